"""T1, T2, T12: cached gradients are those of the whole batch at once."""

import pytest
import torch
from one_step import prepare_step
from PIL import Image

from mmrag.content import Content
from mmrag.embedders import load_backbone
from mmrag.modeling.backbone import inputs_of
from mmrag_recipes import gradcache
from mmrag_recipes.batches import Batch
from mmrag_recipes.config import DataConfig, LoraConfig, TrainConfig
from mmrag_recipes.data import load_datasets
from mmrag_recipes.steps import encode, step_loss
from mmrag_recipes.trainable import frozen_towers, make_trainable


def config_of(model, rows, **changes) -> TrainConfig:
    config = TrainConfig(
        model=str(model),
        family="gme",
        out="unused",
        data=(DataConfig(rows=str(rows)),),
        hard_negatives=2,
        device="cpu",
    )
    return config.replace(**changes)


def gradients(
    config: TrainConfig, chunk: int, seed: int = 5, costs: bool = False
) -> tuple[float, dict]:
    """Loss and gradient of every weight for one fixed step, from a fresh model."""
    torch.manual_seed(seed)
    backbone = load_backbone(config.model, family="gme", device="cpu")
    make_trainable(backbone, config)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:  # zero at the start: the gradient of lora_A would vanish
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(7))
    dataset = load_datasets(config, backbone)[0]
    step = prepare_step(Batch(0, tuple(range(8)), 0), dataset, backbone, config.hard_negatives)
    torch.manual_seed(seed)
    loss = gradcache.step(
        lambda inputs: encode(backbone, inputs, config),
        step.inputs,
        lambda vectors: step_loss(vectors, step, config),
        chunk,
        costs=[one.n_tokens for one in step.inputs] if costs else None,
    )
    named = backbone.model.named_parameters()
    return float(loss), {n: p.grad.clone() for n, p in named if p.grad is not None}


VARIANTS = {
    "plain": {},
    "matryoshka": {"matryoshka_dims": (8, 16)},
    "depths": {"matryoshka_layers": ((1, 8), (1, 16)), "gradient_checkpointing": True},
    "no hard negatives": {"hard_negatives": 0},
    "lora": {"lora": LoraConfig(r=4)},
    "checkpointing": {"gradient_checkpointing": True},
    "lora, checkpointing, matryoshka": {
        "lora": LoraConfig(r=4),
        "gradient_checkpointing": True,
        "matryoshka_dims": (8,),
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_gradients_equal_those_of_the_whole_batch(tiny_model, mixed_rows, variant):
    config = config_of(tiny_model, mixed_rows, **VARIANTS[variant])
    loss, whole = gradients(config, chunk=0)
    assert max(g.abs().max() for g in whole.values()) > 1e-3
    for chunk, costs in ((1, False), (3, False), (3, True), (10_000, True)):
        again, cached = gradients(config, chunk, costs=costs)
        assert again == pytest.approx(loss, rel=1e-5)
        assert cached.keys() == whole.keys()
        for name, gradient in whole.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (cached[name] - gradient).abs().max() / scale < 2e-3, name


def test_a_chunk_is_bounded_by_the_tokens_of_the_longest():
    weight = torch.ones(1, requires_grad=True)
    costs, seen = [5, 100, 5, 5, 90, 5, 5, 100], []

    def encode(inputs):
        seen.append(inputs)
        return torch.tensor(inputs, dtype=torch.float32).unsqueeze(1) * weight

    gradcache.step(encode, range(8), lambda v: (v.squeeze(1) ** 2).sum(), 2, costs=costs)
    # At most 200 padded tokens each; the longest run once.
    assert seen == [[2, 3, 5, 6], [4, 0], [1, 7], [2, 3, 5, 6], [4, 0]]
    assert weight.grad.item() == 2 * sum(n**2 for n in range(8))


def test_dropout_falls_the_same_way_in_both_passes(tiny_model, mixed_rows):
    """With chunks equal to the whole inputs in order, dropout must match draw by draw."""
    config = config_of(tiny_model, mixed_rows, lora=LoraConfig(r=4, dropout=0.5))
    torch.manual_seed(0)
    backbone = load_backbone(config.model, family="gme", device="cpu")
    make_trainable(backbone, config)
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    dataset = load_datasets(config, backbone)[0]
    step = prepare_step(Batch(0, (0, 1, 2, 3), 0), dataset, backbone, 1)
    seen = []

    def encode(inputs):
        vectors = backbone.forward(inputs)
        seen.append(vectors.detach().clone())
        return vectors

    torch.manual_seed(11)
    gradcache.step(encode, step.inputs, lambda v: (v * v.detach().roll(1, 0)).sum(), chunk=5)
    n_again = len(seen) // 2  # the last chunk runs once
    for first, second in zip(seen[:n_again], seen[n_again + 1 :], strict=True):
        torch.testing.assert_close(first, second)
    torch.manual_seed(12)
    assert not torch.allclose(encode(step.inputs[:5]), seen[0], atol=1e-4)  # dropout is active


def test_a_frozen_tower_sees_each_image_once(tiny_model, mixed_rows):
    """Its features serve both passes, and the gradients are those of computing them twice."""
    config = config_of(tiny_model, mixed_rows, freeze=("visual",), hard_negatives=1)
    backbone = load_backbone(config.model, family="gme", device="cpu")
    make_trainable(backbone, config)
    towers = frozen_towers(backbone.model)
    assert towers == [backbone.model.visual]
    dataset = load_datasets(config, backbone)[0]
    step = prepare_step(Batch(0, tuple(range(8)), 0), dataset, backbone, 1)
    patches = []
    # Inside the tower, so that outputs handed out again do not count.
    first = backbone.model.visual.blocks[0]
    first.register_forward_pre_hook(lambda module, args: patches.append(len(args[0])))

    def gradients_of(chunk, frozen):
        backbone.model.zero_grad()
        patches.clear()
        gradcache.step(
            lambda inputs: backbone.forward(inputs).float(),
            step.inputs,
            lambda vectors: step_loss(vectors, step, config),
            chunk,
            frozen,
        )
        named = backbone.model.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}

    gradients_of(0, ())
    whole = sum(patches)
    twice = gradients_of(3, ())
    assert sum(patches) > 1.5 * whole
    once = gradients_of(3, towers)
    assert sum(patches) == whole
    assert once.keys() == twice.keys()
    for name, gradient in twice.items():
        torch.testing.assert_close(once[name], gradient, rtol=0, atol=1e-6 * gradient.abs().max())


def test_only_what_trains_is_computed_again_for_memory(tiny_model, mixed_rows):
    config = config_of(tiny_model, mixed_rows, freeze=("visual",), gradient_checkpointing=True)
    config = config.replace(lora=LoraConfig(r=2))
    backbone = load_backbone(config.model, family="gme", device="cpu")
    make_trainable(backbone, config)
    on = {
        name
        for name, module in backbone.model.named_modules()
        if getattr(module, "gradient_checkpointing", False)
    }
    assert "language_model.layers.0" in on
    assert not any(name.startswith("visual") for name in on)
    assert not backbone.model.visual.training
    # No graph either, of which the activations of every layer would be kept.
    features = []
    backbone.model.visual.register_forward_hook(lambda *call: features.append(call[-1]))
    page = Content(image=Image.new("RGB", (60, 80), "red"))
    assert backbone.forward([inputs_of(backbone, page, None)]).requires_grad
    assert not features[0].pooler_output.requires_grad


@pytest.mark.gpu
def test_memory_stays_flat_as_the_batch_grows(tiny_model, text_rows):
    """T14: one card takes the same cached path."""
    peaks = []
    config = config_of(tiny_model, text_rows, device="cuda")
    backbone = load_backbone(config.model, family="gme", device="cuda", dtype="float32")
    make_trainable(backbone, config)
    inputs = [inputs_of(backbone, Content("word " * 60), None) for _ in range(64)]
    for count in (16, 64):
        torch.cuda.reset_peak_memory_stats()
        gradcache.step(backbone.forward, inputs[:count], lambda v: v.square().sum(), chunk=8)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.1 * peaks[0]
