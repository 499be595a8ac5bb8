"""Answers as Markdown whose citations are links to the cited pages; also while they stream."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmrag.answering.response import harmless, literal
from mmrag.nodes import page_name

# [1], and [1, 2] as some models write it.
_MARK = re.compile(r"\[(\d{1,3}(?:\s*[,;]\s*\d{1,3})*)\]")
# The end of a text that may go on to be a mark, or an image.
_BEGUN = re.compile(r"(?:!|!?\[[\d\s,;]{0,20})$")
_LINKED = re.compile(r"\[\[(\d{1,3})\]\]\([^)\s]*\)")
SOURCES = "**Sources**"
PROBLEMS = "**Check before you trust it**"


@dataclass(frozen=True)
class Citation:
    """A linked mark in a text. start, end: in characters of the text."""

    n: int
    start: int
    end: int


class Linker:
    """Turns ``[n]`` in a stream of text into links.

    >>> linker = Linker({1: "http://host/#view"})
    >>> linker.add("It rained [") + linker.add("1].") + linker.end()
    'It rained [[1]](http://host/#view).'

    links: address of each source. Marks of other numbers stay as they are. Images and HTML that
    the model wrote are made harmless, as in ``CitedResponse.markdown``.
    """

    def __init__(self, links: Mapping[int, str]) -> None:
        self._links = links
        self._held = ""
        self._length = 0
        self.citations: list[Citation] = []

    def add(self, text: str) -> str:
        """What can be shown after a further piece."""
        text = self._held + text
        begun = _BEGUN.search(text)
        cut = begun.start() if begun else len(text)
        self._held = text[cut:]
        return self._shown(text[:cut])

    def end(self) -> str:
        """What was held back."""
        rest, self._held = self._held, ""
        return self._shown(rest)

    def _shown(self, text: str) -> str:
        parts: list[str] = []
        start = 0
        for mark in _MARK.finditer(text):
            parts.append(self._counted(harmless(text[start : mark.start()])))
            start = mark.end()
            for n in map(int, re.findall(r"\d+", mark[1])):
                if n not in self._links:
                    parts.append(self._counted(f"[{n}]"))
                    continue
                # OpenAI's url_citation names the characters that the link takes in the answer.
                begin = self._length
                parts.append(self._counted(f"[[{n}]]({self._links[n]})"))
                self.citations.append(Citation(n, begin, self._length))
        parts.append(self._counted(harmless(text[start:])))
        return "".join(parts)

    def _counted(self, text: str) -> str:
        self._length += len(text)
        return text


def closing(answer: Mapping[str, Any]) -> str:
    """The sources that an answer cites, and what to check, to stand below it.

    answer: of ``answer_row``.
    """
    lines: list[str] = []
    cited = [source for source in answer["sources"] if source["cited"]] if answer["found"] else []
    if cited:
        lines += ["", "", SOURCES, "", *(_listed(source) for source in cited)]
    if answer["problems"]:
        lines += ["", "", PROBLEMS, "", *(f"- {literal(text)}" for text in answer["problems"])]
    return "\n".join(lines)


def without_links(text: str) -> str:
    """What a client sends back of an answer in its history, as it was before it was linked."""
    for heading in (SOURCES, PROBLEMS):
        text = text.split(f"\n\n{heading}\n", 1)[0]
    return _LINKED.sub(r"[\1]", text)


def url_citations(
    citations: Sequence[Citation], sources: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Citations as OpenAI's ``url_citation``; sources: of ``answer_row``."""
    by_number = {source["n"]: source for source in sources}
    return [
        {
            "type": "url_citation",
            "url_citation": {
                "start_index": citation.start,
                "end_index": citation.end,
                "title": place_of(by_number[citation.n]),
                "url": by_number[citation.n]["view"],
            },
        }
        for citation in citations
    ]


def place_of(source: Mapping[str, Any]) -> str:
    """File name and page, for people."""
    page = page_name(source)
    return f"{source['name']}, {page}" if page else str(source["name"])


def _listed(source: Mapping[str, Any]) -> str:
    quote = f": \u201c{literal(source['quote'])}\u201d" if source["quote"] else ""
    return f"- \\[{source['n']}\\] [{literal(place_of(source))}]({source['view']}){quote}"
