"""What the model of one family has to do: the protocol that embedders and training share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from mmrag.content import Content, Modality


class Inputs(Protocol):
    """One item, ready for the model: what a Backbone's ``prepare`` returns."""

    @property
    def n_tokens(self) -> int:
        """Length of the sequence the decoder sees, visual tokens included."""
        ...


class Backbone(Protocol):
    """One model family: its prompt, image rule, positions, pooling and end token.

    ``prepare`` runs on the CPU in threads; ``forward`` runs the model, differentiably, and is
    the very function that training uses.
    """

    family: str
    dim: int
    modalities: frozenset[Modality]
    model: torch.nn.Module

    def cost(self, content: Content, instruction: str | None) -> int:
        """Number of tokens, visual ones included, without decoding any image."""
        ...

    def prepare(self, content: Content, instruction: str | None) -> Inputs:
        """Token ids and pixels of one item. Raises ContentError if it cannot be used."""
        ...

    def forward(self, batch: Sequence[Any]) -> Tensor:
        """Pooled vectors of shape (len(batch), dim), not normalised, on the model's device."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything besides the weights that moves vectors: limits, prompts, pooling."""
        ...
