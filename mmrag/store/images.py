"""The folder of a collection's page images, and which paths in a payload may be used.

A collection may come from somebody else, so a path that it holds is not trusted: an image is
read or deleted only if it lies in the collection's own folder of images, links resolved.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llama_index.core.schema import BaseNode, ImageNode, Node

from mmrag.content import ImageSource, load_image
from mmrag.errors import CollectionError
from mmrag.nodes import node_image
from mmrag.reading import is_url, words_path
from mmrag.reading.files import IMAGES_MARK, write

log = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")

NOTES = "sources"
"""Folder of notes that say which content a URL had."""
COPY = "original"
"""Name without suffix of the copy of a file that came from a URL."""


class ImageFolder:
    """Where page images are, and how their paths are stored.

    Args:
        path: the folder of images; it need not exist yet.
        home: the folder of an embedded collection: paths are stored relative to it, so that it
            can be moved. None for a collection on a server: paths are stored absolute.
    """

    def __init__(self, path: Path, home: Path | None) -> None:
        self.path = path
        self._real_path = path.resolve()
        self._home = home
        self._warned = False

    def make(self, *, given: bool) -> None:
        """Make the folder, marked so that indexing passes it over.

        given: whether the user named the folder; otherwise it must not lead out of ``home``.

        Raises:
            CollectionError: For a folder that holds links or, not given, is one.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        inside = self._home is None or self._real_path.is_relative_to(self._home.resolve())
        if not given and not inside:
            raise CollectionError(
                f"{self.path} is a link to {self._real_path}, outside of the collection. If "
                "that is intended, pass that folder as images_dir."
            )
        # Images are written to and deleted from the folders in here.
        with os.scandir(self.path) as entries:
            links = [entry.name for entry in entries if entry.is_symlink()]
        if links:
            raise CollectionError(
                f"{self.path} holds links ({links[0]}), which mmrag never makes; delete them."
            )
        mark = self.path / IMAGES_MARK
        if not mark.exists():
            mark.touch()

    def stored(self, path: Path, node_id: str) -> Path:
        """How the path of a node's image is stored; one from elsewhere is copied in here.

        Raises:
            CollectionError: For a path in here that links lead elsewhere.
        """
        absolute = path.absolute()
        if self._holds(absolute):
            pass
        elif absolute.is_relative_to(self.path):
            raise CollectionError(
                f"{path} is a link to {absolute.resolve()}, outside of the collection; delete it."
            )
        elif absolute.is_file():
            # A folder of its own for each node: files of one name would replace each other.
            own = self.path / _own_folder(node_id) / absolute.name
            # Replaced and not changed in place: snapshots hold links to images.
            write(own, absolute.read_bytes())
            absolute = own
        if self._home is not None and absolute.is_relative_to(self._home):
            return absolute.relative_to(self._home)
        return absolute

    def saved(self, image: ImageSource, node_id: str) -> Path:
        """Keep a node's image in a file of its own. Returns its absolute path.

        Raises:
            ContentError: If it is no image.
        """
        own = self.path / _own_folder(node_id) / "image.png"
        data = io.BytesIO()
        # Encoded anew: nothing but pixels is stored, and the suffix is right.
        load_image(image).save(data, "PNG")
        write(own, data.getvalue())
        return own

    def found(self, stored: Path) -> Path | None:
        """The way back from ``stored``; None for a path that may not be read."""
        path = stored if self._home is None else self._home / stored
        # On a server the default images_dir depends on the working directory: page images are
        # found from another one too, two levels below the mark of a folder that mmrag made.
        marked = path.resolve().parents[1:2] if self._home is None else ()
        if self._holds(path) or any((folder / IMAGES_MARK).is_file() for folder in marked):
            return path
        # Once: a collection that was moved without its images has thousands of such paths.
        if not self._warned:
            self._warned = True
            log.warning("Images outside of %s are not used, such as %s.", self.path, stored)
        return None

    def remove(self, stored: set[Path], hashes: set[str]) -> None:
        """Delete images by stored path, and the folders that reading made for files."""
        for path in stored:
            absolute = path if self._home is None else self._home / path
            if self._holds(absolute):
                absolute.unlink(missing_ok=True)
                words_path(absolute).unlink(missing_ok=True)
                if absolute.parent != self.path and not any(absolute.parent.iterdir()):
                    absolute.parent.rmdir()
        for sha256 in hashes:
            # The hash comes from a payload; "../.." would delete another folder.
            if _SHA256.fullmatch(sha256):
                shutil.rmtree(self.path / sha256[:16], ignore_errors=True)

    def _holds(self, path: Path) -> bool:
        return path.resolve().is_relative_to(self._real_path)


def copy_of(images_dir: Path, sha256: str) -> Path | None:
    """The copy of a content that came from a URL, which lies beside its page images."""
    # The hash may come from a payload; "../.." would name another folder.
    if not _SHA256.fullmatch(sha256):
        return None
    folder = images_dir / sha256[:16]
    inside = (p for p in folder.glob(f"{COPY}.*") if p.resolve().parent == folder.resolve())
    return next(inside, None)


def original_path(payload: Mapping[str, Any], images_dir: Path) -> Path:
    """Where the bytes of an indexed file should be: its path, or the copy of what its URL names.

    payload: of a node or of the file's entry, with ``file``, ``folder`` and ``sha256``.
    """
    if is_url(payload["file"]):
        # The last part of a URL stands for a copy that is gone: there is no such file.
        missing = images_dir / Path(payload["file"]).name
        return copy_of(images_dir, str(payload["sha256"])) or missing
    return Path(payload.get("folder", ""), payload["file"])


def _own_folder(node_id: str) -> str:
    return hashlib.sha256(node_id.encode()).hexdigest()[:16]


def image_paths(node: BaseNode) -> set[Path]:
    """The image of a node and that of its page."""
    paths = (node_image(node), node.metadata.get("page_image"))
    return {Path(path) for path in paths if path}


def with_image_paths(node: BaseNode, change: Callable[[Path], Path | None]) -> BaseNode:
    """Change the image paths of ``node`` in place; one that becomes None is taken away."""
    image = node_image(node)
    if isinstance(node, ImageNode) and image:
        path = change(image)
        node.image_path = None if path is None else path.as_posix()
    elif isinstance(node, Node) and node.image_resource and image:
        path = change(image)
        resource = node.image_resource.model_copy(update={"path": path})
        node.image_resource = resource if path is not None else None
    if node.metadata.get("page_image"):
        path = change(Path(node.metadata["page_image"]))
        if path is None:
            del node.metadata["page_image"]
        else:
            node.metadata["page_image"] = path.as_posix()
    return node
