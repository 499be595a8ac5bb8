"""Tiny LoRA and DoRA adapters in the layout that peft writes, and their arithmetic by hand."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

# Decoder modules of tests/tiny.py's Qwen2-VL: name in a published checkpoint, rows, columns.
MODULES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(2)
    for name, shape in {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (16, 32),
        "self_attn.v_proj": (16, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.down_proj": (32, 64),
    }.items()
}
TARGETS = ["down_proj", "gate_up_proj", "k_proj", "o_proj", "out_proj", "q_proj", "v_proj"]
ALPHA = 16


def adapter_weights(dora: bool = False, rank: int = 4, seed: int = 1) -> dict[str, Tensor]:
    """Random matrices by the names that peft gave them before transformers 4.52."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    weights = {}
    for module, (rows, columns) in MODULES.items():
        key = f"base_model.model.{module}"
        weights[f"{key}.lora_A.weight"] = noise(rank, columns)
        weights[f"{key}.lora_B.weight"] = noise(rows, rank)
        if dora:
            weights[f"{key}.lora_magnitude_vector"] = 1 + noise(rows).abs()
    return weights


def save_adapter(folder: Path, weights: dict[str, Tensor], base: object, **config: object) -> Path:
    """Write an adapter folder; ``config`` goes over the fields of a published one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "adapter_model.safetensors")
    fields = {
        "base_model_name_or_path": str(base),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "lora_alpha": ALPHA,
        "lora_dropout": 0.1,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": 4,
        "target_modules": TARGETS,
        "task_type": None,
        "use_dora": any("magnitude" in key for key in weights),
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(fields | config))
    return folder


def merged(base: Path, weights: dict[str, Tensor], alpha: float = ALPHA, rs: bool = False):
    """Weights of the base with the adapter in them, by the formulas of the papers, in float64."""
    result = load_file(base / "model.safetensors")
    for module in MODULES:
        key = f"base_model.model.{module}"
        first, second = (weights[f"{key}.lora_{m}.weight"].double() for m in "AB")
        rank = len(first)
        scale = alpha / (math.sqrt(rank) if rs else rank)
        total = result[f"{module}.weight"].double() + scale * second @ first
        if f"{key}.lora_magnitude_vector" in weights:
            magnitude = weights[f"{key}.lora_magnitude_vector"].double()
            total = magnitude[:, None] * total / total.norm(dim=1, keepdim=True)
        result[f"{module}.weight"] = total.float()
    return result
