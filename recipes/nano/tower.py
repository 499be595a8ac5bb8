"""The vision tower: how it starts, and how it learns to read.

Visual tokens are taught to be the sum of the vectors of the trigrams they show; the decoder then
adds them up as it adds up token vectors, and a page lies where its text lies.

Two things in the start matter on a CPU. The patch embedding is a cosine transform, so that no
pixel is lost. And each head looks at one neighbour of its patch: constant queries and keys whose
rotary angles differ by that neighbour's offset. So the tower reads a whole page as it reads a
small crop.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2VLConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from mmrag.embedders.qwen_images import PictureRule, to_patches
from recipes.nano import glyphs
from recipes.nano.config import VisionConfig
from recipes.nano.vectors import Matrix

HEAD_DIM = 32
NEIGHBOURS = ((0, 1), (0, -1), (1, 0), (-1, 0), (0, 2), (0, -2))  # rows down, columns right
_LOCALITY = 6.0  # logits per rotary pair
_PAIRS = 4  # rotary pairs per axis that take part: the fast ones
_RULE = PictureRule(min_pixels=28 * 28, max_pixels=28 * 28 * 16384)
_WARM_UP = 60
_KEPT = 400  # crops kept for a second look
_SAVE_EVERY = 100


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
        nn.init.normal_(tower.merger.mlp[0].weight, std=(4 * config.width) ** -0.5)
        nn.init.zeros_(tower.merger.mlp[0].bias)
        nn.init.zeros_(tower.merger.mlp[2].weight)
        nn.init.zeros_(tower.merger.mlp[2].bias)
    return tower


def cosine_patches(width: int, patch: int = 14) -> Tensor:
    """The ``width`` slowest waves of the 2-D cosine transform of the mean colour.

    Returns: weight of the patch embedding, (width, 3, 2, patch, patch).
    """
    k = np.arange(patch)
    waves = np.cos(np.pi * (k[None] + 0.5) * k[:, None] / patch) * math.sqrt(2 / patch)
    waves[0] /= math.sqrt(2)
    order = sorted(np.ndindex(patch, patch), key=lambda uv: uv[0] ** 2 + uv[1] ** 2)[:width]
    # The mean brightness would drown the rest in the first LayerNorm.
    planes = [np.outer(waves[u], waves[v]) * (1.0 if u + v else 0.05) for u, v in order]
    plane = torch.tensor(np.stack(planes), dtype=torch.float32) * 0.134
    return plane[:, None, None].expand(-1, 3, 2, -1, -1).clone()


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


@dataclass(frozen=True)
class Crop:
    """One example.

    patches: (patches, pixels) as the picture rule cuts them; grid: their rows and columns.
    classes: (patches, 4), the character under each probe.
    places: (n, 2), patch and trigram. wanted: (tokens, dim), sums of their trigrams' vectors.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    classes: Tensor
    places: Tensor
    wanted: Tensor


class Crops:
    """An endless source of rendered crops of running text."""

    def __init__(
        self,
        texts: Sequence[str],
        vectors: Tensor,
        vocabulary: dict[str, int],
        config: VisionConfig,
        seed: int,
    ) -> None:
        self.words = [word for text in texts for word in text.split() if len(word) < 25]
        self.vectors = vectors
        self.vocabulary = vocabulary
        self.config = config
        self.fonts = glyphs.find_fonts(config.fonts, config.faces)
        if not self.fonts:
            raise FileNotFoundError(f"no TrueType fonts in {', '.join(config.fonts)}")
        self.rng = random.Random(seed)
        self.kept: list[Crop] = []

    def batch(self) -> list[Crop]:
        """``config.crops`` crops: half of them new, once there are some to look at again."""
        n = self.config.crops
        new = [self.draw() for _ in range(n // 2 if len(self.kept) >= 8 * n else n)]
        again = self.rng.sample(self.kept, n - len(new))
        self.kept = (self.kept + new)[-_KEPT:]
        return new + again

    def draw(self) -> Crop:
        """One new crop."""
        wide, tall = self.config.crop_width, self.config.crop_height
        start = self.rng.randrange(max(1, len(self.words) - 260))
        words = self.words[start : start + 260]
        if self.rng.random() < 0.03:
            words = [word.upper() for word in words]
        layout = glyphs.random_layout(self.fonts, self.rng)
        picture, found = glyphs.render(words, wide, tall, layout)
        picture, found = glyphs.clear_edge(picture, found, layout.paper, self.rng)
        places = glyphs.gram_places(found, wide, tall, self.vocabulary)
        where = torch.tensor(places, dtype=torch.long).view(-1, 2)
        patches, grid = to_patches(picture.convert("RGB"), _RULE)
        wanted = torch.zeros(len(patches) // 4, self.vectors.shape[1])
        wanted.index_add_(0, where[:, 0] // 4, self.vectors[where[:, 1]])
        classes = torch.from_numpy(glyphs.probe_classes(found, wide, tall))
        return Crop(patches, grid, classes, where, wanted)


def common_size(vectors: Matrix, most_common: int = 500) -> float:
    """Root mean square norm of the vectors of the most common trigrams: the unit of training."""
    return float(np.sqrt((vectors[:most_common] ** 2).sum(axis=1).mean()))


class Heads(nn.Module):
    """What reads the states of patches during training only.

    letters: the class under each of the four probes. grams: a direction in the trigrams' space;
    the nearest trigram vector is the one that was read.
    """

    def __init__(self, width: int, vectors: Tensor) -> None:
        super().__init__()
        self.letters = nn.Linear(width, 4 * len(glyphs.CLASSES))
        self.grams = nn.Linear(width, vectors.shape[1])
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))
        self.directions = F.normalize(vectors, dim=1)  # (trigrams, dim); fixed, so no buffer

    def gram_logits(self, states: Tensor) -> Tensor:
        """Scores of the common trigrams, (patches, trigrams)."""
        read = F.normalize(self.grams(states), dim=1)
        return self.sharpness.exp() * read @ self.directions.T


def read_loss(tower: Any, heads: Heads, crops: Sequence[Crop]) -> tuple[Tensor, dict[str, float]]:
    """Letters and trigrams per patch, wanted vectors per token, and their sum per crop.

    The sum is what a page's vector is made of: errors that all tokens share hurt it most.
    """
    classes = torch.cat([crop.classes for crop in crops]).flatten()
    wanted = torch.cat([crop.wanted for crop in crops])
    with torch.autocast("cpu", torch.bfloat16):
        grid = torch.tensor([crop.grid for crop in crops])
        output = tower(torch.cat([crop.patches for crop in crops]), grid_thw=grid)
        letters = heads.letters(output.last_hidden_state)
    letters = letters.float().view(-1, len(glyphs.CLASSES))
    tokens = output.pooler_output.float()[:, : wanted.shape[1]]
    token_error = unexplained(tokens, wanted)
    shape = (len(crops), -1, wanted.shape[1])
    crop_error = unexplained(tokens.view(shape).sum(1), wanted.view(shape).sum(1))
    loss = 0.5 * F.cross_entropy(letters, classes) + 2 * token_error + crop_error
    patch, gram = _common_places(crops, len(heads.directions))
    if len(patch):
        scores = heads.gram_logits(output.last_hidden_state.float()[patch])
        loss = loss + F.cross_entropy(scores, gram)
    inked = classes > 0
    right = (letters.argmax(1) == classes)[inked].float().mean()
    return loss, {
        "letters": float(right),
        "unexplained": float(token_error.detach()),
        "unexplained sums": float(crop_error.detach()),
    }


def unexplained(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error as a share of what was wanted; an empty batch counts as one unit."""
    return ((found - wanted) ** 2).sum() / (wanted**2).sum().clamp(min=1.0)


def _common_places(crops: Sequence[Crop], grams: int) -> tuple[Tensor, Tensor]:
    """Patch of the batch and trigram, for the trigrams that are told apart."""
    size = len(crops[0].classes)
    places = torch.cat([c.places + torch.tensor([i * size, 0]) for i, c in enumerate(crops)])
    places = places[places[:, 1] < grams]
    return places[:, 0], places[:, 1]


def train_tower(config: VisionConfig, width: int, crops: Crops, out: Path, seed: int) -> Any:
    """Train for ``config.minutes``; saved to ``out`` as it goes, resumable."""
    torch.manual_seed(seed)
    tower = new_tower(config, width, seed)
    heads = Heads(config.width, crops.vectors[: config.grams])
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98))
    step, spent = 0, 0.0
    if out.is_file():
        state = torch.load(out, weights_only=True)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    began = time.monotonic() - spent
    while (spent := time.monotonic() - began) < 60 * config.minutes:
        rate = _rate(step, spent / (60 * config.minutes))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        loss, metrics = read_loss(tower, heads, crops.batch())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"step {step}, {spent / 60:.0f} min: {shown}", flush=True)
        if step % _SAVE_EVERY == 0:
            _save(out, tower, heads, optimizer, step, spent)
    _save(out, tower, heads, optimizer, step, spent)
    return tower


def _rate(step: int, done: float) -> float:
    """Warm-up by steps, then a cosine over the time."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return min(1.0, (step + 1) / _WARM_UP) * max(0.02, cosine)


def _save(
    out: Path,
    tower: Any,
    heads: Heads,
    optimizer: torch.optim.Optimizer,
    step: int,
    spent: float,
) -> None:
    state = {
        "tower": tower.state_dict(),
        "heads": heads.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": spent,
    }
    partial = out.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(out)


@torch.no_grad()
def silence_blank(tower: Any) -> None:
    """Make the tokens of white paper exactly zero, by the bias of the last layer.

    All tokens of an empty page are equal, and a page has hundreds of them.
    """
    patches, grid = to_patches(Image.new("RGB", (280, 280), "white"), _RULE)
    blank = tower(patches, grid_thw=torch.tensor([grid])).pooler_output
    tower.merger.mlp[2].bias -= blank.mean(0)


def tower_weights(tower: Any, word_dim: int, size: float, scale: float) -> dict[str, Tensor]:
    """The tower's part of a checkpoint: outputs in the decoder's own units.

    Args:
        size: what training divided trigram vectors by (``common_size``).
        scale: value of the decoder's constant dimension, which visual tokens need too.
    """
    weights = {f"visual.{name}": value.clone() for name, value in tower.state_dict().items()}
    last, bias = weights["visual.merger.mlp.2.weight"], weights["visual.merger.mlp.2.bias"]
    last *= size
    bias *= size
    last[word_dim:] = 0.0
    bias[word_dim:] = 0.0
    bias[word_dim] = scale
    return weights


def vectors_for_tower(vectors: Matrix) -> tuple[Tensor, float]:
    """Trigram vectors in training units, and that unit."""
    size = common_size(vectors)
    scaled: NDArray[np.float32] = np.asarray(vectors / size, dtype=np.float32)
    return torch.from_numpy(scaled), size
