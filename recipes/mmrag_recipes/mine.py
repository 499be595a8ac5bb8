"""Mine hard negatives with any embedder, over one corpus of all modalities.

    python -m mmrag_recipes mine rows.jsonl --out mined.jsonl --model mmrag-nano
    python -m mmrag_recipes mine rows.jsonl --out mined.jsonl --right 8 --wrong 0 --sample random
    python -m mmrag_recipes mine rows.jsonl --out mined.jsonl --corpus papers/ --reranker MODEL

Two pools, after MM-Embed (arXiv 2411.02571, section 3.3):

- ``wrong``: candidates of another modality than the positive that rank above it. The model
  prefers them merely for their modality.
- ``right``: candidates of the positive's modality that rank below ``rank_cut`` and score at
  most ``max_ratio`` of the positive (NV-Retriever's TopK-PercPos, arXiv 2407.15831, section 3).

Nothing that may answer the question is taken: no known positive of it or of a row that asks the
same, no copy of one, nothing whose vector is close to a positive's, nothing from the same page.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders import load_embedder
from mmrag.rerankers import Scorer, load_scorer
from mmrag_recipes.config import MineConfig, MiningRules
from mmrag_recipes.console import track
from mmrag_recipes.corpus import read_corpus
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
from mmrag_recipes.vectors import VectorCache, Vectors, nearest

logger = logging.getLogger("mmrag_recipes")


@dataclass
class MineReport:
    """What was mined: negatives and their mean score by modality, and what the guards dropped."""

    rows: int = 0
    short: int = 0
    taken: Counter[str] = field(default_factory=Counter)
    score_sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    dropped: Counter[str] = field(default_factory=Counter)

    def count(self, chosen: Sequence[tuple[str, float]], modality: str, asked: int) -> None:
        """Add the negatives of one row: modality and score of each."""
        self.rows += 1
        self.short += len(chosen) < asked
        for kind, score in chosen:
            label = f"{kind} for {modality}"
            self.taken[label] += 1
            self.score_sums[label] += score

    def __str__(self) -> str:
        lines = [f"{self.rows} rows; {self.short} got fewer negatives than asked for"]
        for kind, count in sorted(self.taken.items()):
            mean = self.score_sums[kind] / count
            lines.append(f"  {kind}: {count} negatives, mean score {mean:.3f}")
        for reason, count in sorted(self.dropped.items()):
            lines.append(f"  left out, {reason}: {count}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Corpus:
    """Documents that are searched, each once.

    position: number of a document by its key. places: of each document, by number, the pages it
    is of. answers: by the key of a query, the documents that answer it in any row.
    """

    items: list[Item]
    position: dict[int, int]
    places: dict[int, set[str]]
    answers: dict[int, set[int]]

    @classmethod
    def of(cls, rows: Iterable[Row], extra: Sequence[tuple[Item, str]] = ()) -> Corpus:
        """Documents of the rows in order of first appearance, then others with their pages."""
        kept = list(rows)
        items = {item.key: item for item in corpus_of(kept)}
        # By content, so that a page of the corpus that a row holds already comes once.
        items.update((item.key, item) for item, _ in extra)
        position = {key: index for index, key in enumerate(items)}
        places: defaultdict[int, set[str]] = defaultdict(set)
        answers: defaultdict[int, set[int]] = defaultdict(set)
        for row in kept:
            own = [position[item.key] for item in row.positives]
            # Questions are asked twice in some sets, with different answers marked.
            answers[row.query.key].update(own)
            for index in own if row.place else ():
                places[index].add(str(row.place))
        for item, place in extra:
            places[position[item.key]].add(place)
        return cls(list(items.values()), position, places, answers)


def mine(
    rows: Sequence[Row],
    cache: VectorCache,
    config: MineConfig,
    extra: Sequence[tuple[Item, str]] = (),
) -> tuple[list[Row], MineReport]:
    """Replace the negatives of each row by mined ones.

    Args:
        cache: the embedder, and what it has embedded before.
        extra: documents that are candidates beside those of the rows, each with its page.

    Returns:
        The rows with ``negatives``, ``negative_scores`` and ``positive_scores`` (cosines of the
        miner), and the report.
    """
    corpus = Corpus.of(rows, extra)
    documents = cache.encode(corpus.items)
    queries = cache.encode([row.query for row in rows], [row.instruction for row in rows])
    return mine_rows(rows, queries, corpus, documents, config)


def mine_rows(
    rows: Sequence[Row],
    queries: Vectors,
    corpus: Corpus,
    documents: Vectors,
    config: MiningRules,
) -> tuple[list[Row], MineReport]:
    """As ``mine``, with vectors: (len(rows), d) of the queries, (n, d) of the corpus."""
    report = MineReport()
    found = nearest(queries, documents, config.depth)
    mined = [
        _mine_row(row, query, order, scores, corpus, documents, config, report)
        for row, query, (order, scores) in track(
            zip(rows, queries, found, strict=True), len(rows), "mining"
        )
    ]
    return mined, report


def _mine_row(
    row: Row,
    query: Vectors,
    order: NDArray[np.int64],
    scores: Vectors,
    corpus: Corpus,
    documents: Vectors,
    config: MiningRules,
    report: MineReport,
) -> Row:
    score_of = dict(zip(order.tolist(), scores.tolist(), strict=True))
    own = [corpus.position[item.key] for item in row.positives]
    own_scores = (documents[own] @ query).tolist()
    # All positives must stay ahead of a negative, the worst too.
    worst = min(own_scores)
    # A positive that is not among the candidates ranks below all of them.
    rank_of_positive = max([*order.tolist(), index].index(index) for index in own)
    # The share is of the score's size, so that it is below the positive for negative scores too.
    most = worst - (1 - config.max_ratio) * abs(worst)
    wrong, right = [], []
    modality = row.positives[0].modality
    for rank, index in _without_answers(row, order, own, corpus, documents, config, report):
        if corpus.items[index].modality != modality:
            # Below the positive, another modality teaches nothing new.
            if rank < rank_of_positive:
                wrong.append(index)
        elif rank < config.rank_cut:
            report.dropped["ranked above the cut"] += 1
        elif score_of[index] > most:
            report.dropped["too close to the positive's score"] += 1
        else:
            right.append(index)
    # By row, so that adding rows to the file changes none of the others.
    chance = random.Random(f"{config.seed}/{row.id}")
    chosen = _choose(wrong, config.wrong, config, chance)
    chosen += _choose(right, config.right, config, chance)
    report.count(
        [(corpus.items[index].modality, score_of[index]) for index in chosen],
        modality,
        config.right + config.wrong,
    )
    return row.model_copy(
        update={
            "negatives": [corpus.items[index] for index in chosen],
            "negative_scores": [score_of[index] for index in chosen],
            "positive_scores": own_scores,
        }
    )


def _without_answers(
    row: Row,
    order: NDArray[np.int64],
    own: Sequence[int],
    corpus: Corpus,
    documents: Vectors,
    config: MiningRules,
    report: MineReport,
) -> list[tuple[int, int]]:
    """Rank and index of candidates that are neither a positive, nor like one, nor the query."""
    # (candidates,)
    nearness = (documents[order] @ documents[list(own)].T).max(axis=1)
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
        # Another cut of the same page may hold the answer.
        if row.place in corpus.places.get(index, ()):
            report.dropped["from the positive's page"] += 1
            continue
        allowed.append((rank, index))
    return allowed


def _plain(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def _choose(pool: list[int], count: int, config: MiningRules, chance: random.Random) -> list[int]:
    if config.sample == "random":
        return chance.sample(pool, min(count, len(pool)))
    return pool[:count]


def rescore(rows: Iterable[Row], scorer: Scorer, store: ImageStore) -> Iterator[Row]:
    """Rows with the scores of a reranker for their positives and negatives, to learn from."""
    for row in rows:
        items = [*row.positives, *row.negatives]
        query = store.content(row.query)
        outcomes = scorer.judge([(query, store.content(item)) for item in items], row.instruction)
        scores = [outcome for outcome in outcomes if isinstance(outcome, float)]
        if len(scores) < len(items):  # a ranking with holes would teach that they come last
            logger.warning("row %s gets no scores of the reranker: a pair failed", row.id)
            scores = []
        cut = len(row.positives)
        update = {"positive_scores": scores[:cut], "negative_scores": scores[cut:]}
        yield row.model_copy(update=update)


def run(options: MineConfig) -> None:
    """Command: mine negatives for a file of rows."""
    rows, store = read_rows(options.rows), store_of(options.rows)
    embedder = load_embedder(options.model, family=options.family)
    kept = options.rows.with_name(options.rows.name + ".index")
    extra: list[tuple[Item, str]] = []
    if options.corpus:
        # Only kinds that answer somewhere: others could never be confused with an answer.
        wanted = {item.modality for row in rows for item in row.positives} & embedder.modalities
        documents, problems = read_corpus(options.corpus, store)
        extra = [
            (document.item(modality), document.place)
            for document in documents
            for modality in document.modalities
            if modality in wanted
        ]
        for problem in problems:
            print(f"not read: {problem}")
    mined, report = mine(rows, VectorCache(kept, embedder, store), options, extra)
    if options.reranker:
        scored = rescore(mined, load_scorer(options.reranker), store)
        mined = list(track(scored, len(mined), "scoring"))
    write_rows(options.out, mined)
    # Rows name images of the store beside them.
    if options.out.parent.resolve() != options.rows.parent.resolve():
        for image_id in images_of(mined):
            store_of(options.out).copy_from(store, image_id)
    print(report)
    print(f"wrote {options.out}")
