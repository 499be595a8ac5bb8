"""Measure the cosine at which a passage supports a claim, for one embedder.

    python -m mmrag_recipes calibrate questions.jsonl --pdfs papers/ --model mmrag-nano

Questions are as in ``mmrag_recipes.evaluate_pages``, with an ``answer``. Each sentence of an answer
is a claim that its page supports, and every other page of the same file stands for a wrong
citation, though some of them may say the same. The cosine printed last lets few wrong citations
pass; it belongs into ``calibration`` of the checkpoint's ``mmrag.json``, as ``support_cosine``.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.errors import ContentError
from mmrag.evaluation.questions import Page, Question
from mmrag.lexical import sentences
from mmrag.nodes import node_text
from mmrag.reading import ReadOptions, find_files, read_file
from mmrag_recipes.config import CalibrateConfig
from mmrag_recipes.evaluate_pages import read_questions

Cosines = NDArray[np.float32]


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


def run(options: CalibrateConfig) -> None:
    """Print the shares at several cosines, and the one to take."""
    questions = read_questions(options.questions)
    passages = read_passages(options.pdfs)
    right, wrong = support(load_embedder(options.model), questions, passages)
    chosen = least_cosine(wrong, options.wrong_share)
    print(f"{len(right)} claims, {len(wrong)} wrong citations\n")
    print("| cosine | right pages pass | other pages of the file pass |")
    print("|---|---|---|")
    for least in sorted({0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, chosen}):
        print(f"| {least:.2f} | {(right >= least).mean():.3f} | {(wrong >= least).mean():.3f} |")
    print(f"\n{json.dumps({'support_cosine': chosen})}")
