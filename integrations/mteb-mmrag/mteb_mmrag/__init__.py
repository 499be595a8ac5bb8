"""mmrag's embedders as models of mteb, by object and by name."""

from mmrag.evaluation.mteb_encoder import MTEBEncoder
from mteb_mmrag.registry import register

__all__ = ["MTEBEncoder", "register"]
