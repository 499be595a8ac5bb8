"""An embedder that is not loaded until it has something to embed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmrag.embedders.base import Embedder
from mmrag.store.settings import CollectionSettings


class Unloaded:
    """Knows an embedder's name and fingerprint, and loads it when more is asked.

    Examples:
        >>> Unloaded(CollectionSettings("my-model", "1", dim=4), load=lambda: 1 / 0).name
        'my-model'
    """

    def __init__(self, settings: CollectionSettings, load: Callable[[], Embedder]) -> None:
        self.name = settings.embedder
        self.fingerprint = settings.fingerprint
        self._load = load

    # Called for attributes that are not set, thus for all but those above.
    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)
