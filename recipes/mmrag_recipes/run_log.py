"""What a run writes while it goes: lines on the terminal, ``log.jsonl``, and reports elsewhere."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmrag.errors import ConfigError
from mmrag_recipes.batches import Batch
from mmrag_recipes.config import RunConfig
from mmrag_recipes.data import Problem

logger = logging.getLogger("mmrag_recipes")

Report = Callable[[int, dict[str, float]], None]
"""Takes the values of one step or evaluation: the step's number, and each value by its name."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of ``log.jsonl``; a line that a kill cut short is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except ValueError:
            logger.warning("%s: one line is cut short and is left out", path)
    return records


class RunLog:
    """Log of one run."""

    def __init__(self, out: Path, first: int, config: RunConfig, hooks: Sequence[Report]) -> None:
        self.path = out / "log.jsonl"
        self.config = config
        # Steps that will be run again are forgotten.
        kept = [record for record in read_log(self.path) if record["step"] < first]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.hooks = [*hooks, *(_OPENERS[name](out, config) for name in config.report)]

    def step(self, step: int, dataset: str, batch: Batch, values: dict[str, float]) -> None:
        """Record one step; every ``log_every`` steps a line is printed."""
        self._write({"step": step, "dataset": dataset, "rows": list(batch.rows), **values}, values)
        if step % self.config.log_every == 0 or step + 1 == self.config.steps:
            print(
                f"step {step + 1}/{self.config.steps}  loss {values['loss']:.4f}  "
                f"norm {values['grad_norm']:.2f}  lr {values['lr']:.2e}  "
                f"{values['rows_per_second']:.1f} rows/s  [{dataset}]",
                flush=True,
            )

    def skipped(self, step: int, problems: Sequence[Problem]) -> None:
        """Record rows and documents that a step left out."""
        for problem in problems:
            logger.warning("step %d: row %s is left out: %s", step + 1, problem.row, problem.reason)
            self._write({"step": step, "skipped": problem.row, "reason": problem.reason}, {})

    def metrics(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Record an evaluation."""
        flat = {f"{pair}/{name}": v for pair, m in results.items() for name, v in m.items()}
        self._write({"step": step, "metrics": flat}, flat)
        for pair, values in results.items():
            shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(f"step {step + 1}  {pair}: {shown}", flush=True)

    def _write(self, record: dict[str, Any], values: dict[str, float]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for hook in self.hooks if values else ():
            hook(int(record["step"]), values)


def _tensorboard(out: Path, config: RunConfig) -> Report:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        logger.warning("TensorBoard logs are off: pip install 'mmrag[train]' turns them on.")
        # TensorBoard is asked for by default: its absence is no reason to stop.
        return lambda step, values: None
    board: Any = SummaryWriter(str(out / "tensorboard"))

    def report(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            board.add_scalar(name, value, step)
        board.flush()

    return report


def _wandb(out: Path, config: RunConfig) -> Report:
    try:
        import wandb
    except ImportError as error:
        raise ConfigError("report=wandb needs it: pip install wandb") from error
    # The same id after resuming, so that the run goes on in the same curves.
    run: Any = wandb.init(
        project="mmrag", name=out.name, id=out.name, resume="allow", dir=str(out),
        config=json.loads(config.model_dump_json()),
    )  # fmt: skip

    def report(step: int, values: dict[str, float]) -> None:
        run.log(values, step=step)

    return report


_OPENERS: dict[str, Callable[[Path, RunConfig], Report]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
