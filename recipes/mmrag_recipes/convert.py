"""Turn training data of other forms into rows, record by record.

    python -m mmrag_recipes convert mmeb MMEB-train/ --subsets OK-VQA --images . --out rows.jsonl
    python -m mmrag_recipes convert mbeir query.jsonl --pool pool.jsonl --images . --out rows.jsonl
    python -m mmrag_recipes convert swift train.jsonl --images . --out rows.jsonl
    python -m mmrag_recipes convert rows mine.jsonl --images . --out rows.jsonl
    python -m mmrag_recipes convert pdfs questions.jsonl --pdfs papers/ --out rows.jsonl

A record that cannot be used is reported and left out; the rest is converted. Nothing is held in
memory but the places of the candidates in a pool and the pages of videos.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mmrag.errors import ConfigError, ContentError, ReadError
from mmrag.reading import read_file
from mmrag_recipes.config import ConvertConfig
from mmrag_recipes.rows import ImageStore, Item, Row, first_problem, store_of, write_rows
from mmrag_recipes.sides import Files, Media, Sides, Stretch

logger = logging.getLogger("mmrag_recipes")

Record = Mapping[str, Any]
Converted = Iterator[Row | str]
"""Rows, and a message for each record that is left out."""

# A wrong folder of images makes every record a problem: the first few tell, and the count.
_SHOWN_PROBLEMS = 20


def from_mmeb(records: Iterable[Record], media: Media, task: str) -> Converted:
    """VLM2Vec's MMEB training rows: ``qry``, ``qry_image_path``, ``pos_text``, ... .

    The instruction is part of ``qry`` there and stays in the query's text.
    """

    def convert(number: int, record: Record) -> Row:
        negatives = []
        # Most subsets have the columns, but empty.
        if record.get("neg_text") or record.get("neg_image_path"):
            negatives = [media.item(_files(record.get("neg_text"), record.get("neg_image_path")))]
        name = record.get("subset", task)
        return Row(
            id=str(record.get("id", f"{name}-{number}")),
            task=name,
            query=media.item(_files(record["qry"], record.get("qry_image_path"))),
            # get: classification has answers in words alone, image retrieval none in words.
            positives=[media.item(_files(record.get("pos_text"), record.get("pos_image_path")))],
            negatives=negatives,
            source=name,
        )

    return _each(records, convert)


def from_mbeir(
    records: Iterable[Record],
    pool: Pool,
    media: Media,
    task: str,
    instructions: Mapping[tuple[str, str, str], str] | None = None,
) -> Converted:
    """M-BEIR's queries (``qid``, ``query_txt``, ``pos_cand_list``, ...) with their pool.

    Args:
        instructions: sentence by data set, query modality and candidate modality; a query that
            has none of them is left out.
    """

    def document(did: str) -> Item:
        candidate = pool[did]
        return media.item(_files(candidate.get("txt"), candidate.get("img_path")))

    def instruction(record: Record) -> str | None:
        if instructions is None:
            return record.get("instruction")
        # The instruction says what is looked for, so it depends on the answer's modality (M-BEIR,
        # arXiv 2311.17136).
        sought = pool[record["pos_cand_list"][0]]["modality"]
        # A qid is "data set:number".
        asked = str(record["qid"]).partition(":")[0], record["query_modality"], sought
        if asked not in instructions:
            raise ContentError(f"no instruction for {asked}")
        return instructions[asked]

    def convert(number: int, record: Record) -> Row:
        return Row(
            id=str(record["qid"]),
            task=task,
            instruction=instruction(record),
            query=media.item(_files(record.get("query_txt"), record.get("query_img_path"))),
            positives=[document(did) for did in record["pos_cand_list"]],
            negatives=[document(did) for did in record.get("neg_cand_list") or []],
            source=task,
        )

    return _each(records, convert)


class Pool:
    """The candidates of a JSON lines file by ``did``, read from their places in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # M-BEIR's pools have millions of candidates: 16 bytes of each are kept, not the records.
        hashes, offsets = [], []
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    hashes.append(_hash(str(json.loads(line)["did"])))
                    offsets.append(offset)
                offset += len(line)
        # Sorted, to be found by bisection: a dict of millions of strings would take gigabytes.
        order = np.argsort(np.array(hashes, dtype=np.int64), kind="stable")
        self._hashes: NDArray[np.int64] = np.array(hashes, dtype=np.int64)[order]
        self._offsets: NDArray[np.int64] = np.array(offsets, dtype=np.int64)[order]

    def __getitem__(self, did: str) -> dict[str, Any]:
        """A candidate. Raises ContentError if there is none."""
        place = int(np.searchsorted(self._hashes, _hash(did)))
        with self.path.open("rb") as file:
            # Two ids may share a hash, so the id itself decides.
            while place < len(self._hashes) and self._hashes[place] == _hash(did):
                file.seek(self._offsets[place])
                candidate: dict[str, Any] = json.loads(file.readline())
                if str(candidate["did"]) == did:
                    return candidate
                place += 1
        raise ContentError(f"candidate {did} is not in the pool")


def _hash(text: str) -> int:
    # 63 bits: numpy's int64 has a sign. Not hash(), which differs from process to process.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def read_instructions(path: Path) -> dict[tuple[str, str, str], str]:
    """M-BEIR's ``query_instructions.tsv``: its first prompt by data set and modalities."""
    # newline="": csv itself has to see the line ends that stand in a quoted field.
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    try:
        return {
            (row["dataset_id"], row["query_modality"], row["cand_modality"]): row["prompt_1"]
            for row in rows
        }
    except KeyError as error:
        raise ContentError(f"{path}: there is no column {error}.") from error


def from_swift(records: Iterable[Record], media: Media, task: str) -> Converted:
    """ms-swift's rows in both forms.

    ``messages`` with ``images`` and ``videos``, ``positive_messages`` and ``negative_messages``;
    or ``query``, ``response`` and ``rejected_response``. A system message of the query is its
    instruction. A video beside a positive or negative gives one for each of its frames, or one
    clip.
    """

    def documents(record: Record, kind: str, right: Container[int] = ()) -> list[Item]:
        messages = record.get(f"{kind}_messages") or []
        # A list for each document, empty for those without images or videos.
        images = record.get(f"{kind}_images") or [[] for _ in messages]
        videos = record.get(f"{kind}_videos") or [[] for _ in messages]
        sides = zip(map(_said, messages), images, videos, strict=True)
        return [item for side in sides for item in media.documents(_swift(*side), right)]

    def convert(number: int, record: Record) -> Row:
        # Pairs of its other losses may be unlike each other, or alike to some degree.
        if record.get("label") not in (None, 1):
            raise ContentError(f"label is {record['label']}: only pairs with label 1 become rows")
        if "query" in record:
            rejected = record.get("rejected_response") or []
            rejected = [rejected] if isinstance(rejected, str) else rejected
            query = _swift(record["query"], record.get("images"), record.get("videos"))
            return Row(
                id=f"{task}-{number}",
                task=task,
                instruction=record.get("system"),
                query=media.item(query),
                positives=[media.item(_swift(record["response"]))],
                negatives=[media.item(_swift(text)) for text in rejected],
                source=task,
            )
        told = [m["content"] for m in record["messages"] if m["role"] == "system"]
        query = _swift(_said(record["messages"]), record.get("images"), record.get("videos"))
        positives = documents(record, "positive")
        return Row(
            id=f"{task}-{number}",
            task=task,
            instruction=told[0] if told else None,
            query=media.item(query),
            positives=positives,
            negatives=documents(record, "negative", {item.key for item in positives}),
            source=task,
        )

    return _each(records, convert)


def _said(messages: Sequence[Mapping[str, str]]) -> str:
    return "\n".join(m["content"] for m in messages if m["role"] != "system")


def _swift(text: str, images: Any = None, videos: Any = None) -> Files:
    """What makes an item; images and videos are paths, or tables that have one."""
    names, shown = _paths(images), _paths(videos)
    if (n_told := text.count("<video>")) != len(shown):
        raise ContentError(f"{n_told} <video> in a text with {len(shown)} videos")
    # Fewer are right: ms-swift puts those that are not named at the start.
    if (n_told := text.count("<image>")) > len(names):
        raise ContentError(f"{n_told} <image> in a text with {len(names)} images")
    return Files(text, names, [Stretch(name) for name in shown])


def _paths(files: Any) -> list[str]:
    """Paths of files, each a path or a table that has one; a single one may stand alone."""
    listed = [files] if isinstance(files, str | Mapping) else files or []
    return [str(file["path"] if isinstance(file, Mapping) else file) for file in listed]


def from_rows(records: Iterable[Record], media: Media, task: str) -> Converted:
    """Rows whose sides name files: ``image`` by path, ``video`` with ``start`` and ``end``.

    A positive or negative that is a video gives one for each of its frames, with its score, or one
    clip.
    """

    def convert(number: int, record: Record) -> Row:
        record = _without_null(record)
        sides = Sides.model_validate(record)
        row = {"id": f"{task}-{number}", "task": task, **record}
        row["id"] = str(row["id"])
        row["query"] = media.item(sides.query.files)
        right: set[int] = set()
        for kind, named in (("positive", sides.positives), ("negative", sides.negatives)):
            scores = record.get(f"{kind}_scores") or []
            if scores and len(scores) != len(named):
                raise ContentError(f"{len(scores)} {kind}_scores for {len(named)} {kind}s")
            made = [media.documents(side.files, right) for side in named]
            row[f"{kind}s"] = [item for items in made for item in items]
            row[f"{kind}_scores"] = [
                scores[n] for n, items in enumerate(made) if scores for _ in items
            ]
            right.update(item.key for item in row[f"{kind}s"])
        return Row.model_validate(row)

    return _each(records, convert)


def _without_null(value: Any) -> Any:
    """A value of JSON without null, which tables write where a record has no such field."""
    if isinstance(value, Mapping):
        return {key: _without_null(one) for key, one in value.items() if one is not None}
    return [_without_null(one) for one in value] if isinstance(value, list) else value


def _files(text: str | None, image: str | None) -> Files:
    return Files(text, [image] if image else [])


def from_pdfs(
    questions: Iterable[Record], pdfs: Path, store: ImageStore, items: str, license_: str
) -> Converted:
    """Questions about pages of PDFs; a page becomes its image, its text, or both.

    Only the files that are asked about are read.
    """
    # Gone through twice: first to learn which files to read.
    asked = list(questions)
    pages: dict[tuple[str, int], Item] = {}
    for name in sorted({page["file"] for q in asked for page in q.get("pages", ())}):
        errors: list[ReadError] = []
        for number, item in pages_of(pdfs / name, store, items, errors):
            pages[name, number] = item
        yield from (str(error) for error in errors)

    def convert(number: int, record: Record) -> Row:
        wanted = [(page["file"], page["page"]) for page in record["pages"]]
        missing = [f"{file} page {page}" for file, page in wanted if (file, page) not in pages]
        if missing:
            raise ContentError(f"not readable: {', '.join(missing)}")
        return Row(
            id=str(record.get("id", f"question-{number}")),
            task="page_for_question",
            instruction="page_for_question",
            query=Item(text=record["question"]),
            positives=[pages[page] for page in wanted],
            source=f"{wanted[0][0]}#{wanted[0][1]}",
            license=license_,
        )

    yield from _each(asked, convert)


def pages_of(
    path: Path, store: ImageStore, items: str, errors: list[ReadError]
) -> Iterator[tuple[int, Item]]:
    """Number and item of each page of a file that has what is asked for."""
    for page in read_file(path, store.folder.parent / "pages", on_error=errors.append):
        node = next((n for n in page.nodes if n.metadata["kind"] == "page"), None)
        if node is None or page.page is None:
            continue
        text = node.text_resource.text if node.text_resource else None  # type: ignore[attr-defined]
        image = store.add(Path(node.metadata["page_image"])) if items != "text" else None
        if items == "image" or not text:
            text = None
        if text or image:
            yield page.page, Item(text=text, image=image)


def _each(records: Iterable[Record], convert: Callable[[int, Record], Row]) -> Converted:
    seen: set[int] = set()
    for number, record in enumerate(records, 1):
        try:
            row = convert(number, record)
            if (name := _hash(row.id)) in seen:  # files of rows have each id once
                raise ContentError(f"id {row.id!r} is that of an earlier record")
            seen.add(name)
            yield row
        except KeyError as error:
            yield f"record {number}: {error} is missing"
        except ValidationError as error:
            yield f"record {number}: {first_problem(error)}"
        except (ContentError, ValueError, TypeError) as error:
            yield f"record {number}: {error}"


def read_records(path: Path, subsets: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Records of a JSON lines file, a JSON list, a parquet file, or a folder of subsets.

    In a folder, each sub-folder with parquet files is a subset; its name is in ``subset``.

    Raises:
        ContentError: If it is none of these, or one of the records is no JSON object.
    """
    if path.is_dir():
        yield from _subsets(path, subsets)
    elif path.suffix == ".parquet":
        yield from _parquet(path)
    else:
        with path.open("rb") as file:
            start = file.read(1000).removeprefix(codecs.BOM_UTF8).lstrip()
        yield from _json_list(path) if start.startswith(b"[") else _json_lines(path)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    # Bytes: json takes away a byte order mark, and an error of the encoding is one of the line.
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ContentError(
                    f"{path}: neither JSON lines nor a JSON list ({error})."
                ) from error
            yield _checked(path, number, record)


def _json_list(path: Path) -> Iterator[dict[str, Any]]:
    try:
        records = json.loads(path.read_bytes())
    except ValueError as error:
        raise ContentError(f"{path}: neither JSON lines nor a JSON list ({error}).") from error
    for number, record in enumerate(records, 1):
        yield _checked(path, number, record)


def _checked(path: Path, number: int, record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ContentError(f"{path}: record {number} is not a JSON object.")
    return record


def _subsets(folder: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    found = sorted({path.parent for path in folder.glob("*/*.parquet")})
    unknown = sorted(set(wanted) - {path.name for path in found})
    if not found:
        raise ContentError(f"{folder}: no subset, which is a folder with parquet files.")
    if unknown:
        names = ", ".join(path.name for path in found)
        raise ContentError(f"{folder}: no subset {', '.join(unknown)}; there are: {names}.")
    for subset in found:
        if not wanted or subset.name in wanted:
            for path in sorted(subset.glob("*.parquet")):
                yield from ({**record, "subset": subset.name} for record in _parquet(path))


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("Parquet files need pyarrow: pip install 'mmrag[train]'") from error
    try:
        # In parts: training sets have hundreds of thousands of records.
        for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ContentError(f"{path}: not a parquet file ({error}).") from error


def run(options: ConvertConfig) -> None:
    """Command: convert a file of records."""
    n_rows, n_problems = 0, 0

    def rows() -> Iterator[Row]:
        nonlocal n_rows, n_problems
        for made in _convert(options):
            if isinstance(made, Row):
                n_rows += 1
                yield made
                continue
            n_problems += 1
            if n_problems <= _SHOWN_PROBLEMS:
                print(f"left out: {made}")
        if not n_rows:
            raise ContentError(f"{options.records}: none of its {n_problems} records can be used.")

    # A generator: a large set is never in memory as a whole.
    write_rows(options.out, rows())
    print(f"{n_rows} rows, {n_problems} left out: {options.out}")


def _convert(options: ConvertConfig) -> Converted:
    records = read_records(options.records, options.subsets)
    media = Media(options.images, store_of(options.out), options.items, options.clips)
    task = options.task or options.records.stem
    match options.kind:
        case "mmeb":
            return from_mmeb(records, media, task)
        case "mbeir":
            if options.pool is None:
                raise ContentError("mbeir needs --pool, the file of candidates.")
            told = read_instructions(options.instructions) if options.instructions else None
            return from_mbeir(records, Pool(options.pool), media, task, told)
        case "swift":
            return from_swift(records, media, task)
        case "rows":
            return from_rows(records, media, task)
    return from_pdfs(records, options.pdfs, media.store, options.items, options.license)
