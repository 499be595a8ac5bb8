"""Combine task vectors into one: weighted sums, SLERP and TIES.

A task vector is what fine-tuning added to the weights of its base (arXiv 2212.04089, section 2).
Here it is a dict of float32 tensors by name, without the weights that did not change: an adapter
on a few projections takes the memory of those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

TaskVector = Mapping[str, Tensor]
Combine = Callable[[list[Tensor]], Tensor]

# Nearer to parallel than this, in radians, the quotient of sines loses its digits.
_LEAST_ANGLE = 1e-3


def task_vector(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What was added to the weights of ``base``; weights that are equal are left out."""
    return {
        name: tuned[name] - base[name] for name in base if not torch.equal(tuned[name], base[name])
    }


def combine(vectors: Sequence[TaskVector], how: Combine) -> dict[str, Tensor]:
    """Combine task vectors weight by weight; a weight that a vector lacks counts as zeros."""
    first = {name: value for vector in vectors for name, value in vector.items()}
    return {
        name: how([vector.get(name, torch.zeros_like(like)) for vector in vectors])
        for name, like in first.items()
    }


def weighted_sum(vectors: Sequence[TaskVector], weights: Sequence[float]) -> dict[str, Tensor]:
    """Task arithmetic (arXiv 2212.04089, section 2): the sum of the vectors times their weights."""
    from peft.utils.merge_utils import task_arithmetic

    factors = torch.tensor(weights)
    return combine(vectors, lambda parts: task_arithmetic(parts, factors.to(parts[0].device)))


def ties(
    vectors: Sequence[TaskVector], weights: Sequence[float], density: float
) -> dict[str, Tensor]:
    """TIES (arXiv 2306.01708, section 3): trim, elect signs, mean of the entries that agree.

    Each weight matrix is trimmed on its own, as in peft; the paper trims the whole vector at once,
    which for a large model would have to be sorted in memory.
    """
    from peft.utils.merge_utils import ties as merge

    factors = torch.tensor(weights)
    return combine(vectors, lambda parts: merge(parts, factors.to(parts[0].device), density))


def slerp(first: TaskVector, second: TaskVector, share: float) -> dict[str, Tensor]:
    """Interpolate along the arc between two task vectors, weight by weight (Shoemake 1985).

    Of task vectors and not of weights: models tuned from one base have weights so nearly parallel
    that the arc is the chord.

    Args:
        share: of the second, from 0 to 1.
    """
    return combine([first, second], lambda parts: slerp_tensors(parts[0], parts[1], share))


def slerp_tensors(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Interpolate two tensors of one shape along the arc; along the line where there is none."""
    lengths = first.norm() * second.norm()
    # In float64: an arc cosine near 1 needs the digits.
    cosine = (first.double() * second.double()).sum() / lengths.double().clamp(min=1e-300)
    angle = torch.arccos(cosine.clamp(-1, 1))
    # A zero tensor has no direction, and opposite ones have no arc of their own.
    if float(lengths) == 0 or float(angle.sin()) < _LEAST_ANGLE:
        return (1 - share) * first + share * second
    ours, theirs = torch.sin((1 - share) * angle), torch.sin(share * angle)
    return ((ours * first + theirs * second) / torch.sin(angle)).to(first.dtype)
