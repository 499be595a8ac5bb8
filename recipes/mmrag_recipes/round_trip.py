"""The filter of synthesis: a row is kept if its query finds its document again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmrag_recipes.config import MODALITIES
from mmrag_recipes.corpus import Document
from mmrag_recipes.rows import Row
from mmrag_recipes.vectors import VectorCache

_QUERIES_AT_ONCE = 1024
_EQUAL = 1e-6  # scores closer than this are the same


def round_trip(
    rows: Sequence[Row], documents: Sequence[Document], cache: VectorCache, top_k: int
) -> tuple[list[Row], int, int]:
    """Keep rows whose query finds its document among all of the same modality.

    Returns:
        Kept rows, number lost, number kept unseen because the embedder lacks a modality.
    """
    able = cache.embedder.modalities
    judged = [
        # What the embedder cannot see it cannot judge: such rows are kept.
        row
        for row in rows
        if row.query.modality in able and row.positives[0].modality in able
    ]
    lost = set()
    for modality in MODALITIES:
        asked = [row for row in judged if row.positives[0].modality == modality]
        if asked:
            pool = [d.item(modality) for d in documents if modality in d.modalities]
            # A copy of the document ranks beside it, and is no reason to drop the row.
            copies = Counter(item.key for item in pool)
            vectors = cache.encode(pool)
            own = cache.encode([row.positives[0] for row in asked])
            queries = cache.encode([r.query for r in asked], [r.instruction for r in asked])
            for start in range(0, len(asked), _QUERIES_AT_ONCE):
                block = slice(start, start + _QUERIES_AT_ONCE)
                # (block, 1)
                scores = (queries[block] * own[block]).sum(axis=1, keepdims=True)
                better = ((queries[block] @ vectors.T) > scores + _EQUAL).sum(axis=1)
                for row, count in zip(asked[block], better.tolist(), strict=True):
                    if count >= top_k + max(0, copies[row.positives[0].key] - 1):
                        lost.add(row.id)
    kept = [row for row in rows if row.id not in lost]
    return kept, len(lost), len(rows) - len(judged)
