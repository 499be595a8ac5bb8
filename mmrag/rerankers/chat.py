"""Any image-text-to-text model of transformers as a reranker, through its own processor.

As ``answers``, for the families that have no place there: LLaVA-NeXT, on which MM-Embed was
tried, and others. The processor's template makes the prompt, each pair goes through the model
whole, and only the logits of last positions are computed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.models.auto import AutoModelForImageTextToText

from mmrag.content import Content, load_image
from mmrag.errors import ContentError, ModelError
from mmrag.instructions import resolve
from mmrag.modeling.batching import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET, plan_batches
from mmrag.modeling.chat import answer_ids, load_processor, process, special_marks
from mmrag.modeling.loading import Placement, load_exact
from mmrag.prompting import broken_up
from mmrag.rerankers.base import Outcome, Pair, isolate, sigmoid
from mmrag.rerankers.prompts import RerankPrompt, prompt_for


class ChatScorer:
    """Scores pairs by the answer of a chat model; arguments as of ``AnswerScorer``."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        name: str,
        prompt: RerankPrompt | None = None,
        max_length: int = 8192,
        token_budget: int | None = None,
    ) -> None:
        on_cpu = model.device.type == "cpu"
        self.model = model
        self.processor = processor
        self.name = name
        self.prompt = prompt
        self.max_length = max_length
        self.token_budget = token_budget or (CPU_TOKEN_BUDGET if on_cpu else GPU_TOKEN_BUDGET)
        self._marks = special_marks(processor.tokenizer)
        self._lock = threading.Lock()  # the processor's state is not for several threads either
        answer_ids(processor.tokenizer, (prompt or prompt_for(None)).answers, name)

    def score(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """Probability of yes against no for each pair, (len(pairs),); see ``AnswerScorer``."""
        return sigmoid(self.logits(pairs, instruction))

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """As ``score``, with the error of each pair that cannot be used in its place."""
        return isolate(lambda some: self.score(some, instruction), pairs)

    def logits(self, pairs: Sequence[Pair], instruction: str | None = None) -> NDArray[np.float32]:
        """What ``score`` takes the sigmoid of: the logit of yes minus that of no."""
        task = resolve(instruction)
        logits = np.zeros(len(pairs), dtype=np.float32)
        with self._lock, torch.inference_mode():
            fitted = [self._fit(place, pair, task) for place, pair in enumerate(pairs)]
            # Not all processors take items with and without images together.
            for seeing in (False, True):
                places = [i for i, pair in enumerate(pairs) if bool(_images(pair)) == seeing]
                costs = [fitted[place][1] for place in places]
                for batch in plan_batches(costs, self.token_budget):
                    some = [places[index] for index in batch]
                    texts = [fitted[place][0] for place in some]
                    logits[some] = self._run(texts, [pairs[place] for place in some])
        return logits

    def _fit(self, place: int, pair: Pair, task: str | None) -> tuple[str, int]:
        """The prompt of a pair and its tokens; a long document loses words from its end."""
        query, document = pair
        text = (document.text if document else None) or ""
        try:
            prompt = self._render(query, document, text, task)
            tokens = self._length(prompt, pair)
            if tokens > self.max_length:
                ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
                kept = len(ids) - (tokens - self.max_length)
                if kept < 0:
                    raise ContentError(
                        f"the images and the query alone are over max_length={self.max_length} "
                        "tokens; raise max_length."
                    )
                text = self.processor.tokenizer.decode(ids[:kept])
                prompt = self._render(query, document, text, task)
                tokens = self._length(prompt, pair)
        except ContentError as error:
            raise ContentError(f"pair {place}: {error}") from error
        return prompt, tokens

    def _length(self, prompt: str, pair: Pair) -> int:
        return int(self._process([prompt], [pair])["input_ids"].shape[1])

    def _render(
        self, query: Content | None, document: Content | None, text: str, task: str | None
    ) -> str:
        """The literal prompt by the model's own template."""
        prompt = self.prompt or prompt_for(query)
        before, between, after = prompt.split()
        own = (resolve(query.instruction) if query else None) or task
        asked = f"Task: {own}\n{before}" if own else before
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
        images = [[load_image(source) for source in _images(pair)] for pair in pairs]
        return process(self.processor, texts, images)

    def _run(self, texts: Sequence[str], pairs: Sequence[Pair]) -> NDArray[np.float32]:
        """Logits of one batch, halved as often as memory asks for."""
        inputs = self._process(texts, pairs).to(self.model.device, self.model.dtype)
        last = inputs["attention_mask"].sum(dim=1) - 1
        kept, rows = torch.unique(last, return_inverse=True)
        try:
            logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits.float()
        except torch.OutOfMemoryError as error:
            if len(texts) == 1:
                raise ModelError(
                    f"{self.name}: one pair of {int(last[0]) + 1} tokens does not fit in memory; "
                    "lower max_length, or use a smaller dtype."
                ) from error
            middle = len(texts) // 2
            first = self._run(texts[:middle], pairs[:middle])
            return np.concatenate([first, self._run(texts[middle:], pairs[middle:])])
        values = []
        for index, (query, _) in enumerate(pairs):
            answers = (self.prompt or prompt_for(query)).answers
            yes, no = answer_ids(self.processor.tokenizer, answers, self.name)
            at = logits[index, rows[index]]
            values.append(float(at[yes] - at[no]))
        return np.asarray(values, dtype=np.float32)


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
    max_length: int = 8192,
) -> ChatScorer:
    """Load a checkpoint with a processor and a chat template.

    Raises: ModelError if either is missing or cannot be used here, or the weights do not load
        exactly.
    """
    processor = load_processor(folder, name)
    model = load_exact(AutoModelForImageTextToText, folder, placement)
    return ChatScorer(
        model,
        processor,
        name=name,
        prompt=prompt,
        max_length=max_length,
        token_budget=token_budget,
    )
