"""Tests of contents and of loading images."""

import base64
import io
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrag.content import (
    Clip,
    Content,
    ImageLimits,
    as_content,
    describe,
    image_size,
    load_image,
)
from mmrag.errors import ContentError

RED, GREEN, BLUE, WHITE, BLACK = (
    (255, 0, 0),
    (0, 255, 0),
    (0, 0, 255),
    (255, 255, 255),
    (0, 0, 0),
)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(size=(40, 30)) -> Image.Image:
    return Image.effect_noise(size, 50).convert("RGB")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def declared_png(width: int, height: int, *extra: bytes) -> bytes:
    """A PNG of a few bytes that declares any size."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0\0\0\0"))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + pixels + chunk(b"IEND", b"")


# --- Content ----------------------------------------------------------------------------------


def test_a_clip_has_a_time_for_each_frame():
    clip = Clip(["0.jpg", "1.jpg"], [0, 1.5])
    assert Content("words", "page.png", clip=clip).modality == "clip"
    assert as_content(clip) == as_content({"clip": clip}) == Content(clip=clip)
    for frames, seconds in ([], []), (["0.jpg"], [0, 1]), (["a", "b"], [1, 0]), (["a"], [-1]):
        with pytest.raises(ContentError):
            Clip(frames, seconds)
    with pytest.raises(ContentError):
        Clip(["a", "b"], [0, float("nan")])
    with pytest.raises(ContentError, match="must be a Clip"):
        Content(clip=["0.jpg", "1.jpg"])


def test_modality_tells_text_image_and_both():
    assert Content(text="a").modality == "text"
    assert Content(text="").modality == "text"
    assert Content(image="a.png").modality == "image"
    assert Content(text="", image="a.png").modality == "fused"


def test_images_are_always_a_tuple():
    array = np.zeros((2, 2), np.uint8)
    assert Content(text="a").images == ()
    assert Content(image="a.png").images == ("a.png",)
    assert Content(image=["a.png", "b.png"]).images == ("a.png", "b.png")
    assert Content(image=array).images[0] is array


@pytest.mark.parametrize("wrong", [{}, {"image": []}, {"text": 3}, {"text": b"a"}])
def test_content_needs_a_text_or_an_image(wrong):
    with pytest.raises(ContentError):
        Content(**wrong)


def test_plain_values_become_contents():
    image = noise()
    assert as_content("a.png") == Content(text="a.png")
    assert as_content(Path("a.png")) == Content(image=Path("a.png"))
    assert as_content(image).image is image
    assert as_content(b"raw").modality == "image"
    assert as_content({"text": "a", "image": image}).modality == "fused"
    assert as_content({"text": "a", "instruction": "i"}).instruction == "i"
    content = Content(text="a")
    assert as_content(content) is content


@pytest.mark.parametrize("wrong", [None, 3, ["a"], {"text": "a", "picture": "b"}])
def test_anything_else_is_refused(wrong):
    with pytest.raises(ContentError):
        as_content(wrong)


# --- where an image comes from ---------------------------------------------------------------


def sources(raw: bytes, folder: Path):
    path = folder / "picture.png"
    path.write_bytes(raw)
    url = "data:image/png;base64," + base64.b64encode(raw).decode()
    return {
        "path": path,
        "str": str(path),
        "bytes": raw,
        "bytearray": bytearray(raw),
        "BytesIO": io.BytesIO(raw),
        "PIL": Image.open(io.BytesIO(raw)),
        "data URL": url,
        "wrapped data URL": "DATA:image/png;base64," + base64.encodebytes(raw).decode(),
        "array": np.asarray(Image.open(io.BytesIO(raw))),
    }


def test_every_source_gives_the_same_image(tmp_path):
    truth = noise()
    for name, source in sources(encoded(truth), tmp_path).items():
        loaded = load_image(source)
        assert loaded.mode == "RGB", name
        assert np.array_equal(np.asarray(loaded), np.asarray(truth)), name
        assert image_size(source) == truth.size, name


def test_stream_is_read_from_its_start_and_twice():
    stream = io.BytesIO(encoded(noise()))
    stream.read()
    assert load_image(stream).size == load_image(stream).size == (40, 30)


def test_image_of_the_caller_stays_open_and_unchanged():
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    load_image(image).putpixel((0, 0), RED)
    assert image.mode == "RGBA"
    assert image.getpixel((0, 0)) == (0, 0, 0, 0)
    rgb = Image.new("RGB", (2, 2))
    load_image(rgb).putpixel((0, 0), RED)
    assert rgb.getpixel((0, 0)) == BLACK


@pytest.mark.parametrize(
    "source", [None, 3, memoryview(b"a"), "no/such.png", "", "a\0b", "a" * 5000]
)
def test_missing_or_unknown_source_is_refused(source):
    for function in (load_image, image_size):
        with pytest.raises(ContentError) as error:
            function(source)
        assert len(str(error.value)) < 500


def test_folder_is_no_image(tmp_path):
    with pytest.raises(ContentError, match="no such image file"):
        load_image(tmp_path)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/png;base64,###",
        "data:image/png;base64,é",
        "data:image/png;base64,",
    ],
)
def test_broken_data_url_is_refused_without_repeating_it(url):
    for function in (load_image, image_size):
        with pytest.raises(ContentError) as error:
            function(url)
        assert "###" not in str(error.value)
    assert describe("DATA:image/png;base64,AAAA") == "image from a data URL"


# --- web addresses ----------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["http://x/a.png", "HTTPS://x/a.png", "s3://x/a.png"])
def test_web_address_is_not_followed_without_a_loader(url, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was tried"))
    for function in (load_image, image_size):
        with pytest.raises(ContentError, match="not followed"):
            function(url)


def test_web_address_is_read_by_the_loader():
    asked = []

    def loader(url: str) -> bytes:
        asked.append(url)
        return encoded(noise())

    assert load_image("https://x/a.png", loader=loader).size == (40, 30)
    assert asked == ["https://x/a.png"]


def test_limits_hold_for_what_the_loader_brings():
    with pytest.raises(ContentError, match="over the limit"):
        load_image("https://x/a", loader=lambda _: b"x" * 99, limits=ImageLimits(max_bytes=98))


def test_loader_that_fails_or_returns_no_bytes_is_a_content_error():
    class OddError(Exception):
        pass

    def broken(url: str) -> bytes:
        raise OddError("gone")

    with pytest.raises(ContentError, match="gone"):
        load_image("https://x/a.png", loader=broken)
    with pytest.raises(ContentError, match="must return bytes"):
        load_image("https://x/a.png", loader=lambda _: "text")


# --- what it looks like -----------------------------------------------------------------------


def two_by_three(turn: int, form: str) -> bytes:
    """An image whose upright form is 2x3 with a red, a green and a blue row; stored turned."""
    upright = Image.new("RGB", (2, 3))
    upright.putdata([RED, RED, GREEN, GREEN, BLUE, BLUE])
    inverse = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[turn]
    stored = upright if inverse is None else upright.transpose(inverse)
    exif = Image.Exif()
    exif[0x0112] = turn
    return encoded(stored, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(turn, form):
    raw = two_by_three(turn, form)
    image = load_image(raw)
    assert image.size == image_size(raw) == (2, 3)
    assert [image.getpixel((0, y)) for y in range(3)] == [RED, GREEN, BLUE]


def test_jpeg_from_a_phone_is_turned_upright():
    stored = Image.new("RGB", (64, 32), "red")
    stored.paste((0, 0, 255), (32, 0, 64, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 90 degrees clockwise
    image = load_image(encoded(stored, "JPEG", exif=exif, quality=95))
    assert image.size == (32, 64)
    top, bottom = image.getpixel((16, 8)), image.getpixel((16, 56))
    assert top[0] > 200 > 50 > top[2]
    assert bottom[2] > 200 > 50 > bottom[0]


def test_png_that_states_its_orientation_after_the_pixels_is_turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    block = chunk(b"eXIf", exif.tobytes()[6:])
    raw = encoded(Image.new("RGB", (4, 2)))
    assert load_image(raw[:-12] + block + raw[-12:]).size == (2, 4)


@pytest.mark.parametrize("value", [0, 9, 99])
def test_unknown_orientation_changes_nothing(value):
    exif = Image.Exif()
    exif[0x0112] = value
    raw = encoded(Image.new("RGB", (4, 2)), exif=exif)
    assert load_image(raw).size == image_size(raw) == (4, 2)


def test_size_is_read_without_decoding(monkeypatch):
    raw = encoded(noise())
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    assert image_size(raw) == (40, 30)


def palette(**options) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    return encoded(image, **options)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (encoded(Image.new("RGBA", (2, 1), (0, 0, 0, 0))), [WHITE, WHITE]),
        (encoded(Image.new("RGBA", (2, 1), (0, 0, 0, 255))), [BLACK, BLACK]),
        (encoded(Image.new("RGBA", (2, 1), (255, 0, 0, 51))), [(255, 204, 204)] * 2),
        (encoded(Image.new("LA", (2, 1), (0, 0))), [WHITE, WHITE]),
        (encoded(Image.new("LA", (2, 1), (0, 255))), [BLACK, BLACK]),
        (encoded(Image.new("RGBA", (2, 1), (0, 0, 0, 0)), "WEBP", lossless=True), [WHITE] * 2),
        (Image.new("RGBA", (2, 1), (0, 0, 0, 0)).convert("PA"), [WHITE, WHITE]),
        (Image.new("RGBA", (2, 1), (0, 0, 0, 0)).convert("RGBa"), [WHITE, WHITE]),
        (palette(), [RED, GREEN]),
        (palette(transparency=0), [WHITE, GREEN]),
        (palette(transparency=b"\xff\x33"), [RED, (204, 255, 204)]),
        (palette(form="GIF", transparency=1), [RED, WHITE]),
        (encoded(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(1, 2, 3)), [WHITE, WHITE]),
        (encoded(Image.new("RGB", (2, 1), (1, 2, 3)), transparency=(3, 2, 1)), [(1, 2, 3)] * 2),
        (encoded(Image.new("L", (2, 1), 7), transparency=7), [WHITE, WHITE]),
        (encoded(Image.new("1", (2, 1), 1)), [WHITE, WHITE]),
        (encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [RED, RED]),
        (Image.new("HSV", (2, 1), (0, 255, 255)), [RED, RED]),
    ],
)
def test_modes_become_rgb_with_transparent_parts_on_white(source, expected):
    image = load_image(source)
    assert image.mode == "RGB"
    assert [image.getpixel((x, 0)) for x in range(2)] == expected


def test_cmyk_jpeg_is_not_inverted():
    image = load_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    red, green, blue = image.getpixel((4, 4))
    assert red > 240 and green < 15 and blue < 15


# --- deep images ----------------------------------------------------------------------------


def big_endian_tiff(values: list[int]) -> bytes:
    """One row of 16-bit grey, most significant byte first, written by hand."""
    data = struct.pack(f">{len(values)}H", *values)
    tags = [(256, len(values)), (257, 1), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, 1), (279, len(data))]
    head = b"MM" + struct.pack(">HI", 42, 8 + len(data)) + data + struct.pack(">H", len(tags))
    return head + b"".join(struct.pack(">HHIHH", t, 3, 1, v, 0) for t, v in tags) + bytes(4)


DEEP = np.array([[0, 257, 32768, 65535]], np.uint16)


@pytest.mark.parametrize(
    "source",
    [
        encoded(Image.fromarray(DEEP)),
        encoded(Image.fromarray(DEEP), "TIFF"),
        encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"),
        big_endian_tiff([0, 257, 32768, 65535]),
        Image.fromarray(DEEP),
        DEEP,
        DEEP.astype(">u2"),
    ],
)
def test_sixteen_bits_are_scaled_not_clipped(source):
    grey = np.asarray(load_image(source))[0]
    assert grey[:, 0].tolist() == [0, 1, 128, 255]
    assert (grey == grey[:, :1]).all()


def test_float_images_are_fractions_of_white():
    values = np.array([[0, 0.5, 1, np.nan]], np.float32)
    raw = encoded(Image.fromarray(values), "TIFF")
    assert np.asarray(load_image(raw))[0, :, 0].tolist() == [0, 128, 255, 0]


def test_wide_integers_that_fit_a_byte_are_taken_as_bytes():
    raw = encoded(Image.fromarray(np.array([[0, 100, 255]], np.int32)), "TIFF")
    assert np.asarray(load_image(raw))[0, :, 0].tolist() == [0, 100, 255]


def test_sixteen_bit_grey_declared_transparent_is_white():
    raw = encoded(Image.fromarray(DEEP), transparency=257)
    assert np.asarray(load_image(raw))[0, :, 0].tolist() == [0, 255, 128, 255]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_taken(form):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    raw = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(raw)).n_frames == 2
    assert load_image(raw).getpixel((0, 0)) == RED


# --- arrays -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 3), 9, np.uint8), (9, 9, 9)),
        (np.full((2, 3, 1), 9, np.uint8), (9, 9, 9)),
        (np.full((2, 3, 3), 9, np.uint8), (9, 9, 9)),
        (np.zeros((2, 3, 4), np.uint8), WHITE),
        (np.ones((2, 3), bool), WHITE),
        (np.full((2, 3, 3), 0.5), (128, 128, 128)),
        (np.full((2, 3), 1, np.float16), WHITE),
        (np.asfortranarray(np.full((2, 3, 3), 7, np.uint8)), (7, 7, 7)),
        (np.full((4, 6, 3), 7, np.uint8)[::2, ::-2], (7, 7, 7)),
    ],
)
def test_kinds_of_arrays(array, expected):
    image = load_image(array)
    assert image.size == (3, 2)
    assert image.getpixel((2, 1)) == expected


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(4, np.uint8),
        np.zeros((3, 4, 5), np.uint8),
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((2, 2), np.int64),
        np.full((2, 2), 2.0),
        np.full((2, 2), -0.1),
        np.full((2, 2), np.nan),
        np.full((2, 2), "a"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array):
    with pytest.raises(ContentError, match="array of shape"):
        load_image(array)


# --- limits and damage ------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_huge_declared_png_is_refused_before_decoding(size, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("decoded"))
    for function in (load_image, image_size):
        with pytest.raises(ContentError, match="pixels"):
            function(declared_png(*size))


def test_decompression_bombs_in_side_chunks_are_refused():
    for kind in (b"zTXt", b"iCCP"):
        bomb = chunk(kind, b"k\0\0" + zlib.compress(bytes(100_000_000)))
        for function in (load_image, image_size):
            with pytest.raises(ContentError, match="too large"):
                function(declared_png(1, 1, bomb))


def test_limit_on_pixels_counts_the_area_and_can_be_raised():
    image = noise()
    assert load_image(image, limits=ImageLimits(max_pixels=1200)).size == (40, 30)
    for source in (image, encoded(image), np.asarray(image)):
        with pytest.raises(ContentError, match=r"40x30 is 1,200 pixels.*max_pixels"):
            load_image(source, limits=ImageLimits(max_pixels=1199))


def test_limit_on_bytes_holds_for_every_encoded_source(tmp_path):
    raw = encoded(noise())
    limits = ImageLimits(max_bytes=len(raw) - 1)
    for name, source in sources(raw, tmp_path).items():
        if name in ("PIL", "array"):
            continue
        with pytest.raises(ContentError, match="over the limit"):
            load_image(source, limits=limits)
    assert load_image(raw, limits=ImageLimits(max_bytes=len(raw))).size == (40, 30)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_truncated_image_is_refused(form, share):
    raw = encoded(noise((64, 64)), form)
    with pytest.raises(ContentError):
        load_image(raw[: int(len(raw) * share)])


def test_eps_is_refused_because_it_starts_a_program():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ContentError, match="none of the formats"):
        load_image(eps)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "AVIF", "ICO"])
def test_damaged_images_raise_nothing_but_content_errors(form):
    rng = random.Random(form)
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = encoded(noise(), form, **({"exif": exif} if form not in ("GIF", "ICO") else {}))
    refused = 0
    for _ in range(200):
        raw = bytearray(whole)
        reach = rng.choice((64, len(raw)))
        for _ in range(rng.choice((1, 4, 20))):
            raw[rng.randrange(min(reach, len(raw)))] = rng.randrange(256)
        for function in (load_image, image_size):
            try:
                function(bytes(raw))
            except ContentError:
                refused += 1
    assert refused


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_named_pipe_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(ContentError, match="no such image file"):
        load_image(pipe)
