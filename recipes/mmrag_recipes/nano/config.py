"""Configuration of the nano recipe; ``nano.toml`` holds the values that made the shipped model."""

from __future__ import annotations

from pydantic import Field

from mmrag_recipes.options import Options


class TextConfig(Options):
    """Token vectors: what they start from and how they are distilled."""

    limits: dict[str, int] = Field(default_factory=dict)
    """Most pairs of each source; the sources are the sub-folders of the data folder."""
    pairs: int = 42000
    """Pairs that are used, of those that ``limits`` leaves and their cloze pairs."""
    passage_words: int = 120
    """Passages are cut after about this many words."""
    dim: int = 381
    """Dimensions of a token vector; with the 3 reserved ones a multiple of 64."""
    rarity: float = 2.0
    """A piece is weighted by log(1 / frequency) to this power."""
    held_out: int = 2000
    """Pairs that are not trained on, for the retrieval score in the log."""
    epochs: int = 3
    """Passes over the pairs."""
    batch: int = 256
    """Pairs a step; all other passages of a batch are negatives."""
    learning_rate: float = 1e-3
    """Peak rate of the token vectors; falls linearly to zero."""
    gram_learning_rate: float = 4e-3
    """The same for the trigram vectors, which start at random."""
    gram_weight: float = 0.5
    """Weight of the trigram loss beside the text loss."""
    gram_count: int = 20
    """Trigrams seen less often in the passages get no vector."""
    temperature: float = 0.05
    """Of the softmax over a batch, for student and teacher."""
    hard_weight: float = 0.3
    """Weight of the true pairs beside the teacher's scores."""


class VisionConfig(Options):
    """The vision tower and the crops it learns to read from."""

    depth: int = 3
    """Transformer blocks."""
    width: int = 192
    """Width of a block; heads are 32 wide."""
    minutes: float = 90.0
    """Training time on one CPU thread; 0 leaves the tower out: the model then takes text only."""
    learning_rate: float = 3.5e-3
    """Peak rate; warm-up over 60 steps, then a cosine over the training time."""
    crops: int = 8
    """Crops a step, half of them new."""
    crop_width: int = 336
    """Pixels; a multiple of 28."""
    crop_height: int = 112
    """Pixels; a multiple of 28."""
    picture_folder: str = ""
    """Folder below ``data`` of pictures whose file names are their titles; empty for none."""
    picture_minutes: float = 85.0
    """Training time on pictures and crops together, after ``minutes``."""
    pictures: int = 8
    """Pictures a step, beside the crops."""
    fonts: tuple[str, ...] = ("/usr/share/fonts",)
    """Folders of TrueType and OpenType fonts."""
    faces: tuple[str, ...] = ("",)
    """How the names of the font files that are used begin."""


class NanoConfig(Options):
    """One run: from a data folder to a checkpoint folder."""

    data: str
    """Folder of the text sources; see README.md."""
    work: str
    """Folder of everything in between; each finished step is kept and not done again."""
    out: str
    """Checkpoint folder."""
    threads: int = 2
    """CPU threads."""
    seed: int = 0
    """Seed of every random choice."""
    mlp: int = 2048
    """Inner width of the decoder's feed-forward layers; one less is how many trigrams are read."""
    max_length: int = 2304
    """Tokens of an input, visual ones included."""
    max_image_tokens: int = 1280
    """Most visual tokens of one picture."""
    text: TextConfig = TextConfig()
    vision: VisionConfig = VisionConfig()
