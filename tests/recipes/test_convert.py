"""Other projects' rows become ours; what cannot be used is named and the rest converted."""

import json

import pymupdf
import pytest
from PIL import Image

from mmrag_recipes.__main__ import main
from mmrag_recipes.convert import Images, from_mbeir, from_mmeb, from_pdfs, from_swift
from mmrag_recipes.rows import ImageStore, Item, check_rows, store_of


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9), "red" if name == "a.png" else "blue").save(tmp_path / name)
    return Images(tmp_path, ImageStore(tmp_path / "images"))


def test_mmeb(images):
    records = [
        {
            "qry": "<|image_1|>\nRepresent the given image with the following question: what?",
            "qry_image_path": "a.png",
            "pos_text": "a cat",
            "pos_image_path": "",
            "neg_text": "a dog",
        },
        {"qry": "a cat", "pos_text": "<|image_1|>", "pos_image_path": "b.png"},
        {"qry": "a cat", "pos_text": "", "pos_image_path": "none.png"},
        {"pos_text": "no query"},
    ]
    found = from_mmeb(records, images, "OK-VQA")
    first, second = found.rows
    assert first.query.text == "Represent the given image with the following question: what?"
    assert first.pair == "fused->text"
    assert first.negatives == [Item(text="a dog")]
    assert second.pair == "text->image"
    assert second.positives[0].text is None
    assert len(found.problems) == 2
    assert "none.png" in found.problems[0]
    assert found.problems[1] == "record 4: 'qry' is missing"


def test_mbeir(images):
    pool = [
        {"did": "1:1", "txt": "text", "img_path": None, "modality": "text"},
        {"did": "1:2", "txt": "both", "img_path": "a.png", "modality": "image,text"},
        {"did": "1:3", "txt": None, "img_path": "b.png", "modality": "image"},
    ]
    base = {"query_txt": "q", "query_img_path": None}
    records = [
        {"qid": "9:1", **base, "pos_cand_list": ["1:2"], "neg_cand_list": ["1:1", "1:3"]},
        {"qid": "9:2", **base, "pos_cand_list": ["1:9"], "neg_cand_list": []},
    ]
    found = from_mbeir(records, pool, images, "webqa")
    assert [row.pair for row in found.rows] == ["text->fused"]
    assert [item.modality for item in found.rows[0].negatives] == ["text", "image"]
    assert found.problems == ["record 2: candidate 1:9 is not in the pool"]


def test_swift(images):
    records = [
        {
            "messages": [
                {"role": "system", "content": "Find a caption."},
                {"role": "user", "content": "<image>what is it"},
            ],
            "images": ["a.png"],
            "positive_messages": [[{"role": "user", "content": "a cat"}]],
            "negative_messages": [[{"role": "user", "content": "<image>"}]],
            "negative_images": [["b.png"]],
        }
    ]
    (row,) = from_swift(records, images, "s").rows
    assert row.instruction == "Find a caption."
    assert (row.query.text, row.query.modality) == ("what is it", "fused")
    assert [item.modality for item in row.negatives] == ["image"]


def test_pdfs_with_questions(tmp_path):
    pdf = pymupdf.open()
    pdf.new_page().insert_text((72, 72), "first page")
    pdf.new_page().insert_text((72, 72), "second page")
    pdf.save(tmp_path / "a.pdf")
    questions = [
        {"question": "which?", "pages": [{"file": "a.pdf", "page": 2}]},
        {"question": "where?", "pages": [{"file": "a.pdf", "page": 9}]},
    ]
    store = ImageStore(tmp_path / "out" / "images")
    for items, modality in (("image", "image"), ("text", "text"), ("fused", "fused")):
        found = from_pdfs(questions, tmp_path, store, items, "CC0")
        (row,) = found.rows
        assert row.positives[0].modality == modality
        assert row.source == "a.pdf#2"
        assert found.problems == ["record 2: not readable: a.pdf page 9"]
    assert row.positives[0].text == "second page"


def test_the_command_writes_rows_that_check(images, tmp_path, capsys):
    records = tmp_path / "train.jsonl"
    record = {"qry": "a cat", "pos_text": "", "pos_image_path": "b.png"}
    records.write_text(json.dumps(record) + "\n" + json.dumps({"qry": "x"}) + "\n")
    out = tmp_path / "made" / "rows.jsonl"
    main(["convert", "mmeb", str(records), "--images", str(tmp_path), "--out", str(out)])
    rows, problems = check_rows(out, store_of(out))
    assert len(rows) == 1
    assert not problems
    shown = capsys.readouterr().out
    assert "1 rows, 1 left out" in shown


@pytest.mark.parametrize("kind", ["mmeb", "swift", "pdfs"])
def test_records_that_are_no_objects_are_named(tmp_path, kind):
    records = tmp_path / "records.jsonl"
    records.write_text('{"question": "a"}\n"abc"\n')
    with pytest.raises(SystemExit, match="record 2 is no JSON object"):
        main(["convert", kind, str(records), "--out", str(tmp_path / "rows.jsonl")])


def test_a_question_without_pages_costs_that_record_only(tmp_path, capsys):
    records = tmp_path / "questions.jsonl"
    records.write_text('{"question": "a"}\n')
    main(["convert", "pdfs", str(records), "--out", str(tmp_path / "rows.jsonl")])
    assert "left out: record 1: 'pages' is missing" in capsys.readouterr().out
