"""Late interaction: models that give one vector for each token, and how a page is kept of them.

ColPali (arXiv 2407.01449), ColQwen2, ColModernVBERT, ColBERT and whatever else the
``MultiVectorEncoder`` of sentence-transformers loads. A query and a document are compared by
MaxSim: for each token of the query the best cosine with any token of the document, summed up.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mmrag.content import Content, Modality, load_image
from mmrag.embedders.muvera import Muvera
from mmrag.errors import ConfigError, ContentError, ModelError, naming

Tokens: TypeAlias = NDArray[np.float32]
"""One vector for each token, (n_tokens, dim), each of L2 norm 1."""

# A third of the storage for about 2 % of nDCG (arXiv 2407.01449, section 5.3).
POOL_FACTOR = 3.0


@runtime_checkable
class TokenEmbedder(Protocol):
    """Turns a query or a document into one vector for each of its tokens.

    name: what it was loaded from. dim: length of each vector.
    modalities: of the documents it embeds; queries are texts.
    fingerprint: changes when the weights or any setting that moves vectors change.

    >>> class FirstLetters:
    ...     name, fingerprint, dim, modalities = "letters", "1", 26, frozenset({"text"})
    ...     def encode_query(self, text):
    ...         places = [ord(word[0]) - ord("a") for word in text.lower().split()]
    ...         return np.eye(26, dtype=np.float32)[places]
    ...     def encode_documents(self, contents, pool_factor=1.0):
    ...         return [self.encode_query(content.text) for content in contents]
    >>> isinstance(FirstLetters(), TokenEmbedder)
    True
    """

    name: str
    dim: int
    modalities: frozenset[Modality]
    fingerprint: str

    def encode_documents(
        self, contents: Sequence[Content], pool_factor: float = 1.0
    ) -> list[Tokens]:
        """Tokens of each document, about one in ``pool_factor`` of them.

        Raises:
            ContentError: For an item that cannot be used (its index is in the message).
        """
        ...

    def encode_query(self, text: str) -> Tokens:
        """Tokens of a query, all of them."""
        ...


@dataclass(frozen=True, slots=True)
class LateInteraction:
    """How the pages of a collection are kept for late interaction.

    embedder: gives the vectors of tokens.
    pool_factor: tokens that become one on average, by hierarchical pooling: Ward's clusters of a
        page's tokens, each replaced by its mean (Clavie, Chaffin and Adams, arXiv 2409.14683).
        ColPali keeps 97.8 % of its nDCG with a factor of 3 (arXiv 2407.01449, section 5.3); 1
        keeps every token.
    muvera: also keep one vector of each page, for the first stage; None for none.

    Raises:
        ConfigError: For a factor below 1, and for an embedder with one vector for a page.

    >>> embedder = load_token_embedder("vidore/colqwen2-v1.0-hf")  # doctest: +SKIP
    >>> late = LateInteraction(embedder, pool_factor=2, muvera=Muvera())  # doctest: +SKIP
    >>> index = UniversalIndex("library", late=late)  # doctest: +SKIP
    """

    embedder: TokenEmbedder
    pool_factor: float = POOL_FACTOR
    muvera: Muvera | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.embedder, TokenEmbedder):
            raise ConfigError(
                f"{getattr(self.embedder, 'name', self.embedder)!r} gives one vector for a page. "
                "Late interaction needs a model with a vector for each token: "
                "load_token_embedder(...)."
            )
        if self.pool_factor < 1:
            raise ConfigError(f"pool_factor={self.pool_factor}: give at least 1.")


class MultiVectorEmbedder:
    """A TokenEmbedder over a ``MultiVectorEncoder``. Safe to call from several threads.

    A model of transformers' own (ColPali, ColQwen2, ColModernVBERT) embeds images as documents,
    for its processor writes every text as a query; others embed what they say they can.

    >>> from sentence_transformers import MultiVectorEncoder  # doctest: +SKIP
    >>> model = MultiVectorEncoder("vidore/colqwen2-v1.0-hf")  # doctest: +SKIP
    >>> embedder = MultiVectorEmbedder(model, name="colqwen2", fingerprint="1")  # doctest: +SKIP
    >>> embedder.encode_query("wind energy").shape  # doctest: +SKIP
    (17, 128)
    """

    def __init__(self, model: Any, *, name: str, fingerprint: str, batch_size: int = 4) -> None:
        self.model = model
        self.name = name
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        # Its name for models of transformers' own, whose processor has one template for images and
        # one for queries, but none for texts as documents.
        native = getattr(model[0], "transformer_task", None) == "retrieval"
        kinds: tuple[Modality, ...] = ("image",) if native else ("image", "text")
        self.modalities = frozenset(kind for kind in kinds if model.supports(kind))
        # The model's tokenizer and processor keep state between calls.
        self._lock = threading.Lock()
        # Asked of the model: configurations name this length in different ways, or not at all.
        self.dim = int(self.encode_query("How long are the vectors?").shape[1])

    def encode_documents(
        self, contents: Sequence[Content], pool_factor: float = 1.0
    ) -> list[Tokens]:
        """Tokens of each document; see ``TokenEmbedder.encode_documents``."""
        # A batch holds one kind: pooling differs, and so do the processor's inputs.
        groups: dict[Modality, list[int]] = {}
        inputs = []
        for index, content in enumerate(contents):
            with naming(f"item {index}"):
                inputs.append(self._input(content))
            groups.setdefault(content.modality, []).append(index)
        tokens: dict[int, Tokens] = {}
        for kind, places in groups.items():
            # The first token of a text sums it up; those of an image are patches.
            pooling = _pooling(pool_factor, protected=int(kind == "text"))
            with self._lock:
                found = self.model.encode_document(
                    [inputs[place] for place in places],
                    batch_size=self.batch_size,
                    show_progress_bar=False,
                    token_pooling=pooling,
                    normalize_embeddings=True,
                )
            tokens |= zip(places, (self._checked(each) for each in found), strict=True)
        return [tokens[index] for index in range(len(contents))]

    def encode_query(self, text: str) -> Tokens:
        """Tokens of a query; see ``TokenEmbedder.encode_query``."""
        with self._lock:
            found = self.model.encode_query(
                [text], show_progress_bar=False, normalize_embeddings=True
            )
        return self._checked(found[0])

    def _input(self, content: Content) -> Any:
        if content.modality not in self.modalities:
            able = " or ".join(sorted(self.modalities))
            raise ContentError(f"{self.name} embeds documents of {able}, not {content.modality}.")
        # One image: no modality of these models has two.
        return load_image(content.images[0]) if content.images else content.text

    def _checked(self, found: Any) -> Tokens:
        tokens: Tokens = found.float().cpu().numpy()
        if not len(tokens) or not np.isfinite(tokens).all():
            raise ModelError(
                f"{self.name}: no token, or a vector that is not finite; load the model with "
                "dtype='float32'."
            )
        return tokens


def load_token_embedder(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    download: bool = True,
    batch_size: int = 4,
) -> TokenEmbedder:
    """Load a model that gives one vector for each token.

    Args:
        name: a checkpoint folder or a name on the hub, such as ``vidore/colqwen2-v1.0-hf``.
        device: as in ``load_embedder``.
        dtype: as in ``load_embedder``.
        revision: branch, tag or commit on the hub.
        download: False takes from the hub only what was downloaded before.
        batch_size: items in a batch.

    Raises:
        ModelError: If it cannot be found, does not load exactly, needs code of its own, or gives
            one vector for a whole text or image.
        ConfigError: If sentence-transformers is not installed.

    >>> embedder = load_token_embedder("vidore/colqwen2-v1.0-hf")  # doctest: +SKIP
    """
    from mmrag.modeling.checkpoints import find_checkpoint
    from mmrag.modeling.loading import place

    try:
        from sentence_transformers import MultiVectorEncoder
    except ImportError as error:
        raise ConfigError(
            "Late interaction needs sentence-transformers: pip install 'mmrag[st]'."
        ) from error
    from mmrag.embedders.sentence_transformers import open_exactly
    from mmrag.modeling.checkpoints import fingerprint

    folder = find_checkpoint(name, revision, download=download)
    _check_kind(str(name), folder)
    placement = place(device, dtype)
    model = open_exactly(MultiVectorEncoder, folder, placement)
    # The modules behind the transformer, such as ``1_Dense``, move vectors as its weights do.
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    settings = {"prompts": model.prompts, "dtype": str(placement.dtype), "tokens": True}
    return MultiVectorEmbedder(
        model,
        name=str(name),
        fingerprint=fingerprint([folder, *parts], settings),
        batch_size=batch_size,
    )


def _check_kind(name: str, folder: Path) -> None:
    """Refuse a checkpoint to which sentence-transformers would add a head of random weights."""
    from mmrag.modeling.checkpoints import gives_tokens, is_adapter, read_json

    if gives_tokens(folder):
        return
    if "auto_map" in read_json(folder / "config.json"):
        raise ModelError(
            f"{name} needs code of its own, and code that comes with a checkpoint is never run. "
            "Use a checkpoint of the same model that was saved as a MultiVectorEncoder."
        )
    if is_adapter(folder):
        raise ModelError(
            f"{name}: an adapter of colpali-engine. Use the merged checkpoint of the same model, "
            "whose name ends in -hf, or one that was saved as a MultiVectorEncoder."
        )
    raise ModelError(
        f"{name} gives one vector for a whole text or image. Late interaction needs one for each "
        "token: ColPali, ColQwen2 or another model that was saved as a MultiVectorEncoder."
    )


def _pooling(factor: float, protected: int) -> Any:
    # No module at all: pooling with a factor of 1 would cluster for nothing.
    if factor == 1:
        return None
    from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

    return HierarchicalTokenPooling(factor, num_protected_tokens=protected)


def max_sim(query: Tokens, document: Tokens) -> float:
    """Sum over the query's tokens of the best cosine with any token of the document.

    >>> unit = np.eye(2, dtype=np.float32)
    >>> max_sim(unit, unit[:1])
    1.0
    """
    return float((query @ document.T).max(axis=1).sum())
