"""One model on several devices of a machine: a process for each, among which contents are dealt."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from queue import LifoQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content, ContentLike, Modality
from mmrag.embedders.base import Calibration, as_items, check_dim
from mmrag.embedders.progress import progress_bar
from mmrag.errors import ConfigError, ContentError, ModelError
from mmrag.processes import end_process, preparing_threads, start_module

# Enough that batches stay full, and few enough that images of many are not in memory at once.
_MOST_ITEMS = 256
_LEAST_ITEMS = 8
_PATIENCE = 5.0  # seconds


class ParallelEmbedder:
    """An Embedder that runs a model in one process on each of several devices.

    Contents are dealt to the devices in shares of 8 to 256; a single query takes one device, and
    queries from several threads take several. The processes start here, and again if one has
    ended; they end with the object, by ``close``, and with this process.

    Args:
        name: as in ``load_embedder``.
        devices: such as ``cuda:0`` and ``cuda:1``; a device that is named twice runs two processes.
        options: further arguments of ``load_embedder``. ``workers`` is the number of threads of
            each process; by default the cores are divided among them.

    Raises:
        ModelError: If the model does not load.
        ConfigError: For less than two devices, for ``device_map``, and if the devices would give
            different vectors.

    >>> embedder = ParallelEmbedder("mmrag-nano", ["cpu", "cpu"])
    >>> embedder.encode(["wind", "sun"]).shape
    (2, 384)
    >>> embedder.close()
    """

    name: str
    family: str
    dim: int
    modalities: frozenset[Modality]
    fingerprint: str
    prefers_text: bool = False
    prefers_passages: bool = False
    matryoshka_dims: tuple[int, ...] = ()
    calibration: Calibration | None = None

    def __init__(self, name: str, devices: Sequence[str], **options: Any) -> None:
        if len(devices) < 2 or not all(device.strip() for device in devices):
            raise ConfigError(f"devices {','.join(devices)!r}: name at least two.")
        if options.get("device_map") is not None:
            raise ConfigError("device_map spreads one model over all devices: name no devices.")
        if options.get("workers") is None:
            options["workers"] = preparing_threads(len(devices))
        self._settings = (name, tuple(devices), options)
        self._workers = [
            # The warnings of one of them are enough.
            _Worker(name, device.strip(), options, subprocess.DEVNULL if number else None)
            for number, device in enumerate(devices)
        ]
        weakref.finalize(self, _close_all, self._workers)
        try:
            with ThreadPoolExecutor(len(devices)) as pool:
                found = list(pool.map(_Worker.start, self._workers))
        except BaseException:
            self.close()
            raise
        if len({traits["fingerprint"] for traits in found}) > 1:
            self.close()
            raise ConfigError(
                f"{', '.join(devices)}: the model does not give the same vectors on these devices; "
                "pass dtype= so that all of them use one."
            )
        self.__dict__.update(found[0])
        # Last in, first out: single queries stay with one device, whose caches are warm.
        self._idle: LifoQueue[_Worker] = LifoQueue()
        for worker in reversed(self._workers):
            self._idle.put(worker)

    def __reduce__(self) -> tuple[Any, ...]:
        # Processes cannot be pickled; the other side starts its own.
        name, devices, options = self._settings
        return partial(ParallelEmbedder, **options), (name, devices)

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed contents of any mix of modalities; see ``Embedder.encode``.

        Raises:
            ModelError: If a process ends; besides what ``Embedder.encode`` raises.
        """
        kept = check_dim(dim, self.dim, self.matryoshka_dims)
        items = as_items(self, contents, instruction)
        vectors = np.zeros((len(items), kept), dtype=np.float32)
        n_devices = len(self._workers)
        n_shares = max(
            -(-len(items) // _MOST_ITEMS), min(n_devices, -(-len(items) // _LEAST_ITEMS))
        )
        # Every so many, not runs: pages of one file cost alike, and every share gets some.
        shares = [range(start, len(items), n_shares) for start in range(n_shares)]
        if n_shares == 1:
            # One query: no thread to start.
            vectors[shares[0]] = self._embed(items, shares[0], dim)
            return vectors
        with ThreadPoolExecutor(n_devices) as pool, progress_bar(len(items), progress) as advance:
            running = {pool.submit(self._embed, items, share, dim): share for share in shares}
            try:
                for done in as_completed(running):
                    vectors[running[done]] = done.result()
                    advance(len(running[done]))
            except BaseException as error:
                pool.shutdown(wait=False, cancel_futures=True)
                if not isinstance(error, Exception):
                    # Ctrl-C: nobody waits for what is being embedded.
                    _close_all(self._workers)
                raise
        return vectors

    def _embed(
        self, items: Sequence[Content], share: range, dim: int | None
    ) -> NDArray[np.float32]:
        worker = self._idle.get()
        try:
            # The items carry their instructions.
            vectors = worker.ask([items[index] for index in share], None, dim)
        except ContentError as error:
            # The process counts within its share.
            message = re.sub(
                r"^item (\d+)", lambda found: f"item {share[int(found[1])]}", str(error)
            )
            raise ContentError(message) from error
        finally:
            self._idle.put(worker)
        return np.asarray(vectors, dtype=np.float32)

    def close(self) -> None:
        """End the processes; a later call starts them anew."""
        _close_all(self._workers)


class _Worker:
    """The process of one device. One thread at a time may use it."""

    def __init__(self, name: str, device: str, options: dict[str, Any], stderr: int | None) -> None:
        self._name, self._device, self._options, self._stderr = name, device, options, stderr
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def start(self) -> dict[str, Any]:
        """Load the model; its traits."""
        self._process, self._owner = (
            start_module("mmrag.embedders.worker", self._stderr),
            os.getpid(),
        )
        try:
            return dict(self._exchange(self._name, self._options | {"device": self._device}))
        except BaseException:
            self.close()
            raise

    def ask(self, *request: Any) -> Any:
        """The answer to a request, by a process that is started if there is none."""
        # After a fork the pipes are still those of the parent.
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            self.start()
        return self._exchange(*request)

    def _exchange(self, *request: Any) -> Any:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        # Whole, before anything is written: what cannot be pickled must not leave half a request.
        message = pickle.dumps(request, pickle.HIGHEST_PROTOCOL)
        try:
            process.stdin.write(message)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_PATIENCE)  # for its own exit code, before it is killed
            self.close()
            raise ModelError(
                f"{self._name}: the process on {self._device} ended (exit code "
                f"{process.returncode}), for lack of memory perhaps; the next call starts it anew."
            ) from error
        except BaseException:
            # Ctrl-C: the next request would get the answer to this one.
            self.close()
            raise
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        end_process(process)


def _close_all(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.close()
