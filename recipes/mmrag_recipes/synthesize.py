"""Make training rows from a user's own files: GME's fused-modal pipeline.

    python -m mmrag_recipes synthesize papers/ --out data/mine
    python -m mmrag_recipes synthesize papers/ --out data/mine --llm MODEL --base-url http://host/v1
    python -m mmrag_recipes synthesize papers/ --out data/mine --local-llm FOLDER --rows 500

1. Passages, pages and figures are chosen so that all modality pairs come up equally often.
2. A query is written for each (Doc2Query with examples), from text, from the image, or both.
3. For queries with an image, the thing asked about is named, the query rewritten ("this
   plant"), and an image found among the files' own figures, or made by an image endpoint.
4. A row is kept if its query finds its document again among all documents.
5. With ``--dev 0.2``, the rows of a fifth of the pages go to ``dev.jsonl``, for choosing settings.

Run the same command again to go on where it stopped. Without a model, queries are extracts.
Source: GME (arXiv 2412.16855, section 4.2).
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag_recipes.config import PAIRS, SynthesizeConfig
from mmrag_recipes.console import track
from mmrag_recipes.corpus import Document, read_corpus
from mmrag_recipes.figures import Drawer, Figures, drawn_image
from mmrag_recipes.round_trip import round_trip
from mmrag_recipes.rows import IMAGES, ImageStore, Item, Modality, Row, write_rows
from mmrag_recipes.vectors import VectorCache
from mmrag_recipes.writers import (
    ExtractiveWriter,
    Model,
    ModelWriter,
    Writer,
    open_model,
    reads_as_query,
)

logger = logging.getLogger("mmrag_recipes")

_MOST_FAILURES = 8  # of the server, in a row
_FAILED = "the server or the document failed"

TASKS = {
    "text": "passage_for_question",
    "image": "page_for_question",
    "fused": "page_for_question",
}


# Other wordings of the tasks, so that a model does not learn one sentence by heart.
WORDINGS = {
    "passage_for_question": (
        "Retrieve the passage that holds the answer to this question.",
        "Given a question, find the text that answers it.",
    ),
    "page_for_question": (
        "Retrieve the page of a document that holds the answer to this question.",
        "Given a question, find the page that answers it.",
    ),
    "page_for_image": (
        "Retrieve the page of a document on which this image is shown.",
        "Given an image, find the page that contains it.",
    ),
    "page_for_image_question": (
        "Retrieve the page that answers this question about the image.",
        "Given an image and a question about it, find the page with the answer.",
    ),
}


@dataclass(frozen=True)
class Job:
    """One row to make: a document, handed out in one modality, asked for in another."""

    document: Document
    pair: str
    turn: int = 0

    @property
    def key(self) -> str:
        """Identity of the job over runs."""
        return f"{self.document.id}/{self.pair}" + (f"/{self.turn}" if self.turn else "")

    @property
    def query_modality(self) -> Modality:
        """Modality of the query."""
        return self.pair.partition("->")[0]  # type: ignore[return-value]

    @property
    def document_modality(self) -> Modality:
        """Modality of the document."""
        return self.pair.partition("->")[2]  # type: ignore[return-value]


@dataclass
class Report:
    """Yield by pair and by reason of loss, and cost.

    unfiltered: rows that the embedder cannot judge. too_few: number of documents by modality, where
    all of them are within ``top_k``, so that the filter keeps every row.
    """

    note: str
    documents: int = 0
    planned: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    unfiltered: int = 0
    too_few: dict[str, int] = field(default_factory=dict)
    usage: dict[str, float] = field(default_factory=dict)
    cost: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.documents} documents; {self.note}"]
        for pair in PAIRS:
            if self.planned[pair]:
                lines.append(f"  {pair}: {self.kept[pair]} of {self.planned[pair]} rows kept")
        lines += [f"  lost, {reason}: {n}" for reason, n in sorted(self.lost.items())]
        if self.unfiltered:
            lines.append(
                f"  {self.unfiltered} rows were kept without a round trip: the embedder cannot "
                "embed one of their sides"
            )
        lines += [
            f"  all {n} documents as {modality} are within top_k: the filter drops no row"
            for modality, n in self.too_few.items()
        ]
        used = ", ".join(f"{name} {value:.0f}" for name, value in self.usage.items())
        lines.append(f"  used in all runs: {used}, cost {self.cost:.2f}")
        return "\n".join(lines + [f"  not read: {problem}" for problem in self.problems])


def plan_jobs(
    documents: Sequence[Document], figures: Figures, config: SynthesizeConfig, drawn: bool = False
) -> list[Job]:
    """Choose documents and pairs: each pair as often as the others, as far as there are any.

    Args:
        drawn: images of entities are made, so that no figure is needed for them.
    """
    unknown = sorted(set(config.pairs) - set(PAIRS))
    if unknown:
        raise ConfigError(f"pairs: {unknown} are unknown; there are {list(PAIRS)}.")
    order = [d for d in documents if d.modalities]
    random.Random(config.seed).shuffle(order)
    counts: Counter[str] = Counter()
    quota = -(-config.rows // len(config.pairs))
    jobs: list[Job] = []
    used: Counter[tuple[str, str]] = Counter()
    # A document may serve again, once every one had a turn.
    for _ in range(len(config.pairs) * config.queries):
        for document in order:
            possible = [
                pair
                for pair in config.pairs
                if counts[pair] < quota and _has_pair(document, pair, figures, drawn)
            ]
            open_pairs = [
                pair
                for pair in possible
                # The image of a page is always the same one, so it asks only once.
                if used[document.id, pair] < (1 if pair.startswith("image") else config.queries)
            ]
            if not open_pairs or len(jobs) >= config.rows:
                continue
            # The rarest so far, so that pairs stay even while documents run out.
            pair = min(open_pairs, key=lambda p: (counts[p], config.pairs.index(p)))
            counts[pair] += 1
            jobs.append(Job(document, pair, used[document.id, pair]))
            used[document.id, pair] += 1
    return jobs


def _has_pair(document: Document, pair: str, figures: Figures, drawn: bool) -> bool:
    query, _, wanted = pair.partition("->")
    if wanted not in document.modalities:
        return False
    if query == "image":
        return figures.of_page(document) is not None
    # Looked for now: without a figure, the query and its entity would be paid for in vain.
    return query == "text" or drawn or figures.besides(document)


@dataclass(frozen=True)
class Maker:
    """Makes the row of a job."""

    config: SynthesizeConfig
    writer: Writer
    figures: Figures
    store: ImageStore
    drawer: Drawer | None = None

    @property
    def identity(self) -> str:
        """Changes when the rows would."""
        drawn = f", images by {self.drawer.model}" if self.drawer else ""
        return self.writer.identity + drawn

    def make(self, job: Job) -> Row | str:
        """One row, or the reason why there is none."""
        document = job.document
        without, answer = None, ""
        if job.query_modality == "image":
            figure = self.figures.of_page(document)
            query = Item(image=figure.image) if figure else None
        else:
            draft = self.writer.draft(document, job.document_modality, job.turn)
            if draft is None or not reads_as_query(draft.query):
                return "no query could be written"
            query, without, answer = Item(text=draft.query), draft.sentence, draft.answer
            if job.query_modality == "fused":
                query = self._with_image(draft.query, document)
        if query is None:
            return "no image for the query"
        positive = document.item(job.document_modality, without)
        # A document that was nothing but its query has nothing left to find.
        if positive.modality != job.document_modality or positive.text == "":
            return "the document has nothing beside the query"
        return Row(
            id=job.key,
            task=job.pair,
            instruction=self._instruction(job),
            query=query,
            positives=[positive],
            source=document.place + (f" ({answer})" if answer and answer != without else ""),
            license=self.config.license,
        )

    def _with_image(self, query: str, document: Document) -> Item | None:
        """The query with an image in place of what it names; None if there is none."""
        entity = self.writer.entity(query)
        if entity is None:
            return None
        least = self.config.min_similarity
        if self.drawer is not None:
            embedder = self.figures.embedder
            image = drawn_image(self.drawer, entity, embedder, self.store, least)
        else:
            figure = self.figures.of_entity(entity, document, least)
            image = figure.image if figure else None
        return Item(text=entity.query, image=image) if image else None

    def _instruction(self, job: Job) -> str:
        """The task of a job; with ``vary_instructions`` one of its wordings, by chance."""
        task = {
            "text": TASKS[job.document_modality],
            "image": "page_for_image",
            "fused": "page_for_image_question",
        }[job.query_modality]
        if not self.config.vary_instructions:
            return task
        wordings = (task, *WORDINGS[task])
        return random.Random(f"{self.config.seed}/{job.key}").choice(wordings)


def run_jobs(jobs: Sequence[Job], maker: Maker, out: Path) -> Iterator[tuple[Job, Row | str]]:
    """Make all rows, several at a time; finished ones are kept in ``generated.jsonl``.

    A job that fails for the server's sake is not kept, so that the next run tries it again.

    Raises:
        EndpointError: If the server fails many times in a row.
    """
    path = out / "generated.jsonl"
    done = _done(path, maker.identity)
    lock = threading.Lock()
    failures = 0  # of the server, in a row

    def work(job: Job) -> tuple[Job, Row | str]:
        nonlocal failures
        if job.key in done:
            earlier = done[job.key]
            if isinstance(earlier, Row):
                # The license is no part of what was made: it may be given later.
                earlier = earlier.model_copy(update={"license": maker.config.license})
            return job, earlier
        if failures >= _MOST_FAILURES:
            return job, _FAILED
        try:
            made = maker.make(job)
        except (EndpointError, ContentError) as error:
            logger.warning("%s: %s", job.key, error)
            with lock:
                # A document that fails says nothing about the server.
                failures += isinstance(error, EndpointError)
            return job, _FAILED
        record = made.model_dump(exclude_defaults=True) if isinstance(made, Row) else made
        # Each row at once: queries cost money, and a run may be stopped.
        with lock, path.open("a", encoding="utf-8") as file:
            failures = 0
            file.write(json.dumps({"key": job.key, "by": maker.identity, "made": record}) + "\n")
        return job, made

    with ThreadPoolExecutor(maker.config.concurrency) as pool:
        yield from track(pool.map(work, jobs), len(jobs), "writing queries")
    if failures >= _MOST_FAILURES:
        raise EndpointError(
            f"the server failed {failures} times in a row, so the rest was not tried. What was "
            "written is kept; run the same command again to go on."
        )


def _done(path: Path, made_by: str) -> dict[str, Row | str]:
    """Finished jobs of an earlier run of the same writer; a line cut off by a kill is left out."""
    done: dict[str, Row | str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            # Another model or prompt writes other queries.
            if record["by"] != made_by:
                continue
            made = record["made"]
            done[record["key"]] = made if isinstance(made, str) else Row.model_validate(made)
    return done


def synthesize(
    config: SynthesizeConfig,
    embedder: Embedder,
    model: Model | None = None,
    drawer: Drawer | None = None,
) -> Report:
    """Run the whole pipeline: ``out`` gets ``rows.jsonl``, ``images`` and ``report.json``.

    Raises:
        ContentError: If nothing could be read.
        EndpointError: If the server is down; rows of an earlier run are then left as they are.
    """
    if config.languages and model is None:
        raise ConfigError("languages: extracts have the language of the files; name an llm.")
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    store = ImageStore(out / IMAGES)
    documents, problems = read_corpus(config.paths, store, kept=out / "documents.jsonl")
    if not documents:
        raise ContentError(f"Nothing could be read: {'; '.join(problems) or 'no files were found'}")
    writer: Writer = ExtractiveWriter(documents)
    if model:
        writer = ModelWriter(model, store, config.prompts, config.languages)
    cache = VectorCache(out / "vectors", embedder, store)
    maker = Maker(config, writer, Figures(documents, cache), store, drawer)
    jobs = plan_jobs(documents, maker.figures, config, drawn=drawer is not None)
    report = Report(writer.note, documents=len(documents), problems=problems)
    made: list[Row] = []
    try:
        for job, result in run_jobs(jobs, maker, out):
            report.planned[job.pair] += 1
            if isinstance(result, Row):
                made.append(result)
            else:
                report.lost[result] += 1
    finally:
        # Also of a run that stops, and added up over runs: the report names the whole cost.
        kept = out / "usage.json"
        before = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        report.usage = {k: before.get(k, 0.0) + value for k, value in writer.usage().items()}
        kept.write_text(json.dumps(report.usage), encoding="utf-8")
    rows, lost, report.unfiltered = round_trip(made, documents, cache, config.top_k)
    if lost:
        report.lost[f"not among the first {config.top_k} for its own query"] = lost
    report.too_few = _too_few(documents, made, config.top_k)
    report.kept.update(row.pair for row in rows)
    report.cost = (
        report.usage.get("prompt_tokens", 0.0) * config.prompt_price
        + report.usage.get("completion_tokens", 0.0) * config.completion_price
    ) / 1e6
    train, dev = split(rows, config)
    write_rows(out / "rows.jsonl", train)
    if config.dev:
        write_rows(out / "dev.jsonl", dev)
    (out / "report.json").write_text(json.dumps(vars(report), indent=1))
    return report


def _too_few(documents: Sequence[Document], rows: Sequence[Row], top_k: int) -> dict[str, int]:
    """Number of documents by modality, of those that rows are about and of which top_k are all."""
    sizes = Counter(modality for document in documents for modality in document.modalities)
    asked = {row.positives[0].modality for row in rows}
    return {modality: n for modality, n in sizes.items() if modality in asked and n <= top_k}


def split(rows: Sequence[Row], config: SynthesizeConfig) -> tuple[list[Row], list[Row]]:
    """Part rows into those to train on and those held out, all rows of a page together."""
    train: list[Row] = []
    held: list[Row] = []
    for row in rows:
        # Where there are no pages, the rows of one document stay together: ids begin with its.
        place = row.place or row.id.partition("/")[0]
        # By page and not by row: questions about one page in both parts would flatter the score.
        chance = random.Random(f"{config.seed}/{place}").random()
        (held if chance < config.dev else train).append(row)
    return train, held


def run(options: SynthesizeConfig) -> None:
    """Command: make rows from files."""
    # The SDK insists on a key; local servers take any.
    key = os.environ.get("OPENAI_API_KEY", "none")
    base_url = options.base_url or os.environ.get("OPENAI_BASE_URL")
    model = open_model(options)
    drawer = Drawer(options.image_model, base_url, key) if options.image_model else None
    print(synthesize(options, load_embedder(options.embedder), model, drawer))
    print(f"wrote {options.out / 'rows.jsonl'}")
