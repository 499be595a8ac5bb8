"""What a chat model's reply holds: the answer after its reasoning, JSON, why it ended."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ChatResponse

REASONING_TAGS = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[think]")
REASONING_END = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/think\]", re.IGNORECASE)
LONGEST_END = len("</reasoning>")
_MOST_OBJECTS = 50  # opening braces that are tried; a reply of braces alone must not take long


def without_reasoning(text: str) -> str:
    """What a model says after the reasoning that it writes, between tags, in front.

    Nothing if the reasoning does not end. Some templates write the opening tag into the prompt,
    so the closing one counts alone.
    """
    end = 0
    for found in REASONING_END.finditer(text):
        end = found.end()
    if end:
        return text[end:].lstrip()
    return "" if text[:100].lstrip().lower().startswith(REASONING_TAGS) else text


def json_objects(text: str) -> Iterator[dict[str, Any]]:
    """The JSON objects in a reply, which may stand in a fence or among words, in order.

    An object inside another is not given on its own.
    """
    text, decoder = without_reasoning(text), json.JSONDecoder()
    start = text.find("{")
    for _ in range(_MOST_OBJECTS):
        if start < 0:
            return
        try:
            value, end = decoder.raw_decode(text, start)
        except (json.JSONDecodeError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def why_incomplete(reply: ChatResponse) -> str | None:
    """Why a reply is not whole, in words; None if it is, or if the server does not say."""
    choices = getattr(reply.raw, "choices", None) or ()
    reasons = {getattr(choice, "finish_reason", None) for choice in choices}
    reasons.add(reply.additional_kwargs.get("finish_reason"))
    if "content_filter" in reasons:
        return "the answer was stopped by the server's content filter"
    if "length" in reasons:
        return "the answer is cut off: it reached max_tokens of the model"
    return None
