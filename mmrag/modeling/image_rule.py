"""The image rule of the Qwen-VL families: sizes of images, and how they are normalised. No torch.

An image is resized so that both sides are multiples of ``patch * merge`` pixels and its area
keeps two bounds. Source: Qwen2-VL (arXiv 2409.12191, section 2.1) and its published image
processor.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from mmrag.errors import ContentError, ModelError
from mmrag.modeling.checkpoints import read_json

MAX_ASPECT = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, slots=True)
class ImageRule:
    """How a family turns an image into patches; pixel bounds are areas, in pixels."""

    min_pixels: int
    max_pixels: int
    patch: int = 14
    merge: int = 2
    temporal: int = 2
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @property
    def factor(self) -> int:
        """Side of the square that becomes one visual token, in pixels."""
        return self.patch * self.merge

    def with_tokens(self, least: int | None, most: int | None) -> ImageRule:
        """Bound images by visual tokens instead; ``None`` leaves a bound as it is."""
        area = self.factor**2
        return replace(
            self,
            min_pixels=self.min_pixels if least is None else least * area,
            max_pixels=self.max_pixels if most is None else most * area,
        )

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height that an image of this size is resized to."""
        return smart_resize(width, height, self.factor, self.min_pixels, self.max_pixels)

    def n_tokens(self, width: int, height: int) -> int:
        """Visual tokens of an image that already has a size given by ``size``."""
        return (width // self.factor) * (height // self.factor)


def read_image_rule(folder: Path) -> ImageRule:
    """Read the rule from a checkpoint's processor file, in any form it was published in.

    Raises:
        ModelError: If the file is missing.
    """
    # Newer checkpoints keep all their processors in one file.
    joint = read_json(folder / "processor_config.json").get("image_processor")
    config = read_json(folder / "preprocessor_config.json") or joint
    if not config:
        raise ModelError(
            f"{folder}: preprocessor_config.json is missing; the checkpoint is incomplete."
        )
    size = config.get("size") or {}
    # Three generations of names; the last numbers are the defaults of Qwen2-VL's processor.
    least = config.get("min_pixels") or size.get("shortest_edge") or 56 * 56
    most = config.get("max_pixels") or size.get("longest_edge") or 28 * 28 * 1280
    return ImageRule(
        min_pixels=least,
        max_pixels=most,
        patch=config.get("patch_size", 14),
        merge=config.get("merge_size", 2),
        temporal=config.get("temporal_patch_size", 2),
        mean=tuple(config.get("image_mean", CLIP_MEAN)),
        std=tuple(config.get("image_std", CLIP_STD)),
    )


def smart_resize(
    width: int, height: int, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """Nearest size whose sides are multiples of ``factor`` and whose area is within the bounds.

    Raises:
        ContentError: If one side is more than 200 times the other.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ContentError(
            f"an image of {width}x{height} is too long and thin: one side may be at most "
            f"{MAX_ASPECT} times the other; crop it."
        )
    # Python's round, half to even, as the published code has it.
    w = max(factor, round(width / factor) * factor)
    h = max(factor, round(height / factor) * factor)
    if w * h > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        w = max(factor, math.floor(width / scale / factor) * factor)
        h = max(factor, math.floor(height / scale / factor) * factor)
    elif w * h < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        w = math.ceil(width * scale / factor) * factor
        h = math.ceil(height * scale / factor) * factor
    return w, h
