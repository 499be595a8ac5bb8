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
from mmrag.modeling.batching import pad
from mmrag.modeling.clip_images import only_image
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.pooling import mean_tokens
from mmrag.modeling.prompts import Prompt, load_fast_tokenizer, tokenize
from mmrag.modeling.qwen_images import ImageRule, read_image_rule, resize, to_patches
from mmrag.modeling.qwen_vl import ALL_MODALITIES, use_matmul_patch_embed


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
    """One item: ids (length,), patches (n, 3 * temporal * patch * patch) and grid (1, 3).

    None stands for what the item has not: ids without a text, patches and grid without an image.
    """

    n_tokens: int
    ids: Tensor | None
    patches: Tensor | None
    grid: Tensor | None


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
        return {
            "family": self.family,
            "max_length": self.max_length,
            "pixels": [self.rule.min_pixels, self.rule.max_pixels],
        }

    def cost(self, content: Content, instruction: str | None) -> int:
        """Tokens of the text and visual tokens of the image, without decoding the image."""
        source = only_image(content, self.family)
        size = None if source is None else self.rule.size(*image_size(source))
        return len(self._ids(content)) + (self.rule.n_tokens(*size) if size else 0)

    def prepare(self, content: Content, instruction: str | None) -> NanoInputs:
        """Ids and patches of the item."""
        ids = self._ids(content)
        text = None if content.text is None else torch.tensor(ids)
        source = only_image(content, self.family)
        if source is None:
            return NanoInputs(len(ids), text, None, None)
        image = load_image(source)
        image = resize(image, self.rule.size(*image.size))
        patches, grid = to_patches(image, self.rule)
        n_tokens = len(ids) + self.rule.n_tokens(*image.size)
        return NanoInputs(n_tokens, text, patches, torch.tensor([grid]))

    def forward(self, batch: Sequence[NanoInputs]) -> Tensor:
        """The sum of the unit vectors of each item's text and image, (len(batch), dim)."""
        device = self.model.device
        vectors = torch.zeros(len(batch), self.dim, device=device)
        texts = {row: item.ids for row, item in enumerate(batch) if item.ids is not None}
        images = {row: item for row, item in enumerate(batch) if item.patches is not None}
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

    def _images(self, items: Sequence[NanoInputs]) -> Tensor:
        """Unit vectors of images, (len(items), dim)."""
        visual, device = self.model.visual, self.model.device
        patches = torch.cat([item.patches for item in items if item.patches is not None])
        grids = torch.cat([item.grid for item in items if item.grid is not None])
        output = visual(patches.to(device, visual.dtype), grid_thw=grids.to(device))
        added = self.model.readout(output.pooler_output).float()
        counts = (grids.prod(dim=1) // self.rule.merge**2).tolist()
        sums = torch.stack([part.sum(0) for part in added.split(counts)])
        return F.normalize(sums, dim=1)

    def _ids(self, content: Content) -> list[int]:
        if content.text is None:
            return []
        return tokenize(self.tokenizer, Prompt("", content.text, ""), self.max_length)


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
    use_matmul_patch_embed(model.visual)
    rule = read_image_rule(folder).with_tokens(min_image_tokens, max_image_tokens)
    return NanoBackbone(model, load_fast_tokenizer(folder), rule, max_length, modalities)
