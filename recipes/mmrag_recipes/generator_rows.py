"""Make training rows for the model that answers: right pages, irrelevant ones, and refusals.

    python -m mmrag_recipes generator_rows questions.jsonl --pdfs papers/ --out data/answers

Retrieval brings pages that do not answer the question, and a model that has only seen right ones
takes something from them all the same. So some rows have irrelevant pages beside the right one,
and in some there is no right page and the answer is a refusal (noise-injected training on the
level of data, RagVL, arXiv 2407.21439). The rows are chats in the layouts of ms-swift, LLaVA and
transformers.
"""

from __future__ import annotations

import json
import logging
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mmrag.answering.response import SENTINEL
from mmrag.embedders import load_embedder
from mmrag.embedders.base import Embedder
from mmrag.errors import ContentError
from mmrag.evaluation.questions import Page, Question, read_questions
from mmrag.prompting import sanitize
from mmrag.reading import find_files
from mmrag_recipes.config_generator import GeneratorRowsConfig
from mmrag_recipes.convert import pages_of
from mmrag_recipes.rows import IMAGES, ImageStore, Item
from mmrag_recipes.vectors import VectorCache

logger = logging.getLogger("mmrag_recipes")

_SHORTEST = 4  # characters
CLEAN, NOISY, REFUSED = "right pages alone", "with irrelevant pages", "irrelevant pages alone"


@dataclass(frozen=True)
class Chat:
    """One row before it is laid out: what the user shows and asks, and what is right.

    shown: text, or the id of an image that is marked as one. kind: clean, noisy or refused.
    """

    id: str
    kind: str
    shown: tuple[tuple[str, bool], ...]
    answer: str

    @property
    def images(self) -> list[str]:
        """Ids of the images, in order."""
        return [part for part, is_image in self.shown if is_image]


def read_pages(pdfs: Path, store: ImageStore) -> dict[Page, Item]:
    """Every page of a folder of PDFs, with its image and its text; what is unreadable is said."""
    pages: dict[Page, Item] = {}
    found = find_files([pdfs])
    errors = list(found.errors)
    for path in found.files:
        for number, item in pages_of(path, store, "fused", errors):
            pages[path.name, number] = item
    for error in errors:
        logger.warning("not read: %s", error)
    return pages


def similarities(
    questions: Sequence[Question], pages: Sequence[Item], cache: VectorCache
) -> NDArray[np.float32]:
    """Cosine of each question with each page, (questions, pages); a page by its text, if any."""
    seen = [Item(text=page.text) if page.text else Item(image=page.image) for page in pages]
    asked = [Item(text=question.text) for question in questions]
    tasks = ["page_for_question"] * len(asked)
    found: NDArray[np.float32] = cache.encode(asked, tasks) @ cache.encode(seen).T
    return found


def irrelevant(
    question: Question, pages: Mapping[Page, Item], scores: NDArray[np.float32]
) -> list[Page]:
    """Pages that do not answer a question, those that are most like it first.

    Pages that say the answer word for word are left out: they may be right and not labelled so.
    """
    names = list(pages)
    answer = _plain(question.answer)
    # Shorter ones, such as "12" or "yes", stand on pages that have nothing to do with them.
    says = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)") if len(answer) >= _SHORTEST else None
    order = [names[place] for place in np.argsort(-scores, kind="stable")]
    right = set(question.pages)
    said = {name for name in order if says and says.search(_plain(pages[name].text))}
    return [name for name in order if name not in right and name not in said]


def _plain(text: str | None) -> str:
    return " ".join((text or "").casefold().split()).rstrip(".")


def kinds_of(questions: Sequence[Question], options: GeneratorRowsConfig) -> list[str]:
    """Which kind of row each question becomes, by the shares of the options and the seed.

    The shares are of the questions that have a right page; the others are refused in any case.
    """
    able = [place for place, question in enumerate(questions) if question.answerable]
    random.Random(options.seed).shuffle(able)
    n_refused, n_noisy = round(options.refuse * len(able)), round(options.noise * len(able))
    kinds = [REFUSED] * len(questions)
    for rank, place in enumerate(able[n_refused:]):
        kinds[place] = NOISY if rank < n_noisy else CLEAN
    return kinds


def chat_of(
    question: Question,
    kind: str,
    pages: Mapping[Page, Item],
    others: Sequence[Page],
    options: GeneratorRowsConfig,
) -> Chat:
    """The row of one question.

    Args:
        others: pages that do not answer it, the most tempting first.

    Raises:
        ContentError: If its pages are not among those read, or no irrelevant page is left.
    """
    missing = [f"{file} page {page}" for file, page in question.pages if (file, page) not in pages]
    if missing:
        raise ContentError(f"not readable: {', '.join(missing)}")
    # By question, so that adding questions changes none of the other rows.
    chance = random.Random(f"{options.seed}/{question.id}")
    right = [] if kind == REFUSED else list(question.pages[: options.pages])
    room = 0 if kind == CLEAN else options.pages - len(right)
    # Among the nearest, not the nearest alone: retrieval makes mistakes of all sizes.
    pool = others[: max(room, options.depth)]
    wrong = chance.sample(pool, min(room, len(pool)))
    if kind != CLEAN and not wrong:
        raise ContentError("there is no page beside the right ones; give more files or pages.")
    # A place that is always the same would give the right page away.
    order = chance.sample([*right, *wrong], len(right) + len(wrong))
    shown = [
        part
        for number, page in enumerate(order, 1)
        for part in parts_of(number, pages[page], options.items)
    ]
    asked = options.template.replace("{refusal}", options.refusal)
    shown.append((asked.replace("{question}", sanitize(question.text)), False))
    cited = "".join(f"[{order.index(page) + 1}]" for page in right) if options.cite else ""
    answer = f"{question.answer} {cited}".strip() if right else options.refusal
    return Chat(question.id, kind, tuple(shown), answer)


def parts_of(
    number: int, page: Item, items: Literal["image", "text", "fused"]
) -> list[tuple[str, bool]]:
    """What is shown of a page: its number, its image and its text."""
    parts = [(f"[{number}]", False)]
    if items != "text":
        parts += [(name, True) for name in page.images]
    if items != "image" and page.text:
        parts.append((sanitize(page.text), False))
    return parts


def swift(chat: Chat) -> dict[str, Any]:
    """A row in the layout of ms-swift: ``<image>`` marks in the text, and a list of files."""
    text = "\n".join("<image>" if is_image else part for part, is_image in chat.shown)
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": chat.answer}]
    return {"messages": turns, "images": [f"{IMAGES}/{name}" for name in chat.images]}


def llava(chat: Chat) -> dict[str, Any]:
    """A row in the layout of LLaVA's training code; the folder of images is its argument."""
    text = "\n".join("<image>" if is_image else part for part, is_image in chat.shown)
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": chat.answer}]
    images = {"image": [f"{IMAGES}/{name}" for name in chat.images]} if chat.images else {}
    return {"id": chat.id, **images, "conversations": turns}


def transformers(chat: Chat) -> dict[str, Any]:
    """A row as chat templates of transformers take it, parts of a turn in a list."""
    parts = [
        {"type": "image", "path": f"{IMAGES}/{part}"}
        if is_image
        else {"type": "text", "text": part}
        for part, is_image in chat.shown
    ]
    reply = [{"type": "text", "text": chat.answer}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": reply}]
    return {"messages": turns}


LAYOUTS = {"swift": swift, "llava": llava, "transformers": transformers}


def make_chats(
    questions: Sequence[Question],
    pages: Mapping[Page, Item],
    cache: VectorCache,
    options: GeneratorRowsConfig,
) -> tuple[list[Chat], list[str]]:
    """Rows of all questions, and a message for each question that gave none."""
    usable = [q for q in questions if not q.image and (q.answer or not q.answerable)]
    left_out = set(questions) - set(usable)
    problems = [f"{q.id}: it has an image, or no answer" for q in questions if q in left_out]
    scores = similarities(usable, list(pages.values()), cache)
    chats = []
    for question, kind, row in zip(usable, kinds_of(usable, options), scores, strict=True):
        others = irrelevant(question, pages, row)
        try:
            chats.append(chat_of(question, kind, pages, others, options))
        except ContentError as error:
            problems.append(f"{question.id}: {error}")
    return chats, problems


def generator_rows(options: GeneratorRowsConfig, embedder: Embedder) -> Counter[str]:
    """Write the rows and their images into the folder ``out``. Returns how many of each kind.

    Raises:
        ContentError: If no question gives a row.
    """
    options = options.replace(refusal=options.refusal or SENTINEL)
    store = ImageStore(options.out / IMAGES)
    pages = read_pages(options.pdfs, store)
    questions = read_questions(options.questions)
    cache = VectorCache(options.out / "index", embedder, store)
    chats, problems = make_chats(questions, pages, cache, options)
    for problem in problems:
        logger.warning("left out: %s", problem)
    if not chats:
        raise ContentError(f"{options.questions}: no question gives a row.")
    lay_out = LAYOUTS[options.layout]
    lines = [json.dumps(lay_out(chat), ensure_ascii=False) + "\n" for chat in chats]
    target = options.out / "rows.jsonl"
    partial = target.with_name("rows.jsonl.part")
    partial.write_text("".join(lines), encoding="utf-8")
    partial.replace(target)
    return Counter(chat.kind for chat in chats)


def run(options: GeneratorRowsConfig) -> None:
    """Command: make rows for the model that answers."""
    counts = generator_rows(options, load_embedder(options.model))
    print("\n".join(f"{counts[kind]:>6}  {kind}" for kind in (CLEAN, NOISY, REFUSED)))
    print(f"wrote {options.out / 'rows.jsonl'}")
