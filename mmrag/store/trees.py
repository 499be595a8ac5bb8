"""Folders of files: copied, linked, brought to the state of another, and the room they need."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mmrag.errors import CollectionError

# Files of a shard are sparse and grow by 32 MiB: a page that is touched while the disk is full
# ends the process. Two files may grow in one write.
SPACE_TO_WRITE = 64 * 1024 * 1024


def need_space(folder: Path, doing: str, size: int) -> None:
    """Refuse to begin what a full disk would cut short.

    folder: what is written; its parent exists. size: in bytes.

    Raises:
        CollectionError: If there is too little space.
    """
    free = shutil.disk_usage(folder.parent).free
    needed = SPACE_TO_WRITE + size
    if free < needed:
        raise CollectionError(
            f"cannot {doing} {folder}: the disk has {free / 1e6:.0f} MB free, and "
            f"{needed / 1e6:.0f} MB are needed. Free some space and run the same command "
            "again; what is stored is kept."
        )


def size_on_disk(folder: Path) -> int:
    """Bytes that the files of a folder take; 0 where there is none."""
    # By blocks, since files may be sparse: their sizes say nothing of what they take on the disk.
    return sum(os.lstat(path).st_blocks * 512 for path in files_of(folder))


def files_of(folder: Path) -> Iterator[Path]:
    """The regular files of a folder and those below it; hidden ones are left out."""
    for root, folders, names in os.walk(folder):
        # A collection may come from somebody else: links could lead out of it.
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(root, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file() and not path.is_symlink())


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files of a folder to a new one, and wait until they are on the disk.

    Holes stay holes: the files of a shard may be a hundred times as long as what is in them.
    """
    target.mkdir()
    for root, folders, names in os.walk(source):
        to = target / Path(root).relative_to(source)
        for name in folders:
            (to / name).mkdir()
        for name in names:
            copy_sparse(Path(root, name), to / name)
            sync(to / name)
        sync(to)


def link_tree(source: Path, target: Path) -> None:
    """Link the files of a folder into a new one; where the disk differs they are copied.

    For files that are never changed in place: a link takes no space.
    """
    target.mkdir()
    for path in files_of(source):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        _link(path, to)
    sync(target)


def mirror(source: Path, target: Path, *, remove: bool = True) -> None:
    """Give ``target`` the files of ``source``, one after the other, each whole or not at all.

    It can be cut short and started again; ``source`` is only read.

    remove: delete files of the target that the source lacks, and replace those that differ.
    """
    wanted = {path.relative_to(source): path for path in files_of(source)}
    for name, path in wanted.items():
        to = target / name
        if to.exists() and (not remove or _same(path, to)):
            continue
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f".{to.name}.{os.getpid()}.tmp")
        part.unlink(missing_ok=True)
        _link(path, part)
        part.replace(to)
    if remove:
        for path in [each for each in files_of(target) if each.relative_to(target) not in wanted]:
            path.unlink()
            if path.parent != target and not any(path.parent.iterdir()):
                path.parent.rmdir()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another disk, or a file system without links; a full disk fails once more
        shutil.copy2(path, to)


def _same(one: Path, other: Path) -> bool:
    if one.samefile(other):
        return True
    stats = [(each.stat().st_size, each.stat().st_mtime_ns) for each in (one, other)]
    return stats[0] == stats[1]  # copies keep the time


def copy_sparse(source: str | Path, target: str | Path) -> None:
    """Copy a file without its holes: the engine's files are mostly holes."""
    if not hasattr(os, "SEEK_DATA"):
        shutil.copyfile(source, target)
        return
    with Path(source).open("rb") as read, Path(target).open("wb") as written:
        size = os.fstat(read.fileno()).st_size
        written.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(read.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                # Behind the last data there is none to be found; a full disk is another error.
                if error.errno == errno.ENXIO:
                    return
                raise
            end = os.lseek(read.fileno(), start, os.SEEK_HOLE)
            _copy_range(read.fileno(), written.fileno(), start, end)


def _copy_range(source: int, target: int, start: int, end: int) -> None:
    while start < end:
        block = os.pread(source, min(end - start, 1 << 20), start)
        start += os.pwrite(target, block, start)
