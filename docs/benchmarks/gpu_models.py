"""Checkpoints of published shapes with random weights, written in seconds, for benchmarks.

The numbers in ``SHAPES`` are those of the published ``config.json`` files. The tokenizer is made
here: a byte-level BPE on invented words, which take about 1.3 tokens each, as English does in
the published ones.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

Size: TypeAlias = Literal["published", "tiny"]

SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ANSWERS = ("yes", "no", "True", "False")
# The chat template of the published checkpoints, as far as texts and images go.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)
PUBLISHED_QWEN2 = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
    },
}
TINY_QWEN2 = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {
        "depth": 3,
        "embed_dim": 64,
        "hidden_size": 64,
        "num_heads": 4,
        "mlp_ratio": 2,
    },
}
PUBLISHED_QWEN3 = {
    "text_config": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
    },
    "vision_config": {
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2048,
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
TINY_QWEN3 = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 4096,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
            "rope_type": "default",
        },
    },
    "vision_config": {
        "depth": 3,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "num_position_embeddings": 64,
        "out_hidden_size": 64,
        "deepstack_visual_indexes": [0, 1],
    },
}


def save_gme(folder: Path, size: Size, device: torch.device) -> Path:
    """A checkpoint of gme-Qwen2-VL-2B's shape."""
    shape = PUBLISHED_QWEN2 if size == "published" else TINY_QWEN2
    most = (1280 if size == "published" else 64) * 28 * 28
    ids = save_tokenizer(folder, int(str(shape["vocab_size"])))
    vision = {"in_chans": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        **shape,
        **ids,
        "vision_config": {**shape["vision_config"], **vision},  # type: ignore[dict-item]
    }
    processor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 14}
    processor |= {"min_pixels": 4 * 28 * 28, "max_pixels": most}
    _save_json(folder / "config.json", config)
    _save_json(folder / "preprocessor_config.json", {**processor, **_MERGE})
    _save_weights(Qwen2VLForConditionalGeneration, Qwen2VLConfig, folder, device)
    return folder


def save_qwen3_vl(folder: Path, size: Size, device: torch.device) -> Path:
    """A checkpoint of Qwen3-VL-2B's shape: Qwen3-VL-Embedding-2B's and Qwen3-VL-Reranker-2B's."""
    shape: dict[str, Any] = PUBLISHED_QWEN3 if size == "published" else TINY_QWEN3
    ids = save_tokenizer(folder, shape["text_config"]["vocab_size"])
    text = {"model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False}
    text |= {"max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "rope_theta": 5000000.0}
    vision = {"model_type": "qwen3_vl", "hidden_act": "gelu_pytorch_tanh", "in_channels": 3}
    vision |= {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "text_config": {**text, **shape["text_config"], **ids},
        "vision_config": {**vision, **shape["vision_config"]},
        **ids,
    }
    halves = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    processor = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, **halves}
    processor["size"] = {"shortest_edge": 4 * 32 * 32, "longest_edge": 1800 * 32 * 32}
    _save_json(folder / "config.json", config)
    _save_json(folder / "preprocessor_config.json", {**processor, **_MERGE})
    _save_weights(Qwen3VLForConditionalGeneration, Qwen3VLConfig, folder, device)
    return folder


_MERGE = {"temporal_patch_size": 2, "merge_size": 2}


def invented_words(count: int = 2000) -> list[str]:
    """Words of two to four syllables, the same in every run."""
    chance = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er")]
    lengths = chance.integers(2, 5, count)
    return ["".join(chance.choice(syllables, n)) for n in lengths]


def save_tokenizer(folder: Path, rows: int) -> dict[str, int]:
    """A byte-level BPE with Qwen's special tokens; returns the ids that a config names."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(rows - 16, 4000),
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = invented_words()
    tokenizer.train_from_iterator([" ".join(words[::5] * 5 + words)], trainer)
    tokenizer.add_tokens(list(ANSWERS))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIALS[1:]),
        "model_max_length": 32768,
    }
    _save_json(folder / "tokenizer_config.json", config)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    names |= {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
    return {key: int(tokenizer.token_to_id(token)) for key, token in names.items()}


def _save_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


def _save_weights(model_class: Any, config_class: Any, folder: Path, device: torch.device) -> None:
    """Random weights, made on ``device``; bfloat16 on a card, float32 elsewhere.

    Deviations are those that keep states of unit size through the layers.
    """
    with torch.device("meta"):  # gives names and shapes, and computes nothing
        model = model_class(config_class.from_pretrained(folder))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, like in model.state_dict().items():
        if name == "lm_head.weight":  # tied to the embedding of tokens
            continue
        value = torch.empty(like.shape, dtype=dtype, device=device)
        if like.ndim > 1:
            value.normal_(0, 1 / math.sqrt(like[0].numel()), generator=generator)
        else:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.02, generator=generator)
        published = name.replace("model.language_model.", "model.").replace(
            "model.visual.", "visual."
        )
        weights[published if model_class is Qwen2VLForConditionalGeneration else name] = value.cpu()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
