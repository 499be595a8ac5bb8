"""Single searches of an engine, which takes several at once."""

from mmrag.store.engine import Nearest, Words


def nearest(engine, name, vector, limit, where, payload=True):
    (found,) = engine.rank([Nearest(name, vector)], limit, where, payload)
    return found


def bm25(engine, terms, limit, where, payload=True):
    (found,) = engine.rank([Words(terms)], limit, where, payload)
    return found
