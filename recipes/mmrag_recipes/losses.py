"""Losses over vectors: pure functions of tensors, no trainer state, one value per query.

Vectors come in as the model gives them; each loss normalises them itself, so that Matryoshka
prefixes are normalised too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

VectorLoss = Callable[[Tensor, Tensor], Tensor]


def scores(queries: Tensor, documents: Tensor) -> Tensor:
    """Cosine of each query (b, d) with each document (n, d): (b, n), float32."""
    # In float32: cosines near 1 differ by less than half precision can tell.
    return F.normalize(queries.float(), dim=-1) @ F.normalize(documents.float(), dim=-1).T


def candidate_mask(
    targets: Tensor,
    document_keys: Tensor,
    positive_keys: Sequence[Tensor],
    rows: Tensor,
    own_rows: Tensor,
    in_batch: bool,
) -> Tensor:
    """Which documents each query is compared with: its positive, and what cannot be one.

    Args:
        targets: (b,) column of each query's positive.
        document_keys: (n,) content hash of each document; padding has -1.
        positive_keys: for each query, the hashes of all its known positives.
        rows: (n,) global row that each document came with.
        own_rows: (b,) global row of each query.
        in_batch: whether documents of other rows serve as negatives.

    Returns:
        (b, n) bool.
    """
    allowed = (document_keys >= 0).unsqueeze(0).expand(len(targets), -1).clone()
    for index, keys in enumerate(positive_keys):
        # Another copy, or another right answer, is no negative.
        allowed[index] &= ~torch.isin(document_keys, keys)
    if not in_batch:
        allowed &= own_rows.unsqueeze(1) == rows.unsqueeze(0)
    # The positive itself was masked with its copies above.
    allowed[torch.arange(len(targets)), targets] = True
    return allowed


def info_nce(
    similarity: Tensor,
    targets: Tensor,
    allowed: Tensor,
    temperature: float,
    false_negative_margin: float | None = None,
    own: Tensor | None = None,
) -> Tensor:
    """Cross entropy of each query's positive among its candidates, (b,).

    Candidates that score above the positive by more than ``false_negative_margin`` are taken
    for unlabelled positives and left out (Qwen3-VL-Embedding, arXiv 2601.04720, section 4).
    Those of the query's own row stay: a document of the wrong modality is mined because it
    scores above the positive.

    Args:
        similarity: (b, n) cosines.
        targets: (b,) column of the positive.
        allowed: (b, n) bool.
        own: (b, n) bool, documents of the query's own row.
    """
    positive = similarity.gather(1, targets.unsqueeze(1))  # (b, 1)
    if false_negative_margin is not None:
        # Detached: the mask is a decision, nothing to differentiate.
        false = similarity.detach() > positive.detach() + false_negative_margin
        kept = ~false.scatter(1, targets.unsqueeze(1), False)
        allowed = allowed & (kept if own is None else kept | own)
    # (b, n)
    logits = (similarity / temperature).masked_fill(~allowed, float("-inf"))
    return F.cross_entropy(logits, targets, reduction="none")


def distil_scores(
    similarity: Tensor,
    teacher: Tensor,
    known: Tensor,
    temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """KL divergence from a teacher's ranking to ours, over the documents it scored, (b,).

    Args:
        similarity: (b, n) cosines.
        teacher: (b, n) scores, read where ``known`` (b, n) is true.

    Queries with fewer than two scored documents teach nothing: theirs is 0.
    """
    # A finite stand-in for minus infinity: a query without any scored document stays finite.
    low = torch.finfo(torch.float32).min / 4
    ours = (similarity / temperature).masked_fill(~known, low).log_softmax(dim=1)
    theirs = (teacher / teacher_temperature).masked_fill(~known, low).softmax(dim=1)
    # The bound keeps 0 * log 0 at 0 instead of NaN.
    terms = theirs * (theirs.clamp(min=1e-12).log() - ours)
    return terms.masked_fill(~(known & is_taught(known)), 0).sum(dim=1)


def is_taught(known: Tensor) -> Tensor:
    """Whether a teacher scored two documents of a query or more, (b, 1) bool."""
    return known.sum(dim=1, keepdim=True) > 1


def distil_vectors(vectors: Tensor, teacher: Tensor) -> Tensor:
    """One minus the cosine to a teacher's vectors of the same width, mean over rows (n, d)."""
    return (1 - F.cosine_similarity(vectors.float(), teacher.float(), dim=-1)).mean()


def compatible(
    loss: VectorLoss,
    new: tuple[Tensor, Tensor],
    old: tuple[Tensor, Tensor],
    sides: Literal["queries", "both"],
) -> Tensor:
    """A loss over new vectors against those of an old model that is frozen.

    Source: backward-compatible training (arXiv 2003.11942, section 3.2), with the contrastive loss
    in place of a classifier's.

    Args:
        new, old: queries (b, d) and documents (n, d) of each model.
        sides: ``both``: also of old queries over new documents.
    """
    cross = loss(new[0], old[1])
    return cross if sides == "queries" else (cross + loss(old[0], new[1])) / 2


def matryoshka(loss: VectorLoss, parts: Sequence[slice]) -> VectorLoss:
    """Average a loss over parts of the vectors (Kusupati et al., arXiv 2205.13147, eq. 1)."""

    def over_parts(queries: Tensor, documents: Tensor) -> Tensor:
        return torch.stack([loss(queries[:, p], documents[:, p]) for p in parts]).mean()

    return over_parts


def signs(vectors: Tensor) -> Tensor:
    """Vectors cut to -1 and 1 as binary quantization keeps them, with a gradient, (n, d).

    Forward it is the sign of each number (0 counts as -1, as in Qdrant). Backward it is the
    derivative of tanh, which is largest where a sign is about to change (straight-through
    estimator, arXiv 1308.3432; for retrieval Binary Embedding-based Retrieval, arXiv 2302.08714).
    """
    vectors = vectors.float()
    # To a mean square of 1: tanh would be flat for long vectors, and a line for short ones.
    scaled = F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5
    soft = scaled.tanh()
    hard = torch.where(vectors > 0, 1.0, -1.0)
    straight: Tensor = soft + (hard - soft).detach()
    return straight


def binary_aware(loss: VectorLoss, weight: float, queries_too: bool) -> VectorLoss:
    """Mix a loss with its value on vectors cut to signs.

    Args:
        weight: share of the loss on signs, in [0, 1]; 0 gives the loss as it is.
        queries_too: compare signs with signs, as a search in binary codes does; else whole queries
            with the signs of documents.
    """
    if not weight:
        return loss

    def mixed(queries: Tensor, documents: Tensor) -> Tensor:
        asked = signs(queries) if queries_too else queries
        return (1 - weight) * loss(queries, documents) + weight * loss(asked, signs(documents))

    return mixed
