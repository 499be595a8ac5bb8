"""Qwen-VL models that are asked about a pair, and answer with one of two words.

The score is the probability of the word for yes against that of the word for no, from the logits
of the first answer token: of chat models without training (MM-Embed, arXiv 2411.02571, zero-shot
reranking), and of Qwen3-VL-Reranker (arXiv 2601.04720), which was trained for it.

What all documents of a query have in common at the start of the prompt, its images included,
goes through the model once and is shared by its key-value cache; of the last layer only the last
position is used, and of the head only two rows. Positions and images are those of the generative
model, with M-RoPE.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from mmrag.content import Content, image_size, load_image
from mmrag.modeling.chat import NATIVE, answer_ids, special_marks
from mmrag.modeling.checkpoints import read_json
from mmrag.modeling.image_rule import ImageRule, read_image_rule
from mmrag.modeling.loading import Placement
from mmrag.modeling.mrope import mrope_positions
from mmrag.modeling.prompts import Prompt, expand, tokenize
from mmrag.modeling.qwen_images import pixels_of, resize
from mmrag.modeling.qwen_vl import (
    IMAGE_BLOCK,
    QwenInputs,
    decode,
    load_qwen_parts,
)
from mmrag.prompting import broken_up
from mmrag.rerankers.base import Pair
from mmrag.rerankers.local import Group, LocalScorer
from mmrag.rerankers.prompts import RerankPrompt, prompt_for

_ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"

# From a prompt and the visual tokens of its images to ids, images widened, of a bounded length.
Encode = Callable[[PreTrainedTokenizerBase, Prompt, Sequence[int]], list[int]]


@dataclass(frozen=True, slots=True)
class Style:
    """How pairs are put to one kind of model.

    render: the prompt of a query, a document and a task.
    answers: the words for yes and for no, by the query.
    encode: its token ids.
    """

    render: Callable[[Content | None, Content | None, str | None], Prompt]
    answers: Callable[[Content | None], tuple[str, str]]
    encode: Encode


@dataclass(frozen=True, slots=True)
class PairPlan:
    """A pair, its ids with images widened, and rows and columns of visual tokens of each image."""

    pair: Pair
    ids: list[int]
    grids: list[tuple[int, int]]

    @property
    def n_tokens(self) -> int:
        """Length of the sequence, visual tokens included."""
        return len(self.ids)


class QwenAsker:
    """An Asker over a Qwen2-VL, Qwen2.5-VL or Qwen3-VL with a head.

    Raises:
        ModelError: If an answer of the style is not one token to the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        rule: ImageRule,
        style: Style,
        name: str,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rule = rule
        self.style = style
        self.name = name
        self._image_id = int(model.config.image_token_id)
        self._ids: dict[tuple[str, str], tuple[int, int]] = {}
        answer_ids(tokenizer, style.answers(None), name)

    def plan(self, pair: Pair, task: str | None) -> PairPlan:
        """See ``Asker.plan``."""
        grids = [grid for side in pair for grid in self._grids(side)]
        counts = [rows * columns for rows, columns in grids]
        ids = self.style.encode(self.tokenizer, self.style.render(*pair, task), counts)
        return PairPlan(pair, expand(ids, self._image_id, counts), grids)

    def groups(self, pairs: Sequence[Pair], plans: Sequence[PairPlan]) -> list[Group]:
        """The pairs of each query."""
        by_query: dict[Hashable, list[int]] = {}
        for place, (query, _) in enumerate(pairs):
            by_query.setdefault(_identity(query), []).append(place)
        return [
            Group(places, pairs[places[0]][0], self._shared([plans[place] for place in places]))
            for places in by_query.values()
        ]

    def _shared(self, plans: Sequence[PairPlan]) -> int:
        """Length of the common start, which ends before the first image of a document."""
        # Nobody to share with.
        if len(plans) < 2:
            return 0
        every = [plan.ids for plan in plans]
        # As many elements are common to all rows as to the least and the greatest of them.
        pairs = enumerate(zip(min(every), max(every), strict=False))
        shortest = min(map(len, every))
        common = next((place for place, (a, b) in pairs if a != b), shortest)
        # One token at least must be each pair's own: its state is what the score is read from.
        start = min(common, shortest - 1)
        own = sum(rows * columns for rows, columns in self._grids(plans[0].pair[0]))
        seen = 0
        for place, token in enumerate(every[0][:start]):
            seen += token == self._image_id
            # An image cannot be cut in two: its tokens enter the model together.
            if seen > own:
                return place
        return start

    def prefix(self, group: Group, first: PairPlan) -> DynamicCache:
        """Keys and values of the ids that all pairs of a query share."""
        cache = DynamicCache()
        item = self._inputs(first, slice(group.shared), first.pair[:1])
        decode(self.model.model, [item], self.rule, cache=cache)
        return cache

    def prepare(self, plan: PairPlan, group: Group) -> QwenInputs:
        """What a pair does not share; the query's images are shared, or none is."""
        shown = plan.pair[1:] if group.shared else plan.pair
        return self._inputs(plan, slice(group.shared, None), shown)

    def forward(
        self, batch: Sequence[QwenInputs], group: Group, prefix: DynamicCache | None
    ) -> Tensor:
        """See ``Asker.forward``; differentiable."""
        # The model extends the cache that it is given, so each batch gets its own.
        cache = None if prefix is None else widened(prefix, len(batch))
        states, _ = decode(self.model.model, batch, self.rule, cache=cache)
        rows = torch.arange(len(batch), device=states.device)
        last = torch.tensor([item.n_tokens - 1 for item in batch], device=states.device)
        direction = self._direction(group.query)
        # The difference of two logits is one dot product: the rest of the head is not needed.
        return torch.mv(states[rows, last].float(), direction.to(states.device))

    def _direction(self, query: Content | None) -> Tensor:
        """Row of yes minus row of no in the head, (dim,), float32."""
        answers = self.style.answers(query)
        # Tokenising them takes longer than a small batch. The rows are read each time: in training
        # they change.
        if answers not in self._ids:
            self._ids[answers] = answer_ids(self.tokenizer, answers, self.name)
        yes, no = self._ids[answers]
        head = self.model.get_output_embeddings().weight
        return torch.as_tensor(head[yes].float() - head[no].float())

    def _grids(self, content: Content | None) -> list[tuple[int, int]]:
        """Rows and columns of visual tokens of each image of a side."""
        images = content.images if content else ()
        sizes = [self.rule.size(*image_size(image)) for image in images]
        return [(height // self.rule.factor, width // self.rule.factor) for width, height in sizes]

    def _inputs(self, plan: PairPlan, part: slice, shown: Sequence[Content | None]) -> QwenInputs:
        """Ids and positions of a part of a pair, with the images of the sides it shows."""
        loaded = [load_image(source) for side in shown if side for source in side.images]
        images = [pixels_of(resize(image, self.rule.size(*image.size))) for image in loaded]
        # Of the whole pair, so that a part goes on where the shared start ended.
        positions = mrope_positions(plan.ids, self._image_id, plan.grids)[:, part]
        return QwenInputs(torch.tensor(plan.ids[part]), tuple(images), positions)


def widened(cache: DynamicCache, rows: int) -> DynamicCache:
    """A cache of one row for a batch of ``rows``; the given one stays as it is."""
    return DynamicCache(
        [
            # expand makes a view: the prefix is not copied for each row.
            (layer.keys.expand(rows, -1, -1, -1), layer.values.expand(rows, -1, -1, -1))
            for layer in cache.layers
        ]
    )


def _identity(query: Content | None) -> Hashable:
    """Equal for queries that are the same without looking into their images."""
    if query is None:
        return None
    # By identity: comparing the pixels of every pair would cost more than sharing saves.
    images = [i if isinstance(i, (str, Path)) else id(i) for i in query.images]
    return (query.text, query.instruction, *images)


@dataclass(frozen=True, slots=True)
class _ChatTurns:
    """Arguments of ``chat_style``; methods and not closures, which could not be pickled."""

    prompt: RerankPrompt | None
    system: str | None
    marks: tuple[str, ...]
    max_length: int

    def side(self, content: Content | None) -> str:
        images = IMAGE_BLOCK * len(content.images) if content else ""
        return images + broken_up((content.text if content else None) or "", self.marks)

    def render(self, query: Content | None, document: Content | None, task: str | None) -> Prompt:
        asked = self.prompt or prompt_for(query)
        before, between, after = asked.split()
        turn = self.system if asked.system is None else asked.system
        opening = f"<|im_start|>system\n{turn}<|im_end|>\n" if turn else ""
        aim = f"Task: {broken_up(task, self.marks)}\n" if task else ""
        text = broken_up((document.text if document else None) or "", self.marks)
        images = IMAGE_BLOCK * len(document.images) if document else ""
        return Prompt(
            f"{opening}<|im_start|>user\n{aim}{before}{self.side(query)}{between}{images}",
            text,
            f"{after}{_ASSISTANT}",
        )

    def answers(self, query: Content | None) -> tuple[str, str]:
        return (self.prompt or prompt_for(query)).answers

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, asked: Prompt, counts: Sequence[int]
    ) -> list[int]:
        room = self.max_length - sum(counts) + len(counts)
        return tokenize(tokenizer, asked, room, special=False)


def chat_style(
    prompt: RerankPrompt | None, system: str | None, marks: Sequence[str], max_length: int
) -> Style:
    """Ask a chat model by ``prompt``, or by the one that fits the query; cut long documents.

    Args:
        system: the system turn where the prompt has none.
        marks: control tokens of the model, which lose their meaning in texts.
    """
    turns = _ChatTurns(prompt, system, tuple(marks), max_length)
    return Style(turns.render, turns.answers, turns.encode)


def load_answer_scorer(
    folder: Path,
    placement: Placement,
    *,
    name: str,
    prompt: RerankPrompt | None = None,
    token_budget: int | None = None,
    workers: int | None = None,
    max_length: int = 8192,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = 1280,
) -> LocalScorer:
    """Load a chat checkpoint of these families, or an embedder's of that shape with a head.

    Raises:
        ModelError: If it does not load exactly, for instance for want of a head.
    """
    model_class, system = NATIVE[read_json(folder / "config.json")["model_type"]]
    model, tokenizer = load_qwen_parts(model_class, folder, placement)
    rule = read_image_rule(folder).with_tokens(min_image_tokens, max_image_tokens)
    style = chat_style(prompt, system, special_marks(tokenizer), max_length)
    asker = QwenAsker(model, tokenizer, rule, style, name)
    return LocalScorer(asker, name=name, token_budget=token_budget, workers=workers)
