"""OpenAI's chat completions over a collection: what was asked, and the answer in its form."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from mmrag.content import ImageLimits
from mmrag.errors import ConfigError, ContentError
from mmrag.llms.failures import translated_errors
from mmrag.prompting import estimate_tokens
from mmrag.queries import MultimodalQuery
from mmrag.server.answers import answer_events
from mmrag.server.library import Library
from mmrag.server.markdown import Linker, closing, url_citations, without_links
from mmrag.server.schemas import LONGEST_QUERY, decode_image
from mmrag.server.sse import Event

if TYPE_CHECKING:
    from llama_index.core.llms import LLM

# Prompts that chat clients write, for the model of the chat. Open WebUI's are for titles, tags and
# follow-ups, and put attached documents before a question; LibreChat's are for titles.
_TASKS = ("### Task:\n", "Provide a concise, 5-word-or-less title for the conversation")
# Without a model the client makes do with an empty reply: the question stays the title.
_OPTIONAL = ("<chat_history>", _TASKS[1])


class Message(BaseModel):
    """One message; content is a text, or a list of parts of type text and image_url."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None


class StreamOptions(BaseModel):
    """include_usage: end the stream with the number of tokens."""

    include_usage: bool = False


class ChatRequest(BaseModel):
    """A chat completion. model: the name of a collection. Other parameters are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=400)
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, le=1)


@dataclass(frozen=True)
class Asked:
    """The last message of a request, with the conversation before it.

    is_task: whether it is a prompt of the client's own, which the model answers unsearched.
    """

    query: MultimodalQuery
    history: tuple[tuple[str, str], ...]
    is_task: bool


def read_chat(request: ChatRequest, limits: ImageLimits) -> Asked:
    """What a request asks. System messages are left out: the answer's prompt is fixed.

    Raises:
        ConfigError: If the last message is not the user's.
        ContentError: For unusable parts.
    """
    spoken = [message for message in request.messages if message.role in ("user", "assistant")]
    if not spoken or spoken[-1].role != "user":
        raise ConfigError("The last message must be the user's.")
    text, image = _read_content(spoken[-1], limits)
    if not text.strip() and image is None:
        raise ConfigError("The last message is empty: give a text, an image, or both.")
    is_task = text.startswith(_TASKS)
    if len(text) > LONGEST_QUERY and not is_task:
        raise ConfigError(f"The question is longer than {LONGEST_QUERY} characters.")
    history = tuple(
        # Links and lists of sources that we added would mislead the rewriting of the question.
        (message.role, without_links(_read_content(message, limits)[0]))
        for message in spoken[:-1]
    )
    return Asked(MultimodalQuery(text, image=image), history, is_task)


def parts_of(message: Message) -> list[dict[str, Any]]:
    """The parts of a message; a plain text is one."""
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    return message.content or []


def _read_content(message: Message, limits: ImageLimits) -> tuple[str, bytes | None]:
    texts: list[str] = []
    images: list[str] = []
    for part in parts_of(message):
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image_url" and isinstance(part.get("image_url"), dict):
            images.append(str(part["image_url"].get("url", "")))
        else:
            raise ContentError("A part of a message must be of type text or image_url.")
    if len(images) > 1:
        raise ContentError("A question can have at most one image.")
    return "\n".join(texts), decode_image(images[0], limits) if images else None


class ChatChunks:
    """One chat completion, piece by piece. Iterate once, then ``completion`` has the whole.

    content: the Markdown so far.
    """

    def __init__(self, library: Library, request: ChatRequest, asked: Asked, base: str) -> None:
        self._library = library
        self._request = request
        self._asked = asked
        self._base = base
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": request.model,
        }
        self.content = ""
        self._annotations: list[dict[str, Any]] = []
        self._answer: Mapping[str, Any] = {}

    def __iter__(self) -> Generator[Event, None, None]:
        texts = self._task() if self._asked.is_task else self._linked()
        first = next(texts, "")  # what fails before the first word is an HTTP error
        # As OpenAI's first chunk, which has the role and no text.
        yield self._chunk({"role": "assistant", "content": ""})
        for text in chain([first], texts):
            self.content += text
            yield self._chunk({"content": text})
        # After the text, since a link's place is known only when all before it is written.
        if self._annotations:
            yield self._chunk({"annotations": self._annotations})
        # OpenAI's clients ignore fields that they do not know; others find the checked answer here.
        yield self._chunk({}, "stop", mmrag=self._answer)
        if self._request.stream_options and self._request.stream_options.include_usage:
            yield self._chunk({}, choices=[], usage=self._usage())

    def completion(self) -> dict[str, Any]:
        """The whole answer."""
        message = {
            "role": "assistant",
            "content": self.content,
            "refusal": None,
            "annotations": self._annotations,
        }
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        body = {"object": "chat.completion", "choices": [choice], "usage": self._usage()}
        return {**self._head, **body, "mmrag": self._answer}

    def _linked(self) -> Iterator[str]:
        """The text of an answer with links to its pages."""
        linker = Linker({})
        asked = self._asked
        for event in answer_events(self._library, asked.query, asked.history, self._base):
            if event.name == "sources":
                links = {row["n"]: row["view"] for row in event.data["sources"] if row["view"]}
                linker = Linker(links)
            elif event.name == "token":
                if text := linker.add(event.data["text"]):
                    yield text
            else:
                self._answer = event.data
                if text := linker.end() + closing(event.data):
                    yield text
        self._annotations = url_citations(linker.citations, self._answer["sources"])

    def _task(self) -> Iterator[str]:
        llm, prompt = self._library.answering.llm, self._asked.query.query_str
        if llm is not None:
            yield answer_task(llm, prompt)
        elif not any(sign in prompt for sign in _OPTIONAL):
            raise ConfigError(
                "Documents attached to a chat are for a language model, and this server has none. "
                "Ask without them, or start it with: mmrag serve --llm MODEL"
            )

    def _chunk(self, delta: Mapping[str, Any], reason: str | None = None, **fields: Any) -> Event:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return Event(
            {**self._head, "object": "chat.completion.chunk", "choices": [choice], **fields}
        )

    def _usage(self) -> dict[str, int]:
        """Tokens of question and answer, estimated; the pages that a model was shown not."""
        asked = [self._asked.query.query_str, *(text for _, text in self._asked.history)]
        prompt, reply = sum(map(estimate_tokens, asked)), estimate_tokens(self.content)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": reply,
            "total_tokens": prompt + reply,
        }


def answer_task(llm: LLM, prompt: str) -> str:
    """What the model says to a prompt, without any page. Raises EndpointError if it fails."""
    from llama_index.core.base.llms.types import ChatMessage

    with translated_errors(llm.metadata.model_name):
        return llm.chat([ChatMessage(role="user", content=prompt)]).message.content or ""


def model_rows(names: Sequence[str], created: int) -> list[dict[str, Any]]:
    """Models as ``/v1/models`` lists them."""
    return [
        {"id": name, "object": "model", "created": created, "owned_by": "mmrag"} for name in names
    ]
