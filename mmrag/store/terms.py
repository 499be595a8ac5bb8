"""The terms that BM25 ranks by: made here alike for pages and for questions.

Qdrant's own text index knows neither numbers by value nor neighbouring words, and one language
per collection. So the index holds ready terms that it only splits at spaces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import PurePath
from typing import Any

import Stemmer

from mmrag.errors import ConfigError
from mmrag.lexical import STOP_WORDS, fold, is_pair, words
from mmrag.store.engine import LANGUAGE_FIELD, TERMS_FIELD

AUTO_LANGUAGE = "auto"
NO_LANGUAGE = "none"
STEMMED = tuple(sorted(set(Stemmer.algorithms()) - {"porter", "dutch_porter"}))
"""The languages that Snowball stems."""

# ISO 639 codes of py3langid for the languages of Snowball.
_BY_CODE = {
    "ar": "arabic", "hy": "armenian", "eu": "basque", "ca": "catalan", "cs": "czech",
    "da": "danish", "nl": "dutch", "en": "english", "eo": "esperanto", "et": "estonian",
    "fi": "finnish", "fr": "french", "de": "german", "el": "greek", "hi": "hindi",
    "hu": "hungarian", "id": "indonesian", "ga": "irish", "it": "italian", "lt": "lithuanian",
    "ne": "nepali", "no": "norwegian", "nb": "norwegian", "nn": "norwegian", "fa": "persian",
    "pl": "polish", "pt": "portuguese", "ro": "romanian", "ru": "russian", "sr": "serbian",
    "es": "spanish", "sv": "swedish", "ta": "tamil", "tr": "turkish", "yi": "yiddish",
}  # fmt: skip
_SURE = 0.5  # confidence of py3langid; below are names, numbers and tables
_SAMPLE = 2000  # characters of a document that its language is told from
_FIRST_WORDS = 25


@dataclass(frozen=True)
class NodeTerms:
    """What BM25 finds a node by: terms separated by spaces, stemmed as ``language``.

    text, file_name, first_words: of the node's own text, and of the document that it is in.
    """

    language: str
    text: str
    file_name: str = ""
    first_words: str = ""

    @classmethod
    def from_payload(cls, payload: Mapping[str, Any]) -> NodeTerms:
        """The terms that ``to_payload`` gave; none for a node without text."""
        return cls(payload.get(LANGUAGE_FIELD, NO_LANGUAGE), *payload.get(TERMS_FIELD, [""]))

    def to_payload(self) -> dict[str, Any]:
        """The fields of a point's payload that hold them."""
        terms = [self.text, self.file_name, self.first_words]
        return {TERMS_FIELD: terms, LANGUAGE_FIELD: self.language}

    def renamed(self, file: str) -> NodeTerms:
        """The same in a document of another name."""
        return dataclasses.replace(self, file_name=_file_name_terms(file, self.language))


class DocumentTerms:
    """Makes the terms of one document's nodes.

    A page seldom says which document it is of, and a question often does: so each node has the
    terms of the file's name and of the document's first words as well.

    language: of a Snowball stemmer, ``"auto"`` to detect it, or ``"none"`` for no stemming.

        document = DocumentTerms("reports/annual-2023.pdf")
        document.read("Annual report of Example Ltd")
        document.of("Revenue grew to 1,577 million").text  # "revenu grew 1577 million ..."
    """

    def __init__(self, file: str, language: str = AUTO_LANGUAGE) -> None:
        self._file = file
        self._detects = language == AUTO_LANGUAGE
        # Until a text tells: names of files are most often English.
        self._language = "english" if self._detects else language
        self._sample = ""

    def read(self, text: str) -> None:
        """Take the next of the document's texts, in order, before asking for its terms.

        Those up to the first 2,000 characters decide the language.
        """
        # Two thousand characters tell a language; reading on would only cost time.
        if len(self._sample) < _SAMPLE and text.strip():
            self._sample = f"{self._sample}\n{text}"[:_SAMPLE]
            if self._detects:
                self._language = detect_language(self._sample)

    def of(self, text: str) -> NodeTerms:
        """The terms of a node with this text."""
        language = self._language
        first = " ".join(self._sample.split()[:_FIRST_WORDS])
        return NodeTerms(
            language,
            _joined(text, language),
            _file_name_terms(self._file, language),
            _joined(first, language),
        )


def has_terms(payload: Mapping[str, Any]) -> bool:
    """Whether BM25 finds a node: one with text, or an image file, by its name."""
    # A page without text would be found by its file's name as well, and before all others, since
    # BM25 favours short texts.
    return bool(payload.get("text")) or payload.get("kind") == "picture"


def query_terms(text: str, languages: Collection[str]) -> str:
    """Terms of a question, separated by spaces, as each of the collection's languages has them."""
    found = (term for language in sorted(languages) for term in index_terms(text, language))
    return " ".join(dict.fromkeys(found))


def index_terms(text: str, language: str) -> Iterator[str]:
    """Terms of a text in order: its words without common ones, and every two neighbours.

    They hold letters and digits alone, so that any tokenizer of Qdrant takes each as one token.
    """
    content = [word for word in words(text) if fold(word) not in STOP_WORDS]
    if language != NO_LANGUAGE:
        # Stemmed before accents are taken off: Snowball's rules need them.
        content = _stemmer(language).stemWords(content)
    terms = [fold(word) for word in content]
    yield from map(_letters_only, terms)
    for first, second in pairwise(terms):
        # Pairs of characters are neighbours by themselves.
        if not (is_pair(first) or is_pair(second)):
            yield _letters_only(f"{first} {second}")


def check_language(language: str) -> None:
    """Raise ConfigError for a language that has no stemmer."""
    if language not in (AUTO_LANGUAGE, NO_LANGUAGE, *STEMMED):
        raise ConfigError(
            f"There is no stemmer for the language {language!r}; use {AUTO_LANGUAGE}, "
            f"{NO_LANGUAGE}, or one of {', '.join(STEMMED)}."
        )


def detect_language(text: str) -> str:
    """The language of a text that Snowball stems; English if there is no telling."""
    code, confidence = _identifier().classify(text)
    return _BY_CODE.get(code, "english") if confidence >= _SURE else "english"


@cache
def _identifier() -> Any:
    # Loading takes 0.4 s, which a search has no use for.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _stemmer(language: str) -> Any:
    return Stemmer.Stemmer(language)


def _file_name_terms(file: str, language: str) -> str:
    return _joined(PurePath(file).stem, language)


def _joined(text: str, language: str) -> str:
    return " ".join(index_terms(text, language))


def _letters_only(term: str) -> str:
    """A term with every other character written as a letter and its code: ``1.5`` is ``1ꞏ2e5``."""
    if term.isalnum():
        return term
    # A letter that hardly any text has, so that no word looks like an escape.
    return "".join(c if c.isalnum() else f"\ua78f{ord(c):x}" for c in term)
