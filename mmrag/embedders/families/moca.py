"""MoCa on Qwen2.5-VL, 3B and 7B: attention both ways, and the mean of all tokens.

Source: MoCa (arXiv 2506.23115) and haon-chen/MoCa.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen2_5_VLModel

from mmrag.content import Content
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import REPRESENT_WITH_TEXT, Prompt
from mmrag.modeling.qwen_vl import IMAGE_BLOCK, QwenBackbone, Recipe, load_qwen

PAGE = "Represent the given document image."
_LEAST_SIDE = 28


def load_moca(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 2048,
    min_image_tokens: int = 256,
    max_image_tokens: int = 1024,
) -> QwenBackbone:
    """Load MoCa-Qwen25VL-3B/7B: M-RoPE positions, bidirectional decoder, mean pooling."""
    recipe = Recipe("moca", moca_prompt, moca_fit, max_length, mrope=True, bidirectional=True)
    backbone = load_qwen(
        folder,
        placement,
        recipe,
        min_image_tokens,
        max_image_tokens,
        model_class=Qwen2_5_VLModel,
    )
    for layer in backbone.model.language_model.layers:
        layer.self_attn.is_causal = False  # what attention goes by where it gets no mask
    return backbone


def moca_prompt(content: Content, instruction: str | None) -> Prompt:
    """MoCa's literal prompt: image, instruction, text, and a newline; a bare text has none."""
    text = content.text or ""
    if content.images and not instruction:
        instruction = REPRESENT_WITH_TEXT if text else PAGE
    image = IMAGE_BLOCK if content.images else ""
    task = (instruction or "") + (" " if instruction and text else "")
    # Nothing at all is no input to the reference code; a newline makes it one.
    return Prompt(image + task, text, "\n" if instruction or not text else "")


def moca_fit(width: int, height: int) -> tuple[int, int]:
    """Size before the common image rule: no side is under 28 pixels."""
    return max(width, _LEAST_SIDE), max(height, _LEAST_SIDE)
