"""Rows whose sides name videos: frames, rows and vectors are those of indexing."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from made_videos import make_video
from PIL import Image
from tiny_qwen3 import save_qwen3_vl
from training import config_of, killed_at, log_of, same, weights_of

from mmrag import UniversalIndex
from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError, ContentError
from mmrag.reading import count_pages
from mmrag_recipes.__main__ import main
from mmrag_recipes.convert import from_rows, from_swift
from mmrag_recipes.rows import ImageStore, Row, check_rows, read_rows, store_of
from mmrag_recipes.sides import Files, Media, Stretch
from mmrag_recipes.train import train

pytest.importorskip("av")

# The picture changes at 0:50 and 1:50: the pages of the video begin at 0:00, 1:00 and 2:00.
SCENES = (("white", 50), ("yellow", 60), ("cyan", 20))
SAID = """WEBVTT

00:03.000 --> 00:05.000
the well

01:05.000 --> 01:08.000
seeds in May
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    make_video(folder / "talk.mp4", SCENES)
    (folder / "talk.vtt").write_text(SAID)
    make_video(folder / "red.mp4", [("red", 10)])
    make_video(folder / "still.mp4", [("green", 130)])
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    Image.new("RGB", (56, 56), "blue").save(folder / "a.png")
    return folder


@pytest.fixture
def media(folder, tmp_path):
    return Media(folder, ImageStore(tmp_path / "images"))


def parted(converted):
    made = list(converted)
    rows = [one for one in made if isinstance(one, Row)]
    return SimpleNamespace(rows=rows, problems=[one for one in made if isinstance(one, str)])


def colours(media, items):
    """What is drawn in the corner of each image of items."""
    found = []
    for name in [name for item in items for name in item.images]:
        with Image.open(media.store.path(name)) as image:
            corner = np.asarray(image.convert("RGB"), dtype=int)[0, 0]
        told = ("white", "yellow", "cyan", "red", "green", "blue")
        values = [np.array(Image.new("RGB", (1, 1), one).getpixel((0, 0))) for one in told]
        found.append(told[int(np.argmin([np.abs(corner - value).max() for value in values]))])
    return found


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 1e9, ["white", "yellow", "cyan"]),
        (70, 80, ["yellow"]),
        (59.9, 60.1, ["white", "yellow"]),
        (60, 120, ["yellow"]),
        (125, 500, ["cyan"]),
    ],
)
def test_a_stretch_is_the_pages_that_it_lies_on(media, start, end, expected):
    files = Files(None, stretches=[Stretch("talk.mp4", start, end)])
    documents = media.documents(files)
    assert colours(media, documents) == expected
    assert all(len(item.images) == 1 for item in documents)
    # A query is one item, whatever it shows.
    assert colours(media, [media.item(files)]) == expected


def test_a_picture_that_stays_is_one_document(media, folder, tmp_path):
    """Without words it has one page to the end of the video, with words one a minute."""
    still = Files(None, stretches=[Stretch("still.mp4", 125, 128)])
    assert colours(media, media.documents(still)) == ["green"]
    (folder / "told.mp4").write_bytes((folder / "still.mp4").read_bytes())
    cues = (f"{n // 60:02}:{n % 60:02}.000 --> 02:10.000\nword{n}" for n in range(5, 130, 15))
    (folder / "told.vtt").write_text("\n\n".join(["WEBVTT", *cues]))
    told = Files(None, stretches=[Stretch("told.mp4")])
    assert colours(media, media.documents(told)) == ["green"]
    assert colours(media, [media.item(told)]) == ["green"]
    both = Media(folder, ImageStore(tmp_path / "both"), "fused")
    assert len(both.documents(told)) == 3


def test_stretches_of_a_video_are_counted(folder):
    assert [count_pages(folder / name) for name in ("talk.mp4", "red.mp4")] == [7, 1]


@pytest.mark.parametrize("family", ["gme", "qwen3_vl"])
def test_rows_have_the_vectors_of_the_index(family, folder, tiny_model, tmp_path):
    model = tiny_model if family == "gme" else save_qwen3_vl(tmp_path / "tiny")
    embedder = load_embedder(str(model), family=family, device="cpu")
    with UniversalIndex(tmp_path / "library", embedder, views=("image", "fused")) as index:
        assert index.add(folder / "talk.mp4").errors == []
        stored = {view: index.collection.vectors(view) for view in ("image", "fused")}
    for items, view in (("image", "image"), ("fused", "fused")):
        media = Media(folder, ImageStore(tmp_path / items), items)
        for hit, vector in zip(*stored[view], strict=True):
            begins = hit.payload["start"]
            stretch = Stretch("talk.mp4", begins, begins + 20)
            (item,) = media.documents(Files(None, stretches=[stretch]))
            (frame,) = (tmp_path / "library").rglob(Path(hit.payload["page_image"]).name)
            assert media.store.path(item.image).read_bytes() == frame.read_bytes()
            (encoded,) = embedder.encode([media.store.content(item)])
            # Encoded alone and not in a batch.
            np.testing.assert_allclose(encoded, vector, atol=1e-6)
        assert len(stored[view][0]) >= (3 if view == "image" else 2)


def test_rows_name_files(media):
    record = {
        "id": "q",
        "instruction": "Find the moment.",
        "query": {"text": "when?", "image": "a.png"},
        "positives": [{"video": "talk.mp4", "start": 12, "end": 70}, {"text": "at noon"}],
        "negatives": [
            {"video": "talk.mp4", "start": 100},
            {"text": "a red card", "video": "red.mp4"},
        ],
        "positive_scores": [0.9, 0.8],
        "negative_scores": [0.3, 0.1],
        "source": "talk.mp4#1",
    }
    (row,) = from_rows([record], media, "t")
    assert (row.id, row.task, row.place) == ("q", "t", "talk.mp4#1")
    assert row.pair == "fused->image"
    assert colours(media, [row.query, *row.positives]) == ["blue", "white", "yellow"]
    assert row.positive_scores == [0.9, 0.9, 0.8]
    # The second stretch has the yellow page too, which is right.
    assert colours(media, row.negatives) == ["cyan", "red"]
    assert [item.text for item in row.negatives] == [None, "a red card"]
    assert row.negative_scores == [0.3, 0.1]


def test_what_is_said_comes_where_it_is_asked_for(folder, tmp_path):
    record = {
        "query": {"video": "talk.mp4", "end": 80},
        "positives": [{"video": "talk.mp4", "end": 20}, {"text": "own", "video": "talk.mp4"}],
    }
    for items, told in (("fused", "the well\n\nseeds in May"), ("image", None)):
        media = Media(folder, ImageStore(tmp_path / items), items)
        (row,) = from_rows([record], media, "t")
        assert (row.id, row.query.text, len(row.query.images)) == ("t-1", told, 2)
        assert row.positives[0].text == (told and "the well")
        assert {item.text for item in row.positives[1:]} == {"own"}
    words = Media(folder, ImageStore(tmp_path / "text"), "text")
    (row,) = from_rows([record], words, "t")
    assert row.pair == "text->text"
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ({"video": "none.mp4"}, "there is no video"),
        ({"video": "broken.mp4"}, "broken.mp4: the video cannot be opened"),
        ({"video": "a.png"}, "a.png: not a video; use .mp4"),
        ({"video": "red.mp4", "start": 30}, "red.mp4: there is nothing from 30 s to the end"),
        ({"video": "red.mp4", "start": 5, "end": 5}, "positives.0: start=5 is not before end=5"),
        ({"video": "red.mp4", "start": -1}, "positives.0.start: Input should be greater"),
        ({"text": "x", "start": 5}, "positives.0: start and end are those of a video"),
        ({"text": "x", "vidoe": "red.mp4"}, "positives.0.vidoe: Extra inputs"),
        ({"video": "red.mp4", "image": "a.png"}, "a document has images or a video, not both"),
    ],
)
def test_a_side_that_cannot_be_used_costs_its_record(media, side, said):
    good = {"query": {"text": "a"}, "positives": [{"video": "red.mp4"}]}
    found = parted(from_rows([{**good, "positives": [side]}, good], media, "t"))
    assert [row.id for row in found.rows] == ["t-2"]
    assert found.problems[0].startswith("record 1: ")
    assert said in found.problems[0]


def test_a_broken_video_is_opened_once(media, monkeypatch):
    opened = []
    monkeypatch.setattr(Media, "_read", lambda self, path: opened.append(path) or _refuse())
    record = {"query": {"text": "a"}, "positives": [{"video": "broken.mp4"}]}
    assert len(parted(from_rows([record, record], media, "t")).problems) == 2
    assert len(opened) == 1


def _refuse():
    raise ContentError("broken")


def user(text):
    return {"role": "user", "content": text}


def test_swift_with_videos(media):
    records = [
        {
            "messages": [user("<video><image>what comes next?")],
            "images": ["a.png"],
            "videos": [{"path": "red.mp4"}],
            "positive_messages": [[user("<video>")]],
            "positive_videos": [["talk.mp4"]],
            "negative_messages": [
                [user("a text")],
                [user("<video>a caption")],
                [user("<video>")],
            ],
            "negative_videos": [[], ["red.mp4"], ["talk.mp4"]],
        },
        {"query": "<video>what is it?", "videos": ["red.mp4"], "response": "a card"},
        {"query": "what is it?", "videos": ["red.mp4"], "response": "a card"},
        {"messages": [user("<video>?")], "positive_messages": [[user("a card")]]},
    ]
    found = parted(from_swift(records, media, "s"))
    whole, short = found.rows
    assert (whole.query.text, colours(media, [whole.query])) == (
        "what comes next?",
        ["blue", "red"],
    )
    assert colours(media, whole.positives) == ["white", "yellow", "cyan"]
    assert {item.text for item in whole.positives} == {None}
    assert [(item.text, colours(media, [item])) for item in whole.negatives] == [
        ("a text", []),
        ("a caption", ["red"]),
    ]
    assert (short.query.text, short.pair) == ("what is it?", "fused->text")
    assert found.problems == [
        "record 3: 0 <video> in a text with 1 videos",
        "record 4: 1 <video> in a text with 0 videos",
    ]


def convert(folder, out, records):
    named = out.with_name("named.jsonl")
    named.write_text("\n".join(map(json.dumps, records)))
    main(["convert", "rows", str(named), "--images", str(folder), "--out", str(out)])
    return out


def rows_of_videos():
    good = [
        {
            "id": f"r{n}",
            "query": {"text": f"question {n}"},
            "positives": [{"video": "talk.mp4", "start": 60 * n, "end": 60 * n + 9}],
            "negatives": [{"video": "red.mp4"}],
        }
        for n in range(3)
    ]
    watched = {"id": "asked", "query": {"video": "red.mp4"}, "positives": [{"text": "a card"}]}
    several = {"id": "several", "query": {"video": "talk.mp4"}, "positives": [{"text": "a talk"}]}
    broken = {"id": "b", "query": {"text": "?"}, "positives": [{"video": "broken.mp4"}]}
    return [*good, watched, several, broken]


@pytest.fixture
def video_rows(folder, tmp_path):
    return convert(folder, tmp_path / "rows.jsonl", rows_of_videos())


def test_the_command_counts_what_it_leaves_out(folder, tmp_path, capsys):
    video_rows = convert(folder, tmp_path / "rows.jsonl", rows_of_videos())
    shown = capsys.readouterr().out
    assert "left out: record 6: " in shown
    assert "broken.mp4: the video cannot be opened" in shown
    assert "5 rows, 1 left out" in shown
    rows, problems = check_rows(video_rows, store_of(video_rows))
    assert (len(rows), problems) == (5, [])


def test_training_on_videos_moves_weights_and_resumes(tiny_model, video_rows, tmp_path):
    config = config_of(tiny_model, tmp_path / "whole", video_rows, batch_size=2, seed=1)
    train(config)
    still = config_of(tiny_model, tmp_path / "still", video_rows, batch_size=2, seed=1, lr=1e-12)
    train(still)
    learned, before = weights_of(config.out), weights_of(still.out)
    moved = [name for name in learned if (learned[name] - before[name]).abs().max() > 1e-4]
    assert any(name.startswith("visual.") for name in moved)
    # GME takes one image an item, and a query of three frames is one item.
    (left,) = map(json.loads, (tmp_path / "whole" / "left_out.jsonl").read_text().splitlines())
    assert left["row"] == "several"
    assert "takes 1 image per item, got 3" in left["reason"]
    half = config.replace(out=str(tmp_path / "half"))
    with killed_at(4):
        train(half)
    train(half)
    assert [r["rows"] for r in log_of(half.out)] == [r["rows"] for r in log_of(config.out)]
    assert same(weights_of(half.out), learned)


def test_a_model_of_several_images_takes_a_query_of_several_frames(video_rows, tmp_path):
    model = save_qwen3_vl(tmp_path / "tiny")
    config = config_of(model, tmp_path / "out", video_rows, batch_size=5, steps=1)
    train(config.replace(family="qwen3_vl"))
    assert (tmp_path / "out" / "left_out.jsonl").read_text() == ""
    assert len(log_of(config.out)[0]["rows"]) == 5


def test_another_video_is_another_run(folder, tiny_model, tmp_path):
    films = tmp_path / "films"
    films.mkdir()
    record = {"id": "a", "query": {"text": "?"}, "positives": [{"video": "a.mp4"}]}
    record["negatives"] = [{"text": "no"}]
    config = config_of(tiny_model, tmp_path / "out", tmp_path / "rows.jsonl", batch_size=1, steps=1)
    for colour in ("red", "blue"):
        make_video(films / "a.mp4", [(colour, 10)])
        convert(films, tmp_path / "rows.jsonl", [record])
        if colour == "red":
            train(config)
    with pytest.raises(ConfigError, match="data"):
        train(config)


def test_without_the_extra_it_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mmrag.reading.files.find_spec", lambda _: None)
    with pytest.raises(SystemExit, match=r"pip install 'mmrag\[video\]'"):
        convert(folder, tmp_path / "rows.jsonl", rows_of_videos())


def test_rows_that_name_videos_are_sent_to_convert(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(rows_of_videos()[0]))
    with pytest.raises(
        ContentError, match=r"positives\.0: rows hold images and clips: `convert rows`"
    ):
        read_rows(path)


def test_pyav_is_not_imported_without_a_video():
    code = "import sys, mmrag_recipes.convert; sys.exit('av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
