"""From a page's tokens, or a text's words, to passages of about equal size."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence

from mmrag.reading.boxes import union
from mmrag.reading.layout import Token, text_of
from mmrag.reading.options import Box, Passage

_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u2026][\"'\u2019\u201d)\]]*$")
_CHARACTERS_PER_WORD = 8  # of a script without spaces; about a word and a half of English


def passages_of(
    tokens: Sequence[Token], limit: int, overlap: int, section: Callable[[Box], str | None]
) -> list[Passage]:
    """Cut tokens into passages of at most ``limit`` words at ends of sentences and paragraphs.

    Empty if all fits into one passage. section: the heading above a box.
    """
    sizes = [n_words(token.text) for token in tokens]
    if sum(sizes) <= limit:
        return []
    ends = [i + 1 for i in range(len(tokens)) if _ends_unit(tokens, i)]
    pieces = []
    for start, end in cut(sizes, ends, limit, overlap):
        part = tokens[start:end]
        pieces.append(Passage(text_of(part), union(t.box for t in part), section(part[0].box)))
    return pieces


def cut(
    sizes: Sequence[int], ends: Collection[int], limit: int, overlap: int
) -> list[tuple[int, int]]:
    """Ranges [start, end) over items of the given sizes, none above ``limit`` where possible.

    ends: where a range may end. Ranges are of about equal size; each begins with up to
    ``overlap`` of what the one before ended with.
    """
    ends = frozenset(ends)
    total = sum(sizes)
    fresh = limit - overlap
    # Equal pieces: the rest of a page would otherwise be a passage of three words.
    target = -(-total // max(1, -(-total // fresh)))
    ranges: list[tuple[int, int]] = []
    start = done = 0
    while done < len(sizes):
        stop = _stop(sizes, ends, done, target, limit - sum(sizes[start:done]))
        ranges.append((start, stop))
        done = stop
        start = _overlap_start(sizes, ends, ranges[-1][0], done, overlap)
    return ranges


def _stop(sizes: Sequence[int], ends: Collection[int], done: int, target: int, room: int) -> int:
    """The end after ``done`` nearest to the target size that keeps within the room."""
    size, best, reach = 0, done, done
    for i in range(done, len(sizes)):
        size += sizes[i]
        # At least one item, or a token longer than the limit would never be passed.
        if size > room and i > done:
            break
        reach = i + 1
        if reach in ends:
            best = reach
            if size >= target:
                break
    return best if best > done else reach


def _overlap_start(
    sizes: Sequence[int], ends: Collection[int], first: int, done: int, overlap: int
) -> int:
    """The earliest sentence start whose distance to ``done`` is within the overlap."""
    size, start = 0, done
    for i in range(done - 1, first, -1):
        size += sizes[i]
        if size > overlap:
            break
        if i in ends:
            start = i
    return start


def n_words(text: str) -> int:
    """How many words a token counts for; scripts without spaces come as long tokens."""
    return 1 if text.isascii() else max(1, len(text) // _CHARACTERS_PER_WORD)


def ends_sentence(text: str) -> bool:
    """Whether a word ends a sentence, also with a quotation mark or bracket behind its mark."""
    return _SENTENCE_END.search(text) is not None


def _ends_unit(tokens: Sequence[Token], i: int) -> bool:
    if i + 1 == len(tokens):
        return True
    after = tokens[i + 1]
    return "\n" in after.gap or (ends_sentence(tokens[i].text) and not after.text[:1].islower())
