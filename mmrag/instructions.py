"""Named task instructions for queries.

Embedders of this kind are trained with a sentence that says what the query is looking for.
The sentences here are in the style of M-BEIR (arXiv 2311.17136) and GME (arXiv 2412.16855):
what is wanted, and how it relates to what is given.
"""

from __future__ import annotations

import difflib
import re

from mmrag.errors import ConfigError

TASKS: dict[str, str] = {
    # a question in words
    "page_for_question": "Find a document page that answers the question.",
    "passage_for_question": "Find a passage of text that answers the question.",
    "figure_for_question": "Find a figure, chart or table that answers the question.",
    "image_for_question": "Find an image that answers the question.",
    "fused_for_question": "Find an image with its text that answers the question.",
    # a description in words
    "image_for_caption": "Find an image that matches the given text.",
    "page_for_description": "Find a document page that matches the given description.",
    # an image
    "caption_for_image": "Find a text that describes the given image.",
    "passage_for_image": "Find a passage of text that is about what the given image shows.",
    "image_for_image": "Find an image that looks similar to the given image.",
    "page_for_image": "Find a document page that contains or shows the given image.",
    # an image with words about it
    "passage_for_image_question": (
        "Find a passage of text that answers the question about the given image."
    ),
    "page_for_image_question": (
        "Find a document page that answers the question about the given image."
    ),
    "fused_for_image_question": (
        "Find an image with its text that answers the question about the given image."
    ),
    "image_for_edited_image": (
        "Find an image that looks like the given image with the described changes."
    ),
}

# ASCII words joined by _ are meant as a name; those joined by - are if they resemble one.
_NAME = re.compile(r"[A-Za-z0-9]+([_-]+[A-Za-z0-9]+)+")


def resolve(instruction: str | None) -> str | None:
    """The sentence for a task's name; free text as it is; ``None`` for ``None``.

    Blank text is an instruction that says nothing: it marks a query, where a family marks them.

    Raises:
        ConfigError: For a name that is not in ``TASKS``, with the nearest that are.

    >>> resolve("page_for_question")
    'Find a document page that answers the question.'
    >>> resolve("Identify")
    'Identify'
    """
    if instruction is None:
        return None
    text = instruction.strip()
    if text in TASKS:
        return TASKS[text]
    if _NAME.fullmatch(text):
        near = difflib.get_close_matches(text.lower().replace("-", "_"), TASKS)
        # A single hyphenated word ("semi-structured") may be meant as free text.
        if near or "_" in text:
            raise ConfigError(
                f"There is no task instruction named {text!r}. Did you mean: "
                f"{', '.join(near or TASKS)}? An instruction of your own must be a sentence."
            )
    return text
