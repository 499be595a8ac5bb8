"""An endless source of rendered crops with what a tower should read in them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrag.modeling.qwen_images import ImageRule, to_patches
from mmrag_recipes.nano import glyphs
from mmrag_recipes.nano.config import VisionConfig

WHOLE = ImageRule(min_pixels=28 * 28, max_pixels=28 * 28 * 16384)
_KEPT = 400  # crops kept for a second look
_WORDS = 260  # more than a crop holds


@dataclass(frozen=True)
class Crop:
    """One example.

    patches: (patches, width), as the patch embedding gives them; grid: their rows and columns.
    classes: (patches, 4), the character under each probe.
    places: (n, 2), patch and trigram. wanted: (tokens, dim), sums of their trigrams' vectors.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    classes: Tensor
    places: Tensor
    wanted: Tensor


class Crops:
    """Crops of running text in random type.

    Args:
        texts: passages; their words are set in order.
        vectors: (trigrams, dim), in training units.
        embedding: (pixels of a patch, width), the frozen patch embedding.
    """

    def __init__(
        self,
        texts: Sequence[str],
        vectors: Tensor,
        vocabulary: dict[str, int],
        embedding: Tensor,
        config: VisionConfig,
        seed: int,
    ) -> None:
        self.words = [word for text in texts for word in text.split() if len(word) < 25]
        self.vectors = vectors
        self.vocabulary = vocabulary
        self.embedding = embedding
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
        start = self.rng.randrange(max(1, len(self.words) - _WORDS))
        words = self.words[start : start + _WORDS]
        if self.rng.random() < 0.03:
            words = [word.upper() for word in words]
        layout = glyphs.random_layout(self.fonts, self.rng)
        picture, found = glyphs.render(words, wide, tall, layout, self.rng)
        picture, found = glyphs.clear_edge(picture, found, layout.paper, self.rng)
        if self.rng.random() < 0.25:
            picture = scanned(picture, self.rng)
        places = glyphs.gram_places(found, wide, tall, self.vocabulary)
        where = torch.tensor(places, dtype=torch.long).view(-1, 2)
        patches, grid = to_patches(picture.convert("RGB"), WHOLE)
        wanted = torch.zeros(len(patches) // 4, self.vectors.shape[1])
        wanted.index_add_(0, where[:, 0] // 4, self.vectors[where[:, 1]])
        classes = torch.from_numpy(glyphs.probe_classes(found, wide, tall))
        return Crop(patches @ self.embedding, grid, classes, where, wanted)


def scanned(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The grey picture with the noise and the weaker contrast of a scan."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(
        scale=rng.uniform(2, 14), size=(picture.height, picture.width)
    )
    faded = 128 + (np.asarray(picture, dtype=np.float32) - 128) * rng.uniform(0.7, 1.0)
    return Image.fromarray(np.clip(faded + noise, 0, 255).astype(np.uint8))
