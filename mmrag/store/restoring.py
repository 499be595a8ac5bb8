"""Another version takes the place of a collection's files, as a whole or not at all.

``prepare`` makes a complete copy beside the collection, under a name that nothing looks at, and
renames it to ``restored``: from then on the new version holds. ``finish`` moves it into place. A
process that is killed before the renaming leaves the old version; one that is killed after it
leaves work that the next opening of the collection ends, before it reads anything.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mmrag.store.point_count import COUNT
from mmrag.store.trees import copy_tree, link_tree, mirror, sync

SHARD = "qdrant"
IMAGES = "images"
UPLOADS = "uploads"
SNAPSHOTS = "snapshots"
RESTORED = "restored"
_UNFINISHED, _DONE = f"{RESTORED}.new", f"{RESTORED}.done"


def beside_images(images: Path, name: str) -> Path:
    """A folder that belongs to a collection: ``name`` in its folder, else beside its images."""
    # Page images are kept under this name in a collection's folder.
    return images.parent / (name if images.name == IMAGES else f"{images.name}-{name}")


def prepare(version: Path, folder: Path, n_points: int) -> None:
    """Make a copy of a version that ``finish`` can move into a collection's folder.

    version: a folder with the shard, images and uploads. n_points: of the shard.
    """
    for name in (_UNFINISHED, _DONE):
        shutil.rmtree(folder / name, ignore_errors=True)
    unfinished = folder / _UNFINISHED
    unfinished.mkdir()
    copy_tree(version / SHARD, unfinished / SHARD)
    # Links, so that `finish` can be repeated: what it reads does not change.
    for name in (IMAGES, UPLOADS):
        link_tree(version / name, unfinished / name)
    (unfinished / f"{SHARD}{COUNT}").write_text(str(n_points), encoding="ascii")
    sync(unfinished)
    unfinished.rename(folder / RESTORED)
    sync(folder)


def finish(folder: Path, images: Path) -> None:
    """End what ``prepare`` began, if it did. The caller holds the collection's lock.

    images: the collection's folder of page images.
    """
    restored = folder / RESTORED
    if not restored.is_dir():
        return
    if (restored / SHARD).is_dir():
        # A folder cannot be renamed over another one that holds files.
        if (folder / SHARD).exists():
            shutil.rmtree(folder / SHARD)
        (restored / SHARD).rename(folder / SHARD)
    count = Path(f"{folder / SHARD}{COUNT}")
    if (restored / count.name).exists():
        (restored / count.name).replace(count)
    mirror(restored / IMAGES, images)
    mirror(restored / UPLOADS, beside_images(images, UPLOADS))
    sync(folder)
    # Renamed first: half deleted, it would look like a version with fewer images.
    restored.rename(folder / _DONE)
    shutil.rmtree(folder / _DONE, ignore_errors=True)
