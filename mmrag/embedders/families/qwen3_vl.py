"""Qwen3-VL-Embedding: the chat template, three-axis positions, DeepStack, the last token.

The instruction stands in the system turn with a full stop added, images come before the text,
and the newline after ``assistant`` is pooled, as in the released code; the paper speaks of
another end token, which gives other vectors (cosine 0.46). A content without text and image
becomes ``NULL`` in that code; here ``Content`` refuses to be empty. A clip comes before the images;
see ``mmrag.modeling.qwen_clips``.

Source: Qwen3-VL-Embedding (arXiv 2601.04720) and its published inference code.
"""

from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

from transformers import Qwen3VLModel

from mmrag.content import Content, Modality
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_clips import clip_prompt
from mmrag.modeling.qwen_vl import IMAGE_BLOCK, QwenBackbone, Recipe, as_it_is, load_qwen

DEFAULT_INSTRUCTION = "Represent the user's input."
# The published code resizes to these bounds, whatever the checkpoint's processor file says.
MIN_IMAGE_TOKENS = 4
MAX_IMAGE_TOKENS = 1800
MODALITIES: frozenset[Modality] = frozenset({"text", "image", "fused", "clip"})


def embedding_prompt(content: Content, instruction: str | None) -> Prompt:
    """The literal prompt: a system turn with the instruction; clip, images, text."""
    task = (instruction or "").strip() or DEFAULT_INSTRUCTION
    # As published: a full stop, unless the instruction ends in any sign of Unicode category P.
    task = task if unicodedata.category(task[-1]).startswith("P") else f"{task}."
    system = f"<|im_start|>system\n{task}<|im_end|>\n"
    seen = clip_prompt(content.clip) + IMAGE_BLOCK * len(content.images)
    return Prompt(
        before=f"{system}<|im_start|>user\n{seen}",
        text=content.text or "",
        after="<|im_end|>\n<|im_start|>assistant\n",
    )


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
    )
    least = MIN_IMAGE_TOKENS if min_image_tokens is None else min_image_tokens
    most = MAX_IMAGE_TOKENS if max_image_tokens is None else max_image_tokens
    return load_qwen(
        folder, placement, recipe, least, most, modalities=MODALITIES, model_class=Qwen3VLModel
    )
