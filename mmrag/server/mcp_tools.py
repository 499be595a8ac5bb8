"""The Model Context Protocol: search, answers and pages as tools of an assistant.

``mmrag mcp`` runs them over stdio; ``mmrag serve`` has them at ``/mcp`` where the extra ``mcp``
is installed. https://modelcontextprotocol.io
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import wraps
from importlib import metadata
from typing import Annotated, Any, ParamSpec, TypeVar

from anyio import to_thread
from mcp.server.mcpserver import Image, MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import CallToolResult, ContentBlock, ResourceLink, TextContent, ToolAnnotations
from pydantic import Field

from mmrag.errors import MMRagError
from mmrag.queries import MultimodalQuery, Where
from mmrag.server.answers import answer_row, hit_row
from mmrag.server.library import Libraries
from mmrag.server.links import format_boxes, parse_boxes
from mmrag.server.markdown import place_of
from mmrag.server.pages import page_image_bytes

P = ParamSpec("P")
R = TypeVar("R")

INSTRUCTIONS = """\
Documents of the user, indexed page by page. Use ask for an answer that cites its pages, search
to find pages, and get_page to look at one: figures, tables and scans are best read from the
image. Cite file and page in what you tell the user."""
PAGE_WIDTH = 1100  # pixels; legible to a model, and small enough for clients that bound results
# Clients may ask the user before each call of a tool that is not marked as harmless.
READ_ONLY = ToolAnnotations(read_only_hint=True, open_world_hint=False)

CollectionName = Annotated[
    str | None, Field(description="Name of a collection; default: the first one.")
]


def create_mcp(libraries: Libraries) -> MCPServer:
    """An MCP server over open collections."""
    server: MCPServer = MCPServer(
        "mmrag", version=metadata.version("mmrag"), instructions=INSTRUCTIONS
    )

    @server.tool(annotations=READ_ONLY)
    @_in_thread
    def search(
        query: Annotated[str, Field(description="What to look for, in words.")],
        top_k: Annotated[int, Field(ge=1, le=50, description="Pages to return.")] = 5,
        files: Annotated[
            list[str] | None, Field(description="Only these file names or globs.")
        ] = None,
        collection: CollectionName = None,
    ) -> CallToolResult:
        """Find the pages of the user's documents that match a query."""
        library = libraries.get(collection)
        where = Where(files=tuple(files)) if files else None
        asked = MultimodalQuery(query, where=where, top_k=top_k)
        hits = library.search(asked)
        # An empty base: the links of the web page are of no use to an assistant.
        rows = [hit_row(hit, library.name, "") for hit in hits]
        # An empty result reads to some models as a failed call.
        blocks: list[ContentBlock] = [] if rows else [_text("Nothing found.")]
        for row in rows:
            blocks.append(_text(f"{place_of(row)} (file_id {row['file_id']}):\n{row['text']}"))
            blocks += _links([row], library.name)
        return CallToolResult(content=blocks)

    @server.tool(annotations=READ_ONLY)
    @_in_thread
    def ask(
        question: Annotated[str, Field(description="A question that stands on its own.")],
        collection: CollectionName = None,
    ) -> CallToolResult:
        """Answer a question from the user's documents, citing pages as [1], [2]."""
        library = libraries.get(collection)
        _, response = library.answer(MultimodalQuery(question))
        answer = answer_row(response, library.name, "")
        # Pages that were only looked at would be taken for evidence.
        cited = [row for row in answer["sources"] if row["cited"]] if answer["found"] else []
        lines = [answer["answer"], ""]
        lines += [f"[{row['n']}] {place_of(row)} (file_id {row['file_id']})" for row in cited]
        lines += [f"Check: {problem}" for problem in answer["problems"]]
        return CallToolResult(
            content=[_text("\n".join(lines).strip()), *_links(cited, library.name)]
        )

    @server.tool(annotations=READ_ONLY)
    @_in_thread
    def get_page(
        file_id: Annotated[str, Field(description="As search, ask and list_files give it.")],
        page: Annotated[int, Field(ge=1, description="From 1.")],
        mark: Annotated[
            str | None,
            Field(description="Boxes to mark, as x0,y0,x1,y1 in points; semicolons between."),
        ] = None,
        collection: CollectionName = None,
    ) -> Image:
        """The image of a page, with boxes marked, to read figures, tables and layout."""
        return Image(data=marked_image(collection, file_id, page, mark), format="webp")

    @server.tool(annotations=READ_ONLY)
    @_in_thread
    def list_files(collection: CollectionName = None) -> dict[str, Any]:
        """The files of a collection, with their number of pages; and the other collections."""
        library = libraries.get(collection)
        rows = library.file_rows()
        files = [{"file_id": row["id"], "file": row["name"], "pages": row["pages"]} for row in rows]
        return {
            "collection": library.name,
            "files": files,
            "collections": [each.name for each in libraries],
        }

    @server.resource(
        "mmrag://{collection}/{file_id}/{page}/{mark}", name="page", mime_type="image/webp"
    )
    @_in_thread
    def marked_page(collection: str, file_id: str, page: int, mark: str) -> bytes:
        """A page with its evidence marked; mark is ``all`` for none."""
        return marked_image(collection, file_id, page, None if mark == "all" else mark)

    def marked_image(collection: str | None, file_id: str, page: int, mark: str | None) -> bytes:
        opened = libraries.get(collection).collection
        return page_image_bytes(opened, file_id, page, parse_boxes(mark), PAGE_WIDTH)[0]

    return server


def _in_thread(work: Callable[P, R]) -> Callable[P, Awaitable[R]]:
    """Work in a thread; our errors become what an assistant is told of a tool that failed."""

    @wraps(work)
    async def run(*args: P.args, **options: P.kwargs) -> R:
        try:
            # Searching blocks for as long as the model runs; other calls go on.
            return await to_thread.run_sync(lambda: work(*args, **options))
        except MMRagError as error:
            raise ToolError(str(error)) from error

    return run


def _text(text: str) -> TextContent:
    return TextContent(type="text", text=text)


def _links(rows: Sequence[Mapping[str, Any]], collection: str) -> list[ContentBlock]:
    """Links to the images of pages; files without pages have none."""
    return [
        ResourceLink(
            type="resource_link",
            uri=f"mmrag://{collection}/{row['file_id']}/{row['page']}/"
            # A part of an address cannot be empty.
            f"{format_boxes(row['boxes']) or 'all'}",
            name=place_of(row),
            mime_type="image/webp",
            description=row.get("quote"),
        )
        for row in rows
        if row["file_id"] and row["page"] is not None
    ]
