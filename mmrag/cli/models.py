"""``mmrag models``."""

from __future__ import annotations

from mmrag.cli import display
from mmrag.cli.console import print_json, show
from mmrag.cli.options import JsonOption


def models(as_json: JsonOption = False) -> None:
    """Show the embedders that mmrag knows."""
    from dataclasses import asdict

    from mmrag.embedders.known import KNOWN

    if as_json:
        print_json({"models": [asdict(model) for model in KNOWN]})
    else:
        show(display.models_view(KNOWN))
