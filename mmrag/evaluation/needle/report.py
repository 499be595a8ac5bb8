"""The needle test as one HTML file: what was found, by ranking and, as a heat map, by depth."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from mmrag.evaluation.measures import MEASURES
from mmrag.evaluation.needle.scores import Cell, NeedleResult
from mmrag.evaluation.report import template_environment


def write_needle_report(
    result: NeedleResult, path: str | Path, *, title: str = "Needle test"
) -> None:
    """Write the result as one HTML file that loads nothing from anywhere."""
    depths = sorted({case.depth for case in result.cases.values()})
    html = (
        template_environment()
        .get_template("needle.html")
        .render(
            title=title,
            now=datetime.now().astimezone(),
            result=result,
            evaluation=result.evaluation,
            rows=result.cells("layer", "kind", "size"),
            depths=depths,
            heat=heat_rows(result, depths),
            rankings=[
                {"system": system, "cells": result.cells("layer", "kind", system=system)}
                for system in result.systems()
            ],
            measures=MEASURES,
        )
    )
    Path(path).write_text(html, encoding="utf-8")


def heat_rows(result: NeedleResult, depths: list[float]) -> list[tuple[str, list[Cell | None]]]:
    """A row for each layer, kind and size, with a cell for each depth."""
    rows: dict[str, dict[float, Cell]] = {}
    for cell in result.cells("layer", "kind", "size", "depth"):
        group = cell.group
        label = f"{group['layer']}, {group['kind']}, {group['size']} pages"
        rows.setdefault(label, {})[group["depth"]] = cell
    return [(label, [of.get(depth) for depth in depths]) for label, of in rows.items()]
