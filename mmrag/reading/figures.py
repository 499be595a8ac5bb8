"""Finding the figures of a PDF page: images and drawings with their captions.

Boxes are in points of the page as it is shown, also those of the words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mmrag.reading.boxes import area, as_box, clipped, distance, holds, moved, sides, union
from mmrag.reading.characters import clean
from mmrag.reading.columns import Word
from mmrag.reading.options import Box

# Lengths are in points of 1/72 inch; shares are of areas. Chosen on company reports and handbooks
# so that charts and photographs come out whole, and letterheads and tables do not.
_MIN_SIDE = 36.0  # half an inch: smaller art is an icon
_MIN_SHARE = 0.012  # of the page: a square inch of A4
_MAX_SHARE = 0.85  # larger ones are scans and backgrounds: the page itself shows them
_MAX_PATH_SHARE = 0.6  # a single path of this size is a frame or a coloured background
_THIN = 3.0  # rules and hairlines
_STRAIGHT = 0.5  # how far a line may lean and still be a rule
_NEAR = 9.0  # between parts of one drawing; less than a line of text
_MAX_PATHS = 20_000  # maps have more, and the first ones show where they are
_WHITE = 0.98  # least of red, green and blue of a fill that cannot be seen
_TEXT_SHARE = 0.3  # of a frame that its words cover: it is a box around text
_IMAGE_SHARE = 0.5  # of a group that its images cover: it is a photograph with a frame
_FULL_ROW = 0.85  # of a row's width that its filled boxes cover: the shading of a table
_SAME_EDGE = 4.0  # rows whose ends differ by less are of one table

_CAPTION_REACH = 72.0  # an inch: how far off a caption that says "Figure 3" may stand
_NEAREST_REACH = 22.0  # how far off any other text may stand to be taken for the caption
_TITLE_HEIGHT = 14.0  # above a drawing's box, where its title may begin
_TITLE_SHARE = 0.25  # of a drawing's height, from its top, where its title may stand
_LETTER_SHARE = 0.6  # of a title's characters; the labels of an axis have fewer letters
_SHARED_WIDTH = 0.3  # of the narrower of caption and figure that stand above each other
_LABEL_WORDS, _LABEL_HEIGHT = 6, 24.0  # longer or taller lines are no labels of a chart
_LABEL_REACH = 12.0  # how far from a drawing its label may stand: a line of text
_NUMBER_REACH = 26.0  # the numbers of an axis stand farther off, behind its ticks
_MAX_GROWTH = 1.8  # times its area that labels may add to a drawing; more is other text
_MARGIN = 2.0  # around a drawing and its labels
CAPTION = re.compile(
    r"^(fig(ure|\.)?|chart|exhibit|table|tab\.|plate|photo(graph)?|image|picture|diagram|graph|map"
    r"|scheme|illustration|abb(ildung|\.)?|figura|tableau)\s*\d",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Found:
    """A figure's box with its caption; ``mark`` is equal for the same art on another page."""

    box: Box
    caption: str
    mark: str


@dataclass(frozen=True, slots=True)
class _Art:
    """One image or drawn path. shape: what tells it from others of the same box."""

    box: Box
    shape: str
    raster: bool = False
    ruled: bool = False  # made of straight, axis-parallel pieces only
    filled: bool = False


@dataclass(frozen=True, slots=True)
class _Block:
    """A block or a line of text."""

    box: Box
    text: str
    words: int
    tall: float  # height of its largest words


def find_figures(page: Any, words: Sequence[Word]) -> list[Found]:
    """Figures of a PyMuPDF page, from top to bottom."""
    bounds = as_box(page.rect)
    blocks = _blocks(words, lambda word: word.block)
    labels = _labels(words)
    figures = []
    for group in _groups(_rasters(page, bounds) + _drawings(page, bounds)):
        box = union(art.box for art in group)
        if not _is_figure(group, box, bounds, words):
            continue
        raster = any(art.raster for art in group)
        caption = _caption(box, blocks, drawn=not raster)
        # The labels of a photograph are part of its pixels.
        if not raster:
            box = clipped(_with_labels(box, labels, caption), bounds)
        # Four shapes are enough to tell art apart, and keep the mark short.
        mark = "|".join([*sorted({art.shape for art in group})[:4], *(f"{v:.0f}" for v in box)])
        figures.append(Found(box, caption.text if caption else "", mark))
    return sorted(figures, key=lambda figure: (figure.box[1], figure.box[0]))


def _rasters(page: Any, bounds: Box) -> list[_Art]:
    found = []
    shown = tuple(page.rotation_matrix)
    for info in page.get_image_info(xrefs=True):
        box = clipped(moved(info["bbox"], shown), bounds)
        if min(sides(box)) >= _THIN and area(box) <= _MAX_SHARE * area(bounds):
            found.append(_Art(box, f"i{info['xref']}:{info['width']}x{info['height']}", True))
    return found


def _drawings(page: Any, bounds: Box) -> list[_Art]:
    """Drawn paths that can be part of a figure: visible, and not as large as the page."""
    found = []
    shown = tuple(page.rotation_matrix)
    for path in page.get_drawings()[:_MAX_PATHS]:
        box = clipped(moved(path["rect"], shown), bounds)
        white = path.get("fill") is not None and min(path["fill"]) > _WHITE
        if max(sides(box)) < 1 or area(box) > _MAX_PATH_SHARE * area(bounds):
            continue
        if path.get("color") is None and (path.get("fill") is None or white):
            continue
        found.append(
            _Art(
                box,
                f"d{len(path['items'])}",
                ruled=min(sides(box)) <= _THIN or all(_is_ruled(i) for i in path["items"]),
                filled=path.get("fill") is not None and not white,
            )
        )
    return found


def _is_ruled(item: Sequence[Any]) -> bool:
    if item[0] == "l":
        start, end = item[1], item[2]
        return bool(abs(start.x - end.x) < _STRAIGHT or abs(start.y - end.y) < _STRAIGHT)
    return item[0] in ("re", "qu")


def _groups(arts: list[_Art]) -> list[list[_Art]]:
    """Art that touches or nearly touches, together: a sweep from left to right."""
    groups: list[tuple[Box, list[_Art]]] = []
    for art in sorted(arts, key=lambda art: art.box[0]):
        box, members = art.box, [art]
        apart = []
        for other, others in groups:
            if distance(box, other) <= _NEAR:
                box, members = union((box, other)), others + members
            else:
                apart.append((other, others))
        groups = [*apart, (box, members)]
    return _joined(groups)


def _joined(groups: list[tuple[Box, list[_Art]]]) -> list[list[_Art]]:
    """Groups whose boxes came to touch while they grew, joined until none does."""
    done: list[tuple[Box, list[_Art]]] = []
    for box, members in groups:
        while touching := [g for g in done if distance(box, g[0]) <= _NEAR]:
            done = [g for g in done if g not in touching]
            box = union([box, *(g[0] for g in touching)])
            members = members + [art for g in touching for art in g[1]]
        done.append((box, members))
    return [members for _, members in done]


def _is_figure(group: list[_Art], box: Box, bounds: Box, words: Sequence[Word]) -> bool:
    """Large enough, and neither a background, a table's rules, nor a frame around text."""
    share = area(box) / max(area(bounds), 1.0)
    if min(sides(box)) < _MIN_SIDE or not _MIN_SHARE <= share <= _MAX_SHARE:
        return False
    inside = [word.box for word in words if holds(box, word.box)]
    if sum(map(area, inside)) > _TEXT_SHARE * area(box):
        return False
    images = [art.box for art in group if art.raster]
    if images and area(union(images)) > _IMAGE_SHARE * area(box):
        return True
    if all(art.ruled for art in group):
        return _has_bars(group, inside)
    # One or two curves are an ornament or a signature.
    return len(group) >= 3 or bool(images)


def _has_bars(group: Sequence[_Art], words: Sequence[Box]) -> bool:
    """Whether straight art is a chart's: its bars are empty, a table's cells have words on them."""
    solid = [art for art in group if art.filled and min(sides(art.box)) > _THIN]
    shaded = sum(any(holds(art.box, word) for word in words) for art in solid)
    return len(solid) >= 2 and shaded * 2 < len(solid) and not _is_tiled(solid)


def _is_tiled(arts: Sequence[_Art]) -> bool:
    """Whether filled boxes lie in full rows of one width, as the shading of a table does."""
    rows: dict[tuple[int, int], list[Box]] = defaultdict(list)
    for art in arts:
        rows[round(art.box[1]), round(art.box[3])].append(art.box)
    extents: Counter[tuple[int, int]] = Counter()
    for boxes in rows.values():
        x0, _, x1, _ = union(boxes)
        if sum(b[2] - b[0] for b in boxes) > _FULL_ROW * (x1 - x0):
            extents[round(x0 / _SAME_EDGE), round(x1 / _SAME_EDGE)] += 1
    return max(extents.values(), default=0) > 0.5 * len(rows)


def _blocks(words: Sequence[Word], key: Callable[[Word], Any]) -> list[_Block]:
    grouped: dict[Any, list[Word]] = defaultdict(list)
    for word in words:
        grouped[key(word)].append(word)
    return [
        _Block(
            union(w.box for w in group),
            clean(" ".join(w.text for w in group)),
            len(group),
            max(min(sides(w.box)) for w in group),
        )
        for group in grouped.values()
    ]


def _caption(box: Box, blocks: Sequence[_Block], drawn: bool) -> _Block | None:
    """A block near by that says "Figure 3"; else a drawing's title; else what is nearest."""
    outside = [
        b for b in blocks if not holds(box, b.box) and distance(box, b.box) <= _CAPTION_REACH
    ]
    near = sorted(((_beside(box, b.box), b) for b in outside), key=lambda item: item[0])
    for _, block in near:
        if CAPTION.match(block.text):
            return block
    if drawn and (title := _title(box, blocks)):
        return title
    for gap, block in near:
        if gap <= _NEAREST_REACH and 3 <= block.words <= 40:
            return block
    return None


def _title(box: Box, blocks: Sequence[_Block]) -> _Block | None:
    """The highest block across the top of a drawing that reads like words, not like numbers."""
    height = box[3] - box[1]
    top = (box[0], box[1] - _TITLE_HEIGHT, box[2], box[1] + _TITLE_SHARE * height)
    titles = [b for b in blocks if 2 <= b.words <= 25 and holds(top, b.box)]
    for block in sorted(titles, key=lambda b: b.box[1]):
        if sum(c.isalpha() for c in block.text) > _LETTER_SHARE * len(block.text):
            return block
    return None


def _beside(box: Box, other: Box) -> float:
    """Distance above or below; infinite where the two do not overlap from left to right."""
    shared = min(box[2], other[2]) - max(box[0], other[0])
    if shared < _SHARED_WIDTH * min(box[2] - box[0], other[2] - other[0]):
        return float("inf")
    return max(other[1] - box[3], box[1] - other[3], 0.0)


def _labels(words: Sequence[Word]) -> list[_Block]:
    """Short lines of no great height that do not belong to running text."""
    lines = Counter(block for block, _ in {(word.block, word.line) for word in words})
    sizes = Counter(word.block for word in words)
    loose = [word for word in words if sizes[word.block] < 4 * lines[word.block]]
    found = _blocks(loose, lambda word: (word.block, word.line))
    return [line for line in found if line.words <= _LABEL_WORDS and line.tall <= _LABEL_HEIGHT]


def _with_labels(box: Box, labels: Sequence[_Block], caption: _Block | None) -> Box:
    """The box of a drawing, grown over the labels around it (axes, legends)."""
    if caption:
        labels = [line for line in labels if not holds(caption.box, line.box)]
    grown = box
    for _ in range(2):  # the labels of an axis, then the legend below them
        near = []
        for line in labels:
            reach = _LABEL_REACH if any(c.isalpha() for c in line.text) else _NUMBER_REACH
            if distance(grown, line.box) <= reach:
                near.append(line.box)
        grown = union([grown, *near])
    if area(grown) > _MAX_GROWTH * area(box):
        return box
    x0, y0, x1, y1 = grown
    return (x0 - _MARGIN, y0 - _MARGIN, x1 + _MARGIN, y1 + _MARGIN)
