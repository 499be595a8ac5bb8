"""From the states of a sequence to one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def last_token(hidden: Tensor, mask: Tensor) -> Tensor:
    """State of the last real token of each row, for left or right padding.

    Args:
        hidden: (batch, length, dim).
        mask: (batch, length), 1 for real tokens.

    Returns:
        (batch, dim).
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    # By position and not by count, so that it holds for padding on either side.
    last = (mask * positions).argmax(dim=1)  # (batch,)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


def mean_tokens(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states of the real tokens of each row; shapes as in ``last_token``."""
    weights = mask.to(hidden.dtype).unsqueeze(-1)  # (batch, length, 1)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
