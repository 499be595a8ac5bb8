"""MUVERA: the tokens of a page as one vector, whose inner product stands for MaxSim.

Dhulipala, Hadian, Jayaram, Lee and Mirrokni, "MUVERA: Multi-Vector Retrieval via Fixed
Dimensional Encodings" (arXiv 2405.19504), section 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrag.errors import ConfigError

_MOST_DIMENSIONS = 65_535  # of one vector in Qdrant


@dataclass(frozen=True, slots=True)
class Muvera:
    """Parameters of the encoding; the defaults are those of the paper's 10,240 dimensions.

    Space is cut into ``2 ** k_sim`` clusters by the signs of ``k_sim`` Gaussian projections
    (SimHash). A query has the sum of its tokens in each cluster, a document their mean; a
    cluster without a token of the document takes the token whose signs differ from the
    cluster's in the fewest places. All this is repeated with fresh projections.

    k_sim: sign bits of a cluster.
    repetitions: independent partitions (R_reps).
    d_proj: dimensions that each cluster keeps, by a random projection of +1 and -1.
    final_dim: dimensions of the whole, by another such projection; None: none.
    seed: of all random numbers. The paper fixes none.

    Raises:
        ConfigError: For values below 1, and more dimensions than Qdrant holds in one vector.

    Examples:
        >>> muvera = Muvera(k_sim=2, repetitions=8, d_proj=4)
        >>> tokens = np.eye(4, dtype=np.float32)
        >>> muvera.encode_document(tokens).shape == (muvera.dim(4),)
        True
    """

    k_sim: int = 5
    repetitions: int = 20
    d_proj: int = 16
    final_dim: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        final = 1 if self.final_dim is None else self.final_dim
        # None stands for no final projection, and passes.
        if min(self.k_sim, self.repetitions, self.d_proj, final) < 1:
            raise ConfigError("k_sim, repetitions, d_proj and final_dim must be at least 1.")
        # The most it can be: how long tokens are is not known yet.
        size = self.final_dim or self.repetitions * 2**self.k_sim * self.d_proj
        if size > _MOST_DIMENSIONS:
            raise ConfigError(
                f"MUVERA with these parameters has {size:,} dimensions, and Qdrant holds "
                f"{_MOST_DIMENSIONS:,} in one vector: lower k_sim, or give final_dim."
            )

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Muvera:
        """The parameters that ``to_json`` gave."""
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    def dim(self, token_dim: int) -> int:
        """Dimensions of the encoding of tokens of ``token_dim`` dimensions."""
        # A projection to more dimensions than there are would add nothing.
        kept = min(self.d_proj, token_dim)
        return self.final_dim or self.repetitions * 2**self.k_sim * kept

    def encode_query(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """The encoding of a query's tokens, (n, token_dim) to (dim,), float32.

        Its inner product with the encoding of a document approximates their MaxSim.
        """
        clusters, projected = self._placed(tokens)
        # Sums for a query and means for a document (section 2): MaxSim adds up over the query's
        # tokens, each against its best.
        return self._joined(self._sums(clusters, projected))

    def encode_document(self, tokens: NDArray[np.float32]) -> NDArray[np.float32]:
        """The encoding of a document's tokens, (n, token_dim) to (dim,), float32."""
        clusters, projected = self._placed(tokens)
        means = self._sums(clusters, projected)
        for repetition, of_tokens in enumerate(clusters):
            counts = np.bincount(of_tokens, minlength=2**self.k_sim)
            filled, empty = np.flatnonzero(counts), np.flatnonzero(counts == 0)
            means[repetition, filled] /= counts[filled, None]
            # (n empty, n tokens): the Hamming distance of the signs, which approximates the angle.
            differing = np.bitwise_count(empty[:, None] ^ of_tokens[None, :])
            # Left at zero, a query's token in such a cluster would count as if nothing were near
            # it.
            means[repetition, empty] = projected[repetition, differing.argmin(axis=1)]
        return self._joined(means)

    def _placed(self, tokens: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Each token's cluster, (repetitions, n), and projection, (repetitions, n, kept)."""
        planes, signs = _partitions(self, tokens.shape[1])
        # (repetitions, n, k_sim): on which side of each plane a token lies.
        bits = np.einsum("nd,rkd->rnk", tokens, planes) > 0
        # The signs read as a binary number are the cluster's.
        clusters = bits @ (2 ** np.arange(self.k_sim))
        if signs is None:
            # A view: the tokens are not copied for each repetition.
            return clusters, np.broadcast_to(tokens, (self.repetitions, *tokens.shape))
        return clusters, np.einsum("nd,rpd->rnp", tokens, signs)

    def _sums(
        self, clusters: NDArray[np.int64], projected: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Sum of the tokens in each cluster, (repetitions, 2 ** k_sim, kept)."""
        shape = (self.repetitions, 2**self.k_sim, projected.shape[2])
        sums = np.zeros(shape, dtype=np.float32)
        repetitions = np.broadcast_to(np.arange(self.repetitions)[:, None], clusters.shape)
        # add.at and not +=, which counts a place once however often it is named.
        np.add.at(sums, (repetitions, clusters), projected)
        return sums

    def _joined(self, of_clusters: NDArray[np.float32]) -> NDArray[np.float32]:
        """One vector; scaled so that inner products are the mean over the repetitions."""
        joined = of_clusters.reshape(-1) / np.float32(np.sqrt(self.repetitions))
        return joined if self.final_dim is None else _final(self, joined.size) @ joined


# Random numbers of megabytes that each page and query needs again.
@lru_cache(maxsize=4)
def _partitions(
    of: Muvera, token_dim: int
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Normals of the planes, (repetitions, k_sim, token_dim), and the inner projections.

    These are (repetitions, d_proj, token_dim); None where they would not shorten anything.
    """
    # Seeds of their own for partitions and final projection: final_dim changes no partition.
    random = np.random.default_rng((of.seed, 0))
    planes = random.standard_normal((of.repetitions, of.k_sim, token_dim), dtype=np.float32)
    if of.d_proj >= token_dim:
        return planes, None
    return planes, _signs(random, (of.repetitions, of.d_proj, token_dim))


@lru_cache(maxsize=2)
def _final(of: Muvera, size: int) -> NDArray[np.float32]:
    """The projection of the whole, (final_dim, size)."""
    assert of.final_dim is not None
    return _signs(np.random.default_rng((of.seed, 1)), (of.final_dim, size))


def _signs(random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A projection of +1 and -1 that keeps inner products on average."""
    signs = 2 * random.integers(0, 2, shape, dtype=np.int8) - 1
    return signs.astype(np.float32) / np.float32(np.sqrt(shape[-2]))
