"""Adapters on weights of 4 and 8 bits (QLoRA, arXiv 2305.14314)."""

from pathlib import Path

import pytest
import torch
from test_fields import scored_rows
from training import config_of, log_of, weights_of

from mmrag.content import Content
from mmrag.embedders import load_backbone
from mmrag_recipes import train as train_module
from mmrag_recipes.config import LoraConfig
from mmrag_recipes.export import load_trained, probe_vectors, write_adapter
from mmrag_recipes.train import load_model, train
from mmrag_recipes.trainable import evaluating, make_trainable

bitsandbytes = pytest.importorskip("bitsandbytes")


def quantised(model):
    """Codes and scales of every quantised weight, by name, as they are now."""
    return {
        name: (p.data.clone(), p.quant_state.absmax.clone())
        for name, p in model.named_parameters()
        if isinstance(p, bitsandbytes.nn.Params4bit)
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return scored_rows(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def config(tiny_model, rows, tmp_path_factory):
    lora = LoraConfig(r=4, quantize="4bit-double")
    options = {"steps": 16, "lr": 0.02, "warmup": 0.0, "chunk": 3, "dtype": "bfloat16"}
    out = tmp_path_factory.mktemp("run")
    evaluation = {"evaluate": str(rows), "evaluate_every": 8, "report": ()}
    return config_of(tiny_model, out, rows, lora=lora, **options, **evaluation)


@pytest.fixture(scope="module")
def run(config):
    """The trained model as it was held in training, its codes before it, and the folder."""
    held = []

    def load(config):
        backbone = load_model(config)
        held.extend([backbone.model, quantised(backbone.model)])
        return backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "load_model", load)
        train(config)
    return held


def test_the_weights_stay_as_quantised_and_the_adapters_learn(config, run):
    model, before = run
    after = quantised(model)
    # Seven layers of the decoder each, and those of the tower, at half a byte for a weight.
    assert len(after) >= 2 * 7
    state = model.language_model.layers[0].mlp.up_proj.base_layer.weight.quant_state
    assert (state.quant_type, state.nested, state.dtype) == ("nf4", True, torch.bfloat16)
    for name, (codes, scales) in before.items():
        place = name.replace(".weight", ".base_layer.weight")
        now = after[place if place in after else name]
        assert torch.equal(codes, now[0])
        assert torch.equal(scales, now[1])
    trained = weights_of(config.out)
    assert all("lora_" in name and value.dtype == torch.float32 for name, value in trained.items())
    assert all(bool(value.abs().max() > 1e-3) for value in trained.values())
    losses = [record["loss"] for record in log_of(config.out)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_the_export_is_the_published_base_with_the_adapter(config, run, tiny_model, tmp_path):
    adapter = write_adapter(Path(config.out), tmp_path / "adapter")
    beside = load_backbone(adapter, family="gme", base=tiny_model, device="cpu", dtype="float32")
    merged, _ = load_trained(Path(config.out))
    vectors, expected = probe_vectors("merged", merged), probe_vectors("adapter", beside)
    assert ((vectors * expected).sum(axis=1) > 0.99999).all()
    base = load_backbone(tiny_model, family="gme", device="cpu", dtype="float32")
    assert ((vectors * probe_vectors("base", base)).sum(axis=1) < 0.99).all()


def gradients(config, change=None, evaluate=False):
    """Gradients of the adapters for two texts. change: gets the model before its adapters."""
    torch.manual_seed(0)
    backbone = load_model(config)
    if change:
        change(backbone.model)
    make_trainable(backbone, config)
    contents = [Content("a page about wind"), Content("a page about water and other things")]
    inputs = [backbone.prepare(backbone.plan(content, None)) for content in contents]
    if evaluate:
        with evaluating(backbone.model), torch.no_grad():
            backbone.forward(inputs)
    backbone.forward(inputs)[:, 0].square().sum().backward()
    named = backbone.model.named_parameters()
    return {name: p.grad for name, p in named if p.grad is not None}


def equal(found, expected):
    close = [torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected]
    return found.keys() == expected.keys() and all(close)


@pytest.mark.parametrize("way", ["8bit", "4bit", "4bit-double"])
def test_an_evaluation_leaves_the_gradients_as_they_were(config, way):
    config = config.replace(lora=LoraConfig(r=4, quantize=way), dtype="float32")
    assert equal(gradients(config, evaluate=True), gradients(config))


@pytest.mark.parametrize("dora", [False, True])
def test_the_gradient_is_that_of_the_weights_as_rounded(config, dora):
    lora = LoraConfig(r=4, dora=dora)
    quantised_config = config.replace(dtype="float32", lora=lora.replace(quantize="4bit-double"))
    rounded = {}

    def keep(model):
        for name, (codes, _) in quantised(model).items():
            state = model.get_parameter(name).quant_state
            rounded[name] = bitsandbytes.functional.dequantize_4bit(codes, state)

    def put(model):
        for name, value in rounded.items():
            model.get_parameter(name).data.copy_(value)

    found = gradients(quantised_config, keep)
    plain = quantised_config.replace(lora=lora)
    assert equal(found, gradients(plain, put))
    assert not equal(found, gradients(plain))
