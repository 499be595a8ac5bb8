"""What the loop of a training needs of what is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from mmrag_recipes.batches import Batch
from mmrag_recipes.data import Dataset, Planner, Problem
from mmrag_recipes.refresh import Refresh


class Step(Protocol):
    """One process's share of a step: prepared inputs, and what had to be left out."""

    @property
    def inputs(self) -> Sequence[Any]:
        """Inputs of ``Task.encode``."""
        ...

    @property
    def skipped(self) -> Sequence[Problem]:
        """Rows and documents whose images could not be decoded."""
        ...


class Task(Protocol):
    """What is trained, on what, and by which loss."""

    model: nn.Module

    @property
    def planner(self) -> Planner:
        """Counts the tokens of the rows, once, before the first step."""
        ...

    @property
    def refresh(self) -> Refresh | None:
        """Mines the negatives again every so many steps; None where they stay."""
        ...

    def steps(
        self, datasets: Sequence[Dataset], batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, Any]]:
        """Batches with their ``Step``, prepared ahead."""
        ...

    def encode(self, inputs: Sequence[Any]) -> Tensor:
        """What the model gives for each input alone, (len(inputs), width), with a graph."""
        ...

    def loss(self, outputs: Tensor, step: Any) -> Tensor:
        """Loss of what ``encode`` gave for all inputs of a step."""
        ...

    def filler(self, pictured: bool) -> Any:
        """A small input of ``encode``, with an image or without."""
        ...

    def alone(self) -> AbstractContextManager[None]:
        """While one process may run the model for itself; entered by all."""
        ...

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Metrics of the model as it stands, on the rows of ``evaluate``."""
        ...
