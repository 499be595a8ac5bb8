"""Clips for the Qwen-VL families: which frames are seen, and at which size.

Two frames together are one image to the tower. What differs between the families that were trained
on videos is data: a ``ClipRule``, and the prompt. Positions are those of the family's images.

Their published code reads a list of frames otherwise than a video file: it takes fixed times, or
resizes by another filter. Clips follow what it does with files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mmrag.content import Clip, Content, image_size, load_image
from mmrag.errors import ContentError
from mmrag.modeling.image_rule import ImageRule, smart_resize
from mmrag.modeling.qwen_images import pixels_of, resize

VIDEO = "<|video_pad|>"
VIDEO_BLOCK = f"<|vision_start|>{VIDEO}<|vision_end|>"


@dataclass(frozen=True, slots=True)
class ClipRule:
    """Which frames of a clip a family sees, and at which size; areas are in pixels.

    max_frames: of more, so many are taken evenly.
    frame: least and most area of a frame after the first resize; None: there is none.
    total: most area of all frames together after it; it never makes a frame smaller than ``frame``
        allows.
    as_images: frames are then resized by the family's rule for images.
    """

    max_frames: int
    frame: tuple[int, int] | None = None
    total: float = math.inf
    as_images: bool = True

    def first_size(self, size: tuple[int, int], n_frames: int, factor: int) -> tuple[int, int]:
        """Width and height of ``n_frames`` frames of a size after the first resize.

        As ``fetch_video`` of qwen-vl-utils has it.
        """
        if self.frame is None:
            return size
        least, most = self.frame
        share = min(most, self.total / n_frames)
        return smart_resize(*size, factor, least, max(share, int(least * 1.05)))


def seen_clip(
    content: Content, rule: ClipRule | None, images: ImageRule
) -> tuple[Content, tuple[tuple[int, int], ...]]:
    """A content with those frames of its clip that are seen, and the size of each pair of them.

    Returns:
        The content, and width and height in pixels of each pair; none without a clip.

    Raises:
        ContentError: For a clip without a rule, and for frames of different sizes.
    """
    if content.clip is None:
        return content, ()
    if rule is None:
        raise ContentError("the model takes no clips: give some of the frames as images.")
    clip = with_even_frames(content.clip, rule.max_frames)
    sizes = {image_size(frame) for frame in clip.frames}
    if len(sizes) > 1:
        raise ContentError(
            f"the frames of a clip must have one size, got {sorted(sizes)}; resize them to one."
        )
    size = rule.first_size(sizes.pop(), len(clip.frames), images.factor)
    size = images.size(*size) if rule.as_images else size
    return replace(content, clip=clip), (size,) * (len(clip.frames) // 2)


def with_even_frames(clip: Clip, most: int) -> Clip:
    """A clip with an even number of frames, at most ``most``.

    More are thinned out evenly; of an odd number the last stands twice.
    """
    places = list(range(len(clip.frames)))
    if len(places) > most:
        places = np.linspace(0, len(places) - 1, most, dtype=int).tolist()
    places += places[-1:] * (len(places) % 2)
    return Clip([clip.frames[place] for place in places], [clip.seconds[place] for place in places])


def pair_pixels(
    clip: Clip | None, rule: ClipRule | None, factor: int, sizes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Pixels of each pair of frames, (2, height, width, 3), uint8, in the first of ``sizes``.

    Args:
        factor: side of the square that becomes one visual token, in pixels.
    """
    if clip is None or rule is None:
        return []
    first = rule.first_size(image_size(clip.frames[0]), len(clip.frames), factor)
    frames = [resize_frame(pixels_of(load_image(frame)), first) for frame in clip.frames]
    if sizes[0] != first:
        frames = [pixels_of(resize(Image.fromarray(each.numpy()), sizes[0])) for each in frames]
    return [torch.stack(frames[place : place + 2]) for place in range(0, len(frames), 2)]


def resize_frame(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as torchvision resizes bytes: in float32 by the bicubic filter, then rounded.

    Args:
        pixels: (height, width, 3), uint8.
        size: width and height, in pixels.
    """
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = pixels.permute(2, 0, 1).unsqueeze(0).float()
    resized = F.interpolate(planes, (height, width), mode="bicubic", antialias=True)
    return resized[0].clamp(0, 255).round().to(torch.uint8).permute(1, 2, 0)
