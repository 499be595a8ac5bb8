"""Questions that a model answers with one of two words.

MM-Embed (arXiv 2411.02571) asks an off-the-shelf MLLM about a query and a candidate and takes
the probability of ``True`` against ``False``, with a question for each task of M-BEIR. The one
of captions is the paper's own; the others are in its form.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mmrag.content import Content
from mmrag.errors import ConfigError

_QUERY, _DOCUMENT = "{query}", "{document}"


@dataclass(frozen=True, slots=True)
class RerankPrompt:
    """A user turn that asks for one of two words, and the words.

    template: holds ``{query}`` and after it ``{document}``, once each. An image stands before
        the text of its side. What comes before the document is computed once for all documents.
    answers: the word for yes and the word for no.
    system: the system turn; None leaves it to the model's own template.

    Raises:
        ConfigError: For a template that lacks a place, or words that are the same.

    Examples:
        >>> prompt = RerankPrompt("{query} Is this a fit? {document}", ("yes", "no"))
        >>> prompt.answers
        ('yes', 'no')
    """

    template: str
    answers: tuple[str, str] = ("True", "False")
    system: str | None = None

    def __post_init__(self) -> None:
        once = self.template.count(_QUERY) == self.template.count(_DOCUMENT) == 1
        # The query first: what comes before the document is computed once and shared.
        if not once or self.template.index(_QUERY) > self.template.index(_DOCUMENT):
            raise ConfigError("A prompt must hold {query} and after it {document}, once each.")
        yes, no = (word.strip().lower() for word in self.answers)
        if not yes or not no or yes == no:
            raise ConfigError(f"The two answers must be different words, got {self.answers}.")

    def split(self) -> tuple[str, str, str]:
        """What stands before the query, between query and document, and after the document."""
        before, rest = self.template.split(_QUERY)
        between, after = rest.split(_DOCUMENT)
        return before, between, after


def _ask(query: str, document: str, question: str) -> RerankPrompt:
    return RerankPrompt(f"{query}: {_QUERY}\n{document}: {_DOCUMENT}\n{question} True or False")


PROMPTS: dict[str, RerankPrompt] = {
    "answer": _ask("Question", "Document", "Does the above document answer the question?"),
    "passage": _ask("Question", "Passage", "Does the above passage answer the question?"),
    "image": _ask("Question", "Image", "Does the above image answer the question?"),
    "caption": _ask("Caption", "Image", "Does the above daily-life image match the caption?"),
    "news": _ask("Caption", "Image", "Does the above news image match the caption?"),
    "fashion": _ask("Description", "Image", "Does the above fashion image match the description?"),
    "described_image": _ask("Image", "Text", "Does the above text describe the image?"),
    "same_image": _ask("Image", "Other image", "Do the above two images look alike?"),
    "image_question": _ask(
        "Image and question",
        "Document",
        "Does the above document answer the question about the image?",
    ),
    "edited_image": _ask(
        "Image and change",
        "Other image",
        "Does the other image show the first one with the described change?",
    ),
    "relevance": _ask("Query", "Document", "Is the above document relevant to the query?"),
}
"""Named prompts, by what is looked for."""

_BY_QUERY = {"text": "answer", "image": "relevance", "fused": "image_question"}


def find_prompt(prompt: RerankPrompt | str) -> RerankPrompt:
    """A prompt as given, one of ``PROMPTS`` by its name, or one from its template.

    Raises:
        ConfigError: For a name that is not known.
    """
    if isinstance(prompt, RerankPrompt):
        return prompt
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    if _QUERY in prompt or _DOCUMENT in prompt:
        return RerankPrompt(prompt)
    near = difflib.get_close_matches(prompt, PROMPTS) or list(PROMPTS)
    raise ConfigError(
        f"There is no rerank prompt named {prompt!r}: use {', '.join(near)}, or a template with "
        "{query} and {document}."
    )


def prompt_for(query: Content | None) -> RerankPrompt:
    """The prompt that fits a query by what it is made of: one for all of its documents."""
    # By the query alone: answers to different questions could not be compared.
    return PROMPTS[_BY_QUERY[query.modality if query else "text"]]
