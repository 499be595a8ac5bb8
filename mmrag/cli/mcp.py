"""``mmrag mcp``."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from mmrag.cli.console import errors, say
from mmrag.cli.llm import BaseURLOption, LLMOption, WindowOption, chat_model
from mmrag.cli.options import DEFAULT_COLLECTION, DebugOption, EmbedderOption
from mmrag.server import require


def mcp(
    collection: Annotated[
        list[str] | None,
        typer.Option(
            "--collection",
            "-c",
            metavar="[NAME=]FOLDER_OR_URL",
            envvar="MMRAG_COLLECTION",
            help=f"A collection; may be repeated. Default: {DEFAULT_COLLECTION}.",
        ),
    ] = None,
    llm: LLMOption = None,
    base_url: BaseURLOption = None,
    context_window: WindowOption = None,
    embedder: EmbedderOption = None,
    debug: DebugOption = False,
) -> None:
    """Give an assistant the documents as tools, over the Model Context Protocol on stdio.

    An assistant starts this command itself. Over HTTP: mmrag serve, at /mcp.
    """
    with errors(debug):
        require("mcp")
        say("Loading mmrag for MCP on stdio (Ctrl-C stops)")  # stdout belongs to the protocol
        from mmrag.server.library import Answering, open_libraries
        from mmrag.server.mcp_tools import create_mcp

        libraries = open_libraries(
            collection or [DEFAULT_COLLECTION],
            embedder=embedder,
            answering=Answering(chat_model(llm, base_url, context_window)),
            api_key=os.environ.get("QDRANT_API_KEY"),
        )
        try:
            libraries.warm_up()
            create_mcp(libraries).run("stdio")
        finally:
            # An assistant closes stdin when it ends; the folder's lock must go.
            libraries.close()
