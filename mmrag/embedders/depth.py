"""Loading a model with fewer layers: which depths it was trained for, and at which widths."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmrag.errors import ConfigError
from mmrag.modeling.backbone import Backbone
from mmrag.modeling.depth import check_layers, decoder_of, keep_layers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cut:
    """What vectors of a model with fewer layers are.

    dim: length of the full vector. trained: lengths it was trained for; none: not known.
    """

    dim: int
    trained: tuple[int, ...]


def cut_depth(
    backbone: Backbone, layers: int | None, about: Mapping[str, Any], name: str
) -> Cut | None:
    """Leave out the layers of a backbone after the first ``layers``.

    Args:
        about: what the checkpoint says of itself; ``matryoshka_layers`` are the pairs of layers
            and width that it was trained for.

    Returns:
        None where all layers run.

    Raises:
        ConfigError: For a family without a decoder, a number of layers that it does not have, or
            one that it was not trained for.
    """
    if layers is None:
        return None
    check_layers(layers, backbone)
    full = len(decoder_of(backbone).layers)
    if layers == full:
        return None
    pairs = [(int(depth), int(width)) for depth, width in about.get("matryoshka_layers") or ()]
    widths = sorted(width for depth, width in pairs if depth == layers)
    if pairs and not widths:
        depths = ", ".join(map(str, sorted({depth for depth, _ in pairs} | {full})))
        raise ConfigError(f"layers={layers}: this model was trained for {depths} layers.")
    if not pairs:
        # Of most checkpoints nothing is known; where it is, it is in mmrag.json.
        logger.warning(
            "%s: not known to be trained for fewer layers; its vectors after layer %d of %d may "
            "be of little use. Measure them first.",
            name,
            layers,
            full,
        )
    keep_layers(backbone, layers)
    return Cut(widths[-1] if widths else backbone.dim, tuple(widths))
