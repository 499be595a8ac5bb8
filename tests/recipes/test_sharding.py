"""Training with split weights gives what training without does."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from made_rows import make_rows
from pydantic import ValidationError
from tiny import save_qwen2_vl
from tiny_qwen3 import add_words
from training import config_of, log_of, same, weights_of
from two_processes import free_ports, run_on_two

from mmrag.errors import ConfigError
from mmrag_recipes.config import FeaturesConfig, GroupConfig, LoraConfig, RefreshConfig
from mmrag_recipes.config_reranker import TrainRerankerConfig
from mmrag_recipes.rows import read_rows, write_rows
from mmrag_recipes.train import train
from mmrag_recipes.train_reranker import train_reranker


def on_two_processes(*arguments):
    worker = Path(__file__).parent / "whole_runs.py"
    ports = " ".join(free_ports(len(arguments)))
    command = [sys.executable, str(worker), *arguments]
    run_on_two(command, 300, MASTER_PORTS=ports, LOCAL_WORLD_SIZE="2")


@pytest.fixture(scope="module")
def runs(tiny_model, tmp_path_factory):
    """Options by name, of runs that are over; those that begin with ``split`` by two processes."""
    folder = tmp_path_factory.mktemp("sharding")
    path = make_rows(folder / "rows", 12, negatives=2)
    rows = read_rows(path)
    # One process often has less to do in a step than the other, or no image.
    for n, row in enumerate(rows):
        rows[n] = row.model_copy(update={"negatives": row.negatives[: n % 3]})
    write_rows(path, rows)
    base = config_of(tiny_model, folder / "x", path, steps=5, save_every=2, batch_size=6)
    base = base.replace(
        hard_negatives=2,
        chunk=2,
        weight_decay=0.1,
        clip=0.5,
        report=(),
        gradient_checkpointing=True,
        groups=(GroupConfig(prefix="visual", lr=3e-4),),
        evaluate=str(path),
        evaluate_every=2,
        patience=9,
        refresh=RefreshConfig(every=3, right=2, wrong=1),
    )
    configs = {
        name: base.replace(out=str(folder / name), shard=name != "alone")
        for name in ("alone", "split", "split-stopped")
    }
    chat = save_qwen2_vl(folder / "chat", seed=4)
    add_words(chat, ("True", "False"))
    pairs = {"steps": 2, "batch_size": 2, "hard_negatives": 2, "chunk": 2, "device": "cpu"}
    pairs |= {"model": str(chat), "data": [{"rows": str(path)}], "lr": 1e-3, "report": ()}
    pairs |= {"freeze": ["model.visual"]}
    for name in ("reranker", "reranker-split"):
        out = str(folder / name)
        configs[name] = TrainRerankerConfig(**pairs, out=out, shard=name != "reranker")
    for name, config in configs.items():
        config.save(folder / f"{name}.json")
    train(configs["alone"])
    train_reranker(configs["reranker"])
    names = ("split.json", "split-stopped.json:3", "split-stopped.json", "reranker-split.json")
    on_two_processes(*(str(folder / name) for name in names))
    return configs


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The softmax takes no notice of the keys' biases: their gradient is rounding alone.
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=name)


def test_split_weights_learn_what_one_process_does(runs):
    expected = log_of(runs["alone"].out)
    found = log_of(runs["split"].out)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-3)
    assert_close(weights_of(runs["split"].out), weights_of(runs["alone"].out))


def test_so_do_rerankers(runs):
    assert_close(weights_of(runs["reranker-split"].out), weights_of(runs["reranker"].out))


def test_evaluations_see_the_weights_as_they_are(runs):
    def best(name):
        state = torch.load(Path(runs[name].out) / "checkpoints" / "best.pt", weights_only=True)
        return state["step"], state["value"], state["weights"]

    step, value, weights = best("split")
    expected_step, expected_value, expected = best("alone")
    assert (step, value) == (expected_step, pytest.approx(expected_value))
    assert_close(weights, expected)


def test_a_resumed_run_ends_at_the_same_bits(runs):
    assert same(weights_of(runs["split-stopped"].out), weights_of(runs["split"].out))


def test_one_process_takes_up_what_several_began(runs, tmp_path):
    folder = Path(shutil.copytree(runs["split"].out, tmp_path / "run"))
    shutil.rmtree(folder / "final")
    (folder / "checkpoints" / "step-000005.pt").unlink()
    train(runs["alone"].replace(out=str(folder)))
    assert_close(weights_of(folder), weights_of(runs["alone"].out))


def test_what_cannot_be_split_is_said(tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows)
    with pytest.raises(ConfigError, match="there is one: start several with torchrun"):
        train(config.replace(shard=True))
    with pytest.raises(ValidationError, match="leave it or the table lora out"):
        config.replace(shard=True, lora=LoraConfig())
    with pytest.raises(ValidationError, match="leave one out"):
        config.replace(shard=True, features=FeaturesConfig(folder="kept"))
