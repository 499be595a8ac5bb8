"""LLaVA-NeXT embedders: VLM2Vec-LLaVaNext and E5-V.

An image is seen whole and in tiles; the black border of the tiles is left out of the feature
map, and a newline vector ends each of its rows. The last token is pooled.

Source: VLM2Vec (arXiv 2410.05160), E5-V (arXiv 2407.12580), and their published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlavaNextModel, PreTrainedTokenizerBase

from mmrag.content import Content, Modality, image_size, load_image
from mmrag.modeling.backbone import Plan
from mmrag.modeling.batching import pad, send
from mmrag.modeling.clip_images import (
    TOWER_NAMES,
    ClipRule,
    join,
    only_image,
    place_features,
    read_clip_rule,
    tower_features,
)
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.pooling import last_token
from mmrag.modeling.prompts import (
    Prompt,
    PromptStyle,
    expand,
    harmless,
    tokenize,
    vlm2vec_prompt,
)
from mmrag.modeling.qwen_images import resize
from mmrag.modeling.qwen_vl import ALL_MODALITIES
from mmrag.modeling.tokenizers import load_tokenizer

IMAGE = "<image>"
_HEADS = ("lm_head.", "language_model.lm_head.")


@dataclass(frozen=True, slots=True)
class LlavaInputs:
    """One item: ids (length,), tiles (n, 3, side, side), uint8, and the image's size in pixels."""

    ids: Tensor
    tiles: Tensor | None = None
    size: tuple[int, int] = (0, 0)

    @property
    def n_tokens(self) -> int:
        """Length of the sequence, visual tokens included."""
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class LlavaRecipe:
    """What sets one LLaVA-NeXT family apart.

    render: the prompt of a content under an instruction (``None``: a document).
    max_length: tokens, visual ones included; longer texts are cut before the prompt's end.
    squash: side of the square that images are resized to first, in pixels, if they are.
    """

    family: str
    render: Callable[[Content, str | None], Prompt]
    max_length: int
    squash: int | None = None

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image before it is cut into tiles."""
        return (width, height) if self.squash is None else (self.squash, self.squash)


class LlavaNextBackbone:
    """A Backbone over ``LlavaNextModel``, pooled at the last token."""

    modalities: frozenset[Modality] = ALL_MODALITIES

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rule: ClipRule,
        recipe: LlavaRecipe,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.recipe = recipe
        self.family = recipe.family
        config: Any = model.config
        self.dim = int(config.text_config.hidden_size)
        self._image_id = int(config.image_token_id)
        self._layer = int(config.vision_feature_layer)

    @property
    def decoder(self) -> Any:
        """The decoder, whose states are pooled."""
        return self.model.language_model

    def settings(self) -> dict[str, Any]:
        """Limits and the literal prompts, which move vectors."""
        render = self.recipe.render
        return {
            "family": self.family,
            "max_length": self.recipe.max_length,
            "squash": self.recipe.squash,
            "prompts": [str(render(Content("x"), None)), str(render(Content("x"), "y"))],
        }

    def plan(self, content: Content, instruction: str | None) -> Plan:
        """Tokens of the item; see ``Backbone.plan``."""
        source = only_image(content, self.family)
        item, task = harmless(content, instruction, (IMAGE,))
        sizes = () if source is None else (self.recipe.fit(*image_size(source)),)
        return Plan(item, self._ids(item, task, sizes), sizes)

    def prepare(self, plan: Plan) -> LlavaInputs:
        """Ids and tiles of the item."""
        item = plan.content
        if not item.images:
            return LlavaInputs(torch.tensor(plan.ids))
        image = load_image(item.images[0])
        image = resize(image, self.recipe.fit(*image.size))
        # Some files say only behind their pixels that they lie on their side.
        stands = plan.sizes == (image.size,)
        ids = plan.ids if stands else self._ids(item, item.instruction, (image.size,))
        return LlavaInputs(torch.tensor(ids), self.rule.anyres(image), image.size)

    def forward(self, batch: Sequence[LlavaInputs]) -> Tensor:
        """State of each item's last token, (len(batch), dim), not normalised."""
        device = self.model.device
        ids, mask = pad([item.ids for item in batch], 0)
        ids, mask = ids.to(device), mask.to(device)
        embeds = self.model.get_input_embeddings()(ids)  # (batch, length, dim)
        embeds = place_features(embeds, ids == self._image_id, self._features(batch))
        # Padded on the right under causal attention, no token sees the padding: no mask is needed.
        output = self.model.language_model(inputs_embeds=embeds, use_cache=False)
        return last_token(output.last_hidden_state, mask)

    def _features(self, batch: Sequence[LlavaInputs]) -> list[Tensor]:
        """Visual tokens of each image of a batch, (tokens, dim) each."""
        shown = [(item.tiles, item.size) for item in batch if item.tiles is not None]
        if not shown:
            return []
        counts = [len(tiles) for tiles, _ in shown]
        tower = self.model.vision_tower
        pixels = send(torch.cat([tiles for tiles, _ in shown]), tower.device)
        states = tower_features(tower, self.rule.normalise(pixels), self._layer)
        projected = self.model.multi_modal_projector(states)  # (all tiles, n * n, dim)
        parts = torch.split(projected, counts)
        return [self._pack(part, size) for part, (_, size) in zip(parts, shown, strict=True)]

    def _pack(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The whole view, then the rows of the feature map, each with a newline at its end."""
        height, width = self.rule.grid(*size)
        whole = join(features[1:], height // self.rule.side, width // self.rule.side)
        rows = whole[self.rule.inner(*size)]
        newline = self.model.image_newline.to(rows.dtype).expand(len(rows), 1, -1)
        return torch.cat([features[0], torch.cat([rows, newline], dim=1).flatten(0, 1)])

    def _ids(
        self, content: Content, instruction: str | None, sizes: Sequence[tuple[int, int]]
    ) -> list[int]:
        visual = []
        for size in sizes:
            rows, columns = (part.stop - part.start for part in self.rule.inner(*size))
            # The whole view, then the rows of the tiles with a newline behind each.
            visual.append(self.rule.across**2 + rows * (columns + 1))
        prompt = self.recipe.render(content, instruction)
        room = self.recipe.max_length + len(visual) - sum(visual)
        return expand(tokenize(self.tokenizer, prompt, room), self._image_id, visual)


def load_vlm2vec_llava_next(
    folder: Path,
    placement: Placement,
    *,
    style: PromptStyle = "demo",
    squash: int | None = None,
    max_length: int = 8192,
) -> LlavaNextBackbone:
    """Load VLM2Vec-LLaVaNext; for ``style`` see ``vlm2vec_prompt``.

    ``squash``: side in pixels of the square that every image is resized to first; the MMEB
    evaluation has 1344.
    """
    render = partial(vlm2vec_prompt, image_token=IMAGE, style=style)
    return _load(folder, placement, LlavaRecipe("vlm2vec_llava_next", render, max_length, squash))


def load_e5_v(folder: Path, placement: Placement, *, max_length: int = 8192) -> LlavaNextBackbone:
    """Load E5-V."""
    return _load(folder, placement, LlavaRecipe("e5_v", e5_v_prompt, max_length))


def _load(folder: Path, placement: Placement, recipe: LlavaRecipe) -> LlavaNextBackbone:
    model = load_exact(LlavaNextModel, folder, placement, unused=_HEADS, key_mapping=TOWER_NAMES)
    rule = read_clip_rule(folder, int(model.config.vision_config.patch_size))
    # Those of the configuration, by which the model itself finds the border of the features.
    rule = replace(rule, grids=tuple((h, w) for h, w in model.config.image_grid_pinpoints))
    rows = model.get_input_embeddings().num_embeddings
    tokenizer = load_tokenizer(folder, rows=rows, tokens={IMAGE: model.config.image_token_id})
    return LlavaNextBackbone(model, tokenizer, rule, recipe)


def e5_v_prompt(content: Content, instruction: str | None) -> Prompt:
    """E5-V's literal prompt; it has no place for an instruction, which goes before the text."""
    text = " ".join(part for part in (instruction, content.text) if part)
    if not content.images:
        image, shown = "", "\nSummary above sentence"
    elif text:
        image, shown = f"{IMAGE}\n", "\nSummary above image and text"
    else:
        image, shown = f"{IMAGE}\n", "Summary above image"
    return Prompt(
        before=f"<|start_header_id|>user<|end_header_id|>\n\n{image}",
        text=text,
        after=f"{shown} in one word: <|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n \n",
    )
