"""The pages of the test: needles with their questions, and pages of the same kinds around them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias, get_args

from mmrag.evaluation.needle.pictures import Shapes, all_shapes, draw_bars, draw_shapes
from mmrag.reading import Box
from mmrag.reading.writing import PAPER, DrawnPage

Kind: TypeAlias = Literal["page", "figure", "cell"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# Words are parted by spaces here, which is easier to read than lists of strings.
_SYLLABLES = (
    "bra dal fen gor hal jor kes lum mar nor pel qui ros sel tor ulm vas wen yar zel",
    "a be di eno fi ga hi ila ko le mo ni ore pa ru si ta uve vi zo",
    "beck dorf field ford gate holm ley mere mond nes pont ridge stad thorpe ton wick",
)
# Sentences that have a value, and the questions that ask for it.
_FACTS = (
    (
        "The visitor code of {name} station is {value}.",
        "What is the visitor code of {name} station?",
    ),
    (
        "The reservoir at {name} holds {value} cubic metres of water.",
        "How many cubic metres of water does the reservoir at {name} hold?",
    ),
    (
        "The parish of {name} has {value} registered beehives.",
        "How many registered beehives does the parish of {name} have?",
    ),
    (
        "Last year {value} trees were planted in the forest of {name}.",
        "How many trees were planted in the forest of {name} last year?",
    ),
)
_SENTENCES = (
    "The {noun} of the {other} was reviewed in {month}, and the {body} asked for a second opinion.",
    "In {month} the {body} replaced the {adjective} {noun} with one that needs less upkeep.",
    "Nobody on the {body} had expected the {noun} to outlast the {adjective} {other}.",
    "A {adjective} {noun} was lent to the {body} until the {other} could be repaired.",
    "Members may use the {noun} on weekdays, but the {other} stays locked from {month} on.",
    "The {body} thanked everyone who had carried the {adjective} {noun} to the {other}.",
    "It was agreed that the {noun} should be painted before {month}, weather permitting.",
    "Costs of the {adjective} {other} were shared between the {body} and its neighbours.",
)
_WORDS = {
    "noun": "ferry roof archive orchard bell ledger fence kitchen generator map tractor",
    "other": "harbour library workshop chapel garden museum cellar pavilion stable mill",
    "adjective": "old wooden narrow heavy rented spare painted northern quiet broken",
    "body": "committee council board school cooperative choir brigade society",
    "month": "January March April May June August September October November",
}
_YEARS = range(1981, 1987)
_PARAGRAPHS, _SENTENCES_EACH = 5, 5
_EDGE, _GAP = 64.0, 24.0  # of a sheet, in points: so far apart, each picture is a figure
_CHART: Box = (90.0, 470.0, 505.0, 710.0)


@dataclass(frozen=True)
class Ask:
    """A question that a needle answers. kind: of the question; picture: asked with, as PNG."""

    kind: str
    text: str
    answer: str
    picture: bytes | None = None


@dataclass(frozen=True)
class Needle:
    """A page to hide. depth: where, from 0 (first page) to 1; box: of the part asked for."""

    id: str
    kind: Kind
    depth: float
    page: DrawnPage
    asks: tuple[Ask, ...]
    box: Box | None = None


class PageMaker:
    """Makes pages and needles by chance from a seed; no page names what a needle is asked by.

    grid: pictures in a row, and rows, of a sheet of pictures.

    Examples:
        >>> maker = PageMaker(seed=0, grid=3)
        >>> (needle,) = maker.needles(("page",), depths=(0.5,), each=1)
        >>> needle.id, needle.asks[0].kind
        ('page-0.5-1', 'page')
    """

    def __init__(self, seed: int, grid: int) -> None:
        self.seed, self.grid = seed, grid
        names = ["".join(parts).capitalize() for parts in product(*map(str.split, _SYLLABLES))]
        shapes = all_shapes()
        chance = random.Random(seed)
        chance.shuffle(names)
        chance.shuffle(shapes)
        # Needles take theirs from the front, all other pages from the second half.
        half = len(names) // 2
        self._own_names, self._names = iter(names[:half]), names[half:]
        half = len(shapes) // 2
        self._own_shapes, self._shapes = iter(shapes[:half]), shapes[half:]

    def needles(self, kinds: Sequence[Kind], depths: Sequence[float], each: int) -> list[Needle]:
        """``each`` needles of every kind at every depth, those of one round together."""
        make = {"page": self._page_needle, "figure": self._figure_needle, "cell": self._cell_needle}
        return [
            make[kind](f"{kind}-{depth:g}-{number}", depth)
            for number in range(1, each + 1)
            for kind in kinds
            for depth in depths
        ]

    def haystack(self) -> Iterator[DrawnPage]:
        """Pages without end, of the same kinds as needles: six of eight are text."""
        # One chance for each page, so that a large corpus begins as a small one does.
        number = 0
        while True:
            chance = random.Random(f"{self.seed}/{number}")
            name = chance.choice(self._names)
            if number % 8 == 3:
                yield self._chart(chance, name)[0]
            elif number % 8 == 7:
                cells = chance.choices(self._shapes, k=self.grid**2)
                yield DrawnPage(pictures=tuple(self._cells(cells)))
            else:
                fact, value = chance.choice(_FACTS)[0], chance.randint(1000, 99999)
                yield _text_page(chance, fact.format(name=name, value=value))
            number += 1

    def _page_needle(self, id_: str, depth: float) -> Needle:
        chance, name = self._chance(id_), next(self._own_names)
        (fact, question), value = chance.choice(_FACTS), str(chance.randint(1000, 99999))
        page = _text_page(chance, fact.format(name=name, value=value))
        ask = Ask("page", question.format(name=name), value)
        return Needle(id_, "page", depth, page, (ask,))

    def _figure_needle(self, id_: str, depth: float) -> Needle:
        chance, name = self._chance(id_), next(self._own_names)
        page, values = self._chart(chance, name)
        year, value = chance.choice(values)
        question = f"How many tonnes did {name} mill put out in {year}?"
        ask = Ask("figure", question, str(value))
        return Needle(id_, "figure", depth, page, (ask,), _CHART)

    def _cell_needle(self, id_: str, depth: float) -> Needle:
        chance, wanted = self._chance(id_), next(self._own_shapes)
        cells = chance.choices(self._shapes, k=self.grid**2)
        at = chance.randrange(len(cells))
        cells[at] = wanted
        placed = self._cells(cells)
        row, column = divmod(at, self.grid)
        answer = f"row {row + 1}, column {column + 1}"
        where = "In which row and column of its sheet is"
        asks = (
            Ask("cell by text", f"{where} the picture of {wanted.words}?", answer),
            Ask("cell by picture", f"{where} this picture?", answer, draw_shapes(wanted)),
        )
        page = DrawnPage(pictures=tuple(placed))
        return Needle(id_, "cell", depth, page, asks, placed[at][0])

    def _chance(self, id_: str) -> random.Random:
        return random.Random(f"{self.seed}/{id_}")

    def _chart(self, chance: random.Random, name: str) -> tuple[DrawnPage, list[tuple[str, int]]]:
        """A page of text with a chart, whose words are pixels and on no text layer."""
        values = [(str(year), chance.randint(1000, 9999)) for year in _YEARS]
        image = draw_bars(f"{name} mill: output in tonnes", values)
        text = tuple(" ".join(_sentences(chance)) for _ in range(_PARAGRAPHS - 1))
        return DrawnPage(text, ((_CHART, image),)), values

    def _cells(self, cells: Sequence[Shapes]) -> list[tuple[Box, bytes]]:
        """The pictures of a sheet, row by row."""
        step = (PAPER[0] - 2 * _EDGE + _GAP) / self.grid
        found = []
        for place, shapes in enumerate(cells):
            row, column = divmod(place, self.grid)
            x, y = _EDGE + column * step, 1.5 * _EDGE + row * step
            found.append(((x, y, x + step - _GAP, y + step - _GAP), draw_shapes(shapes)))
        return found


def _text_page(chance: random.Random, fact: str) -> DrawnPage:
    """A page of text with a sentence somewhere in it."""
    paragraphs = [_sentences(chance) for _ in range(_PARAGRAPHS)]
    chosen = chance.choice(paragraphs)
    chosen.insert(chance.randint(0, len(chosen)), fact)
    return DrawnPage(tuple(" ".join(sentences) for sentences in paragraphs))


def _sentences(chance: random.Random) -> list[str]:
    """The sentences of a paragraph."""
    return [
        sentence.format(**{slot: chance.choice(words.split()) for slot, words in _WORDS.items()})
        for sentence in chance.sample(_SENTENCES, _SENTENCES_EACH)
    ]
