"""Models that judge a query and a document together. ``load_scorer`` is the door to all.

No LlamaIndex but in what a remote model is sent; torch only for models that run here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmrag.errors import ConfigError
from mmrag.rerankers.base import Scorer
from mmrag.rerankers.prompts import PROMPTS, RerankPrompt, find_prompt

__all__ = ["PROMPTS", "RerankPrompt", "Scorer", "find_prompt", "load_scorer"]

_TRAINED = "qwen3-vl-reranker"


def load_scorer(
    model: str | Path,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    prompt: RerankPrompt | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    **options: Any,
) -> Scorer:
    """Load the model of a reranker.

    Args:
        model: a name on the hub or a folder. Qwen3-VL-Reranker scores as published; a chat MLLM
            is asked for one of two words. With ``base_url``, the name at a server.
        base_url: of an OpenAI-compatible server, up to ``/v1``.
        prompt: for models that are asked: a ``RerankPrompt``, the name of one in ``PROMPTS``, or
            a template with ``{query}`` and ``{document}``. By default it fits the query.
        device, dtype, revision: as in ``load_embedder``, for models that run here.
        options: what the kind of scorer takes: ``token_budget``, ``max_length``,
            ``max_image_tokens`` here; ``mode``, ``concurrency``, ``timeout``, ``retries``,
            ``deadline`` on a server.

    Raises: ModelError if it cannot be found or used, ConfigError for options that are unknown.
    """
    asked = None if prompt is None else find_prompt(prompt)
    if base_url is not None:
        if (device, dtype, revision) != ("auto", "auto", None):
            raise ConfigError("With base_url leave out device, dtype and revision.")
        remote = importlib.import_module("mmrag.rerankers.remote").RemoteScorer
        _check(remote, options)
        scorer: Scorer = remote(str(model), base_url, api_key=api_key, prompt=asked, **options)
        return scorer
    if api_key is not None:
        raise ConfigError("api_key is for a server: give its base_url.")
    return _load_local(model, asked, device, dtype, revision, options)


def _load_local(
    model: str | Path,
    prompt: RerankPrompt | None,
    device: str,
    dtype: str,
    revision: str | None,
    options: dict[str, Any],
) -> Scorer:
    from mmrag.modeling.chat import NATIVE
    from mmrag.modeling.loading import find_checkpoint, place, read_json
    from mmrag.rerankers.chat import load_chat_scorer
    from mmrag.rerankers.local import load_answer_scorer
    from mmrag.rerankers.qwen3_vl import load_qwen3_vl_scorer

    folder = find_checkpoint(model, revision)
    if is_trained(model, folder):
        if prompt is not None:
            raise ConfigError(
                f"{model} has a prompt of its own: leave out prompt, use instruction."
            )
        _check(load_qwen3_vl_scorer, options)
        return load_qwen3_vl_scorer(model, device=device, dtype=dtype, revision=revision, **options)
    native = read_json(folder / "config.json").get("model_type") in NATIVE
    load = load_answer_scorer if native else load_chat_scorer
    _check(load, options)
    loaded: Scorer = load(folder, place(device, dtype), name=str(model), prompt=prompt, **options)
    return loaded


def is_trained(model: str | Path, folder: Path) -> bool:
    """Whether a checkpoint is Qwen3-VL-Reranker, by its name or by what it says of itself."""
    from mmrag.modeling.loading import MARKER, read_json

    own = read_json(folder / MARKER).get("family", "")
    names = (str(model), folder.resolve().name, str(own).replace("_", "-"))
    return any(_TRAINED in name.lower() for name in names)


def _check(load: Callable[..., object], options: dict[str, Any]) -> None:
    fixed = {"name", "prompt", "device", "dtype", "revision", "api_key"}
    known = {
        parameter.name
        for parameter in inspect.signature(load).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    } - fixed
    if unknown := sorted(set(options) - known):
        able = ", ".join(sorted(known))
        raise ConfigError(f"{', '.join(unknown)}: unknown to this reranker; it takes {able}.")
