"""An mmrag embedder as LangChain's ``Embeddings``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.runnables.config import run_in_executor
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, SecretStr

from mmrag.content import Content, ImageSource
from mmrag.embedders.base import Embedder
from mmrag.embedding import UniversalEmbedding
from mmrag.errors import ConfigError


class MMRAGEmbeddings(BaseModel, Embeddings):
    """Texts, images, and texts with images, embedded in one vector space.

    The model is loaded when it is first needed. Every vector has L2 norm 1. It is safe to use from
    several threads.

    Raises:
        ConfigError: For settings that contradict each other. What loading raises (ModelError,
            EndpointError) comes with the first use.

    Examples:
        >>> embeddings = MMRAGEmbeddings(model="mmrag-nano", device="cpu")
        >>> len(embeddings.embed_query("Which plan covers eye exams?"))
        384
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str | None = Field(
        None, description="mmrag-nano (default), a checkpoint folder, or a name on a hub or server."
    )
    embedder: Embedder | None = Field(
        None, exclude=True, description="An embedder that is loaded already, in place of a model."
    )
    query_instruction: str | None = Field(
        "page_for_question",
        description="The task of queries: a name in mmrag.instructions or a sentence. None embeds "
        "them as documents.",
    )
    dim: int | None = Field(None, description="Leading dimensions to keep (Matryoshka).")
    family: str | None = Field(None, description="The recipe to follow; by default the model's.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")
    dtype: str = Field("auto", description="auto, float32, bfloat16 or float16.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    base_url: str | None = Field(
        None, description="Of an OpenAI-compatible embeddings server that runs the model."
    )
    api_key: SecretStr | None = Field(None, exclude=True, description="For that server.")
    options: Mapping[str, Any] = Field(
        default_factory=dict, description="Arguments of mmrag.load_embedder, or RemoteEmbedder."
    )

    _model: UniversalEmbedding = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Check the settings together; nothing is loaded."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        name, embedder = settings.pop("model"), settings.pop("embedder")
        self._model = UniversalEmbedding(name, embedder=embedder, **settings)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed passages."""
        return self._model.embed_contents([Content(text) for text in texts])

    def embed_query(self, text: str) -> list[float]:
        """Embed a question, with ``query_instruction``."""
        return self._model.get_query_embedding(text)

    def embed_image(
        self, uris: Sequence[ImageSource], texts: Sequence[str | None] | None = None
    ) -> list[list[float]]:
        """Embed images, as documents; LangChain's stores that take images call this.

        Args:
            uris: paths, data URLs, bytes, PIL images or arrays.
            texts: what goes with each image, embedded with it in one vector; None for no text.

        Raises:
            ConfigError: If there are not as many texts as images.
            ContentError: For an image that cannot be used.
        """
        texts = [None] * len(uris) if texts is None else texts
        if len(texts) != len(uris):
            raise ConfigError(f"{len(uris)} images and {len(texts)} texts: give one text an image.")
        pairs = zip(texts, uris, strict=True)
        return self._model.embed_contents([Content(text, image) for text, image in pairs])

    async def aembed_image(
        self, uris: Sequence[ImageSource], texts: Sequence[str | None] | None = None
    ) -> list[list[float]]:
        """As ``embed_image``, off the event loop."""
        return await run_in_executor(None, self.embed_image, uris, texts)

    def embed_query_image(self, image: ImageSource, text: str | None = None) -> list[float]:
        """Embed an image, and words about it, as a question: with ``query_instruction``.

        Raises:
            ContentError: For an image that cannot be used.
        """
        return self._model.get_query_image_embedding(image, text)

    async def aembed_query_image(self, image: ImageSource, text: str | None = None) -> list[float]:
        """As ``embed_query_image``, off the event loop."""
        return await run_in_executor(None, self.embed_query_image, image, text)
