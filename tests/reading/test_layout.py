"""Cleaning, cutting, and finding quotes, without any file."""

import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.reading.characters import clean
from mmrag.reading.columns import Word
from mmrag.reading.layout import Token, in_reading_order, text_of
from mmrag.reading.marking import find_quote
from mmrag.reading.passages import cut, passages_of


def line(text: str, x: float, y: float, number: int, block: int = 0) -> list[Word]:
    """Words of one line, 6 points a character, 10 high."""
    words = []
    for part in text.split(" "):
        words.append(Word(part, (x, y, x + 6 * len(part), y + 10), block, number))
        x += 6 * len(part) + 6
    return words


def test_clean_mends_characters() -> None:
    assert clean("e\ufb03cient \ufb02ow") == "efficient flow"
    assert clean("a\x00b\x07c\ud800d\u200be\ufeff") == "abcde"
    assert clean("1\u00a0000 \uf0b7 item\n\tnext") == "1 000 \u2022 item\n\tnext"
    assert clean("Ünïcödé 日本語 שלום") == "Ünïcödé 日本語 שלום"


def test_lines_that_were_wrapped_are_joined_and_others_are_not() -> None:
    words = [
        *line("This paragraph was wrapped at the right", 50, 100, 0),
        *line("edge of its column.", 50, 112, 1),
        *line("Item one", 50, 140, 2, block=1),
        *line("Item two is a little longer than that", 50, 152, 3, block=1),
    ]
    assert text_of(in_reading_order(words)) == (
        "This paragraph was wrapped at the right edge of its column.\n\n"
        "Item one\nItem two is a little longer than that"
    )


def test_hyphens_inside_a_line_stay() -> None:
    words = [
        *line("a well-known state-", 50, 100, 0),
        *line("ment on 2020-", 50, 112, 1),
        *line("2021 self-", 50, 124, 2),
        *line("Test", 50, 136, 3),
    ]
    text = text_of(in_reading_order(words))
    assert "well-known statement" in text
    assert "2020-" in text and "self-" in text  # numbers and names keep theirs


LEFT = [
    "the reservoir of the lake is filled",
    "to 62 percent so that the water of",
    "spring can be stored for months; all",
    "gates stay closed",
]
RIGHT = [
    "the reservoir of the lake is lowered",
    "to 35 percent to make room for all",
    "storms of the winter, and its gates",
    "stay open at night",
]


def columns(first: int = 1, y: float = 120) -> list[Word]:
    """Two columns of four lines each, whose lines stand side by side 14 points apart."""
    left = [line(text, 50, y + 14 * i, i, first) for i, text in enumerate(LEFT)]
    right = [line(text, 320, y + 14 * i, i, first + 1) for i, text in enumerate(RIGHT)]
    return [word for lines in (left, right) for words in lines for word in words]


def test_columns_below_a_heading_as_wide_as_both_are_read_one_after_the_other() -> None:
    heading = line("The operation of the reservoir of the lake in the seasons", 50, 100, 0)
    text = text_of(in_reading_order([*heading, *columns()]))
    assert text.split("\n\n") == [
        "The operation of the reservoir of the lake in the seasons",
        " ".join(LEFT),
        " ".join(RIGHT),
    ]


def test_headings_of_columns_are_read_with_their_column() -> None:
    above = line("Everything about the lake is told in the two columns below", 50, 80, 0)
    heads = [*line("In spring", 50, 106, 0, 8), *line("In autumn", 320, 106, 0, 9)]
    text = text_of(in_reading_order([*above, *heads, *columns()]))
    assert text.index("In spring") < text.index("gates stay closed") < text.index("In autumn")


def test_columns_below_a_list_of_bullets_are_read_one_after_the_other() -> None:
    bullets = []
    for i in range(3):
        bullets += line("*", 50, 78 + 14 * i, 2 * i, block=9)
        text = "one item of a list that is as wide as both of the columns"
        bullets += line(text, 80, 78 + 14 * i, 2 * i + 1, block=9)
    text = text_of(in_reading_order([*bullets, *columns()]))
    assert text.endswith(" ".join(LEFT) + "\n\n" + " ".join(RIGHT))


def test_long_cells_of_a_table_stay_in_rows() -> None:
    rows = [
        ("Title of each class of shares", "Name of each exchange for them"),
        ("Ordinary Shares at $0.01 each", "New York Stock Exchange Inc."),
        ("1.125% Guaranteed Notes due 2027", "New York Stock Exchange Inc."),
        ("5.450% Guaranteed Notes due 2029", "London Stock Exchange and Paris"),
    ]
    cells = [
        word
        for i, row in enumerate(rows)
        for j, cell in enumerate(row)
        for word in line(cell, 50 + 270 * j, 100 + 14 * i, j, block=i)
    ]
    assert text_of(in_reading_order(cells)).split("\n") == [" ".join(row) for row in rows]


def test_words_apart_are_read_after_the_others() -> None:
    words = [*line("before", 50, 100, 0), *line("label", 300, 101, 1), *line("after", 50, 112, 2)]
    assert text_of(in_reading_order(words, [(290, 90, 400, 200)])) == "before after\n\nlabel"


def test_the_order_does_not_depend_on_the_order_given() -> None:
    words = [w for i in range(20) for w in line(f"line {i} of the text", 50, 100 + 12 * i, i)]
    shuffled = sorted(words, key=lambda w: (hash((w.line, 7)), w.box[0]))
    assert text_of(in_reading_order(shuffled)) == text_of(in_reading_order(words))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=80), st.data())
def test_cut_covers_everything_within_the_limit(sizes, data) -> None:
    limit = data.draw(st.integers(30, 120))
    overlap = data.draw(st.integers(0, limit // 3))
    ends = data.draw(st.sets(st.integers(1, len(sizes)))) | {len(sizes)}
    ranges = cut(sizes, ends, limit, overlap)
    assert ranges[0][0] == 0 and ranges[-1][1] == len(sizes)
    for start, end in ranges:
        assert 0 <= start < end
        assert sum(sizes[start:end]) <= max(limit, sizes[end - 1] + overlap)
    for (a, b), (c, d) in itertools.pairwise(ranges):
        assert a < c <= b < d  # no hole, always on
        assert sum(sizes[c:b]) <= overlap


def test_cut_gives_passages_of_about_equal_size() -> None:
    sizes = [1] * 200
    ranges = cut(sizes, range(1, 201), limit=180, overlap=30)
    assert len(ranges) == 2
    assert [end - start for start, end in ranges] == [100, 130]


def test_passages_end_at_sentences_and_know_their_place() -> None:
    rng = random.Random(1)
    tokens = []
    for i in range(60):
        for j in range(rng.randint(4, 9)):
            text = f"word{j}" if j else f"Sentence{i}"
            tokens.append(Token(text, (50 + 40 * j, 12 * i, 85 + 40 * j, 12 * i + 10)))
        tokens[-1] = Token(tokens[-1].text + ".", tokens[-1].box)
    passages = passages_of(tokens, 60, 10, lambda box: "low" if box[1] > 300 else "high")
    assert all(p.text.startswith("Sentence") and p.text.endswith(".") for p in passages)
    assert passages[0].section == "high" and passages[-1].section == "low"
    assert passages[-1].box is not None and passages[-1].box[3] == 59 * 12 + 10
    assert passages_of(tokens, 10_000, 10, lambda box: None) == []


TEXT = in_reading_order(
    [
        *line("The deposit is paid back when the key is re-", 50, 100, 0),
        *line("turned. Members who leave should clear it", 50, 112, 1),
        *line("by 15 November, said Ann \u2018the warden\u2019.", 50, 124, 2),
    ]
)


def test_a_quote_is_found_across_lines_and_hyphens() -> None:
    boxes = find_quote(TEXT, "the key is  returned.\nMembers")
    assert len(boxes) == 2
    assert boxes[0][1] == 100 and boxes[0][2] == 50 + 6 * 44
    assert boxes[1] == (50, 112, 50 + 6 * 15, 122)


def test_case_and_punctuation_do_not_count() -> None:
    assert find_quote(TEXT, 'SAID ANN "THE WARDEN"') == find_quote(TEXT, "said Ann the warden")
    assert len(find_quote(TEXT, "said Ann the warden")) == 1


def test_parts_of_a_quote_are_found_one_by_one() -> None:
    assert len(find_quote(TEXT, "The deposit [...] by 15 November")) == 2


def test_a_quote_that_is_nearly_there_is_found_by_its_longest_run() -> None:
    assert len(find_quote(TEXT, "Members who leave should clear their plot")) == 1
    assert find_quote(TEXT, "Members who left must tidy the plot by May") == []
    assert find_quote(TEXT, "") == find_quote(TEXT, "...") == []
