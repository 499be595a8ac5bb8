"""The one collection: what its points mean, and how it remembers what built it.

A collection holds nodes (one point each, one named vector per view), one point per finished
file, and one point with the settings that built it. No second database exists that could
disagree: a file is finished exactly when its own point is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid5

import numpy as np
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.utils import metadata_dict_to_node
from numpy.typing import NDArray

from mmrag.errors import CollectionError, ConfigError
from mmrag.queries import Where
from mmrag.store.convert import Change, Copying, check_target, cut_to
from mmrag.store.damage import Examination, examine
from mmrag.store.engine import (
    LANGUAGE_FIELD,
    TERMS_FIELD,
    TOKENS,
    AnyOf,
    Engine,
    Fields,
    Filter,
    Nearest,
    Point,
    Scored,
    Words,
    in_batches,
)
from mmrag.store.entries import FileEntry, folder_of, only_files, with_metadata
from mmrag.store.images import image_paths
from mmrag.store.inserted import InsertedNodes, Insertion, point_id, with_image_file
from mmrag.store.location import Location
from mmrag.store.making import (
    NAMESPACE,
    SCHEMA_VERSION,
    agree,
    schema_of,
    settings_point,
    store_settings,
)
from mmrag.store.matching import as_filter, matching_paths
from mmrag.store.payloads import (
    at_path,
    node_payload,
    own_terms,
    payload_node,
    with_stored_images,
)
from mmrag.store.read_ahead import ReadAhead
from mmrag.store.settings import CollectionSettings, View
from mmrag.store.snapshots import Snapshots
from mmrag.store.terms import AUTO_LANGUAGE, NodeTerms, has_terms, query_terms
from mmrag.store.upgrade import rebuild_terms
from mmrag.store.vectors import check_vector, checked_vectors, nearest

if TYPE_CHECKING:
    from llama_index.vector_stores.qdrant import QdrantVectorStore
    from qdrant_client import QdrantClient

__all__ = ["Collection", "CollectionSettings", "FileEntry"]

_BOOKKEEPING = AnyOf("kind", ("file", "settings"))
_FILES = Filter(must=(AnyOf("kind", ("file",)),))
_NODES = Filter(must_not=(_BOOKKEEPING,))


class Collection:
    """Nodes with their vectors, in a folder (qdrant-edge) or on a Qdrant server.

    Made by ``Collection.open``; a context manager that closes itself.

    Examples:
        >>> import tempfile
        >>> settings = CollectionSettings("my-model", fingerprint="1", dim=4)
        >>> with Collection.open(tempfile.mkdtemp(), settings=settings) as collection:
        ...     collection.count()
        0
    """

    def __init__(self, engine: Engine, settings: CollectionSettings, location: Location) -> None:
        self._engine = engine
        engine.quantization = settings.quantization
        self._location = location
        self._ahead = ReadAhead()
        self._images = location.images
        self.settings = settings
        self.images_dir = location.images.path
        self.inserted = InsertedNodes(engine, self._images)
        self.snapshots = Snapshots(location, engine)

    @classmethod
    def open(
        cls,
        location: str | Path | QdrantClient,
        *,
        settings: CollectionSettings | None = None,
        name: str = "mmrag",
        api_key: str | None = None,
        images_dir: str | Path | None = None,
    ) -> Collection:
        """Open a collection, or create it when ``settings`` are given and it is not there.

        Args:
            location: a folder, the URL of a Qdrant server, or a client of one.
            settings: what it must have been built with; None takes what is there.
            name: of the collection on a server.
            api_key: for the server.
            images_dir: where page images are kept; default: in the folder, or for a server
                ``mmrag-images/<name>`` in the working directory.

        Raises:
            MissingCollectionError: If it is not there.
            CollectionError: If it is locked, built with other settings or by a newer mmrag.
            EndpointError: If the server cannot be reached.
        """
        where = Location.of(location, name, api_key, images_dir)
        try:
            engine = where.open_engine(schema_of(settings) if settings else None)
            try:
                stored = agree(engine, settings, where)
                where.images.make(given=where.images_given)
            except BaseException:
                engine.close()
                raise
        except OSError as error:
            raise CollectionError(
                f"{where} cannot be used ({error}); give a folder that can be written."
            ) from error
        return cls(engine, stored, where)

    @property
    def folder(self) -> Path | None:
        """The folder of an embedded collection; None on a server."""
        return self._location.folder

    @classmethod
    def upgrade(
        cls,
        location: str | Path | QdrantClient,
        *,
        name: str = "mmrag",
        api_key: str | None = None,
        images_dir: str | Path | None = None,
    ) -> int:
        """Bring a collection that an older mmrag built up to date, keeping its vectors.

        Returns:
            How many nodes were rewritten; 0 where nothing was to be done.

        Raises what ``open`` raises.
        """
        where = Location.of(location, name, api_key, images_dir)
        engine = where.open_engine(None)
        try:
            point = settings_point(engine, where)
            if point is None or point.payload["schema"] >= SCHEMA_VERSION:
                return 0
            settings = dict(point.payload["settings"])
            if settings["language"] == "english":  # what schema 1 had unless told otherwise
                settings["language"] = AUTO_LANGUAGE
            upgraded = CollectionSettings.from_json(settings)
            engine.drop_index("text")  # schema 1 ranked by it
            engine.create_indexes(schema_of(upgraded))
            n_nodes = rebuild_terms(engine, upgraded.language)
            engine.optimize(schema_of(upgraded))
            engine.upsert(list(engine.scroll(_FILES)))  # for their checksums
            store_settings(engine, upgraded)
            return n_nodes
        finally:
            engine.close()

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the rankings that were fitted for this collection; empty if none were."""
        point = settings_point(self._engine, self._location)
        return dict(point.payload.get("weights", {})) if point else {}

    def save_weights(self, weights: Mapping[str, float]) -> None:
        """Keep the weights of the rankings with the collection; empty ones forget them."""
        store_settings(self._engine, self.settings, weights)

    def write(
        self,
        nodes: Sequence[BaseNode],
        vectors: Sequence[Mapping[str, Any]],
        terms: Sequence[NodeTerms] | None = None,
    ) -> None:
        """Store nodes, each with the vectors of the views it has; equal ids are replaced.

        Images from outside of ``images_dir`` are copied into it.

        vectors: for each node, view to (dim,) float32, ``tokens`` to (n, dim); may be empty.
        terms: what BM25 finds each node by; None makes them from its text and file name alone.

        Raises:
            ConfigError: For vectors that do not fit.
        """
        if terms is None:
            terms = [own_terms(node, self.settings.language) for node in nodes]
        points = [
            Point(
                node.node_id,
                node_payload(node, of_text, self._images),
                checked_vectors(self.settings, node.node_id, of_node),
            )
            for node, of_node, of_text in zip(nodes, vectors, terms, strict=True)
        ]
        if points:
            self._engine.upsert(points)

    def insert(
        self,
        nodes: Sequence[Insertion],
        vectors: Sequence[Mapping[str, Any]],
        terms: Sequence[NodeTerms],
        files: Mapping[str, str],
    ) -> None:
        """Store nodes of an application; equal ids are replaced. Images are copied in here.

        vectors, terms: as for ``write``. files: document id to the name of the document.

        Raises:
            ConfigError: For vectors that do not fit.
        """
        points: list[Point] = []
        images: set[Path] = set()
        for each, of_node, of_text in zip(nodes, vectors, terms, strict=True):
            copy = with_image_file(each.node.model_copy(deep=True), self._images)
            stored = with_stored_images(copy, self._images)
            images |= image_paths(stored)
            payload = each.payload(stored, files[each.doc_id])
            payload |= of_text.to_payload() if has_terms(payload) else {}
            vectors_of = checked_vectors(self.settings, stored.node_id, of_node)
            points.append(Point(point_id(stored.node_id), payload, vectors_of))
        if points:
            self.inserted.drop_images([each.node.node_id for each in nodes], images)
            self._engine.upsert(points)

    def mark_done(self, file: FileEntry) -> None:
        """Write the file's own point: all of its nodes are stored."""
        # An id made of the hash: storing the entry again replaces it.
        id_ = str(uuid5(NAMESPACE, f"file/{file.sha256}"))
        self._engine.upsert([Point(id_, file.to_payload())])

    def files(self) -> list[FileEntry]:
        """The finished files, and the documents that were inserted, ordered by path."""
        # Entries have no vectors; one that comes with some is damaged, which the checksum tells.
        points = self._engine.scroll(_FILES, vectors=True)
        # A damaged entry is none: its file counts as unfinished, and is read again.
        entries = [FileEntry.from_payload(p.payload) for p in points if self._engine.is_intact(p)]
        return sorted(entries, key=lambda entry: (entry.file, entry.sha256))

    def read_files(self) -> list[FileEntry]:
        """The files alone, which can be read again."""
        return only_files(self.files())

    def paths(self) -> list[str]:
        """Every path that has points here, of unfinished files too."""
        return sorted(self._engine.facet("file"))

    def existing(self, ids: Sequence[str]) -> set[str]:
        """Those of the node ids that are stored."""
        return {point.id for point in self._engine.retrieve(ids, payload=False)}

    def file_nodes(self, sha256: str, page: int | None = None) -> Iterator[BaseNode]:
        """The nodes of a file's content, of one page where that is given."""
        same = _with_hash(sha256)
        if page is not None:
            same = dataclasses.replace(same, must=(*same.must, AnyOf("page", (page,))))
        return (self.node(point.payload) for point in self._engine.scroll(same))

    def unfinished(self, entries: Iterable[FileEntry] | None = None) -> dict[str, str]:
        """Hash to path of the files that have nodes here but are not finished.

        entries: what ``files`` gives, where it is known.
        """
        done = {entry.sha256 for entry in (self.files() if entries is None else entries)}
        return {
            sha256: str(next(self._engine.scroll(_with_hash(sha256))).payload["file"])
            for sha256 in self._engine.facet("sha256")
            if sha256 not in done
        }

    def damaged(self, entries: Sequence[FileEntry]) -> list[FileEntry]:
        """Those of the files of which fewer nodes are here than were stored, by their number."""
        # A file's own point counts among those with its hash.
        stored = self._engine.facet("sha256")
        return [entry for entry in entries if stored.get(entry.sha256, 0) - 1 < entry.nodes]

    def examine(self) -> Examination:
        """Read every point, and say which are not as they were written."""
        return examine(self._engine, schema_of(self.settings))

    def clear_damage(self, found: Examination) -> None:
        """Delete the points that ``examine`` found altered, and make wrong indexes anew.

        Files that lose nodes by it are read again by the next run of indexing.
        """
        self._engine.delete_ids(found.altered)
        # Deleted with the others, and stored again without the vectors that only damage can have
        # given them.
        self._engine.upsert(found.as_written)
        for entry in found.misplaced:
            same = _with_hash(entry.sha256)
            at_its_path = AnyOf("file", (entry.file,))
            self._engine.delete(dataclasses.replace(same, must_not=(*same.must_not, at_its_path)))
        if found.indexes:
            for key in found.indexes:
                self._engine.drop_index(key)
            self._engine.create_indexes(schema_of(self.settings))
        # Otherwise the points that were deleted would be reported as missing for good.
        self._engine.settle()

    def remove_file(self, sha256_or_path: str) -> int:
        """Delete a file's points and page images; returns how many nodes went."""
        of_documents = [
            self.inserted.remove(entry.doc_id)
            for entry in self.files()
            if entry.doc_id and sha256_or_path in (entry.file, entry.sha256)
        ]
        by_path = self._remove(AnyOf("file", (sha256_or_path,)))
        return sum(of_documents) + by_path + self._remove(AnyOf("sha256", (sha256_or_path,)))

    def remove_document(self, ref_doc_id: str) -> int:
        """Delete what came from a document, by LlamaIndex's ``ref_doc_id``.

        That of a file that was read is the ``ref_doc_id`` of any node of it.

        Returns:
            How many nodes went; 0 if there is no such document.
        """
        if self.inserted.entries([ref_doc_id]):
            return self.inserted.remove(ref_doc_id)
        found = self.find(Where(metadata={"doc_id": ref_doc_id}), 1)
        return self.remove_file(found[0].payload["sha256"]) if found else 0

    def move_file(self, entry: FileEntry, path: str) -> FileEntry:
        """Give a file another path, keeping its vectors."""
        moved = dataclasses.replace(entry, file=path, folder=folder_of(path))
        # Nodes first: cut short, the entry still has the old path, and the next run moves it again.
        self.rename_nodes(entry.sha256, path)
        self.mark_done(moved)
        return moved

    def tag_file(self, entry: FileEntry, metadata: Mapping[str, Any]) -> None:
        """Give a file and its nodes this metadata in place of the entry's, keeping vectors."""
        for batch in in_batches(self._engine.scroll(_with_hash(entry.sha256), vectors=True), 64):
            payloads = [with_metadata(p.payload, entry.metadata, metadata) for p in batch]
            # Only what changes: a run that was cut short has tagged most of them before.
            changed = [
                dataclasses.replace(old, payload=new)
                for old, new in zip(batch, payloads, strict=True)
                if new != old.payload
            ]
            self._engine.upsert(changed)
        self.mark_done(dataclasses.replace(entry, metadata=metadata))

    def rename_nodes(self, sha256: str, path: str) -> None:
        """Give the nodes of a content this path, where they have another, keeping vectors."""
        same = _with_hash(sha256)
        other = dataclasses.replace(same, must_not=(*same.must_not, AnyOf("file", (path,))))
        # In batches: the nodes of a large file with their vectors may not fit in memory.
        for batch in in_batches(self._engine.scroll(other, vectors=True), 64):
            self._engine.upsert([at_path(point, path, self._images) for point in batch])

    def search(
        self,
        view: str,
        vector: NDArray[np.float32],
        limit: int,
        where: Where | None = None,
        payload: Fields = True,
    ) -> list[Scored]:
        """The nodes nearest to ``vector`` ((dim,) float32) in one view, best first.

        By cosine; in the view ``muvera`` by inner product.

        payload: which of its fields are read; reading all of it takes most of the time.

        Raises:
            ConfigError: For a view that the collection does not have.
        """
        return self.search_all({view: vector}, None, limit, where, payload)[0][view]

    def search_all(
        self,
        vectors: Mapping[str, NDArray[np.float32]],
        text: str | None,
        limit: int,
        where: Where | None = None,
        payload: Fields = True,
    ) -> tuple[dict[str, list[Scored]], list[Scored]]:
        """``search`` in each view and, if there is a text, ``search_text``, asked for at once.

        Raises:
            ConfigError: As for ``search``.
        """
        queries: list[Nearest | Words] = [*nearest(self.settings, vectors)]
        # A collection may hold several languages: a word is looked for as each of them stems it.
        terms = query_terms(text, self._engine.facet(LANGUAGE_FIELD)) if text else ""
        queries += [Words(terms)] if terms else []
        found = self._engine.rank(queries, limit, self._filter(where), payload) if queries else []
        by_words = found.pop() if terms else []
        return dict(zip(vectors, found, strict=True)), by_words

    def vectors(self, view: View) -> tuple[list[Scored], NDArray[np.float32]]:
        """All nodes that have a vector of a view, ordered by id, and these: (n nodes, dim)."""
        points = [p for p in self._engine.scroll(_NODES, vectors=True) if view in p.vectors]
        nodes = [
            Scored(p.id, 1.0, {k: v for k, v in p.payload.items() if k != TERMS_FIELD})
            for p in points
        ]
        rows = [point.vectors[view] for point in points]
        return nodes, np.array(rows, dtype=np.float32).reshape(-1, self.settings.dim)

    def max_sim(
        self,
        tokens: NDArray[np.float32],
        ids: Sequence[str],
        where: Where | None = None,
        payload: Fields = True,
    ) -> list[Scored]:
        """Of the nodes with these ids those that have tokens, by MaxSim with ``tokens``.

        tokens: of a query, (n, dim) float32.
        payload: as for ``search``.
        """
        check_vector(self.settings, TOKENS, tokens)
        return self._engine.max_sim(tokens, ids, self._filter(where), payload) if ids else []

    def search_text(
        self, query: str, limit: int, where: Where | None = None, payload: Fields = True
    ) -> list[Scored]:
        """The nodes that rank highest by BM25, best first; see ``mmrag.store.terms``.

        payload: as for ``search``.
        """
        return self.search_all({}, query, limit, where, payload)[1]

    def find(self, where: Where, limit: int) -> list[Scored]:
        """The first nodes that ``where`` lets through, ordered by id; each has a score of 1."""
        nodes = dataclasses.replace(self._filter(where), must_not=(_BOOKKEEPING,))
        return [
            Scored(point.id, 1.0, {k: v for k, v in point.payload.items() if k != TERMS_FIELD})
            for point in islice(self._engine.scroll(nodes), limit)
        ]

    def payloads(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The whole payloads of those of the nodes that are stored, by id."""
        return {point.id: point.payload for point in self._engine.retrieve(ids)}

    def node(self, payload: Mapping[str, Any]) -> BaseNode:
        """The node a payload was made from, with its images' paths as they are here.

        The metadata of a file's node has ``file_path``, where the file was when it was indexed,
        which models are not shown. An image outside of ``images_dir`` is taken away.

        Raises:
            CollectionError: For a payload that is damaged.
        """
        return payload_node(payload, self._images, str(self._location))

    def count(self, where: Where | None = None) -> int:
        """How many nodes there are."""
        nodes = dataclasses.replace(self._filter(where), must_not=(_BOOKKEEPING,))
        return self._engine.count(nodes)

    def count_points(self) -> int:
        """How many points there are, with those of files and of the settings."""
        return self._engine.count(Filter())

    def unmatched(self, where: Where | None) -> list[str]:
        """Those of the file patterns that match no indexed file."""
        if where is None or not where.files:
            return []
        paths = self.paths()
        return [pattern for pattern in where.files if not matching_paths([pattern], paths)]

    def as_llama_vector_store(self, view: View = "text") -> QdrantVectorStore:
        """LlamaIndex's own QdrantVectorStore over one view; the collection must be on a server.

        Raises:
            CollectionError: For a collection in a folder.
            ConfigError: If the package ``llama-index-vector-stores-qdrant`` is missing.
        """
        client = self._location.client
        if client is None:
            raise CollectionError(
                "QdrantVectorStore reads collections on a Qdrant server, and this one is in a "
                "folder. Use UniversalRetriever, or index to a server (url)."
            )
        try:
            from llama_index.vector_stores.qdrant import QdrantVectorStore
        except ImportError as error:
            raise ConfigError(
                "Missing package: pip install llama-index-vector-stores-qdrant"
            ) from error
        return QdrantVectorStore(
            self._location.name,
            client=client,
            aclient=self._location.async_client(),
            dense_vector_name=view,
        )

    def copy_to(
        self,
        target: Collection,
        progress: Callable[[int, int], None] | None = None,
        change: Change | None = None,
    ) -> int:
        """Copy nodes, files, images and fitted weights to another collection, without embedding.

        Vectors are cut to the target's dimension. A copy cut short is continued by another call.

        Args:
            target: made with the settings of this one, but for ``dim`` and ``quantization``.
            progress: called with the number of points that are done, and of all.
            change: maps vectors into the space of another embedder, (n, dim) to (n, dim of the
                target), of L2 norm 1; ``target`` then names that embedder, and has no weights yet.

        Returns:
            How many points were copied.

        Raises:
            ConfigError: If the target was built with other settings, or cut vectors are too short.
        """
        new = change or cut_to(self.settings, target.settings)
        check_target(self.settings, target.settings, mapped=change is not None)
        copying = Copying(self._engine, self._images, target._engine, target._images, new)
        n_copied = copying.run(progress)
        if self.weights and change is None:  # they are of one embedder
            target.save_weights(self.weights)
        # Once, at the end: an index built along the way would be built again.
        target.optimize()
        return n_copied

    def optimize(self, tick: Callable[[], None] | None = None) -> None:
        """Build the search indexes, where many vectors lack one; a server does so by itself.

        In a folder another process builds them, and searches and writes go on meanwhile.

        tick: called twice a second; an error from it ends the building, and nothing is changed.
        """
        self._engine.optimize(schema_of(self.settings), tick)

    def read_ahead(self, fields: Sequence[str]) -> ReadAhead:
        """Keep these fields of all nodes in memory, read in the background, for searches.

        ``search``, ``search_text`` and ``max_sim`` with ``payload=fields`` then read none. Returns
        at once, with what can be waited for; ends with ``close``. Another call reads what was
        written since.
        """
        self._ahead.start(self._engine.read_ahead(fields))
        return self._ahead

    def close(self) -> None:
        """Release the folder or the connection."""
        self._ahead.stop()
        self._engine.close()

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _remove(self, of: AnyOf) -> int:
        nodes = Filter(must=(of,), must_not=(_BOOKKEEPING,))
        images: set[Path] = set()
        hashes: set[str] = set()
        removed = 0
        for point in self._engine.scroll(nodes):
            removed += 1
            images |= image_paths(metadata_dict_to_node(point.payload))
            # Folders of images are named by these, and go with them.
            hashes.add(str(point.payload.get("sha256", "")))
        # The file's own point goes first: cut short, this leaves an unfinished file.
        self._engine.delete(Filter(must=(of, AnyOf("kind", ("file",)))))
        self._engine.delete(nodes)
        self._images.remove(images, hashes)
        return removed

    def _filter(self, where: Where | None) -> Filter:
        return Filter() if where is None else as_filter(where, self.paths)


def _with_hash(sha256: str) -> Filter:
    """The nodes of the file with this content."""
    return Filter(must=(AnyOf("sha256", (sha256,)),), must_not=(_BOOKKEEPING,))
