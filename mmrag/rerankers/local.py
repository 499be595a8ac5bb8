"""A chat MLLM of the Qwen-VL families as a reranker, without training.

The model is asked whether a document serves a query, and the score is the probability of the
word for yes against that of the word for no, from the logits of its first answer token (MM-Embed,
arXiv 2411.02571, zero-shot reranking). What all documents of a query have in common at the start
of the prompt, its images included, goes through the model once and is shared by its key-value
cache; of the last layer only the last position is used, and of the head only two rows.

Positions and images are those of the generative model, with M-RoPE.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedTokenizerBase,
)

from mmrag.content import Content, image_size, load_image
from mmrag.errors import ContentError, ModelError
from mmrag.instructions import resolve
from mmrag.modeling.batching import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET, pad, plan_batches, prepared
from mmrag.modeling.chat import NATIVE, answer_ids, special_marks
from mmrag.modeling.loading import Placement, load_exact, read_json
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_images import ImageRule, read_image_rule, resize, to_patches
from mmrag.modeling.qwen_vl import (
    IMAGE,
    QwenInputs,
    expand,
    load_tokenizer,
    mrope_positions,
    pad_positions,
    use_matmul_patch_embed,
)
from mmrag.prompting import broken_up
from mmrag.rerankers.base import Outcome, Pair, isolate, sigmoid
from mmrag.rerankers.prompts import RerankPrompt, prompt_for

IMAGE_BLOCK = f"<|vision_start|>{IMAGE}<|vision_end|>"
_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True)
class _Group:
    """Pairs with one query: their places in the call, their ids, and how many ids they share."""

    places: list[int]
    ids: list[list[int]]
    shared: int


class AnswerScorer:
    """Scores pairs by the answer of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL chat model.

    ``prompt`` of None fits the query, see ``prompt_for``. ``token_budget`` bounds a batch: its
    number of pairs times its longest sequence, in tokens, visual ones included. Safe to call
    from several threads: the model runs one batch at a time.

    Raises: ModelError if an answer of the prompt is not one token to the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rule: ImageRule,
        *,
        name: str,
        prompt: RerankPrompt | None = None,
        system: str | None = None,
        max_length: int = 8192,
        token_budget: int | None = None,
        workers: int = 2,
    ) -> None:
        on_cpu = model.device.type == "cpu"
        self.model = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.name = name
        self.prompt = prompt
        self.system = system
        self.max_length = max_length
        self.token_budget = token_budget or (CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET)
        self.workers = workers
        self._image_id = int(model.config.image_token_id)
        self._marks = special_marks(tokenizer)
        self._lock = threading.Lock()
        answer_ids(tokenizer, (prompt or prompt_for(None)).answers, name)

    def score(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """Probability of yes against no for each pair, (len(pairs),), in the order of ``pairs``.

        Pairs with the same query share what they can.

        Raises: ContentError for a pair that cannot be used (its index is in the message).
        """
        return sigmoid(self.logits(pairs, instruction))

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """As ``score``, with the error of each pair that cannot be used in its place."""
        return isolate(lambda some: self.score(some, instruction), pairs)

    def logits(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """What ``score`` takes the sigmoid of: the logit of yes minus that of no."""
        logits = np.zeros(len(pairs), dtype=np.float32)
        with ThreadPoolExecutor(self.workers, thread_name_prefix="mmrag-prepare") as pool:
            for group in self._groups(pairs, resolve(instruction)):
                query = pairs[group.places[0]][0]
                cache = self._prefix(query, group.ids[0], group.shared) if group.shared else None
                direction = self._direction(query)
                batches = plan_batches([len(ids) for ids in group.ids], self.token_budget)
                prepare = partial(self._inputs, pairs, group)
                for batch, inputs in prepared(pool, batches, prepare):
                    places = [group.places[index] for index in batch]
                    logits[places] = self._run(inputs, cache, direction)
        return logits

    def _groups(self, pairs: Sequence[Pair], task: str | None) -> list[_Group]:
        by_query: dict[Hashable, list[int]] = {}
        for place, (query, _) in enumerate(pairs):
            by_query.setdefault(_identity(query), []).append(place)
        groups = []
        for places in by_query.values():
            ids = [self._ids(place, pairs[place], task) for place in places]
            query = pairs[places[0]][0]
            groups.append(_Group(places, ids, self._shared(ids, query) if len(ids) > 1 else 0))
        return groups

    def _shared(self, ids: list[list[int]], query: Content | None) -> int:
        """Length of the common start, which ends before the first image of a document."""
        start = min(_common_start(ids), min(map(len, ids)) - 1)
        own = sum(self.rule.n_tokens(*size) for size in self._sizes(query))
        seen = 0
        for place, token in enumerate(ids[0][:start]):
            seen += token == self._image_id
            if seen > own:
                return place
        return start

    def _ids(self, place: int, pair: Pair, task: str | None) -> list[int]:
        """Token ids, images widened; a long document loses words from its end."""
        query, document = pair
        own = resolve(query.instruction) if query else None
        prompt = self._render(query, document, own or task)
        try:
            sizes = [*self._sizes(query), *self._sizes(document)]
            counts = [self.rule.n_tokens(*size) for size in sizes]
            ids = self._tokenize(str(prompt))
            excess = len(ids) - len(counts) + sum(counts) - self.max_length
            if excess > 0:
                ids = self._cut(prompt, ids, excess)
        except ContentError as error:
            raise ContentError(f"pair {place}: {error}") from error
        return expand(ids, self._image_id, counts)

    def _render(self, query: Content | None, document: Content | None, task: str | None) -> Prompt:
        prompt = self.prompt or prompt_for(query)
        before, between, after = prompt.split()
        system = self.system if prompt.system is None else prompt.system
        opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        asked = f"<|im_start|>user\nTask: {task}\n" if task else "<|im_start|>user\n"
        images = IMAGE_BLOCK * len(document.images) if document else ""
        return Prompt(
            before=f"{opening}{asked}{before}{self._side(query)}{between}{images}",
            text=broken_up((document.text if document else None) or "", self._marks),
            after=f"{after}{_ASSISTANT}",
        )

    def _side(self, content: Content | None) -> str:
        if content is None:
            return ""
        return IMAGE_BLOCK * len(content.images) + broken_up(content.text or "", self._marks)

    def _cut(self, prompt: Prompt, ids: list[int], excess: int) -> list[int]:
        end = len(ids) - len(self._tokenize(prompt.after))
        if end - excess < len(self._tokenize(prompt.before)):
            raise ContentError(
                f"the images and the query alone are over max_length={self.max_length} tokens; "
                "raise max_length or lower max_image_tokens."
            )
        return ids[: end - excess] + ids[end:]

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _sizes(self, content: Content | None) -> list[tuple[int, int]]:
        return [self.rule.size(*image_size(i)) for i in (content.images if content else ())]

    def _inputs(self, pairs: Sequence[Pair], group: _Group, index: int) -> QwenInputs:
        """What a pair of a group does not share; the query's images are shared, or none is."""
        place, ids = group.places[index], group.ids[index]
        pair = pairs[place]
        sides = pair[1:] if group.shared else pair
        try:
            return self._slice(pair, sides, ids, slice(group.shared, None))
        except ContentError as error:
            raise ContentError(f"pair {place}: {error}") from error

    def _slice(
        self, pair: Pair, sides: Sequence[Content | None], ids: list[int], part: slice
    ) -> QwenInputs:
        """Ids and positions of a part of a pair's prompt, with the images of ``sides``."""
        sizes = [size for side in pair for size in self._sizes(side)]
        cells = [(h // self.rule.factor, w // self.rule.factor) for w, h in sizes]
        positions = mrope_positions(ids, self._image_id, cells)[:, part]
        images = [load_image(source) for side in sides if side for source in side.images]
        cut = [to_patches(resize(p, self.rule.size(*p.size)), self.rule) for p in images]
        if not cut:
            return QwenInputs(torch.tensor(ids[part]), positions=positions)
        pixels = torch.cat([patches for patches, _ in cut])
        grids = torch.tensor([grid for _, grid in cut])
        return QwenInputs(torch.tensor(ids[part]), pixels, grids, positions)

    def _prefix(self, query: Content | None, ids: list[int], shared: int) -> DynamicCache:
        """Keys and values of the ids that all pairs of a query share."""
        item = self._slice((query, None), (query,), ids[:shared], slice(0, shared))
        cache = DynamicCache()
        try:
            with self._lock, torch.inference_mode():
                self._decode([item], cache)
        except torch.OutOfMemoryError as error:
            raise self._too_large(item) from error
        return cache

    def _direction(self, query: Content | None) -> Tensor:
        """Row of yes minus row of no in the head, (dim,), float32."""
        answers = (self.prompt or prompt_for(query)).answers
        yes, no = answer_ids(self.tokenizer, answers, self.name)
        head = self.model.get_output_embeddings().weight
        return torch.as_tensor(head[yes].float() - head[no].float()).detach()

    def _run(
        self, inputs: list[QwenInputs], prefix: DynamicCache | None, direction: Tensor
    ) -> NDArray[np.float32]:
        """Logits of one batch, halved as often as memory asks for."""
        try:
            with self._lock, torch.inference_mode():
                cache = None if prefix is None else widened(prefix, len(inputs))
                states = self._decode(inputs, cache)
                rows = torch.arange(len(inputs), device=states.device)
                last = torch.tensor([item.n_tokens - 1 for item in inputs], device=states.device)
                return torch.mv(states[rows, last].float(), direction).cpu().numpy()
        except torch.OutOfMemoryError as error:
            if len(inputs) == 1:
                raise self._too_large(inputs[0]) from error
        middle = len(inputs) // 2
        first = self._run(inputs[:middle], prefix, direction)
        return np.concatenate([first, self._run(inputs[middle:], prefix, direction)])

    def _too_large(self, item: QwenInputs) -> ModelError:
        return ModelError(
            f"{self.name}: one prompt of {item.n_tokens} tokens does not fit in memory; lower "
            "max_image_tokens or max_length, or use a smaller dtype."
        )

    def _decode(self, batch: Sequence[QwenInputs], cache: DynamicCache | None) -> Tensor:
        """States of the last layer after the norm, (len(batch), longest, dim).

        Rows are padded on the right without a mask: a causal model looks at nothing behind a
        token, so that padding is seen by padding only.
        """
        model, device = self.model.model, self.model.device
        ids, _ = pad([item.ids for item in batch], self.tokenizer.pad_token_id or 0)
        ids = ids.to(device)
        embeds = model.get_input_embeddings()(ids)
        extra: dict[str, Any] = {}
        pixels = [item.pixels for item in batch if item.pixels is not None]
        grids = [item.grids for item in batch if item.grids is not None]
        if pixels:
            places = ids == self._image_id
            patches = torch.cat(pixels).to(device, model.visual.dtype)
            seen = model.visual(patches, grid_thw=torch.cat(grids).to(device))
            features = seen.pooler_output.to(embeds.dtype)
            embeds = embeds.masked_scatter(places.unsqueeze(-1).expand_as(embeds), features)
            if deepstack := getattr(seen, "deepstack_features", None):
                extra = {"visual_pos_masks": places, "deepstack_visual_embeds": deepstack}
        output = model.language_model(
            inputs_embeds=embeds,
            position_ids=pad_positions(batch, device),
            past_key_values=cache,
            use_cache=cache is not None,
            **extra,
        )
        return torch.as_tensor(output.last_hidden_state)


def widened(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache of one row for a batch of ``rows``; the given one stays as it is."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    return DynamicCache(
        [
            (keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1))
            for keys, values in layers
        ]
    )


def _common_start(rows: list[list[int]]) -> int:
    """Number of leading elements that all rows share: as many as the least and greatest do."""
    least, greatest = min(rows), max(rows)
    together = zip(least, greatest, strict=False)
    return next((i for i, (a, b) in enumerate(together) if a != b), len(least))


def _identity(query: Content | None) -> Hashable:
    """Equal for queries that are the same without looking into their images."""
    if query is None:
        return None
    images = [i if isinstance(i, (str, Path)) else id(i) for i in query.images]
    return (query.text, query.instruction, *images)


def load_answer_scorer(
    folder: Path,
    placement: Placement,
    *,
    name: str,
    prompt: RerankPrompt | None = None,
    token_budget: int | None = None,
    max_length: int = 8192,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = 1280,
) -> AnswerScorer:
    """Load a chat checkpoint of these families, or an embedder's of that shape with a head.

    Raises: ModelError if it does not load exactly, for instance for want of a head.
    """
    model_class, system = NATIVE[read_json(folder / "config.json")["model_type"]]
    model = load_exact(model_class, folder, placement)
    use_matmul_patch_embed(model.model.visual)
    return AnswerScorer(
        model,
        load_tokenizer(folder),
        read_image_rule(folder).with_tokens(min_image_tokens, max_image_tokens),
        name=name,
        prompt=prompt,
        system=system,
        max_length=max_length,
        token_budget=token_budget,
    )
