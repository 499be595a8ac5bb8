"""GME: the universal embedders on Qwen2-VL, and checkpoints of their layout.

Source: GME (arXiv 2412.16855) and the inference script published with its weights.
"""

from __future__ import annotations

from pathlib import Path

from mmrag.content import Content, Modality
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_vl import (
    ALL_MODALITIES,
    IMAGE_BLOCK,
    QwenBackbone,
    Recipe,
    load_qwen,
    qwen_fetch_size,
)

GME_DEFAULT = "You are a helpful assistant."


def gme_prompt(content: Content, instruction: str | None) -> Prompt:
    """GME's literal prompt: instruction in the system turn, image right before the text."""
    image = IMAGE_BLOCK if content.images else ""
    system = f"<|im_start|>system\n{instruction or GME_DEFAULT}<|im_end|>\n"
    return Prompt(
        before=f"{system}<|im_start|>user\n{image}",
        text=content.text or "",
        after="<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    )


def load_gme(
    folder: Path,
    placement: Placement,
    *,
    family: str = "gme",
    modalities: frozenset[Modality] = ALL_MODALITIES,
    # The published script's; it counts visual tokens, of which an image has at most 1280.
    max_length: int = 1800,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> QwenBackbone:
    """Load a checkpoint of GME's layout: gme-Qwen2-VL-2B/7B, or any of that shape."""
    recipe = Recipe(family, gme_prompt, qwen_fetch_size, max_length)
    return load_qwen(
        folder, placement, recipe, min_image_tokens, max_image_tokens, modalities=modalities
    )
