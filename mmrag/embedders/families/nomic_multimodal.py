"""nomic-embed-multimodal 3B and 7B: adapters on Qwen2.5-VL, for pages and the questions to them.

Source: the model cards and ``BiQwen2_5`` of illuin-tech/colpali as they were published.
"""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen2_5_VLModel

from mmrag.content import Content, Modality
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_vl import IMAGE_BLOCK, QwenBackbone, Recipe, as_it_is, load_qwen

_END = "<|endoftext|>"


def load_nomic_multimodal(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    min_image_tokens: int = 4,
    max_image_tokens: int = 768,
) -> QwenBackbone:
    """Load nomic-embed-multimodal-3b/7b: M-RoPE positions, last token.

    It was trained without instructions: whichever one comes marks a query, and is not shown.
    """
    modalities: frozenset[Modality] = frozenset({"text", "image"})
    recipe = Recipe("nomic_multimodal", nomic_prompt, as_it_is, max_length, mrope=True)
    return load_qwen(
        folder,
        placement,
        recipe,
        min_image_tokens,
        max_image_tokens,
        modalities=modalities,
        model_class=Qwen2_5_VLModel,
    )


def nomic_prompt(content: Content, instruction: str | None) -> Prompt:
    """The literal prompt of a page, a question, or a text."""
    if content.images:
        image = f"<|im_start|>user\n{IMAGE_BLOCK}"
        return Prompt(f"{image}Describe the image.<|im_end|>", "", _END)
    return Prompt("" if instruction is None else "Query: ", content.text or "", _END)
