"""The protocol of embedders, and what every one of them does with its arguments. No torch."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mmrag.content import Content, ContentLike, Modality, as_content
from mmrag.errors import ConfigError, ContentError, naming
from mmrag.instructions import resolve


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured for one embedder and does not hold for another.

    None, or a ranking that is not listed, means: not measured; the reader's own default holds.

    fusion_weights: weight of each ranking in fusion: ``image``, ``text``, ``fused``, ``bm25``.
    zero_cosine: for each view, the cosine of a question and a page that have nothing in common.
        Fusion counts from it; the cosines of a view without one are scaled over its first hits.
    support_cosine: least cosine of a claim and a sentence of its source that supports it.

    >>> Calibration(fusion_weights={"bm25": 3.0}).support_cosine is None
    True
    """

    fusion_weights: Mapping[str, float] = field(default_factory=dict)
    zero_cosine: Mapping[str, float] = field(default_factory=dict)
    support_cosine: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """From the ``calibration`` of a checkpoint's ``mmrag.json``.

        Raises:
            ConfigError: For keys that are unknown and values that are no numbers.
        """
        if unknown := sorted(set(values) - set(cls.__dataclass_fields__)):
            raise ConfigError(f"calibration: {', '.join(unknown)} unknown in mmrag.json.")
        by_ranking = [values.get(key) or {} for key in ("fusion_weights", "zero_cosine")]
        if not all(isinstance(each, Mapping) for each in by_ranking):
            raise ConfigError("calibration in mmrag.json: numbers by the name of the ranking.")
        numbers = [number for each in by_ranking for number in each.values()]
        numbers += [values["support_cosine"]] if values.get("support_cosine") is not None else []
        if not all(isinstance(number, (int, float)) for number in numbers):
            raise ConfigError("calibration in mmrag.json must hold numbers.")
        return cls(**values)

    def over(self, other: Calibration) -> Calibration:
        """These settings, and those of ``other`` where there is none of these."""
        support = self.support_cosine
        return Calibration(
            {**other.fusion_weights, **self.fusion_weights},
            {**other.zero_cosine, **self.zero_cosine},
            other.support_cosine if support is None else support,
        )


@runtime_checkable
class Embedder(Protocol):
    """Turns Contents into vectors. Knows nothing of LlamaIndex or Qdrant.

    name: what it was loaded from: a hub id, a folder, or a server's model name.
    family: which recipe it follows, for instance ``gme``.
    dim: length of its full vectors.
    modalities: what it can embed.
    fingerprint: changes when the weights or any setting that moves vectors change.

    An embedder may have ``OPTIONAL_TRAITS`` besides; ``calibration_of`` reads one of them.

    >>> from mmrag import load_embedder
    >>> embedder = load_embedder("mmrag-nano", device="cpu")
    >>> isinstance(embedder, Embedder)
    True
    >>> embedder.encode(["a text", {"text": "another"}]).shape == (2, embedder.dim)
    True
    """

    name: str
    family: str
    dim: int
    modalities: frozenset[Modality]
    fingerprint: str

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed ``contents`` in any mix of modalities.

        Args:
            contents: texts, images, or both, or clips; see ``mmrag.content.as_content``.
            instruction: the task, for queries: free text or the name of a task in
                ``mmrag.instructions``. ``None`` means documents; an empty one means queries
                without a task, which most families embed as documents.
            dim: keep this many leading dimensions (Matryoshka), then normalise again.
            progress: show a progress bar on stderr.

        Returns:
            Shape (len(contents), dim or self.dim), float32, every row of L2 norm 1, in the order of
            ``contents``.

        Raises:
            ContentError: For an item that cannot be used (its index is in the message).
            ConfigError: For a ``dim`` the model does not have.
        """
        ...


OPTIONAL_TRAITS = ("prefers_text", "prefers_passages", "matryoshka_dims", "calibration")
"""Attributes that an embedder may have besides those of ``Embedder``; see ``LocalEmbedder``."""


def optional_traits(embedder: Embedder) -> dict[str, Any]:
    """Those of ``OPTIONAL_TRAITS`` that an embedder has, for one that wraps it."""
    return {name: getattr(embedder, name) for name in OPTIONAL_TRAITS if hasattr(embedder, name)}


def calibration_of(embedder: Embedder) -> Calibration:
    """What was measured for an embedder; nothing for one that has no ``calibration``."""
    # Not part of the protocol: an Embedder of somebody else's need not have measured anything.
    return getattr(embedder, "calibration", None) or Calibration()


def as_items(
    embedder: Embedder, contents: Sequence[ContentLike], instruction: str | None
) -> list[Content]:
    """Contents that the embedder takes, each with the sentence of its own instruction.

    Raises:
        ContentError: For a single content in place of a sequence, and for an item that cannot be
            used.
        ConfigError: For the name of a task that does not exist.
    """
    # A str is a sequence too, and would be embedded letter by letter.
    single = (str, bytes, bytearray, io.BytesIO, os.PathLike, Mapping, np.ndarray, Image.Image)
    if isinstance(contents, (*single, Content)) or not isinstance(contents, Iterable):
        kind = type(contents).__name__
        raise ContentError(
            f"encode takes a sequence of contents, got one {kind}: put it in a list."
        )
    task = resolve(instruction)
    items = []
    for index, value in enumerate(contents):
        with naming(f"item {index}"):
            content = as_content(value)
        # Here and not in each family: some would drop the part they cannot see, in silence.
        if content.modality not in embedder.modalities:
            able = ", ".join(sorted(embedder.modalities))
            # A clip is made by programs, which know its frames.
            else_do = " Give its frames as images." if content.modality == "clip" else ""
            raise ContentError(
                f"item {index}: {embedder.name} cannot embed {content.modality}, only "
                f"{able}.{else_do}"
            )
        # Not `or`: an empty instruction is one too, that of a query without a task.
        own = resolve(content.instruction) if content.instruction is not None else task
        items.append(replace(content, instruction=own))
    return items


def check_dim(dim: int | None, full: int, trained: Sequence[int] = ()) -> int:
    """The dimension to keep.

    Args:
        full: length of the model's vectors.
        trained: shorter lengths that the model was trained for (Matryoshka); none: not known,
            and every length is taken.

    Raises:
        ConfigError: If the model has fewer, for less than 1, and for a length it was not trained
            for.
    """
    if dim is None:
        return full
    if not 1 <= dim <= full:
        raise ConfigError(f"dim={dim} is not possible: this model has {full} dimensions.")
    # Between two trained lengths the vector is cut somewhere that training never looked at.
    if trained and dim not in (*trained, full):
        lengths = ", ".join(map(str, sorted({*trained, full})))
        raise ConfigError(f"dim={dim}: this model was trained for {lengths} dimensions.")
    return dim


def truncate_normalise(vectors: NDArray[np.floating[Any]], dim: int) -> NDArray[np.float32]:
    """First ``dim`` dimensions of each row, scaled to L2 norm 1 (Matryoshka, arXiv 2205.13147)."""
    kept = np.asarray(vectors[:, :dim], dtype=np.float32)
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    # The bound keeps a zero vector from becoming NaN, which no index takes.
    return np.asarray(kept / np.maximum(norms, 1e-12), dtype=np.float32)
