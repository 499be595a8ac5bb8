"""The vision tower and the dictionary behind it: what they are and how they start.

Visual tokens are taught to be the sum of the vectors of the trigrams they show; the decoder then
adds them up as it adds up token vectors, and a page lies where its text lies.

Two things in the start matter on a CPU. The patch embedding is a cosine transform, so that no
pixel is lost; it stays as it is. And each head looks at one neighbour of its patch: constant
queries and keys whose rotary angles differ by that neighbour's offset. So the tower reads a whole
page as it reads a small crop.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmrag.modeling.qwen_images import CLIP_STD, to_patches
from mmrag_recipes.nano.config import VisionConfig
from mmrag_recipes.nano.crops import WHOLE
from mmrag_recipes.nano.vectors import Matrix

HEAD_DIM = 32
NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0), (0, 2), (0, -2))  # rows down, columns right
_LOCALITY = 6.0  # logits per rotary pair
_PAIRS = 4  # rotary pairs per axis that take part: the fast ones
CODE = 0.02  # share of a token's code that the decoder's residual connection lets through
_COLOURS = ((1.0, -1.0, 0.0), (0.5, 0.5, -1.0))  # red against green, both against blue
_COLOUR_SIZE = 0.02
_FIRING = 2.0  # gate of a trigram that is as likely there as not


def vision_settings(config: VisionConfig, width: int) -> dict[str, Any]:
    """The tower's part of ``config.json``; ``width`` is the decoder's."""
    heads = config.width // HEAD_DIM
    return {
        "depth": config.depth,
        "embed_dim": config.width,
        "num_heads": heads,
        "hidden_size": width,
    }


def new_tower(config: VisionConfig, width: int, seed: int) -> Any:
    """A tower before training."""
    settings = Qwen2VLConfig(vision_config=vision_settings(config, width)).vision_config
    settings._attn_implementation = "sdpa"
    torch.manual_seed(seed)
    tower: Any = Qwen2VisionTransformerPretrainedModel(settings)
    with torch.no_grad():
        tower.patch_embed.proj.weight.copy_(cosine_patches(config.width))
        for block in tower.blocks:
            _start_block(block, config.width)
        _start_merger(tower.merger.mlp)
    return tower


def cosine_patches(width: int, patch: int = 14) -> Tensor:
    """The slowest waves of the 2-D cosine transform of the brightness, and two means of colour.

    Returns: weight of the patch embedding, (width, 3, 2, patch, patch).
    """
    k = np.arange(patch)
    waves = np.cos(np.pi * (k[None] + 0.5) * k[:, None] / patch) * math.sqrt(2 / patch)
    waves[0] /= math.sqrt(2)
    slowest = sorted(np.ndindex(patch, patch), key=lambda uv: uv[0] ** 2 + uv[1] ** 2)
    order = slowest[: width - len(_COLOURS)]
    # The mean brightness would drown the rest in the first LayerNorm.
    planes = [np.outer(waves[u], waves[v]) * (1.0 if u + v else 0.05) for u, v in order]
    plane = torch.tensor(np.stack(planes), dtype=torch.float32) * 0.134
    brightness = plane[:, None, None].expand(-1, 3, 2, -1, -1)
    # Times the deviations that channels are divided by, so that grey has no colour.
    channels = torch.tensor(_COLOURS) * torch.tensor(CLIP_STD)
    colour = channels[:, :, None, None, None].expand(-1, -1, 2, patch, patch) * _COLOUR_SIZE
    return torch.cat([brightness, colour])


def _start_block(block: Any, width: int) -> None:
    qkv, out = block.attn.qkv, block.attn.proj
    nn.init.normal_(qkv.weight[: 2 * width], std=0.02)
    nn.init.normal_(qkv.weight[2 * width :], std=width**-0.5)
    nn.init.normal_(out.weight, std=0.5 * width**-0.5)
    nn.init.normal_(block.mlp.fc1.weight, std=width**-0.5)
    nn.init.normal_(block.mlp.fc2.weight, std=0.5 * (4 * width) ** -0.5)
    for layer in (qkv, out, block.mlp.fc1, block.mlp.fc2):
        nn.init.zeros_(layer.bias)
    qkv.bias.copy_(neighbour_bias(width // HEAD_DIM))


def _start_merger(mlp: Any) -> None:
    """A linear map: gelu(x) - gelu(-x) = x."""
    half = mlp[0].out_features // 2
    mix = torch.randn(half, mlp[0].in_features) * mlp[0].in_features ** -0.5
    through = torch.eye(mlp[2].out_features, half)
    mlp[0].weight.copy_(torch.cat([mix, -mix]))
    mlp[2].weight.copy_(torch.cat([through, -through], dim=1))
    nn.init.zeros_(mlp[0].bias)
    nn.init.zeros_(mlp[2].bias)


def neighbour_bias(heads: int) -> Tensor:
    """Bias of queries, keys and values that points head ``i`` at neighbour ``i``, (3 * width,).

    With these, the logit between patches at distance d is a sum of cos(frequency * (d - offset)).
    """
    bias = torch.zeros(3, heads, HEAD_DIM)
    per_axis = HEAD_DIM // 4
    frequency = 10000.0 ** (-2 * np.arange(per_axis) / (HEAD_DIM // 2))
    size = math.sqrt(_LOCALITY * math.sqrt(HEAD_DIM))
    for head in range(heads):
        for axis, offset in enumerate(NEIGHBOURS[head % len(NEIGHBOURS)]):
            for pair in range(_PAIRS):
                at = axis * per_axis + pair
                angle = frequency[pair] * offset
                bias[0, head, at] = size * math.cos(angle)
                bias[0, head, at + HEAD_DIM // 2] = size * math.sin(angle)
                bias[1, head, at] = size
    return bias.flatten()


class Dictionary(nn.Module):
    """From codes of visual tokens to sums of trigram vectors; a SwiGLU with one unit a trigram.

    Unit k fires when trigram k is read, and adds its vector. It becomes the first feed-forward
    layer of the decoder (``checkpoint.dictionary_weights``): to look up thousands of vectors that
    follow no rule is beyond the tower's own layers.

    Args:
        vectors: (units, dim), the vectors of the most common trigrams, in training units.
    """

    vectors: Tensor

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        units, dim = vectors.shape
        self.register_buffer("vectors", vectors.clone(), persistent=False)
        self.gate = nn.Linear(dim, units)
        self.up = nn.Linear(dim, units)
        nn.init.normal_(self.gate.weight, std=dim**-0.5)
        nn.init.constant_(self.gate.bias, -4.0)
        nn.init.zeros_(self.up.weight)
        nn.init.constant_(self.up.bias, 0.2)

    def forward(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (tokens, dim), and the logits of each trigram's presence (tokens, units)."""
        gate = self.gate(codes)
        fired = F.silu(gate) * self.up(codes)
        # The residual connection of the decoder lets the codes through, made small.
        return CODE * codes + fired @ self.vectors, gate - _FIRING


@torch.no_grad()
def read_picture(tower: Any, dictionary: Dictionary, picture: Image.Image) -> Tensor:
    """Vectors of the visual tokens of an RGB picture sized to whole tokens, (tokens, dim)."""
    patches, grid = to_patches(picture, WHOLE)
    codes = tower(patches, grid_thw=torch.tensor([grid])).pooler_output
    tokens: Tensor = dictionary(codes[:, : dictionary.vectors.shape[1]])[0]
    return tokens


def vectors_for_tower(vectors: Matrix) -> tuple[Tensor, float]:
    """Trigram vectors in training units, and that unit."""
    size = common_size(vectors)
    scaled: NDArray[np.float32] = np.asarray(vectors / size, dtype=np.float32)
    return torch.from_numpy(scaled), size


def common_size(vectors: Matrix, most_common: int = 500) -> float:
    """Root mean square norm of the vectors of the most common trigrams: the unit of training."""
    return float(np.sqrt((vectors[:most_common] ** 2).sum(axis=1).mean()))
