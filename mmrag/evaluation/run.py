"""``evaluate``: questions asked of one library or several, whatever is compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TypeAlias

from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.llms import LLM
from typing_extensions import Unpack

from mmrag import __version__
from mmrag.errors import ContentError
from mmrag.evaluation.asking import AskOptions, Options, ask_library
from mmrag.evaluation.engines import answer_all
from mmrag.evaluation.judge import JUDGE_PROMPT, NUGGET_PROMPT, SUPPORT_PROMPT
from mmrag.evaluation.kept import Kept
from mmrag.evaluation.questions import Question, numbered
from mmrag.evaluation.results import Evaluation
from mmrag.index import UniversalIndex


@dataclass(frozen=True)
class Step:
    """How far an evaluation is: ``done`` of ``total`` questions of one ``task``."""

    task: str
    done: int
    total: int


ShowStep: TypeAlias = Callable[[Step], None]


def evaluate(
    libraries: UniversalIndex | Mapping[str, UniversalIndex],
    questions: Sequence[Question],
    *,
    engines: Mapping[str, BaseQueryEngine] | None = None,
    judge: LLM | None = None,
    keep: str | Path | None = None,
    progress: ShowStep | None = None,
    **options: Unpack[AskOptions],
) -> Evaluation:
    """Ask every question, and say where each ranking and each fusion has the right pages.

    Args:
        libraries: one, or several by the name that they have in the results.
        questions: see ``read_questions``.
        engines: engines that answer the questions as well, by the name of their results:
            CitedQueryEngine or PlanningQueryEngine, not streaming.
        judge: a language model that grades the answers, says which nuggets they state, and
            whether what each sentence cites supports it; its prompts are ``JUDGE_PROMPT``,
            ``NUGGET_PROMPT`` and ``SUPPORT_PROMPT`` of ``mmrag.evaluation.judge``.
        keep: a file to keep what was found in, by a fingerprint of all that moves it: files,
            model, options, question. A run that is stopped goes on from it.
        progress: called with each Step.
        options: ``cuts``, the values of k, ascending (1, 5, 10); ``scopes`` (``corpus`` and
            ``document``); ``fusions``, options of the retriever by name; ``dims``, leading
            dimensions to search with as well; ``rerankers``, by name the postprocessors that
            reorder the first fusion, one after the other; ``depth``, nodes of each ranking (100).

    Each question is embedded alone, as it is in use, so that no batch size moves a number.

    Raises:
        ContentError: If no question has a right page, or no right page is of an indexed file.
        ConfigError: For options that make no sense.
        MissingCollectionError: If there is nothing in a library.
        EndpointError: If a server fails.

    Examples:
        >>> from pathlib import Path
        >>> from mmrag import Question, UniversalIndex, evaluate
        >>> _ = Path("well.md").write_text("The well is nine metres deep.")
        >>> with UniversalIndex("library") as index:
        ...     _ = index.add("well.md")
        ...     found = evaluate(index, [Question("How deep is the well?", (("well.md", 1),))])
        >>> found.notes
        []
    """
    started = time.monotonic()
    # First, so that options that make no sense fail before a model is loaded.
    chosen = Options(**options)
    named = {"": libraries} if isinstance(libraries, UniversalIndex) else dict(libraries)
    evaluation = Evaluation(numbered(questions), cuts=chosen.cuts)
    asked = evaluation.asked()
    # Engines may be asked what has no answer alone, to see whether they refuse.
    if not asked and not engines:
        raise ContentError("No question has a right page; there is nothing to measure.")
    kept = Kept(Path(keep) if keep else None)

    def counted(task: str, total: int) -> Callable[[int], None]:
        return lambda done: progress(Step(task, done, total)) if progress else None

    for name, index in named.items():
        model = name or PurePath(index.collection.settings.embedder).name
        evaluation.notes += _missing(model, index, asked)
        done = counted(f"{model}: asked", len(asked))
        for found in ask_library(model, index, asked, chosen, kept, evaluation.notes, done):
            evaluation.add(*found)
    for name, engine in (engines or {}).items():
        evaluation.answers[name] = answer_all(
            engine,
            # All of them: whether an engine refuses is measured by those without an answer.
            evaluation.questions,
            judge=judge,
            kept=kept,
            notes=evaluation.notes,
            done=counted(f"{name}: answered", len(questions)),
        )
    if judge is not None:
        model = judge.metadata.model_name
        # Grades of two judges, or prompts, cannot be compared.
        prompts = {
            "prompt": JUDGE_PROMPT.template,
            "nugget_prompt": NUGGET_PROMPT.template,
            "support_prompt": SUPPORT_PROMPT.template,
        }
        evaluation.info["judge"] = {"model": model, **prompts}
    evaluation.info["mmrag"] = __version__
    evaluation.info["seconds"] = round(time.monotonic() - started, 1)
    return evaluation


def _missing(model: str, index: UniversalIndex, questions: Sequence[Question]) -> list[str]:
    """Which files of right pages are not in the library. Raises ContentError for all of them."""
    # By name: questions are written without knowing where files will lie.
    there = {PurePath(path).name for path in index.collection.paths()}
    wanted = {file for question in questions for file, _ in question.relevant}
    missing = sorted(wanted - there)
    # One that is missing may be meant; all of them are the wrong collection.
    if missing and len(missing) == len(wanted):
        raise ContentError(
            f"{model}: none of the files that the questions are about is in the collection "
            f"({', '.join(missing[:3])}...); it has {', '.join(sorted(there)[:3])}..."
        )
    return [
        f"{model}: {name} is not in the collection; its pages count as not found"
        for name in missing
    ]
