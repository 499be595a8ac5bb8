"""Measure the settings that hold for one embedder: its ``calibration`` in ``mmrag.json``.

    python -m mmrag_recipes calibrate questions.jsonl --pdfs papers/ --model mmrag-nano
    python -m mmrag_recipes calibrate questions.jsonl --pdfs papers/ --model models/my-gme --write

Questions are as in ``mmrag_recipes.evaluate_pages``, with an ``answer``.

``zero_cosine``: the mean cosine of a question to the pages of other files, in each view.
``fusion_weights``: fitted with these zeros as ``mmrag tune`` does, and left out if their gain on
documents left out of the fit is within noise.
``support_cosine``: each sentence of an answer is a claim that its page supports, and every other
page of the same file stands for a wrong citation, though some of them may say the same. The cosine
lets few wrong citations pass.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError, ContentError
from mmrag.evaluation.asking import page_of
from mmrag.evaluation.questions import Page, Question
from mmrag.evaluation.tuning import Tuning, tune
from mmrag.index import UniversalIndex
from mmrag.lexical import sentences
from mmrag.nodes import node_text
from mmrag.reading import ReadOptions, find_files, read_file
from mmrag.retrieval.retriever import UniversalRetriever
from mmrag_recipes.config import CalibrateConfig
from mmrag_recipes.evaluate_pages import read_questions

Cosines = NDArray[np.float32]
_EVERY_NODE = 10_000  # hits of a ranking that the mean of unrelated pages is taken over


def zero_cosines(retriever: UniversalRetriever, questions: Sequence[Question]) -> dict[str, float]:
    """Mean cosine, in hundredths, of a question to the nodes of other files, in each view.

    A view is left out if it has nodes of the questions' own files only.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for question in questions:
        own = {file for file, _ in question.pages}
        rankings = retriever.rankings(question.query(), limit=_EVERY_NODE)
        for view in retriever.collection.settings.views:
            found[view] += [
                hit.score for hit in rankings.get(view, ()) if page_of(hit.payload)[0] not in own
            ]
    return {view: round(float(np.mean(each)), 2) for view, each in found.items() if each}


def fusion_settings(
    embedder: Embedder, questions: Sequence[Question], pdfs: Path
) -> tuple[dict[str, float], Tuning]:
    """The zeros of the views, and weights fitted with them. Raises ContentError like ``tune``."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        UniversalIndex(Path(scratch) / "library", embedder) as index,
    ):
        index.add(pdfs, progress=True)
        retriever = index.as_retriever()
        zeros = zero_cosines(retriever, questions)
        # Weights hold for the scale that they were fitted on.
        retriever.zeros |= zeros
        return zeros, tune(retriever, questions)


def read_passages(pdfs: Path) -> dict[Page, list[str]]:
    """Sentences of every page, and pairs of neighbours: what a claim is compared with."""
    found: dict[Page, list[str]] = {}
    files = find_files([pdfs]).files
    with tempfile.TemporaryDirectory() as scratch:
        for path in files:
            # Only text is wanted, so the images that reading makes may be small.
            for page in read_file(path, scratch, ReadOptions(dpi=24, figures=False)):
                if page.page is not None and page.nodes:
                    single = sentences(node_text(page.nodes[0]))
                    pairs = [f"{a} {b}" for a, b in pairwise(single)]
                    found[path.name, page.page] = single + pairs
    return found


def support(
    embedder: Embedder, questions: Sequence[Question], passages: Mapping[Page, list[str]]
) -> tuple[Cosines, Cosines]:
    """Best cosine of each claim on its own pages, and on each other page of their file.

    Returns:
        (claims,), and (claims and other pages,).

    Raises:
        ContentError: If no question has an answer, or no page of an answer has text.
    """
    claims = [(one, row) for row in questions for one in sentences(row.answer or "")]
    vectors = {page: embedder.encode(texts) for page, texts in passages.items() if texts}
    right, wrong = [], []
    for claim, (_, row) in zip(embedder.encode([text for text, _ in claims]), claims, strict=True):
        own = set(row.pages)
        best = {page: float((rows @ claim).max()) for page, rows in vectors.items()}
        here = [score for page, score in best.items() if page in own]
        files = {file for file, _ in own}
        others = [s for page, s in best.items() if page[0] in files and page not in own]
        # A claim whose file has a single page has no wrong citation to compare with.
        if here and others:
            right.append(max(here))
            wrong += others
    if not right:
        raise ContentError("there is no answer whose page has text, in a file of several pages.")
    return np.array(right, dtype=np.float32), np.array(wrong, dtype=np.float32)


def least_cosine(wrong: Cosines, share: float) -> float:
    """The least cosine, in hundredths, that at most ``share`` of wrong citations reach."""
    steps = np.arange(0, 101) / 100
    passing = (wrong[None] >= steps[:, None]).mean(axis=1)
    # argmax finds the first True; at 1.00 nothing passes, so there is one.
    return float(steps[int(np.argmax(passing <= share))])


def write(model: str, calibration: Mapping[str, object]) -> Path:
    """Write into the ``mmrag.json`` of a checkpoint's folder, over what was measured before.

    Raises:
        ConfigError: If the model is no folder.
    """
    if not Path(model).is_dir():
        raise ConfigError(f"--write writes into the folder of a checkpoint, and {model} is none.")
    path = Path(model) / "mmrag.json"
    about = json.loads(path.read_text()) if path.exists() else {}
    about["calibration"] = about.get("calibration", {}) | calibration
    path.write_text(json.dumps(about, indent=2) + "\n")
    return path


def run(options: CalibrateConfig) -> None:
    """Print what was measured, and the calibration to take."""
    questions = read_questions(options.questions)
    embedder = load_embedder(options.model)
    zeros, tuning = fusion_settings(embedder, questions, options.pdfs)
    print(
        f"{tuning.n_questions} questions about {tuning.n_documents} documents; nDCG@10 on "
        f"documents left out of the fit: {tuning.before:.3f} before, {tuning.after:.3f} after "
        f"(gain 95 % interval {tuning.low:+.3f} to {tuning.high:+.3f})"
    )
    right, wrong = support(embedder, questions, read_passages(options.pdfs))
    chosen = least_cosine(wrong, options.wrong_share)
    print(f"{len(right)} claims, {len(wrong)} wrong citations\n")
    print("| cosine | right pages pass | other pages of the file pass |")
    print("|---|---|---|")
    for least in sorted({0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, chosen}):
        print(f"| {least:.2f} | {(right >= least).mean():.3f} | {(wrong >= least).mean():.3f} |")
    calibration: dict[str, object] = {"zero_cosine": zeros, "support_cosine": chosen}
    if tuning.within_noise:
        print("\nThe gain of other weights is within noise, so they are left as they are.")
    else:
        calibration["fusion_weights"] = tuning.weights
    print(f"\n{json.dumps(calibration)}")
    if options.write:
        print(f"written to {write(options.model, calibration)}")
