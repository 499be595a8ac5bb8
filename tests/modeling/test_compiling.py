"""Compiled blocks and recorded runs give what the model gives, and say when they cannot."""

import pickle
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_qwen2_vl
from tiny_qwen3 import QWEN_FAMILIES
from torch import nn
from torch._dynamo.utils import counters

from mmrag.content import Content
from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError
from mmrag.modeling import compiling
from mmrag.modeling.compiling import HotBlocks, ShortRuns, repeated_blocks, run_decoder
from mmrag.modeling.loading import place


def mixed(count, seed):
    chance = np.random.default_rng(seed)
    sizes = chance.integers(60, 250, (count, 2))
    pages = [Content(image=chance.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
    return [*pages, *(Content("word " * int(n)) for n in chance.integers(3, 60, count))]


@pytest.fixture
def eager_compiler(monkeypatch):
    """Traces and checks as the compiler does, and makes no code: that takes a minute."""
    monkeypatch.setattr(compiling, "_BACKEND", "aot_eager")
    monkeypatch.setattr(compiling, "LARGE", 64)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "family",
    ["gme", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moca", "qwen3_vl"))],
)
def test_compiled_blocks_give_the_same_vectors_and_are_compiled_once_a_kind(
    family, tmp_path, eager_compiler
):
    folder = QWEN_FAMILIES[family](tmp_path / "tiny")
    options = {"family": family, "device": "cpu", "dtype": "float32", "token_budget": 600}
    plain, compiled = (load_embedder(folder, compile=c, **options) for c in (False, True))
    for seed in range(4):
        contents = mixed(4, seed)
        np.testing.assert_allclose(
            compiled.encode(contents), plain.encode(contents), atol=2e-5, rtol=0
        )
    # One a kind of block, not one a block: after eight the compiler gives up. The first layers of
    # Qwen3-VL's decoder get features of the tower as well.
    assert counters["stats"]["unique_graphs"] == (3 if family == "qwen3_vl" else 2)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_the_true_compiler_gives_the_same_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "LARGE", 64)
    folder = save_qwen2_vl(tmp_path / "tiny")
    options = {"family": "gme", "device": "cpu", "dtype": "float32", "token_budget": 600}
    plain, compiled = (load_embedder(folder, compile=c, **options) for c in (False, True))
    for seed in range(2):
        contents = mixed(5, seed)
        cosines = (compiled.encode(contents) * plain.encode(contents)).sum(1)
        assert cosines.min() > 0.9999


@dataclass
class Item:
    n_tokens: int


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x).relu()


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.ModuleList([nn.Linear(4, 4), nn.Tanh()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_only_blocks_of_one_kind_are_repeated():
    model = Layers()
    assert list(repeated_blocks(nn.Sequential(model))) == list(model.layers)


def test_small_batches_run_as_they_are_and_cold_ones_too(monkeypatch):
    monkeypatch.setattr(compiling, "LARGE", 100)
    monkeypatch.setattr(compiling, "_BACKEND", "eager")
    model = Layers()
    blocks = HotBlocks(model, True)
    blocks._cold = 300
    seen = []

    def forward(batch):
        stance = torch._dynamo.eval_frame._stance.stance
        seen.append(model.layers[0]._compiled_call_impl is not None and stance == "default")
        return model(torch.ones(2, 4))

    for batch in ([Item(500)], [Item(50)] * 2, [Item(50)] * 4, [Item(10)] * 3, [Item(50)] * 2):
        blocks.run(forward, batch)
    assert seen == [False, False, True, False, True]


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no kernel for this card")

    monkeypatch.setattr(compiling, "LARGE", 1)
    monkeypatch.setattr(compiling, "_BACKEND", broken)
    torch._dynamo.reset()
    model = Layers()
    blocks = HotBlocks(model, True)
    x = torch.ones(2, 4)
    expected = model(x)
    for _ in range(2):
        torch.testing.assert_close(blocks.run(lambda _: model(x), [Item(5)] * 2), expected)
    assert caplog.text.count("cannot be compiled here") == 1


def test_none_compiles_nothing_on_a_cpu_and_true_needs_a_compiler(monkeypatch):
    assert not HotBlocks(Layers(), None)._active
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match=r"compile=True needs a C\+\+ compiler"):
        HotBlocks(Layers(), True)


def test_what_is_quantised_or_spread_is_not_compiled():
    assert place("auto", device_map="auto").compile is False
    with pytest.raises(ConfigError, match="compile=True cannot be had with"):
        place("auto", device_map="auto", compile=True)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """An embedder whose short texts run as on a card, with the graph's replay as a plain run."""
    lengths = []

    def record(decoder, like, length):
        lengths.append(length)
        inputs = like.new_zeros(1, length, like.shape[2])
        states = torch.empty_like(inputs)
        return inputs, states, lambda: states.copy_(run_decoder(decoder, inputs))

    monkeypatch.setattr(compiling, "record", record)
    folder = save_qwen2_vl(tmp_path / "tiny")
    embedder = load_embedder(folder, family="gme", device="cpu", dtype="float32")
    embedder.backbone.model.short_runs = ShortRuns(embedder.backbone.model.language_model)
    return embedder, load_embedder(folder, family="gme", device="cpu", dtype="float32"), lengths


def test_recorded_runs_give_the_same_vectors(recorded):
    embedder, plain, lengths = recorded
    texts = ["a long question about " + "wells " * n for n in (30, 1, 3, 0, 2)]
    for text in texts:
        np.testing.assert_allclose(embedder.encode([text]), plain.encode([text]), atol=1e-5)
    assert sorted(set(lengths)) == sorted(lengths) and len(lengths) < len(texts)
    before = len(lengths)
    image = Content(image=Image.new("RGB", (80, 80)))
    for contents in ([image], texts[:2], ["word " * 600]):
        np.testing.assert_allclose(embedder.encode(contents), plain.encode(contents), atol=1e-5)
    assert len(lengths) == before


def test_runs_that_cannot_be_recorded_run_as_they_are_and_say_so(recorded, monkeypatch, caplog):
    embedder, plain, _ = recorded

    def broken(decoder, like, length):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(compiling, "record", broken)
    for _ in range(2):
        np.testing.assert_allclose(embedder.encode(["well"]), plain.encode(["well"]), atol=1e-5)
    assert caplog.text.count("not permitted when stream is capturing") == 1


def test_recorded_runs_are_left_out_of_pickles(recorded):
    embedder, plain, _ = recorded
    embedder.encode(["well"])
    again = pickle.loads(pickle.dumps(embedder))
    assert not again.backbone.model.short_runs._recorded
    np.testing.assert_allclose(again.encode(["well"]), plain.encode(["well"]), atol=1e-5)
