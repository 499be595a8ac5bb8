"""``--llm`` and its kin: the chat model that answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mmrag.llms.endpoint import EndpointLLM
    from mmrag.llms.local import LocalLLM

LLMOption = Annotated[
    str | None,
    typer.Option(
        "--llm",
        metavar="MODEL",
        envvar="MMRAG_LLM",
        help="Chat model at an OpenAI-compatible server (key: OPENAI_API_KEY), or the folder of "
        "a checkpoint to run here. Without one, the best sentences are quoted.",
    ),
]
BaseURLOption = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        metavar="URL",
        envvar=["OPENAI_BASE_URL", "OPENAI_API_BASE"],
        help="Address of the server, up to /v1. Default: OpenAI's.",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--context-window",
        min=512,
        help="Context window of the model in tokens. Default: the server is asked.",
    ),
]
NoImagesOption = Annotated[
    bool, typer.Option("--no-images", help="Send text only, for models that take no images.")
]


def chat_model(
    model: str | None, base_url: str | None, window: int | None
) -> EndpointLLM | LocalLLM | None:
    """The model of --llm and --base-url; None without either."""
    if model is None and base_url is None:
        return None
    # A folder is a checkpoint only without an address: servers may call a model by its path.
    if model is not None and base_url is None and Path(model).is_dir():
        from mmrag.llms.local import LocalLLM

        return LocalLLM(model, context_window=window)
    from mmrag.llms.endpoint import open_llm

    key = os.environ.get("OPENAI_API_KEY")
    return open_llm(model, base_url, key, context_window=window)
