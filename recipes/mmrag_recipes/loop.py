"""The loop of every training: steps, evaluations, checkpoints, and what stops a run.

What is trained is a ``Task``: the embedder of ``mmrag_recipes.train``, the reranker of
``mmrag_recipes.train_reranker``.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmrag.embedders.registry import find_folders
from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.checkpoints import fingerprint
from mmrag.modeling.loading import place
from mmrag_recipes import distributed, gradcache
from mmrag_recipes.batches import Batch, Source, plan
from mmrag_recipes.checkpoints import (
    Checkpoints,
    Progress,
    check_identity,
    identity,
    trained_state,
)
from mmrag_recipes.config import RunConfig
from mmrag_recipes.data import Dataset, load_datasets
from mmrag_recipes.features import keep_features, unchanging
from mmrag_recipes.judging import check_evaluation, judge_by, metric_of
from mmrag_recipes.refresh import Refresh
from mmrag_recipes.reports import plot_run
from mmrag_recipes.row_file import Ragged, write_whole
from mmrag_recipes.run_log import Report, RunLog
from mmrag_recipes.sharding import ShardedTask
from mmrag_recipes.tasks import Step, Task
from mmrag_recipes.trainable import learning_rate, make_optimizer, make_trainable

logger = logging.getLogger("mmrag_recipes")


def fit(config: RunConfig, hooks: Sequence[Report], load: Callable[[], Task]) -> Path:
    """Run a whole training, or resume it. Returns the folder with the final weights.

    Args:
        hooks: called with the values of each step and evaluation, beside ``config.report``.
        load: loads what is trained.

    Raises:
        ConfigError: For options that do not fit the model or the run in ``out``.
        ContentError: For bad rows.
        ModelError: If the loss does not stay finite.
    """
    rank, size = distributed.start()
    try:
        return _fit(config, hooks, load, rank, size)
    finally:
        distributed.stop()


def _fit(
    config: RunConfig, hooks: Sequence[Report], load: Callable[[], Task], rank: int, size: int
) -> Path:
    if config.batch_size % size:
        raise ConfigError(f"batch_size={config.batch_size} does not divide by {size} processes.")
    if config.shard and size == 1:
        raise ConfigError(
            "shard splits the weights over processes, and there is one: start several with "
            "torchrun --nproc_per_node 8 -m mmrag_recipes, or leave it out."
        )
    if config.evaluate:
        check_evaluation(config)
    # Adapters begin at random weights: the same in every process and every run.
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    task = load()
    make_trainable(task, config)
    if config.features:
        keep_features(task.model, config, config.features)
    if config.shard:
        task = ShardedTask(task, place(config.device).device)
    optimizer = make_optimizer(task.model, config)
    if rank == 0:
        load_datasets(config, task.planner)  # indexes the rows, while the other processes wait
    distributed.wait()
    datasets = load_datasets(config, task.planner)
    config = with_steps(config, datasets)
    out = Path(config.out)
    base = fingerprint(find_folders(config.model), task.planner.settings())
    about = identity(config, datasets, base)
    if is_finished(config, about):
        logger.info("%s: the run is finished; give more `steps` to go on.", out)
        return out / "final"
    checkpoints = Checkpoints(config, about)
    progress = checkpoints.resume(task.model, optimizer)
    if config.evaluate:
        judge_by(progress, config)
    log = None
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        config.save(out / "config.json")
        _report_left_out(out, datasets)
        log = RunLog(out, progress.step, config, hooks)
    training = Training(config, task, optimizer, datasets, checkpoints, progress, log)
    training.go_on()
    _finish(training, out, about)
    return out / "final"


def with_steps(config: RunConfig, datasets: Sequence[Dataset]) -> RunConfig:
    """The configuration with ``epochs``, if given, as steps."""
    if not config.epochs:
        return config
    usable = sum(int((dataset.costs >= 0).sum()) for dataset in datasets)
    steps = math.ceil(config.epochs * usable / config.batch_size)
    return config.replace(steps=max(1, steps))


def is_finished(config: RunConfig, about: dict[str, Any]) -> bool:
    """Whether ``out`` holds the end of this run. Raises ConfigError if it is of another run."""
    path = Path(config.out) / "final" / "run.json"
    if not path.is_file():
        return False
    try:
        stored = json.loads(path.read_bytes())
    except ValueError:
        logger.warning("%s is damaged: the end of the run is made again", path)
        return False
    check_identity(config, about, stored["identity"])
    return bool(stored["steps"] >= config.steps)


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
    """A run under way. log: of the first process, None in the others."""

    config: RunConfig
    task: Task
    optimizer: torch.optim.Optimizer
    datasets: list[Dataset]
    checkpoints: Checkpoints
    progress: Progress
    log: RunLog | None

    def go_on(self) -> None:
        """Run all steps that are left."""
        config, progress = self.config, self.progress
        sources = [
            Source(d.rows.keys, d.costs, d.config.weight, d.config.in_batch_negatives)
            for d in self.datasets
        ]
        # Skipping planned batches is cheap: they are indices, nothing has been decoded. The plan
        # keeps to the negatives of the files, so that a resumed run need not know older ones.
        planned = itertools.islice(
            plan(sources, config.batch_size, config.seed), progress.step, config.steps
        )
        refresh = self.task.refresh
        stop = False
        while progress.step < config.steps and not stop:
            count = config.steps
            if refresh:
                self._refresh(refresh)
                count = refresh.every - progress.step % refresh.every
            # No further: steps are prepared ahead with the negatives of now.
            stop = self._run(itertools.islice(planned, count))

    def _refresh(self, refresh: Refresh) -> None:
        """Mine the negatives where it is time, and put the last ones in place."""
        progress = self.progress
        if progress.step % refresh.every == 0 and progress.step > progress.refreshed:
            with self.task.alone():
                mined = refresh.mine(self.datasets)
            progress.negatives = [(torch.tensor(m.values), torch.tensor(m.ends)) for m in mined]
            progress.refreshed = progress.step
            # A search may take long: a run that stops soon after need not do it again.
            self.checkpoints.save(self.task.model, self.optimizer, progress)
        for index, (values, ends) in enumerate(progress.negatives):
            negatives = Ragged(values.numpy(), ends.numpy())
            self.datasets[index] = replace(self.datasets[index], negatives=negatives)

    def _run(self, batches: Iterable[Batch]) -> bool:
        """Run steps, the coming ones prepared meanwhile. Returns whether the run is to stop."""
        config, progress = self.config, self.progress
        started, n_rows = time.perf_counter(), 0
        for batch, inputs in self.task.steps(self.datasets, batches):
            step = progress.step
            # Dropout depends on the step and the process alone, so that resuming changes nothing.
            torch.manual_seed(hash((config.seed, step, distributed.rank())))
            loss, norm = train_step(self.task, self.optimizer, inputs, config, step)
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
                self.checkpoints.save(self.task.model, self.optimizer, progress)
            if stop:
                return True
        return False

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
        with self.task.alone():
            results = self.task.evaluate() if self.log else {}
        if self.log:
            self.log.metrics(progress.step - 1, results)
            value = metric_of(results, config.best_metric)
        device = next(self.task.model.parameters()).device
        # Only the first process evaluates; all must stop at the same step.
        value = distributed.from_first(value, device)
        progress.evaluations_since += 1
        if not value <= progress.best:  # also where there is no best yet
            progress.best, progress.evaluations_since = value, 0
            self.checkpoints.save_best(self.task.model, progress.step, value)
        if config.patience and progress.evaluations_since >= config.patience:
            logger.info(
                "%s has not improved in %d evaluations", config.best_metric, config.patience
            )
            return True
        return False


def train_step(
    task: Task,
    optimizer: torch.optim.Optimizer,
    step: Step,
    config: RunConfig,
    number: int,
) -> tuple[float, float]:
    """One optimizer step; no update if a value is not finite.

    Returns:
        The loss over all processes and the gradient's norm.
    """
    # None tells a weight that no input used from one whose gradient is zero.
    optimizer.zero_grad(set_to_none=True)
    # Shards are gathered by all processes together: they need equally many chunks.
    costs = None if config.shard else [one.n_tokens for one in step.inputs]
    loss = gradcache.step(
        task.encode,
        step.inputs,
        lambda outputs: task.loss(outputs, step),
        config.chunk,
        unchanging(task.model),
        costs,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not config.shard:  # gradients of shards are averages already
        distributed.average_gradients(parameters)
    # After averaging: clipped before, each process would scale its part differently.
    norm = float(distributed.whole(nn.utils.clip_grad_norm_(parameters, config.clip)))
    mean = distributed.mean(loss)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(number, config) * group["scale"]
    # Both are the same in all processes, so that all of them step or none.
    if math.isfinite(mean) and math.isfinite(norm):
        optimizer.step()
    return mean, norm


def _finish(training: Training, out: Path, about: dict[str, Any]) -> None:
    """Write the final weights: those of the best evaluation, if there was one."""
    from safetensors.torch import save_file

    model = training.task.model
    distributed.wait()  # until the first process has written the best weights
    # Without a value, best.pt is of evaluations that do not count.
    judged = training.config.evaluate and not math.isnan(training.progress.best)
    best = training.checkpoints.load_best(model) if judged else None
    if best is not None:
        logger.info("the final weights are those after step %d, the best evaluation", best)
    # safetensors refuses views.
    weights = {name: value.contiguous() for name, value in trained_state(model).items()}
    if distributed.rank():
        return
    final = out / "final"
    final.mkdir(exist_ok=True)
    save_file(weights, final / "trained.safetensors")
    training.config.save(final / "config.json")
    state = {"steps": training.config.steps, "identity": about, "best_step": best}
    # Written last: it says that the run is finished.
    write_whole(final / "run.json", json.dumps(state, indent=1).encode())
    plot_run(out)
