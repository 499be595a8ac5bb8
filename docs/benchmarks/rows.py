"""From a file of rows to the inputs of the first step: time and memory of each process.

make bench NAMES=rows
PYTHONPATH=.:recipes python docs/benchmarks/rows.py FOLDER
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mmrag_recipes.rows import ImageStore, Item, Row, write_rows

WORDS = ["the", "page", "that", "answers", "a", "question", "about", "pumps", "heat", "1990"]
COLUMNS = (
    *("rows", "start", "process", "s to open", "s to the first step", "CPU s"),
    *("peak MiB", "before the rows"),
)


def made_rows(count: int, store: ImageStore | None) -> Iterator[Row]:
    """Rows of texts of 5 to 80 words; with a store, each positive has an image of its own."""
    chance = np.random.default_rng(4)
    texts = [" ".join(chance.choice(WORDS, int(n))) for n in chance.integers(20, 80, 2000)]
    pixels = chance.integers(0, 255, (60, 56, 3), dtype=np.uint8)
    for number in range(count):
        image = None
        if store:
            pixels[0, 0] = np.frombuffer(number.to_bytes(3, "big"), np.uint8)  # each one another
            image = store.add(Image.fromarray(pixels))
        yield Row(
            id=str(number),
            instruction="page_for_question",
            query=Item(text=f"{number} {texts[number % 1999][:60]}"),
            positives=[Item(text=f"{number} {texts[number % 2000]}", image=image)],
            negatives=[Item(text=f"{number} not {texts[number % 1997]}")],
        )


def first_step(
    rows: str, rank: int, size: int, port: int, answer: multiprocessing.Queue[list[float]]
) -> None:
    """Seconds from the rows to the inputs of the first step, and peak memory, as ``train`` has it.

    Memory in MiB: of this process, and of it before the rows.
    """
    from mmrag_recipes import distributed
    from mmrag_recipes.batches import Source, plan
    from mmrag_recipes.config import TrainConfig
    from mmrag_recipes.data import load_datasets
    from mmrag_recipes.steps import Feeder
    from mmrag_recipes.train import load_model

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    distributed.start()
    config = TrainConfig(
        model="mmrag-nano", out="unused", data=(rows,), hard_negatives=1, device="cpu"
    )
    backbone = load_model(config)

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    before, started = peak(), time.perf_counter()
    if rank == 0:
        load_datasets(config, backbone)
    distributed.wait()
    datasets = load_datasets(config, backbone)
    opened = time.perf_counter() - started
    batches = plan([Source(d.rows.keys, d.costs) for d in datasets], config.batch_size, 0)
    next(Feeder(datasets, backbone, config.hard_negatives).steps(batches))
    stepped = time.perf_counter() - started - opened
    seconds = time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    answer.put([rank, opened, stepped, seconds, peak(), before])
    distributed.stop()


def start(path: Path, size: int) -> list[list[float]]:
    """What ``first_step`` measured in each of ``size`` processes that start together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answer: multiprocessing.Queue[list[float]] = context.Queue()
    processes = [
        context.Process(target=first_step, args=(str(path), rank, size, port, answer))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    found = sorted(answer.get() for _ in processes)
    for process in processes:
        process.join()
    return found


def run(folder: Path) -> None:
    """Print the table of a million rows of text, and of 50,000 with an image each."""
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name, count in (("of text", 1_000_000), ("with an image each", 50_000)):
        path = folder / f"rows-{count}.jsonl"
        write_rows(
            path, made_rows(count, None if name == "of text" else ImageStore(folder / "images"))
        )
        for which, size in (("first", 2), ("second", 1)):
            for rank, opened, stepped, *others in start(path, size):
                cells = [f"{count:,} {name}", which, f"{rank:.0f} of {size}", f"{opened:.1f}"]
                cells += [f"{stepped:.1f}", *(f"{value:.0f}" for value in others)]
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run(Path(sys.argv[1]))
