"""An embedder behind an OpenAI-compatible ``/v1/embeddings`` server, such as vLLM. No torch.

Texts go as ``input``, many in a request. An image goes as chat ``messages``, which is vLLM's
extension of the protocol and takes one item a request
(https://docs.vllm.ai/en/stable/models/pooling_models/).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrag.content import DEFAULT_LIMITS, Content, ContentLike, ImageLimits, Modality, load_image
from mmrag.embedders.base import Calibration, as_items, check_dim, truncate_normalise
from mmrag.embedders.known import find_known
from mmrag.embedders.progress import progress_bar
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.instructions import resolve
from mmrag.jsonapi import JsonServer, excerpt
from mmrag.prompting import data_url
from mmrag.retries import Deadline

ALL_MODALITIES: frozenset[Modality] = frozenset(("text", "image", "fused"))


class RemoteEmbedder:
    """An Embedder that asks a server. Safe to call from several threads, and picklable.

    Args:
        model: the name the server knows the model by.
        base_url: as OpenAI clients take it, for instance ``http://localhost:8000/v1``.
        api_key: sent as a bearer token; never part of a message, a repr or the fingerprint.
        dim: length of the server's vectors; without it one request is made to find out.
        chat: send texts as chat messages too, with the instruction as the system turn. Models
            with a chat template, such as Qwen3-VL-Embedding, need it: ``input`` skips the
            template. Without it the instruction is written before the text.
        instruction_format: how, when ``chat`` is off.
        document_instruction: the instruction of items that have none.
        extra_body: fields added to every request, such as ``{"add_generation_prompt": True}``
            (vLLM: the template's end, as Qwen3-VL-Embedding needs it) or
            ``{"truncate_prompt_tokens": -1}`` (vLLM: cut over-long texts).
        modalities: what the model takes; anything else is refused before it is sent.
        batch_size: texts in one request.
        concurrency: requests under way at once, over all threads.
        timeout: seconds for one request.
        deadline: seconds for one call of ``encode``, however many requests it makes.
        retries: how often a request is repeated after a busy, broken or absent answer.
        limits: bounds on images. They are sent as PNG, upright, at full size.

    Raises:
        EndpointError: If ``dim`` is not given and the server does not answer.
        ConfigError: For options that make no sense.

    >>> embedder = RemoteEmbedder(
    ...     "Qwen/Qwen3-VL-Embedding-2B", "http://localhost:8000/v1", dim=2048, chat=True
    ... )
    >>> embedder.encode(["wind energy"])  # doctest: +SKIP
    """

    family = "remote"

    def __init__(
        self,
        model: str,
        base_url: str,
        *,
        api_key: str | None = None,
        dim: int | None = None,
        chat: bool = False,
        instruction_format: str = "Instruct: {instruction}\nQuery: {text}",
        document_instruction: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        modalities: frozenset[Modality] = ALL_MODALITIES,
        batch_size: int = 32,
        concurrency: int = 8,
        timeout: float = 60.0,
        deadline: float | None = None,
        retries: int = 4,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        if "{instruction}" not in instruction_format or "{text}" not in instruction_format:
            raise ConfigError("instruction_format must hold {instruction} and {text}.")
        if batch_size < 1:
            raise ConfigError("batch_size must be above 0.")
        self.name = model
        self.modalities = modalities
        self.chat = chat
        self.instruction_format = instruction_format
        # A name in mmrag.instructions becomes its sentence here, since the server knows no names.
        self.document_instruction = resolve(document_instruction)
        self.extra_body = dict(extra_body or {})
        self.batch_size = batch_size
        self.deadline = deadline
        self.limits = limits
        endpoint = base_url.rstrip("/")
        self.server = JsonServer(
            endpoint if endpoint.endswith("/embeddings") else f"{endpoint}/embeddings",
            model,
            api_key=api_key,
            hint="check base_url, which usually ends in /v1, and the model's name",
            timeout=timeout,
            retries=retries,
            concurrency=concurrency,
        )
        known = find_known(model)
        self.matryoshka_dims = known.matryoshka_dims if known else ()
        self.calibration: Calibration | None = known.calibration if known else None
        if dim is None:  # asked of the server, which alone knows it
            probe = self._body([Content(text="How long are the vectors?")])
            dim = int(self._post(probe, 1, Deadline(deadline)).shape[1])
        self.dim = dim
        # Of the model and what shapes its prompts, not of the address: the same model at another
        # server is the same, and a collection stays usable.
        shape = (self.name, self.dim, self.chat, self.instruction_format)
        settings = [*shape, self.document_instruction, self.extra_body]
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        self.fingerprint = digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"RemoteEmbedder({self.name!r}, {self.server.shown!r})"

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed contents of any mix of modalities; see ``Embedder.encode``.

        Raises:
            EndpointError: If the server refuses, stays silent or answers nonsense; the vectors of
                the other items are lost with it.
        """
        kept = check_dim(dim, self.dim, self.matryoshka_dims)
        items = as_items(self, contents, instruction)
        # Filled in as answers come, in any order.
        vectors = np.zeros((len(items), self.dim), dtype=np.float32)
        call = Deadline(self.deadline)
        with (
            ThreadPoolExecutor(self.server.concurrency, thread_name_prefix="mmrag-remote") as pool,
            progress_bar(len(items), progress) as advance,
        ):
            jobs = {
                pool.submit(self._embed, [items[i] for i in job], job, call): job
                for job in self._jobs(items)
            }
            try:
                for future in as_completed(jobs):
                    vectors[jobs[future]] = future.result()
                    advance(len(jobs[future]))
            finally:
                # Also ends the pauses of requests that are being retried.
                call.stop.set()
                for future in jobs:
                    future.cancel()
        return truncate_normalise(vectors, kept)

    def _jobs(self, items: Sequence[Content]) -> Iterator[list[int]]:
        """Indices of the items of each request: texts together, images alone."""
        texts = [i for i, item in enumerate(items) if not self.chat and not item.images]
        for start in range(0, len(texts), self.batch_size):
            yield texts[start : start + self.batch_size]
        together = set(texts)
        yield from ([i] for i in range(len(items)) if i not in together)

    def _embed(
        self, items: Sequence[Content], indices: Sequence[int], call: Deadline
    ) -> NDArray[np.float32]:
        where = f"item {indices[0]}" if len(indices) == 1 else f"items {indices[0]}-{indices[-1]}"
        try:
            vectors = self._post(self._body(items), len(items), call)
        except ContentError as error:
            raise ContentError(f"{where}: {error}") from error
        except EndpointError as error:
            raise EndpointError(f"{where}: {error}") from error
        if vectors.shape[1] != self.dim:
            raise self.server.error(
                f"answers with {vectors.shape[1]} dimensions where {self.dim} were expected; "
                "check dim and the model's name"
            )
        return vectors

    def _body(self, items: Sequence[Content]) -> dict[str, Any]:
        """The JSON of one request: one item with images, or any number of texts."""
        # float, since not every server can send base64.
        body = {"model": self.name, "encoding_format": "float", **self.extra_body}
        # vLLM takes one conversation a request, so items of this kind come alone.
        if self.chat or items[0].images:
            return {**body, "messages": self._messages(items[0])}
        return {**body, "input": [self._text(item) for item in items]}

    def _task(self, item: Content) -> str | None:
        """The instruction of an item; an empty one is none at all."""
        task = self.document_instruction if item.instruction is None else item.instruction
        return task or None

    def _text(self, item: Content) -> str:
        task = self._task(item)
        if self.chat or task is None:
            return item.text or ""
        return self.instruction_format.format(instruction=task, text=item.text or "").rstrip()

    def _messages(self, item: Content) -> list[dict[str, Any]]:
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_url(load_image(i, limits=self.limits))}}
            for i in item.images
        ]
        text = self._text(item)
        # A message must have some part: an empty text is sent as one.
        if text or not parts:
            parts.append({"type": "text", "text": text})
        user = {"role": "user", "content": parts}
        task = self._task(item)
        if not self.chat or task is None:
            return [user]
        return [{"role": "system", "content": [{"type": "text", "text": task}]}, user]

    def _post(self, body: dict[str, Any], n: int, call: Deadline) -> NDArray[np.float32]:
        """Vectors of one request. Shape (n, dim)."""
        return self._vectors(self.server.post(body, call), n)

    def _vectors(self, answer: bytes, n: int) -> NDArray[np.float32]:
        """The rows of an answer in the order of the question, checked."""
        try:
            rows = json.loads(answer)["data"]
            # OpenAI's protocol allows any order; some servers leave the index out.
            order = [row.get("index", position) for position, row in enumerate(rows)]
            vectors = [np.asarray(row["embedding"], dtype=np.float32) for row in rows]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise self.server.error(f"answers nonsense: {excerpt(answer)}") from error
        # By str, since a broken server may send anything as an index.
        if sorted(order, key=str) != sorted(range(n), key=str):
            raise self.server.error(f"answers with {len(rows)} vectors where {n} were asked for")
        if any(v.ndim != 1 or v.shape != vectors[0].shape or not len(v) for v in vectors):
            raise self.server.error("answers with vectors of different shapes")
        stacked = np.stack(vectors)[np.argsort(order)]
        # A vector of zeros has no direction: stored, it would never be found.
        if not np.isfinite(stacked).all() or not np.linalg.norm(stacked, axis=1).all():
            raise self.server.error("answers with vectors that are zero or not finite")
        return stacked
