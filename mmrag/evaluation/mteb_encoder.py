"""An embedder as a model of mteb, so that public benchmarks run by their standard tool."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content
from mmrag.embedders.base import Embedder, check_dim
from mmrag.embedders.progress import progress_bar
from mmrag.embedding import UniversalEmbedding
from mmrag.errors import ConfigError, ContentError, naming

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.types import PromptType

# What a query is (rows) and what it looks for (columns), for tasks of mteb without a prompt.
_INSTRUCTIONS = {
    "text": {
        "text": "passage_for_question",
        "image": "image_for_caption",
        "fused": "fused_for_question",
        "page": "page_for_question",
    },
    "image": {
        "text": "caption_for_image",
        "image": "image_for_image",
        "fused": "image_for_image",
        "page": "page_for_image",
    },
    "fused": {
        "text": "passage_for_image_question",
        "image": "image_for_edited_image",
        "fused": "fused_for_image_question",
        "page": "page_for_image_question",
    },
}
# The images of these types of task are pages; those of photos have types of their own.
_OF_PAGES = ("DocumentUnderstanding", "Retrieval", "Reranking")
# Most contents in one call of the embedder. Pages take megabytes once they are decoded.
_MOST_ITEMS, _MOST_IMAGES = 1024, 64


class MTEBEncoder:
    """An embedder as ``mteb.evaluate`` takes it (mteb's ``EncoderProtocol``).

    Rows may hold a text, an image or both, in any mix within one batch. Queries get the prompt of
    the task; where mteb has none, the instruction of ``mmrag.instructions`` for what the query is
    and what it looks for. Documents get none, so that each family embeds them by its recipe. Both
    sides of a task without queries, such as STS or clustering, get its prompt, if it has one.

    Vectors do not depend on mteb's ``batch_size``: the embedder always gets the same calls.

    Args:
        embedder: an Embedder, or an embed model, whose ``query_instruction`` is not used.
        dim: leading dimensions to keep (Matryoshka); by default those of the embed model, or all.
        instructions: by name of a task of mteb, what to use in place of its prompt; a sentence or
            a name in ``mmrag.instructions``.
        name: ``organization/model``, as results are filed; by default the hub's name, or
            ``mmrag/`` and the name of the model or folder.

    Raises:
        ConfigError: Without mteb, for a ``dim`` that the model does not have, and for a ``name``
            without a slash.

    Examples:
        >>> encoder = MTEBEncoder(UniversalEmbedding("mmrag-nano", device="cpu"))
        >>> encoder.mteb_model_meta.name
        'mmrag/mmrag-nano'
        >>> import mteb
        >>> mteb.evaluate(encoder, mteb.get_tasks(["NFCorpus"]))  # doctest: +SKIP
    """

    def __init__(
        self,
        embedder: Embedder | UniversalEmbedding,
        *,
        dim: int | None = None,
        instructions: Mapping[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        try:
            from mteb.models import ModelMeta
        except ImportError as error:
            raise ConfigError("mteb is not installed: pip install 'mmrag[eval]'.") from error
        if isinstance(embedder, UniversalEmbedding):
            dim = embedder.dim if dim is None else dim
            embedder = embedder.embedder
        self.embedder = embedder
        self.dim = check_dim(dim, embedder.dim, getattr(embedder, "matryoshka_dims", ()))
        self.instructions = dict(instructions or {})
        name = model_name(embedder.name) if name is None else name
        if "/" not in name:
            raise ConfigError(f"name={name!r}: mteb files results by organization/model.")
        # mteb finds the results of earlier runs by these, so all that moves vectors is among them.
        settings: dict[str, Any] = {"dim": self.dim} if self.dim != embedder.dim else {}
        if self.instructions:
            settings["instructions"] = self.instructions
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision=embedder.fingerprint,
            release_date=None,
            languages=None,
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=None,
            embed_dim=self.dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=[],
            similarity_fn_name="cosine",
            use_instructions=True,
            training_datasets=None,
            # mteb knows no "fused": a task of texts with images asks for both.
            modalities=sorted(embedder.modalities & {"text", "image"}),
            experiment_kwargs=settings or None,
        )

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool = True,
        precision: str | None = None,
    ) -> NDArray[np.float32]:
        """Embed the rows of a ``DataLoader`` of mteb.

        Args:
            inputs: batches, dicts of columns; ``text`` and ``image`` are read. A blank text beside
                an image, and an image that is None, mean that a row has none.
            task_metadata: of the task, for its prompt and modalities.
            hf_split: the split, for messages.
            hf_subset: the subset, for messages.
            prompt_type: ``query``, ``document``, or None for tasks that have no queries.
            batch_size: mteb passes it on; it has cut ``inputs``, and moves no vector.
            show_progress_bar: show a progress bar on stderr.
            precision: only ``float32``; mteb would file other results as quantised.

        Returns:
            Shape (rows, dim), float32, every row of L2 norm 1, in the order of ``inputs``.

        Raises:
            ContentError: For a row that cannot be embedded; its place is in the message. It is
                not left out, since the score would be that of another task.
            ConfigError: For another ``precision``.
        """
        if precision not in (None, "float32"):
            raise ConfigError(f"precision={precision!r}: MTEBEncoder gives float32 only.")
        side = "rows" if prompt_type is None else prompt_type.value
        where = f"{task_metadata.name}, {hf_subset}, {hf_split}, {side}"
        vectors = [np.zeros((0, self.dim), dtype=np.float32)]
        with naming(where), progress_bar(len(inputs.dataset), show_progress_bar) as advance:
            done = 0
            for contents in chunks(row for batch in inputs for row in rows_of(batch)):
                asked = [
                    Content(
                        content.text,
                        content.image,
                        instruction_for(content, task_metadata, prompt_type, self.instructions),
                    )
                    for content in contents
                ]
                with naming(f"from row {done}"):
                    vectors.append(self.embedder.encode(asked, dim=self.dim))
                done += len(contents)
                advance(len(contents))
        return np.concatenate(vectors)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of all pairs, a tensor of shape (len(embeddings1), len(embeddings2))."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:
        """Cosines of each row with the row of the same place, a tensor of shape (rows,)."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def rows_of(batch: Mapping[str, Any]) -> Iterator[Content]:
    """The rows of a batch of mteb, which is a dict of columns.

    Raises:
        ContentError: For a batch without texts and images, and for a row that has neither.

    >>> [row.modality for row in rows_of({"text": ["a", " "], "image": [None, b"..."]})]
    ['text', 'image']
    """
    texts, images = batch.get("text"), batch.get("image")
    if texts is None and images is None:
        raise ContentError(f"rows have {', '.join(sorted(batch))}, and neither text nor image.")
    pairs = zip(
        repeat(None, len(images or ())) if texts is None else texts,
        repeat(None, len(texts or ())) if images is None else images,
        strict=True,
    )
    for text, image in pairs:
        # mteb's loader allows no None among texts: where a row has only an image, it is blank.
        seen = image is not None and not (text or "").strip()
        yield Content(None if seen else text, image)


def chunks(contents: Iterable[Content]) -> Iterator[list[Content]]:
    """Cut a stream by what it holds alone, so that each chunk fits in memory.

    >>> [len(chunk) for chunk in chunks([Content("a")] * 1500)]
    [1024, 476]
    """
    chunk: list[Content] = []
    n_images = 0
    for content in contents:
        chunk.append(content)
        n_images += len(content.images)
        if len(chunk) >= _MOST_ITEMS or n_images >= _MOST_IMAGES:
            yield chunk
            chunk, n_images = [], 0
    if chunk:
        yield chunk


def instruction_for(
    content: Content,
    task: TaskMetadata,
    prompt_type: PromptType | None,
    instructions: Mapping[str, str],
) -> str | None:
    """What one row of a task is asked with: a sentence or the name of one; None for documents.

    instructions: by name of a task, in place of its prompt.
    """
    if prompt_type is not None and prompt_type.value == "document":
        return None
    prompt = instructions.get(task.name) or task.prompt
    if isinstance(prompt, Mapping):
        prompt = prompt.get("query")
    if prompt or prompt_type is None:
        return prompt or None
    wanted = set(task.get_modalities(type(prompt_type)("document")))
    if "image" not in wanted:
        goal = "text"
    elif task.type in _OF_PAGES:
        goal = "page"
    else:
        goal = "fused" if "text" in wanted else "image"
    return _INSTRUCTIONS[content.modality][goal]


def model_name(name: str) -> str:
    """What mteb calls a model: ``organization/model``.

    >>> model_name("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"), model_name("/models/mine")
    ('Alibaba-NLP/gme-Qwen2-VL-2B-Instruct', 'mmrag/mine')
    """
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    # A folder says nothing to others, and its name in full would be part of the results.
    return f"mmrag/{Path(name).resolve().name}"
