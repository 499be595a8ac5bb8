"""A disk that is full, on a file system of its own, at any moment of indexing.

The command must say so, leave the collection sound, and end as if undisturbed when there is space.
``MMRAG_HOSTILE=full pytest -m slow -s tests/ingest/test_full_disk.py`` tries 20 moments.
"""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
from fakes import FakeEmbedder
from kill_restart import content

from mmrag.index import UniversalIndex

FULL = os.environ.get("MMRAG_HOSTILE") == "full"
SIZE = 512 * 1024 * 1024  # optimising a new collection takes half of it
CODE = """
import sys
from fakes import FakeEmbedder
from mmrag.errors import MMRagError
from mmrag.index import UniversalIndex
from mmrag.reading import ReadOptions
try:
    with UniversalIndex(sys.argv[1], FakeEmbedder(), reading=ReadOptions(dpi=50)) as index:
        report = index.add(sys.argv[2])
        print("lost", report.errors[0]) if report.errors else print("done")
except MMRagError as error:
    print("refused", error)
"""


@contextmanager
def small_disk(folder: Path):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root, and a system that lets it")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def write_files(folder: Path) -> None:
    import pymupdf

    folder.mkdir()
    for number in range(30):
        text = "\n\n".join(f"# Part {part}\n\nWords of {number}." for part in range(20))
        (folder / f"{number:02}.md").write_text(text)
    for number in range(6):
        with pymupdf.open() as document:
            for page in range(4):
                document.new_page().insert_text((72, 72), f"Sheet {page} of {number}")
            document.save(folder / f"{number}.pdf")


def index(library: Path, files: Path) -> tuple[int, str]:
    """Exit status, negative for a signal, and what was said."""
    command = [sys.executable, "-c", CODE, str(library), str(files)]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    return done.returncode, (done.stdout or done.stderr).strip()


def fill(ballast: Path, left: int) -> None:
    """Fill the disk but for ``left`` bytes."""
    free = os.statvfs(ballast.parent).f_bavail * 4096
    with ballast.open("ab") as file:
        while free > left:
            file.write(bytes(min(4 << 20, free - left)))
            file.flush()
            free = os.statvfs(ballast.parent).f_bavail * 4096


@contextmanager
def filling(ballast: Path, dice: random.Random):
    """The disk has little space from the beginning, or another program fills it meanwhile."""
    if dice.random() < 0.5:
        fill(ballast, dice.randrange(180 << 20))
        yield
        return
    stop = threading.Event()

    def write() -> None:
        stop.wait(dice.uniform(1, 6))
        with ballast.open("ab") as file:
            while not stop.is_set():
                try:
                    file.write(bytes(1 << 20))
                    file.flush()
                except OSError:  # it is full
                    return
                time.sleep(0.005)

    writer = threading.Thread(target=write)
    writer.start()
    yield
    stop.set()
    writer.join()


@pytest.mark.slow
def test_a_full_disk_is_said_and_loses_nothing(tmp_path):
    write_files(tmp_path / "files")
    assert index(tmp_path / "undisturbed", tmp_path / "files") == (0, "done")
    expected = content(tmp_path / "undisturbed")
    dice = random.Random(20261127)
    counts: Counter[str] = Counter()
    for moment in range(20 if FULL else 5):
        disk = tmp_path / f"disk{moment}"
        with small_disk(disk):
            with filling(disk / "ballast", dice):
                code, said = index(disk / "library", tmp_path / "files")
            assert code == 0, f"moment {moment}: {code} {said}"
            counts[said.split()[0]] += 1
            assert said == "done" or "space" in said or "disk" in said, said
            (disk / "ballast").unlink(missing_ok=True)
            assert index(disk / "library", tmp_path / "files") == (0, "done")
            assert content(disk / "library") == expected
            with UniversalIndex(disk / "library", FakeEmbedder()) as library:
                assert not library.collection.examine().damaged
    print(dict(counts))
    assert counts["done"] < counts.total()
