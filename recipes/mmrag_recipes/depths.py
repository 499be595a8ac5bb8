"""2-D Matryoshka: vectors after inner layers, trained beside those after the last.

A fixed list of pairs of layers and width, small to large, with the loss of each at every step
(Starbucks, arXiv 2410.13230). What a pair gives is what ``load_embedder(layers=n)``
gives: the states after layer n, through the decoder's final norm and the family's pooling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mmrag.embedders.base import check_dim
from mmrag.errors import ConfigError
from mmrag.modeling.backbone import Backbone
from mmrag.modeling.depth import check_layers, decoder_of

Pairs = Sequence[tuple[int, int]]
"""Layers of the decoder, and the width of the vectors after them."""


def check_pairs(pairs: Pairs, backbone: Backbone) -> None:
    """Refuse pairs that the model does not have.

    Raises:
        ConfigError: For a family without a decoder, and for a number of layers or a width out of
            range.
    """
    for layers, width in pairs:
        check_layers(layers, backbone)
        if layers == len(decoder_of(backbone).layers):
            raise ConfigError(
                f"matryoshka_layers: {layers} layers are all that the model has; widths at its "
                "full depth are matryoshka_dims."
            )
        check_dim(width, backbone.dim)


def depths(pairs: Pairs) -> list[int]:
    """The numbers of layers of all pairs, each once, ascending."""
    return sorted({layers for layers, _ in pairs})


def parts(pairs: Pairs, dims: Sequence[int], width: int) -> tuple[list[slice], list[slice]]:
    """Where each size lies in vectors of ``inner_vectors``.

    Args:
        dims: prefixes of the vectors after the last layer.
        width: of the whole, all depths included.

    Returns:
        Slices of prefixes of the last layer's vectors, the full ones last, and of the pairs.
    """
    places = {layers: place for place, layers in enumerate(depths(pairs), start=1)}
    dim = width // (1 + len(places))
    prefixes = [slice(0, each) for each in (*dims, dim)]
    return prefixes, [slice(places[n] * dim, places[n] * dim + kept) for n, kept in pairs]


@contextmanager
def inner_vectors(backbone: Backbone, layers: Sequence[int]) -> Iterator[None]:
    """Let ``forward`` give the vectors after each of ``layers`` beside the last layer's.

    They stand behind them: (batch, (1 + len(layers)) * dim). One pass computes all.
    """
    if not layers:
        yield
        return
    decoder = decoder_of(backbone)
    states: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def before(module: Any, args: tuple[Any, ...]) -> None:
            states[number] = args[0]

        return before

    def widen(norm: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        # Along the width: pooling works on each number alone, whatever it is a part of.
        return torch.cat([output, *(norm.forward(states[number]) for number in layers)], dim=-1)

    # Before the next layer and not after the last: some models add to the states in between.
    hooks = [decoder.layers[n].register_forward_pre_hook(keep(n)) for n in layers]
    hooks.append(decoder.norm.register_forward_hook(widen))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
