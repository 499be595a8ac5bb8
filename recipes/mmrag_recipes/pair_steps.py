"""One step of a reranker: rows with their candidates as prepared pairs, and the losses."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmrag.content import Content
from mmrag.errors import ContentError
from mmrag.instructions import resolve
from mmrag.modeling.qwen_vl import QwenInputs
from mmrag.rerankers.base import refuse_clips
from mmrag.rerankers.local import Group
from mmrag.rerankers.qwen import PairPlan, QwenAsker
from mmrag_recipes import distributed
from mmrag_recipes.ahead import MOST_BYTES, bytes_of, own_rows, prepare_ahead, tokens_of
from mmrag_recipes.batches import Batch
from mmrag_recipes.data import Dataset, Problem, documents_of
from mmrag_recipes.rows import ImageStore, Item, Row


@dataclass(frozen=True)
class PairInput:
    """One query with one document, ready for the model."""

    item: QwenInputs
    query: Content

    @property
    def n_tokens(self) -> int:
        """Length of the sequence, visual tokens included."""
        return self.item.n_tokens

    @property
    def images(self) -> tuple[Tensor, ...]:
        """Of both sides."""
        return self.item.images


@dataclass(frozen=True)
class PairStep:
    """One process's share of a step.

    inputs: the pairs of one row after another, each row's positive first. counts: pairs of each
    row. skipped: rows and documents whose images could not be decoded.
    """

    inputs: list[PairInput]
    counts: list[int]
    skipped: list[Problem] = dataclasses.field(default_factory=list)

    @property
    def n_bytes(self) -> int:
        """Memory of the inputs."""
        return sum(bytes_of(one.item) for one in self.inputs)


class PairPlanner:
    """Counts the tokens of the sides of pairs, for batches of rows of about equal cost."""

    def __init__(self, asker: QwenAsker, settings: dict[str, Any]) -> None:
        # It is sent to processes, which need no weights.
        self._asker = copy.copy(asker)
        self._asker.model = None
        self._settings = settings

    def plan(self, content: Content, instruction: str | None) -> PairPlan:
        """A side alone in the prompt. Raises ContentError if it cannot be used."""
        refuse_clips((content, None))
        return self._asker.plan((content, None), instruction)

    def settings(self) -> dict[str, Any]:
        """What the scores depend on besides the weights."""
        return self._settings


Waiting = list[tuple[Row, list[Future[PairInput]]]]


class PairFeeder:
    """Prepares the pairs of the coming steps on all cores, within a bound on memory."""

    def __init__(self, datasets: Sequence[Dataset], asker: QwenAsker, hard_negatives: int) -> None:
        self.datasets = datasets
        self.asker = asker
        self.hard_negatives = hard_negatives

    def steps(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, PairStep]]:
        """Batches with this process's share of their pairs, in order."""
        return prepare_ahead(batches, self.begin, self.collect, MOST_BYTES)

    def begin(self, batch: Batch, pool: ThreadPoolExecutor) -> tuple[Waiting, int]:
        """Let the pairs of a batch be prepared."""
        dataset = self.datasets[batch.dataset]
        mine = own_rows(batch)
        waiting = []
        for index in mine:
            row = dataset.row(index)
            documents = documents_of(row, batch.epoch, self.hard_negatives)
            pairs = [pool.submit(self._prepare, dataset.store, row, item) for item, _ in documents]
            waiting.append((row, pairs))
        return waiting, tokens_of(dataset, mine)

    def _prepare(self, store: ImageStore, row: Row, item: Item) -> PairInput:
        query = store.content(row.query)
        return pair_of(self.asker, query, store.content(item), resolve(row.instruction))

    def collect(self, batch: Batch, waiting: Waiting) -> PairStep:
        """Pairs of a step, less what cannot be decoded: a row, or one negative of it."""
        step = PairStep([], [])
        for row, (positive, *negatives) in waiting:
            try:
                pairs = [positive.result()]
            except ContentError as error:
                step.skipped.append(Problem(row.id, str(error)))
                continue
            for future in negatives:
                try:
                    pairs.append(future.result())
                except ContentError as error:
                    step.skipped.append(Problem(row.id, f"negative: {error}"))
            step.inputs.extend(pairs)
            step.counts.append(len(pairs))
        return step


def pair_of(
    asker: QwenAsker, query: Content, document: Content | None, instruction: str | None
) -> PairInput:
    """One pair, or one side alone, prepared. Raises ContentError if it cannot be used."""
    refuse_clips((query, document))
    plan = asker.plan((query, document), instruction)
    # Nothing is shared: keys and values of a shared start would have no graph.
    return PairInput(asker.prepare(plan, Group([0])), query)


def encode_pairs(asker: QwenAsker, inputs: Sequence[PairInput]) -> Tensor:
    """Logit of yes minus that of no for each pair, (len(inputs), 1), float32, with a graph."""
    device = asker.model.device
    if not inputs:  # every row of this process was skipped
        return torch.zeros(0, 1, device=device, requires_grad=True)
    # On CUDA alone: most CPUs have no fast bfloat16.
    low = device.type == "cuda"
    parts = []
    # Queries of other modalities may be asked for other words.
    for _, run in itertools.groupby(inputs, lambda one: asker.style.answers(one.query)):
        pairs = list(run)
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            group = Group(list(range(len(pairs))), pairs[0].query)
            parts.append(asker.forward([pair.item for pair in pairs], group, None))
    return torch.cat(parts).float().unsqueeze(1)


def pair_loss(
    logits: Tensor,
    counts: Sequence[int],
    loss: Literal["listwise", "pointwise"],
    temperature: float,
) -> Tensor:
    """Loss of this process's pairs; its mean over processes is that over all of the step.

    Pointwise is the binary cross entropy of each pair, the sigmoid of its logit being the
    probability of yes against no (monoT5, arXiv 2003.06713). Listwise is the cross entropy of each
    row's positive in the softmax over its candidates (RankT5, arXiv 2210.10634).

    Args:
        logits: (pairs, 1), rows one after another, each row's positive first.
        counts: pairs of each row.
    """
    rows = torch.split(logits.squeeze(1), list(counts))
    if loss == "pointwise":
        labels = [F.one_hot(torch.tensor(0, device=logits.device), len(row)) for row in rows]
        values = [
            F.binary_cross_entropy_with_logits(row, label.float(), reduction="sum")
            for row, label in zip(rows, labels, strict=True)
        ]
        count = sum(counts)
    else:
        values = [-(row / temperature).log_softmax(dim=0)[0] for row in rows]
        count = len(counts)
    total = distributed.total(torch.tensor(float(count), device=logits.device))
    # The empty sum keeps a graph, so that a process without rows takes part in the backward.
    summed: Tensor = torch.stack(values).sum() if values else logits.sum()
    return summed / (total.clamp(min=1) / distributed.size())
