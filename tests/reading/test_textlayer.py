"""Text layers that cannot be trusted, and scripts that the engine gives in another order."""

import io
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pymupdf
import pytest
from PIL import Image, ImageDraw, ImageFont

from mmrag.errors import ReadError
from mmrag.reading import file_sha256, locate_quote, save_marked_page, textlayer
from mmrag.reading.pagewords import load_words, words_path

DEJAVU = next(
    (path for path in Path("/usr/share/fonts").rglob("DejaVuSans.ttf")),
    None,
)
needs_font = pytest.mark.skipif(DEJAVU is None, reason="needs the font DejaVu Sans")

GOOD = [
    "This is the yearly report of the maintenance department, in a standard font.",
    "It has several lines of plain text that every reader can take as they are.",
]
TABLE = [
    "Item K-200 pump housing, stock 418 units, reorder level 60",
    "Item K-210 bearing ring, stock 95 units, reorder level 120",
    "The cooling unit must be replaced every eighteen months.",
]


def with_map(document: pymupdf.Document, meaning: Callable[[str], str] | None) -> None:
    """Give each font of the document a ToUnicode map, or none; ASCII and Arabic forms only."""
    font = pymupdf.Font(fontfile=str(DEJAVU))
    chars = [*map(chr, range(32, 127)), *map(chr, range(0xFE80, 0xFEFD))]
    glyphs = {char: font.has_glyph(ord(char)) for char in chars}
    rows = [
        f"<{glyph:04x}> <{meaning(char).encode('utf-16-be').hex()}>"
        for char, glyph in glyphs.items()
        if glyph and meaning is not None
    ]
    tables = [rows[i : i + 100] for i in range(0, len(rows), 100)]
    body = "".join(
        f"{len(table)} beginbfchar\n" + "\n".join(table) + "\nendbfchar\n" for table in tables
    )
    stream = (
        "/CIDInit /ProcSet findresource begin 12 dict begin begincmap /CMapName /X def\n"
        f"1 begincodespacerange <0000> <FFFF> endcodespacerange\n{body}endcmap end end"
    )
    for xref in range(1, document.xref_length()):
        kind, value = document.xref_get_key(xref, "ToUnicode")
        if kind != "xref":
            continue
        if meaning is None:
            document.xref_set_key(xref, "ToUnicode", "null")
            # Nor does the font itself say what its glyphs mean.
            document.xref_set_key(xref, "Encoding", "/Identity-H")
        else:
            document.update_stream(int(value.split()[0]), stream.encode())


def shifted(char: str) -> str:
    return chr(33 + (ord(char) - 33 + 15) % 94) if "!" <= char <= "~" else char


def mixed(document: pymupdf.Document) -> None:
    """Lines in a sound font, and three in one that says the wrong characters."""
    page = document.new_page()
    for i, line in enumerate(GOOD):
        page.insert_text((60, 100 + 18 * i), line)
    for i, line in enumerate(TABLE):
        page.insert_text((60, 200 + 18 * i), line, fontname="dj", fontfile=str(DEJAVU))
    with_map(document, shifted)


@needs_font
def test_garbled_lines_are_reported_with_their_page(make_pdf, read) -> None:
    reading = read(make_pdf(mixed))
    (error,) = reading.errors
    assert error.page == 1 and "3 of its lines" in str(error) and "--ocr" in str(error)
    assert reading.pages[0].needs_ocr
    assert reading.text(1).startswith(GOOD[0])


@pytest.mark.parametrize(
    ("lines", "n_holed"),
    [
        (["the gar\ufffden of the h\ufffd\ufffdse is open", GOOD[0]], 1),
        (["it isn\ufffdt open, and nobody that was asked knew that it wasn\ufffdt"], 0),
        (["\ufffd the garden", "\ufffd the house\ufffd", "a fi\ufffdld"], 0),
    ],
)
def test_lines_that_lack_letters_inside_of_words_are_counted(lines, n_holed, monkeypatch) -> None:
    words = [
        textlayer.Word(text, (60.0 + 40 * n, 60.0 + 20 * i, 95.0 + 40 * n, 72.0 + 20 * i), 0, i)
        for i, line in enumerate(lines)
        for n, text in enumerate(line.split())
    ]
    monkeypatch.setattr(textlayer, "_raw_words", lambda page: words)
    with pymupdf.open() as document:
        layer = textlayer.page_text(document.new_page())
    assert (layer.n_holed_lines, layer.words, layer.doubt) == (n_holed, words, "none")


@needs_font
def test_letters_that_a_font_does_not_name_are_told(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        for i, line in enumerate([*TABLE, *GOOD]):
            page.insert_text((60, 200 + 18 * i), line, fontname="dj", fontfile=str(DEJAVU))
        with_map(document, lambda char: "\ufffd" if char == "o" else char)

    reading = read(make_pdf(draw), ocr="off")
    (error,) = reading.errors
    assert error.page == 1 and "letters are missing inside of words on 1 of its lines" in str(error)
    assert "rerder level 60" in reading.text(1) and not reading.pages[0].needs_ocr


@needs_font
def test_a_garbled_page_has_no_text_layer(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        for i, line in enumerate(TABLE):
            page.insert_text((60, 200 + 18 * i), line, fontname="dj", fontfile=str(DEJAVU))
        with_map(document, shifted)

    reading = read(make_pdf(draw))
    assert reading.kind("page")[0].metadata["text_layer"] == "none"
    assert reading.text(1) == "" and reading.errors


@pytest.mark.ocr
@needs_font
def test_garbled_lines_are_recognised_and_the_others_kept(make_pdf, read) -> None:
    reading = read(make_pdf(mixed))
    assert reading.errors == [] and not reading.pages[0].needs_ocr
    text = " ".join(reading.text(1).split())
    assert GOOD[0] in text and text.count("yearly report") == 1
    assert "stock 418 units, reorder level 60" in text
    assert reading.kind("page")[0].metadata["text_layer"] == "ocr"


def scan(document: pymupdf.Document, hidden: list[str], stamp: str = "") -> None:
    image = Image.new("RGB", (1240, 1754), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(34)
    for i, line in enumerate(["Minutes of the harbour board", "at a cost of 2,350 crowns"]):
        draw.text((120, 200 + 70 * i), line, fill="black", font=font)
    data = io.BytesIO()
    image.save(data, "PNG")
    page = document.new_page()
    page.insert_image(page.rect, stream=data.getvalue())
    for i, line in enumerate(hidden):
        page.insert_text((58, 105 + 34 * i), line, fontsize=12, render_mode=3)
    page.insert_text((40, 830), stamp, fontsize=6)


STAMP = "Digitised by the archive and downloaded by user 4711, please do not redistribute " * 2
DOTS = [". , i l | - _ ; : ~ ! l i ."] * 6
LAYER = ["Minutes of the harbour board, taken by hand in the year of the great storm"] * 12


@pytest.mark.parametrize(("hidden", "stamp"), [([], ""), (DOTS, ""), ([], STAMP)])
def test_a_scan_under_a_stamp_or_dots_needs_recognition(hidden, stamp, make_pdf, read) -> None:
    reading = read(make_pdf(lambda document: scan(document, hidden, stamp)))
    assert reading.pages[0].needs_ocr
    assert ("Digitised" in reading.text(1)) == bool(stamp)


def test_a_scan_with_a_good_hidden_layer_needs_none(make_pdf, read) -> None:
    reading = read(make_pdf(lambda document: scan(document, LAYER)))
    assert not reading.pages[0].needs_ocr and "great storm" in reading.text(1)


def test_a_blank_page_needs_no_recognition(make_pdf, read) -> None:
    reading = read(make_pdf(lambda document: document.new_page()))
    assert not reading.pages[0].needs_ocr
    assert reading.kind("page")[0].metadata["text_layer"] == "none"


@pytest.mark.ocr
def test_a_scan_is_recognised_beside_its_stamp_and_in_place_of_its_layer(make_pdf, read) -> None:
    text = read(make_pdf(lambda document: scan(document, [], STAMP))).text(1)
    assert "at a cost of 2,350 crowns" in text and text.count("user 4711") == 2
    path = make_pdf(lambda document: scan(document, LAYER), "layer.pdf")
    assert "2,350 crowns" not in read(path).text(1)
    forced = read(path, ocr="force").text(1)
    assert "2,350 crowns" in forced and "great storm" not in forced


# Order


@needs_font
@pytest.mark.parametrize("spelt", [True, False])
def test_arabic_ligatures_keep_the_order_of_their_letters(spelt, make_pdf, read) -> None:
    """spelt: the font says two letters for the glyph, else the one character of the ligature."""
    visual = "\ufee1\ufefc\ufeb4\ufedf\ufe8d \ufefb"  # as drawn, from left to right

    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        page.insert_text((300, 100), visual, fontname="dj", fontfile=str(DEJAVU))
        plain = (lambda char: unicodedata.normalize("NFKC", char)) if spelt else str
        with_map(document, plain)

    assert sorted(read(make_pdf(draw)).text(1).split()) == sorted(["السلام", "لا"])


@needs_font
def test_rows_of_hebrew_keep_latin_words_in_place(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        font, x = pymupdf.Font(fontfile=str(DEJAVU)), 520.0
        for word in ["התקן", "את", "התוכנה", "Studio", "Visual", "במחשב", "450", "פעמים"]:
            drawn = word[::-1] if not word.isascii() else word
            x -= font.text_length(drawn, 12)
            page.insert_text((x, 100), drawn, fontsize=12, fontname="dj", fontfile=str(DEJAVU))
            x -= 5

    assert read(make_pdf(draw)).text(1) == "התקן את התוכנה Visual Studio במחשב 450 פעמים"


@pytest.mark.parametrize("font", ["japan", "china-s"])
def test_vertical_text_is_read_in_columns(font, make_pdf, read) -> None:
    columns = ["吾輩は猫である。", "名前はまだ無い。", "何処で生"]

    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        for i, column in enumerate(columns):
            for j, char in enumerate(column):
                page.insert_text((500 - 40 * i, 100 + 20 * j), char, fontsize=18, fontname=font)

    assert read(make_pdf(draw)).text(1).split() == columns


def test_chinese_lines_that_were_wrapped_are_joined_without_a_space(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        text = "差旅费报销必须在三十天内提交给财务部东京分公司的营业额增长了百分之十二" * 3
        box = (60, 60, 300, 700)
        document.new_page().insert_textbox(box, text, fontname="china-s", fontsize=12)

    assert " " not in read(make_pdf(draw)).text(1)


def test_symbols_of_symbol_fonts_are_read(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        page.insert_text((60, 100), "Angle")
        page.insert_text((100, 100), "a = 30", fontname="symb")
        page.insert_text((60, 130), "4", fontname="zadb")
        page.insert_text((80, 130), "Paid")

    assert read(make_pdf(draw)).text(1).split() == ["Angle", "α", "=", "30", "✔", "Paid"]


# Words kept beside the page's image


def test_quotes_are_located_and_marked_without_the_original(make_pdf, read, tmp_path) -> None:
    path = make_pdf(lambda document: document.new_page().insert_text((72, 100), GOOD[0]))
    (node,) = read(path).nodes
    image = node.image_resource.path
    from_file = locate_quote(path, 1, "the maintenance department")
    path.unlink()
    (kept,) = locate_quote(path, 1, "the maintenance department", image)
    assert kept == pytest.approx(from_file[0], abs=0.1)
    marked = save_marked_page(path, 1, [kept], tmp_path / "marked.png", image)
    with Image.open(marked) as picture, Image.open(image) as page:
        assert picture.size == page.size
        x, y = round(2 * kept[0]), round(kept[1] + kept[3])
        assert picture.convert("RGB").getpixel((x, y))[2] < 60  # yellow or orange


def test_pages_of_earlier_collections_fall_back_to_the_original(make_pdf, read, caplog) -> None:
    path = make_pdf(lambda document: document.new_page().insert_text((72, 100), GOOD[0]))
    image = read(path).nodes[0].image_resource.path
    for content in (b"", b"\x1f\x8bdamaged", None):
        if content is None:
            words_path(image).unlink()
        else:
            words_path(image).write_bytes(content)
        assert load_words(image) is None
        assert len(locate_quote(path, 1, "yearly report", image)) == 1
        assert "Index it again" in caplog.text


def test_another_file_than_the_one_indexed_is_not_opened(make_pdf, read, tmp_path) -> None:
    path = make_pdf(lambda document: document.new_page().insert_text((72, 100), GOOD[0]))
    indexed = file_sha256(path)
    assert locate_quote(path, 1, "yearly report", None, indexed)
    assert save_marked_page(path, 1, [], tmp_path / "page.png", None, indexed).is_file()
    (tmp_path / "page.png").unlink()
    for wrong, said in ((path, "not the one that was indexed"), (tmp_path / "gone", "has gone")):
        with pytest.raises(ReadError, match=said):
            locate_quote(wrong, 1, "yearly report", None, "0" * 64)
        with pytest.raises(ReadError, match=said):
            save_marked_page(wrong, 1, [], tmp_path / "page.png", None, "0" * 64)
    assert not (tmp_path / "page.png").exists()
