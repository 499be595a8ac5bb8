"""``mmrag eval``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeGuard

import typer

from mmrag.cli.console import errors, print_json, say, show
from mmrag.cli.llm import BaseURLOption, LLMOption, NoImagesOption, WindowOption, chat_model
from mmrag.cli.options import (
    DEFAULT_COLLECTION,
    DebugOption,
    ResultsOption,
    open_library,
)
from mmrag.cli.progress import Step, indexing, working
from mmrag.cli.reranking import RerankOption, rerankers
from mmrag.cli.scores import comparison_view, evaluation_view
from mmrag.cli.serving import typed

if TYPE_CHECKING:
    from llama_index.core.base.base_query_engine import BaseQueryEngine

    from mmrag.evaluation.questions import Question
    from mmrag.evaluation.results import Evaluation
    from mmrag.index import UniversalIndex
    from mmrag.llms.endpoint import EndpointLLM
    from mmrag.llms.local import LocalLLM


def evaluate(
    context: typer.Context,
    questions: Annotated[
        Path | None,
        typer.Argument(
            metavar="QUESTIONS.jsonl",
            exists=True,
            dir_okay=False,
            help='Lines of {"question": ..., "pages": [{"file": ..., "page": 7}]}.',
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER_OF_PDFS]",
            exists=True,
            help="Files to index first, with each --embedder; else a collection is asked.",
        ),
    ] = None,
    collection: Annotated[
        list[str] | None,
        typer.Option(
            "--collection",
            "-c",
            metavar="FOLDER_OR_URL",
            help="A collection to ask; may be repeated. Default: MMRAG_COLLECTION, else "
            f"{DEFAULT_COLLECTION}.",
        ),
    ] = None,
    embedder: Annotated[
        list[str] | None,
        typer.Option(
            "--embedder",
            "-e",
            metavar="NAME_OR_FOLDER",
            help="Embedding model; may be repeated where a folder of files is given.",
        ),
    ] = None,
    cut: Annotated[
        list[int] | None,
        typer.Option("-k", min=1, help="Pages that count; may be repeated. Default: 1, 5 and 10."),
    ] = None,
    dim: Annotated[
        list[int] | None,
        typer.Option(
            "--dim",
            min=1,
            help="Search with this many leading dimensions as well (Matryoshka); may be repeated.",
        ),
    ] = None,
    rerank: RerankOption = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers",
            help="Answer the questions as well: with --llm, else by quoting passages.",
        ),
    ] = False,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
    context_window: WindowOption = None,
    no_images: NoImagesOption = False,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            metavar="MODEL[@URL]",
            help="A chat model that grades the answers and says whether what they cite supports "
            "them, at --base-url or at its own URL (key: MMRAG_JUDGE_KEY, else OPENAI_API_KEY).",
        ),
    ] = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(
            "--run",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="A TREC run of another system to set beside; may be repeated.",
        ),
    ] = None,
    qrels: Annotated[
        Path | None,
        typer.Option(
            "--qrels",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="TREC qrels: graded right pages, in place of those of the questions.",
        ),
    ] = None,
    save_runs: Annotated[
        Path | None,
        typer.Option(
            "--save-runs",
            metavar="DIR",
            help="Save what each ranking returned as TREC runs, with the qrels.",
        ),
    ] = None,
    json_file: ResultsOption = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a report with plots and the worst questions beside the pages found.",
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--compare",
            metavar="A.json B.json",
            help="Ask nothing; say what was gained from one file of results to the other, and "
            "which differences are real.",
        ),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Measure on your own questions how well each ranking finds the right pages."""
    with errors(debug, stopped=stopped(json_file)):
        # Before the options are checked: two files of results need no library.
        if compare is not None:
            _compare(*compare, json_file)
            return
        _check(folder, collection, embedder, judge, answers)
        need_use_of_llm(context, rerank, answers)
        with working(log=True) as step, work_folder(json_file) as work, ExitStack() as stack:
            step("Loading")
            from mmrag.evaluation.run import evaluate as measure

            # Read before anything is indexed: a mistake in the file is known at once.
            asked = _asked(_need(questions), qrels)
            cuts = tuple(sorted(set(cut or (1, 5, 10))))
            model = model_in_use(llm, base_url, context_window, rerank, answers)
            # The deepest cut: fewer pages would leave its metrics short.
            chain = rerankers(rerank, model, cuts[-1], images=not no_images)
            if folder is not None:
                libraries = _indexed(folder, embedder or ["mmrag-nano"], work, stack, step)
            else:
                libraries = _opened(collection, embedder, not run, stack, step)
            engines: dict[str, BaseQueryEngine] = {}
            if answers:
                engines = engines_over(libraries, model, images=not no_images)
            evaluation = measure(
                libraries,
                asked,
                engines=engines,
                judge=judge_model(judge, base_url) if judge else None,
                # Line by line, so that a run that is killed loses the question in hand at most.
                keep=work / "questions.jsonl",
                progress=lambda now: step.often(f"{now.task} {now.done}/{now.total}"),
                cuts=cuts,
                dims=tuple(dim or ()),
                rerankers={", then ".join(rerank): chain} if rerank else {},
            )
            # After our own, so that they come last in the tables.
            _add_runs(evaluation, run or [])
            if html is not None:
                step("Writing the report")
                from mmrag.evaluation.report import write_report

                write_report(evaluation, html, libraries, title=f"Evaluation: {_named(questions)}")
        _write(evaluation, save_runs, json_file)


def _compare(before: Path, after: Path, json_file: Path | None) -> None:
    """Print what was gained from one file of results to another."""
    from mmrag.evaluation.compare import compare_evaluations
    from mmrag.evaluation.matrix import compare_matrices
    from mmrag.evaluation.results import Evaluation

    old, new = Evaluation.load(before), Evaluation.load(after)
    found = [*compare_evaluations(old, new), *compare_matrices(old, new)]
    rows = [one.to_json() for one in found]
    if is_file(json_file):
        json_file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    elif json_file is not None:
        print_json(rows)
        return
    show(comparison_view(found, old.cuts))


def _named(questions: Path | None) -> str:
    """A file of questions by its folder too: many are called questions.jsonl."""
    path = _need(questions).resolve()
    # The folder's name too: it is often that of the data set.
    return f"{path.parent.name}/{path.name}"


def _need(questions: Path | None) -> Path:
    if questions is None:
        raise typer.BadParameter("Give a file of questions, or --compare two files of results.")
    return questions


def _check(
    folder: Path | None,
    collections: list[str] | None,
    embedders: list[str] | None,
    judge: str | None,
    answers: bool,
) -> None:
    """Refuse options that contradict each other."""
    if folder is not None and collections:
        raise typer.BadParameter("Give a folder of files or --collection, not both.")
    if folder is None and len(embedders or ()) > 1:
        raise typer.BadParameter("Several --embedder need a folder of files to index.")
    if judge and not answers:
        raise typer.BadParameter("--judge needs --answers.")


def need_use_of_llm(context: typer.Context, rerank: list[str] | None, answers: bool) -> None:
    """Refuse an ``--llm`` that was typed and would not be asked."""
    # In the environment it is for other commands too.
    if typed(context, "llm") and not answers and "llm" not in (rerank or ()):
        raise typer.BadParameter("--llm needs --answers, or --rerank llm.")


def model_in_use(
    llm: str | None,
    base_url: str | None,
    window: int | None,
    rerank: list[str] | None,
    answers: bool,
) -> EndpointLLM | LocalLLM | None:
    """The model of ``--llm``, if it is to answer or to rerank."""
    wanted = answers or "llm" in (rerank or ())
    return chat_model(llm, base_url, window) if wanted else None


def engines_over(
    libraries: Mapping[str, UniversalIndex], model: EndpointLLM | LocalLLM | None, *, images: bool
) -> dict[str, BaseQueryEngine]:
    """An engine over each library, named by what finds the pages and what answers."""
    # A local model is named by its folder, whose path would fill the table.
    answers = "quotes" if model is None else Path(model.metadata.model_name).name
    return {
        f"{name}, {answers}": index.as_query_engine(model, images=images)
        for name, index in libraries.items()
    }


def judge_model(given: str, base_url: str | None) -> EndpointLLM:
    """The model of ``--judge``."""
    from mmrag.llms.endpoint import open_llm

    # Not at "@" alone, which names of models have as well.
    model, _, url = given.partition("@http")
    # From the environment: arguments can be read by every user of the machine.
    key = os.environ.get("MMRAG_JUDGE_KEY") or os.environ.get("OPENAI_API_KEY")
    return open_llm(model, f"http{url}" if url else base_url, key)


def _asked(path: Path, qrels: Path | None) -> list[Question]:
    """The questions, with the relevance of the qrels if there are any."""
    from mmrag.evaluation import trec
    from mmrag.evaluation.questions import read_questions

    asked = read_questions(path)
    return asked if qrels is None else trec.with_qrels(asked, trec.read_qrels(qrels))


def _add_runs(evaluation: Evaluation, paths: list[Path]) -> None:
    """Set the runs of other systems beside what was asked."""
    from mmrag.evaluation import trec
    from mmrag.evaluation.results import System

    for path in paths:
        tag, rankings = trec.read_run(path)
        # A question that the run does not have counts as one without a hit, as trec_eval -c has it.
        for question in evaluation.asked():
            evaluation.add(System(tag, "run"), question.id, rankings.get(question.id, []))


def _write(evaluation: Evaluation, runs: Path | None, json_file: Path | None) -> None:
    """Save what is to be saved, and print a table, or JSON for ``--json -``."""
    if runs is not None:
        from mmrag.evaluation.trec import save_runs

        save_runs(evaluation, runs)
    if is_file(json_file):
        evaluation.save(json_file)
    if json_file is None or is_file(json_file):
        show(evaluation_view(evaluation))
    else:
        print_json(evaluation.to_json())


def is_file(json_file: Path | None) -> TypeGuard[Path]:
    """Whether ``--json`` names a file."""
    # By convention - is stdout.
    return json_file is not None and str(json_file) != "-"


def stopped(json_file: Path | None) -> str:
    """What is said after Ctrl-C."""
    if is_file(json_file):
        return "Stopped. The same command goes on from here."
    return "Stopped. With --json FILE, a run goes on where it was stopped."


@contextmanager
def work_folder(json_file: Path | None) -> Iterator[Path]:
    """Where indexes and results of single questions are: beside the JSON, else for this run."""
    if is_file(json_file):
        yield json_file.with_name(f"{json_file.name}.cache")
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _opened(
    collections: list[str] | None,
    embedders: list[str] | None,
    needed: bool,
    stack: ExitStack,
    step: Step,
) -> dict[str, UniversalIndex]:
    """The collections by the names of their embedders, or their own where these are the same.

    needed: without any, the usual one is opened.
    """
    places = collections or []
    if needed and not places:
        places = [os.environ.get("MMRAG_COLLECTION") or DEFAULT_COLLECTION]
    libraries = {}
    for place in places:
        step(f"Opening {place}")
        given = embedders[0] if embedders else None
        libraries[place] = stack.enter_context(open_library(place, given))
    models = [Path(one.collection.settings.embedder).name for one in libraries.values()]
    if len(set(models)) < len(models):
        models = [Path(place).name if len(places) > 1 else place for place in libraries]
    if len(set(models)) < len(models):
        models = list(libraries)
    return dict(zip(models, libraries.values(), strict=True))


def _indexed(
    folder: Path, embedders: list[str], work: Path, stack: ExitStack, step: Step
) -> dict[str, UniversalIndex]:
    """The files indexed with each embedder."""
    libraries = {}
    for number, name in enumerate(embedders, 1):
        step(f"Loading {name}")
        model = Path(name).name
        if model in libraries:
            model = f"{model} ({number})"
        # Kept beside the results, so that a run that was stopped does not index again.
        index = stack.enter_context(open_library(str(work / "indexes" / model), name))
        step.stop()
        with indexing() as progress:
            # prune: pages of files that are gone would be wrong hits.
            report = index.add(folder, progress=progress, prune=True)
        for error in report.errors:
            say(f"could not be read: {error}")
        libraries[model] = index
    return libraries
