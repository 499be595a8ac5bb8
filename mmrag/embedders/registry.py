"""Which embedders there are, and loading one by name or from a folder.

A family is one file with a ``load_*`` function that returns a ``Backbone``, and one row of
``FAMILIES``; packages outside add theirs by entry points of the group ``mmrag.families``.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from mmrag.embedders.base import Calibration, Embedder
from mmrag.embedders.known import KNOWN, SENTENCE_TRANSFORMERS, KnownModel, find_known
from mmrag.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from mmrag.modeling.backbone import Backbone
    from mmrag.modeling.loading import DeviceMap, Placement, Quantization
    from mmrag.modeling.prompts import PromptStyle

__all__ = [
    "FAMILIES",
    "GROUP",
    "KNOWN",
    "Embedder",
    "FamilyOptions",
    "KnownModel",
    "all_families",
    "load_backbone",
    "load_embedder",
]

logger = logging.getLogger(__name__)

GROUP = "mmrag.families"
"""Entry points of this group name a family and the function that loads it."""

_HERE = "mmrag.embedders.families"
# family: module and function that load it
FAMILIES: dict[str, str] = {
    "gme": f"{_HERE}.gme:load_gme",
    "qwen3_vl": f"{_HERE}.qwen3_vl:load_qwen3_vl",
    "wemm": f"{_HERE}.wemm:load_wemm",
    "vlm2vec_qwen2vl": f"{_HERE}.vlm2vec_qwen2vl:load_vlm2vec_v1",
    "vlm2vec_v2": f"{_HERE}.vlm2vec_qwen2vl:load_vlm2vec_v2",
    "vlm2vec_llava_next": f"{_HERE}.llava_next:load_vlm2vec_llava_next",
    "vlm2vec_phi3v": f"{_HERE}.phi3v:load_phi3v",
    "mm_embed": f"{_HERE}.mm_embed:load_mm_embed",
    "e5_v": f"{_HERE}.llava_next:load_e5_v",
    "ops_mm": f"{_HERE}.qwen2_vl_recipes:load_ops_mm",
    "dse": f"{_HERE}.qwen2_vl_recipes:load_dse",
    "vdr": f"{_HERE}.qwen2_vl_recipes:load_vdr",
    "mcdse": f"{_HERE}.qwen2_vl_recipes:load_mcdse",
    "lamra": f"{_HERE}.qwen2_vl_recipes:load_lamra",
    "unite": f"{_HERE}.qwen2_vl_recipes:load_unite",
    "nomic_multimodal": f"{_HERE}.nomic_multimodal:load_nomic_multimodal",
    "moca": f"{_HERE}.moca:load_moca",
    "nano": f"{_HERE}.nano:load_nano",
}


class FamilyOptions(TypedDict, total=False):
    """What families take beyond the common arguments; each takes some of these.

    max_length: tokens of the longest input, visual ones included; longer texts are cut.
    min_image_tokens, max_image_tokens: bounds of one image, in visual tokens.
    keep_end: cut a long text before the prompt's end (``qwen3_vl``).
    style: ``demo`` or ``mmeb`` (the VLM2Vec families).
    squash: side of the square that images are resized to, in pixels (VLM2Vec).
    num_crops: most tiles of an image (``vlm2vec_phi3v``).
    batch_size: items in a batch (``sentence-transformers``).
    prompt_format: where the instruction goes, with ``{instruction}`` (``sentence-transformers``).
    """

    max_length: int
    min_image_tokens: int | None
    max_image_tokens: int | None
    keep_end: bool
    style: PromptStyle
    squash: int | None
    num_crops: int | None
    batch_size: int
    prompt_format: str | None


def all_families() -> dict[str, EntryPoint]:
    """Every family by its key: mmrag's own, and those that installed packages bring."""
    own = {key: EntryPoint(key, value, GROUP) for key, value in FAMILIES.items()}
    # Ours win: a package must not change the vectors of a known family.
    return {point.name: point for point in entry_points(group=GROUP)} | own


def load_embedder(
    name: str | Path,
    *,
    family: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    base: str | Path | None = None,
    download: bool = True,
    token_budget: int | None = None,
    workers: int | None = None,
    quantize: Quantization | None = None,
    device_map: DeviceMap | None = None,
    compile: bool | None = None,
    layers: int | None = None,
    **options: Unpack[FamilyOptions],
) -> Embedder:
    """Load an embedder by name or from a folder.

    Args:
        name: ``mmrag-nano``, a checkpoint folder, or a name on the hub; a checkpoint may be a
            LoRA adapter.
        family: the recipe to follow, a key of ``all_families()`` or ``sentence-transformers``; by
            default that of the known checkpoint, or what the folder says of itself.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``; several, as in
            ``cuda:0,cuda:1``, run the model in a process on each, see ``ParallelEmbedder``.
        dtype: ``auto``, ``float32``, ``bfloat16``, ``float16``.
        revision: branch, tag or commit on the hub.
        base: folder or name of the model that an adapter sits on, instead of the one it states.
        download: False takes from the hub only what was downloaded before.
        token_budget: tokens of a padded batch, visual ones included.
        workers: threads that prepare texts and images; None: one for each core, at most 16.
        quantize: ``8bit``, ``4bit`` (NF4), or ``4bit-double``, which also quantises the scales of
            the blocks (QLoRA, arXiv 2305.14314), by bitsandbytes; None: as ``dtype`` says.
        device_map: ``auto`` spreads a model over all devices; None: one device.
        compile: True compiles the model's blocks at the first large batch, which takes half a
            minute and makes pages faster; False never; None: on CUDA, in long runs. On CUDA short
            texts are also recorded and replayed, unless it is False.
        layers: run this many layers of the decoder alone, for models trained so (2-D
            Matryoshka); the vectors then have the width that was trained with them.
        options: what the family takes; see ``FamilyOptions``.

    Raises:
        ModelError: If it cannot be found or does not load exactly.
        ConfigError: For options that are unknown, and for layers that the model does not have
            or was not trained for.

    >>> embedder = load_embedder("mmrag-nano", device="cpu", max_length=512)
    >>> embedder.encode(["a page about wind energy"]).shape
    (1, 384)
    """
    if "," in device:
        from mmrag.embedders.parallel import ParallelEmbedder

        return ParallelEmbedder(
            str(name),
            device.split(","),
            family=family,
            dtype=dtype,
            revision=revision,
            base=base,
            download=download,
            token_budget=token_budget,
            workers=workers,
            quantize=quantize,
            device_map=device_map,
            compile=compile,
            layers=layers,
            **options,
        )
    from mmrag.embedders.depth import cut_depth
    from mmrag.embedders.local import LocalEmbedder
    from mmrag.modeling.checkpoints import fingerprint
    from mmrag.modeling.fast_cpu import use_fast_arithmetic
    from mmrag.modeling.loading import place

    folders = find_folders(name, revision, base, download)
    chosen = _choose(name, folders, family)
    placement = place(device, dtype, quantize=quantize, device_map=device_map, compile=compile)
    if chosen == SENTENCE_TRANSFORMERS:
        if (token_budget, workers, compile, layers) != (None, None, None, None):
            raise ConfigError(
                f"family {chosen!r} takes batch_size, no token_budget, workers, compile or layers."
            )
        return _load_sentence_transformers(name, folders, placement, options)
    backbone = _load(folders, chosen, placement, options)
    about, known = read_marker(folders), find_known(str(name))
    cut = cut_depth(backbone, layers, about, str(name))
    on_cpu = placement.device.type == "cpu" and placement.device_map is None
    if dtype == "auto" and on_cpu and about.get("fast_on_cpu"):
        # No part of the fingerprint: a collection may be asked on another processor.
        use_fast_arithmetic(backbone.model)
    traits = traits_of(folders, about, known)
    if cut:
        traits["matryoshka_dims"] = cut.trained
    depth = {"layers": layers} if cut else {}
    moves = {"dtype": str(placement.dtype), "quantize": quantize, **backbone.settings(), **depth}
    return LocalEmbedder(
        backbone,
        name=str(name),
        fingerprint=fingerprint(folders, moves),
        token_budget=token_budget,
        dim=cut.dim if cut else None,
        workers=workers,
        compile=placement.compile,
        **traits,
    )


def load_backbone(
    name: str | Path,
    *,
    family: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    base: str | Path | None = None,
    quantize: Quantization | None = None,
    **options: Unpack[FamilyOptions],
) -> Backbone:
    """Load the Backbone alone, as training does; arguments and errors as in ``load_embedder``."""
    from mmrag.modeling.loading import place

    folders = find_folders(name, revision, base)
    placement = place(device, dtype, quantize=quantize)
    return _load(folders, _choose(name, folders, family), placement, options)


def find_folders(
    name: str | Path,
    revision: str | None = None,
    base: str | Path | None = None,
    download: bool = True,
) -> list[Path]:
    """Folder of the checkpoint, or those of the base model and of the adapter on it.

    Raises:
        ConfigError: For a ``base`` of a checkpoint that is no adapter.
    """
    from mmrag.modeling.checkpoints import find_base, find_checkpoint, is_adapter

    folder = find_checkpoint(name, revision, download=download)
    if is_adapter(folder):
        known = find_known(str(name))
        stated = known.base if known else None
        return [find_base(folder, base, stated, download=download), folder]
    if base is not None:
        raise ConfigError(f"base={str(base)!r} is for adapters, and {name} is none: leave it out.")
    return [folder]


def read_marker(folders: list[Path]) -> dict[str, Any]:
    """What the folders say of themselves in mmrag's own file."""
    from mmrag.modeling.checkpoints import MARKER, read_json

    return {key: value for folder in folders for key, value in read_json(folder / MARKER).items()}


def _choose(name: str | Path, folders: list[Path], family: str | None) -> str:
    """The recipe asked for, the folder's own, or that of the known checkpoint. Never a guess."""
    from mmrag.modeling.checkpoints import gives_tokens, read_json

    known = find_known(str(name))
    if known is not None and known.non_commercial:
        logger.warning("%s: its license (%s) forbids commercial use.", name, known.license)
    own: str | None = read_marker(folders).get("family") or (known.family if known else None)
    if family or own:
        return family or own or ""
    folder = folders[-1]
    if gives_tokens(folder):
        raise ModelError(
            f"{name} gives one vector for each token: pass it as late= or --late, beside an "
            "embedder with one vector for a page."
        )
    if len(folders) == 1 and (folder / "modules.json").is_file():
        logger.info("%s: a sentence-transformers model; loaded as that.", name)
        return SENTENCE_TRANSFORMERS
    # No guess by architecture: checkpoints of one are trained with different prompts, and with
    # another prompt every vector is wrong without any sign of it.
    model_type = read_json(folders[0] / "config.json").get("model_type", "unknown")
    raise ModelError(
        f"{name}: this checkpoint (model_type {model_type}) is not among the known ones and does "
        f"not say which recipe it follows. Pass family=, one of {', '.join(all_families())}, or "
        f"{SENTENCE_TRANSFORMERS}."
    )


class Traits(TypedDict):
    """What is known of an embedder besides its vectors; see ``LocalEmbedder``."""

    prefers_text: bool
    prefers_passages: bool
    matryoshka_dims: tuple[int, ...]
    calibration: Calibration | None


def traits_of(folders: list[Path], about: Mapping[str, Any], known: KnownModel | None) -> Traits:
    """What a checkpoint says of itself, else the table of known ones.

    about: what ``read_marker`` gives. Raises ConfigError for a calibration that is not valid.
    """
    from mmrag.modeling.checkpoints import read_json

    calibration = known.calibration if known else None
    if "calibration" in about:
        own = Calibration.from_dict(about["calibration"])
        calibration = own.over(calibration) if calibration else own
    # WeMM publishes them in its config.json, under a name of its own.
    published = read_json(folders[0] / "config.json").get("matryoshka_dimensions")
    dims = about.get("matryoshka_dims") or published
    return Traits(
        prefers_text=bool(about.get("prefers_text", False)),
        prefers_passages=bool(about.get("prefers_passages", False)),
        matryoshka_dims=tuple(dims or (known.matryoshka_dims if known else ())),
        calibration=calibration,
    )


def _load_sentence_transformers(
    name: str | Path, folders: list[Path], placement: Placement, options: Mapping[str, Any]
) -> Embedder:
    from mmrag.embedders.sentence_transformers import load_sentence_transformers as load

    if len(folders) > 1:
        raise ConfigError(f"family={SENTENCE_TRANSFORMERS!r} takes no adapters: merge it first.")
    _check_options(load, SENTENCE_TRANSFORMERS, options)
    embedder = load(folders[0], placement, str(name), **options)
    traits = traits_of(folders, read_marker(folders), find_known(str(name)))
    embedder.calibration = traits["calibration"]
    embedder.prefers_text = traits["prefers_text"]
    embedder.prefers_passages = traits["prefers_passages"]
    return embedder


def _load(
    folders: list[Path], family: str, placement: Placement, options: Mapping[str, Any]
) -> Backbone:
    if family == SENTENCE_TRANSFORMERS:
        raise ConfigError(f"family={family!r} embeds only, through load_embedder.")
    if (point := all_families().get(family)) is None:
        able = ", ".join([*all_families(), SENTENCE_TRANSFORMERS])
        raise ConfigError(f"family={family!r} is not known: use one of {able}.")
    load: Callable[..., Backbone] = point.load()
    # A checkpoint made here keeps the options it was trained with in mmrag.json.
    own = {key: value for key, value in read_marker(folders).items() if key in _options(load)}
    if "modalities" in own:
        own["modalities"] = frozenset(own["modalities"])
    _check_options(load, family, options)
    # Merging into 4 or 8 bits would round the adapter away.
    if len(folders) > 1 and placement.quantize is not None:
        raise ConfigError("quantize= does not work with an adapter: export it merged first.")
    backbone = load(folders[0], placement, **{**own, **options})
    for adapter in folders[1:]:
        from mmrag.modeling.adapters import merge_adapter

        merge_adapter(backbone.model, adapter)
    return backbone


def _check_options(load: Callable[..., Any], family: str, options: Mapping[str, Any]) -> None:
    able = _options(load)
    if unknown := sorted(set(options) - able):
        raise ConfigError(
            f"{', '.join(unknown)}: unknown to family {family!r}; it takes "
            f"{', '.join(sorted(able))}."
        )


def _options(load: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(load).parameters.values()
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
