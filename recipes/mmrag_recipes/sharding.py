"""Weights, gradients and optimizer state split over the processes, for full fine-tuning.

A block's weights are gathered while it runs and its gradients are summed where they are kept
(ZeRO-3, arXiv 1910.02054, section 5.3; FSDP, arXiv 2304.11277), by ``fully_shard`` of PyTorch.
All processes have to run the same blocks equally often: one with fewer inputs than another, or
with none that has an image, runs a filler beside them, whose output is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mmrag.content import Content
from mmrag.errors import ConfigError
from mmrag_recipes import distributed
from mmrag_recipes.batches import Batch
from mmrag_recipes.data import Dataset, Problem
from mmrag_recipes.tasks import Step, Task

# Without an image, and with one.
FILLERS = (Content("filler"), Content("filler", Image.new("RGB", (56, 56))))


class _Root(nn.Module):
    """What ``fully_shard`` takes for a model: its forward is the whole of ``Task.encode``."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self.encode = task.encode

    def forward(self, inputs: Sequence[Any]) -> Tensor:
        return self.encode(inputs)


@dataclass(frozen=True)
class PaddedStep:
    """A step of as many inputs as that of every other process. own: without the fillers."""

    inputs: Sequence[Any]
    skipped: Sequence[Problem]
    own: Step


class ShardedTask:
    """A ``Task`` whose weights are split over the processes.

    Args:
        task: with its model on the CPU, and what trains chosen.
        device: where to train; each process keeps its share there.

    Raises:
        ConfigError: For a model of another kind than Qwen-VL.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        self.task = task
        self.model = task.model
        self.planner = task.planner
        self.refresh = task.refresh
        self.device = device
        self._fillers = {pictured: task.filler(pictured) for pictured in (False, True)}
        names = set(getattr(task.model, "_no_split_modules", None) or ())
        blocks: list[Any] = [
            module for module in task.model.modules() if type(module).__name__ in names
        ]
        if not blocks or not hasattr(self._fillers[True], "images"):
            raise ConfigError("shard is for models of the Qwen-VL families: leave it out.")
        kinds = [type(block) for block in blocks]
        mesh = init_device_mesh(device.type, (distributed.size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # All the rest, such as the embeddings: gathered from the first block to the last.
        self._root: Any = fully_shard(_Root(task), mesh=mesh, reshard_after_forward=False)
        # What is gathered ahead in the backward pass: the block before. By default it is what ran
        # before, which is not the same in all processes once one has evaluated alone.
        self._root.set_modules_to_backward_prefetch(blocks[-1:])
        before: dict[type, Any] = {}
        for kind, block in zip(kinds, blocks, strict=True):
            block.set_modules_to_backward_prefetch([before.get(kind, self._root)])
            before[kind] = block

    def steps(
        self, datasets: Sequence[Dataset], batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, PaddedStep]]:
        """See ``Task.steps``."""
        for batch, step in self.task.steps(datasets, batches):
            # GradCache then cuts them into equally many chunks.
            missing = distributed.most(len(step.inputs), self.device) - len(step.inputs)
            inputs = [*step.inputs, *[self._fillers[False]] * missing]
            yield batch, PaddedStep(inputs, step.skipped, step)

    def encode(self, inputs: Sequence[Any]) -> Tensor:
        """See ``Task.encode``."""
        # Only where another process has an image: weights of the tower that no process used must
        # have no gradient, rather than one of zero.
        pictured = any(one.images for one in inputs)
        missing = distributed.most(int(pictured), self.device) > pictured
        vectors: Tensor = self._root([*inputs, self._fillers[True]] if missing else inputs)
        # The gradient of what is cut off is zero, but it passes through every block.
        return vectors[: len(inputs)]

    def loss(self, outputs: Tensor, step: PaddedStep) -> Tensor:
        """See ``Task.loss``."""
        return self.task.loss(outputs[: len(step.own.inputs)], step.own)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """See ``Task.evaluate``."""
        return self.task.evaluate()

    def filler(self, pictured: bool) -> Any:
        """See ``Task.filler``."""
        return self._fillers[pictured]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """See ``Task.alone``: every process holds all weights meanwhile."""
        shards = [module for module in self._root.modules() if isinstance(module, FSDPModule)]
        for shard in shards:
            # Else each block would be given up again after its first run.
            shard.set_reshard_after_forward(False, recurse=False)
            shard.unshard()
        try:
            yield
        finally:
            for shard in shards:
                shard.reshard()
                shard.set_reshard_after_forward(shard is not self._root, recurse=False)
