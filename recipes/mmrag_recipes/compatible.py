"""The old model of a backward-compatible training: frozen, beside the one that trains.

New queries are trained against its documents, so that a collection that it built need not be
embedded again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmrag.embedders import load_backbone
from mmrag.embedders.registry import find_folders
from mmrag.errors import ConfigError
from mmrag.modeling.backbone import Backbone
from mmrag.modeling.checkpoints import fingerprint
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.steps import StepInputs

_AT_ONCE = 32  # inputs of the old model, where the new one runs the batch at once


def old_options(config: TrainConfig) -> tuple[str, dict[str, Any]]:
    """Name of the old model, and what it is loaded with."""
    settings = config.compatible
    if settings is None or settings.model is None:
        return config.model, {"family": config.family, **config.limits}
    same = settings.model == config.model
    limits = settings.limits or (config.limits if same else {})
    return settings.model, {
        "family": settings.family or (config.family if same else None),
        **limits,
    }


def old_fingerprint(config: TrainConfig) -> str:
    """Fingerprint of the files of the old model."""
    return fingerprint(find_folders(old_options(config)[0]), {})


def load_old(config: TrainConfig, new: Backbone) -> Backbone | None:
    """Load the old model of a compatible training; None for any other training.

    Raises:
        ConfigError: If its vectors have another length than those of ``new``.
    """
    if config.compatible is None:
        return None
    name, options = old_options(config)
    old = load_backbone(name, device=config.device, dtype=config.dtype, **options)
    if old.dim != new.dim:
        raise ConfigError(
            f"compatible.model: {name} has {old.dim} dimensions and the new model {new.dim}, so "
            "that their vectors cannot be compared. Train without it, and map the old vectors with "
            "the recipe project."
        )
    old.model.eval().requires_grad_(False)
    return old


def old_vectors(old: Backbone | None, step: StepInputs, chunk: int) -> Tensor | None:
    """Vectors of the step's items by the old model, (b + n, d) float32; None without one."""
    if old is None:
        return None
    device = next(old.model.parameters()).device
    parts = [torch.zeros(0, old.dim, device=device)]  # every row of this process may be skipped
    size = chunk or _AT_ONCE
    with torch.no_grad():
        for start in range(0, len(step.old_inputs), size):
            parts.append(old.forward(step.old_inputs[start : start + size]).float())
    return torch.cat(parts)
