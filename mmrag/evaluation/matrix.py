"""Results by kind of question and kind of document, after OmniEval (arXiv 2412.13018)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from mmrag.evaluation.compare import Difference, paired
from mmrag.evaluation.results import Evaluation, Score

# The measure that says most of an answer first; a matrix shows the first that there is.
_LEADING = ("nuggets_vital_strict", "judged", "contains", "right_page")


def compare_matrices(before: Evaluation, after: Evaluation) -> list[Difference]:
    """What each cell of the matrix gained, by the same bootstrap as ``compare_evaluations``.

    The main metric of the main ranking, and every measure of answers; nothing without several
    kinds of documents. The kinds are those of ``before``.

    Raises:
        ContentError: If the evaluations have no question in common.
    """
    if len(document_kinds(before)) < 2:
        return []
    found = []
    for pair in paired(before, after):
        answers = isinstance(pair.before, str)
        if not answers and pair.before != before.main_system:
            continue
        cells = sorted({(q.kind, q.document_kind) for q in pair.questions})
        for kind, document_kind in cells:
            at = [
                i
                for i, q in enumerate(pair.questions)
                if (q.kind, q.document_kind) == (kind, document_kind)
            ]
            rows, questions = [pair.rows[i] for i in at], [pair.questions[i] for i in at]
            found += [
                replace(one, kind=kind, document_kind=document_kind)
                for one in replace(pair, rows=rows, questions=questions).differences()
                # All metrics of a ranking would say in each cell what the main one says.
                if answers or one.metric == before.main_metric
            ]
    return found


def shown_measures(there: Collection[str]) -> list[str]:
    """The measures of answers that have a table: the one that says most, and abstention."""
    # Questions without an answer have no other measure.
    return [name for name in _LEADING if name in there][:1] + ["abstained"] * ("abstained" in there)


def matrix_tables(evaluation: Evaluation) -> list[tuple[str, list[tuple[str, list[Score | None]]]]]:
    """Tables for people: a title, and rows by kind of question with a score for each column.

    The columns are ``document_kinds``.
    """
    cells = evaluation.matrix()
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
        for name in shown_measures({name for cell in cells for name in cell.answers[engine]}):
            by_engine = rows(lambda cell, e=engine, m=name: cell.answers[e].get(m))
            tables.append((f"{engine}: {name}", by_engine))
    return tables


def document_kinds(evaluation: Evaluation) -> list[str]:
    """The kinds of documents that questions are about, in the order of columns."""
    return sorted({question.document_kind for question in evaluation.questions})
