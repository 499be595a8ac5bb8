"""Hard negatives mined again during a run, by the model as it stands (ANCE, arXiv 2007.00808).

ANCE searches beside the training with weights that are some steps old. Here the training waits,
so that negatives are those of the present weights and a resumed run takes the same ones.

The documents searched are those of the rows, with the rules of ``mine``. Every process embeds and
searches its share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmrag.content import ContentLike
from mmrag.embedders.local import LocalEmbedder
from mmrag.embedders.registry import find_folders
from mmrag.errors import ContentError
from mmrag.ingest.halving import each_or_error
from mmrag.modeling.backbone import Backbone, inputs_of
from mmrag.modeling.checkpoints import fingerprint
from mmrag_recipes import distributed
from mmrag_recipes.config import RefreshConfig, TrainConfig
from mmrag_recipes.data import Dataset
from mmrag_recipes.mine import Corpus, mine_rows
from mmrag_recipes.row_file import Ragged
from mmrag_recipes.rows import ImageStore, Item, Row, corpus_of
from mmrag_recipes.trainable import evaluating
from mmrag_recipes.vectors import VectorCache, Vectors

logger = logging.getLogger("mmrag_recipes")

_GATHERED = 65_536  # vectors that pass between processes at a time
_NONE = -1  # stands for a negative that a row does not have; keys are not negative


class _Tolerant(LocalEmbedder):
    """Gives NaN for what cannot be embedded: one broken image must not end a run."""

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        embed = super().encode
        vectors = np.full((len(contents), dim or self.dim), np.nan, dtype=np.float32)
        found = each_or_error(lambda some: [*embed(some, instruction, dim, progress)], contents)
        for place, one in enumerate(found):
            if isinstance(one, ContentError):
                logger.warning("left out of the search for negatives: %s", one)
            else:
                vectors[place] = one
        return vectors


class Refresh:
    """Mines the negatives of data sets with the present weights of ``backbone``."""

    def __init__(self, config: TrainConfig, rules: RefreshConfig, backbone: Backbone) -> None:
        self.config = config
        self.every = rules.every
        self.rules = rules
        self.backbone = backbone

    def mine(self, datasets: Sequence[Dataset]) -> list[Ragged]:
        """Negatives of the rows of each data set, as keys of documents.

        Rows that are left out, or whose positives cannot be embedded, keep what they have.
        """
        with evaluating(self.backbone.model):
            return [self._mine(dataset) for dataset in datasets]

    def _mine(self, dataset: Dataset) -> Ragged:
        usable = np.flatnonzero(np.asarray(dataset.costs) >= 0).tolist()
        rows: dict[int, Row] = {index: dataset.rows[index] for index in usable}
        items = [item for item in corpus_of([*rows.values()]) if _is_there(dataset.store, item)]
        vectors = self._documents(dataset, items)
        good = ~np.isnan(vectors[:, 0])
        place = {items[n].key: n for n in np.flatnonzero(good).tolist()}
        rows = {
            index: row.model_copy(
                update={"negatives": [item for item in row.negatives if item.key in place]}
            )
            for index, row in rows.items()
            if all(item.key in place for item in row.positives)
        }
        # Of all rows, whichever process mines one: what answers another row may be a candidate.
        corpus = Corpus.of(rows.values())
        own = [*rows.values()][distributed.rank() :: distributed.size()]
        cache = VectorCache(None, self._embedder("training"), dataset.store)
        queries = cache.encode([row.query for row in own], [row.instruction for row in own])
        mined, report = mine_rows(
            own,
            # A query that cannot be embedded costs its row the step, whatever the negatives are.
            np.nan_to_num(queries),
            corpus,
            vectors[[place[item.key] for item in corpus.items]],
            self.rules,
        )
        logger.info("%s, negatives of the present weights: %s", dataset.name, report)
        keys = np.full((len(own), self.rules.right + self.rules.wrong), _NONE, dtype=np.int64)
        for line, row in zip(keys, mined, strict=True):
            line[: len(row.negatives)] = [item.key for item in row.negatives]
        lists = [dataset.rows.keys.negatives[index].tolist() for index in range(len(dataset.rows))]
        for index, found in zip(rows, self._gather(keys, len(rows)).tolist(), strict=True):
            lists[index] = [key for key in found if key != _NONE]
        return Ragged.of(lists)

    def _documents(self, dataset: Dataset, items: Sequence[Item]) -> Vectors:
        """Vectors of documents, (len(items), d), normalised; NaN for those that are broken."""
        share = items[distributed.rank() :: distributed.size()]
        vectors = np.zeros((len(share), self.backbone.dim), dtype=np.float32)
        for modality in sorted({item.modality for item in items}):
            places = [n for n, item in enumerate(share) if item.modality == modality]
            sample = next(item for item in items if item.modality == modality)
            folder, version = None, "training"
            if not self._moves(dataset.store, sample):
                # The vectors of the starting checkpoint, at every refresh of the run.
                folder = Path(self.config.out) / "vectors"
                version = fingerprint(find_folders(self.config.model), self.backbone.settings())
            cache = VectorCache(folder, self._embedder(version), dataset.store)
            vectors[places] = cache.encode([share[n] for n in places])
        return self._gather(vectors, len(items))

    def _moves(self, store: ImageStore, sample: Item) -> bool:
        """Whether training can move the vectors of items like this one: weights in it train."""
        try:
            inputs = inputs_of(self.backbone, store.content(sample), None)
        except ContentError:
            return True  # not known, and right in any case
        with torch.enable_grad():
            return self.backbone.forward([inputs]).requires_grad

    def _embedder(self, version: str) -> LocalEmbedder:
        # Never compiled: the blocks of a model that trains would stay so.
        return _Tolerant(self.backbone, name=self.config.model, fingerprint=version, compile=False)

    def _gather(self, share: NDArray[Any], total: int) -> NDArray[Any]:
        """Rows of all processes, process r of n holding rows r, r + n and so on, in order."""
        device = next(self.backbone.model.parameters()).device
        room = -(-total // distributed.size())
        parts = [share[:0]]
        for start in range(0, room, _GATHERED):
            stop = min(room, start + _GATHERED)
            block = np.zeros((stop - start, *share.shape[1:]), dtype=share.dtype)
            held = share[start:stop]
            block[: len(held)] = held
            gathered = distributed.gather(torch.from_numpy(block).to(device)).cpu().numpy()
            by_process = gathered.reshape(distributed.size(), *block.shape)
            parts.append(by_process.swapaxes(0, 1).reshape(-1, *share.shape[1:]))
        return np.concatenate(parts)[:total]


def _is_there(store: ImageStore, item: Item) -> bool:
    """Whether the images of an item are in the store; the step that needs them says which not."""
    try:
        store.content(item)
    except ContentError:
        return False
    return True
