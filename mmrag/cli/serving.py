"""The server that holds a collection, for the commands that can ask it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from mmrag.errors import CollectionError, ConfigError

if TYPE_CHECKING:
    from mmrag.server.client import ServerClient


def typed(context: typer.Context, *parameters: str) -> list[str]:
    """Those of a command's parameters that were typed, and not taken from the environment."""
    # By source and not by value: a default that was typed is wanted too.
    sources = {name: context.get_parameter_source(name) for name in parameters}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def server_of(
    collection: str, context: typer.Context | None = None, *options: str
) -> ServerClient | None:
    """The running server that holds a collection; None for none.

    context: of the command. options: names of its parameters that a server does not take. They
        are refused where they were typed; in the environment they are for commands that work
        without a server.

    Raises:
        ConfigError: For such an option.
    """
    from mmrag.server.client import find_server

    server = find_server(collection)
    if server is None:
        return None
    if context is not None and (given := typed(context, *options)):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"The server at {server.address.url} holds {collection} and does not take {names}. "
            "Leave that out, or stop the server and run the same command again."
        )
    return server


def need_no_server(collection: str) -> None:
    """Refuse a command that cannot work while a server holds the collection.

    Raises:
        CollectionError: If one does.
    """
    if (server := server_of(collection)) is not None:
        raise CollectionError(
            f"The server at {server.address.url} holds {collection}, and this command needs it for "
            "itself. Stop the server and run the same command again."
        )
