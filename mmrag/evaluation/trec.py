"""TREC's files: runs, what a system returned, and qrels, what is relevant.

A run has lines of ``question Q0 page rank score tag``, qrels of ``question 0 page relevance``.
Pages are written as ``file.pdf#7``, with spaces and ``#`` of file names percent-encoded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mmrag.errors import ContentError, naming
from mmrag.evaluation.questions import Page, Question, as_page, page_id
from mmrag.evaluation.results import Evaluation, ScoredPage

_STEP = 1e-6  # relative; wider than trec_eval's single precision


def read_run(path: str | Path) -> tuple[str, dict[str, list[ScoredPage]]]:
    """The tag of a run, and its pages by question, best first; equal scores go by rank.

    Raises:
        ContentError: For a line that is not of a run, and for a file without lines.
    """
    rows: dict[str, list[tuple[float, int, Page]]] = {}
    tags = set()
    for question, _, page, rank, score, tag in _lines(path, 6):
        # Negative, so that sorting puts the best first and equal ones by rank.
        rows.setdefault(question, []).append((-float(score), int(rank), as_page(page)))
        tags.add(tag)
    return min(tags), {
        question: [(page, -score) for score, _, page in sorted(found)]
        for question, found in rows.items()
    }


def write_run(path: str | Path, tag: str, rankings: Mapping[str, Sequence[ScoredPage]]) -> None:
    """Write what a system returned, best first, by question.

    trec_eval goes by scores alone and orders equal ones by name, so a score that is not below
    the one before it is lowered by a millionth.
    """
    lines = []
    for question, pages in rankings.items():
        last = float("inf")
        for rank, (page, score) in enumerate(pages, 1):
            if score >= last:
                score = last - max(_STEP, abs(last) * _STEP)
            last = score
            lines.append(f"{question} Q0 {page_id(page)} {rank} {score:.7g} {_word(tag)}\n")
    Path(path).write_text("".join(lines), encoding="utf-8")


def read_qrels(path: str | Path) -> dict[str, dict[Page, float]]:
    """Relevance, above 0, of pages by question. Raises ContentError as ``read_run``."""
    found: dict[str, dict[Page, float]] = {}
    for question, _, page, grade in _lines(path, 4):
        # A question of which nothing is relevant is judged too.
        of_question = found.setdefault(question, {})
        if float(grade) > 0:
            of_question[as_page(page)] = float(grade)
    return found


def write_qrels(path: str | Path, questions: Iterable[Question]) -> None:
    """Write the right pages of questions."""
    lines = [
        f"{question.id} 0 {page_id(page)} {grade:g}\n"
        for question in questions
        for page, grade in question.relevant.items()
    ]
    Path(path).write_text("".join(lines), encoding="utf-8")


def with_qrels(
    questions: Sequence[Question], qrels: Mapping[str, Mapping[Page, float]]
) -> list[Question]:
    """The questions with the relevance of qrels in place of their own pages.

    Raises:
        ContentError: If the qrels have none of the questions.
    """
    if not any(question.id in qrels for question in questions):
        raise ContentError(
            f"the qrels have none of the questions; they name {', '.join(list(qrels)[:3])}, and "
            f"the questions are called {', '.join(q.id for q in questions[:3])}."
        )
    return [
        replace(question, pages=tuple(grades), grades=dict(grades))
        for question in questions
        for grades in [qrels.get(question.id, {})]
    ]


def save_runs(evaluation: Evaluation, folder: str | Path) -> list[Path]:
    """Write a run of each system that was asked, and ``qrels.txt``; return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    qrels = folder / "qrels.txt"
    write_qrels(qrels, evaluation.asked())
    written = [qrels]
    for system, rankings in evaluation.rankings.items():
        scope = "" if system.scope == "corpus" else f"-in-{system.scope}"
        tag = _word(f"{system.model}-{system.name}{scope}")
        written.append(folder / f"{tag}.run")
        write_run(written[-1], tag, rankings)
    return written


def _lines(path: str | Path, n_fields: int) -> Iterator[list[str]]:
    text = Path(path).read_text(encoding="utf-8")
    numbered = [(n, line.split()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not numbered:
        raise ContentError(f"{path}: the file is empty.")
    names = "question Q0 page rank score tag" if n_fields == 6 else "question 0 page relevance"
    for number, fields in numbered:
        with naming(f"{path}:{number}"):
            try:
                if len(fields) != n_fields:
                    raise ValueError
                int(fields[3])
                float(fields[-2 if n_fields == 6 else -1])
                as_page(fields[2])
            except ValueError as error:
                raise ContentError(f"give lines of {names!r}.") from error
        yield fields


def _word(text: str) -> str:
    """A tag in one word, fit for the name of a file."""
    return re.sub(r"[^\w.-]+", "-", text) or "mmrag"
