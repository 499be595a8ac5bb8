"""What a frozen vision tower gives for each image, kept on disk over steps, passes and runs.

A file is named by what goes into the tower: the pixels as the model sees them, how they are
normalised, the weights of the checkpoint, and the type that it computes in. So an image that was
changed, cut to another size or augmented has a file of its own.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from mmrag.embedders.registry import find_folders
from mmrag.errors import ConfigError
from mmrag.modeling.checkpoints import fingerprint
from mmrag.modeling.image_rule import ImageRule
from mmrag.modeling.qwen_vl import cells
from mmrag.modeling.vision import tower_output
from mmrag_recipes import distributed
from mmrag_recipes.config import FeaturesConfig, RunConfig
from mmrag_recipes.row_file import write_whole
from mmrag_recipes.trainable import frozen_towers

logger = logging.getLogger("mmrag_recipes")

_DIGEST = hashlib.sha256().digest_size
_GIB = 2**30


class KeptFeatures:
    """Runs a tower on the images of which it has no features yet, and keeps what it gives.

    Args:
        visual: tower of a Qwen-VL model or of ``mmrag-nano``, of which no weight trains.
        base: fingerprint of the checkpoint.
        most_bytes: of new files; what does not fit is computed every time.
    """

    def __init__(self, visual: nn.Module, folder: Path, base: str, most_bytes: float) -> None:
        self.visual = visual
        self.folder = folder
        self.base = base
        self.room = most_bytes
        self._full = False

    def forward(self, images: Sequence[Tensor], rule: ImageRule) -> Any:
        """What ``mmrag.modeling.vision.run_tower`` gives, less what no model uses.

        Returns:
            ``pooler_output`` (tokens, dim) and ``deepstack_features``, likewise, of inner layers.
        """
        paths = [self._path(image, rule) for image in images]
        found = {path: self._read(path) for path in dict.fromkeys(paths)}
        missing = {
            path: image for path, image in zip(paths, images, strict=True) if not found[path]
        }
        if missing:
            found.update(self._compute(missing, rule))
        device = next(self.visual.parameters()).device
        names = next(iter(found.values()))
        seen = {name: torch.cat([found[path][name] for path in paths]).to(device) for name in names}
        pooled = seen.pop("pooler_output")
        # Names sort as their numbers do: towers give three or four.
        deepstack = [seen[name] for name in sorted(seen)]
        return SimpleNamespace(pooler_output=pooled, deepstack_features=deepstack)

    def _path(self, image: Tensor, rule: ImageRule) -> Path:
        weight = next(self.visual.parameters())
        kind = weight.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else ""
        about = [self.base, tuple(image.shape), rule, weight.dtype, computed]
        digest = hashlib.sha256(repr(about).encode())
        digest.update(image.numpy().tobytes())
        name = digest.hexdigest()
        # Folders of a million files are slow to list.
        return self.folder / name[:2] / name[2:]

    def _read(self, path: Path) -> dict[str, Tensor]:
        """Features of one image; none where there is no file, or a broken one."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            return load(content[_DIGEST:])
        logger.warning("%s: the features are corrupted and are computed again", path)
        self.room += len(content)
        return {}

    def _compute(
        self, images: dict[Path, Tensor], rule: ImageRule
    ) -> dict[Path, dict[str, Tensor]]:
        with torch.no_grad():
            output = tower_output(self.visual, list(images.values()), rule)
        whole = {"pooler_output": output.pooler_output}
        inner = getattr(output, "deepstack_features", None) or ()
        whole |= {f"deepstack.{n}": features for n, features in enumerate(inner)}
        counts = [rows * columns for rows, columns in cells(images.values(), rule)]
        parts = {name: torch.split(features.cpu(), counts) for name, features in whole.items()}
        computed = {}
        for n, path in enumerate(images):
            # Cloned: a part of a tensor would be saved with the whole of it.
            computed[path] = {name: split[n].clone() for name, split in parts.items()}
            self._write(path, computed[path])
        return computed

    def _write(self, path: Path, features: dict[str, Tensor]) -> None:
        content = save(features)
        size = _DIGEST + len(content)
        if size > self.room:
            if not self._full:
                logger.warning("%s is full: other images are computed every time", self.folder)
            self._full = True
            return
        self.room -= size
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, and with a digest: a disk may lose what was written last.
        write_whole(path, hashlib.sha256(content).digest() + content)


def keep_features(model: nn.Module, config: RunConfig, kept: FeaturesConfig) -> None:
    """Let the frozen vision tower of a model take its features from disk where they are there.

    Raises:
        ConfigError: If the tower trains, or the model has none of the kind that is kept.
    """
    named = dict(model.named_modules())
    visual = next((m for name, m in named.items() if name.rpartition(".")[2] == "visual"), None)
    if visual is None:
        raise ConfigError(
            f"features: {config.model} has no vision tower whose features can be kept; those of "
            "Qwen-VL models and mmrag-nano can."
        )
    if visual not in frozen_towers(model):
        raise ConfigError(
            "features: the vision tower trains, so that what it gives changes with every step. "
            'Freeze it by freeze = ["visual"], or leave out features.'
        )
    folder = Path(kept.folder)
    taken = sum(path.stat().st_size for path in folder.glob("*/*") if path.is_file())
    room = (kept.gib * _GIB - taken) / distributed.local_size()
    # A quantised tower gives something else.
    settings = {"quantize": config.lora.quantize if config.lora else None}
    base = fingerprint(find_folders(config.model), settings)
    setattr(visual, "kept_features", KeptFeatures(visual, folder, base, room))  # noqa: B010


def unchanging(model: nn.Module) -> list[Any]:
    """What gives the same in both passes of a cached step: frozen towers, or what keeps theirs."""
    return [getattr(tower, "kept_features", tower) for tower in frozen_towers(model)]
