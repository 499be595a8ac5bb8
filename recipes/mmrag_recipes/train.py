"""Fine-tune an embedder: contrastive, with hard negatives, GradCache, LoRA and exact resume.

    python -m mmrag_recipes.train recipes/mmrag_recipes/configs/adapt.toml
    python -m mmrag_recipes.train recipes/mmrag_recipes/configs/adapt.toml --dry-run
    python -m mmrag_recipes.train recipes/mmrag_recipes/configs/adapt.toml lr=5e-5 lora.r=16
    torchrun --nproc_per_node 8 -m mmrag_recipes.train recipes/mmrag_recipes/configs/adapt.toml

Run the same command again to resume. Prompts, images and pooling are those of inference: the
same ``Backbone.prepare`` and ``Backbone.forward``.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrag.embedders import load_backbone
from mmrag.embedders.base import check_dim
from mmrag.errors import ConfigError
from mmrag.modeling.backbone import Backbone
from mmrag_recipes import distributed, gradcache
from mmrag_recipes.batches import Batch, Source, plan
from mmrag_recipes.config import TrainConfig, load_config
from mmrag_recipes.console import ends_cleanly
from mmrag_recipes.data import Dataset, StepInputs, load_datasets, prepare_step
from mmrag_recipes.losses import candidate_mask, distil_scores, info_nce, matryoshka, scores
from mmrag_recipes.reports import dry_run, plot_run
from mmrag_recipes.rows import read_rows, store_of

logger = logging.getLogger("mmrag.train")


def step_loss(vectors: Tensor, step: StepInputs, config: TrainConfig) -> Tensor:
    """Loss of this process's queries against the documents of all processes.

    Args:
        vectors: (b + n, d), queries first, as ``StepInputs.inputs``.
    """
    device = vectors.device
    queries, local = vectors[: step.n_queries], vectors[step.n_queries :]
    # Every process gathers equally many rows; what is filled up has the key -1.
    room = distributed.most(len(local), device)
    documents = distributed.gather(_fill(local, room, 0.0))
    keys = distributed.gather(_fill(step.keys.to(device), room, -1))
    rows = distributed.gather(_fill(step.rows.to(device), room, -1))
    teacher = distributed.gather(_fill(step.teacher.to(device), room, float("nan")))
    targets = step.targets.to(device) + distributed.rank() * room
    own_rows = step.own_rows.to(device)
    known_positives = [keys_of.to(device) for keys_of in step.positives]
    allowed = candidate_mask(targets, keys, known_positives, rows, own_rows, step.in_batch)
    own = own_rows.unsqueeze(1) == rows.unsqueeze(0)
    scored = own & ~teacher.isnan().unsqueeze(0)

    def loss(q: Tensor, d: Tensor) -> Tensor:
        similarity = scores(q, d)
        contrast = info_nce(
            similarity, targets, allowed, config.temperature, config.false_negative_margin, own
        )
        if not config.distil_weight:
            return contrast
        wanted = teacher.nan_to_num().unsqueeze(0).expand_as(similarity)
        followed = distil_scores(
            similarity, wanted, scored, config.temperature, config.distil_temperature
        )
        return (1 - config.distil_weight) * contrast + config.distil_weight * followed

    dims = (*config.matryoshka_dims, vectors.shape[1])
    return matryoshka(loss, dims)(queries, documents)


def _fill(rows: Tensor, count: int, value: float) -> Tensor:
    missing = count - rows.shape[0]
    if missing == 0:
        return rows
    return torch.cat([rows, rows.new_full((missing, *rows.shape[1:]), value)])


def make_trainable(backbone: Backbone, config: TrainConfig) -> list[nn.Parameter]:
    """Choose what trains: adapters, or all weights; less what is frozen. float32 masters.

    Raises: ConfigError if a frozen prefix names nothing, or nothing is left to train.
    """
    model: Any = backbone.model
    if config.lora:
        from peft import LoraConfig as PeftLora
        from peft import inject_adapter_in_model

        adapter = PeftLora(
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=config.lora.targets,
            use_dora=config.lora.dora,
        )
        try:
            inject_adapter_in_model(adapter, model)
        except ValueError as error:
            raise ConfigError(f"lora.targets: {error}") from error
    for prefix in config.freeze:
        frozen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
        if not frozen:
            raise ConfigError(f"freeze: no weight begins with {prefix!r}.")
        for parameter in frozen:
            parameter.requires_grad_(False)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("Nothing is left to train: loosen `freeze` or the adapters' `targets`.")
    if config.lora:
        for parameter in trainable:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    return trainable


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then linear decay to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * max(0.0, (config.steps - step) / max(1, config.steps - warmup))


def train(config: TrainConfig) -> Path:
    """Run a whole training, or resume it. Returns the folder with the final weights."""
    rank, size = distributed.start()
    if config.batch_size % size:
        raise ConfigError(f"batch_size={config.batch_size} does not divide by {size} processes.")
    if config.evaluate:
        read_rows(config.evaluate)  # a bad file is told now, not at the first evaluation
    torch.manual_seed(config.seed)
    random.seed(config.seed)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    backbone = _load_backbone(config)
    parameters = make_trainable(backbone, config)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    datasets = load_datasets(config, backbone)
    identity = _identity(config)
    first = resume(out, backbone.model, optimizer, identity)
    if rank == 0:
        (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    log = RunLog(out, first) if rank == 0 else None
    with ThreadPoolExecutor(2, thread_name_prefix="prepare") as pool:
        _run(config, backbone, optimizer, datasets, first, pool, log, identity)
    if rank == 0:
        _finish(config, backbone, out)
    distributed.stop()
    return out / "final"


def _load_backbone(config: TrainConfig) -> Backbone:
    # Weights that train are kept in float32; adapters sit on a model of any type.
    dtype = config.dtype if config.lora else "float32"
    backbone = load_backbone(
        config.model,
        family=config.family,
        device=config.device,
        dtype=dtype,
        **config.limits,
    )
    for dim in config.matryoshka_dims:
        check_dim(dim, backbone.dim)
    return backbone


def _run(
    config: TrainConfig,
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    datasets: Sequence[Dataset],
    first: int,
    pool: ThreadPoolExecutor,
    log: RunLog | None,
    identity: str,
) -> None:
    """The loop: the next step is prepared while this one runs."""
    sources = [
        Source(d.rows, d.costs, d.config.weight, d.config.in_batch_negatives) for d in datasets
    ]
    # Skipping planned batches costs nothing: they are indices, nothing has been decoded.
    planned = itertools.islice(plan(sources, config.batch_size, config.seed), first, config.steps)

    def submit(batch: Batch) -> Future[StepInputs]:
        dataset = datasets[batch.dataset]
        return pool.submit(prepare_step, batch, dataset, backbone, config.hard_negatives)

    ahead = [(batch, submit(batch)) for batch in itertools.islice(planned, 2)]
    started = time.perf_counter()
    for step in range(first, config.steps):
        batch, future = ahead.pop(0)
        following = next(planned, None)
        if following is not None:
            ahead.append((following, submit(following)))
        # Dropout depends on the step and the process alone, so that resuming changes nothing.
        torch.manual_seed(hash((config.seed, step, distributed.rank())))
        loss, norm = train_step(backbone, optimizer, future.result(), config, step)
        if log:
            rate = (step - first + 1) * len(batch.rows) / (time.perf_counter() - started)
            log.step(step, datasets[batch.dataset].config.name, batch, loss, norm, rate, config)
        if config.evaluate and (step + 1) % config.evaluate_every == 0 and log:
            log.metrics(step, evaluate_now(backbone, config))
        if (step + 1) % config.save_every == 0 and log:
            save(log.out, backbone.model, optimizer, step + 1, identity)


def train_step(
    backbone: Backbone,
    optimizer: torch.optim.Optimizer,
    step: StepInputs,
    config: TrainConfig,
    number: int,
) -> tuple[float, float]:
    """One optimizer step. Returns the loss over all processes and the gradient's norm."""
    device = next(backbone.model.parameters()).device
    low = device.type == "cuda"

    def encode(inputs: Sequence[Any]) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return backbone.forward(inputs).float()

    optimizer.zero_grad(set_to_none=True)
    loss = gradcache.step(
        encode, step.inputs, lambda vectors: step_loss(vectors, step, config), config.chunk
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    distributed.average_gradients(parameters)
    norm = nn.utils.clip_grad_norm_(parameters, config.clip)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(number, config)
    optimizer.step()
    return distributed.mean(loss), float(norm)


def evaluate_now(backbone: Backbone, config: TrainConfig) -> dict[str, dict[str, float]]:
    """Retrieval metrics of the model as it stands, per modality pair."""
    from mmrag.embedders.local import LocalEmbedder
    from mmrag_recipes.evaluate import evaluate_rows

    backbone.model.eval()
    embedder = LocalEmbedder(backbone, name=config.model, fingerprint="training")
    results = evaluate_rows(embedder, read_rows(config.evaluate), store_of(config.evaluate))
    backbone.model.train()
    return results


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Weights that train, by name; the others are those of the starting checkpoint."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def save(
    out: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    identity: str,
) -> None:
    """Write a checkpoint to resume from: whole, or not at all."""
    state = {
        "step": step,
        "weights": trained_state(model),
        "optimizer": optimizer.state_dict(),
        "identity": identity,
    }
    partial = out / "checkpoint.pt.part"
    torch.save(state, partial)
    partial.replace(out / "checkpoint.pt")


def resume(out: Path, model: nn.Module, optimizer: torch.optim.Optimizer, identity: str) -> int:
    """Take up the last checkpoint of a run, if there is one. Returns the next step.

    Raises: ConfigError if the checkpoint was made with another configuration or other rows.
    """
    path = out / "checkpoint.pt"
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["identity"] != identity:
        raise ConfigError(
            f"{out}: holds a run with another configuration or other rows; choose another `out`, "
            "or delete it."
        )
    parameters = dict(model.named_parameters())
    for name, value in state["weights"].items():
        parameters[name].data.copy_(value)
    optimizer.load_state_dict(state["optimizer"])
    logger.info("resuming at step %d", state["step"])
    return int(state["step"])


def _identity(config: TrainConfig) -> str:
    """What must be the same for a run to go on: all but where and how often things are written."""
    values = dataclasses.asdict(config)
    for key in ("out", "log_every", "save_every", "evaluate", "evaluate_every", "device"):
        del values[key]
    files = [Path(data.rows).read_bytes() for data in config.data]
    values["rows"] = [hashlib.sha256(content).hexdigest() for content in files]
    return json.dumps(values, sort_keys=True)


def _finish(config: TrainConfig, backbone: Backbone, out: Path) -> None:
    from safetensors.torch import save_file

    final = out / "final"
    final.mkdir(exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in trained_state(backbone.model).items()},
        final / "trained.safetensors",
    )
    (final / "train.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))
    plot_run(out)


class RunLog:
    """Log of one run: lines on the terminal, ``log.jsonl``, and TensorBoard where installed."""

    def __init__(self, out: Path, first: int) -> None:
        self.out = out
        self.path = out / "log.jsonl"
        self._drop_after(first)
        self.board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.warning("TensorBoard logs are off: pip install 'mmrag[train]' turns them on.")
        else:
            self.board = SummaryWriter(str(out / "tensorboard"))

    def _drop_after(self, first: int) -> None:
        """Forget steps that will be run again."""
        if self.path.is_file():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if json.loads(line)["step"] < first]
            self.path.write_text("".join(line + "\n" for line in kept))

    def step(
        self,
        step: int,
        dataset: str,
        batch: Batch,
        loss: float,
        norm: float,
        rate: float,
        config: TrainConfig,
    ) -> None:
        """Record one step; every ``log_every`` steps a line is printed."""
        lr = learning_rate(step, config)
        values = {"loss": loss, "grad_norm": norm, "lr": lr, "rows_per_second": rate}
        self._write({"step": step, "dataset": dataset, "rows": list(batch.rows), **values})
        self._board(step, values)
        if step % config.log_every == 0 or step + 1 == config.steps:
            print(
                f"step {step + 1}/{config.steps}  loss {loss:.4f}  norm {norm:.2f}  "
                f"lr {lr:.2e}  {rate:.1f} rows/s  [{dataset}]",
                flush=True,
            )

    def metrics(self, step: int, results: dict[str, dict[str, float]]) -> None:
        """Record an evaluation."""
        flat = {f"{pair}/{name}": v for pair, m in results.items() for name, v in m.items()}
        self._write({"step": step, "metrics": flat})
        self._board(step, flat)
        for pair, values in results.items():
            shown = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(f"step {step + 1}  {pair}: {shown}", flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _board(self, step: int, values: dict[str, float]) -> None:
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="mmrag_recipes.train", description=__doc__.split("\n")[0])
    parser.add_argument("config", help="TOML file; its keys are the fields of TrainConfig")
    parser.add_argument("overrides", nargs="*", help="key=value, such as lr=5e-5 or lora.r=16")
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained on")
    given = parser.parse_intermixed_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with ends_cleanly():
        config = load_config(TrainConfig, given.config, given.overrides)
        if given.dry_run:
            backbone = _load_backbone(config)
            print(dry_run(config, backbone, load_datasets(config, backbone)))
        else:
            print(f"trained weights: {train(config)}")


if __name__ == "__main__":
    main()
