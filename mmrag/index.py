"""UniversalIndex: one object for indexing files, finding pages, and answering."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from typing_extensions import Unpack

from mmrag.embedders.base import Embedder, check_dim
from mmrag.errors import CollectionError, ConfigError, MissingCollectionError
from mmrag.ingest.late import as_late, late_settings, load_late
from mmrag.ingest.metadata import FileMetadata
from mmrag.ingest.progress import IngestReport, Progress, shown_progress
from mmrag.ingest.run import check_clips, ingest, prune_folders, reading_settings
from mmrag.ingest.unloaded import Unloaded
from mmrag.queries import Where
from mmrag.reading import ReadOptions, file_sha256
from mmrag.store.collection import Collection
from mmrag.store.damage import Examination
from mmrag.store.engine import Quantization
from mmrag.store.entries import FileEntry
from mmrag.store.matching import matching_paths
from mmrag.store.settings import CollectionSettings, View, lasting_name, refuse_other

if TYPE_CHECKING:
    from llama_index.core.chat_engine.types import ChatMode
    from llama_index.core.llms import LLM
    from llama_index.core.memory import BaseMemory
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, Document
    from llama_index.core.vector_stores.types import MetadataFilters
    from qdrant_client import QdrantClient

    from mmrag.answering.chat import CitedChatEngine
    from mmrag.answering.engine import CitedQueryEngine, EngineOptions
    from mmrag.embedders.late import LateInteraction, TokenEmbedder
    from mmrag.embedding import UniversalEmbedding
    from mmrag.retrieval.retriever import RetrieverOptions, UniversalRetriever

log = logging.getLogger(__name__)

DEFAULT_EMBEDDER = "mmrag-nano"
DEFAULT_LOCATION = "./mmrag-library"


class UniversalIndex:
    """A library of files in one collection, in a folder or on a Qdrant server.

    The collection is made by the first ``add``. One that exists is opened as it was built:
    what is left out here is taken from it, and what contradicts it is refused.

    Args:
        location: a folder, the URL of a Qdrant server, or a ``QdrantClient``.
        embed_model: a ``UniversalEmbedding``, an ``Embedder``, or a name for ``load_embedder``;
            default: the one that built the collection, else ``mmrag-nano``.
        device: for an embedder that is loaded by name, as in ``load_embedder``.
        name: of the collection on a server.
        api_key: of the server.
        images_dir: where page images are kept, if not in the folder.
        reading: how files are read.
        views: which vectors nodes get; default: image and text, as far as the embedder can.
        dim: length of the stored vectors, for embedders that can be cut (Matryoshka).
        late: a model with a vector for each token, by which the pages found first are compared
            again: its name or folder, a ``TokenEmbedder``, or a ``LateInteraction`` that says how
            its vectors are kept. Default: as the collection was built, without if it is new.
        language: stemming for BM25; default: detected for each document; ``"none"`` for none.
        quantization: ``"int8"`` or ``"binary"`` codes for the first pass of a search, a quarter or
            a thirty-second of the memory; default: none. See docs/collection.md.

    Raises:
        CollectionError: For a collection that is locked or was built otherwise.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("well.txt").write_text("The well is nine metres deep.")
        >>> with UniversalIndex("library") as index:
        ...     report = index.add("well.txt")
        ...     hits = index.as_retriever(similarity_top_k=1).retrieve("How deep is the well?")
        >>> hits[0].text
        'The well is nine metres deep.'
    """

    def __init__(
        self,
        location: str | Path | QdrantClient = DEFAULT_LOCATION,
        embed_model: UniversalEmbedding | Embedder | str | Path | None = None,
        *,
        device: str = "auto",
        name: str = "mmrag",
        api_key: str | None = None,
        images_dir: str | Path | None = None,
        reading: ReadOptions | None = None,
        views: Sequence[View] | None = None,
        dim: int | None = None,
        late: LateInteraction | TokenEmbedder | str | Path | None = None,
        language: str | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        self._where: dict[str, Any] = {
            "location": location,
            "name": name,
            "api_key": api_key,
            "images_dir": images_dir,
        }
        self._reading, self._device = reading, device
        self._embedder = None if embed_model is None else _as_embedder(embed_model, device)
        # A UniversalEmbedding may have been told to cut its vectors; an Embedder has no such field.
        own_dim = getattr(embed_model, "dim", None)
        is_model = isinstance(embed_model, (str, Path, Embedder))
        self._late = None if late is None else as_late(late)
        given: dict[str, Any] = {
            "views": tuple(views) if views else None,
            "dim": dim or (None if is_model else own_dim),
            "language": language,
            "late": None if self._late is None else late_settings(self._late),
            "quantization": quantization,
            "reading": reading_settings(reading) if reading else None,
        }
        self._given: dict[str, Any] = {
            key: value for key, value in given.items() if value is not None
        }
        self._collection: Collection | None = None
        with contextlib.suppress(MissingCollectionError):  # the first ``add`` makes it
            self._collection = self._open_checked()

    @property
    def collection(self) -> Collection:
        """The collection. Raises MissingCollectionError before anything was added."""
        if self._collection is None:
            # Another process may have made it in the meantime; otherwise this says what is missing.
            self._collection = self._open_checked()
        return self._collection

    @property
    def embedder(self) -> Embedder:
        """The embedder, loaded when it is first needed.

        Raises:
            CollectionError: If its weights have changed since the collection was built, or if the
                collection names a model inside of itself.
            ModelError: If it names one that is not on this machine.
        """
        if self._embedder is None and self._collection is None:
            self._embedder = _as_embedder(DEFAULT_EMBEDDER, self._device)
        elif self._embedder is None and self._collection is not None:
            embedder = _load_stored(self._collection, self._device)
            stored = self._collection.settings
            refuse_other(stored, _identified(stored, embedder), "The collection")
            self._embedder = embedder
        assert self._embedder is not None
        return self._embedder

    @property
    def late(self) -> LateInteraction | None:
        """What makes the tokens of pages, loaded when it is first needed; None for none.

        Raises:
            CollectionError: If its weights have changed since the collection was built, or if the
                collection names a model inside of itself.
            ModelError: If it names one that is not on this machine.
        """
        # Without a collection there is nothing that could name a model.
        if self._late is None and self._collection is not None:
            settings = self._collection.settings
            if settings.late is not None:
                # Before loading: reading a checkpoint that somebody else chose is what this
                # prevents.
                _check_path(settings.late.embedder, self._collection, "late= or --late")
                late = load_late(settings.late)
                found = dataclasses.replace(settings, late=late_settings(late))
                refuse_other(settings, found, "The collection")
                self._late = late
        return self._late

    def add(
        self,
        paths: str | Path | Sequence[str | Path],
        *,
        progress: bool | Callable[[Progress], None] = False,
        prune: bool = False,
        workers: int | None = None,
        metadata: FileMetadata | None = None,
        describe: LLM | None = None,
    ) -> IngestReport:
        """Index files, folders and URLs; see ``mmrag.ingest.run.ingest``.

        progress: True shows a bar on stderr; a function is called with each Progress.
        metadata: of the files, to filter by: a dict for all of them, or a function of the path.
        describe: a model that takes images, to describe figures, image files and pages without
            words; see docs/reading.md. The report has its cost as ``descriptions``.
        """
        # A str is a sequence too, and would be taken letter by letter.
        many = [paths] if isinstance(paths, (str, Path)) else list(paths)
        if self._collection is not None and self._embedder is None:
            # As it built the collection, and not loaded yet: unchanged files need no model.
            stand_in = Unloaded(self._collection.settings, lambda: self.embedder)
            embedder = cast(Embedder, stand_in)
        else:
            embedder = self.embedder
        collection = self._made()
        with shown_progress(progress) as show:
            report = ingest(
                many,
                collection,
                embedder,
                # A function: a run that finds nothing new does not load the model.
                late=lambda: self.late,
                options=self._reading,
                progress=show,
                prune=prune,
                workers=workers,
                metadata=metadata,
            )
        if describe is not None:
            from mmrag.ingest.describe import describe_files

            done = (report.indexed, report.replaced, report.incomplete, report.unchanged)
            names = [*(name for each in done for name in each), *report.moved]
            describe_files(names, collection, embedder, describe, report, lambda: self.late)
        return report

    def insert_nodes(self, nodes: Sequence[BaseNode]) -> None:
        """Insert nodes of your own: TextNode, ImageNode, Node with text, image or both.

        They are searched and cited as pages are, and ``files`` lists their documents. A node's
        document is its ``ref_doc_id``, else what its metadata names (``file``, ``file_path``,
        ``file_name``, ``title``, ``url`` or ``source``). A node that is stored already is skipped
        if nothing in it has changed, else replaced. Each view is embedded here; a vector that a
        node brings along is not used. Images are copied into the collection.

        Raises:
            ContentError: For nodes that cannot be embedded or stored; all others are stored.
        """
        # Heavy imports stay inside of the methods that need them: opening a collection is fast.
        from mmrag.ingest.insert import insert_nodes

        insert_nodes(nodes, self._made(), self.embedder, late=self.late)

    async def ainsert_nodes(self, nodes: Sequence[BaseNode]) -> None:
        """As ``insert_nodes``, off the event loop."""
        await asyncio.to_thread(self.insert_nodes, nodes)

    def insert(self, document: Document) -> None:
        """Insert a document, split by ``Settings.transformations``; one with an image is not split.

        An earlier version of the document, by its id, is replaced.

        Raises:
            ContentError: If it cannot be embedded or stored; an earlier version stays.
        """
        self.refresh_ref_docs([document])

    async def ainsert(self, document: Document) -> None:
        """As ``insert``, off the event loop."""
        await asyncio.to_thread(self.insert, document)

    def update_ref_doc(self, document: Document) -> None:
        """The same as ``insert``."""
        self.insert(document)

    async def aupdate_ref_doc(self, document: Document) -> None:
        """As ``update_ref_doc``, off the event loop."""
        await self.ainsert(document)

    def refresh_ref_docs(self, documents: Sequence[Document], **_update_kwargs: Any) -> list[bool]:
        """Insert documents that are new or have changed, in text, metadata or image.

        Args:
            _update_kwargs: LlamaIndex's, for its stores; nothing depends on them here.

        Returns:
            For each document, whether it was inserted.

        Raises:
            ContentError: As ``insert``; the documents before it are inserted.
        """
        from mmrag.ingest.insert import insert_document

        collection, embedder = self._made(), self.embedder
        return [
            insert_document(document, collection, embedder, self.late) for document in documents
        ]

    async def arefresh_ref_docs(
        self, documents: Sequence[Document], **_update_kwargs: Any
    ) -> list[bool]:
        """As ``refresh_ref_docs``, off the event loop."""
        return await asyncio.to_thread(self.refresh_ref_docs, documents)

    def delete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False) -> None:
        """Delete a document and its nodes, also a file that was read, by a node's ``ref_doc_id``.

        Args:
            delete_from_docstore: LlamaIndex's; the collection is the only store here.
        """
        # Part of LlamaIndex's signature, by which callers pass it.
        del delete_from_docstore
        if not self.collection.remove_document(ref_doc_id):
            log.warning("ref_doc_id %s not found, nothing deleted.", ref_doc_id)

    async def adelete_ref_doc(self, ref_doc_id: str, delete_from_docstore: bool = False) -> None:
        """As ``delete_ref_doc``, off the event loop."""
        await asyncio.to_thread(self.delete_ref_doc, ref_doc_id, delete_from_docstore)

    def delete_nodes(self, node_ids: list[str]) -> None:
        """Delete inserted nodes by id; nodes of files that were read go with their file only."""
        self.collection.inserted.remove_nodes(node_ids)

    async def adelete_nodes(self, node_ids: list[str]) -> None:
        """As ``delete_nodes``, off the event loop."""
        await asyncio.to_thread(self.delete_nodes, node_ids)

    def remove(self, *patterns: str) -> list[str]:
        """Forget files by path, name or glob pattern; returns the paths that went."""
        paths = matching_paths(patterns, self.collection.paths())
        for path in paths:
            self.collection.remove_file(path)
        return paths

    def prune(self, *folders: str | Path) -> list[str]:
        """Forget the files that are gone from the folders; returns their paths and URLs."""
        return prune_folders(folders, self.collection)

    def repair(self, found: Examination) -> int:
        """Read and embed again what damage to the collection's files has cost.

        A file is read again if its content is that which was indexed. The working directory is
        the one in which a file was indexed for as long as it is read.

        found: what ``collection.examine()`` found.

        Returns:
            How many points are gone still, of files that nothing is left of: index them again.
        """
        # First: a damaged point that is still there would count as stored, and not be embedded
        # again.
        self.collection.clear_damage(found)
        n_points = self.collection.count_points()
        # Paths are stored as they were given, some relative: each group is read from its own
        # folder.
        by_folder: dict[str, list[Path]] = defaultdict(list)
        for entry in dict.fromkeys((*found.lost, *found.misplaced, *found.unfinished)):
            # A collection that somebody else made may name files that were never in it.
            if entry.path.is_file() and file_sha256(entry.path) == entry.sha256:
                by_folder[entry.folder].append(Path(entry.file))
        for folder, files in by_folder.items():
            with contextlib.chdir(folder or Path.cwd()):
                self.add(files)
        n_cleared = len(found.altered) - len(found.as_written)
        # What was cleared comes back as well and makes up for nothing that was missing.
        n_restored = self.collection.count_points() - n_points - n_cleared
        return max(0, found.missing - n_restored)

    def convert(
        self,
        location: str | Path | QdrantClient,
        *,
        name: str = "mmrag",
        api_key: str | None = None,
        images_dir: str | Path | None = None,
        dim: int | None = None,
        quantization: Quantization | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Copy all to a new collection, between folder and server, or with other vectors.

        Nothing is read or embedded again. A conversion cut short is continued by the same call.

        Args:
            location: of the new collection; ``name``, ``api_key`` and ``images_dir`` as for the
                class.
            dim: leading dimensions to keep, scaled to length 1; default: all.
            quantization: default: as it is here.
            progress: called with the number of points that are done, and of all.

        Returns:
            How many points were copied.

        Raises:
            ConfigError: For a ``dim`` that the embedder was not trained for.
            CollectionError: If something else is at the new location.
        """
        stored = self.collection.settings
        if dim is not None:
            # Only here, since it loads the model: any other conversion does without one.
            trained = getattr(self.embedder, "matryoshka_dims", ())
            dim = check_dim(dim, stored.dim, trained)
        settings = dataclasses.replace(
            stored, dim=dim or stored.dim, quantization=quantization or stored.quantization
        )
        with Collection.open(
            location, settings=settings, name=name, api_key=api_key, images_dir=images_dir
        ) as target:
            return self.collection.copy_to(target, progress)

    def files(self) -> list[FileEntry]:
        """The indexed files, ordered by path."""
        return self.collection.files()

    def warm_up(self) -> None:
        """Load the embedder, and read in the background what searches need of each node.

        For a process that answers many questions, whose first would read from disk; call it again
        after much was added. It takes 20 µs of CPU and half a kilobyte a node, of at most 250,000,
        and ends with ``close``. It does not start by itself: a program that asks once would lose.

        Raises:
            MissingCollectionError: If there is no collection.
            CollectionError, ModelError: If the embedder cannot be loaded; see ``embedder``.
        """
        from mmrag.retrieval.fusion import PAGE_FIELDS

        self.collection.read_ahead(PAGE_FIELDS)
        _ = self.embedder

    def as_retriever(self, **options: Unpack[RetrieverOptions]) -> UniversalRetriever:
        """A LlamaIndex retriever; ``options`` are those of ``UniversalRetriever``.

        Raises:
            MissingCollectionError: If there is no collection, or nothing in it.
        """
        from mmrag.retrieval.retriever import UniversalRetriever

        # An empty collection would answer every question with "not found".
        if self.collection.count() == 0:
            raise MissingCollectionError("This collection is empty; index something into it first.")
        return UniversalRetriever(self.collection, self.embedder, late=self.late, **options)

    def as_chat_engine(
        self,
        chat_mode: ChatMode | str = "best",
        llm: LLM | None = None,
        *,
        memory: BaseMemory | None = None,
        similarity_top_k: int = 8,
        where: Where | None = None,
        filters: MetadataFilters | None = None,
        **options: Unpack[EngineOptions],
    ) -> CitedChatEngine:
        """A conversation whose every answer cites its pages.

        Args:
            chat_mode: ``best`` or ``condense_question``: a follow-up question is rewritten to
                stand on its own. Other modes do without the retriever, or without citations; use
                LlamaIndex's chat engines over ``as_retriever()`` for them.
            llm: default: ``Settings.llm``, if it was set.
            memory: default: one that takes a quarter of the context window.
            options: those of ``CitedQueryEngine``.

        Raises:
            ConfigError: Without a language model, and for another mode.
        """
        from mmrag.answering.chat import CitedChatEngine

        # LlamaIndex's "best" is an agent or a context chat; ours is the one whose answers are
        # checked.
        if chat_mode not in ("best", "condense_question"):
            raise ConfigError(
                f"chat_mode={chat_mode!r} is not one of ours: use best, or one of LlamaIndex's "
                "chat engines, such as ContextChatEngine.from_defaults(retriever)."
            )
        engine = self.as_query_engine(
            llm, similarity_top_k=similarity_top_k, where=where, filters=filters, **options
        )
        return CitedChatEngine(engine, memory=memory)

    def as_query_engine(
        self,
        llm: LLM | None = None,
        node_postprocessors: Sequence[BaseNodePostprocessor] = (),
        *,
        streaming: bool = False,
        similarity_top_k: int = 8,
        where: Where | None = None,
        filters: MetadataFilters | None = None,
        **options: Unpack[EngineOptions],
    ) -> CitedQueryEngine:
        """An engine whose answers cite their pages.

        Args:
            llm: default: ``Settings.llm``, if it was set; otherwise passages are quoted. (A
                ``CitedQueryEngine`` without one quotes passages whatever the settings.)
            options: those of ``CitedQueryEngine``.
        """
        from llama_index.core import Settings

        from mmrag.answering.engine import CitedQueryEngine

        # Not Settings.llm: reading that would make a client of a service that costs money.
        if llm is None and Settings._llm is not None:
            llm = Settings._llm
            log.info("Answers come from Settings.llm, %s.", llm.metadata.model_name)

        retriever = self.as_retriever(
            similarity_top_k=similarity_top_k, where=where, filters=filters
        )
        return CitedQueryEngine(
            retriever, llm, list(node_postprocessors), streaming=streaming, **options
        )

    def close(self) -> None:
        """Release the folder or the connection."""
        if self._collection is not None:
            self._collection.close()

    def __enter__(self) -> UniversalIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _made(self) -> Collection:
        """The collection, made if there is none yet."""
        if self._collection is None:
            settings = self._settings(self.embedder)
            self._collection = Collection.open(**self._where, settings=settings)
        return self._collection

    def _open_checked(self) -> Collection:
        """The collection as it was built. Raises CollectionError for what contradicts it."""
        collection = Collection.open(**self._where)
        wanted = dataclasses.replace(collection.settings, **self._given)
        if self._embedder is not None:
            wanted = _identified(wanted, self._embedder)
        try:
            refuse_other(collection.settings, wanted, "The collection")
        except BaseException:
            # Otherwise the folder stays locked after the error.
            collection.close()
            raise
        return collection

    def _settings(self, embedder: Embedder) -> CollectionSettings:
        views: tuple[View, ...] = ("image", "text")
        check_clips(self._reading or ReadOptions(), embedder)  # before anything is made
        default: dict[str, Any] = {
            "dim": embedder.dim,
            "views": tuple(view for view in views if view in embedder.modalities),
            "reading": reading_settings(self._reading or ReadOptions()),
        }
        # A relative path would name another model in another working directory.
        name = lasting_name(embedder.name)
        return CollectionSettings(name, embedder.fingerprint, **(default | self._given))


def _identified(settings: CollectionSettings, embedder: Embedder) -> CollectionSettings:
    """The settings as if ``embedder`` had built them."""
    return dataclasses.replace(settings, embedder=embedder.name, fingerprint=embedder.fingerprint)


def _load_stored(collection: Collection, device: str) -> Embedder:
    """The embedder that a collection names, which may have come from somebody else.

    It is not loaded from a path that came with the collection, and nothing is downloaded for it.
    """
    from mmrag.embedders import load_embedder
    from mmrag.embedders.nano_text import open_question_embedder

    name, fingerprint = collection.settings.embedder, collection.settings.fingerprint
    _check_path(name, collection, "embed_model= or --embedder")
    load = partial(load_embedder, name, device=device, download=False)
    return open_question_embedder(name, fingerprint, load) or load()


def _check_path(name: str, collection: Collection, options: str) -> None:
    """Refuse a folder that came with a collection. options: those that would take it."""
    path = Path(name)
    inside = collection.folder and path.resolve().is_relative_to(collection.folder.resolve())
    if path.is_dir() and (inside or not path.is_absolute()):
        raise CollectionError(
            f"The collection names the model {name!r}, a folder that came with it or depends on "
            f"the working directory. If you trust that model, pass it: {options}."
        )


def _as_embedder(embed_model: UniversalEmbedding | Embedder | str | Path, device: str) -> Embedder:
    if isinstance(embed_model, (str, Path)):
        from mmrag.embedders import load_embedder

        return load_embedder(embed_model, device=device)
    if device != "auto":
        raise ConfigError("device= is for an embedder that is given by name.")
    if isinstance(embed_model, Embedder):
        return embed_model
    # By attribute: any embed model that wraps an Embedder of ours will do.
    embedder = getattr(embed_model, "embedder", None)
    if not isinstance(embedder, Embedder):
        raise ConfigError(
            f"embed_model is a {type(embed_model).__name__}; give a UniversalEmbedding, an "
            "Embedder, or the name of one."
        )
    return embedder
