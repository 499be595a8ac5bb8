"""Qwen3-VL-Reranker: how sure the model is that a document answers a query.

Source: Qwen3-VL-Reranker (arXiv 2601.04720) and its published inference code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from mmrag.content import Content
from mmrag.embedders.families.qwen3_vl import MAX_IMAGE_TOKENS, MIN_IMAGE_TOKENS
from mmrag.errors import ConfigError, ContentError
from mmrag.modeling.image_rule import read_image_rule
from mmrag.modeling.loading import Placement
from mmrag.modeling.prompts import Prompt
from mmrag.modeling.qwen_vl import IMAGE_BLOCK, PLACEHOLDERS, load_qwen_parts
from mmrag.prompting import broken_up
from mmrag.rerankers.local import LocalScorer
from mmrag.rerankers.prompts import RerankPrompt
from mmrag.rerankers.qwen import QwenAsker, Style

DEFAULT_INSTRUCTION = "Given a search query, retrieve relevant candidates that answer the query."
_SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".'
)
# The end of the template, "<|im_end|>\n<|im_start|>assistant\n", which is never cut.
_TAIL_TOKENS = 5


def rerank_prompt(
    query: Content | None, document: Content | None, instruction: str | None
) -> Prompt:
    """The literal prompt; the instruction gets no full stop, nothing parts it from the query."""
    task = broken_up(instruction or DEFAULT_INSTRUCTION, PLACEHOLDERS)
    return Prompt(
        f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n<|im_start|>user\n"
        f"<Instruct>: {task}<Query>:{_side(query)}\n<Document>:",
        _side(document),
        "<|im_end|>\n<|im_start|>assistant\n",
    )


def _side(content: Content | None) -> str:
    if content is None:
        return "NULL"
    return IMAGE_BLOCK * len(content.images) + broken_up(content.text or "", PLACEHOLDERS)


def _answers(query: Content | None) -> tuple[str, str]:
    return "yes", "no"


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    counts: Sequence[int],
    *,
    special: frozenset[int],
    max_length: int,
) -> list[int]:
    """Ids of a prompt, cut as the published code cuts them.

    Ordinary tokens are dropped from the end until ``max_length`` are left, visual ones counted;
    ``special`` ones and the template's end stay, the latter uncounted.

    Raises:
        ContentError: If the special tokens alone are more.
    """
    ids: list[int] = tokenizer(str(prompt), add_special_tokens=False, verbose=False)["input_ids"]
    body, tail = ids[:-_TAIL_TOKENS], ids[-_TAIL_TOKENS:]
    room = max_length - sum(counts) + len(counts)
    excess = len(body) - room
    ordinary = [place for place, token in enumerate(body) if token not in special]
    if excess > len(ordinary):
        raise ContentError(
            f"the images alone are over max_length={max_length} tokens; raise max_length or lower "
            "max_image_tokens."
        )
    dropped = set(ordinary[len(ordinary) - excess :] if excess > 0 else ())
    return [token for place, token in enumerate(body) if place not in dropped] + tail


def load_qwen3_vl_scorer(
    folder: Path,
    placement: Placement,
    *,
    name: str,
    prompt: RerankPrompt | None = None,
    token_budget: int | None = None,
    workers: int | None = None,
    max_length: int = 10240,
    min_image_tokens: int | None = None,
    max_image_tokens: int | None = None,
) -> LocalScorer:
    """Load Qwen3-VL-Reranker-2B/8B, or any checkpoint of that shape; see ``load_scorer``.

    Raises:
        ModelError: If it does not load exactly.
        ConfigError: For a prompt: it has its own.
    """
    if prompt is not None:
        raise ConfigError(f"{name} has a prompt of its own: leave out prompt, use instruction.")
    model, tokenizer = load_qwen_parts(Qwen3VLForConditionalGeneration, folder, placement)
    # The published code resizes to its own bounds, whatever the checkpoint's processor file says.
    rule = read_image_rule(folder).with_tokens(
        MIN_IMAGE_TOKENS if min_image_tokens is None else min_image_tokens,
        MAX_IMAGE_TOKENS if max_image_tokens is None else max_image_tokens,
    )
    special = frozenset(tokenizer.all_special_ids)
    limited = partial(encode, special=special, max_length=max_length)
    style = Style(rerank_prompt, _answers, limited)
    asker = QwenAsker(model, tokenizer, rule, style, name)
    return LocalScorer(asker, name=name, token_budget=token_budget, workers=workers)
