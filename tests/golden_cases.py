"""Vectors of the reference code of a family, as cases for its tests; and images of noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmrag.content import Content
from mmrag.embedders import load_backbone
from mmrag.modeling.backbone import inputs_of

Case = tuple[Any, Any, dict[str, Any]]


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def case_content(case: dict[str, Any], image: Path | None) -> tuple[Content, str | None]:
    return Content(case["text"], image), case["instruction"]


def golden_cases(
    folder: Path,
    family: str,
    options: Callable[[dict[str, Any]], dict[str, Any]],
    read: Callable[[dict[str, Any], Path | None], tuple[Content, str | None]] = case_content,
) -> list[Case]:
    """Backbone, prepared item and expected values of each case.

    options: of the family, as a case was computed with them. read: content and instruction.
    """
    loaded: dict[str, Any] = {}
    cases = []
    for case in json.loads((folder / "expected.json").read_text())["cases"]:
        chosen = options(case)
        key = str(chosen)
        if key not in loaded:
            checkpoint = folder / "checkpoint"
            loaded[key] = load_backbone(checkpoint, family=family, device="cpu", **chosen)
        content, task = read(case, folder / "images" / case["image"] if case["image"] else None)
        assert loaded[key].plan(content, task).n_tokens == case["n_tokens"]
        cases.append((loaded[key], inputs_of(loaded[key], content, task), case))
    return cases


@torch.no_grad()
def assert_vectors(cases: list[Case]) -> None:
    """Each item alone and in mixed batches has the vector of the reference code."""
    items = [item for _, item, _ in cases]
    expected = torch.tensor([case["vector"] for _, _, case in cases])
    backbone = cases[0][0]  # forward does not depend on the options of a case
    alone = torch.cat([backbone.forward([item]) for item in items])
    mixed = torch.cat([backbone.forward(items[start::4]) for start in range(4)])
    order = torch.cat([torch.arange(start, len(items), 4) for start in range(4)])
    for vectors in (alone, mixed[order.argsort()]):
        assert (torch.cosine_similarity(vectors, expected) >= 0.9999).all()
