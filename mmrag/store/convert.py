"""Copy points, images and what URLs named: to a server or from one, cut, or quantized otherwise.

Nothing is read or embedded again.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
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
from mmrag.store.settings import VIEWS, CollectionSettings

_BATCH_POINTS = 64
# The fields of a payload in which the path of an image may stand.
_WITH_PATHS = ("_node_content", "page_image")

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
    """Copies the points of one engine to another, with their images.

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
            return Point(point.id, point.payload, vectors)
        node = metadata_dict_to_node(point.payload)
        moved = with_image_paths(node, lambda stored: self._moved(stored, node.node_id))
        changed = node_to_metadata_dict(moved)
        # The rest may differ from what the node's metadata say, as for nodes that were inserted.
        payload: dict[str, Any] = {key: changed[key] for key in _WITH_PATHS if key in changed}
        return Point(point.id, point.payload | payload, vectors)

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
