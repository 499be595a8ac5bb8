"""Any image-text-to-text model of transformers as a reranker, through its own processor.

As ``qwen``, for the families that have no place there: LLaVA-NeXT, on which MM-Embed was tried,
and others. The processor's template makes the prompt, each pair goes through the model whole,
and only the logits of last positions are computed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.auto import AutoModelForImageTextToText

from mmrag.content import Content, load_image
from mmrag.errors import ContentError
from mmrag.modeling.chat import answer_ids, load_processor, process, special_marks
from mmrag.modeling.loading import Placement, load_exact
from mmrag.modeling.tokenizers import check_tokenizer
from mmrag.prompting import broken_up
from mmrag.rerankers.base import Pair
from mmrag.rerankers.local import Group, LocalScorer
from mmrag.rerankers.prompts import RerankPrompt, prompt_for


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A pair, its literal prompt and the length of that in tokens."""

    pair: Pair
    prompt: str
    n_tokens: int


class ChatAsker:
    """An Asker over a chat model and its processor.

    Raises:
        ModelError: If an answer of the prompt is not one token to the model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        prompt: RerankPrompt | None = None,
        max_length: int = 8192,
    ) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.prompt = prompt
        self.max_length = max_length
        self._marks = special_marks(processor.tokenizer)
        self._lock = threading.Lock()  # the processor's state is not for several threads
        self._latest: tuple[str, Pair, Any] | None = None  # what was processed last, alone
        self._ids: dict[tuple[str, str], tuple[int, int]] = {}
        # Now, so that words which are no tokens fail at loading and not at the first query.
        self._answers((prompt or prompt_for(None)).answers)

    def _answers(self, words: tuple[str, str]) -> tuple[int, int]:
        """Ids of the two words, looked up once: tokenising them takes longer than a small batch."""
        if words not in self._ids:
            self._ids[words] = answer_ids(self.processor.tokenizer, words, self.name)
        return self._ids[words]

    def plan(self, pair: Pair, task: str | None) -> ChatPlan:
        """The prompt of a pair; a long document loses words from its end.

        Raises:
            ContentError: If query and images alone are longer than ``max_length``.
        """
        document = pair[1]
        text = (document.text if document else None) or ""
        prompt = self._render(pair, text, task)
        tokens = self._length(prompt, pair)
        if tokens > self.max_length:
            ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            # From the end of the document: the query must stay whole, and pages begin with what
            # they are about.
            kept = len(ids) - (tokens - self.max_length)
            if kept < 0:
                raise ContentError(
                    f"the images and the query alone are over max_length={self.max_length} "
                    "tokens; raise max_length."
                )
            text = self.processor.tokenizer.decode(ids[:kept])
            prompt = self._render(pair, text, task)
            tokens = self._length(prompt, pair)
        return ChatPlan(pair, prompt, tokens)

    def groups(self, pairs: Sequence[Pair], plans: Sequence[ChatPlan]) -> list[Group]:
        """Pairs with images and those without: not all processors take both together."""
        seeing = [bool(_images(pair)) for pair in pairs]
        parts = [[i for i, sees in enumerate(seeing) if sees == kind] for kind in (False, True)]
        return [Group(places) for places in parts if places]

    def prefix(self, group: Group, first: ChatPlan) -> None:
        """Nothing is shared: processors differ in where they put images."""

    def prepare(self, plan: ChatPlan, group: Group) -> ChatPlan:
        """The plan itself: the processor takes a batch as a whole."""
        return plan

    def forward(self, batch: Sequence[ChatPlan], group: Group, prefix: None) -> Tensor:
        """See ``Asker.forward``."""
        inputs = self._process([item.prompt for item in batch], [item.pair for item in batch])
        inputs = inputs.to(self.model.device, self.model.dtype)
        # The place of the last prompt token, where the answer would begin; padding is on the right.
        last = inputs["attention_mask"].sum(dim=1) - 1
        # The head over a whole page of tokens would take more memory than the model's states.
        kept, rows = torch.unique(last, return_inverse=True)
        logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits.float()
        values = []
        for index, item in enumerate(batch):
            yes, no = self._answers((self.prompt or prompt_for(item.pair[0])).answers)
            at = logits[index, rows[index]]
            values.append(at[yes] - at[no])
        return torch.stack(values)

    def _length(self, prompt: str, pair: Pair) -> int:
        return int(self._process([prompt], [pair])["input_ids"].shape[1])

    def _render(self, pair: Pair, text: str, task: str | None) -> str:
        """The literal prompt by the model's own template."""
        query, document = pair
        prompt = self.prompt or prompt_for(query)
        before, between, after = prompt.split()
        asked = f"Task: {broken_up(task, self._marks)}\n{before}" if task else before
        # A text with the model's own marks could end its turn and answer in the model's place.
        wanted = broken_up((query.text if query else None) or "", self._marks)
        pieces: list[str | None] = [asked, *_places(query), f"{wanted}{between}"]
        pieces += [*_places(document), f"{broken_up(text, self._marks)}{after}"]
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in pieces]
        messages = [{"role": "user", "content": parts}]
        if prompt.system is not None:
            system = [{"type": "text", "text": prompt.system}]
            messages.insert(0, {"role": "system", "content": system})
        return str(
            self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        )

    def _process(self, texts: Sequence[str], pairs: Sequence[Pair]) -> Any:
        latest, self._latest = self._latest, None
        alone = len(texts) == 1
        # Planning a pair has processed it already: one that is judged alone is not done twice.
        if alone and latest and latest[0] == texts[0] and latest[1] is pairs[0]:
            return latest[2]
        images = [[load_image(source) for source in _images(pair)] for pair in pairs]
        with self._lock:
            inputs = process(self.processor, texts, images)
        if alone:
            self._latest = (texts[0], pairs[0], inputs)
        return inputs


def _images(pair: Pair) -> list[Any]:
    return [source for side in pair if side for source in side.images]


def _places(content: Content | None) -> list[None]:
    return [None] * len(content.images) if content else []


def load_chat_scorer(
    folder: Path,
    placement: Placement,
    *,
    name: str,
    prompt: RerankPrompt | None = None,
    token_budget: int | None = None,
    workers: int | None = None,
    max_length: int = 8192,
) -> LocalScorer:
    """Load a checkpoint with a processor and a chat template.

    Raises:
        ModelError: If either is missing or cannot be used here, or the weights do not load exactly.
    """
    processor = load_processor(folder, name)
    model = load_exact(AutoModelForImageTextToText, folder, placement)
    check_tokenizer(processor.tokenizer, name, rows=model.get_input_embeddings().num_embeddings)
    asker = ChatAsker(model, processor, name=name, prompt=prompt, max_length=max_length)
    return LocalScorer(asker, name=name, token_budget=token_budget, workers=workers)
