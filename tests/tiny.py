"""Tiny Qwen2-VL and Qwen2.5-VL checkpoints as published, built from config, random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from mmrag.modeling.qwen_images import cut_patches

QWEN_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]


def save_qwen_tokenizer(folder: Path) -> dict[str, int]:
    """A byte-level BPE of a few hundred pieces with Qwen's special tokens; returns their ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=QWEN_SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = ["You are a helpful assistant.", "system user assistant", "find the page that answers"]
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": QWEN_SPECIALS[1:],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {token: tokenizer.token_to_id(token) for token in QWEN_SPECIALS}


def seen(item, rule):
    """Grids and patches of the images of one item, as the vision tower gets them."""
    grids = [[1, i.shape[0] // rule.patch, i.shape[1] // rule.patch] for i in item.images]
    return grids, torch.cat([cut_patches(image.unsqueeze(0), rule) for image in item.images])


def save_qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """A random Qwen2-VL checkpoint with the key names and config fields it was published with."""
    pixels = {"min_pixels": 4 * 784, "max_pixels": 64 * 784}
    save_qwen2_files(folder, "qwen2_vl", {"embed_dim": 32, "mlp_ratio": 2}, pixels)
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig.from_pretrained(folder))
    return save_qwen2_weights(folder, model, seed)


def save_qwen2_5_vl(folder: Path) -> Path:
    """A random Qwen2.5-VL checkpoint, in its published layout as well."""
    vision = {"out_hidden_size": 32, "intermediate_size": 48, "tokens_per_second": 2}
    vision |= {"window_size": 112, "fullatt_block_indexes": [1]}
    pixels = {"min_pixels": 3136, "max_pixels": 12845056}
    pixels |= {"image_processor_type": "Qwen2VLImageProcessor"}
    save_qwen2_files(folder, "qwen2_5_vl", vision, pixels)
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    return save_qwen2_weights(folder, model, 0)


def save_qwen2_files(
    folder: Path, kind: str, vision: dict[str, object], pixels: dict[str, object]
) -> None:
    """Tokenizer, config.json and preprocessor_config.json of a small model."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = save_qwen_tokenizer(folder)
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
    published = {
        "architectures": [f"{names[kind]}ForConditionalGeneration"],
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "vocab_size": 420,
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **vision,
        },
    }
    (folder / "config.json").write_text(json.dumps(published))
    pixels = {**pixels, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))


def save_qwen2_weights(folder: Path, model: torch.nn.Module, seed: int) -> Path:
    """Its weights with noise, under the names of before transformers 4.52, as published."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            name = key.replace("model.language_model.", "model.").replace("model.visual", "visual")
            # Wide enough that attention is not flat and mistakes in positions show.
            weights[name] = value + torch.randn(value.shape, generator=generator) * 0.15
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
