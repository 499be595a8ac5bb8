"""Content -> vector: multimodal embedders, free of LlamaIndex and Qdrant.

``load_embedder`` loads one by name. A family is one file in ``families`` and one row of
``registry.FAMILIES``.
"""

from mmrag.embedders.base import Calibration, Embedder, calibration_of
from mmrag.embedders.known import KNOWN, KnownModel
from mmrag.embedders.registry import (
    FAMILIES,
    FamilyOptions,
    all_families,
    load_backbone,
    load_embedder,
)

__all__ = [
    "FAMILIES",
    "KNOWN",
    "Calibration",
    "Embedder",
    "FamilyOptions",
    "KnownModel",
    "all_families",
    "calibration_of",
    "load_backbone",
    "load_embedder",
]
