"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

if TYPE_CHECKING:
    from mmrag.embedders.late import LateInteraction
    from mmrag.index import UniversalIndex
    from mmrag.queries import Where
    from mmrag.reading import ReadOptions

Quantization: TypeAlias = Literal["none", "int8", "binary"]
# As they are stored: "picture" is an image file, and old collections have that word.
KINDS = ("page", "figure", "passage", "picture", "text", "description")
DEFAULT_COLLECTION = "./mmrag-library"

CollectionOption = Annotated[
    str,
    typer.Option(
        "--collection",
        "-c",
        metavar="FOLDER_OR_URL",
        envvar="MMRAG_COLLECTION",
        help="Folder of the collection, or URL of a Qdrant server (key: QDRANT_API_KEY).",
    ),
]
EmbedderOption = Annotated[
    str | None,
    typer.Option(
        "--embedder",
        "-e",
        metavar="NAME_OR_FOLDER",
        help="Embedding model. Default: the one that built the collection, else mmrag-nano.",
    ),
]
ResultsOption = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Save the results; - prints them. A run that is stopped goes on from what it keeps "
        "in FILE.cache.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
ImageOption = Annotated[
    Path | None,
    typer.Option("--image", "-i", metavar="PATH", help="An image to ask with, or to ask about."),
]
FileOption = Annotated[
    list[str] | None,
    typer.Option("--file", metavar="PATTERN", help="Only this file or glob; may be repeated."),
]
PagesOption = Annotated[
    str | None, typer.Option("--pages", metavar="3-9", help="Only these pages: 5, 3-9, 3- or -9.")
]
QuantizationOption = Annotated[
    Quantization | None,
    typer.Option(
        "--quantization",
        help="Search shorter codes of the vectors first, and score the best again with the "
        "vectors: int8 takes a quarter of the memory, binary a thirty-second. Only when the "
        "collection is made.",
    ),
]
KindOption = Annotated[
    list[str] | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        help="Only page, figure, passage, picture or text; may be repeated.",
    ),
]
WhereOption = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        help="Only what has this metadata: year>=2023, team=wind, draft!=true, or title~annual "
        "report for whole words; may be repeated, then all must hold.",
    ),
]
MetaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--meta",
        metavar="KEY=VALUE",
        help="Metadata of these files, to filter by (--where); may be repeated. A sidecar file "
        "report.pdf.meta.json gives that of report.pdf.",
    ),
]


@contextmanager
def open_library(
    collection: str,
    embedder: str | None = None,
    *,
    device: str = "auto",
    reading: ReadOptions | None = None,
    language: str | None = None,
    late: LateInteraction | None = None,
    quantization: Quantization | None = None,
) -> Iterator[UniversalIndex]:
    """The collection of --collection, with the embedder of --embedder.

    None: what the collection was built with.
    """
    from mmrag.cli.serving import need_no_server
    from mmrag.index import UniversalIndex

    need_no_server(collection)
    key = os.environ.get("QDRANT_API_KEY")
    with UniversalIndex(
        collection,
        embedder,
        device=device,
        api_key=key,
        reading=reading,
        language=language,
        late=late,
        quantization=quantization,
    ) as library:
        yield library


def need_query(query: str | None, image: Path | None) -> None:
    """Refuse a command without text and image."""
    if not (query and query.strip()) and image is None:
        raise typer.BadParameter("Give a text, --image, or both.")


def where_from(
    files: list[str] | None,
    pages: str | None,
    kinds: list[str] | None,
    conditions: list[str] | None = None,
) -> Where | None:
    """The filter of --file, --pages, --kind and --where; None without any of them."""
    from mmrag.queries import Where

    for kind in kinds or ():
        if kind not in KINDS:
            raise typer.BadParameter(f"{kind!r} is not a kind: use {', '.join(KINDS)}.")
    bounds = _page_range(pages) if pages is not None else None
    if not (files or bounds or kinds or conditions):
        return None
    where = Where(files=tuple(files or ()), pages=bounds, kinds=tuple(kinds or ()))
    return _with_conditions(where, conditions) if conditions else where


def _with_conditions(where: Where, conditions: list[str]) -> Where:
    from llama_index.core.vector_stores.types import MetadataFilter, MetadataFilters

    from mmrag.store.filters import as_where

    filters: list[MetadataFilter | MetadataFilters] = []
    for text in conditions:
        # Longer signs first, or >= would be read as > and a value that begins with =.
        found = re.fullmatch(r"\s*([^=!<>~]+?)\s*(!=|>=|<=|=|>|<|~)\s*(.+?)\s*", text)
        if found is None:
            raise typer.BadParameter(
                f"{text!r} is not a condition: use key=value, or !=, <, <=, >, >= or ~."
            )
        key, sign, value = found.groups()
        # Booleans stay words: LlamaIndex's filters have no other value for them.
        plain = value if sign == "~" or value in ("true", "false") else _value(value)
        operator = {"=": "==", "~": "text_match_insensitive"}.get(sign, sign)
        filters.append(
            MetadataFilter.model_validate({"key": key, "operator": operator, "value": plain})
        )
    checked = as_where(where, MetadataFilters(filters=filters))
    assert checked is not None
    return checked


def metadata_from(pairs: list[str] | None) -> dict[str, Any] | None:
    """The metadata of --meta; None without any."""
    metadata: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise typer.BadParameter(f"{pair!r} is not KEY=VALUE.")
        metadata[key.strip()] = _value(value.strip())
    return metadata or None


def _value(text: str) -> Any:
    """A number, boolean or list as in JSON; anything else is text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    # null and objects are no metadata to filter by, and are taken as they were typed.
    return value if isinstance(value, (bool, int, float, list)) else text


def _page_range(pages: str) -> tuple[int | None, int | None]:
    """5, 3-9, 3- and -9 as first and last page."""
    # At most nine digits: larger numbers are a slip, and overflow Qdrant's integers.
    found = re.fullmatch(r"(\d{0,9})(\s*-\s*)?(\d{0,9})", pages.strip())
    if not found or not (found[1] or found[3]):
        raise typer.BadParameter(f"{pages!r} is not a page range: use 5, 3-9, 3- or -9.")
    first, last = (int(bound) if bound else None for bound in (found[1], found[3]))
    if not found[2]:
        return first, first
    if first is not None and last is not None and first > last:
        raise typer.BadParameter(f"{pages!r} ends before it starts: use {last}-{first}.")
    return first, last
