"""Results by kind of question and kind of document, after OmniEval (arXiv 2412.13018)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from mmrag.evaluation.compare import Difference, paired
from mmrag.evaluation.measures import MEASURES
from mmrag.evaluation.results import Evaluation, MatrixCell, Score

# The measure that says most of an answer first; a matrix shows the first that there is.
_LEADING = ("nuggets_vital_strict", "judged", "contains", "right_page")


def compare_matrices(before: Evaluation, after: Evaluation) -> list[Difference]:
    """What each cell of the matrix gained, by the same bootstrap as ``compare_evaluations``.

    The main metric of the main ranking, and every measure of answers; nothing without several
    kinds of documents. The kinds are those of ``before``.

    Raises:
        ContentError: If the evaluations have no question in common.
    """
    if len({question.document_kind for question in before.questions}) < 2:
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


@dataclass(frozen=True)
class MatrixTable:
    """One measure for people: rows are kinds of questions, columns kinds of documents.

    Kinds without any score are left out; a cell without questions is None.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[Score | None]]]


def matrix_tables(evaluation: Evaluation) -> list[MatrixTable]:
    """The main metric, and for each engine the measures of ``shown_measures``."""
    cells = evaluation.matrix()
    tables = [_table(evaluation.main_metric, {_key(cell): cell.retrieval for cell in cells})]
    for engine in evaluation.answers:
        for name in shown_measures({name for cell in cells for name in cell.answers[engine]}):
            scores = {_key(cell): cell.answers[engine].get(name) for cell in cells}
            tables.append(_table(f"{engine}: {MEASURES[name]}", scores))
    # Without a question that has a right page, retrieval has no score.
    return [each for each in tables if each.rows]


def _key(cell: MatrixCell) -> tuple[str, str]:
    return cell.kind, cell.document_kind


def _table(title: str, scores: Mapping[tuple[str, str], Score | None]) -> MatrixTable:
    there = [key for key, score in scores.items() if score is not None]
    columns = sorted({column for _, column in there})
    kinds = dict.fromkeys(kind for kind, _ in there)
    rows = [(kind, [scores.get((kind, column)) for column in columns]) for kind in kinds]
    return MatrixTable(title, columns, rows)
