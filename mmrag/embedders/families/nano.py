"""The shipped embedder: a BERT sentence encoder, and a small vision tower in its space.

A text is read by ``BertModel`` and the mean of its tokens is its vector, as in Sentence-BERT
(arXiv 1908.10084, section 3) and the MiniLM encoders (arXiv 2002.10957). An image goes through
the vision tower of Qwen2-VL (arXiv 2409.12191); a gated layer turns each visual token into what
it adds to the vector of the image, and these are summed. Text and image together are the sum of
their unit vectors. Instructions change nothing: the encoder was trained without them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedTokenizerBase
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmrag.content import Content, Modality, image_size, load_image
from mmrag.embedders.nano_text import nano_settings
from mmrag.modeling.backbone import Plan
from mmrag.modeling.batching import pad
from mmrag.modeling.clip_images import only_image
from mmrag.modeling.image_rule import ImageRule, read_image_rule
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.pooling import mean_tokens
from mmrag.modeling.prompts import Prompt, tokenize
from mmrag.modeling.qwen_images import pixels_of, resize
from mmrag.modeling.qwen_vl import ALL_MODALITIES, cells
from mmrag.modeling.tokenizers import load_tokenizer
from mmrag.modeling.vision import run_tower, speed_up

_VISUAL = -1  # stands for a visual token, which is in no vocabulary


class Readout(nn.Module):
    """A gated layer (SwiGLU, arXiv 2002.05202) from visual tokens to the space of texts."""

    def __init__(self, width: int, units: int, dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, units)
        self.up_proj = nn.Linear(width, units)
        self.down_proj = nn.Linear(units, dim)

    def units(self, tokens: Tensor) -> Tensor:
        """What each token makes the units give, (tokens, units)."""
        return torch.as_tensor(F.silu(self.gate_proj(tokens)) * self.up_proj(tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        """What each token adds to the vector of its image, (tokens, dim)."""
        return torch.as_tensor(self.down_proj(self.units(tokens)))


class NanoModel(BertModel):  # type: ignore[misc]
    """``BertModel`` with a vision tower beside it.

    ``config.json`` is BERT's, with ``vision_config`` (as in Qwen2-VL) and ``readout_units``.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        vision = Qwen2VLVisionConfig(**config.vision_config)
        vision._attn_implementation = config._attn_implementation
        self.visual = Qwen2VisionTransformerPretrainedModel(vision)
        self.readout = Readout(vision.hidden_size, config.readout_units, config.hidden_size)
        self.post_init()


@dataclass(frozen=True, slots=True)
class NanoInputs:
    """One item: ids (length,) of its text, and its image (height, width, 3), uint8.

    None stands for a text or an image that the item does not have.
    """

    n_tokens: int
    ids: Tensor | None
    image: Tensor | None


class NanoBackbone:
    """A Backbone over ``NanoModel``. ``max_length`` counts tokens of the text alone."""

    family = "nano"

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rule: ImageRule,
        max_length: int,
        modalities: frozenset[Modality] = ALL_MODALITIES,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.max_length = max_length
        self.modalities = modalities
        self.dim = int(model.config.hidden_size)

    def settings(self) -> dict[str, Any]:
        """The limits, which move vectors of long texts and large images."""
        return nano_settings(self.max_length, self.rule)

    def plan(self, content: Content, instruction: str | None) -> Plan:
        """Tokens of the text, then one for each visual token; see ``Backbone.plan``."""
        source = only_image(content, self.family)
        sizes = () if source is None else (self.rule.size(*image_size(source)),)
        ids: list[int] = []
        if content.text is not None:
            ids = tokenize(self.tokenizer, Prompt("", content.text, ""), self.max_length)
        # Text and image never meet in one sequence; the sum is only what the item costs.
        visual = sum(self.rule.n_tokens(*size) for size in sizes)
        return Plan(content, ids + [_VISUAL] * visual, sizes)

    def prepare(self, plan: Plan) -> NanoInputs:
        """Ids and pixels of the item."""
        ids = [token for token in plan.ids if token != _VISUAL]
        text = None if plan.content.text is None else torch.tensor(ids)
        if not plan.content.images:
            return NanoInputs(plan.n_tokens, text, None)
        image = load_image(plan.content.images[0])
        return NanoInputs(
            plan.n_tokens, text, pixels_of(resize(image, self.rule.size(*image.size)))
        )

    def forward(self, batch: Sequence[NanoInputs]) -> Tensor:
        """The sum of the unit vectors of each item's text and image, (len(batch), dim)."""
        device = self.model.device
        vectors = torch.zeros(len(batch), self.dim, device=device)
        texts = {row: item.ids for row, item in enumerate(batch) if item.ids is not None}
        images = {row: item.image for row, item in enumerate(batch) if item.image is not None}
        if texts:
            rows = torch.tensor(list(texts), device=device)
            vectors = vectors.index_add(0, rows, self._texts(list(texts.values())))
        if images:
            rows = torch.tensor(list(images), device=device)
            vectors = vectors.index_add(0, rows, self._images(list(images.values())))
        return vectors

    def _texts(self, sequences: Sequence[Tensor]) -> Tensor:
        """Unit vectors of texts, (len(sequences), dim)."""
        ids, mask = pad(sequences, self.tokenizer.pad_token_id)
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.normalize(mean_tokens(hidden.float(), mask), dim=1)

    def _images(self, images: Sequence[Tensor]) -> Tensor:
        """Unit vectors of images, (len(images), dim)."""
        output = run_tower(self.model.visual, images, self.rule)
        added = self.model.readout(output.pooler_output).float()
        counts = [rows * columns for rows, columns in cells(images, self.rule)]
        sums = torch.stack([part.sum(0) for part in torch.split(added, counts)])
        # A sum and not a mean: after normalising they are the same.
        return F.normalize(sums, dim=1)


def load_nano(
    folder: Path,
    placement: Placement,
    *,
    modalities: frozenset[Modality] = ALL_MODALITIES,
    max_length: int = 512,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> NanoBackbone:
    """Load ``mmrag-nano``, or a checkpoint adapted from it."""
    model = load_exact(NanoModel, folder, placement)
    speed_up(model.visual)
    rule = read_image_rule(folder).with_tokens(min_image_tokens, max_image_tokens)
    tokenizer = load_tokenizer(folder, rows=model.get_input_embeddings().num_embeddings)
    return NanoBackbone(model, tokenizer, rule, max_length, modalities)
