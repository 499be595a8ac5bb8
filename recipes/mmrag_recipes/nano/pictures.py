"""Pictures with titles, and how the tower learns to tell what a picture shows.

A picture's visual tokens must add up to the vector of its title. The text side stays as it is, so
every title of the training pictures is a candidate in every step (as LiT does with a locked tower,
Zhai et al., arXiv 2111.07991, here with the text tower locked).
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from mmrag.content import load_image
from mmrag.errors import ContentError
from mmrag.modeling.qwen_images import to_patches
from mmrag_recipes.nano.crops import WHOLE
from mmrag_recipes.nano.distil import piece_bags
from mmrag_recipes.nano.glyphs import TOKEN

LARGEST = 8  # tokens: longer side of a picture
_SMALLEST = 4
_PER_TITLE = 3  # pictures of one title that are used
_TOPIC = 0.5  # weight of the folders' words beside the title's
_TEMPERATURE = 0.05


@dataclass(frozen=True)
class Titled:
    """A picture of at most 224 pixels a side, its title, and the names of its folders."""

    title: str
    topic: str
    picture: Image.Image


def is_held_out(title: str) -> bool:
    """Whether pictures of this title are for measuring, as one title in eight is."""
    return zlib.crc32(title.encode()) % 8 == 0


def read_titled(folder: Path, held_out: bool) -> list[Titled]:
    """Pictures below ``folder``, at most three of a title, which are the words of the file name.

    Files that cannot be read as pictures are passed over, and counted on the console.
    """
    found: dict[str, list[Titled]] = {}
    passed_over = 0
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in {".png", ".jpg"}):
        title = _words(path.stem)
        same = found.setdefault(title, [])
        if not title or is_held_out(title) != held_out or len(same) == _PER_TITLE:
            continue
        try:
            picture = load_image(path)
        except ContentError:
            passed_over += 1
            continue
        picture.thumbnail((LARGEST * TOKEN, LARGEST * TOKEN))
        topic = " ".join(_words(part) for part in path.relative_to(folder).parts[:-1])
        same.append(Titled(title, topic, picture))
    if passed_over:
        print(f"{passed_over} pictures could not be read and were passed over")
    return [one for same in found.values() for one in same]


def _words(name: str) -> str:
    return " ".join(re.findall(r"[a-z]{3,}", name.lower()))


@dataclass(frozen=True)
class Seen:
    """patches: (patches, width), as the patch embedding gives them; grid: rows and columns."""

    patches: Tensor
    grid: tuple[int, int, int]


class Pictures:
    """Batches of training pictures, each title as likely as any other.

    Args:
        words: (pieces, dim), the vectors of the text side.
        embedding: (pixels of a patch, width), the frozen patch embedding.

    Attributes:
        wanted: (titles, dim), normalised: what the pictures of a title should add up to.
    """

    def __init__(
        self,
        items: Sequence[Titled],
        words: Tensor,
        tokenizer: Tokenizer,
        embedding: Tensor,
        seed: int,
    ) -> None:
        groups: dict[str, list[Titled]] = {}
        for item in items:
            groups.setdefault(item.title, []).append(item)
        self.groups = list(groups.values())
        titles = piece_bags(list(groups), tokenizer).embed(words)
        topics = piece_bags([group[0].topic for group in self.groups], tokenizer).embed(words)
        self.wanted = F.normalize(titles + _TOPIC * topics, dim=1)
        self.embedding = embedding
        self.rng = random.Random(seed)

    def batch(self, n: int) -> tuple[list[Seen], Tensor]:
        """``n`` pictures in random sizes, and the rows of their titles, (n,)."""
        rows = [self.rng.randrange(len(self.groups)) for _ in range(n)]
        return [self._look(self.rng.choice(self.groups[row])) for row in rows], torch.tensor(rows)

    def _look(self, item: Titled) -> Seen:
        longer = self.rng.uniform(_SMALLEST, LARGEST)
        scale = longer / max(item.picture.size)
        wide, tall = (max(1, round(side * scale)) * TOKEN for side in item.picture.size)
        picture = item.picture.resize((wide, tall), Image.Resampling.BICUBIC)
        if self.rng.random() < 0.5:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        patches, grid = to_patches(picture, WHOLE)
        return Seen(patches @ self.embedding, grid)

    def blank(self) -> Seen:
        """White paper."""
        patches, grid = to_patches(Image.new("RGB", (4 * TOKEN, 4 * TOKEN), "white"), WHOLE)
        return Seen(patches @ self.embedding, grid)


def picture_loss(reader: Any, pictures: Pictures, n: int) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy of the right title among all, and how often it comes first.

    Args:
        reader: ``reading.Reader``, whose tower takes embedded patches.
    """
    seen, rows = pictures.batch(n)
    seen.append(pictures.blank())
    with torch.autocast("cpu", torch.bfloat16):
        _, tokens, _ = reader(seen)
    parts = tokens.float().split([one.grid[1] * one.grid[2] // 4 for one in seen])
    # White paper counts as nothing, as in the checkpoint.
    found = torch.stack([(part - parts[-1].mean(0)).sum(0) for part in parts[:-1]])
    scores = F.normalize(found, dim=1) @ pictures.wanted.T / _TEMPERATURE
    loss = F.cross_entropy(scores, rows)
    return loss, {"titles": float((scores.argmax(1) == rows).float().mean())}
