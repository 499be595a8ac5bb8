"""nomic-embed-multimodal 3B and 7B: adapters on Qwen2.5-VL, for pages and the questions to them.

Source: the model cards and ``BiQwen2_5`` of illuin-tech/colpali as they were published.
"""

from __future__ import annotations

from transformers import Qwen2_5_VLModel

from mmrag.content import Content
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_vl import IMAGE_BLOCK, Recipe, as_it_is, qwen_loader

_END = "<|endoftext|>"


def nomic_prompt(content: Content, instruction: str | None) -> Prompt:
    """The literal prompt of a page, a question, or a text."""
    if content.images:
        image = f"<|im_start|>user\n{IMAGE_BLOCK}"
        return Prompt(f"{image}Describe the image.<|im_end|>", "", _END)
    # It was trained without instructions: whichever one comes marks a query, and is not shown.
    return Prompt("" if instruction is None else "Query: ", content.text or "", _END)


load_nomic_multimodal = qwen_loader(
    Recipe("nomic_multimodal", nomic_prompt, as_it_is, 8192, mrope=True),
    4,
    768,
    modalities=frozenset({"text", "image"}),
    model_class=Qwen2_5_VLModel,
)
