"""Bounds on time, memory and pages, for each kind of file, in workers."""

import struct
import subprocess
import sys
import time
import zlib

import pytest
from PIL import Image

from mmrag.errors import ReadError
from mmrag.reading import ReadOptions, client, read_file

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def fresh_workers() -> None:
    """A worker that has recognised text holds its models in memory."""
    client.close_workers()


def grey_png(side: int, depth: int) -> bytes:
    """A square grey PNG that is small as a file and large in memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    packer = zlib.compressobj(9)
    row = b"\0" + bytes(side * depth // 8)
    pixels = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, depth, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_a_deep_image_takes_bounded_memory(tmp_path) -> None:
    """36 million pixels of 16 bits in a small file: scaled in strips, not all in float64."""
    path = tmp_path / "deep.png"
    path.write_bytes(grey_png(6_000, 16))
    assert path.stat().st_size < MIB
    errors: list[ReadError] = []
    options = ReadOptions(max_memory_bytes=650 * MIB)
    (page,) = read_file(path, tmp_path / "img", options, errors.append)
    with Image.open(page.nodes[0].image_resource.path) as image:
        assert image.size == (2000, 2000)
    assert errors == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are kept on Linux only")
def test_what_needs_more_memory_is_reported_to_be_tried_again(read, tmp_path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(grey_png(9_000, 8))
    reading = read(path, max_memory_bytes=120 * MIB)
    (error,) = reading.errors
    assert "memory" in str(error) and error.retry
    good = tmp_path / "good.txt"
    good.write_text("the same worker reads on")
    assert len(read(good).nodes) == 1


def test_a_jpeg_of_many_scans_is_refused(read, tmp_path) -> None:
    path = tmp_path / "scans.jpg"
    Image.new("RGB", (9000, 9000)).save(path, progressive=True)
    data = path.read_bytes()
    last = data.rindex(b"\xff\xda")
    path.write_bytes(data[:last] + data[last:-2] * 3000 + data[-2:])
    started = time.monotonic()
    (error,) = read(path).errors
    assert "scans" in str(error)
    assert time.monotonic() - started < 30


def test_frames_and_pages_over_the_limit_are_reported(read, make_pdf, tmp_path) -> None:
    frames = [Image.new("L", (8, 8), i) for i in range(12)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    pdf = make_pdf(lambda document: [document.new_page() for _ in range(12)])
    for path in (tmp_path / "a.tif", pdf):
        reading = read(path, max_pages=5)
        assert [page.page for page in reading.pages] == [1, 2, 3, 4, 5]
        (error,) = reading.errors
        assert "max_pages" in str(error)
    assert len(read(tmp_path / "a.tif", max_pages=12).pages) == 12


def test_a_pdf_that_states_pages_it_cannot_have_ends_soon(read, tmp_path) -> None:
    path = tmp_path / "liar.pdf"
    path.write_bytes(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[3 0 R]/Count 2000000000>>endobj\n"
        b"3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]>>endobj\n"
        b"trailer<</Root 1 0 R>>\n"
    )
    reading = read(path)
    assert len(reading.errors) < 10
    assert any("2,000,000,000" in str(error) or "page" in str(error) for error in reading.errors)


# Regular expressions: each text would take minutes where one backtracks.

LONG = 60_000
ADVERSARIAL = {
    "heading": "# a" + " " * LONG + "b\n",
    "closed heading": "# a" + " #" * LONG + "b\n",
    "blank lines": "a" + "\n \n" * LONG + "b",
    "spaces": "a." + " " * LONG + "b",
    "quotes": "." + '"' * LONG + "x",
    "dots": ".)" * LONG + "x",
    "one word": "x" * LONG,
    "fences": "~" * LONG + "\n" + "`" * LONG,
    "digits": "1," * LONG + "x",
    "bullets": "- " * LONG,
    "ideographs": "\u4e00 " * LONG,
}


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_text_that_makes_expressions_backtrack_is_read_in_linear_time(name, tmp_path) -> None:
    path = tmp_path / "a.md"
    path.write_text(ADVERSARIAL[name])
    code = (
        "import sys; from pathlib import Path; from mmrag.reading import ReadOptions\n"
        "from mmrag.reading.text import read_passages; from mmrag.lexical import sentences\n"
        "path = Path(sys.argv[1]); list(read_passages(path, ReadOptions()))\n"
        "sentences(path.read_text())"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def test_a_text_file_is_read_in_a_worker_with_a_deadline(read, tmp_path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("All work and no play. " * 400_000)
    (error,) = read(path, page_seconds=0.05).errors
    assert "took too long" in str(error) and error.retry


def test_a_deadline_is_told_whatever_the_worker_was_doing(tmp_path) -> None:
    """Among others while it imports modules, where a dump of its stack crashed it."""
    pptx = pytest.importorskip("pptx")
    path = tmp_path / "a.pptx"
    pptx.Presentation().save(path)
    options = ReadOptions()
    for number in range(30):
        hurried = ReadOptions(page_seconds=0.001 + 0.0001 * number)
        with pytest.raises(client.WorkerDied) as caught:
            list(client.ask(hurried, "office", path, tmp_path, options, 1, frozenset()))
        assert caught.value.late
