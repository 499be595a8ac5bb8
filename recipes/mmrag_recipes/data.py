"""Data sets of a training: rows with their images and costs, and what a step is made of."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrag.errors import ConfigError
from mmrag.instructions import resolve
from mmrag.modeling.backbone import Backbone
from mmrag_recipes import distributed
from mmrag_recipes.batches import Batch, shard
from mmrag_recipes.config import DataConfig, TrainConfig
from mmrag_recipes.rows import ImageStore, Item, Row, read_rows, store_of


@dataclass(frozen=True)
class Dataset:
    """Rows of one data set with their images and settings."""

    config: DataConfig
    rows: list[Row]
    store: ImageStore
    costs: list[int]


@dataclass(frozen=True)
class StepInputs:
    """One process's share of a step.

    inputs: prepared queries first, then documents; b queries, n documents.
    targets: (b,) document of each query. keys: (n,) content hashes. rows: (n,) global row of
    each document. own_rows: (b,). positives: hashes of each query's positives. teacher: (n,)
    the teacher's score of each document for its own row, NaN where there is none.
    """

    inputs: list[Any]
    targets: Tensor
    keys: Tensor
    rows: Tensor
    own_rows: Tensor
    positives: list[Tensor]
    teacher: Tensor
    in_batch: bool

    @property
    def n_queries(self) -> int:
        """Number of queries."""
        return len(self.targets)


def load_datasets(config: TrainConfig, backbone: Backbone) -> list[Dataset]:
    """Read all data sets and the cost of each row in tokens; images are not decoded."""
    if not config.data:
        raise ConfigError("data: at least one data set is needed.")
    return [_load_dataset(data, config, backbone) for data in config.data]


def _load_dataset(data: DataConfig, config: TrainConfig, backbone: Backbone) -> Dataset:
    rows, store = read_rows(data.rows), store_of(data.rows)

    def cost(row: Row) -> int:
        asked = backbone.cost(store.content(row.query), resolve(row.instruction))
        items = (row.positives[0], *row.negatives[: config.hard_negatives])
        return asked + sum(backbone.cost(store.content(item), None) for item in items)

    with ThreadPoolExecutor(2) as pool:
        costs = list(pool.map(cost, rows))
    named = replace(data, name=data.name or Path(data.rows).stem)
    return Dataset(named, rows, store, costs)


def documents_of(row: Row, epoch: int, hard_negatives: int) -> list[tuple[Item, float]]:
    """Positive and negatives of a row in this pass, with the teacher's scores (NaN: none).

    Several positives, and more negatives than are used at once, rotate over the passes.
    """
    absent = float("nan")
    which = epoch % len(row.positives)
    positive_scores = row.positive_scores or [absent] * len(row.positives)
    negative_scores = row.negative_scores or [absent] * len(row.negatives)
    documents = [(row.positives[which], positive_scores[which])]
    count = min(hard_negatives, len(row.negatives))
    for step in range(count):
        index = (epoch * count + step) % len(row.negatives)
        documents.append((row.negatives[index], negative_scores[index]))
    return documents


def prepare_step(
    batch: Batch, dataset: Dataset, backbone: Backbone, hard_negatives: int
) -> StepInputs:
    """Decode and tokenize this process's rows of a batch; runs in a thread, ahead of the model."""
    mine = shard(batch.rows, distributed.rank(), distributed.size())
    queries: list[Any] = []
    documents: list[Any] = []
    own: list[int] = []
    targets: list[int] = []
    positives: list[Tensor] = []
    keys: list[int] = []
    teacher: list[float] = []
    rows: list[int] = []
    for index in mine:
        row = dataset.rows[index]
        task = resolve(row.instruction)
        queries.append(backbone.prepare(dataset.store.content(row.query), task))
        targets.append(len(documents))
        own.append(index)
        positives.append(torch.tensor([item.key for item in row.positives]))
        for item, score in documents_of(row, batch.epoch, hard_negatives):
            documents.append(backbone.prepare(dataset.store.content(item), None))
            keys.append(item.key)
            rows.append(index)
            teacher.append(score)
    return StepInputs(
        inputs=queries + documents,
        targets=torch.tensor(targets),
        keys=torch.tensor(keys),
        rows=torch.tensor(rows),
        own_rows=torch.tensor(own),
        positives=positives,
        teacher=torch.tensor(teacher),
        in_batch=dataset.config.in_batch_negatives,
    )
