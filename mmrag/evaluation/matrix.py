"""Results by kind of question and kind of document, after OmniEval (arXiv 2412.13018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mmrag.evaluation.compare import main_system
from mmrag.evaluation.results import Evaluation, Score

# The measure that says most of an answer first; a matrix shows the first that there is.
_LEADING = ("nuggets_vital_strict", "judged", "contains", "right_page")


@dataclass(frozen=True)
class MatrixCell:
    """The questions of one kind about one kind of documents.

    n: their number. retrieval: the main metric of the main ranking; None where no question has a
    right page. answers: by engine, every measure of its answers.
    """

    kind: str
    document_kind: str
    n: int
    retrieval: Score | None
    answers: Mapping[str, Mapping[str, Score]]


def matrix(evaluation: Evaluation) -> list[MatrixCell]:
    """A cell for each pair of kinds that has questions; none without several kinds of documents."""
    groups: dict[tuple[str, str], list[Any]] = {}
    for question in evaluation.questions:
        groups.setdefault((question.kind, question.document_kind), []).append(question)
    if len({of for _, of in groups}) < 2:
        return []
    main = main_system(evaluation)
    cells = []
    for (kind, document_kind), questions in sorted(groups.items()):
        # An evaluation of its own, so that all scores are computed in one place.
        part = replace(evaluation, questions=questions)
        scores = part.scores(main) if main is not None else {}
        answers = {engine: part.answer_scores(engine) for engine in evaluation.answers}
        retrieval = scores.get(evaluation.main_metric)
        cells.append(MatrixCell(kind, document_kind, len(questions), retrieval, answers))
    return cells


def shown_measures(cells: Sequence[MatrixCell], engine: str) -> list[str]:
    """The measures of answers that have a table: the one that says most, and abstention."""
    there = {name for cell in cells for name in cell.answers[engine]}
    # Questions without an answer have no other measure.
    return [name for name in _LEADING if name in there][:1] + ["abstained"] * ("abstained" in there)


def matrix_tables(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, list[Score | None]]]]]:
    """Tables for people: a title, and rows by kind of question with a score for each column.

    The columns are ``document_kinds``.
    """
    cells = matrix(evaluation)
    if not cells:
        return []
    of = {(cell.kind, cell.document_kind): cell for cell in cells}
    columns = document_kinds(evaluation)
    kinds = list(dict.fromkeys(cell.kind for cell in cells))

    def rows(score: Any) -> list[tuple[str, list[Score | None]]]:
        return [
            (kind, [score(of[kind, c]) if (kind, c) in of else None for c in columns])
            for kind in kinds
        ]

    tables = [(evaluation.main_metric, rows(lambda cell: cell.retrieval))]
    for engine in evaluation.answers:
        for name in shown_measures(cells, engine):
            by_engine = rows(lambda cell, e=engine, m=name: cell.answers[e].get(m))
            tables.append((f"{engine}: {name}", by_engine))
    return tables


def document_kinds(evaluation: Evaluation) -> list[str]:
    """The kinds of documents that questions are about, in the order of columns."""
    return sorted({question.document_kind for question in evaluation.questions})
