"""The one collection: what its points mean, and how it remembers what built it.

A collection holds nodes (one point each, one named vector per view), one point per finished
file, and one point with the settings that built it. No second database exists that could
disagree: a file is finished exactly when its own point is there.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid5

import numpy as np
from llama_index.core.schema import BaseNode, Node
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
from numpy.typing import NDArray
from qdrant_client import AsyncQdrantClient, QdrantClient

from mmrag.errors import CollectionError, ConfigError, MissingCollectionError
from mmrag.nodes import node_image, node_text
from mmrag.queries import Where
from mmrag.reading import words_path
from mmrag.reading.files import IMAGES_MARK
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import (
    LANGUAGE_FIELD,
    TERMS_FIELD,
    AnyOf,
    Between,
    Condition,
    Engine,
    Filter,
    Point,
    Schema,
    Scored,
)
from mmrag.store.server import ServerEngine
from mmrag.store.settings import CollectionSettings, View, refuse_other
from mmrag.store.terms import AUTO_LANGUAGE, DocumentTerms, NodeTerms, has_terms, query_terms
from mmrag.store.upgrade import rebuild_terms

if TYPE_CHECKING:
    from llama_index.vector_stores.qdrant import QdrantVectorStore

__all__ = [
    "Collection",
    "CollectionSettings",
    "FileEntry",
    "Scored",
    "View",
    "Where",
    "matching_paths",
    "node_image",
    "node_text",
]

log = logging.getLogger(__name__)

SCHEMA_VERSION = 2

_NAMESPACE = UUID("5a3c1f0e-6f0b-4d57-9f5e-0d6c2f3b8a11")
_SETTINGS_ID = str(uuid5(_NAMESPACE, "settings"))
_BOOKKEEPING = AnyOf("kind", ("file", "settings"))
_FILES = Filter(must=(AnyOf("kind", ("file",)),))
_KEYWORDS = ("file", "kind", "sha256", "doc_id", LANGUAGE_FIELD)
_INTEGERS = ("page",)
_SHARD = "qdrant"
_IMAGES = "images"


@dataclass(frozen=True)
class FileEntry:
    """One indexed file: its path as given, its content's hash, and what became of it.

    errors: what could not be read or embedded.
    folder: the working directory that a relative ``file`` was given in; else empty.
    complete: False if pages were lost to time, memory or a full disk; the next run of indexing
        reads the file again.
    """

    file: str
    sha256: str
    pages: int
    nodes: int
    errors: tuple[str, ...] = ()
    folder: str = ""
    complete: bool = True

    @property
    def place(self) -> Path:
        """Where the file is, whatever the working directory is now."""
        return place_of(Path(self.folder, self.file))


def folder_of(path: str) -> str:
    """What a FileEntry of ``path`` has as its folder."""
    return "" if Path(path).is_absolute() else str(Path.cwd())


def place_of(path: Path) -> Path:
    """One absolute path for all spellings; a link that is the file itself is not followed."""
    return path.parent.resolve() / path.name


class Collection:
    """Nodes with their vectors, in a folder (qdrant-edge) or on a Qdrant server.

    Made by ``Collection.open``; a context manager that closes itself.
    """

    def __init__(self, engine: Engine, settings: CollectionSettings, place: _Place) -> None:
        self._engine = engine
        self._place = place
        self.settings = settings
        self.images_dir = place.images_dir

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

        Raises: MissingCollectionError if it is not there; CollectionError if it is locked, built
            with other settings or by a newer
            mmrag; EndpointError if the server cannot be reached.
        """
        place = _Place.at(location, name, api_key, images_dir)
        try:
            engine = place.engine(settings)
            try:
                stored = _agree(engine, settings, place)
                place.make_images_dir()
            except BaseException:
                engine.close()
                raise
        except OSError as error:
            raise CollectionError(
                f"{place} cannot be used ({error}); give a folder that can be written."
            ) from error
        return cls(engine, stored, place)

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

        Returns: how many nodes were rewritten; 0 where nothing was to be done.

        Raises: as ``open``.
        """
        place = _Place.at(location, name, api_key, images_dir)
        engine = place.engine(None)
        try:
            point = _settings_point(engine, place)
            if point is None or point.payload["schema"] >= SCHEMA_VERSION:
                return 0
            settings = dict(point.payload["settings"])
            if settings["language"] == "english":  # what schema 1 had unless told otherwise
                settings["language"] = AUTO_LANGUAGE
            upgraded = CollectionSettings.from_json(settings)
            engine.drop_index("text")  # schema 1 ranked by it
            engine.create_indexes(_schema(upgraded))
            n_nodes = rebuild_terms(engine, upgraded.language)
            _store_settings(engine, upgraded)
            return n_nodes
        finally:
            engine.close()

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the rankings that were fitted for this collection; empty if none were."""
        point = _settings_point(self._engine, self._place)
        return dict(point.payload.get("weights", {})) if point else {}

    def save_weights(self, weights: Mapping[str, float]) -> None:
        """Keep the weights of the rankings with the collection; empty ones forget them."""
        _store_settings(self._engine, self.settings, weights)

    def write(
        self,
        nodes: Sequence[BaseNode],
        vectors: Sequence[Mapping[View, Any]],
        terms: Sequence[NodeTerms] | None = None,
    ) -> None:
        """Store nodes, each with the vectors of the views it has; equal ids are replaced.

        vectors: for each node, view to (dim,) float32; may be empty.
        terms: what BM25 finds each node by; None makes them from its text and file name alone.
        """
        if terms is None:
            terms = [self._own_terms(node) for node in nodes]
        points = [
            Point(node.node_id, self._payload(node, of_text), self._checked(node, of_node))
            for node, of_node, of_text in zip(nodes, vectors, terms, strict=True)
        ]
        if points:
            self._engine.upsert(points)

    def mark_done(self, file: FileEntry) -> None:
        """Write the file's own point: all of its nodes are stored."""
        payload = dataclasses.asdict(file) | {"kind": "file", "errors": list(file.errors)}
        self._engine.upsert([Point(_file_id(file.sha256), payload)])

    def files(self) -> list[FileEntry]:
        """The finished files, ordered by path."""
        entries = [_entry(point.payload) for point in self._engine.scroll(_FILES)]
        return sorted(entries, key=lambda entry: (entry.file, entry.sha256))

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

    def unfinished(self) -> dict[str, str]:
        """Hash to path of the files that have nodes here but are not finished."""
        done = {entry.sha256 for entry in self.files()}
        return {
            sha256: str(next(self._engine.scroll(_with_hash(sha256))).payload["file"])
            for sha256 in self._engine.facet("sha256")
            if sha256 not in done
        }

    def remove_file(self, sha256_or_path: str) -> int:
        """Delete a file's points and page images; returns how many nodes went."""
        by_path = self._remove(AnyOf("file", (sha256_or_path,)))
        return by_path + self._remove(AnyOf("sha256", (sha256_or_path,)))

    def move_file(self, entry: FileEntry, path: str) -> FileEntry:
        """Give a file another path, keeping its vectors."""
        moved = dataclasses.replace(entry, file=path, folder=folder_of(path))
        self.rename_nodes(entry.sha256, path)
        self.mark_done(moved)
        return moved

    def rename_nodes(self, sha256: str, path: str) -> None:
        """Give the nodes of a content this path, where they have another, keeping vectors."""
        same = _with_hash(sha256)
        other = dataclasses.replace(same, must_not=(*same.must_not, AnyOf("file", (path,))))
        for batch in _batched(self._engine.scroll(other, vectors=True), 64):
            self._engine.upsert([self._at_path(point, path) for point in batch])

    def search(
        self, view: View, vector: NDArray[np.float32], limit: int, where: Where | None = None
    ) -> list[Scored]:
        """The nodes nearest to ``vector`` ((dim,) float32) by cosine in one view, best first."""
        if view not in self.settings.views:
            raise ConfigError(
                f"This collection has no view {view!r}; it has {', '.join(self.settings.views)}."
            )
        self._check_dim(vector)
        condition = self._filter(where)
        return self._engine.nearest(view, vector, limit, condition) if condition else []

    def search_text(self, query: str, limit: int, where: Where | None = None) -> list[Scored]:
        """The nodes that rank highest by BM25, best first; see ``mmrag.store.terms``."""
        condition = self._filter(where)
        terms = query_terms(query, self._engine.facet(LANGUAGE_FIELD))
        return self._engine.bm25(terms, limit, condition) if condition and terms else []

    def find(self, where: Where, limit: int) -> list[Scored]:
        """The first nodes that ``where`` lets through, ordered by id; each has a score of 1."""
        condition = self._filter(where)
        if condition is None:
            return []
        nodes = dataclasses.replace(condition, must_not=(*condition.must_not, _BOOKKEEPING))
        return [
            Scored(point.id, 1.0, {k: v for k, v in point.payload.items() if k != TERMS_FIELD})
            for point in islice(self._engine.scroll(nodes), limit)
        ]

    def node(self, payload: Mapping[str, Any]) -> BaseNode:
        """The node a payload was made from, with its pictures' paths as they are here."""
        node = metadata_dict_to_node(dict(payload))
        return _with_image_paths(node, self._place.absolute)

    def count(self, where: Where | None = None) -> int:
        """How many nodes there are."""
        condition = self._filter(where)
        if condition is None:
            return 0
        return self._engine.count(dataclasses.replace(condition, must_not=(_BOOKKEEPING,)))

    def as_llama_vector_store(self, view: View = "text") -> QdrantVectorStore:
        """LlamaIndex's own QdrantVectorStore over one view; the collection must be on a server.

        Raises: CollectionError for a collection in a folder, ConfigError if the package
            ``llama-index-vector-stores-qdrant`` is missing.
        """
        client = self._place.client
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
            self._place.name,
            client=client,
            aclient=self._place.async_client(),
            dense_vector_name=view,
        )

    def optimize(self) -> None:
        """Build the search indexes. In a folder this may hold the GIL for seconds."""
        self._engine.optimize()

    def close(self) -> None:
        """Release the folder or the connection."""
        self._engine.close()

    def __enter__(self) -> Collection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _payload(self, node: BaseNode, terms: NodeTerms) -> dict[str, Any]:
        stored = _with_image_paths(node.model_copy(deep=True), self._place.portable)
        payload = node_to_metadata_dict(stored)
        if text := node_text(node):
            payload["text"] = text
        return payload | terms.to_payload() if has_terms(payload) else payload

    def _own_terms(self, node: BaseNode) -> NodeTerms:
        text = node_text(node)
        document = DocumentTerms(node.metadata.get("file", ""), self.settings.language)
        document.read(text)
        return dataclasses.replace(document.of(text), first_words="")

    def _checked(
        self, node: BaseNode, vectors: Mapping[View, Any]
    ) -> dict[str, NDArray[np.float32]]:
        unknown = set(vectors) - set(self.settings.views)
        if unknown:
            raise ConfigError(f"Node {node.node_id}: the collection has no view {unknown}.")
        arrays = {str(name): np.asarray(each, np.float32) for name, each in vectors.items()}
        for vector in arrays.values():
            self._check_dim(vector)
        return arrays

    def _check_dim(self, vector: NDArray[np.float32]) -> None:
        if vector.shape != (self.settings.dim,):
            raise ConfigError(
                f"A vector of shape {vector.shape} does not fit: this collection holds vectors "
                f"of {self.settings.dim} dimensions, made by {self.settings.embedder}."
            )
        if not np.isfinite(vector).all():
            raise ConfigError("A vector holds NaN or infinity; check the embedder.")

    def _at_path(self, point: Point, path: str) -> Point:
        node = metadata_dict_to_node(point.payload)
        node.metadata["file"] = path
        terms = NodeTerms.from_payload(point.payload).renamed(path)
        return dataclasses.replace(point, payload=self._payload(node, terms))

    def _remove(self, of: AnyOf) -> int:
        """Delete the file's own point first: cut short, it leaves an unfinished file."""
        nodes = Filter(must=(of,), must_not=(_BOOKKEEPING,))
        images: set[Path] = set()
        removed = 0
        for point in self._engine.scroll(nodes):
            removed += 1
            images |= self._place.own_images(point.payload)
        self._engine.delete(Filter(must=(of, AnyOf("kind", ("file",)))))
        self._engine.delete(nodes)
        for image in images:
            image.unlink(missing_ok=True)
            words_path(image).unlink(missing_ok=True)
        for folder in {image.parent for image in images} - {self.images_dir}:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        return removed

    def _filter(self, where: Where | None) -> Filter | None:
        """None if no file matches: nothing can be found then."""
        where = where or Where()
        must: list[Condition] = []
        if where.files:
            files = matching_paths(where.files, self.paths())
            if not files:
                log.warning("No indexed file matches %s", ", ".join(where.files))
                return None
            must.append(AnyOf("file", tuple(files)))
        if where.pages is not None:
            must.append(Between("page", *where.pages))
        if where.kinds:
            must.append(AnyOf("kind", tuple(where.kinds)))
        must += [AnyOf(key, _values(key, value)) for key, value in where.metadata.items()]
        return Filter(must=tuple(must))


def matching_paths(patterns: Sequence[str], paths: Sequence[str]) -> list[str]:
    """The paths that end in a pattern, or match it as a glob: ``a.pdf``, ``x/a.pdf``, ``x/*``."""
    return [path for path in paths if any(_matches(path, pattern) for pattern in patterns)]


def _matches(path: str, pattern: str) -> bool:
    wanted = PurePosixPath(pattern).as_posix()
    if wanted == ".":
        return False
    return f"/{path}".endswith(f"/{wanted}") or PurePosixPath(path).match(wanted)


@dataclass(frozen=True)
class _Place:
    """Where a collection is: a folder, or a name on a server."""

    folder: Path | None
    client: QdrantClient | None
    name: str
    images_dir: Path
    url: str | None = None
    api_key: str | None = None

    @classmethod
    def at(
        cls,
        location: str | Path | QdrantClient,
        name: str,
        api_key: str | None,
        images_dir: str | Path | None,
    ) -> _Place:
        remote_images = Path(images_dir or Path("mmrag-images") / name).absolute()
        if isinstance(location, QdrantClient):
            return cls(None, location, name, remote_images)
        if str(location).startswith(("http://", "https://")):
            url = str(location)
            client = QdrantClient(url, api_key=api_key, check_compatibility=False)
            return cls(None, client, name, remote_images, url, api_key)
        if "://" in str(location):
            raise ConfigError(f"{location}: give a folder, or a URL with http:// or https://.")
        folder = Path(location).expanduser().absolute()
        return cls(folder, None, name, Path(images_dir or folder / _IMAGES).absolute())

    def __str__(self) -> str:
        return str(self.folder) if self.folder else f"the collection {self.name!r} on the server"

    def engine(self, settings: CollectionSettings | None) -> Engine:
        """The store, created if it is missing and ``settings`` say how."""
        if self.client is not None:
            return self._server(self.client, settings)
        assert self.folder is not None
        if (self.folder / _SHARD).is_dir():
            return EdgeEngine(self.folder / _SHARD)
        if settings is None:
            raise MissingCollectionError(
                f"{self} holds no mmrag collection. Index something into it first "
                "(mmrag index PATH), or give the folder that was indexed."
            )
        if self.folder.exists() and not self.folder.is_dir():
            raise CollectionError(f"{self} is a file; give a folder for the collection.")
        foreign = self._foreign_files()
        if foreign:
            raise CollectionError(
                f"{self} is no mmrag collection and not empty ({foreign[0]}, ...); choose an "
                "empty or new folder for the collection."
            )
        return EdgeEngine.create(self.folder / _SHARD, _schema(settings))

    def async_client(self) -> AsyncQdrantClient | None:
        """A client for async callers; a client that was passed in has no async twin."""
        if self.url is None:
            return None
        return AsyncQdrantClient(self.url, api_key=self.api_key, check_compatibility=False)

    def portable(self, path: Path) -> Path:
        """How an image's path is stored: relative to the folder, so that the folder can move."""
        absolute = path.absolute()
        if self.folder is not None and absolute.is_relative_to(self.folder):
            return absolute.relative_to(self.folder)
        return absolute

    def absolute(self, path: Path) -> Path:
        """The way back from ``portable``."""
        return path if self.folder is None else self.folder / path

    def make_images_dir(self) -> None:
        """Make the folder of images, marked so that indexing passes it over."""
        self.images_dir.mkdir(parents=True, exist_ok=True)
        mark = self.images_dir / IMAGES_MARK
        if not mark.exists():
            mark.touch()

    def own_images(self, payload: Mapping[str, Any]) -> set[Path]:
        """The images of a node that lie in ``images_dir``."""
        node = metadata_dict_to_node(dict(payload))
        paths = [node_image(node), node.metadata.get("page_image")]
        absolute = {self.absolute(Path(path)) for path in paths if path}
        return {path for path in absolute if path.is_relative_to(self.images_dir)}

    def _foreign_files(self) -> list[str]:
        if self.folder is None or not self.folder.is_dir():
            return []
        names = sorted(each.name for each in self.folder.iterdir())
        # A process that creates the shard, or was killed over it, leaves one ending in .new.
        return [n for n in names if n != _IMAGES and not re.fullmatch(rf"{_SHARD}\..*new", n)]

    def _server(self, client: QdrantClient, settings: CollectionSettings | None) -> Engine:
        engine = ServerEngine(client, self.name, owned=self.url is not None)
        try:
            if not engine.exists():
                if settings is None:
                    raise MissingCollectionError(
                        f"There is no collection {self.name!r} on the server. Index something "
                        "first, or give its name."
                    )
                engine.create(_schema(settings))
        except BaseException:
            engine.close()
            raise
        return engine


def _agree(engine: Engine, wanted: CollectionSettings | None, place: _Place) -> CollectionSettings:
    """The settings that hold: those stored, or those wanted by whoever creates it."""
    stored = _stored_settings(engine, place)
    if stored is not None:
        if wanted is not None:
            refuse_other(stored, wanted, place)
        return stored
    if engine.count(Filter()) > 0:
        raise CollectionError(f"{place} was not made by mmrag; choose another name or folder.")
    if wanted is None:
        raise MissingCollectionError(f"{place} is empty; index something into it first.")
    if isinstance(engine, ServerEngine):
        if engine.vector_dims() != dict(_schema(wanted).vectors):
            raise CollectionError(
                f"{place} was not made by mmrag: it has other vectors. Choose another name."
            )
        engine.create(_schema(wanted))
    _store_settings(engine, wanted)
    return wanted


def _store_settings(
    engine: Engine, settings: CollectionSettings, weights: Mapping[str, float] | None = None
) -> None:
    payload = {"kind": "settings", "schema": SCHEMA_VERSION, "settings": settings.to_json()}
    payload |= {"weights": dict(weights or {})}
    engine.upsert([Point(_SETTINGS_ID, payload)])
    engine.flush()


def _stored_settings(engine: Engine, place: _Place) -> CollectionSettings | None:
    point = _settings_point(engine, place)
    if point is None:
        return None
    payload = point.payload
    if payload["schema"] < SCHEMA_VERSION:
        raise CollectionError(
            f"{place} was built by an older mmrag, which kept other terms for BM25 (schema "
            f"{payload['schema']}, this version writes {SCHEMA_VERSION}). Bring it up to date: "
            "mmrag upgrade -c FOLDER_OR_URL. Nothing is embedded again."
        )
    return CollectionSettings.from_json(payload["settings"])


def _settings_point(engine: Engine, place: _Place) -> Point | None:
    found = engine.retrieve([_SETTINGS_ID])
    if found and found[0].payload["schema"] > SCHEMA_VERSION:
        raise CollectionError(
            f"{place} was built by a newer mmrag (schema {found[0].payload['schema']}, this "
            f"version knows {SCHEMA_VERSION}). Upgrade: pip install -U mmrag"
        )
    return found[0] if found else None


def _schema(settings: CollectionSettings) -> Schema:
    return Schema(
        vectors=dict.fromkeys(settings.views, settings.dim),
        keywords=_KEYWORDS,
        integers=_INTEGERS,
    )


def _with_hash(sha256: str) -> Filter:
    """The nodes of the file with this content."""
    return Filter(must=(AnyOf("sha256", (sha256,)),), must_not=(_BOOKKEEPING,))


def _file_id(sha256: str) -> str:
    return str(uuid5(_NAMESPACE, f"file/{sha256}"))


def _entry(payload: Mapping[str, Any]) -> FileEntry:
    names = {each.name for each in dataclasses.fields(FileEntry)} & set(payload)
    values = {name: payload[name] for name in names}
    return FileEntry(**(values | {"errors": tuple(values["errors"])}))


def _values(key: str, value: Any) -> tuple[str | int | float | bool, ...]:
    many = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
    if not many or not all(isinstance(each, (str, int, float)) for each in many):
        raise ConfigError(
            f"Where.metadata[{key!r}] = {value!r}: give a str, int, float or bool, or a list of "
            "them that is not empty."
        )
    return tuple(many)


def _with_image_paths(node: BaseNode, change: Callable[[Path], Path]) -> BaseNode:
    """Change the image paths of ``node`` in place: its own, and that of its page."""
    image = node_image(node)
    if isinstance(node, Node) and node.image_resource and image:
        node.image_resource = node.image_resource.model_copy(update={"path": change(image)})
    if node.metadata.get("page_image"):
        node.metadata["page_image"] = change(Path(node.metadata["page_image"])).as_posix()
    return node


def _batched(points: Iterator[Point], size: int) -> Iterator[list[Point]]:
    batch: list[Point] = []
    for point in points:
        batch.append(point)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
