"""What made a collection: kept in one point of it, and compared when it is opened."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID, uuid5

from mmrag.errors import CollectionError, MissingCollectionError
from mmrag.store.edge import BUILD_ANEW
from mmrag.store.engine import LANGUAGE_FIELD, Engine, Filter, Point, Schema
from mmrag.store.location import Location
from mmrag.store.settings import CollectionSettings, refuse_other

SCHEMA_VERSION = 3
NAMESPACE = UUID("5a3c1f0e-6f0b-4d57-9f5e-0d6c2f3b8a11")

SETTINGS_ID = str(uuid5(NAMESPACE, "settings"))
_KEYWORDS = ("file", "kind", "sha256", "doc_id", LANGUAGE_FIELD)
_INTEGERS = ("page",)


def agree(
    engine: Engine, wanted: CollectionSettings | None, location: Location
) -> CollectionSettings:
    """The settings that hold: those stored, or those wanted by whoever creates it.

    Raises:
        CollectionError: If it was built otherwise, or not by mmrag.
        MissingCollectionError: If it is empty and nothing is wanted.
    """
    stored = _stored_settings(engine, location)
    if stored is not None:
        if wanted is not None:
            refuse_other(stored, wanted, location)
        return stored
    # Points without settings are another program's.
    if engine.count(Filter()) > 0:
        raise CollectionError(f"{location} was not made by mmrag; choose another name or folder.")
    if wanted is None:
        raise MissingCollectionError(f"{location} is empty; index something into it first.")
    if location.client is not None:
        from mmrag.store.server import ServerEngine

        assert isinstance(engine, ServerEngine)
        if engine.vector_dims() != wanted.vectors:
            raise CollectionError(
                f"{location} was not made by mmrag: it has other vectors. Choose another name."
            )
        # The collection was made by hand, empty: only its indexes are missing.
        engine.create(schema_of(wanted))
    store_settings(engine, wanted)
    return wanted


def store_settings(
    engine: Engine, settings: CollectionSettings, weights: Mapping[str, float] | None = None
) -> None:
    """Write the collection's own point: its settings, and weights that were fitted for it."""
    payload = {"kind": "settings", "schema": SCHEMA_VERSION, "settings": settings.to_json()}
    payload |= {"weights": dict(weights or {})}
    engine.upsert([Point(SETTINGS_ID, payload)])
    # Without its settings a collection cannot be opened, so they are on disk first.
    engine.flush()


def _stored_settings(engine: Engine, location: Location) -> CollectionSettings | None:
    point = settings_point(engine, location)
    if point is None:
        return None
    payload = point.payload
    if payload["schema"] < SCHEMA_VERSION:
        raise CollectionError(
            f"{location} was built by an older mmrag, which kept other terms for BM25 or no "
            f"checksums (schema {payload['schema']}, this version writes {SCHEMA_VERSION}). "
            "Bring it up to date: mmrag upgrade -c FOLDER_OR_URL. Nothing is embedded again."
        )
    if not engine.is_intact(point):
        raise CollectionError(f"The settings of {location} are damaged. {BUILD_ANEW}")
    return CollectionSettings.from_json(payload["settings"])


def settings_point(engine: Engine, location: Location) -> Point | None:
    """The collection's own point, if there is one. Raises CollectionError for a newer schema."""
    found = engine.retrieve([SETTINGS_ID])
    if not found:
        return None
    schema = found[0].payload.get("schema")
    if not isinstance(schema, int):
        raise CollectionError(f"The settings of {location} are damaged. {BUILD_ANEW}")
    if schema > SCHEMA_VERSION:
        raise CollectionError(
            f"{location} was built by a newer mmrag (schema {schema}, this version knows "
            f"{SCHEMA_VERSION}). Upgrade: pip install -U mmrag"
        )
    return found[0]


def schema_of(settings: CollectionSettings) -> Schema:
    """The vectors and payload indexes of a collection with these settings."""
    return Schema(
        vectors=dict.fromkeys(settings.views, settings.dim),
        keywords=_KEYWORDS,
        integers=_INTEGERS,
        late=settings.late.vectors if settings.late else {},
        quantization=settings.quantization,
    )
