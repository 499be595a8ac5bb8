"""Tiny Qwen3-VL checkpoints in the published layout, built from config with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import save_qwen2_5_vl, save_qwen2_vl, save_qwen_tokenizer
from tokenizers import Tokenizer
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 262144,
    "num_attention_heads": 2,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 420,
}
VISION = {
    "depth": 3,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_size": 32,
    "in_channels": 3,
    "intermediate_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 64,
    "out_hidden_size": 32,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def save_processor(folder: Path) -> None:
    """The image processor's file as Qwen3-VL checkpoints carry it."""
    config = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "size": {"shortest_edge": 4096, "longest_edge": 1310720},
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def token_ids(ids: dict[str, int]) -> dict[str, int]:
    """Config fields that name the vision tokens."""
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def save_weights(model: torch.nn.Module, folder: Path, drop: str = "") -> None:
    """Random weights wide enough that attention is not flat and mistakes in positions show."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: value + torch.randn(value.shape, generator=generator) * 0.15
        for key, value in model.state_dict().items()
        if not (drop and key.startswith(drop))
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def add_words(folder: Path, words: tuple[str, ...]) -> None:
    """Add words to the tokenizer of a folder, as plain tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens(list(words))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_qwen3_vl(folder: Path, *, tied: bool = True, words: tuple[str, ...] = ()) -> Path:
    """A random Qwen3-VL: tied as the 2B, or with a head of its own as the 8B reranker.

    ``words`` are one token each to its tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids = save_qwen_tokenizer(folder)
    add_words(folder, words)
    rope = {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": TEXT
        | {"model_type": "qwen3_vl_text", "rope_scaling": rope, "rope_theta": 5000000.0},
        "tie_word_embeddings": tied,
        "vision_config": VISION | {"deepstack_visual_indexes": [0, 1], "model_type": "qwen3_vl"},
        **token_ids(ids),
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_processor(folder)
    torch.manual_seed(0)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_pretrained(folder))
    save_weights(model, folder, drop="lm_head." if tied else "")
    return folder


def reference_inputs(folder: Path, prompt: str, images: list[Image.Image]) -> dict[str, Any]:
    """What transformers' own classes make of a prompt and its images, for its own model."""
    inputs: dict[str, Any] = {}
    if images:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil", do_resize=False)
        inputs = dict(processor(images=images, return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            prompt = prompt.replace("<|image_pad|>", "<slot>" * (int(grid.prod()) // 4), 1)
        prompt = prompt.replace("<slot>", "<|image_pad|>")
    ids = AutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
    image_token = json.loads((folder / "config.json").read_text())["image_token_id"]
    return {"input_ids": ids, "mm_token_type_ids": (ids == image_token).int(), **inputs}


QWEN_FAMILIES = {"gme": save_qwen2_vl, "moca": save_qwen2_5_vl, "qwen3_vl": save_qwen3_vl}
"""A family of each generation of Qwen-VL, and what saves a tiny checkpoint of it."""


def save_wemm(folder: Path) -> Path:
    """A random Qwen3.5 with WeMM's extra token, all its processors in one file."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = save_qwen_tokenizer(folder)
    add_words(folder, ("<embedding>",))
    rope = {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000000,
        "rope_type": "default",
    }
    linear = {
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 8,
    }
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "auto_map": {"AutoModel": "modeling_wemm_embedding.WeMMEmbedding"},
        "matryoshka_dimensions": [8, 16, 32],
        "model_type": "qwen3_5",
        "text_config": TEXT
        | linear
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 2,
            "rope_parameters": rope,
        },
        "tie_word_embeddings": True,
        "vision_config": VISION | {"model_type": "qwen3_5"},
        **token_ids(ids),
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_processor(folder)
    (folder / "preprocessor_config.json").rename(folder / "old.json")
    processor = {"image_processor": json.loads((folder / "old.json").read_text())}
    (folder / "old.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps(processor))
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config.from_pretrained(folder))
    save_weights(model, folder, drop="lm_head.")
    return folder
