"""2-D Matryoshka in training: the loss by hand, and what an export says of it."""

import json

import pytest
import torch
import torch.nn.functional as F
from training import config_of

from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError
from mmrag_recipes.depths import depths, parts
from mmrag_recipes.export import export
from mmrag_recipes.steps import StepInputs, step_loss
from mmrag_recipes.train import train

PAIRS = ((2, 3), (1, 2))


def test_each_pair_has_its_place():
    assert depths(PAIRS) == [1, 2]
    prefixes, inner = parts(PAIRS, (2,), 12)  # three depths of four numbers
    assert prefixes == [slice(0, 2), slice(0, 4)]
    assert inner == [slice(8, 11), slice(4, 6)]


def test_the_loss_is_the_mean_over_sizes_and_small_ones_follow_the_full_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(4, 12, generator=generator)
    step = StepInputs(
        inputs=[],
        targets=torch.tensor([0, 1]),
        keys=torch.tensor([1, 2]),
        rows=torch.tensor([0, 1]),
        own_rows=torch.tensor([0, 1]),
        positives=[torch.tensor([1]), torch.tensor([2])],
        teacher=torch.full((2,), float("nan")),
        in_batch=True,
    )
    config = config_of("m", tmp_path, "r", temperature=0.5, false_negative_margin=2)
    found = step_loss(vectors, step, config.replace(matryoshka_layers=PAIRS))

    def logits(part):
        one = F.normalize(vectors[:, part], dim=1)
        return (one[:2] @ one[2:].T) / 0.5

    full = logits(slice(0, 4)).log_softmax(1)
    values = [-full.diag().mean()]
    for part in (slice(8, 11), slice(4, 6)):
        small = logits(part).log_softmax(1)
        divergence = (full.exp() * (full - small)).sum(1).mean()
        values.append(divergence - small.diag().mean())
    assert float(found) == pytest.approx(float(torch.stack(values).mean()), rel=1e-5)


def test_an_export_says_which_sizes_were_trained(tiny_model, text_rows, tmp_path):
    sizes = {"matryoshka_layers": ((1, 8),), "matryoshka_dims": (16, 8)}
    train(config_of(tiny_model, tmp_path / "run", text_rows, steps=2, **sizes))
    folder = export(tmp_path / "run", tmp_path / "out", dtype="float32")
    marker = json.loads((folder / "mmrag.json").read_text())
    assert marker["matryoshka_layers"] == [[1, 8]]
    assert marker["matryoshka_dims"] == [8, 16]
    assert load_embedder(folder, device="cpu", layers=1).encode(["x"]).shape == (1, 8)
    with pytest.raises(ConfigError, match="trained for 8, 16, 32"):
        load_embedder(folder, device="cpu").encode(["x"], dim=12)


def test_a_run_without_pairs_takes_them_back(tiny_model, text_rows, tmp_path):
    """Its updates moved the inner layers away from what an earlier run had trained them for."""
    first = config_of(tiny_model, tmp_path / "a", text_rows, steps=1, matryoshka_layers=((1, 8),))
    train(first)
    once = export(tmp_path / "a", tmp_path / "once", dtype="float32")
    train(config_of(once, tmp_path / "b", text_rows, steps=1))
    twice = export(tmp_path / "b", tmp_path / "twice", dtype="float32")
    assert json.loads((twice / "mmrag.json").read_text())["matryoshka_layers"] == []


def test_training_for_a_depth_makes_it_better(tiny_model, text_rows, tmp_path):
    """After one layer, right documents are nearer than without; the same steps otherwise."""
    from mmrag_recipes.evaluate import evaluate_rows
    from mmrag_recipes.rows import read_rows, store_of

    values = {}
    for name, pairs in {"plain": (), "depths": ((1, 4),)}.items():
        config = config_of(tiny_model, tmp_path / name, text_rows, steps=25, lr=2e-3)
        train(config.replace(matryoshka_layers=pairs, hard_negatives=0))
        folder = export(tmp_path / name, tmp_path / f"{name}-out", dtype="float32")
        cut = load_embedder(folder, device="cpu", layers=1)
        rows = read_rows(text_rows)
        values[name] = evaluate_rows(cut, rows, store_of(text_rows), 4)["all"]["mrr@10"]
    assert values["depths"] > values["plain"] + 0.1
