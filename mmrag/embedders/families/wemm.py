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
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.prompts import Prompt, load_fast_tokenizer
from mmrag.modeling.qwen_images import read_image_rule, smart_resize
from mmrag.modeling.qwen_vl import IMAGE, Qwen2VLBackbone, Recipe, use_matmul_patch_embed

EMBEDDING = "<embedding>"
_IMAGE_BLOCK = f"<|vision_start|>{IMAGE}<|vision_end|>"


def wemm_prompt(content: Content, instruction: str | None) -> Prompt:
    """The literal prompt: one user turn, images first, and the token that is pooled."""
    text = content.text or ""
    opening = _IMAGE_BLOCK * len(content.images) or "\n"
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
) -> Qwen2VLBackbone:
    """Load WeMM-Embedding-2B/4B/9B; bounds of None are the checkpoint's own."""
    tokenizer = load_fast_tokenizer(folder)
    if EMBEDDING not in tokenizer.get_vocab():
        raise ModelError(f"{folder}: its tokenizer has no {EMBEDDING}; it is no WeMM-Embedding.")
    model = load_exact(Qwen3_5Model, folder, placement, unused=("lm_head.", "mtp."))
    use_matmul_patch_embed(model.visual)
    rule = read_image_rule(folder).with_tokens(min_image_tokens, max_image_tokens)
    recipe = Recipe("wemm", wemm_prompt, fetch_size, max_length, max_images=sys.maxsize, mrope=True)
    return Qwen2VLBackbone(model, tokenizer, rule, recipe)
