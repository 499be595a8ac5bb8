"""What a collection remembers of its making, and the refusal of anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from mmrag.errors import CollectionError, ConfigError
from mmrag.store.terms import AUTO_LANGUAGE, check_language

View: TypeAlias = Literal["image", "text", "fused"]
VIEWS: tuple[View, ...] = get_args(View)


@dataclass(frozen=True)
class CollectionSettings:
    """What a collection was built with; every vector in it depends on these.

    embedder: name the embedder was loaded by; ``fingerprint`` identifies it exactly.
    dim: length of the stored vectors.
    views: the named vectors that nodes may have.
    reading: the options files were read with.
    language: stemming for BM25: ``"auto"`` detects it for each document, ``"none"`` leaves words
        as they are.

    Examples:
        >>> settings = CollectionSettings("mmrag-nano", fingerprint="1f0c", dim=384)
        >>> CollectionSettings.from_json(settings.to_json()) == settings
        True
    """

    embedder: str
    fingerprint: str
    dim: int
    views: tuple[View, ...] = ("image", "text")
    reading: Mapping[str, Any] = field(default_factory=dict)
    language: str = AUTO_LANGUAGE

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"dim={self.dim}: vectors need at least one dimension.")
        if not self.views or not set(self.views) <= set(VIEWS):
            raise ConfigError(f"views={self.views}: give one or more of {', '.join(VIEWS)}.")
        check_language(self.language)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CollectionSettings:
        """The settings that ``to_json`` gave."""
        return cls(**(dict(values) | {"views": tuple(values["views"])}))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = {"views": list(self.views), "reading": dict(self.reading)}
        return dataclasses.asdict(self) | plain


def refuse_other(stored: CollectionSettings, wanted: CollectionSettings, place: object) -> None:
    """Raise CollectionError if the collection was built with anything but ``wanted``."""
    remedy = f"Open it with embedder {stored.embedder!r}, or build another collection elsewhere."
    if stored.fingerprint != wanted.fingerprint:
        same_name = stored.embedder == wanted.embedder
        other = (
            f"another version of {stored.embedder!r} (its weights or settings have changed)"
            if same_name
            else f"{stored.embedder!r}, not by {wanted.embedder!r}"
        )
        if same_name:
            remedy = "Load the version that built it, or build another collection elsewhere."
        raise CollectionError(
            f"{place} was built by {other}. Vectors of different models cannot be compared. "
            + remedy
        )
    old, new = stored.to_json(), wanted.to_json()
    changed = [
        key for key in old if key not in ("embedder", "fingerprint") and old[key] != new[key]
    ]
    if changed:
        differences = "; ".join(f"{key}: {old[key]!r}, not {new[key]!r}" for key in changed)
        raise CollectionError(
            f"{place} was built with other settings ({differences}). Open it with its own by "
            "leaving them out, or build another collection elsewhere."
        )
