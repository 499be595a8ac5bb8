"""The recipes of the CLIP families written out for one item: plain loops, no padding, no batch."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def read_weights(folder: Path) -> Weights:
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.float() for part in parts for name, tensor in part.items()}


def normalised(image: Image.Image) -> Tensor:
    pixels = torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1)
    return (pixels / 255 - MEAN) / STD


def clip_states(w: Weights, prefix: str, pixels: Tensor, heads: int, layers: int) -> Tensor:
    """States of a tile (3, side, side) before the last layer, class token left out."""
    w = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
    patches = F.conv2d(pixels[None], w["embeddings.patch_embedding.weight"], stride=14)[0]
    x = torch.cat([w["embeddings.class_embedding"][None], patches.flatten(1).T])
    x = norm(x + w["embeddings.position_embedding.weight"], w, "pre_layrnorm")
    for i in range(layers - 1):
        layer = f"encoder.layers.{i}."
        y = norm(x, w, layer + "layer_norm1")
        q, k, v = (
            linear(y, w, f"{layer}self_attn.{n}_proj").view(len(y), heads, -1).transpose(0, 1)
            for n in "qkv"
        )
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        joined = (weights @ v).transpose(0, 1).flatten(1)
        x = x + linear(joined, w, layer + "self_attn.out_proj")
        y = linear(norm(x, w, layer + "layer_norm2"), w, layer + "mlp.fc1")
        x = x + linear(y * torch.sigmoid(1.702 * y), w, layer + "mlp.fc2")
    return x[1:]


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def norm(x: Tensor, w: Weights, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotate(x: Tensor, frequencies: Tensor, scale: float) -> Tensor:
    """Rotary positions on (heads, length, dim)."""
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def decode(
    w: Weights,
    prefix: str,
    x: Tensor,
    frequencies: Tensor,
    *,
    causal: bool,
    scale: float = 1.0,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 2,
) -> Tensor:
    """States after the final norm of a Llama-like decoder on embeddings (length, dim)."""
    length, dim = x.shape
    size = dim // heads
    for i in range(layers):
        layer = f"{prefix}.layers.{i}"
        y = rms(x, w[f"{layer}.input_layernorm.weight"])
        if f"{layer}.self_attn.qkv_proj.weight" in w:
            joined = linear(y, w, f"{layer}.self_attn.qkv_proj")
        else:
            joined = torch.cat([linear(y, w, f"{layer}.self_attn.{n}_proj") for n in "qkv"], -1)
        q, k, v = (
            part.view(length, -1, size).transpose(0, 1)
            for part in joined.split([dim, kv_heads * size, kv_heads * size], dim=-1)
        )
        q, k = rotate(q, frequencies, scale), rotate(k, frequencies, scale)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
        logits = q @ k.transpose(1, 2) / math.sqrt(size)
        if causal:
            logits = logits + torch.full((length, length), -torch.inf).triu(1)
        attended = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(attended, w, f"{layer}.self_attn.o_proj")
        y = rms(x, w[f"{layer}.post_attention_layernorm.weight"])
        if f"{layer}.mlp.gate_up_proj.weight" in w:
            gate, up = linear(y, w, f"{layer}.mlp.gate_up_proj").chunk(2, dim=-1)
        else:
            gate, up = linear(y, w, f"{layer}.mlp.gate_proj"), linear(y, w, f"{layer}.mlp.up_proj")
        x = x + linear(F.silu(gate) * up, w, f"{layer}.mlp.down_proj")
    return rms(x, w[f"{prefix}.norm.weight"])


def unit(vector: Tensor) -> np.ndarray:
    return (vector / vector.norm()).numpy()
