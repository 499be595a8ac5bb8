"""What was found of the needles, by kind, size and depth, beside chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.needle.corpora import Layer
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import Evaluation, Score, System

_Z = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Case:
    """A question of the test: what it asks for, and where that is hidden.

    kind: ``page``, ``figure``, ``cell by text`` or ``cell by picture``.
    size: pages of the corpus. located: whether the box of the hit is that of the part asked for;
    None for a page needle, which is no part.
    """

    needle: str
    kind: str
    layer: Layer
    size: int
    depth: float
    located: bool | None = None


@dataclass(frozen=True)
class Cell:
    """Scores of the questions that are alike.

    hits: of each k, share of right pages among the first k, with its Wilson interval.
    mrr: with the interval of a bootstrap over needles.
    chance: of ``hit@k`` and ``mrr``, what a random order of the pages would have.
    located: share whose right page was found, with the right part of it; NaN for page needles.
    answers: by engine the mean of each measure of answers.
    """

    group: Mapping[str, Any]
    n: int
    hits: Mapping[int, Score]
    mrr: Score
    chance: Mapping[str, float]
    located: float
    answers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As JSON values; None for what is not known."""
        rows = {f"hit@{k}": score for k, score in self.hits.items()} | {"mrr": self.mrr}
        return {
            **self.group,
            "n": self.n,
            **{name: [_known(s.mean), _known(s.low), _known(s.high)] for name, s in rows.items()},
            "chance": {name: round(value, 6) for name, value in self.chance.items()},
            "located": _known(self.located),
            "answers": {engine: dict(means) for engine, means in self.answers.items()},
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


@dataclass
class NeedleResult:
    """An evaluation of hidden needles. cases: by the id of the question.

    Examples:
        >>> question = Question("Which code?", (("text-10-1.pdf", 5),), kind="page", id="q1")
        >>> system = System("mmrag-nano", "fusion")
        >>> found = Evaluation([question], {system: {"q1": {("text-10-1.pdf", 5): 2}}})
        >>> case = Case("page-0.5-1", "page", "text", size=10, depth=0.5)
        >>> (cell,) = NeedleResult(found, {"q1": case}).cells("kind")
        >>> cell.mrr.mean, cell.chance["hit@5"]
        (0.5, 0.5)
    """

    evaluation: Evaluation
    cases: dict[str, Case]

    def systems(self) -> list[System]:
        """Every ranking that was asked, the one that the test is about first."""
        main = self.main
        return [main, *(one for one in self.evaluation.systems() if one != main)]

    @property
    def main(self) -> System:
        """The last reranker over the fusion if there is one, else the fusion."""
        reranked = [one for one in self.evaluation.systems() if one.reranker]
        found = reranked[-1] if reranked else self.evaluation.main_system
        assert found is not None
        return found

    def cells(self, *by: str, system: System | None = None) -> list[Cell]:
        """Scores of a ranking for each value of some fields of a Case, in the order asked."""
        groups: dict[tuple[Any, ...], list[Question]] = {}
        for question in self.evaluation.questions:
            case = asdict(self.cases[question.id])
            groups.setdefault(tuple(case[name] for name in by), []).append(question)
        return [
            self._cell(dict(zip(by, values, strict=True)), questions, system or self.main)
            for values, questions in groups.items()
        ]

    def _cell(
        self, group: Mapping[str, Any], questions: Sequence[Question], system: System
    ) -> Cell:
        values = self.evaluation.values(system, questions)
        cases = [self.cases[question.id] for question in questions]
        cuts = self.evaluation.cuts
        mrr = values[f"mrr@{cuts[-1]}"]
        # Two questions about one needle fail together, and so do its copies in other corpora.
        low, high = interval(mrr[:, None], [case.needle for case in cases])
        located = [case.located for case in cases if case.located is not None]
        return Cell(
            group,
            len(questions),
            {k: wilson(int(values[f"hit@{k}"].sum()), len(questions)) for k in cuts},
            Score(float(mrr.mean()), float(low[0]), float(high[0]), len(mrr)),
            _mean([chance(case.size, cuts) for case in cases]),
            float(np.mean(located)) if located else math.nan,
            {engine: self._answered(engine, questions) for engine in self.evaluation.answers},
        )

    def _answered(self, engine: str, questions: Sequence[Question]) -> dict[str, float]:
        records = self.evaluation.answers[engine]
        return _mean([records[q.id].scores(q) for q in questions if q.id in records])

    def to_json(self) -> dict[str, Any]:
        """The evaluation as JSON values, with every question's case and the table of scores."""
        rows = [
            {"ranking": system.name, **cell.to_json()}
            for system in self.systems()
            for cell in self.cells("layer", "kind", "size", "depth", system=system)
        ]
        cases = {id_: asdict(case) for id_, case in self.cases.items()}
        return self.evaluation.to_json() | {"needle": {"cases": cases, "cells": rows}}


def wilson(right: int, n: int) -> Score:
    """A share with its 95 % interval (Wilson 1927; Brown, Cai and DasGupta 2001, section 3.1.1).

    It stays within 0 and 1, and says something of few questions, all right or all wrong.
    """
    share, scale = right / n, 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / scale
    reach = _Z / scale * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Score(share, max(0.0, middle - reach), min(1.0, middle + reach), n)


def chance(size: int, cuts: Sequence[int]) -> dict[str, float]:
    """What a random order of ``size`` pages, one of them right, has on average."""
    deepest = min(cuts[-1], size)
    hits = {f"hit@{k}": min(1.0, k / size) for k in cuts}
    return hits | {"mrr": sum(1 / rank for rank in range(1, deepest + 1)) / size}


def _mean(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each value over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
