"""Merge fine-tuned checkpoints or adapters of one base into one model.

    python -m mmrag_recipes merge medical legal --base mmrag-nano --out merged
    python -m mmrag_recipes merge medical legal --base mmrag-nano --out merged --method ties

All methods combine task vectors, what each model added to the weights of the base:
``mmrag_recipes.task_vectors`` has the arithmetic, ``mmrag_recipes.merge_fit`` learns coefficients
(arXiv 2410.15035).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrag.embedders import load_backbone
from mmrag.embedders.registry import find_folders, read_marker
from mmrag.embedders.saving import save_checkpoint
from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.backbone import Backbone
from mmrag.modeling.checkpoints import find_checkpoint, fingerprint, is_adapter
from mmrag.modeling.loading import check_keys
from mmrag_recipes.config_models import MergeConfig
from mmrag_recipes.export import check_in_fresh_process, probe_vectors
from mmrag_recipes.merge_fit import add_vectors, learn
from mmrag_recipes.task_vectors import TaskVector, slerp, task_vector, ties, weighted_sum

logger = logging.getLogger("mmrag_recipes")


@dataclass(frozen=True)
class Parent:
    """A model that is merged: its name, its fingerprint, and what it adds to the base."""

    name: str
    fingerprint: str
    vector: dict[str, Tensor]


def merge(options: MergeConfig) -> Path:
    """Merge the models, write the checkpoint folder, and compare it in a fresh process.

    Raises:
        ConfigError: If the base is an adapter.
        ModelError: For a model that is no fine-tuning of the base, or whose weights are not finite.
    """
    folders = find_folders(options.base)
    if len(folders) > 1:
        raise ConfigError(f"base={options.base!r} is an adapter: merge it into its base first.")
    if any(find_checkpoint(name).resolve() == options.out.resolve() for name in options.models):
        raise ConfigError(f"out={str(options.out)!r} is one of the models: give another folder.")
    backbone = _load(options.base, options, None)
    weights = weights_of(backbone)
    parents = [load_parent(name, backbone, weights, options) for name in options.models]
    added, about = combined(backbone, parents, options)
    add_vectors(dict(backbone.model.named_parameters()), weights, added)
    marker = {
        **read_marker(folders),
        **options.limits,
        "merged": {
            "method": options.method,
            "base": {"name": options.base, "fingerprint": _fingerprint(folders, backbone)},
            "parents": [{"name": p.name, "fingerprint": p.fingerprint} for p in parents],
            **about,
        },
    }
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    save_checkpoint(backbone, folders[0], options.out, dtype=kinds[options.dtype], marker=marker)
    (options.out / "README.md").write_text(card(options.out.name, marker), encoding="utf-8")
    check_in_fresh_process(options.out, probe_vectors(options.out, backbone))
    return options.out


def _load(name: str, options: MergeConfig, base: str | None) -> Backbone:
    backbone = load_backbone(
        name,
        family=options.family,
        device=options.device,
        # Differences of half-precision weights would keep few digits.
        dtype="float32",
        base=base,
        **options.limits,
    )
    backbone.model.eval()
    return backbone


def weights_of(backbone: Backbone) -> dict[str, Tensor]:
    """A copy of all weights by name; tied ones are there once."""
    return {name: value.detach().clone() for name, value in backbone.model.named_parameters()}


def load_parent(
    name: str, base: Backbone, weights: Mapping[str, Tensor], options: MergeConfig
) -> Parent:
    """Load one of the models and take its task vector; an adapter goes on the given base.

    Raises:
        ModelError: If its family, settings, weights or shapes are not those of the base.
    """
    under = options.base if is_adapter(find_checkpoint(name)) else None
    folders = find_folders(name, base=under)
    backbone = _load(name, options, under)
    tuned = {key: value.detach() for key, value in backbone.model.named_parameters()}
    check_alike(folders[-1], base, backbone, weights, tuned)
    return Parent(name, _fingerprint(folders, backbone), task_vector(weights, tuned))


def check_alike(
    folder: Path,
    base: Backbone,
    other: Backbone,
    weights: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
) -> None:
    """Raise ModelError if a model cannot have been fine-tuned from the base."""
    if other.family != base.family:
        raise ModelError(f"{folder}: its family is {other.family}, that of the base {base.family}.")
    ours, theirs = base.settings(), other.settings()
    differing = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
    if differing:
        shown = "; ".join(f"{key}: {theirs.get(key)}, not {ours.get(key)}" for key in differing)
        raise ModelError(
            f"{folder}: its settings differ from those of the base ({shown}), and a merged model "
            "has one set of them. Set them for all with limits."
        )
    check_keys(
        folder, missing=weights.keys() - tuned.keys(), unexpected=tuned.keys() - weights.keys()
    )
    shapes = [
        f"{name} {tuple(tuned[name].shape)}, not {tuple(weights[name].shape)}"
        for name in weights
        if tuned[name].shape != weights[name].shape
    ]
    if shapes:
        raise ModelError(f"{folder}: weights of another shape: {', '.join(shapes[:8])}.")


def _fingerprint(folders: Sequence[Path], backbone: Backbone) -> str:
    return fingerprint(folders, backbone.settings())


def combined(
    backbone: Backbone, parents: Sequence[Parent], options: MergeConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the merged model adds to the base, and how it was found, for the checkpoint to state."""
    vectors: list[TaskVector] = [parent.vector for parent in parents]
    equal = [1.0] * len(vectors)
    given = list(options.weights or equal)
    # Shares add up to 1, so that the mean of n models does not move n times as far.
    shares = [weight / sum(given) for weight in given]
    match options.method:
        case "linear":
            return weighted_sum(vectors, shares), {"weights": shares}
        case "task":
            return weighted_sum(vectors, given), {"weights": given}
        case "slerp":
            return slerp(vectors[0], vectors[1], shares[1]), {"weights": shares}
        case "ties":
            about = {"weights": given, "density": options.density}
            return ties(vectors, given, options.density), about
        case "learned":
            assert options.learn is not None
            coefficients = learn(backbone, vectors, options, options.learn)
            return coefficients.apply(vectors), {"coefficients": coefficients.by_group()}


def card(name: str, marker: Mapping[str, Any]) -> str:
    """Write the card: the models that were merged, and how."""
    about = marker["merged"]
    lines = [f"# {name}", "", f"Merged from fine-tunings of `{about['base']['name']}` with mmrag."]
    lines += ["", f"Method: {about['method']}.", "", "| model | fingerprint |", "|---|---|"]
    lines += [f"| {one['name']} | {one['fingerprint']} |" for one in about["parents"]]
    numbers = {key: about[key] for key in ("weights", "density", "coefficients") if key in about}
    lines += ["", "```json", json.dumps(numbers, indent=1), "```", "", "## Use", "", "```python"]
    lines += ["from mmrag import UniversalEmbedding", ""]
    lines += [f'embed_model = UniversalEmbedding("{name}")', "```", ""]
    return "\n".join(lines)


def run(options: MergeConfig) -> None:
    """Command: merge models."""
    print(f"merged: {merge(options)}")
    about = json.loads((options.out / "mmrag.json").read_text(encoding="utf-8"))["merged"]
    print(json.dumps(about, indent=1))
