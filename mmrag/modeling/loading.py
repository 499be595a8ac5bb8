"""Finding a checkpoint, placing it, and loading it exactly: no weight is ever made up.

Every family loads through ``load_exact``, which compares the names and shapes in the file with
those of the model and refuses anything but a perfect match.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmrag.errors import ConfigError, ModelError

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parents[1] / "models"
MARKER = "mmrag.json"
ADAPTER_CONFIG = "adapter_config.json"
_WHOLE_BYTES = 1 << 28
_SAMPLES, _SAMPLE_BYTES = 1024, 1 << 16
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.bin"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model runs; ``attention`` is a name that transformers knows."""

    device: torch.device
    dtype: torch.dtype
    attention: str


def place(device: str = "auto", dtype: str | torch.dtype = "auto") -> Placement:
    """Choose CUDA, then MPS, then the CPU; bfloat16 on CUDA where it has it, else float32.

    Raises: ConfigError for a device that is not here or a dtype that is unknown.
    """
    try:
        chosen = torch.device(_best_device() if device == "auto" else device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not known: use auto, cpu, cuda or mps.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device!r}: torch sees no CUDA device here; use cpu or auto.")
    precision = _dtype(dtype, chosen)
    half = precision in (torch.float16, torch.bfloat16)
    flash = chosen.type == "cuda" and half and _has_flash_attention()
    return Placement(chosen, precision, "flash_attention_2" if flash else "sdpa")


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    named = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype not in named:
        raise ConfigError(f"dtype={dtype!r} is not known: use auto, {', '.join(named)}.")
    return named[dtype]


def _has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def find_checkpoint(name: str | Path, revision: str | None = None) -> Path:
    """Folder of a checkpoint: a folder as given, one shipped with mmrag, or one from the hub.

    Raises: ModelError if there is neither such a folder nor such a model within reach.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    shipped = SHIPPED / str(name)
    if "/" not in str(name) and shipped.is_dir():
        return shipped
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise ModelError(f"{name}: there is no such folder, and it is not a hub name.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name}: there is no such folder, and it could not be downloaded from the hub "
            f"({type(error).__name__}). Check the name and the network, or give a folder."
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, which needs a base model."""
    return (folder / ADAPTER_CONFIG).is_file()


def find_base(adapter: Path, base: str | Path | None = None, known: str | None = None) -> Path:
    """Folder of the model that an adapter sits on: ``base``, else what the adapter states.

    That is often a path on the machine it was trained on; where there is no such folder here,
    ``known``, the base of a published adapter, goes first.

    Raises: ModelError if the adapter does not say and nothing else is given.
    """
    if base is not None:
        return find_checkpoint(base)
    config = read_json(adapter / ADAPTER_CONFIG)
    stated = config.get("base_model_name_or_path")
    if known is not None and not (stated and Path(stated).is_dir()):
        return find_checkpoint(known)
    if not stated:
        raise ModelError(f"{adapter}: {ADAPTER_CONFIG} does not name the base model; pass base=.")
    return find_checkpoint(stated, config.get("revision"))


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file of a checkpoint; empty if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected.")
    return value


def load_exact(
    model_class: Any,
    folder: Path,
    placement: Placement,
    *,
    unused: Iterable[str] = (),
    **kwargs: Any,
) -> Any:
    """Load a transformers model in evaluation mode, with every weight accounted for.

    ``unused`` are prefixes of weight names that the file may hold and this use does not need,
    such as ``lm_head.``; ``kwargs`` go to ``from_pretrained``.

    Raises: ModelError that lists the names missing from the file, unknown to the model, or of
        another shape.
    """
    try:
        with _quiet():
            model, info = model_class.from_pretrained(
                folder,
                dtype=placement.dtype,
                attn_implementation=placement.attention,
                output_loading_info=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                **kwargs,
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(f"{folder}: the checkpoint cannot be loaded ({error}).") from error
    allowed = tuple(unused)
    extra = [key for key in info["unexpected_keys"] if not (allowed and key.startswith(allowed))]
    check_keys(folder, missing=info["missing_keys"], unexpected=extra)
    if info.get("mismatched_keys"):
        raise ModelError(
            f"{folder}: weights of another shape: {_few(map(str, info['mismatched_keys']))}."
        )
    return model.eval().to(placement.device)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and its own table of keys: ours is an error."""
    from transformers.utils import logging as chatter

    level, shown = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if shown:
            chatter.enable_progress_bar()


def check_keys(folder: Path, *, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise ModelError naming the weights that have no partner, if there are any."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        parts = []
        if missing:
            parts.append(f"{len(missing)} weights are not in the file: {_few(missing)}")
        if unexpected:
            parts.append(
                f"{len(unexpected)} weights have no place in the model: {_few(unexpected)}"
            )
        raise ModelError(f"{folder}: {'; '.join(parts)}. It is another architecture or incomplete.")


def _few(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def fingerprint(folders: Iterable[Path], settings: dict[str, Any]) -> str:
    """Hash of the weights and of every setting that moves vectors: 16 hexadecimal digits.

    A weight file up to 256 MiB is read whole: training may change a single matrix. Of a larger
    one its size, its start (which holds the tensor table) and 1024 samples spread over it are
    read, so that a checkpoint of many gigabytes takes a moment.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for folder in folders:
        # An adapter's configuration holds its scale.
        files = ("*.safetensors", "*.bin", ADAPTER_CONFIG)
        for path in sorted(path for pattern in files for path in folder.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}".encode())
            with path.open("rb") as file:
                if size <= _WHOLE_BYTES:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
                    continue
                for step in range(_SAMPLES):
                    file.seek(size * step // _SAMPLES)
                    digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
