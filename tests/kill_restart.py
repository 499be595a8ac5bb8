"""Index with the fake embedder, to be killed: python kill_restart.py COLLECTION PATH..."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fakes import FakeEmbedder

from mmrag.ingest.run import ingest, reading_settings
from mmrag.reading import ReadOptions
from mmrag.store.collection import Collection, CollectionSettings
from mmrag.store.engine import Filter

EMBEDDER = FakeEmbedder()
SETTINGS = CollectionSettings(
    EMBEDDER.name, EMBEDDER.fingerprint, EMBEDDER.dim, reading=reading_settings(ReadOptions(dpi=50))
)


def run(location: Path, paths: list[str]):
    with Collection.open(location, settings=SETTINGS) as collection:
        return ingest(paths, collection, EMBEDDER)


def run_and_kill(location: Path, paths: list[Path], seconds: float) -> bool:
    """Whether the run was still going when it was killed, ``seconds`` after it said it starts."""
    command = [sys.executable, __file__, str(location), *map(str, paths)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "starting\n"
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    alive = process.poll() is None
    if alive:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    return alive


def content(location: Path):
    """Every point of a collection, and its images."""
    with Collection.open(location) as collection:
        points = {
            point.id: (
                point.payload,
                {name: vector.tobytes() for name, vector in point.vectors.items()},
            )
            for point in collection._engine.scroll(Filter(), vectors=True)
        }
    images = location / "images"
    pictures = {p.relative_to(images): p.read_bytes() for p in images.rglob("*") if p.is_file()}
    return points, pictures


def check(folder: Path, paths: list[Path], kills: int, seed: int) -> int:
    """Kill ``kills`` runs at random moments; the last one must end as if undisturbed.

    The moments add up to 0.8 of the time that an undisturbed run takes on this machine, so that
    work is left for the last kill. Returns how many of the runs were killed before their end.
    """
    started = time.monotonic()
    run(folder / "undisturbed", paths)
    undisturbed = time.monotonic() - started
    chance = random.Random(seed)
    parts = [chance.random() for _ in range(kills)]
    moments = [0.8 * undisturbed * part / sum(parts) for part in parts]
    killed = [run_and_kill(folder / "killed", paths, moment) for moment in moments]
    run(folder / "killed", paths)
    expected_points, expected_images = content(folder / "undisturbed")
    points, images = content(folder / "killed")
    assert points.keys() == expected_points.keys()
    for point, expected in expected_points.items():
        assert points[point] == expected, point
    assert images == expected_images
    return sum(killed)


if __name__ == "__main__":
    print("starting", flush=True)
    report = run(Path(sys.argv[1]), sys.argv[2:])
    print(dataclasses.asdict(report) if report.errors else "done", EMBEDDER.encoded)
