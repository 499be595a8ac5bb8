"""Running the first layers of a decoder alone: faster, at the quality it was trained for.

2-D Matryoshka training (Starbucks, arXiv 2410.13230) makes the states of some inner
layers usable as vectors: they go through the decoder's final norm and the family's pooling, as
those of the last layer do.
"""

from __future__ import annotations

from typing import Any

from mmrag.errors import ConfigError
from mmrag.modeling.backbone import Backbone


def decoder_of(backbone: Backbone) -> Any:
    """The decoder of a backbone, with ``layers`` and ``norm``.

    Raises:
        ConfigError: If the family has none, or does more with its states than pool them.
    """
    decoder = getattr(backbone, "decoder", None)
    if decoder is None:
        raise ConfigError(
            f"Layers cannot be left out in family {backbone.family!r}: its vectors are not the "
            "pooled states of a decoder."
        )
    return decoder


def check_layers(layers: int, backbone: Backbone) -> None:
    """Raise ConfigError for a number of layers that the decoder does not have."""
    full = len(decoder_of(backbone).layers)
    if not 1 <= layers <= full:
        raise ConfigError(f"layers={layers} is not possible: this model has {full} layers.")


def keep_layers(backbone: Backbone, layers: int) -> None:
    """Drop all layers after the first ``layers``; the final norm stays.

    Raises:
        ConfigError: For a family without a decoder, or a number of layers it does not have.
    """
    check_layers(layers, backbone)
    decoder = decoder_of(backbone)
    decoder.layers = decoder.layers[:layers]
