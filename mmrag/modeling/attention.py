"""Attention without a plan for each shape.

On the Hopper and Blackwell generations, PyTorch prefers the attention of cuDNN, which builds a plan
for every shape that it has not met. Batches of texts, or of pages with their texts, hardly ever
have the shape of an earlier one, and the plan takes longer than the attention. Flash attention
needs no plan. It may be slower on long sequences, which a decoder hardly notices: at the length of
a page, attention is a hundredth of its work. Towers of Qwen-VL have their own, in ``vision``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLANLESS = "mmrag_planless"
"""The implementation's name, for ``attn_implementation`` of transformers."""

_HALF = (torch.bfloat16, torch.float16)
_MOST_DIM = 256  # of a head, in flash attention


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as ``sdpa`` of transformers, by flash attention where it can be.

    Args:
        query: (batch, heads, length, head dim).
        key, value: (batch, key heads, length, head dim).

    Returns:
        (batch, length, heads, head dim).
    """
    if not _takes(query, key, attention_mask, others):
        others |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return attended, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # What scaled_dot_product_attention calls once it has chosen flash attention. Its context
    # manager for choosing acts on all threads, of which others may be at their own batches.
    attended = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, dropout, bool(causal), scale=scaling
    )[0]
    return attended.transpose(1, 2).contiguous(), None


def _takes(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, others: dict[str, Any]
) -> bool:
    """Whether flash attention gives what ``sdpa`` does: no mask, and keys of the queries alone."""
    plain = attention_mask is None and all(
        others.get(name) is None for name in ("position_bias", "cache", "softcap")
    )
    return plain and query.shape[2] == key.shape[2] and _has_kernel(query)


def _has_kernel(query: Tensor) -> bool:
    dim = query.shape[-1]
    return query.is_cuda and query.dtype in _HALF and dim % 8 == 0 and dim <= _MOST_DIM


def has_flash(device: torch.device) -> bool:
    """Whether PyTorch has flash attention for a device: CUDA, from the Ampere generation on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    available = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


AttentionInterface.register(PLANLESS, attend)
AttentionMaskInterface.register(PLANLESS, sdpa_mask)
