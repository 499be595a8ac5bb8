"""Learn how much of each task vector to add, by the retrieval loss on dev rows.

The weights stay as they are; only the coefficients move (arXiv 2410.15035: the best point of the
space that the task vectors span, searched by gradient descent on a few rows). The gradient of a
coefficient is the inner product of its task vector with the gradient of the merged weights, so
that any model trains as it is.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.backbone import Backbone
from mmrag_recipes import gradcache
from mmrag_recipes.batches import Source, plan
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.config_models import LearnConfig, MergeConfig
from mmrag_recipes.console import track
from mmrag_recipes.data import load_datasets
from mmrag_recipes.steps import Feeder, step_loss
from mmrag_recipes.task_vectors import TaskVector

logger = logging.getLogger("mmrag_recipes")


@dataclass(frozen=True)
class Coefficients:
    """How much of each task vector is added to the weights of each group.

    values: (models, groups + 1); the last column is of the weights that no prefix names.
    """

    values: Tensor
    groups: tuple[str, ...]

    def column(self, name: str) -> int:
        """The column of a weight: of the first prefix that fits, as in training."""
        found = (i for i, prefix in enumerate(self.groups) if name.startswith(prefix))
        return next(found, len(self.groups))

    def apply(self, vectors: Sequence[TaskVector]) -> dict[str, Tensor]:
        """The sum of the task vectors times their coefficients."""
        added: dict[str, Tensor] = {}
        for row, vector in zip(self.values, vectors, strict=True):
            for name, value in vector.items():
                part = row[self.column(name)] * value
                added[name] = added[name] + part if name in added else part
        return added

    def gradient(self, vectors: Sequence[TaskVector], of: Mapping[str, Tensor]) -> Tensor:
        """Gradient of the coefficients from that of the merged weights: inner products."""
        result = torch.zeros_like(self.values)
        for row, vector in enumerate(vectors):
            for name, value in vector.items():
                if name in of:  # a vision tower has no gradient in a batch of texts
                    result[row, self.column(name)] += (value * of[name]).sum()
        return result

    def by_group(self) -> dict[str, list[float]]:
        """One list per group, a number for each model."""
        names = [*self.groups, "all others" if self.groups else "all"]
        return {name: self.values[:, i].tolist() for i, name in enumerate(names)}


def add_vectors(
    parameters: Mapping[str, Tensor], base: Mapping[str, Tensor], added: TaskVector
) -> None:
    """Set the weights of a model to base plus what is added.

    Raises:
        ModelError: If a merged weight is not finite.
    """
    for name, value in added.items():
        merged = base[name] + value
        if not bool(merged.isfinite().all()):
            raise ModelError(f"{name}: the merged weight is not finite; use smaller weights.")
        parameters[name].data.copy_(merged)


def learn(
    backbone: Backbone, vectors: Sequence[TaskVector], options: MergeConfig, learning: LearnConfig
) -> Coefficients:
    """Fit the coefficients, from equal shares on. The weights of ``backbone`` move meanwhile.

    Raises:
        ConfigError: For a group that names no weight that differs between the models.
        ContentError: For rows that cannot be used.
        ModelError: If the loss does not stay finite.
    """
    config = TrainConfig.model_validate(
        {
            **{
                key: value for key, value in dict(learning).items() if key not in ("rows", "groups")
            },
            **{"model": options.base, "family": options.family, "limits": options.limits},
            **{"out": str(options.out), "data": [learning.rows]},
        }
    )
    changed = {name for vector in vectors for name in vector}
    for prefix in learning.groups:
        if not any(name.startswith(prefix) for name in changed):
            raise ConfigError(f"learn.groups: no merged weight begins with {prefix!r}.")
    parameters = {n: p for n, p in backbone.model.named_parameters() if n in changed}
    base = {name: value.detach().clone() for name, value in parameters.items()}
    # No graph is kept of the weights that all models share.
    for name, parameter in backbone.model.named_parameters():
        parameter.requires_grad_(name in changed)
    device = next(backbone.model.parameters()).device
    start = torch.full((len(vectors), len(learning.groups) + 1), 1 / len(vectors), device=device)
    coefficients = Coefficients(start, learning.groups)
    optimizer = torch.optim.Adam([coefficients.values], lr=config.lr)
    datasets = load_datasets(config, backbone)
    sources = [Source(d.rows.keys, d.costs) for d in datasets]
    batches = itertools.islice(plan(sources, config.batch_size, config.seed), config.steps)
    feeder = Feeder(datasets, backbone, config.hard_negatives)

    def encode(inputs: Sequence[Any]) -> Tensor:
        return backbone.forward(inputs).float()

    for _, step in track(feeder.steps(batches), config.steps, "learning coefficients"):
        if not step.inputs:
            continue  # none of its images could be decoded
        add_vectors(parameters, base, coefficients.apply(vectors))
        backbone.model.zero_grad()
        objective = partial(step_loss, step=step, config=config)
        loss = gradcache.step(encode, step.inputs, objective, config.chunk)
        if not bool(loss.isfinite()):
            raise ModelError("the loss on the dev rows is not finite; use a lower learn.lr.")
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        coefficients.values.grad = coefficients.gradient(vectors, gradients)
        optimizer.step()
        logger.debug("loss %.4f, coefficients %s", float(loss), coefficients.by_group())
    backbone.model.zero_grad()
    return coefficients
