"""Pages of videos as clips: which frames they have, and what becomes of them."""

import dataclasses

import numpy as np
import pytest
from fakes import FakeEmbedder
from made_videos import make_video
from typer.testing import CliRunner

from mmrag import UniversalIndex
from mmrag.cli.app import app
from mmrag.content import load_image
from mmrag.errors import CollectionError, ConfigError, ReadError
from mmrag.ingest.run import reading_settings
from mmrag.reading import ReadOptions, read_clip
from mmrag.reading.options import PageRecord
from mmrag.reading.video import read_stretches

pytest.importorskip("av")

CLIPS = ReadOptions(clips=True)


class ClipEmbedder(FakeEmbedder):
    """Keeps the clips that it is given, with their frames decoded."""

    def __init__(self):
        super().__init__(modalities=("text", "image", "fused", "clip"))
        self.clips = []

    def encode(self, contents, *args, **options):
        for content in contents:
            if content.clip is not None:
                colours = [mean_colour(frame) for frame in content.clip.frames]
                self.clips.append((content.text, colours, list(content.clip.seconds)))
        return super().encode(contents, *args, **options)


def mean_colour(frame):
    red, green, blue = np.asarray(load_image(frame)).reshape(-1, 3).mean(axis=0)
    return "white" if blue > 200 else "yellow" if green > 200 else f"{red:.0f}"


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """At 2 frames a second: yellow from 0:05 to 0:30 in white; 48 seconds in all."""
    scenes = [("white", 5), ("yellow", 25), ("white", 18)]
    return make_video(tmp_path_factory.mktemp("video") / "talk.mp4", scenes, 17)


def test_frames_are_those_that_the_reference_code_takes(talk):
    clip = read_clip(talk)
    # smart_nframes: 40 frames at 2 a second are 20 seconds, thus 20 frames.
    assert list(clip.seconds) == (np.linspace(0, 39, 20).round() / 2).tolist()
    seen = [mean_colour(frame) for frame in clip.frames]
    assert seen == ["white" if second < 5 else "yellow" for second in clip.seconds]
    later = read_clip(talk, start=29, seconds=3.0)
    assert list(later.seconds) == [0, 1, 1.5, 2.5]  # 4 at least, from 6
    assert [mean_colour(frame) for frame in later.frames] == ["yellow", "white", "white", "white"]
    assert len(read_clip(talk, start=40).frames) == 8  # the video ends at 0:48
    assert len(read_clip(talk, seconds=1000).frames) == 48


def test_what_has_no_clip_is_an_error(talk, tmp_path):
    with pytest.raises(ReadError, match="less than two frames from 50 s"):
        read_clip(talk, start=50)
    (tmp_path / "notes.txt").write_text("a text")
    with pytest.raises(ReadError, match="no video"):
        read_clip(tmp_path / "notes.txt")
    (tmp_path / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    with pytest.raises(ReadError, match="cannot be opened"):
        read_clip(tmp_path / "bad.mp4")


def test_a_picture_that_stays_is_one_clip(tmp_path, read):
    path = make_video(tmp_path / "still.mp4", [("white", 50)], 20)
    cues = (f"00:{n}.000 --> 00:{n}.900\nword{n}" for n in (10, 25, 45))
    (tmp_path / "still.vtt").write_text("\n\n".join(["WEBVTT", *cues]))
    (page,) = read(path, clips=True).pages
    # 20, 20 and 10 frames of three stretches, whose times go on.
    assert len(page.clip.frames) == 50
    assert page.clip.seconds[20] == 20
    assert page.clip.seconds[-1] == 49.5
    assert read(path).pages[0].clip is None


def test_a_clip_that_kills_its_worker_costs_the_clip_alone(talk, tmp_path):
    skipped = frozenset({(1, "clip")})
    records = read_stretches(talk, tmp_path / "out", CLIPS, 1, skipped)
    pages = [record for record in records if isinstance(record, PageRecord)]
    assert pages[0].image is not None
    assert [bool(page.clip) for page in pages] == [False, True, True]


def test_pages_are_embedded_as_clips_and_shown_as_before(talk, tmp_path):
    embedder = ClipEmbedder()
    with UniversalIndex(tmp_path / "clips", embedder, reading=CLIPS) as index:
        assert index.add(talk).errors == []
        as_clips = shown(index)
        n_encoded = embedder.encoded
        index.add(talk)
    assert embedder.encoded == n_encoded  # nothing is embedded twice
    assert [len(seen) for _, seen, _ in embedder.clips] == [20, 20, 8]
    assert embedder.clips[0][1] == ["white"] * 5 + ["yellow"] * 15
    assert list((tmp_path / "clips").rglob(".*.tmp")) == []
    with UniversalIndex(tmp_path / "frames", ClipEmbedder()) as index:
        index.add(talk)
        assert shown(index) == as_clips


def shown(index):
    """Of each page its image and all metadata but where that image is kept."""
    (entry,) = index.files()
    found = {}
    for node in index.collection.file_nodes(entry.sha256):
        facts = node.metadata | {"page_image": node.image_resource.path.read_bytes()}
        found[node.node_id] = {k: v for k, v in facts.items() if k != "file_path"}
    return found


def test_frames_of_pages_that_are_stored_already_are_removed(talk, tmp_path):
    """As after a run that was killed when the page was stored and its file was not."""
    embedder = ClipEmbedder()
    with UniversalIndex(tmp_path / "library", embedder, reading=CLIPS) as index:
        index.add(talk)
        (entry,) = index.files()
        index.collection.mark_done(dataclasses.replace(entry, complete=False))
        index.add(talk)
    assert len(embedder.clips) == 3
    assert list((tmp_path / "library").rglob(".*.tmp")) == []


def test_text_and_clip_are_fused(tmp_path):
    path = make_video(tmp_path / "talk.mp4", [("white", 10)], 20)
    (tmp_path / "talk.srt").write_text("1\n00:00:01,000 --> 00:00:04,000\nThe well is deep.\n")
    embedder = ClipEmbedder()
    with UniversalIndex(
        tmp_path / "library", embedder, reading=CLIPS, views=("image", "text", "fused")
    ) as index:
        index.add(path)
    assert [text for text, _, _ in embedder.clips] == [None, "The well is deep."]


def test_embedders_without_clips_are_refused_before_anything_is_made(talk, tmp_path):
    with (
        UniversalIndex(tmp_path / "library", FakeEmbedder(), reading=CLIPS) as index,
        pytest.raises(ConfigError, match="takes no clips"),
    ):
        index.add(talk)
    assert not (tmp_path / "library").exists()


def test_the_command_refuses_clips_for_an_embedder_without(talk, tmp_path):
    arguments = ["index", str(talk), "--clips", "-c", str(tmp_path / "library")]
    result = CliRunner().invoke(app, [*arguments, "--embedder", "mmrag-nano"])
    assert result.exit_code == 2
    assert "takes no clips" in " ".join(result.stderr.split())
    assert not (tmp_path / "library").exists()


def test_clips_are_part_of_how_a_collection_was_read(talk, tmp_path):
    embedder = ClipEmbedder()
    with UniversalIndex(tmp_path / "library", embedder) as index:
        index.add(talk)
    with pytest.raises(CollectionError, match="other settings"):
        UniversalIndex(tmp_path / "library", embedder, reading=CLIPS)
    # Collections that were built before there were clips say nothing of them.
    assert "clips" not in reading_settings(ReadOptions())
    UniversalIndex(tmp_path / "library", embedder, reading=ReadOptions()).close()
