"""Plain text and Markdown files: sections from headings, passages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mmrag.reading.characters import clean
from mmrag.reading.encodings import NotText, UnknownEncoding, decode
from mmrag.reading.options import Passage, Problem, ReadOptions, Step
from mmrag.reading.passages import cut, ends_sentence, n_words

_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]")
_FENCE = re.compile(r" {0,3}(```|~~~)")
# Text without spaces, as Chinese, goes on for a paragraph: its sentences are cut apart.
_WORD = re.compile(r"[^\s\u3002\uff01\uff1f]{1,200}[\u3002\uff01\uff1f]*|[\u3002\uff01\uff1f]+")
_LONGEST_HEADING = 200  # characters; every passage below it carries it


def read_passages(path: Path, options: ReadOptions) -> Iterator[Passage | Problem | Step]:
    """Passages of a text file, in order, none across a heading of Markdown."""
    yield Step(None, "open")
    try:
        text = decode(path.read_bytes())
    except NotText:
        yield Problem(None, "the content is not text; convert it or give it its right suffix")
        return
    except UnknownEncoding as error:
        yield Problem(
            None,
            f"the text is not in UTF-8, and its encoding cannot be told (perhaps {error}); convert "
            "it to UTF-8, for instance with: iconv -f ENCODING -t UTF-8",
        )
        return
    text = clean(text.replace("\r\n", "\n").replace("\r", "\n"))
    markdown = path.suffix.lower() in (".md", ".markdown")
    found = False
    for section, body in sections(text) if markdown else [(None, text)]:
        for piece in pieces(body, options.passage_words, options.passage_overlap):
            found = True
            yield Passage(piece, None, section)
    if not found:
        yield Problem(None, "the file holds no text, only white space")


def sections(text: str) -> list[tuple[str | None, str]]:
    """Headings (``Plans > Dental``) with the text from each to the next."""
    sections: list[tuple[str | None, list[str]]] = [(None, [])]
    path: list[str] = []
    fenced = False
    for line in text.split("\n"):
        # A # in a block of code is a comment, not a heading.
        fenced ^= _FENCE.match(line) is not None
        heading = None if fenced else _HEADING.match(line)
        title = line[heading.end() :].strip().rstrip("#").rstrip() if heading else ""
        if heading and title:
            path = [*path[: len(heading[1]) - 1], title[:_LONGEST_HEADING]]
            sections.append((" > ".join(path), []))
        sections[-1][1].append(line)
    return [(heading, "\n".join(lines).strip()) for heading, lines in sections]


def pieces(text: str, limit: int, overlap: int) -> Iterator[str]:
    """A text cut into passages at ends of sentences and lines."""
    words = list(_WORD.finditer(text))
    if not words:
        return
    ends = [len(words)]
    for i in range(1, len(words)):
        gap = text[words[i - 1].end() : words[i].start()]
        if "\n" in gap or ends_sentence(words[i - 1][0]):
            ends.append(i)
    sizes = [n_words(word[0]) for word in words]
    for start, end in cut(sizes, ends, limit, overlap):
        yield text[words[start].start() : words[end - 1].end()]
