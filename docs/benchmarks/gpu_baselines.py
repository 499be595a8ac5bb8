"""What the library is compared with, on the same checkpoints and the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_models import TEMPLATE
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    Qwen2VLModel,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from mmrag.content import Content, load_image
from mmrag.embedders.families.gme import gme_prompt
from mmrag.modeling.attention import PLANLESS
from mmrag.modeling.loading import Placement
from mmrag.modeling.qwen_vl import IMAGE


class PlainLoop:
    """GME's published loop: transformers' own model and image processor, one batch at a time.

    The image processor is the one that transformers chooses: on torch where torchvision is
    installed, else on Pillow.
    """

    def __init__(self, folder: Path, placement: Placement) -> None:
        model: Any = Qwen2VLModel.from_pretrained(folder, **_options(placement))
        self.model = model.to(placement.device).eval()
        self.image_processor = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, contents: Sequence[Content], batch: int) -> NDArray[np.float32]:
        """Vectors of pages, (len(contents), dim), of norm 1."""
        parts = [
            self._batch(contents[start : start + batch]) for start in range(0, len(contents), batch)
        ]
        return torch.cat(parts).numpy()

    def _batch(self, contents: Sequence[Content]) -> Tensor:
        images = [load_image(content.images[0]) for content in contents]
        seen = self.image_processor(images=images, return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(1) // self.image_processor.merge_size**2).tolist()
        texts = [
            str(gme_prompt(content, None)).replace(IMAGE, IMAGE * count)
            for content, count in zip(contents, counts, strict=True)
        ]
        tokens = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        model, device = self.model, self.model.device
        with torch.inference_mode():
            ids, mask = tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
            pixels = seen["pixel_values"].to(device, model.dtype)
            features = model.visual(pixels, grid_thw=seen["image_grid_thw"].to(device))
            embeds = model.get_input_embeddings()(ids)
            places = (ids == model.config.image_token_id).unsqueeze(-1).expand_as(embeds)
            embeds = embeds.masked_scatter(places, features.pooler_output.to(embeds.dtype))
            output = model.language_model(inputs_embeds=embeds, attention_mask=mask)
            last = output.last_hidden_state[torch.arange(len(ids)), mask.sum(1) - 1]
            return torch.nn.functional.normalize(last.float(), dim=1).cpu()


def _options(placement: Placement) -> dict[str, Any]:
    attention = "sdpa" if placement.attention == PLANLESS else placement.attention
    return {"dtype": placement.dtype, "attn_implementation": attention}


class _WithoutVideos:
    """For a processor whose video part needs torchvision: none is given."""

    def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
        if name == "video_processor":
            return None
        return super().check_argument_for_proper_class(name, argument)  # type: ignore[misc]


class _Qwen2(_WithoutVideos, Qwen2VLProcessor):
    pass


class _Qwen3(_WithoutVideos, Qwen3VLProcessor):
    pass


def sentence_transformer(folder: Path, placement: Placement, end: str = "") -> Any:
    """A SentenceTransformer over a checkpoint, pooling the last token.

    With the sentence of the system turn as ``prompt=`` it sees what the library shows the model.

    Args:
        end: what stands behind the template.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    kind = AutoConfig.from_pretrained(folder).model_type
    processor = (_Qwen2 if kind == "qwen2_vl" else _Qwen3)(
        AutoImageProcessor.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        None,
        chat_template=TEMPLATE + end,
    )
    loader = "sentence_transformers.base.modules.transformer.AutoProcessor.from_pretrained"
    with patch(loader, return_value=processor):
        transformer = modules.Transformer(
            str(folder),
            model_kwargs=_options(placement),
            processing_kwargs={"chat_template": {"add_generation_prompt": True}},
        )
    width = transformer.get_embedding_dimension()
    parts = [transformer, modules.Pooling(width, "lasttoken"), modules.Normalize()]
    return SentenceTransformer(modules=parts, device=str(placement.device))
