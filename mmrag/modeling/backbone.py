"""What the model of one family has to do: the protocol that embedders and training share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mmrag.content import Content, Modality


@dataclass(frozen=True, slots=True)
class Plan:
    """One item as it will be shown to the model, before any image is decoded.

    content: the item, its instruction included.
    ids: tokens, images widened to their visual ones.
    sizes: width and height of each image as the model sees it, in pixels; those of a clip first,
        two frames of which are one image to it.
    """

    content: Content
    ids: list[int]
    sizes: tuple[tuple[int, int], ...] = ()

    @property
    def n_tokens(self) -> int:
        """Length of the sequence the decoder sees, visual tokens included."""
        return len(self.ids)


class Inputs(Protocol):
    """One item, ready for the model: what a Backbone's ``prepare`` returns."""

    @property
    def n_tokens(self) -> int:
        """Length of the sequence the decoder sees, visual tokens included."""
        ...


class Backbone(Protocol):
    """One model family: its prompt, image rule, positions, pooling and end token.

    ``plan`` and ``prepare`` run on the CPU in threads; ``forward`` runs the model,
    differentiably, and is the very function that training uses.

    Where vectors are pooled states of a decoder and nothing follows, a Backbone may have
    ``decoder`` besides, a module with ``layers`` and ``norm``; ``mmrag.modeling.depth`` reads it.
    One whose model keeps something from batch to batch says ``stateful = True``; no two of its
    batches then run at once.

    >>> from mmrag.embedders import load_backbone
    >>> backbone = load_backbone("mmrag-nano", device="cpu")
    >>> plan = backbone.plan(Content("wind energy"), None)
    >>> backbone.forward([backbone.prepare(plan)]).shape
    torch.Size([1, 384])
    """

    family: str
    dim: int
    modalities: frozenset[Modality]
    model: torch.nn.Module

    # Apart from prepare, so that batches are formed by length before a single image is decoded.
    def plan(self, content: Content, instruction: str | None) -> Plan:
        """Tokens of one item and the sizes of its images, by their headers alone.

        ``None`` means a document; an empty instruction a query without a task.

        Raises:
            ContentError: If it cannot be used.
        """
        ...

    def prepare(self, plan: Plan) -> Inputs:
        """Token ids and pixels of one item. Raises ContentError if an image is broken."""
        ...

    # Not normalised: training takes prefixes (Matryoshka), each of which is normalised on its own.
    def forward(self, batch: Sequence[Any]) -> Tensor:
        """Pooled vectors of shape (len(batch), dim), not normalised, on the model's device."""
        ...

    # Part of the fingerprint: a collection refuses an embedder whose settings differ.
    def settings(self) -> dict[str, Any]:
        """Everything besides the checkpoint that moves vectors: limits, prompts, pooling."""
        ...


def inputs_of(backbone: Backbone, content: Content, instruction: str | None) -> Any:
    """Inputs of one item, planned and prepared at once, for those who batch by themselves."""
    return backbone.prepare(backbone.plan(content, instruction))
