"""Any sentence-transformers model as an Embedder: the optional backend ``mmrag[st]``.

For the families that mmrag does not know. The model itself says what it can embed and brings
its own pooling, prompts and limits (https://sbert.net). Code that comes with a checkpoint is
never run.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content, ContentLike, Modality, load_image
from mmrag.embedders.base import Calibration, as_items, check_dim, truncate_normalise
from mmrag.embedders.known import SENTENCE_TRANSFORMERS
from mmrag.embedders.progress import progress_bar
from mmrag.errors import ConfigError, ContentError, ModelError, naming
from mmrag.modeling.attention import planless
from mmrag.modeling.checkpoints import fingerprint
from mmrag.modeling.loading import Placement, check_finite, check_weights, quiet

logger = logging.getLogger(__name__)

M = TypeVar("M")

MODALITIES: dict[Modality, Any] = {"text": "text", "image": "image", "fused": ("image", "text")}
"""Our words and theirs. Clips have no input of their own there."""


class SentenceTransformersEmbedder:
    """An Embedder over a ``SentenceTransformer``. Safe to call from several threads.

    Documents go through its ``encode_document``, whatever has an instruction through its
    ``encode_query``, each with the prompt that the model was saved with. Where the instruction
    goes: into ``prompt_format``, such as ``"Instruct: {instruction} Query: "``, if given; into
    the system turn of a model with a chat template; else nowhere, for a model without either
    was not trained on instructions.

    Raises:
        ConfigError: For a ``prompt_format`` without a place for the instruction.

    >>> from sentence_transformers import SentenceTransformer  # doctest: +SKIP
    >>> model = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")  # doctest: +SKIP
    >>> embedder = SentenceTransformersEmbedder(
    ...     model, name="MiniLM", fingerprint="1"
    ... )  # doctest: +SKIP
    >>> embedder.encode(["a text"]).shape  # doctest: +SKIP
    (1, 384)
    """

    calibration: Calibration | None = None
    prefers_text = prefers_passages = False
    family = SENTENCE_TRANSFORMERS

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        fingerprint: str,
        batch_size: int = 32,
        prompt_format: str | None = None,
    ) -> None:
        if prompt_format is not None and "{instruction}" not in prompt_format:
            raise ConfigError("prompt_format must hold {instruction}.")
        self.model = model
        self.name = name
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        self.prompt_format = prompt_format
        self.dim = int(model.get_embedding_dimension())
        self.modalities = frozenset(
            modality for modality, theirs in MODALITIES.items() if model.supports(theirs)
        )
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def encode(
        self,
        contents: Sequence[ContentLike],
        instruction: str | None = None,
        dim: int | None = None,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Embed contents of any mix of modalities; see ``Embedder.encode``.

        Raises:
            ContentError: For an item with more than one image.
        """
        kept = check_dim(dim, self.dim)
        items = as_items(self, contents, instruction)
        for index, item in enumerate(items):
            if len(item.images) > 1:
                raise ContentError(f"item {index}: {self.name} takes one image per item.")
        vectors = np.zeros((len(items), self.dim), dtype=np.float32)
        with progress_bar(len(items), progress) as advance:
            for indices in self._batches(items):
                vectors[indices] = self._run(indices, items)
                advance(len(indices))
        return truncate_normalise(vectors, kept)

    def _batches(self, items: Sequence[Content]) -> list[list[int]]:
        """Indices of items that share modality and instruction, longest text first."""
        groups: dict[tuple[Modality, str | None], list[int]] = {}
        for index, item in enumerate(items):
            # sentence-transformers takes one prompt, and one kind of input, in a call.
            groups.setdefault((item.modality, item.instruction), []).append(index)
        batches = []
        for group in groups.values():
            # Texts of similar length are padded little; the longest first shows at once what does
            # not fit.
            group.sort(key=lambda index: -len(items[index].text or ""))
            for start in range(0, len(group), self.batch_size):
                batches.append(group[start : start + self.batch_size])
        return batches

    def _run(self, indices: Sequence[int], items: Sequence[Content]) -> NDArray[np.float32]:
        inputs = [self._input(index, items[index]) for index in indices]
        instruction = items[indices[0]].instruction
        options: dict[str, Any] = {"batch_size": len(inputs), "show_progress_bar": False}
        # Texts hardly ever come in batches of a shape that was there before; images may.
        texts = items[indices[0]].modality == "text"
        with self._lock, planless(self.model.device) if texts else nullcontext():
            if instruction is None:
                vectors = self.model.encode_document(inputs, **options)
            else:
                prompt = None  # the model's own prompt for queries
                if self.prompt_format is not None:
                    prompt = self.prompt_format.format(instruction=instruction)
                elif "message" in self.model.modalities:
                    # A model with a chat template puts it into the system turn; any other would
                    # take it for a part of the text.
                    prompt = instruction
                vectors = self.model.encode_query(inputs, prompt=prompt, **options)
        return np.asarray(vectors, dtype=np.float32)

    def _input(self, index: int, item: Content) -> Any:
        if not item.images:
            return item.text
        with naming(f"item {index}"):
            image = load_image(item.images[0])
        return image if item.text is None else {"image": image, "text": item.text}


def load_sentence_transformers(
    folder: Path,
    placement: Placement,
    name: str,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    prompt_format: str | None = None,
) -> SentenceTransformersEmbedder:
    """Load a folder that sentence-transformers saved; ``max_length`` is in tokens.

    Raises:
        ModelError: If it is not such a folder or needs code of its own.
        ConfigError: If sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            "sentence-transformers is not installed: pip install 'mmrag[st]'."
        ) from error
    if placement.quantize is not None or placement.device_map is not None:
        raise ConfigError(f"family {SENTENCE_TRANSFORMERS!r} takes no quantize or device_map.")
    if not (folder / "modules.json").is_file():
        raise ModelError(
            f"{folder}: modules.json is missing, so it is no sentence-transformers model, and how "
            "it pools is not known."
        )
    model = open_exactly(SentenceTransformer, folder, placement)
    if max_length is not None:
        model.max_seq_length = max_length
    settings = {
        "family": SENTENCE_TRANSFORMERS,
        "prompts": model.prompts,
        "default_prompt": model.default_prompt_name,
        "prompt_format": prompt_format,
        "max_length": max_length,
        "dtype": str(placement.dtype),
    }
    modules = sorted(path for path in folder.iterdir() if path.is_dir())
    return SentenceTransformersEmbedder(
        model,
        name=name,
        fingerprint=fingerprint([folder, *modules], settings),
        batch_size=batch_size,
        prompt_format=prompt_format,
    )


def open_exactly(kind: Callable[..., M], folder: Path, placement: Placement, **options: Any) -> M:
    """A model of sentence-transformers, of the class ``kind``, with all weights of a folder.

    options: of ``kind``, beside those of the placement.

    Raises:
        ModelError: For weights that are not in the files, or not finite, and for a folder that
            cannot be loaded or needs code of its own.
    """
    try:
        with quiet():
            model = kind(
                str(folder),
                device=str(placement.device),
                model_kwargs={"dtype": placement.dtype},
                # The folder is complete; without this, missing files would be looked for on the
                # hub.
                local_files_only=True,
                **options,
            )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError) as error:
        raise ModelError(f"{folder}: sentence-transformers cannot load it ({error}).") from error
    _check_transformers(model, folder)
    return model


def _check_transformers(model: Any, folder: Path) -> None:
    # sentence-transformers fills what is missing at random, with no more than a log line.
    listed = folder / "modules.json"  # a model of a single part need not have it
    described = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else [{}]
    for part, row in zip(model.children(), described, strict=listed.is_file()):
        inner = getattr(part, "auto_model", None)
        if inner is None:
            continue
        # A pooler that no modality reads may be missing, as in models trained without one.
        outputs = [how.get("method_output_name") for how in part.modality_config.values()]
        ignored = () if "pooler_output" in outputs else ("pooler.",)
        check_weights(
            type(inner),
            folder / row.get("path", ""),
            unused=("",),
            missing_unused=ignored,
            config=inner.config,
        )
    check_finite(model, folder)
