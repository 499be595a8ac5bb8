"""Copy a collection: to a server or from one, with vectors cut, or quantized otherwise.

Points, images, copies of what URLs named, and uploads. Nothing is read or embedded again.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
from numpy.typing import NDArray

from mmrag.embedders.base import truncate_normalise
from mmrag.errors import ConfigError
from mmrag.reading import words_path
from mmrag.store.engine import AnyOf, Engine, Filter, Point, in_batches
from mmrag.store.images import NOTES, ImageFolder, copy_of, with_image_paths
from mmrag.store.making import SETTINGS_ID
from mmrag.store.restoring import UPLOADS, beside_images
from mmrag.store.settings import VIEWS, CollectionSettings
from mmrag.store.trees import mirror

_BATCH_POINTS = 64
# The fields of a payload in which the path of a file or an image stands.
_WITH_PATHS = ("_node_content", "page_image", "file")

# Vectors (n, d) to (n, d of the target), each of L2 norm 1.
Change = Callable[[NDArray[np.float32]], NDArray[np.float32]]


def cut_to(source: CollectionSettings, target: CollectionSettings) -> Change:
    """Cut vectors to the target's dimension.

    Raises:
        ConfigError: If they are shorter already.
    """
    if target.dim > source.dim:
        raise ConfigError(
            f"dim={target.dim}: the vectors have {source.dim} dimensions, and can only be cut."
        )
    return lambda vectors: truncate_normalise(vectors, target.dim)


def check_target(source: CollectionSettings, target: CollectionSettings, mapped: bool) -> None:
    """Raise ConfigError if the target's settings differ in more than a copy may change.

    mapped: whether vectors are mapped into the space of another embedder.
    """
    free = {"dim", "quantization"} | ({"embedder", "fingerprint"} if mapped else set())
    changed = {name: getattr(target, name) for name in free}
    if target != dataclasses.replace(source, **changed):
        raise ConfigError("The target was built with other settings; give a new one.")


@dataclass(frozen=True)
class Copying:
    """Copies the points of one engine to another, with their images and uploads.

    change: of the vectors of each view.
    """

    source: Engine
    source_images: ImageFolder
    target: Engine
    target_images: ImageFolder
    change: Change

    def run(self, progress: Callable[[int, int], None] | None = None) -> int:
        """Copy what is not in the target yet; returns how many points that was.

        progress: called with the number of points that are done, and of all.
        """
        # Before the points, which say where they are.
        mirror(*self._uploads, remove=False)
        n_copied, done, total = 0, 0, self.source.count(Filter())
        files = AnyOf("kind", ("file",))
        # Files last: one that is known in the target has all of its nodes there, also after a kill.
        for part in (Filter(must_not=(files,)), Filter(must=(files,))):
            for batch in in_batches(self.source.scroll(part, vectors=True), _BATCH_POINTS):
                there = self.target.retrieve([point.id for point in batch], payload=False)
                kept = {point.id for point in there} | {SETTINGS_ID}
                missing = [self._copied(point) for point in batch if point.id not in kept]
                if missing:
                    self.target.upsert(missing)
                n_copied, done = n_copied + len(missing), done + len(batch)
                if progress is not None:
                    progress(done, total)
        for note in (self.source_images.path / NOTES).glob("*.json"):
            _copy_file(note, self.target_images.path / NOTES / note.name)
        self.target.flush()
        return n_copied

    def _copied(self, point: Point) -> Point:
        vectors = {
            # The vectors of late interaction are of another model, and stay as they are.
            name: self.change(vector[None])[0] if name in VIEWS else vector
            for name, vector in point.vectors.items()
        }
        if point.payload.get("kind") == "file":
            kept = copy_of(self.source_images.path, str(point.payload.get("sha256")))
            if kept is not None:
                _copy_file(kept, self.target_images.path / kept.parent.name / kept.name)
            file = self._file(point.payload["file"])
            return Point(point.id, point.payload | {"file": file}, vectors)
        node = metadata_dict_to_node(point.payload)
        if "file" in node.metadata:
            node.metadata["file"] = self._file(node.metadata["file"])
        moved = with_image_paths(node, lambda stored: self._moved(stored, node.node_id))
        changed = node_to_metadata_dict(moved)
        # The rest may differ from what the node's metadata say, as for nodes that were inserted.
        payload: dict[str, Any] = {key: changed[key] for key in _WITH_PATHS if key in changed}
        return Point(point.id, point.payload | payload, vectors)

    @cached_property
    def _uploads(self) -> tuple[Path, Path]:
        """Where uploads were, and where they are from now on."""
        images = (self.source_images, self.target_images)
        old, new = (beside_images(each.path, UPLOADS).resolve() for each in images)
        return old, new

    def _file(self, file: str) -> str:
        """The path of a file from now on: that of its copy, if it was uploaded."""
        old, new = self._uploads
        return str(new / Path(file).name) if Path(file).parent.resolve() == old else file

    def _moved(self, stored: Path, node_id: str) -> Path | None:
        """Copy an image, and the boxes of its words; returns how the copy's path is stored."""
        path = self.source_images.found(stored)
        if path is None:
            return None
        copy = self.target_images.path / path.parent.name / path.name
        if path.is_file() and not copy.is_file():
            # The image last: where it is there, its boxes are too.
            _copy_file(words_path(path), words_path(copy))
            _copy_file(path, copy)
        return self.target_images.stored(copy, node_id)


def _copy_file(path: Path, to: Path) -> None:
    """Copy a file that may be missing; it appears when it is complete."""
    if not path.is_file() or to.is_file():
        return
    to.parent.mkdir(exist_ok=True)
    part = to.with_name(f".{to.name}.tmp")
    shutil.copyfile(path, part)
    part.replace(to)
