"""What a collection keeps of an indexed file, and where the file is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from mmrag.reading import is_url

Place: TypeAlias = Path | str
"""Where a file is: its absolute path, or its URL."""


@dataclass(frozen=True)
class FileEntry:
    """One indexed file: its path or URL as given, its content's hash, and what became of it.

    A document that was inserted has an entry too.

    errors: what could not be read or embedded.
    folder: the working directory that a relative ``file`` was given in; else empty.
    complete: False if pages were lost to time, memory or a full disk; the next run of indexing
        reads the file again.
    doc_id: of a document whose nodes were inserted, LlamaIndex's ``ref_doc_id``; ``sha256`` is
        then the hash of its content. Empty for a file that was read.
    descriptions: how many of ``nodes`` are descriptions of images, which reading does not make.
    metadata: what was given for the file; each of its nodes has it too.

    Examples:
        >>> entry = FileEntry("in/a.pdf", "0" * 64, pages=2, nodes=5, folder="/home/ann")
        >>> entry.path.as_posix()
        '/home/ann/in/a.pdf'
    """

    file: str
    sha256: str
    pages: int
    nodes: int
    errors: tuple[str, ...] = ()
    folder: str = ""
    complete: bool = True
    doc_id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict, hash=False)
    descriptions: int = 0

    @property
    def path(self) -> Path:
        """Where the file is, whatever the working directory is now; of no use for a URL."""
        return Path(find_place(self.folder, self.file))

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> FileEntry:
        """The entry that ``to_payload`` gave; fields that an older mmrag did not know are left."""
        names = {each.name for each in dataclasses.fields(cls)} & set(payload)
        values = {name: payload[name] for name in names}
        return cls(**(values | {"errors": tuple(values["errors"])}))

    def to_payload(self) -> dict[str, Any]:
        """As the payload of the file's own point."""
        return dataclasses.asdict(self) | {"kind": "file", "errors": list(self.errors)}


def only_files(entries: Iterable[FileEntry]) -> list[FileEntry]:
    """The entries of files, which can be read again, without those of inserted documents."""
    return [entry for entry in entries if not entry.doc_id]


def folder_of(path: str) -> str:
    """What a FileEntry of ``path`` has as its folder."""
    return "" if is_url(path) or Path(path).is_absolute() else str(Path.cwd())


def find_place(folder: str, file: str) -> Place:
    """One place for all spellings of a file's name; see ``find_places``."""
    return find_places([(folder, file)])[0]


def find_places(files: Iterable[tuple[str, str]]) -> list[Place]:
    """Where files are, by folder and name. A link that is the file itself is not followed."""
    folders: dict[Path, Path] = {}
    found: list[Place] = []
    for folder, file in files:
        if is_url(file):
            found.append(file)
            continue
        path = Path(folder, file)
        # Each folder is resolved once, for that asks the file system.
        if path.parent not in folders:
            folders[path.parent] = path.parent.resolve()
        # Two links to one file are two entries: each was named by the user.
        found.append(folders[path.parent] / path.name)
    return found


def is_missing(place: Place) -> bool:
    """Whether nothing is at a path any more; of a URL only asking its server would tell."""
    return isinstance(place, Path) and not place.exists()


def with_metadata(
    payload: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """A node's payload with the metadata ``after`` in place of ``before``."""
    # LlamaIndex has metadata twice: flat, to filter by, and inside of the serialised node.
    flat = {key: value for key, value in payload.items() if key not in before}
    content = json.loads(flat["_node_content"])
    for key in before:
        content["metadata"].pop(key, None)
    content["metadata"] |= after
    return flat | {**after, "_node_content": json.dumps(content, ensure_ascii=False)}
