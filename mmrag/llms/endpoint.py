"""A chat model behind an OpenAI-compatible server, with its real context window."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import httpx
import openai

from mmrag.errors import ConfigError, EndpointError

if TYPE_CHECKING:
    from llama_index.core.base.llms.types import ChatResponse
    from llama_index.llms.openai_like import OpenAILike

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
ASSUMED_WINDOW = 16_384
"""Tokens taken as the context window when neither the user nor the server names one."""
# What clients raise that take a reply of another shape for a chat completion.
_UNREADABLE = (json.JSONDecodeError, TypeError, AttributeError, LookupError)
REASONING_TAGS = ("<think>", "<thinking>", "<thought>", "<reasoning>", "[think]")
_REASONED = re.compile(r"</(?:think|thinking|thought|reasoning)>|\[/think\]", re.IGNORECASE)
# What servers call it: vLLM and SGLang, OpenRouter, LM Studio, llama.cpp.
_WINDOW_KEYS = ("max_model_len", "context_length", "context_window", "max_context_length", "n_ctx")


def open_llm(
    model: str | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    *,
    context_window: int | None = None,
    max_tokens: int = 1024,
    timeout: float = 120.0,
) -> OpenAILike:
    """A chat LLM that takes images, for ``CitedQueryEngine``.

    Args:
        model: its name at the server; without it, the only model that the server has.
        base_url: up to ``/v1``; OpenAI's own by default.
        context_window: in tokens. By default the server is asked, then LlamaIndex's table of
            OpenAI's models; else it is ``ASSUMED_WINDOW``, with a warning.
        api_key: sent as a bearer token.
        max_tokens: longest answer; at most a quarter of the context window.
        timeout: seconds for one request, of which there are at most two.

    Raises: ConfigError without a model, EndpointError if one has to be asked for in vain.
    """
    from llama_index.llms.openai_like import OpenAILike

    base_url = (base_url or OPENAI).rstrip("/")
    key = api_key or "none"
    served: dict[str, int | None] = {}
    if model is None or (context_window is None and base_url != OPENAI):
        try:
            served = served_models(base_url, key)
        except EndpointError:
            if model is None:
                raise
    if model is None:
        model = _only(served, base_url)
    window = context_window or served.get(model) or _known_window(model)
    if window is None:
        window = ASSUMED_WINDOW
        logger.warning(
            "%s does not say how long the context of %s is; taking %d tokens. Set the context "
            "window to use all of it.",
            base_url,
            model,
            window,
        )
    return OpenAILike(
        model=model,
        api_base=base_url,
        api_key=key,
        is_chat_model=True,
        context_window=window,
        max_tokens=min(max_tokens, window // 4),
        timeout=timeout,
        max_retries=1,
        temperature=0.0,
    )


def served_models(
    base_url: str, api_key: str = "none", timeout: float = 10.0
) -> dict[str, int | None]:
    """Names of a server's models, each with its context window in tokens where it says so.

    Raises: EndpointError if ``/models`` cannot be read.
    """
    url = f"{base_url.rstrip('/')}/models"
    try:
        reply = httpx.get(url, headers={"Authorization": f"Bearer {api_key}"}, timeout=timeout)
        reply.raise_for_status()
        rows = reply.json()["data"]
        windows = {str(row["id"]): _window(row) for row in rows}
        trained = {str(row["id"]): _trained_window(row) for row in rows}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EndpointError(f"{url} cannot be read: {error}. Is the server running?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EndpointError(
            f"{url} does not answer as an OpenAI-compatible server does."
        ) from error
    for name, window in trained.items():
        if windows[name] is None and window is not None:
            windows[name] = _started_with(base_url, name, api_key, timeout) or window
    return windows


def _started_with(base_url: str, model: str, api_key: str, timeout: float) -> int | None:
    """The window that llama.cpp's server was given, which its list of models does not have."""
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/props"
    headers = {"Authorization": f"Bearer {api_key}"}
    try:
        asked = {"model": model, "autoload": "false"}  # a router must not load it for this
        reply = httpx.get(url, params=asked, headers=headers, timeout=timeout)
        window = reply.json()["default_generation_settings"]["n_ctx"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return window if isinstance(window, int) and window > 0 else None


def without_reasoning(text: str) -> str:
    """What a model says after the reasoning that it writes, between tags, in front.

    Nothing if the reasoning does not end. Some templates write the opening tag into the prompt,
    so the closing one counts alone.
    """
    if end := list(_REASONED.finditer(text)):
        return text[end[-1].end() :].lstrip()
    return "" if text.lstrip().lower().startswith(REASONING_TAGS) else text


def cut_off(reply: ChatResponse) -> bool:
    """Whether a reply ended because it was as long as it may be."""
    choices = getattr(reply.raw, "choices", None) or ()
    reasons = {getattr(choice, "finish_reason", None) for choice in choices}
    return "length" in reasons | {reply.additional_kwargs.get("finish_reason")}


@contextmanager
def translated_errors(model: str) -> Iterator[None]:
    """Turn what a chat endpoint's client raises into EndpointError with advice."""
    try:
        yield
    except openai.APITimeoutError as error:
        raise EndpointError(f"{model} did not answer in time; is the server overloaded?") from error
    except openai.APIConnectionError as error:
        raise EndpointError(
            f"{model} cannot be reached ({_cause(error)}). Check the base URL and that the "
            "server is running."
        ) from error
    except openai.AuthenticationError as error:
        raise EndpointError(f"{model}: the server refuses the API key.") from error
    except openai.NotFoundError as error:
        raise EndpointError(f"{model}: the server has no such model or path: {error}") from error
    except openai.APIStatusError as error:
        advice = " If it takes no images, ask without them." if error.status_code == 400 else ""
        raise EndpointError(f"{model}: the server refused ({error}).{advice}") from error
    except (openai.OpenAIError, httpx.HTTPError, *_UNREADABLE) as error:
        raise EndpointError(f"{model}: the answer broke off or is not valid ({error}).") from error


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error)


def _window(row: dict[str, Any]) -> int | None:
    for place in (row, _meta(row)):
        for key in _WINDOW_KEYS:
            if isinstance(place.get(key), int):
                return int(place[key])
    return None


def _trained_window(row: dict[str, Any]) -> int | None:
    """What llama.cpp says a model was trained with: the most that it may be given."""
    window = _meta(row).get("n_ctx_train")
    return window if isinstance(window, int) else None


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    meta = row.get("meta")
    return meta if isinstance(meta, dict) else {}


def _known_window(model: str) -> int | None:
    from llama_index.llms.openai.utils import openai_modelname_to_contextsize

    try:
        return openai_modelname_to_contextsize(model)
    except ValueError:
        return None


def _only(served: dict[str, int | None], base_url: str) -> str:
    if len(served) == 1:
        return next(iter(served))
    names = ", ".join(sorted(served)) or "none"
    raise ConfigError(f"Name a model: {base_url} has {names}.")
