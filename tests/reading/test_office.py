"""Office documents, web pages, books and mail."""

import io
import zipfile
from email.message import EmailMessage

import pytest
from PIL import Image

from mmrag.ingest.plan import note_passed_over
from mmrag.ingest.progress import IngestReport
from mmrag.nodes import page_name
from mmrag.reading import files, find_files

pytest.importorskip("markitdown")


def png(colour: str, size: tuple[int, int] = (200, 120)) -> io.BytesIO:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    data.seek(0)
    return data


def places(reading) -> list[str]:
    return list(dict.fromkeys(page_name(node.metadata) for node in reading.nodes))


@pytest.fixture
def presentation(tmp_path):
    from pptx import Presentation
    from pptx.util import Inches

    deck = Presentation()
    for number, colour in enumerate(("red", "red", "blue"), start=1):
        slide = deck.slides.add_slide(deck.slide_layouts[5])
        slide.shapes.title.text = f"Title {number}"
        box = slide.shapes.add_textbox(Inches(1), Inches(2), Inches(4), Inches(1))
        box.text_frame.text = f"The well is {number * 3} metres deep."
        slide.shapes.add_picture(png(colour), Inches(1), Inches(4))
    table = deck.slides[2].shapes.add_table(2, 2, Inches(5), Inches(2), Inches(3), Inches(1)).table
    for row, column, text in ((0, 0, "Item"), (0, 1, "Cost"), (1, 0, "pump"), (1, 1, "90")):
        table.cell(row, column).text = text
    deck.slides[0].notes_slide.notes_text_frame.text = "Mention the pump_A."
    deck.save(tmp_path / "deck.pptx")
    return tmp_path / "deck.pptx"


def test_each_slide_is_a_page_with_its_table_notes_and_images(presentation, read) -> None:
    reading = read(presentation)
    assert reading.errors == []
    assert [page.page for page in reading.pages] == [1, 2, 3]
    assert places(reading) == ["slide 1", "slide 2", "slide 3"]
    assert "The well is 6 metres deep." in reading.text(2)
    assert "Mention the pump_A." in reading.text(1)  # nothing of Markdown is escaped
    assert "| Item | Cost |" in reading.text(3) and "base64" not in reading.text(3)
    # The red image stands on two slides: the first one counts.
    assert [node.metadata["page"] for node in reading.kind("figure")] == [1, 3]
    (figure, _) = reading.kind("figure")
    assert figure.metadata["caption"] == "Title 1"
    with Image.open(figure.image_resource.path) as image:
        assert image.size == (200, 120) and image.getpixel((5, 5)) == (255, 0, 0)


def test_the_number_of_slides_is_limited(presentation, read) -> None:
    reading = read(presentation, max_pages=2)
    assert [page.page for page in reading.pages] == [1, 2]
    assert "first 2 slides" in str(reading.errors[0])


def docx(path, body: str, media: dict[str, bytes]) -> None:
    """A Word document of a body, with the parts that Word itself would write."""
    office = "http://schemas.openxmlformats.org/officeDocument/2006"
    package = "http://schemas.openxmlformats.org/package/2006"
    links = "".join(
        f'<Relationship Id="r{i}" Type="{office}/relationships/image" Target="media/{name}"/>'
        for i, name in enumerate(media)
    )
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.'
        'relationships+xml"/><Default Extension="png" ContentType="image/png"/>'
        '<Default Extension="xml" ContentType="application/vnd.openxmlformats-officedocument.'
        'wordprocessingml.document.main+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{package}/relationships"><Relationship Id="d" '
        f'Type="{office}/relationships/officeDocument" Target="word/document.xml"/>'
        "</Relationships>",
        "word/_rels/document.xml.rels": f'<Relationships xmlns="{package}/relationships">{links}'
        "</Relationships>",
        "word/document.xml": '<w:document xmlns:w="http://schemas.openxmlformats.org/'
        f'wordprocessingml/2006/main" xmlns:r="{office}/relationships" xmlns:a="http://schemas.'
        'openxmlformats.org/drawingml/2006/main" xmlns:wp="http://schemas.openxmlformats.org/'
        f'drawingml/2006/wordprocessingDrawing"><w:body>{body}</w:body></w:document>',
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
        for name, data in media.items():
            archive.writestr(f"word/media/{name}", data)


def paragraph(text: str, style: str = "") -> str:
    look = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{look}<w:r><w:t>{text}</w:t></w:r></w:p>"


IMAGE = (
    '<w:p><w:r><w:drawing><wp:inline><wp:docPr id="1" name="Picture 1" descr="A pump"/>'
    '<a:graphic><a:graphicData><pic:pic xmlns:pic="http://schemas.openxmlformats.org/drawingml/'
    '2006/picture"><pic:blipFill><a:blip r:embed="r0"/></pic:blipFill></pic:pic></a:graphicData>'
    "</a:graphic></wp:inline></w:drawing></w:r></w:p>"
)


def test_a_word_document_is_cited_by_its_headings(tmp_path, read) -> None:
    body = [
        paragraph("2 Costs", "Heading1"),
        paragraph("All costs are in euros."),
        paragraph("2.1 Fees", "Heading2"),
        paragraph("The late fee is 40 euros."),
        IMAGE,
        paragraph("Figure 3: the pump of the well"),
    ]
    docx(tmp_path / "costs.docx", "".join(body), {"image1.png": png("green").getvalue()})
    reading = read(tmp_path / "costs.docx")
    assert reading.errors == []
    assert places(reading) == ["section 2 Costs", "section 2 Costs > 2.1 Fees"]
    assert any("The late fee is 40 euros." in node.text for node in reading.kind("text"))
    (figure,) = reading.kind("figure")
    assert figure.metadata["caption"] == "Figure 3: the pump of the well"
    assert page_name(figure.metadata) == "section 2 Costs > 2.1 Fees"


@pytest.mark.parametrize("broken", ["svg", "truncated"])
def test_an_image_that_cannot_be_decoded_costs_itself_alone(broken, tmp_path, read) -> None:
    data = b"<svg/>" if broken == "svg" else png("green").getvalue()[:60]
    docx(tmp_path / "a.docx", paragraph("The text stays.") + IMAGE, {"image1.png": data})
    reading = read(tmp_path / "a.docx")
    assert "The text stays." in reading.nodes[0].text
    assert "image" in str(reading.errors[0]) and len(reading.errors) == 1


def test_sheets_keep_the_headings_of_their_tables(tmp_path, read) -> None:
    from openpyxl import Workbook

    book = Workbook()
    book.active.title = "Budget"
    book.active.append(["Item", "Cost", "Note"])
    for number in range(300):
        book.active.append([f"item {number}", number * 2, None])
    book.create_sheet("Staff").append(["Ann"])
    book.save(tmp_path / "plan.xlsx")
    reading = read(tmp_path / "plan.xlsx")
    assert reading.errors == []
    assert places(reading) == ["sheet Budget", "sheet Staff"]
    budget = [n.text for n in reading.nodes if page_name(n.metadata) == "sheet Budget"]
    assert len(budget) > 3
    assert all(text.startswith("| Item | Cost | Note |\n| --- ") for text in budget)
    assert all(len(text.replace("|", " ").split()) <= 180 + 3 for text in budget)
    rows = [line for text in budget for line in text.split("\n")[2:]]
    assert [row.split("|")[1].strip() for row in rows] == [f"item {n}" for n in range(300)]
    assert "NaN" not in "".join(budget)


def test_a_web_page_gives_text_without_scripts_and_addresses(tmp_path, read) -> None:
    page = (
        "<html><head><title>Wells</title><script>evil()</script></head><body><p>Before.</p>"
        "<h1>Depth</h1><p>The <b>old</b> well, see <a href='http://x/y'>the map</a>, is "
        "caf\u00e9_deep.</p><img src='a.png' alt='a map'></body></html>"
    )
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    reading = read(tmp_path / "a.html")
    assert places(reading) == ["section Wells", "section Depth"]
    text = "\n".join(node.text for node in reading.nodes)
    assert "The old well, see the map, is café_deep." in text and "a map" in text
    assert "evil" not in text and "http" not in text


def test_a_book_is_cited_by_its_chapters(tmp_path, read) -> None:
    with zipfile.ZipFile(tmp_path / "b.epub", "w") as book:
        book.writestr("mimetype", "application/epub+zip")
        book.writestr(
            "META-INF/container.xml",
            '<container><rootfiles><rootfile full-path="c.opf"/></rootfiles></container>',
        )
        book.writestr(
            "c.opf",
            '<package xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>Wells'
            '</dc:title></metadata><manifest><item id="a" href="a.xhtml"/></manifest><spine>'
            '<itemref idref="a"/></spine></package>',
        )
        book.writestr("a.xhtml", "<html><body><h1>Water</h1><p>It is cold.</p></body></html>")
    reading = read(tmp_path / "b.epub")
    assert places(reading) == ["section Wells", "section Water"]
    assert "It is cold." in reading.nodes[-1].text


@pytest.mark.parametrize("form", ["plain", "html"])
def test_a_mail_gives_its_headings_and_text_and_names_attachments(form, tmp_path, read) -> None:
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = (
        "Ann <ann@x.org>",
        "bob@x.org",
        "The d\u00e9p\u00f4t",
    )
    text = "The well is 9 metres deep.\n"
    mail.set_content(text if form == "plain" else f"<p>{text}</p>", subtype=form)
    mail.add_attachment(b"%PDF-", maintype="application", subtype="pdf", filename="map.pdf")
    (tmp_path / "a.eml").write_bytes(mail.as_bytes())
    reading = read(tmp_path / "a.eml")
    (node,) = reading.nodes
    assert "From: Ann <ann@x.org>" in node.text and "The well is 9 metres deep." in node.text
    assert page_name(node.metadata) == "message The d\u00e9p\u00f4t"
    assert "map.pdf" in str(reading.errors[0])


def test_a_csv_file_is_a_table(tmp_path, read) -> None:
    (tmp_path / "a.csv").write_text("Item,Cost\npump,90\n")
    assert read(tmp_path / "a.csv").nodes[0].text.endswith("| pump | 90 |")


# Files that misbehave


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, read) -> None:
    docx(tmp_path / "bomb.docx", paragraph("x" * 30_000_000), {})
    assert (tmp_path / "bomb.docx").stat().st_size < 100_000
    reading = read(tmp_path / "bomb.docx", max_file_bytes=10_000_000)
    assert reading.nodes == [] and "unpacks to 30,001," in str(reading.errors[0])


@pytest.mark.parametrize("suffix", files.OFFICE_SUFFIXES)
def test_a_broken_file_is_an_error_and_the_next_one_is_read(suffix, tmp_path, read) -> None:
    broken = tmp_path / f"a{suffix}"
    broken.write_bytes(b"PK\x03\x04" + bytes(range(256)) * 20)
    reading = read(broken)
    assert len(reading.errors) == 1 and "anew" in str(reading.errors[0])
    (tmp_path / "b.csv").write_text("Item\npump\n")
    assert read(tmp_path / "b.csv").errors == []


def test_conversion_has_a_deadline(presentation, read) -> None:
    (error,) = read(presentation, page_seconds=0.001).errors
    assert "converting the file took longer than 0.005 s" in str(error) and error.retry


def test_without_the_extra_files_are_passed_over_by_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    (tmp_path / "a.docx").write_bytes(b"x")
    found = find_files([tmp_path])
    report = IngestReport()
    note_passed_over([path.as_posix() for path in found.passed_over], report)
    assert report.passed_over == [(tmp_path / "a.docx").as_posix()]
    assert "To read .docx: pip install 'mmrag[office]'" in report.notes[0]
    (error,) = find_files([tmp_path / "a.docx"]).errors
    assert "mmrag[office]" in str(error)
