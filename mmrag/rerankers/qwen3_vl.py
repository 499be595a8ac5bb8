"""Qwen3-VL-Reranker: how sure the model is that a document answers a query.

The score is the sigmoid of one logit: the last token's state times the difference of the output
rows of ``yes`` and ``no``. Items are scored in batches and come out as they do alone.

Source: Qwen3-VL-Reranker (arXiv 2601.04720) and its published inference code.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from mmrag.content import Content, image_size, load_image
from mmrag.embedders.families.qwen3_vl import IMAGE_BLOCK, image_rule, last_token_states
from mmrag.errors import ContentError, ModelError
from mmrag.instructions import resolve
from mmrag.modeling.batching import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET, plan_batches, prepared
from mmrag.modeling.loading import find_checkpoint, load_exact, place
from mmrag.modeling.qwen_images import ImageRule, resize, to_patches
from mmrag.modeling.qwen_vl import (
    QwenInputs,
    expand,
    load_tokenizer,
    mrope_positions,
    use_matmul_patch_embed,
    without_vision_tokens,
)
from mmrag.rerankers.base import Outcome, Pair, isolate, sigmoid

DEFAULT_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
# The end of the template, "<|im_end|>\n<|im_start|>assistant\n", which is never cut.
_TAIL_TOKENS = 5


class Qwen3VLScorer:
    """Scores pairs of query and document, each a text, images, or both.

    ``token_budget`` bounds a batch: its number of pairs times its longest sequence, in tokens,
    visual ones included. Safe to call from several threads: the model runs one batch at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rule: ImageRule,
        *,
        name: str,
        max_length: int,
        token_budget: int | None = None,
        workers: int = 2,
    ) -> None:
        on_cpu = model.device.type == "cpu"
        self.model = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.name = name
        self.max_length = max_length
        self.token_budget = token_budget or (CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET)
        self.workers = workers
        self._image_id = int(model.config.image_token_id)
        self._special = frozenset(tokenizer.all_special_ids)
        self._answers = [_token_id(tokenizer, answer) for answer in ("yes", "no")]
        self._lock = threading.Lock()

    def score(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """Probability of ``yes`` for each pair, (len(pairs),), in the order of ``pairs``.

        ``instruction`` says what the query is looking for: free text or the name of a task in
        ``mmrag.instructions``. A query's own instruction overrides it.

        Raises: ContentError for a pair that cannot be used (its index is in the message).
        """
        return sigmoid(self.logits(pairs, instruction))

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """As ``score``, with the error of each pair that cannot be used in its place."""
        return isolate(lambda some: self.score(some, instruction), pairs)

    def logits(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """What ``score`` takes the sigmoid of: the logit of ``yes`` minus that of ``no``."""
        tasks = [resolve(query.instruction if query else None) for query, _ in pairs]
        given = resolve(instruction)
        tasks = [given if task is None else task for task in tasks]
        costs = [self._cost(*item) for item in zip(range(len(pairs)), pairs, tasks, strict=True)]
        logits = np.zeros(len(pairs), dtype=np.float32)
        batches = plan_batches(costs, self.token_budget)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="mmrag-prepare") as pool:
            prepare = partial(self._prepare, pairs, tasks)
            for indices, inputs in prepared(pool, batches, prepare):
                logits[indices] = self._run(inputs)
        return logits

    def prepare(self, pair: Pair, instruction: str | None) -> QwenInputs:
        """Ids, patches and positions of one pair."""
        ids = self._ids(pair, instruction)
        images = [load_image(source) for side in pair if side for source in side.images]
        parts = [to_patches(resize(p, self.rule.size(*p.size)), self.rule) for p in images]
        cells = [(rows // self.rule.merge, cols // self.rule.merge) for _, (_, rows, cols) in parts]
        positions = mrope_positions(ids, self._image_id, cells)
        if not parts:
            return QwenInputs(torch.tensor(ids), positions=positions)
        pixels = torch.cat([patches for patches, _ in parts])
        grids = torch.tensor([grid for _, grid in parts])
        return QwenInputs(torch.tensor(ids), pixels, grids, positions)

    def forward(self, batch: Sequence[QwenInputs]) -> Tensor:
        """Logits of a batch, (len(batch),), float32, differentiable."""
        states = last_token_states(self.model.model, batch, self.tokenizer.pad_token_id or 0)
        yes, no = self.model.lm_head.weight[self._answers].float()
        return torch.mv(states.float(), yes - no)

    def _cost(self, index: int, pair: Pair, instruction: str | None) -> int:
        try:
            return len(self._ids(pair, instruction))
        except ContentError as error:
            raise ContentError(f"pair {index}: {error}") from error

    def _prepare(
        self, pairs: Sequence[Pair], tasks: Sequence[str | None], index: int
    ) -> QwenInputs:
        try:
            return self.prepare(pairs[index], tasks[index])
        except ContentError as error:
            raise ContentError(f"pair {index}: {error}") from error

    def _ids(self, pair: Pair, instruction: str | None) -> list[int]:
        """Token ids, images widened, cut to ``max_length`` and the template's end."""
        prompt = rerank_prompt(*pair, instruction)
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]
        sizes = [self.rule.size(*image_size(i)) for side in pair if side for i in side.images]
        wide = expand(ids, self._image_id, [self.rule.n_tokens(*size) for size in sizes])
        body, tail = wide[:-_TAIL_TOKENS], wide[-_TAIL_TOKENS:]
        return self._cut(body) + tail

    def _cut(self, body: list[int]) -> list[int]:
        """Drop ordinary tokens from the end until ``max_length`` are left, special ones stay."""
        if len(body) <= self.max_length:
            return body
        room = self.max_length - sum(token in self._special for token in body)
        if room < 0:
            raise ContentError(
                f"the images alone are over max_length={self.max_length} tokens; raise "
                "max_length or lower max_image_tokens."
            )
        kept = []
        for token in body:
            special = token in self._special
            if special or room > 0:
                kept.append(token)
                room -= not special
        return kept

    def _run(self, inputs: list[QwenInputs]) -> NDArray[np.float32]:
        """Logits of one batch, halved as often as memory asks for."""
        try:
            with self._lock, torch.inference_mode():
                return self.forward(inputs).cpu().numpy()
        except torch.OutOfMemoryError as error:
            if len(inputs) == 1:
                raise ModelError(
                    f"{self.name}: one pair of {inputs[0].n_tokens} tokens does not fit in memory; "
                    "lower max_image_tokens or max_length, or use a smaller dtype."
                ) from error
        middle = len(inputs) // 2
        return np.concatenate([self._run(inputs[:middle]), self._run(inputs[middle:])])


def rerank_prompt(query: Content | None, document: Content | None, instruction: str | None) -> str:
    """The literal prompt; the instruction gets no full stop, nothing parts it from the query."""
    return (
        f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n"
        f"<Instruct>: {instruction or DEFAULT_INSTRUCTION}<Query>:{_side(query)}"
        f"\n<Document>:{_side(document)}<|im_end|>\n<|im_start|>assistant\n"
    )


def _side(content: Content | None) -> str:
    if content is None:
        return "NULL"
    return IMAGE_BLOCK * len(content.images) + (without_vision_tokens(content).text or "")


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ModelError(f"{token!r} is {len(ids)} tokens to this tokenizer: not a reranker's.")
    return int(ids[0])


def load_qwen3_vl_scorer(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    token_budget: int | None = None,
    max_length: int = 10240,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> Qwen3VLScorer:
    """Load Qwen3-VL-Reranker-2B/8B, or any checkpoint of that shape; see ``load_embedder``.

    Raises: ModelError if it cannot be found or does not load exactly.
    """
    folder = find_checkpoint(name, revision)
    model = load_exact(Qwen3VLForConditionalGeneration, folder, place(device, dtype))
    use_matmul_patch_embed(model.model.visual)
    return Qwen3VLScorer(
        model,
        load_tokenizer(folder),
        image_rule(folder, min_image_tokens, max_image_tokens),
        name=str(name),
        max_length=max_length,
        token_budget=token_budget,
    )
