"""Short batches beside large ones, on one model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch

from mmrag.modeling.compiling import LENGTHS
from mmrag.modeling.loading import is_out_of_memory

# What is recorded as a CUDA graph must never run beside itself: texts of one recorded length are
# all short, or none is.
SHORT = next(length for length in LENGTHS if length >= 512)
"""Most tokens of a padded batch that runs beside others: a few queries, or a small image."""

R = TypeVar("R")


class Lanes:
    """Runs one large batch at a time, and beside it one short batch at a time.

    A query then does not wait for a batch of pages, which takes a second on a card. On CUDA, short
    batches have a stream of high priority; on the CPU, one beside a large batch takes half of the
    threads. One that finds no memory beside a large batch runs after it.

    Args:
        device: that the model is on.
        stateful: the model keeps something from batch to batch: all of them run one by one.
    """

    def __init__(self, device: torch.device, stateful: bool = False) -> None:
        self._device = device
        self._stateful = stateful
        self._large, self._short = threading.Lock(), threading.Lock()
        self._stream: torch.cuda.Stream | None = None

    def __reduce__(self) -> tuple[type[Lanes], tuple[torch.device, bool]]:
        # Locks and streams belong to a process; Ray and multiprocessing send models to others.
        return Lanes, (self._device, self._stateful)

    def run(self, forward: Callable[[], R], tokens: int) -> R:
        """The result of ``forward``, a batch of so many tokens with padding.

        It must leave nothing on the device, so that no other stream has to wait for it.
        """
        if self._stateful or tokens > SHORT:
            with self._large:
                return forward()
        try:
            with self._short, self._beside():
                return forward()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler: the traceback would keep the failed tensors alive.
        with self._large, self._short:
            return forward()

    def _beside(self) -> AbstractContextManager[object]:
        if self._device.type == "cpu" and self._large.locked():
            return _half_of_the_threads()
        if self._device.type != "cuda":
            return nullcontext()
        if self._stream is None:
            # In one stream, the kernels of a query would stand behind those of the batch.
            self._stream = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)


@contextmanager
def _half_of_the_threads() -> Iterator[None]:
    # Threads of one operation wait for each other, and where there are more of them than cores, for
    # one that has no core. The number is the caller's own, and that of threads which use torch for
    # the first time meanwhile.
    usual = torch.get_num_threads()
    torch.set_num_threads(max(1, usual // 2))
    try:
        yield
    finally:
        torch.set_num_threads(usual)
