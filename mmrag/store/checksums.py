"""A checksum for each point, so that damage to the files of a shard is not read as data."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmrag.store.engine import MUVERA, TOKENS, Point

# What the engine takes for whole numbers; it keeps larger ones as floats.
_INTEGERS = range(-(2**63), 2**64)
# Squared lengths this near to 1 are left alone by the engine too, which allows 1e-6.
_UNIT = 2e-7


def checksum(point: Point) -> str:
    """16 hexadecimal digits that depend on the id, the payload and every bit of the vectors.

    Floats of the payload count by nine digits: the engine reads them back with an error in the
    last one.
    """
    # The id is part of it: an index that is damaged may hand out another point's payload.
    body = json.dumps([point.id, _comparable(point.payload)], sort_keys=True)
    # Against accidents, not attacks: eight bytes suffice, and every point carries them.
    digest = blake2b(body.encode(), digest_size=8)
    for name in sorted(point.vectors):
        digest.update(name.encode() + np.asarray(point.vectors[name], dtype="<f4").tobytes())
    return digest.hexdigest()


def as_stored(name: str, vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """A vector as the engine keeps it: of length 1, or in half precision."""
    if name in (TOKENS, MUVERA):
        return vector.astype(np.float16).astype(np.float32)
    return unit_length(vector)


def unit_length(vector: NDArray[np.float32]) -> NDArray[np.float32]:
    """The vector scaled to length 1, so that the engine stores it bit by bit as it is given."""
    squared = float(np.square(vector, dtype=np.float64).sum())
    if squared == 0 or abs(squared - 1) < _UNIT:
        return vector
    scaled: NDArray[np.float32] = (vector / np.float64(squared**0.5)).astype(np.float32)
    return scaled


def _comparable(value: Any) -> Any:
    """The value with its floats as text."""
    if isinstance(value, dict):
        return {key: _comparable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_comparable(each) for each in value]
    whole = isinstance(value, int) and value in _INTEGERS
    return f"{value:.9g}" if isinstance(value, (int, float)) and not whole else value
