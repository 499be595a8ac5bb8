import time

import numpy as np
import pytest
from fakes import make_node
from llama_index.core.schema import NodeWithScore

from mmrag.answering import citations
from mmrag.answering.citations import (
    best_passage,
    check_answer,
    embedder_similarity,
    locate,
    parse_marks,
    strip_marks,
)
from mmrag.answering.context import Source
from mmrag.errors import ReadError
from mmrag.prompting import sanitize

EYES = "The gold plan covers one eye examination a year. Lenses cost 150 dollars."
TEETH = "Dental cleaning is free for children under 12. Adults pay for crowns."


@pytest.fixture(autouse=True)
def no_pdf(monkeypatch, tmp_path):
    """Quotes are located in an empty file: a box per quote, its width the quote's length."""
    (tmp_path / "a.pdf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        citations,
        "locate_quote",
        lambda path, page, quote, image, indexed: [(1, 2, 1 + len(quote), 4)],
    )


def source(n, text, file="a.pdf"):
    return Source(n, file, n, NodeWithScore(node=make_node(text, page=n)), text)


SOURCES = [source(1, EYES), source(2, TEETH)]


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("a [1].", [1]),
        ("a [1][2], b [2].", [1, 2]),
        ("a [1, 3] b [5;6]", [1, 3, 5, 6]),
        ("a [1-3]", [1, 2, 3]),
        ("a [1\u20133]", [1, 2, 3]),
        ("a [1-9999]", [1, 9999]),
        ("a \u30102\u3011 b \u30103\u2020source\u3011", [2, 3]),
        ("a [Source 2] b [sources 1, 4] c [^7]", [2, 1, 4, 7]),
        ("a \uff3b1\uff3d b \u30142\u3015 c [3 and 4] d [5 & 6]", [1, 2, 3, 4, 5, 6]),
        ("a \u30101\u30012\u3011 b [3, p. 7] c [4, pages 2-5]", [1, 2, 3, 4]),
        ("see [1](https://x.org) and a[i] and [a]", []),
    ],
)
def test_marks_in_the_spellings_that_models_use(text, marks):
    assert parse_marks(text) == marks


def test_a_claim_is_the_sentence_without_marks_and_bullet():
    assert strip_marks("- Eye exams are covered [1][2].") == "Eye exams are covered."
    assert strip_marks("2. Lenses [1]") == "Lenses"


def test_supported_claims_get_their_quote_and_box():
    checked = check_answer("One eye examination is covered by the gold plan [1].", SOURCES)
    (claim,) = checked.claims
    assert claim.supported
    assert not checked.problems
    one, two = checked.sources
    assert one.quote == "The gold plan covers one eye examination a year."
    assert one.box == (1, 2, 1 + len(one.quote), 4)
    assert one.cited
    assert (two.quote, two.cited) == (None, False)


def test_a_claim_cited_to_the_wrong_page_is_flagged():
    checked = check_answer("The gold plan covers one eye examination [2].", SOURCES)
    assert checked.claims[0].supported is False
    assert checked.sources[1].quote is None
    assert checked.problems == ["[2] does not support: The gold plan covers one eye examination."]


def test_a_page_cited_beside_the_right_one_is_checked_too():
    both = "The gold plan covers one eye examination a year [1][2]."
    checked = check_answer(both, SOURCES)
    assert checked.claims[0].supported
    assert checked.problems == [f"[2] is cited but does not support: {strip_marks(both)}"]


def test_what_two_pages_say_may_be_joined_in_one_sentence():
    said = "The gold plan covers one eye examination, and dental cleaning is free for children"
    checked = check_answer(f"{said} [1][2].", SOURCES)
    assert checked.problems == []
    assert [bool(page.quote) for page in checked.sources] == [True, True]
    assert check_answer(f"{said} [1].", SOURCES).problems
    assert check_answer("Cheese is green and the moon is old [1][2].", SOURCES).problems


def test_a_number_that_the_page_does_not_have_is_flagged():
    right = check_answer("Lenses cost 150 dollars [1].", SOURCES)
    wrong = check_answer("Lenses cost 250 dollars [1].", SOURCES)
    assert (right.claims[0].supported, wrong.claims[0].supported) == (True, False)


def test_citations_to_nowhere_are_flagged_or_removed():
    text = "Dental cleaning is free for children [2][7]."
    flagged = check_answer(text, SOURCES)
    assert flagged.text == text
    assert flagged.claims[0].dangling == (7,)
    assert flagged.problems == ["[7] points to no source: Dental cleaning is free for children."]
    removed = check_answer(text, SOURCES, dangling="remove")
    assert removed.text == "Dental cleaning is free for children [2]."
    assert removed.problems
    only = check_answer("Dental cleaning is free [9].", SOURCES, dangling="remove")
    assert only.text == "Dental cleaning is free."


def test_sentences_without_support_are_flagged_or_removed():
    text = "Adults pay for crowns [2].\n\nThe moon is made of green cheese.\n- Lenses cost 150 [1]."
    flagged = check_answer(text, SOURCES)
    assert [claim.supported for claim in flagged.claims] == [True, False, True]
    assert flagged.problems == ["no source supports: The moon is made of green cheese."]
    assert flagged.text == text
    removed = check_answer(text, SOURCES, unsupported="remove")
    assert removed.text == "Adults pay for crowns [2].\n- Lenses cost 150 [1]."


def test_a_true_sentence_without_a_citation_passes():
    assert not check_answer("Adults pay for crowns.", SOURCES).problems


def test_a_line_that_announces_a_list_is_no_claim():
    text = "Here is what the documents say:\n- Adults pay crowns [2]."
    assert not check_answer(text, SOURCES).problems


def test_marks_after_the_full_stop_belong_to_the_sentence_before():
    checked = check_answer("Adults pay for crowns. [2] Lenses cost 150 dollars. [1]", SOURCES)
    assert [claim.citations for claim in checked.claims] == [(2,), (1,)]
    assert not checked.problems


def test_marks_are_shown_in_one_spelling():
    checked = check_answer("Lenses cost 150 dollars [Source 1, 2].", SOURCES)
    assert checked.text == "Lenses cost 150 dollars [1][2]."


def test_markdown_survives_the_check():
    text = "# Cover\n\n* Lenses cost **150** dollars [1]\n* Adults pay for crowns [2]\n\n| a | b |"
    assert check_answer(text, SOURCES).text == text


def test_pages_without_text_cannot_be_checked():
    checked = check_answer("The chart peaks in May [1].", [source(1, "")])
    assert checked.claims[0].supported is None
    assert not checked.problems
    assert checked.sources[0].cited


def test_a_paraphrase_needs_the_embedder():
    claim = "Optometrist appointments come annually [1]."

    def alike(first, second):
        return np.asarray([["eye" in text for text in second] for _ in first], dtype=np.float32)

    assert check_answer(claim, SOURCES).claims[0].supported is False
    checked = check_answer(claim, SOURCES, alike)
    assert checked.claims[0].supported
    assert "eye examination" in checked.sources[0].quote


def test_similarity_is_the_embedders_cosine():
    class Letters:
        def encode(self, contents, **_):
            rows = np.asarray([[text.count("a"), text.count("b")] for text in contents], float)
            return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    matrix = embedder_similarity(Letters())(["a", "ab"], ["aa", "b", "abab"])
    assert matrix == pytest.approx(
        np.asarray([[1, 0, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]]), abs=1e-6
    )


def test_two_neighbours_support_a_claim_that_needs_both():
    score, quote, _ = best_passage("eye examination and lenses for 150 dollars", SOURCES[0])
    assert quote == EYES
    assert score > 0.6


FEES = """Students pay the reduced fee for a plot.

Plot Size Full fee Reduced fee Deposit

Small bed 12 m2 36 euros 18 euros 40 euros

Half plot 40 m2 84 euros 42 euros 40 euros

Full plot 80 m2 150 euros 75 euros 40 euros"""
BARRED = """| Plot | Size | Full fee | Reduced fee of students |
| --- | --- | --- | --- |
| Small bed | 12 m2 | 36 euros | 18 euros |
| Full plot | 80 m2 | 150 euros | 75 euros |"""


@pytest.mark.parametrize("text", [FEES, BARRED])
@pytest.mark.parametrize(
    ("claim", "number"),
    [
        ("The reduced fee for a full plot is 75 euros [1].", "75 euros"),
        ("A small bed has a reduced fee of 18 euros [1].", "18 euros"),
        ("The full fee for the plot of 80 m2 is 150 euros [1].", "75 euros"),
    ],
)
def test_of_a_table_the_row_with_the_numbers_is_quoted(text, claim, number):
    checked = check_answer(claim, [source(1, text)])
    (row,) = [line for line in text.splitlines() if number in line]
    assert checked.sources[0].quote == row
    assert checked.claims[0].supported


def test_a_passage_without_the_numbers_is_no_evidence_beside_one_that_has_them():
    text = (
        "The reduced yearly fee for a full plot was raised by the members in spring.\n\n"
        "Since then a full plot costs 75 euros."
    )
    (found,) = check_answer(
        "The reduced yearly fee for a full plot is 75 euros [1].", [source(1, text)]
    ).sources
    assert "75 euros" in found.quote


def test_a_file_that_has_gone_costs_the_box_not_the_quote(monkeypatch, caplog):
    def gone(*_):
        raise ReadError("it is not there", file="a.pdf")

    monkeypatch.setattr(citations, "locate_quote", gone)
    found = locate(SOURCES[0], "eye")
    assert (found.quote, found.box) == ("eye", None)
    assert "cannot be located" in caplog.text
    moved = locate(source(1, "x", file="moved.pdf"), "x")
    assert (moved.quote, moved.box) == ("x", None)


def test_only_pdfs_are_searched_for_boxes():
    assert locate(source(1, "x", file="n.md"), "x").boxes == ()


def test_marks_behind_any_full_stop_belong_to_the_sentence_before():
    pages = [source(1, "金牌计划每月90美元。"), source(2, "银牌计划每月60美元。")]
    said = "金牌计划每月90美元。[1]银牌计划每月60美元。[2]"
    checked = check_answer(said, pages)
    assert [claim.citations for claim in checked.claims] == [(1,), (2,)]
    assert checked.problems == []


def test_marks_on_a_line_of_their_own_belong_to_the_sentence_before():
    checked = check_answer("The gold plan covers one eye examination\n\n[1]", SOURCES)
    assert [claim.citations for claim in checked.claims] == [(1,)]
    assert checked.sources[0].quote == "The gold plan covers one eye examination a year."


@pytest.mark.parametrize("said", ["[99]", "It is. [99]"])
def test_marks_of_sentences_without_content_words_count_too(said):
    assert check_answer(said, SOURCES).problems[0].startswith("[99] points to no source")
    assert check_answer("They all do [2].", SOURCES).sources[1].cited


def test_an_abbreviation_does_not_end_a_claim():
    page = source(1, "Dr. Smith of Acme Inc. audits the plan, see Fig. 3.")
    said = "Dr. Smith of Acme Inc. audits it, as Fig. 3 says [1]."
    checked = check_answer(said, [page], unsupported="remove")
    assert checked.text == said
    assert len(checked.claims) == 1


def test_the_numbers_of_a_list_are_no_claims():
    said = "1. The gold plan covers one eye examination [1].\n2. Adults pay for crowns [2]."
    checked = check_answer(said, SOURCES, unsupported="remove")
    assert checked.text == said
    assert checked.problems == []


def test_a_bare_yes_is_no_claim():
    assert check_answer("Yes [1].", SOURCES).problems == []


def test_a_list_of_references_makes_no_claims():
    said = "Adults pay for crowns [2].\n\nSources:\n[2] a.pdf, page 2"
    assert check_answer(said, SOURCES).problems == []


def test_a_run_of_spaces_takes_no_more_than_linear_work():
    counted = 200_000  # quadratic work would take minutes
    assert parse_marks(" " * counted + "[1]" + " " * counted) == [1]


def test_each_text_is_embedded_once_for_an_answer():
    class Counting:
        texts = 0

        def encode(self, contents):
            self.texts += len(contents)
            return np.eye(len(contents), dtype=np.float32)

    embedder = Counting()
    alike = embedder_similarity(embedder)
    alike(["a"], ["b", "c"])
    assert alike(["a"], ["b", "a"]).shape == (1, 2)
    assert embedder.texts == 3


def test_a_price_with_and_without_its_cents_is_one_number():
    page = source(1, "The gold plan costs $1,290.00 a year.")
    assert check_answer("The gold plan costs $1,290 a year [1].", [page]).problems == []
    assert check_answer("The gold plan costs $1,209 a year [1].", [page]).problems


HOSTILE = [
    "[1\u2020" * 20_000,
    "[" * 100_000,
    "[ " * 50_000,
    "[1" + ", 1" * 50_000,
    "." + " " * 100_000 + "x",
    " " * 100_000,
    "! " * 50_000,
    "." + "'" * 100_000,
    ". [1]" * 20_000,
    "a" * 200_000,
    "\n" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_answers_take_linear_time(text):
    """A quadratic pattern takes minutes for these."""
    started = time.process_time()
    parse_marks(text)
    strip_marks(text)
    pieces = citations._pieces(text)
    sanitize(text)
    assert time.process_time() - started < 20
    assert "".join(space + piece for space, piece in pieces).rstrip() == text.rstrip()
