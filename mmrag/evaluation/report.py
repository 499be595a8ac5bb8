"""The report: one HTML file with tables, plots, and the worst questions beside their pages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from mmrag.evaluation.compare import finding_systems, gains
from mmrag.evaluation.evidence import ShownPage, show_page
from mmrag.evaluation.matrix import matrix_tables
from mmrag.evaluation.measures import MEASURES, metric_names
from mmrag.evaluation.questions import Page, Question
from mmrag.evaluation.results import Evaluation, Scope, System
from mmrag.index import UniversalIndex

_SHOWN = 3  # pages that are shown of what was found for a question
_SCOPES: Mapping[Scope, str] = {"corpus": "All documents", "document": "Inside the document"}
_CURVE = 10  # values of k in the plot of hits


def write_report(
    evaluation: Evaluation,
    path: str | Path,
    libraries: Mapping[str, UniversalIndex] | None = None,
    *,
    title: str = "Evaluation",
    worst: int = 10,
) -> None:
    """Write an evaluation as one HTML file that loads nothing from anywhere.

    Args:
        libraries: the libraries that were asked, by their names in the evaluation, for the images
            of pages; without them, or for an evaluation that was loaded, no page is shown.
        title: the heading.
        worst: how many of the worst questions are shown with the pages that were found.
    """
    html = (
        template_environment()
        .get_template("report.html")
        .render(
            title=title,
            now=datetime.now().astimezone(),
            evaluation=evaluation,
            metrics=metric_names(evaluation.cuts),
            scopes=[_scope(evaluation, scope) for scope in _SCOPES if evaluation.systems(scope)],
            several=len({system.model for system in evaluation.found}) > 1,
            lead=_lead(evaluation),
            kinds=_groups(evaluation, "kind"),
            documents=_groups(evaluation, "document"),
            matrices=matrix_tables(evaluation),
            gains=_gains(evaluation),
            answers=_answers(evaluation),
            worst=_worst(evaluation, libraries or {}, worst),
        )
    )
    Path(path).write_text(html, encoding="utf-8")


def template_environment() -> jinja2.Environment:
    """Where the templates of reports are, and how they write numbers."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmrag.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["score"] = "{:.3f}".format
    environment.filters["gain"] = "{:+.3f}".format
    return environment


def _scope(evaluation: Evaluation, scope: Scope) -> dict[str, Any]:
    """The rows of a table and the curves of a plot."""
    systems = evaluation.shown_systems(scope)
    scores = {system: evaluation.scores(system) for system in systems}
    names = metric_names(evaluation.cuts)
    best = {name: max(each[name].mean for each in scores.values()) for name in names}
    return {
        "title": _SCOPES[scope],
        "rows": [{"system": system, "scores": each} for system, each in scores.items()],
        "best": best,
        "panels": [
            {
                "model": model,
                "curves": _curves(evaluation, [s for s in systems if s.model == model]),
            }
            for model in dict.fromkeys(system.model for system in systems)
        ],
    }


def _curves(evaluation: Evaluation, systems: Sequence[System]) -> list[dict[str, Any]]:
    """The share of questions with a right page among the first k, for k from 1."""
    asked = evaluation.asked()
    deepest = min(_CURVE, evaluation.cuts[-1])
    curves = []
    for system in systems:
        firsts = [_first(evaluation, system, question) for question in asked]
        shares = [
            sum(first is not None and first <= k for first in firsts) / len(asked)
            for k in range(1, deepest + 1)
        ]
        if any(shares):
            curves.append({"name": system.name, "shares": shares})
    return curves


def _first(evaluation: Evaluation, system: System, question: Question) -> int | None:
    """The rank of the first right page."""
    return min(evaluation.found[system].get(question.id, {}).values(), default=None)


def _lead(evaluation: Evaluation) -> dict[str, Any] | None:
    """What the main system does, in numbers, and where its first pages go wrong."""
    system = evaluation.main_system
    if system is None:
        return None
    asked = evaluation.asked()
    ranked = evaluation.rankings.get(system, {})
    other_page = other_document = 0
    for question in asked:
        pages = ranked.get(question.id, ())
        if pages and pages[0][0] not in question.relevant:
            right_document = pages[0][0][0] in {file for file, _ in question.relevant}
            other_page += right_document
            other_document += not right_document
    return {
        "system": system,
        "scores": evaluation.scores(system),
        "n": len(asked),
        "n_documents": len({question.document for question in asked}),
        "other_page": other_page,
        "other_document": other_document,
    }


def _groups(evaluation: Evaluation, by: str) -> dict[str, Any] | None:
    """The main metric of each system for each kind or document; None for fewer than two."""
    systems = finding_systems(evaluation)
    names = sorted({str(getattr(question, by)) for question in evaluation.asked()})
    if len(names) < 2 or not systems:
        return None
    groups = {name: [q for q in evaluation.asked() if getattr(q, by) == name] for name in names}
    rows = []
    for system in systems:
        values = [
            evaluation.values(system, some)[evaluation.main_metric] for some in groups.values()
        ]
        rows.append({"system": system, "means": [float(each.mean()) for each in values]})
    heads = [{"name": name or "(none)", "n": len(some)} for name, some in groups.items()]
    return {"heads": heads, "rows": rows}


def _gains(evaluation: Evaluation) -> dict[str, Any] | None:
    """What the main system gains over each other one, by the paired bootstrap."""
    rows = gains(evaluation)
    if not rows:
        return None
    ends = [abs(end) for _, one in rows for end in (one.low, one.high, one.gain) if end == end]
    limit = math.ceil(10 * max(*ends, 0.1)) / 10  # of the plot, in tenths
    return {"system": evaluation.main_system, "rows": rows, "limit": limit}


def _answers(evaluation: Evaluation) -> dict[str, Any] | None:
    if not evaluation.answers:
        return None
    scores = {engine: evaluation.answer_scores(engine) for engine in evaluation.answers}
    measures = [name for name in MEASURES if any(name in found for found in scores.values())]
    return {"scores": scores, "measures": {name: MEASURES[name] for name in measures}}


@dataclass(frozen=True)
class _Worst:
    """A question that went wrong. ranks: of the first right page, by system."""

    question: Question
    score: float
    ranks: list[tuple[System, int | None]]
    right: list[ShownPage]
    found: list[tuple[ShownPage, str]]
    answers: dict[str, Any]


def _worst(
    evaluation: Evaluation, libraries: Mapping[str, UniversalIndex], count: int
) -> list[_Worst]:
    """The questions at which the main system is worst, and all others with it."""
    main = evaluation.main_system
    if main is None:
        return []
    systems = [one for one in evaluation.systems(main.scope) if one.model == main.model]

    def badness(question: Question) -> tuple[float, float]:
        scores = [evaluation.metrics(one, question)[evaluation.main_metric] for one in systems]
        own = evaluation.metrics(main, question)[evaluation.main_metric]
        return own, sum(scores)

    asked = sorted(evaluation.asked(), key=badness)
    index = libraries.get(main.model)
    found = []
    for question in asked[:count]:
        score = badness(question)[0]
        if score == 1.0:
            break
        ranked = [page for page, _ in evaluation.rankings.get(main, {}).get(question.id, ())]
        ranks = [(one, _first(evaluation, one, question)) for one in systems]
        wanted = question.answer or question.text
        found.append(
            _Worst(
                question,
                score,
                ranks,
                [_shown(index, page, wanted) for page in list(question.relevant)[:_SHOWN]],
                [
                    (_shown(index, page, question.text), _verdict(page, question))
                    for page in ranked[:_SHOWN]
                ],
                {
                    engine: records[question.id]
                    for engine, records in evaluation.answers.items()
                    if question.id in records
                },
            )
        )
    return found


def _shown(index: UniversalIndex | None, page: Page, wanted: str) -> ShownPage:
    if index is None:
        return ShownPage(page, f"{page[0]}, page {page[1]}", None)
    return show_page(index.collection, page, wanted)


def _verdict(page: Page, question: Question) -> str:
    """What is wrong with a page that was found."""
    if page in question.relevant:
        return "right"
    same = page[0] in {file for file, _ in question.relevant}
    return "another page of the document" if same else "another document"
