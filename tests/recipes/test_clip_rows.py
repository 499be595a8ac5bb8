"""Rows with clips of videos: made by convert, trained on by the code that indexes them."""

import json

import numpy as np
import pytest
import torch
from made_videos import make_video
from one_step import Prepared
from PIL import Image
from tiny import save_qwen2_vl
from tiny_nano import save_nano
from tiny_qwen3 import save_qwen3_vl
from training import config_of, killed_at, log_of, same, weights_of

from mmrag import UniversalIndex, read_clip
from mmrag.content import Clip, Content
from mmrag.embedders import load_embedder
from mmrag.errors import ConfigError, ContentError
from mmrag.reading import ReadOptions
from mmrag_recipes.__main__ import main
from mmrag_recipes.config import ConvertConfig, FeaturesConfig, LoraConfig
from mmrag_recipes.convert import from_swift
from mmrag_recipes.data import LEFT_OUT
from mmrag_recipes.export import probe_contents
from mmrag_recipes.pair_steps import pair_of
from mmrag_recipes.rows import ImageStore, Item, ItemClip, images_of, read_rows, store_of
from mmrag_recipes.sides import Media
from mmrag_recipes.steps import encode
from mmrag_recipes.train import train

pytest.importorskip("av")

# The picture changes where pages begin, so that each of the three is a clip of its own.
SCENES = (("white", 20), ("yellow", 20), ("cyan", 12))
SAID = "WEBVTT\n\n00:03.000 --> 00:05.000\nthe well\n\n00:25.000 --> 00:28.000\nseeds in May\n"
RECORDS = [
    {
        "id": f"r{n}",
        "query": {"text": f"question {n}"},
        "positives": [{"video": "talk.mp4", "start": 20 * n, "end": 20 * n + 20}],
        "negatives": [{"video": "red.mp4"}, {"text": "a text of its own", "video": "red.mp4"}],
    }
    for n in range(3)
]
WATCHED = {"id": "w", "query": {"video": "red.mp4"}, "positives": [{"text": "a card"}]}


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    make_video(folder / "talk.mp4", SCENES)
    (folder / "talk.vtt").write_text(SAID)
    make_video(folder / "red.mp4", [("red", 4)])
    (folder / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(200))
    Image.new("RGB", (56, 56), "blue").save(folder / "a.png")
    return folder


def convert(films, out, records, *options):
    out.parent.mkdir(parents=True, exist_ok=True)
    named = out.with_name("named.jsonl")
    named.write_text("\n".join(map(json.dumps, records)))
    main(["convert", "rows", str(named), "--images", str(films), "--out", str(out), *options])
    return out


@pytest.fixture(scope="session")
def rows(films, tmp_path_factory):
    out = tmp_path_factory.mktemp("clips") / "rows.jsonl"
    return convert(films, out, [*RECORDS, WATCHED], "--clips")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_qwen2_vl(tmp_path_factory.mktemp("clip-model") / "tiny", seed=3)


def test_a_stretch_is_the_clip_that_read_clip_gives(films, rows):
    made = read_rows(rows)
    assert [row.pair for row in made] == ["text->clip"] * 3 + ["clip->text"]
    for n, row in enumerate(made[:3]):
        (item,) = row.positives
        expected = read_clip(films / "talk.mp4", 20 * n, 20)
        content = store_of(rows).content(item)
        assert [path.read_bytes() for path in content.clip.frames] == list(expected.frames)
        assert list(content.clip.seconds) == list(expected.seconds)
        assert (content.text, content.images) == (None, ())
    whole = store_of(rows).content(made[3].query).clip
    assert list(whole.seconds) == list(read_clip(films / "red.mp4", 0, 100).seconds)
    assert [item.text for item in made[0].negatives] == [None, "a text of its own"]
    stored = {path.name for path in store_of(rows).folder.iterdir()}
    assert images_of(made) == stored


def test_without_the_option_rows_hold_frames(films, tmp_path):
    (row,) = read_rows(convert(films, tmp_path / "rows.jsonl", RECORDS[:1]))
    assert (row.pair, row.positives[0].clip) == ("text->image", None)


def test_words_are_those_said_meanwhile(films, tmp_path):
    record = {
        "query": {"text": "when?", "image": "a.png"},
        "positives": [{"video": "talk.mp4", "start": 20, "end": 40}],
        "negatives": [{"video": "talk.mp4", "text": "own"}, {"video": "red.mp4"}],
    }
    out = convert(films, tmp_path / "rows.jsonl", [record], "--clips", "--items", "fused")
    (row,) = read_rows(out)
    items = [*row.positives, *row.negatives]
    assert [item.text for item in items] == ["seeds in May", "own", None]
    assert [item.images for item in items] == [(), (), ()]
    # Nothing but the frames of the clips, and the image of the query, is in the store.
    assert images_of([row]) == {path.name for path in store_of(out).folder.iterdir()}


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ({"video": "broken.mp4"}, "broken.mp4: the clip cannot be read (the video cannot be ope"),
        ({"video": "none.mp4"}, "there is no video"),
        ({"video": "a.png"}, "a.png: not a video; use .mp4"),
        ({"video": "red.mp4", "start": 30}, "it shows less than two frames from 30 s on"),
    ],
)
def test_what_has_no_clip_is_left_out(films, tmp_path, capsys, side, said):
    bad = [{**RECORDS[0], "id": f"b{n}", "positives": [side]} for n in range(2)]
    out = convert(films, tmp_path / "rows.jsonl", [*bad, RECORDS[1]], "--clips")
    shown = capsys.readouterr().out
    assert "1 rows, 2 left out" in shown
    assert shown.count(said) == 2
    assert [row.id for row in read_rows(out)] == ["r1"]


def test_a_stretch_is_read_once(films, tmp_path, monkeypatch):
    opened = []
    original = Media._read_clip
    monkeypatch.setattr(Media, "_read_clip", lambda *args: opened.append(args) or original(*args))
    broken = {**RECORDS[0], "id": "b", "positives": [{"video": "broken.mp4"}]}
    convert(films, tmp_path / "rows.jsonl", [RECORDS[0], broken, {**broken, "id": "c"}], "--clips")
    assert [stretch.video for _, stretch in opened] == ["talk.mp4", "red.mp4", "broken.mp4"]


def test_swift_with_clips(films, tmp_path):
    def user(text):
        return {"role": "user", "content": text}

    record = {
        "messages": [user("<video>what is it?")],
        "videos": ["red.mp4"],
        "positive_messages": [[user("<video>")]],
        "positive_videos": [["talk.mp4"]],
    }
    several = {**record, "messages": [user("<video><video>?")], "videos": ["red.mp4", "talk.mp4"]}
    media = Media(films, ImageStore(tmp_path / "images"), clips=True)
    row, problem = from_swift([record, several], media, "s")
    assert (row.query.text, row.pair) == ("what is it?", "clip->clip")
    assert len(row.positives[0].clip.frames) == 52  # one a second of the whole video
    assert problem.startswith("record 2: an item has one clip at most")


@pytest.mark.parametrize(
    "changes", [{"kind": "pdfs"}, {"kind": "rows", "items": "text"}, {"kind": "mmeb"}]
)
def test_clips_without_clips_to_make_are_refused(tmp_path, changes):
    ConvertConfig(kind="rows", records=tmp_path, out=tmp_path, clips=True)
    with pytest.raises(ValueError, match="clips is for swift and rows"):
        ConvertConfig(records=tmp_path, out=tmp_path, clips=True, **changes)


def test_an_item_with_a_clip():
    frames, seconds = ("a", "b"), (0.0, 1.0)
    clip = ItemClip(frames=frames, seconds=seconds)
    item = Item(text="x", clip=clip)
    assert (item.modality, item.images, item.files) == ("clip", (), ("a", "b"))
    later = Item(text="x", clip=ItemClip(frames=frames, seconds=(0.0, 2.0)))
    assert len({item.key, later.key, Item(text="x").key, Item(clip=clip).key}) == 4
    # Of the SHA-256 of '["x", null]', as before there were clips: vectors are kept by it.
    assert Item(text="x").key == 8562697833592056283
    for wrong in ({"frames": ("a",)}, {"seconds": (1.0, 0.0)}, {"frames": (), "seconds": ()}):
        with pytest.raises(ValueError, match=r"A Clip needs|never go back"):
            ItemClip(**{"frames": frames, "seconds": seconds, **wrong})


def trained(model, rows, out, family="vlm2vec_v2", **changes):
    return config_of(model, out, rows, **{"family": family, "batch_size": 2, **changes})


@pytest.mark.parametrize("family", ["vlm2vec_v2", "unite", "qwen3_vl"])
def test_the_trainer_embeds_the_clips_of_the_index(family, films, rows, model, tmp_path):
    model = save_qwen3_vl(tmp_path / "tiny") if family == "qwen3_vl" else model
    embedder = load_embedder(model, family=family, device="cpu")
    reading = ReadOptions(clips=True)
    with UniversalIndex(tmp_path / "library", embedder, reading=reading, views=("image",)) as index:
        assert index.add(films / "talk.mp4").errors == []
        hits, stored = index.collection.vectors("image")
    by_start = {hit.payload["start"]: vector for hit, vector in zip(hits, stored, strict=True)}

    config = trained(model, rows, tmp_path / "out", family, hard_negatives=0)
    made = Prepared(config)
    with torch.no_grad():
        vectors = encode(made.backbone, made.step.inputs, config)[made.step.n_queries :]
    vectors = torch.nn.functional.normalize(vectors, dim=1).numpy()
    assert sorted(by_start) == [0, 20, 40]
    for n, start in enumerate(sorted(by_start)):
        np.testing.assert_allclose(vectors[n], by_start[start], atol=1e-5)


def test_costs_count_all_frames(rows, model, tmp_path):
    config = trained(model, rows, tmp_path / "out", hard_negatives=2)
    made = Prepared(config)
    counts = [one.n_tokens for one in made.step.inputs]
    queries, documents = counts[:4], counts[4:]
    # Three rows with two negatives, each a clip and one of them with a text; then one without.
    sums = [queries[n] + sum(documents[3 * n : 3 * n + 3]) for n in range(3)]
    assert made.dataset.costs.tolist() == [*sums, queries[3] + documents[9]]
    # 320 x 240 becomes 392 x 280: 14 x 10 tokens of two frames, one a second.
    assert documents[0] > 10 * 14 * 10
    assert documents[2] - documents[1] < 20


def close(ours, others):
    assert ours.keys() == others.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, others[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"lora": LoraConfig(r=4)}, {"freeze": ("visual",)}])
def test_gradients_of_chunks_are_those_of_the_whole(rows, model, tmp_path, changes):
    made = Prepared(trained(model, rows, tmp_path / "out", **changes))
    whole = made.gradients(0)
    close(made.gradients(3), whole)
    assert any(gradient.abs().max() > 1e-5 for gradient in whole.values())
    if "freeze" not in changes:
        return
    kept = FeaturesConfig(folder=str(tmp_path / "features"))
    for _ in range(2):  # computed, then found
        close(made.gradients(3, kept), whole)
    pairs = {pair.numpy().tobytes() for one in made.step.inputs for pair in one.images}
    assert len([path for path in (tmp_path / "features").rglob("*") if path.is_file()]) == len(
        pairs
    )


def test_training_on_clips_learns_and_resumes(rows, model, tmp_path):
    options = {"steps": 4, "save_every": 2, "lora": LoraConfig(r=4), "chunk": 2}
    config = trained(model, rows, tmp_path / "whole", **options)
    train(config)
    assert (tmp_path / "whole" / "left_out.jsonl").read_text() == ""
    losses = [record["loss"] for record in log_of(config.out)]
    assert len(losses) == 4
    half = config.replace(out=str(tmp_path / "half"))
    with killed_at(3):
        train(half)
    train(half)
    assert same(weights_of(half.out), weights_of(config.out))
    still = config.replace(out=str(tmp_path / "still"), lr=1e-12)
    train(still)
    assert not same(weights_of(still.out), weights_of(config.out))


def broken_copy(rows, tmp_path, spoil):
    """The rows with a store of which ``spoil`` gets a frame of the clip of the second row alone."""
    copy = tmp_path / "copy" / "rows.jsonl"
    copy.parent.mkdir()
    copy.write_bytes(rows.read_bytes())
    for path in store_of(rows).folder.iterdir():
        store_of(copy).copy_from(store_of(rows), path.name)
    first, second, *_ = read_rows(copy)
    spoil(store_of(copy).path(second.positives[0].clip.frames[7]))
    assert second.positives[0].clip.frames[7] not in first.positives[0].clip.frames
    return copy


def test_a_frame_that_is_missing_costs_its_row(rows, model, tmp_path):
    copy = broken_copy(rows, tmp_path, lambda path: path.unlink())
    made = Prepared(trained(model, copy, tmp_path / "out"))
    assert (made.dataset.costs == LEFT_OUT).tolist() == [False, True, False, False]
    assert "there is no image with id" in made.dataset.problems[0].reason


def test_a_frame_that_is_broken_costs_its_row_the_step(rows, model, tmp_path):
    copy = broken_copy(
        rows, tmp_path, lambda path: path.write_bytes(path.read_bytes()[:700] + bytes(40))
    )
    made = Prepared(trained(model, copy, tmp_path / "out"))
    (problem,) = made.step.skipped
    assert problem.row == "r1"
    assert "cannot be decoded" in problem.reason
    assert made.step.n_queries == 3


@pytest.mark.parametrize("family", ["gme", "nano"])
def test_families_without_clips_leave_such_rows_out(rows, model, tmp_path, family):
    model = save_nano(tmp_path / "nano") if family == "nano" else model
    with pytest.raises(ContentError, match=r"no row can be used: .* no clips"):
        Prepared(trained(model, rows, tmp_path / "out", family))


def test_rerankers_take_no_clips(rows):
    clip = store_of(rows).content(read_rows(rows)[0].positives[0])
    with pytest.raises(ContentError, match="Rerankers take no clips"):
        pair_of(None, Content("a question"), clip, None)


def test_other_frames_are_another_run(films, rows, model, tmp_path):
    copy = broken_copy(rows, tmp_path, lambda path: None)
    train(trained(model, copy, tmp_path / "out", steps=1))
    frame = store_of(copy).path(read_rows(copy)[1].positives[0].clip.frames[7])
    frame.write_bytes((films / "a.png").read_bytes())
    with pytest.raises(ConfigError, match="data"):
        train(trained(model, copy, tmp_path / "out", steps=1))


def test_a_dry_run_shows_clips(rows, model, tmp_path, capsys):
    options = ["--model", str(model), "--family", "vlm2vec_v2", "--data", str(rows)]
    main(["train", *options, "--out", str(tmp_path / "out"), "--device", "cpu", "--dry-run"])
    assert "clip of 20 frames of 320x240" in capsys.readouterr().out


def test_exports_are_checked_by_a_clip_too(model):
    embedder = load_embedder(model, family="unite", device="cpu")
    probes = probe_contents(embedder.modalities)
    assert [isinstance(probe.clip, Clip) for probe in probes].count(True) == 1
    assert embedder.encode(probes).shape == (len(probes), 32)
