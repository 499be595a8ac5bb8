"""Checkpoints of a run: whole or not at all, the last few and the best, and which run they are of.

``checkpoints/step-000200.pt`` holds weights, optimizer and progress after 200 steps, and
``best.pt`` the weights of the best evaluation.
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from mmrag.errors import ConfigError, ModelError
from mmrag_recipes import distributed
from mmrag_recipes.compatible import old_fingerprint
from mmrag_recipes.config import RunConfig, TrainConfig
from mmrag_recipes.data import Dataset

logger = logging.getLogger("mmrag_recipes")

# Options that may differ between the parts of a run: they say how it runs and what it writes,
# how long, and what it keeps. All others decide what is learned.
MAY_CHANGE = frozenset(
    {"out", "dry_run", "device", "chunk", "gradient_checkpointing", "shard", "steps", "epochs"}
    | {"evaluate", "evaluate_every", "best_metric", "patience", "max_skipped_steps"}
    | {"save_every", "keep", "log_every", "report", "features"}
)


@dataclass
class Progress:
    """How far a run is. step: the next one. best: value of the best evaluation, NaN for none.

    judged: what the best evaluation measured, and the digest of its rows. evaluations_since:
    evaluations since the best one. skipped: steps in a row without an update. refreshed: step
    before which negatives were mined last, 0 for never. negatives: what was mined, per data set
    the ``values`` and ``ends`` of a ``Ragged`` of keys.
    """

    step: int = 0
    best: float = float("nan")
    judged: str = ""
    evaluations_since: int = 0
    skipped: int = 0
    refreshed: int = 0
    negatives: list[tuple[Tensor, Tensor]] = field(default_factory=list)


def identity(config: RunConfig, datasets: list[Dataset], base: str) -> dict[str, Any]:
    """What decides the weights that a run ends with, by key.

    Args:
        base: fingerprint of the checkpoint that the run starts from.
    """
    values = _deciding(config)
    # A path may change; what is in the files may not.
    for entry, dataset in zip(values["data"], datasets, strict=True):
        entry["rows"] = dataset.digest
    # By its weights: a folder may be moved, and a name on the hub gets new files.
    values["model"] = base
    if isinstance(config, TrainConfig) and config.compatible:
        values["compatible"]["model"] = old_fingerprint(config)
    return values


def _deciding(config: RunConfig) -> dict[str, Any]:
    """The options that decide what is learned."""
    values: dict[str, Any] = json.loads(config.model_dump_json(exclude=set(MAY_CHANGE)))
    for entry in values["data"]:
        del entry["name"]  # only for logs
    return values


def check_identity(config: RunConfig, mine: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raise ConfigError naming each key in which a stored run differs.

    Options that came after the run count as their defaults.
    """
    stored = _with_defaults(type(config), stored)
    differences = [
        _difference(key, stored.get(key), mine.get(key))
        for key in sorted((mine.keys() | stored.keys()) - MAY_CHANGE)
        if mine.get(key) != stored.get(key)
    ]
    if differences:
        raise ConfigError(
            f"{config.out} holds a run with {'; '.join(differences)}. Choose another `out`, or "
            "delete it."
        )


def _with_defaults(cls: type[RunConfig], stored: dict[str, Any]) -> dict[str, Any]:
    # A stored identity has the shape of its options, nested tables included, so that reading it
    # as options fills in what is missing.
    known = {key: value for key, value in stored.items() if key in cls.model_fields}
    try:
        options = cls.model_validate({**known, "out": ""})
    except ValidationError:
        return stored  # a value that is no longer allowed differs from the present one
    return {**stored, **_deciding(options)}


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "model":
        return "other weights of the model it started from (model)"
    if key == "data" and len(before or ()) == len(now):
        changed = [
            f"data[{i}].{name}"
            for i, (old, new) in enumerate(zip(before, now, strict=True))
            for name in new
            if old.get(name) != new[name]
        ]
        rows = any(name.endswith(".rows") for name in changed)
        return f"other {'rows or images' if rows else 'settings'} ({', '.join(changed)})"
    if key == "data":
        return "other data sets (data)"
    return f"{key}={before!r}, now {now!r}"


class Checkpoints:
    """The checkpoints in the folder of a run."""

    def __init__(self, config: RunConfig, about: dict[str, Any]) -> None:
        self.config = config
        self.folder = Path(config.out) / "checkpoints"
        self.about = about

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Write a checkpoint to resume from, and delete those beyond the last ``keep``."""
        state = {
            "progress": asdict(progress),
            "weights": trained_state(model),
            "optimizer": _optimizer_state(optimizer),
            # As text, since weights_only loads tensors and plain containers alone.
            "identity": json.dumps(self.about),
        }
        self._write(state, self.folder / f"step-{progress.step:06d}.pt")
        # After the new one is complete, so that there is always one to resume from.
        for path in self._steps()[: -self.config.keep] if distributed.rank() == 0 else ():
            path.unlink()

    def save_best(self, model: nn.Module, step: int, value: float) -> None:
        """Write the weights of the best evaluation so far."""
        # Without the optimizer, which is twice as large: nothing resumes from here.
        state = {"step": step, "value": value, "weights": trained_state(model)}
        self._write(state, self.folder / "best.pt")

    def load_best(self, model: nn.Module) -> int | None:
        """Put the weights of the best evaluation in place. Returns its step; None without one."""
        path = self.folder / "best.pt"
        if not path.is_file():
            return None
        state = _load(path)
        _fill(model, state["weights"])
        return int(state["step"])

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress:
        """Take up the last checkpoint, if there is one.

        Raises:
            ConfigError: If it is of a run with other options, rows, images or base weights.
            ModelError: If it is damaged.
        """
        paths = self._steps()
        if not paths:
            return Progress()
        # mmap: with shards, the processes of a machine share one copy and read their parts.
        state = _load(paths[-1], mmap=self.config.shard)
        # Before any weight is touched.
        check_identity(self.config, self.about, json.loads(state["identity"]))
        _fill(model, state["weights"])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, moments in state["optimizer"]["state"].items():
            for name, value in moments.items():
                moments[name] = distributed.share_of(value, parameters[index])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
        logger.info("resuming at step %d", progress.step)
        return progress

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def _write(self, state: dict[str, Any], path: Path) -> None:
        if distributed.rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        try:
            # Whole or not at all: a kill while writing leaves the last one intact.
            torch.save(state, partial)
            partial.replace(path)
        except (RuntimeError, OSError) as error:  # on a full disk torch raises the first
            partial.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            raise ModelError(
                f"{path} cannot be written ({error}); {free:,} bytes are free. Checkpoints of "
                "before are whole: with more room, the same command goes on from the last."
            ) from error


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    try:
        # weights_only: a checkpoint from somewhere else must not run code.
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{path} is damaged and cannot be read. Delete it, and the same command goes on from "
            "the checkpoint before it, or from the start where there is none."
        ) from error
    return state


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights that train, by name; the others are those of the starting checkpoint.

    All processes call it, and the first gets them.
    """
    named = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return _to_first(named)


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {**state, "state": {i: _to_first(moments) for i, moments in state["state"].items()}}


def _to_first(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU of the first process, one at a time; nothing in the others."""
    gathered = {}
    for name, value in tensors.items():
        one = distributed.whole(value)
        if distributed.rank() == 0:
            gathered[name] = one.cpu()
    return gathered


def _fill(model: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in weights.items():
        # In place: the optimizer holds these very tensors.
        parameter = parameters[name].detach()
        parameter.copy_(distributed.share_of(value, parameter))
