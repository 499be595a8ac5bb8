"""Writing a checkpoint that mmrag, transformers and sentence-transformers all load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mmrag.errors import ModelError
from mmrag.modeling.backbone import Backbone
from mmrag.modeling.checkpoints import MARKER, read_json

# Weights and their index are written anew; everything else of the source describes them.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")
# Written below; a README of the source describes another model.
_OWN = ("config.json", "modules.json", MARKER, "README.md")

_ST_MODULES = [
    {
        "idx": 0,
        "name": "0",
        "path": "",
        "type": "mmrag.embedders.st_module.UniversalModule",
    },
    {
        "idx": 1,
        "name": "1",
        "path": "1_Normalize",
        "type": "sentence_transformers.models.Normalize",
    },
]


def save_checkpoint(
    backbone: Backbone,
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    marker: dict[str, Any] | None = None,
) -> None:
    """Write the weights as they stand, with the tokenizer and settings of ``source``.

    Args:
        source: folder that the backbone was loaded from.
        dtype: type to store; by default the one the weights have.
        marker: what ``mmrag.json`` says, over what the source's says.

    Raises:
        ModelError: If the target is the source.
    """
    save_model(backbone.model, source, target, dtype)
    own = {"family": backbone.family, **read_json(source / MARKER), **(marker or {})}
    own["modalities"] = sorted(backbone.modalities)
    (target / MARKER).write_text(json.dumps(own, indent=2) + "\n")
    (target / "modules.json").write_text(json.dumps(_ST_MODULES, indent=2) + "\n")
    (target / "1_Normalize").mkdir(exist_ok=True)


def save_model(model: Any, source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Write a model's weights as they stand, with what describes them in ``source``.

    Args:
        dtype: type to store; by default the one the weights have.

    Raises:
        ModelError: If the target is the source.
    """
    if target.resolve() == source.resolve():
        raise ModelError(f"{target}: a checkpoint cannot be written over the one it comes from.")
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(_WEIGHTS) and path.name not in _OWN:
            shutil.copyfile(path, target / path.name)
    # A part of the model may be described in a folder of its own, as in MM-Embed.
    for path in source.glob("*/config.json"):
        (target / path.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(path, target / path.parent.name / path.name)
    weights = None
    if dtype is not None:
        # A converted copy: the model itself may go on training in its own dtype.
        weights = {key: value.to(dtype) for key, value in model.state_dict().items()}
    model.save_pretrained(target, state_dict=weights)
    if not type(model).__module__.startswith("transformers."):
        # A model built from parts is described by the published configuration alone.
        shutil.copyfile(source / "config.json", target / "config.json")
    if dtype is not None:
        config = read_json(target / "config.json")
        config["dtype"] = str(dtype).removeprefix("torch.")
        (target / "config.json").write_text(json.dumps(config, indent=2))
