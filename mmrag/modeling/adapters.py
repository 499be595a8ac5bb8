"""LoRA and DoRA adapters: loaded through peft, verified key by key, and merged.

transformers 5 renamed the parts of multimodal models, so that adapters written before it carry
names the model no longer has. peft then leaves every matrix at its start value with a warning
only, and ``load_adapter`` of transformers drops DoRA's magnitudes: vectors come out, and are
wrong. Here names are mapped, and each weight of the adapter must meet its place in the model,
each place its weight.

Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732), DoRA (arXiv 2402.09353).
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import set_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mmrag.errors import ModelError
from mmrag.modeling.checkpoints import ADAPTER_CONFIG, check_weight_files, read_json
from mmrag.modeling.loading import check_keys

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+?)\.(?P<part>lora_[AB]\.(?:weight|bias)|lora_magnitude_vector)")

# How the modules of the model were called when adapters were written: old prefix, new prefix.
_NAMINGS: tuple[Mapping[str, str], ...] = (
    {"": ""},
    # the model inside transformers' ForConditionalGeneration, from 4.52
    {"model.": ""},
    # Qwen2-VL and its kin before 4.52: the decoder was the model, the vision tower beside it
    {"model.": "language_model.", "visual.": "visual."},
    # LLaVA and its kin before 4.52: the decoder was a causal model of its own
    {
        "language_model.model.": "language_model.",
        "vision_tower.": "vision_tower.",
        "multi_modal_projector.": "multi_modal_projector.",
    },
)


def merge_adapter(model: nn.Module, folder: Path) -> None:
    """Add the adapter in ``folder`` to the weights of ``model``, in place.

    Products are computed in float32, whatever the dtype of the model.

    Raises:
        ModelError: That lists every weight of the adapter without a place in the model, and every
            module the adapter's configuration asks for without weights.
    """
    config = _read_config(folder)
    parts = _key_by_part(folder, _read_weights(folder))
    written = {module for module, _ in parts}

    def found(naming: Mapping[str, str]) -> int:
        return sum(_takes_lora(model, _rename(module, naming)) for module in written)

    # Files do not say which transformers wrote them: the naming that finds most modules did.
    naming = max(_NAMINGS, key=found)
    renamed = {
        (_rename(module, naming) or module, part): tensor
        for (module, part), tensor in parts.items()
    }
    modules = {module for module, _ in renamed}
    check_keys(
        folder,
        missing=[f"{m}.lora_A.weight" for m in _wanted(model, config, naming) - modules],
        unexpected=[f"{m}.{part}" for m, part in renamed if not _takes_lora(model, m)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        adapted = PeftModel(model, _pin(config, modules, naming))
    weights = {f"{_PREFIX}{module}.{part}": tensor for (module, part), tensor in renamed.items()}
    _fill(adapted, folder, weights)
    try:
        # safe_merge refuses NaN; a diverged adapter would otherwise spoil the model in silence.
        adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"{folder}: the merged weights are not finite ({error}).") from error
    model.requires_grad_(True)  # peft froze what it does not train


def _read_config(folder: Path) -> LoraConfig:
    written = read_json(folder / ADAPTER_CONFIG)
    # peft has a default for each, and with another rank or alpha every weight is scaled wrongly.
    absent = [key for key in ("r", "lora_alpha") if not isinstance(written.get(key), (int, float))]
    if absent and written.get("peft_type", "LORA") == "LORA":
        raise ModelError(
            f"{folder}: {ADAPTER_CONFIG} has no {' and no '.join(absent)}, so that the adapter's "
            "scale is unknown. Restore the file that was saved with the adapter."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: {ADAPTER_CONFIG} cannot be read ({error}).") from error
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"{folder}: adapters of type {config.peft_type} are not supported, only LoRA and DoRA."
        )
    return config


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the adapter, of one file or of several."""
    check_weight_files(folder)
    weights: dict[str, Tensor] = {}
    try:
        for path in sorted(folder.glob("adapter_model*.safetensors")):
            weights.update(load_file(path))
        if not weights:
            # Only without safetensors: a .bin file is a pickle, if one that torch restricts to
            # tensors.
            for path in sorted(folder.glob("adapter_model*.bin")):
                weights.update(torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError:
        raise ModelError(
            f"{folder}: a .bin file holds more than tensors or is broken, and loading it may run "
            "foreign code. Use an adapter in the safetensors format."
        ) from None
    except (SafetensorError, OSError, RuntimeError, EOFError) as error:
        raise ModelError(f"{folder}: the adapter's weights cannot be read ({error}).") from error
    if not weights:
        raise ModelError(f"{folder}: there is no adapter_model.safetensors; it is incomplete.")
    return weights


def _key_by_part(folder: Path, weights: Mapping[str, Tensor]) -> dict[tuple[str, str], Tensor]:
    """Key each tensor by its module, as the file calls it, and its part of the adapter."""
    parts, unknown = {}, []
    for key, tensor in weights.items():
        # Early DoRA files end in .weight, later ones do not.
        name = key.removeprefix(_PREFIX).replace("magnitude_vector.weight", "magnitude_vector")
        if match := _PART.fullmatch(name):
            parts[match["module"], match["part"]] = tensor
        else:
            unknown.append(key)
    check_keys(folder, missing=(), unexpected=unknown)
    return parts


def _rename(name: str, naming: Mapping[str, str]) -> str | None:
    """A name with its prefix exchanged; None if no prefix of the naming begins it."""
    for old, new in naming.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def _takes_lora(model: nn.Module, name: str | None) -> bool:
    try:
        module = model.get_submodule(name) if name else None
    except AttributeError:
        return False
    # Embeddings can be adapted as well, but no published adapter of these models does.
    return isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))


def _wanted(model: nn.Module, config: LoraConfig, naming: Mapping[str, str]) -> set[str]:
    """Modules of the model that the configuration selects, by the names it was written for."""
    back = {new: old for old, new in naming.items()}
    return {
        name
        for name, _ in model.named_modules()
        if _takes_lora(model, name)
        and (old := _rename(name, back))
        and check_target_module_exists(config, old)
    }


def _pin(config: LoraConfig, modules: set[str], naming: Mapping[str, str]) -> LoraConfig:
    """Let the configuration name exactly ``modules``, each with its own rank and alpha."""
    back = {new: old for old, new in naming.items()}

    def per_module(pattern: Mapping[str, int]) -> dict[str, int]:
        named = {module: _rename(module, back) or module for module in modules}
        keys = {module: get_pattern_key(list(pattern), old) for module, old in named.items()}
        return {
            f"^{re.escape(module)}": pattern[key] for module, key in keys.items() if key in pattern
        }

    # peft matches these patterns, and layers_to_transform, by the names in the model; the file has
    # the old names.
    config.rank_pattern = per_module(config.rank_pattern)
    config.alpha_pattern = per_module(config.alpha_pattern)
    config.target_modules = set(modules)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.modules_to_save = None
    config.lora_dropout = 0.0
    config.inference_mode = True
    return config


def _fill(adapted: Any, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Put the weights in place; names and shapes must be exactly those that peft expects."""
    # Compared by hand: set_peft_model_state_dict skips names that it does not know.
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {key: value.shape for key, value in state.items()}
    check_keys(
        folder,
        missing=expected.keys() - weights.keys(),
        unexpected=weights.keys() - expected.keys(),
    )
    wrong = [
        f"{key} {tuple(weights[key].shape)}, not {tuple(shape)}"
        for key, shape in sorted(expected.items())
        if weights[key].shape != shape
    ]
    if wrong:
        raise ModelError(f"{folder}: weights of another shape: {', '.join(wrong[:8])}.")
    set_peft_model_state_dict(adapted, dict(weights))
