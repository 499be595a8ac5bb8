"""The collections that a server holds open, and what is asked of them. No HTTP here."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError, MissingCollectionError
from mmrag.index import DEFAULT_EMBEDDER, UniversalIndex
from mmrag.queries import MultimodalQuery
from mmrag.rerankers.base import Scorer
from mmrag.server.address import Address, remove_address, write_address
from mmrag.server.batching import BatchingEmbedder
from mmrag.server.errors import ApiError, no_model, not_found
from mmrag.server.jobs import Job, Writer
from mmrag.server.uploads import clean_incoming
from mmrag.server.watching import Watcher
from mmrag.store.collection import Collection, FileEntry
from mmrag.store.restoring import UPLOADS, beside_images
from mmrag.store.snapshots import Snapshot

if TYPE_CHECKING:
    from llama_index.core.llms import LLM
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import NodeWithScore

    from mmrag.answering.engine import CitedQueryEngine
    from mmrag.answering.response import CitedResponse, CitedStreamingResponse


@dataclass(frozen=True)
class Answering:
    """How questions are answered.

    llm: None quotes the best sentences. postprocessors: rerankers; for each, three times as
        many pages are retrieved. images: whether pages go to the model as images too.
    """

    llm: LLM | None = None
    postprocessors: Sequence[BaseNodePostprocessor] = ()
    images: bool = True

    @property
    def model_name(self) -> str | None:
        """What answers, if a language model does."""
        return None if self.llm is None else self.llm.metadata.model_name


class Library:
    """One collection, open and warm. Its methods may be called from several threads.

    name: what clients call it. uploads: the folder of the files that came through the server.
    folder: of the collection; None for one on a Qdrant server.
    """

    def __init__(
        self,
        name: str,
        index: UniversalIndex,
        uploads: Path,
        answering: Answering,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        self.index = index
        self.uploads = uploads
        self.folder = folder
        # Commands of this machine read it from the folder.
        self.secret = "" if folder is None else secrets.token_urlsafe(32)
        self.answering = answering
        self.writer = Writer(index)
        self._watcher: Watcher | None = None
        clean_incoming(uploads)
        if uploads.is_dir() and any(uploads.iterdir()):
            self.writer.add(uploads)  # what a stop has cut short; finished files cost a hash

    @property
    def collection(self) -> Collection:
        """The open collection."""
        return self.index.collection

    def search(self, query: MultimodalQuery, *, explain: bool = False) -> list[NodeWithScore]:
        """The pages nearest to a query, best first; ``explain`` adds how each was found."""
        return self.index.as_retriever(explain=explain).retrieve(query)

    def ask(
        self, query: MultimodalQuery, history: Sequence[tuple[str, str]] = ()
    ) -> tuple[str, CitedStreamingResponse]:
        """The question as it was searched, and the answer as a stream.

        history: role and text of the messages before. With a language model the question is
        rewritten to stand on its own.
        """
        # A reranker is of use only with more pages to choose from than are shown.
        top_k = (query.top_k or 8) * 3 ** len(self.answering.postprocessors)
        return ask_engine(self._engine(), dataclasses.replace(query, top_k=top_k), history)

    def answer(
        self, query: MultimodalQuery, history: Sequence[tuple[str, str]] = ()
    ) -> tuple[str, CitedResponse]:
        """As ``ask``, with the whole answer."""
        question, stream = self.ask(query, history)
        return question, stream.get_response()

    def files(self) -> list[FileEntry]:
        """The files of the collection, by path."""
        return self.collection.files()

    def file_rows(self) -> list[dict[str, Any]]:
        """The files for JSON. uploaded: removing it deletes it too."""
        return [
            vars(entry)
            | {
                "id": entry.sha256,
                "name": Path(entry.file).name,
                "errors": list(entry.errors),
                "uploaded": self.is_upload(entry),
            }
            for entry in self.files()
        ]

    def file(self, file_id: str) -> FileEntry:
        """One file by the SHA-256 of its content. Raises ApiError 404."""
        entry = next((each for each in self.files() if each.sha256 == file_id), None)
        if entry is None:
            raise not_found(f"The collection {self.name!r} has no file {file_id[:16]}.")
        return entry

    def is_upload(self, entry: FileEntry) -> bool:
        """Whether a file came through the server, which then owns it."""
        return entry.path.is_relative_to(self.uploads.resolve())

    def add(self, path: Path) -> Job:
        """Queue an uploaded file for indexing."""
        return self.writer.add(path, uploaded=True)

    def remove(self, file_id: str) -> FileEntry:
        """Forget a file; an uploaded one is deleted too. Waits for indexing to pause.

        Raises:
            ApiError: 409 while files are being indexed.
        """
        entry = self.file(file_id)
        with self._writing():
            # The file first: one that stayed behind would be indexed again at the next start.
            if self.is_upload(entry):
                entry.path.unlink(missing_ok=True)
            self.collection.remove_file(file_id)
        return entry

    def create_snapshot(self, name: str | None) -> Snapshot:
        """Keep the collection as it is; searches go on meanwhile.

        Raises:
            ApiError: 409 while files are being indexed.
        """
        with self._writing():
            return self.collection.snapshots.create(name)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        # Short, since it holds a thread of the pool; a long run of indexing is reported instead.
        if not self.writer.lock.acquire(timeout=5):
            raise ApiError(
                409,
                "Files are being indexed; try again when they are done.",
                "indexing",
                {"Retry-After": "5"},
            )
        try:
            yield
        finally:
            self.writer.lock.release()

    def watch(self, folders: Sequence[Path]) -> None:
        """Index folders, and their changes as they come.

        Raises:
            ConfigError: If the extra ``watch`` is missing, or something to watch is no folder.
        """
        self._watcher = Watcher(folders, self.writer)

    @property
    def watched(self) -> list[Path]:
        """The folders that are being watched."""
        return self._watcher.folders if self._watcher else []

    def announce(self, url: str) -> None:
        """Let commands on this machine find the server."""
        if self.folder is not None:
            write_address(self.folder, Address(url, self.name, self.secret))

    def close(self) -> None:
        """Stop indexing and release the collection."""
        if self.folder is not None:
            # Before the rest, so that commands stop finding a server that is about to go.
            remove_address(self.folder)
        if self._watcher is not None:
            self._watcher.stop()
        self.writer.stop()
        self.index.close()

    def _engine(self) -> CitedQueryEngine:
        how = self.answering
        return self.index.as_query_engine(
            how.llm, list(how.postprocessors), streaming=True, images=how.images
        )


def ask_engine(
    engine: CitedQueryEngine, query: MultimodalQuery, history: Sequence[tuple[str, str]] = ()
) -> tuple[str, CitedStreamingResponse]:
    """As ``Library.ask``, of an engine that streams."""
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.memory import ChatMemoryBuffer

    from mmrag.answering.chat import CitedChatEngine
    from mmrag.answering.response import CitedStreamingResponse

    question = query.query_str
    if history and engine.llm is not None and question.strip():
        messages = [ChatMessage(role=role, content=text) for role, text in history]
        # The server keeps no conversations; clients send the history along.
        memory = ChatMemoryBuffer.from_defaults(chat_history=messages)
        question = CitedChatEngine(engine, memory=memory).standalone(question)
    response = engine.query(dataclasses.replace(query, query_str=question))
    assert isinstance(response, CitedStreamingResponse)
    return question, response


class Libraries:
    """The collections of a server by name. The first is the default.

    embedders: by name, shared by the collections that use them.
    """

    def __init__(self, libraries: Sequence[Library], embedders: Sequence[BatchingEmbedder]) -> None:
        self._by_name = {library.name: library for library in libraries}
        self.embedders: Mapping[str, BatchingEmbedder] = {e.name: e for e in embedders}

    def __iter__(self) -> Iterator[Library]:
        return iter(self._by_name.values())

    def get(self, name: str | None = None) -> Library:
        """A collection by name. Raises ApiError 404."""
        if name is None:
            return next(iter(self))
        if name not in self._by_name:
            known = ", ".join(self._by_name)
            raise not_found(f"There is no collection {name!r}; this server has {known}.")
        return self._by_name[name]

    def model_names(self) -> list[str]:
        """What clients of OpenAI may ask for: collections, embedders, rerankers."""
        return [*self._by_name, *self.embedders, *self._scorers()]

    def chat_model(self, name: str) -> Library:
        """The collection that chats under a name. Raises ApiError 404."""
        if name not in self._by_name:
            raise no_model(name, self._by_name)
        return self._by_name[name]

    def embedder(self, name: str) -> Embedder:
        """An embedder by name. Raises ApiError 404."""
        if name not in self.embedders:
            raise no_model(name, self.embedders)
        return self.embedders[name]

    def judge(self, name: str | None = None) -> Scorer | Embedder:
        """What reranks: a reranker or embedder by name, else the first. Raises ApiError 404."""
        judges: dict[str, Scorer | Embedder] = {**self._scorers(), **self.embedders}
        # Rerankers come before embedders, which only compare vectors.
        name = name or next(iter(judges))
        if name not in judges:
            raise no_model(name, judges)
        return judges[name]

    def _scorers(self) -> dict[str, Scorer]:
        """The rerankers that are loaded, by name."""
        scorers = (
            getattr(postprocessor, "scorer", None)
            for library in self
            for postprocessor in library.answering.postprocessors
        )
        return {scorer.name: scorer for scorer in scorers if isinstance(scorer, Scorer)}

    def warm_up(self) -> None:
        """Read in the background what searches need of each node."""
        for library in self:
            library.index.warm_up()

    def close(self) -> None:
        """Stop all indexing and release the collections."""
        for library in self:
            library.close()
        for embedder in self.embedders.values():
            embedder.close()


def open_libraries(
    locations: Sequence[str],
    *,
    embedder: str | None = None,
    answering: Answering | None = None,
    batch_ms: float = 2.0,
    api_key: str | None = None,
    observe_batch: Callable[[int], None] | None = None,
) -> Libraries:
    """Open collections, and load each of their embedders once.

    A collection that is not there is made, empty, for ``embedder`` (default: mmrag-nano).

    Args:
        locations: folders, or URLs of Qdrant servers; ``NAME=LOCATION`` gives it that name.
        api_key: of the Qdrant servers.
        observe_batch: is told the size of each batch of queries.

    Raises:
        ConfigError: For two collections of one name; what opening and loading raise.
    """
    from mmrag.embedders import load_embedder

    embedders: dict[str, BatchingEmbedder] = {}
    libraries: list[Library] = []
    try:
        for name, location in _named_locations(locations):
            wanted = embedder or _stored_embedder(location, name, api_key) or DEFAULT_EMBEDDER
            if wanted not in embedders:
                loaded = load_embedder(wanted)
                embedders[wanted] = BatchingEmbedder(loaded, batch_ms / 1000, observe=observe_batch)
                # The first call allocates and compiles; no user should wait for it.
                embedders[wanted].encode(["warm"], "page_for_question")
            index = UniversalIndex(location, embedders[wanted], name=name, api_key=api_key)
            try:
                index.add([])  # makes a collection that is not there
                # Beside the page images, which have a folder even where Qdrant runs elsewhere.
                uploads = beside_images(index.collection.images_dir, UPLOADS)
            except BaseException:
                index.close()
                raise
            folder = None if "://" in location else Path(location).expanduser().absolute()
            libraries.append(Library(name, index, uploads, answering or Answering(), folder))
    except BaseException:
        Libraries(libraries, list(embedders.values())).close()
        raise
    return Libraries(libraries, list(embedders.values()))


def _named_locations(locations: Sequence[str]) -> list[tuple[str, str]]:
    """Name and place of each collection: the name given, or the folder's.

    On a Qdrant server it is the name of the collection there, ``mmrag`` unless given.
    """
    found: list[tuple[str, str]] = []
    for location in locations:
        name, equals, place = location.partition("=")
        # An address may hold = in its query, and a folder may have one in its name.
        if not equals or not name or "/" in name:
            name, place = "", location
        if not name:
            name = "mmrag" if "://" in place else Path(place).expanduser().resolve().name
        if name in dict(found):
            raise ConfigError(f"Two collections are called {name!r}: give them as NAME=FOLDER.")
        found.append((name, place))
    return found


def _stored_embedder(location: str, name: str, api_key: str | None) -> str | None:
    """The embedder that built a collection, if there is one."""
    try:
        # Opened twice: the index needs the embedder before it opens the collection itself.
        with Collection.open(location, name=name, api_key=api_key) as collection:
            return collection.settings.embedder
    except MissingCollectionError:
        return None
