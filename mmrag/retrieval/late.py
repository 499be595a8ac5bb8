"""The stages of late interaction: MUVERA among the first, MaxSim over what all of them found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmrag.embedders.late import LateInteraction
from mmrag.queries import Where
from mmrag.reading.files import node_id
from mmrag.retrieval.fusion import PAGE_FIELDS
from mmrag.store.collection import Collection
from mmrag.store.engine import MUVERA, TOKENS, Scored


def late_rankings(
    collection: Collection,
    late: LateInteraction | None,
    text: str | None,
    found: Mapping[str, Sequence[Scored]],
    *,
    limit: int,
    where: Where | None,
    weights: Mapping[str, float],
) -> dict[str, list[Scored]]:
    """``muvera``, where the collection keeps it, and ``tokens``; without those of weight 0.

    Args:
        late: None for a collection without tokens: there are none of these rankings then.
        text: of the query; one without has none either.
        found: the rankings of the other first stages.
    """
    rankings: dict[str, list[Scored]] = {}
    if late is None or not text:
        return rankings
    tokens = late.embedder.encode_query(text)
    if late.muvera is not None and weights[MUVERA] > 0:
        vector = late.muvera.encode_query(tokens)
        rankings[MUVERA] = collection.search(MUVERA, vector, limit, where, PAGE_FIELDS)
    if weights[TOKENS] > 0:
        hits = [hit for hits in (*found.values(), *rankings.values()) for hit in hits]
        rankings[TOKENS] = collection.max_sim(tokens, _with_pages(hits), where, PAGE_FIELDS)
    return rankings


def _with_pages(hits: Sequence[Scored]) -> list[str]:
    """Ids of the nodes found, and of their pages: a passage's tokens may be those of its page."""
    ids = {hit.id: None for hit in hits}
    for hit in hits:
        sha256, page = hit.payload.get("sha256"), hit.payload.get("page")
        if sha256 is not None and page is not None:
            ids[node_id(sha256, page, "page", 0)] = None
    return list(ids)
