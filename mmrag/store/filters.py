"""LlamaIndex's metadata filters in the terms of the engine: the one translation of them.

A value that is a list counts as all of its elements, as everywhere in Qdrant: a condition holds
if one of them meets it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)

from mmrag.errors import ConfigError
from mmrag.queries import Where
from mmrag.store.engine import AnyOf, Condition, Filter, HasText, IsEmpty, Within

FilePaths = Callable[[Sequence[str]], Sequence[str]]
"""From file patterns to the stored paths that they match."""

_RANGES: Mapping[FilterOperator, str] = {
    FilterOperator.GT: "gt",
    FilterOperator.GTE: "gte",
    FilterOperator.LT: "lt",
    FilterOperator.LTE: "lte",
}
_EQUALITY = (FilterOperator.EQ, FilterOperator.IN, FilterOperator.ANY, FilterOperator.CONTAINS)
_INEQUALITY = (FilterOperator.NE, FilterOperator.NIN)
_LISTS = (FilterOperator.IN, FilterOperator.NIN, FilterOperator.ANY, FilterOperator.ALL)
_TRUTH: Mapping[object, bool] = {"true": True, "false": False}
_ISO_DATE = re.compile(
    r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?", re.ASCII
)
_EXACT = 2**53  # whole numbers up to here are exact as floats


def as_where(
    where: Where | MetadataFilters | None, filters: MetadataFilters | None = None
) -> Where | None:
    """One Where of both, which must hold together; None if neither is given.

    Raises:
        ConfigError: For a filter that Qdrant cannot express; it names the operator.
    """
    if isinstance(where, MetadataFilters):
        where, filters = None, _both(where, filters)
    if filters is None:
        return where
    # For its errors: a filter that cannot be expressed fails here and not at the first query.
    translated(filters, lambda names: names)
    where = where or Where()
    named = [] if where.files else _named_files(filters)
    # A page that a question names is looked up in the files of the Where.
    files = where.files or tuple(str(value) for item in named for value in _values(item))
    return dataclasses.replace(where, files=files, filters=_both(where.filters, filters))


def _both(one: MetadataFilters | None, other: MetadataFilters | None) -> MetadataFilters | None:
    if one is None or other is None:
        return one or other
    return MetadataFilters(filters=[one, other])


def _named_files(filters: MetadataFilters) -> list[MetadataFilter]:
    """The one condition on files that every node must meet; an empty list if there is none."""
    if filters.condition not in (None, FilterCondition.AND):
        return []
    single = [each for each in filters.filters if isinstance(each, MetadataFilter)]
    named = [each for each in single if each.key == "file" and each.operator in _EQUALITY]
    # Two conditions on files must both hold; a list of names could not say that.
    return named if len(named) == 1 else []


def translated(filters: MetadataFilters, paths: FilePaths) -> Filter:
    """The engine's filter.

    - EQ, IN, ANY and CONTAINS: the value, or one of its elements, is one of those given. ALL:
      each of those given is there. NE and NIN are their negation: they also hold where the key
      is missing, as in LlamaIndex.
    - ``"true"`` and ``"false"`` also equal booleans, which these filters cannot hold.
    - ``file`` takes paths, file names and globs in these.
    - GT, GTE, LT, LTE: numbers, or dates and times as ISO 8601 strings.
    - TEXT_MATCH: contains the text. TEXT_MATCH_INSENSITIVE: has its words, one after the other,
      without regard to case and punctuation.
    - IS_EMPTY: missing, null or an empty list.
    - AND, OR, NOT (none of them holds), nested in any depth. A group of none is left out.

    Args:
        paths: resolves the names of files.

    Raises:
        ConfigError: For a value that does not fit its operator.
    """
    conditions: list[Condition] = []
    for each in filters.filters:
        if isinstance(each, MetadataFilter):
            conditions.append(_condition(each, paths))
        elif each.filters:
            conditions.append(translated(each, paths))
    group = tuple(conditions)
    match filters.condition:
        case FilterCondition.OR:
            return Filter(should=group)
        case FilterCondition.NOT:
            return Filter(must_not=group)
        case _:
            return Filter(must=group)


def any_of(key: str, values: Sequence[str | int | float | bool]) -> AnyOf:
    """One of the values, where whole numbers and floats compare as numbers: 3 equals 3.0."""
    return AnyOf(key, tuple(map(_comparable, values)))


def _comparable(value: str | int | float | bool) -> str | int | float | bool:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _EXACT:
        # A range compares integers and floats alike; a match does not.
        return float(value)
    return value


def _condition(item: MetadataFilter, paths: FilePaths) -> Condition:
    match item.operator:
        case FilterOperator.TEXT_MATCH | FilterOperator.TEXT_MATCH_INSENSITIVE:
            if not isinstance(item.value, str) or not item.value.strip():
                raise _refusal(item, "a text")
            words = item.operator is FilterOperator.TEXT_MATCH_INSENSITIVE
            return HasText(item.key, item.value, words=words)
        case FilterOperator.IS_EMPTY:
            return IsEmpty(item.key)
        case FilterOperator.ALL:
            return Filter(must=tuple(_same(item.key, [value]) for value in _values(item)))
        case operator if operator in _RANGES:
            return Within(item.key, **{_RANGES[operator]: _bound(item)})
    values: Sequence[Any] = _values(item)
    if item.key == "file":
        values = paths([str(value) for value in values])
    same = _same(item.key, values)
    return Filter(must_not=(same,)) if item.operator in _INEQUALITY else same


def _same(key: str, values: Sequence[Any]) -> AnyOf:
    return any_of(key, [*values, *(_TRUTH[each] for each in values if each in _TRUTH)])


def _values(item: MetadataFilter) -> list[Any]:
    if item.operator in _LISTS:
        if not isinstance(item.value, list) or not item.value:
            raise _refusal(item, "a list of values that is not empty")
        return list(item.value)
    if item.value is None or isinstance(item.value, list):
        raise _refusal(item, "one value")
    return [item.value]


def _bound(item: MetadataFilter) -> float | str:
    value = item.value
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    if item.key == "page":  # its index of whole numbers would take a date for a number
        raise _refusal(item, "a number")
    if isinstance(value, str) and _ISO_DATE.fullmatch(value):
        return value
    raise _refusal(item, "a number, or a date such as 2024-05-31 or 2024-05-31T09:00:00Z")


def _refusal(item: MetadataFilter, takes: str) -> ConfigError:
    return ConfigError(
        f"The filter {item.key} {item.operator.value} {item.value!r} cannot be used: "
        f"{item.operator.name} takes {takes}."
    )
