"""Turn other projects' training data into rows.

    python -m mmrag_recipes convert mmeb train.jsonl --images MMEB-train/ --out rows.jsonl
    python -m mmrag_recipes convert mbeir query.jsonl --pool pool.jsonl --images . --out rows.jsonl
    python -m mmrag_recipes convert swift train.jsonl --images . --out rows.jsonl
    python -m mmrag_recipes convert pdfs questions.jsonl --pdfs papers/ --out rows.jsonl

A record that cannot be used is reported and left out; the rest is converted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mmrag.errors import ContentError, ReadError
from mmrag.reading import read_file
from mmrag_recipes.config import ConvertConfig
from mmrag_recipes.rows import ImageStore, Item, Row, store_of, write_rows

_PLACEHOLDER = re.compile(r"<\|image_\d+\|>|<image>|<\|image_pad\|>")


@dataclass
class Converted:
    """Rows, and one message per record that was left out."""

    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Images:
    """Where a data set's images come from and where they go."""

    folder: Path
    store: ImageStore

    def item(self, text: str | None, image: str | None) -> Item:
        """Make an item; placeholders are taken out of the text, the image into the store."""
        plain = _PLACEHOLDER.sub("", text or "").strip()
        if not plain and not image:
            raise ContentError("an item has neither text nor picture")
        image_id = self.store.add(self._path(image)) if image else None
        return Item(text=plain or None, image=image_id)

    def _path(self, image: str) -> Path:
        path = self.folder / image
        if not path.is_file():
            raise ContentError(f"there is no image {path}")
        return path


def from_mmeb(records: Sequence[Mapping[str, Any]], images: Images, task: str) -> Converted:
    """VLM2Vec's MMEB training rows: ``qry``, ``qry_image_path``, ``pos_text``, ... .

    The instruction is part of ``qry`` there and stays in the query's text.
    """

    def convert(number: int, record: Mapping[str, Any]) -> Row:
        negatives = []
        if record.get("neg_text") or record.get("neg_image_path"):
            negatives = [images.item(record.get("neg_text"), record.get("neg_image_path"))]
        return Row(
            id=str(record.get("id", f"{task}-{number}")),
            task=task,
            query=images.item(record["qry"], record.get("qry_image_path")),
            positives=[images.item(record.get("pos_text"), record.get("pos_image_path"))],
            negatives=negatives,
            source=task,
        )

    return _each(records, convert)


def from_mbeir(
    records: Sequence[Mapping[str, Any]],
    pool: Sequence[Mapping[str, Any]],
    images: Images,
    task: str,
) -> Converted:
    """M-BEIR's queries (``qid``, ``query_txt``, ``pos_cand_list``, ...) with their pool."""
    candidates = {candidate["did"]: candidate for candidate in pool}

    def document(did: str) -> Item:
        if did not in candidates:
            raise ContentError(f"candidate {did} is not in the pool")
        return images.item(candidates[did].get("txt"), candidates[did].get("img_path"))

    def convert(number: int, record: Mapping[str, Any]) -> Row:
        return Row(
            id=str(record["qid"]),
            task=task,
            instruction=record.get("instruction"),
            query=images.item(record.get("query_txt"), record.get("query_img_path")),
            positives=[document(did) for did in record["pos_cand_list"]],
            negatives=[document(did) for did in record.get("neg_cand_list") or []],
            source=task,
        )

    return _each(records, convert)


def from_swift(records: Sequence[Mapping[str, Any]], pictures: Images, task: str) -> Converted:
    """ms-swift's rows: ``messages`` with ``images``, ``positive_messages``, ``negative_messages``.

    A system message of the query is its instruction.
    """

    def side(messages: Sequence[Mapping[str, str]], images: Sequence[str]) -> Item:
        text = "\n".join(m["content"] for m in messages if m["role"] != "system")
        if len(images) > 1:
            raise ContentError(f"{len(images)} images in one item; rows hold one")
        return pictures.item(text, images[0] if images else None)

    def sides(record: Mapping[str, Any], kind: str) -> list[Item]:
        messages = record.get(f"{kind}_messages") or []
        images = record.get(f"{kind}_images") or [[] for _ in messages]
        return [side(*pair) for pair in zip(messages, images, strict=True)]

    def convert(number: int, record: Mapping[str, Any]) -> Row:
        told = [m["content"] for m in record["messages"] if m["role"] == "system"]
        return Row(
            id=f"{task}-{number}",
            task=task,
            instruction=told[0] if told else None,
            query=side(record["messages"], record.get("images") or []),
            positives=sides(record, "positive"),
            negatives=sides(record, "negative"),
            source=task,
        )

    return _each(records, convert)


def from_pdfs(
    questions: Sequence[Mapping[str, Any]], pdfs: Path, store: ImageStore, items: str, license: str
) -> Converted:
    """Questions about pages of PDFs; a page becomes its image, its text, or both.

    Only the files that are asked about are read.
    """
    converted = Converted()
    pages: dict[tuple[str, int], Item] = {}
    for name in sorted({page["file"] for q in questions for page in q.get("pages", ())}):
        errors: list[ReadError] = []
        for number, item in _pages(pdfs / name, store, items, errors):
            pages[name, number] = item
        converted.problems.extend(str(error) for error in errors)

    def convert(number: int, record: Mapping[str, Any]) -> Row:
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
            license=license,
        )

    found = _each(questions, convert)
    return Converted(found.rows, converted.problems + found.problems)


def _pages(
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


def _each(
    records: Sequence[Mapping[str, Any]], convert: Callable[[int, Mapping[str, Any]], Row]
) -> Converted:
    converted = Converted()
    for number, record in enumerate(records, 1):
        try:
            converted.rows.append(convert(number, record))
        except KeyError as error:
            converted.problems.append(f"record {number}: {error} is missing")
        except (ContentError, ValidationError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            converted.problems.append(f"record {number}: {reason}")
    return converted


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON lines file or of a JSON list.

    Raises: ContentError if it is neither, or one of them is no JSON object.
    """
    text = path.read_text(encoding="utf-8")
    try:
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except ValueError as error:
        raise ContentError(f"{path}: neither JSON lines nor a JSON list ({error}).") from error
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise ContentError(f"{path}: record {number} is no JSON object.")
    return list(records)


def run(options: ConvertConfig) -> None:
    """Command: convert a file of records."""
    converted = _convert(options)
    count = write_rows(options.out, converted.rows)
    for problem in converted.problems:
        print(f"left out: {problem}")
    print(f"{count} rows, {len(converted.problems)} left out: {options.out}")


def _convert(options: ConvertConfig) -> Converted:
    records = read_records(options.records)
    images = Images(options.images, store_of(options.out))
    task = options.task or options.records.stem
    match options.kind:
        case "mmeb":
            return from_mmeb(records, images, task)
        case "mbeir":
            if options.pool is None:
                raise ContentError("mbeir needs --pool, the file of candidates.")
            return from_mbeir(records, read_records(options.pool), images, task)
        case "swift":
            return from_swift(records, images, task)
    return from_pdfs(records, options.pdfs, images.store, options.items, options.license)
