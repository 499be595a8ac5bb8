"""Clips for Qwen3-VL: which frames are seen, at which size, and how their times are written.

Two frames together are one image to the tower, under a time of their own in the prompt. At most 64
frames are seen. A frame has from 128 to 768 visual tokens before frames are joined, and all frames
together 15,360, which counts from the 21st frame on.

Source: the published inference code of Qwen3-VL-Embedding (``MAX_FRAMES``, ``MAX_TOTAL_PIXELS``),
``fetch_video`` of qwen-vl-utils 0.0.14 for sizes and resizing, and ``Qwen3VLProcessor`` of
transformers 4.57.3, with which that code was published, for the times. Later releases of the
processor (seen in 5.23) keep the template's own ``<|vision_start|>`` and ``<|vision_end|>`` around
all of a video's frames; 4.57.3 puts the frames in their place, and so does this.

That code reads a list of frames otherwise than a video file: it takes two frames for a second, and
resizes them to multiples of 64 pixels first. Clips follow what it does with files; for those it
sets no bound on all frames, so that longer clips than this bound allows are over ``max_length``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmrag.content import Clip, Content, image_size, load_image
from mmrag.errors import ContentError
from mmrag.modeling.image_rule import smart_resize
from mmrag.modeling.qwen_images import pixels_of

VIDEO = "<|video_pad|>"
FRAME_BLOCK = f"<|vision_start|>{VIDEO}<|vision_end|>"
MAX_FRAMES = 64
MIN_FRAME_TOKENS = 128
MAX_FRAME_TOKENS = 768
# Ten frames of the largest size, doubled in ``fetch_video``, since two frames become one.
MAX_CLIP_TOKENS = 2 * 10 * MAX_FRAME_TOKENS


def with_even_clip(content: Content) -> Content:
    """A content whose clip has an even number of frames, at most ``MAX_FRAMES``.

    More are thinned out evenly; of an odd number the last stands twice.
    """
    if content.clip is None:
        return content
    frames, seconds = content.clip.frames, content.clip.seconds
    places = list(range(len(frames)))
    if len(frames) > MAX_FRAMES:
        places = np.linspace(0, len(frames) - 1, MAX_FRAMES, dtype=int).tolist()
    places += places[-1:] * (len(places) % 2)
    clip = Clip([frames[place] for place in places], [seconds[place] for place in places])
    return replace(content, clip=clip)


def clip_prompt(clip: Clip | None) -> str:
    """The time of each pair of frames, the mean of both, with a placeholder for the pair."""
    if clip is None:
        return ""
    times = [(a + b) / 2 for a, b in zip(clip.seconds[::2], clip.seconds[1::2], strict=True)]
    return "".join(f"<{time:.1f} seconds>{FRAME_BLOCK}" for time in times)


def pair_sizes(clip: Clip | None, factor: int) -> tuple[tuple[int, int], ...]:
    """Width and height in pixels that each pair of frames is seen in, the same for all.

    Args:
        factor: side of the square that becomes one visual token, in pixels.

    Raises:
        ContentError: For frames of different sizes.
    """
    if clip is None:
        return ()
    sizes = {image_size(frame) for frame in clip.frames}
    if len(sizes) > 1:
        raise ContentError(
            f"the frames of a clip must have one size, got {sorted(sizes)}; resize them to one."
        )
    area = factor**2
    least = MIN_FRAME_TOKENS * area
    share = MAX_CLIP_TOKENS * area / len(clip.frames)
    most = max(min(MAX_FRAME_TOKENS * area, share), int(least * 1.05))
    return (smart_resize(*sizes.pop(), factor, least, most),) * (len(clip.frames) // 2)


def pair_pixels(clip: Clip | None, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Pixels of each pair of frames, (2, height, width, 3), uint8, in the first of ``sizes``."""
    if clip is None:
        return []
    frames = [resize_frame(pixels_of(load_image(frame)), sizes[0]) for frame in clip.frames]
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
