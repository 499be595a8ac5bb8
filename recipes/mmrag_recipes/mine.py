"""Mine hard negatives with any embedder, over one corpus of all modalities.

    python -m mmrag_recipes mine rows.jsonl --out mined.jsonl --model mmrag-nano
    python -m mmrag_recipes mine rows.jsonl --out mined.jsonl --right 8 --wrong 0 --sample random

Two pools, after MM-Embed (arXiv 2411.02571, section 3.3):

- ``wrong``: candidates of another modality than the positive that rank above it. The model
  prefers them merely for their modality.
- ``right``: candidates of the positive's modality that rank below ``rank_cut`` and score at
  most ``max_ratio`` of the positive (NV-Retriever's TopK-PercPos, arXiv 2407.15831, section 3).

Nothing that may answer the question is taken: no known positive of it or of a row that asks the
same, no copy of one, nothing whose vector is close to a positive's, nothing from the same page.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.instructions import resolve
from mmrag_recipes.config import MineConfig
from mmrag_recipes.rows import (
    ImageStore,
    Item,
    Row,
    corpus_of,
    images_of,
    read_rows,
    store_of,
    write_rows,
)


@dataclass
class MineReport:
    """What was mined: negatives and their mean score by modality, and what the guards dropped."""

    rows: int = 0
    short: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    score_sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    dropped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.rows} rows; {self.short} got fewer negatives than asked for"]
        for kind, count in sorted(self.taken.items()):
            mean = self.score_sums[kind] / count
            lines.append(f"  {kind}: {count} negatives, mean score {mean:.3f}")
        for reason, count in sorted(self.dropped.items()):
            lines.append(f"  left out, {reason}: {count}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Corpus:
    items: list[Item]
    vectors: NDArray[np.float32]
    position: dict[int, int]
    places: dict[int, set[str]]
    answers: dict[int, set[int]]  # by the key of the query


def mine(
    rows: Sequence[Row],
    store: ImageStore,
    embedder: Embedder,
    config: MineConfig,
    extra: Sequence[Item] = (),
) -> tuple[list[Row], MineReport]:
    """Replace the negatives of each row by mined ones.

    Args:
        extra: documents that are candidates beside those of the rows.

    Returns: the rows with ``negatives``, ``negative_scores`` and ``positive_scores`` (cosines
        of the miner), and the report.

    """
    items = list({item.key: item for item in (*corpus_of(rows), *extra)}.values())
    vectors = embedder.encode([store.content(item) for item in items])
    position = {item.key: index for index, item in enumerate(items)}
    places: defaultdict[int, set[str]] = defaultdict(set)
    answers: defaultdict[int, set[int]] = defaultdict(set)
    for row in rows:
        own = [position[item.key] for item in row.positives]
        answers[row.query.key].update(own)
        for index in own if row.place else ():
            places[index].add(str(row.place))
    corpus = _Corpus(items, vectors, position, places, answers)
    queries = _embed_queries(rows, store, embedder)
    report = MineReport()
    mined = [
        _mine_row(row, query, corpus, config, report)
        for row, query in zip(rows, queries, strict=True)
    ]
    return mined, report


def _embed_queries(
    rows: Sequence[Row], store: ImageStore, embedder: Embedder
) -> NDArray[np.float32]:
    vectors = np.zeros((len(rows), embedder.dim), dtype=np.float32)
    asked: dict[str | None, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        asked[resolve(row.instruction)].append(index)
    for instruction, indices in asked.items():
        contents = [store.content(rows[index].query) for index in indices]
        vectors[indices] = embedder.encode(contents, instruction)
    return vectors


def _mine_row(
    row: Row, query: NDArray[np.float32], corpus: _Corpus, config: MineConfig, report: MineReport
) -> Row:
    scores = corpus.vectors @ query  # (n,)
    order = np.argsort(-scores, kind="stable")
    own = [corpus.position[item.key] for item in row.positives]
    worst = min(own, key=lambda index: float(scores[index]))
    rank_of_positive = int(np.flatnonzero(order == worst)[0])
    allowed = _without_answers(row, order[: config.depth], own, corpus, config, report)
    wrong, right = [], []
    modality = row.positives[0].modality
    for rank, index in allowed:
        if corpus.items[index].modality != modality:
            if rank < rank_of_positive:
                wrong.append(index)
        elif rank < config.rank_cut:
            report.dropped["ranked above the cut"] += 1
        elif scores[index] > config.max_ratio * scores[worst]:
            report.dropped["too close to the positive's score"] += 1
        else:
            right.append(index)
    chance = random.Random(f"{config.seed}/{row.id}")
    chosen = _choose(wrong, config.wrong, config, chance)
    chosen += _choose(right, config.right, config, chance)
    _count(chosen, scores, corpus, modality, config, report)
    return row.model_copy(
        update={
            "negatives": [corpus.items[index] for index in chosen],
            "negative_scores": [float(scores[index]) for index in chosen],
            "positive_scores": [float(scores[index]) for index in own],
        }
    )


def _without_answers(
    row: Row,
    order: NDArray[np.int64],
    own: Sequence[int],
    corpus: _Corpus,
    config: MineConfig,
    report: MineReport,
) -> list[tuple[int, int]]:
    """Rank and index of candidates that are neither a positive, nor like one, nor the query."""
    nearness = (corpus.vectors[order] @ corpus.vectors[list(own)].T).max(axis=1)
    texts = {_plain(item.text) for item in (*row.positives, row.query) if item.text}
    allowed = []
    for rank, index in enumerate(order.tolist()):
        text = corpus.items[index].text
        if index in own or corpus.items[index].key == row.query.key:
            continue
        if index in corpus.answers[row.query.key]:
            report.dropped["answers the same query of another row"] += 1
            continue
        if nearness[rank] > config.duplicate_cosine or (text and _plain(text) in texts):
            report.dropped["like a positive"] += 1
            continue
        if row.place in corpus.places.get(index, ()):
            report.dropped["from the positive's page"] += 1
            continue
        allowed.append((rank, index))
    return allowed


def _plain(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def _choose(pool: list[int], count: int, config: MineConfig, chance: random.Random) -> list[int]:
    if config.sample == "random":
        return chance.sample(pool, min(count, len(pool)))
    return pool[:count]


def _count(
    chosen: Sequence[int],
    scores: NDArray[np.float32],
    corpus: _Corpus,
    modality: str,
    config: MineConfig,
    report: MineReport,
) -> None:
    report.rows += 1
    report.short += len(chosen) < config.right + config.wrong
    for index in chosen:
        kind = corpus.items[index].modality
        label = f"{kind} for {modality}"
        report.taken[label] += 1
        report.score_sums[label] += float(scores[index])


def run(options: MineConfig) -> None:
    """Command: mine negatives for a file of rows."""
    rows, store = read_rows(options.rows), store_of(options.rows)
    embedder = load_embedder(options.model, family=options.family)
    mined, report = mine(rows, store, embedder, options)
    write_rows(options.out, mined)
    if options.out.parent.resolve() != options.rows.parent.resolve():
        for image_id in images_of(mined):
            store_of(options.out).copy_from(store, image_id)
    print(report)
    print(f"wrote {options.out}")
