"""Merging, routing and compatible training on a CPU, each beside its baseline.

    python docs/benchmarks/combine.py pairs.jsonl.gz --work build/combine

``pairs`` are JSON lines, gzipped or not, with ``question``, ``answer``, ``focus`` (what both are
about) and ``source``. Two sources are two tasks. Adapters on mmrag-nano are trained on some
focuses, coefficients are learned on others, and all is measured on the rest, in one corpus of both
tasks.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmrag.embedders import Embedder, load_embedder
from mmrag.embedders.routing import RoutedEmbedder, load_routed, save_route
from mmrag.evaluation.bootstrap import interval
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.config_models import MergeConfig
from mmrag_recipes.evaluate import encode_queries, row_metrics
from mmrag_recipes.export import write_adapter
from mmrag_recipes.merge import merge
from mmrag_recipes.options import build
from mmrag_recipes.project import cross_recall, fit, table
from mmrag_recipes.rows import Item, Row, corpus_of, read_rows, store_of, write_rows
from mmrag_recipes.train import train

BASE = "mmrag-nano"
LORA = {"r": 8, "alpha": 16, "targets": r"encoder\.layer\.\d+\.attention\.self\.(query|value)"}
FAST = 1e-2  # five times the learning rate of the other runs
WORDS = 30  # of an answer: the benchmark takes minutes on one core
SIZES = {"train": 480, "dev": 96, "test": 150}  # rows of a task
FORMULAS: dict[str, dict[str, Any]] = {
    "merged, linear": {},
    "merged, slerp": {"method": "slerp"},
    "merged, task arithmetic": {"method": "task"},
    "merged, ties": {"method": "ties"},
}


def split(pairs: Path, sources: Sequence[str], folder: Path) -> None:
    """Write rows of each task and part; a focus is in one part alone."""
    raw = pairs.read_bytes()
    if pairs.suffix == ".gz":
        raw = gzip.decompress(raw)
    records = [json.loads(line) for line in raw.splitlines()]
    for source in sources:
        mine = [one for one in records if one["source"] == source]
        focuses = np.array(sorted({one["focus"] for one in mine}))
        order = np.random.default_rng(0).permutation(focuses)
        ends = (np.array([0.55, 0.65, 1.0]) * len(order)).astype(int)
        parts = zip(SIZES, np.split(order, ends[:-1]), strict=True)
        for part, kept in parts:
            inside = set(kept.tolist())
            rows = [
                Row(
                    id=f"{source}-{number}",
                    query=Item(text=one["question"]),
                    positives=[Item(text=" ".join(one["answer"].split()[:WORDS]))],
                    source=f"{one['focus']}#1",
                )
                for number, one in enumerate(mine)
                if one["focus"] in inside
            ]
            # In the order of focuses, some would be there whole and others not at all.
            drawn = np.random.default_rng(1).permutation(len(rows))[: SIZES[part]]
            write_rows(folder / f"{source}-{part}.jsonl", [rows[index] for index in drawn])
    for part in ("dev", "test"):
        both = [row for source in sources for row in read_rows(folder / f"{source}-{part}.jsonl")]
        write_rows(folder / f"{part}.jsonl", both)


def adapter(folder: Path, name: str, rows: Sequence[Path], steps: int, **changes: Any) -> str:
    """Train an adapter; one that is there already is taken."""
    values = {"model": BASE, "out": str(folder / "runs" / name), "data": list(map(str, rows))}
    values |= {"steps": steps, "batch_size": 16, "lr": 2e-3, "lora": LORA, "device": "cpu"}
    values |= {"dtype": "bfloat16"}  # the base under the adapters; three times as fast
    config = build(TrainConfig, {**values, "report": [], **changes}, name)
    train(config)
    return str(write_adapter(Path(config.out), folder / "adapters" / name))


def load(name: str) -> Embedder:
    """An adapter on the base, or a checkpoint."""
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    return load_embedder(name, device="cpu", **({"base": BASE} if is_adapter else {}))


def measure(rows: Sequence[Row], queries: Embedder, documents: Embedder) -> np.ndarray:
    """nDCG@10 of each row, (n,)."""
    vectors = documents.encode([item.text for item in corpus_of(rows)])
    found = row_metrics(rows, encode_queries(queries, rows, store_of("rows.jsonl")), vectors)
    return np.array([one["ndcg@10"] for one in found])


def routed(folder: Path, sources: Sequence[str]) -> RoutedEmbedder:
    """Experts whose documents are the base's."""
    base = load(BASE)
    places = {source: folder / "adapters" / f"{source} expert" for source in sources}
    for source, place in places.items():
        rows = read_rows(folder / f"{source}-train.jsonl")
        save_route(place, base, encode_queries(base, rows, store_of(folder / "rows.jsonl")))
    return load_routed(BASE, places, device="cpu")


def show(rows: Sequence[Row], sources: Sequence[str], found: dict[str, np.ndarray]) -> None:
    """nDCG@10 of each model on each task, and the gain over the model trained on both."""
    owners = np.array([row.place for row in rows])
    tasks = np.array([row.id.rpartition("-")[0] for row in rows])
    print(
        f"| nDCG@10 | {' | '.join(sources)} | both | over trained on both |\n|---|---|---|---|---|"
    )
    for name, values in found.items():
        cells = []
        picks: list[tuple[np.ndarray, np.ndarray]] = [(values, tasks == one) for one in sources]
        picks += [(values, tasks != "")]
        picks += [(values - found["trained on both"], tasks != "")]
        for numbers, kept in picks:
            low, high = interval(numbers[kept, None], owners[kept].tolist())
            cells.append(f"{numbers[kept].mean():.3f} [{low[0]:.3f}, {high[0]:.3f}]")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, merge, route, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--sources", nargs=2, default=["GHR", "NIDDK"])
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args(arguments)
    folder, sources = options.work, options.sources
    folder.mkdir(parents=True, exist_ok=True)
    split(options.pairs, sources, folder)
    rows = {source: [folder / f"{source}-train.jsonl"] for source in sources}
    both = [path for paths in rows.values() for path in paths]
    one, all_steps = options.steps, 2 * options.steps  # each row is seen equally often
    alone = [adapter(folder, source, rows[source], one) for source in sources]
    joint = adapter(folder, "both", both, all_steps)
    old_documents = {"compatible": {"weight": 1.0}}
    for source in sources:
        adapter(folder, f"{source} expert", rows[source], one, **old_documents)
    # At the rate of the others the space hardly moves, and nothing would be there to keep.
    fast: dict[str, Any] = {"lr": FAST}
    moved = adapter(folder, "moved", both, all_steps, **fast)
    kept = adapter(folder, "moved, compatible", both, all_steps, compatible={"weight": 0.5}, **fast)

    # With an instruction, if an empty one: without any they would be embedded as documents.
    asked = {"instruction": ""}
    test = [row.model_copy(update=asked) for row in read_rows(folder / "test.jsonl")]
    named = {BASE: BASE, "trained on both": joint}
    named |= {f"trained on {source}": each for source, each in zip(sources, alone, strict=True)}
    learning = {"rows": str(folder / "dev.jsonl"), "steps": options.steps, "batch_size": 16}
    methods = FORMULAS | {"merged, learned": {"method": "learned", "learn": learning}}
    for name, values in methods.items():
        place = {"models": alone, "base": BASE, "out": str(folder / name), "device": "cpu"}
        named[name] = str(merge(build(MergeConfig, place | values, name)))
    found = {}
    for name, model in named.items():
        embedder = load(model)
        found[name] = measure(test, embedder, embedder)
    router = routed(folder, sources)
    found["routed"] = measure(test, router, router)
    for source, expert in router.experts.items():
        found[f"{source} expert, documents of {BASE}"] = measure(test, expert.embedder, router.base)
    show(test, sources, found)
    chosen = router.route([row.query.text for row in test])
    right = np.mean([row.id.startswith(f"{name}-") for row, name in zip(test, chosen, strict=True)])
    print(f"\n{right:.3f} of the queries are routed to the expert of their source\n")
    compare(folder, test, {"as above": joint, "fast": moved, "fast, compatible": kept})


def compare(folder: Path, test: Sequence[Row], models: dict[str, str]) -> None:
    """Old and new queries over old, new and projected documents, for each new model."""
    store = store_of(folder / "rows.jsonl")
    paths = sorted(folder.glob("*-train.jsonl"))
    texts = [item.text for path in paths for item in corpus_of(read_rows(path))]
    old = load(BASE)
    before = old.encode(texts)
    recall = {}
    for name, model in models.items():
        new = load(model)
        after = new.encode(texts)
        found = cross_recall(test, store, old, new, fit(before, after))
        linear = cross_recall(test, store, old, new, fit(before, after, "linear"))
        found["new -> projected old, linear"] = linear["new -> projected old"]
        print(f"{name}\n\n{table(test, found)}\n", flush=True)
        recall[name] = np.array([one["recall@10"] for one in found["new -> old"]])
    gain = (recall["fast, compatible"] - recall["fast"])[:, None]
    low, high = interval(gain, [row.place or row.id for row in test])
    print("recall@10 of new queries over old documents, compatible less not:")
    print(f"{gain.mean():.3f} [{low[0]:.3f}, {high[0]:.3f}]")


if __name__ == "__main__":
    main()
