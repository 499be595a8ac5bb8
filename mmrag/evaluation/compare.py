"""Two evaluations of the same questions, and which of their differences are real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mmrag.errors import ContentError
from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.metrics import Metrics
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import Evaluation, Scope, System


@dataclass(frozen=True)
class Difference:
    """What one metric gained from one result to another, over the questions that both have.

    name: of the system or engine. scope: ``corpus``, ``document`` or ``answers``.
    before, after: means. low, high: 95 % interval of ``after - before``, from a paired bootstrap
        over documents; NaN where all questions are about one document.

    Examples:
        >>> gained = Difference("text", "corpus", "hit@1", 0.30, 0.42, low=0.05, high=0.2, n=60)
        >>> round(gained.gain, 2), gained.is_real
        (0.12, True)
    """

    name: str
    scope: str
    metric: str
    before: float
    after: float
    low: float
    high: float
    n: int
    model: str | None = None
    kind: str | None = None
    document_kind: str | None = None

    @property
    def gain(self) -> float:
        """What was gained; below 0 what was lost."""
        return self.after - self.before

    @property
    def is_real(self) -> bool:
        """Whether the interval leaves out 0; of differences by chance, one in twenty does."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        # NaN is no JSON.
        plain = {name: None if value != value else value for name, value in asdict(self).items()}
        return plain | {"gain": self.gain, "is_real": self.is_real}


def compare_evaluations(before: Evaluation, after: Evaluation) -> list[Difference]:
    """Every metric of every system and engine that both evaluations have.

    Systems are the same by model, ranking, dimension, reranker and scope; where each evaluation
    has one model only, by whatever name, by the rest. Questions are the same by id, text and right
    pages.

    Raises:
        ContentError: If the evaluations have no question, or nothing that was asked, in common.
    """
    found = [one for pair in paired(before, after) for one in pair.differences()]
    if not found:
        raise ContentError("The two results have no system and no engine in common.")
    return found


@dataclass(frozen=True)
class Pair:
    """What a system or an engine got in two evaluations, question by question.

    before: the system or the name of the engine in the first one. rows: both values of each metric
    for each question, before and after.
    """

    before: System | str
    rows: Sequence[tuple[Metrics, Metrics]]
    questions: Sequence[Question]

    def differences(self) -> list[Difference]:
        """What each metric gained."""
        if isinstance(self.before, str):
            return differences(self.before, "answers", self.rows, self.questions)
        found = differences(self.before.name, self.before.scope, self.rows, self.questions)
        # Systems of several models have the same names.
        return [replace(one, model=self.before.model) for one in found]


def paired(before: Evaluation, after: Evaluation) -> list[Pair]:
    """Every system and engine that both evaluations have, over the questions that both have.

    Raises:
        ContentError: If they have no question in common.
    """
    # By text and right pages too: the same id in an edited file is another question.
    theirs = {(q.id, q.text, tuple(q.relevant)): q for q in after.questions}
    both = [q for q in before.questions if (q.id, q.text, tuple(q.relevant)) in theirs]
    if not both:
        raise ContentError("The two results have no question in common.")
    # Questions without a right page say nothing of retrieval, but something of answers.
    asked = [question for question in both if question.relevant]
    found = [
        Pair(old, [(before.metrics(old, q), after.metrics(new, q)) for q in asked], asked)
        for old, new in _pairs(before, after)
    ]
    for old_name, new_name in _same(list(before.answers), list(after.answers)):
        one, two = before.answers[old_name], after.answers[new_name]
        answered = [q for q in both if q.id in one and q.id in two]
        rows = [(one[q.id].scores(q), two[q.id].scores(q)) for q in answered]
        found.append(Pair(old_name, rows, answered))
    return found


def finding_systems(evaluation: Evaluation, scope: Scope = "corpus") -> list[System]:
    """The systems that found any right page: one that found none is in tables alone."""
    shown = evaluation.shown_systems(scope)
    return [system for system in shown if any(evaluation.found[system].values())]


def gains(evaluation: Evaluation) -> list[tuple[System, Difference]]:
    """What the main system gains over each other one of its scope, in the main metric."""
    main = evaluation.main_system
    if main is None:
        return []
    asked = evaluation.asked()
    found = []
    for system in finding_systems(evaluation, main.scope):
        if system != main:
            rows = [(evaluation.metrics(system, q), evaluation.metrics(main, q)) for q in asked]
            of_metric = differences(system.name, main.scope, rows, asked)
            found += [(system, one) for one in of_metric if one.metric == evaluation.main_metric]
    return found


def differences(
    name: str, scope: str, rows: Sequence[tuple[Metrics, Metrics]], questions: Sequence[Question]
) -> list[Difference]:
    """What each metric gained; ``rows`` has both values of each question, before and after."""
    # A dict and not a set: the order of the metrics is that of tables.
    metrics = dict.fromkeys(metric for one, two in rows for metric in one if metric in two)
    found = []
    for metric in metrics:
        # A question allows a measure in both results or it is no pair.
        shared = [i for i, (one, two) in enumerate(rows) if metric in one and metric in two]
        values = np.array([[rows[i][0][metric], rows[i][1][metric]] for i in shared])
        # Paired: the questions' own difficulty, most of the variance, cancels out.
        gains = values[:, 1:] - values[:, :1]
        # (n, 1): ``interval`` takes a column for each metric.
        (low,), (high,) = interval(gains, [questions[i].group for i in shared])
        old, new = values.mean(axis=0).tolist()
        found.append(
            Difference(name, scope, metric, old, new, float(low), float(high), len(shared))
        )
    return found


def _pairs(before: Evaluation, after: Evaluation) -> list[tuple[System, System]]:
    """The systems that both have."""
    models = _same(
        list(dict.fromkeys(system.model for system in before.found)),
        list(dict.fromkeys(system.model for system in after.found)),
    )
    renamed: Mapping[str, str] = dict(models)
    pairs = [
        (system, replace(system, model=renamed[system.model]))
        for system in before.found
        if system.model in renamed
    ]
    return [(old, new) for old, new in pairs if new in after.found]


def _same(ours: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Names that both have; the only one of each side is the same thing, changed."""
    # A model before and after training has two names, and is what was to be compared.
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])]
    return [(name, name) for name in ours if name in theirs]
