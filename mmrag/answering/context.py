"""From hits to what a model is shown: select sources, drop duplicates, fit them, fence them.

One source is one page, with its text and its image together. Sources are numbered and shown
from the most to the least relevant: models make best use of the ends of a long context (Liu et
al., "Lost in the Middle", TACL 2024), so the first sources and the question are placed there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from llama_index.core.base.llms.types import ImageBlock, LLMMetadata, TextBlock
from llama_index.core.schema import ImageNode, MetadataMode, Node, NodeWithScore

from mmrag.content import image_size, load_image
from mmrag.errors import ConfigError, ContentError
from mmrag.lexical import Idf, sentences, terms
from mmrag.nodes import as_hit, document_name, page_name
from mmrag.numerals import numbers
from mmrag.prompting import PIXELS_PER_TOKEN, estimate_tokens, image_bytes, sanitize

Box: TypeAlias = tuple[float, float, float, float]

DUPLICATE = 0.9  # Jaccard index of word triples above which two texts are the same page
_ANSWER_ROOM = 1024  # tokens kept free for the answer where the model sets no maximum
_ENOUGH_TEXT = 200  # characters; a page with fewer needs its image to be understood


@dataclass(frozen=True)
class Source:
    """A page that an answer may cite as ``[n]``.

    file, page: where it is; ``page`` is None for files without pages.
    node: the hit that stands for the page, as retrieved.
    text: text layer of what was hit, the best hit first.
    image: the file that shows it: the page, or the figure if a figure is what hit.
    quote: the sentence of the page that carries the answer, once it is known.
    boxes: where the quote stands, one box a line, in PDF points.
    cited: whether the answer cites it.
    description: what a model wrote of an image on the page. It does not stand there: it is no
        evidence and is not quoted.
    described_by: the name of that model.

    Examples:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> hit = NodeWithScore(node=TextNode(text="The well is nine metres deep."), score=1.0)
        >>> Source(1, "well.pdf", 3, hit, hit.text).to_dict()["page"]
        3
    """

    n: int
    file: str
    page: int | None
    node: NodeWithScore = field(repr=False)
    text: str = field(repr=False)
    image: Path | None = None
    quote: str | None = None
    boxes: tuple[Box, ...] = ()
    cited: bool = False
    description: str | None = field(default=None, repr=False)
    described_by: str | None = None

    @property
    def box(self) -> Box | None:
        """The rectangle around ``boxes``; without any, the box of the node itself."""
        if not self.boxes:
            own = as_hit(self.node).box or self.node.node.metadata.get("box")
            return tuple(own) if own else None
        x0, y0, x1, y1 = zip(*self.boxes, strict=True)
        return (min(x0), min(y0), max(x1), max(y1))

    @property
    def path(self) -> Path:
        """Where the file was when it was indexed, whatever the working directory is now."""
        return Path(self.node.node.metadata.get("file_path") or self.file)

    @property
    def label(self) -> str | None:
        """What is printed on the page as its number, where the file says so."""
        label = self.node.node.metadata.get("label")
        return None if label is None else str(label)

    @property
    def page_name(self) -> str:
        """The page for people: ``page 6 (printed 3)``, ``slide 2``; empty without one."""
        return page_name({**self.node.node.metadata, "page": self.page, "label": self.label})

    @property
    def place(self) -> str:
        """File and page for people: ``report.pdf, page 3``."""
        return f"{self.file}, {self.page_name}" if self.page_name else self.file

    def to_dict(self) -> dict[str, Any]:
        """The public fields, ready for JSON."""
        box = None if self.box is None else [round(edge, 2) for edge in self.box]
        return {
            "n": self.n,
            "file": self.file,
            "page": self.page,
            "label": self.label,
            "page_name": self.page_name,
            "quote": self.quote,
            "box": box,
        }


@dataclass(frozen=True)
class ImageBudget:
    """How large the images of one request may be.

    max_pixels: of one image; larger ones are scaled down.
    max_bytes: of all images together, encoded.

    Examples:
        >>> ImageBudget(max_pixels=512 * 512).max_bytes
        8388608
    """

    max_pixels: int = 1024 * 1024
    max_bytes: int = 8 * 1024 * 1024


@dataclass(frozen=True)
class Part:
    """One source as it is sent: its text, cut if need be, and the pixels its image may have."""

    source: Source
    text: str
    pixels: int = 0
    image: bytes | None = None
    mimetype: str | None = None

    @property
    def tokens(self) -> int:
        """A cautious estimate of what this part costs."""
        # The fence, and the lines with file, page, section and caption.
        head = 40
        described = estimate_tokens(self.source.description or "")
        return head + described + estimate_tokens(self.text) + -(-self.pixels // PIXELS_PER_TOKEN)


@dataclass(frozen=True)
class Packed:
    """What is sent, and what had to be left out or cut for it, in words."""

    parts: tuple[Part, ...]
    notes: tuple[str, ...] = field(default=())


def relevance(hit: NodeWithScore) -> float:
    """The reranker's score where there is one, else the retriever's."""
    reranked = as_hit(hit).rerank_score
    score = hit.score if reranked is None else reranked
    # Retrievers without scores (keyword lists, say): 0, which any threshold above 0 drops.
    return 0.0 if score is None else score


def select_sources(
    hits: Sequence[NodeWithScore],
    question: str,
    max_sources: int = 5,
    threshold: float | None = None,
) -> list[Source]:
    """Up to ``max_sources`` pages whose relevance clears ``threshold``, best first, numbered.

    The hits keep their order. Hits on one page become one source; a page whose text another
    source already has is dropped, unless the question tells the two apart. An empty list means
    that nothing is relevant enough.

    Source: adaptive up-to-k selection of "Re-ranking the Context for Multimodal RAG"
    (arXiv 2501.04695); ``calibrate_threshold`` finds the threshold.
    """
    pages: dict[tuple[str, int | str], list[NodeWithScore]] = {}
    for hit in hits:
        if threshold is None or relevance(hit) >= threshold:
            file, page = _location(hit)
            # Hits without a page number (text files, plain nodes) stay sources of their own.
            pages.setdefault((file, hit.node.node_id if page is None else page), []).append(hit)
    kept: list[Source] = []
    wanted = set(terms(question))
    for group in pages.values():
        source = _source(group)
        if not any(_same_page(source, other, wanted) for other in kept):
            kept.append(replace(source, n=len(kept) + 1))
        if len(kept) == max_sources:
            break
    return kept


def calibrate_threshold(relevant: Iterable[float], irrelevant: Iterable[float]) -> float:
    """The threshold that best tells two samples of relevance scores apart.

    Give the best scores of questions that the documents answer, and of questions that they do
    not. The threshold has the greatest share of the first at or above it minus the share of the
    second (Youden's J, Cancer 3(1), 1950), and lies midway between the scores around it.

    Raises:
        ConfigError: If a sample is empty.
    """
    good, bad = sorted(relevant), sorted(irrelevant)
    if not good or not bad:
        raise ConfigError("calibrate_threshold needs at least one score in each sample.")

    def youden(cut: float) -> float:
        return sum(s >= cut for s in good) / len(good) - sum(s >= cut for s in bad) / len(bad)

    scores = sorted({*good, *bad})
    best = max(scores, key=lambda cut: (youden(cut), cut))
    below = [score for score in scores if score < best]
    return (best + below[-1]) / 2 if below else best


def pack(
    sources: Sequence[Source],
    question: str,
    room: int,
    *,
    images: bool = True,
    budget: ImageBudget = ImageBudget(),
) -> Packed:
    """Make sources fit into ``room`` tokens, losing as little as possible, and say what was lost.

    In this order: images get smaller, down to a quarter; images of pages with text go, last
    source first; long texts are cut to the sentences nearest to the question; the last sources
    go. The first source always stays.
    """
    notes: list[str] = []
    # Sanitized before it is measured: taking marks apart makes the text longer.
    parts = [Part(source, sanitize(source.text)) for source in sources]
    if images:
        parts = _fit_images(parts, room, budget, notes)
    parts = _fit_texts(parts, question, room, notes)
    with_image = sum(part.pixels > 0 for part in parts)
    share = budget.max_bytes // max(1, with_image)
    return Packed(tuple(_encode(part, share, notes) for part in parts), tuple(notes))


def fence(part: Part, boundary: str) -> str:
    """A source between two lines that only this request's boundary can open and close."""
    source = part.source
    where = [f"file: {_one_line(source.file)}"]
    if source.page is not None:
        where.append(f"page: {source.page}")
    for name in ("page_name", "section", "caption"):
        if value := source.node.node.metadata.get(name):
            where.append(f"{name.replace('_', ' ')}: {_one_line(str(value))}")
    # Said in words: a model takes an empty fence for a source that was left out.
    text = part.text.strip() or "(no text layer)"
    head, tail = f"<<<source {source.n} {boundary}>>>", f"<<<end of source {source.n} {boundary}>>>"
    described = []
    if source.description:
        # Beside the text and not in it: an answer must not quote it as the page's own words.
        by = _one_line(source.described_by or "a model")
        written = sanitize(source.description).strip()
        described = [f"description by {by}, not written on the page:", written]
    return "\n".join([head, *where, "text:", text, *described, tail])


def room_in_window(model: LLMMetadata, window: int) -> int:
    """Tokens of a context window of ``window`` that are left beside the model's answer."""
    # LlamaIndex's OpenAI models report -1 where no maximum is set.
    answer = max(model.num_output, 0) or _ANSWER_ROOM
    # A model's maximum may be as large as its whole window.
    return window - min(answer, window // 4)


def source_blocks(packed: Packed, boundary: str) -> list[TextBlock | ImageBlock]:
    """Each source's text, followed by its image."""
    blocks: list[TextBlock | ImageBlock] = []
    for part in packed.parts:
        if part.image is None:
            blocks.append(TextBlock(text=fence(part, boundary)))
            continue
        shown = f"{fence(part, boundary)}\nImage of source {part.source.n}:"
        blocks.append(TextBlock(text=shown))
        blocks.append(ImageBlock(image=part.image, image_mimetype=part.mimetype))
    return blocks


def joined_blocks(blocks: Sequence[TextBlock | ImageBlock]) -> list[TextBlock | ImageBlock]:
    """Blocks with neighbouring texts as one, a blank line between them.

    LlamaIndex puts the texts of a message without images together with nothing in between.
    """
    joined: list[TextBlock | ImageBlock] = []
    for block in blocks:
        last = joined[-1] if joined else None
        if isinstance(block, TextBlock) and isinstance(last, TextBlock):
            joined[-1] = TextBlock(text=f"{last.text}\n\n{block.text}")
        else:
            joined.append(block)
    return joined


def _one_line(text: str) -> str:
    return " ".join(sanitize(text).split())


def _location(hit: NodeWithScore) -> tuple[str, int | None]:
    """File and page from our metadata, or from the keys that LlamaIndex's readers write."""
    metadata = hit.node.metadata
    page = str(metadata.get("page", metadata.get("page_label")))
    return document_name(hit.node), int(page) if page.isdecimal() else None


def _source(group: Sequence[NodeWithScore]) -> Source:
    best = group[0]
    file, page = _location(best)
    texts: list[str] = []
    for hit in group:
        if hit.node.metadata.get("kind") == "description":
            continue
        text = hit.node.get_content(MetadataMode.NONE).strip()
        # A passage is part of its page's text, which may be among the hits as well.
        if text and not any(text in other for other in texts):
            texts.append(text)
    written = (_described(hit) for hit in group)
    description, by = next((each for each in written if each[0]), (None, None))
    text, image = "\n\n".join(texts), _image(best)
    return Source(0, file, page, best, text, image, description=description, described_by=by)


def _described(hit: NodeWithScore) -> tuple[str | None, str | None]:
    """The description that came with a hit, or that it is, and the model that wrote it."""
    node = hit.node
    if node.metadata.get("kind") == "description":
        return node.get_content(MetadataMode.NONE), node.metadata.get("described_by")
    return as_hit(hit).description, as_hit(hit).described_by


def _image(hit: NodeWithScore) -> Path | None:
    """The figure's crop or the page's image; the page's where the crop's file is gone."""
    node = hit.node
    own: str | Path | None = None
    if isinstance(node, ImageNode):
        own = node.image_path
    elif isinstance(node, Node) and node.image_resource:
        own = node.image_resource.path
    paths = [Path(path) for path in (own, node.metadata.get("page_image")) if path]
    return next((path for path in paths if path.is_file()), paths[0] if paths else None)


def _same_page(one: Source, other: Source, wanted: set[str]) -> bool:
    """Whether two sources would tell a reader the same."""
    a, b = terms(one.text), terms(other.text)
    # Scans without a text layer can only be compared as files.
    if not a or not b:
        return not a and not b and _same_file(one.image, other.image)
    first, second = _triples(a), _triples(b)
    if len(first & second) < DUPLICATE * len(first | second):
        return False
    # However alike two pages look, a number or a word of the question (the file's name counts)
    # tells them apart: two plans of one insurer, two years of one report.
    named = [wanted & {*words, *terms(source.file)} for words, source in ((a, one), (b, other))]
    return named[0] == named[1] and numbers(one.text) == numbers(other.text)


def _triples(words: list[str]) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}


def _same_file(one: Path | None, other: Path | None) -> bool:
    if one is None or other is None or not (one.is_file() and other.is_file()):
        return False
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()


def _cost(parts: Sequence[Part]) -> int:
    return sum(part.tokens for part in parts)


def _fit_images(parts: list[Part], room: int, budget: ImageBudget, notes: list[str]) -> list[Part]:
    sizes = [_pixels(part.source, notes) for part in parts]
    for shrink in (1, 2, 4):
        cap = budget.max_pixels // shrink
        parts = [
            replace(part, pixels=min(size, cap)) for part, size in zip(parts, sizes, strict=True)
        ]
        if _cost(parts) <= room:
            return parts
    for i in reversed(range(len(parts))):
        if _cost(parts) <= room:
            break
        # Without its image, a page with hardly any text would be an empty source.
        if parts[i].pixels and len(parts[i].text) >= _ENOUGH_TEXT:
            parts[i] = replace(parts[i], pixels=0)
            notes.append(f"the image of [{i + 1}] was not sent: the context window is full")
    return parts


def _fit_texts(parts: list[Part], question: str, room: int, notes: list[str]) -> list[Part]:
    if _cost(parts) > room:
        images = _cost([replace(part, text="") for part in parts])
        share = max(100, (room - images) // len(parts))
        parts = [_cut(part, question, share, notes) for part in parts]
    while len(parts) > 1 and _cost(parts) > room:
        notes.append(f"[{parts[-1].source.n}] was left out: the context window is full")
        parts = parts[:-1]
    # Only the first source is left by now. An answer from its text beats a request that fails.
    if parts and parts[0].pixels and _cost(parts) > room:
        parts = [replace(parts[0], pixels=0)]
        notes.append("the image of [1] was not sent: the context window is too small")
    if parts and _cost(parts) > room:
        parts = [_cut(parts[0], question, max(50, room - 40), notes)]
    return parts


def _cut(part: Part, question: str, tokens: int, notes: list[str]) -> Part:
    if estimate_tokens(part.text) <= tokens:
        return part
    notes.append(f"[{part.source.n}] was cut to the sentences that match the question best")
    return replace(part, text=condense(part.text, question, tokens))


def condense(text: str, question: str, tokens: int) -> str:
    """The sentences that share most with the question, in their order, within ``tokens``."""
    pieces = sentences(text)
    words = [terms(piece) for piece in pieces]
    idf, wanted = Idf(words), terms(question)
    # Best first until the room is used up, then in the page's order, so that it still reads well.
    by_worth = sorted(range(len(pieces)), key=lambda i: (-idf.coverage(wanted, words[i]), i))
    chosen: list[int] = []
    for i in by_worth:
        # Plus one for the line break that joins it.
        tokens -= estimate_tokens(pieces[i]) + 1
        if tokens < 0:
            break
        chosen.append(i)
    return "\n".join(pieces[i] for i in sorted(chosen))


def _pixels(source: Source, notes: list[str]) -> int:
    if source.image is None:
        return 0
    try:
        width, height = image_size(source.image)
    except ContentError as error:
        notes.append(f"the image of [{source.n}] was not sent: {error}")
        return 0
    return width * height


def _encode(part: Part, max_bytes: int, notes: list[str]) -> Part:
    """The part with its image."""
    if not part.pixels or part.source.image is None:
        return part
    try:
        image = load_image(part.source.image)
    except ContentError as error:
        notes.append(f"the image of [{part.source.n}] was not sent: {error}")
        return replace(part, pixels=0)
    data, mimetype = image_bytes(image, part.pixels, max_bytes)
    return replace(part, image=data, mimetype=mimetype)
