"""Draft questions about a user's own files, with answers and nuggets, for a person to check.

    python -m mmrag_recipes draft_questions papers/ --out data/mine --llm MODEL --base-url URL
    mmrag eval data/mine/questions.jsonl papers/

A model writes each kind of question about each file, so that the matrix of kinds of questions by
kinds of documents is filled evenly (after OmniEval, arXiv 2412.13018), with the facts that a good
answer states (nuggets, vital or not; AutoNuggetizer, arXiv 2411.09607). Each row of
``questions.jsonl`` is a draft. It counts once its ``status`` is set to ``accepted``; ``review.md``
shows all rows for reading. Run the same command again to go on: rows that are there are kept as
they are, corrections too.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from string import Template
from typing import Any

from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag.evaluation.kept import Kept, fingerprint
from mmrag.evaluation.questions import json_lines
from mmrag_recipes.config import PROMPTS, QUESTION_KINDS, DraftQuestionsConfig
from mmrag_recipes.console import track
from mmrag_recipes.corpus import Document, read_corpus
from mmrag_recipes.rows import IMAGES, ImageStore
from mmrag_recipes.writers import JsonAsker, Model, open_model

logger = logging.getLogger("mmrag_recipes")

_PAGES = {"comparison": 2, "summary": 3}  # a question is about; one where nothing is said
_MOST_TEXT = 6000  # characters of a page that a prompt carries
_MOST_FAILURES = 8  # of the server, in a row


@dataclass(frozen=True)
class Job:
    """A question to write. pages: neighbours of one file."""

    kind: str
    pages: tuple[Document, ...]

    @property
    def id(self) -> str:
        """Identity over runs."""
        first = self.pages[0]
        return f"{self.kind}/{PurePath(first.file).name}#{first.page or 1}"


def plan_jobs(documents: Sequence[Document], config: DraftQuestionsConfig) -> list[Job]:
    """Every kind of question about every file in turn, each about pages of its own."""
    files: dict[str, list[Document]] = {}
    for document in documents:
        # A page holds what its passages and figures do.
        if document.kind not in ("passage", "figure"):
            files.setdefault(document.file, []).append(document)
    chance = random.Random(config.seed)
    turns: list[Iterator[Job]] = []
    for pages in files.values():
        for kind in config.kinds:
            span = _PAGES.get(kind, 1)
            starts = list(range(len(pages) - span + 1))
            chance.shuffle(starts)
            turns.append(iter([Job(kind, tuple(pages[at : at + span])) for at in starts]))
    chance.shuffle(turns)
    jobs: list[Job] = []
    while turns and len(jobs) < config.rows:
        found = [(turn, next(turn, None)) for turn in turns]
        jobs += [job for _, job in found if job is not None]
        turns = [turn for turn, job in found if job is not None]
    # Files are told apart by name alone, as mmrag eval does.
    return list({job.id: job for job in jobs}.values())[: config.rows]


class Drafter:
    """Writes rows with a model. Raises EndpointError from every method if the server fails."""

    def __init__(self, model: Model, store: ImageStore, kept: Kept) -> None:
        self.asker, self.store, self.kept, self.name = JsonAsker(model), store, kept, model.name
        self._prompts = {
            name: Template((PROMPTS / f"{name}.txt").read_text(encoding="utf-8"))
            for name in ("question", "document_kind")
        }
        self._lock = threading.Lock()

    def row(self, job: Job, kinds: Sequence[str], first: Document) -> dict[str, Any] | None:
        """The row of a job; None if the model writes no question."""
        prompt = self._prompts["question"].safe_substitute(
            kind=job.kind, description=QUESTION_KINDS[job.kind], pages=_shown(job.pages)
        )
        reply = self.asker.ask(prompt, self._images(job.pages), "question")
        question, nuggets = str(reply.get("question") or "").strip(), _nuggets(reply)
        answerable = job.kind != "unanswerable"
        if not question or (answerable and not nuggets):
            return None
        places = [{"file": PurePath(d.file).name, "page": d.page or 1} for d in job.pages]
        row: dict[str, Any] = {
            "id": job.id,
            "status": "draft",
            "kind": job.kind,
            "document_kind": self.document_kind(first, kinds),
            "question": question,
            "written_by": self.name,
        }
        if not answerable:
            # Where it would be answered: for the person who checks that it is not.
            return row | {"answerable": False, "written_from": places}
        answer = str(reply.get("answer") or "").strip()
        return row | {"answer": answer, "pages": places, "nuggets": nuggets}

    def document_kind(self, document: Document, kinds: Sequence[str]) -> str:
        """What kind of document a file is, by its first page; ``other`` for none of ``kinds``."""
        key = fingerprint("document kind", self.name, document.id, list(kinds))
        # One at a time: several jobs of one file would ask the same.
        with self._lock:
            return str(self.kept.get_or(key, lambda: self._kind_of(document, kinds)))

    def _kind_of(self, document: Document, kinds: Sequence[str]) -> str:
        prompt = self._prompts["document_kind"].safe_substitute(
            kinds=", ".join(kinds), text=_shown([document])
        )
        reply = self.asker.ask(prompt, self._images([document]), "kind")
        found = str(reply.get("kind") or "").strip().lower()
        return found if found in kinds else "other"

    def _images(self, pages: Sequence[Document]) -> list[Path]:
        """Of pages without text, which nothing else would show."""
        return [self.store.path(d.image) for d in pages if d.image and not d.text.strip()]


def _nuggets(reply: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = reply.get("nuggets")
    facts = [each for each in given if isinstance(each, Mapping)] if isinstance(given, list) else []
    return [
        {"text": str(each["text"]).strip(), "vital": bool(each.get("vital", True))}
        for each in facts
        if str(each.get("text") or "").strip()
    ]


def _shown(pages: Sequence[Document]) -> str:
    parts = [f"Page {d.page or 1}:\n{d.text[:_MOST_TEXT] or '(an image)'}" for d in pages]
    return "\n\n".join(parts)


def draft_questions(config: DraftQuestionsConfig, model: Model) -> Counter[str]:
    """Write ``questions.jsonl`` and ``review.md``; returns how many rows are of each status.

    Rows that no question could be written for are counted as ``not written``.

    Raises:
        ContentError: If nothing could be read.
        ConfigError: For unknown kinds of questions.
        EndpointError: If the server fails many times in a row; what was written is kept.
    """
    if unknown := sorted(set(config.kinds) - set(QUESTION_KINDS)):
        raise ConfigError(f"kinds: {unknown} are unknown; there are {list(QUESTION_KINDS)}.")
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    store = ImageStore(out / IMAGES)
    documents, problems = read_corpus(config.paths, store, kept=out / "documents.jsonl")
    for problem in problems:
        logger.warning("not read: %s", problem)
    if not documents:
        raise ContentError("Nothing could be read: there is no question to write.")
    path = out / "questions.jsonl"
    there = {row["id"] for row in read_rows(path)}
    jobs = [job for job in plan_jobs(documents, config) if job.id not in there]
    drafter = Drafter(model, store, Kept(out / "document_kinds.jsonl"))
    firsts = {d.file: d for d in reversed(documents) if d.kind not in ("passage", "figure")}
    lost = 0
    try:
        for row in _written(jobs, drafter, config, firsts):
            if row is None:
                lost += 1
                continue
            # Each row at once: a model costs money, and a run may be stopped.
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    finally:
        rows = read_rows(path)
        (out / "review.md").write_text(review(rows), encoding="utf-8")
    return Counter([str(row.get("status")) for row in rows] + ["not written"] * lost)


def _written(
    jobs: Sequence[Job],
    drafter: Drafter,
    config: DraftQuestionsConfig,
    firsts: Mapping[str, Document],
) -> Iterator[dict[str, Any] | None]:
    failures = 0
    stopped = threading.Event()

    def work(job: Job) -> dict[str, Any] | None:
        nonlocal failures
        if stopped.is_set():
            return None
        try:
            row = drafter.row(job, config.document_kinds, firsts[job.pages[0].file])
        except EndpointError as error:
            logger.warning("%s: %s", job.id, error)
            failures += 1
            # An event, since a reply that comes late would set the count back.
            if failures >= _MOST_FAILURES:
                stopped.set()
            return None
        failures = 0
        return row

    with ThreadPoolExecutor(config.concurrency) as pool:
        yield from track(pool.map(work, jobs), len(jobs), "writing questions")
    if stopped.is_set():
        raise EndpointError(
            f"the server failed {_MOST_FAILURES} times in a row, so the rest was not tried. What "
            "was written is kept; run the same command again to go on."
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of questions; none if there is no file. Raises ContentError."""
    return [row for _, row in json_lines(path)] if path.is_file() else []


def review(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, by kind of question and of document, for a person to read."""
    counts = Counter(str(row.get("status")) for row in rows)
    parts = [
        "# Questions to check",
        ", ".join(f"{n} {status}" for status, n in sorted(counts.items())) + ".",
        "Read each question beside its pages. Correct its row in questions.jsonl and set its "
        "status to accepted; or set it to rejected. Drafts do not count. This file is written "
        "anew by every run.",
    ]
    order = sorted(rows, key=lambda row: (row["kind"], row["document_kind"]))
    heading = ""
    for row in order:
        group = f"## {row['kind']}, {row['document_kind']}"
        parts += [group] * (group != heading)
        heading = group
        places = row.get("pages") or row.get("written_from") or ()
        where = "; ".join(f"{place['file']}, page {place['page']}" for place in places)
        parts += [f"### {row['id']} ({row.get('status')})", f"**{row['question']}**"]
        parts.append(str(row.get("answer") or "Not answered by:") + f" ({where})")
        facts = [
            f"- {'vital' if n['vital'] else 'okay'}: {n['text']}" for n in row.get("nuggets", ())
        ]
        parts += ["\n".join(facts)] * bool(facts)
    return "\n\n".join(parts) + "\n"


def run(options: DraftQuestionsConfig) -> None:
    """Command: draft questions about files."""
    model = open_model(options)
    if model is None:
        raise ConfigError("Name a model: --llm with --base-url, or --local-llm.")
    for status, count in sorted(draft_questions(options, model).items()):
        print(f"{count} {status}")
    print(f"read {options.out / 'review.md'}, correct {options.out / 'questions.jsonl'}")
