"""Tiny late-interaction checkpoints in the published layouts, with random weights."""

import json
from pathlib import Path

import torch
from tiny import save_qwen2_vl, save_qwen_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    ColPaliConfig,
    ColPaliForRetrieval,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)

DIM = 16


def _save(model: torch.nn.Module, folder: Path) -> Path:
    """Weights wide enough that attention is not flat and mistakes in positions show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += torch.randn(weight.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    return folder


def save_colqwen2(folder: Path) -> Path:
    """As vidore/colqwen2-v1.0-hf: a Qwen2-VL with a projection of every token."""
    base = save_qwen2_vl(folder / "base")
    save_qwen_tokenizer(folder)
    sides = {"shortest_edge": 4 * 784, "longest_edge": 64 * 784}
    pixels = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "size": sides}
    pixels |= {"image_processor_type": "Qwen2VLImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    named = {"processor_class": "ColQwen2Processor"}
    (folder / "processor_config.json").write_text(json.dumps(named))
    vlm = Qwen2VLConfig.from_pretrained(base).to_dict()
    for file in base.iterdir():
        file.unlink()
    base.rmdir()
    torch.manual_seed(0)
    return _save(ColQwen2ForRetrieval(ColQwen2Config(vlm_config=vlm, embedding_dim=DIM)), folder)


def save_colpali(folder: Path) -> Path:
    """As vidore/colpali-v1.3-hf: a PaliGemma with a projection of every token."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(["Question: Describe the image. which page"], trainer)
    ends = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="right", extra_special_tokens=["<image>"], **ends
    ).save_pretrained(folder)
    pixels = {
        "image_processor_type": "SiglipImageProcessor",
        "image_seq_length": 16,
        "size": {"height": 56, "width": 56},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    named = {"processor_class": "ColPaliProcessor"}
    (folder / "processor_config.json").write_text(json.dumps(named))
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    text = {"model_type": "gemma", "hidden_size": 32, "head_dim": 16, "num_key_value_heads": 1}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "projection_dim": 32}
    vlm = {
        "model_type": "paligemma",
        "text_config": text | layers | {"vocab_size": 1600, "pad_token_id": 0},
        "vision_config": vision | layers | {"patch_size": 14, "image_size": 56},
        "projection_dim": 32,
        "image_token_index": tokenizer.token_to_id("<image>"),
    }
    torch.manual_seed(0)
    return _save(ColPaliForRetrieval(ColPaliConfig(vlm_config=vlm, embedding_dim=DIM)), folder)
