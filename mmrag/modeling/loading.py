"""Placing a model and loading it exactly: no weight is ever made up.

Every family loads through ``load_exact``, which compares the names and shapes in the file with
those of the model and refuses anything but a perfect match.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch

from mmrag.errors import ConfigError, ModelError
from mmrag.modeling.checkpoints import check_weight_files, read_json

Quantization: TypeAlias = Literal["8bit", "4bit", "4bit-double"]
DeviceMap: TypeAlias = Literal["auto"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What transformers raises for checkpoints that it cannot use.
_UNLOADABLE = (
    *(OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, ImportError),
    *(EOFError, pickle.UnpicklingError),
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where and how a model runs.

    attention: an implementation that transformers knows.
    quantize: of the linear layers, by bitsandbytes; None for none.
    device_map: ``auto`` spreads a model over all devices, by accelerate; None for one device.
    compile: as in ``load_embedder``.
    """

    device: torch.device
    dtype: torch.dtype
    attention: str
    quantize: Quantization | None = None
    device_map: DeviceMap | None = None
    compile: bool | None = None


def place(
    device: str = "auto",
    dtype: str | torch.dtype = "auto",
    *,
    quantize: Quantization | None = None,
    device_map: DeviceMap | None = None,
    compile: bool | None = None,
) -> Placement:
    """Choose CUDA, then MPS, then the CPU; bfloat16 on CUDA where it has it, else float32.

    Raises:
        ConfigError: For a device that is not here, a dtype or a way to quantise that is unknown,
            and for libraries that are missing.
    """
    try:
        chosen = torch.device(_best_device() if device == "auto" else device)
    except RuntimeError as error:
        raise ConfigError(f"device={device!r} is not known: use auto, cpu, cuda or mps.") from error
    if chosen.type == "meta":
        raise ConfigError("device='meta' holds no weights: use auto, cpu, cuda or mps.")
    try:
        # torch.device accepts cuda:7 on any machine; only an allocation shows whether it is there.
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise ConfigError(f"device={device!r} is not here ({first}); use auto or cpu.") from error
    if device_map not in (None, *get_args(DeviceMap)):
        raise ConfigError(f"device_map={device_map!r} is not known: use auto, or leave it out.")
    if device_map is not None and device != "auto":
        raise ConfigError("device_map chooses the devices itself: leave out device.")
    _check_quantize(quantize)
    precision = _dtype(dtype, chosen)
    compiling = _check_compile(compile, quantize, device_map)
    attention = _attention(chosen, precision)
    return Placement(chosen, precision, attention, quantize, device_map, compiling)


def _attention(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest implementation of attention there is, by a name that transformers knows."""
    from transformers.utils import is_flash_attn_2_available

    # The package has kernels for half precision on CUDA alone.
    half = dtype in (torch.float16, torch.bfloat16)
    if device.type == "cuda" and half and is_flash_attn_2_available():
        return "flash_attention_2"
    if not has_flash(device):
        return "sdpa"
    # Here, for it imports transformers' models, which takes seconds.
    from mmrag.modeling.attention import PLANLESS

    return PLANLESS


def has_flash(device: torch.device) -> bool:
    """Whether PyTorch has flash attention for a device: CUDA, from the Ampere generation on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    available = torch.backends.cuda.is_flash_attention_available()
    return available and torch.cuda.get_device_capability(device) >= (8, 0)


def device_name() -> str:
    """The device that models run on unless told otherwise, and its memory: ``cpu, 8 cores``."""
    device = _best_device()
    if device != "cuda":
        return f"{device}, {os.cpu_count()} cores"
    free, total = torch.cuda.mem_get_info()
    name = torch.cuda.get_device_name()
    return f"cuda, {name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        # Most CPUs compute in half precision by converting each number, which is slower.
        if device.type != "cuda":
            return torch.float32
        # Float16 overflows in some of these models, so it comes last.
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r} is not known: use auto, {', '.join(_DTYPES)}.")
    return _DTYPES[dtype]


def _check_compile(
    compile: bool | None, quantize: Quantization | None, device_map: DeviceMap | None
) -> bool | None:
    if quantize is None and device_map is None:
        return compile
    if compile:  # the layers are not the model's own, or wait for other devices
        raise ConfigError("compile=True cannot be had with quantize= or device_map=.")
    return False


def _check_quantize(quantize: Quantization | None) -> None:
    if quantize is None:
        return
    if quantize not in get_args(Quantization):
        ways = ", ".join(get_args(Quantization))
        raise ConfigError(f"quantize={quantize!r} is not known: use {ways}, or leave it out.")
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ConfigError("quantize= needs bitsandbytes: pip install 'mmrag[quantized]'.")


def load_exact(
    model_class: Any,
    folder: Path,
    placement: Placement,
    *,
    unused: Iterable[str] = (),
    config: Any = None,
    key_mapping: dict[str, str] | None = None,
) -> Any:
    """Load a transformers model in evaluation mode, with every weight accounted for.

    Args:
        unused: prefixes of weight names that the file may hold and this use does not need,
            such as ``lm_head.``.
        config: in place of the folder's own ``config.json``.
        key_mapping: patterns of weight names in the file, and what they are in the model.

    Raises:
        ModelError: That lists the names missing from the file, unknown to the model, or of another
            shape; for a checkpoint that is incomplete, quantised, of another architecture, too
            large for the memory, or has weights that are not finite.
    """
    if config is None:
        check_architecture(model_class, folder)
    check_weight_files(folder)
    options: dict[str, Any] = {"dtype": placement.dtype, "key_mapping": key_mapping}
    options |= {"attn_implementation": placement.attention, "local_files_only": True}
    options |= {} if config is None else {"config": config}
    # First without any memory, on the meta device: a configuration that does not fit the file
    # would allocate a model of its own size, and fill it with noise.
    check_weights(model_class, folder, unused=tuple(unused), **options)
    model = _from_pretrained(model_class, folder, **options, **_distribution(placement))
    model = model.eval()
    if placement.quantize is None and placement.device_map is None:
        with memory_errors(f"{folder}: the model does not fit in the memory of the device"):
            model = model.to(placement.device)
    check_finite(model, folder)
    return model


def _distribution(placement: Placement) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for quantised models and those on several devices."""
    if placement.quantize is None:
        return {} if placement.device_map is None else {"device_map": placement.device_map}
    from transformers import BitsAndBytesConfig

    eight = placement.quantize == "8bit"
    double = placement.quantize == "4bit-double"
    quantization = BitsAndBytesConfig(
        load_in_8bit=eight,
        load_in_4bit=not eight,
        bnb_4bit_compute_dtype=placement.dtype,
        bnb_4bit_quant_type="nf4",  # for weights that are normally distributed (QLoRA, 2305.14314)
        bnb_4bit_use_double_quant=double,
    )
    # A quantised model cannot be moved afterwards.
    where = placement.device_map or {"": placement.device}
    return {"quantization_config": quantization, "device_map": where}


def check_architecture(model_class: Any, folder: Path) -> None:
    """Raise ModelError without a config.json, for a quantised one, or of another model type."""
    published = read_json(folder / "config.json")
    if not published:
        raise ModelError(
            f"{folder}: config.json is missing or empty; the checkpoint is incomplete. Download "
            "it again."
        )
    if "quantization_config" in published:
        raise ModelError(
            f"{folder}: the checkpoint was stored quantised. Use the original one, with quantize= "
            "if it has to be small."
        )
    config_class = getattr(model_class, "config_class", None)
    wanted, found = getattr(config_class, "model_type", None), published.get("model_type")
    # Some name their own class, as UNITE does: unite_qwen2_vl.
    if wanted and found != wanted and not str(found).endswith(f"_{wanted}"):
        raise ModelError(
            f"{folder}: model_type is {found!r} in config.json, and this family needs {wanted!r}. "
            "Pass another family=."
        )


def check_weights(
    model_class: Any,
    folder: Path,
    *,
    unused: tuple[str, ...] = (),
    missing_unused: tuple[str, ...] = (),
    **options: Any,
) -> None:
    """Compare names and shapes of a checkpoint's weights with the model's; loads nothing.

    Args:
        unused: prefixes of names that the file may hold and the model lacks.
        missing_unused: prefixes of names that the file may lack.
        options: of ``from_pretrained``.

    Raises:
        ModelError: That lists what differs.
    """
    _, info = _from_pretrained(
        model_class,
        folder,
        **options,
        device_map={"": "meta"},
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, by name
    )
    check_keys(
        folder,
        missing=[key for key in info["missing_keys"] if not key.startswith(missing_unused)],
        unexpected=[key for key in info["unexpected_keys"] if not key.startswith(unused)],
    )
    if info.get("mismatched_keys"):
        names = map(str, info["mismatched_keys"])
        raise ModelError(f"{folder}: weights of another shape: {_name_some(names)}.")


def _from_pretrained(model_class: Any, folder: Path, **options: Any) -> Any:
    try:
        with quiet(), memory_errors(f"{folder}: the model does not fit in memory"):
            return model_class.from_pretrained(folder, **options)
    except _UNLOADABLE as error:
        if "weights_only" in str(error):
            # torch advises to load the file unsafely, which runs whatever code it holds.
            raise ModelError(
                f"{folder}: a .bin file holds more than tensors or is broken, and loading it may "
                "run foreign code. Use a checkpoint in the safetensors format."
            ) from None
        raise ModelError(f"{folder}: the checkpoint cannot be loaded ({error}).") from error


def check_finite(model: torch.nn.Module, folder: Path) -> None:
    """Raise ModelError for weights that are not numbers, or infinite."""
    broken = []
    for name, weight in model.named_parameters():
        # Those that device_map keeps on disk or on the CPU until they are used are on meta here.
        if weight.is_floating_point() and weight.numel() and not weight.is_meta:
            low, high = torch.aminmax(weight.detach())  # both are NaN if any weight is
            if not (torch.isfinite(low) and torch.isfinite(high)):
                broken.append(name)
    if broken:
        raise ModelError(
            f"{folder}: weights that are not finite: {_name_some(broken)}. The checkpoint is "
            "damaged, or its training diverged; a half precision too small for it also does this."
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device: torch has an error of its own for CUDA alone."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "DefaultCPUAllocator" in text or "not enough memory" in text or "out of memory" in text
    )


@contextmanager
def memory_errors(problem: str) -> Iterator[None]:
    """Turn errors of memory into a ModelError that begins with ``problem`` and says what helps."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{problem}. Use dtype='bfloat16', quantize=, or a smaller checkpoint."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
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
            parts.append(f"{len(missing)} weights are not in the file: {_name_some(missing)}")
        if unexpected:
            parts.append(
                f"{len(unexpected)} weights have no place in the model: {_name_some(unexpected)}"
            )
        raise ModelError(f"{folder}: {'; '.join(parts)}. It is another architecture or incomplete.")


def _name_some(names: Iterable[str], most: int = 8) -> str:
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
