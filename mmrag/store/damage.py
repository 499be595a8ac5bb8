"""What damaged files of a shard have cost a collection, found by reading every point once."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from mmrag.store.engine import TERMS_FIELD, AnyOf, Engine, Filter, Point, Schema
from mmrag.store.entries import FileEntry

# Terms whose index is compared with the points; a large collection has tens of millions.
_MAX_TERMS = 200_000


@dataclass
class Examination:
    """What was found wrong.

    lost: files that have fewer nodes than were stored, with how many fewer.
    altered: ids of points that are not as they were written, of files and settings too.
    as_written: those of them that had no vectors, and are otherwise as they were written.
    misplaced: files of which nodes have another path than the file: a change that was lost.
    indexes: fields whose index does not agree with the points.
    missing: how many points fewer there are than when the collection was last closed; negative
        for points that came back.
    unfinished: files that have nodes and are not finished, which is no damage where a run was
        cut short; each with ``pages`` and ``nodes`` of 0.
    """

    lost: dict[FileEntry, int] = field(default_factory=dict)
    altered: list[str] = field(default_factory=list)
    as_written: list[Point] = field(default_factory=list)
    misplaced: list[FileEntry] = field(default_factory=list)
    indexes: list[str] = field(default_factory=list)
    missing: int = 0
    unfinished: list[FileEntry] = field(default_factory=list)

    @property
    def damaged(self) -> bool:
        """Whether anything is not as it was written."""
        return bool(self.lost or self.altered or self.misplaced or self.indexes or self.missing)


def examine(engine: Engine, schema: Schema) -> Examination:
    """Read every point with its vectors, and compare with checksums, entries and indexes."""
    found = Examination(missing=engine.missing)
    entries: list[FileEntry] = []
    n_nodes: Counter[str] = Counter()
    places: dict[str, set[tuple[str, str]]] = defaultdict(set)
    values: dict[str, Counter[str | int]] = {
        key: Counter() for key in (*schema.keywords, *schema.integers)
    }
    terms: Counter[str] = Counter()
    for point in engine.every_point():
        _count_values(point, values, terms)
        payload = point.payload
        if not engine.is_intact(point):
            found.altered.append(point.id)
            # Some points never had vectors; damage can show as vectors that were not written.
            point = dataclasses.replace(point, vectors={})
            if not engine.is_intact(point):
                continue
            found.as_written.append(point)
        if payload.get("kind") == "file":
            entries.append(FileEntry.from_payload(payload))
        elif "node_hash" in payload:
            n_nodes[payload["doc_id"]] += 1
        elif "sha256" in payload:
            n_nodes[payload["sha256"]] += 1
            places[payload["sha256"]].add((payload.get("file", ""), payload.get("folder", "")))
    for entry in entries:
        n_found = n_nodes[entry.doc_id or entry.sha256]
        if n_found < entry.nodes:
            found.lost[entry] = entry.nodes - n_found
        if any(file != entry.file for file, _ in places[entry.sha256]):
            found.misplaced.append(entry)
    finished = {entry.sha256 for entry in entries}
    for sha256 in sorted(places.keys() - finished):
        file, folder = min(places[sha256])
        found.unfinished.append(FileEntry(file, sha256, pages=0, nodes=0, folder=folder))
    found.indexes = _wrong_indexes(engine, schema, values, terms)
    return found


def _count_values(point: Point, values: dict[str, Counter[str | int]], terms: Counter[str]) -> None:
    """Count what the indexes should hold of a point, which may be a damaged one."""
    for key, counts in values.items():
        value = point.payload.get(key)
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, (str, int)):
                counts[each] += 1
    for term in {each for text in point.payload.get(TERMS_FIELD, ()) for each in text.split()}:
        if term in terms or len(terms) < _MAX_TERMS:
            terms[term] += 1


def _wrong_indexes(
    engine: Engine, schema: Schema, values: dict[str, Counter[str | int]], terms: Counter[str]
) -> list[str]:
    wrong = [key for key in schema.keywords if engine.facet(key) != values[key]]
    for key in schema.integers:
        counts = values[key].items()
        if any(engine.count(Filter((AnyOf(key, (each,)),))) != count for each, count in counts):
            wrong.append(key)
    if any(engine.count_term(term) != count for term, count in terms.items()):
        wrong.append(TERMS_FIELD)
    return wrong
