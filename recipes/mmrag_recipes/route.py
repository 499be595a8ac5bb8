"""Write where an expert's queries lie, so that ``UniversalEmbedding(experts=...)`` can route to it.

    python -m mmrag_recipes route experts/medical --rows medical/rows.jsonl --base mmrag-nano

The file ``route.json`` goes into the folder of the expert; ``mmrag.embedders.routing`` reads it.
"""

from __future__ import annotations

from mmrag.embedders import load_embedder
from mmrag.embedders.routing import save_route
from mmrag_recipes.config_models import RouteConfig
from mmrag_recipes.evaluate import encode_queries
from mmrag_recipes.rows import read_rows, store_of


def run(options: RouteConfig) -> None:
    """Command: compute and write the centroid."""
    rows = read_rows(options.rows)
    base = load_embedder(options.base, family=options.family)
    queries = encode_queries(base, rows, store_of(options.rows))
    print(f"centroid of {len(rows)} queries: {save_route(options.expert, base, queries)}")
