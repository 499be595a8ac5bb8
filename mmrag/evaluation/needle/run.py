"""``find_needles``: the whole pipeline over corpora with needles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import LLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor

from mmrag.embedders.base import Embedder
from mmrag.errors import ContentError
from mmrag.evaluation.asking import page_of
from mmrag.evaluation.kept import fingerprint
from mmrag.evaluation.needle.corpora import Corpus, CorpusWriter, NeedleOptions, plan_corpora
from mmrag.evaluation.needle.pages import Needle, PageMaker
from mmrag.evaluation.needle.scores import Case, NeedleResult
from mmrag.evaluation.questions import Question
from mmrag.evaluation.results import Evaluation
from mmrag.evaluation.run import ShowStep, Step, evaluate
from mmrag.index import UniversalIndex
from mmrag.ingest.progress import Progress
from mmrag.nodes import as_hit
from mmrag.reading import Box, ReadOptions
from mmrag.reading.boxes import area, clipped
from mmrag.reading.writing import copyable_pages

Engines = Callable[[UniversalIndex], Mapping[str, BaseQueryEngine]]

_OVERLAP = 0.5  # intersection over union that counts as the same part, as in PASCAL VOC


def find_needles(
    embedder: Embedder,
    work: str | Path,
    options: NeedleOptions | None = None,
    *,
    folder: str | Path | None = None,
    reading: ReadOptions | None = None,
    rerankers: Mapping[str, Sequence[BaseNodePostprocessor]] | None = None,
    engines: Engines | None = None,
    judge: LLM | None = None,
    progress: ShowStep | None = None,
) -> NeedleResult:
    """Hide needles in corpora of every size, index each corpus, and ask for every needle.

    Args:
        embedder: the model to test.
        work: a folder to keep corpora, indexes and what was found in; a run that is stopped goes
            on from there.
        options: sizes, depths, kinds; default: ``NeedleOptions()``.
        folder: of PDFs whose pages the needles are hidden among; default: pages made up.
        reading: how the corpora are read.
        rerankers: as for ``evaluate``.
        engines: makes the engines that answer the questions over an index, by name.
        judge: grades the answers.
        progress: called with each Step.

    Raises:
        ContentError: If the folder has fewer pages than the largest corpus.
        EndpointError: If a server fails.

    Examples:
        >>> from mmrag import NeedleOptions, find_needles, load_embedder
        >>> options = NeedleOptions(sizes=(4,), depths=(0.5,), kinds=("page",), layers=("text",))
        >>> found = find_needles(load_embedder("mmrag-nano"), "work", options)
        >>> [(cell.n, cell.hits[10].mean) for cell in found.cells("size")]
        [(2, 1.0)]
    """
    chosen, work = options or NeedleOptions(), Path(work)
    maker = PageMaker(chosen.seed, chosen.grid)
    needles = maker.needles(chosen.kinds, chosen.depths, chosen.each)
    total = Evaluation([], cuts=tuple(sorted(set(chosen.cuts))))
    haystack = None
    if folder is not None:
        haystack, errors = copyable_pages(Path(folder))
        total.notes += [f"left out: {error}" for error in errors]
        if len(haystack) < max(chosen.sizes):
            raise ContentError(
                f"{folder}: its PDFs have {len(haystack)} pages; give sizes of no more, or more "
                "files."
            )
    writer = CorpusWriter(work / "corpora", maker, haystack)
    result = NeedleResult(total, {})
    corpora = plan_corpora(chosen, needles)
    for number, corpus in enumerate(corpora, 1):
        task = f"corpus {number}/{len(corpora)}, {corpus.size} pages, {corpus.layer}"
        show = _Shown(progress, task, corpus.size)
        path = writer.write(corpus, show.written)
        # Beside the corpus and by the model, so that nothing else is ever searched.
        place = path.parent / f"{corpus.layer}-{corpus.size}-{corpus.round}-index"
        place = place / fingerprint(embedder.fingerprint, repr(reading))
        with UniversalIndex(place, embedder, reading=reading) as index:
            report = index.add(path, progress=show.indexed)
            total.notes += [str(error) for error in report.errors]
            questions = _questions(corpus, work / "pictures", embedder)
            if questions:
                found = evaluate(
                    index,
                    questions,
                    engines=engines(index) if engines else None,
                    judge=judge,
                    keep=work / "questions.jsonl",
                    progress=show.asked,
                    cuts=total.cuts,
                    scopes=("corpus",),
                    rerankers=rerankers or {},
                )
                _add(result, corpus, found, index)
    hidden = [needle for corpus in corpora for needle in corpus.needles.values()]
    if len(result.cases) < sum(len(needle.asks) for needle in hidden):
        total.notes.append(f"{embedder.name} takes no images: no question was asked with one")
    total.info |= {"needle": _described(chosen, folder), "embedder": embedder.name}
    return result


class _Shown:
    """What is shown of one corpus."""

    def __init__(self, progress: ShowStep | None, task: str, size: int) -> None:
        self._progress, self._task, self._size = progress, task, size

    def written(self, count: int) -> None:
        self._show("pages written", count, self._size)

    def indexed(self, now: Progress) -> None:
        self._show("pages indexed", now.pages, self._size)

    def asked(self, step: Step) -> None:
        self._show(step.task, step.done, step.total)

    def _show(self, what: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Step(f"{self._task}: {what}", done, total))


def _questions(corpus: Corpus, pictures: Path, embedder: Embedder) -> list[Question]:
    """What is asked of a corpus, less the questions that the embedder cannot take."""
    questions = []
    for page, needle in corpus.needles.items():
        for ask in needle.asks:
            image, text = None, ask.text
            if ask.picture is not None:
                if "image" not in embedder.modalities:
                    continue
                pictures.mkdir(parents=True, exist_ok=True)
                image = pictures / f"{fingerprint(ask.picture.hex())}.png"
                image.write_bytes(ask.picture)
                # A model of images alone is asked with the picture alone.
                text = text if "fused" in embedder.modalities else ""
            id_ = f"{PurePath(corpus.name).stem}-{needle.id}-{ask.kind}".replace(" ", "-")
            pages = ((corpus.name, page),)
            questions.append(Question(text, pages, ask.kind, ask.answer, id=id_, image=image))
    return questions


def _add(result: NeedleResult, corpus: Corpus, found: Evaluation, index: UniversalIndex) -> None:
    """Add what was found in a corpus to the result."""
    total = result.evaluation
    total.questions = [*total.questions, *found.questions]
    total.notes += found.notes
    total.info |= {name: found.info[name] for name in ("mmrag", "judge") if name in found.info}
    seconds = total.info.get("seconds", 0.0) + found.info["seconds"]
    total.info["seconds"] = round(seconds, 1)
    for system, ranks in found.found.items():
        total.found.setdefault(system, {}).update(ranks)
        total.rankings.setdefault(system, {}).update(found.rankings[system])
    for engine, records in found.answers.items():
        total.answers.setdefault(engine, {}).update(records)
    for question in found.questions:
        needle = corpus.needles[question.pages[0][1]]
        located = _located(index, question, needle, total.cuts[-1])
        result.cases[question.id] = Case(
            needle.id, question.kind, corpus.layer, corpus.size, needle.depth, located
        )


def _located(index: UniversalIndex, question: Question, needle: Needle, top: int) -> bool | None:
    """Whether the hit of the right page names the part that was asked for."""
    if needle.box is None:
        return None
    for node in index.as_retriever(similarity_top_k=top).retrieve(question.query()):
        if page_of(node.node.metadata) == question.pages[0]:
            box = as_hit(node).box
            return box is not None and _overlap(box, needle.box) >= _OVERLAP
    return False


def _overlap(one: Box, other: Box) -> float:
    """Intersection over union."""
    shared = area(clipped(one, other))
    return shared / max(area(one) + area(other) - shared, 1e-9)


def _described(options: NeedleOptions, folder: str | Path | None) -> dict[str, Any]:
    return vars(options) | {"pages": "made up" if folder is None else str(folder)}
