"""Train token and trigram vectors against MiniLM's vectors of queries and passages.

A text's vector is the normalised sum of its parts, so a step is an embedding bag: minutes on one
CPU core for tens of thousands of pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from mmrag_recipes.nano import grams
from mmrag_recipes.nano.config import TextConfig
from mmrag_recipes.nano.texts import Pair
from mmrag_recipes.nano.vectors import Matrix

_CHUNK = 2000
_WARM_UP = 50


@dataclass(frozen=True)
class Bags:
    """Texts as bags of table rows: row ids, how often each counts, and where a text begins."""

    ids: NDArray[np.int64]
    counts: NDArray[np.float32]
    starts: NDArray[np.int64]

    @classmethod
    def of(
        cls, items: Sequence[Sequence[int]], counts: Sequence[Sequence[float]] | None = None
    ) -> Bags:
        """Bags of ``items``; a text without any part stands for row 0."""
        filled = [list(item) or [0] for item in items]
        if counts is None:
            weights = [[1.0] * len(item) for item in filled]
        else:
            weights = [list(one) or [1.0] for one in counts]
        sizes = [len(item) for item in filled]
        return cls(
            np.array([i for item in filled for i in item], dtype=np.int64),
            np.array([w for one in weights for w in one], dtype=np.float32),
            np.cumsum([0, *sizes]).astype(np.int64),
        )

    def take(self, chosen: NDArray[np.int64]) -> Bags:
        """The bags of some of the texts."""
        spans = [np.arange(self.starts[i], self.starts[i + 1]) for i in chosen]
        rows = np.concatenate(spans)
        sizes = [len(span) for span in spans]
        starts = np.cumsum([0, *sizes]).astype(np.int64)
        return Bags(self.ids[rows], self.counts[rows], starts)

    def embed(self, table: Tensor) -> Tensor:
        """Normalised sums, (texts, dim)."""
        total = F.embedding_bag(
            torch.from_numpy(self.ids),
            table,
            torch.from_numpy(self.starts[:-1]),
            mode="sum",
            per_sample_weights=torch.from_numpy(self.counts),
        )
        return F.normalize(total, dim=1)


def piece_bags(texts: Sequence[str], tokenizer: Tokenizer) -> Bags:
    """Word pieces of each text."""
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return Bags.of([one.ids for one in encoded])


def gram_bags(texts: Sequence[str], vocabulary: dict[str, int]) -> Bags:
    """Known trigrams of each text, with their counts."""
    known = [
        {vocabulary[gram]: n for gram, n in grams.count(text).items() if gram in vocabulary}
        for text in texts
    ]
    return Bags.of([list(one) for one in known], [[float(n) for n in k.values()] for k in known])


def teacher_vectors(texts: Sequence[str], folder: Path, out: Path, max_length: int) -> Matrix:
    """MiniLM's normalised vectors, (len(texts), 384); saved to ``out`` as it goes, resumable."""
    done = np.load(out) if out.is_file() else np.zeros((0, 384), dtype=np.float16)
    if len(done) >= len(texts):
        return np.asarray(done[: len(texts)])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).to(torch.bfloat16).eval()
    for start in range(len(done), len(texts), _CHUNK):
        chunk = texts[start : start + _CHUNK]
        done = np.concatenate([done, _mean_pooled(chunk, tokenizer, model, max_length)])
        partial = out.with_suffix(".part.npy")
        np.save(partial, done)
        partial.replace(out)
        print(f"teacher: {len(done)} of {len(texts)}", flush=True)
    return done


@torch.inference_mode()
def _mean_pooled(
    texts: Sequence[str], tokenizer: Any, model: Any, max_length: int
) -> NDArray[np.float16]:
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    vectors = np.zeros((len(texts), 384), dtype=np.float16)
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        batch = tokenizer(
            [texts[i] for i in chosen],
            padding=True,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )
        states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        vectors[chosen] = F.normalize((states * mask).sum(1) / mask.sum(1), dim=1).numpy()
    return vectors


@dataclass(frozen=True)
class Student:
    """What is learned: token vectors, and trigram vectors in the same space."""

    words: Matrix
    grams: Matrix
    vocabulary: dict[str, int]


@dataclass(frozen=True)
class Examples:
    """Bags and teacher's vectors of all pairs, row by row."""

    queries: Bags
    passages: Bags
    grams: Bags
    teacher_queries: Tensor
    teacher_passages: Tensor


def distil(
    pairs: Sequence[Pair],
    teacher: tuple[Matrix, Matrix],
    initial: Matrix,
    tokenizer: Tokenizer,
    config: TextConfig,
    seed: int,
) -> Student:
    """Train from ``initial`` token vectors on the teacher's vectors of queries and passages."""
    texts = [pair.text for pair in pairs]
    vocabulary = grams.vocabulary(texts, config.gram_count)
    examples = Examples(
        piece_bags([pair.query for pair in pairs], tokenizer),
        piece_bags(texts, tokenizer),
        gram_bags(texts, vocabulary),
        torch.from_numpy(teacher[0]).float(),
        torch.from_numpy(teacher[1]).float(),
    )
    torch.manual_seed(seed)
    words = torch.nn.Parameter(torch.from_numpy(initial).float().clone())
    letters = torch.nn.Parameter(0.1 * torch.randn(len(vocabulary), initial.shape[1]))
    _train(words, letters, examples, len(pairs), config, seed)
    return Student(words.detach().numpy(), letters.detach().numpy(), vocabulary)


def _train(
    words: Tensor, letters: Tensor, examples: Examples, n: int, config: TextConfig, seed: int
) -> None:
    rates = (config.learning_rate, config.gram_learning_rate)
    groups = [{"params": [words], "lr": rates[0]}, {"params": [letters], "lr": rates[1]}]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99))
    held_out = min(config.held_out, n // 10)
    steps = config.epochs * ((n - held_out) // config.batch)
    print(f"held out, before: recall@1 {_held_out(words, examples, held_out):.3f}")
    for step, chosen in enumerate(_batches(held_out, n, config, seed)):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, step / _WARM_UP + 0.02) * (1 - step / steps)
        loss = batch_loss(words, letters, examples, chosen, config)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            found = _held_out(words, examples, held_out)
            print(f"step {step + 1}/{steps}: loss {loss.item():.3f}, recall@1 {found:.3f}")


def _batches(first: int, n: int, config: TextConfig, seed: int) -> Iterator[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    for _ in range(config.epochs):
        order = rng.permutation(np.arange(first, n))
        for start in range(0, len(order) - config.batch + 1, config.batch):
            yield order[start : start + config.batch]


def batch_loss(
    words: Tensor,
    letters: Tensor,
    examples: Examples,
    chosen: NDArray[np.int64],
    config: TextConfig,
) -> Tensor:
    """Distillation within a batch, of texts and of what a reader of trigrams would see.

    The student's softmax over the batch follows the teacher's (query to passage, passage to
    query, passage to passage), and the true pair counts on its own.
    """
    t = config.temperature
    queries = examples.queries.take(chosen).embed(words)
    passages = examples.passages.take(chosen).embed(words)
    seen = examples.grams.take(chosen).embed(letters)
    rows = torch.from_numpy(chosen)
    teacher_q, teacher_p = examples.teacher_queries[rows], examples.teacher_passages[rows]
    scores, wanted = queries @ passages.T / t, teacher_q @ teacher_p.T / t
    among, wanted_among = passages @ passages.T / t, teacher_p @ teacher_p.T / t
    follow = _divergence(scores, wanted) + _divergence(scores.T, wanted.T)
    follow = follow + 0.5 * _divergence(_off_diagonal(among), _off_diagonal(wanted_among))
    true = _contrast(scores) + _contrast(scores.T)
    read, read_passage = queries @ seen.T / t, passages @ seen.T / t
    reading = _contrast(read) + 0.5 * (_contrast(read.T) + _contrast(read_passage))
    reading = reading + _divergence(read, wanted) + (1 - (seen * passages).sum(1)).mean()
    return follow + config.hard_weight * true + config.gram_weight * reading


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the student's softmax from the teacher's, per row."""
    return F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")


def _contrast(scores: Tensor) -> Tensor:
    return F.cross_entropy(scores, torch.arange(len(scores)))


def _off_diagonal(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.eye(len(scores), dtype=torch.bool), -1e4)


@torch.no_grad()
def _held_out(words: Tensor, examples: Examples, n: int) -> float:
    """Recall@1 among the first ``n`` pairs, which are not trained on."""
    if n == 0:
        return math.nan
    chosen = np.arange(n)
    queries = examples.queries.take(chosen).embed(words)
    scores = queries @ examples.passages.take(chosen).embed(words).T
    return float((scores.argmax(1) == torch.arange(n)).float().mean())
