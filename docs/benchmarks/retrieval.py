"""What each ranking finds, what their fusion finds, and what the fusion of version 0.1 found.

    mmrag index pdfs/ -c build/library
    python docs/benchmarks/retrieval.py questions.jsonl -c build/library

Questions are JSON lines with ``question``, ``pages`` and ``kind``; any of the pages is right.
Each is asked of the whole collection, and again of the document that it is about. Intervals are
of 95 %, by a bootstrap over documents. The fusion of version 0.1 adds ranks, and its BM25 is that
of Qdrant's own English stemmer over the same nodes; the vectors are those of the collection.

The collection has to be a folder; it is copied, since the old index is added to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import qdrant_edge as edge
from numpy.typing import NDArray

from mmrag import UniversalIndex, Where
from mmrag.retrieval.fusion import BM25, DEFAULT_WEIGHTS, fuse
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag.store.edge import DIALECT
from mmrag.store.engine import Scored
from mmrag_recipes.evaluate import metrics_of
from mmrag_recipes.evaluate_pages import pages_of

NAMES = ("hit@1", "hit@5", "hit@10", "ndcg@10")
OLD = "BM25 of 0.1"
DRAWS = 2000


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("-c", "--collection", type=Path, required=True)
    given = parser.parse_args(arguments)
    questions = [json.loads(line) for line in given.questions.read_text().splitlines() if line]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "library"
        shutil.copytree(given.collection, copy, ignore=shutil.ignore_patterns("images"))
        with UniversalIndex(copy) as index:
            retriever = index.as_retriever()
            add_old_index(retriever)
            for title, inside in (("the whole collection", False), ("inside the document", True)):
                rows = [ask(retriever, question, inside) for question in questions]
                report(title, rows, questions)


def add_old_index(retriever: UniversalRetriever) -> None:
    """Qdrant's own index over the text, as version 0.1 had it."""
    english = edge.TextIndexParams(
        tokenizer=edge.TokenizerType.Word,
        lowercase=True,
        scoring=True,
        stopwords=edge.Language.English,
        stemmer=edge.SnowballParams(edge.SnowballLanguage.English),
    )
    shard(retriever).update(edge.UpdateOperation.create_field_index("text", english))


def shard(retriever: UniversalRetriever) -> edge.EdgeShard:
    """The shard under a collection in a folder."""
    return retriever.collection._engine._open


def old_bm25(retriever: UniversalRetriever, question: str, where: Where | None) -> list[Scored]:
    """BM25 over the old index."""
    collection = retriever.collection
    request = edge.QueryRequest(
        limit=retriever.depth,
        query=edge.TextQuery("text", question),
        filter=DIALECT.filter(collection._filter(where)),
        with_payload=True,
    )
    found = shard(retriever).query(request)
    return [Scored(str(hit.id), float(hit.score), hit.payload) for hit in found]


def ask(
    retriever: UniversalRetriever, question: Mapping, inside: bool
) -> dict[str, NDArray[np.float64]]:
    """Metrics of every ranking and fusion: (len(NAMES),) each."""
    relevant = {(page["file"], int(page["page"])): 1.0 for page in question["pages"]}
    retriever.where = Where(files=(question["pages"][0]["file"],)) if inside else None
    rankings = retriever.rankings(question["question"])
    views = {name: hits for name, hits in rankings.items() if name in ("image", "text", "fused")}
    old = views | {BM25: old_bm25(retriever, question["question"], retriever.where)}
    of_entries = {
        "fusion": fuse(rankings, retriever.weights),
        "fusion by ranks": fuse(rankings, retriever.weights, by="ranks"),
        "fusion of 0.1": fuse(old, DEFAULT_WEIGHTS, by="ranks"),
    }
    ranked = {name: pages_of(hits) for name, hits in {**rankings, OLD: old[BM25]}.items()}
    ranked |= {name: pages_of([e.best for e in found]) for name, found in of_entries.items()}
    return {name: values(pages, relevant) for name, pages in ranked.items()}


def values(pages: Sequence, relevant: Mapping) -> NDArray[np.float64]:
    """The metrics of one ranking of pages."""
    metrics = metrics_of(pages[:10], relevant)
    return np.array([metrics[name] for name in NAMES])


def report(title: str, rows: Sequence[Mapping], questions: Sequence[Mapping]) -> None:
    """A table of all rankings, then of the gains of the fusion, with intervals."""
    documents = np.array([question["pages"][0]["file"] for question in questions])
    kinds = np.array([question.get("kind", "") for question in questions])
    zero = np.zeros(len(NAMES))
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = {name: np.stack([row.get(name, zero) for row in rows]) for name in names}
    print(f"\n{title}, {len(rows)} questions, {len(set(documents))} documents\n")
    print(f"| | {' | '.join(NAMES)} |\n|---|---|---|---|---|")
    for name, found in table.items():
        print(f"| {name} | {' | '.join(cells(found, documents))} |")
    for kind in sorted(set(kinds)):
        for name in ("bm25", "text", "fusion", "fusion of 0.1"):
            of_kind = table[name][kinds == kind].mean(axis=0)
            line = " | ".join(f"{value:.3f}" for value in of_kind)
            print(f"| {name}, {kind} ({(kinds == kind).sum()}) | {line} |")
    parts = [name for name in ("bm25", "text") if name in table]
    best = max(parts, key=lambda name: table[name][:, -1].mean())
    for other in (best, "fusion of 0.1"):
        gain = table["fusion"] - table[other]
        print(f"| fusion less {other} | {' | '.join(cells(gain, documents))} |")


def cells(found: NDArray[np.float64], documents: NDArray) -> Iterator[str]:
    """Mean and interval of each metric."""
    names = sorted(set(documents))
    sums = np.stack([found[documents == name].sum(axis=0) for name in names])
    counts = np.array([(documents == name).sum() for name in names])
    drawn = np.random.default_rng(0).integers(0, len(names), (DRAWS, len(names)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1, keepdims=True)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    for mean, least, most in zip(found.mean(axis=0), low, high, strict=True):
        yield f"{mean:.3f} [{least:.3f}, {most:.3f}]"


if __name__ == "__main__":
    main()
