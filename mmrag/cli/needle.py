"""``mmrag needle``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mmrag.cli.console import errors, print_json, show
from mmrag.cli.evaluate import (
    engines_over,
    is_file,
    judge_model,
    model_in_use,
    need_use_of_llm,
    stopped,
    work_folder,
)
from mmrag.cli.llm import BaseURLOption, LLMOption, NoImagesOption, WindowOption
from mmrag.cli.options import (
    DebugOption,
    ResultsOption,
)
from mmrag.cli.progress import working
from mmrag.cli.reranking import RerankOption, rerankers
from mmrag.cli.scores import needle_view

if TYPE_CHECKING:
    from mmrag.evaluation.needle.scores import NeedleResult


def needle(
    context: typer.Context,
    folder: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FOLDER_OF_PDFS]",
            exists=True,
            help="PDFs whose pages the needles are hidden among. Default: pages made up.",
        ),
    ] = None,
    embedder: Annotated[
        str, typer.Option("--embedder", "-e", metavar="NAME_OR_FOLDER", help="Embedding model.")
    ] = "mmrag-nano",
    size: Annotated[
        list[int] | None,
        typer.Option(min=2, help="Pages of a corpus; may be repeated. Default: 10, 100 and 1000."),
    ] = None,
    depth: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            help="Where a needle is, from 0 (first page) to 1; may be repeated. Default: 0, 0.25, "
            "0.5, 0.75 and 1.",
        ),
    ] = None,
    each: Annotated[int, typer.Option(min=1, help="Needles of each kind at each depth.")] = 2,
    kind: Annotated[
        list[str] | None,
        typer.Option(metavar="page|figure|cell", help="What is hidden. Default: all."),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="text|scanned", help="With or without a text layer. Default: both."),
    ] = None,
    grid: Annotated[
        int, typer.Option(min=1, max=12, help="Pictures in a row, and rows, of a sheet.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of everything that is made by chance.")] = 0,
    ocr: Annotated[
        Literal["auto", "off", "force"],
        typer.Option("--ocr", help="As for mmrag index. Off: scanned pages are found by image."),
    ] = "off",
    cut: Annotated[
        list[int] | None,
        typer.Option("-k", min=1, help="Pages that count; may be repeated. Default: 1, 5 and 10."),
    ] = None,
    rerank: RerankOption = None,
    answers: Annotated[
        bool,
        typer.Option(
            "--answers", help="Answer the questions as well: with --llm, else by quoting passages."
        ),
    ] = False,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
    context_window: WindowOption = None,
    no_images: NoImagesOption = False,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge", metavar="MODEL[@URL]", help="A chat model that grades the answers."
        ),
    ] = None,
    json_file: ResultsOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a report with heat maps.")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Hide pages, figures and parts of pictures among many pages, and see what is found.

    The whole pipeline is tested, reading and indexing too, and no questions are needed.
    """
    with errors(debug, stopped=stopped(json_file)):
        if judge and not answers:
            raise typer.BadParameter("--judge needs --answers.")
        need_use_of_llm(context, rerank, answers)
        with working(log=True) as step, work_folder(json_file) as work:
            step(f"Loading {embedder}")
            from mmrag.embedders import load_embedder
            from mmrag.evaluation.needle.corpora import NeedleOptions
            from mmrag.evaluation.needle.run import find_needles
            from mmrag.reading import ReadOptions

            # What is not given has its default there.
            given = {"sizes": size, "depths": depth, "kinds": kind, "layers": layer, "cuts": cut}
            several: dict[str, Any] = {name: tuple(of) for name, of in given.items() if of}
            options = NeedleOptions(each=each, grid=grid, seed=seed, **several)
            model = model_in_use(llm, base_url, context_window, rerank, answers)
            chain = rerankers(rerank, model, max(options.cuts), images=not no_images)
            name = Path(embedder).name
            result = find_needles(
                load_embedder(embedder),
                work,
                options,
                folder=folder,
                reading=ReadOptions(ocr=ocr),
                rerankers={", then ".join(rerank): chain} if rerank else {},
                engines=(
                    (lambda index: engines_over({name: index}, model, images=not no_images))
                    if answers
                    else None
                ),
                judge=judge_model(judge, base_url) if judge else None,
                progress=lambda now: step.often(f"{now.task} {now.done}/{now.total}"),
            )
            if html is not None:
                step("Writing the report")
                from mmrag.evaluation.needle.report import write_needle_report

                write_needle_report(result, html)
        _write(result, json_file)


def _write(result: NeedleResult, json_file: Path | None) -> None:
    """Save what is to be saved, and print tables, or JSON for ``--json -``."""
    if is_file(json_file):
        text = json.dumps(result.to_json(), ensure_ascii=False, indent=1)
        json_file.write_text(text + "\n", encoding="utf-8")
    if json_file is None or is_file(json_file):
        show(needle_view(result))
    else:
        print_json(result.to_json())
