"""Qwen3-VL-Embedding: the chat template, three-axis positions, DeepStack, the last token.

The instruction stands in the system turn with a full stop added, images come before the text,
and the newline after ``assistant`` is pooled, as in the released code; the paper speaks of
another end token, which gives other vectors (cosine 0.46). A content without text and image
becomes ``NULL`` in that code; here ``Content`` refuses to be empty.

A clip comes before the images, each pair of frames under a time of its own. At most 64 frames are
seen. A frame has from 128 to 768 visual tokens before frames are joined, and all frames together
15,360, which counts from the 21st frame on.

Source: Qwen3-VL-Embedding (arXiv 2601.04720) and its published inference code (``MAX_FRAMES``,
``MAX_TOTAL_PIXELS``); for clips ``fetch_video`` of qwen-vl-utils 0.0.14, and ``Qwen3VLProcessor``
of transformers 4.57.3, with which that code was published, for the times. Later releases of the
processor (seen in 5.23) keep the template's own ``<|vision_start|>`` and ``<|vision_end|>`` around
all of a video's frames; 4.57.3 puts the frames in their place, and so does this. For a list of
frames that code sets no bound on all of them; here the one of files holds.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

from transformers import Qwen3VLModel

from mmrag.content import Clip, Content
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_clips import VIDEO_BLOCK, ClipRule
from mmrag.modeling.qwen_vl import IMAGE_BLOCK, QwenBackbone, Recipe, as_it_is, load_qwen

DEFAULT_INSTRUCTION = "Represent the user's input."
# The published code resizes to these bounds, whatever the checkpoint's processor file says.
MIN_IMAGE_TOKENS = 4
MAX_IMAGE_TOKENS = 1800
_TOKEN = 32 * 32  # pixels
CLIPS = ClipRule(
    max_frames=64,
    frame=(128 * _TOKEN, 768 * _TOKEN),
    # Ten frames of the largest size, doubled in ``fetch_video``, since two frames become one.
    total=2 * 10 * 768 * _TOKEN,
    as_images=False,
)


def embedding_prompt(content: Content, instruction: str | None) -> Prompt:
    """The literal prompt: a system turn with the instruction; clip, images, text."""
    task = (instruction or "").strip() or DEFAULT_INSTRUCTION
    # As published: a full stop, unless the instruction ends in any sign of Unicode category P.
    task = task if unicodedata.category(task[-1]).startswith("P") else f"{task}."
    system = f"<|im_start|>system\n{task}<|im_end|>\n"
    seen = timed_frames(content.clip) + IMAGE_BLOCK * len(content.images)
    return Prompt(
        before=f"{system}<|im_start|>user\n{seen}",
        text=content.text or "",
        after="<|im_end|>\n<|im_start|>assistant\n",
    )


def timed_frames(clip: Clip | None) -> str:
    """The time of each pair of frames, the mean of both, with a placeholder for the pair."""
    if clip is None:
        return ""
    times = [(a + b) / 2 for a, b in zip(clip.seconds[::2], clip.seconds[1::2], strict=True)]
    return "".join(f"<{time:.1f} seconds>{VIDEO_BLOCK}" for time in times)


def load_qwen3_vl(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    keep_end: bool = False,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> QwenBackbone:
    """Load Qwen3-VL-Embedding-2B/8B, or any checkpoint of that shape.

    The published code cuts an over-long text together with the end of the template and pools
    the last word that is left. ``keep_end`` cuts the text alone: other vectors than the
    published code, nearer to those of texts that fit.
    """
    recipe = Recipe(
        "qwen3_vl",
        embedding_prompt,
        as_it_is,
        max_length,
        # It was trained on several images in one item; max_length bounds them.
        max_images=sys.maxsize,
        mrope=True,
        keep_end=keep_end,
        clips=CLIPS,
    )
    least = MIN_IMAGE_TOKENS if min_image_tokens is None else min_image_tokens
    most = MAX_IMAGE_TOKENS if max_image_tokens is None else max_image_tokens
    return load_qwen(folder, placement, recipe, least, most, model_class=Qwen3VLModel)
