"""How a command finds the server that holds a collection: a file in the collection's folder."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

_FILE = "server.json"
_SECRET = "server.secret"


@dataclass(frozen=True)
class Address:
    """Where a collection is served, and what it is called there.

    secret: what proves that a request comes from somebody who may read the collection's folder.
    """

    url: str
    collection: str
    secret: str = field(default="", repr=False)


def write_address(folder: Path, address: Address) -> None:
    """Say in a collection's folder that it is served."""
    # Readable by the server's user alone: it lets files of that user be indexed.
    secret = folder / _SECRET
    secret.unlink(missing_ok=True)
    secret.touch(mode=0o600, exist_ok=False)
    secret.write_text(address.secret, encoding="ascii")
    values = {"url": address.url, "collection": address.collection, "pid": os.getpid()}
    part = folder / f".{_FILE}.{os.getpid()}"
    part.write_text(json.dumps(values), encoding="utf-8")
    # Whole or not at all: another process may read the file while it is written.
    part.replace(folder / _FILE)


def remove_address(folder: Path) -> None:
    """Take it back, if it is of this process."""
    values = _read(folder)
    # A second server may have taken the folder over since.
    if values is not None and values.get("pid") == os.getpid():
        for name in (_FILE, _SECRET):
            (folder / name).unlink(missing_ok=True)


def find_address(location: str) -> Address | None:
    """The server that holds a folder, as far as its file tells; None without one.

    The file of a server that was killed stays behind: whether it answers is to be asked. Only
    addresses of this machine are taken, since a folder may come from elsewhere.
    """
    folder = Path(location).expanduser()
    values = _read(folder)
    if values is None:
        return None
    url, collection = values.get("url"), values.get("collection")
    if not isinstance(url, str) or not isinstance(collection, str):
        return None
    parts = urlsplit(url)
    own = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    try:
        secret = (folder / _SECRET).read_text(encoding="ascii")
    except OSError:  # of another user, who may still search
        secret = ""
    return Address(url, collection, secret) if own else None


def _read(folder: Path) -> dict[str, object] | None:
    try:
        values = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
