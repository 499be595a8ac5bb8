"""The options of the recipes that work on trained models: merge, route, project."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from mmrag_recipes.options import Options


class LearnConfig(Options):
    """How the coefficients of a merge are learned."""

    rows: str
    """Rows held out of every training: dev rows of all tasks."""
    groups: tuple[str, ...] = ()
    """Prefixes of weights that get coefficients of their own; all others share one per model."""
    steps: int = Field(60, ge=1)
    """Optimizer steps."""
    batch_size: int = Field(32, ge=2)
    """Queries per step."""
    chunk: int = Field(0, ge=0)
    """GradCache: inputs run at a time with a graph; 0 runs the batch at once."""
    hard_negatives: int = Field(0, ge=0)
    """Mined negatives taken per row and step."""
    temperature: float = Field(0.03, gt=0)
    """Of the softmax over cosines."""
    # Adam moves a coefficient by about this much a step, whatever the size of the task vectors.
    lr: float = Field(0.02, gt=0)
    """Rate of Adam over the coefficients."""
    seed: int = 0
    """Of the batches."""


class MergeConfig(Options):
    """Merge fine-tuned checkpoints or adapters of one base into one model."""

    positional: ClassVar[tuple[str, ...]] = ("models",)

    models: tuple[str, ...] = Field(min_length=2)
    """Checkpoints or adapters to merge, all fine-tuned from ``base``."""
    base: str
    """The checkpoint that they were fine-tuned from."""
    out: Path
    """Checkpoint folder to write."""
    method: Literal["linear", "task", "slerp", "ties", "learned"] = "linear"
    """linear (mean), task (sum of task vectors), slerp (of two), ties, or learned on dev rows."""
    # A mean and an arc need shares; a sum needs factors.
    weights: tuple[float, ...] = ()
    """One per model, by default equal: shares for linear and slerp, factors for task and ties."""
    density: float = Field(0.2, gt=0, le=1)
    """Of ties: share of each weight matrix that is kept, the entries largest in magnitude."""
    learn: LearnConfig | None = None
    """Of learned: rows and rates."""
    family: str | None = None
    """Recipe of the models where it cannot be told from the checkpoints."""
    limits: dict[str, Any] = Field(default_factory=dict)
    """Limits of the family for all models, such as {max_length = 1800}."""
    device: str = "auto"
    """Where to merge."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the weights that are written; merging computes in float32."""

    @model_validator(mode="after")
    def _fits_the_method(self) -> MergeConfig:
        if self.weights and len(self.weights) != len(self.models):
            raise ValueError(f"{len(self.weights)} weights for {len(self.models)} models")
        if self.method == "slerp" and len(self.models) != 2:
            raise ValueError("slerp takes two models; merge more with linear, ties or learned")
        if (self.method == "learned") != (self.learn is not None):
            raise ValueError("method 'learned' and the table `learn` go together")
        if self.method == "learned" and self.weights:
            raise ValueError("method 'learned' finds the weights; leave them out")
        shares = self.method in ("linear", "slerp") and self.weights
        if shares and (min(self.weights) < 0 or sum(self.weights) == 0):
            raise ValueError(f"weights of {self.method} are shares: none below 0, not all 0")
        return self


class RouteConfig(Options):
    """Write where an expert's queries lie, so that queries can be routed to it."""

    positional: ClassVar[tuple[str, ...]] = ("expert",)

    expert: Path
    """Folder of the expert: an adapter, or a checkpoint; ``route.json`` is written into it."""
    rows: Path
    """Rows that the expert was trained on."""
    base: str
    """The model that embeds documents and routes queries."""
    family: str | None = None
    """Recipe of the base where it cannot be told from the checkpoint."""


class ProjectConfig(Options):
    """Fit a projection of an old model's vectors into a new model's space, and measure it."""

    positional: ClassVar[tuple[str, ...]] = ("rows",)

    rows: Path
    """Rows whose documents the projection is fitted on."""
    old: str
    """The model that made the vectors that you have."""
    new: str
    """The model that asks."""
    out: Path
    """File of the projection to write, .npz: ``matrix``, and the fingerprints of both models."""
    # An orthogonal map keeps every cosine between old vectors; a linear one fits closer.
    method: Literal["orthogonal", "linear"] = "orthogonal"
    """orthogonal (Procrustes) keeps angles; linear (least squares) fits closer with many rows."""
    ridge: float = Field(1e-3, ge=0)
    """Of linear: penalty on the matrix, relative to the number of documents."""
    evaluate: Path | None = None
    """Held-out rows: recall of new and old queries over new, old and projected documents."""
    source: Path | None = None
    """What to map: the folder of a collection of the old model, or a .npy file of its vectors."""
    target: Path | None = None
    """Where the mapped collection or vectors go."""

    @model_validator(mode="after")
    def _source_and_target(self) -> ProjectConfig:
        if (self.source is None) != (self.target is None):
            raise ValueError("source and target go together")
        return self
