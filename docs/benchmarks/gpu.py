"""Everything that runs on a card, by one command that needs no network.

    make bench NAMES=gpu
    PYTHONPATH=.:recipes python docs/benchmarks/gpu.py --seconds 225

Checkpoints of the published shapes are written with random weights; pages and texts are made.
Needed are torch and transformers; lines that need more say so where it is missing. Without CUDA
the same lines run on a tiny shape, which shows that they work and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from gpu_attention import attention, by_shape
from gpu_baselines import PlainLoop, sentence_transformer
from gpu_data import make_texts, save_pages
from gpu_models import Size, save_gme, save_qwen3_vl
from gpu_table import Table, machine, median_ms, rate, timed, versions
from torch.utils.flop_counter import FlopCounterMode

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.embedders.families.gme import GME_DEFAULT
from mmrag.embedders.local import LocalEmbedder
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.batching import TokenBudget, open_pool
from mmrag.modeling.compiling import LARGE
from mmrag.modeling.loading import place, quiet
from mmrag.rerankers import load_scorer
from mmrag.rerankers.local import LocalScorer

SECONDS = 225.0
OUT = Path("build/benchmarks")
DEFAULT = "encode(pages), default threads"
COMPILED = "encode(pages), blocks compiled"
PLAIN = "plain transformers loop, batches of 8"
ONE_QUERY = "one query, median"
TEXTS = "encode(texts), default threads"
THEIRS = "sentence-transformers, texts, batches of 32"
RERANKER = "Qwen3-VL-Reranker-2B"  # also the name of its folder, which says how it is scored


@dataclass
class Bench:
    """What the parts share.

    seconds: that one line is measured for. least: items of the first, uncounted run.
    flops: floating point operations of one page. profile: time by kernel, once it is known.
    """

    table: Table
    folder: Path
    device: torch.device
    size: Size
    pages: list[Content]
    texts: list[str]
    seconds: float
    least: int
    embedder: LocalEmbedder
    flops: float = 0.0
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def on_card(self) -> bool:
        """Whether the shapes are the published ones."""
        return self.device.type == "cuda"

    def page_line(self, what: str, run: Callable[[Sequence[Content]], object]) -> None:
        """A line of pages per second, beside the plain loop."""
        self.table.line(
            what,
            "pages/s",
            2 * self.seconds,
            lambda: rate(run, self.pages, self.seconds, self.least),
            flops=self.flops,
            against=PLAIN,
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole run")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of gpu.json and gpu.png")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.seconds, options.out)


def run(folder: Path, seconds: float = SECONDS, out: Path = OUT) -> None:
    """The whole benchmark, with its files in ``folder``."""
    on_card = torch.cuda.is_available()
    print(machine(), ", ".join(f"{name} {number}" for name, number in versions().items()), sep="\n")
    if not on_card:
        print("There is no CUDA device: a tiny shape runs, and its ratios say nothing of a card.")
    table = Table(seconds)
    device = torch.device("cuda" if on_card else "cpu")
    size: Size = "published" if on_card else "tiny"
    pages = save_pages(folder / "pages", (1232, 1764) if on_card else (224, 336), 384)
    model = save_gme(folder / "gme", size, device)
    bench = Bench(
        table,
        folder,
        device,
        size,
        pages if on_card else pages[:48],
        make_texts(2048 if on_card else 64),
        seconds=min(2.0, seconds / 90),
        least=8 if on_card else 4,
        embedder=_local(load_embedder(model, family="gme", device=device.type)),
    )
    # Compiling has a part of its own; after half a million tokens it would fall into a line.
    bench.embedder.blocks.release()
    table.head("The machine")
    table.line("matrix product", "TFLOP/s", 2, lambda: matrix_rate(bench) / 1e12)
    parts = (
        *(encoding, preparing, model_alone, compiled, texts, attending),
        *(indexing, qwen3_embedding, reranker, training),
    )
    for part in parts:
        _, why = table.attempt(2 * bench.seconds, partial(part, bench))
        if why:
            print(f"\n{part.__name__}: {why}")
        gc.collect()
        if on_card:
            torch.cuda.empty_cache()
    table.save(out, profile=bench.profile)


def _local(embedder: Any) -> LocalEmbedder:
    assert isinstance(embedder, LocalEmbedder)
    return embedder


def matrix_rate(bench: Bench) -> float:
    """Floating point operations per second of a large matrix product, for now."""
    n = 8192 if bench.on_card else 1024
    dtype = place(bench.device.type).dtype
    left, right = (torch.randn(n, n, device=bench.device, dtype=dtype) for _ in "ab")

    def products() -> None:
        for _ in range(20):
            left @ right

    products()
    bench.table.matrix_rate = 20 * 2 * n**3 / timed(products)
    return bench.table.matrix_rate


def encoding(bench: Bench) -> None:
    """Pages on GME-2B's shape, and the plain loop over the same checkpoint."""
    embedder, pages = bench.embedder, bench.pages
    bench.flops = flops_of(embedder, pages[0])
    tokens = embedder.backbone.plan(pages[0], None).n_tokens
    title = f"GME-2B's shape, pages of {tokens:,} tokens, {bench.flops / 1e12:.3g} TFLOP each"
    bench.table.head(title)
    with quiet():
        plain = PlainLoop(bench.folder / "gme", place(bench.device.type))
    bench.page_line(PLAIN, partial(plain, batch=8))
    bench.page_line("plain transformers loop, one by one", partial(plain, batch=1))
    bench.page_line(DEFAULT, embedder.encode)
    default, usual = embedder.workers, embedder.budget
    for workers in sorted({8, 16} - {default}):
        embedder.workers = workers
        bench.page_line(f"encode(pages), {workers} threads", embedder.encode)
    embedder.workers = default
    for budget in (8192, 65536):
        embedder.budget = TokenBudget(budget)
        bench.page_line(f"encode(pages), token budget {budget:,}", embedder.encode)
    embedder.budget = usual
    ours, theirs = embedder.encode(pages[:4]), plain(pages[:4], 4)
    print(f"\nLeast cosine to the plain loop's vectors: {(ours * theirs).sum(1).min():.4f}")


def flops_of(embedder: LocalEmbedder, content: Content) -> float:
    """Floating point operations of one content, as torch counts them."""
    inputs = inputs_of(embedder.backbone, content, None)
    aten = torch.ops.aten
    kernels = (
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
    )
    counted = dict.fromkeys(kernels, _attention_flops)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        embedder.backbone.forward([inputs])
    return float(counter.get_total_flops())


def _attention_flops(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    # torch's own formula refuses keys of fewer heads than queries.
    *rows, dim = query
    return 2 * math.prod(rows) * key[-2] * (dim + value[-1])


def preparing(bench: Bench) -> None:
    """Decoding, resizing and tokenising alone."""
    bench.table.head("Preparing alone")
    prepare = partial(inputs_of, bench.embedder.backbone, instruction=None)
    for workers in (2, 8, 16):
        with open_pool(workers, 2) as pool:

            def run(pages: Sequence[Content], pool: Any = pool) -> None:
                list(pool.map(prepare, pages))

            bench.table.line(
                f"preparing alone, {workers} threads",
                "pages/s",
                2 * bench.seconds,
                lambda run=run: rate(run, bench.pages, bench.seconds, 16),
                against=DEFAULT,
            )


def model_alone(bench: Bench) -> None:
    """The model on inputs that are ready, and what its time goes to."""
    from gpu_profile import kernels, show

    bench.table.head("The model alone, on prepared pages")
    backbone = bench.embedder.backbone
    inputs = [inputs_of(backbone, page, None) for page in bench.pages[:24]]

    def run(items: Sequence[Any], batch: int) -> None:
        with torch.inference_mode():
            for start in range(0, len(items), batch):
                backbone.forward(items[start : start + batch])

    for batch in (1, 8, 24):
        bench.table.line(
            f"the model alone, batches of {batch}",
            "pages/s",
            2 * bench.seconds,
            lambda batch=batch: rate(
                partial(run, batch=batch), inputs * 16, bench.seconds, max(batch, bench.least)
            ),
            flops=bench.flops,
            against=PLAIN,
        )
    profile, why = bench.table.attempt(10, lambda: kernels(lambda: run(inputs, 24)))
    if profile is None:
        print(f"\nprofile: {why}")
    else:
        bench.profile["plain"] = profile
        show(profile)


def compiled(bench: Bench) -> None:
    """The same with compiled blocks, which is what long runs come to by themselves."""
    from gpu_profile import kernels, show

    bench.table.head("The model's blocks compiled")
    if not bench.on_card:
        print("| encode(pages), compiled | skipped: a tiny shape has no large batch | | |")
        return
    old = bench.embedder
    embedder = LocalEmbedder(old.backbone, name="gme", fingerprint="", compile=True)
    large = bench.pages[: 2 * LARGE // old.backbone.plan(bench.pages[0], None).n_tokens]
    ours = old.encode(bench.pages[:4])
    try:
        bench.table.line(
            "compiling, with the first batch",
            "s",
            45,
            lambda: timed(lambda: embedder.encode(large)),
        )
        bench.page_line(COMPILED, embedder.encode)
        theirs = embedder.encode(large)[:4]
        inputs = [inputs_of(old.backbone, page, None) for page in bench.pages[:24]]

        def run(items: Sequence[Any]) -> None:
            with torch.inference_mode():
                for start in range(0, len(items), 24):
                    old.backbone.forward(items[start : start + 24])

        bench.table.line(
            "the model alone, batches of 24, compiled",
            "pages/s",
            2 * bench.seconds,
            lambda: rate(run, inputs * 16, bench.seconds, 24),
            flops=bench.flops,
            against=PLAIN,
        )
        profile, why = bench.table.attempt(10, lambda: kernels(lambda: run(inputs)))
        if profile is None:
            print(f"\nprofile: {why}")
        else:
            bench.profile["compiled"] = profile
            show(profile)
        print(f"\nLeast cosine to the vectors before: {(ours * theirs).sum(1).min():.4f}")
    finally:
        embedder.blocks.release()


def texts(bench: Bench) -> None:
    """Texts beside sentence-transformers, and one query."""
    table, embedder = bench.table, bench.embedder
    table.head("Texts of 40 to 260 words")

    def line(what: str, run: Callable[[Sequence[str]], object]) -> None:
        table.line(
            what,
            "texts/s",
            2 * bench.seconds,
            lambda: rate(run, bench.texts, bench.seconds, 8 * bench.least),
            against=THEIRS,
        )

    def load() -> Any:
        with quiet():
            folder, placement = bench.folder / "gme", place(bench.device.type)
            return sentence_transformer(folder, placement, "<|endoftext|>")

    theirs, why = table.attempt(4 * bench.seconds, load)
    if theirs is None:
        print(f"| {THEIRS} | {why} | | |")
    else:
        for batch in (32, 128):
            encode = partial(theirs.encode, prompt=GME_DEFAULT, batch_size=batch)
            line(f"sentence-transformers, texts, batches of {batch}", encode)
    line(TEXTS, embedder.encode)
    default, embedder.workers = embedder.workers, 16
    line("encode(texts), 16 threads", embedder.encode)
    embedder.workers = default
    table.line(ONE_QUERY, "ms", 2, lambda: query_ms(bench))
    busy = f"{ONE_QUERY}, while pages are encoded"
    table.line(busy, "ms", 6, lambda: query_beside_ms(bench), against=ONE_QUERY)
    if theirs is not None:
        some = bench.texts[:8]
        cosines = (embedder.encode(some) * theirs.encode(some, prompt=GME_DEFAULT)).sum(1)
        print(f"\nLeast cosine to sentence-transformers' vectors: {cosines.min():.4f}")


def attending(bench: Bench) -> None:
    """What a decoder's attention costs on shapes that are new, as those of texts mostly are."""
    by_shape(bench.table, bench.device)
    bench.table.head("Texts of 40 to 260 words, by the decoder's attention")
    embedder: Any = bench.embedder
    with attention(embedder.backbone.model, "sdpa"):
        bench.table.line(
            "encode(texts), attention as torch chooses",
            "texts/s",
            2 * bench.seconds,
            lambda: rate(embedder.encode, bench.texts, bench.seconds, 8 * bench.least),
            against=TEXTS,
        )
    bench.table.head("One picture as a question, each of another size")
    own = "one picture, median"
    bench.table.line(own, "ms", 3, lambda: picture_ms(bench))
    with patch("mmrag.modeling.vision.has_varlen", lambda query, scale: False):
        name = "one picture, attention as torch chooses, median"
        bench.table.line(name, "ms", 8, lambda: picture_ms(bench), against=own)


def picture_ms(bench: Bench) -> float:
    """Median milliseconds of a picture, after a first one."""
    pictures = [np.full((300, 400 + 28 * n, 3), 8 * n, dtype=np.uint8) for n in range(8)]
    ask = bench.embedder.encode
    return median_ms(lambda image: ask([Content(image=image)]), pictures, uncounted=1)


def query_ms(bench: Bench) -> float:
    """Median milliseconds of a question of twelve words, another one each time."""
    questions = [" ".join(text.split()[:12]) for text in bench.texts[:48]]
    ask = partial(bench.embedder.encode, instruction="page_for_question")
    # Vectors come back on the CPU; waiting for the whole card would wait for pages as well.
    return median_ms(lambda question: ask([question]), questions, uncounted=8)


def query_beside_ms(bench: Bench) -> float:
    """The same while another thread encodes pages."""
    stop = threading.Event()

    def encode() -> None:
        while not stop.is_set():
            bench.embedder.encode(bench.pages[:48])

    with ThreadPoolExecutor(1) as pool:
        encoding = pool.submit(encode)
        try:
            return query_ms(bench)
        finally:
            stop.set()
            encoding.result()


def indexing(bench: Bench) -> None:
    """Files into a collection, beside embedding the same pages."""
    bench.table.head(f"Indexing {len(bench.pages)} PNG pages")
    try:
        from mmrag import ReadOptions, UniversalIndex
    except ImportError as error:
        print(f"| UniversalIndex.add | skipped: {error.name} is not installed | | |")
        return
    paths = [str(page.image) for page in bench.pages]

    def add() -> float:
        library, reading = bench.folder / "library", ReadOptions(ocr="off")
        with UniversalIndex(library, bench.embedder, reading=reading) as index:
            return len(paths) / timed(lambda: index.add(paths))

    needs = len(paths) / (12 if bench.on_card else 40)
    bench.table.line("UniversalIndex.add", "pages/s", needs, add, against=DEFAULT)


def qwen3_embedding(bench: Bench) -> None:
    """Qwen3-VL-Embedding-2B's shape."""
    folder = save_qwen3_vl(bench.folder / RERANKER, bench.size, bench.device)
    embedder = _local(load_embedder(folder, family="qwen3_vl", device=bench.device.type))
    tokens = embedder.backbone.plan(bench.pages[0], None).n_tokens
    bench.table.head(f"Qwen3-VL-Embedding-2B's shape, pages of {tokens:,} tokens")
    bench.table.line(
        "Qwen3-VL-Embedding-2B, encode(pages)",
        "pages/s",
        2 * bench.seconds,
        lambda: rate(embedder.encode, bench.pages, bench.seconds, bench.least),
        flops=flops_of(embedder, bench.pages[0]),
    )


def reranker(bench: Bench) -> None:
    """Qwen3-VL-Reranker-2B's shape, which is that of the embedder, batched and one by one."""
    scorer = load_scorer(bench.folder / RERANKER, device=bench.device.type)
    assert isinstance(scorer, LocalScorer)
    bench.table.head(f"{RERANKER}'s shape")
    query = Content(bench.texts[0][:80])

    def one_by_one(pairs: Sequence[Any]) -> None:
        for pair in pairs:
            scorer.score([pair])

    documents: dict[str, list[Content]] = {
        "pages": bench.pages,
        "texts": [Content(text) for text in bench.texts],
    }
    for kind, found in documents.items():
        pairs = [(query, document) for document in found]
        for name, score in (("batched", scorer.score), ("one by one", one_by_one)):
            bench.table.line(
                f"{RERANKER}, {kind}, {name}",
                "pairs/s",
                2 * bench.seconds,
                lambda score=score, pairs=pairs: rate(score, pairs, bench.seconds, bench.least),
                against=f"{RERANKER}, {kind}, batched",
            )


def training(bench: Bench) -> None:
    """Steps of LoRA on GME-2B's shape; the embedder is of no other use afterwards."""
    from mmrag.modeling.qwen_vl import QwenBackbone
    from mmrag_recipes import gradcache
    from mmrag_recipes.config import DataConfig, LoraConfig, TrainConfig
    from mmrag_recipes.trainable import frozen_towers, make_trainable

    old: Any = bench.embedder.backbone
    rule = old.rule.with_tokens(None, 1024)
    backbone = QwenBackbone(old.model, old.tokenizer, rule, old.recipe)
    options: dict[str, Any] = {"lora": LoraConfig(), "freeze": ("visual",)}
    options |= {"gradient_checkpointing": True, "data": (DataConfig(rows="none"),)}
    make_trainable(backbone, TrainConfig(model="gme", out="none", **options))
    n = 16 if bench.on_card else 4
    questions = [inputs_of(backbone, Content(text[:80]), "") for text in bench.texts[: 2 * n]]
    pages = [inputs_of(backbone, page, None) for page in bench.pages[: 2 * n]]
    tokens = pages[0].n_tokens
    title = f"LoRA, rows of a question and a page of {tokens:,} tokens, tower frozen"
    bench.table.head(f"{title}, checkpointing")

    def encode(inputs: Sequence[Any]) -> torch.Tensor:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.on_card):
            return backbone.forward(inputs).float()

    def loss(vectors: torch.Tensor) -> torch.Tensor:
        asked, found = torch.nn.functional.normalize(vectors, dim=1).chunk(2)
        right = torch.arange(len(asked), device=vectors.device)
        return torch.nn.functional.cross_entropy(asked @ found.T / 0.03, right)

    def step(rows: int, chunk: int) -> None:
        inputs = questions[:rows] + pages[:rows]
        costs = [one.n_tokens for one in inputs]
        gradcache.step(encode, inputs, loss, chunk, frozen_towers(backbone.model), costs)
        backbone.model.zero_grad()

    step(2, 2)  # not counted
    base = f"LoRA, at once, batch of {n}"
    for name, rows, chunk in (
        (base, n, 0),
        (f"LoRA, GradCache by 4, batch of {n}", n, 4),
        (f"LoRA, GradCache by 16, batch of {n}", n, 16),
        (f"LoRA, GradCache by 4, batch of {2 * n}", 2 * n, 4),
    ):
        if bench.on_card:
            torch.cuda.reset_peak_memory_stats()
        work = partial(step, rows, chunk)
        needs = rows / 3 if bench.on_card else 2.0
        bench.table.line(
            name,
            "rows/s",
            needs,
            lambda rows=rows, work=work: rows / timed(work),
            against=base,
        )
        if bench.on_card:
            peak = torch.cuda.max_memory_allocated() / 2**30
            print(f"| its peak memory | {peak:.1f} GiB | | |")


if __name__ == "__main__":
    main()
