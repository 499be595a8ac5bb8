"""Search over many nodes in an embedded collection: latency, recall, memory, by setting.

    make bench NAMES=scale                              # 100,000 nodes
    python docs/benchmarks/scale.py --nodes 200000 --json scale.json --folder built

Nodes have a text of made-up words, an image vector and a text vector, in clusters as those of
models are. A search ranks both views and BM25, a hundred nodes each, and fuses them by page,
through ``UniversalRetriever``; the query's vector is given, so that no model takes part. Latency is
that of the first questions to a collection that was just opened (``first``), which read from disk
what pages the nodes found are on, and of other questions when ``warm_up`` has read that of all
nodes (``warm``). Recall is that of the ten nearest by text vector, against exact search.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

DIM = 384
N_QUERIES = 300
PAGES_PER_FILE = 30
SETTINGS = ("none", "int8", "binary")


def vectors(n: int, seed: int) -> np.ndarray:
    """(n, DIM) float32 of length 1, around n / 50 centres that every seed shares."""
    centres = np.random.default_rng(0).standard_normal((max(1, n // 50), DIM))
    chance = np.random.default_rng(seed)
    rows = centres[chance.integers(0, len(centres), n)] + 0.7 * chance.standard_normal((n, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def texts(n: int) -> list[str]:
    """Sixty words each, drawn by Zipf's law from 50,000."""
    chance = np.random.default_rng(1)
    numbers = np.minimum(chance.zipf(1.2, (n, 60)), 50_000)
    # Of letters alone: a word with digits is two terms.
    digits = str.maketrans("0123456789", "bdfgklmnpr")
    return [" ".join(f"{number}".translate(digits) for number in row) for row in numbers]


class NoModel:
    """What a retriever asks of an embedder when the vector comes with the query."""

    name, fingerprint, dim, modalities = "given", "1", DIM, frozenset(("text", "image"))


def fill(folder: Path, n: int, quantization: str) -> dict[str, float]:
    """Write ``n`` nodes and build the indexes; seconds and bytes."""
    from llama_index.core.schema import TextNode

    from mmrag.store.collection import Collection, CollectionSettings

    settings = CollectionSettings("given", "1", DIM, language="english", quantization=quantization)
    image, text, words = vectors(n, 2), vectors(n, 3), texts(n)
    started = time.perf_counter()
    with Collection.open(folder, settings=settings) as collection:
        for first in range(0, n, 500):
            rows = range(first, min(n, first + 500))
            nodes = [
                TextNode(
                    text=words[row],
                    metadata={
                        "file": f"file-{row // PAGES_PER_FILE}.pdf",
                        "page": row % PAGES_PER_FILE + 1,
                        "kind": "page",
                    },
                )
                for row in rows
            ]
            collection.write(nodes, [{"image": image[r], "text": text[r]} for r in rows])
        written = time.perf_counter()
        collection.optimize()
        optimized = time.perf_counter()
    size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    return {
        "write_s": written - started,
        "optimize_s": optimized - written,
        "kilobytes_a_node": size / n / 1000,
    }


def measure(folder: Path, n: int) -> dict[str, float]:
    """Open the collection and search: in a process of its own, whose memory is counted."""
    from llama_index.core.schema import QueryBundle

    from mmrag.retrieval.fusion import PAGE_FIELDS
    from mmrag.retrieval.retriever import UniversalRetriever
    from mmrag.store.collection import Collection

    text, words = vectors(n, 3), texts(n)
    chance = np.random.default_rng(4)
    # Of each of the two passes its own: a question that is asked again finds all in memory.
    rows = chance.integers(0, n, 2 * N_QUERIES)
    asked = text[rows] + 0.4 / DIM**0.5 * chance.standard_normal((len(rows), DIM))
    asked = (asked / np.linalg.norm(asked, axis=1, keepdims=True)).astype(np.float32)
    # What was allocated up to here is not the collection's.
    before = resident_mib()
    started = time.perf_counter()
    collection = Collection.open(folder)
    opened = time.perf_counter() - started
    retriever = UniversalRetriever(collection, NoModel(), similarity_top_k=8)  # type: ignore[arg-type]

    def times(when: str, first: int) -> dict[str, float]:
        """Ask N_QUERIES of the questions; milliseconds."""
        seconds, cpu = [], []
        for row, vector in list(zip(rows, asked, strict=True))[first : first + N_QUERIES]:
            query = QueryBundle(" ".join(words[row].split()[:8]), embedding=vector.tolist())
            started, used = time.perf_counter(), time.process_time()
            retriever.retrieve(query)
            seconds.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        return {
            f"{when}_p50_ms": 1000 * float(np.percentile(seconds, 50)),
            f"{when}_p99_ms": 1000 * float(np.percentile(seconds, 99)),
            # CPU of this process: beside other programs it says more than the time on the clock.
            f"{when}_cpu_p50_ms": 1000 * float(np.percentile(cpu, 50)),
            f"{when}_min_ms": 1000 * min(seconds),
        }

    figures = {"open_s": opened} | times("first", 0)
    started = time.perf_counter()
    collection.read_ahead(PAGE_FIELDS).join()
    figures["read_ahead_s"] = time.perf_counter() - started
    figures |= times("warm", N_QUERIES)
    found = 0
    for vector in asked[:N_QUERIES]:
        hits = collection.search("text", vector, 10)
        # Ranks by the stored vectors' own scores: a tie is as good as the one it ties with.
        tenth = np.partition(text @ vector, -10)[-10]
        found += sum(hit.score >= tenth - 1e-5 for hit in hits)
    figures |= {"recall_at_10": found / (10 * N_QUERIES), "memory_mib": resident_mib() - before}
    collection.close()
    return figures


def resident_mib() -> float:
    """Memory of this process, files of the collection that are mapped into it included."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line
    )
    return int(line.split()[1]) / 1024


def run(n: int, settings: tuple[str, ...] = SETTINGS, keep: Path | None = None) -> dict[str, Any]:
    """A row for each setting; prints each as it comes.

    keep: folder for the collections, where those of an earlier run are measured as they are.
    """
    columns = (
        "write_s",
        "optimize_s",
        "open_s",
        "read_ahead_s",
        *(
            f"{when}_{of}_ms"
            for when in ("first", "warm")
            for of in ("p50", "p99", "cpu_p50", "min")
        ),
        "recall_at_10",
        "memory_mib",
        "kilobytes_a_node",
    )
    print(f"{n} nodes, {DIM} dimensions; {platform.machine()}, Python {platform.python_version()}")
    print(f"| codes | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|", flush=True)
    rows: dict[str, Any] = {}
    for setting in settings:
        with tempfile.TemporaryDirectory() as scratch:
            folder = (keep or Path(scratch)) / f"{n}-{setting}"
            built = folder.with_suffix(".json")
            if not built.exists():
                # What a run that was interrupted has left.
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(parents=True, exist_ok=True)
                built.write_text(json.dumps(fill(folder, n, setting)))
            row = json.loads(built.read_text())
            done = subprocess.run(
                [sys.executable, __file__, "--measure", str(folder), "--nodes", str(n)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            rows[setting] = row | json.loads(done.stdout)
        cells = (f"{rows[setting][column]:.3g}" for column in columns)
        print(f"| {setting} | {' | '.join(cells)} |", flush=True)
    return {"nodes": n, "dim": DIM, "rows": rows}


def main() -> None:
    """Measure, or in a child process search one collection."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--folder", type=Path, help="keep the collections here, and use them again")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.nodes)))
        return
    figures = run(options.nodes, tuple(options.settings), options.folder)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
