"""Nodes into the collection: embedded in batches across pages and files, then stored.

Batches are embedded in threads while the caller reads on and stores what is done: the model waits
neither for files nor for the database, and the collection is used by one thread alone.
"""

from __future__ import annotations

import contextvars
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self, TypeAlias

import numpy as np
from llama_index.core.schema import BaseNode
from numpy.typing import NDArray

from mmrag.content import Clip, Content, ImageSource
from mmrag.embedders.base import Embedder
from mmrag.embedders.late import LateInteraction
from mmrag.embedding import embedding_events
from mmrag.errors import ContentError, ReadError
from mmrag.ingest.halving import each_or_error
from mmrag.ingest.late import encode_tokens, token_content
from mmrag.ingest.plan import Job
from mmrag.ingest.prefetch import THREAD_NAME, End
from mmrag.ingest.progress import IngestReport, Progress
from mmrag.nodes import node_image, node_text
from mmrag.reading import ReadPage, discard
from mmrag.store.collection import Collection
from mmrag.store.engine import TOKENS
from mmrag.store.entries import FileEntry, folder_of
from mmrag.store.settings import View
from mmrag.store.terms import NodeTerms

log = logging.getLogger(__name__)

# 32 fill a GPU's batch and are few to lose: each batch is stored once it is embedded. The first
# batches are smaller, 4, 8 and 16, so that the model soon has something to do.
_FIRST_ITEMS, _BATCH_ITEMS = 4, 32
# One batch runs while the inputs of the next are prepared; a third is there when the first is done.
_EMBEDDED_AT_ONCE = 2
_BATCHES_AHEAD = 3

_Vectors: TypeAlias = dict[str, NDArray[np.float32]]


class _Waiting(NamedTuple):
    """A node that is to be embedded, with what of it. clip: whose frames are then removed."""

    job: Job
    node: BaseNode
    views: dict[View, Content]
    tokens: Content | None
    terms: NodeTerms
    clip: Clip | None


class _Embedded(NamedTuple):
    """What became of a batch: vectors by view for each node, and views that have none."""

    vectors: list[_Vectors]
    failures: list[tuple[_Waiting, str, ContentError]]


class Writer:
    """Takes what reading gives, file by file, and keeps the report. Use it in ``with``.

    Args:
        late: gives how tokens are made, of a collection that keeps them.
        total: how many files the run deals with. known: how many of them need no reading.
        sizes: bytes of the files to read, by hash.
        started: the run's beginning, in seconds of ``time.monotonic``.

    Attributes:
        n_needs_ocr: pages and images whose text only recognition can read.
    """

    def __init__(
        self,
        collection: Collection,
        embedder: Embedder,
        report: IngestReport,
        *,
        late: Callable[[], LateInteraction | None] | None = None,
        total: int,
        known: int,
        sizes: Mapping[str, int],
        progress: Callable[[Progress], None] | None,
        started: float,
    ) -> None:
        self._collection = collection
        self._embedder = embedder
        self._report = report
        self._late = late
        self._total = total
        self._done = known
        self._sizes = sizes
        self._bytes_to_read = sum(sizes.values())
        self._finished = [0, 0]  # bytes and pages of finished files
        self._progress = progress
        self._started = started
        self._waiting: list[_Waiting] = []
        # Items and not nodes: a node may have three views.
        self._items_waiting = 0
        self._pages_waiting = 0
        self._batch_items = _FIRST_ITEMS
        self._embedding: deque[tuple[list[_Waiting], int, Future[_Embedded]]] = deque()
        self.n_needs_ocr = 0

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(_EMBEDDED_AT_ONCE, thread_name_prefix=THREAD_NAME)
        return self

    def __exit__(self, *error: object) -> None:
        # A batch that runs is waited for: a thread inside torch cannot be left behind at exit.
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, job: Job, event: ReadPage | ReadError | End) -> None:
        """Deal with one event of reading, and store what has been embedded meanwhile."""
        while self._embedding and self._embedding[0][2].done():
            self._store_next()
        match event:
            case ReadPage():
                self._take_page(job, event)
            case ReadError():
                self._fail(job, event)
            case End():
                self._end(job, event.error)

    def flush(self) -> None:
        """Embed and write what waits, and finish the files that are complete by it."""
        self._embed_waiting()
        while self._embedding:
            self._store_next()

    def _embed_waiting(self) -> None:
        """Hand on what waits; store the oldest batch first where too many are under way."""
        batch, pages = self._waiting, self._pages_waiting
        self._waiting, self._items_waiting, self._pages_waiting = [], 0, 0
        if batch:
            self._batch_items = min(2 * self._batch_items, _BATCH_ITEMS)
            # With the caller's context, by which LlamaIndex knows what its events belong to.
            run = contextvars.copy_context().run
            self._embedding.append((batch, pages, self._pool.submit(run, self._embed, batch)))
        while len(self._embedding) > _BATCHES_AHEAD:
            self._store_next()

    def _store_next(self) -> None:
        """Write the oldest batch, once it is embedded, and finish its files."""
        batch, pages, future = self._embedding.popleft()
        embedded = future.result()
        for waiting, view, error in embedded.failures:
            self._fail_view(waiting, view, error)
        self._collection.write(
            [each.node for each in batch], embedded.vectors, [each.terms for each in batch]
        )
        self._report.nodes += len(batch)
        self._report.pages += pages
        for each in batch:
            each.job.waiting -= 1
            discard(each.clip)
        # In order and once each: a batch may hold the ends of several small files.
        for job in dict.fromkeys(each.job for each in batch):
            self._finish_if_read(job)
        self._tell(batch[-1].job)

    def _take_page(self, job: Job, page: ReadPage) -> None:
        for warning in page.warnings:
            log.info("%s, page %s: %s", job.name, page.page, warning)
        job.pages += 1
        job.nodes += len(page.nodes)
        for node in page.nodes:
            # All pages so far tell the language; a first page is often a title.
            job.terms.read(node_text(node))
        self.n_needs_ocr += page.needs_ocr
        # Ids come from the file's hash: what an earlier run stored need not be embedded again.
        stored = self._collection.existing([node.node_id for node in page.nodes])
        missing = [node for node in page.nodes if node.node_id not in stored]
        # Nodes of an earlier run may carry other metadata than the file has now.
        job.tagged = job.tagged and not stored
        for node in missing:
            node.metadata |= job.metadata
        # A page whose nodes are all stored costs nothing, and would embellish the speed.
        self._pages_waiting += bool(missing)
        cut = any(node.metadata.get("kind") == "passage" for node in page.nodes)
        if not any(_is_page(node) for node in missing):
            discard(page.clip)
        for node in missing:
            clip = page.clip if _is_page(node) else None
            views = node_views(node, self._collection.settings.views, self._embedder, cut, clip)
            tokens = self._tokens_of(node, cut)
            terms = job.terms.of(node_text(node))
            self._waiting.append(_Waiting(job, node, views, tokens, terms, clip))
            self._items_waiting += len(views) + (tokens is not None)
            job.waiting += 1
            if self._items_waiting >= self._batch_items:
                self._embed_waiting()

    def _end(self, job: Job, error: Exception | None) -> None:
        if isinstance(error, (ReadError, ContentError, OSError, MemoryError)):
            job.broken = True
            message = f"reading stopped ({error or type(error).__name__})"
            self._fail(job, ReadError(message, file=job.name, retry=True))
        # A server that went away fails the run: every other file would fail as well.
        elif error is not None:
            raise error
        job.read = True
        self._finish_if_read(job)

    def _fail(self, job: Job, error: ReadError) -> None:
        job.errors.append(error)
        self._report.errors.append(error)

    def _finish_if_read(self, job: Job) -> None:
        if not job.read or job.waiting:
            return
        # A damaged page stays damaged; only what another run may read is tried again.
        complete = not any(error.retry for error in job.errors)
        if job.broken or job.pages == 0:
            self._report.failed.append(job.name)
        else:
            self._store_entry(job, complete)
            if complete:
                # After the entry of the new version: until then the old one is found.
                for sha256 in job.stale:
                    self._collection.remove_file(sha256)
                (self._report.replaced if job.stale else self._report.indexed).append(job.name)
            else:
                self._report.incomplete.append(job.name)
        if job.stale and not (complete and job.pages):
            self._report.notes.append(f"{job.name}: its earlier version stays in place.")
        self._done += 1
        self._finished[0] += self._sizes.get(job.sha256, 0)
        self._finished[1] += job.pages
        self._tell(job)

    def _store_entry(self, job: Job, complete: bool) -> None:
        # A run that was cut short may have stored some under the path that the file had then.
        self._collection.rename_nodes(job.sha256, job.name)
        entry = FileEntry(
            file=job.name,
            sha256=job.sha256,
            pages=job.pages,
            nodes=job.nodes,
            # Sorted, so that reading a file twice gives the same entry.
            errors=tuple(sorted(str(error) for error in job.errors)),
            folder=folder_of(job.name),
            complete=complete,
            metadata=job.metadata,
        )
        if not job.tagged:
            self._collection.tag_file(entry, job.metadata)
        self._collection.mark_done(entry)

    def _tokens_of(self, node: BaseNode, cut: bool) -> Content | None:
        """What of a node is embedded token by token."""
        late = self._late() if self._late else None
        if late is None:
            return None
        in_passages = cut and _is_page(node)
        text = node_text(node).strip()
        return token_content(text, node_image(node), late, in_passages=in_passages)

    def _embed(self, batch: Sequence[_Waiting]) -> _Embedded:
        """Vectors of the views and tokens of a batch; runs in a thread and changes nothing."""
        keys = [(row, view) for row, each in enumerate(batch) for view in each.views]
        contents = [batch[row].views[view] for row, view in keys]
        results = encode_each(self._embedder, contents, self._collection.settings.dim)
        embedded = _Embedded([{} for _ in batch], [])
        for (row, view), result in zip(keys, results, strict=True):
            if isinstance(result, ContentError):
                embedded.failures.append((batch[row], view, result))
            else:
                embedded.vectors[row][view] = result
        late = self._late() if self._late else None
        found = encode_tokens(late, [each.tokens for each in batch]) if late else []
        for row, tokens in enumerate(found):
            if isinstance(tokens, ContentError):
                embedded.failures.append((batch[row], TOKENS, tokens))
            else:
                embedded.vectors[row] |= tokens
        return embedded

    def _fail_view(self, waiting: _Waiting, view: str, error: ContentError) -> None:
        job, node = waiting.job, waiting.node
        kind, page = node.metadata.get("kind"), node.metadata.get("page")
        message = f"the {view} view of a {kind} has no vector: {error}"
        self._fail(job, ReadError(message, file=job.name, page=page))

    def tell_optimizing(self) -> None:
        """Say that everything is stored, and that the search indexes are being built."""
        if self._progress is not None:
            self._progress(self._state("", optimizing=True))

    def _tell(self, job: Job) -> None:
        if self._progress is not None:
            self._progress(self._state(job.name))

    def _state(self, file: str, *, optimizing: bool = False) -> Progress:
        size, pages = self._finished
        expected = pages * self._bytes_to_read / size if size else None
        return Progress(
            files_done=self._done,
            files_total=self._total,
            pages=self._report.pages,
            failures=len(self._report.errors),
            file=file,
            seconds=time.monotonic() - self._started,
            pages_left=None if expected is None else max(0, round(expected) - self._report.pages),
            optimizing=optimizing,
        )


def _is_page(node: BaseNode) -> bool:
    return node.metadata.get("kind") == "page"


def encode_each(
    embedder: Embedder, contents: Sequence[Content], dim: int
) -> list[NDArray[np.float32] | ContentError]:
    """One vector for each content, or what is wrong with it."""

    def encode(some: Sequence[Content]) -> list[NDArray[np.float32]]:
        with embedding_events(embedder, some) as done:
            vectors = embedder.encode(some, dim=dim)
            done(vectors.tolist())
        return list(vectors)

    # One bad image must not cost the other 31 items of its batch.
    return each_or_error(encode, contents)


def node_views(
    node: BaseNode,
    views: Sequence[View],
    embedder: Embedder,
    cut: bool = False,
    clip: Clip | None = None,
) -> dict[View, Content]:
    """What is embedded of a node: its image, its text, or both, as far as it has them.

    A node with text gets no ``image`` view from an embedder that prefers text, and a page that
    was cut into passages no ``text`` view from one that prefers passages.

    Args:
        cut: whether the page that the node belongs to was cut into passages.
        clip: what is embedded in place of the image.
    """
    in_passages = cut and _is_page(node)
    text = node_text(node).strip()
    return views_of(text, clip or node_image(node), views, embedder, in_passages=in_passages)


def views_of(
    text: str,
    image: ImageSource | Clip | None,
    views: Sequence[View],
    embedder: Embedder,
    *,
    in_passages: bool = False,
) -> dict[View, Content]:
    """The views of a text and an image; see ``node_views``. in_passages: text is found by parts."""
    possible: dict[View, Content] = {}
    if image is not None and not (text and getattr(embedder, "prefers_text", False)):
        possible["image"] = _content(None, image)
    if text and not (in_passages and getattr(embedder, "prefers_passages", False)):
        possible["text"] = Content(text=text)
    if image is not None and text:
        possible["fused"] = _content(text, image)
    return {
        view: possible[view] for view in views if view in possible and view in embedder.modalities
    }


def _content(text: str | None, seen: ImageSource | Clip) -> Content:
    return Content(text, clip=seen) if isinstance(seen, Clip) else Content(text, seen)
