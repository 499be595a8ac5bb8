"""Page retrieval on a folder of PDFs: every view, BM25 and their fusion, side by side.

    python -m mmrag_recipes evaluate_pages questions.jsonl --pdfs papers/ --model mmrag-nano

Questions are JSON lines: ``{"question": ..., "pages": [{"file": ..., "page": 7}], "kind": ...}``;
pages count from 1, files are named without their folder, and any of the pages is right. Rows
that name their page (``mmrag_recipes.rows``) are read too: their queries are the questions, less
those that ask with an image.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.errors import ContentError
from mmrag.index import UniversalIndex
from mmrag.retrieval.fusion import fuse
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag.store.engine import Scored
from mmrag_recipes.config import EvaluatePagesConfig
from mmrag_recipes.evaluate import CUTS, Metrics, average, metrics_of, show
from mmrag_recipes.rows import Row

logger = logging.getLogger("mmrag_recipes")

Page = tuple[str, int]


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
        Metrics per ranking (``text``, ``image``, ``bm25``, ``fused``), over all questions and per
        kind of question.
    """
    asked = read_questions(questions)
    with (
        tempfile.TemporaryDirectory() as scratch,
        UniversalIndex(library or Path(scratch) / "library", embedder) as index,
    ):
        report = index.add(pdfs, progress=True)
        if report.errors:
            names = "; ".join(str(error) for error in report.errors)
            raise ContentError(f"Not every file could be read: {names}")
        retriever = index.as_retriever(depth=200, weights=weights)
        return _ask_all(retriever, asked)


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Questions with their right pages.

    Raises:
        ContentError: For a line without either, or if no question is asked in words alone.
    """
    questions, pictured = [], 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            question = json.loads(line)
            row = Row.model_validate(question) if "positives" in question else None
        except ValueError as error:
            raise ContentError(f"{path}:{number}: {error}") from error
        if row is not None and row.query.image:
            pictured += 1
            continue
        if row is not None:
            question = _of_row(row)
        if not question.get("question") or not question.get("pages"):
            raise ContentError(f"{path}:{number}: a question and its pages are needed.")
        questions.append(question)
    if pictured:
        logger.warning("%s: %d rows ask with an image and were left out.", path, pictured)
    if not questions:
        raise ContentError(f"{path}: there is no question in words.")
    return questions


def _of_row(row: Row) -> dict[str, Any]:
    if not row.place:
        return {}
    file, _, page = row.place.rpartition("#")
    return {"question": row.query.text, "pages": [{"file": file, "page": int(page)}]}


def _ask_all(
    retriever: UniversalRetriever, questions: Sequence[Mapping[str, Any]]
) -> dict[str, Metrics]:
    found: dict[str, list[Metrics]] = defaultdict(list)
    for question in questions:
        relevant = {(page["file"], int(page["page"])): 1.0 for page in question["pages"]}
        rankings = retriever.rankings(question["question"])
        ranked = {name: pages_of(hits) for name, hits in rankings.items()}
        fused = fuse(rankings, retriever.weights)
        ranked["fused"] = pages_of([entry.best for entry in fused])
        for name, pages in ranked.items():
            metrics = metrics_of(pages[: CUTS[-1]], relevant)
            found[name].append(metrics)
            if "kind" in question:
                found[f"{name}, {question['kind']}"].append(metrics)
    return {name: average(results) for name, results in sorted(found.items())}


def pages_of(hits: Sequence[Scored]) -> list[Page]:
    """Pages in the order of their best nodes."""
    pages = [
        (Path(hit.payload["file"]).name, int(hit.payload["page"]))
        for hit in hits
        if hit.payload.get("page") is not None
    ]
    return list(dict.fromkeys(pages))


def run(options: EvaluatePagesConfig) -> None:
    """Command: evaluate on the pages of PDFs."""
    embedder = load_embedder(options.model, family=options.family)
    results = evaluate_pages(embedder, options.pdfs, options.questions, options.library)
    show(results, as_json=options.as_json)
