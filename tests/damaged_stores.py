"""Damage the files of a collection at random, and see what is said about it.

MMRAG_HOSTILE=full pytest -m slow -s tests/store/test_damage.py     # 200 stores
"""

import logging
import os
import pickle
import random
import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fakes import FakeEmbedder

from mmrag.errors import CollectionError
from mmrag.index import UniversalIndex
from mmrag.store.collection import Collection
from mmrag.store.engine import Filter

EMBEDDER = FakeEmbedder()
N_FILES = 24


def build(folder: Path) -> Path:
    """A collection of texts, some of which were changed, moved and removed since."""
    texts = folder / "texts"
    texts.mkdir(parents=True)
    for number in range(N_FILES):
        sections = (f"# Part {part} of {number}\n\nWord{number} in part {part}." for part in "abc")
        (texts / f"{number}.md").write_text("\n\n".join(sections))
    with UniversalIndex(folder / "library", EMBEDDER) as index:
        index.add(texts)
        (texts / "0.md").write_text("# Changed\n\nThis one was changed.")
        (texts / "1.md").rename(texts / "moved.md")
        (texts / "2.md").unlink()
        index.add(texts, prune=True)
    return folder / "library"


def read_all(collection: Collection):
    """Every point, and what searches for every file find."""
    points = {
        point.id: (point.payload, {name: v.tobytes() for name, v in point.vectors.items()})
        for point in collection._engine.scroll(Filter(), vectors=True)
    }
    found = []
    for number in range(N_FILES):
        words = f"word{number}"
        vector = EMBEDDER.encode([words])[0]
        hits = (*collection.search("text", vector, 5), *collection.search_text(words, 5))
        # Nodes of equal score come in any order. A changed mapping gives a point another's id.
        own = all(collection.node(hit.payload).node_id == hit.id for hit in hits)
        found.append(([round(hit.score, 4) for hit in hits], own))
    return points, found, collection.files()


def examined(library: Path):
    """What was read, and everything that was said: an error, warnings, or an examination."""
    said = _Said()
    logging.getLogger("mmrag").addHandler(said)
    read = None
    try:
        with Collection.open(library) as collection:
            found = collection.examine()
            if found.damaged:
                said.lines.append(str(found))
            read = read_all(collection)
    except CollectionError as error:
        said.lines.append(str(error))
    return read, said.lines


def repaired(library: Path):
    """What is read after a repair; None where the collection cannot be opened or repaired."""
    try:
        with UniversalIndex(library, EMBEDDER) as index:
            n_untraced = index.repair(index.collection.examine())
    except CollectionError as error:
        return None, [str(error)]
    read, said = examined(library)
    return read, said + [f"{n_untraced} points are gone"] * bool(n_untraced)


class _Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def damage(shard: Path, dice: random.Random) -> str:
    """Change one file of a shard as disks, copies and other programs do; returns what was done."""
    files = sorted(path for path in shard.rglob("*") if path.is_file() and path.stat().st_blocks)
    sizes = [path.stat().st_blocks if dice.random() < 0.5 else 1 for path in files]
    path = dice.choices(files, sizes)[0]
    data = path.read_bytes()
    used = len(data.rstrip(b"\0")) or len(data)
    way = dice.choice(("flip", "flip", "flip", "zero", "truncate", "delete", "append", "swap"))
    out = bytearray(data)
    match way:
        case "flip":
            for _ in range(dice.choice((1, 20, 500))):
                out[dice.randrange(used)] = dice.randrange(256)
        case "zero":
            start = dice.randrange(used)
            out[start : start + max(1, used // dice.randint(2, 20))] = bytes(
                len(out[start : start + max(1, used // 10)])
            )
        case "truncate":
            del out[dice.randrange(used) :]
        case "append":
            out += dice.randbytes(64)
        case "swap":
            out = bytearray(dice.choice(files).read_bytes())
    path.unlink()
    if way != "delete":
        path.write_bytes(out)
    return f"{way} {path.relative_to(shard)}"


def in_a_child(work: Callable[[], object]):
    """The result of ``work`` in a forked process, or how that ended."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read_end)
        try:
            result = work()
        except BaseException:  # noqa: BLE001 - that it is raised is a finding
            result = traceback.format_exc()
        with os.fdopen(write_end, "wb") as pipe:
            pickle.dump(result, pipe)
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        data = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return pickle.loads(data) if data else f"ended with {status}"


def outcome(library: Path, expected, dice: random.Random) -> tuple[str, str]:
    """Damage a copy of the library once; what became of it, and the particulars."""
    copy = library.with_name("damaged")
    shutil.rmtree(copy, ignore_errors=True)
    subprocess.run(["cp", "-r", "--sparse=always", library, copy], check=True)
    done = damage(copy / "qdrant", dice)
    result = in_a_child(lambda: examined(copy))
    if isinstance(result, str):
        return "raw", f"{done}: {result}"
    read, said = result
    changed = read is not None and read != expected
    if not said:
        return (
            ("SILENT", f"{done}: {difference(read, expected)}") if changed else ("harmless", done)
        )
    again = in_a_child(lambda: repaired(copy))
    if isinstance(again, str):
        return "raw repair", f"{done}: {again}"
    read, said = again
    if read is None:
        return "refused", f"{done}: {said[-1]}"
    # Deleted points count in the scores of BM25 until the engine drops them.
    if not said and (read[0], read[2]) == (expected[0], expected[2]):
        return "repaired", done
    return ("not repaired" if said else "SILENT after repair"), (
        f"{done}: {said} {difference(read, expected)}"
    )


def difference(read, expected) -> str:
    if read is None:
        return "nothing was read"
    (points, found, files), (wanted, hits, entries) = read, expected
    ids = [id_ for id_ in points.keys() | wanted.keys() if points.get(id_) != wanted.get(id_)]
    searches = sum(a != b for a, b in zip(found, hits, strict=True))
    return f"{len(ids)} points, {searches} searches, files {files != entries}"


def check(folder: Path, count: int, seed: int) -> Counter[str]:
    """Damage ``count`` copies of one store; how many ended in each way."""
    library = build(folder)
    expected, said = in_a_child(lambda: examined(library))
    assert expected is not None and not said, said
    dice = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(count):
        name, what = outcome(library, expected, dice)
        counts[name] += 1
        if name not in ("harmless", "repaired"):
            print(name, what)
    print(dict(counts))
    return counts
