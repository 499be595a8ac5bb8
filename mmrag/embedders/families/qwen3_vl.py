"""Qwen3-VL-Embedding: the chat template, three-axis positions, DeepStack, the last token.

The instruction stands in the system turn with a full stop added, images come before the text,
and the newline after ``assistant`` is pooled, as in the released code; the paper speaks of
another end token, which gives other vectors (cosine 0.46). A content without text and image
becomes ``NULL`` in that code; here ``Content`` refuses to be empty.

Source: Qwen3-VL-Embedding (arXiv 2601.04720) and its published inference code.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3VLModel

from mmrag.content import Content
from mmrag.modeling.batching import pad
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.pooling import last_token
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_images import ImageRule, read_image_rule
from mmrag.modeling.qwen_vl import (
    IMAGE,
    Qwen2VLBackbone,
    QwenInputs,
    Recipe,
    load_tokenizer,
    pad_positions,
    use_matmul_patch_embed,
)

DEFAULT_INSTRUCTION = "Represent the user's input."
IMAGE_BLOCK = f"<|vision_start|>{IMAGE}<|vision_end|>"
# The published code resizes to these bounds, whatever the checkpoint's processor file says.
MIN_IMAGE_TOKENS = 4
MAX_IMAGE_TOKENS = 1800


class Qwen3VLBackbone(Qwen2VLBackbone):
    """A Backbone over ``Qwen3VLModel``, pooled at the last token."""

    def forward(self, batch: Sequence[QwenInputs]) -> Tensor:
        """State of each item's last token, (len(batch), dim), not normalised."""
        return last_token_states(self.model, batch, self.tokenizer.pad_token_id or 0)


def last_token_states(model: Any, batch: Sequence[QwenInputs], pad_id: int) -> Tensor:
    """Run a ``Qwen3VLModel`` on items of any length and return their last states after the norm.

    Returns: (len(batch), dim).
    """
    device, image_id = model.device, model.config.image_token_id
    ids, mask = pad([item.ids for item in batch], pad_id)
    ids, mask = ids.to(device), mask.to(device)
    embeds = model.get_input_embeddings()(ids)  # (batch, length, dim)
    places = ids == image_id
    images = [item for item in batch if item.pixels is not None]
    deepstack = None
    if images:
        visual = model.visual
        pixels = torch.cat([item.pixels for item in images if item.pixels is not None])
        grids = torch.cat([item.grids for item in images if item.grids is not None])
        seen = visual(pixels.to(device, visual.dtype), grid_thw=grids.to(device))
        embeds = embeds.masked_scatter(
            places.unsqueeze(-1).expand_as(embeds), seen.pooler_output.to(embeds.dtype)
        )
        deepstack = seen.deepstack_features
    output = model.language_model(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=pad_positions(batch, device),
        visual_pos_masks=places if deepstack else None,
        deepstack_visual_embeds=deepstack,
        use_cache=False,
    )
    return last_token(output.last_hidden_state, mask)


def embedding_prompt(content: Content, instruction: str | None) -> Prompt:
    """The literal prompt: a system turn with the instruction, images before the text."""
    system = f"<|im_start|>system\n{_sentence(instruction)}<|im_end|>\n"
    return Prompt(
        before=f"{system}<|im_start|>user\n{IMAGE_BLOCK * len(content.images)}",
        text=content.text or "",
        after="<|im_end|>\n<|im_start|>assistant\n",
    )


def _sentence(instruction: str | None) -> str:
    """The instruction with a full stop, unless it ends in any sign of Unicode category P."""
    text = (instruction or "").strip() or DEFAULT_INSTRUCTION
    return text if unicodedata.category(text[-1]).startswith("P") else f"{text}."


def image_rule(folder: Path, least: int | None, most: int | None) -> ImageRule:
    """The checkpoint's patches with the published code's bounds on visual tokens."""
    rule = read_image_rule(folder)
    return rule.with_tokens(
        MIN_IMAGE_TOKENS if least is None else least, MAX_IMAGE_TOKENS if most is None else most
    )


def same_size(width: int, height: int) -> tuple[int, int]:
    """No resizing before the common rule."""
    return width, height


def load_qwen3_vl(
    folder: Path,
    placement: Placement,
    *,
    max_length: int = 8192,
    keep_end: bool = False,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> Qwen3VLBackbone:
    """Load Qwen3-VL-Embedding-2B/8B, or any checkpoint of that shape.

    The published code cuts an over-long text together with the end of the template and pools
    the last word that is left. ``keep_end`` cuts the text alone: other vectors than the
    published code, nearer to those of texts that fit.
    """
    model = load_exact(Qwen3VLModel, folder, placement, unused=("lm_head.",))
    use_matmul_patch_embed(model.visual)
    recipe = Recipe(
        "qwen3_vl",
        embedding_prompt,
        same_size,
        max_length,
        max_images=sys.maxsize,
        mrope=True,
        keep_end=keep_end,
    )
    rule = image_rule(folder, min_image_tokens, max_image_tokens)
    return Qwen3VLBackbone(model, load_tokenizer(folder), rule, recipe)
