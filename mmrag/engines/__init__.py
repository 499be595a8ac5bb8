"""Two engines under one protocol: qdrant-edge in this process, and a Qdrant server.

The engines know points, named vectors, filters and BM25; what the points mean is the business
of ``mmrag.collection``.
"""

from mmrag.engines.base import (
    AnyOf,
    Between,
    Condition,
    Engine,
    Filter,
    Point,
    Schema,
    Scored,
    check_language,
)
from mmrag.engines.edge import EdgeEngine
from mmrag.engines.server import ServerEngine

__all__ = [
    "AnyOf",
    "Between",
    "Condition",
    "EdgeEngine",
    "Engine",
    "Filter",
    "Point",
    "Schema",
    "Scored",
    "ServerEngine",
    "check_language",
]
