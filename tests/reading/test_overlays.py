"""Form fields, comments, attachments, XFA forms, printed page numbers."""

import pymupdf
import pytest

from mmrag.reading.outline import printed_label


def add_field(page: pymupdf.Page, kind: int, top: float, value: object, name: str) -> None:
    widget = pymupdf.Widget()
    widget.field_name, widget.field_type = name, kind
    wide = 250 if kind == pymupdf.PDF_WIDGET_TYPE_TEXT else 14
    widget.rect = pymupdf.Rect(200, top, 200 + wide, top + 14)
    widget.field_value = value
    page.insert_text((60, top + 11), name, fontsize=10)
    page.add_widget(widget)


@pytest.mark.parametrize("turn", [0, 90])
def test_fields_of_a_form_are_read(turn, make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        add_field(page, pymupdf.PDF_WIDGET_TYPE_TEXT, 100, "Quillfeather", "Surname of owner")
        add_field(page, pymupdf.PDF_WIDGET_TYPE_CHECKBOX, 140, True, "Member already")
        add_field(page, pymupdf.PDF_WIDGET_TYPE_CHECKBOX, 180, False, "Newsletter wanted")
        page.set_rotation(turn)

    reading = read(make_pdf(draw))
    assert " ".join(reading.text(1).split()) == (
        "Surname of owner Quillfeather Member already ☑ Newsletter wanted ☐"
    )
    assert reading.errors == []


def test_the_value_of_a_field_that_is_not_drawn_is_read(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        add_field(page, pymupdf.PDF_WIDGET_TYPE_TEXT, 100, "Quillfeather", "Surname")
        (widget,) = page.widgets()
        document.xref_set_key(widget.xref, "AP", "null")

    assert "Quillfeather" in read(make_pdf(draw)).text(1)


def test_comments_are_read_and_marked_as_such(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        page.insert_text((60, 80), "Draft contract for the delivery of compost.")
        page.add_freetext_annot((60, 120, 400, 160), "This is drawn on the page")
        note = page.add_text_annot((450, 80), "The price was cut to 1875 euros")
        note.set_info(title="Ann")
        mark = page.add_highlight_annot(page.search_for("delivery of compost")[0])
        mark.set_info(content="Check the moisture clause")
        page.add_highlight_annot(page.search_for("Draft")[0])

    reading = read(make_pdf(draw))
    assert reading.text(1).endswith(
        "Comment by Ann: The price was cut to 1875 euros\n\nComment: Check the moisture clause"
    )
    assert reading.text(1).count("This is drawn on the page") == 1


def test_attached_files_are_named(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        document.new_page().insert_text((60, 80), "Cover sheet")
        document.embfile_add("budget", b"9120 francs", filename="budget.txt")

    reading = read(make_pdf(draw))
    assert len(reading.pages) == 1
    (error,) = reading.errors
    assert "budget.txt" in str(error) and not error.retry


def test_files_attached_to_a_place_on_a_page_are_named(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        document.new_page().insert_text((60, 80), "Cover sheet")
        page = document.new_page()
        page.insert_text((60, 80), "The figures behind this page are attached.")
        page.add_file_annot((60, 120), b"9120 francs", "a.csv", ufilename="figures – März.csv")

    reading = read(make_pdf(draw))
    assert len(reading.pages) == 2
    (error,) = reading.errors
    assert error.page == 2 and "figures – März.csv" in str(error) and not error.retry


@pytest.mark.parametrize("needs_rendering", [True, False])
def test_a_dynamic_form_is_an_error_that_says_what_to_do(needs_rendering, make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        text = "Veuillez patienter... Adobe Reader 8 est requis"
        document.new_page().insert_text((60, 80), text)
        catalog = document.pdf_catalog()
        document.xref_set_key(catalog, "AcroForm", "<</Fields[]/XFA(x)>>")
        if needs_rendering:
            document.xref_set_key(catalog, "NeedsRendering", "true")

    reading = read(make_pdf(draw))
    assert reading.pages == []
    (error,) = reading.errors
    assert "XFA" in str(error) and "print it" in str(error)


@pytest.mark.parametrize(
    ("raw", "label"),
    [
        ("iv", "iv"),
        ("A-12", "A-12"),
        ("<FEFF0058>3", "X3"),
        ("<416E68616E672D>7", "Anhang-7"),
        ("\\376\\377\\000X3", "X3"),
        ("<FEFFE001>", None),
        ("a very long label that is no page number", None),
        ("", None),
    ],
)
def test_page_labels_are_decoded_or_dropped(raw, label) -> None:
    assert printed_label(raw) == label


def test_a_step_that_fails_costs_what_it_gives(make_pdf, read) -> None:
    """An image of no width: the engine fails over it when it looks for figures."""

    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        page.insert_text((60, 80), "The text is sound.")
        pixmap = pymupdf.Pixmap(pymupdf.csGRAY, (0, 0, 9, 9))
        page.insert_image((100, 100, 200, 200), pixmap=pixmap)
        document.xref_set_key(page.get_images()[0][0], "Width", "0")

    reading = read(make_pdf(draw))
    assert reading.text(1) == "The text is sound."
    assert "without its figures" in str(reading.errors[0])
