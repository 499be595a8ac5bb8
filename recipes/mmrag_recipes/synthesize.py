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

import base64
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
from typing import Any

import numpy as np
import openai
from numpy.typing import NDArray

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError, ContentError, EndpointError
from mmrag_recipes.config import MODALITIES, PAIRS, SynthesizeConfig
from mmrag_recipes.corpus import Document, read_corpus
from mmrag_recipes.rows import IMAGES, ImageStore, Item, Modality, Row, write_rows
from mmrag_recipes.writers import (
    EndpointModel,
    Entity,
    ExtractiveWriter,
    LocalModel,
    Model,
    ModelWriter,
    Writer,
)

logger = logging.getLogger("mmrag_recipes")

TASKS = {
    "text": "passage_for_question",
    "image": "page_for_question",
    "fused": "page_for_question",
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
    """Yield by pair and by reason of loss, and cost."""

    note: str
    documents: int = 0
    planned: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    unfiltered: int = 0
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
        used = ", ".join(f"{name} {value:.0f}" for name, value in self.usage.items())
        lines.append(f"  used: {used}, cost {self.cost:.2f}")
        return "\n".join(lines + [f"  not read: {problem}" for problem in self.problems])


class Drawer:
    """Pictures of entities from an OpenAI-compatible image endpoint."""

    def __init__(self, model: str, base_url: str | None, api_key: str | None) -> None:
        self.model = model
        self.client = openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=4)

    def draw(self, caption: str) -> bytes:
        """Make one image. Raises EndpointError."""
        try:
            reply = self.client.images.generate(
                model=self.model, prompt=caption, response_format="b64_json", n=1
            )
        except openai.OpenAIError as error:
            raise EndpointError(f"{self.model}: {error}") from error
        if not reply.data or not reply.data[0].b64_json:
            raise EndpointError(f"{self.model}: the server sent no image.")
        try:
            return base64.b64decode(reply.data[0].b64_json)
        except ValueError as error:
            raise EndpointError(f"{self.model}: the image is no base64 ({error}).") from error


class Figures:
    """The figures of the files, to stand for entities: found by the embedder."""

    def __init__(
        self, documents: Sequence[Document], store: ImageStore, embedder: Embedder
    ) -> None:
        self.figures = [d for d in documents if d.kind in ("figure", "picture") and d.image]
        self.by_page: dict[tuple[str, int | None], list[Document]] = {}
        for figure in self.figures:
            self.by_page.setdefault((figure.file, figure.page), []).append(figure)
        self.embedder = embedder
        self.reads_images = "image" in embedder.modalities
        contents: list[Any] = []
        if self.reads_images:
            contents = [store.path(str(figure.image)) for figure in self.figures]
        else:
            # Without eyes, captions stand for the figures.
            contents = [figure.text or "no caption" for figure in self.figures]
        self._vectors = embedder.encode(contents)

    def of_page(self, document: Document) -> Document | None:
        """A figure on the document's page that is not the document itself."""
        on_page = self.by_page.get((document.file, document.page), [])
        return next((f for f in on_page if f.image != document.image), None)

    def of_entity(self, entity: Entity, document: Document, least: float) -> Document | None:
        """The figure most like an entity's name, if it is at least so like."""
        if not self.figures:
            return None
        query = self.embedder.encode([entity.name], "image_for_caption")[0]
        scores = self._vectors @ query
        for index in np.argsort(-scores, kind="stable").tolist():
            figure: Document = self.figures[index]
            if scores[index] < least:
                return None
            if figure.image != document.image:
                return figure
        return None


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
                if counts[pair] < quota and _can_be(document, pair, figures, drawn)
            ]
            open_pairs = [p for p in possible if used[document.id, p] < _most(p, config)]
            if not open_pairs or len(jobs) >= config.rows:
                continue
            pair = min(open_pairs, key=lambda p: (counts[p], config.pairs.index(p)))
            counts[pair] += 1
            jobs.append(Job(document, pair, used[document.id, pair]))
            used[document.id, pair] += 1
    return jobs


def _most(pair: str, config: SynthesizeConfig) -> int:
    """How often a document serves for a pair. An image alone asks only once."""
    return 1 if pair.startswith("image") else config.queries


def _can_be(document: Document, pair: str, figures: Figures, drawn: bool) -> bool:
    query, _, wanted = pair.partition("->")
    if wanted not in document.modalities:
        return False
    if query == "image":
        return figures.of_page(document) is not None
    return query == "text" or drawn or bool(figures.figures)


def make_row(
    job: Job,
    writer: Writer,
    figures: Figures,
    store: ImageStore,
    config: SynthesizeConfig,
    drawer: Drawer | None = None,
) -> Row | str:
    """One row, or the reason why there is none."""
    document = job.document
    without = None
    answer = ""
    if job.query_modality == "image":
        figure = figures.of_page(document)
        query = Item(image=figure.image) if figure else None
    else:
        draft = writer.draft(document, job.document_modality, job.turn)
        if draft is None:
            return "no query could be written"
        query, without, answer = Item(text=draft.query), draft.sentence, draft.answer
        if job.query_modality == "fused":
            query = _with_image(draft.query, document, writer, figures, store, config, drawer)
    if query is None:
        return "no image for the query"
    positive = document.item(job.document_modality, without)
    if positive.modality != job.document_modality or positive.text == "":
        return "the document has nothing beside the query"
    asked = TASKS[job.document_modality] if job.query_modality == "text" else "page_for_image"
    return Row(
        id=job.key,
        task=job.pair,
        instruction=asked if job.query_modality != "fused" else "page_for_image_question",
        query=query,
        positives=[positive],
        source=document.place + (f" ({answer})" if answer and answer != without else ""),
        license=config.license,
    )


def _with_image(
    query: str,
    document: Document,
    writer: Writer,
    figures: Figures,
    store: ImageStore,
    config: SynthesizeConfig,
    drawer: Drawer | None,
) -> Item | None:
    entity = writer.entity(query)
    if entity is None:
        return None
    if drawer is not None:
        return Item(text=entity.query, image=store.add(drawer.draw(entity.caption)))
    figure = figures.of_entity(entity, document, config.min_similarity)
    return Item(text=entity.query, image=figure.image) if figure else None


def run_jobs(
    jobs: Sequence[Job],
    writer: Writer,
    figures: Figures,
    store: ImageStore,
    config: SynthesizeConfig,
    out: Path,
    drawer: Drawer | None = None,
) -> Iterator[tuple[Job, Row | str]]:
    """Make all rows, several at a time; finished ones are kept in ``generated.jsonl``.

    A job that fails for the server's sake is not kept, so that the next run tries it again.
    """
    path = out / "generated.jsonl"
    made_by = writer.identity + (f", images by {drawer.model}" if drawer else "")
    done = _done(path, made_by)
    lock = threading.Lock()

    def work(job: Job) -> tuple[Job, Row | str]:
        if job.key in done:
            earlier = done[job.key]
            if isinstance(earlier, Row):
                earlier = earlier.model_copy(update={"license": config.license})
            return job, earlier
        try:
            made = make_row(job, writer, figures, store, config, drawer)
        except (EndpointError, ContentError) as error:
            logger.warning("%s: %s", job.key, error)
            return job, "the server or the document failed"
        record = made.model_dump(exclude_defaults=True) if isinstance(made, Row) else made
        with lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": job.key, "by": made_by, "made": record}) + "\n")
        return job, made

    with ThreadPoolExecutor(config.concurrency) as pool:
        yield from pool.map(work, jobs)


def _done(path: Path, made_by: str) -> dict[str, Row | str]:
    """Finished jobs of an earlier run of the same writer; a line cut off by a kill is left out."""
    done: dict[str, Row | str] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["by"] != made_by:
                continue
            made = record["made"]
            done[record["key"]] = made if isinstance(made, str) else Row.model_validate(made)
    return done


def round_trip(
    rows: Sequence[Row],
    documents: Sequence[Document],
    store: ImageStore,
    embedder: Embedder,
    top_k: int,
) -> tuple[list[Row], int, int]:
    """Keep rows whose query finds its document among all of the same modality.

    Returns: kept rows, number lost, number kept unseen because the embedder lacks a modality.
    """
    pools: dict[Modality, list[Item]] = {
        m: [d.item(m) for d in documents if m in d.modalities] for m in MODALITIES
    }
    vectors: dict[Modality, NDArray[np.float32]] = {}
    kept, lost, unseen = [], 0, 0
    for row in rows:
        wanted = row.positives[0].modality
        if wanted not in embedder.modalities or row.query.modality not in embedder.modalities:
            kept.append(row)
            unseen += 1
            continue
        if wanted not in vectors:
            vectors[wanted] = embedder.encode([store.content(item) for item in pools[wanted]])
        query = embedder.encode([store.content(row.query)], row.instruction)[0]
        own = embedder.encode([store.content(row.positives[0])])[0]
        own_key = row.positives[0].key
        better = int(((vectors[wanted] @ query) > float(own @ query) + 1e-6).sum())
        near_copies = sum(item.key == own_key for item in pools[wanted])
        if better < top_k + max(0, near_copies - 1):
            kept.append(row)
        else:
            lost += 1
    return kept, lost, unseen


def synthesize(
    config: SynthesizeConfig,
    embedder: Embedder,
    model: Model | None = None,
    drawer: Drawer | None = None,
) -> Report:
    """Run the whole pipeline: ``out`` gets ``rows.jsonl``, ``images`` and ``report.json``."""
    out = config.out
    out.mkdir(parents=True, exist_ok=True)
    store = ImageStore(out / IMAGES)
    documents, problems = read_corpus(config.paths, store)
    if not documents:
        raise ContentError(f"Nothing could be read: {'; '.join(problems) or 'no files were found'}")
    writer: Writer = ExtractiveWriter(documents)
    if model:
        writer = ModelWriter(model, store, config.prompts)
    figures = Figures(documents, store, embedder)
    jobs = plan_jobs(documents, figures, config, drawn=drawer is not None)
    report = Report(writer.note, documents=len(documents), problems=problems)
    made: list[Row] = []
    for job, result in run_jobs(jobs, writer, figures, store, config, out, drawer):
        report.planned[job.pair] += 1
        if isinstance(result, Row):
            made.append(result)
        else:
            report.lost[result] += 1
    rows, lost, report.unfiltered = round_trip(made, documents, store, embedder, config.top_k)
    if lost:
        report.lost[f"not among the first {config.top_k} for its own query"] = lost
    report.kept.update(row.pair for row in rows)
    report.usage = writer.usage()
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


def split(rows: Sequence[Row], config: SynthesizeConfig) -> tuple[list[Row], list[Row]]:
    """Part rows into those to train on and those held out, all rows of a page together."""
    train: list[Row] = []
    held: list[Row] = []
    for row in rows:
        # Where there are no pages, the rows of one document stay together: ids begin with its.
        place = row.place or row.id.partition("/")[0]
        chance = random.Random(f"{config.seed}/{place}").random()
        (held if chance < config.dev else train).append(row)
    return train, held


def run(options: SynthesizeConfig) -> None:
    """Command: make rows from files."""
    key = os.environ.get("OPENAI_API_KEY", "none")
    base_url = options.base_url or os.environ.get("OPENAI_BASE_URL")
    model: Model | None = None
    if options.local_llm:
        model = LocalModel(options.local_llm)
    elif options.llm:
        model = EndpointModel(options.llm, base_url, key)
    drawer = Drawer(options.image_model, base_url, key) if options.image_model else None
    print(synthesize(options, load_embedder(options.embedder), model, drawer))
    print(f"wrote {options.out / 'rows.jsonl'}")
