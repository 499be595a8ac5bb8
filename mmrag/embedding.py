"""The embedder as LlamaIndex's embed model: texts, images, both, and nodes of any kind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_args

from llama_index.core.base.embeddings.base import Embedding
from llama_index.core.bridge.pydantic import Field, PrivateAttr, SecretStr
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index.core.schema import BaseNode, QueryBundle
from llama_index.core.utils import get_tqdm_iterable
from llama_index_instrumentation import get_dispatcher

from mmrag.content import Content, ImageSource, describe
from mmrag.embedders.base import Embedder
from mmrag.errors import ConfigError
from mmrag.instructions import resolve
from mmrag.nodes import NodeView, node_content, refuse_lost_image
from mmrag.queries import query_content

# Comes with the package: a first try needs no download.
DEFAULT_MODEL = "mmrag-nano"
# The settings that say which embedder to load, and how.
_LOADING = (
    *("family", "device", "dtype", "revision", "layers", "experts"),
    *("base_url", "api_key", "options"),
)

dispatcher = get_dispatcher(__name__)


class EmbeddingSettings(TypedDict, total=False):
    """The fields of ``UniversalEmbedding``, as its constructor takes them."""

    family: str | None
    device: str
    dtype: str
    revision: str | None
    layers: int | None
    dim: int | None
    query_instruction: str | None
    node_view: NodeView
    experts: Mapping[str, str | Path] | str | Path | None
    base_url: str | None
    api_key: str | SecretStr | None
    options: Mapping[str, Any]
    embed_batch_size: int
    num_workers: int | None
    callback_manager: CallbackManager | None


class UniversalEmbedding(MultiModalEmbedding):
    """An embed model for ``Settings``, ``IngestionPipeline`` and ``VectorStoreIndex``.

    The model is loaded when it is first needed; ``embedder`` gives it. Copies share it, and a
    pickle carries its name rather than its weights. It is safe to use from several threads.

    Args:
        model_name: ``mmrag-nano``, a checkpoint folder, a hub name, or with ``base_url`` the
            name that the server knows it by.
        embedder: an Embedder to use in place of loading one; excludes the settings that say
            which to load, and how.
        settings: the fields below, and those of ``BaseEmbedding``: ``embed_batch_size`` is the
            number of contents in one call of the embedder, which cuts its own batches by
            tokens within it.

    Raises:
        ConfigError: For settings that are unknown or contradict each other. What loading raises
            comes with the first use.

    >>> model = UniversalEmbedding("mmrag-nano", device="cpu")
    >>> len(model.get_query_embedding("wind energy"))
    384
    """

    family: str | None = Field(None, description="The recipe to follow; by default the model's.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps, or several.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    layers: int | None = Field(
        None, description="Layers of the decoder to run, for models trained so (2-D Matryoshka)."
    )
    dim: int | None = Field(None, description="Leading dimensions to keep (Matryoshka).")
    query_instruction: str | None = Field(
        "page_for_question",
        description="The task of queries: a name in mmrag.instructions or a sentence. "
        "None embeds them as documents.",
    )
    node_view: NodeView = Field(
        "fused",
        description="How a node with both text and image is embedded: fused, image or text. A "
        "node with one of them is embedded by the one it has.",
    )
    experts: dict[str, str] | str | None = Field(
        None,
        description="Adapters that embed queries, by name, or a folder of them: each query is "
        "embedded by the one whose training queries are nearest, documents by the model itself.",
    )
    base_url: str | None = Field(
        None, description="Of an OpenAI-compatible embeddings server; then no torch is needed."
    )
    api_key: SecretStr | None = Field(
        None, exclude=True, description="For that server; in no dict, event or message."
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of load_embedder, or of RemoteEmbedder."
    )
    embed_batch_size: int = Field(64, gt=0, le=2048, description="Contents in one call.")

    _engine: _Engine = PrivateAttr()

    def __init__(
        self,
        model_name: str | None = None,
        *,
        embedder: Embedder | None = None,
        **settings: Unpack[EmbeddingSettings],
    ) -> None:
        _check_settings(model_name, embedder, settings, set(type(self).model_fields))
        name = embedder.name if embedder is not None else model_name or DEFAULT_MODEL
        fields: dict[str, Any] = {**settings}
        if experts := settings.get("experts"):
            # As text: a path is no JSON value, and to_dict is stored as that.
            fields["experts"] = (
                {label: str(place) for label, place in experts.items()}
                if isinstance(experts, Mapping)
                else str(experts)
            )
        super().__init__(model_name=name, **fields)
        # For its error: a misspelt task should fail here and not at the first query.
        resolve(self.query_instruction)
        if self.experts is not None and self.query_instruction is None:
            raise ConfigError(
                "With experts= queries need a query_instruction, if an empty one: without any they "
                "are embedded as documents, which stay with the base."
            )
        self._engine = _Engine(embedder)

    @classmethod
    def class_name(cls) -> str:
        """The name that LlamaIndex stores."""
        return "UniversalEmbedding"

    @property
    def embedder(self) -> Embedder:
        """The Embedder, loaded on first access. Raises ModelError or EndpointError if it fails."""
        return self._engine.get(self._load)

    def _load(self) -> Embedder:
        if self.base_url is not None:
            from mmrag.embedders.remote import RemoteEmbedder

            unknown = sorted(set(self.options) - set(signature(RemoteEmbedder).parameters))
            if unknown:
                raise ConfigError(f"options {', '.join(unknown)}: unknown to RemoteEmbedder.")
            key = self.api_key.get_secret_value() if self.api_key else None
            return RemoteEmbedder(self.model_name, self.base_url, api_key=key, **self.options)
        # Not at the top: with base_url torch is never imported.
        from mmrag.embedders import load_embedder

        options: dict[str, Any] = {"family": self.family, "device": self.device}
        options |= {"dtype": self.dtype, "layers": self.layers, **self.options}
        if self.experts is not None:
            from mmrag.embedders.routing import load_routed

            return load_routed(self.model_name, self.experts, revision=self.revision, **options)
        return load_embedder(self.model_name, revision=self.revision, **options)

    # --- storing and sending -------------------------------------------------------------------

    def to_payload(self) -> dict[str, Any]:
        """What events say of the model: no address, key or option."""
        own = {"dim": self.dim, "layers": self.layers, "query_instruction": self.query_instruction}
        return {**super().to_payload(), **own}

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Settings, and the fingerprint of the weights: LlamaIndex's cache keys depend on it."""
        # IngestionCache keys nodes by this dict: with other weights, cached vectors would be wrong.
        return {**super().to_dict(**kwargs), "fingerprint": self.embedder.fingerprint}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: Any) -> UniversalEmbedding:
        """From ``to_dict``; pass ``api_key`` or ``embedder`` again where there was one."""
        settings = {**data, **kwargs}
        # What to_dict adds, and what cannot be stored.
        unstored = ("class_name", "fingerprint", "callback_manager")
        return cls(**{key: value for key, value in settings.items() if key not in unstored})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # LlamaIndex's own knows nothing of an embedder that was given.
        engine: _Engine = state["__pydantic_private__"]["_engine"]
        self.__init__(embedder=engine.given, **state["__dict__"])  # type: ignore[misc]

    # --- embedding -----------------------------------------------------------------------------

    @dispatcher.span
    def embed_contents(
        self,
        contents: Sequence[Content],
        instruction: str | None = None,
        show_progress: bool = False,
    ) -> list[Embedding]:
        """Embed contents of any mix, ``embed_batch_size`` a call, with LlamaIndex's events."""
        size, payload = self.embed_batch_size, self.to_payload()
        starts = range(0, len(contents), size)
        vectors: list[Embedding] = []
        for start in get_tqdm_iterable(starts, show_progress, "Generating embeddings"):
            batch = contents[start : start + size]
            with embedding_events(payload, batch, self.callback_manager) as done:
                if self.rate_limiter is not None:
                    self.rate_limiter.acquire()
                rows = self._encode(batch, instruction)
                done(rows)
            vectors.extend(rows)
        return vectors

    def _encode(
        self, contents: Sequence[Content], instruction: str | None = None
    ) -> list[Embedding]:
        vectors = self.embedder.encode(contents, instruction=instruction, dim=self.dim)
        rows: list[Embedding] = vectors.tolist()
        return rows

    def get_query_embedding(self, query: str | QueryBundle) -> Embedding:
        """Embed a question in words, an image, or both; a bundle's ``image`` or ``image_path``."""
        return self.embed_contents([query_content(query)], self.query_instruction)[0]

    async def aget_query_embedding(self, query: str | QueryBundle) -> Embedding:
        """As ``get_query_embedding``, off the event loop."""
        return await asyncio.to_thread(self.get_query_embedding, query)

    def get_query_image_embedding(self, image: ImageSource, text: str | None = None) -> Embedding:
        """Embed an image, and words about it, as a query: with the instruction."""
        return self.embed_contents([Content(text, image)], self.query_instruction)[0]

    async def aget_query_image_embedding(
        self, image: ImageSource, text: str | None = None
    ) -> Embedding:
        """As ``get_query_image_embedding``, off the event loop."""
        return await asyncio.to_thread(self.get_query_image_embedding, image, text)

    def get_fused_embedding(self, text: str, image: ImageSource) -> Embedding:
        """Embed a text and an image as one document."""
        return self.embed_contents([Content(text, image)])[0]

    async def aget_fused_embedding(self, text: str, image: ImageSource) -> Embedding:
        """As ``get_fused_embedding``, off the event loop."""
        return await asyncio.to_thread(self.get_fused_embedding, text, image)

    def get_image_embedding(self, img_file_path: ImageSource) -> Embedding:
        """Embed an image: a path, bytes, BytesIO, PIL image, data URL or array."""
        return self.embed_contents([Content(image=img_file_path)])[0]

    async def aget_image_embedding(self, img_file_path: ImageSource) -> Embedding:
        """As ``get_image_embedding``, off the event loop."""
        return await asyncio.to_thread(self.get_image_embedding, img_file_path)

    def get_image_embedding_batch(
        self, img_file_paths: Sequence[ImageSource], show_progress: bool = False
    ) -> list[Embedding]:
        """Embed images in batches."""
        contents = [Content(image=image) for image in img_file_paths]
        return self.embed_contents(contents, show_progress=show_progress)

    async def aget_image_embedding_batch(
        self, img_file_paths: Sequence[ImageSource], show_progress: bool = False
    ) -> list[Embedding]:
        """As ``get_image_embedding_batch``, off the event loop."""
        return await asyncio.to_thread(
            self.get_image_embedding_batch, img_file_paths, show_progress
        )

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Set ``embedding`` of each node, by its text, its image, or both.

        Texts are embedded with their metadata as LlamaIndex does (``MetadataMode.EMBED``);
        images, with or without text, without it.

        Raises:
            ContentError: For a node whose image cannot be used, or would be lost in storage: that
                of an ImageDocument, of a Document, or of a class that LlamaIndex does not know.
        """
        for node in nodes:
            refuse_lost_image(node)
        contents = [node_content(node, self.node_view) for node in nodes]
        vectors = self.embed_contents(contents, show_progress=bool(kwargs.get("show_progress")))
        for node, vector in zip(nodes, vectors, strict=True):
            node.embedding = vector
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """As ``__call__``, off the event loop."""
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    # --- what the base class asks for ----------------------------------------------------------

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._encode([Content(text)])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return self._encode([Content(text) for text in texts])

    def _get_query_embedding(self, query: str) -> Embedding:
        return self._encode([Content(query)], self.query_instruction)[0]

    def _get_image_embedding(self, img_file_path: ImageSource) -> Embedding:
        return self._encode([Content(image=img_file_path)])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_image_embedding(self, img_file_path: ImageSource) -> Embedding:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)


class _Engine:
    """Holds the embedder: loaded once, shared by copies, left out of pickles unless given."""

    def __init__(self, given: Embedder | None = None) -> None:
        self.given = given
        self._embedder = given
        self._lock = threading.Lock()

    def get(self, load: Callable[[], Embedder]) -> Embedder:
        # LlamaIndex embeds in threads; two of them must not load the model twice.
        with self._lock:
            if self._embedder is None:
                self._embedder = load()
            return self._embedder

    def __deepcopy__(self, memo: dict[int, Any]) -> _Engine:
        # LlamaIndex copies embed models; the weights are too large to have twice.
        return self

    def __reduce__(self) -> tuple[type[_Engine], tuple[Embedder | None]]:
        # A lock cannot be pickled, and weights should not be.
        return _Engine, (self.given,)


@contextmanager
def embedding_events(
    model: Embedder | Mapping[str, Any],
    contents: Sequence[Content],
    callback_manager: CallbackManager | None = None,
) -> Iterator[Callable[[list[Embedding]], None]]:
    """LlamaIndex's events around one call of an embedder; give the vectors to what it yields.

    model: an Embedder, or what events say of the model.
    """
    payload = {"model_name": model.name} if isinstance(model, Embedder) else dict(model)
    # Events are logged and sent to tracing services: names of images, never their bytes.
    chunks = []
    for each in contents:
        names = [f"[{describe(image)}]" for image in each.images]
        names += [f"[clip of {len(each.clip.frames)} frames]"] if each.clip else []
        chunks.append(" ".join([each.text, *names] if each.text is not None else names))
    dispatcher.event(EmbeddingStartEvent(model_dict=payload))
    manager = callback_manager or CallbackManager()
    with manager.event(CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: payload}) as event:

        def done(vectors: list[Embedding]) -> None:
            event.on_end({EventPayload.CHUNKS: chunks, EventPayload.EMBEDDINGS: vectors})
            dispatcher.event(EmbeddingEndEvent(chunks=chunks, embeddings=vectors))

        yield done


def _check_settings(
    model_name: str | None, embedder: Embedder | None, settings: Mapping[str, Any], known: set[str]
) -> None:
    """Raise ConfigError for settings that are unknown or contradict each other."""
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(f"{', '.join(unknown)}: unknown; it takes {', '.join(sorted(known))}.")
    if settings.get("embeddings_cache") is not None:
        raise ConfigError(
            "embeddings_cache is not possible: LlamaIndex keys it by the bare text, so that "
            "queries, documents and other models would get each other's vectors."
        )
    if settings.get("node_view", "fused") not in get_args(NodeView):
        raise ConfigError(f"node_view={settings['node_view']!r}: use fused, image or text.")
    loading = [name for name in _LOADING if settings.get(name) not in (None, "auto", {})]
    if embedder is not None:
        if loading or model_name not in (None, embedder.name):
            raise ConfigError("With embedder= leave out model_name, " + ", ".join(_LOADING) + ".")
    elif settings.get("base_url"):
        # A setting that has no effect there would be a promise that is not kept.
        if model_name is None or not {"base_url", "api_key", "options"}.issuperset(loading):
            raise ConfigError(
                "With base_url the model runs on a server: give model_name as the server calls "
                "it, and leave out family, device, dtype, revision, layers and experts."
            )
    elif settings.get("api_key"):
        raise ConfigError("api_key is for a server: give its base_url.")
