"""One training step per configuration, under as many processes as the environment says.

Run as a script by each rank; imported for the result of a single process.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mmrag_recipes import distributed, gradcache
from mmrag_recipes.batches import Batch
from mmrag_recipes.config import FeaturesConfig, TrainConfig
from mmrag_recipes.data import load_datasets
from mmrag_recipes.features import keep_features, unchanging
from mmrag_recipes.options import build
from mmrag_recipes.steps import Feeder, encode, step_loss
from mmrag_recipes.train import load_model
from mmrag_recipes.trainable import make_trainable


def prepare_step(batch, dataset, backbone, hard_negatives):
    """This process's share of a batch."""
    ((_, step),) = Feeder([dataset], backbone, hard_negatives).steps([batch])
    return step


class Prepared:
    """A model and one step of it, as the trainer prepares it: of the first ``rows``, or of all."""

    def __init__(self, config: TrainConfig, rows: int | None = None) -> None:
        self.config = config
        self.backbone = load_model(config)
        make_trainable(self.backbone, config)
        self.dataset = load_datasets(config, self.backbone)[0]
        batch = Batch(0, tuple(range(rows or len(self.dataset.rows))), 0)
        self.step = prepare_step(batch, self.dataset, self.backbone, config.hard_negatives)

    def gradients(
        self, chunk: int | None = None, store: FeaturesConfig | None = None
    ) -> dict[str, torch.Tensor]:
        """By name. chunk: in place of the configuration's; store: keeps features of the tower."""
        model = self.backbone.model
        vars(model.visual).pop("kept_features", None)
        if store:
            keep_features(model, self.config, store)
        model.zero_grad()
        torch.manual_seed(0)  # of dropout
        gradcache.step(
            lambda inputs: encode(self.backbone, inputs, self.config),
            self.step.inputs,
            lambda vectors: step_loss(vectors, self.step, self.config),
            self.config.chunk if chunk is None else chunk,
            unchanging(model),
        )
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def one_step(config: TrainConfig) -> dict:
    """Loss, gradients after averaging, and how often gradients were reduced."""
    torch.manual_seed(0)
    backbone = load_model(config)
    parameters = make_trainable(backbone, config)
    dataset = load_datasets(config, backbone)[0]
    batch = Batch(0, tuple(range(config.batch_size)), 0)
    step = prepare_step(batch, dataset, backbone, config.hard_negatives)
    loss = gradcache.step(
        lambda inputs: encode(backbone, inputs, config),
        step.inputs,
        lambda vectors: step_loss(vectors, step, config),
        config.chunk,
    )
    reductions = 0
    original = dist.all_reduce

    def counting(*args, **kwargs):
        nonlocal reductions
        reductions += 1
        return original(*args, **kwargs)

    dist.all_reduce = counting
    distributed.average_gradients(parameters)
    dist.all_reduce = original
    named = backbone.model.named_parameters()
    return {
        "loss": distributed.mean(loss),
        "reductions": reductions,
        "gradients": {name: p.grad for name, p in named if p.grad is not None},
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    results = {}
    for path in sorted(folder.glob("*.json")):
        values = json.loads(path.read_text())
        config = build(TrainConfig, {k: v for k, v in values.items() if v is not None}, "test")
        results[path.stem] = one_step(config)
    if distributed.rank() == 0:
        torch.save(results, folder / "results.pt")
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
