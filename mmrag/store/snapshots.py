"""Versions of a collection: made, listed, and restored as a whole or not at all.

A snapshot is a folder of its own in ``snapshots``, beside the page images: a manifest, and page
images and uploaded files as hard links, which take no space. Of a collection in a folder it holds
a copy of the shard; of one on a server the points are a snapshot that Qdrant makes and keeps.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrag.errors import CollectionError, ConfigError, MissingCollectionError
from mmrag.reading.files import IMAGES_MARK
from mmrag.store.edge import locked
from mmrag.store.engine import AnyOf, Engine, Filter
from mmrag.store.location import Location
from mmrag.store.making import SCHEMA_VERSION, settings_point
from mmrag.store.restoring import (
    IMAGES,
    SHARD,
    SNAPSHOTS,
    UPLOADS,
    beside_images,
    finish,
    prepare,
)
from mmrag.store.settings import CollectionSettings, differences
from mmrag.store.trees import copy_tree, link_tree, mirror, need_space, size_on_disk, sync

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

    from mmrag.store.server import ServerEngine

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MANIFEST = "snapshot.json"


@dataclass(frozen=True)
class Snapshot:
    """One version of a collection.

    created: ISO time in UTC. mmrag, schema: versions of the program and of what it stores.
    settings: what the collection was built with, as JSON. on_server: Qdrant's name of the
    points, for a collection on a server.

    Examples:
        >>> counts = {"files": 2, "pages": 9, "points": 14}
        >>> Snapshot("monday", "2026-11-27T08:00:00+00:00", "0.1.0", 3, {}, **counts).pages
        9
    """

    name: str
    created: str
    mmrag: str
    schema: int
    settings: dict[str, Any]
    files: int
    pages: int
    points: int
    on_server: str | None = None


class Snapshots:
    """The versions of one collection; its Python side is ``mmrag snapshot``.

    Args:
        location: of the collection.
        engine: of the collection, where this process has it open. Nothing may be written to it
            while a snapshot is made; searches go on.

    Examples:
        >>> import tempfile
        >>> from mmrag.store.collection import Collection, CollectionSettings
        >>> folder, settings = tempfile.mkdtemp(), CollectionSettings("my-model", "1", dim=4)
        >>> with Collection.open(folder, settings=settings) as collection:
        ...     _ = collection.snapshots.create("empty")
        >>> snapshots = Snapshots.of(folder)
        >>> [each.name for each in snapshots.list()]
        ['empty']
        >>> snapshots.restore("empty").points
        1
    """

    def __init__(self, location: Location, engine: Engine | None = None) -> None:
        self._location = location
        self._engine = engine
        self._images = location.images.path
        self._uploads = beside_images(self._images, UPLOADS)
        self.folder = beside_images(self._images, SNAPSHOTS)

    @classmethod
    def of(
        cls,
        location: str | Path | QdrantClient,
        *,
        name: str = "mmrag",
        api_key: str | None = None,
        images_dir: str | Path | None = None,
    ) -> Snapshots:
        """The versions of a collection that is not open here; as ``Collection.open``."""
        return cls(Location.of(location, name, api_key, images_dir))

    def create(self, name: str | None = None) -> Snapshot:
        """Keep the collection as it is now.

        name: letters, digits, dots, dashes and underscores; default: the time.

        Raises:
            ConfigError: For a name that is not valid or taken.
            MissingCollectionError: If there is nothing to keep.
            CollectionError: If the collection cannot be opened, or the disk is full.
        """
        now = datetime.now(UTC)
        target = self._path(name or now.strftime("%Y-%m-%dT%H-%M-%S"))
        if target.exists():
            raise ConfigError(f"There is a snapshot {target.name!r} already; give another name.")
        # Hidden until it is complete.
        part = target.with_name(f".{target.name}.part")
        with self._opened() as engine, _disk_errors("create the snapshot", target):
            found = settings_point(engine, self._location)
            if found is None:
                raise MissingCollectionError(f"{self._location} is empty; nothing to keep.")
            entries = list(engine.scroll(Filter(must=(AnyOf("kind", ("file",)),))))
            self.folder.mkdir(parents=True, exist_ok=True)
            # Indexing passes marked folders over.
            (self.folder / IMAGES_MARK).touch()
            shutil.rmtree(part, ignore_errors=True)
            engine.flush()
            self._check_space(target, "create the snapshot", self._shard, self._trees)
            part.mkdir()
            try:
                # Images first: a server's snapshot would stay behind if linking failed.
                for source, tree in zip(self._trees, (IMAGES, UPLOADS), strict=True):
                    link_tree(source, part / tree)
                snapshot = Snapshot(
                    target.name,
                    now.isoformat(timespec="microseconds"),
                    metadata.version("mmrag"),
                    found.payload["schema"],
                    found.payload["settings"],
                    files=len(entries),
                    pages=sum(int(each.payload.get("pages", 0)) for each in entries),
                    points=engine.count(Filter()),
                    on_server=self._keep_points(engine, part),
                )
                text = json.dumps(asdict(snapshot), indent=2)
                (part / _MANIFEST).write_text(text, encoding="utf-8")
                sync(part)
                part.rename(target)
                sync(self.folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return snapshot

    def list(self) -> list[Snapshot]:
        """The snapshots, oldest first. The collection may be in use meanwhile."""
        paths = self.folder.glob(f"[!.]*/{_MANIFEST}")
        return sorted((self._read(path.parent) for path in paths), key=lambda each: each.created)

    def restore(self, name: str) -> Snapshot:
        """Give the collection the points, page images and uploaded files of a snapshot.

        What was stored since is lost, unless it is in another snapshot. Cut short, the collection
        is the old one or the new one; the next opening ends what was begun.

        Raises:
            ConfigError: If there is no such snapshot.
            CollectionError: If the collection is in use, was built with other settings or by
                another version of mmrag than the snapshot, or the disk is full.
        """
        version = self._path(name)
        if not (version / _MANIFEST).is_file():
            known = ", ".join(each.name for each in self.list()) or "none"
            raise ConfigError(f"{self._location} has no snapshot {name!r}; it has: {known}.")
        snapshot = self._read(version)
        self._check_fits(snapshot)
        with _disk_errors("restore the snapshot", version):
            self._location.images.make(given=self._location.images_given)
            if self._location.folder is None:
                self._restore_on_server(snapshot, version)
            else:
                self._restore_in_folder(snapshot, version, self._location.folder)
        return snapshot

    def _restore_in_folder(self, snapshot: Snapshot, version: Path, folder: Path) -> None:
        trees = (version / IMAGES, version / UPLOADS)
        # A check before this would not hold until the files are changed.
        with locked(folder / SHARD, "restore"):
            self._check_space(folder / SHARD, "restore", version / SHARD, trees)
            prepare(version, folder, snapshot.points)
            finish(folder, self._images)

    def _restore_on_server(self, snapshot: Snapshot, version: Path) -> None:
        url, key = self._location.url, self._location.api_key
        if url is None:
            raise ConfigError("Give the URL of the Qdrant server; a client does not tell it.")
        images, uploads = version / IMAGES, version / UPLOADS
        self._check_space(self._images, "restore", None, (images, uploads))
        # Both versions find their images while Qdrant changes from one to the other.
        mirror(images, self._images, remove=False)
        with self._opened() as engine:
            _server(engine).restore_snapshot(str(snapshot.on_server), url, key)
        mirror(images, self._images)
        mirror(uploads, self._uploads)

    @property
    def _shard(self) -> Path | None:
        return None if self._location.folder is None else self._location.folder / SHARD

    @property
    def _trees(self) -> tuple[Path, Path]:
        return self._images, self._uploads

    def _keep_points(self, engine: Engine, part: Path) -> str | None:
        """Copy the shard, or have the server keep its points under the name that comes back."""
        if self._shard is None:
            return _server(engine).create_snapshot()
        copy_tree(self._shard, part / SHARD)
        return None

    def _check_space(
        self, target: Path, doing: str, copied: Path | None, linked: tuple[Path, Path]
    ) -> None:
        """Refuse what the disk has no room for. linked: takes space on another disk only."""
        disk = target.parent.stat().st_dev
        others = [tree for tree in linked if tree.exists() and tree.stat().st_dev != disk]
        trees = [*others, *([copied] if copied is not None else [])]
        need_space(target, doing, sum(map(size_on_disk, trees)))

    @contextmanager
    def _opened(self) -> Iterator[Engine]:
        engine = self._engine or self._location.open_engine(None)
        with nullcontext(engine) if self._engine else closing(engine):
            yield engine

    def _check_fits(self, snapshot: Snapshot) -> None:
        """Raise CollectionError for a snapshot that the collection would not go on from."""
        if snapshot.schema != SCHEMA_VERSION:
            raise CollectionError(
                f"The snapshot {snapshot.name!r} is of mmrag {snapshot.mmrag} (schema "
                f"{snapshot.schema}, this version has {SCHEMA_VERSION}). Restore it with that "
                "version."
            )
        if (snapshot.on_server is None) == (self._location.folder is None):
            raise CollectionError(
                f"The snapshot {snapshot.name!r} is of a collection "
                f"{'in a folder' if snapshot.on_server is None else 'on a server'}, and "
                f"{self._location} is not. Restore it where it was made, then use mmrag convert."
            )
        current = self._current_settings()
        made_of = CollectionSettings.from_json(snapshot.settings)
        changed = differences(made_of, current) if current else []
        if changed:
            raise CollectionError(
                f"The snapshot {snapshot.name!r} was built by {made_of.embedder!r} with other "
                f"settings than the collection has ({'; '.join(changed)}). Restore it into a "
                f"collection of its own: copy {self.folder / snapshot.name} to the folder "
                "snapshots of a new collection."
            )

    def _current_settings(self) -> CollectionSettings | None:
        """What the collection is built with; None if it is gone or too damaged to say."""
        if self._shard is not None and self._shard.parent.is_dir():
            # Said first: damage is no reason to refuse a restore, another user is.
            with locked(self._shard, "restore"):
                pass
        with suppress(CollectionError), self._opened() as engine:
            point = settings_point(engine, self._location)
            return (
                None if point is None else CollectionSettings.from_json(point.payload["settings"])
            )
        return None

    def _path(self, name: str) -> Path:
        # It becomes the name of a folder, and comes from a command line or the network.
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is no name for a snapshot: use letters, digits, dots, dashes and "
                "underscores, a letter or digit first, at most 100."
            )
        return self.folder / name

    def _read(self, version: Path) -> Snapshot:
        try:
            values = json.loads((version / _MANIFEST).read_text(encoding="utf-8"))
            # By its folder, which may have been copied under another name.
            return Snapshot(**(values | {"name": version.name}))
        except (OSError, ValueError, TypeError) as error:
            raise CollectionError(
                f"The snapshot {version} cannot be read ({error}); delete its folder."
            ) from error


def _server(engine: Engine) -> ServerEngine:
    from mmrag.store.server import ServerEngine

    assert isinstance(engine, ServerEngine)
    return engine


@contextmanager
def _disk_errors(doing: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CollectionError(
            f"cannot {doing} {path}: {error}. Check the disk, then run the same command again."
        ) from error
