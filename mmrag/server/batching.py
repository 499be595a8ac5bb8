"""One model for many askers: queries that arrive together are embedded in one batch."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content, ContentLike, Modality, as_content
from mmrag.embedders.base import Embedder, check_dim, optional_traits, truncate_normalise
from mmrag.errors import MMRagError

SMALL = 8
"""Most items of a call that waits for others. Larger calls, as indexing makes, fill a batch by
themselves and go straight to the model."""


@dataclass(frozen=True)
class _Call:
    contents: list[Content]
    result: Future[NDArray[np.float32]] = field(default_factory=Future)


class BatchingEmbedder:
    """An Embedder that joins the small calls of several threads.

    A call that finds the model free waits ``wait`` seconds for others; calls that come while a
    batch runs are the next batch. A call that fails, fails alone.

    >>> embedder = BatchingEmbedder(load_embedder("mmrag-nano"))  # doctest: +SKIP
    >>> embedder.encode(["a question"], instruction="page_for_question")  # doctest: +SKIP

    Args:
        embedder: the model. Must be safe to call from several threads.
        wait: seconds.
        max_items: contents of a batch, at most; a single call is never cut.
        observe: is told the number of contents of each batch.
    """

    def __init__(
        self,
        embedder: Embedder,
        wait: float = 0.002,
        max_items: int = 64,
        observe: Callable[[int], None] | None = None,
    ) -> None:
        self._embedder = embedder
        self._wait = wait
        self._max_items = max_items
        self._observe = observe
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.name = embedder.name
        self.family = embedder.family
        self.dim = embedder.dim
        self.modalities: frozenset[Modality] = embedder.modalities
        self.fingerprint = embedder.fingerprint
        self.matryoshka_dims: tuple[int, ...] = ()
        vars(self).update(optional_traits(embedder))
        threading.Thread(target=self._run, name="mmrag-batch", daemon=True).start()

    def __reduce__(self) -> tuple[type[BatchingEmbedder], tuple[Embedder, float, int]]:
        """Pickle what it is made of; a copy has a thread of its own and tells no one its sizes."""
        return type(self), (self._embedder, self._wait, self._max_items)

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed contents; see ``Embedder.encode``."""
        # Waiting would delay a full batch, and searches would wait for all of it.
        if not 0 < len(contents) <= SMALL:
            return self._embedder.encode(contents, instruction, dim, progress)
        kept = check_dim(dim, self.dim, self.matryoshka_dims)
        call = _Call([as_content(each) for each in contents])
        if instruction is not None:
            # Calls with different instructions share a batch, so each content carries its own.
            call.contents[:] = [
                dataclasses.replace(each, instruction=instruction)
                if each.instruction is None
                else each
                for each in call.contents
            ]
        self._calls.put(call)
        # Callers of one batch may ask for different dims, so the batch is made in full.
        return truncate_normalise(call.result.result(), kept)

    def close(self) -> None:
        """End the thread, after the calls that were made."""
        self._calls.put(None)

    def _run(self) -> None:
        while (first := self._calls.get()) is not None:
            calls, ended = self._collect(first)
            self._answer(calls)
            if ended:
                return

    def _collect(self, first: _Call) -> tuple[list[_Call], bool]:
        """The calls of one batch, and whether ``close`` was among them."""
        calls = [first]
        # Counted from the first call: a steady stream of calls must not postpone it for ever.
        until = time.monotonic() + self._wait
        while sum(len(call.contents) for call in calls) < self._max_items:
            try:
                call = self._calls.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if call is None:
                return calls, True
            calls.append(call)
        return calls, False

    def _answer(self, calls: Sequence[_Call]) -> None:
        """Set the results of calls, all at once; one by one where that fails."""
        contents = [content for call in calls for content in call.contents]
        try:
            vectors = self._embedder.encode(contents)
        # Bad content of one caller is no reason to fail the others: each is tried on its own.
        except MMRagError as error:
            if len(calls) == 1:
                calls[0].result.set_exception(error)
                return
            for call in calls:
                self._answer([call])
            return
        except Exception as error:  # noqa: BLE001 - each caller gets it; this thread serves on
            for call in calls:
                call.result.set_exception(error)
            return
        if self._observe is not None:
            self._observe(len(contents))
        start = 0
        for call in calls:
            call.result.set_result(vectors[start : start + len(call.contents)])
            start += len(call.contents)
