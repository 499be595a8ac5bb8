"""Pages of PDFs: nodes, text, labels, sections, figures, rotation, errors, deadlines."""

import io
import logging
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pymupdf
import pytest
from llama_index.core.schema import Node, NodeRelationship, TextNode
from PIL import Image

from mmrag.errors import ConfigError, ReadError
from mmrag.reading import (
    ReadOptions,
    client,
    file_sha256,
    locate_quote,
    node_id,
    read_file,
    save_marked_page,
)
from mmrag.reading.options import DEADLINE, Step

FOX = "The quick brown fox jumps over the lazy dog near the river bank."


def one_page(document: pymupdf.Document) -> None:
    document.new_page().insert_text((72, 100), FOX)


def words(document: pymupdf.Document, text: str = FOX) -> None:
    document.new_page().insert_textbox((60, 60, 530, 780), text, fontsize=11)


def test_a_page_is_a_node_with_image_text_and_metadata(make_pdf, read, tmp_path) -> None:
    path = make_pdf(one_page)
    sha = file_sha256(path)
    (node,) = read(path).nodes
    assert isinstance(node, Node)
    assert node.id_ == node_id(sha, 1, "page", 0)
    assert node.text_resource.text == FOX
    assert node.relationships[NodeRelationship.SOURCE].node_id == node_id(sha, None, "file", 0)
    image = tmp_path / "images" / sha[:16] / "p0001.png"
    assert node.metadata == {
        "file": path.as_posix(),
        "sha256": sha,
        "page": 1,
        "label": "1",
        "kind": "page",
        "page_image": image.as_posix(),
        "text_layer": "pdf",
    }
    assert node.image_resource.path == image
    assert node.image_resource.data is None
    hidden = {"page_image", "sha256", "box", "text_layer"}
    assert hidden <= set(node.excluded_embed_metadata_keys) & set(node.excluded_llm_metadata_keys)
    with Image.open(image) as picture:
        assert picture.size == (1190, 1684)
    assert {p.name for p in image.parent.iterdir()} == {"p0001.png", "p0001.words.json.gz"}


def test_nodes_survive_storage_without_bytes(make_pdf, read) -> None:
    (node,) = read(make_pdf(one_page)).nodes
    stored = node.to_json()
    assert Node.from_json(stored).image_resource.path == node.image_resource.path
    assert len(stored) < 4000


def test_ids_do_not_depend_on_the_name(make_pdf, read) -> None:
    first = make_pdf(one_page)
    second = first.with_name("b.pdf")
    second.write_bytes(first.read_bytes())
    assert [n.id_ for n in read(first).nodes] == [n.id_ for n in read(second).nodes]


def test_labels_and_sections_come_from_the_document(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        for _ in range(4):
            one_page(document)
        document.set_page_labels([{"startpage": 0, "style": "r"}, {"startpage": 2, "style": "D"}])
        document.set_toc([[1, "Plans", 1], [2, "Dental\ufb01x  care", 2], [1, "Forms", 4]])

    pages = read(make_pdf(draw)).kind("page")
    assert [p.metadata["label"] for p in pages] == ["i", "ii", "1", "2"]
    sections = [p.metadata["section"] for p in pages]
    assert sections == ["Plans", "Plans > Dentalfix care", "Plans > Dentalfix care", "Forms"]


def test_long_pages_are_cut_into_passages(make_pdf, read) -> None:
    sentences = " ".join(f"Sentence number {i} says a little more." for i in range(70))
    reading = read(make_pdf(lambda d: words(d, sentences)), passage_words=100, passage_overlap=20)
    passages = reading.kind("passage")
    assert 5 <= len(passages) <= 7
    assert all(isinstance(p, TextNode) and len(p.text.split()) <= 100 for p in passages)
    assert all(p.text.startswith("Sentence") and p.text.endswith("more.") for p in passages)
    for i in range(70):
        assert any(f"number {i} " in p.text for p in passages), i
    first, second = passages[:2]
    assert second.text.split(". ")[0] in first.text  # they overlap
    assert second.metadata["box"][1] > first.metadata["box"][1]
    assert first.metadata["page_image"] == reading.kind("page")[0].metadata["page_image"]
    assert not read(make_pdf(lambda d: words(d, sentences)), passage_words=2000).kind("passage")


def test_lines_become_paragraphs_and_broken_words_are_mended(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        lines = [
            "We have now dis-",
            "cussed the final well-known",
            "plan.",
            "",
            "Next point",
        ]
        for i, line in enumerate(lines):
            page.insert_text((72, 100 + 14 * i), line, fontname="tiro")

    text = read(make_pdf(draw)).text(1)
    assert text == "We have now discussed the final well-known plan.\n\nNext point"


def test_columns_are_read_one_after_the_other_and_table_rows_across(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        page.insert_text((150, 60), "A title across both of the columns here", fontsize=16)
        for i in range(12):
            page.insert_text((60, 100 + 14 * i), f"left column line {i} of this text")
            page.insert_text((320, 100 + 14 * i), f"right column line {i} of this text")
        for i, row in enumerate([("Plan", "Price"), ("Small", "12"), ("Large", "30")]):
            page.insert_text((60, 400 + 16 * i), row[0])
            page.insert_text((320, 400 + 16 * i), row[1])

    text = read(make_pdf(draw)).text(1)
    assert text.startswith("A title across both")
    assert text.index("left column line 11") < text.index("right column line 0")
    assert "Small 12\nLarge 30" in text


def test_pages_without_text_are_marked(make_pdf, read) -> None:
    image = Image.effect_noise((300, 400), 60)
    path = make_pdf(lambda d: d.new_page().insert_image((0, 0, 595, 842), stream=png(image)))
    reading = read(path)
    assert reading.pages[0].needs_ocr
    (node,) = reading.nodes  # the scan is the page, not a figure
    assert node.metadata["text_layer"] == "none"
    assert node.text_resource.text == ""


def test_a_page_image_is_what_the_engine_draws(samples, read) -> None:
    """Pixel by pixel, in a file that other programs open: text, charts, and a scan."""
    for path in sorted(samples.glob("*.pdf")):
        with pymupdf.open(path) as document:
            for node, page in zip(read(path, dpi=110).kind("page"), document, strict=True):
                png = Path(node.metadata["page_image"]).read_bytes()
                with Image.open(io.BytesIO(png)) as image:
                    image.verify()  # the checksums of all parts
                drawn = page.get_pixmap(matrix=pymupdf.Matrix(110 / 72, 110 / 72), alpha=False)
                with Image.open(io.BytesIO(png)) as image:
                    assert (image.mode, image.size) == ("RGB", (drawn.width, drawn.height))
                    assert image.tobytes() == drawn.samples
                assert pymupdf.Pixmap(png).samples == drawn.samples
                # On drawn text and on scans, what is left out costs little.
                assert len(png) < 1.35 * len(drawn.tobytes("png"))


def test_page_images_keep_the_pixel_limit(make_pdf, read) -> None:
    path = make_pdf(lambda d: d.new_page(width=8000, height=4000).insert_text((72, 100), FOX))
    (node,) = read(path, max_page_pixels=500_000).nodes
    with Image.open(node.image_resource.path) as image:
        assert image.size == pytest.approx((1000, 500), abs=1)


def test_images_that_are_there_are_used_again(make_pdf, read, tmp_path) -> None:
    path = make_pdf(one_page)
    image = read(path).nodes[0].image_resource.path
    stamp = image.stat().st_mtime_ns
    left_over = image.with_name(".p0002.png.123.tmp")
    left_over.write_bytes(b"half")
    read(path)
    assert image.stat().st_mtime_ns == stamp
    assert not left_over.exists()
    read(path, dpi=72)
    with Image.open(image) as picture:
        assert picture.width == 595


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


# Rotation


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_boxes_are_those_of_the_page_as_shown(turn, make_pdf, read, tmp_path) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page(width=420, height=300)
        page.insert_text((60, 60), "Water comes from the well.")
        page.draw_rect((200, 150, 330, 250), color=None, fill=(1, 0, 0))
        page.draw_circle((265, 200), 40, color=None, fill=(0, 0, 1))
        page.draw_circle((265, 200), 10, color=None, fill=(0, 1, 0))
        page.set_cropbox(pymupdf.Rect(20, 10, 410, 290))
        page.set_rotation(turn)

    path = make_pdf(draw)
    reading = read(path, dpi=72)
    assert reading.text(1) == "Water comes from the well."
    (figure,) = reading.kind("figure")
    with Image.open(reading.kind("page")[0].image_resource.path) as page:
        x0, y0, x1, y1 = figure.metadata["box"]
        assert page.getpixel((round(x0) + 5, round(y0) + 5)) == (255, 0, 0)
        assert page.getpixel((round(x1) - 6, round(y1) - 6)) == (255, 0, 0)
        boxes = locate_quote(path, 1, "from the well")
        assert len(boxes) == 1
        ink = page.convert("L").crop(tuple(round(v) for v in boxes[0]))
        assert ink.getextrema()[0] < 100
    marked = save_marked_page(path, 1, boxes, tmp_path / "out" / "marked.png")
    with Image.open(marked) as image:
        scale = image.width / page.width
        x0, y0, x1, y1 = (v * scale for v in boxes[0])
        assert image.getpixel((round(x0), round((y0 + y1) / 2)))[2] < 60  # yellow or orange
        assert image.getpixel((3, 3)) == (255, 255, 255)


def test_text_that_runs_up_the_page_is_read(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page(width=300, height=420)
        page.insert_text((60, 400), "A wide table stands on its side,", rotate=90)
        page.insert_text((80, 400), "which takes some care.", rotate=90)

    assert read(make_pdf(draw)).text(1).split() == (
        ["A", "wide", "table", "stands", "on", "its", "side,", "which", "takes", "some", "care."]
    )


# Figures


def chart(page: pymupdf.Page, top: float = 200) -> None:
    for i, high in enumerate((40, 90, 120, 70)):
        page.draw_rect(
            (110 + 50 * i, top + 130 - high, 140 + 50 * i, top + 130), fill=(0, 0.4, 0.8)
        )
    page.draw_line((100, top), (100, top + 130))
    page.draw_line((100, top + 130), (320, top + 130))


def test_charts_are_figures_with_their_caption_and_labels(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        page = document.new_page()
        page.insert_text((72, 100), "Prose that stands above the chart and says nothing of use.")
        chart(page)
        for i, name in enumerate(("Ann", "Ben", "Cem", "Dee")):
            page.insert_text((112 + 50 * i, 344), name)
        page.insert_text((100, 375), "Figure 3: Apples eaten in a week.")

    (figure,) = read(make_pdf(draw)).kind("figure")
    assert figure.metadata["caption"] == "Figure 3: Apples eaten in a week."
    assert figure.text_resource.text == figure.metadata["caption"]
    x0, y0, x1, y1 = figure.metadata["box"]
    assert 90 <= x0 <= 100 and 190 <= y0 <= 212
    assert 300 <= x1 <= 330 and 344 <= y1 <= 362  # with the names below, without the caption
    with Image.open(figure.image_resource.path) as crop:
        assert crop.width == pytest.approx((x1 - x0) * 2, abs=2)


def test_rules_frames_logos_and_backgrounds_are_no_figures(make_pdf, read) -> None:
    logo = png(Image.effect_noise((120, 120), 90))

    def draw(document: pymupdf.Document) -> None:
        for _ in range(3):
            page = document.new_page()
            page.draw_rect(page.rect, fill=(0.9, 0.95, 0.9), color=None)
            page.insert_image((450, 30, 550, 130), stream=logo)
            page.draw_line((50, 140), (550, 140))
            for row in range(8):
                for column in range(4):
                    box = pymupdf.Rect(
                        60 + 110 * column, 200 + 24 * row, 170 + 110 * column, 224 + 24 * row
                    )
                    page.draw_rect(box, fill=(0.8, 0.9, 1) if row % 2 else None)
                    if column != 2:
                        page.insert_text((box.x0 + 5, box.y0 + 16), f"cell {row}")
            page.draw_rect((60, 450, 530, 560), fill=(1, 0.9, 0.8), radius=0.1)
            page.insert_textbox((70, 460, 520, 550), (FOX + " ") * 6, fontsize=12)

    assert read(make_pdf(draw)).kind("figure") == []


def test_images_are_figures_unless_told_otherwise(make_pdf, read) -> None:
    photo = png(Image.effect_noise((200, 150), 90))
    path = make_pdf(lambda d: d.new_page().insert_image((100, 100, 300, 250), stream=photo))
    (figure,) = read(path).kind("figure")
    assert figure.metadata["box"] == pytest.approx([100, 100, 300, 250], abs=1)
    assert figure.metadata["caption"] == ""
    assert read(path, figures=False).kind("figure") == []


def test_charts_of_a_real_report_are_found(shared_data, read) -> None:
    path = shared_data / "handbook" / "pdfs" / "Financial Market Analysis Report 2023.pdf"
    reading = read(path, dpi=48)
    figures = {n.metadata["page"]: n.metadata["caption"] for n in reading.kind("figure")}
    assert sorted(figures) == [3, 4, 5, 6, 8, 9]
    assert figures[6] == "Price Changes of Oil, Gold, and Wheat"
    assert reading.kind("page")[5].metadata["section"] == "Slide 6: Commodity Market Fluctuations"
    prose = "Commodities such as oil, gold, and wheat are fundamental to the global economy"
    assert prose in reading.text(6)  # not mixed with the labels of the chart beside it


# Errors


def test_files_that_are_no_sound_pdf_give_one_clear_error(make_pdf, read, tmp_path) -> None:
    locked = make_pdf(one_page, "locked.pdf", encryption=pymupdf.PDF_ENCRYPT_AES_256, user_pw="x")
    garbage = tmp_path / "garbage.pdf"
    garbage.write_bytes(b"%PDF-1.7\nnothing of use")
    empty = tmp_path / "empty.pdf"
    empty.touch()
    named = tmp_path / "picture.pdf"
    named.write_bytes(png(Image.new("RGB", (9, 9))))
    pageless = tmp_path / "pageless.pdf"
    pageless.write_bytes(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[]/Count 0>>endobj\ntrailer<</Root 1 0 R>>\n"
    )
    expected = {
        locked: "needs a password",
        garbage: "damaged",
        empty: "0 bytes",
        named: "PNG image",
        pageless: "no pages",
        tmp_path / "missing.pdf": "cannot be opened",
    }
    for path, message in expected.items():
        reading = read(path)
        assert reading.pages == []
        assert len(reading.errors) == 1, path
        assert message in str(reading.errors[0])
        assert path.as_posix() in str(reading.errors[0])


def test_too_large_files_are_refused(make_pdf, read) -> None:
    (error,) = read(make_pdf(one_page), max_file_bytes=100).errors
    assert "max_file_bytes" in str(error)


def test_errors_are_raised_by_default(tmp_path) -> None:
    with pytest.raises(ReadError, match="cannot be opened"):
        list(read_file(tmp_path / "missing.pdf", tmp_path))


def test_a_file_that_is_cut_off_gives_its_pages_and_says_so(make_pdf, read) -> None:
    def draw(document: pymupdf.Document) -> None:
        for i in range(6):
            document.new_page().insert_text((72, 100), f"This is page {i + 1} of six.")

    path = make_pdf(draw)
    data = path.read_bytes()
    path.write_bytes(data[: data.rindex(b"xref") - 10])
    reading = read(path)
    assert reading.pages
    assert "damaged" in str(reading.errors[-1])


def slow_page(document: pymupdf.Document, levels: int = 8) -> None:
    """Three pages; the second draws forms within forms, ten at each of the levels."""
    one_page(document)
    document.new_page()
    one_page(document)
    slow = document[1]

    def stream(body: str, resources: str = "") -> int:
        xref = document.get_new_xref()
        form = "<</Type/XObject/Subtype/Form/BBox[0 0 600 800]"
        document.update_object(xref, f"{form}/Resources<<{resources}>>>>")
        document.update_stream(xref, body.encode())
        return xref

    xref = stream("0 0 1 rg 10 10 300 300 re f")
    for _ in range(levels):
        xref = stream("/A Do " * 10, f"/XObject<</A {xref} 0 R>>")
    document.xref_set_key(slow.xref, "Resources", f"<</XObject<</A {xref} 0 R>>>>")
    document.xref_set_key(slow.xref, "Contents", f"{stream('/A Do')} 0 R")


def test_a_page_that_takes_too_long_costs_that_page_only(make_pdf, read) -> None:
    reading = read(make_pdf(slow_page), page_seconds=1)
    assert [page.page for page in reading.pages] == [1, 3]
    (error,) = reading.errors
    assert error.page == 2
    assert "longer than 1 s" in str(error)


class Dying:
    """In place of the engine: dies in the given steps, however often it is started."""

    def __init__(self, deadly: set[tuple[int, str]], exit_code: int = -signal.SIGSEGV) -> None:
        self.deadly = deadly
        self.exit_code = exit_code

    def __call__(
        self, options: ReadOptions, operation: str, *arguments: object
    ) -> Iterator[object]:
        for answer in ASK(options, operation, *arguments):
            yield answer
            if isinstance(answer, Step) and (answer.page, answer.name) in self.deadly:
                raise client.WorkerDied(self.exit_code)


ASK = client.ask


def ten_pages(document: pymupdf.Document) -> None:
    for _ in range(10):
        one_page(document)


def test_a_crash_of_the_engine_costs_one_page(make_pdf, read, monkeypatch) -> None:
    monkeypatch.setattr(client, "ask", Dying({(3, "text"), (6, "text")}))
    reading = read(make_pdf(ten_pages))
    assert [page.page for page in reading.pages] == [1, 2, 4, 5, 7, 8, 9, 10]
    assert [error.page for error in reading.errors] == [3, 6]
    assert all("crashed" in str(error) and not error.retry for error in reading.errors)


def test_a_worker_that_is_killed_or_late_is_no_defect_of_the_file(
    make_pdf, read, monkeypatch
) -> None:
    for exit_code, message in ((-signal.SIGKILL, "was killed"), (DEADLINE, "longer than")):
        monkeypatch.setattr(client, "ask", Dying({(3, "text")}, exit_code))
        (error,) = read(make_pdf(ten_pages)).errors
        assert (error.page, error.retry) == (3, True)
        assert message in str(error)


def test_a_full_disk_is_no_defect_of_the_file(make_pdf, read, monkeypatch, tmp_path) -> None:
    """The images' folder is a file, so that no image can be written."""
    (tmp_path / "images").write_text("in the way")
    reading = read(make_pdf(one_page))
    assert reading.pages == []
    assert all(error.retry for error in reading.errors)


@pytest.mark.parametrize(
    ("step", "said"), [("figures", "without its figures"), ("image", "without it")]
)
def test_a_crash_in_a_step_costs_what_the_step_gives(
    step, said, make_pdf, read, monkeypatch
) -> None:
    monkeypatch.setattr(client, "ask", Dying({(3, step)}))
    reading = read(make_pdf(ten_pages))
    assert [page.page for page in reading.pages] == list(range(1, 11))
    assert all(FOX in reading.text(page) for page in range(1, 11))
    (error,) = reading.errors
    assert said in str(error)


def test_a_file_whose_pages_all_crash_is_given_up(make_pdf, read, monkeypatch) -> None:
    monkeypatch.setattr(client, "ask", Dying({(page, "text") for page in range(4, 11)}))
    reading = read(make_pdf(ten_pages))
    assert [page.page for page in reading.pages] == [1, 2, 3]
    assert [error.page for error in reading.errors] == [4, 5, 6, None]
    assert "given up" in str(reading.errors[-1])


def test_a_worker_that_is_killed_is_replaced(make_pdf, read) -> None:
    path = make_pdf(one_page)
    read(path)
    (worker,) = client._idle
    worker.process.kill()
    worker.process.wait()
    reading = read(path)
    assert len(reading.pages) == 1
    assert reading.errors == []


def test_leaving_a_file_half_read_is_fine(make_pdf, read, tmp_path) -> None:
    def draw(document: pymupdf.Document) -> None:
        for _ in range(30):
            one_page(document)

    path = make_pdf(draw)
    pages = read_file(path, tmp_path / "images")
    assert next(pages).page == 1
    pages.close()
    assert len(read(path).pages) == 30


def test_the_engine_prints_nothing(make_pdf, tmp_path) -> None:
    path = make_pdf(one_page)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    code = (
        "import sys; from mmrag.reading import read_file\n"
        f"list(read_file({str(path)!r}, {str(tmp_path)!r}, on_error=lambda e: None))\n"
        "assert 'pymupdf' not in sys.modules and 'torch' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == run.stderr == ""


def test_reading_keeps_the_log_quiet(make_pdf, read, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        read(make_pdf(one_page))
    assert caplog.records == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"dpi": 0},
        {"page_seconds": -1},
        {"passage_words": 20, "passage_overlap": 20},
        {"ocr": "yes"},
    ],
)
def test_options_that_cannot_work_are_refused(wrong) -> None:
    with pytest.raises(ConfigError, match=list(wrong)[-1]):
        ReadOptions(**wrong)


def test_options_have_sensible_defaults() -> None:
    assert ReadOptions().passage_words == 180
    assert ReadOptions().figures and ReadOptions().ocr == "auto"
    assert ReadOptions(ocr=True).ocr == "auto" and ReadOptions(ocr=False).ocr == "off"


def test_real_reports_are_read_whole(shared_data: Path, read) -> None:
    path = sorted((shared_data / "reports").glob("*.pdf"))[0]
    reading = read(path, dpi=48)
    with pymupdf.open(path) as document:
        assert [p.page for p in reading.pages] == list(range(1, len(document) + 1))
        theirs = {word for page in document for word in page.get_text().split()}
    ours = {word for node in reading.kind("page") for word in node.text_resource.text.split()}
    assert len(theirs - ours) <= 0.02 * len(theirs)  # only words broken at the end of lines
    assert reading.errors == []


def test_relative_paths_follow_the_working_directory(tmp_path, monkeypatch):
    """A worker that was started elsewhere reads the file that is meant now."""
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        pdf = pymupdf.open()
        pdf.new_page().insert_text((72, 72), f"this is folder {name}")
        pdf.save(folder / "same.pdf")
        monkeypatch.chdir(folder)
        (page,) = read_file("same.pdf", "pictures")
        assert name in page.nodes[0].text_resource.text
        assert (folder / page.nodes[0].metadata["page_image"]).is_file()
