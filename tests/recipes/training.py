"""Small training runs and what they wrote, for the tests of the recipes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrag_recipes import loop
from mmrag_recipes.config import DataConfig, TrainConfig


def config_of(model, out, *rows, **changes) -> TrainConfig:
    config = TrainConfig(
        model=str(model),
        family="gme",
        out=str(out),
        data=tuple(DataConfig(rows=str(path)) for path in rows),
        steps=6,
        batch_size=4,
        hard_negatives=1,
        lr=1e-3,
        device="cpu",
        save_every=3,
    )
    return config.replace(**changes)


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """A training in here is interrupted at the step with this number, and comes that far."""
    original = loop.train_step

    def dies(task, optimizer, step, config, at):
        if at == number:
            raise KeyboardInterrupt
        return original(task, optimizer, step, config, at)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "train_step", dies)
        yield


def log_of(out) -> list[dict]:
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def weights_of(out) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "final" / "trained.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
