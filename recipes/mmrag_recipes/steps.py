"""One optimizer step: its inputs, prepared ahead by threads, and its loss.

Prompts, images and pooling are those of inference: the same ``Backbone.prepare`` and
``Backbone.forward``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrag.errors import ContentError
from mmrag.instructions import resolve
from mmrag.modeling.backbone import Backbone, inputs_of
from mmrag_recipes import distributed
from mmrag_recipes.ahead import MOST_BYTES, bytes_of, own_rows, prepare_ahead, tokens_of
from mmrag_recipes.batches import Batch
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.data import Dataset, Problem, documents_of
from mmrag_recipes.depths import depths, inner_vectors, parts
from mmrag_recipes.losses import (
    binary_aware,
    candidate_mask,
    compatible,
    distil_scores,
    info_nce,
    is_taught,
    matryoshka,
    scores,
)
from mmrag_recipes.rows import Item, Row


@dataclass(frozen=True)
class StepInputs:
    """One process's share of a step.

    inputs: prepared queries first, then documents; b queries, n documents.
    targets: (b,) document of each query. keys: (n,) content hashes. rows: (n,) global row of
    each document. own_rows: (b,). positives: hashes of each query's positives. teacher: (n,)
    the teacher's score of each document for its own row, NaN where there is none. skipped: rows
    and documents whose images could not be decoded. old_inputs: as ``inputs``, for the old model
    of a compatible training.
    """

    inputs: list[Any]
    targets: Tensor
    keys: Tensor
    rows: Tensor
    own_rows: Tensor
    positives: list[Tensor]
    teacher: Tensor
    in_batch: bool
    skipped: list[Problem] = dataclasses.field(default_factory=list)
    old_inputs: list[Any] = dataclasses.field(default_factory=list)

    @property
    def n_queries(self) -> int:
        """Number of queries."""
        return len(self.targets)

    @property
    def n_bytes(self) -> int:
        """Memory of the inputs."""
        return sum(bytes_of(one) for one in (*self.inputs, *self.old_inputs))


@dataclass(frozen=True)
class _Waiting:
    """A row that is being prepared: its query, then its documents with the teacher's scores."""

    index: int
    row: Row
    query: Future[Any]
    documents: list[tuple[Item, float, Future[Any]]]


class Feeder:
    """Prepares the coming steps item by item on all cores, within a bound on memory.

    old: of a compatible training, the model whose inputs are prepared beside those of ``backbone``.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        backbone: Backbone,
        hard_negatives: int,
        most_bytes: int = MOST_BYTES,
        old: Backbone | None = None,
    ) -> None:
        self.datasets = datasets
        self.hard_negatives = hard_negatives
        self.most_bytes = most_bytes
        self.backbones = [backbone] if old is None else [backbone, old]

    def steps(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, StepInputs]]:
        """Batches with this process's share of their inputs, in order."""
        return prepare_ahead(batches, self._begin, self._collect, self.most_bytes)

    def _begin(self, batch: Batch, pool: ThreadPoolExecutor) -> tuple[list[_Waiting], int]:
        """Let the rows of a batch be prepared. Returns what to wait for, and its tokens."""
        dataset = self.datasets[batch.dataset]
        mine = own_rows(batch)
        waiting = [self._start(index, dataset, batch.epoch, pool) for index in mine]
        return waiting, tokens_of(dataset, mine)

    def _start(
        self, index: int, dataset: Dataset, epoch: int, pool: ThreadPoolExecutor
    ) -> _Waiting:
        row = dataset.row(index)

        def submit(item: Item, task: str | None) -> Future[Any]:
            content = partial(dataset.store.content, item)
            # In one task, so that an item that one model cannot use is left out for both.
            return pool.submit(lambda: [inputs_of(b, content(), task) for b in self.backbones])

        documents = documents_of(row, epoch, self.hard_negatives)
        return _Waiting(
            index,
            row,
            submit(row.query, resolve(row.instruction)),
            [(item, score, submit(item, None)) for item, score in documents],
        )

    def _collect(self, batch: Batch, waiting: Sequence[_Waiting]) -> StepInputs:
        """Inputs of a step, less what cannot be decoded: a row, or one negative of it."""
        queries: list[Any] = []
        documents: list[Any] = []
        own: list[int] = []
        targets: list[int] = []
        positives: list[Tensor] = []
        keys: list[int] = []
        teacher: list[float] = []
        rows: list[int] = []
        skipped: list[Problem] = []
        for one in waiting:
            try:
                query, positive = one.query.result(), one.documents[0][2].result()
            except ContentError as error:
                skipped.append(Problem(one.row.id, str(error)))
                continue
            queries.append(query)
            # The positive comes first among the documents of its row.
            targets.append(len(documents))
            own.append(one.index)
            positives.append(torch.tensor([item.key for item in one.row.positives]))
            for number, (item, score, future) in enumerate(one.documents):
                try:
                    documents.append(future.result() if number else positive)
                except ContentError as error:
                    skipped.append(Problem(one.row.id, f"negative: {error}"))
                    continue
                keys.append(item.key)
                rows.append(one.index)
                teacher.append(score)
        inputs, *old_inputs = zip(*queries, *documents, strict=True) if queries else ((),)
        return StepInputs(
            inputs=list(inputs),
            old_inputs=list(old_inputs[0]) if old_inputs else [],
            targets=torch.tensor(targets, dtype=torch.long),
            keys=torch.tensor(keys, dtype=torch.long),
            rows=torch.tensor(rows, dtype=torch.long),
            own_rows=torch.tensor(own, dtype=torch.long),
            positives=positives,
            teacher=torch.tensor(teacher),
            in_batch=self.datasets[batch.dataset].config.in_batch_negatives,
            skipped=skipped,
        )


def encode(backbone: Backbone, inputs: Sequence[Any], config: TrainConfig) -> Tensor:
    """Vectors of inputs with a graph, float32, (len(inputs), width).

    The width is the model's; with ``matryoshka_layers``, one more for each depth stands behind.
    """
    inner = depths(config.matryoshka_layers)
    device = next(backbone.model.parameters()).device
    if not inputs:  # every row of this process was skipped
        return torch.zeros(0, backbone.dim * (1 + len(inner)), device=device, requires_grad=True)
    # On CUDA alone: most CPUs have no fast bfloat16.
    low = device.type == "cuda"
    with torch.autocast(device.type, torch.bfloat16, enabled=low), inner_vectors(backbone, inner):
        return backbone.forward(inputs).float()


def step_loss(
    vectors: Tensor, step: StepInputs, config: TrainConfig, old: Tensor | None = None
) -> Tensor:
    """Loss of this process's queries against the documents of all processes.

    Its mean over processes is the mean over all queries of the step.

    Args:
        vectors: (b + n, d), queries first, as ``StepInputs.inputs``; of all depths.
        old: the old model's vectors of the same items, with ``config.compatible``.
    """
    device = vectors.device
    queries, local = vectors[: step.n_queries], vectors[step.n_queries :]
    # Every process gathers equally many rows; what is filled up has the key -1.
    room = distributed.most(len(local), device)
    documents = distributed.gather(_fill(local, room, 0.0))
    keys = distributed.gather(_fill(step.keys.to(device), room, -1))
    rows = distributed.gather(_fill(step.rows.to(device), room, -1))
    teacher = distributed.gather(_fill(step.teacher.to(device), room, float("nan")))
    # Columns of this process's documents among those of all.
    targets = step.targets.to(device) + distributed.rank() * room
    own_rows = step.own_rows.to(device)
    known_positives = [keys_of.to(device) for keys_of in step.positives]
    allowed = candidate_mask(targets, keys, known_positives, rows, own_rows, step.in_batch)
    own = own_rows.unsqueeze(1) == rows.unsqueeze(0)
    scored = own & ~teacher.isnan().unsqueeze(0)
    counts = torch.stack([torch.tensor(len(targets), device=device), is_taught(scored).sum()])
    n_queries, n_taught = (distributed.total(counts).clamp(min=1) / distributed.size()).tolist()

    def loss(q: Tensor, d: Tensor) -> Tensor:
        # (b, n)
        similarity = scores(q, d)
        contrast = info_nce(
            similarity, targets, allowed, config.temperature, config.false_negative_margin, own
        )
        mean: Tensor = contrast.sum() / n_queries
        if not config.distil_weight:
            return mean
        # NaN times 0 would be NaN: what is unknown is masked, and must be finite.
        wanted = teacher.nan_to_num().unsqueeze(0).expand_as(similarity)
        followed = distil_scores(
            similarity, wanted, scored, config.temperature, config.distil_temperature
        )
        taught: Tensor = followed.sum() / n_taught
        return (1 - config.distil_weight) * mean + config.distil_weight * taught

    # The full width is always trained with the prefixes, and all layers with fewer.
    prefixes, inner = parts(config.matryoshka_layers, config.matryoshka_dims, vectors.shape[1])
    mixed = binary_aware(loss, config.binary_weight, config.binary_queries)
    trained = matryoshka(mixed, [*prefixes, *inner])(queries, documents)
    if old is not None and config.compatible:
        before = old[: step.n_queries], distributed.gather(_fill(old[step.n_queries :], room, 0.0))
        # Of all layers alone: an old model has no vectors after fewer.
        objective, share = matryoshka(loss, prefixes), config.compatible.weight
        cross = compatible(objective, (queries, documents), before, config.compatible.sides)
        trained = (1 - share) * trained + share * cross
    if not inner:
        return trained
    # Detached: the full size leads, and is not drawn towards the small ones.
    full = scores(queries[:, prefixes[-1]], documents[:, prefixes[-1]]).detach()

    def follow(q: Tensor, d: Tensor) -> Tensor:
        one = config.temperature
        mean: Tensor = distil_scores(scores(q, d), full, allowed, one, one).sum() / n_queries
        return mean

    share = len(inner) / (len(prefixes) + len(inner))
    return trained + share * matryoshka(follow, inner)(queries, documents)


def _fill(rows: Tensor, count: int, value: float) -> Tensor:
    missing = count - rows.shape[0]
    if missing == 0:
        return rows
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])
