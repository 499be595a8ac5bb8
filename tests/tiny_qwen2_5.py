"""Tiny Qwen2.5-VL checkpoints in the published layout, built from config with random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import save_qwen_tokenizer
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def save_qwen2_5_vl(folder: Path) -> Path:
    """A random Qwen2.5-VL checkpoint with the key names and config fields it was published with."""
    folder.mkdir(parents=True)
    ids = save_qwen_tokenizer(folder)
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
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
            "out_hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14}
    pixels |= {"temporal_patch_size": 2, "merge_size": 2}
    pixels |= {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(folder))
    weights = {}
    for key, value in model.state_dict().items():
        if key != "lm_head.weight":
            name = key.replace("model.language_model.", "model.").replace("model.visual", "visual")
            weights[name] = value + torch.randn(value.shape) * 0.15
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
