"""Videos: frames where the picture changes, and what subtitles say meanwhile."""

import io

import numpy as np
import pytest
from made_videos import make_video, slide
from PIL import Image

from mmrag import UniversalIndex
from mmrag.nodes import page_name
from mmrag.reading import find_files
from mmrag.reading.video import clock

av = pytest.importorskip("av")

SRT = """1
00:00:01,000 --> 00:00:04,000
Welcome to the <i>garden</i>.

2
00:00:30,000 --> 00:00:34,000
The well is nine metres deep.

3
00:01:05,500 --> 00:01:08,500
Seeds are sown in May.
"""
SCENES = (("white", 50), ("yellow", 60), ("cyan", 20))


@pytest.fixture(scope="module", params=[10, 10_000], ids=["key frames", "one key frame"])
def talk(request, tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "talk.mp4", SCENES, request.param)


def with_subtitles(talk, folder, name="talk.srt", text=SRT):
    path = folder / "talk.mp4"
    path.write_bytes(talk.read_bytes())
    (folder / name).write_text(text)
    return path


def told(reading):
    return [
        (page_name(node.metadata), node.get_content().split("\n"))
        for node in reading.nodes
        if node.metadata["kind"] == "page"
    ]


def test_frames_come_where_the_picture_changes(talk, read):
    reading = read(talk)
    assert reading.errors == []
    # The second slide comes at 0:50 and the third at 1:50: stretches begin each 20 seconds.
    assert [name for name, _ in told(reading)] == ["at 0:00", "at 1:00", "at 2:00"]
    for node, (colour, _) in zip(reading.nodes, SCENES, strict=True):
        with Image.open(node.image_resource.path) as image:
            shown = np.asarray(image.convert("RGB"), dtype=int)
        assert abs(shown[0, 0] - Image.new("RGB", (1, 1), colour).getpixel((0, 0))).max() < 12
    assert [node.metadata["start"] for node in reading.nodes] == [0, 60, 120]
    assert all(page.needs_ocr for page in reading.pages)


def test_what_is_said_belongs_to_the_frame_that_is_shown(talk, tmp_path, read):
    reading = read(with_subtitles(talk, tmp_path))
    assert reading.errors == []
    assert told(reading) == [
        ("at 0:00", ["Welcome to the garden.", "", "The well is nine metres deep."]),
        ("at 1:00", ["Seeds are sown in May."]),
        ("at 2:00", [""]),
    ]
    assert not any(page.needs_ocr for page in reading.pages)


def test_a_picture_that_stays_is_cited_by_the_minute(tmp_path, read):
    path = make_video(tmp_path / "talk.mp4", [("white", 130)], 20)
    cues = (f"{n // 60:02}:{n % 60:02}.000 --> 02:10.000\nword{n}" for n in range(5, 130, 15))
    (tmp_path / "talk.en.vtt").write_text("\n\n".join(["WEBVTT", *cues]))
    reading = read(path)
    assert [(name, " ".join(said).split()) for name, said in told(reading)] == [
        ("at 0:00", ["word5", "word20", "word35", "word50"]),
        ("at 1:00", ["word65", "word80", "word95", "word110"]),
        ("at 2:00", ["word125"]),
    ]
    assert len({node.image_resource.path for node in reading.nodes}) == 1


def test_captions_that_roll_say_each_line_once(talk, tmp_path, read):
    rolling = """WEBVTT

00:01.000 --> 00:03.000
the first line

00:03.000 --> 00:05.000
the first line
the second line
"""
    reading = read(with_subtitles(talk, tmp_path, "talk.vtt", rolling))
    assert told(reading)[0][1] == ["the first line the second line"]


def test_subtitles_inside_the_file_are_read(tmp_path, read):
    path = tmp_path / "inside.mkv"
    source = av.open(io.BytesIO(SRT.encode()), "r", format="srt")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        text = container.add_stream_from_template(source.streams.subtitles[0])
        for _ in range(150):
            container.mux(stream.encode(av.VideoFrame.from_image(slide("white", 1))))
        container.mux(stream.encode(None))
        for packet in source.demux():
            if packet.pts is not None:
                packet.stream = text
                container.mux(packet)
    first, *_ = told(read(path))
    assert "The well is nine metres deep." in first[1]


def test_bad_subtitles_are_told_and_the_video_is_read(talk, tmp_path, read):
    path = with_subtitles(talk, tmp_path)
    (tmp_path / "talk.srt").write_bytes(bytes(range(256)) * 20)
    reading = read(path)
    assert len(told(reading)) == 3
    (error,) = reading.errors
    assert "the subtitles in talk.srt cannot be read" in str(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\0\0\0\x18ftypmp42" + bytes(200), "cannot be opened"),
        (b"#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n", "cannot be opened"),
        (b"\x89PNG\r\n\x1a\n" + bytes(50), "the content is a PNG image"),
    ],
    ids=["damaged", "playlist", "image"],
)
def test_what_is_no_video_is_an_error(content, said, tmp_path, read):
    path = tmp_path / "not.mp4"
    path.write_bytes(content)
    reading = read(path)
    assert not reading.pages
    assert said in str(reading.errors[0])


def test_a_list_of_other_files_opens_none_of_them(talk, tmp_path, read):
    """FFmpeg tells a format by content: a list would have it read any file of the machine."""
    (tmp_path / "private.mp4").write_bytes(talk.read_bytes())
    path = tmp_path / "list.mp4"
    path.write_text("ffconcat version 1.0\nfile private.mp4\n")
    with av.open(str(path)) as detected:
        assert detected.streams.video
    reading = read(path)
    assert reading.pages == []
    assert "cannot be opened" in str(reading.errors[0])


def test_a_video_that_is_cut_off_gives_what_it_has(talk, tmp_path, read):
    path = tmp_path / "cut.mkv"
    with av.open(talk) as source, av.open(path, "w") as container:
        copied = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = copied
                container.mux(packet)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    reading = read(path)
    assert told(reading)[0][0] == "at 0:00"


def test_only_so_many_stretches_are_read(talk, read):
    reading = read(talk, max_pages=2)
    assert [name for name, _ in told(reading)] == ["at 0:00"]
    assert "only the first 2 stretches are read" in str(reading.errors[0])


def test_a_video_is_found_and_cited_by_time(talk, tmp_path):
    path = with_subtitles(talk, tmp_path)
    with UniversalIndex(tmp_path / "library", "mmrag-nano") as index:
        assert index.add(path).errors == []
        (source, *_) = index.as_query_engine().query("When are seeds sown?").sources
    assert (source.file, source.page_name) == (path.as_posix(), "at 1:00")


def test_without_the_extra_it_is_named(talk, monkeypatch):
    monkeypatch.setattr("mmrag.reading.files.find_spec", lambda _: None)
    (error,) = find_files([talk]).errors
    assert "pip install 'mmrag[video]'" in str(error)


def test_times_are_shown_as_players_do():
    assert [clock(s) for s in (0, 65.9, 3605)] == ["0:00", "1:05", "1:00:05"]
