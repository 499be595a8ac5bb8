"""The command line: each command is a function in a file of its own, listed here.

Heavy packages are imported inside the commands, so that ``--help`` is there at once.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer

from mmrag.cli.ask import ask
from mmrag.cli.chat import chat
from mmrag.cli.console import EXIT_CODES, MARKUP
from mmrag.cli.convert import convert
from mmrag.cli.doctor import doctor
from mmrag.cli.evaluate import evaluate
from mmrag.cli.index import index
from mmrag.cli.list_files import list_files
from mmrag.cli.mcp import mcp
from mmrag.cli.models import models
from mmrag.cli.needle import needle
from mmrag.cli.remove import remove
from mmrag.cli.report import report
from mmrag.cli.search import search
from mmrag.cli.serve import serve
from mmrag.cli.snapshot import snapshots
from mmrag.cli.tune import tune
from mmrag.cli.upgrade import upgrade

COMMANDS: dict[str, Callable[..., Any]] = {
    "index": index,
    "search": search,
    "ask": ask,
    "chat": chat,
    "list": list_files,
    "remove": remove,
    "tune": tune,
    "eval": evaluate,
    "needle": needle,
    "upgrade": upgrade,
    "report": report,
    "convert": convert,
    "doctor": doctor,
    "models": models,
    "serve": serve,
    "mcp": mcp,
}

app = typer.Typer(
    name="mmrag",
    help="Ask a folder of PDFs and images; every answer cites its pages.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode=MARKUP,
    # Rich's tracebacks show local variables, which may hold keys.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name, epilog=EXIT_CODES)(_command)
app.add_typer(snapshots)


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmrag {metadata.version('mmrag')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Ask a folder of PDFs and images; every answer cites its pages."""
