"""Initial vectors of word pieces, from two public sets of token vectors.

A text's vector is the sum of its pieces' vectors. MiniLM's input embeddings and WordLlama's
static vectors are put side by side, reduced by PCA, and scaled by how rare each piece is
(smooth inverse frequency, Arora et al., ICLR 2017, with a power of log frequency).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

Matrix = NDArray[np.floating[Any]]
FIRST_PIECE = 999  # BERT's vocabulary begins with special and unused entries


def minilm_vectors(folder: Path) -> Matrix:
    """Input embeddings of MiniLM, (vocabulary, 384)."""
    weights = load_file(folder / "model.safetensors")
    return np.asarray(weights["embeddings.word_embeddings.weight"], dtype=np.float32)


def wordllama_vectors(pieces: Sequence[str], package: Path) -> Matrix:
    """Mean of the WordLlama vectors of each piece's own tokens, (len(pieces), 256)."""
    names = package / "tokenizers" / "l2_supercat_tokenizer_config.json"
    tokenizer = Tokenizer.from_file(str(names))
    tokenizer.no_padding()
    table = next(iter(load_file(package / "weights" / "l2_supercat_256.safetensors").values()))
    vectors = np.zeros((len(pieces), table.shape[1]), dtype=np.float32)
    for row, piece in enumerate(pieces):
        ids = tokenizer.encode(piece.removeprefix("##"), add_special_tokens=False).ids
        if ids:
            vectors[row] = table[ids].astype(np.float32).mean(axis=0)
    return vectors


def piece_counts(texts: Sequence[str], tokenizer: Tokenizer) -> NDArray[np.int64]:
    """How often each piece occurs in ``texts``."""
    counts: Counter[int] = Counter()
    for encoded in tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoded.ids)
    return np.array([counts[i] for i in range(tokenizer.get_vocab_size())])


def rarity(counts: NDArray[np.int64], power: float) -> Matrix:
    """Weight of each piece, log(total / count) to a power, 1 on average."""
    weights = np.log(counts.sum() / (counts + 3.0)) ** power
    return np.asarray(weights / weights[FIRST_PIECE:].mean(), dtype=np.float32)


def combine(parts: Sequence[Matrix], weights: Matrix, dim: int) -> Matrix:
    """Centre and scale each part, join them, keep ``dim`` principal axes, apply ``weights``."""
    joined = np.concatenate([_standard(part) for part in parts], axis=1)
    axes = np.linalg.svd(joined[FIRST_PIECE::3], full_matrices=False)[2][:dim]
    return unit_scale(joined @ axes.T) * weights[:, None]


def _standard(vectors: Matrix) -> Matrix:
    return unit_scale(vectors - vectors[FIRST_PIECE:].mean(axis=0))


def unit_scale(vectors: Matrix) -> Matrix:
    """Scaled so that the root mean square norm of a piece is 1."""
    size = np.sqrt((vectors[FIRST_PIECE:] ** 2).sum(axis=1).mean())
    return np.asarray(vectors / size, dtype=np.float32)


def principal_rotation(vectors: Matrix) -> Matrix:
    """Rotation onto principal axes, largest first, so that leading dimensions carry most."""
    values, axes = np.linalg.eigh(vectors[FIRST_PIECE:].T @ vectors[FIRST_PIECE:])
    return np.asarray(axes[:, np.argsort(-values)])
