"""Stand-ins for slow or remote parts, for tests."""

import hashlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from llama_index.core.base.llms.types import ChatMessage, ChatResponse, LLMMetadata, MessageRole
from llama_index.core.bridge.pydantic import Field
from llama_index.core.llms import CompletionResponse, CustomLLM
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.schema import (
    MediaResource,
    Node,
    NodeRelationship,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
)
from PIL import Image

from mmrag.content import Content, as_content, load_image
from mmrag.embedders.base import check_dim, truncate_normalise
from mmrag.errors import ContentError
from mmrag.reading.nodes import node_id


class FakeEmbedder:
    """A deterministic Embedder: texts by their words, images by their pixels.

    Texts that share words are near each other. The vector of an item depends on that item only.
    ``encoded`` counts the items; ``calls`` holds the contents of each call. A text that contains
    ``poison`` raises ContentError.
    """

    family = "fake"

    def __init__(
        self,
        name="fake",
        dim=32,
        modalities=("text", "image", "fused"),
        version="1",
        poison="POISON",
    ):
        self.name = name
        self.dim = dim
        self.modalities = frozenset(modalities)
        self.fingerprint = f"{name}-{dim}-{version}"
        self.poison = poison
        self.calls = []

    @property
    def encoded(self):
        return sum(len(call) for call in self.calls)

    def encode(self, contents, instruction=None, dim=None, progress=False):
        contents = [as_content(content) for content in contents]
        for index, content in enumerate(contents):
            if content.text is not None and self.poison in content.text:
                raise ContentError(f"item {index}: the text is poisoned")
            if content.modality not in self.modalities:
                raise ContentError(f"item {index}: {content.modality} is not possible")
        self.calls.append(contents)
        kept = check_dim(dim, self.dim)
        rows = [self._vector(content, instruction) for content in contents]
        return truncate_normalise(np.array(rows).reshape(-1, self.dim), kept)

    def _vector(self, content: Content, instruction):
        vector = np.full(self.dim, 1e-3)
        if content.text is not None:
            for word in content.text.lower().split():
                vector += _noise(word.encode(), self.dim)
        for image in content.images:
            vector += _noise(load_image(image).tobytes(), self.dim)
        for frame in content.clip.frames if content.clip else ():
            vector += _noise(load_image(frame).tobytes(), self.dim)
        return vector


def _noise(data: bytes, dim: int):
    seed = int.from_bytes(hashlib.sha256(data).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(dim)


def make_node(
    text="",
    *,
    file="a.pdf",
    page=1,
    kind="page",
    index=0,
    image: Path | None = None,
    sha256="0" * 64,
    **metadata,
):
    """A node as reading makes them."""
    known = {"file": file, "sha256": sha256, "page": page, "kind": kind, **metadata}
    fields = {
        "id_": node_id(sha256, page, kind, index),
        "metadata": {key: value for key, value in known.items() if value is not None},
        "relationships": {
            NodeRelationship.SOURCE: RelatedNodeInfo(
                node_id=node_id(sha256, None, "file", 0), node_type=ObjectType.DOCUMENT
            )
        },
    }
    if image is None:
        return TextNode(text=text, **fields)
    return Node(
        text_resource=MediaResource(text=text),
        image_resource=MediaResource(path=image, mimetype="image/png"),
        **fields,
    )


def make_image(path: Path, colour="red", size=(8, 8)) -> Path:
    """A small PNG of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


class Scripted(CustomLLM):
    """A language model that gives its replies one after the other, the last one again and again.

    ``asked`` holds what it was asked, in words.
    """

    replies: list[str]
    asked: list[str] = Field(default_factory=list)
    model_name: str = "scripted"

    def __init__(self, replies, **fields):
        super().__init__(replies=list(replies), **fields)

    @property
    def metadata(self):
        return LLMMetadata(context_window=32_000, is_chat_model=True, model_name=self.model_name)

    def _next(self, asked):
        self.asked.append(asked)
        return self.replies[min(len(self.asked), len(self.replies)) - 1]

    @llm_chat_callback()
    def chat(self, messages, **_):
        reply = self._next("\n".join(message.content or "" for message in messages))
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=reply))

    @llm_chat_callback()
    def stream_chat(self, messages, **_):
        reply = self._next("\n".join(message.content or "" for message in messages))
        said = ""
        for word in reply.split(" "):
            delta = f" {word}" if said else word
            said += delta
            message = ChatMessage(role=MessageRole.ASSISTANT, content=said)
            yield ChatResponse(message=message, delta=delta)

    @llm_completion_callback()
    def complete(self, prompt, formatted=False, **_):
        return CompletionResponse(text=self._next(prompt))

    @llm_completion_callback()
    def stream_complete(self, prompt, formatted=False, **_):
        reply = self._next(prompt)
        yield CompletionResponse(text=reply, delta=reply)


def spy_on_planless(monkeypatch, module) -> list[str]:
    """The device of each batch for which a module keeps cuDNN's plans out, as they come."""
    entered = []

    def planless(device):
        entered.append(device.type)
        return nullcontext()

    monkeypatch.setattr(module, "planless", planless)
    return entered
