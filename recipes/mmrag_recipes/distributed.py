"""The few collective operations that training needs; all of them do nothing on one process.

The model is not wrapped. Each process adds up the gradients of its own rows and
``average_gradients`` runs once per step, so that a process whose batch has no image still
takes part for every weight, and GradCache needs no special case.

Scale: each process sums the losses of its own queries against the documents of all, gathered
with their gradients, and divides by the queries of all over the number of processes; the mean
over processes is then exactly the gradient of the global batch, however its rows are spread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

_PATIENCE = timedelta(hours=2)
# A copy of 128 MB: large enough for full bandwidth, small beside the gradients.
_BUCKET = 32_000_000  # elements reduced at a time


def start() -> tuple[int, int]:
    """Join the group that ``torchrun`` describes, if there is one. Returns rank and size."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    if not dist.is_initialized():
        # NCCL is for GPUs alone, and needs its device chosen before the group is made.
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        # The first process evaluates alone, which can take longer than the default allows.
        dist.init_process_group(backend, timeout=_PATIENCE)
    return dist.get_rank(), dist.get_world_size()


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_size() -> int:
    """Number of processes on this machine, as ``torchrun`` says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if size() > 1 else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """All rows of all processes in rank order; the backward adds up what each one asks."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.rows = local.shape[0]
        parts = [torch.empty_like(local) for _ in range(size())]
        dist.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        # Every process asks for gradients of all rows; each needs the sum of what was asked of its
        # own.
        dist.all_reduce(total)
        first = rank() * int(ctx.rows)
        return total[first : first + int(ctx.rows)]


def gather(local: Tensor) -> Tensor:
    """Rows of all processes in rank order, with gradients; every process has equally many."""
    if size() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call]
    return gathered


def most(value: int, device: torch.device) -> int:
    """Largest value over all processes."""
    if size() == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return int(tensor)


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, without gradients."""
    # all_reduce works in place; the caller's value must stay its own.
    value = value.detach().clone()
    if size() > 1:
        dist.all_reduce(value)
    return value


def from_first(value: float, device: torch.device) -> float:
    """What the first process says; the others' values are not looked at."""
    if size() == 1:
        return value
    # Metrics are Python floats: in float32 processes could disagree in the last digit.
    tensor = torch.tensor(value, device=device, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


def wait() -> None:
    """Wait until every process is here."""
    if size() > 1:
        dist.barrier()


def mean(value: Tensor) -> float:
    """Mean of a scalar over all processes."""
    return float(total(value.float()) / size())


def whole(value: Tensor) -> Tensor:
    """A tensor gathered from its shards; others as they are. All processes call it."""
    gathered: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return gathered


def share_of(value: Tensor, place: Tensor) -> Tensor:
    """What this process keeps of a whole tensor that belongs where ``place`` is; no messages."""
    if not isinstance(place, DTensor) or value.shape != place.shape:
        return value
    return distribute_tensor(value, place.device_mesh, place.placements, src_data_rank=None)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average gradients over processes, once; a missing gradient counts as zero.

    A weight that no process used keeps none.
    """
    if size() == 1:
        return
    for bucket in _buckets(parameters):
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        # In the same message, instead of a second one for each bucket.
        used = parts[0].new_tensor([float(p.grad is not None) for p in bucket])
        flat = torch.cat([*(part.flatten() for part in parts), used])
        dist.all_reduce(flat)
        counts = flat[-len(bucket) :].tolist()
        means = torch.split(flat[: -len(bucket)] / size(), [p.numel() for p in bucket])
        for parameter, count, mean_of in zip(bucket, counts, means, strict=True):
            # None and not zero, as on one process: momentum and weight decay leave it alone.
            parameter.grad = mean_of.view_as(parameter).clone() if count else None


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Group parameters of one dtype until a bucket is full."""
    bucket: list[nn.Parameter] = []
    count = 0
    for parameter in parameters:
        full = count + parameter.numel() > _BUCKET
        # One message has one dtype; adapters in float32 may sit beside weights in bfloat16.
        if bucket and (full or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, count = [], 0
        bucket.append(parameter)
        count += parameter.numel()
    if bucket:
        yield bucket
