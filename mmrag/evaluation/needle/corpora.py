"""Where each needle is hidden: corpora of every size, as one PDF each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from mmrag.errors import ConfigError
from mmrag.evaluation.kept import fingerprint
from mmrag.evaluation.metrics import CUTS
from mmrag.evaluation.needle.pages import KINDS, Kind, Needle, PageMaker
from mmrag.reading.writing import CopiedPage, WrittenPage, write_pdf

Layer: TypeAlias = Literal["text", "scanned"]
LAYERS: tuple[Layer, ...] = get_args(Layer)

_MOST_NEEDLES = 500  # of a kind: there are no more pictures and names to tell apart


@dataclass(frozen=True)
class NeedleOptions:
    """What is hidden, and among how many pages.

    sizes: pages of the corpora, needles included.
    depths: where in a corpus, from 0 (first page) to 1 (last page).
    kinds: ``page``, a sentence on a page of text; ``figure``, a chart whose words are pixels;
        ``cell``, one picture of a sheet of ``grid`` times ``grid``, asked for in words and by the
        picture.
    layers: ``text``, pages with a text layer; ``scanned``, each page one image of itself.
    each: needles of each kind at each depth.
    cuts: the values of k of hit@k, ascending.

    Examples:
        >>> NeedleOptions(sizes=(10, 50)).sizes
        (10, 50)
    """

    sizes: tuple[int, ...] = (10, 100, 1000)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    kinds: tuple[Kind, ...] = KINDS
    layers: tuple[Layer, ...] = LAYERS
    each: int = 2
    grid: int = 4
    seed: int = 0
    cuts: tuple[int, ...] = CUTS

    def __post_init__(self) -> None:
        for name, known in (("kinds", KINDS), ("layers", LAYERS)):
            if unknown := sorted(set(getattr(self, name)) - set(known)):
                raise ConfigError(f"{name}: {unknown} are unknown; there are {list(known)}.")
        for name in ("sizes", "depths", "kinds", "layers", "cuts"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty: give one at least.")
        # Half of a corpus at most are needles.
        if min(self.sizes) < 2 or min(self.cuts) < 1:
            raise ConfigError("sizes begin at 2 pages, and cuts at 1.")
        if min(self.depths) < 0 or max(self.depths) > 1:
            raise ConfigError("depths go from 0, the first page, to 1, the last one.")
        if not 1 <= self.grid <= 12:
            raise ConfigError("grid goes from 1 to 12 pictures in a row.")
        if not 1 <= self.each * len(self.depths) <= _MOST_NEEDLES:
            raise ConfigError(f"each times depths goes from 1 to {_MOST_NEEDLES} needles a kind.")


@dataclass(frozen=True)
class Corpus:
    """A PDF to write. needles: by the number of their page, from 1."""

    layer: Layer
    size: int
    round: int
    needles: Mapping[int, Needle]

    @property
    def name(self) -> str:
        """The name of its file, which no other corpus has."""
        return f"{self.layer}-{self.size}-{self.round}.pdf"


def plan_corpora(options: NeedleOptions, needles: Sequence[Needle]) -> list[Corpus]:
    """Every needle hidden once in every size and layer, small corpora first.

    Half of the pages of a corpus are needles at most, so that a small one takes several rounds.
    """
    return [
        Corpus(layer, size, number, place(needles[first : first + size // 2], size))
        for size in options.sizes
        for layer in options.layers
        for number, first in enumerate(range(0, len(needles), size // 2), 1)
    ]


def place(needles: Sequence[Needle], size: int) -> dict[int, Needle]:
    """The page of each needle, from 1: the free one that is nearest to its depth."""
    placed: dict[int, Needle] = {}
    for needle in needles:
        wanted = 1 + needle.depth * (size - 1)
        free = (page for page in range(1, size + 1) if page not in placed)
        # The sort is stable: of two that are as near the first is taken, in every run.
        placed[min(free, key=lambda page: abs(page - wanted))] = needle
    return placed


class CorpusWriter:
    """Writes corpora into a folder; one that is there is not written again.

    haystack: pages to hide the needles among; default: pages that ``maker`` makes.
    """

    def __init__(
        self, folder: Path, maker: PageMaker, haystack: Sequence[CopiedPage] | None = None
    ) -> None:
        self.maker, self.haystack = maker, haystack
        # By all that moves the pages: with other options, other files.
        self.folder = folder / fingerprint(
            maker.seed, maker.grid, [_stamp(path) for path in self._files()]
        )

    def write(self, corpus: Corpus, done: Callable[[int], None]) -> Path:
        """The path of a corpus, written if it is not there. Raises ReadError."""
        # The needles too: with more depths, the same round hides others.
        ids = {page: needle.id for page, needle in corpus.needles.items()}
        path = self.folder / fingerprint(ids) / corpus.name
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_pdf(path, self._pages(corpus), scanned=corpus.layer == "scanned", done=done)
        return path

    def _pages(self, corpus: Corpus) -> list[WrittenPage]:
        around: Iterator[WrittenPage] = iter(
            self.haystack if self.haystack is not None else self.maker.haystack()
        )
        numbers = range(1, corpus.size + 1)
        hidden = corpus.needles
        return [hidden[n].page if n in hidden else next(around) for n in numbers]

    def _files(self) -> list[Path]:
        return sorted({page.path for page in self.haystack or ()})


def _stamp(path: Path) -> list[str | int]:
    state = path.stat()
    return [path.as_posix(), state.st_size, state.st_mtime_ns]
