"""VLM2Vec-Full on Phi-3.5-vision, which transformers does not have: built from parts it has.

A Phi-3 decoder, a CLIP ViT-L/14-336 tower, and between them the "HD" images: an image is
enlarged to fill up to ``num_crops`` tiles, each 2x2 features become one token, a learned vector
ends each row, and the whole image follows once more in one tile. The text behind an image is
tokenised alone, with a start token of its own. The last token is pooled.

Source: VLM2Vec (arXiv 2410.05160), Phi-3 (arXiv 2404.14219, section 6) and the code published
with both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Phi3Config,
    Phi3Model,
    PreTrainedTokenizerBase,
)

from mmrag.content import Content, Modality, image_size, load_image
from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.backbone import Plan
from mmrag.modeling.batching import pad, send
from mmrag.modeling.checkpoints import read_json
from mmrag.modeling.clip_images import (
    TOWER_NAMES,
    ClipRule,
    channels_first,
    cut,
    join,
    only_image,
    place_features,
    read_clip_rule,
    tower_features,
)
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.pooling import last_token
from mmrag.modeling.prompts import PromptStyle, tokenize, vlm2vec_prompt
from mmrag.modeling.qwen_vl import ALL_MODALITIES
from mmrag.modeling.tokenizers import load_tokenizer

_IMAGE_BLOCK = -1  # stands for an image's token, which is in no vocabulary

# openai/clip-vit-large-patch14-336: fixed in the published code, in no file of the checkpoint.
# A checkpoint with another tower has it in clip_config.json.
_TOWER: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# Not needed to embed; the second is a copy of the token embeddings in some files.
_UNUSED = ("lm_head.", "model.vision_embed_tokens.wte.")


class HDImages(nn.Module):
    """The tower and what makes tokens of its features. Names of the weights are the published."""

    def __init__(self, tower: CLIPVisionConfig, dim: int, layer: int) -> None:
        super().__init__()
        merged = 4 * int(tower.hidden_size)
        self.layer = layer
        self.img_processor = CLIPVisionModel(tower)
        self.glb_GN = nn.Parameter(torch.empty(1, 1, merged))
        self.sub_GN = nn.Parameter(torch.empty(1, 1, 1, merged))
        self.img_projection = nn.Sequential(nn.Linear(merged, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, images: Sequence[tuple[Tensor, tuple[int, int]]]) -> list[Tensor]:
        """Tokens of each image, (tokens, dim) each.

        Args:
            images: of each its tiles, (1 + rows * columns, 3, side, side), the whole first,
                and its rows and columns of tiles.
        """
        if not images:
            return []
        counts = [len(tiles) for tiles, _ in images]
        pixels = torch.cat([tiles for tiles, _ in images])
        states = torch.split(tower_features(self.img_processor, pixels, self.layer), counts)
        return [self._tokens(part, *grid) for part, (_, grid) in zip(states, images, strict=True)]

    def _tokens(self, states: Tensor, rows: int, columns: int) -> Tensor:
        """States (1 + rows * columns, n * n, dim): rows of the tiles, separator, whole image."""
        tiles = self._rows(join(states[1:], rows, columns))
        whole = self._rows(join(states[:1], 1, 1))
        return torch.as_tensor(self.img_projection(torch.cat([tiles, self.glb_GN[0], whole])))

    def _rows(self, features: Tensor) -> Tensor:
        """Merge 2x2 features, end each row with a newline: (h, w, dim) to (tokens, 4 * dim)."""
        height, width, dim = features.shape
        blocks = features.view(height // 2, 2, width // 2, 2, dim).permute(0, 2, 1, 3, 4)
        merged = blocks.reshape(height // 2, width // 2, 4 * dim)
        newline = self.sub_GN[0].expand(len(merged), 1, -1)
        return torch.cat([merged, newline], dim=1).flatten(0, 1)


class Phi3VModel(Phi3Model):  # type: ignore[misc]
    """The Phi-3 decoder with the images beside it, named as in the published files."""

    def __init__(self, config: Phi3Config) -> None:
        super().__init__(config)
        # The tower is no part of Phi-3's configuration, so it is told here how to attend.
        tower = CLIPVisionConfig(**config.tower, attn_implementation=config._attn_implementation)
        layer = config.img_processor.get("layer_idx", -2)
        self.vision_embed_tokens = HDImages(tower, config.hidden_size, layer)
        self.post_init()


@dataclass(frozen=True, slots=True)
class Phi3VInputs:
    """One item: ids (length,), -1 for an image's tokens; its image (3, height, width), uint8."""

    ids: Tensor
    pixels: Tensor | None = None

    @property
    def n_tokens(self) -> int:
        """Length of the sequence, visual tokens included."""
        return len(self.ids)


class Phi3VBackbone:
    """A Backbone over ``Phi3VModel``, pooled at the last token."""

    family = "vlm2vec_phi3v"
    modalities: frozenset[Modality] = ALL_MODALITIES
    # transformers keeps the rotary factors of the last batch, long or short, in the module.
    stateful = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        rule: ClipRule,
        style: PromptStyle,
        num_crops: int,
        max_length: int,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.style = style
        self.num_crops = num_crops
        self.max_length = max_length
        config: Any = model.config
        self.dim = int(config.hidden_size)
        self._short = int(config.original_max_position_embeddings)

    @property
    def decoder(self) -> Any:
        """The decoder, whose states are pooled."""
        return self.model

    def settings(self) -> dict[str, Any]:
        """Limits and the prompt's style, which move vectors."""
        return {
            "family": self.family,
            "style": self.style,
            "num_crops": self.num_crops,
            "max_length": self.max_length,
        }

    def plan(self, content: Content, instruction: str | None) -> Plan:
        """Tokens of the item; see ``Backbone.plan``."""
        source = only_image(content, self.family)
        item = Content(content.text, content.image, instruction)
        if source is None:
            return Plan(item, self._ids(item, None))
        size = hd_size(*image_size(source), self.num_crops, self.rule.side)
        return Plan(item, self._ids(item, size), (size,))

    def prepare(self, plan: Plan) -> Phi3VInputs:
        """Ids and pixels of the item."""
        item = plan.content
        if not item.images:
            return Phi3VInputs(torch.tensor(plan.ids))
        image = hd_image(load_image(item.images[0]), self.num_crops, self.rule.side)
        # Some files say only behind their pixels that they lie on their side.
        ids = plan.ids if plan.sizes == (image.size,) else self._ids(item, image.size)
        return Phi3VInputs(torch.tensor(ids), channels_first(image))

    def forward(self, batch: Sequence[Phi3VInputs]) -> Tensor:
        """State of each item's last token, (len(batch), dim), not normalised."""
        # Items past the length that Phi-3 was first trained for have other rotary factors, and
        # run apart: the vector of an item must not depend on what it is batched with.
        lengths = [item.n_tokens for item in batch]
        short = [i for i, length in enumerate(lengths) if length <= self._short]
        long = [i for i, length in enumerate(lengths) if length > self._short]
        parts = [self._decode([batch[i] for i in part]) for part in (short, long) if part]
        order = torch.tensor(short + long).argsort()
        return torch.cat(parts)[order.to(parts[0].device)]

    def _decode(self, batch: Sequence[Phi3VInputs]) -> Tensor:
        device = self.model.device
        ids, mask = pad([item.ids for item in batch], 0)
        ids, mask = ids.to(device), mask.to(device)
        embeds = self.model.get_input_embeddings()(ids.clamp(min=0))  # (batch, length, dim)
        images = [self.tiles(item.pixels) for item in batch if item.pixels is not None]
        features = self.model.vision_embed_tokens(images)
        embeds = place_features(embeds, ids == _IMAGE_BLOCK, features)
        # Padded on the right under causal attention, no token sees the padding: no mask is needed.
        output = self.model(inputs_embeds=embeds, use_cache=False)
        return last_token(output.last_hidden_state, mask)

    def tiles(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The whole image and its tiles, (1 + tiles, 3, side, side); their rows and columns."""
        side = self.rule.side
        normalised = self.rule.normalise(send(pixels.contiguous(), self.model.device).unsqueeze(0))
        # On the normalised pixels, as published; resized as bytes, the view would differ.
        whole = F.interpolate(normalised, size=(side, side), mode="bicubic")
        grid = pixels.shape[1] // side, pixels.shape[2] // side
        return torch.cat([whole, cut(normalised[0], side)]), grid

    def _ids(self, content: Content, size: tuple[int, int] | None) -> list[int]:
        prompt = vlm2vec_prompt(content, content.instruction, "", self.style)
        if size is None:
            return tokenize(self.tokenizer, prompt, self.max_length)
        columns, rows = (length // self.rule.side for length in size)
        across = self.rule.across // 2
        # Tiles and whole image, a separator, and the ends of the rows of both.
        visual = (rows * columns + 1) * across**2 + 1 + (rows + 1) * across
        # What stands before the image and what behind are tokenised each with a start token.
        head = [*self.tokenizer("")["input_ids"], *[_IMAGE_BLOCK] * visual]
        return head + tokenize(self.tokenizer, prompt, self.max_length - len(head))


def hd_size(width: int, height: int, num_crops: int, side: int) -> tuple[int, int]:
    """Width and height of an image enlarged or shrunk to fill up to ``num_crops`` tiles."""
    (w, h), tall = _fit(width, height, num_crops, side), height > width
    padded = w, math.ceil(h / side) * side
    return (padded[1], padded[0]) if tall else padded


def hd_image(image: Image.Image, num_crops: int, side: int) -> Image.Image:
    """The image at that size, on white; tall ones lie on their side meanwhile, as published."""
    tall = image.height > image.width
    lying = image.transpose(Image.Transpose.TRANSPOSE) if tall else image
    width, height = _fit(*lying.size, num_crops, side)
    canvas = Image.new("RGB", (width, math.ceil(height / side) * side), "white")
    resized = lying.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(resized, (0, (canvas.height - height) // 2))
    return canvas.transpose(Image.Transpose.TRANSPOSE) if tall else canvas


def _fit(width: int, height: int, num_crops: int, side: int) -> tuple[int, int]:
    """Size of an image, longer side first, that is as many tiles long as ``num_crops`` allows."""
    ratio = max(width, height) / min(width, height)
    across = 1
    while (across + 1) * math.ceil((across + 1) / ratio) <= num_crops:
        across += 1
    return across * side, max(1, int(across * side / ratio))


def load_phi3v(
    folder: Path,
    placement: Placement,
    *,
    style: PromptStyle = "demo",
    num_crops: int | None = None,
    max_length: int = 8192,
) -> Phi3VBackbone:
    """Load VLM2Vec-Full; for ``style`` see ``vlm2vec_prompt``.

    ``num_crops`` is the most tiles of an image; by default what the checkpoint says. The
    evaluation on MMEB used 4, the published example 16.

    Raises:
        ConfigError: For ``num_crops`` under 1.
    """
    config = read_config(folder)
    model = load_exact(
        Phi3VModel, folder, placement, unused=_UNUSED, config=config, key_mapping=TOWER_NAMES
    )
    rule = replace(
        read_clip_rule(folder, config.tower["patch_size"]), side=config.tower["image_size"]
    )
    said = read_json(folder / "preprocessor_config.json").get("num_crops", 4)
    crops = num_crops if num_crops is not None else int(said)
    if crops < 1:
        raise ConfigError(f"num_crops={crops} is not possible: an image needs at least 1.")
    rows = model.get_input_embeddings().num_embeddings
    tokenizer = load_tokenizer(folder, rows=rows, tokens={"<|endoftext|>": config.pad_token_id})
    return Phi3VBackbone(model, tokenizer, rule, style, crops, max_length)


def read_config(folder: Path) -> Phi3Config:
    """Phi-3's configuration from Phi-3.5-vision's, with the tower's size beside it.

    Raises:
        ModelError: For a folder that is no Phi-3.5-vision checkpoint.
    """
    published = read_json(folder / "config.json")
    if published.get("model_type") != "phi3_v" or "rope_scaling" not in published:
        raise ModelError(f"{folder}: config.json is missing or is not Phi-3.5-vision's.")
    foreign = ("model_type", "auto_map", "architectures")
    fields = {key: value for key, value in published.items() if key not in foreign}
    trained = published.get("original_max_position_embeddings", 4096)
    # LongRoPE (arXiv 2402.13753) under an older name.
    fields["rope_scaling"] = {
        **published["rope_scaling"],
        "type": "longrope",
        "original_max_position_embeddings": trained,
        "factor": published["max_position_embeddings"] / trained,
    }
    fields["sliding_window"] = None  # the published one is wider than the context
    fields["tower"] = {**_TOWER, **read_json(folder / "clip_config.json")}
    config: Phi3Config = Phi3Config.from_dict(fields)
    return config
