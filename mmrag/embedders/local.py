"""The local engine: plans batches by tokens, prepares ahead in threads, runs the model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress, TaskID

from mmrag.content import Content, ContentLike, Modality, as_content
from mmrag.embedders.base import check_dim, truncate_normalise
from mmrag.errors import ContentError, ModelError
from mmrag.instructions import resolve
from mmrag.modeling.backbone import Backbone, Inputs
from mmrag.modeling.batching import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET, plan_batches, prepared

logger = logging.getLogger(__name__)


class LocalEmbedder:
    """An Embedder that runs a Backbone in this process.

    ``token_budget`` bounds a batch: its number of items times its longest sequence, in tokens,
    visual ones included. Safe to call from several threads: the model runs one batch at a time.

    ``prefers_text`` says that text serves this model better than an image of it: ingestion then
    gives a node that has text no ``image`` view. ``prefers_passages`` says that it was trained on
    passages: a page that is cut into passages then gets no ``text`` view of its own. They move no
    vector and may be set at any time.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        name: str,
        fingerprint: str,
        token_budget: int | None = None,
        prefers_text: bool = False,
        prefers_passages: bool = False,
        workers: int = 2,
    ) -> None:
        on_cpu = next(backbone.model.parameters()).device.type == "cpu"
        self.backbone = backbone
        self.name = name
        self.family: str = backbone.family
        self.dim: int = backbone.dim
        self.modalities: frozenset[Modality] = backbone.modalities
        self.fingerprint = fingerprint
        self.prefers_text = prefers_text
        self.prefers_passages = prefers_passages
        self.token_budget = token_budget or (CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET)
        self.workers = workers
        self._lock = threading.Lock()
        self._told_memory = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed contents of any mix of modalities; see ``Embedder.encode``."""
        kept = check_dim(dim, self.dim)
        task = resolve(instruction)
        items = [self._item(index, value, task) for index, value in enumerate(contents)]
        vectors = np.zeros((len(items), self.dim), dtype=np.float32)
        if not items:
            return vectors[:, :kept]
        with (
            ThreadPoolExecutor(self.workers, thread_name_prefix="mmrag-prepare") as pool,
            Progress(console=Console(stderr=True), disable=not progress) as bar,
        ):
            task_id: TaskID = bar.add_task("embedding", total=len(items))
            costs = list(pool.map(self._cost, range(len(items)), items))
            batches = plan_batches(costs, self.token_budget)
            for indices, inputs in prepared(pool, batches, partial(self._prepare, items)):
                vectors[indices] = self._run(inputs)
                bar.advance(task_id, len(indices))
        return truncate_normalise(vectors, kept)

    def _item(self, index: int, value: ContentLike, task: str | None) -> Content:
        try:
            content = as_content(value)
        except ContentError as error:
            raise ContentError(f"item {index}: {error}") from error
        needed = content.modality
        if needed not in self.modalities:
            able = ", ".join(sorted(self.modalities))
            raise ContentError(f"item {index}: {self.name} cannot embed {needed}, only {able}.")
        own = resolve(content.instruction) if content.instruction is not None else task
        return Content(content.text, content.image, own)

    def _cost(self, index: int, item: Content) -> int:
        try:
            return self.backbone.cost(item, item.instruction)
        except ContentError as error:
            raise ContentError(f"item {index}: {error}") from error

    def _prepare(self, items: Sequence[Content], index: int) -> Inputs:
        item = items[index]
        try:
            return self.backbone.prepare(item, item.instruction)
        except ContentError as error:
            raise ContentError(f"item {index}: {error}") from error

    def _run(self, inputs: list[Inputs]) -> NDArray[np.float32]:
        """Vectors of one batch, halved as often as memory asks for."""
        try:
            with self._lock, torch.inference_mode():
                pooled = self.backbone.forward(inputs)
                return pooled.float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            if len(inputs) == 1:
                raise ModelError(
                    f"{self.name}: one item of {inputs[0].n_tokens} tokens does not fit in memory; "
                    "lower max_image_tokens or max_length, or use a smaller dtype."
                ) from error
        self._make_room(inputs)
        middle = len(inputs) // 2
        return np.concatenate([self._run(inputs[:middle]), self._run(inputs[middle:])])

    def _make_room(self, inputs: list[Inputs]) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        tokens = len(inputs) * max(item.n_tokens for item in inputs)
        self.token_budget = min(self.token_budget, max(1, tokens // 2))
        if not self._told_memory:
            self._told_memory = True
            logger.warning(
                "%s: out of memory with a batch of %d tokens; it is halved and the run goes on. "
                "token_budget=%d avoids this.",
                self.name,
                tokens,
                self.token_budget,
            )
