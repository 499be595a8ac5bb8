"""Haystack's filters as LlamaIndex's, which mmrag takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from haystack.errors import FilterError
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

_OPERATORS = {
    "==": FilterOperator.EQ,
    "!=": FilterOperator.NE,
    ">": FilterOperator.GT,
    ">=": FilterOperator.GTE,
    "<": FilterOperator.LT,
    "<=": FilterOperator.LTE,
    "in": FilterOperator.IN,
    "not in": FilterOperator.NIN,
}
_GROUPS = {
    "AND": FilterCondition.AND,
    "OR": FilterCondition.OR,
    "NOT": FilterCondition.AND,
}


def as_metadata_filters(filters: Mapping[str, Any]) -> MetadataFilters:
    """A filter or group of filters, nested to any depth.

    Raises:
        FilterError: For a filter that has another form than Haystack's.

    >>> found = as_metadata_filters({"field": "meta.year", "operator": ">", "value": 2023})
    >>> [(each.key, each.value) for each in found.filters]
    [('year', 2023)]
    """
    if "field" in filters:
        return _condition(filters)
    operator, conditions = filters.get("operator"), filters.get("conditions")
    if operator not in _GROUPS or not isinstance(conditions, list):
        raise FilterError(
            f"{filters!r}: a filter has field, operator and value, or the operator AND, OR or NOT "
            "and a list of conditions."
        )
    inner = [as_metadata_filters(each) for each in conditions]
    group = MetadataFilters(filters=list(inner), condition=_GROUPS[operator])
    # Haystack's NOT holds where not all of them hold, LlamaIndex's where none does.
    if operator == "NOT":
        return MetadataFilters(filters=[group], condition=FilterCondition.NOT)
    return group


def _condition(filters: Mapping[str, Any]) -> MetadataFilters:
    operator = filters.get("operator")
    if operator not in _OPERATORS or "value" not in filters:
        raise FilterError(f"{filters!r}: give a value, and one of {', '.join(_OPERATORS)}.")
    key, value = str(filters["field"]).removeprefix("meta."), filters["value"]
    if value is not None:
        values = [_text(each) for each in value] if isinstance(value, list) else _text(value)
        one = MetadataFilter(key=key, value=values, operator=_OPERATORS[operator])
        return MetadataFilters(filters=[one])
    if operator not in ("==", "!="):
        raise FilterError(f"{filters!r}: None can be compared by == and != only.")
    missing = MetadataFilter(key=key, value=None, operator=FilterOperator.IS_EMPTY)
    condition = FilterCondition.AND if operator == "==" else FilterCondition.NOT
    return MetadataFilters(filters=[missing], condition=condition)


def _text(value: Any) -> Any:
    """A value that LlamaIndex's filters hold; mmrag reads ``"true"`` as the boolean too."""
    return str(value).lower() if isinstance(value, bool) else value
