"""Metadata filters in both engines, against a plain evaluation in Python."""

from datetime import UTC, datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
)
from qdrant_client import QdrantClient

from mmrag.errors import ConfigError
from mmrag.queries import Where
from mmrag.store.edge import EdgeEngine
from mmrag.store.engine import Point, Schema
from mmrag.store.filters import as_where, translated
from mmrag.store.server import ServerEngine

Op = FilterOperator
SCHEMA = Schema({"text": 2}, ("file", "kind"), ("page",))
ROWS = [
    {"file": "in/a.pdf", "page": 1, "year": 2023, "tags": ["red", "blue"], "day": "2024-01-31"},
    {"file": "in/a.pdf", "page": 2, "year": 2024.0, "tags": ["red"], "day": "2024-01-31T12:00:00Z"},
    {"file": "b.txt", "year": 2024, "tags": [], "day": "2024-02-01 10:00:00", "draft": True},
    {"file": "b.txt", "year": "2024", "tags": "red", "title": "Eye exams, and glasses"},
    {"file": "c.md", "year": 2025, "price": 1.5, "title": "eyes", "tags": None, "draft": False},
    {"file": "c.md", "price": -3, "title": "The eye: EXAMS", "day": "2025-06-01T00:00:00+02:00"},
    {"file": "d.md", "price": 2**60 + 1, "tags": [2024, 7], "Report Year": 2024},
    {"file": "d.md", "nested": {"level": 2}, "title": "", "day": "later", "year": [2023, 2025]},
]


@pytest.fixture(scope="module", params=["edge", "server"])
def engine(request, tmp_path_factory):
    if request.param == "edge":
        made = EdgeEngine(tmp_path_factory.mktemp("filters") / "shard", SCHEMA)
    else:
        made = ServerEngine(QdrantClient(":memory:"), "filters", owned=True)
        made.create(SCHEMA)
    made.upsert([Point(uid(number), row) for number, row in enumerate(ROWS)])
    yield made
    made.close()


def uid(number):
    return f"00000000-0000-0000-0000-{number:012d}"


def found(engine, filters):
    return {int(point.id[-12:]) for point in engine.scroll(translated(filters, lambda x: x))}


def one(key, operator, value):
    return MetadataFilters(filters=[MetadataFilter(key=key, value=value, operator=operator)])


# --- the evaluation that the engines must agree with ---------------------------------------------


def holds(filters, row):
    inner = [
        meets(each, row) if isinstance(each, MetadataFilter) else holds(each, row)
        for each in filters.filters
        if isinstance(each, MetadataFilter) or each.filters
    ]
    if filters.condition == FilterCondition.OR:
        return any(inner) or not inner
    if filters.condition == FilterCondition.NOT:
        return not any(inner)
    return all(inner)


def meets(item, row):
    stored = row.get(item.key)
    elements = [] if stored is None else stored if isinstance(stored, list) else [stored]
    given = item.value if isinstance(item.value, list) else [item.value]
    match item.operator:
        case Op.EQ | Op.IN | Op.ANY | Op.CONTAINS:
            return any(same(a, b) for a in elements for b in given)
        case Op.NE | Op.NIN:
            return not any(same(a, b) for a in elements for b in given)
        case Op.ALL:
            return all(any(same(a, b) for a in elements) for b in given)
        case Op.TEXT_MATCH:
            return any(isinstance(a, str) and item.value in a for a in elements)
        case Op.TEXT_MATCH_INSENSITIVE:
            wanted = words(item.value)
            return any(
                words(a)[i : i + len(wanted)] == wanted
                for a in elements
                if isinstance(a, str)
                for i in range(len(words(a)))
            )
        case Op.IS_EMPTY:
            return not elements
    return any(compares(a, item.operator, item.value) for a in elements)


def same(a, b):
    if isinstance(a, bool):
        return str(a).lower() == b
    return isinstance(a, bool) == isinstance(b, bool) and a == b


def words(text):
    return "".join(c.lower() if c.isalnum() else " " for c in text).split()


def compares(a, operator, b):
    if isinstance(b, str):
        a, b = as_date(a), as_date(b)
        if a is None:
            return False
    elif isinstance(a, (str, bool)):
        return False
    return {Op.GT: a > b, Op.GTE: a >= b, Op.LT: a < b, Op.LTE: a <= b}[operator]


def as_date(value):
    try:
        date = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


KEYS = st.sampled_from(
    ["file", "year", "tags", "day", "price", "title", "draft", "page", "missing", "Report Year"]
)
NUMBERS = st.sampled_from([1, 2, 7, 2023, 2024, 2024.0, 2024.5, 1.5, -3, 2**60 + 1])
TEXTS = st.sampled_from(
    ["red", "blue", "in/a.pdf", "2024", "eye", "Eye exams", "exams", "", "true"]
)
LISTS = st.lists(NUMBERS.filter(lambda n: isinstance(n, int)), min_size=1, max_size=3) | st.lists(
    TEXTS, min_size=1, max_size=3
)
DAYS = st.sampled_from(
    ["2024-01-31", "2024-01-31T12:00:00Z", "2024-02-01", "2025-05-31T22:00:00Z", "2025-06-01"]
)
CONDITION = st.one_of(
    st.builds(
        MetadataFilter,
        key=KEYS,
        value=NUMBERS | TEXTS,
        operator=st.sampled_from([Op.EQ, Op.NE, Op.CONTAINS]),
    ),
    st.builds(
        MetadataFilter,
        key=KEYS,
        value=LISTS,
        operator=st.sampled_from([Op.IN, Op.NIN, Op.ANY, Op.ALL]),
    ),
    st.builds(
        MetadataFilter,
        key=KEYS,
        value=NUMBERS.filter(lambda number: number < 2**53),  # ranges compare floats
        operator=st.sampled_from([Op.GT, Op.GTE, Op.LT, Op.LTE]),
    ),
    st.builds(
        MetadataFilter,
        key=KEYS.filter(lambda key: key != "page"),
        value=DAYS,
        operator=st.sampled_from([Op.GT, Op.GTE, Op.LT, Op.LTE]),
    ),
    st.builds(
        MetadataFilter,
        key=KEYS,
        value=TEXTS.filter(bool),
        operator=st.sampled_from([Op.TEXT_MATCH, Op.TEXT_MATCH_INSENSITIVE]),
    ),
    st.builds(MetadataFilter, key=KEYS, value=st.none(), operator=st.just(Op.IS_EMPTY)),
)
FILTERS = st.recursive(
    st.builds(
        MetadataFilters,
        filters=st.lists(CONDITION, max_size=3),
        condition=st.sampled_from([*FilterCondition, None]),
    ),
    lambda inner: st.builds(
        MetadataFilters,
        filters=st.lists(CONDITION | inner, min_size=1, max_size=3),
        condition=st.sampled_from(FilterCondition),
    ),
    max_leaves=4,
)


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(filters=FILTERS)
def test_filters_find_what_python_finds(engine, filters):
    assert found(engine, filters) == {n for n, row in enumerate(ROWS) if holds(filters, row)}


# --- single cases, so that a reader sees what they mean ------------------------------------------


@pytest.mark.parametrize(
    ("key", "operator", "value", "rows"),
    [
        ("year", Op.EQ, 2024, {1, 2}),  # 2024 and 2024.0, not "2024"
        ("year", Op.NE, 2024, {0, 3, 4, 5, 6, 7}),  # a missing key is not 2024
        ("tags", Op.CONTAINS, "red", {0, 1, 3}),
        ("tags", Op.ALL, ["red", "blue"], {0}),
        ("tags", Op.IS_EMPTY, None, {2, 4, 5, 7}),
        ("day", Op.GTE, "2024-01-31T06:00:00", {1, 2, 5}),
        ("title", Op.TEXT_MATCH, "exams", {3}),
        ("title", Op.TEXT_MATCH_INSENSITIVE, "eye exams", {3, 5}),  # no "eyes"
        ("nested.level", Op.GT, 1, {7}),
        ("Report Year", Op.EQ, 2024, {6}),
        ("draft", Op.EQ, "true", {2}),
    ],
)
def test_single_conditions(engine, key, operator, value, rows):
    assert found(engine, one(key, operator, value)) == rows


@pytest.mark.parametrize(
    ("operator", "value"),
    [
        (Op.IN, "red"),
        (Op.IN, []),
        (Op.ALL, []),
        (Op.EQ, ["red"]),
        (Op.NE, None),
        (Op.GT, "later"),
        (Op.LT, ["2024-01-31"]),
        (Op.LTE, float("inf")),
        (Op.TEXT_MATCH, 3),
        (Op.TEXT_MATCH_INSENSITIVE, " "),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_the_name_of_its_operator(operator, value):
    nested = MetadataFilters(
        filters=[MetadataFilters(filters=[one("colour", operator, value)])],
        condition=FilterCondition.NOT,
    )
    with pytest.raises(ConfigError, match=rf"colour .* {operator.name} takes"):
        as_where(nested)


def test_a_page_is_a_number():
    with pytest.raises(ConfigError, match=r"page > '2024-01-31' .* GT takes a number"):
        as_where(one("page", Op.GT, "2024-01-31"))


def test_a_key_with_a_quote_is_refused(engine):
    with pytest.raises(ConfigError, match="without quotes"):
        found(engine, one('a"b', Op.EQ, 1))


def test_a_file_that_every_node_must_be_of_is_known_to_the_where():
    """References in a question, such as "page 3", are looked up in the files of the Where."""
    assert as_where(one("file", Op.EQ, "a.pdf")).files == ("a.pdf",)
    assert as_where(one("file", Op.NE, "a.pdf")).files == ()
    either = MetadataFilters(
        filters=[*one("file", Op.EQ, "a.pdf").filters, *one("year", Op.EQ, 1).filters],
        condition=FilterCondition.OR,
    )
    assert as_where(either).files == ()


def test_a_where_and_filters_hold_together():
    year, topic = one("year", Op.EQ, 2024), one("topic", Op.EQ, "tax")
    where = as_where(Where(pages=(1, 3), filters=topic), year)
    assert where.pages == (1, 3)
    assert where.filters == MetadataFilters(filters=[topic, year])
    assert as_where(None, year) == as_where(year) == Where(filters=year)
    assert as_where(None) is None
