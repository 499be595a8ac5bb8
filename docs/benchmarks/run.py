"""Benchmarks that need no data: ratios on this machine, in this run.

    make bench
    make bench NAMES=engine      # batches by tokens against one by one and by count
    make bench NAMES=families    # the same for each family
    make bench NAMES=gradcache   # memory and speed of cached steps
    make bench NAMES=rows        # time to the first step and memory, a million rows; see rows.py
    make bench NAMES=rerank      # pairs batched against one by one
    make bench NAMES=late        # the stages of late interaction, likewise
    make bench NAMES=mixed       # mixed contents beside sentence-transformers
    make bench NAMES="engine rerank"
    make bench NAMES=scale       # search over 100,000 nodes; see scale.py
    make bench NAMES=files       # 20,000 small files: time and memory of both runs; see files.py
    make bench NAMES=gpu         # everything on a card, in 4 minutes; see gpu.py

Models have random weights of a small Qwen2-VL shape; speeds compare only within a run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from PIL import Image
from tiny import save_qwen2_5_vl, save_qwen2_vl
from tiny_cross import save_bert
from tiny_late import save_colqwen2
from tiny_llava import save_llava, save_mm_embed, save_phi3v
from tiny_qwen3 import add_words, save_qwen3_vl, save_wemm

from mmrag.content import Content
from mmrag.embedders import Embedder, load_embedder
from mmrag.embedders.late import load_token_embedder
from mmrag.embedders.muvera import Muvera
from mmrag.modeling.backbone import inputs_of
from mmrag.rerankers import load_scorer
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import Filter, Point, Schema

ROUNDS = 3


def timed(work: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Median seconds of three runs after one that is not counted."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        started = clock()
        work()
        seconds.append(clock() - started)
    return statistics.median(seconds)


def cpu(work: Callable[[], object]) -> float:
    """As ``timed``, in seconds of CPU, which other work on the machine does not lengthen."""
    return timed(work, time.process_time)


def mixed_contents(count: int) -> list[Content]:
    """Texts from a line to a page, and images of pages, figures and icons."""
    chance = np.random.default_rng(0)
    contents = []
    for number in range(count):
        if number % 3:
            contents.append(Content("word " * int(chance.integers(3, 400))))
        else:
            height, width = chance.integers(60, 500, 2)
            noise = chance.integers(0, 255, (height, width, 3), dtype=np.uint8)
            contents.append(Content(image=Image.fromarray(noise)))
    return contents


def engine(folder: Path) -> None:
    """Items per second: one at a time, sixteen at a time in the given order, by tokens."""
    model = save_qwen2_vl(folder / "model")
    embedder = load_embedder(model, family="gme", device="cpu")
    contents = mixed_contents(96)

    def one_by_one() -> None:
        for content in contents:
            embedder.encode([content])

    def sixteen(budget: int) -> None:
        wide = load_embedder(model, family="gme", device="cpu", token_budget=budget)
        for start in range(0, len(contents), 16):
            wide.encode(contents[start : start + 16])

    base = timed(one_by_one)
    rows = [
        ("one at a time", base),
        ("16 at a time, padded to the longest", timed(lambda: sixteen(10**9))),
        (f"by tokens ({embedder.budget.full:,})", timed(lambda: embedder.encode(contents))),
    ]
    print("| batches | items/s | against one at a time |\n|---|---|---|")
    for name, seconds in rows:
        print(f"| {name} | {len(contents) / seconds:.1f} | {base / seconds:.2f} |")


def rates(embedder: Embedder, contents: Sequence[Content]) -> list[str]:
    """Items per second batched and one by one, and the ratio."""
    together = len(contents) / timed(lambda: embedder.encode(contents))
    alone = len(contents) / timed(lambda: [embedder.encode([content]) for content in contents])
    return [f"{together:.1f}", f"{alone:.1f}", f"{together / alone:.2f}"]


def families(folder: Path) -> None:
    """Pages and texts per second of each family's tiny checkpoint, batched and one by one."""
    builders: dict[str, Callable[[Path], Path]] = {
        "gme": save_qwen2_vl,
        "ops_mm": save_qwen2_vl,
        "dse": save_qwen2_vl,
        "unite": save_qwen2_vl,
        "lamra": save_qwen2_vl,
        "moca": save_qwen2_5_vl,
        "qwen3_vl": save_qwen3_vl,
        "wemm": save_wemm,
        "vlm2vec_llava_next": save_llava,
        "vlm2vec_phi3v": save_phi3v,
        "mm_embed": save_mm_embed,
    }
    chance = np.random.default_rng(1)
    pages = [
        Content(image=Image.fromarray(chance.integers(0, 255, (h, w, 3), dtype=np.uint8)))
        for h, w in chance.integers(150, 600, (16, 2))
    ]
    texts = [Content("word " * int(n)) for n in chance.integers(3, 200, 48)]
    print(
        "| family | pages/s batched | one by one | ratio | texts/s batched | one by one | ratio |"
    )
    print("|---" * 7 + "|")
    for family, build in builders.items():
        model = build(folder / family)
        embedder = load_embedder(model, family=family, device="cpu", dtype="float32")
        cells = [family, *rates(embedder, pages), *rates(embedder, texts)]
        print(f"| {' | '.join(cells)} |", flush=True)


def _step(model: str, batch: int, chunk: int, answer: multiprocessing.Queue[list[float]]) -> None:
    """Peak memory over the loaded model, in MiB, and seconds of a step; in its own process."""
    import torch

    from mmrag.embedders import load_backbone
    from mmrag_recipes import gradcache

    torch.set_num_threads(1)
    backbone = load_backbone(model, family="gme", device="cpu")
    backbone.model.train()
    inputs = [inputs_of(backbone, Content("word " * 200), None) for _ in range(batch)]

    def step() -> None:
        for parameter in backbone.model.parameters():
            parameter.grad = None
        gradcache.step(backbone.forward, inputs, lambda v: (v @ v.T).logsumexp(1).mean(), chunk)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    step()
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    answer.put([(peak - before) / 1024, seconds])


def gradcache(folder: Path) -> None:
    """Memory of a training step as the batch grows, with a cache of 8 and without."""
    model = save_qwen2_vl(folder / "model")
    config = json.loads((model / "config.json").read_text())
    print(f"model: {config['num_hidden_layers']} layers, width {config['hidden_size']}, 200 words")
    print("| batch | MiB, cached by 8 | MiB, at once | items/s, cached | items/s, at once |")
    print("|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for batch in (16, 32, 64, 128):
        results = []
        for chunk in (8, 0):
            answer = context.Queue()
            process = context.Process(target=_step, args=(str(model), batch, chunk, answer))
            process.start()
            results.append(answer.get())
            process.join()
        (cached, slow), (whole, fast) = results
        speeds = f"{batch / slow:.1f} | {batch / fast:.1f}"
        print(f"| {batch} | {cached:.0f} | {whole:.0f} | {speeds} |")


def frozen(folder: Path) -> None:
    """CPU seconds of a GradCache step over one at once, the features of the tower kept or not."""
    import torch

    from mmrag.embedders import load_backbone
    from mmrag_recipes import gradcache
    from mmrag_recipes.features import KeptFeatures
    from mmrag_recipes.trainable import frozen_towers

    torch.set_num_threads(1)
    backbone = load_backbone("mmrag-nano", device="cpu")
    chance = np.random.default_rng(3)
    pages = [
        Content(image=Image.fromarray(chance.integers(0, 255, (616, 448, 3), dtype=np.uint8)))
        for _ in range(8)
    ]
    # All of one length: chunks would else save padding, and look better than they are.
    inputs = [inputs_of(backbone, page, None) for page in pages]

    def seconds(chunk: int, towers: Sequence[Any]) -> float:
        backbone.model.zero_grad()
        started = time.process_time()
        gradcache.step(
            backbone.forward, inputs, lambda v: (v @ v.T).logsumexp(1).mean(), chunk, towers
        )
        return time.process_time() - started

    backbone.model.visual.requires_grad_(False)
    towers = frozen_towers(backbone.model)
    visual, kept = backbone.model.visual, KeptFeatures(backbone.model.visual, folder, "", 2**30)

    def on_disk() -> float:
        visual.kept_features = kept
        taken = seconds(2, [kept])
        del visual.kept_features
        return taken

    runs = [(seconds(0, ()), seconds(2, ()), seconds(2, towers), on_disk()) for _ in range(4)][1:]
    whole, *others = (float(np.median(column)) for column in zip(*runs, strict=True))
    print("mmrag-nano, 8 pages of 352 visual tokens, tower frozen, chunks of 2")
    print("| | CPU seconds a step | over at once |\n|---|---|---|")
    names = ("at once", "tower twice", "tower once", "features from disk")
    for name, value in zip(names, (whole, *others), strict=True):
        print(f"| {name} | {value:.2f} | {value / whole:.2f} |")


def rows(folder: Path) -> None:
    """Time to the first step and memory of each process, for rows of text and with images."""
    # As a program of its own: each worker imports the main module, and that of `train` is light.
    subprocess.run([sys.executable, Path(__file__).with_name("rows.py"), folder], check=True)


def rerank(folder: Path) -> None:
    """Pairs per second of CPU of each kind of local reranker, batched and one by one."""
    chat = save_qwen2_vl(folder / "chat")
    add_words(chat, ("True", "False"))
    trained = save_qwen3_vl(folder / "Qwen3-VL-Reranker-2B", words=("yes", "no"))
    shape = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    minilm = save_bert(folder / "minilm", length=512, **shape)
    chance = np.random.default_rng(2)
    image = Image.fromarray(chance.integers(0, 255, (400, 400, 3), dtype=np.uint8))
    query = Content("which page shows this?", image)
    pairs = [(query, Content("word " * int(n))) for n in chance.integers(100, 300, 32)]
    print("| reranker | pairs/s batched | one by one | ratio | largest difference of scores |")
    print("|---" * 5 + "|")
    models = {"Qwen2-VL, True or False": chat, "Qwen3-VL-Reranker": trained}
    models |= {"cross-encoder": save_bert(folder / "cross", length=512)}
    models |= {"cross-encoder of MiniLM's shape": minilm}
    for name, model in models.items():
        scorer = load_scorer(model, device="cpu", dtype="float32")
        alone = [scorer.judge([pair])[0] for pair in pairs]
        gap = np.abs(np.subtract(scorer.judge(pairs), alone)).max()
        fast = len(pairs) / cpu(lambda s=scorer: s.judge(pairs))
        slow = len(pairs) / cpu(lambda s=scorer: [s.judge([pair]) for pair in pairs])
        print(f"| {name} | {fast:.1f} | {slow:.1f} | {fast / slow:.2f} | {gap:.0e} |", flush=True)


def mixed(folder: Path) -> None:
    """Mixed contents by encode and by sentence-transformers, on one checkpoint of Qwen3-VL."""
    import torch
    from gpu_baselines import sentence_transformer
    from gpu_models import save_qwen3_vl as save

    from mmrag.embedders.families.qwen3_vl import DEFAULT_INSTRUCTION
    from mmrag.modeling.loading import place

    model = save(folder / "model", "tiny", torch.device("cpu"))
    theirs = sentence_transformer(model, place("cpu"))
    ours = load_embedder(model, family="qwen3_vl", device="cpu")
    contents = mixed_contents(96)
    texts = [content.text for content in contents if content.text]
    images = [content.image for content in contents if content.image is not None]

    def encode() -> np.ndarray:
        # It takes one kind of content a call.
        parts = [theirs.encode(part, prompt=DEFAULT_INSTRUCTION) for part in (texts, images)]
        return np.concatenate(parts)

    cosines = (encode() * ours.encode([*texts, *images])).sum(1)
    seconds = {
        "sentence-transformers": timed(encode),
        "encode": timed(lambda: ours.encode(contents)),
    }
    print("| | items/s | against sentence-transformers |\n|---|---|---|")
    for name, value in seconds.items():
        ratio = seconds["sentence-transformers"] / value
        print(f"| {name} | {len(contents) / value:.1f} | {ratio:.2f} |")
    print(f"\nleast cosine of the vectors: {cosines.min():.4f}")


def gpu(folder: Path) -> None:
    """Published shapes on a card, beside a plain transformers loop and sentence-transformers."""
    from gpu import run

    run(folder)


def late(folder: Path) -> None:
    """Pages per second of CPU of each stage of late interaction, batched and one by one."""
    model = save_colqwen2(folder / "colqwen2")
    embedder = load_token_embedder(model, device="cpu", dtype="float32")
    chance = np.random.default_rng(3)
    sizes = chance.integers(150, 250, (24, 2))
    noise = [chance.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    pages = [Content(image=Image.fromarray(each)) for each in noise]
    rows = [
        (
            "tokens of a page, 4 pages a batch",
            len(pages),
            lambda: embedder.encode_documents(pages),
            lambda: [embedder.encode_documents([page]) for page in pages],
        )
    ]
    # The numbers of the stages behind the model depend on no weights: ColPali's sizes.
    points = [
        Point(str(UUID(int=number)), {"kind": "page"}, {"tokens": _unit(chance, 343, 128)})
        for number in range(200)
    ]
    query, ids = _unit(chance, 20, 128), [point.id for point in points]
    engine = EdgeEngine(folder / "shard", Schema({}, ("kind",), (), late={"tokens": 128}))
    for start in range(0, len(points), 20):
        engine.upsert(points[start : start + 20])
    rows.append(
        (
            "MaxSim over the first 200, 343 tokens each",
            len(ids),
            lambda: engine.max_sim(query, ids, Filter()),
            lambda: [engine.max_sim(query, [each], Filter()) for each in ids],
        )
    )
    print("| stage | pages/s batched | one by one | ratio |")
    print("|---" * 4 + "|")
    for name, count, together, alone in rows:
        fast, slow = count / cpu(together), count / cpu(alone)
        print(f"| {name} | {fast:.1f} | {slow:.1f} | {fast / slow:.2f} |", flush=True)
    engine.close()
    muvera, tokens = Muvera(), [point.vectors["tokens"] for point in points]
    speed = len(tokens) / cpu(lambda: [muvera.encode_document(each) for each in tokens])
    print(f"\nMUVERA, 10,240 dimensions of 343 tokens: {speed:.1f} pages/s")


def _unit(chance: np.random.Generator, count: int, dim: int) -> np.ndarray:
    vectors = chance.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def scale(_folder: Path) -> None:
    """Search over 100,000 nodes: latency, recall and memory, with and without codes."""
    import scale as nodes

    nodes.run(100_000)


def files(folder: Path) -> None:
    """Time and memory of ``mmrag index`` over 20,000 small text files, and again."""
    from files import run

    run(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmarks that are named, or all."""
    known = {
        "engine": engine,
        "families": families,
        "gradcache": gradcache,
        "frozen": frozen,
        "rows": rows,
        "rerank": rerank,
        "late": late,
        "files": files,
        "mixed": mixed,
        "gpu": gpu,
        "scale": scale,
    }
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(known)}")
    for name in parser.parse_args(arguments).names or known:
        with tempfile.TemporaryDirectory() as folder:
            print(f"\n{known[name].__doc__}\n")
            known[name](Path(folder))


if __name__ == "__main__":
    main()
