"""Finding a checkpoint, checking its files before they are used, and its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mmrag.errors import ModelError

SHIPPED = Path(__file__).parents[1] / "models"
MARKER = "mmrag.json"
ADAPTER_CONFIG = "adapter_config.json"
# Without the ONNX, GGUF and TensorFlow copies that many repositories hold beside the weights.
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.bin"]
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin")
# Everything besides the weights that a vector depends on: architecture, tokenizer, image
# processor, adapter, and how sentence-transformers joins its modules.
_DESCRIBING = (
    *("config.json", "*/config.json", "clip_config.json", ADAPTER_CONFIG),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json", "*.jinja"),
    *("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
)
_LFS_POINTER = b"version https://git-lfs"


def find_checkpoint(
    name: str | Path, revision: str | None = None, *, download: bool = True
) -> Path:
    """Folder of a checkpoint: a folder as given, one shipped with mmrag, or one from the hub.

    download: False takes from the hub only what was downloaded before.

    Raises:
        ModelError: If there is neither such a folder nor such a model within reach.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    shipped = SHIPPED / str(name)
    if "/" not in str(name) and shipped.is_dir():
        return shipped
    try:
        return Path(
            snapshot_download(
                str(name),
                revision=revision,
                allow_patterns=_HUB_FILES,
                local_files_only=not download,
            )
        )
    except HFValidationError as error:
        raise ModelError(f"{name}: there is no such folder, and it is not a hub name.") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if not download:
            raise ModelError(
                f"{name} is not on this machine, and models are downloaded only when they are "
                f"asked for. Name it to download it: embed_model={str(name)!r} or --embedder {name}"
            ) from error
        raise ModelError(
            f"{name}: there is no such folder, and it could not be downloaded from the hub "
            f"({type(error).__name__}). Check the name and the network, or give a folder."
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, which needs a base model."""
    return (folder / ADAPTER_CONFIG).is_file()


def gives_tokens(folder: Path) -> bool:
    """Whether a checkpoint says that it gives one vector for each token."""
    architecture = (read_json(folder / "config.json").get("architectures") or [""])[0]
    saved_as = read_json(folder / "config_sentence_transformers.json").get("model_type")
    # Of sentence-transformers and PyLate; of Stanford; of transformers.
    in_words = saved_as in ("MultiVectorEncoder", "ColBERT") or architecture == "HF_ColBERT"
    return in_words or str(architecture).endswith("ForRetrieval")


def find_base(
    adapter: Path,
    base: str | Path | None = None,
    known: str | None = None,
    *,
    download: bool = True,
) -> Path:
    """Folder of the model that an adapter sits on: ``base``, else what the adapter states.

    ``known``, the base of a published adapter, goes before a stated folder that is not here.

    Raises:
        ModelError: If the adapter does not say and nothing else is given.
    """
    if base is not None:
        return find_checkpoint(base, download=download)
    config = read_json(adapter / ADAPTER_CONFIG)
    stated = config.get("base_model_name_or_path")
    # Adapters often state a path on the machine that they were trained on.
    if known is not None and not (stated and Path(stated).is_dir()):
        return find_checkpoint(known, download=download)
    if not stated:
        raise ModelError(f"{adapter}: {ADAPTER_CONFIG} does not name the base model; pass base=.")
    return find_checkpoint(stated, config.get("revision"), download=download)


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file of a checkpoint; empty if there is no such file.

    Raises:
        ModelError: If it is a git-lfs pointer, or holds no JSON object.
    """
    if not path.is_file():
        return {}
    _refuse_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object is expected.")
    return value


def check_weight_files(folder: Path) -> None:
    """Refuse weight files that are missing, empty, cut short, or git-lfs pointers.

    Raises:
        ModelError: That names the file and says what to do.
    """
    files = [path for pattern in _WEIGHTS for path in sorted(folder.glob(pattern))]
    if not files:
        raise ModelError(
            f"{folder}: there are no weights (*.safetensors). Download the checkpoint again."
        )
    for path in files:
        if path.stat().st_size == 0:
            raise ModelError(f"{path}: the file is empty. Download it again.")
        _refuse_pointer(path)
        if path.suffix == ".safetensors":
            _check_safetensors(path)
    for index in folder.glob("*.index.json"):
        shards = set(read_json(index).get("weight_map", {}).values())
        if absent := sorted(shard for shard in shards if not (folder / shard).is_file()):
            raise ModelError(
                f"{folder}: {index.name} lists {', '.join(absent)}, which are not there. Download "
                "the checkpoint again."
            )


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ModelError(
                f"{path}: this is a git-lfs pointer, not the file itself. Run `git lfs pull`, or "
                "download it from the hub."
            )


def _check_safetensors(path: Path) -> None:
    """Compare the size of a file with what its header says (safetensors' published format)."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if 8 + length <= size else b""
    try:
        table = json.loads(header)
        ends = [row["data_offsets"][1] for key, row in table.items() if key != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, LookupError) as error:
        raise ModelError(
            f"{path}: the header is broken or cut short. Download the file again."
        ) from error
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise ModelError(
            f"{path}: {size:,} bytes where its header says {expected:,}: the download was cut "
            "short or the file is damaged. Download it again."
        )


def fingerprint(folders: Iterable[Path], settings: Mapping[str, Any]) -> str:
    """Hash of all that moves vectors: weights, configuration, tokenizer, processor, settings.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    files = [
        (str(path.relative_to(folder)), path)
        for folder in folders
        for pattern in (*_WEIGHTS, *_DESCRIBING)
        for path in sorted(folder.glob(pattern))
    ]
    # Read whole, since training may change a single small tensor; hashing releases the GIL.
    with ThreadPoolExecutor(4, thread_name_prefix="mmrag-hash") as pool:
        for (name, _), hashed in zip(files, pool.map(_hash, [p for _, p in files]), strict=True):
            # The name as well: the same bytes as another file are another checkpoint.
            digest.update(name.encode() + b"\0" + hashed)
    return digest.hexdigest()[:16]


def _hash(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
