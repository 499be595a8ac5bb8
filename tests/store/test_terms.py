"""What BM25 finds a page by."""

import pytest

from mmrag.errors import ConfigError
from mmrag.store.terms import (
    DocumentTerms,
    NodeTerms,
    check_language,
    detect_language,
    has_terms,
    index_terms,
    query_terms,
)

GERMAN = "Das Unternehmen hat im vergangenen Jahr mehr Häuser gebaut als geplant."


def made(text, language="english"):
    return list(index_terms(text, language))


def test_neighbours_are_terms_after_the_words():
    assert made("The annual reports of FY2015") == [
        "annual", "report", "fy", "2015", "annualꞏ20report", "reportꞏ20fy", "fyꞏ202015",
    ]  # fmt: skip


@pytest.mark.parametrize("other", ["XR 2000 B", "xr2000b", "ＸＲ－２０００／Ｂ", "XR\u00ad-2000/b"])
def test_part_numbers_are_found_however_they_are_written(other):
    assert made(other) == made("XR-2000/B")


@pytest.mark.parametrize(
    ("language", "one", "other"),
    [
        ("english", "companies", "company"),
        ("german", "Häuser", "Haus"),
        ("french", "généraux", "general"),
        ("spanish", "informaciones", "información"),
        ("russian", "поездами", "поезд"),
        ("none", "Café", "cafe"),
    ],
)
def test_words_are_stemmed_by_language_and_lose_their_accents(language, one, other):
    assert made(one, language) == made(other, language)


def test_scripts_without_spaces_give_pairs_and_no_neighbours():
    assert made("差旅费 한국어") == ["差旅", "旅费", "한국", "국어"]


def test_terms_are_single_tokens_in_every_tokenizer():
    for term in made("1.5 kg naïve हिन्दी में รายงานประจำปี", "none"):
        assert term.isalnum(), term


def test_a_question_is_stemmed_as_every_language_of_the_collection():
    terms = query_terms("Häuser companies", ["german", "english"]).split()
    assert {*made("Häuser", "german"), *made("companies", "english")} <= set(terms)
    assert len(terms) == len(set(terms))
    assert query_terms("Häuser", []) == ""


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (GERMAN, "german"),
        ("Le conseil a approuvé les comptes annuels de la société.", "french"),
        ("Выручка компании выросла за год.", "russian"),
        ("The board approved the annual accounts of the company.", "english"),
        ("差旅费报销必须在三十天内提交给财务部", "english"),
        ("18 000 | 2023", "english"),
        ("", "english"),
    ],
)
def test_the_language_is_detected_where_there_is_enough_to_go_by(text, language):
    assert detect_language(text) == language


def test_every_node_has_the_file_name_and_first_words_of_its_document():
    document = DocumentTerms("in/3M_2018_10K.pdf")
    document.read("Annual report of Example Ltd " + "filler " * 40)
    document.read("Revenue")
    terms = document.of("Revenue")
    assert terms.text == "revenu"
    assert terms.file_name.split()[:5] == ["3", "m", "2018", "10", "k"]
    assert {"annual", "exampl", "filler"} <= set(terms.first_words.split())
    assert terms.first_words.split().count("filler") == 20
    renamed = terms.renamed("pumps.pdf")
    assert (renamed.file_name, renamed.text) == ("pump", "revenu")


def test_the_language_of_a_document_is_that_of_what_was_read_so_far():
    document = DocumentTerms("x.pdf")
    document.read("2023")
    assert document.of("Häuser").language == "english"
    document.read(GERMAN)
    assert document.of("Häuser").language == "german"
    given = DocumentTerms("x.pdf", "french")
    given.read(GERMAN)
    assert given.of("Häuser").language == "french"


def test_terms_survive_a_payload():
    terms = NodeTerms("german", "a b", "c", "d")
    assert NodeTerms.from_payload(terms.to_payload()) == terms
    assert NodeTerms.from_payload({"kind": "page"}).text == ""


def test_a_page_without_text_has_no_terms_and_an_image_file_has_its_name():
    assert has_terms({"kind": "page", "text": "words"})
    assert not has_terms({"kind": "page"})
    assert has_terms({"kind": "picture"})


def test_unknown_language():
    check_language("auto")
    with pytest.raises(ConfigError, match=r"'klingon'.*english"):
        check_language("klingon")
