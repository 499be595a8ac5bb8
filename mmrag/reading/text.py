"""Plain text and Markdown files: decoding, sections from headings, passages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mmrag.reading.layout import clean, cut
from mmrag.reading.options import Passage, ReadOptions

_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_HEADING = re.compile(r"^ {0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
_FENCE = re.compile(r"^ {0,3}(```|~~~)")
_UNIT_END = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])[\"'\u2019\u201d)\]]*\s+|\s*\n\s*\n\s*|\n")


class NotText(ValueError):
    """The bytes are not text in any encoding that is known here."""


def decode(data: bytes) -> str:
    """Text from UTF-8, UTF-16 or UTF-32 with a byte order mark, UTF-8, UTF-16, or Latin-1.

    UTF-8 that is damaged here and there is still taken for UTF-8.

    Raises: NotText for binary data.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _strictly(data, encoding)
    if b"\0" in data[:4096]:
        half = data[: len(data) // 2 * 2]
        little = half[1::2].count(0) > half[0::2].count(0)
        return _strictly(half, "utf-16-le" if little else "utf-16-be")
    text = data.decode("utf-8", errors="replace")
    damaged = text.count("\ufffd")
    # Letters of Latin-1 make no valid sequences of UTF-8.
    if damaged and damaged >= sum(not c.isascii() for c in text) - damaged:
        text = data.decode("cp1252", errors="replace")
    return _checked(text)


def _strictly(data: bytes, encoding: str) -> str:
    try:
        return _checked(data.decode(encoding))
    except UnicodeDecodeError as error:
        raise NotText from error


def _checked(text: str) -> str:
    sample = text[:100_000]
    odd = sum(not (c.isprintable() or c in "\n\r\t\f\v\u00a0\u00ad") for c in sample)
    odd += sample.count("\ufffd")
    if odd > 0.02 * len(sample):
        raise NotText
    return text


def read_passages(path: Path, options: ReadOptions) -> Iterator[Passage]:
    """Passages of a text file, in order, none across a heading of Markdown.

    Raises: NotText.
    """
    text = clean(decode(path.read_bytes()).replace("\r\n", "\n").replace("\r", "\n"))
    markdown = path.suffix.lower() in (".md", ".markdown")
    for section, body in _sections(text) if markdown else [(None, text)]:
        for piece in _pieces(body, options.passage_words, options.passage_overlap):
            yield Passage(piece, None, section)


def _sections(text: str) -> list[tuple[str | None, str]]:
    """Headings (``Plans > Dental``) with the text from each to the next."""
    sections: list[tuple[str | None, list[str]]] = [(None, [])]
    path: list[str] = []
    fenced = False
    for line in text.split("\n"):
        fenced ^= _FENCE.match(line) is not None
        heading = None if fenced else _HEADING.match(line)
        if heading:
            level = len(heading[1])
            path = [*path[: level - 1], heading[2]]
            sections.append((" > ".join(path), []))
        sections[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in sections]


def _pieces(text: str, limit: int, overlap: int) -> Iterator[str]:
    words = list(re.finditer(r"\S+", text))
    if not words:
        return
    breaks = [match.end() for match in _UNIT_END.finditer(text)]
    starts = {word.start(): i for i, word in enumerate(words)}
    ends = [starts[place] for place in breaks if place in starts] + [len(words)]
    sizes = [max(1, len(w[0]) // 8) if not w[0].isascii() else 1 for w in words]
    for start, end in cut(sizes, ends, limit, overlap):
        yield text[words[start].start() : words[end - 1].end()]
