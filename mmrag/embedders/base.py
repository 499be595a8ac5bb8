"""The protocols of the engine, and the small tensor functions that every family shares.

torch is imported only by the functions that take tensors: a remote embedder needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmrag.content import ContentLike, Modality
from mmrag.errors import ConfigError

if TYPE_CHECKING:
    pass


@runtime_checkable
class Embedder(Protocol):
    """Turns Contents into vectors. Knows nothing of LlamaIndex or Qdrant.

    name: what it was loaded from: a hub id, a folder, or a server's model name.
    family: which recipe it follows, for instance ``gme``.
    dim: length of its full vectors.
    modalities: what it can embed.
    fingerprint: changes when the weights or any setting that moves vectors change.
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
            contents: texts, images, or both; see ``mmrag.content.as_content``.
            instruction: the task, for queries: free text or the name of a task in
                ``mmrag.instructions``. ``None`` means documents.
            dim: keep this many leading dimensions (Matryoshka), then normalise again.
            progress: show a progress bar on stderr.

        Returns: shape (len(contents), dim or self.dim), float32, every row of L2 norm 1, in
            the order of ``contents``.

        Raises: ContentError for an item that cannot be used (its index is in the message),
            ConfigError for a ``dim`` the model does not have.
        """
        ...


def check_dim(dim: int | None, full: int) -> int:
    """The dimension to keep. Raises ConfigError if the model has fewer, or for less than 1."""
    if dim is None:
        return full
    if not 1 <= dim <= full:
        raise ConfigError(f"dim={dim} is not possible: this model has {full} dimensions.")
    return dim


def truncate_normalise(vectors: NDArray[np.floating[Any]], dim: int) -> NDArray[np.float32]:
    """First ``dim`` dimensions of each row, scaled to L2 norm 1 (Matryoshka, arXiv 2205.13147)."""
    kept = np.asarray(vectors[:, :dim], dtype=np.float32)
    norms = np.linalg.norm(kept, axis=1, keepdims=True)
    return np.asarray(kept / np.maximum(norms, 1e-12), dtype=np.float32)
