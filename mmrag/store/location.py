"""Where a collection is: a folder, or a name on a Qdrant server."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mmrag.errors import CollectionError, ConfigError, MissingCollectionError
from mmrag.store.edge import LOCK, EdgeEngine
from mmrag.store.engine import Engine, Schema
from mmrag.store.images import ImageFolder
from mmrag.store.optimizing import OLD
from mmrag.store.point_count import COUNT
from mmrag.store.restoring import IMAGES, RESTORED, SHARD, SNAPSHOTS, UPLOADS, finish

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient, QdrantClient


@dataclass(frozen=True)
class Location:
    """A folder, or a collection's name on a server; exactly one of ``folder`` and ``client``.

    images: where page images are. images_given: whether the user said so.
    url, api_key: of the server, where it was given by URL.
    """

    folder: Path | None
    client: QdrantClient | None
    name: str
    images: ImageFolder
    images_given: bool
    url: str | None = None
    api_key: str | None = None

    @classmethod
    def of(
        cls,
        location: str | Path | QdrantClient,
        name: str,
        api_key: str | None,
        images_dir: str | Path | None,
    ) -> Location:
        """The location for what a user gave. Raises ConfigError for an unknown kind of URL."""
        given = images_dir is not None
        on_server = ImageFolder(Path(images_dir or Path("mmrag-images") / name).absolute(), None)
        if not isinstance(location, (str, Path)):
            return cls(None, location, name, on_server, given)
        if str(location).startswith(("http://", "https://")):
            # Importing the client takes half a second, which a folder has no use for.
            from qdrant_client import QdrantClient

            url = str(location)
            # Our own check says what to upgrade; the client's only warns.
            client = QdrantClient(url, api_key=api_key, check_compatibility=False)
            return cls(None, client, name, on_server, given, url, api_key)
        if "://" in str(location):
            raise ConfigError(f"{location}: give a folder, or a URL with http:// or https://.")
        folder = Path(location).expanduser().absolute()
        images = ImageFolder(Path(images_dir or folder / IMAGES).absolute(), folder)
        return cls(folder, None, name, images, given)

    def __str__(self) -> str:
        return str(self.folder) if self.folder else f"the collection {self.name!r} on the server"

    def open_engine(self, schema: Schema | None) -> Engine:
        """The engine; what is missing is created if there is a ``schema``.

        Raises:
            MissingCollectionError: If nothing is there and there is no ``schema``.
            CollectionError: If it is locked, broken, or the folder holds other files.
        """
        if self.folder is not None:
            return self._open_folder(self.folder, schema)
        from mmrag.store.server import ServerEngine

        assert self.client is not None
        engine = ServerEngine(self.client, self.name, owned=self.url is not None)
        try:
            if not engine.exists():
                if schema is None:
                    raise MissingCollectionError(
                        f"There is no collection {self.name!r} on the server. Index something "
                        "first, or give its name."
                    )
                engine.create(schema)
        except BaseException:
            engine.close()
            raise
        return engine

    def async_client(self) -> AsyncQdrantClient | None:
        """A client for async callers; a client that was passed in has no async twin."""
        if self.url is None:
            return None
        from qdrant_client import AsyncQdrantClient

        return AsyncQdrantClient(self.url, api_key=self.api_key, check_compatibility=False)

    def _open_folder(self, folder: Path, schema: Schema | None) -> Engine:
        # Under another name, where a process was killed while it replaced the shard.
        if any((folder / name).is_dir() for name in (SHARD, f"{SHARD}{OLD}", RESTORED)):
            return EdgeEngine(folder / SHARD, first=partial(finish, folder, self.images.path))
        if schema is None:
            raise MissingCollectionError(
                f"{self} holds no mmrag collection. Index something into it first "
                "(mmrag index PATH), or give the folder that was indexed."
            )
        if folder.exists() and not folder.is_dir():
            raise CollectionError(f"{self} is a file; give a folder for the collection.")
        names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
        # A process that creates the shard, or was killed over it, leaves one ending in "new".
        own = re.compile(
            rf"{IMAGES}|{UPLOADS}|{SNAPSHOTS}|{SHARD}({LOCK}|{COUNT})|({SHARD}|{RESTORED})\..*"
        )
        # A slip such as -c ~ must not fill a home folder.
        foreign = [name for name in names if not own.fullmatch(name)]
        if foreign:
            raise CollectionError(
                f"{self} is no mmrag collection and not empty ({foreign[0]}, ...); choose an "
                "empty or new folder for the collection."
            )
        folder.mkdir(parents=True, exist_ok=True)
        return EdgeEngine(folder / SHARD, schema)
