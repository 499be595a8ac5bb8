"""WeMM-Embedding: Qwen3.5 as an embedder, pooled at a token of its own.

The chat template has no system turn and no generation prompt and ends in ``<embedding>``; with a
image first, not even a newline stands after ``user``. An instruction stands in the user turn,
before the text, as in the published evaluation.

Sources: WeMM-Embedding (arXiv 2608.24053), its model cards and its published evaluation code.
The published code runs on transformers 5.2, and resizes an image that is still outside the
processor's bounds a second time with torchvision; here both times it is Pillow that resizes.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import Qwen3_5Model

from mmrag.content import Content
from mmrag.errors import ModelError
from mmrag.modeling.image_rule import smart_resize
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_vl import IMAGE_BLOCK, QwenBackbone, Recipe, load_qwen

EMBEDDING = "<embedding>"


def wemm_prompt(content: Content, instruction: str | None) -> Prompt:
    """The literal prompt: one user turn, images first, and the token that is pooled."""
    text = content.text or ""
    opening = IMAGE_BLOCK * len(content.images) or "\n"
    task = instruction or ""
    return Prompt(
        before=f"<|im_start|>user{opening}{task}{' ' if task and text else ''}",
        text=text,
        after=f"<|im_end|>{EMBEDDING}",
    )


def fetch_size(width: int, height: int) -> tuple[int, int]:
    """Size after ``fetch_image`` of the published code, which runs before the processor."""
    return smart_resize(width, height, 32, 4 * 32 * 32, 16384 * 32 * 32)


def load_wemm(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 32768,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> QwenBackbone:
    """Load WeMM-Embedding-2B/4B/9B; bounds of None are the checkpoint's own.

    Raises:
        ModelError: If the tokenizer lacks the token that the vector is read at.
    """
    recipe = Recipe("wemm", wemm_prompt, fetch_size, max_length, max_images=sys.maxsize, mrope=True)
    backbone = load_qwen(
        folder,
        placement,
        recipe,
        min_image_tokens,
        max_image_tokens,
        model_class=Qwen3_5Model,
        # The heads for the next token, and for several at once, are not needed to embed.
        unused=("lm_head.", "mtp."),
    )
    # Without the token, it would be cut into pieces and the vector taken from the last one.
    if EMBEDDING not in backbone.tokenizer.get_vocab():
        raise ModelError(f"{folder}: its tokenizer has no {EMBEDDING}; it is no WeMM-Embedding.")
    return backbone
