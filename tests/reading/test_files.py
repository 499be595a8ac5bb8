"""Finding files; image files; text files."""

import os
import random
from pathlib import Path

import pytest
from llama_index.core.schema import Node, TextNode
from PIL import EpsImagePlugin, Image

from mmrag.errors import ConfigError
from mmrag.reading import ReadOptions, find_files, ocr, reader
from mmrag.reading.files import IMAGES_MARK


def touch(path: Path, data: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Finding


def test_folders_are_searched_and_named_files_are_checked(tmp_path) -> None:
    kept = [touch(tmp_path / name) for name in ("b.PDF", "sub/deep/a.md", "sub/c.jpeg", "z/a.tiff")]
    for name in (".hidden.pdf", ".git/a.pdf", "notes.odt", "sub/.cache/b.png"):
        touch(tmp_path / name)
    odd, missing = tmp_path / "notes.odt", tmp_path / "gone.pdf"
    files, errors, _ = find_files([tmp_path, str(kept[0]), odd, missing])
    assert files == sorted(kept)
    assert [error.file for error in errors] == [odd.as_posix(), missing.as_posix()]
    assert ".odt" in str(errors[0]) and "no such" in str(errors[1])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_an_error(tmp_path) -> None:
    locked = tmp_path / "locked"
    touch(locked / "a.pdf")
    locked.chmod(0)
    try:
        files, errors, _ = find_files([tmp_path])
    finally:
        locked.chmod(0o700)
    assert files == []
    assert errors[0].file == locked.as_posix()


def test_names_and_files_that_cannot_be_used_are_errors(tmp_path) -> None:
    good = touch(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).touch()
    long = tmp_path / ("x" * 300 + ".txt")
    files, errors, _ = find_files([tmp_path, long])
    assert files == [good]
    told = {error.file.rpartition("/")[2]: str(error).encode().decode() for error in errors}
    assert "too long" in told[long.name]
    assert "UTF-8" in told["caf\ufffd.txt"]
    assert "pipe" in told["pipe.txt"]


def test_page_images_of_a_collection_are_passed_over(tmp_path) -> None:
    touch(tmp_path / "library/images" / IMAGES_MARK)
    touch(tmp_path / "library/images/5d39/p0001.png")
    kept = touch(tmp_path / "library/notes.md")
    assert find_files([tmp_path]) == ([kept], [], [])


# Images


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "avif", "jp2"])
def test_an_image_file_is_one_node(suffix, read, tmp_path) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(path)
    (node,) = read(path).nodes
    assert isinstance(node, Node)
    assert node.metadata["kind"] == "picture" and node.metadata["page"] == 1
    assert node.text_resource.text == ""
    with Image.open(node.image_resource.path) as image:
        assert image.size == (60, 40)
        assert image.convert("RGB").getpixel((30, 20)) == pytest.approx((200, 30, 30), abs=6)
        assert node.image_resource.mimetype == Image.MIME[image.format]


def test_each_frame_of_a_tiff_is_a_page_and_an_animation_is_one(read, tmp_path) -> None:
    frames = [Image.new("L", (30 + i, 20), 60 * i) for i in range(3)]
    for suffix, pages in (("tif", [1, 2, 3]), ("gif", [1])):
        path = tmp_path / f"a.{suffix}"
        frames[0].save(path, save_all=True, append_images=frames[1:])
        reading = read(path)
        assert [n.metadata["page"] for n in reading.nodes] == pages
        for i, node in enumerate(reading.nodes):
            with Image.open(node.image_resource.path) as image:
                assert image.size == (30 + i, 20)
    assert len({n.id_ for n in read(tmp_path / "a.tif").nodes}) == 3


def test_images_are_turned_upright_and_kept_within_the_limit(read, tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.new("RGB", (400, 200)).save(path, exif=exif)
    (node,) = read(path, max_page_pixels=20_000).nodes
    with Image.open(node.image_resource.path) as image:
        assert image.size == (100, 200)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_that_is_ready_is_stored_as_it_is(suffix, read, tmp_path) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down, which changes no size
    noise = Image.effect_noise((90, 60), 50).convert("RGB")
    changes = (
        {"exif": exif},
        {"save_all": True, "append_images": [noise.copy()]},
        {"transparency": noise.getpixel((0, 0))},
    )
    noise.save(path, quality=60)
    (node,) = read(path).nodes
    assert Path(node.image_resource.path).read_bytes() == path.read_bytes()
    for options in changes if suffix == "png" else changes[:1]:
        noise.save(path, **options)
        (node,) = read(path).nodes
        assert Path(node.image_resource.path).read_bytes() != path.read_bytes()
    noise.rotate(180).save(path)
    (node,) = read(path, max_page_pixels=noise.width * noise.height - 1).nodes
    assert Path(node.image_resource.path).read_bytes() != path.read_bytes()
    transparent = noise.convert("RGBA" if suffix == "png" else "L")
    transparent.save(path)
    (node,) = read(path).nodes
    with Image.open(node.image_resource.path) as image:
        assert image.mode == "RGB"


def test_broken_images_are_reported(read, tmp_path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((90, 90), 50).save(whole)
    cut = touch(tmp_path / "cut.png", whole.read_bytes()[:3000])
    head = touch(tmp_path / "head.png", whole.read_bytes()[:20])
    for path in (cut, head):
        reading = read(path)
        assert reading.nodes == [] and len(reading.errors) == 1
    frames = [Image.effect_noise((50, 50), 40) for _ in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    data = (tmp_path / "a.tif").read_bytes()
    reading = read(touch(tmp_path / "cut.tif", data[: len(data) * 2 // 3]))
    assert reading.errors


def test_an_image_never_starts_another_program(read, tmp_path, monkeypatch) -> None:
    """Pillow decodes EPS by Ghostscript, whatever the file is called."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    reading = read(touch(tmp_path / "a.png", data))
    assert reading.nodes == [] and len(reading.errors) == 1
    assert not started


def test_misnamed_files_are_reported(read, make_pdf, tmp_path) -> None:
    pdf = make_pdf(lambda d: d.new_page()).read_bytes()
    image = tmp_path / "p.png"
    Image.new("L", (5, 5)).save(image)
    cases = {
        touch(tmp_path / "a.png", pdf): "PDF",
        touch(tmp_path / "a.txt", pdf): "PDF",
        touch(tmp_path / "b.md", image.read_bytes()): "PNG",
        touch(tmp_path / "c.pdf", b"PK\x03\x04 and so on"): "ZIP",
        touch(tmp_path / "d.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 90): "HEIC",
    }
    for path, title in cases.items():
        (error,) = read(path).errors
        assert title in str(error) and "rename" in str(error)


@pytest.mark.parametrize("name", ["a.pdf", "a.png", "a.txt"])
def test_a_file_that_has_gone_is_not_called_damaged(name, read, tmp_path, monkeypatch) -> None:
    """It is deleted between the look at its first bytes and reading it."""
    look = reader.file_kind

    def look_and_delete(path: Path, options: ReadOptions, name: str) -> str:
        kind = look(path, options, name)
        path.unlink()
        return kind

    path = touch(tmp_path / name, b"%PDF-1.7" if name == "a.pdf" else b"text")
    monkeypatch.setattr(reader, "file_kind", look_and_delete)
    monkeypatch.setattr(reader, "file_sha256", lambda _: "0" * 64)
    (error,) = read(path).errors
    assert "No such file" in str(error) and "damaged" not in str(error)
    assert error.retry


# Text


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", b"\xef\xbb\xbf"),
        ("utf-16-le", b"\xff\xfe"),
        ("utf-16-be", b"\xfe\xff"),
        ("utf-16-le", b""),
        ("cp1252", b""),
    ],
)
def test_text_is_decoded(encoding, mark, read, tmp_path) -> None:
    text = "Gr\u00fc\u00dfe aus K\u00f6ln, it\u2019s 5 \u20ac."
    (node,) = read(touch(tmp_path / "a.txt", mark + text.encode(encoding))).nodes
    assert isinstance(node, TextNode)
    assert node.text == text
    assert "page" not in node.metadata and node.metadata["kind"] == "text"


def test_a_damaged_byte_does_not_change_the_encoding(read, tmp_path) -> None:
    text = "Gr\u00fc\u00dfe aus K\u00f6ln, und viele mehr. " * 5
    (node,) = read(touch(tmp_path / "a.txt", text.encode() + b"\xff")).nodes
    assert node.text == text.strip()


@pytest.mark.parametrize(
    "data",
    [bytes(range(256)) * 40, random.Random(7).randbytes(4000), b"\xff\xfe\x00"],
    ids=["all bytes", "random", "half a character"],
)
def test_binary_data_is_no_text(data, read, tmp_path) -> None:
    reading = read(touch(tmp_path / "a.txt", data))
    assert reading.nodes == []
    assert "not text" in str(reading.errors[0])


def test_white_space_only_is_reported(read, tmp_path) -> None:
    assert "no text" in str(read(touch(tmp_path / "a.txt", b" \r\n\t\n")).errors[0])


def test_markdown_is_cut_at_its_headings(read, tmp_path) -> None:
    text = "intro\n\n# One\nfirst\n\n## Two ##\nsecond\n```\n# no heading\n```\n\n# Three\n" + (
        "A sentence of six small words. " * 70
    )
    nodes = read(touch(tmp_path / "a.md", text.encode()), passage_words=100).nodes
    sections = [n.metadata.get("section") for n in nodes]
    assert sections[:3] == [None, "One", "One > Two"]
    assert set(sections[3:]) == {"Three"} and len(nodes) >= 8
    assert nodes[2].text == "## Two ##\nsecond\n```\n# no heading\n```"
    assert all(len(n.text.split()) <= 100 for n in nodes)
    assert len({n.id_ for n in nodes}) == len(nodes)


def test_a_large_text_is_cut_in_reasonable_time(read, tmp_path) -> None:
    path = touch(tmp_path / "a.txt", b"All work and no play makes Jack a dull boy. " * 20_000)
    assert len(read(path).nodes) == pytest.approx(200_000 / 150, rel=0.1)


# Recognition


def test_ocr_without_its_extra_says_what_to_install(read, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(ocr, "available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'mmrag\[ocr\]'"):
        read(touch(tmp_path / "a.txt"), ocr="force")
