"""Memory that a training takes on each card: an order of magnitude, not a promise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mmrag_recipes.config import LoraConfig, RunConfig

# Bytes of a weight with its share of the scales, in blocks of 64 (QLoRA, arXiv 2305.14314,
# section 3): one float32 each, or one byte each and a float32 for 256 of them.
_QUANTISED = {
    None: 0.0,
    "8bit": 1.0,
    "4bit": 0.5 + 4 / 64,
    "4bit-double": 0.5 + 1 / 64 + 4 / (64 * 256),
}


@dataclass(frozen=True)
class Sizes:
    """Numbers of weights of a model, and what its decoder keeps.

    linear: in linear layers, which quantisation is for. trained: those that train. block: of the
    largest block. outside: in no block. layers: of the decoder. layer_bytes: see ``layer_bytes``.
    """

    weights: int
    linear: int
    trained: int
    block: int
    outside: int
    layers: int
    hidden: int
    layer_bytes: int


def sizes_of(model: Any, config: RunConfig) -> Sizes:
    """Sizes of a model that is not prepared for training; it may be on the meta device."""
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    # A head is not quantised, and is none of its own where it is tied to the embeddings.
    linear.pop("lm_head", None)
    # What is quantised is packed, and has another shape.
    matrices = {f"{name}.weight": w.in_features * w.out_features for name, w in linear.items()}
    counts |= matrices
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    named = model.named_modules()
    blocks = [f"{name}." for name, module in named if type(module).__name__ in kinds]
    of_blocks = [sum(n for name, n in counts.items() if name.startswith(one)) for one in blocks]
    if config.lora:
        trained = adapter_weights(linear, config.lora)
    else:
        trained = sum(n for name, n in counts.items() if not name.startswith(config.freeze))
    text = model.config.get_text_config()
    return Sizes(
        weights=sum(counts.values()),
        linear=sum(matrices.values()),
        trained=trained,
        block=max(of_blocks, default=0),
        outside=sum(counts.values()) - sum(of_blocks),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        layer_bytes=layer_bytes(text),
    )


def adapter_weights(linear: Mapping[str, nn.Linear], lora: LoraConfig) -> int:
    """Weights of the adapters of some linear layers by name."""
    adapted = [layer for name, layer in linear.items() if re.fullmatch(lora.targets, name)]
    magnitudes = sum(layer.out_features for layer in adapted) if lora.dora else 0
    return lora.r * sum(one.in_features + one.out_features for one in adapted) + magnitudes


def layer_bytes(text: Any) -> int:
    """What one layer of a decoder keeps of a token for the backward pass, in half precision.

    Nine tensors of the width of the hidden state (around norms, projections and attention), three
    of keys and values, and four of a gated MLP; attention scores are computed again. An inventory
    as that of Korthikanti et al. (arXiv 2205.05198, section 4.1), for layers of today as autograd
    keeps them.
    """
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = head * getattr(text, "num_key_value_heads", heads)
    return int(2 * (9 * text.hidden_size + 3 * keys + 4 * text.intermediate_size))


def memory_of(
    sizes: Sizes, config: RunConfig, tokens: float, width: int = 4, cards: int = 1
) -> dict[str, float]:
    """Bytes on each card, by what they are for.

    Args:
        tokens: that are in memory with a graph at a time, on one card.
        width: bytes of a weight under adapters that is not quantised; all weights train in 4.
        cards: that share the work, and with ``shard`` the weights.
    """
    way = config.lora.quantize if config.lora else None
    if way:
        # prepare_model_for_kbit_training of peft leaves the rest in float32.
        weights = _QUANTISED[way] * sizes.linear + 4.0 * (sizes.weights - sizes.linear)
    else:
        weights = float((width if config.lora else 4) * sizes.weights)
    if config.lora:
        weights += 4 * sizes.trained
    share = cards if config.shard else 1
    parts = {
        "weights": weights / share,
        "gradients": 4 * sizes.trained / share,
        "optimizer": 8 * sizes.trained / share,
    }
    if config.shard:
        # Weights and gradients of what runs, and the weights of the block that comes next.
        parts["gathered"] = 8.0 * (sizes.outside + sizes.block) + 4.0 * sizes.block
    # Hidden states are float32 where embeddings and norms are, which they are around 4 bits too.
    factor = 1 if config.lora and width == 2 and not way else 2
    kept = sizes.layers * sizes.layer_bytes
    if config.gradient_checkpointing:
        # The input of each layer, and all of the one that is computed again.
        kept = sizes.layers * 2 * sizes.hidden + sizes.layer_bytes
    parts["activations"] = factor * kept * tokens
    return parts
