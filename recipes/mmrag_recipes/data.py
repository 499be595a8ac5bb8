"""Data sets of a training: rows, the cost of each in tokens, and which cannot be used."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import nn

from mmrag.content import Content
from mmrag.embedders.registry import find_folders
from mmrag.errors import ConfigError, ContentError
from mmrag.instructions import resolve
from mmrag.modeling.batching import Sized
from mmrag_recipes.config import DataConfig, RunConfig, TrainConfig
from mmrag_recipes.console import track
from mmrag_recipes.row_file import (
    Documents,
    Ragged,
    RowFile,
    open_rows,
    save_array,
    workers,
    write_whole,
)
from mmrag_recipes.rows import ImageStore, Item, Row, store_of
from mmrag_recipes.text_tokens import TextTokens

LEFT_OUT = -1  # cost of a row that cannot be used

_ROWS_PER_TASK = 5000
_ENDS = 4096  # bytes of an image file's start and end that its digest reads
_LARGEST_DESCRIPTION = 64_000_000  # bytes; larger files of a checkpoint are weights


class Planner(Protocol):
    """What counts the tokens of an item; every ``Backbone`` does. It is sent to processes."""

    def plan(self, content: Content, instruction: str | None) -> Sized:
        """An item with its ``n_tokens``. Raises ContentError if it cannot be used."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything besides the checkpoint that the number of tokens depends on."""
        ...


@dataclass(frozen=True)
class Problem:
    """A row, or one document of it, that is left out."""

    row: str
    reason: str
    step: int | None = None


@dataclass(frozen=True)
class Dataset:
    """Rows of one data set.

    costs: (n,) tokens of query, positive and negatives; ``LEFT_OUT`` for rows that cannot be
    used, which ``problems`` names. digest: of rows and images. negatives: keys of the documents
    that were mined during the run, in place of the negatives of the rows.
    """

    config: DataConfig
    rows: RowFile
    store: ImageStore
    costs: NDArray[np.int32]
    problems: list[Problem]
    digest: str
    negatives: Ragged | None = None

    def row(self, index: int) -> Row:
        """A row, with the negatives that it has at present."""
        row: Row = self.rows[index]
        if self.negatives is None:
            return row
        items = [self.documents[key] for key in self.negatives[index].tolist()]
        # The scores were those of the old ones.
        update = {"negatives": items, "negative_scores": [], "positive_scores": []}
        return row.model_copy(update=update)

    @cached_property
    def documents(self) -> Documents:
        """The documents of the rows, by their keys."""
        return Documents(self.rows)

    @property
    def name(self) -> str:
        """Name in logs."""
        return self.config.name or Path(self.config.rows).stem


def load_datasets(config: RunConfig, planner: Planner) -> list[Dataset]:
    """Open all data sets; the cost of each row is computed once and kept beside the rows.

    Raises:
        ContentError: For bad rows, or if no row of a data set can be used.
    """
    if not config.data:
        raise ConfigError("data: at least one data set is needed.")
    return [_load(data, config, planner) for data in config.data]


def _load(data: DataConfig, config: RunConfig, planner: Planner) -> Dataset:
    rows, store = open_rows(data.rows), store_of(data.rows)
    files = [(name, store.folder / name) for name in rows.images]
    # Images by size and time: hashing them all would take minutes at every start.
    stats = [(name, _stat(path)) for name, path in files]
    # Costs depend on what describes the checkpoint, its tokenizer above all, and on no weight.
    described = sorted(
        path
        for path in find_folders(config.model)[0].iterdir()
        if path.suffix in (".json", ".txt", ".model") and path.stat().st_size < _LARGEST_DESCRIPTION
    )
    digests = [f"{p.name}:{hashlib.sha256(p.read_bytes()).hexdigest()}" for p in described]
    about = [planner.settings(), digests, config.hard_negatives, stats]
    key = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:16]
    kept, notes = rows.folder / f"costs-{key}.npy", rows.folder / f"costs-{key}.json"
    if not notes.is_file():
        costs, problems = _compute_costs(rows, store, planner, config.hard_negatives)
        images = hashlib.sha256()
        for name, path in files:
            # Once, when the costs are made: the identity of a run needs more than size and time.
            images.update(f"{name}:{_ends(path)}".encode())
        save_array(kept, costs)
        found = {"problems": [vars(p) for p in problems], "images": images.hexdigest()}
        # Last: where it is, the costs are there too.
        write_whole(notes, json.dumps(found).encode())
    found = json.loads(notes.read_text(encoding="utf-8"))
    problems = [Problem(**one) for one in found["problems"]]
    # Mapped, so that the processes of a machine share one copy.
    costs = np.load(kept, mmap_mode="r")
    if not bool((costs != LEFT_OUT).any()):
        raise ContentError(f"{data.rows}: no row can be used: {problems[0].reason}")
    dataset = Dataset(data, rows, store, costs, problems, f"{rows.digest}/{found['images']}")
    _check_contrast(dataset, config)
    return dataset


def _check_contrast(dataset: Dataset, config: RunConfig) -> None:
    """Raise ConfigError if the loss would be zero for every row, and nothing be learned."""
    data = dataset.config
    alone = min(config.batch_size, int((dataset.costs != LEFT_OUT).sum())) < 2
    mined = len(dataset.rows.keys.negatives.values) or (
        isinstance(config, TrainConfig) and config.refresh
    )
    if (alone or not data.in_batch_negatives) and not (config.hard_negatives and mined):
        raise ConfigError(
            f"{data.rows}: nothing could be learned, since no row is compared with a negative. "
            "Give several rows and a batch_size above 1, with in_batch_negatives; or "
            "hard_negatives, and rows that were mined."
        )


def _stat(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns


def _ends(path: Path) -> str:
    """Digest of a file's size, first and last bytes: enough to tell encoded images apart."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest = hashlib.sha256(f"{size}:".encode() + file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read(_ENDS))
    except OSError:
        return "missing"
    return digest.hexdigest()


def _compute_costs(
    rows: RowFile, store: ImageStore, planner: Planner, hard_negatives: int
) -> tuple[NDArray[np.int32], list[Problem]]:
    starts = range(0, len(rows), _ROWS_PER_TASK)
    # Costs need the tokenizer and the image rule, not the weights.
    light = copy.copy(planner)
    for name, value in vars(planner).items():
        if isinstance(value, nn.Module):
            setattr(light, name, None)
    about = (rows.path, rows.folder, store.folder, light, hard_negatives)
    with workers(len(starts), _set_up, *about) as pool:
        stops = [start + _ROWS_PER_TASK for start in starts]
        mapped = pool.map(_costs_between, starts, stops)
        parts = list(track(mapped, len(starts), f"counting {rows.path.name}"))
    return np.concatenate([costs for costs, _ in parts]), [p for _, found in parts for p in found]


_task: dict[str, Any] = {}  # what the tasks of this process share


def _set_up(rows: Path, index: Path, images: Path, planner: Planner, hard_negatives: int) -> None:
    _task.update(rows=RowFile(rows, index), store=ImageStore(images), planner=planner)
    _task.update(hard_negatives=hard_negatives)


def _costs_between(start: int, stop: int) -> tuple[NDArray[np.int32], list[Problem]]:
    """Costs of some rows, and the rows that cannot be used."""
    rows: RowFile = _task["rows"]
    store: ImageStore = _task["store"]
    planner: Planner = _task["planner"]
    # Made anew for these rows, so that costs do not depend on which process counts them.
    of_text = TextTokens(lambda text, task: planner.plan(Content(text), task).n_tokens)

    def tokens(item: Item, task: str | None) -> int:
        if item.text is not None and item.modality == "text":
            return of_text(item.text, task)
        return planner.plan(store.content(item), task).n_tokens

    costs, problems = [], []
    # One at a time: the garbage collector goes through all rows that are in memory.
    for row in map(rows.__getitem__, range(start, min(stop, len(rows)))):
        try:
            costs.append(_cost(row, store, tokens, _task["hard_negatives"]))
        except ContentError as error:
            costs.append(LEFT_OUT)
            problems.append(Problem(row.id, str(error)))
    return np.array(costs, dtype=np.int32), problems


def _cost(
    row: Row, store: ImageStore, tokens: Callable[[Item, str | None], int], hard_negatives: int
) -> int:
    """Tokens of query, first positive and negatives; a negative without its image costs none."""
    total = tokens(row.query, resolve(row.instruction))
    for positive in row.positives[1:]:
        store.content(positive)  # its image must be there too
    # The first stands for all: they are of one kind.
    total += tokens(row.positives[0], None)
    for item in row.negatives[:hard_negatives]:
        try:
            total += tokens(item, None)
        except ContentError:
            continue  # said when its turn comes
    return total


def documents_of(row: Row, epoch: int, hard_negatives: int) -> list[tuple[Item, float]]:
    """Positive and negatives of a row in this pass, with the teacher's scores (NaN: none).

    Several positives, and more negatives than are used at once, rotate over the passes.
    """
    absent = float("nan")
    which = epoch % len(row.positives)
    positive_scores: Sequence[float] = row.positive_scores or [absent] * len(row.positives)
    negative_scores: Sequence[float] = row.negative_scores or [absent] * len(row.negatives)
    documents = [(row.positives[which], positive_scores[which])]
    count = min(hard_negatives, len(row.negatives))
    for step in range(count):
        index = (epoch * count + step) % len(row.negatives)
        documents.append((row.negatives[index], negative_scores[index]))
    return documents
