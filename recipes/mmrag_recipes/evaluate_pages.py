"""Page retrieval on a folder of PDFs: every view, BM25 and their fusion, side by side.

    python -m mmrag_recipes evaluate_pages questions.jsonl --pdfs papers/ --model mmrag-nano

Questions are as ``mmrag eval`` takes them, which has intervals, answers and a report as well. Rows
that name their page (``mmrag_recipes.rows``) are read too: their queries are the questions, less
those that ask with an image.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.errors import ContentError, naming
from mmrag.evaluation.metrics import Metrics
from mmrag.evaluation.questions import Question, as_question, json_lines, numbered
from mmrag.evaluation.run import evaluate
from mmrag.index import UniversalIndex
from mmrag.retrieval.retriever import RetrieverOptions
from mmrag_recipes.config import EvaluatePagesConfig
from mmrag_recipes.evaluate import show
from mmrag_recipes.rows import Row

logger = logging.getLogger("mmrag_recipes")


def evaluate_pages(
    embedder: Embedder,
    pdfs: Path,
    questions: Path,
    library: Path | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Metrics]:
    """Index the PDFs through the library's own path and ask every question.

    Args:
        library: folder to keep the index in, so that a second run is fast; default: none kept.
        weights: of the fusion, over the retriever's own.

    Returns:
        Metrics per ranking (``text``, ``image``, ``bm25``, ``fusion``), over all questions and per
        kind of question.
    """
    asked = read_questions(questions)
    with (
        tempfile.TemporaryDirectory() as scratch,
        UniversalIndex(library or Path(scratch) / "library", embedder) as index,
    ):
        report = index.add(pdfs, progress=True)
        # A page that could not be read would count as not found.
        if report.errors:
            names = "; ".join(str(error) for error in report.errors)
            raise ContentError(f"Not every file could be read: {names}")
        fusions: dict[str, RetrieverOptions] = {"fusion": {"weights": weights}}
        # Deep enough for the ranks of nearly all right pages.
        found = evaluate(index, asked, scopes=("corpus",), depth=200, fusions=fusions)
    kinds = sorted({question.kind for question in asked if question.kind})
    results = {}
    for system in found.systems():
        for kind in (None, *kinds):
            scores = found.scores(system, kind)
            means = {name: score.mean for name, score in scores.items()}
            means["n"] = float(len(found.asked(kind)))
            results[system.ranking if kind is None else f"{system.ranking}, {kind}"] = means
    return dict(sorted(results.items()))


def read_questions(path: Path) -> list[Question]:
    """Questions with their right pages.

    Raises:
        ContentError: For a line without either, or if no question is asked in words alone.
    """
    questions, n_with_image = [], 0
    for number, value in json_lines(path):
        with naming(f"{path}:{number}"):
            row = _as_row(value)
            if row is not None and row.query.image:
                n_with_image += 1
                continue
            questions.append(as_question(value if row is None else _question_of(row), path.parent))
    if n_with_image:
        logger.warning("%s: %d rows ask with an image and were left out.", path, n_with_image)
    if not questions:
        raise ContentError(f"{path}: there is no question in words.")
    return numbered(questions)


def _as_row(value: Any) -> Row | None:
    if "positives" not in value:
        return None
    try:
        return Row.model_validate(value)
    except ValueError as error:
        raise ContentError(str(error)) from error


def _question_of(row: Row) -> dict[str, Any]:
    if not row.place:
        return {}
    file, _, page = row.place.rpartition("#")
    return {"question": row.query.text, "pages": [{"file": file, "page": int(page)}]}


def run(options: EvaluatePagesConfig) -> None:
    """Command: evaluate on the pages of PDFs."""
    embedder = load_embedder(options.model, family=options.family)
    results = evaluate_pages(embedder, options.pdfs, options.questions, options.library)
    show(results, as_json=options.as_json)
