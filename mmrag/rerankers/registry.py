"""Which rerankers there are, and loading one by name or from a folder.

A kind is one function that loads a Scorer, and one row of ``RERANKERS``; packages outside add
theirs by entry points of the group ``mmrag.rerankers``. torch only for models that run here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

from mmrag.errors import ConfigError
from mmrag.rerankers.base import Scorer
from mmrag.rerankers.prompts import RerankPrompt, find_prompt

if TYPE_CHECKING:
    from mmrag.modeling.loading import DeviceMap, Quantization

GROUP = "mmrag.rerankers"
"""Entry points of this group name a kind of reranker and the function that loads it."""

# kind: module and function that load it, called as ``load_answer_scorer`` is
RERANKERS: dict[str, str] = {
    "qwen3_vl_reranker": "mmrag.rerankers.qwen3_vl:load_qwen3_vl_scorer",
    "qwen_chat": "mmrag.rerankers.qwen:load_answer_scorer",
    "chat": "mmrag.rerankers.chat:load_chat_scorer",
    "cross_encoder": "mmrag.rerankers.cross_encoder:load_cross_encoder",
}


class ScorerOptions(TypedDict, total=False):
    """What scorers take beyond the common arguments; each kind takes some of these.

    Here: token_budget (tokens of a padded batch), workers (threads that prepare), max_length
    (tokens of a pair), min_image_tokens, max_image_tokens (visual tokens of one image).
    A chat model on a server: mode, concurrency, timeout, retries, deadline, max_tokens, images,
    max_pixels, max_bytes; see ``RemoteScorer``. A ``/rerank`` endpoint: logits, images, timeout,
    retries, deadline; see ``RerankEndpoint``.
    """

    token_budget: int | None
    workers: int | None
    max_length: int
    min_image_tokens: int | None
    max_image_tokens: int | None
    mode: Literal["logprobs", "schema", "words"] | None
    concurrency: int
    timeout: float
    retries: int
    deadline: float | None
    max_tokens: int
    images: bool
    logits: bool
    max_pixels: int
    max_bytes: int


def all_rerankers() -> dict[str, EntryPoint]:
    """Every kind by its key: mmrag's own, and those that installed packages bring."""
    own = {key: EntryPoint(key, value, GROUP) for key, value in RERANKERS.items()}
    # Ours win: a package must not change what a known kind does.
    return {point.name: point for point in entry_points(group=GROUP)} | own


def load_scorer(
    model: str | Path,
    *,
    kind: str | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    prompt: RerankPrompt | str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    quantize: Quantization | None = None,
    device_map: DeviceMap | None = None,
    **options: Unpack[ScorerOptions],
) -> Scorer:
    """Load the model of a reranker.

    Args:
        model: a name on the hub or a folder. Qwen3-VL-Reranker scores as published; a chat MLLM
            is asked for one of two words; a cross-encoder of sentence-transformers reads text
            alone. With ``base_url``, the name at a server.
        kind: a key of ``all_rerankers()``; None: as the checkpoint says.
        base_url: of an OpenAI-compatible server, up to ``/v1``, whose chat model is asked; or
            of an endpoint in Jina's and Cohere's form, up to ``/rerank``. None: the model runs
            here.
        api_key: sent to that server as a bearer token.
        prompt: for models that are asked: a ``RerankPrompt``, the name of one in ``PROMPTS``, or
            a template with ``{query}`` and ``{document}``. None: it fits the query.
        device: as in ``load_embedder``.
        dtype: as in ``load_embedder``.
        revision: as in ``load_embedder``.
        quantize: as in ``load_embedder``.
        device_map: as in ``load_embedder``.
        options: what the kind of scorer takes; see ``ScorerOptions``.

    Raises:
        ModelError: If it cannot be found or used.
        ConfigError: For options that are unknown.

    >>> scorer = load_scorer("Qwen/Qwen3-VL-Reranker-2B", dtype="bfloat16")  # doctest: +SKIP
    >>> endpoint = load_scorer("rerank-v4.0-fast", base_url="https://api.cohere.com/v2/rerank")
    >>> endpoint.name
    'rerank-v4.0-fast'
    """
    asked = None if prompt is None else find_prompt(prompt)
    here = (device, dtype, revision, quantize, device_map, kind)
    if base_url is not None:
        if here != ("auto", "auto", None, None, None, None):
            raise ConfigError(
                "With base_url leave out device, dtype, revision, quantize, device_map and kind."
            )
        return _at_server(str(model), base_url, api_key, asked, options)
    if api_key is not None:
        raise ConfigError("api_key is for a server: give its base_url.")
    from mmrag.modeling.checkpoints import MARKER, find_checkpoint, read_json
    from mmrag.modeling.loading import place

    folder = find_checkpoint(model, revision)
    known, chosen = all_rerankers(), kind or kind_of(str(model), folder)
    if chosen not in known:
        raise ConfigError(f"kind={chosen!r} is not known: use one of {', '.join(known)}.")
    load: Callable[..., Scorer] = known[chosen].load()
    _check(load, options)
    about = read_json(folder / MARKER)
    own: dict[str, Any] = {}
    if about.get("family") == chosen:
        # A checkpoint made here keeps what it was trained with in mmrag.json.
        own = {key: value for key, value in about.items() if key in _options(load)}
        if asked is None and "prompt" in about:
            words = tuple(about["prompt"]["answers"])
            asked = RerankPrompt(**{**about["prompt"], "answers": words})
    placement = place(device, dtype, quantize=quantize, device_map=device_map)
    return load(folder, placement, name=str(model), prompt=asked, **{**own, **options})


def _at_server(
    model: str,
    base_url: str,
    api_key: str | None,
    prompt: RerankPrompt | None,
    options: Mapping[str, Any],
) -> Scorer:
    """What asks a server: its ``/rerank`` endpoint by the address, else its chat model."""
    if not base_url.rstrip("/").endswith("/rerank"):
        from mmrag.rerankers.remote import RemoteScorer

        _check(RemoteScorer, options)
        return RemoteScorer(model, base_url, api_key=api_key, prompt=prompt, **options)
    from mmrag.rerankers.endpoint import RerankEndpoint

    _check(RerankEndpoint, options)
    if prompt is not None:
        raise ConfigError("A /rerank endpoint is not asked in words: leave out prompt.")
    return RerankEndpoint(model, base_url.rstrip("/"), api_key=api_key, **options)


def kind_of(name: str, folder: Path) -> str:
    """The kind of a checkpoint: by its own word, its published name, or its architecture."""
    from mmrag.modeling.chat import NATIVE
    from mmrag.modeling.checkpoints import MARKER, read_json

    own = str(read_json(folder / MARKER).get("family", ""))
    if own in all_rerankers():
        return own
    # Its config is that of a chat model; only the name tells that it was trained to judge.
    if any("qwen3-vl-reranker" in part.lower() for part in (name, folder.resolve().name)):
        return "qwen3_vl_reranker"
    config = read_json(folder / "config.json")
    saved_as = read_json(folder / "config_sentence_transformers.json").get("model_type")
    heads = ("ForSequenceClassification", "ForCausalLM")
    if saved_as == "CrossEncoder" or (config.get("architectures") or [""])[0].endswith(heads):
        return "cross_encoder"
    return "qwen_chat" if config.get("model_type") in NATIVE else "chat"


def _options(load: Callable[..., object]) -> set[str]:
    # Given by load_scorer itself, and no options of the user.
    fixed = {"name", "prompt", "api_key"}
    parameters = inspect.signature(load).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY} - fixed


def _check(load: Callable[..., object], options: Mapping[str, Any]) -> None:
    known = _options(load)
    if unknown := sorted(set(options) - known):
        able = ", ".join(sorted(known))
        raise ConfigError(f"{', '.join(unknown)}: unknown to this reranker; it takes {able}.")
