"""Who writes the queries: a language model behind a server, a local one, or nobody.

A writer turns a document into a draft query, and a query into one that is asked with an image.
``ExtractiveWriter`` has no model: its queries are headings, captions and sentences of the
documents themselves, which teach less than questions do.
"""

from __future__ import annotations

import base64
import hashlib
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any, Protocol

import openai
from llama_index.core.base.llms.types import ChatMessage, ImageBlock, TextBlock

from mmrag.content import load_image
from mmrag.errors import ConfigError, EndpointError
from mmrag.lexical import Idf, sentences, terms
from mmrag.llms.failures import translated_errors
from mmrag.llms.replies import json_objects
from mmrag.prompting import estimate_tokens, image_bytes
from mmrag_recipes.config import PROMPTS, WriterConfig
from mmrag_recipes.corpus import Document
from mmrag_recipes.rows import ImageStore, Modality

_CAPTION_NUMBER = re.compile(r"^\s*(figure|fig\.|table|chart|photo|image)\s*[\w.-]*[:.\s]\s*", re.I)
_LANGUAGE = "\nWrite the query in {}.\n"
_MALFORMED = "\nAnswer with the JSON object alone: no other words, no code fence.\n"
_ATTEMPTS = 2
_CHECK_SECONDS = 10.0
_BROKEN_WORD = re.compile(r"[^\W\d_]- [^\W\d_]")  # hyphenated at the end of a line
_AGAIN = "\nThis is query number {} about the document: ask about another part of it.\n"
_MOST_TEXT = 6000  # characters of a document that a prompt carries
_MOST_PIXELS = 1280 * 1280
_MOST_IMAGE_BYTES = 1_000_000


@dataclass(frozen=True)
class Draft:
    """A query about a document. sentence: taken out of the document, if it is the query."""

    query: str
    answer: str = ""
    sentence: str | None = None


@dataclass(frozen=True)
class Entity:
    """What an image could show instead of naming it. query: rewritten, as in "this plant"."""

    name: str
    query: str
    caption: str


class Writer(Protocol):
    """Writes queries.

    note: what a report must say of them. identity: changes when its queries would.
    """

    note: str
    identity: str

    def draft(self, document: Document, modality: Modality, turn: int = 0) -> Draft | None:
        """Write a query that the document, handed out so, answers; None if it cannot.

        turn: how many queries the document has got already; each asks for something else.
        """
        ...

    def entity(self, query: str) -> Entity | None:
        """Find what an image could stand for in a query; None if nothing."""
        ...

    def usage(self) -> dict[str, float]:
        """Requests, tokens and seconds so far."""
        ...


class Model(Protocol):
    """A language model that answers a prompt with images."""

    name: str

    def ask(self, prompt: str, images: Sequence[Path]) -> tuple[str, int, int]:
        """Answer, prompt tokens, completion tokens. Raises EndpointError."""
        ...


class EndpointModel:
    """A model behind an OpenAI-compatible server; failed requests are tried again.

    JSON is asked for until a server refuses that.
    """

    def __init__(
        self,
        name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 120.0,
        retries: int = 4,
        max_tokens: int = 400,
        max_tokens_key: str = "max_tokens",
        temperature: float | None = None,
    ) -> None:
        self.name = name
        self.options: dict[str, Any] = {max_tokens_key: max_tokens}
        if temperature is not None:
            self.options["temperature"] = temperature
        self.json_mode: dict[str, Any] = {"response_format": {"type": "json_object"}}
        try:
            self.client = openai.OpenAI(
                base_url=base_url, api_key=api_key, timeout=timeout, max_retries=retries
            )
        except openai.OpenAIError as error:
            raise ConfigError(f"{name}: {error}") from error

    def check(self) -> None:
        """Raise EndpointError within seconds if there is no server."""
        try:
            self.client.with_options(timeout=_CHECK_SECONDS, max_retries=0).models.list()
        except openai.APIConnectionError as error:
            raise EndpointError(
                f"{self.client.base_url} cannot be reached ({error.__cause__ or error}). Check "
                "--base-url and that the server is running."
            ) from error
        except openai.OpenAIError:
            return  # it answers, if not to this question

    def ask(self, prompt: str, images: Sequence[Path]) -> tuple[str, int, int]:
        """See ``Model.ask``."""
        parts: list[Any] = [{"type": "text", "text": prompt}]
        parts += [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in images]
        messages: list[Any] = [{"role": "user", "content": parts if images else prompt}]
        with translated_errors(self.name):
            try:
                reply = self._create(messages, **self.json_mode)
            except openai.BadRequestError:
                if not self.json_mode:
                    raise
                reply = self._create(messages)
                # Without JSON mode it works: the server does not have it.
                self.json_mode = {}
        if not reply.choices:
            raise EndpointError(f"{self.name}: the server sent no answer.")
        used = reply.usage
        counts = (used.prompt_tokens, used.completion_tokens) if used else (0, 0)
        return reply.choices[0].message.content or "", *counts

    def _create(self, messages: list[Any], **more: Any) -> Any:
        return self.client.chat.completions.create(
            model=self.name, messages=messages, **self.options, **more
        )


class LocalModel:
    """A chat model of this machine, one request at a time; tokens are estimated."""

    def __init__(self, name: str, *, device: str = "auto", max_tokens: int = 400) -> None:
        from mmrag.llms.local import LocalLLM

        self.name = name
        self.llm = LocalLLM(name, device=device, max_tokens=max_tokens)

    def ask(self, prompt: str, images: Sequence[Path]) -> tuple[str, int, int]:
        """See ``Model.ask``. Raises ContentError for a prompt that does not fit."""
        blocks: list[Any] = [ImageBlock(path=path) for path in images]
        message = ChatMessage(role="user", blocks=[*blocks, TextBlock(text=prompt)])
        answer = self.llm.chat([message]).message.content or ""
        return answer, estimate_tokens(prompt), estimate_tokens(answer)


def open_model(options: WriterConfig) -> Model | None:
    """The model of ``llm`` or ``local_llm``; None without either.

    Raises:
        EndpointError: Within seconds, if there is no server.
    """
    if options.local_llm:
        return LocalModel(options.local_llm, max_tokens=options.max_tokens)
    if not options.llm:
        return None
    model = EndpointModel(
        options.llm,
        options.base_url or os.environ.get("OPENAI_BASE_URL"),
        # The SDK insists on a key; local servers take any.
        os.environ.get("OPENAI_API_KEY", "none"),
        max_tokens=options.max_tokens,
        max_tokens_key=options.max_tokens_key,
        temperature=options.temperature,
    )
    # Before files are read, which may take minutes.
    model.check()
    return model


class JsonAsker:
    """Asks a model for JSON objects, and counts what that costs. usage: over all requests."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.usage = dict.fromkeys(
            ("requests", "prompt_tokens", "completion_tokens", "seconds"), 0.0
        )
        self._lock = threading.Lock()

    def ask(self, prompt: str, images: Sequence[Path], key: str) -> Mapping[str, Any]:
        """The object in the model's answer; without ``key`` in it, the model is asked again."""
        reply: Mapping[str, Any] = {}
        for attempt in range(_ATTEMPTS):
            started = time.perf_counter()
            answer, asked, given = self.model.ask(prompt + (_MALFORMED if attempt else ""), images)
            with self._lock:
                self.usage["requests"] += 1
                self.usage["prompt_tokens"] += asked
                self.usage["completion_tokens"] += given
                self.usage["seconds"] += time.perf_counter() - started
            reply = next(json_objects(answer), {})
            if key in reply:
                break
        return reply


class ModelWriter:
    """Writes queries with a language model; the prompts are files that a user may edit."""

    def __init__(
        self,
        model: Model,
        store: ImageStore,
        prompts: Path = PROMPTS,
        languages: Sequence[str] = (),
    ) -> None:
        self.store = store
        self.languages = languages
        self.note = f"queries written by {model.name}"
        self._prompts = {
            name: _read_prompt(prompts / f"{name}.txt")
            for name in ("text", "image", "fused", "entity")
        }
        wording = "\n".join([*(p.template for p in self._prompts.values()), *languages])
        self.identity = f"{model.name}/{hashlib.sha256(wording.encode()).hexdigest()[:16]}"
        self._asker = JsonAsker(model)

    def draft(self, document: Document, modality: Modality, turn: int = 0) -> Draft | None:
        """See ``Writer.draft``; None if the model answers something else than was asked."""
        prompt = self._prompts[modality].safe_substitute(
            # safe_substitute: a $ in a user's prompt file is no error.
            section=document.section or "(none)",
            text=document.text[:_MOST_TEXT],
        )
        if turn:
            prompt += _AGAIN.format(turn + 1)
        if self.languages:
            # By document, so that a run that goes on asks the same prompts.
            chance = random.Random(f"{document.id}/{modality}/{turn}")
            prompt += _LANGUAGE.format(chance.choice(self.languages))
        images = []
        if modality != "text" and document.image:
            images = [self.store.path(document.image)]
        reply = self._asker.ask(prompt, images, "query")
        # str(): models put numbers and lists there.
        query = str(reply.get("query") or "").strip()
        return Draft(query, str(reply.get("answer") or "").strip()) if query else None

    def entity(self, query: str) -> Entity | None:
        """See ``Writer.entity``."""
        reply = self._asker.ask(self._prompts["entity"].safe_substitute(query=query), [], "entity")
        name = str(reply.get("entity") or "").strip()
        rewritten = str(reply.get("query") or "").strip()
        # A query that still names the thing needs no image.
        if not name or not rewritten or name.casefold() in rewritten.casefold():
            return None
        return Entity(name, rewritten, str(reply.get("caption") or name).strip())

    def usage(self) -> dict[str, float]:
        """See ``Writer.usage``."""
        return dict(self._asker.usage)


class ExtractiveWriter:
    """Takes queries from the documents themselves."""

    note = (
        "no language model: queries are headings, captions and sentences of the documents, "
        "not questions"
    )
    identity = "extracts"

    def __init__(self, documents: Sequence[Document]) -> None:
        self._idf = Idf([terms(document.text) for document in documents])
        self._pages: dict[str, set[tuple[str, int | None]]] = {}
        for document in documents:
            for sentence in sentences(document.text):
                self._pages.setdefault(sentence, set()).add((document.file, document.page))

    def draft(self, document: Document, modality: Modality, turn: int = 0) -> Draft | None:
        """Caption of a figure; of a text, by turns a telling sentence and a few key words."""
        if document.kind == "figure":
            caption = _CAPTION_NUMBER.sub("", document.text).strip()
            # Where the caption is part of the document, asking with it gives the answer away.
            useful = modality == "image" and len(caption.split()) > 2 and turn == 0
            return Draft(caption) if useful else None
        lengths = range(6, 33)  # words
        found = [s for s in sentences(document.text) if len(s.split()) in lengths]
        candidates = [s for s in found if reads_as_query(s)]
        # A sentence that stands on several pages asks for none of them.
        own = [s for s in dict.fromkeys(candidates) if len(self._pages.get(s, ())) <= 1]
        if len(candidates) < 2 or not own:
            return None
        # Half of the documents begin with key words, half with a sentence, the same in every run.
        if (sum(map(ord, document.id)) + turn) % 2:
            return Draft(f"{document.section} {self._key_words(document, turn)}".strip())
        if turn // 2 >= len(own):
            return None
        best = sorted(own, key=self._weight, reverse=True)[turn // 2]
        return Draft(best, best, sentence=best)

    def _key_words(self, document: Document, turn: int) -> str:
        """Three to seven words of a text, rare ones more often, in the order of chance."""
        # The most telling words alone would be found by any embedder and teach nothing.
        chance = random.Random(f"{document.id}/{turn}")
        # Efraimidis and Spirakis (2006): the largest u^(1/w) are a weighted sample.
        drawn = {
            word: chance.random() ** (1 / max(self._idf(word), 1e-3))
            for word in sorted(set(terms(document.text)))
        }
        return " ".join(sorted(drawn, key=drawn.__getitem__, reverse=True)[: chance.randint(3, 7)])

    def entity(self, query: str) -> Entity | None:
        """The rarest word of the query stands for the image."""
        words = [w for w in query.split() if terms(w) and w.isalpha() and len(w) > 3]
        if len(words) < 3:
            return None
        name = max(words, key=lambda w: (self._idf(terms(w)[0]), w))
        return Entity(name, query.replace(name, "this", 1), name)

    def usage(self) -> dict[str, float]:
        """See ``Writer.usage``: nothing was asked of any model."""
        return {"requests": 0.0}

    def _weight(self, sentence: str) -> float:
        found = terms(sentence)
        # By the root: a plain mean would prefer the shortest sentence, a sum the longest.
        return float(sum(self._idf(term) for term in set(found)) / max(1, len(found)) ** 0.5)


def reads_as_query(text: str) -> bool:
    """Whether a text is words: not a list of numbers, nor words broken by hyphens."""
    letters = sum(char.isalpha() for char in text)
    marks = sum(not char.isspace() for char in text)
    return letters > 0.6 * marks and not _BROKEN_WORD.search(text)


def data_url(path: Path) -> str:
    """An image as a data URL, scaled down where it is large."""
    data, kind = image_bytes(load_image(path), _MOST_PIXELS, _MOST_IMAGE_BYTES)
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _read_prompt(path: Path) -> Template:
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such prompt.")
    return Template(path.read_text(encoding="utf-8"))
