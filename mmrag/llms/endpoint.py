"""A chat model behind an OpenAI-compatible server, with its real context window."""

from __future__ import annotations

import logging
import os
from typing import Any

import httpx
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.llms.openai_like import OpenAILike

from mmrag.errors import ConfigError, EndpointError
from mmrag.llms.address import Address, parse_address
from mmrag.llms.client import AsyncClient, Client

logger = logging.getLogger(__name__)

OPENAI = "https://api.openai.com/v1"
ASSUMED_WINDOW = 16_384
"""Tokens taken as the context window when neither the user nor the server names one."""
# What servers call it: vLLM and SGLang, OpenRouter, LM Studio, llama.cpp.
_WINDOW_KEYS = ("max_model_len", "context_length", "context_window", "max_context_length", "n_ctx")


class EndpointLLM(OpenAILike):
    """A chat model behind an OpenAI-compatible server; made by ``open_llm``.

    The key is in no field, so that no repr, dict, event or pickle holds it. A copy made by pickle
    takes it from ``OPENAI_API_KEY``.
    """

    _address: Address | None = PrivateAttr(default=None)

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's registry."""
        return "EndpointLLM"

    @property
    def address(self) -> Address:
        """Where the server is, with the key for it."""
        if self._address is None:
            return parse_address(self.api_base or OPENAI, os.environ.get("OPENAI_API_KEY"))
        return self._address

    def _get_credential_kwargs(self, is_async: bool = False) -> dict[str, Any]:
        address = self.address
        # The client signs requests itself; the SDK only insists on having a key.
        return super()._get_credential_kwargs(is_async) | {
            "api_key": "none",
            "base_url": address.url,
            "http_client": AsyncClient(address) if is_async else Client(address),
        }

    def __getstate__(self) -> dict[str, Any]:
        self._client = self._aclient = None  # they hold sockets, and are made anew when needed
        state: dict[str, Any] = super().__getstate__()
        # It holds the address, whose headers hold the key.
        state["__pydantic_private__"] = None
        return state


def open_llm(
    model: str | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    *,
    context_window: int | None = None,
    max_tokens: int = 1024,
    timeout: float = 120.0,
) -> EndpointLLM:
    """A chat LLM that takes images, for ``CitedQueryEngine``.

    Args:
        model: its name at the server; without it, the only model that the server has.
        base_url: address of the server up to ``/v1``; OpenAI's own by default. It may hold
            ``user:password@`` for basic authentication, and a query such as ``?api-version=``.
        api_key: sent as a bearer token, to Azure as ``api-key``. None sends no key.
        context_window: in tokens. By default the server is asked, then LlamaIndex's table of
            OpenAI's models; else it is ``ASSUMED_WINDOW``, with a warning.
        max_tokens: longest answer; at most a quarter of the context window.
        timeout: seconds for one request, of which there are at most two.

    Raises:
        ConfigError: For an address that is none, without a model, or without a key for OpenAI's own
            server.
        EndpointError: If the server cannot be asked for its model.
    """
    address = parse_address(base_url or OPENAI, api_key)
    if address.url == OPENAI and not address.headers:
        raise ConfigError(
            "OpenAI's server needs an API key: set OPENAI_API_KEY (api_key=), or give the address "
            "of another server (--base-url, base_url=)."
        )
    served: dict[str, int | None] = {}
    # OpenAI's own list has no windows, and LlamaIndex has a table of them.
    if model is None or (context_window is None and address.url != OPENAI):
        try:
            served = _served(address, timeout=10.0)
        # Not every server lists its models. That is fatal only if the list was to name the model.
        except EndpointError:
            if model is None:
                raise
    if model is None:
        model = _only_model(served, address.public)
    window = context_window or served.get(model) or _known_or_assumed_window(model, address.public)
    llm = EndpointLLM(
        model=model,
        api_base=address.public,
        api_key="",
        is_chat_model=True,
        context_window=window,
        # Servers refuse a request whose prompt and answer together exceed the window.
        max_tokens=min(max_tokens, window // 4),
        timeout=timeout,
        max_retries=1,
        # The same question should get the same answer.
        temperature=0.0,
    )
    # Set after pydantic made the object, whose fields are shown and saved.
    llm._address = address
    return llm


def served_models(
    base_url: str, api_key: str | None = None, timeout: float = 10.0
) -> dict[str, int | None]:
    """Names of a server's models, each with its context window in tokens where it says so.

    timeout: seconds for each request.

    Raises:
        ConfigError: For an address that is none.
        EndpointError: If ``/models`` cannot be read.
    """
    return _served(parse_address(base_url, api_key), timeout)


def _served(address: Address, timeout: float) -> dict[str, int | None]:
    url = f"{address.url}/models"
    with Client(address, timeout=timeout) as client:
        try:
            reply = client.get(url)
            reply.raise_for_status()
            rows = reply.json()["data"]
            windows = {str(row["id"]): _window(row) for row in rows}
            # What llama.cpp's server was trained with: the most that it may be given.
            trained = {str(row["id"]): _meta(row).get("n_ctx_train") for row in rows}
        except httpx.HTTPError as error:
            raise EndpointError(f"{url} cannot be read: {error}. Is the server running?") from error
        except (ValueError, KeyError, TypeError) as error:
            raise EndpointError(f"{url} does not reply as an OpenAI-compatible server.") from error
        for name, window in trained.items():
            if windows[name] is None and isinstance(window, int):
                windows[name] = _configured_window(client, address.url, name) or window
    return windows


def _configured_window(client: Client, url: str, model: str) -> int | None:
    """The window that llama.cpp's server was given, which its list of models does not have."""
    asked = {"model": model, "autoload": "false"}  # a router must not load it for this
    try:
        reply = client.get(f"{url.removesuffix('/v1')}/props", params=asked)
        window = reply.json()["default_generation_settings"]["n_ctx"]
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return None
    return window if isinstance(window, int) and window > 0 else None


def _window(row: dict[str, Any]) -> int | None:
    # llama.cpp keeps its figures one level down, in "meta".
    for place in (row, _meta(row)):
        for key in _WINDOW_KEYS:
            if isinstance(place.get(key), int):
                return int(place[key])
    return None


def _meta(row: dict[str, Any]) -> dict[str, Any]:
    meta = row.get("meta")
    return meta if isinstance(meta, dict) else {}


def _known_or_assumed_window(model: str, server: str) -> int:
    """The window in LlamaIndex's table of OpenAI's models, else a small one, with a warning."""
    from llama_index.llms.openai.utils import openai_modelname_to_contextsize

    try:
        return int(openai_modelname_to_contextsize(model))
    except ValueError:  # a model that the table does not have
        logger.warning(
            "%s does not report the context window of %s; assuming %d tokens. Set "
            "context_window= (--context-window) to use all of it.",
            server,
            model,
            ASSUMED_WINDOW,
        )
        return ASSUMED_WINDOW


def _only_model(served: dict[str, int | None], base_url: str) -> str:
    if len(served) == 1:
        return next(iter(served))
    names = ", ".join(sorted(served)) or "none"
    raise ConfigError(f"Name a model: {base_url} has {names}.")
