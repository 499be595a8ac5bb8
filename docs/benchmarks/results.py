"""The results page: measures the shipped model beside its baselines, and writes the numbers down.

    python docs/benchmarks/results.py measure handbook --data DATA --work build/results \\
        -e mmrag-nano -e all-MiniLM-L6-v2
    python docs/benchmarks/results.py page

``measure`` runs ``mmrag eval`` on one set, a folder with ``pdfs/`` and ``questions.jsonl``, and
keeps the means in ``docs/results/SET.json``: no question, no answer and no text of a document. Run
again, it goes on where it was stopped. It then writes the page, as ``page`` does from the files
there are.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from mmrag import Evaluation
from mmrag.cli.app import app
from mmrag.evaluation.compare import gains
from mmrag.evaluation.measures import MEASURES, metric_names

DOCS = Path(__file__).parents[1]
KEPT = DOCS / "results"
PAGE = DOCS / "results.md"

SETS = {
    "handbook": "**Employee handbook and benefit plans**: 7 PDFs, 273 pages in one collection; the "
    "sample documents of Microsoft's Azure search demo (MIT). 50 questions about text, 10 about "
    "charts. The questions are about three documents, so the intervals say little.",
    "filings": "**Company filings**: 20 filings, 2,624 pages in one collection, mostly dense "
    "tables; the open set of FinanceBench (CC BY-NC, evaluation only).",
}
SCOPES = {"corpus": "All documents", "document": "Inside the document"}

HEAD = """\
# Results

What the shipped model finds, beside its baselines in the same run. Every number is the output of
the command above its tables; [Evaluation](evaluation.md) says what the metrics are, and how to run
the same on your documents. `bm25` are the words alone. The other rankings of a model are its
vectors of text (`text`) and of images (`image`), and their fusions with the words; `fusion` is what
mmrag returns. `mmrag-nano` has image vectors of pages and figures without text alone, so `image`
finds little in documents like these. In brackets: 95 % intervals, from a bootstrap over documents.

This page is written by `docs/benchmarks/results.py`, and a test compares it with the saved means.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("page")
    measured = commands.add_parser("measure")
    measured.add_argument("set", choices=SETS)
    measured.add_argument("--data", type=Path, required=True, help="folder of the sets")
    measured.add_argument("--work", type=Path, required=True, help="keeps indexes between runs")
    measured.add_argument("-e", "--embedder", action="append", required=True)
    given = parser.parse_args(arguments)
    if given.command == "measure":
        measure(given.set, given.data / given.set, given.work, given.embedder)
    kept = {name: KEPT / f"{name}.json" for name in SETS}
    found = {name: json.loads(p.read_text()) for name, p in kept.items() if p.exists()}
    PAGE.write_text(page(found))


def measure(name: str, data: Path, work: Path, embedders: Sequence[str]) -> None:
    """Run ``mmrag eval`` and keep the means."""
    work.mkdir(parents=True, exist_ok=True)
    out = work / f"{name}.json"
    models = [part for embedder in embedders for part in ("-e", embedder)]
    options = [*models, "--answers", "--json", str(out)]
    questions, pdfs = str(data / "questions.jsonl"), str(data / "pdfs")
    if code := app(["eval", questions, pdfs, *options], standalone_mode=False):
        raise SystemExit(code)
    shown = [part for e in embedders for part in ("-e", Path(e).name)]
    kept = summary(Evaluation.load(out)) | {
        "command": f"mmrag eval {name}/questions.jsonl {name}/pdfs {' '.join(shown)} --answers",
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, no GPU, OMP_NUM_THREADS="
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}",
    }
    KEPT.mkdir(exist_ok=True)
    (KEPT / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def summary(evaluation: Evaluation) -> dict:
    """The means of an evaluation, without its questions."""
    asked = evaluation.asked()
    main = evaluation.main_metric
    rows = evaluation.to_json()
    kinds = {
        kind: {
            "n": len(evaluation.asked(kind)),
            "means": [
                round(evaluation.scores(system, kind)[main].mean, 6)
                for system in evaluation.shown_systems()
            ],
        }
        for kind in evaluation.kinds()
    }
    shown = [s for scope in SCOPES for s in evaluation.shown_systems(scope)]
    names = [(s.model, s.ranking, s.dim, s.reranker, s.scope) for s in shown]
    keys = ("model", "ranking", "dim", "reranker", "scope")
    systems = {tuple(row[key] for key in keys): row for row in rows["systems"]}
    return {
        "mmrag": evaluation.info["mmrag"],
        "n_questions": len(asked),
        "n_documents": len({question.document for question in asked}),
        "cuts": list(evaluation.cuts),
        "systems": [{key: systems[name][key] for key in (*keys, "metrics")} for name in names],
        "kinds": kinds,
        "gains": [
            {
                "over": label({"model": system.model, "ranking": system.ranking}),
                "gain": rounded([one.gain, one.low, one.high]),
            }
            for system, one in gains(evaluation)
        ],
        "answers": [
            {
                "engine": engine,
                "metrics": {
                    name: [*rounded([s.mean, s.low, s.high]), s.n]
                    for name, s in evaluation.answer_scores(engine).items()
                },
            }
            for engine in evaluation.answers
        ],
    }


def rounded(values: Sequence[float]) -> list[float | None]:
    """Six decimals; None for what is not known."""
    return [None if value != value else round(value, 6) for value in values]


def page(found: Mapping[str, Mapping]) -> str:
    """The page, from the means of each set."""
    parts = [HEAD]
    for name, kept in found.items():
        parts += [f"## {name.capitalize()}\n", SETS[name] + "\n"]
        parts.append(
            f"```bash\n{kept['command']}\n```\n\n{kept['n_questions']} questions about "
            f"{kept['n_documents']} documents, on {kept['date']}, {kept['machine']}, mmrag "
            f"{kept['mmrag']}.\n"
        )
        for scope, title in SCOPES.items():
            parts.append(scope_table(kept, scope, title))
        parts.append(gains_table(kept))
        if kept["kinds"]:
            parts.append(kinds_table(kept))
        if kept["answers"]:
            parts.append(answers_table(kept))
    return "\n".join(parts)


def scope_table(kept: Mapping, scope: str, title: str) -> str:
    """Metrics of every system of a scope."""
    names = metric_names(kept["cuts"])
    head = ["", *names]
    rows = []
    for system in (row for row in kept["systems"] if row["scope"] == scope):
        cells = [f"{system['metrics'][name][0]:.3f}" for name in names]
        cells[-1] += interval(system["metrics"][names[-1]][1:])
        rows.append([label(system), *cells])
    return f"**{title}**\n\n{table(head, rows)}"


def gains_table(kept: Mapping) -> str:
    """What the fusion gains over each ranking."""
    rows = [
        [one["over"], f"{one['gain'][0]:+.3f}", signed(one["gain"][1:])] for one in kept["gains"]
    ]
    metric = metric_names(kept["cuts"])[-1]
    head = ["", "difference", "95 % interval, paired"]
    return f"**All documents, {metric} of mmrag-nano's fusion less that of**\n\n{table(head, rows)}"


def signed(bounds: Sequence[float | None]) -> str:
    """An interval of a difference."""
    low, high = bounds
    return "" if low is None or high is None else f"[{low:+.3f}, {high:+.3f}]"


def kinds_table(kept: Mapping) -> str:
    """The main metric by kind of question."""
    systems = [row for row in kept["systems"] if row["scope"] == "corpus"]
    head = ["", *(f"{kind} ({of['n']})" for kind, of in kept["kinds"].items())]
    rows = [
        [label(system), *(f"{of['means'][at]:.3f}" for of in kept["kinds"].values())]
        for at, system in enumerate(systems)
    ]
    return f"**All documents, {metric_names(kept['cuts'])[-1]} by kind**\n\n{table(head, rows)}"


def answers_table(kept: Mapping) -> str:
    """Measures of answers, a column for each engine."""
    engines = kept["answers"]
    head = ["answers", *(row["engine"] for row in engines)]
    rows = []
    for name in MEASURES:
        cells = [row["metrics"].get(name) for row in engines]
        if any(cells):
            shown = [f"{c[0]:.3f}{interval(c[1:3])} of {c[3]}" if c else "" for c in cells]
            rows.append([MEASURES[name], *shown])
    return table(head, rows)


def label(system: Mapping) -> str:
    """How a row is called."""
    if system["ranking"] == "bm25":
        return "bm25"
    return f"{system['model']}, {system['ranking']}"


def interval(bounds: Sequence[float | None]) -> str:
    """An interval behind a mean; nothing where there is none."""
    low, high = bounds
    return "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    main()
