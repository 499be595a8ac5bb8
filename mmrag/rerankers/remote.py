"""A chat model behind an OpenAI-compatible server as a reranker. No torch.

The model is asked as in ``answers``, and the score is the probability of the word for yes
against that of the word for no among the likeliest first tokens. Servers that give no log-
probabilities are asked for a grade from 0 to 10 instead: as structured output where they take a
schema, else in words.
"""

from __future__ import annotations

import logging
import math
import re
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal

import openai

from mmrag.content import Content, load_image
from mmrag.errors import ConfigError, ContentError, EndpointError, MMRagError
from mmrag.instructions import resolve
from mmrag.llms.address import Address, parse_address
from mmrag.llms.client import Client
from mmrag.llms.endpoint import OPENAI
from mmrag.llms.failures import translated_errors
from mmrag.llms.replies import json_objects, without_reasoning
from mmrag.prompting import data_url
from mmrag.rerankers.base import DeadlineError, Outcome, Pair, refuse_clips
from mmrag.rerankers.prompts import RerankPrompt, prompt_for
from mmrag.retries import RETRIED_STATUS, BusyError, Deadline, with_retries

logger = logging.getLogger(__name__)

Mode = Literal["logprobs", "schema", "words"]
_MODES: tuple[Mode, ...] = ("logprobs", "schema", "words")
_TOP = 20  # the most that OpenAI and vLLM give
_GRADE = 10
_ASK_GRADE = (
    "Instead of the words, grade how true this is as JSON with one whole number from 0 (not at "
    f'all) to {_GRADE} (fully), and nothing else: {{"grade": 0}}'
)
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "judgement",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"grade": {"type": "integer", "minimum": 0, "maximum": _GRADE}},
            "required": ["grade"],
            "additionalProperties": False,
        },
    },
}
# A pair that any model judges: it tells whether a refusal is about the mode or about a pair.
_PLAIN: Pair = (Content("What is worth 0.5?"), Content("Half of the whole is worth 0.5."))
_GRADE_IN_TEXT = re.compile(r'"?grade"?\s*:\s*(\d+(?:\.\d+)?)', re.IGNORECASE)


class _UnsupportedError(Exception):
    """The server does not answer in this mode."""


class RemoteScorer:
    """Scores pairs by a chat model on a server. Safe to call from several threads.

    Args:
        model: the name the server knows it by.
        base_url: up to ``/v1``, as ``mmrag.llms.address`` reads it; OpenAI's own by default.
        api_key: sent as a bearer token; None sends no key.
        prompt: None fits the query, see ``prompt_for``.
        mode: how scores are asked for: by ``logprobs``, by a grade under a ``schema``, or by a
            grade in ``words``. By default the first of these that the server answers is taken,
            found out with the first pair; one that only that pair is refused in stays.
        concurrency: requests under way at once.
        timeout: seconds for one request; retries: how often it is repeated after a busy, broken
            or absent answer.
        deadline: seconds for one call of ``judge``; pairs that are not judged by then fail.
        max_tokens: of a grade; models that think before they answer need more.
        images: False sends text alone, for models that take no images.
        max_pixels, max_bytes: of one image; larger ones are scaled down.

    Raises:
        ConfigError: For options that make no sense.

    >>> scorer = RemoteScorer("Qwen/Qwen3-VL-8B-Instruct", "http://localhost:8000/v1")
    >>> scorer.judge([(Content("wind"), Content("Turbines make power."))])  # doctest: +SKIP
    [0.97]
    """

    def __init__(
        self,
        model: str,
        base_url: str | Address | None = None,
        *,
        api_key: str | None = None,
        prompt: RerankPrompt | None = None,
        mode: Mode | None = None,
        concurrency: int = 8,
        timeout: float = 60.0,
        retries: int = 3,
        deadline: float | None = None,
        max_tokens: int = 256,
        images: bool = True,
        max_pixels: int = 1024 * 1024,
        max_bytes: int = 2 * 1024 * 1024,
    ) -> None:
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ConfigError("concurrency and timeout must be above 0, retries at least 0.")
        if deadline is not None and deadline <= 0:
            raise ConfigError("deadline must be above 0, or None.")
        if mode is not None and mode not in _MODES:
            raise ConfigError(f"mode={mode!r} is not known: use {', '.join(_MODES)}.")
        self.name = model
        self.prompt = prompt
        self.mode: Mode | None = mode
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.deadline = deadline
        self.max_tokens = max_tokens
        self.images = images
        self.max_pixels = max_pixels
        self.max_bytes = max_bytes
        address = (
            base_url
            if isinstance(base_url, Address)
            else parse_address(base_url or OPENAI, api_key)
        )
        self._client = openai.OpenAI(
            api_key="none",  # the client signs requests itself
            base_url=address.url,
            http_client=Client(address),
            timeout=timeout,
            max_retries=0,  # its own retries know no deadline
        )
        self._lock = threading.Lock()

    def judge(self, pairs: Sequence[Pair], instruction: str | None = None) -> list[Outcome]:
        """Outcomes of all pairs, asked for at once; see ``Scorer.judge``."""
        task = resolve(instruction)
        ends = Deadline(self.deadline)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="mmrag-rerank")
        try:
            futures: list[Future[float]] = []
            for pair in pairs:
                futures.append(pool.submit(self._score, pair, task, ends))
                if self.mode is None and len(futures) == 1:  # it finds out how to ask the others
                    wait(futures, timeout=_wait(ends))
            wait(futures, timeout=_wait(ends))
            return [self._outcome(future) for future in futures]
        finally:
            ends.stop.set()
            # Without waiting: the deadline is over, and threads end with their requests.
            pool.shutdown(wait=False, cancel_futures=True)

    def _outcome(self, future: Future[float]) -> Outcome:
        if not future.done():
            return DeadlineError(
                f"{self.name}: the deadline of {self.deadline} s passed before it was judged."
            )
        error = future.exception()
        if error is None:
            return future.result()
        if isinstance(error, MMRagError):
            return error
        # A bug of ours, not of the pair.
        raise error

    def _score(self, pair: Pair, task: str | None, ends: Deadline) -> float:
        """Probability of one pair, in the first mode that the server answers."""
        known = self.mode
        refusal: Exception | None = None
        for mode in _MODES if known is None else (known,):
            try:
                choice = self._ask(pair, task, mode, ends)
            except _UnsupportedError as error:
                # A server refuses a mode and a bad pair with the same status: a plain pair tells
                # them apart.
                if known is not None or self._takes(mode, ends):
                    self._settle(mode, refusal)
                    raise EndpointError(f"{self.name}: refuses this pair ({error}).") from error
                refusal = error
                continue
            self._settle(mode, refusal)
            with translated_errors(self.name):
                if mode == "logprobs":
                    prompt = self.prompt or prompt_for(pair[0])
                    return answer_probability(choice.logprobs, prompt.answers)
                return self._grade(without_reasoning(choice.message.content or ""))
        raise EndpointError(f"{self.name}: no score can be had from this server ({refusal}).")

    def _takes(self, mode: Mode, ends: Deadline) -> bool:
        """Whether the server answers in a mode at all, asked with a pair that is harmless."""
        try:
            self._ask(_PLAIN, None, mode, ends)
        except _UnsupportedError:
            return False
        return True

    def _settle(self, mode: Mode, refusal: Exception | None) -> None:
        # Several threads find the mode out at once; the first one decides.
        with self._lock:
            if self.mode is not None:
                return
            self.mode = mode
        if refusal is not None:
            logger.warning(
                "%s gives no log-probabilities (%s); it is asked for grades from 0 to %d instead, "
                "which are coarser.",
                self.name,
                refusal,
                _GRADE,
            )

    def _ask(self, pair: Pair, task: str | None, mode: Mode, ends: Deadline) -> Any:
        """The model's answer. Raises _UnsupportedError where it is refused in this mode."""
        prompt = self.prompt or prompt_for(pair[0])
        options: dict[str, Any] = {"max_tokens": 1, "logprobs": True, "top_logprobs": _TOP}
        if mode != "logprobs":
            options = {"max_tokens": self.max_tokens}
        if mode == "schema":
            options["response_format"] = _SCHEMA
        messages = self._messages(pair, task, prompt, mode)
        with translated_errors(self.name):
            try:
                reply = self._create(ends, messages=messages, **options)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if mode == "words":
                    raise
                raise _UnsupportedError(error) from error
            choice = reply.choices[0]
            # Some servers accept the option and ignore it.
            if mode == "logprobs" and not (choice.logprobs and choice.logprobs.content):
                raise _UnsupportedError("the answer came without any")
            return choice

    def _create(self, ends: Deadline, **request: Any) -> Any:
        """The reply to a request, which is repeated only while there is time."""

        def ask() -> Any:
            client = self._client.with_options(timeout=max(min(ends.left(), self.timeout), 0.001))
            try:
                return client.chat.completions.create(model=self.name, temperature=0.0, **request)
            except openai.APIStatusError as error:
                if error.status_code not in RETRIED_STATUS and error.status_code < 500:
                    raise
                asked: str = error.response.headers.get("retry-after", "")
                # Whole seconds below 100; a date or an hour is not waited for.
                pause = float(asked) if re.fullmatch(r"[1-9]\d?", asked) else None
                raise BusyError(error, pause) from error
            except openai.APIConnectionError as error:
                raise BusyError(error) from error

        return with_retries(ask, self.retries, ends)

    def _grade(self, text: str) -> float:
        try:
            grade = float(next(value["grade"] for value in json_objects(text) if "grade" in value))
        # Models asked in words write the grade into a sentence.
        except (ValueError, TypeError, StopIteration):
            match = _GRADE_IN_TEXT.search(text)
            if match is None:
                raise EndpointError(
                    f"{self.name}: answers {text[:200]!r} where a grade was asked for."
                ) from None
            grade = float(match[1])
        if not 0 <= grade <= _GRADE:
            raise EndpointError(f"{self.name}: the grade {grade:g} is not within 0 to {_GRADE}.")
        return grade / _GRADE

    def _messages(
        self, pair: Pair, task: str | None, prompt: RerankPrompt, mode: Mode
    ) -> list[Any]:
        refuse_clips(pair)
        query, document = pair if self.images else (_without_images(side) for side in pair)
        before, between, after = prompt.split()
        own = resolve(query.instruction) if query else None
        opening = f"Task: {own or task}\n" if own or task else ""
        parts = [
            *self._side(opening + before, query),
            *self._side(between, document),
            {"type": "text", "text": after if mode == "logprobs" else f"{after}\n{_ASK_GRADE}"},
        ]
        user = {"role": "user", "content": _joined(parts)}
        if prompt.system is None:
            return [user]
        return [{"role": "system", "content": prompt.system}, user]

    def _side(self, label: str, content: Content | None) -> list[dict[str, Any]]:
        """The text before a side, its images, its text."""
        images = [self._image(source) for source in (content.images if content else ())]
        text = (content.text if content else None) or ""
        return [{"type": "text", "text": label}, *images, {"type": "text", "text": text}]

    def _image(self, source: Any) -> dict[str, Any]:
        url = data_url(load_image(source), self.max_pixels, self.max_bytes)
        return {"type": "image_url", "image_url": {"url": url}}


def answer_probability(logprobs: Any, answers: tuple[str, str]) -> float:
    """Probability of the first answer against the second at the first token.

    Spellings that differ in case or white space count as one word. A word that is not among
    the tokens listed is taken at the probability of the least likely of these, which bounds it.

    Raises:
        EndpointError: If neither word is listed.
    """
    top = logprobs.content[0].top_logprobs
    if not top:
        raise EndpointError("The server lists no likely tokens: use mode='schema'.")
    yes, no = (
        sum(math.exp(t.logprob) for t in top if t.token.strip().lower() == word.strip().lower())
        for word in answers
    )
    if not yes and not no:
        raise EndpointError(
            f"The model begins with {top[0].token!r} where {' or '.join(answers)} was asked for. "
            "A model that thinks before it answers needs mode='schema'."
        )
    bound = math.exp(min(t.logprob for t in top))
    yes, no = (share or min(bound, yes or no) for share in (yes, no))
    return yes / (yes + no)


def _without_images(content: Content | None) -> Content | None:
    """A side without its images. Raises ContentError if nothing is left."""
    if content is None or not content.images:
        return content
    if content.text is None:
        raise ContentError("There is only an image to judge, and the model takes none.")
    return Content(content.text, instruction=content.instruction)


def _joined(parts: Sequence[dict[str, Any]]) -> Any:
    """Neighbouring texts as one; a plain string where there are no images."""
    joined: list[dict[str, Any]] = []
    for part in parts:
        if part["type"] == "text" and joined and joined[-1]["type"] == "text":
            joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
        elif part["type"] != "text" or part["text"]:
            joined.append(part)
    return joined[0]["text"] if len(joined) == 1 else joined


def _wait(ends: Deadline) -> float | None:
    """Seconds to wait, as ``concurrent.futures`` takes them."""
    return None if ends.seconds is None else ends.left()
