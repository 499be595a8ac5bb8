"""From an image to the patches of the Qwen-VL families, by an ``ImageRule``.

An image is resized to the rule's size, then normalised and cut into patches, ``merge x merge``
neighbours together.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrag.modeling.image_rule import ImageRule


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize with the bicubic filter, which all Qwen-VL reference code uses."""
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def pixels_of(image: Image.Image) -> Tensor:
    """Pixels of an RGB image, (height, width, 3), uint8."""
    return torch.from_numpy(np.array(image, dtype=np.uint8))


def cut_patches(pixels: Tensor, rule: ImageRule) -> Tensor:
    """Normalise images of one size and cut them into patches, on the device they are on.

    Args:
        pixels: (images, height, width, 3), uint8, sized by ``rule.size``; or pairs of frames of
            a clip, (pairs, ``rule.temporal``, height, width, 3).

    Returns:
        (images * rows * columns, 3 * temporal * patch * patch), float32, in the order of the
        merger.
    """
    # Divided by tensors: torch multiplies by the reciprocal of a number on CUDA, which rounds
    # otherwise than the published processors do.
    white = torch.tensor(255, dtype=torch.float32, device=pixels.device)
    mean = torch.tensor(rule.mean, dtype=torch.float32, device=pixels.device)
    std = torch.tensor(rule.std, dtype=torch.float32, device=pixels.device)
    normalised = (pixels.float() / white - mean) / std
    n, height, width = len(pixels), *pixels.shape[-3:-1]
    m, p = rule.merge, rule.patch
    rows, columns = height // p, width // p
    blocks = normalised.view(n, -1, rows // m, m, p, columns // m, m, p, 3)
    blocks = blocks.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # (n, R/m, C/m, m, m, 3, frames, p, p)
    # A still image fills every frame of the temporal patch.
    frames = blocks.expand(-1, -1, -1, -1, -1, -1, rule.temporal, -1, -1)
    return frames.reshape(n * rows * columns, -1)


def to_patches(image: Image.Image, rule: ImageRule) -> tuple[Tensor, tuple[int, int, int]]:
    """Patches of one RGB image, sized by ``rule.size``, and its grid (1, rows, columns)."""
    grid = (1, image.height // rule.patch, image.width // rule.patch)
    return cut_patches(pixels_of(image).unsqueeze(0), rule), grid
