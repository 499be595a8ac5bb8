"""Symbols, glyph variants, and the order of scripts that run to the left."""

import random

import pytest

from mmrag.reading import bidi
from mmrag.reading.characters import clean
from mmrag.reading.symbols import DINGBATS, SYMBOL, WINGDINGS, spelt_out, table_of


@pytest.mark.parametrize(
    ("raw", "meant"),
    [
        ("Storage: \uf02d18 \uf0b0C", "Storage: −18 °C"),
        ("40 \uf0b1 0.2 mm, gap \uf0a3 3 mm", "40 ± 0.2 mm, gap ≤ 3 mm"),
        (
            "R \uf03d U \uf0b8 I; \uf061 \uf03d 30\uf0b0; 2 \uf0b4 3 m",
            "R = U ÷ I; α = 30°; 2 × 3 m",
        ),
        ("5 \uf06dm \uf0ae \uf053x \uf0b9 \uf0a5", "5 μm → Σx ≠ ∞"),
        ("\uf0b7 item", "• item"),
        ("\uf0fc paid \uf0fe yes \uf0a8 no", "✓ paid ☑ yes ☐ no"),
        ("\uf8ebx\uf8f6", "⎛x⎞"),
        ("\ufb01rst e\ufb03cient", "first efficient"),
        ("\ufe8d\ufedf\ufeb4\ufefc\ufee1", "السلام"),  # with the ligature of lam and alef
        ("\u2f08\u2f8f", "人行"),  # radicals in place of the characters
    ],
)
def test_characters_of_symbol_fonts_and_glyph_variants_are_spelt_out(raw, meant) -> None:
    assert clean(raw) == meant


def test_symbol_fonts_are_known_by_name_and_their_codes_by_table() -> None:
    assert table_of("ABCDEF+SymbolMT") is SYMBOL
    assert table_of("Wingdings-Regular") is WINGDINGS
    assert table_of("ZapfDingbats") is DINGBATS
    assert table_of("SegoeUISymbol") is table_of("NotoSansSymbols") is table_of("Helvetica") is None
    assert spelt_out("abc -\uf0b3", SYMBOL) == "αβχ −≥"
    assert spelt_out("34 8", DINGBATS) == "✓✔ ✘"


def in_order(visual: str) -> str:
    return " ".join(bidi.in_reading_order(visual.split(), str))


def test_words_of_right_to_left_rows_keep_latin_words_in_their_order() -> None:
    # As on the page, from left to right.
    assert in_order("לפני Microsoft Word את התקן") == "התקן את Microsoft Word לפני"
    assert in_order("שקלים 450 הוא") == "הוא 450 שקלים"
    assert in_order("הקורס Python 3 את") == "את Python 3 הקורס"
    assert in_order("the word שלום עולם means") == "the word עולם שלום means"


def test_the_order_is_that_of_unicode() -> None:
    """Reference: rule L2 on words, with directions written out by hand."""
    dice = random.Random(3)
    for _ in range(200):
        logical = [dice.choice(("א", "ב", "x", "y")) for _ in range(dice.randint(1, 9))]
        if logical.count("א") + logical.count("ב") <= len(logical) / 2:
            continue
        runs: list[list[str]] = []
        for word in logical:
            if runs and word.isascii() and runs[-1][-1].isascii():
                runs[-1].append(word)
            else:
                runs.append([word])
        visual = [word for run in reversed(runs) for word in run]
        assert bidi.in_reading_order(visual, str) == logical
