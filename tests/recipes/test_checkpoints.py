"""Checkpoints of runs that were begun by earlier versions are taken up."""

import json

import pytest
import torch
from training import config_of, log_of

from mmrag.errors import ConfigError
from mmrag_recipes.config import LoraConfig
from mmrag_recipes.train import train


def edit_identity(out, edit):
    """Change what a run says of itself, in its checkpoints and in its final weights."""
    for path in (out / "checkpoints").glob("step-*.pt"):
        state = torch.load(path, weights_only=True)
        state["identity"] = json.dumps(edit(json.loads(state["identity"])))
        torch.save(state, path)
    path = out / "final" / "run.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "identity": edit(state["identity"])}))


def without_new_options(identity):
    """As before these options existed, and while ``chunk`` still counted."""
    new = {"matryoshka_layers", "binary_weight", "binary_queries", "compatible", "schedule"}
    old = {key: value for key, value in identity.items() if key not in new}
    del old["lora"]["dora"], old["data"][0]["in_batch_negatives"]
    return {**old, "chunk": 0}


def test_a_run_older_than_an_option_goes_on(tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows, steps=2, lora=LoraConfig(r=2))
    train(config)
    edit_identity(tmp_path, without_new_options)
    for changes, words in [
        ({"temperature": 0.5}, r"temperature=0\.03, now 0\.5\. "),
        ({"schedule": "cosine"}, r"with schedule='linear', now 'cosine'\. "),
        ({"lora": LoraConfig(r=2, dora=True)}, r"with lora=.*'dora': False.*now .*'dora': True"),
    ]:
        with pytest.raises(ConfigError, match=words):
            train(config.replace(steps=3, **changes))
    train(config.replace(steps=3))
    assert [record["step"] for record in log_of(tmp_path)] == [0, 1, 2]


def test_an_option_that_is_gone_is_named(tiny_model, text_rows, tmp_path):
    config = config_of(tiny_model, tmp_path, text_rows, steps=1)
    train(config)
    edit_identity(tmp_path, lambda identity: {**identity, "annealing": 3})
    with pytest.raises(ConfigError, match="annealing=3, now None"):
        train(config.replace(steps=2))
