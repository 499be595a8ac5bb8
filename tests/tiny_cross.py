"""Tiny cross-encoders built from config: a classifier, and language models that say yes or no."""

from pathlib import Path

import torch
from tiny import save_qwen_tokenizer
from tiny_qwen3 import add_words
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LINES = ["which turbine makes power from wind", "solar cells make power from light all day"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_bert(folder: Path, labels: int = 1, length: int = 64, **shape: int) -> Path:
    """As BGE's rerankers are published: a classifier with one label, no modules.json."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = BertConfig(
        vocab_size=200,
        num_attention_heads=2,
        max_position_embeddings=length,
        num_labels=labels,
        initializer_range=0.6,
        **(small | shape),
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIALS)
    tokenizer.train_from_iterator(LINES, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    pair = "[CLS] $A [SEP] $B:1 [SEP]:1"
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", pair, ends)
    named = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, **named
    ).save_pretrained(folder)
    return folder


def save_qwen3(folder: Path) -> Path:
    """As Qwen3-Reranker was published: a language model without sentence-transformers' files."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = save_qwen_tokenizer(folder)
    add_words(folder, ("yes", "no"))
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=420,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=0.4,
        pad_token_id=ids["<|endoftext|>"],
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder
