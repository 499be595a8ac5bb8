"""Embedders on the Qwen-VL architectures: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5.

A family is a ``Recipe``: the literal prompt, what happens to an image before the common image
rule, positions, limits and pooling. Positions are plain and one-dimensional unless the recipe
says otherwise, as in the reference code of GME and VLM2Vec, which never computes M-RoPE; with
three-axis positions the vectors of images differ (cosine 0.98 and less).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen2VLModel
from transformers.masking_utils import create_bidirectional_mask

from mmrag.content import Content, Modality, image_size, load_image
from mmrag.errors import ContentError
from mmrag.modeling.backbone import Plan
from mmrag.modeling.batching import pad, send
from mmrag.modeling.compiling import ShortRuns
from mmrag.modeling.image_rule import ImageRule, read_image_rule, smart_resize
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.mrope import mrope_positions
from mmrag.modeling.pooling import last_token, mean_tokens
from mmrag.modeling.prompts import Prompt, expand, harmless, tokenize
from mmrag.modeling.qwen_clips import VIDEO, ClipRule, pair_pixels, seen_clip
from mmrag.modeling.qwen_images import pixels_of, resize
from mmrag.modeling.tokenizers import load_tokenizer
from mmrag.modeling.vision import add_features, run_tower, speed_up

IMAGE = "<|image_pad|>"
IMAGE_BLOCK = f"<|vision_start|>{IMAGE}<|vision_end|>"
PLACEHOLDERS = (IMAGE, VIDEO, "<|vision_start|>", "<|vision_end|>")
ALL_MODALITIES: frozenset[Modality] = frozenset({"text", "image", "fused"})


@dataclass(frozen=True, slots=True)
class Recipe:
    """What sets one family on a Qwen-VL architecture apart.

    render: the prompt of a content under an instruction (``None``: a document).
    fit: the size an image is brought to before the common rule, from its width and height.
    max_length: tokens, visual ones included; longer texts are cut.
    max_images: images that one content may hold; a clip counts as one.
    clips: which frames of a clip are seen; None: it takes no clips.
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
    clips: ClipRule | None = None


@dataclass(frozen=True, slots=True)
class QwenInputs:
    """One item: ids (length,) and images (height, width, 3), uint8, of the size they are seen in.

    Pairs of frames of a clip, (2, height, width, 3), stand before the images, as in the prompt.
    positions: (3, length) where they are on three axes; None: 0, 1, 2, ... on each axis.
    """

    ids: Tensor
    images: tuple[Tensor, ...] = ()
    positions: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Length of the sequence, visual tokens included."""
        return len(self.ids)


class QwenBackbone:
    """A Backbone over a model of the Qwen-VL architectures."""

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
        self.modalities = modalities | {"clip"} if recipe.clips else modalities
        self.family = recipe.family
        config: Any = model.config
        self.dim = int(config.get_text_config().hidden_size)
        self._image_id = int(config.image_token_id)
        self._video_id = int(config.video_token_id)

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
            "pixels": [self.rule.min_pixels, self.rule.max_pixels],
            # A function has no stable name to hash; its results for a large and a thin image stand
            # for it.
            "fit": [self.recipe.fit(3000, 2000), self.recipe.fit(400, 20)],
            "mrope": self.recipe.mrope,
            "keep_end": self.recipe.keep_end,
            "prompts": [str(render(Content("x"), None)), str(render(Content("x"), "y"))],
        }

    def plan(self, content: Content, instruction: str | None) -> Plan:
        """Tokens of the item; see ``Backbone.plan``.

        Raises:
            ContentError: For more images than the family takes in one item, and for a clip if it
                takes none.
        """
        n_seen = len(content.images) + (content.clip is not None)
        if n_seen > self.recipe.max_images:
            also = ", the clip included" if content.clip else ""
            raise ContentError(
                f"{self.family} takes {self.recipe.max_images} image per item, got {n_seen}{also}; "
                "embed them one by one."
            )
        item, task = harmless(content, instruction, PLACEHOLDERS)
        item, pairs = seen_clip(item, self.recipe.clips, self.rule)
        # Read from the headers of the files: images are decoded later, in threads.
        wanted = [self.recipe.fit(*image_size(source)) for source in self._images(item)]
        images = [self.rule.size(*size) for size in wanted]
        counts = [self.rule.n_tokens(*size) for size in images]
        of_clip = sum(self.rule.n_tokens(*size) for size in pairs)
        prompt = self.recipe.render(item, task)
        # A family has one placeholder for all of a clip, or one for each pair of frames.
        n_clips = str(prompt).count(VIDEO)
        ids = tokenize(
            self.tokenizer,
            prompt,
            # The prompt holds a placeholder for each of them, which is widened afterwards.
            self.recipe.max_length - of_clip - sum(counts) + n_clips + len(counts),
            special=False,
            keep_end=self.recipe.keep_end,
        )
        ids = expand(ids, self._video_id, [of_clip // max(n_clips, 1)] * n_clips)
        return Plan(item, expand(ids, self._image_id, counts), (*pairs, *images))

    def prepare(self, plan: Plan) -> QwenInputs:
        """Ids and pixels of the item."""
        images = pair_pixels(plan.content.clip, self.recipe.clips, self.rule.factor, plan.sizes)
        for source in self._images(plan.content):
            image = load_image(source)
            fitted = resize(image, self.recipe.fit(*image.size))
            images.append(pixels_of(resize(fitted, self.rule.size(*fitted.size))))
        positions = None
        if self.recipe.mrope:
            # Each pair of a clip is counted as an image is.
            ids = [self._image_id if each == self._video_id else each for each in plan.ids]
            positions = mrope_positions(ids, self._image_id, cells(images, self.rule))
        return QwenInputs(torch.tensor(plan.ids), tuple(images), positions)

    def forward(self, batch: Sequence[QwenInputs]) -> Tensor:
        """State of each item's last token or their mean, (len(batch), dim), not normalised."""
        two_ways = self.recipe.bidirectional
        states, mask = decode(self.model, batch, self.rule, bidirectional=two_ways)
        return (mean_tokens if two_ways else last_token)(states, mask)

    def _images(self, content: Content) -> tuple[Any, ...]:
        if content.images or self.recipe.blank is None:
            return content.images
        # Families trained with an image in every item give other vectors without one.
        return (Image.new("RGB", self.recipe.blank),)


def decode(
    model: Any,
    batch: Sequence[QwenInputs],
    rule: ImageRule,
    *,
    cache: Any = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run a model without head on items of any length.

    Args:
        cache: keys and values of what stands before each item; it is extended.

    Returns:
        States of the last layer after the norm, (len(batch), longest, dim), and the mask of real
        tokens, (len(batch), longest).
    """
    # Padded on the right. A causal model needs no mask for that: it looks at nothing behind a
    # token, so that padding is seen by padding only.
    ids, mask = pad([item.ids for item in batch], 0)
    ids, mask = send(ids, model.device), send(mask, model.device)
    embeds = model.get_input_embeddings()(ids)  # (batch, length, dim)
    extra: dict[str, Any] = {}
    images = [image for item in batch for image in item.images]
    if images:
        seen = run_tower(model.visual, images, rule)
        places = (ids == model.config.image_token_id) | (ids == model.config.video_token_id)
        features = seen.pooler_output.to(embeds.device, embeds.dtype)
        embeds = embeds.masked_scatter(places.unsqueeze(-1).expand_as(embeds), features)
        # Qwen3-VL adds features of inner layers of the tower to the first layers of the decoder.
        if deepstack := getattr(seen, "deepstack_features", None):
            extra = {"visual_pos_masks": places, "deepstack_visual_embeds": deepstack}
    short: ShortRuns | None = getattr(model, "short_runs", None)
    plain = not images and cache is None and not bidirectional
    if plain and short and short.takes(embeds):
        return short(embeds), mask  # positions of a text are 0, 1, 2, ... on all axes
    if bidirectional:
        config = model.language_model.config
        two_ways = create_bidirectional_mask(
            config=config, inputs_embeds=embeds, attention_mask=mask
        )
        extra["attention_mask"] = {"full_attention": two_ways}
    positions = [item.positions.T for item in batch if item.positions is not None]
    if positions:  # else the decoder counts 0, 1, 2, ... on all three axes
        padded = pad_sequence(positions, batch_first=True).permute(2, 0, 1)  # (3, batch, length)
        extra["position_ids"] = send(padded.contiguous(), embeds.device)
    output = model.language_model(
        inputs_embeds=embeds, past_key_values=cache, use_cache=cache is not None, **extra
    )
    return output.last_hidden_state, mask


def cells(images: Iterable[Tensor], rule: ImageRule) -> list[tuple[int, int]]:
    """Rows and columns of visual tokens of each image, (..., height, width, 3)."""
    return [(image.shape[-3] // rule.factor, image.shape[-2] // rule.factor) for image in images]


def as_it_is(width: int, height: int) -> tuple[int, int]:
    """No resizing before the common image rule."""
    return width, height


def qwen_fetch_size(width: int, height: int) -> tuple[int, int]:
    """Size after ``fetch_image`` of the reference code, which runs before the processor."""
    return smart_resize(width, height, 28, 4 * 28 * 28, 16384 * 28 * 28)


def load_qwen(
    folder: Path,
    placement: Placement,
    recipe: Recipe,
    min_image_tokens: int | None,
    max_image_tokens: int | None,
    *,
    modalities: frozenset[Modality] = ALL_MODALITIES,
    model_class: type[nn.Module] = Qwen2VLModel,
    unused: Iterable[str] = ("lm_head.",),
) -> QwenBackbone:
    """Load a checkpoint to run by ``recipe``; bounds of None are the checkpoint's own."""
    model, tokenizer = load_qwen_parts(model_class, folder, placement, unused=unused)
    rule = read_image_rule(folder).with_tokens(min_image_tokens, max_image_tokens)
    return QwenBackbone(model, tokenizer, rule, recipe, modalities)


def qwen_loader(
    recipe: Recipe,
    least: int | None,
    most: int | None,
    *,
    modalities: frozenset[Modality] = ALL_MODALITIES,
    model_class: type[nn.Module] = Qwen2VLModel,
) -> Callable[..., QwenBackbone]:
    """The ``load_*`` function of a family that a recipe describes in full.

    Args:
        least: visual tokens of one image, at least; None: as the checkpoint says.
        most: visual tokens of one image, at most; None: as the checkpoint says.
    """

    # Keyword-only, with the family's defaults: the registry reads from here which options it takes.
    def load(
        folder: Path,
        placement: Placement,
        *,
        max_length: int = recipe.max_length,
        min_image_tokens: int | None = least,
        max_image_tokens: int | None = most,
    ) -> QwenBackbone:
        return load_qwen(
            folder,
            placement,
            replace(recipe, max_length=max_length),
            min_image_tokens,
            max_image_tokens,
            modalities=modalities,
            model_class=model_class,
        )

    return load


def load_qwen_parts(
    model_class: type[nn.Module],
    folder: Path,
    placement: Placement,
    *,
    unused: Iterable[str] = (),
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model of these architectures, with or without a head, and its tokenizer."""
    model = load_exact(model_class, folder, placement, unused=unused)
    base = model.model if hasattr(model, "lm_head") else model
    speed_up(base.visual)
    if hasattr(base.language_model, "_deepstack_process"):
        base.language_model._deepstack_process = add_features
    if placement.device.type == "cuda" and placement.compile is not False:
        base.short_runs = ShortRuns(base.language_model)
    rows = model.get_input_embeddings().num_embeddings
    # If the two disagree, images would be put in the place of some other token.
    tokens = {IMAGE: int(model.config.image_token_id), VIDEO: int(model.config.video_token_id)}
    return model, load_tokenizer(folder, rows=rows, tokens=tokens)
