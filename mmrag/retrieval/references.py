"""What a question names outright: a page, a figure, a section, a document, a kind of result."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath

from mmrag.lexical import words
from mmrag.queries import Where
from mmrag.store.collection import Collection
from mmrag.store.engine import Scored

_FIGURE_KINDS = ("figure", "picture", "description")
_FIGURES = (
    r"(?:figure|chart|graph|diagram|plot|photo(?:graph)?|drawing|map|picture|image|illustration)s?"
)
# Only a request for a figure itself; "what does the chart show?" wants an answer.
_FIGURE_WANTED = re.compile(
    r"^\W*(?:please\s+)?(?:find|show|search\s+for|look\s+for|give|get)\s+(?:me\s+)?"
    rf"(?:(?:a|an|the|any|all|some)\s+)?(?:\w+\s+){{0,2}}?{_FIGURES}\b(?!\s*\d)",
    re.IGNORECASE,
)
_PAGE = re.compile(
    r"\b(?:pages?|seite|página|pagina|страниц\w*)\s*(\d{1,4}|[ivxlc]{1,6})\b", re.IGNORECASE
)
_COVER = re.compile(r"\b(?:cover|title|front|first)\s+page\b|\bthe\s+cover\b", re.IGNORECASE)
_LABEL = re.compile(
    r"\b(fig(?:ure|\.)?|table|chart|exhibit|box|abb(?:ildung|\.)?|tab(?:elle|leau|\.))\s*"
    r"(\d{1,3}(?:[.-]\d{1,3})*[a-z]?)\b",
    re.IGNORECASE,
)
_SECTION = re.compile(
    r"(?:\b(?:section|chapter|clause|article|kapitel|abschnitt)|§)\s*(\d{1,3}(?:\.\d{1,3})*)\b",
    re.IGNORECASE,
)
_DEPTH = 50
_NODES = 5000  # of a document that are looked through for a section's heading


def wants_figures(question: str) -> bool:
    """Whether a question asks for a figure itself: "find a chart of sales"."""
    return _FIGURE_WANTED.search(question) is not None


def only_figures(where: Where | None) -> Where | None:
    """The filter narrowed to figures and images; None if it names its kinds already."""
    where = where or Where()
    return None if where.kinds else dataclasses.replace(where, kinds=_FIGURE_KINDS)


def named_nodes(collection: Collection, question: str, where: Where | None) -> list[Scored]:
    """The nodes that a question names by page, label or section, best first; often none.

    A page number says nothing without its document. So this finds something only where files
    are filtered, the question names a file, or there is one file only.

    Returns:
        Scores of 1 for what is named, 0.5 for text that mentions the label or section.
    """
    pages = _PAGE.findall(question)
    cover = _COVER.search(question)
    labels = [*_LABEL.finditer(question)]
    sections = _SECTION.findall(question)
    if not (pages or cover or labels or sections):
        return []
    where = where or Where()
    if not where.files:
        files = _named_files(question, collection.paths())
        if not files:
            return []
        where = dataclasses.replace(where, files=files)
    found: dict[str, Scored] = {}
    first = (1, 1)
    for hit in (
        *(collection.find(dataclasses.replace(where, pages=first), _DEPTH) if cover else ()),
        *_on_pages(collection, pages, where),
        *(hit for label in labels for hit in _labelled(collection, label, where)),
        *(hit for number in sections for hit in _in_section(collection, number, where)),
    ):
        if hit.id not in found or hit.score > found[hit.id].score:
            found[hit.id] = hit
    return sorted(found.values(), key=lambda hit: (-hit.score, hit.id))


def _named_files(question: str, paths: Sequence[str]) -> tuple[str, ...]:
    """The files of which a question has every word of the name."""
    if len(paths) == 1:
        return tuple(paths)
    asked = set(words(question))
    return tuple(
        path
        for path in paths
        # Very short names ("a.pdf") are words of many questions.
        if (name := set(words(PurePath(path).stem))) <= asked and len("".join(name)) >= 4
    )


def _on_pages(collection: Collection, pages: Sequence[str], where: Where) -> Iterator[Scored]:
    """Nodes of pages by their number in the file and by the printed one."""
    for page in pages:
        if page.isdigit() and where.pages is None:
            number = int(page)
            yield from collection.find(dataclasses.replace(where, pages=(number, number)), _DEPTH)
        # Printed numbers: "12" beside page 16 of the file, or "iv", in either case.
        for label in {page, page.lower()}:
            printed = dataclasses.replace(where, metadata={**where.metadata, "label": label})
            yield from collection.find(printed, _DEPTH)


def _labelled(collection: Collection, label: re.Match[str], where: Where) -> Iterator[Scored]:
    """Captions that begin with "Figure 3", then texts that mention it."""
    # "Fig. 3", "Figure 3" and "Figures 3" share three letters.
    stem = re.escape(label[1][:3])
    caption = re.compile(rf"\b{stem}\w*\.?\s*{re.escape(label[2])}\b(?![.-]?\d)", re.IGNORECASE)
    for hit in collection.search_text(label[0], _DEPTH, where):
        text = hit.payload.get("text", "")
        match = caption.search(text)
        if match:
            # A caption begins with its label; a text mentions it within a sentence.
            begins_line = not text[: match.start()].rpartition("\n")[2].strip()
            yield dataclasses.replace(hit, score=1.0 if begins_line else 0.5)


def _in_section(collection: Collection, number: str, where: Where) -> Iterator[Scored]:
    """Nodes under the heading with this number, and texts in which it begins a line."""
    heading = re.compile(rf"(?:^|\n|> ?)\W*(?:\w+\s+)?{re.escape(number)}(?![.\d]*\d)\.?\s")
    for hit in collection.find(where, _NODES):
        if heading.search(f"{hit.payload.get('section') or ''} "):
            yield dataclasses.replace(hit, score=1.0)
        elif heading.search(hit.payload.get("text", "")):
            yield dataclasses.replace(hit, score=0.5)
