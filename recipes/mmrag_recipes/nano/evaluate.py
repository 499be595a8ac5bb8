"""The table of the model card: mmrag-nano beside MiniLM, the untrained vectors and BM25.

    python -m mmrag_recipes.nano.evaluate --xquad xquad/en.jsonl --handbook handbook/

``--xquad`` is JSON lines of paragraphs with their questions; ``--handbook`` a folder with
``pdfs/`` and ``questions.jsonl``. With ``--pages`` XQuAD's paragraphs are also rendered to pages
without a text layer, and the model must find the page. ``--pictures`` is a folder of pictures
whose file names are their titles, and a title that was not trained on must find its picture.
``--work``, the folder that ``mmrag_recipes.nano.build`` worked in, adds MiniLM and the vectors
before training.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rank_bm25 import BM25Okapi

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.reading import ReadOptions, find_files, read_file
from mmrag_recipes.console import ends_cleanly
from mmrag_recipes.evaluate import Metrics, average, metrics_of, table
from mmrag_recipes.nano.build import plain_tokenizer
from mmrag_recipes.nano.distil import piece_bags
from mmrag_recipes.nano.glyphs import find_fonts, render_page
from mmrag_recipes.nano.pictures import read_titled

Scores = NDArray[np.floating[Any]]
Scorer = Callable[[Sequence[str], Sequence[str]], Scores]
PASSAGE_WORDS = 180
PICTURES = 500


def neural(embedder: Embedder) -> Scorer:
    """Scores by cosine."""

    def score(queries: Sequence[str], documents: Sequence[str]) -> Scores:
        found = embedder.encode(list(queries), "passage_for_question")
        return found @ embedder.encode(list(documents)).T

    return score


def minilm(folder: Path) -> Scorer:
    """Scores by cosine of MiniLM, the teacher, at its usual 256 tokens."""
    from sentence_transformers import SentenceTransformer

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


def untrained(work: Path) -> Scorer:
    """Scores by cosine of the token vectors before training."""
    start = torch.from_numpy(np.load(work / "initial.npy")).float()
    tokenizer = plain_tokenizer(work / "all-MiniLM-L6-v2")

    def score(queries: Sequence[str], documents: Sequence[str]) -> Scores:
        vectors = [piece_bags(texts, tokenizer).embed(start) for texts in (queries, documents)]
        return (vectors[0] @ vectors[1].T).numpy()

    return score


def ranking_metrics(scores: Scores, relevant: Sequence[set[int]]) -> Metrics:
    """Metrics over queries; ``relevant`` holds the right columns of each row."""
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
        pages = np.full((len(self.questions), max(self.owners) + 1), -np.inf)
        for column, page in enumerate(self.owners):
            pages[:, page] = np.maximum(pages[:, page], scores[:, column])
        return pages


def read_handbook(folder: Path) -> Handbook:
    """Read ``pdfs/`` and ``questions.jsonl`` of a folder."""
    numbers: dict[tuple[str, int], int] = {}
    passages: list[str] = []
    owners: list[int] = []
    files, _ = find_files([folder / "pdfs"])
    with tempfile.TemporaryDirectory() as scratch:
        for path in files:
            for page in read_file(path, scratch, ReadOptions(dpi=24, figures=False)):
                number = numbers.setdefault((path.name, page.page or 1), len(numbers))
                words = (page.nodes[0].get_content() if page.nodes else "").split()
                starts = range(0, max(1, len(words)), PASSAGE_WORDS)
                passages += [" ".join(words[s : s + PASSAGE_WORDS]) for s in starts]
                owners += [number] * len(starts)
    lines = (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    relevant = [{numbers[p["file"], p["page"]] for p in row["pages"]} for row in rows]
    return Handbook(passages, owners, [row["question"] for row in rows], relevant)


def page_scores(
    embedder: Embedder, queries: Sequence[str], paragraphs: Sequence[str], fonts: Sequence[str]
) -> Scores:
    """Cosine of questions to pictures of pages, the fonts taken in turn."""
    pages = [render_page(text, fonts[i % len(fonts)]) for i, text in enumerate(paragraphs)]
    found = embedder.encode(list(queries), "page_for_question")
    return np.asarray(found @ embedder.encode(pages, progress=True).T)


def picture_scores(
    embedder: Embedder, titles: Sequence[str], pictures: Sequence[Image.Image]
) -> Scores:
    """Cosine of titles to pictures, (titles, pictures)."""
    found = embedder.encode(list(titles), "image_for_caption")
    return np.asarray(found @ embedder.encode(list(pictures), progress=True).T)


def _chance_mrr(documents: int) -> float:
    return sum(1 / rank for rank in range(1, 11)) / documents


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="mmrag_recipes.nano.evaluate", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="mmrag-nano")
    parser.add_argument("--xquad", type=Path)
    parser.add_argument("--handbook", type=Path)
    parser.add_argument("--work", type=Path, help="work folder of mmrag_recipes.nano.build")
    parser.add_argument("--pages", nargs="*", metavar="FOLDER", help="render pages in these fonts")
    parser.add_argument("--pictures", type=Path, help="folder of pictures named by their titles")
    given = parser.parse_args(arguments)
    with ends_cleanly():
        _measure(given)


def _measure(given: argparse.Namespace) -> None:
    embedder = load_embedder(given.model)
    scorers: dict[str, Scorer] = {given.model: neural(embedder), "BM25": bm25}
    if given.work:
        scorers["MiniLM"] = minilm(given.work / "all-MiniLM-L6-v2")
        scorers["before training"] = untrained(given.work)
    names = ["hit@1", "hit@5", "hit@10", "mrr@10"]
    if given.xquad:
        paragraphs, questions, right = read_xquad(given.xquad)
        found = {n: ranking_metrics(s(questions, paragraphs), right) for n, s in scorers.items()}
        print(f"XQuAD, question to paragraph\n\n{table(found, names)}\n")
        if given.pages is not None:
            fonts = find_fonts(given.pages)
            scores = page_scores(embedder, questions, paragraphs, fonts)
            pictures = {given.model: ranking_metrics(scores, right)}
            print(f"XQuAD, question to picture of a page\n\n{table(pictures, names)}\n")
    if given.handbook:
        book = read_handbook(given.handbook)
        found = {n: ranking_metrics(book.score(s), book.relevant) for n, s in scorers.items()}
        print(f"Handbook, question to page by its best passage\n\n{table(found, names)}\n")
    if given.pictures:
        shown_once = {one.title: one for one in read_titled(given.pictures, held_out=True)}
        titles = list(shown_once)[:PICTURES]
        images = [shown_once[title].picture for title in titles]
        right = [{i} for i in range(len(titles))]
        shown = {given.model: ranking_metrics(picture_scores(embedder, titles, images), right)}
        chance = {f"hit@{k}": k / len(titles) for k in (1, 5, 10)} | {"n": len(titles)}
        shown["chance"] = {**shown[given.model], **chance, "mrr@10": _chance_mrr(len(titles))}
        print(f"Title to picture\n\n{table(shown, names)}")


if __name__ == "__main__":
    main()
