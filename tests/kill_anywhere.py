"""Kill mmrag at any moment of whatever it does to a collection, and end it as if undisturbed.

MMRAG_HOSTILE=full pytest -m slow -s tests/ingest/test_kills.py     # 100 kills
python kill_anywhere.py COLLECTION FOLDER    # one run over all steps, to be killed
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from fakes import FakeEmbedder
from kill_restart import content

from mmrag.index import UniversalIndex
from mmrag.reading import ReadOptions

N_FILES = 40
STEPS = ("starting", "made", "indexed", "again", "removed")
"""What a run says when it begins to create, index, index again, remove and optimise."""


def write_first(files: Path) -> None:
    """What is indexed first."""
    files.mkdir()
    for number in range(N_FILES):
        (files / f"{number:02}.md").write_text(_text("first", number))


def _text(edition: str, number: int) -> str:
    return "\n\n".join(
        f"# Part {part}\n\nThe {edition} words of {number} in part {part}." for part in "abcdefgh"
    )


def write_second(files: Path) -> None:
    """The same folder later: changed, moved, new and missing files."""
    for number in range(0, 8):
        (files / f"{number:02}.md").write_text(_text("second", number))
    for number in range(8, 16):
        with contextlib.suppress(FileNotFoundError):  # moved by the run that was killed
            (files / f"{number:02}.md").rename(files / f"moved-{number:02}.md")
    for number in range(16, 20):
        (files / f"{number:02}.md").unlink(missing_ok=True)
    for number in range(4):
        (files / f"new-{number}.md").write_text(_text("new", number))


def run(library: Path, files: Path) -> None:
    """Creation, indexing, optimising, indexing again with changes, removing."""
    os.chdir(files.parent)
    with UniversalIndex(library, FakeEmbedder(), reading=ReadOptions(dpi=50)) as index:
        print("made", flush=True)
        if not (files / "new-3.md").exists():
            index.add(files.name)
            print("indexed", flush=True)
            write_second(files)
        index.add(files.name, prune=True)
        print("again", flush=True)
        index.remove("2?.md")
        print("removed", flush=True)
        index.collection.optimize()


def start(library: Path, files: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, str(library), str(files)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    return process


def wait_for(process: subprocess.Popen, step: str) -> str:
    """Read what the run says until it says ``step``, or ends; returns the last word."""
    assert process.stdout is not None
    last = STEPS[0]
    while last != step and (line := process.stdout.readline()):
        last = line.strip()
    return last


def run_and_kill(library: Path, files: Path, step: str, seconds: float) -> str | None:
    """Kill a run so long after it came to a step.

    Returns the step that was killed, which may be a later one; None where the run ended before.
    """
    process = start(library, files)
    last = wait_for(process, step)
    time.sleep(seconds)
    alive = process.poll() is None
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    said = process.communicate()[0].split()
    return [last, *said][-1] if alive else None


def check(folder: Path, kills: int, seed: int) -> dict[str, int]:
    """Kill runs until there were ``kills`` kills; each library ends as an undisturbed one.

    A library is killed one to four times, each time in a step drawn by lot, and then finished.
    Returns how many kills hit each step.
    """
    dice = random.Random(seed)
    expected, seconds = _undisturbed(folder / "undisturbed")
    where: dict[str, int] = {}
    while sum(where.values()) < kills:
        shutil.rmtree(folder / "killed", ignore_errors=True)
        (folder / "killed").mkdir()
        library, files = folder / "killed" / "library", folder / "killed" / "files"
        write_first(files)
        for _ in range(dice.randint(1, 4)):
            step = dice.choice(STEPS)
            after = run_and_kill(library, files, step, dice.uniform(0, seconds[step]))
            if after is not None:
                where[after] = where.get(after, 0) + 1
        assert start(library, files).wait(600) == 0
        _assert_same(library, expected)
    print(where)
    return where


def _undisturbed(folder: Path):
    """What a run leaves behind that nobody kills, and the seconds of each step."""
    folder.mkdir()
    write_first(folder / "files")
    process = start(folder / "library", folder / "files")
    seconds = {}
    for step, following in pairwise([*STEPS, "the end"]):
        started = time.monotonic()
        wait_for(process, following)
        seconds[step] = time.monotonic() - started
    assert process.wait(600) == 0
    return _content(folder / "library"), seconds


def _content(library: Path):
    """Points without the folder that their files were in, and images."""
    points, images = content(library)
    kept = {
        id_: ({k: v for k, v in payload.items() if k != "folder"}, vectors)
        for id_, (payload, vectors) in points.items()
    }
    with UniversalIndex(library, FakeEmbedder()) as index:
        assert not index.collection.examine().damaged
        assert index.collection.unfinished() == {}
    return kept, images


def _assert_same(library: Path, expected) -> None:
    points, images = _content(library)
    assert points.keys() == expected[0].keys()
    for point, wanted in expected[0].items():
        assert points[point] == wanted, point
    assert images == expected[1]


if __name__ == "__main__":
    print("starting", flush=True)
    run(Path(sys.argv[1]), Path(sys.argv[2]))
