"""What version 0.1 found, as TREC runs to set beside what this version finds.

    mmrag index pdfs/ -c library
    python docs/benchmarks/retrieval.py questions.jsonl -c library --out runs
    mmrag eval questions.jsonl -c library --run runs/bm25.run --run runs/fusion.run

The fusion of version 0.1 adds ranks, and its BM25 is that of Qdrant's own English stemmer over the
same nodes; the vectors are those of the collection.

The collection has to be a folder; it is copied, since the old index is added to it.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import qdrant_edge as edge

from mmrag import UniversalIndex, read_questions
from mmrag.evaluation.asking import page_of, pages_of
from mmrag.evaluation.trec import write_run
from mmrag.retrieval.fusion import BM25, fuse
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag.store.edge import DIALECT
from mmrag.store.engine import Scored

WEIGHTS = {"image": 1.0, "text": 1.0, "fused": 1.0, BM25: 3.0}
"""Of the fusion of version 0.1."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write ``bm25.run`` and ``fusion.run``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", type=Path)
    parser.add_argument("-c", "--collection", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, dict[str, list]] = {"bm25": {}, "fusion": {}}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "library"
        shutil.copytree(given.collection, copy, ignore=shutil.ignore_patterns("images"))
        with UniversalIndex(copy) as index:
            retriever = index.as_retriever()
            add_old_index(retriever)
            for question in read_questions(given.questions):
                old = old_bm25(retriever, question.text)
                rankings = retriever.rankings(question.text)
                views = {v: rankings[v] for v in retriever.collection.settings.views}
                fused = fuse(views | {BM25: old}, WEIGHTS, by="ranks")
                runs["bm25"][question.id] = pages_of(old)
                runs["fusion"][question.id] = [
                    (page_of(entry.best.payload), entry.score) for entry in fused
                ]
    for name, run in runs.items():
        write_run(given.out / f"{name}.run", f"{name}-of-0.1", run)


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


def old_bm25(retriever: UniversalRetriever, question: str) -> list[Scored]:
    """BM25 over the old index."""
    collection = retriever.collection
    request = edge.QueryRequest(
        limit=retriever.depth,
        query=edge.TextQuery("text", question),
        filter=DIALECT.filter(collection._filter(None)),
        with_payload=True,
    )
    found = shard(retriever).query(request)
    return [Scored(str(hit.id), float(hit.score), hit.payload) for hit in found]


if __name__ == "__main__":
    main()
