"""Numbers by value: every pair is written out by hand, with what a reader would say."""

import time

import pytest

from mmrag.numerals import decimal_mark, missing_numbers, number, numbers, numerals, plain_digits

SAME = [
    ("Die Kaution ist 1.000 Euro.", "Die Kaution ist 1000 Euro."),
    ("Die Kaution ist 1.000 Euro.", "The deposit is 1,000 euros."),
    ("Die Gebühr ist 1.234,56 Euro.", "The fee is 1,234.56 euros."),
    ("Das Gerät wiegt 12,5 kg.", "It weighs 12.5 kg."),
    ("La hauteur est de 12 500 mm.", "La hauteur est de 12500 mm."),
    ("La hauteur est de 12\u202f500 mm.", "The height is 12,500 mm."),
    ("Die Miete ist 1\u2019250 Franken.", "Die Miete ist 1250 Franken."),
    ("Die Miete ist 1'250.50 Franken.", "The rent is 1,250.5 francs."),
    ("The grant is 1,00,000 rupees.", "The grant is 100,000 rupees."),
    ("料金は１２３００円です。", "料金は12300円です。"),
    ("الرسوم ٢٥٠ ريالا", "الرسوم 250 ريالا"),
    ("الرسوم ١٬٢٥٠٫٥ ريالا", "The fee is 1,250.5 riyals."),
    ("वार्षिक शुल्क ५०० रुपये है।", "वार्षिक शुल्क 500 रुपये है।"),
    ("The toll is 0.50 euro.", "The toll is 0.5 euro."),
    ("The toll is 2.50 euro.", "The toll is 2,5 euro."),
    ("Factor 1.0 here.", "Factor 1 here."),
    ("It is \u221218 °C there.", "It is -18 °C there."),
    ("It is minus 18 degrees.", "It is -18 degrees."),
    ("It is 18 degrees below zero.", "It is -18 degrees."),
    ("From 10 -18 mm.", "It is 18 mm."),
    ("10\u201318 mm.", "It is 18 mm."),
    ("Covid-19 came.", "Covid 19 came."),
    ("On 2024-03-01 it ends.", "It ends on 1 March 2024."),
    ("Am 01.03.2024 endet es.", "It ends on 1 March 2024."),
    ("Revenue was 3.2 million dollars.", "Revenue was 3,200,000 dollars."),
    ("The period is three months.", "The period is 3 months."),
    ("差旅费必须在三十天内提交。", "差旅费必须在30天内提交。"),
    ("The area is 25 m².", "The area is 25 m2."),
    ("The limit is 5² here.", "The limit is 5 here."),
    ("12 500 7 300", "Both 12,500 and 7,300 are there."),
    ("12 500 7 300", "There are 12 and 500 there."),
    ("1.000", "1000"),
    ("1.000", "1"),
    ("Install release 2.10 of it.", "Release 2.10 is the one."),
    ("See 10.0.0.1 there.", "It is 10.0.0.1."),
]
OTHER = [
    ("The dose is 1,5 mg.", "The dose is 15 mg."),
    ("Das Gerät wiegt 12,5 kg.", "Das Gerät wiegt 125 kg."),
    ("Das Gerät wiegt 12,5 kg.", "It weighs 12 kg."),
    ("It is -18 degrees.", "It is 18 degrees."),
    ("It is \u221218 °C.", "It is 18 °C."),
    ("It is minus 18 degrees.", "It is 18 degrees."),
    ("It is 18 degrees.", "It is -18 degrees."),
    ("Factor 1.0 here.", "Factor 10 here."),
    ("Install release 2.10 of it.", "Install release 2.1 of it."),
    ("Install release 1.234 of it.", "Install release 1234 of it."),
    ("The wall is 1,234 mm long.", "The wall is 1.234 mm long."),
    ("Die Kaution ist 1.000 Euro.", "The deposit is 1 euro."),
    ("La hauteur est de 12 500 mm.", "La hauteur est de 500 mm."),
    ("12\u202f500 mm", "500 mm"),
    ("The limit is 5² here.", "The limit is 52 here."),
    ("1.234.567 Euro", "1.234 Euro"),
    ("The toll is 0.05 euro.", "The toll is 0.5 euro."),
    ("料金は１２３００円です。", "料金は1230円です。"),
    ("See 10.0.0.1 there.", "It is 10.0.0.2."),
]


@pytest.mark.parametrize(("source", "claim"), SAME)
def test_one_number_in_two_spellings(source, claim):
    assert missing_numbers(claim, source) == []


@pytest.mark.parametrize(("source", "claim"), OTHER)
def test_another_number(source, claim):
    assert missing_numbers(claim, source)


def test_what_is_missing_is_named_as_it_is_written():
    assert missing_numbers("It costs -1,5 or 20 euros.", "It costs 20 euros.") == ["-1,5"]


def test_numbers_have_one_spelling():
    assert numbers("$1,250.50 and 1250.50 in 2021.") == {"1250.5", "2021"}
    spellings = ("1,577", "1.577", "1577", "1.577,00", "1'577", "01577")
    assert {number(spelling) for spelling in spellings} == {"1577"}


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("The wall is 1.234 mm long.", "."),
        ("Die Wand ist lang.", ","),
        ("1,5 und mehr", ","),
        ("The dose is 1,5 mg of it.", ","),
        ("The dose is 1,5 or 2.5 mg of it.", "."),
        ("1.234", None),
    ],
)
def test_how_a_text_writes_decimals(text, mark):
    assert decimal_mark(text) == mark


def test_digits_of_other_scripts_are_plain():
    assert plain_digits("１２ ٢٥ ५० 10⁶ m²") == "12 25 50 10 6 m2"


@pytest.mark.parametrize(
    "text",
    [
        *("1" * 200_000, "111 " * 50_000, "1.1" * 70_000, "1,234." * 40_000, "1'" * 100_000),
        *("- " * 100_000, "十" * 200_000, "1\u00a0" * 100_000, "0." * 100_000, "m 2" * 70_000),
    ],
)
def test_hostile_text_takes_linear_time(text):
    """A quadratic pattern takes minutes for these; half the text tells nothing then."""
    started = time.process_time()
    numerals(text)
    missing_numbers("5", text)
    assert time.process_time() - started < 20
