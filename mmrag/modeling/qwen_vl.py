"""Qwen2-VL embedders: GME and those that share its machinery.

A family on this architecture is a ``Recipe``: the literal prompt, what happens to an image
before the common image rule, positions and limits. Positions are plain and one-dimensional
unless the recipe says otherwise, as in the reference code of GME and VLM2Vec, which never
computes M-RoPE; with three-axis positions the vectors of images differ (cosine 0.98 and less).

Source: GME (arXiv 2412.16855) and the inference script published with its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLModel
from transformers.masking_utils import create_bidirectional_mask

from mmrag.content import Content, Modality, image_size, load_image
from mmrag.errors import ContentError
from mmrag.modeling.batching import pad
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.pooling import last_token, mean_tokens
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_images import (
    ImageRule,
    read_image_rule,
    resize,
    smart_resize,
    to_patches,
)

IMAGE = "<|image_pad|>"
_VISION_TOKENS = (IMAGE, "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
ALL_MODALITIES: frozenset[Modality] = frozenset({"text", "image", "fused"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What sets one Qwen2-VL family apart.

    render: the prompt of a content under an instruction (``None``: a document).
    fit: the size an image is brought to before the common rule, from its width and height.
    max_length: tokens, visual ones included; longer texts are cut.
    max_images: images that one content may hold.
    mrope: three-axis positions (time, row, column) inside images.
    keep_end: cut a long text before the prompt's end, not together with it.
    blank: size of the black image that stands in where a content has none, if one must.
    bidirectional: every token sees all others, and the mean of all is pooled.
    """

    family: str
    render: Callable[[Content, str | None], Prompt]
    fit: Callable[[int, int], tuple[int, int]]
    max_length: int
    max_images: int = 1
    mrope: bool = False
    keep_end: bool = True
    blank: tuple[int, int] | None = None
    bidirectional: bool = False


@dataclass(frozen=True, slots=True)
class QwenInputs:
    """One item: ids (length,), patches (n, 3 * temporal * patch * patch) and grids (k, 3).

    positions: (3, length) for the recipes with M-RoPE, else None: 0, 1, 2, ... on each axis.
    """

    ids: Tensor
    pixels: Tensor | None = None
    grids: Tensor | None = None
    positions: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Length of the sequence, visual tokens included."""
        return len(self.ids)


class Qwen2VLBackbone:
    """A Backbone over ``Qwen2VLModel``, pooled at the last token."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rule: ImageRule,
        recipe: Recipe,
        modalities: frozenset[Modality] = ALL_MODALITIES,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.recipe = recipe
        self.modalities = modalities
        self.family = recipe.family
        config: Any = model.config
        self.dim = int(config.get_text_config().hidden_size)
        self._image_id = int(config.image_token_id)

    def settings(self) -> dict[str, Any]:
        """Limits and the literal prompts, which move vectors."""
        render = self.recipe.render
        return {
            "family": self.family,
            "max_length": self.recipe.max_length,
            "pixels": [self.rule.min_pixels, self.rule.max_pixels],
            "fit": [self.recipe.fit(3000, 2000), self.recipe.fit(400, 20)],
            "mrope": self.recipe.mrope,
            "keep_end": self.recipe.keep_end,
            "prompts": [str(render(Content("x"), None)), str(render(Content("x"), "y"))],
        }

    def cost(self, content: Content, instruction: str | None) -> int:
        """Tokens of the item, without decoding its images."""
        return len(self._ids(content, instruction, self._sizes(content)))

    def prepare(self, content: Content, instruction: str | None) -> QwenInputs:
        """Ids and patches of the item."""
        ids = torch.tensor(self._ids(content, instruction, self._sizes(content)))
        parts = [to_patches(self._image(source), self.rule) for source in self._images(content)]
        grids = torch.tensor([grid for _, grid in parts]).reshape(-1, 3)
        positions = None
        if self.recipe.mrope:
            cells = (grids[:, 1:] // self.rule.merge).tolist()
            positions = mrope_positions(ids.tolist(), self._image_id, cells)
        if not parts:
            return QwenInputs(ids, positions=positions)
        return QwenInputs(ids, torch.cat([patches for patches, _ in parts]), grids, positions)

    def forward(self, batch: Sequence[QwenInputs]) -> Tensor:
        """State of each item's last token or their mean, (len(batch), dim), not normalised."""
        device = self.model.device
        ids, mask = pad([item.ids for item in batch], self.tokenizer.pad_token_id or 0)
        ids, mask = ids.to(device), mask.to(device)
        embeds = self.model.get_input_embeddings()(ids)  # (batch, length, dim)
        features = self.image_features(batch)
        if features is not None:
            places = (ids == self._image_id).unsqueeze(-1).expand_as(embeds)
            embeds = embeds.masked_scatter(places, features.to(embeds.dtype))
        # Without position_ids the decoder counts 0, 1, 2, ... on all three axes.
        output = self.model.language_model(
            inputs_embeds=embeds,
            attention_mask=self._attention(embeds, mask),
            position_ids=pad_positions(batch, device) if self.recipe.mrope else None,
            use_cache=False,
        )
        pool = mean_tokens if self.recipe.bidirectional else last_token
        return pool(output.last_hidden_state, mask)

    def _attention(self, embeds: Tensor, mask: Tensor) -> Any:
        if not self.recipe.bidirectional:
            return mask
        config = self.model.language_model.config
        both_ways = create_bidirectional_mask(
            config=config, inputs_embeds=embeds, attention_mask=mask
        )
        return {"full_attention": both_ways}

    def image_features(self, batch: Sequence[QwenInputs]) -> Tensor | None:
        """Visual tokens of all images of a batch in order, (tokens, dim); None without any."""
        pixels = [item.pixels for item in batch if item.pixels is not None]
        grids = [item.grids for item in batch if item.grids is not None]
        if not pixels:
            return None
        visual = self.model.visual
        patches = torch.cat(pixels).to(self.model.device, visual.dtype)
        output = visual(patches, grid_thw=torch.cat(grids).to(self.model.device))
        return torch.as_tensor(output.pooler_output)

    def _images(self, content: Content) -> tuple[Any, ...]:
        if content.images or self.recipe.blank is None:
            return content.images
        return (Image.new("RGB", self.recipe.blank),)

    def _sizes(self, content: Content) -> list[tuple[int, int]]:
        if len(content.images) > self.recipe.max_images:
            raise ContentError(
                f"{self.family} takes {self.recipe.max_images} image per item, got "
                f"{len(content.images)}; embed them one by one."
            )
        return [self.rule.size(*self.recipe.fit(*image_size(i))) for i in self._images(content)]

    def _image(self, source: Any) -> Image.Image:
        image = load_image(source)
        fitted = resize(image, self.recipe.fit(*image.size))
        return resize(fitted, self.rule.size(*fitted.size))

    def _ids(
        self, content: Content, instruction: str | None, sizes: Sequence[tuple[int, int]]
    ) -> list[int]:
        prompt = self.recipe.render(without_vision_tokens(content), instruction)
        ids = self._tokenize(str(prompt))
        visual = [self.rule.n_tokens(*size) for size in sizes]
        excess = len(ids) - len(visual) + sum(visual) - self.recipe.max_length
        if excess > 0:
            ids = self._cut(prompt, ids, excess)
        return expand(ids, self._image_id, visual)

    def _cut(self, prompt: Prompt, ids: list[int], excess: int) -> list[int]:
        """Take ``excess`` tokens off the end of the text, or off the end of all."""
        tail = len(self._tokenize(prompt.after)) if self.recipe.keep_end else 0
        head = len(self._tokenize(prompt.before))
        end = len(ids) - tail
        if end - excess < head:
            raise ContentError(
                f"the image and the instruction alone are over max_length="
                f"{self.recipe.max_length} tokens; raise max_length or lower max_image_tokens."
            )
        return ids[: end - excess] + ids[end:]

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def expand(ids: Sequence[int], image_id: int, counts: Sequence[int]) -> list[int]:
    """Widen each image placeholder to its number of visual tokens."""
    remaining = iter(counts)
    return [
        token
        for original in ids
        for token in ([original] * next(remaining) if original == image_id else [original])
    ]


def mrope_positions(ids: Sequence[int], image_id: int, grids: Iterable[Sequence[int]]) -> Tensor:
    """Three-axis positions: time, row, column (Qwen2-VL, arXiv 2409.12191, section 2.1).

    A text token has one number on all axes. The tokens of an image share one time and lie in
    a grid; what follows goes on after the largest number used.

    Args:
        ids: of one item, images widened.
        grids: rows and columns of each image, in visual tokens.

    Returns: (3, len(ids)), int64.
    """
    positions = torch.arange(len(ids)).repeat(3, 1)
    place = lag = 0
    for rows, columns in grids:
        place = ids.index(image_id, place)
        cells = torch.arange(rows * columns)
        grid = torch.stack([torch.zeros_like(cells), cells // columns, cells % columns])
        positions[:, place : place + len(cells)] = grid + (place - lag)
        place += len(cells)
        lag += len(cells) - max(rows, columns)
        positions[:, place:] = torch.arange(place, len(ids)) - lag
    return positions


def pad_positions(batch: Sequence[QwenInputs], device: torch.device) -> Tensor:
    """Positions of a batch padded on the right, (3, batch, longest)."""
    rows = [item.positions.T for item in batch if item.positions is not None]
    return pad_sequence(rows, batch_first=True).permute(2, 0, 1).to(device)


def without_vision_tokens(content: Content) -> Content:
    """Break up placeholders that stand in the text itself: they would pass for images."""
    if content.text is None or ("<|v" not in content.text and IMAGE not in content.text):
        return content
    text = content.text
    for token in _VISION_TOKENS:
        text = text.replace(token, token.replace("|", " "))
    return Content(text, content.image, content.instruction)


def use_matmul_patch_embed(visual: Any) -> None:
    """Run the patch embedding as a matrix product.

    Its convolution never overlaps, so each output is one dot product; the convolution kernel
    is 10 to 20 times slower in some torch releases (pytorch issue 166122). The weight keeps
    its name and shape, so that checkpoints are saved as they were.
    """
    visual.patch_embed.forward = _MatmulPatchEmbed(visual.patch_embed)


class _MatmulPatchEmbed:
    """A picklable bound forward for a patch embedding."""

    def __init__(self, patch_embed: nn.Module) -> None:
        self.patch_embed: Any = patch_embed

    def __call__(self, patches: Tensor) -> Tensor:
        projection = self.patch_embed.proj
        weight = projection.weight.flatten(1)  # (embed, 3 * temporal * patch * patch)
        return F.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, projection.bias)


# --- GME -------------------------------------------------------------------------------------


def as_it_is(width: int, height: int) -> tuple[int, int]:
    """No resizing before the common image rule."""
    return width, height


def qwen_fetch_size(width: int, height: int) -> tuple[int, int]:
    """Size after ``fetch_image`` of the reference code, which runs before the processor."""
    return smart_resize(width, height, 28, 4 * 28 * 28, 16384 * 28 * 28)


def load_qwen2_vl(
    folder: Path,
    placement: Placement,
    recipe: Recipe,
    min_image_tokens: int | None,
    max_image_tokens: int | None,
    modalities: frozenset[Modality] = ALL_MODALITIES,
    model_class: type[nn.Module] = Qwen2VLModel,
) -> Qwen2VLBackbone:
    """Load a checkpoint of this shape to run by ``recipe``; bounds of None are its own."""
    model = load_exact(model_class, folder, placement, unused=("lm_head.",))
    use_matmul_patch_embed(model.visual)
    rule = read_image_rule(folder).with_tokens(min_image_tokens, max_image_tokens)
    return Qwen2VLBackbone(model, load_tokenizer(folder), rule, recipe, modalities)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, use_fast=True
    )
    return tokenizer
