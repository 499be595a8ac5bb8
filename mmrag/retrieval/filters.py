"""LlamaIndex's metadata filters as a Where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from mmrag.errors import ConfigError
from mmrag.queries import Where


def as_where(filters: Where | MetadataFilters | None) -> Where | None:
    """LlamaIndex filters as a Where: conditions joined by AND.

    ``file`` and ``kind`` take == and IN, ``page`` also >, >=, < and <=, other keys == and IN.

    Raises:
        ConfigError: For anything else.
    """
    if filters is None or isinstance(filters, Where):
        return filters
    if filters.condition not in (None, FilterCondition.AND):
        raise ConfigError("Only filters joined by AND can be used; join several values by IN.")
    low: int | None = None
    high: int | None = None
    metadata: dict[str, list[Any]] = {}
    for item in filters.filters:
        if isinstance(item, MetadataFilters):
            raise ConfigError("Nested filters cannot be used; list the conditions in one level.")
        if item.key == "page":
            first, last = _page_bounds(item)
            low = max((bound for bound in (low, first) if bound is not None), default=None)
            high = min((bound for bound in (high, last) if bound is not None), default=None)
        elif item.key in metadata:
            raise ConfigError(f"{item.key} is filtered twice; give its values in one IN.")
        else:
            metadata[item.key] = _any_of(item)
    files, kinds = metadata.pop("file", []), metadata.pop("kind", [])
    pages = None if low is None and high is None else (low, high)
    return Where(files=tuple(files), pages=pages, kinds=tuple(kinds), metadata=metadata)


def _any_of(item: MetadataFilter) -> list[Any]:
    if item.operator is FilterOperator.EQ and item.value is not None:
        return [item.value]
    if item.operator is FilterOperator.IN and isinstance(item.value, list) and item.value:
        return list(item.value)
    raise ConfigError(
        f"The filter {item.key} {item.operator.value} {item.value!r} cannot be used here: "
        f"{item.key} takes == and IN, with one value at least."
    )


def _page_bounds(item: MetadataFilter) -> tuple[int | None, int | None]:
    bounds: dict[FilterOperator, Callable[[int], tuple[int | None, int | None]]] = {
        FilterOperator.EQ: lambda page: (page, page),
        FilterOperator.GTE: lambda page: (page, None),
        FilterOperator.GT: lambda page: (page + 1, None),
        FilterOperator.LTE: lambda page: (None, page),
        FilterOperator.LT: lambda page: (None, page - 1),
    }
    if item.operator not in bounds or not isinstance(item.value, int):
        raise ConfigError(
            f"The filter page {item.operator.value} {item.value!r} cannot be used here: page "
            "takes ==, >, >=, < and <= with a whole number."
        )
    return bounds[item.operator](item.value)
