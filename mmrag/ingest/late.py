"""The tokens of nodes, for collections that keep them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content, ImageSource
from mmrag.embedders.late import LateInteraction, TokenEmbedder, load_token_embedder
from mmrag.embedders.muvera import Muvera
from mmrag.errors import ContentError
from mmrag.ingest.halving import each_or_error
from mmrag.store.engine import MUVERA, TOKENS
from mmrag.store.settings import LateSettings, lasting_name


def as_late(late: LateInteraction | TokenEmbedder | str | Path) -> LateInteraction:
    """What a user gave, with its model loaded. Raises ModelError and ConfigError."""
    if isinstance(late, LateInteraction):
        return late
    return LateInteraction(load_token_embedder(late) if isinstance(late, (str, Path)) else late)


def load_late(stored: LateSettings) -> LateInteraction:
    """What a collection remembers, from this machine alone. Raises ModelError."""
    # Whoever made the collection named the model: nothing is fetched because of that.
    embedder = load_token_embedder(stored.embedder, download=False)
    muvera = None if stored.muvera is None else Muvera.from_json(stored.muvera)
    return LateInteraction(embedder, stored.pool_factor, muvera)


def late_settings(late: LateInteraction) -> LateSettings:
    """What a collection is to remember."""
    embedder, muvera = late.embedder, late.muvera
    return LateSettings(
        embedder=lasting_name(embedder.name),
        fingerprint=embedder.fingerprint,
        dim=embedder.dim,
        # 3 and 3.0 are the same, and are compared after a way through JSON.
        pool_factor=float(late.pool_factor),
        muvera=None if muvera is None else muvera.to_json(),
        # Stored, so that a collection can be opened without its model.
        muvera_dim=0 if muvera is None else muvera.dim(embedder.dim),
    )


def token_content(
    text: str, image: ImageSource | None, late: LateInteraction, *, in_passages: bool = False
) -> Content | None:
    """What of a node is embedded token by token; None for nothing.

    Its image, where the model takes images; else its text.

    Args:
        in_passages: whether the text is embedded in passages, which are nodes of their own.
    """
    able = late.embedder.modalities
    # The image first: it has the layout and figures, which text does not.
    if image is not None and "image" in able:
        return Content(image=image)
    # A long page has passages with tokens of their own; twice would only cost.
    return Content(text) if text and "text" in able and not in_passages else None


def encode_tokens(
    late: LateInteraction, contents: Sequence[Content | None]
) -> list[dict[str, NDArray[np.float32]] | ContentError]:
    """For each content ``tokens``, (n, dim), and ``muvera`` where it is kept, (muvera_dim,).

    Nothing for None, and the error of a content that cannot be used.
    """

    def encode(some: Sequence[Content]) -> list[dict[str, NDArray[np.float32]]]:
        vectors = []
        for tokens in late.embedder.encode_documents(some, late.pool_factor):
            muvera = {MUVERA: late.muvera.encode_document(tokens)} if late.muvera else {}
            vectors.append({TOKENS: tokens} | muvera)
        return vectors

    results = iter(each_or_error(encode, [each for each in contents if each is not None]))
    return [{} if content is None else next(results) for content in contents]
