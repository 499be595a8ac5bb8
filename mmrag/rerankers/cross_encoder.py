"""Any cross-encoder of sentence-transformers as a reranker of texts: the extra ``mmrag[st]``.

BGE, Qwen3-Reranker, zerank and others (https://sbert.net). The model brings its own head, prompt
and limits. Code that comes with a checkpoint is never run.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mmrag.embedders.sentence_transformers import open_exactly
from mmrag.errors import ConfigError, ModelError
from mmrag.instructions import resolve
from mmrag.modeling.attention import planless
from mmrag.modeling.batching import default_budget, iter_batches, run_halving
from mmrag.modeling.checkpoints import read_json
from mmrag.modeling.loading import Placement
from mmrag.prompting import estimate_tokens
from mmrag.rerankers.base import Outcome, Pair, isolate, judge_readable, text_pair
from mmrag.rerankers.prompts import RerankPrompt

# Qwen3-Reranker was published without a template for pairs; its model card writes them like this.
_QWEN3_TEMPLATE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: "
    "{{ messages | selectattr('role', 'eq', 'system') | map(attribute='content') | first | "
    "default('Given a web search query, retrieve relevant passages that answer the query') }}\n"
    "<Query>: {{ messages | selectattr('role', 'eq', 'query') | map(attribute='content') | first }}"
    "\n<Document>: "
    "{{ messages | selectattr('role', 'eq', 'document') | map(attribute='content') | first }}"
    # As an expression: Jinja drops a line break at the end of a template.
    "{{ '<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)


@dataclass(frozen=True, slots=True)
class _Item:
    """A pair as it is read: its texts, the instruction, and the length in tokens, estimated."""

    texts: tuple[str, str]
    task: str | None
    n_tokens: int


class CrossEncoderScorer:
    """A Scorer over a ``CrossEncoder``: it reads text alone. Safe to call from several threads.

    The score is the sigmoid of the model's logit, whatever activation it was saved with, so that
    it lies in [0, 1]; the order is that of ``CrossEncoder.predict``. An instruction is the system
    turn of a model with a chat template; a model without one was not trained on instructions, and
    gets none. A page without text has no score: it keeps its place, and its error says why.

    ``token_budget`` bounds a batch: its number of pairs times its longest, in estimated tokens;
    None is 1,024 on the CPU and 16,384 elsewhere.

    Raises:
        ConfigError: For a model with more than one label.

    >>> from sentence_transformers import CrossEncoder  # doctest: +SKIP
    >>> model = CrossEncoder("BAAI/bge-reranker-v2-m3")  # doctest: +SKIP
    >>> scorer = CrossEncoderScorer(model, name="bge")  # doctest: +SKIP
    >>> scorer.judge([(Content("wind"), Content("Turbines make power."))])  # doctest: +SKIP
    [0.97]
    """

    def __init__(self, model: Any, *, name: str, token_budget: int | None = None) -> None:
        if model.num_labels != 1:
            raise ConfigError(
                f"{name}: a classifier of {model.num_labels} labels, where a reranker has one."
            )
        self.model = model
        self.name = name
        self.budget = default_budget(model, token_budget)
        self._lock = threading.Lock()

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """One outcome for each pair, in order; see ``Scorer.judge``."""
        able = "message" in self.model.modalities
        task = resolve(instruction) if able else None
        # The model cuts longer pairs, so they cost no more than that.
        most = self.model.max_seq_length or math.inf

        def read(pair: Pair) -> _Item:
            texts = text_pair(pair)
            own = resolve(pair[0].instruction) if pair[0] and able else None
            return _Item(texts, own or task, int(min(sum(map(estimate_tokens, texts)), most)))

        return judge_readable(lambda items: isolate(self._scores, items), read, pairs)

    def _scores(self, items: Sequence[_Item]) -> NDArray[np.float64]:
        """Score of each item in [0, 1], (len(items),). Raises ModelError."""
        logits = np.zeros(len(items), dtype=np.float32)
        # predict takes one prompt for a batch.
        for task in {item.task for item in items}:
            places = [place for place, item in enumerate(items) if item.task == task]
            costs = [items[place].n_tokens for place in places]
            for some in iter_batches(costs, lambda: self.budget.limit):
                batch = [places[index] for index in some]
                inputs = [items[place] for place in batch]
                logits[batch] = run_halving(self._forward, inputs, self.budget, self.name)
        if not np.isfinite(logits).all():
            raise ModelError(
                f"{self.name}: a score is not finite; load the model with dtype='float32'."
            )
        # float64 keeps apart the high logits of models that were trained without a sigmoid.
        scores: NDArray[np.float64] = torch.sigmoid(torch.from_numpy(logits).double()).numpy()
        return scores

    def _forward(self, batch: Sequence[_Item]) -> NDArray[np.float32]:
        """Logits of items that have one instruction."""
        with self._lock, planless(self.model.device):
            logits: NDArray[np.float32] = self.model.predict(
                [item.texts for item in batch],
                prompt=batch[0].task,
                batch_size=len(batch),
                # Models are saved with a sigmoid, with none, or with another function: we apply our
                # own to the logit.
                activation_fn=torch.nn.Identity(),
                show_progress_bar=False,
            )
            return logits


def load_cross_encoder(
    folder: Path,
    placement: Placement,
    *,
    name: str,
    prompt: RerankPrompt | None = None,
    token_budget: int | None = None,
    max_length: int | None = None,
) -> CrossEncoderScorer:
    """Load a cross-encoder; see ``load_scorer``. Longer pairs lose the end of the document.

    Raises:
        ModelError: If it does not load exactly, or does not say how a pair is written.
        ConfigError: If sentence-transformers is not installed, and for options it has not.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise ConfigError(
            f"{name} needs sentence-transformers: pip install 'mmrag[st]'."
        ) from error
    if prompt is not None:
        raise ConfigError(f"{name} has a prompt of its own: leave out prompt, use instruction.")
    if placement.quantize is not None or placement.device_map is not None:
        raise ConfigError(f"{name} is a cross-encoder, which takes no quantize or device_map.")
    options: dict[str, Any] = {"processor_kwargs": _template(name, folder)}
    if max_length is not None:
        options["max_length"] = max_length
    model = open_exactly(CrossEncoder, folder, placement, **options)
    return CrossEncoderScorer(model, name=name, token_budget=token_budget)


def _template(name: str, folder: Path) -> dict[str, str]:
    """How a causal model is shown a pair, where the checkpoint does not say."""
    # sentence-transformers would write the pair in the model's chat format, which rerankers were
    # not trained on; the scores are then wrong without any sign of it.
    architectures = read_json(folder / "config.json").get("architectures") or [""]
    if not architectures[0].endswith("ForCausalLM") or (folder / "modules.json").is_file():
        return {}
    if any("qwen3-reranker" in part.lower() for part in (name, folder.resolve().name)):
        return {"chat_template": _QWEN3_TEMPLATE}
    raise ModelError(
        f"{name}: a language model that does not say how it is shown a pair: modules.json of "
        "sentence-transformers is missing. Use a checkpoint that was saved as a CrossEncoder."
    )
