"""What an evaluation found, and the numbers that follow from it.

Kept are the ranks of the right pages, question by question: every metric is computed from these,
so that a file of results can be compared with another one later.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mmrag.errors import ContentError
from mmrag.evaluation.answers import AnswerRecord
from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.metrics import CUTS, Metrics, metrics_of
from mmrag.evaluation.questions import Nugget, Page, Question, as_page, page_id
from mmrag.retrieval.fusion import BM25

Scope: TypeAlias = Literal["corpus", "document"]
ScoredPage: TypeAlias = tuple[Page, float]
VERSION = 1


@dataclass(frozen=True, order=True)
class System:
    """What ranked the pages.

    model: the library's embedder, or the tag of a TREC run.
    ranking: ``text``, ``image``, ``bm25``, ... or a fusion of them.
    dim: how many leading dimensions of the vectors were used (Matryoshka); None: all.
    reranker: what reordered the pages; None: nothing.
    scope: ``corpus``, all documents; or ``document``, those of the right pages alone.

    Examples:
        >>> System("mmrag-nano", "text", dim=128).name
        'text, 128 dimensions'
    """

    model: str
    ranking: str
    dim: int | None = None
    reranker: str | None = None
    scope: Scope = "corpus"

    @property
    def name(self) -> str:
        """What it is called beside others of the same model."""
        dim = f", {self.dim} dimensions" if self.dim else ""
        return f"{self.ranking}{dim}" + (f", reranked by {self.reranker}" if self.reranker else "")


@dataclass(frozen=True)
class Score:
    """A mean over ``n`` questions with its 95 % interval, from a bootstrap over documents.

    low, high: NaN where all questions are about one document.

    Examples:
        >>> print(Score(0.5, 0.42, 0.61, n=60))
        0.500 [0.420, 0.610]
    """

    mean: float
    low: float
    high: float
    n: int

    @property
    def interval(self) -> str:
        """The interval for tables; empty if it is not known."""
        return "" if math.isnan(self.low) else f"[{self.low:.3f}, {self.high:.3f}]"

    def rounded(self) -> list[float | None]:
        """Mean, low and high for JSON, which has no NaN: None."""
        values = (self.mean, self.low, self.high)
        return [None if math.isnan(value) else round(value, 6) for value in values]

    def __str__(self) -> str:
        return f"{self.mean:.3f} {self.interval}".rstrip()


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

    def to_json(self) -> dict[str, Any]:
        """As JSON values: of each measure mean, low, high and the number of questions."""
        retrieval = (
            None if self.retrieval is None else [*self.retrieval.rounded(), self.retrieval.n]
        )
        return {
            "kind": self.kind,
            "document_kind": self.document_kind,
            "n": self.n,
            "retrieval": retrieval,
            "answers": {
                engine: {name: [*score.rounded(), score.n] for name, score in of.items()}
                for engine, of in self.answers.items()
            },
        }


@dataclass
class Evaluation:
    """Questions, what each system found for them, and what each engine answered.

    questions: those asked, each with an ``id``.
    found: rank, from 1, of each right page that was found, by system and id of the question.
    answers: what was answered, by name of the engine and id of the question.
    cuts: the values of k of the metrics.
    notes: what went wrong: questions that could not be asked, documents that are not there.
    info: versions, seconds, and what the numbers were made with.
    rankings: the pages with their scores, best first, by system and id of the question; not saved.

    Examples:
        >>> question = Question("How deep is the well?", (("well.pdf", 3),), id="q1")
        >>> system = System("mmrag-nano", "text")
        >>> found = Evaluation([question], {system: {"q1": {("well.pdf", 3): 2}}})
        >>> found.scores(system)["mrr@10"].mean
        0.5
    """

    questions: Sequence[Question]
    found: dict[System, dict[str, dict[Page, int]]] = field(default_factory=dict)
    answers: dict[str, dict[str, AnswerRecord]] = field(default_factory=dict)
    cuts: tuple[int, ...] = CUTS
    notes: list[str] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    rankings: dict[System, dict[str, Sequence[ScoredPage]]] = field(default_factory=dict)

    def add(self, system: System, question_id: str, pages: Sequence[ScoredPage]) -> None:
        """Record what a system returned for a question, best first."""
        relevant = next(q.relevant for q in self.questions if q.id == question_id)
        # Only right pages: every metric follows from their ranks, and a file of results stays
        # small.
        ranks = {page: rank for rank, (page, _) in enumerate(pages, 1) if page in relevant}
        self.found.setdefault(system, {})[question_id] = ranks
        self.rankings.setdefault(system, {})[question_id] = pages

    @property
    def main_metric(self) -> str:
        """The metric that tables are led by: nDCG at the deepest cut."""
        deepest = self.cuts[-1]
        # At one page nDCG is the same as a hit, under a name that says more than there is.
        return f"ndcg@{deepest}" if deepest > 1 else "hit@1"

    def systems(self, scope: Scope = "corpus") -> list[System]:
        """The systems of a scope, in the order in which they were asked."""
        return [system for system in self.found if system.scope == scope]

    def shown_systems(self, scope: Scope = "corpus") -> list[System]:
        """Those that tables show: BM25 once, where several models ranked the same words alike."""
        shown: list[System] = []
        for system in self.systems(scope):
            alike = [one for one in shown if (one.name, system.name) == (BM25, BM25)]
            if all(self.found[one] != self.found[system] for one in alike):
                shown.append(system)
        return shown

    @property
    def main_system(self) -> System | None:
        """The system that this is about: the first fusion, else the first that was asked."""
        systems = self.systems() or self.systems("document")
        fusions = [system for system in systems if system.ranking == "fusion"]
        return next(iter([*fusions, *systems]), None)

    def asked(self, kind: str | None = None) -> list[Question]:
        """The questions that count for retrieval, of one kind or of all."""
        return [q for q in self.questions if q.relevant and kind in (None, q.kind)]

    def kinds(self) -> list[str]:
        """The kinds of these questions, if there are several."""
        kinds = sorted({question.kind for question in self.asked()})
        # A single kind would repeat the table of all.
        return kinds if len(kinds) > 1 else []

    def metrics(self, system: System, question: Question) -> Metrics:
        """All metrics of one question; see ``mmrag.evaluation.metrics``."""
        ranks = {rank: page for page, rank in self.found[system].get(question.id, {}).items()}
        # None stands for a page that is not right.
        ranked = [ranks.get(rank) for rank in range(1, self.cuts[-1] + 1)]
        return metrics_of(ranked, question.relevant, self.cuts)

    def values(self, system: System, questions: Iterable[Question]) -> dict[str, NDArray[Any]]:
        """Each metric of each question: (n questions,) by the name of the metric."""
        rows = [self.metrics(system, question) for question in questions]
        return {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else ())}

    def scores(self, system: System, kind: str | None = None) -> dict[str, Score]:
        """Mean and interval of each metric, over the questions of one kind or all."""
        asked = self.asked(kind)
        return with_intervals(self.values(system, asked), [q.group for q in asked])

    def answer_scores(self, engine: str, kind: str | None = None) -> dict[str, Score]:
        """Mean and interval of each measure of answers, over the questions that allow it.

        The measures are those of ``AnswerRecord.scores``.
        """
        values: dict[str, dict[str, float]] = {}
        for question in self.questions:
            record = self.answers[engine].get(question.id)
            if record is not None and kind in (None, question.kind):
                # Each measure has questions of its own, so that means are taken over different
                # ones.
                for name, value in record.scores(question).items():
                    values.setdefault(name, {})[question.id] = value
        documents = {question.id: question.group for question in self.questions}
        found: dict[str, Score] = {}
        for name, of_questions in values.items():
            owners = [documents[id_] for id_ in of_questions]
            found |= with_intervals({name: np.array([*of_questions.values()])}, owners)
        return found

    def matrix(self) -> list[MatrixCell]:
        """A cell for each pair of kinds that has questions; none without two kinds of documents.

        Source: OmniEval (arXiv 2412.13018).
        """
        groups: dict[tuple[str, str], list[Question]] = {}
        for question in self.questions:
            groups.setdefault((question.kind, question.document_kind), []).append(question)
        if len({of for _, of in groups}) < 2:
            return []
        main, cells = self.main_system, []
        for (kind, document_kind), questions in sorted(groups.items()):
            # An evaluation of its own, so that all scores are computed in one place.
            part = dataclasses.replace(self, questions=questions)
            scores = part.scores(main) if main is not None else {}
            answers = {engine: part.answer_scores(engine) for engine in self.answers}
            retrieval = scores.get(self.main_metric)
            cells.append(MatrixCell(kind, document_kind, len(questions), retrieval, answers))
        return cells

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON values, with the means for readers; ``from_json`` reads it back."""
        return {
            "version": VERSION,
            "info": self.info,
            "cuts": list(self.cuts),
            "notes": self.notes,
            "questions": [_question_row(question) for question in self.questions],
            "systems": [self._system_row(system) for system in self.found],
            "answers": [self._engine_row(engine) for engine in self.answers],
            "matrix": [cell.to_json() for cell in self.matrix()],
        }

    def _system_row(self, system: System) -> dict[str, Any]:
        means = _means(self.scores(system))
        found = {
            id_: {page_id(page): rank for page, rank in ranks.items()}
            for id_, ranks in self.found[system].items()
        }
        kinds = {kind: _means(self.scores(system, kind)) for kind in self.kinds()}
        return {**dataclasses.asdict(system), "metrics": means, "kinds": kinds, "found": found}

    def _engine_row(self, engine: str) -> dict[str, Any]:
        means = _means(self.answer_scores(engine))
        records = {id_: record.to_json() for id_, record in self.answers[engine].items()}
        names = sorted({question.kind for question in self.questions})
        kinds = {kind: _means(self.answer_scores(engine, kind)) for kind in names}
        # A single kind would repeat the means of all.
        kinds = kinds if len(kinds) > 1 else {}
        return {"engine": engine, "metrics": means, "kinds": kinds, "records": records}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Evaluation:
        """The evaluation that ``to_json`` gave. Raises ContentError for anything else."""
        try:
            if values["version"] != VERSION:
                raise ContentError(
                    f"version {values['version']} of the format cannot be read; use the mmrag "
                    "that wrote it."
                )
            # By name: the rows have metrics and ranks besides.
            names = [one.name for one in dataclasses.fields(System)]
            return cls(
                questions=[_as_question(row) for row in values["questions"]],
                found={
                    System(**{name: row[name] for name in names}): {
                        id_: {as_page(page): rank for page, rank in ranks.items()}
                        for id_, ranks in row["found"].items()
                    }
                    for row in values["systems"]
                },
                answers={
                    row["engine"]: {
                        id_: AnswerRecord.from_json(one) for id_, one in row["records"].items()
                    }
                    for row in values["answers"]
                },
                cuts=tuple(values["cuts"]),
                notes=values["notes"],
                info=values["info"],
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ContentError(f"this is no result of an evaluation ({error!r}).") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON, a question and a system a line; ``load`` reads it back."""
        parts = []
        for key, value in self.to_json().items():
            rows = value if isinstance(value, list) and value else None
            text = (
                "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
                if rows
                else json.dumps(value, ensure_ascii=False)
            )
            parts.append(f"{json.dumps(key)}: {text}")
        Path(path).write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what ``save`` wrote. Raises ContentError for another file."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ContentError(
                f"{path} cannot be read ({error}); give a file that mmrag eval --json wrote."
            ) from error
        try:
            return cls.from_json(values)
        except ContentError as error:
            raise ContentError(f"{path}: {error}") from error


def with_intervals(
    values: Mapping[str, NDArray[Any]], documents: Sequence[str]
) -> dict[str, Score]:
    """Mean and interval of each metric; ``values`` has one for each question."""
    if not values:
        return {}
    table = np.stack(list(values.values()), axis=1).astype(np.float64)
    low, high = interval(table, documents)
    return {
        name: Score(float(mean), float(least), float(most), len(table))
        for name, mean, least, most in zip(values, table.mean(axis=0), low, high, strict=True)
    }


def _means(scores: Mapping[str, Score]) -> dict[str, list[float | None]]:
    """Mean, low and high of each metric, for JSON."""
    return {name: score.rounded() for name, score in scores.items()}


def _question_row(question: Question) -> dict[str, Any]:
    row = dataclasses.asdict(question) | {
        "pages": [page_id(page) for page in question.pages],
        "grades": {page_id(page): grade for page, grade in question.grades.items()},
        "image": str(question.image) if question.image else None,
        "nuggets": [dataclasses.asdict(nugget) for nugget in question.nuggets],
    }
    return {key: value for key, value in row.items() if value not in ("", None, {}, [])}


def _as_question(row: Mapping[str, Any]) -> Question:
    parts = dict(row) | {
        "pages": tuple(as_page(page) for page in row.get("pages", ())),
        "grades": {as_page(page): grade for page, grade in row.get("grades", {}).items()},
        "image": Path(row["image"]) if row.get("image") else None,
        "nuggets": tuple(Nugget(**nugget) for nugget in row.get("nuggets", ())),
    }
    return Question(**parts)
