"""Fine-tune an embedder: contrastive, with hard negatives, GradCache, LoRA and exact resume.

    python -m mmrag_recipes train --config adapt --dry-run
    python -m mmrag_recipes train --config adapt
    python -m mmrag_recipes train --config adapt --lr 5e-5 --lora.r 16
    torchrun --nproc_per_node 8 -m mmrag_recipes train --config gme-lora

Run the same command again to resume. What makes up a step is in ``mmrag_recipes.steps``.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrag.embedders import load_backbone
from mmrag.embedders.base import check_dim
from mmrag.embedders.registry import find_folders
from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.backbone import Backbone
from mmrag.modeling.checkpoints import fingerprint
from mmrag_recipes import distributed, gradcache
from mmrag_recipes.batches import Source, plan
from mmrag_recipes.checkpoints import (
    Checkpoints,
    Progress,
    check_identity,
    identity,
    trained_state,
)
from mmrag_recipes.compatible import load_old, old_vectors
from mmrag_recipes.config import TrainConfig
from mmrag_recipes.data import Dataset, load_datasets
from mmrag_recipes.depths import check_pairs
from mmrag_recipes.reports import dry_run, plot_run
from mmrag_recipes.rows import read_rows, store_of
from mmrag_recipes.run_log import Report, RunLog
from mmrag_recipes.steps import Feeder, StepInputs, encode, step_loss
from mmrag_recipes.trainable import frozen_towers, learning_rate, make_optimizer, make_trainable

logger = logging.getLogger("mmrag_recipes")


def run(config: TrainConfig) -> None:
    """Command: train, or show what would be trained on."""
    if config.dry_run:
        backbone = load_model(config)
        print(dry_run(config, backbone, load_datasets(config, backbone)))
    else:
        print(f"trained weights: {train(config)}")


def train(config: TrainConfig, hooks: Sequence[Report] = ()) -> Path:
    """Run a whole training, or resume it. Returns the folder with the final weights.

    Args:
        hooks: called with the values of each step and evaluation, beside ``config.report``.

    Raises:
        ConfigError: For options that do not fit the model or the run in ``out``.
        ContentError: For bad rows.
        ModelError: If the loss does not stay finite.
    """
    rank, size = distributed.start()
    try:
        return _train(config, hooks, rank, size)
    finally:
        distributed.stop()


def _train(config: TrainConfig, hooks: Sequence[Report], rank: int, size: int) -> Path:
    if config.batch_size % size:
        raise ConfigError(f"batch_size={config.batch_size} does not divide by {size} processes.")
    if config.evaluate:
        read_rows(config.evaluate)  # a bad file is told now, not at the first evaluation
    # Adapters begin at random weights: the same in every process and every run.
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    backbone = load_model(config)
    make_trainable(backbone, config)
    optimizer = make_optimizer(backbone.model, config)
    if rank == 0:
        load_datasets(config, backbone)  # indexes the rows, while the other processes wait
    distributed.wait()
    datasets = load_datasets(config, backbone)
    config = with_steps(config, datasets)
    out = Path(config.out)
    base = fingerprint(find_folders(config.model), backbone.settings())
    about = identity(config, datasets, base)
    if is_finished(out, about, config.steps):
        logger.info("%s: the run is finished; give more `steps` to go on.", out)
        return out / "final"
    checkpoints = Checkpoints(out, about, config.keep)
    progress = checkpoints.resume(backbone.model, optimizer)
    log = None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        config.save(out / "config.json")
        _report_left_out(out, datasets)
        log = RunLog(out, progress.step, config, hooks)
    old = load_old(config, backbone)
    training = Training(config, backbone, optimizer, datasets, checkpoints, progress, log, old)
    training.go_on()
    if rank == 0:
        _finish(training, out, about)
    return out / "final"


def load_model(config: TrainConfig) -> Backbone:
    """Load the starting checkpoint; weights that train are float32, adapters sit on any type."""
    # Updates of full fine-tuning are smaller than bfloat16 can add.
    dtype = config.dtype if config.lora else "float32"
    backbone = load_backbone(
        config.model, family=config.family, device=config.device, dtype=dtype, **config.limits
    )
    for dim in config.matryoshka_dims:
        check_dim(dim, backbone.dim)
    check_pairs(config.matryoshka_layers, backbone)
    return backbone


def with_steps(config: TrainConfig, datasets: Sequence[Dataset]) -> TrainConfig:
    """The configuration with ``epochs``, if given, as steps."""
    if not config.epochs:
        return config
    usable = sum(int((dataset.costs >= 0).sum()) for dataset in datasets)
    steps = math.ceil(config.epochs * usable / config.batch_size)
    return config.replace(steps=max(1, steps))


def is_finished(out: Path, about: dict[str, Any], steps: int) -> bool:
    """Whether ``out`` holds the end of this run. Raises ConfigError if it is of another run."""
    path = out / "final" / "run.json"
    if not path.is_file():
        return False
    stored = json.loads(path.read_text(encoding="utf-8"))
    check_identity(out, about, stored["identity"])
    return bool(stored["steps"] >= steps)


def _report_left_out(out: Path, datasets: Sequence[Dataset]) -> None:
    """Say which rows cannot be used, and write all of them to ``left_out.jsonl``."""
    problems = [(d.config.rows, problem) for d in datasets for problem in d.problems]
    for rows, problem in problems[:10]:
        logger.warning("%s: row %s is left out: %s", rows, problem.row, problem.reason)
    if problems:
        logger.warning("%d rows are left out; see %s", len(problems), out / "left_out.jsonl")
    lines = [
        json.dumps({"rows": rows, "row": p.row, "reason": p.reason}) + "\n" for rows, p in problems
    ]
    (out / "left_out.jsonl").write_text("".join(lines), encoding="utf-8")


@dataclass
class Training:
    """A run under way. log: of the first process, None in the others.

    old: the model that a compatible training compares with.
    """

    config: TrainConfig
    backbone: Backbone
    optimizer: torch.optim.Optimizer
    datasets: list[Dataset]
    checkpoints: Checkpoints
    progress: Progress
    log: RunLog | None
    old: Backbone | None = None

    def go_on(self) -> None:
        """Run all steps that are left; the coming ones are prepared while one runs."""
        config, progress = self.config, self.progress
        sources = [
            Source(d.rows.keys, d.costs, d.config.weight, d.config.in_batch_negatives)
            for d in self.datasets
        ]
        # Skipping planned batches is cheap: they are indices, nothing has been decoded.
        planned = itertools.islice(
            plan(sources, config.batch_size, config.seed), progress.step, config.steps
        )
        feeder = Feeder(self.datasets, self.backbone, config.hard_negatives, old=self.old)
        started, n_rows = time.perf_counter(), 0
        for batch, inputs in feeder.steps(planned):
            step = progress.step
            # Dropout depends on the step and the process alone, so that resuming changes nothing.
            torch.manual_seed(hash((config.seed, step, distributed.rank())))
            before = old_vectors(self.old, inputs, config.chunk)
            loss, norm = train_step(self.backbone, self.optimizer, inputs, config, step, before)
            n_rows += len(batch.rows)
            if self.log:
                rate = n_rows / (time.perf_counter() - started)
                values = {"loss": loss, "grad_norm": norm, "lr": learning_rate(step, config)}
                name = self.datasets[batch.dataset].name
                self.log.step(step, name, batch, {**values, "rows_per_second": rate})
                self.log.skipped(step, inputs.skipped)
            self._check_finite(loss, norm)
            progress.step += 1
            stop = self._evaluate()
            if stop or progress.step % config.save_every == 0 or progress.step == config.steps:
                self._save()
            if stop:
                return

    def _check_finite(self, loss: float, norm: float) -> None:
        """Count steps that made no update; raise ModelError for too many in a row."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.progress.skipped = 0
            return
        self.progress.skipped += 1
        logger.warning("step %d: loss %s, norm %s: no update", self.progress.step + 1, loss, norm)
        if self.progress.skipped > self.config.max_skipped_steps:
            raise ModelError(
                f"step {self.progress.step + 1}: the loss is {loss} and the norm of the gradient "
                f"{norm}. The weights and the last checkpoint are as they were before. Lower lr, "
                "raise temperature, or use dtype=float32, in another `out`."
            )

    def _evaluate(self) -> bool:
        """Evaluate where it is time; keep the best weights. Returns whether to stop early."""
        config, progress = self.config, self.progress
        if not config.evaluate or progress.step % config.evaluate_every:
            return False
        value = 0.0
        if self.log:
            results = evaluate_now(self.backbone, config)
            self.log.metrics(progress.step - 1, results)
            value = metric_of(results, config.best_metric)
        device = next(self.backbone.model.parameters()).device
        # Only the first process evaluates; all must stop at the same step.
        value = distributed.from_first(value, device)
        progress.evaluations_since += 1
        if not value <= progress.best:  # also where there is no best yet
            progress.best, progress.evaluations_since = value, 0
            if self.log:
                self.checkpoints.save_best(self.backbone.model, progress.step, value)
        if config.patience and progress.evaluations_since >= config.patience:
            logger.info(
                "%s has not improved in %d evaluations", config.best_metric, config.patience
            )
            return True
        return False

    def _save(self) -> None:
        if self.log:
            self.checkpoints.save(self.backbone.model, self.optimizer, self.progress)


def train_step(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    step: StepInputs,
    config: TrainConfig,
    number: int,
    old: Tensor | None = None,
) -> tuple[float, float]:
    """One optimizer step; no update if a value is not finite.

    Args:
        old: the old model's vectors of ``step.old_inputs``, with ``config.compatible``.

    Returns:
        The loss over all processes and the gradient's norm.
    """
    # None tells a weight that no input used from one whose gradient is zero.
    optimizer.zero_grad(set_to_none=True)
    loss = gradcache.step(
        lambda inputs: encode(backbone, inputs, config),
        step.inputs,
        lambda vectors: step_loss(vectors, step, config, old),
        config.chunk,
        frozen_towers(backbone.model),
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    distributed.average_gradients(parameters)
    # After averaging: clipped before, each process would scale its part differently.
    norm = float(nn.utils.clip_grad_norm_(parameters, config.clip))
    mean = distributed.mean(loss)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(number, config) * group["scale"]
    # Both are the same in all processes, so that all of them step or none.
    if math.isfinite(mean) and math.isfinite(norm):
        optimizer.step()
    return mean, norm


def evaluate_now(backbone: Backbone, config: TrainConfig) -> dict[str, dict[str, float]]:
    """Retrieval metrics of the model as it stands, per modality pair."""
    from mmrag.embedders.local import LocalEmbedder
    from mmrag_recipes.evaluate import evaluate_rows

    # Frozen towers are in evaluation mode all along, so train() for all would be wrong.
    modes = {module: module.training for module in backbone.model.modules()}
    backbone.model.eval()
    embedder = LocalEmbedder(backbone, name=config.model, fingerprint="training")
    results = evaluate_rows(embedder, read_rows(config.evaluate), store_of(config.evaluate))
    for module, training in modes.items():
        module.training = training
    return results


def metric_of(results: dict[str, dict[str, float]], name: str) -> float:
    """The value of a metric such as ``all/ndcg@10``. Raises ConfigError for an unknown one."""
    pair, _, metric = name.rpartition("/")
    try:
        return results[pair][metric]
    except KeyError as error:
        names = ", ".join(f"{p}/{m}" for p, found in results.items() for m in found)
        raise ConfigError(f"best_metric={name!r} is unknown; there are {names}.") from error


def _finish(training: Training, out: Path, about: dict[str, Any]) -> None:
    """Write the final weights: those of the best evaluation, if there was one."""
    from safetensors.torch import save_file

    model = training.backbone.model
    best = training.checkpoints.load_best(model) if training.config.evaluate else None
    if best is not None:
        logger.info("the final weights are those after step %d, the best evaluation", best)
    final = out / "final"
    final.mkdir(exist_ok=True)
    # safetensors refuses views.
    weights = {name: value.contiguous() for name, value in trained_state(model).items()}
    save_file(weights, final / "trained.safetensors")
    training.config.save(final / "config.json")
    state = {"steps": training.config.steps, "identity": about, "best_step": best}
    # Written last: it says that the run is finished.
    (final / "run.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    plot_run(out)
