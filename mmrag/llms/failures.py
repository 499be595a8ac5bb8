"""What a chat endpoint's client raises, as errors of ours that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from mmrag.errors import EndpointError

# What clients raise that take a reply of another shape for a chat completion.
_UNREADABLE = (json.JSONDecodeError, TypeError, AttributeError, LookupError)


@contextmanager
def translated_errors(model: str) -> Iterator[None]:
    """Turn what a chat endpoint's client raises into EndpointError with advice."""
    try:
        yield
    except Exception as error:
        if (advice := _advice(error)) is None:
            raise
        raise EndpointError(f"{model}{advice}") from error


def _advice(error: Exception) -> str | None:
    """What to say of an error after the model's name; None for one that is not the client's."""
    # Importing it takes most of a second, which answers without a server need not wait for.
    import openai

    # APITimeoutError before APIConnectionError, of which it is a subclass.
    if isinstance(error, openai.APITimeoutError):
        return " did not answer in time; is the server overloaded?"
    if isinstance(error, openai.APIConnectionError):
        # The SDK's own message is "Connection error."; its cause says what failed.
        cause = error.__cause__ or error
        return f" cannot be reached ({cause}). Check the base URL and that the server is running."
    if isinstance(error, openai.AuthenticationError):
        return ": the server needs an API key, or refuses the one it got. Set OPENAI_API_KEY."
    if isinstance(error, openai.NotFoundError):
        return f": the server has no such model or path: {error}"
    if isinstance(error, openai.APIStatusError):
        # Text-only models answer a message with images like that, without saying why.
        more = " If it takes no images, ask without them." if error.status_code == 400 else ""
        return f": the server refused ({error}).{more}"
    if isinstance(error, (openai.OpenAIError, httpx.HTTPError)):
        return f": the reply broke off or is not valid ({error})."
    if isinstance(error, _UNREADABLE):
        return (
            ": the reply is not a chat completion. Check that the base URL is that of an "
            "OpenAI-compatible server."
        )
    return None
