import time

import pytest

from mmrag.answering.passages import passages, running_lines

FEES = """\
Millbrook Garden - Handbook

Fees
Fees are for the calendar year and due on 31 January. They have not risen since 2022, and nobody
pays them twice.

What about late fees?

Plot Size Full fee Reduced fee Deposit

Small bed 12 m2 36 euros 18 euros 40 euros

Full plot 80 m2 150 euros 75 euros 40 euros

Glasshouse shelf 2 m2 22 euros 11 euros none

Table 1: Yearly fees by kind of plot.

4
"""
RAIN = """\
Rain in the Garden 2024

0 20 40 60 80 100

Jan Feb Mar Apr May Jun

Rain (mm)

July was the wettest month, with 96 mm. The
barrels ran over twice.

Millbrook Garden - Handbook
"""


def texts(page, *others):
    return [each.text for each in passages(page, running_lines([page, *others]))]


def test_headings_questions_and_running_heads_are_not_quoted():
    assert texts(FEES, RAIN) == [
        "Fees are for the calendar year and due on 31 January.",
        "They have not risen since 2022, and nobody pays them twice.",
        "Table 1: Yearly fees by kind of plot.",
        "Small bed: Size 12 m2, Full fee 36 euros, Reduced fee 18 euros, Deposit 40 euros",
        "Full plot: Size 80 m2, Full fee 150 euros, Reduced fee 75 euros, Deposit 40 euros",
        "Plot Size Full fee Reduced fee Deposit: Glasshouse shelf 2 m2 22 euros 11 euros none",
    ]


def test_ticks_and_labels_of_a_chart_are_not_quoted():
    assert texts(RAIN, FEES) == [
        "July was the wettest month, with 96 mm.",
        "The barrels ran over twice.",
    ]


def test_a_row_is_quoted_with_its_heads_and_found_by_its_own_words():
    row = next(each for each in passages(FEES) if each.text.startswith("Full plot"))
    assert row.heads
    assert row.quote == "Full plot 80 m2 150 euros 75 euros 40 euros"
    assert {"reduced", "fee", "full", "plot"} <= set(row.words)


def test_rows_of_a_markdown_table():
    text = (
        "| Plot | Fee | Note |\n|---|---|---|\n| Half | 84 euros |  |\n| Full | 150 euros | paid |"
    )
    half, full = passages(text)
    assert (half.text, half.quote) == ("Half: Fee 84 euros", "| Half | 84 euros | |")
    assert full.text == "Full: Fee 150 euros, Note paid"


def test_rows_without_heads_are_left_out():
    page = "The prices rose again in spring.\nApples 12 euros\nPears 14 euros"
    assert texts(page) == ["The prices rose again in spring."]


def test_values_are_not_put_under_heads_that_may_not_be_theirs():
    """The rows' own heads have no head here, so a row with one blank has as many cells as heads."""
    page = "Gold Oil Bitcoin\n\nGold 1\n\nOil 0.6 1\n\nBitcoin 0.2 0.3 1\n\nSilver 0.4 0.5"
    assert texts(page) == [
        "Gold Oil Bitcoin: Gold 1",
        "Gold Oil Bitcoin: Oil 0.6 1",
        "Gold Oil Bitcoin: Bitcoin 0.2 0.3 1",
        "Gold Oil Bitcoin: Silver 0.4 0.5",
    ]


def test_lines_of_a_form_are_quoted_one_by_one_and_head_no_columns():
    page = (
        "Make: Vans Registration: N103JT\nYear of make: Amateur Built: Yes\n"
        "Certificate: Special Serial number: 80580\nGear: Tailwheel Seats: 2"
    )
    assert texts(page) == page.split("\n")
    assert not any(each.heads for each in passages(page))


def test_a_long_line_of_a_form_is_no_part_of_the_sentence_below():
    form = "Operator of the aircraft: Northern Gliding Association Registration: N103JT"
    sentence = "the glider was towed to the field in the morning."
    assert texts(f"{form}\n{sentence}") == [sentence, form]


def test_a_list_stays_with_what_announces_it():
    head, items = (
        "The plan does not pay for:",
        "\u2022 glasses of any kind\n\u2022 hearing aids, parts",
    )
    assert texts(f"{head}\n{items}")[0] == f"{head} {' '.join(items.split())}"


def test_a_page_of_headings_alone_gives_these():
    assert texts("Annual Report of the Garden") == ["Annual Report of the Garden"]


def test_chinese_sentences_are_quoted_without_the_title():
    page = "差旅费管理办法\n差旅费报销必须在三十天内提交给财务部。逾期提交的申请将不予受理和报销。"
    assert texts(page) == [
        "差旅费报销必须在三十天内提交给财务部。",
        "逾期提交的申请将不予受理和报销。",
    ]


@pytest.mark.parametrize("text", ["a 1 " * 50_000, "A 1\n" * 30_000, "? " * 90_000, "\n" * 200_000])
def test_hostile_pages_take_linear_time(text):
    started = time.process_time()
    passages(text, running_lines([text, text[:100]]))
    assert time.process_time() - started < 20
