"""Attention without a plan for each shape.

On the Hopper and Blackwell generations, PyTorch prefers the attention of cuDNN, which builds a plan
for every shape that it has not met. Batches of texts, or of pages with their texts, hardly ever
have the shape of an earlier one, and the plan takes longer than the attention. Flash attention
needs no plan. It may be slower on long sequences, which a decoder hardly notices: at the length of
a page, attention is a hundredth of its work. Towers of Qwen-VL have their own, in ``vision``.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PLANLESS = "mmrag_planless"
"""The implementation's name, for ``attn_implementation`` of transformers."""

_cuda: Any = torch.backends.cuda  # whose functions have no types
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
    """Attention as ``sdpa`` of transformers: by flash attention, or with a mask by another kernel.

    Args:
        query: (batch, heads, length, head dim).
        key, value: (batch, key heads, length, head dim).

    Returns:
        (batch, length, heads, head dim).
    """
    if not _takes(query, key, attention_mask, others):
        others |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        with planless(query.device):
            attended, _ = sdpa_attention_forward(
                module, query, key, value, attention_mask, **others
            )
        return attended, None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # What scaled_dot_product_attention calls once it has chosen flash attention.
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


class _WithoutCudnn:
    """Keeps cuDNN out while any thread is inside: PyTorch has one setting for all of a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._usual = _cuda.cudnn_sdp_enabled()
                # Where it is the one kernel left, as in sdpa_kernel, it is what the user wants.
                _cuda.enable_cudnn_sdp(self._usual and not _others_enabled())
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                _cuda.enable_cudnn_sdp(self._usual)


def _others_enabled() -> bool:
    others = (_cuda.flash_sdp_enabled, _cuda.mem_efficient_sdp_enabled, _cuda.math_sdp_enabled)
    return any(enabled() for enabled in others)


_without_cudnn = _WithoutCudnn()


def planless(device: torch.device) -> AbstractContextManager[None]:
    """Keep cuDNN's attention out on CUDA.

    The attention of other threads may meanwhile be another kernel's, with the same results.
    """
    # The compiler writes the kernel down that it finds when it compiles.
    if device.type != "cuda" or torch.compiler.is_compiling():
        return nullcontext()
    return _without_cudnn


AttentionInterface.register(PLANLESS, attend)
AttentionMaskInterface.register(PLANLESS, sdpa_mask)
