"""Fit the readout's last layer: images near the texts they show.

The layer is linear and the visual tokens of an image are summed behind it, so an image takes part
as the sum of its tokens' units, computed once; a step is two matrix products. Tower and units
stay as they are, and so does the text side (LiT, arXiv 2111.07991).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mmrag.content import Content
from mmrag.embedders.families.nano import NanoBackbone
from mmrag.modeling.backbone import inputs_of
from mmrag.modeling.vision import run_tower

STEPS = 600
_RATE = 3e-3
_TEMPERATURE = 0.05
_DECAY = 1e-5  # of the squared distance from the start
_STEP_SIZE = 0.05  # of a change, in units of a column's typical value
_PAGES, _DRAWINGS = 256, 128  # examples a step
_HARD = 0.3  # weight of the true pairs beside the scores of the encoder
_DRAWING_WEIGHT = 0.5


@dataclass(frozen=True)
class Pages:
    """units: (n, units + 1). passages, queries: unit vectors of a page's text and of a query."""

    units: Tensor
    passages: Tensor
    queries: Tensor


@dataclass(frozen=True)
class Drawings:
    """units: (n, units + 1). titles: unit vectors, one each. rows: (n,), title of each drawing."""

    units: Tensor
    titles: Tensor
    rows: Tensor


@torch.no_grad()
def summed_units(backbone: NanoBackbone, images: Sequence[Image.Image]) -> Tensor:
    """Units of the readout summed over each image's tokens, and their number, (n, units + 1)."""
    model = backbone.model
    found = []
    for image in images:
        item = inputs_of(backbone, Content(image=image), None)
        tokens = run_tower(model.visual, [item.image], backbone.rule).pooler_output
        count = torch.tensor([float(len(tokens))])  # what the bias is multiplied by
        found.append(torch.cat([model.readout.units(tokens).sum(0), count]))
    return torch.stack(found)


def fit_readout(layer: nn.Linear, pages: Pages, drawings: Drawings, seed: int = 0) -> None:
    """Train ``layer``, in place, on pages and drawings together."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.cat([layer.weight.detach().T, layer.bias.detach()[None]]).clone()
    # Each unit in its own measure, so that one learning rate fits all of them.
    typical = pages.units.pow(2).mean(0, keepdim=True).sqrt().T + 1e-3  # (units + 1, 1)
    # The change is learned and kept small: the start is good already.
    change = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.Adam([change], lr=_RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / STEPS)
        matrix = start + _STEP_SIZE * change / typical
        some = torch.randperm(len(pages.units), generator=generator)[:_PAGES]
        others = torch.randint(len(drawings.units), (_DRAWINGS,), generator=generator)
        loss = page_loss(matrix, pages, some)
        loss = loss + _DRAWING_WEIGHT * drawing_loss(matrix, drawings, others)
        loss = loss + _DECAY * change.pow(2).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {float(loss.detach()):.3f}", flush=True)
    final = (start + _STEP_SIZE * change / typical).detach()
    layer.weight.data.copy_(final[:-1].T)
    layer.bias.data.copy_(final[-1])


def page_loss(matrix: Tensor, pages: Pages, some: Tensor) -> Tensor:
    """Of all passages a page must find its own; queries must score pages as they score passages."""
    found = F.normalize(pages.units[some] @ matrix, dim=1)
    # (pages, passages)
    own = F.cross_entropy(found @ pages.passages.T / _TEMPERATURE, some)
    queries = pages.queries[some]
    scores = (queries @ found.T / _TEMPERATURE).log_softmax(1)
    # The encoder's own scores: which other pages are nearly right is told too.
    teacher = (queries @ pages.passages[some].T / _TEMPERATURE).softmax(1)
    wanted = (1 - _HARD) * teacher + _HARD * torch.eye(len(some))
    return own - (wanted * scores).sum(1).mean()


def drawing_loss(matrix: Tensor, drawings: Drawings, some: Tensor) -> Tensor:
    """Of all titles a drawing must find its own."""
    found = F.normalize(drawings.units[some] @ matrix, dim=1)
    return F.cross_entropy(found @ drawings.titles.T / _TEMPERATURE, drawings.rows[some])
