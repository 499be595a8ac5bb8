"""Indexing a folder beside its parts: reading alone, and embedding the same nodes alone.

    python docs/benchmarks/indexing.py pdfs/ --model mmrag-nano
    python docs/benchmarks/indexing.py pdfs/ --model path/to/model --family gme

End to end is the rate of UniversalIndex.add. Memory is that of this process: its peak when half
of the pages are stored and at the end show whether it grows with their number. Queries go to the
same embedder, twenty a second at most: first alone, then while the folder is indexed once more.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from gpu_table import Table, machine, median_ms, versions

from mmrag import Progress, ReadOptions, UniversalIndex, load_embedder
from mmrag.content import Content
from mmrag.embedders.base import Embedder
from mmrag.ingest.prefetch import run_ahead
from mmrag.ingest.writer import node_views
from mmrag.reading import find_files, read_file


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="mmrag-nano")
    parser.add_argument("--family", default=None)
    parser.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    options = parser.parse_args()
    embedder = load_embedder(options.model, family=options.family)
    files, reading = find_files([options.folder]).files, ReadOptions(ocr="off")
    table = Table(seconds=24 * 3600)
    print(machine(), versions(), sep="\n")
    table.head(f"{len(files)} files, {options.model}")
    with tempfile.TemporaryDirectory() as folder:
        contents: list[Content] = []
        pages = 0

        def read_all() -> float:
            nonlocal pages
            started = time.perf_counter()
            images = Path(folder, "images")

            def read(path: Path, put: object) -> None:
                for page in read_file(path, images, reading, put):  # type: ignore[arg-type]
                    put(page)  # type: ignore[operator]

            for _, page in run_ahead(read, files, 1, 64):
                nodes = getattr(page, "nodes", [])
                pages += bool(nodes)
                cut = any(node.metadata.get("kind") == "passage" for node in nodes)
                for node in nodes:
                    contents.extend(node_views(node, ("image", "text"), embedder, cut).values())
            return pages / (time.perf_counter() - started)

        def embed_all() -> float:
            started = time.perf_counter()
            embedder.encode(contents)
            return pages / (time.perf_counter() - started)

        peaks: list[tuple[int, float]] = []

        def add() -> float:
            def show(now: Progress) -> None:
                peaks.append((now.pages, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))

            with UniversalIndex(Path(folder, "library"), embedder, reading=reading) as index:
                report = index.add(options.folder, progress=show)
            return report.pages / report.seconds

        embedder.encode(["a first text"])
        alone = "embedding the same nodes alone"
        table.line("reading alone", "pages/s", 0, read_all)
        table.line("UniversalIndex.add", "pages/s", 0, add)
        table.line(alone, "pages/s", 0, embed_all)
        rates = {line.what: line.value or 0.0 for line in table.lines}
        ratio = rates["UniversalIndex.add"] / rates[alone]
        query = "one query, median"
        table.line(query, "ms", 0, lambda: query_ms(embedder, 100))
        with UniversalIndex(Path(folder, "second"), embedder, reading=reading) as index:
            adding = threading.Thread(target=index.add, args=(options.folder,))
            adding.start()
            time.sleep(2)  # until pages are embedded
            table.line(
                f"{query}, while indexing",
                "ms",
                0,
                lambda: query_ms(embedder, 200, adding.is_alive),
                against=query,
            )
            adding.join()
        half = next(peak for stored, peak in peaks if stored >= pages / 2)
        print(f"\n{pages} pages, {len(contents)} items; add is {ratio:.2f} of embedding alone")
        print(f"peak memory: {half:.0f} MiB at half, {peaks[-1][1]:.0f} MiB at the end")
        options.out.mkdir(parents=True, exist_ok=True)
        found = {"machine": machine(), "rates": rates, "ratio": ratio, "peaks": peaks}
        (options.out / "indexing.json").write_text(json.dumps(found, indent=1))


def query_ms(embedder: Embedder, most: int, goes_on: Callable[[], bool] = lambda: True) -> float:
    """Median milliseconds to embed a question of nine words, another one each time."""

    def questions() -> Iterator[str]:
        for n in range(most):
            if not goes_on():
                return
            yield f"what does plan {n} pay for the {n + 1}th visit"
            time.sleep(0.05)

    ask = partial(embedder.encode, instruction="page_for_question")
    return median_ms(lambda question: ask([question]), questions())


if __name__ == "__main__":
    main()
