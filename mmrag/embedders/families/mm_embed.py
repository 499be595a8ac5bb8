"""MM-Embed: LLaVA-NeXT whose decoder is NV-Embed-v1, bidirectional, with latent attention.

An image is seen once, squashed to one square. Every token but those of the instruction enters
the mean, after it has looked at a trained set of latents.

Source: MM-Embed (arXiv 2411.02571), NV-Embed (arXiv 2405.17428, section 3), and their published
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaNextConfig, LlavaNextModel, PreTrainedTokenizerBase

from mmrag.content import Content, Modality, load_image
from mmrag.errors import ContentError, ModelError
from mmrag.modeling.backbone import Plan
from mmrag.modeling.batching import pad, send
from mmrag.modeling.checkpoints import read_json
from mmrag.modeling.clip_images import (
    TOWER_NAMES,
    ClipRule,
    only_image,
    place_features,
    read_clip_rule,
    tower_features,
)
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.pooling import mean_tokens
from mmrag.modeling.prompts import Prompt, expand, harmless, tokenize
from mmrag.modeling.qwen_vl import ALL_MODALITIES
from mmrag.modeling.tokenizers import load_tokenizer

IMAGE = "<image>"

# nvidia/NV-Embed-v1, whose configuration MM-Embed names and does not hold: the decoder's and
# the latent attention's. A checkpoint with another decoder has it in retriever/config.json.
_DECODER: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
_LATENT: dict[str, Any] = {
    "num_latents_value": 512,
    "num_cross_heads": 8,
    "cross_dim_head": 4096,
    "latent_dim": 4096,
}


class _CrossAttention(nn.Module):
    """Tokens ask, latents answer. Names of the weights are the published ones."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, tokens: Tensor, latents: Tensor) -> Tensor:
        """Tokens (batch, length, dim), latents (latents, dim); returns (batch, length, dim)."""
        keys, values = self.to_kv(latents).unsqueeze(0).chunk(2, dim=-1)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.to_q(tokens), keys, values)
        )
        k, v = (part.expand(len(q), -1, -1, -1) for part in (k, v))
        attended = F.scaled_dot_product_attention(q, k, v)  # (batch, heads, length, head_dim)
        return torch.as_tensor(self.to_out(attended.transpose(1, 2).flatten(2)))


class _GatedGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        values, gates = x.chunk(2, dim=-1)
        return values * F.gelu(gates)


class _Block(nn.Module):
    """A layer behind a norm; ``context`` is another input, with a norm of its own."""

    def __init__(self, dim: int, layer: nn.Module, with_context: bool) -> None:
        super().__init__()
        self.fn = layer
        self.norm = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(dim) if with_context else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norm(x)
        if self.norm_context is None:
            return torch.as_tensor(self.fn(x))
        return torch.as_tensor(self.fn(x, self.norm_context(context)))


class _FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 8 * dim), _GatedGelu(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.net(x))


class LatentAttention(nn.Module):
    """NV-Embed's latent attention (arXiv 2405.17428, section 3.2), before its mean."""

    def __init__(self, latents: int, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(latents, dim))
        self.cross_attend_blocks = nn.ModuleList(
            [
                _Block(dim, _CrossAttention(dim, heads, head_dim), with_context=True),
                _Block(dim, _FeedForward(dim), with_context=False),
            ]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """States (batch, length, dim) to states of the same shape."""
        attend, feed = self.cross_attend_blocks
        hidden = attend(hidden, self.latents) + hidden
        return torch.as_tensor(feed(hidden) + hidden)


class MMEmbedModel(LlavaNextModel):  # type: ignore[misc]
    """LLaVA-NeXT with a bidirectional decoder, and NV-Embed's latent attention beside it."""

    def __init__(self, config: LlavaNextConfig) -> None:
        super().__init__(config)
        latent = config.latent_attention_config
        self.latent_attention_model = LatentAttention(
            latent["num_latents_value"],
            latent["latent_dim"],
            latent["num_cross_heads"],
            latent["cross_dim_head"],
        )
        for layer in self.language_model.layers:
            # transformers passes a mask of its own only where there is padding; without one, SDPA
            # goes by this.
            layer.self_attn.is_causal = False
        self.post_init()


@dataclass(frozen=True, slots=True)
class MMEmbedInputs:
    """One item: ids (length,), image (1, 3, side, side), uint8, and tokens left out of the mean."""

    ids: Tensor
    tiles: Tensor | None
    masked: int

    @property
    def n_tokens(self) -> int:
        """Length of the sequence, visual tokens included."""
        return len(self.ids)


class MMEmbedBackbone:
    """A Backbone over ``MMEmbedModel``. ``max_length`` counts an image as one token."""

    family = "mm_embed"
    modalities: frozenset[Modality] = ALL_MODALITIES

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rule: ClipRule, max_length: int
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.max_length = max_length
        config: Any = model.config
        self.dim = int(config.text_config.hidden_size)
        self._image_id = int(config.image_token_id)
        self._layer = int(config.vision_feature_layer)
        self._end_id = int(tokenizer.eos_token_id)
        self._vocabulary = int(config.text_config.vocab_size)

    def settings(self) -> dict[str, Any]:
        """The limit, which moves vectors of long texts."""
        return {"family": self.family, "max_length": self.max_length}

    def plan(self, content: Content, instruction: str | None) -> Plan:
        """Tokens of the item; an empty instruction marks a query without one."""
        only_image(content, self.family)
        item, task = harmless(content, instruction, (IMAGE,))
        ids = tokenize(self.tokenizer, mm_embed_prompt(item, task), self.max_length - 1)
        # Tokens beyond the vocabulary, such as padding, are embedded as the end token.
        known = [i if i < self._vocabulary or i == self._image_id else self._end_id for i in ids]
        visual = [self.rule.across**2 + 1] if item.images else []
        return Plan(item, [*expand(known, self._image_id, visual), self._end_id])

    def prepare(self, plan: Plan) -> MMEmbedInputs:
        """Ids and pixels of the item.

        Raises:
            ContentError: If the instruction alone is longer than ``max_length``.
        """
        task, images = plan.content.instruction, plan.content.images
        # As published, transparency is dropped, not laid on white.
        tiles = self.rule.whole(load_image(images[0], on_white=False)) if images else None
        masked = 0
        if task:
            # Its length with start and end tokens. Within the prompt no end token follows it, so
            # that the newline behind it is left out of the mean too, as published.
            masked = len(self.tokenizer(f"Instruct: {task}")["input_ids"]) + 1
        if masked >= plan.n_tokens:
            raise ContentError(
                f"the instruction alone is over max_length={self.max_length} tokens; raise it."
            )
        return MMEmbedInputs(torch.tensor(plan.ids), tiles, masked)

    def forward(self, batch: Sequence[MMEmbedInputs]) -> Tensor:
        """Mean over each item's tokens behind its instruction, (len(batch), dim)."""
        device = self.model.device
        ids, mask = pad([item.ids for item in batch], self._end_id)
        ids, mask = ids.to(device), mask.to(device)
        places = ids == self._image_id
        # The image's token has no embedding of its own.
        embeds = self.model.get_input_embeddings()(ids.masked_fill(places, 0))
        embeds = place_features(embeds, places, self._features(batch))
        output = self.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, use_cache=False
        )
        hidden = self.model.latent_attention_model(output.last_hidden_state)
        starts = torch.tensor([item.masked for item in batch], device=device)
        behind = torch.arange(ids.shape[1], device=device) >= starts.unsqueeze(1)
        # In float32: a sum over hundreds of tokens loses digits in half precision.
        return mean_tokens(hidden.float(), mask * behind)

    def _features(self, batch: Sequence[MMEmbedInputs]) -> list[Tensor]:
        """Visual tokens of each image of a batch, (tokens, dim) each; the last is a newline."""
        tiles = [item.tiles for item in batch if item.tiles is not None]
        if not tiles:
            return []
        tower = self.model.vision_tower
        pixels = self.rule.normalise(send(torch.cat(tiles), tower.device))
        states = tower_features(tower, pixels, self._layer)
        projected = self.model.multi_modal_projector(states)  # (images, n * n, dim)
        newline = self.model.image_newline.to(projected.dtype).expand(len(projected), 1, -1)
        return list(torch.cat([projected, newline], dim=1))


def mm_embed_prompt(content: Content, instruction: str | None) -> Prompt:
    """MM-Embed's literal prompt; ``None`` is a document, an empty instruction a bare query."""
    image = f"{IMAGE}\n" if content.images else ""
    if instruction is None:
        task = ""
    else:
        task = f"Instruct: {instruction}\nQuery: " if instruction else "Query: "
    return Prompt(task + image, content.text or "", "")


def load_mm_embed(folder: Path, placement: Placement, *, max_length: int = 512) -> MMEmbedBackbone:
    """Load MM-Embed."""
    config = read_config(folder)
    model = load_exact(MMEmbedModel, folder, placement, config=config, key_mapping=TOWER_NAMES)
    rule = read_clip_rule(folder, int(config.vision_config.patch_size))
    rows = model.get_input_embeddings().num_embeddings
    tokenizer = load_tokenizer(folder, rows=rows, tokens={IMAGE: config.image_token_id})
    return MMEmbedBackbone(model, tokenizer, rule, max_length)


def read_config(folder: Path) -> LlavaNextConfig:
    """LLaVA-NeXT's configuration with NV-Embed's decoder in place of its own.

    Raises:
        ModelError: For a decoder that is neither NV-Embed-v1 nor described in the folder.
    """
    published = read_json(folder / "config.json")
    if published.get("model_type") != "llava_next":
        raise ModelError(f"{folder}: config.json is missing or is not MM-Embed's.")
    retriever = read_json(folder / "retriever" / "config.json")
    named = published.get("retriever")
    if not retriever and named != "nvidia/NV-Embed-v1":
        raise ModelError(
            f"{folder}: its decoder is {named!r}; put that model's config.json into retriever/."
        )
    decoder = {**_DECODER, **retriever.get("text_config", {})}
    # Attention goes both ways and over any distance.
    decoder |= {"model_type": "mistral", "is_causal": False, "sliding_window": None}
    latent = {**_LATENT, **retriever.get("latent_attention_config", {})}
    fields = {**published, "text_config": decoder, "latent_attention_config": latent}
    config: LlavaNextConfig = LlavaNextConfig.from_dict(fields)
    return config
