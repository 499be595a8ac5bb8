"""Questions with the pages and the answers that are right."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, TypeAlias
from urllib.parse import quote, unquote

from mmrag.errors import ContentError, naming
from mmrag.queries import MultimodalQuery

logger = logging.getLogger(__name__)

Page: TypeAlias = tuple[str, int]
"""A page: the name of its file, without folders, and its number from 1."""

ACCEPTED = "accepted"
"""The status of rows that count; those without a status count too."""

_EXAMPLE = '{"question": "...", "pages": [{"file": "a.pdf", "page": 7}]}'


@dataclass(frozen=True)
class Nugget:
    """A fact that an answer should state. vital: a good answer has it; else it is of some use.

    Source: TREC 2024 RAG track, AutoNuggetizer (arXiv 2411.09607).

    Examples:
        >>> Nugget("The well is 9 m deep.").vital
        True
    """

    text: str
    vital: bool = True


@dataclass(frozen=True)
class Question:
    """A question, and what is right.

    text: the question; ``image``, if it is asked with one.
    pages: the right pages, any one of which is a hit; the first is of the document that the
        question is about.
    grades: relevance of pages where some are better than others; 1 for each of ``pages`` if empty.
    kind: what results are broken down by; may be empty.
    document_kind: what kind of document it is about; with ``kind``, a cell of the matrix.
    nuggets: the facts that an answer should state.
    answer: the right answer, if it is known.
    answerable: False where the documents do not answer it, and saying so is right.
    id: names it in results and TREC files; ``evaluate`` numbers those without.

    Examples:
        >>> question = Question("How deep is the well?", pages=(("well.pdf", 3),))
        >>> question.document
        'well.pdf'
    """

    text: str
    pages: tuple[Page, ...] = ()
    kind: str = ""
    answer: str | None = None
    answerable: bool = True
    id: str = ""
    image: Path | None = None
    grades: Mapping[Page, float] = field(default_factory=dict, hash=False)
    document_kind: str = ""
    nuggets: tuple[Nugget, ...] = ()

    @property
    def document(self) -> str:
        """The document that it is about; empty for one that has no right page."""
        return self.pages[0][0] if self.pages else ""

    @property
    def group(self) -> str:
        """Questions of one group are alike: the document, else the question on its own."""
        # The bootstrap draws groups: questions about one page are no independent observations.
        return self.document or f"question {self.id}"

    @property
    def relevant(self) -> Mapping[Page, float]:
        """Relevance of each right page, above 0."""
        # Binary relevance, unless some pages are better than others.
        return self.grades or dict.fromkeys(self.pages, 1.0)

    def query(self, **fields: Any) -> MultimodalQuery:
        """The query that asks it; ``fields`` are those of MultimodalQuery."""
        return MultimodalQuery(self.text, image=self.image, **fields)


def read_questions(path: Path) -> list[Question]:
    """Questions from JSON lines.

    ``{"question": "...", "pages": [{"file": "a.pdf", "page": 7}]}``, and if wanted ``answer``,
    ``kind``, ``document_kind``, ``id``, ``image`` (a path, from the folder of the questions),
    ``nuggets`` (``[{"text": ..., "vital": true}]``) and ``"answerable": false``, which needs no
    pages. Files are compared by name, without folders; a file without pages, a text or an image,
    counts as its page 1. A row whose ``status`` is not ``accepted`` is left out, and a warning says
    how many were.

    Raises:
        ContentError: For a line without question or pages, and for a file without questions.
    """
    questions, left_out = [], 0
    for number, row in json_lines(path):
        # What a model wrote counts once a person has said so.
        if isinstance(row, Mapping) and row.get("status", ACCEPTED) != ACCEPTED:
            left_out += 1
            continue
        with naming(f"{path}:{number}"):
            questions.append(as_question(row, path.parent))
    if left_out:
        logger.warning(
            "%s: %d of %d questions are not accepted and were left out; set their status to "
            "accepted once they are right.",
            *(path, left_out, left_out + len(questions)),
        )
    if not questions:
        raise ContentError(f"{path}: there is no question{' that is accepted' * bool(left_out)}.")
    return numbered(questions)


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank. Raises ContentError for bad JSON."""
    # As bytes: json takes away a byte order mark. Not splitlines, which also cuts at U+2028 inside
    # of a JSON text.
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ContentError(
                    f"{path}:{number}: this is not JSON ({error}); give a question and its "
                    f"pages, as in {_EXAMPLE}."
                ) from error


def as_question(row: Any, folder: Path) -> Question:
    """One row of a file of questions; see ``read_questions``. Raises ContentError."""
    try:
        answerable = bool(row.get("answerable", True))
        given = row.get("pages", []) if not answerable else row["pages"]
        # By name alone: questions outlive the folders that files lie in.
        pages = tuple((PurePath(page["file"]).name, int(page["page"])) for page in given)
        image = folder / row["image"] if row.get("image") else None
        # A question may be an image alone.
        text = str(row.get("question", "") if image else row["question"])
        nuggets = tuple(
            Nugget(str(each["text"]), bool(each.get("vital", True)))
            for each in row.get("nuggets") or ()
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ContentError(f"give a question and its pages, as in {_EXAMPLE}.") from error
    if answerable and not pages:
        raise ContentError(
            'pages is empty: give a right page, or "answerable": false if there is none.'
        )
    answer = None if row.get("answer") is None else str(row["answer"])
    kind, of, name = (str(row.get(key) or "") for key in ("kind", "document_kind", "id"))
    pages = tuple(dict.fromkeys(pages))
    return Question(
        text, pages, kind, answer, answerable, name, image, document_kind=of, nuggets=nuggets
    )


def numbered(questions: Sequence[Question]) -> list[Question]:
    """The questions, those without an id called ``q1``, ``q2`` by their place.

    Raises:
        ContentError: If two have the same id.
    """
    named = [q if q.id else replace(q, id=f"q{n}") for n, q in enumerate(questions, 1)]
    ids: set[str] = set()
    for question in named:
        if question.id in ids:
            raise ContentError(f"two questions have the id {question.id!r}; ids are unique.")
        ids.add(question.id)
    return named


def page_id(page: Page) -> str:
    """A page in one word, as TREC files need it: ``annual%20report.pdf#7``."""
    # TREC's files are split at white space.
    return f"{quote(page[0], safe='')}#{page[1]}"


def as_page(page_id: str) -> Page:
    """The page that ``page_id`` named. Raises ContentError for another string."""
    # From the right, since a name may have a # that was not quoted by us.
    file, _, number = page_id.rpartition("#")
    if not file or not number.isdigit():
        raise ContentError(f"{page_id!r} does not name a page: use file.pdf#7.")
    return unquote(file), int(number)
