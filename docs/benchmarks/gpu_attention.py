"""Attention on shapes that are new, and on those that are not, by who chooses its kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_table import Table, timed

from mmrag.modeling.attention import PLANLESS, attend

N_SHAPES = 8
HEADS, KEY_HEADS, HEAD_DIM, BATCH = 12, 2, 128, 8  # as of GME-2B's decoder


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    """Let the decoder of a model attend by another implementation."""
    config = model.language_model.config
    own, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = own


def by_shape(table: Table, device: torch.device) -> None:
    """One layer's attention forward and backward: on new lengths, and on the same again."""
    table.head(f"Attention of a decoder's layer, {BATCH} sequences of 300 and more tokens, causal")
    longest = 300 if device.type == "cuda" else 16
    layer = torch.nn.Module()
    layer.num_key_value_groups = HEADS // KEY_HEADS  # type: ignore[assignment]
    chosen = torch.nn.functional.scaled_dot_product_attention

    def of_torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return chosen(query, key, value, is_causal=True, enable_gqa=True)

    def own(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attend(layer, query, key, value, None)[0]

    for start, (name, run) in enumerate((("as torch chooses", of_torch), (PLANLESS, own)), longest):
        step(run, device, longest - 1)  # sets the libraries up
        # Odd lengths for one, and even ones for the other.
        shapes = range(start, start + 2 * N_SHAPES, 2)
        first = f"attention, {name}, new lengths"
        for what in (first, f"attention, {name}, the same again"):
            table.line(
                what,
                "ms",
                10 if device.type == "cuda" else 1,
                lambda run=run, shapes=shapes: mean_ms(run, device, shapes),
                against=first,
            )


def mean_ms(run: Callable[..., torch.Tensor], device: torch.device, lengths: range) -> float:
    """Milliseconds of a forward and a backward run, on average over the lengths."""
    seconds = [timed(lambda length=length: step(run, device, length)) for length in lengths]
    return 1e3 * sum(seconds) / len(seconds)


def step(run: Callable[..., torch.Tensor], device: torch.device, length: int) -> None:
    """Attention within ``BATCH`` sequences, with the gradients of all three inputs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = [
        torch.randn(
            BATCH, length, heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True
        ).transpose(1, 2)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    ]
    run(*inputs).sum().backward()  # type: ignore[no-untyped-call]
