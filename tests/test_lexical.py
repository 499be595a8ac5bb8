import pytest

from mmrag.lexical import Idf, sentences, stem, terms, words


@pytest.mark.parametrize(
    ("word", "folded"),
    [
        ("policies", "policy"), ("plans", "plan"), ("expenses", "expense"), ("glass", "glass"),
        ("status", "status"), ("gas", "gas"), ("shoes", "shoe"),
    ],
)  # fmt: skip
def test_plurals_are_folded_by_the_s_stemmer(word, folded):
    assert stem(word) == folded


def test_terms_fold_case_accents_and_numbers_and_drop_common_words():
    assert terms("What does the CAFÉ charge for 1,000 plans?") == ["cafe", "charge", "1000", "plan"]


def test_letters_and_digits_are_apart_and_one_spelling_stands_for_all():
    assert words("XR-2000/B, FY2015") == ["xr", "2000", "b", "fy", "2015"]
    assert words("ﬁnance infor\u00admation １２３ ١٢٣٫٥") == [
        "finance",
        "information",
        "123",
        "123.5",
    ]
    assert words("the company\u2019s plan") == ["the", "company", "plan"]


def test_what_may_be_one_word_or_two_is_both():
    assert words("infor-\nmation") == ["information", "infor", "mation"]
    assert words("12 500 euros") == ["12500", "12", "500", "euros"]


def test_marks_stay_where_they_tell_words_apart():
    assert terms("が हिन्दी résumé") == ["が", "हिन्दी", "resume"]


def test_scripts_without_spaces_become_pairs():
    assert terms("北京大学 is") == ["北京", "京大", "大学"]


def test_line_breaks_inside_a_sentence_are_undone():
    text = (
        "Eye exams\n"
        "The plan covers one eye examination a year for each\n"
        "member. Dr. Smith, e.g., charges 3.5 percent. Is that all?\n"
        "\n"
        "\u2022 Glasses are extra, at a fixed price\n"
        "\u2022 Lenses are not covered at all here"
    )
    assert sentences(text) == [
        "Eye exams The plan covers one eye examination a year for each member.",
        "Dr. Smith, e.g., charges 3.5 percent.",
        "Is that all?",
        "\u2022 Glasses are extra, at a fixed price",
        "\u2022 Lenses are not covered at all here",
    ]


def test_a_number_ends_a_sentence_but_not_a_list_mark():
    text = (
        "Cleaning is free for children under 12. Adults pay for crowns. 1. First comes the check."
    )
    assert sentences(text) == [
        "Cleaning is free for children under 12.",
        "Adults pay for crowns.",
        "1. First comes the check.",
    ]


def test_a_blank_line_ends_a_sentence():
    text = "Fees\n\nMembers pay in\nJanuary, all at once.\n \n"
    text += "A long line that is wrapped, yet not ended by a mark\n\nand goes on below"
    assert sentences(text) == [
        "Fees",
        "Members pay in January, all at once.",
        "A long line that is wrapped, yet not ended by a mark",
        "and goes on below",
    ]


def test_rows_of_a_markdown_table_are_sentences():
    row = "| A plot with a shed and a tap of its own at the southern gate | 75 euros |"
    assert sentences(f"{row}\n{row}\nas of May, by decision of all members") == [
        row, row, "as of May, by decision of all members"
    ]  # fmt: skip


def test_sentences_of_chinese_text():
    assert sentences("第一句话在这里写得比较长一些。第二句话也在这里写得比较长一些。") == [
        "第一句话在这里写得比较长一些。",
        "第二句话也在这里写得比较长一些。",
    ]


def test_text_without_end_marks_is_cut():
    pieces = sentences("word " * 500)
    assert max(map(len, pieces)) <= 400
    assert sum(piece.count("word") for piece in pieces) == 500


def test_rare_and_unknown_words_weigh_most():
    idf = Idf([["plan", "eye"], ["plan", "tooth"], ["plan"]])
    assert idf("unknown") > idf("eye") > idf("plan") > 0
    assert idf.coverage(["eye"], ["eye", "plan"]) == 1
    assert idf.coverage(["plan", "unknown"], ["plan"]) < 0.2
    assert idf.coverage([], ["plan"]) == 0
