"""What a collection remembers of its making, and the refusal of anything else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from mmrag.errors import CollectionError, ConfigError
from mmrag.store.engine import MUVERA, TOKENS, Quantization, check_quantization
from mmrag.store.terms import AUTO_LANGUAGE, check_language

View: TypeAlias = Literal["image", "text", "fused"]
VIEWS: tuple[View, ...] = get_args(View)


@dataclass(frozen=True, repr=False)
class LateSettings:
    """How the tokens of pages were made; see ``mmrag.embedders.late.LateInteraction``.

    embedder, fingerprint: of the model with a vector for each token. dim: length of these.
    muvera: the parameters of ``mmrag.embedders.muvera.Muvera``; None for none.
    muvera_dim: length of MUVERA's vectors.
    """

    embedder: str = field(compare=False)  # a folder may move; the fingerprint tells
    fingerprint: str
    dim: int
    pool_factor: float
    muvera: Mapping[str, Any] | None = None
    muvera_dim: int = 0

    def __repr__(self) -> str:
        muvera = f", muvera {dict(self.muvera)}" if self.muvera else ""
        return (
            f"{self.embedder!r} (fingerprint {self.fingerprint}), "
            f"pool_factor {self.pool_factor:g}{muvera}"
        )

    @property
    def vectors(self) -> dict[str, int]:
        """Name to dimension of the vectors that a node may have beside its views."""
        return {TOKENS: self.dim} | ({MUVERA: self.muvera_dim} if self.muvera else {})


@dataclass(frozen=True)
class CollectionSettings:
    """What a collection was built with; every vector in it depends on these.

    embedder: name the embedder was loaded by; ``fingerprint`` identifies it exactly.
    dim: length of the stored vectors.
    views: the named vectors that nodes may have.
    reading: the options files were read with.
    language: stemming for BM25: ``"auto"`` detects it for each document, ``"none"`` leaves words
        as they are.
    quantization: how vectors are kept for the first pass of a search, ``"int8"`` or ``"binary"``;
        the best are scored again with the vectors themselves. ``"none"``: as they are.

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
    late: LateSettings | None = None
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ConfigError(f"dim={self.dim}: vectors need at least one dimension.")
        if not self.views or not set(self.views) <= set(VIEWS):
            raise ConfigError(f"views={self.views}: give one or more of {', '.join(VIEWS)}.")
        check_language(self.language)
        check_quantization(self.quantization)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> CollectionSettings:
        """The settings that ``to_json`` gave."""
        late = values.get("late")
        parsed = {"views": tuple(values["views"]), "late": LateSettings(**late) if late else None}
        return cls(**(dict(values) | parsed))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = {"views": list(self.views), "reading": dict(self.reading)}
        return dataclasses.asdict(self) | plain

    @property
    def vectors(self) -> dict[str, int]:
        """Name to dimension of every vector that a node may have."""
        return dict.fromkeys(map(str, self.views), self.dim) | (
            self.late.vectors if self.late else {}
        )


def lasting_name(name: str) -> str:
    """The name of a model; a folder's, to be found from any working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def refuse_other(stored: CollectionSettings, wanted: CollectionSettings, place: object) -> None:
    """Raise CollectionError if the collection was built with anything but ``wanted``."""
    remedy = f"Open it with embedder {stored.embedder!r}, or build another collection elsewhere."
    # By fingerprint and not by name: a folder may be moved, and a name on the hub gets new weights.
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
    if changed := differences(stored, wanted):
        raise CollectionError(
            f"{place} was built with other settings ({'; '.join(changed)}). Open it with its own "
            "by leaving them out, or build another collection elsewhere."
        )


def differences(stored: CollectionSettings, wanted: CollectionSettings) -> list[str]:
    """What differs, but for the names of models, which may move: ``dim: 8, not 4``."""
    # As JSON, the name of a late model that has moved to another folder would count.
    old, new = (settings.to_json() | {"late": settings.late} for settings in (stored, wanted))
    return [
        f"{key}: {old[key]!r}, not {new[key]!r}"
        for key in old
        if key != "embedder" and old[key] != new[key]
    ]
