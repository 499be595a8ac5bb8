"""Fine-tune an embedder: contrastive, with hard negatives, GradCache, LoRA and exact resume.

    python -m mmrag_recipes train --config adapt --dry-run
    python -m mmrag_recipes train --config adapt
    python -m mmrag_recipes train --config adapt --lr 5e-5 --lora.r 16
    torchrun --nproc_per_node 8 -m mmrag_recipes train --config gme-lora

Run the same command again to resume. What makes up a step is in ``mmrag_recipes.steps``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrag.embedders import load_backbone
from mmrag.embedders.base import check_dim
from mmrag.modeling.backbone import Backbone, inputs_of
from mmrag_recipes.batches import Batch
from mmrag_recipes.compatible import load_old, old_vectors
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.data import Dataset, load_datasets
from mmrag_recipes.depths import check_pairs
from mmrag_recipes.loop import fit
from mmrag_recipes.refresh import Refresh
from mmrag_recipes.reports import dry_run
from mmrag_recipes.rows import read_rows, store_of
from mmrag_recipes.run_log import Report
from mmrag_recipes.sharding import FILLERS
from mmrag_recipes.steps import Feeder, StepInputs, encode, step_loss
from mmrag_recipes.trainable import evaluating, quantization_of


def run(config: TrainConfig) -> None:
    """Command: train, or show what would be trained on."""
    if config.dry_run:
        backbone = load_model(config)
        datasets = load_datasets(config, backbone)
        print(dry_run(config, backbone.model, datasets, partial(inputs_of, backbone)))
    else:
        print(f"trained weights: {train(config)}")


def train(config: TrainConfig, hooks: Sequence[Report] = ()) -> Path:
    """Train an embedder, or resume; see ``mmrag_recipes.loop.fit`` for errors and ``hooks``.

    Returns:
        The folder with the final weights.
    """
    return fit(config, hooks, lambda: EmbedderTask(config, load_model(config)))


def load_model(config: TrainConfig) -> Backbone:
    """Load the starting checkpoint; weights that train are float32, adapters sit on any type."""
    # Updates of full fine-tuning are smaller than bfloat16 can add.
    dtype = config.dtype if config.lora else "float32"
    backbone = load_backbone(
        config.model,
        family=config.family,
        # Shards go to the devices one by one, none of which may hold all weights.
        device="cpu" if config.shard else config.device,
        dtype=dtype,
        quantize=quantization_of(config),
        **config.limits,
    )
    for dim in config.matryoshka_dims:
        check_dim(dim, backbone.dim)
    check_pairs(config.matryoshka_layers, backbone)
    return backbone


class EmbedderTask:
    """A ``Task``: an embedder and contrastive losses."""

    def __init__(self, config: TrainConfig, backbone: Backbone) -> None:
        self.config = config
        self.model = backbone.model
        self.planner = backbone
        self.old: Backbone | None = None  # the model that a compatible training compares with
        self.refresh = Refresh(config, config.refresh, backbone) if config.refresh else None

    def steps(
        self, datasets: Sequence[Dataset], batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, StepInputs]]:
        """See ``Task.steps``."""
        # Here, where training begins: a run that is finished does not need it.
        self.old = self.old or load_old(self.config, self.planner)
        feeder = Feeder(datasets, self.planner, self.config.hard_negatives, old=self.old)
        return feeder.steps(batches)

    def encode(self, inputs: Sequence[Any]) -> Tensor:
        """Vectors of queries and documents."""
        return encode(self.planner, inputs, self.config)

    def loss(self, outputs: Tensor, step: StepInputs) -> Tensor:
        """See ``mmrag_recipes.steps.step_loss``."""
        before = old_vectors(self.old, step, self.config.chunk)
        return step_loss(outputs, step, self.config, before)

    def filler(self, pictured: bool) -> Any:
        """See ``Task.filler``."""
        return inputs_of(self.planner, FILLERS[pictured], None)

    def alone(self) -> AbstractContextManager[None]:
        """See ``Task.alone``."""
        return nullcontext()

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Retrieval metrics per modality pair."""
        return evaluate_now(self.planner, self.config)


def evaluate_now(backbone: Backbone, config: TrainConfig) -> dict[str, dict[str, float]]:
    """Retrieval metrics of the model as it stands, per modality pair."""
    from mmrag.embedders.local import LocalEmbedder
    from mmrag_recipes.evaluate import evaluate_rows

    embedder = LocalEmbedder(backbone, name=config.model, fingerprint="training")
    with evaluating(backbone.model):
        return evaluate_rows(embedder, read_rows(config.evaluate), store_of(config.evaluate))
