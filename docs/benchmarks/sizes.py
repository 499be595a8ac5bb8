"""What training for fewer layers and for binary codes brings, on a tiny model.

    PYTHONPATH=.:recipes:tests python docs/benchmarks/sizes.py

A Qwen2-VL of four layers and 64 dimensions with random weights learns to find made-up reports by
some of their facts; no report of the evaluation is in the training. From there three trainings go
on that differ in one option alone. Differences are paired, with 95 % intervals by a bootstrap over
questions: they say what the option does, not how a large model fares.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import torch
from numpy.typing import NDArray
from tiny import save_qwen2_files
from tiny_qwen3 import add_words
from transformers import Qwen2VLConfig, Qwen2VLModel

from mmrag.content import Content
from mmrag.embedders import Embedder, load_backbone, load_embedder
from mmrag.embedders.base import truncate_normalise
from mmrag.evaluation.bootstrap import interval
from mmrag.evaluation.metrics import metrics_of
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.depth import keep_layers
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import Filter, Nearest, Point, Schema
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.export import export
from mmrag_recipes.rows import Item, Row, write_rows
from mmrag_recipes.train import train

Values = NDArray[np.float32]

SLOTS = {
    "place": (
        *("Rome", "Oslo", "Lima", "Cairo", "Delhi", "Tokyo"),
        *("Paris", "Quito", "Berlin", "Lagos", "Seoul", "Accra"),
    ),
    "thing": (
        *("turbine", "bridge", "harbour", "tunnel", "reactor"),
        *("dam", "railway", "airport", "mine", "canal"),
    ),
    "cause": (
        *("rust", "fire", "flood", "storm", "frost"),
        *("leak", "crack", "noise", "dust", "heat"),
    ),
    "month": (
        *("January", "February", "March", "April", "May"),
        *("June", "July", "August", "September", "October"),
    ),
    "owner": ("Acme", "Borel", "Ciro", "Dexa", "Emil", "Fano", "Gira", "Hela", "Ilex", "Juno"),
    "state": ("closed", "repaired", "sold", "insured", "inspected", "flooded", "painted", "moved"),
}
PAIRS = ((1, 8), (2, 16), (3, 32))
TOP_K = 10


def report(facts: Sequence[str]) -> str:
    """A document of one fact for each slot."""
    place, thing, cause, month, owner, state = facts
    return f"The {thing} of {owner} in {place} was {state} in {month} because of {cause}."


def make_rows(folder: Path, n_train: int, n_dev: int) -> list[Row]:
    """Write rows to train on, and return others: each asks for a report by three of its facts."""
    chance = np.random.default_rng(0)
    every = list(itertools.product(*SLOTS.values()))
    rows = []
    for number, place in enumerate(chance.choice(len(every), n_train + n_dev, replace=False)):
        asked = sorted(chance.choice(len(SLOTS), 3, replace=False))
        query = " and ".join(every[place][slot] for slot in asked)
        document = Item(text=report(every[place]))
        rows.append(Row(id=str(number), query=Item(text=f"{query}?"), positives=[document]))
    write_rows(folder / "rows.jsonl", rows[:n_train])
    return rows[n_train:]


def save_model(folder: Path) -> Path:
    """A Qwen2-VL with a token for every word of the reports."""
    pixels = {"min_pixels": 4 * 784, "max_pixels": 64 * 784}
    save_qwen2_files(folder, "qwen2_vl", {"embed_dim": 32, "mlp_ratio": 2}, pixels)
    words = [word for slot in SLOTS.values() for word in slot]
    add_words(folder, tuple(f" {word}" for word in words) + tuple(words))
    about = json.loads((folder / "config.json").read_text())
    about |= {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    about |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 640}
    about["vision_config"]["hidden_size"] = 64
    (folder / "config.json").write_text(json.dumps(about))
    torch.manual_seed(0)
    Qwen2VLModel(Qwen2VLConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def trained(name: str, model: Path, folder: Path, **options: object) -> Path:
    """Train with some options and export. Returns the checkpoint."""
    # Of this family a text is its own prompt, so that steps are short.
    common: dict[str, Any] = {"model": str(model), "family": "vlm2vec_qwen2vl", "batch_size": 32}
    common |= {"out": str(folder / name), "data": [str(folder / "rows.jsonl")]}
    common |= {"temperature": 0.05, "false_negative_margin": 2.0, "freeze": ["visual"]}
    common |= {"device": "cpu", "report": [], "log_every": 50}
    train(TrainConfig.model_validate({**common, **options}))
    return export(folder / name, folder / f"{name}-exported", dtype="float32")


def vectors_of(embedder: Embedder, rows: Sequence[Row]) -> tuple[Values, Values]:
    """Vectors of questions and of documents."""
    queries = embedder.encode([row.query.text for row in rows])
    return queries, embedder.encode([row.positives[0].text for row in rows])


def ndcg(ranked: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """nDCG@10 of each question, whose right document has its own place."""
    return np.array([metrics_of(list(r), {i: 1.0})["ndcg@10"] for i, r in enumerate(ranked)])


def by_cosine(queries: Values, documents: Values) -> NDArray[np.float64]:
    """nDCG@10 of an exact search."""
    return ndcg(np.argsort(-queries @ documents.T, axis=1, kind="stable")[:, :TOP_K].tolist())


def by_collection(queries: Values, documents: Values) -> NDArray[np.float64]:
    """nDCG@10 of a collection with ``quantization="binary"``, which scores again what it finds."""
    with tempfile.TemporaryDirectory() as folder:
        schema = Schema({"text": documents.shape[1]}, (), (), quantization="binary")
        engine = EdgeEngine(Path(folder) / "shard", schema)
        try:
            points = [Point(str(UUID(int=i)), {}, {"text": d}) for i, d in enumerate(documents)]
            engine.upsert(points)
            engine.optimize(schema)
            hits = [engine.rank([Nearest("text", query)], TOP_K, Filter())[0] for query in queries]
        finally:
            engine.close()
    return ndcg([[UUID(hit.id).int for hit in found] for found in hits])


def line(name: str, before: NDArray[np.float64], after: NDArray[np.float64]) -> str:
    """A line of a table: means, and the paired difference with its interval."""
    difference = (after - before)[:, None]
    (low,), (high,) = interval(difference, [str(i) for i in range(len(before))])
    gain = f"{difference.mean():+.3f} ({low:+.3f} to {high:+.3f})"
    return f"| {name} | {before.mean():.3f} | {after.mean():.3f} | {gain} |"


def cut(folder: Path, layers: int, width: int, rows: Sequence[Row]) -> NDArray[np.float64]:
    """nDCG@10 after some layers, at a width; of a model trained for it or not."""
    embedder = load_embedder(folder, device="cpu", layers=layers)
    queries, documents = vectors_of(embedder, rows)
    return by_cosine(truncate_normalise(queries, width), truncate_normalise(documents, width))


def seconds(folder: Path, layers: int, rows: Sequence[Row]) -> float:
    """Least CPU seconds of five runs of the model over the documents, which are prepared before."""
    backbone = load_backbone(folder, device="cpu")
    keep_layers(backbone, layers)
    items = [inputs_of(backbone, Content(row.positives[0].text), None) for row in rows]
    measured = []
    for _ in range(5):
        started = time.process_time()
        with torch.inference_mode():
            backbone.forward(items)
        measured.append(time.process_time() - started)
    return min(measured)


def main() -> None:
    """Train, measure and print both tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--dev", type=int, default=400)
    parser.add_argument(
        "--from-scratch", action="store_true", help="train each variant from random weights"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = make_rows(folder, given.train, given.dev)
        model = save_model(folder / "model")
        base = model
        more: dict[str, Any] = {"steps": 3 * given.steps, "lr": 3e-3}
        if not given.from_scratch:
            base = trained("base", model, folder, steps=2 * given.steps, lr=3e-3)
            more = {"steps": given.steps, "lr": 1e-3, "seed": 1}
        plain = trained("plain", base, folder, **more)
        depths = trained("depths", base, folder, **more, matryoshka_layers=PAIRS)
        binary = trained("binary", base, folder, **more, binary_weight=0.5)
        print(f"\n{given.dev} questions, nDCG@10\n")
        print("| layers, width | plain | matryoshka_layers | difference | CPU time |")
        print("|---|---|---|---|---|")
        whole = seconds(depths, 4, rows)
        for layers, width in (*PAIRS, (4, 64)):
            before, after = (cut(one, layers, width, rows) for one in (plain, depths))
            share = seconds(depths, layers, rows) / whole if layers < 4 else 1.0
            print(f"{line(f'{layers}, {width}', before, after)} {share:.2f} |")
        print("\n| search | plain | binary_weight | difference |\n|---|---|---|---|")
        found = [vectors_of(load_embedder(one, device="cpu"), rows) for one in (plain, binary)]
        signs = [tuple(np.where(v > 0, 1, -1).astype(np.float32) for v in pair) for pair in found]
        print(line("whole vectors", *(by_cosine(*pair) for pair in found)))
        print(line("codes alone", *(by_cosine(*pair) for pair in signs)))
        print(line('`quantization="binary"`', *(by_collection(*pair) for pair in found)))


if __name__ == "__main__":
    main()
