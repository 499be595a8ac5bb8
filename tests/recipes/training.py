"""Small training runs and what they wrote, for the tests of the recipes."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

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


def log_of(out) -> list[dict]:
    lines = (Path(out) / "log.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def weights_of(out) -> dict[str, torch.Tensor]:
    return load_file(Path(out) / "final" / "trained.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
