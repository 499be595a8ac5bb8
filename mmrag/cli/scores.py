"""Tables of an evaluation, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from mmrag.cli.display import clean, plain_table
from mmrag.evaluation.measures import MEASURES, metric_names

if TYPE_CHECKING:
    from mmrag.evaluation.compare import Difference
    from mmrag.evaluation.matrix import MatrixTable
    from mmrag.evaluation.needle.scores import NeedleResult
    from mmrag.evaluation.results import Evaluation, Scope, Score, System

_TITLES = {"corpus": "All documents", "document": "Inside the document"}


def evaluation_view(evaluation: Evaluation) -> RenderableType:
    """A table for each scope, one by kind of question, and what went wrong."""
    from mmrag.evaluation.compare import gains
    from mmrag.evaluation.matrix import matrix_tables

    asked = evaluation.asked()
    documents = len({question.document for question in asked})
    rows: list[RenderableType] = [Text(f"{len(asked)} questions about {documents} documents")]
    # The harder one first: it is what a search over the whole collection is like.
    for scope in ("corpus", "document"):
        if evaluation.systems(scope):
            rows += [Text(), _scope_table(evaluation, scope)]
    if evaluation.kinds() and evaluation.systems():
        rows += [Text(), _kinds_table(evaluation)]
    for table in matrix_tables(evaluation):
        rows += [Text(), _matrix_view(table)]
    if others := gains(evaluation):
        rows += [Text(), _own_gains_table(evaluation, others)]
    if evaluation.answers:
        rows += [Text(), _answers_table(evaluation)]
    if evaluation.answers and evaluation.info.get("judge"):
        rows.append(Text(f"judged by {evaluation.info['judge']['model']}", style="dim"))
    rows.append(
        Text(
            "\n[low, high]: 95 % interval, from a bootstrap over documents"
            # A bootstrap over documents draws from these few again and again.
            + (" (few documents: it says little)" if documents < 10 else ""),
            style="dim",
        )
    )
    rows += [Padding(Text(f"- {clean(note)}", style="yellow")) for note in evaluation.notes]
    return Group(*rows)


def _scope_table(evaluation: Evaluation, scope: Scope) -> Table:
    names = metric_names(evaluation.cuts)
    shown = _named_table(_TITLES[scope], [*names, "95 % interval"])
    systems = evaluation.shown_systems(scope)
    scores = {system: evaluation.scores(system) for system in systems}
    best = {name: max(scores[system][name].mean for system in systems) for name in names}
    for system in systems:
        cells = [_cell(scores[system][name], best[name]) for name in names]
        main = scores[system][evaluation.main_metric]
        # For one metric: intervals of all would fill the screen.
        interval = Text(main.interval, style="dim")
        shown.add_row(*_names(system, systems), *cells, interval)
    return shown


def _kinds_table(evaluation: Evaluation) -> Table:
    kinds = evaluation.kinds()
    counts = {kind: len(evaluation.asked(kind)) for kind in kinds}
    heads = [f"{clean(kind)} ({counts[kind]})" for kind in kinds]
    shown = _named_table(f"All documents, {evaluation.main_metric} by kind of question", heads)
    systems = evaluation.shown_systems()
    for system in systems:
        scores = [evaluation.scores(system, kind)[evaluation.main_metric] for kind in kinds]
        shown.add_row(*_names(system, systems), *(f"{score.mean:.3f}" for score in scores))
    return shown


def _matrix_view(table: MatrixTable) -> Table:
    shown = plain_table(f"{clean(table.title)}, by kind of question and of document")
    shown.add_column("question")
    for column in table.columns:
        shown.add_column(clean(column) or "(none)", justify="right", overflow="fold")
    for kind, scores in table.rows:
        cells = ["" if score is None else f"{score} of {score.n}" for score in scores]
        shown.add_row(clean(kind) or "(none)", *cells)
    return shown


def _own_gains_table(evaluation: Evaluation, others: Sequence[tuple[System, Difference]]) -> Table:
    main = evaluation.main_system
    name = "" if main is None else clean(f"{main.model}, {main.name}")
    shown = _named_table(
        f"{evaluation.main_metric} of {name} less that of", ["difference", "95 % interval"]
    )
    systems = [system for system, _ in others]
    for system, one in others:
        interval = Text(_gain_interval(one), style="dim")
        shown.add_row(*_names(system, systems), _gain(one), interval)
    return shown


def _answers_table(evaluation: Evaluation) -> Table:
    shown = plain_table("Answers")
    shown.add_column("measure")
    scores = {engine: evaluation.answer_scores(engine) for engine in evaluation.answers}
    for engine in evaluation.answers:
        shown.add_column(clean(engine), justify="right", overflow="fold")
    # In the order of MEASURES, and not of whichever engine was asked first.
    for measure in [name for name in MEASURES if any(name in of for of in scores.values())]:
        cells = [
            f"{of[measure]} of {of[measure].n}" if measure in of else "" for of in scores.values()
        ]
        shown.add_row(MEASURES[measure], *cells)
    return shown


def _named_table(title: str, heads: Sequence[str]) -> Table:
    shown = plain_table(title)
    shown.add_column("model", overflow="fold")
    shown.add_column("ranking", overflow="fold")
    for head in heads:
        shown.add_column(head, justify="right")
    return shown


def _names(system: System, systems: Sequence[System]) -> tuple[Text, Text]:
    """Model and ranking; the model is named once, on the first of its rows."""
    first = next(one for one in systems if one.model == system.model)
    model = clean(system.model) if system == first else ""
    return Text(model, style="bold"), Text(clean(system.name))


def _cell(score: Score, best: float) -> Text:
    return Text(f"{score.mean:.3f}", style="bold green" if score.mean == best > 0 else "")


def comparison_view(found: Sequence[Difference], cuts: Sequence[int]) -> RenderableType:
    """What each system and engine gained, real differences marked."""
    rows: list[RenderableType] = []
    names = metric_names(cuts)
    over_all = [one for one in found if one.kind is None]
    for scope, title in _TITLES.items():
        of_scope = [one for one in over_all if one.scope == scope]
        if of_scope:
            rows += [_gains_table(of_scope, names, title), Text()]
    answers = [one for one in over_all if one.scope == "answers"]
    for engine in dict.fromkeys(one.name for one in answers):
        rows += [_answer_gains([one for one in answers if one.name == engine]), Text()]
    for table in _matrix_gains([one for one in found if one.kind is not None]):
        rows += [table, Text()]
    rows.append(
        Text(
            "* real: the 95 % interval of the difference, from a paired bootstrap over documents, "
            "leaves out 0. Of many differences by chance, one in twenty does.",
            style="dim",
        )
    )
    return Group(*rows)


def _gains_table(found: Sequence[Difference], metrics: Sequence[str], title: str) -> Table:
    shown = plain_table(f"{title}, {found[0].n} questions: after - before")
    shown.add_column("model", overflow="fold")
    shown.add_column("ranking", overflow="fold")
    # Files with different cuts have some metrics in common, and only these were compared.
    names = [name for name in metrics if any(one.metric == name for one in found)]
    for name in [*names, "95 % interval"]:
        shown.add_column(name, justify="right")
    last_model = None
    for model, system in dict.fromkeys((one.model, one.name) for one in found):
        by_metric = {one.metric: one for one in found if (one.model, one.name) == (model, system)}
        # The deepest nDCG, as in the table of one evaluation.
        last = by_metric[names[-1]]
        cells = [_gain(by_metric[name]) for name in names]
        interval = Text(_gain_interval(last), style="dim")
        # The model is named once, on the first of its rows.
        head = Text("" if model == last_model else clean(model or ""), style="bold")
        shown.add_row(head, Text(clean(system)), *cells, interval)
        last_model = model
    return shown


def _answer_gains(found: Sequence[Difference]) -> Table:
    shown = plain_table(f"Answers of {clean(found[0].name)}: after - before")
    for head in ("measure", "before", "after", "difference", "95 % interval"):
        shown.add_column(head, justify="left" if head == "measure" else "right")
    # In the order of MEASURES, and not of what the first question allows.
    by_metric = {one.metric: one for one in found}
    for name, measure in MEASURES.items():
        if (one := by_metric.get(name)) is None:
            continue
        cells = (f"{one.before:.3f}", f"{one.after:.3f}", _gain(one), _gain_interval(one))
        shown.add_row(measure, *cells)
    return shown


def _matrix_gains(found: Sequence[Difference]) -> list[Table]:
    """A table for each measure that the matrix of one evaluation shows."""
    from mmrag.evaluation.matrix import shown_measures

    tables = []
    for name, scope in dict.fromkeys((one.name, one.scope) for one in found):
        own = [one for one in found if (one.name, one.scope) == (name, scope)]
        there = dict.fromkeys(one.metric for one in own)
        for metric in shown_measures(there) if scope == "answers" else there:
            cells = {(one.kind, one.document_kind): one for one in own if one.metric == metric}
            columns = sorted({column or "" for _, column in cells})
            # Metrics of rankings are called what they are.
            title = f"{clean(name)}: {MEASURES.get(metric, metric)}, by kind of question and of"
            shown = plain_table(f"{title} document: after - before")
            shown.add_column("question")
            for column in columns:
                shown.add_column(clean(column) or "(none)", justify="right", overflow="fold")
            for kind in dict.fromkeys(kind for kind, _ in cells):
                of_kind = [cells.get((kind, column)) for column in columns]
                shown.add_row(clean(kind or "") or "(none)", *map(_gain_cell, of_kind))
            tables.append(shown)
    return tables


def _gain_cell(one: Difference | None) -> Text:
    # No question of this kind is about documents of that kind.
    if one is None:
        return Text()
    # Without an interval there is no space for one.
    more = " ".join(part for part in (_gain_interval(one), f"of {one.n}") if part)
    return Text.assemble(_gain(one), Text(f" {more}", style="dim"))


def _gain(one: Difference) -> Text:
    # No colour for chance: it would be read as a result.
    style = ("green" if one.gain > 0 else "red") if one.is_real else ""
    return Text(f"{one.gain:+.3f}{'*' if one.is_real else ' '}", style=style)


def _gain_interval(one: Difference) -> str:
    # NaN, the only value that differs from itself: all questions are about one document.
    return "" if one.low != one.low else f"[{one.low:+.3f}, {one.high:+.3f}]"


def needle_view(result: NeedleResult) -> RenderableType:
    """What was found by layer, kind and size, beside chance; by depth; and by ranking."""
    evaluation = result.evaluation
    deepest = evaluation.cuts[-1]
    n = len(evaluation.questions)
    rows: list[RenderableType] = [Text(f"{n} questions, of {result.main.name}"), Text()]
    rows += [_found_table(result), Text(), _depths_table(result), Text()]
    by_ranking = plain_table(f"mrr@{deepest} by ranking, over all sizes")
    by_ranking.add_column("ranking", overflow="fold")
    for cell in result.cells("layer", "kind"):
        by_ranking.add_column(f"{cell.group['layer']}, {cell.group['kind']}", justify="right")
    for system in result.systems():
        cells = result.cells("layer", "kind", system=system)
        means = [f"{cell.mrr.mean:.3f}" for cell in cells]
        by_ranking.add_row(Text(clean(system.name)), *means)
    rows.append(by_ranking)
    if evaluation.answers:
        rows += [Text(), _answers_table(evaluation)]
    rows.append(
        Text(
            "\n[low, high]: 95 % interval, of Wilson for shares, from a bootstrap over needles for "
            "mrr. chance: what a random order of the pages would have. located: the right page was "
            "found, and the part of it that was asked for.",
            style="dim",
        )
    )
    rows += [Padding(Text(f"- {clean(note)}", style="yellow")) for note in evaluation.notes]
    return Group(*rows)


def _found_table(result: NeedleResult) -> Table:
    cuts = result.evaluation.cuts
    shown = plain_table("Found")
    for head in ("layer", "needle"):
        shown.add_column(head)
    heads = [f"hit@{cuts[0]}", *([f"hit@{cuts[-1]}"] if len(cuts) > 1 else []), f"mrr@{cuts[-1]}"]
    for head in ("pages", "n", *heads, "chance", "located"):
        shown.add_column(head, justify="right")
    for cell in result.cells("layer", "kind", "size"):
        scores = [cell.hits[k] for k in dict.fromkeys((cuts[0], cuts[-1]))]
        # In the order of the columns before it: both hits, and mrr.
        names = [*(f"hit@{k}" for k in dict.fromkeys((cuts[0], cuts[-1]))), "mrr"]
        by_chance = ", ".join(f"{cell.chance[name]:.3f}" for name in names)
        located = "" if cell.located != cell.located else f"{cell.located:.3f}"
        group = [str(cell.group[name]) for name in ("layer", "kind", "size")]
        cells = [str(score) for score in (*scores, cell.mrr)]
        shown.add_row(*group, str(cell.n), *cells, by_chance, located)
    return shown


def _depths_table(result: NeedleResult) -> Table:
    from mmrag.evaluation.needle.report import heat_rows

    deepest = result.evaluation.cuts[-1]
    depths = sorted({case.depth for case in result.cases.values()})
    shown = plain_table(f"mrr@{deepest} by depth, from 0 (first page) to 1 (last page)")
    shown.add_column("corpus")
    for depth in depths:
        shown.add_column(f"{depth:g}", justify="right")
    for label, cells in heat_rows(result, depths):
        means = ["" if cell is None else f"{cell.mrr.mean:.3f}" for cell in cells]
        shown.add_row(label, *means)
    return shown
