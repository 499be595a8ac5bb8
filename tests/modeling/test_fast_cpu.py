"""Faster arithmetic on a CPU: chosen by the processor, near float32, never for training."""

import pytest
import torch
from tiny_nano import save_nano
from torch import nn

from mmrag.embedders import load_backbone, load_embedder
from mmrag.modeling import fast_cpu
from mmrag.modeling.fast_cpu import Int8Linear, fast_arithmetic, use_int8

TEXTS = ["Which plan pays for glasses?", "a cat", "Net revenue grew by 4 %. " * 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_nano(tmp_path_factory.mktemp("nano") / "tiny", fast_on_cpu=True)


def processor(monkeypatch, *abilities):
    for name in ("_is_avx512_bf16_supported", "_is_vnni_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in abilities, raising=False)


@pytest.mark.parametrize(
    ("abilities", "chosen"),
    [
        ((), None),
        (("_is_vnni_supported",), "int8"),
        (("_is_vnni_supported", "_is_avx512_bf16_supported"), "bfloat16"),
    ],
)
def test_the_processor_decides(monkeypatch, abilities, chosen):
    processor(monkeypatch, *abilities)
    assert fast_arithmetic() == chosen


def test_int8_layer_is_near_the_float_layer():
    torch.manual_seed(0)
    layer, plain = nn.Linear(64, 48), nn.Linear(64, 48, bias=False)
    x = torch.randn(2, 5, 64) * torch.logspace(-3, 3, 5)[:, None]  # rows of all sizes
    for exact in (layer, plain):
        wanted, found = exact(x), Int8Linear(exact)(x)
        assert found.shape == wanted.shape
        errors = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert errors.max() < 0.02


def test_rows_of_zeros_stay_what_they_are():
    layer = nn.Linear(8, 4)
    torch.testing.assert_close(Int8Linear(layer)(torch.zeros(3, 8)), layer.bias.expand(3, 4))


@pytest.mark.parametrize("ability", ["_is_vnni_supported", "_is_avx512_bf16_supported"])
def test_vectors_stay_near_those_of_float32(monkeypatch, ability):
    exact = load_embedder("mmrag-nano", device="cpu", dtype="float32")
    processor(monkeypatch, ability)
    fast = load_embedder("mmrag-nano", device="cpu")
    assert (exact.encode(TEXTS) * fast.encode(TEXTS)).sum(axis=1).min() > 0.99
    # A collection that was built on one processor is searched on another.
    assert fast.fingerprint == exact.fingerprint


def test_named_dtypes_and_training_are_left_alone(monkeypatch, folder):
    processor(monkeypatch, "_is_avx512_bf16_supported")
    assert load_embedder(folder, device="cpu").backbone.model.dtype == torch.bfloat16
    assert (
        load_embedder(folder, device="cpu", dtype="float32").backbone.model.dtype == torch.float32
    )
    assert load_backbone(folder, device="cpu").model.dtype == torch.float32


def test_models_that_do_not_ask_for_it_stay_as_they_are(monkeypatch, qwen2_vl_folder):
    monkeypatch.setattr(fast_cpu, "fast_arithmetic", lambda: "bfloat16")
    embedder = load_embedder(qwen2_vl_folder, family="gme", device="cpu")
    assert embedder.backbone.model.dtype == torch.float32


def test_only_linear_layers_are_replaced(folder):
    model = load_backbone(folder, device="cpu", dtype="float32").model
    linear = sum(type(module) is nn.Linear for module in model.modules())
    use_int8(model)
    assert sum(isinstance(module, Int8Linear) for module in model.modules()) == linear
    assert not any(type(module) is nn.Linear for module in model.modules())
