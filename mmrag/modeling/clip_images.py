"""Images for CLIP towers, which see squares of one size: squashing, cutting into tiles.

An image becomes one view of the whole, squashed to a square, and in most families tiles of a
larger version of it. A tile's patches are its features, in rows; the rows of all tiles together
make the feature map of the image.
Source: LLaVA-NeXT's "anyres" and its published image processor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmrag.content import Content, ImageSource
from mmrag.errors import ContentError, ModelError
from mmrag.modeling.checkpoints import read_json
from mmrag.modeling.image_rule import CLIP_MEAN, CLIP_STD
from mmrag.modeling.qwen_images import pixels_of

# Weights of towers are published one level deeper than transformers has them since 5.6; not
# every release renames them by itself.
TOWER_NAMES = {r"(vision_tower|img_processor)\.vision_model\.": r"\1."}


@dataclass(frozen=True, slots=True)
class ClipRule:
    """How a family shows images to its tower.

    side: of a tile, in pixels. patch: side of what becomes one feature, in pixels.
    grids: (height, width) in pixels of the images that may be cut into tiles.
    """

    side: int
    patch: int
    grids: tuple[tuple[int, int], ...] = ()
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    @property
    def across(self) -> int:
        """Features in a row of a tile."""
        return self.side // self.patch

    def normalise(self, pixels: Tensor) -> Tensor:
        """Scale and normalise (images, 3, height, width), uint8, to float32, on their device."""
        # Divided by tensors, not by numbers: see ``qwen_images.cut_patches``.
        white = torch.tensor(255, dtype=torch.float32, device=pixels.device)
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / white - mean) / std

    def whole(self, image: Image.Image) -> Tensor:
        """The image squashed to one square view, (1, 3, side, side), uint8."""
        squashed = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return channels_first(squashed).unsqueeze(0)

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) among ``grids`` that keeps most of an image and wastes least."""

        def kept_and_spared(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            # The second counts between grids that keep the same: the least black border.
            return kept, kept - grid[0] * grid[1]

        return max(self.grids, key=kept_and_spared)

    def anyres(self, image: Image.Image) -> Tensor:
        """The whole view, then the tiles of the image on black: (tiles, 3, side, side), uint8."""
        width, height = image.size
        grid_height, grid_width = self.grid(width, height)
        if grid_width / width < grid_height / height:
            size = grid_width, min(math.ceil(height * (grid_width / width)), grid_height)
        else:
            size = min(math.ceil(width * (grid_height / height)), grid_width), grid_height
        canvas = Image.new("RGB", (grid_width, grid_height))
        corner = (grid_width - size[0]) // 2, (grid_height - size[1]) // 2
        canvas.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
        return torch.cat([self.whole(image), cut(channels_first(canvas), self.side)])

    def inner(self, width: int, height: int) -> tuple[slice, slice]:
        """Rows and columns of the feature map that show the image and not its black border."""
        grid = self.grid(width, height)
        rows, columns = grid[0] // self.patch, grid[1] // self.patch
        # Rounded as published: 7 digits, and the same border cut off at both ends.
        if width / height > columns / rows:
            border = (rows - int(round(height * (columns / width), 7))) // 2
            return slice(border, rows - border), slice(0, columns)
        border = (columns - int(round(width * (rows / height), 7))) // 2
        return slice(0, rows), slice(border, columns - border)


def read_clip_rule(folder: Path, patch: int) -> ClipRule:
    """Read the rule from a checkpoint's ``preprocessor_config.json``.

    Raises:
        ModelError: If the file is missing.
    """
    config = read_json(folder / "preprocessor_config.json")
    if not config:
        raise ModelError(
            f"{folder}: preprocessor_config.json is missing; the checkpoint is incomplete."
        )
    crop: Any = config.get("crop_size", 336)
    return ClipRule(
        side=crop["height"] if isinstance(crop, dict) else crop,
        patch=patch,
        grids=tuple((h, w) for h, w in config.get("image_grid_pinpoints", ())),
        mean=tuple(config.get("image_mean", CLIP_MEAN)),
        std=tuple(config.get("image_std", CLIP_STD)),
    )


def channels_first(image: Image.Image) -> Tensor:
    """Pixels of an RGB image, (3, height, width), uint8."""
    return pixels_of(image).permute(2, 0, 1)


def cut(pixels: Tensor, side: int) -> Tensor:
    """Cut (channels, height, width) into squares, row by row: (tiles, channels, side, side)."""
    channels, height, width = pixels.shape
    rows = pixels.view(channels, height // side, side, width // side, side)
    return rows.permute(1, 3, 0, 2, 4).reshape(-1, channels, side, side)


def join(features: Tensor, rows: int, columns: int) -> Tensor:
    """Join features of tiles into a map: (tiles, n * n, dim) to (rows * n, columns * n, dim)."""
    n, dim = math.isqrt(features.shape[1]), features.shape[2]
    tiled = features.view(rows, columns, n, n, dim)
    return tiled.permute(0, 2, 1, 3, 4).reshape(rows * n, columns * n, dim)


def tower_features(tower: Any, pixels: Tensor, layer: int) -> Tensor:
    """States of a CLIP tower after ``layer``, without the class token: (tiles, n * n, dim).

    ``pixels`` are normalised, (tiles, 3, side, side).
    Layers count as hidden states do: 0 is before the first, -1 after the last.
    """
    # Asking the tower for its hidden states would leave hooks in it that cannot be pickled.
    hidden: Tensor = tower.embeddings(pixels.to(tower.device, tower.dtype))
    hidden = tower.pre_layrnorm(hidden)
    layers = tower.encoder.layers
    for block in layers[: layer if layer >= 0 else len(layers) + 1 + layer]:
        hidden = block(hidden, None)
    return hidden[:, 1:]


def place_features(embeds: Tensor, places: Tensor, features: Sequence[Tensor]) -> Tensor:
    """Put the features of images, in order, where ``places`` (batch, length) is true."""
    if not features:
        return embeds
    flat = torch.cat(list(features)).to(embeds.device, embeds.dtype)
    return embeds.masked_scatter(places.unsqueeze(-1).expand_as(embeds), flat)


def only_image(content: Content, family: str) -> ImageSource | None:
    """The image of a content, if it has one. Raises ContentError for several, and for a clip."""
    if content.clip is not None:
        raise ContentError(f"{family} takes no clips: give one of the frames as an image.")
    if len(content.images) > 1:
        raise ContentError(
            f"{family} takes 1 image per item, got {len(content.images)}; embed them one by one."
        )
    return content.images[0] if content.images else None
