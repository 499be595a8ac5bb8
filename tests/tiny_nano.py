"""A tiny checkpoint of the shipped embedder's architecture, built from config, random weights."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig

from mmrag.embedders.families.nano import NanoModel

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_nano(folder: Path, seed: int = 0, fast_on_cpu: bool = False) -> Path:
    """BERT of width 32 whose pieces are characters, a vision tower, and a readout of 24 units."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    pieces = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    named["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    config = {
        "model_type": "bert",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "vocab_size": len(pieces),
        "pad_token_id": 0,
        "readout_units": 24,
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    pixels = {"min_pixels": 4 * 784, "max_pixels": 64 * 784, "patch_size": 14}
    pixels |= {"temporal_patch_size": 2, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    settings = {"family": "nano", "prefers_text": True, "prefers_passages": True}
    settings["fast_on_cpu"] = fast_on_cpu
    (folder / "mmrag.json").write_text(json.dumps(settings))
    torch.manual_seed(seed)
    weights = NanoModel(BertConfig.from_pretrained(folder)).state_dict()
    # Wide enough that attention is not flat and mistakes in positions show.
    noisy = {key: value + 0.15 * torch.randn_like(value) for key, value in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
