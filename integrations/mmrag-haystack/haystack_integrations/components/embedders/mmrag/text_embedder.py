"""Questions of words as vectors."""

from __future__ import annotations

import asyncio
from typing import Any

from haystack import component, default_from_dict, default_to_dict
from haystack.utils import Secret

from mmrag.embedding import UniversalEmbedding


@component
class MMRAGTextEmbedder:
    """Embeds a question, for the vectors of ``MMRAGDocumentEmbedder`` with the same model.

    Args:
        model: ``mmrag-nano``, a checkpoint folder, a hub name, or the name that a server knows.
        instruction: the task: a name in ``mmrag.instructions`` or a sentence. None embeds the text
            as a document.
        dim: leading dimensions to keep (Matryoshka); by default all.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; with ``base_url`` leave it out.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        base_url: of an OpenAI-compatible embeddings server that runs the model.
        api_key: of that server, for instance ``Secret.from_env_var("EMBEDDINGS_KEY")``.
        options: arguments of ``mmrag.load_embedder``, or of ``mmrag.RemoteEmbedder``.

    Raises:
        ConfigError: For settings that contradict each other. What loading raises (ModelError,
            EndpointError) comes with ``warm_up``.

    Examples:
        >>> embedder = MMRAGTextEmbedder("mmrag-nano", device="cpu")
        >>> len(embedder.run("Which plan covers eye exams?")["embedding"])
        384
    """

    def __init__(
        self,
        model: str = "mmrag-nano",
        *,
        instruction: str | None = "page_for_question",
        dim: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        base_url: str | None = None,
        api_key: Secret | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.instruction = instruction
        self.dim = dim
        self.device = device
        self.dtype = dtype
        self.base_url = base_url
        self.api_key = api_key
        self.options = options or {}
        self._embedding = UniversalEmbedding(
            model,
            query_instruction=instruction,
            dim=dim,
            device=device,
            dtype=dtype,
            base_url=base_url,
            api_key=api_key.resolve_value() if api_key else None,
            options=self.options,
        )

    def to_dict(self) -> dict[str, Any]:
        """The component as Haystack stores it; of a key only where it is read from."""
        return default_to_dict(
            self,
            model=self.model,
            instruction=self.instruction,
            dim=self.dim,
            device=self.device,
            dtype=self.dtype,
            base_url=self.base_url,
            api_key=self.api_key,
            options=self.options,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MMRAGTextEmbedder:
        """The component that ``to_dict`` has stored."""
        loaded: MMRAGTextEmbedder = default_from_dict(cls, data)
        return loaded

    def warm_up(self) -> None:
        """Load the model, once; ``run`` does it as well."""
        _ = self._embedding.embedder

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a question.

        Returns:
            ``embedding``: of L2 norm 1.

        Raises:
            TypeError: For anything but a text.
        """
        if not isinstance(text, str):
            raise TypeError("MMRAGTextEmbedder takes a str; MMRAGDocumentEmbedder takes Documents.")
        return {"embedding": self._embedding.get_query_embedding(text)}

    @component.output_types(embedding=list[float])
    async def run_async(self, text: str) -> dict[str, Any]:
        """As ``run``, off the event loop."""
        return await asyncio.to_thread(self.run, text)
