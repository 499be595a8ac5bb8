"""The embedder of models that run here: batches by tokens, prepared ahead in threads."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmrag.content import Content, ContentLike, Modality
from mmrag.embedders.base import Calibration, as_items, check_dim, truncate_normalise
from mmrag.embedders.progress import progress_bar
from mmrag.errors import ModelError, naming
from mmrag.modeling.backbone import Backbone, Inputs, Plan
from mmrag.modeling.batching import (
    default_budget,
    default_workers,
    iter_batches,
    open_pool,
    padded_tokens,
    prepared,
    run_halving,
)
from mmrag.modeling.compiling import HotBlocks
from mmrag.modeling.lanes import Lanes

logger = logging.getLogger(__name__)


class LocalEmbedder:
    """An Embedder that runs a Backbone in this process.

    ``token_budget`` bounds a batch: its number of items times its longest sequence, in tokens,
    visual ones included; None is 1,024 on the CPU and 16,384 elsewhere. ``workers`` threads
    prepare ahead of the model; None is one for each core, at most 16. ``compile`` as in
    ``load_embedder``. Safe to call from several threads: the model runs one batch at a time, and
    beside it one short batch, such as a query, which does not wait while others index.

    ``prefers_text`` says that text serves this model better than an image of it: ingestion then
    gives a node that has text no ``image`` view. ``prefers_passages`` says that it was trained on
    passages: a page that is cut into passages then gets no ``text`` view of its own. They move no
    vector and may be set at any time. ``dim`` is the number of leading dimensions that make the
    full vector; None: all that the backbone gives.

    >>> from mmrag import load_embedder
    >>> nano = load_embedder("mmrag-nano", device="cpu")
    >>> nano.encode(["wind energy"], instruction="page_for_question").shape
    (1, 384)
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        name: str,
        fingerprint: str,
        token_budget: int | None = None,
        dim: int | None = None,
        prefers_text: bool = False,
        prefers_passages: bool = False,
        matryoshka_dims: tuple[int, ...] = (),
        calibration: Calibration | None = None,
        workers: int | None = None,
        compile: bool | None = None,
    ) -> None:
        self.backbone = backbone
        self.name = name
        self.family: str = backbone.family
        self.dim: int = dim or backbone.dim
        self.modalities: frozenset[Modality] = backbone.modalities
        self.fingerprint = fingerprint
        self.prefers_text = prefers_text
        self.prefers_passages = prefers_passages
        self.matryoshka_dims = matryoshka_dims
        self.calibration = calibration
        self.budget = default_budget(backbone.model, token_budget)
        self.workers = default_workers(workers)
        self.blocks = HotBlocks(backbone.model, compile)
        device = next(backbone.model.parameters()).device
        self._lanes = Lanes(device, getattr(backbone, "stateful", False))

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed contents of any mix of modalities; see ``Embedder.encode``.

        Raises:
            ModelError: If one item alone does not fit in memory, and for vectors that are not
                finite; besides what ``Embedder.encode`` raises.
        """
        kept = check_dim(dim, self.dim, self.matryoshka_dims)
        items = as_items(self, contents, instruction)
        vectors = np.zeros((len(items), self.dim), dtype=np.float32)

        def prepare(index: int) -> Inputs:
            with naming(f"item {index}"):
                return self.backbone.prepare(plans[index])

        with (
            open_pool(self.workers, len(items)) as pool,
            progress_bar(len(items), progress) as advance,
        ):
            # All plans before any image is decoded: bad items are found, and batches cut, at once.
            plans = list(pool.map(self._plan, range(len(items)), items))
            batches = iter_batches([plan.n_tokens for plan in plans], lambda: self.budget.limit)
            for indices, inputs in prepared(pool, batches, prepare):
                vectors[indices] = run_halving(self._forward, inputs, self.budget, self.name)
                advance(len(indices))
        # Float16 overflows in some models; a NaN in a collection would spoil every search.
        if not np.isfinite(vectors).all():
            raise ModelError(
                f"{self.name}: a vector is not finite; load the model with dtype='float32'."
            )
        return truncate_normalise(vectors, kept)

    def _plan(self, index: int, item: Content) -> Plan:
        with naming(f"item {index}"):
            return self.backbone.plan(item, item.instruction)

    def _forward(self, inputs: Sequence[Inputs]) -> NDArray[np.float32]:
        def run() -> NDArray[np.float32]:
            with torch.inference_mode():
                vectors = self.blocks.run(self.backbone.forward, inputs)
                return vectors[:, : self.dim].float().cpu().numpy()

        return self._lanes.run(run, padded_tokens(inputs))
