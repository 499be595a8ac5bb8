"""Processes that open one new folder at the same moment, and write the same files to it.

``MMRAG_HOSTILE=full pytest -m slow -s tests/store/test_processes.py`` plays 200 rounds.
"""

import os
import random
import shutil
import time
from collections import Counter

import pytest
from damaged_stores import in_a_child
from fakes import FakeEmbedder, make_node

from mmrag.errors import CollectionError
from mmrag.store.collection import Collection, CollectionSettings, FileEntry

FULL = os.environ.get("MMRAG_HOSTILE") == "full"
EMBEDDER = FakeEmbedder()
SETTINGS = CollectionSettings(EMBEDDER.name, EMBEDDER.fingerprint, EMBEDDER.dim)
N_FILES, N_NODES = 25, 4


def fill(library, delay: float) -> str:
    """Open, or make, the collection and write all files to it; what came of that."""
    time.sleep(delay)
    try:
        with Collection.open(library, settings=SETTINGS) as collection:
            for number in range(N_FILES):
                sha256, name = f"{number:064x}", f"{number}.txt"
                nodes = [
                    make_node(f"node {i} of {number}", file=name, sha256=sha256, page=None, index=i)
                    for i in range(N_NODES)
                ]
                texts = [node.text for node in nodes]
                vectors = [{"text": vector} for vector in EMBEDDER.encode(texts)]
                collection.write(nodes, vectors)
                collection.mark_done(FileEntry(name, sha256, 1, N_NODES))
    except CollectionError as error:
        return "in use" if "in use by another process" in str(error) else str(error)
    return "done"


def at_once(library, delays: list[float]) -> list[str]:
    """What each of several processes says."""
    waiting = []
    for delay in delays:
        read_end, write_end = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(write_end, str(in_a_child(lambda: fill(library, delay))).encode())  # noqa: B023
            os._exit(0)
        os.close(write_end)
        waiting.append((child, read_end))
    said = []
    for child, read_end in waiting:
        with os.fdopen(read_end, "rb") as pipe:
            said.append(pipe.read().decode())
        os.waitpid(child, 0)
    return said


@pytest.mark.slow
def test_two_and_three_processes_at_once_leave_one_sound_collection(tmp_path):
    dice = random.Random(20261127)
    counts: Counter[str] = Counter()
    for number in range(200 if FULL else 20):
        library = tmp_path / "library"
        shutil.rmtree(library, ignore_errors=True)
        said = at_once(library, [dice.uniform(0, 0.06) for _ in range(2 + number % 2)])
        assert set(said) <= {"done", "in use"}, said
        assert "done" in said
        counts[f"{said.count('done')} of {len(said)} done"] += 1
        with Collection.open(library) as collection:
            assert not collection.examine().damaged
            assert len(collection.files()) == N_FILES
            assert collection.count() == N_FILES * N_NODES
    print(dict(counts))
