"""Three-axis positions of the Qwen-VL families."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def mrope_positions(ids: Sequence[int], image_id: int, grids: Iterable[Sequence[int]]) -> Tensor:
    """Three-axis positions: time, row, column (Qwen2-VL, arXiv 2409.12191, section 2.1).

    A text token has one number on all axes. The tokens of an image share one time and lie in
    a grid; what follows goes on after the largest number used.

    Args:
        ids: of one item, images widened.
        grids: rows and columns of each image, in visual tokens.

    Returns:
        (3, len(ids)), int64.
    """
    positions = torch.arange(len(ids)).repeat(3, 1)
    place = lag = 0
    for rows, columns in grids:
        place = ids.index(image_id, place)
        inside = torch.arange(rows * columns)
        grid = torch.stack([torch.zeros_like(inside), inside // columns, inside % columns])
        positions[:, place : place + len(inside)] = grid + (place - lag)
        place += len(inside)
        # An image takes fewer numbers than tokens: what follows it goes on from its longer side.
        lag += len(inside) - max(rows, columns)
        positions[:, place:] = torch.arange(place, len(ids)) - lag
    return positions
