"""How the tower learns to read: from crops where the place of every letter is known.

Three things are asked of each crop, from easy to hard: the letter under each patch, the trigrams
around it, and the sum of the trigrams' vectors per visual token. The first two carry the third: a
tower that was only asked for vectors learned nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmrag_recipes.nano import glyphs
from mmrag_recipes.nano.config import VisionConfig
from mmrag_recipes.nano.crops import Crop, Crops
from mmrag_recipes.nano.pictures import Pictures, Seen, picture_loss
from mmrag_recipes.nano.tower import Dictionary

_WARM_UP = 60  # steps
_SAVE_EVERY = 200  # steps
_PICTURE_RATE = 0.4  # share of the peak rate that the second part starts with
_PICTURE_WEIGHT = 0.1  # of the loss of pictures beside that of crops
_PATCHES_ASKED = 500  # patches of a step whose trigram is asked for


class Reader(nn.Module):
    """A tower, the dictionary behind it, and heads that exist during training only.

    letters: the class under each of the four probes of a patch. grams: a direction in the
    trigrams' space; the nearest trigram vector is the one that was read.
    """

    def __init__(self, tower: Any, vectors: Tensor, units: int) -> None:
        super().__init__()
        width = tower.config.embed_dim
        self.tower = tower
        self.dictionary = Dictionary(vectors[:units])
        self.letters = nn.Linear(width, 4 * len(glyphs.CLASSES))
        self.grams = nn.Linear(width, vectors.shape[1])
        self.sharpness = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, crops: Sequence[Crop | Seen]) -> tuple[Tensor, Tensor, Tensor]:
        """States of the patches (patches, width), and the tokens' vectors and trigram logits."""
        grid = torch.tensor([crop.grid for crop in crops])
        output = self.tower(torch.cat([crop.patches for crop in crops]), grid_thw=grid)
        codes = output.pooler_output[:, : self.dictionary.vectors.shape[1]]
        tokens, logits = self.dictionary(codes)
        return output.last_hidden_state, tokens, logits

    def gram_scores(self, states: Tensor) -> Tensor:
        """Scores of the dictionary's trigrams, (patches, units)."""
        read = F.normalize(self.grams(states), dim=1)
        return self.sharpness.exp() * read @ F.normalize(self.dictionary.vectors, dim=1).T


def read_loss(
    reader: Reader, crops: Sequence[Crop], done: float
) -> tuple[Tensor, dict[str, float]]:
    """The loss of one step, and what to show of it.

    Args:
        done: share of the training that has passed. Vectors and their sums over a crop count the
            more, the later: they refine what letters and trigrams have built. A page's vector is
            such a sum, and an error that all tokens share hurts it most.
    """
    classes = torch.cat([crop.classes for crop in crops]).flatten()
    wanted = torch.cat([crop.wanted for crop in crops])
    patch, gram = _places(crops, len(reader.dictionary.vectors))
    asked = torch.randperm(len(patch))[:_PATCHES_ASKED]
    with torch.autocast("cpu", torch.bfloat16):
        states, tokens, logits = reader(crops)
        letters = reader.letters(states)
        scores = reader.gram_scores(states[patch[asked]])
    letters = letters.float().view(-1, len(glyphs.CLASSES))
    tokens, right = tokens.float(), gram[asked]
    token_error = unexplained(tokens, wanted)
    shape = (len(crops), -1, wanted.shape[1])
    crop_error = unexplained(tokens.view(shape).sum(1), wanted.view(shape).sum(1))
    loss = 2 * F.cross_entropy(letters, classes) + 0.3 * _fired_loss(logits.float(), patch, gram)
    loss = loss + (0.3 + 0.7 * done) * token_error + (0.1 + 0.4 * done) * crop_error
    if len(asked):
        loss = loss + F.cross_entropy(scores.float(), right)
    inked = classes > 0
    return loss, {
        "letters": float((letters.argmax(1) == classes)[inked].float().mean()),
        "trigrams": float((scores.argmax(1) == right).float().mean()),
        "unexplained": float(token_error.detach()),
        "unexplained sums": float(crop_error.detach()),
    }


def unexplained(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared error as a share of what was wanted; an empty batch counts as one unit."""
    return ((found - wanted) ** 2).sum() / (wanted**2).sum().clamp(min=1.0)


def _places(crops: Sequence[Crop], grams: int) -> tuple[Tensor, Tensor]:
    """Patch of the batch and trigram, for the trigrams of the dictionary."""
    size = len(crops[0].classes)
    places = torch.cat([c.places + torch.tensor([i * size, 0]) for i, c in enumerate(crops)])
    places = places[places[:, 1] < grams]
    return places[:, 0], places[:, 1]


def _fired_loss(logits: Tensor, patch: Tensor, gram: Tensor) -> Tensor:
    """Binary cross-entropy of which trigrams each token shows, per trigram that is there."""
    shown = torch.zeros_like(logits)
    shown[patch // 4, gram] = 1.0
    total = F.binary_cross_entropy_with_logits(logits, shown, reduction="sum")
    return total / shown.sum().clamp(min=1.0)


def train_reader(
    reader: Reader, crops: Crops, pictures: Pictures | None, config: VisionConfig, out: Path
) -> None:
    """Train for ``config.minutes`` on crops, then for ``config.picture_minutes`` on both.

    Saved to ``out`` as it goes, resumable.

    Args:
        pictures: None leaves the second part out.
    """
    parameters = [p for p in reader.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    step, spent = 0, 0.0
    if out.is_file():
        state = torch.load(out, weights_only=True)
        reader.load_state_dict(state["reader"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    first = 60 * config.minutes
    total = first + (60 * config.picture_minutes if pictures else 0.0)
    began = time.monotonic() - spent
    while (spent := time.monotonic() - began) < total:
        rate = _rate(step, spent / first)
        loss, metrics = read_loss(reader, crops.batch(), min(1.0, spent / first))
        if pictures and spent >= first:
            rate = _PICTURE_RATE * _rate(step, (spent - first) / (total - first))
            titled, more = picture_loss(reader, pictures, config.pictures)
            loss, metrics = loss + _PICTURE_WEIGHT * titled, metrics | more
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"step {step}, {spent / 60:.0f} min: {shown}", flush=True)
        if step % _SAVE_EVERY == 0:
            _save(out, reader, optimizer, step, spent)
    _save(out, reader, optimizer, step, spent)


def _rate(step: int, done: float) -> float:
    """Warm-up by steps, then a cosine over the time."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return min(1.0, (step + 1) / _WARM_UP) * max(0.02, cosine)


def _save(
    out: Path, reader: Reader, optimizer: torch.optim.Optimizer, step: int, spent: float
) -> None:
    state = {
        "reader": reader.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": spent,
    }
    partial = out.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(out)
