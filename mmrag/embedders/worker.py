"""The process that runs a model on one device of several; see ``parallel``.

It takes pickled requests from its standard input, first the arguments of ``load_embedder`` and then
those of ``encode``, and answers each with a pickled value or with the error that it ended in.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from typing import Any

from mmrag.embedders.base import Embedder, optional_traits
from mmrag.embedders.registry import load_embedder
from mmrag.errors import MMRagError, ModelError

TRAITS = ("name", "family", "dim", "modalities", "fingerprint")
"""Attributes that every embedder has."""


def main() -> None:
    """Load a model and embed until the other side goes away."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    # Nothing that a library prints may get between the answers.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    embedder: Embedder | None = None

    def load(name: str, options: dict[str, Any]) -> dict[str, Any]:
        nonlocal embedder
        embedder = load_embedder(name, **options)
        return {name: getattr(embedder, name) for name in TRAITS} | optional_traits(embedder)

    def encode(*arguments: Any) -> Any:
        assert embedder is not None
        return embedder.encode(*arguments)

    try:
        while True:
            request = pickle.load(requests)
            answer = _answer(encode if embedder is not None else load, request)
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _answer(do: Callable[..., Any], request: tuple[Any, ...]) -> Any:
    try:
        return do(*request)
    except MMRagError as error:
        return error
    except Exception as error:  # noqa: BLE001 - raised again on the other side
        # Its class may not be one that the other side can import.
        return ModelError(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
