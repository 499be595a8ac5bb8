"""The tables of the model card: mmrag-nano beside MiniLM, BM25, and other checkpoints.

    python -m mmrag_recipes.nano.evaluate --xquad xquad/en.jsonl --handbook handbook/

``--xquad`` is JSON lines of paragraphs with their questions; ``--handbook`` a folder with
``pdfs/`` and ``questions.jsonl``, and ``--scans`` asks its questions of images of the right pages,
as if the PDFs had no text layer. With ``--pages FONTS`` XQuAD's paragraphs are also rendered to
pages without a text layer, and the model must find the page. ``--drawings`` is a folder of
drawings whose file names are their titles, and a title that was not trained on must find its
drawing. ``--encoder``, the folder of MiniLM, adds it as it was published.
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rank_bm25 import BM25Okapi

from mmrag.content import load_image
from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.evaluation.metrics import Metrics, average, metrics_of
from mmrag.nodes import node_image
from mmrag.reading import ReadOptions, find_files, read_file
from mmrag_recipes.console import ends_cleanly
from mmrag_recipes.evaluate import table
from mmrag_recipes.nano.images import find_fonts, read_titled, render_page
from mmrag_recipes.options import Options, read_arguments

Scores = NDArray[np.floating[Any]]
Scorer = Callable[[Sequence[str], Sequence[str]], Scores]
# As ``ReadOptions.passage_words``: the card says what indexing gives.
PASSAGE_WORDS = 180
# Enough for steps of 0.2 % in a metric, and few enough for a CPU.
DRAWINGS = 500
NAMES = ("hit@1", "hit@5", "hit@10", "ndcg@10")
RECALL = ("recall@1", "recall@5", "recall@10")


def neural(embedder: Embedder) -> Scorer:
    """Scores by cosine."""

    def score(queries: Sequence[str], documents: Sequence[str]) -> Scores:
        found = embedder.encode(list(queries), "passage_for_question")
        return found @ embedder.encode(list(documents)).T

    return score


def minilm(folder: Path) -> Scorer:
    """Scores by cosine of MiniLM as published, at its 256 tokens."""
    from sentence_transformers import SentenceTransformer

    # On the CPU, where mmrag-nano is meant to run.
    model = SentenceTransformer(str(folder), device="cpu")

    def score(queries: Sequence[str], documents: Sequence[str]) -> Scores:
        found = model.encode(list(queries), normalize_embeddings=True)
        return np.asarray(found @ model.encode(list(documents), normalize_embeddings=True).T)

    return score


def bm25(queries: Sequence[str], documents: Sequence[str]) -> Scores:
    """BM25 with rank-bm25's defaults: lower case, no stemming, no stop words."""
    index = BM25Okapi([_words(text) for text in documents])
    return np.stack([index.get_scores(_words(query)) for query in queries])


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def ranking_metrics(scores: Scores, relevant: Sequence[set[int]]) -> Metrics:
    """Metrics over queries; ``relevant`` holds the right columns of each row."""
    # Stable: BM25 ties at 0 keep the order of the documents, on any machine.
    order = np.argsort(-scores, axis=1, kind="stable")
    return average(
        [
            metrics_of(row[:10].tolist(), dict.fromkeys(right, 1.0))
            for row, right in zip(order, relevant, strict=True)
        ]
    )


def read_xquad(path: Path) -> tuple[list[str], list[str], list[set[int]]]:
    """Paragraphs, questions, and the paragraph of each question."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    asked = [(q["question"], {i}) for i, row in enumerate(rows) for q in row["questions"]]
    return [row["paragraph"] for row in rows], [q for q, _ in asked], [right for _, right in asked]


@dataclass(frozen=True)
class Handbook:
    """Passages of PDF pages with their pages' numbers, and questions with their right pages."""

    passages: list[str]
    owners: list[int]
    questions: list[str]
    relevant: list[set[int]]

    def score(self, scorer: Scorer) -> Scores:
        """Score of each page: that of its best passage, (questions, pages)."""
        scores = scorer(self.questions, self.passages)
        # Not zeros: a page whose passages all have negative cosines would rank too high.
        pages = np.full((len(self.questions), max(self.owners) + 1), -np.inf)
        for column, page in enumerate(self.owners):
            pages[:, page] = np.maximum(pages[:, page], scores[:, column])
        return pages


def read_handbook(folder: Path) -> Handbook:
    """Read ``pdfs/`` and ``questions.jsonl`` of a folder."""
    numbers: dict[tuple[str, int], int] = {}
    passages: list[str] = []
    owners: list[int] = []
    files = find_files([folder / "pdfs"]).files
    with tempfile.TemporaryDirectory() as scratch:
        for path in files:
            # Images are made and not looked at: small ones are made fastest.
            for page in read_file(path, scratch, ReadOptions(dpi=24, figures=False)):
                number = numbers.setdefault((path.name, page.page or 1), len(numbers))
                words = (page.nodes[0].get_content() if page.nodes else "").split()
                # An empty page keeps its number, or questions would point at the wrong one.
                starts = range(0, max(1, len(words)), PASSAGE_WORDS)
                passages += [" ".join(words[s : s + PASSAGE_WORDS]) for s in starts]
                owners += [number] * len(starts)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    # A KeyError here means a question about a page that is not there: better than a wrong table.
    relevant = [{numbers[p["file"], p["page"]] for p in row["pages"]} for row in rows]
    return Handbook(passages, owners, [row["question"] for row in rows], relevant)


def read_scans(folder: Path) -> tuple[list[Image.Image], list[str], list[set[int]]]:
    """Images of all pages that answer a question, the questions, and the right images of each."""
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    right = [{(page["file"], page["page"]) for page in row["pages"]} for row in rows]
    wanted = set().union(*right)
    scans: dict[tuple[str, int], Image.Image] = {}
    files = find_files([folder / "pdfs"]).files
    with tempfile.TemporaryDirectory() as scratch:
        for path in files:
            for page in read_file(path, scratch, ReadOptions(dpi=100, figures=False)):
                place = (path.name, page.page or 1)
                image = node_image(page.nodes[0]) if place in wanted and page.nodes else None
                if image is not None:
                    scans[place] = load_image(image)
    places = list(scans)
    relevant = [{places.index(place) for place in one if place in scans} for one in right]
    return list(scans.values()), [row["question"] for row in rows], relevant


def page_scores(
    embedder: Embedder, queries: Sequence[str], paragraphs: Sequence[str], fonts: Sequence[str]
) -> Scores:
    """Cosine of questions to images of pages, the fonts taken in turn."""
    pages = [render_page(text, fonts[i % len(fonts)]) for i, text in enumerate(paragraphs)]
    return image_scores(embedder, queries, pages)


def image_scores(
    embedder: Embedder, queries: Sequence[str], images: Sequence[Image.Image]
) -> Scores:
    """Cosine of texts to images, (queries, images)."""
    found = embedder.encode(list(queries), "page_for_question")
    return np.asarray(found @ embedder.encode(list(images), progress=True).T)


def chance(documents: int) -> dict[str, float]:
    """Expected metrics of a random order: recall, and where one document is right the others."""
    shares = {k: min(1.0, k / documents) for k in (1, 5, 10)}
    hits = {f"{name}@{k}": share for name in ("hit", "recall") for k, share in shares.items()}
    # The one right document is at each rank with the same probability, and the ideal gain is 1.
    gains = sum(1 / math.log2(rank + 1) for rank in range(1, min(10, documents) + 1))
    return hits | {"ndcg@10": gains / documents}


class EvaluateOptions(Options):
    """The tables of the model card: mmrag-nano beside MiniLM, BM25, and other checkpoints."""

    model: tuple[str, ...] = ("mmrag-nano",)
    """Embedders, side by side."""
    xquad: Path | None = None
    """JSON lines of paragraphs with their questions."""
    handbook: Path | None = None
    """Folder with pdfs/ and questions.jsonl."""
    scans: bool = False
    """Ask the handbook's questions of images of its pages."""
    encoder: Path | None = None
    """Folder of all-MiniLM-L6-v2."""
    pages: Path | None = None
    """Folder of fonts in which pages are rendered."""
    faces: tuple[str, ...] = ("",)
    """How names of font files begin."""
    drawings: Path | None = None
    """Folder of drawings named by their titles."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    words = sys.argv[1:] if arguments is None else arguments
    with ends_cleanly():
        measure(read_arguments(EvaluateOptions, words, "mmrag_recipes.nano.evaluate"))


def measure(given: EvaluateOptions) -> None:
    """Print a table for each source that is given."""
    embedders = {name: load_embedder(name) for name in given.model}
    scorers: dict[str, Scorer] = {name: neural(model) for name, model in embedders.items()}
    # The baseline that a text model must beat to be of use.
    scorers["BM25"] = bm25
    if given.encoder:
        scorers["MiniLM"] = minilm(given.encoder)
    if given.xquad:
        paragraphs, questions, right = read_xquad(given.xquad)
        found = {n: ranking_metrics(s(questions, paragraphs), right) for n, s in scorers.items()}
        _show("XQuAD, question to paragraph", found)
        if given.pages is not None:
            fonts = find_fonts(given.pages, given.faces)
            found = {
                name: ranking_metrics(page_scores(model, questions, paragraphs, fonts), right)
                for name, model in embedders.items()
            }
            _show("XQuAD, question to image of a page", found, len(paragraphs))
    if given.handbook:
        book = read_handbook(given.handbook)
        found = {n: ranking_metrics(book.score(s), book.relevant) for n, s in scorers.items()}
        _show("Handbook, question to page by its best passage", found)
    if given.handbook and given.scans:
        images, questions, right = read_scans(given.handbook)
        found = {
            name: ranking_metrics(image_scores(model, questions, images), right)
            for name, model in embedders.items()
        }
        # Some questions have several right pages, so that chance is known for recall alone.
        _show("Handbook, question to image of a page", found, len(images), RECALL)
    if given.drawings:
        shown_once = {one.title: one for one in read_titled(given.drawings, held_out=True)}
        titles = list(shown_once)[:DRAWINGS]
        images = [shown_once[title].image for title in titles]
        right = [{i} for i in range(len(titles))]
        found = {
            name: ranking_metrics(image_scores(model, titles, images), right)
            for name, model in embedders.items()
        }
        _show("Title to drawing", found, len(titles))


def _show(
    title: str,
    found: dict[str, Metrics],
    documents: int | None = None,
    names: Sequence[str] = NAMES,
) -> None:
    """Print a table, with the row of chance where the number of documents is given."""
    if documents is not None:
        found["chance"] = {"n": next(iter(found.values()))["n"], **chance(documents)}
    print(f"{title}\n\n{table(found, names)}\n", flush=True)


if __name__ == "__main__":
    main()
