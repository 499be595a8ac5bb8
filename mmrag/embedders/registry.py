"""Which embedders there are, and loading one by name or from a folder.

A family is one file with a ``load_*`` function that returns a ``Backbone``, and one row of
``FAMILIES``.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrag.embedders.base import Embedder
from mmrag.embedders.known import KNOWN, SENTENCE_TRANSFORMERS, KnownModel, find_known
from mmrag.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mmrag.modeling.backbone import Backbone

__all__ = ["FAMILIES", "KNOWN", "Embedder", "KnownModel", "load_backbone", "load_embedder"]

logger = logging.getLogger(__name__)

# family: module and function that load it
FAMILIES: dict[str, tuple[str, str]] = {
    "gme": ("gme", "load_gme"),
    "qwen3_vl": ("qwen3_vl", "load_qwen3_vl"),
    "wemm": ("wemm", "load_wemm"),
    "vlm2vec_qwen2vl": ("vlm2vec_qwen2vl", "load_vlm2vec_v1"),
    "vlm2vec_v2": ("vlm2vec_qwen2vl", "load_vlm2vec_v2"),
    "vlm2vec_llava_next": ("llava_next", "load_vlm2vec_llava_next"),
    "vlm2vec_phi3v": ("phi3v", "load_phi3v"),
    "mm_embed": ("mm_embed", "load_mm_embed"),
    "e5_v": ("llava_next", "load_e5_v"),
    "ops_mm": ("qwen2_vl_recipes", "load_ops_mm"),
    "dse": ("qwen2_vl_recipes", "load_dse"),
    "lamra": ("qwen2_vl_recipes", "load_lamra"),
    "unite": ("qwen2_vl_recipes", "load_unite"),
    "nomic_multimodal": ("nomic_multimodal", "load_nomic_multimodal"),
    "moca": ("moca", "load_moca"),
    "nano": ("nano", "load_nano"),
}

# What a folder is taken for when nothing else tells: its config's model_type.
_BY_MODEL_TYPE = {
    "qwen2_vl": "gme",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5": "wemm",
    "phi3_v": "vlm2vec_phi3v",
}


def load_embedder(
    name: str | Path,
    *,
    family: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    base: str | Path | None = None,
    token_budget: int | None = None,
    **limits: Any,
) -> Embedder:
    """Load an embedder by name or from a folder.

    Args:
        name: ``mmrag-nano``, a checkpoint folder, or a name on the hub; a checkpoint may be a
            LoRA adapter.
        family: the recipe to follow, a key of ``FAMILIES`` or ``sentence-transformers``; by
            default that of the known checkpoint, or what the folder says of itself.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``.
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16``.
        revision: branch, tag or commit on the hub.
        base: folder or name of the model that an adapter sits on, instead of the one it states.
        token_budget: tokens of a padded batch, visual ones included.
        limits: what the family takes: ``max_length``, ``min_image_tokens``,
            ``max_image_tokens`` and the like.

    Raises: ModelError if it cannot be found or does not load exactly, ConfigError for options
        that are unknown.
    """
    from mmrag.embedders.local import LocalEmbedder
    from mmrag.modeling.fast_cpu import use_fast_arithmetic
    from mmrag.modeling.loading import fingerprint

    folders = find_folders(name, revision, base)
    chosen = _choose(name, folders, family)
    if chosen == SENTENCE_TRANSFORMERS:
        return _load_sentence_transformers(name, folders, device, dtype, token_budget, limits)
    backbone = _load(folders, chosen, device, dtype, limits)
    marker = read_marker(folders)
    on_cpu = next(backbone.model.parameters()).device.type == "cpu"
    if dtype == "auto" and on_cpu and marker.get("fast_on_cpu"):
        use_fast_arithmetic(backbone.model)
    return LocalEmbedder(
        backbone,
        name=str(name),
        fingerprint=fingerprint(folders, backbone.settings()),
        token_budget=token_budget,
        prefers_text=bool(marker.get("prefers_text", False)),
        prefers_passages=bool(marker.get("prefers_passages", False)),
    )


def load_backbone(
    name: str | Path,
    *,
    family: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    base: str | Path | None = None,
    **limits: Any,
) -> Backbone:
    """Load the Backbone alone, as training does; arguments as in ``load_embedder``."""
    folders = find_folders(name, revision, base)
    return _load(folders, _choose(name, folders, family), device, dtype, limits)


def find_folders(
    name: str | Path, revision: str | None = None, base: str | Path | None = None
) -> list[Path]:
    """Folder of the checkpoint, or those of the base model and of the adapter on it."""
    from mmrag.modeling.loading import find_base, find_checkpoint, is_adapter

    folder = find_checkpoint(name, revision)
    if is_adapter(folder):
        known = find_known(str(name))
        return [find_base(folder, base, known.base if known else None), folder]
    if base is not None:
        raise ConfigError(f"base={str(base)!r} is for adapters, and {name} is none: leave it out.")
    return [folder]


def read_marker(folders: list[Path]) -> dict[str, Any]:
    """What the folders say of themselves in mmrag's own file."""
    from mmrag.modeling.loading import MARKER, read_json

    return {key: value for folder in folders for key, value in read_json(folder / MARKER).items()}


def _choose(name: str | Path, folders: list[Path], family: str | None) -> str:
    """The recipe asked for, the folder's own, that of the known checkpoint, or a guess."""
    known = find_known(str(name))
    if known is not None and known.non_commercial:
        logger.warning("%s: its licence (%s) forbids commercial use.", name, known.licence)
    own: str | None = read_marker(folders).get("family") or (known.family if known else None)
    return family or own or _guess(folders)


def _load_sentence_transformers(
    name: str | Path,
    folders: list[Path],
    device: str,
    dtype: str,
    token_budget: int | None,
    limits: dict[str, Any],
) -> Embedder:
    from mmrag.embedders.sentence_transformers import load_sentence_transformers as load
    from mmrag.modeling.loading import place

    if len(folders) > 1:
        raise ConfigError(f"family={SENTENCE_TRANSFORMERS!r} takes no adapters: merge it first.")
    if token_budget is not None:
        raise ConfigError(f"token_budget: family {SENTENCE_TRANSFORMERS!r} takes batch_size.")
    _check_options(load, SENTENCE_TRANSFORMERS, limits)
    return load(folders[0], place(device, dtype), str(name), **limits)


def _check_options(load: Callable[..., Any], family: str, limits: dict[str, Any]) -> None:
    unknown = sorted(set(limits) - _options(load))
    if unknown:
        able = ", ".join(sorted(_options(load)))
        raise ConfigError(f"{', '.join(unknown)}: unknown to family {family!r}; it takes {able}.")


def _load(
    folders: list[Path], family: str, device: str, dtype: str, limits: dict[str, Any]
) -> Backbone:
    from mmrag.modeling.loading import place

    load = _loader(family)
    own = {key: value for key, value in read_marker(folders).items() if key in _options(load)}
    if "modalities" in own:
        own["modalities"] = frozenset(own["modalities"])
    _check_options(load, family, limits)
    backbone = load(folders[0], place(device, dtype), **{**own, **limits})
    for adapter in folders[1:]:
        from mmrag.modeling.adapters import merge_adapter

        merge_adapter(backbone.model, adapter)
    return backbone


def _loader(family: str) -> Callable[..., Backbone]:
    if family == SENTENCE_TRANSFORMERS:
        raise ConfigError(f"family={family!r} embeds only, through load_embedder.")
    if family not in FAMILIES:
        able = ", ".join([*FAMILIES, SENTENCE_TRANSFORMERS])
        raise ConfigError(f"family={family!r} is not known: use one of {able}.")
    module, function = FAMILIES[family]
    loader: Callable[..., Backbone] = getattr(
        importlib.import_module(f"mmrag.embedders.families.{module}"), function
    )
    return loader


def _options(load: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(load).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _guess(folders: list[Path]) -> str:
    """Take a folder without a name or marker by its architecture, and say so."""
    from mmrag.modeling.loading import read_json

    folder = folders[-1]
    if len(folders) > 1:
        raise ModelError(
            f"{folder}: cannot tell which recipe this adapter follows. Pass family=, one of "
            f"{', '.join(FAMILIES)}."
        )
    config = read_json(folder / "config.json")
    model_type = config.get("model_type", "")
    family = _BY_MODEL_TYPE.get(model_type)
    if family is None and (folder / "modules.json").is_file():
        family = SENTENCE_TRANSFORMERS
    if family is None:
        raise ModelError(
            f"{folder}: cannot tell which recipe this checkpoint follows (model_type "
            f"{model_type!r}). Pass family=, one of {', '.join(FAMILIES)}."
        )
    logger.warning("%s: does not say its recipe; taken for family %r.", folder, family)
    return family
