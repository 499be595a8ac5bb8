"""What each way to fuse words and text finds, over several collections, and how far to trust it.

    mmrag index handbook/pdfs -c handbook
    python docs/benchmarks/fusion.py --set handbook/questions.jsonl handbook \\
        --set docs/benchmarks/reports.jsonl reports

Each setting is a zero of the cosines (``Calibration.zero_cosine``; none: the hundredth hit) and the
share of BM25 beside the text. The last lines fit both by split halves: to the questions about half
of the documents of each set, judged on the other half beside the setting of before.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag import Question, UniversalIndex, Where, read_questions
from mmrag.evaluation.asking import page_of
from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.metrics import metrics_of
from mmrag.retrieval.fusion import BM25, ZEROS, Rankings, fuse
from mmrag.retrieval.retriever import UniversalRetriever

NONE = math.inf  # of a zero: the hundredth hit takes its place
SETTINGS = tuple(itertools.product((NONE, 0.0, 0.2, 0.3), (0.5, 0.6, 2 / 3, 0.7, 0.75, 0.8)))
BEFORE, SHIPPED = (NONE, 0.75), (0.3, 2 / 3)
HALVES = 300
# The words alone and the text alone come last.
ALL = (*SETTINGS, (NONE, 1.0), (NONE, 0.0))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, the differences and the split halves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--set", nargs=2, action="append", required=True)
    found: dict[str, NDArray[np.float64]] = {}
    documents: dict[str, list[str]] = {}
    for questions, collection in parser.parse_args(arguments).set:
        asked = [each for each in read_questions(Path(questions)) if each.pages]
        for scope in ("corpus", "document"):
            name = f"{Path(collection).name}, {scope}"
            found[name] = measured(collection, asked, scope)
            documents[name] = [question.document for question in asked]
    print("| zero | BM25 | " + " | ".join(found) + " |\n" + "|---" * (len(found) + 2) + "|")
    for at, (zero, share) in enumerate(ALL):
        means = [f"{each[:, at].mean():.3f}" for each in found.values()]
        zero_name = "hundredth" if zero == NONE else f"{zero:.1f}"
        print(f"| {zero_name} | {share:.2f} | {' | '.join(means)} |")
    shipped = ALL.index(SHIPPED)
    others = {"before": ALL.index(BEFORE), "BM25": len(ALL) - 2, "text": len(ALL) - 1}
    for name, each in found.items():
        for other, at in others.items():
            gain = each[:, shipped] - each[:, at]
            (low,), (high,) = interval(gain[:, None], documents[name])
            print(f"{name}: shipped less {other} {gain.mean():+.3f} [{low:+.3f}, {high:+.3f}]")
    gains = np.array(list(split_halves(found, documents)))
    low, high = np.percentile(gains, (2.5, 97.5))
    print(f"split halves: gain over before {gains.mean():+.4f} [{low:+.4f}, {high:+.4f}]")


def measured(collection: str, asked: Sequence[Question], scope: str) -> NDArray[np.float64]:
    """nDCG@10 of every question with every setting: (questions, settings)."""
    with UniversalIndex(collection) as index:
        retriever = UniversalRetriever(index.collection, index.embedder)
        return np.array([list(qualities(retriever, question, scope)) for question in asked])


def qualities(retriever: UniversalRetriever, question: Question, scope: str) -> Iterator[float]:
    """nDCG@10 of a question with each setting."""
    files = tuple(dict.fromkeys(file for file, _ in question.pages))
    where = Where(files=files) if scope == "document" else None
    ranked: Rankings = retriever.rankings(question.query(where=where))
    for zero, share in ALL:
        # As shipped beside a text and words of 3 in all: the image 0.3, a page that is named 3.
        weights = {"text": 1 - share, BM25: share, "image": 0.1, "reference": 1.0}
        if share in (0.0, 1.0):
            weights |= {"image": 0.0, "reference": 0.0}
        used = {name: hits for name, hits in ranked.items() if weights.get(name)}
        entries = fuse(used, weights, zeros={**ZEROS, "text": zero, "image": NONE})
        pages = [page_of(entry.best.payload) for entry in entries[:10]]
        yield metrics_of(pages, question.relevant)["ndcg@10"]


def split_halves(
    found: dict[str, NDArray[np.float64]], documents: dict[str, list[str]]
) -> Iterator[float]:
    """Mean gain over ``BEFORE`` on one half, of the setting that is best on the other half."""
    generator = np.random.default_rng(0)
    for _ in range(HALVES):
        fitted, judged = np.zeros(len(SETTINGS)), np.zeros(len(SETTINGS))
        for name, each in found.items():
            names = sorted(set(documents[name]))
            half = set(generator.permutation(names)[: len(names) // 2].tolist())
            here = np.array([document in half for document in documents[name]])
            rows = each[:, : len(SETTINGS)]
            fitted += rows[here].mean(axis=0)
            judged += (rows - rows[:, [SETTINGS.index(BEFORE)]])[~here].mean(axis=0)
        yield judged[fitted.argmax()] / len(found)


if __name__ == "__main__":
    main()
