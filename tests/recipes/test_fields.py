"""T9: each option of training has its effect: the weights move, or they must not."""

import json

import numpy as np
import pytest
import torch
from tiny import save_qwen2_vl
from training import config_of, log_of, same, weights_of

from mmrag.errors import ConfigError
from mmrag_recipes.__main__ import main
from mmrag_recipes.config import (
    CompatibleConfig,
    DataConfig,
    GroupConfig,
    LoraConfig,
    TrainConfig,
)
from mmrag_recipes.rows import Item, Row, write_rows
from mmrag_recipes.train import load_model, train

LORA = LoraConfig(r=2)
MOVES = {
    "steps": 4,
    "batch_size": 2,
    "hard_negatives": 0,
    "temperature": 0.2,
    "false_negative_margin": -0.5,
    "matryoshka_dims": (8,),
    "matryoshka_layers": ((1, 8),),
    "binary_weight": 0.5,
    "distil_weight": 0.9,
    "distil_temperature": 5.0,
    "compatible": CompatibleConfig(weight=0.9),
    "lr": 2e-3,
    "groups": (GroupConfig(prefix="language_model.layers.1", lr=1e-4),),
    "schedule": "constant",
    "warmup": 1.0,
    "weight_decay": 0.5,
    "clip": 1e-3,
    "seed": 1,
    "limits": {"max_length": 40},
    "family": "dse",
}
KEEPS = {  # to the last bit
    "save_every": 1,
    "keep": 1,
    "log_every": 1,
    "report": (),
    "evaluate_every": 1,
    "patience": 1,
    "best_metric": "all/hit@1",
    "max_skipped_steps": 9,
}
KEEPS_ABOUT = {"chunk": 3, "gradient_checkpointing": True}  # sums in another order
LORA_MOVES = {"r": 4, "alpha": 3, "dropout": 0.5, "targets": ".*k_proj", "dora": True}
ALONE = {"model", "out", "data", "dry_run", "epochs", "lora", "freeze", "device", "dtype"}
ALONE |= {"evaluate", "shard", "binary_queries", "refresh", "features"}


def test_every_option_has_a_test():
    tested = MOVES.keys() | KEEPS.keys() | KEEPS_ABOUT.keys() | ALONE
    assert tested == TrainConfig.model_fields.keys()
    # test_quantized.py has the remaining one, which needs bitsandbytes.
    assert LORA_MOVES.keys() | {"quantize"} == LoraConfig.model_fields.keys()
    assert GroupConfig.model_fields.keys() == {"prefix", "lr", "weight_decay"}
    assert DataConfig.model_fields.keys() == {"rows", "name", "weight", "in_batch_negatives"}


def scored_rows(folder, prefix="", count=12):
    """Texts with negatives and a teacher's scores."""
    chance = np.random.default_rng(1)
    rows = [
        Row(
            id=f"r{n}",
            instruction="Find a page.",
            query=Item(text=f"{prefix}query {n} about page {n * 7}"),
            positives=[Item(text=f"{prefix}answer {n} " + "the page " * (n % 3 + 10))],
            negatives=[Item(text=f"{prefix}no {n} {k}") for k in range(3)],
            positive_scores=[0.9],
            negative_scores=chance.random(3).tolist(),
        )
        for n in range(count)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "rows.jsonl", rows)
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return scored_rows(tmp_path_factory.mktemp("scored"))


@pytest.fixture(scope="module")
def base(tiny_model, rows):
    def config(out, **changes):
        options = {"steps": 3, "distil_weight": 0.5, "warmup": 0.4, "report": ("tensorboard",)}
        return config_of(tiny_model, out, rows, **{**options, **changes})

    return config


@pytest.fixture(scope="module")
def expected(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("base")
    train(base(out))
    return weights_of(out)


@pytest.fixture(scope="module")
def expected_lora(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora")
    train(base(out, lora=LORA))
    return weights_of(out)


@pytest.mark.parametrize("name", MOVES)
def test_it_moves_the_weights(base, expected, tmp_path, name):
    train(base(tmp_path, **{name: MOVES[name]}))
    assert not same(weights_of(tmp_path), expected)


@pytest.mark.parametrize("name", KEEPS)
def test_it_leaves_the_weights(base, expected, tmp_path, name):
    train(base(tmp_path, **{name: KEEPS[name]}))
    assert same(weights_of(tmp_path), expected)


@pytest.mark.parametrize("name", KEEPS_ABOUT)
def test_it_leaves_the_weights_but_for_rounding(base, expected, tmp_path, name):
    # Adam divides by the gradient's size, so rounding shows where gradients are almost zero.
    train(base(tmp_path, **{name: KEEPS_ABOUT[name]}))
    found = weights_of(tmp_path)
    near = [torch.isclose(found[n], expected[n], atol=1e-4).float().mean() for n in expected]
    assert min(near) > 0.98


@pytest.mark.parametrize("name", LORA_MOVES)
def test_it_moves_the_adapters(base, expected_lora, tmp_path, name):
    train(base(tmp_path, lora=LORA.replace(**{name: LORA_MOVES[name]})))
    assert not same(weights_of(tmp_path), expected_lora)


def test_adapters_and_what_is_frozen(base, expected, expected_lora, tmp_path):
    assert all("lora_" in name for name in expected_lora)
    train(base(tmp_path, freeze=("visual", "language_model.layers.0")))
    left = weights_of(tmp_path).keys()
    assert left < expected.keys()
    assert not any(name.startswith(("visual", "language_model.layers.0")) for name in left)


def test_the_type_of_the_weights_under_adapters(base, expected_lora, tmp_path):
    train(base(tmp_path, lora=LORA, dtype="bfloat16"))
    found = weights_of(tmp_path)
    assert all(value.dtype == torch.float32 for value in found.values())
    assert not same(found, expected_lora)


def test_whole_queries_train_other_weights_than_their_signs(base, tmp_path):
    train(base(tmp_path / "signs", binary_weight=0.5))
    train(base(tmp_path / "whole", binary_weight=0.5, binary_queries=False))
    assert not same(weights_of(tmp_path / "signs"), weights_of(tmp_path / "whole"))


def test_a_group_has_its_own_rate_and_decay(base, expected, tmp_path):
    """At a rate of almost nothing its weights stay; the others move as ever."""
    group = GroupConfig(prefix="language_model.layers.1", lr=1e-12, weight_decay=0.0)
    train(base(tmp_path, groups=(group,), steps=1))
    start = load_model(base(tmp_path)).model.state_dict()
    moved = {n for n, value in weights_of(tmp_path).items() if not torch.equal(value, start[n])}
    assert moved
    assert not any(
        float((weights_of(tmp_path)[n] - start[n]).abs().max()) > 1e-9
        for n in start
        if n.startswith("language_model.layers.1")
    )
    with pytest.raises(ConfigError, match="nothing that trains begins with 'vison'"):
        train(base(tmp_path / "other", groups=(GroupConfig(prefix="vison"),)))


def test_another_start_and_other_data(base, expected, tmp_path):
    model = save_qwen2_vl(tmp_path / "model", seed=8)
    train(base(tmp_path / "a").replace(model=str(model)))
    assert not same(weights_of(tmp_path / "a"), expected)
    other = scored_rows(tmp_path / "rows", "other ")
    train(base(tmp_path / "b", data=(str(other),)))
    assert not same(weights_of(tmp_path / "b"), expected)


def test_options_of_a_data_set(base, rows, expected, tmp_path):
    alone = DataConfig(rows=str(rows), in_batch_negatives=False)
    train(base(tmp_path / "alone", data=(alone,)))
    assert not same(weights_of(tmp_path / "alone"), expected)
    train(base(tmp_path / "named", data=(DataConfig(rows=str(rows), name="mine"),)))
    assert same(weights_of(tmp_path / "named"), expected)
    assert {record["dataset"] for record in log_of(tmp_path / "named")} == {"mine"}
    other = DataConfig(rows=str(scored_rows(tmp_path / "x", "x ")), name="x", weight=50)
    train(base(tmp_path / "mix", data=(DataConfig(rows=str(rows)), other), steps=12))
    names = [record["dataset"] for record in log_of(tmp_path / "mix")]
    assert names.count("x") >= 10


def test_epochs_are_steps(base, tmp_path):
    train(base(tmp_path, epochs=1.5))
    assert len(log_of(tmp_path)) == 5  # 12 rows in batches of 4


def test_a_dry_run_writes_nothing(base, tmp_path, capsys):
    config = base(tmp_path / "out")
    (tmp_path / "c.json").write_text(config.model_dump_json(exclude_none=True))
    main(["train", "--config", str(tmp_path / "c.json"), "--dry-run"])
    assert "tokens per row" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="device"):
        train(base(tmp_path, device="warp"))


def test_evaluation_and_saving_take_place_when_asked(base, rows, tmp_path, capsys):
    options = {"evaluate": str(rows), "evaluate_every": 2, "save_every": 1, "keep": 2}
    train(base(tmp_path, log_every=2, steps=4, **options))
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "metrics" in r] == [1, 3]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", "step-000003.pt", "step-000004.pt"]
    shown = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert [line.split()[1] for line in shown] == ["1/4", "3/4", "4/4"]
    assert (tmp_path / "tensorboard").is_dir()


def test_a_hook_of_your_own_gets_every_value(base, tmp_path):
    seen = []
    train(base(tmp_path, report=()), hooks=[lambda step, values: seen.append((step, values))])
    assert [step for step, _ in seen] == [0, 1, 2]
    assert seen[0][1].keys() == {"loss", "grad_norm", "lr", "rows_per_second"}
    assert not (tmp_path / "tensorboard").exists()


def test_wandb_gets_the_values(base, tmp_path, monkeypatch):
    import sys
    import types

    logged = []

    class Fake(types.ModuleType):
        def init(self, **options):
            assert options["config"]["steps"] == 3
            return types.SimpleNamespace(log=lambda values, step: logged.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", Fake("wandb"))
    train(base(tmp_path, report=("wandb",)))
    assert [step for step, _ in logged] == [0, 1, 2]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        train(base(tmp_path / "other", report=("wandb",)))
