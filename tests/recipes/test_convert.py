"""Other projects' rows become ours; what cannot be used is named and the rest converted."""

import json
from types import SimpleNamespace

import pymupdf
import pytest
from PIL import Image

from mmrag_recipes.__main__ import main
from mmrag_recipes.convert import Pool, from_mbeir, from_mmeb, from_pdfs, from_rows, from_swift
from mmrag_recipes.rows import ImageStore, Item, Row, check_rows, read_rows, store_of
from mmrag_recipes.sides import Media


def parted(converted):
    made = list(converted)
    rows = [one for one in made if isinstance(one, Row)]
    return SimpleNamespace(rows=rows, problems=[one for one in made if isinstance(one, str)])


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 9), "red" if name == "a.png" else "blue").save(tmp_path / name)
    return Media(tmp_path, ImageStore(tmp_path / "images"))


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
    found = parted(from_mmeb(records, images, "OK-VQA"))
    first, second = found.rows
    assert first.query.text == "Represent the given image with the following question: what?"
    assert first.pair == "fused->text"
    assert first.negatives == [Item(text="a dog")]
    assert second.pair == "text->image"
    assert second.positives[0].text is None
    assert len(found.problems) == 2
    assert "none.png" in found.problems[0]
    assert found.problems[1] == "record 4: 'qry' is missing"


def test_mbeir(images, tmp_path):
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
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in pool))
    found = parted(from_mbeir(records, Pool(path), images, "webqa"))
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
    (row,) = from_swift(records, images, "s")
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
        found = parted(from_pdfs(questions, tmp_path, store, items, "CC0"))
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
    with pytest.raises(SystemExit, match="record 2 is not a JSON object"):
        main(["convert", kind, str(records), "--out", str(tmp_path / "rows.jsonl")])


def test_a_question_without_pages_is_named(tmp_path, capsys):
    records = tmp_path / "questions.jsonl"
    records.write_text('{"question": "a"}\n')
    with pytest.raises(SystemExit, match="none of its 1 records"):
        main(["convert", "pdfs", str(records), "--out", str(tmp_path / "rows.jsonl")])
    assert "left out: record 1: 'pages' is missing" in capsys.readouterr().out


def test_swift_with_several_images_and_in_its_other_form(images):
    messages = {"role": "user", "content": "<image><image>which is blue?"}
    other = {"query": "sky", "response": "blue"}
    records = [
        {
            "messages": [messages],
            "images": ["a.png", {"path": "b.png"}],
            "positive_messages": [[{"role": "assistant", "content": "the second"}]],
        },
        {
            "query": "sky",
            "response": "blue",
            "rejected_response": ["red", "green"],
            "system": "Say.",
        },
        {**other, "rejected_response": "red"},
    ]
    several, plain, single = from_swift(records, images, "s")
    assert len(several.query.images) == 2
    assert len(images.store.content(several.query).images) == 2
    assert (several.query.text, several.query.modality) == ("which is blue?", "fused")
    assert [item.text for item in plain.negatives] == ["red", "green"]
    assert plain.instruction == "Say."
    assert single.negatives == [Item(text="red")]
    assert Row.model_validate_json(several.model_dump_json()) == several


def test_mbeir_with_its_instructions(images, tmp_path):
    pool = tmp_path / "pool.jsonl"
    candidates = [
        {"did": "2:1", "txt": "a cat", "img_path": None, "modality": "text"},
        {"did": "2:2", "txt": None, "img_path": "a.png", "modality": "image"},
    ]
    pool.write_text("\n".join(json.dumps(one) for one in candidates) + "\n\n")
    table = tmp_path / "query_instructions.tsv"
    columns = [
        "query_modality",
        "cand_modality",
        "dataset_name",
        "dataset_id",
        "prompt_1",
        "prompt_2",
    ]
    lines = [columns, ["text", "image", "webqa", "2", "Find a photo.", "Find it."]]
    table.write_text("\n".join("\t".join(line) for line in lines))
    queries = tmp_path / "query.jsonl"
    base = {"query_txt": "cat", "query_modality": "text"}
    records = [
        {"qid": "2:7", **base, "pos_cand_list": ["2:2"]},
        {"qid": "2:8", **base, "pos_cand_list": ["2:1"]},
    ]
    queries.write_text("\n".join(json.dumps(one) for one in records))
    out = tmp_path / "out" / "rows.jsonl"
    words = ["--pool", str(pool), "--images", str(tmp_path), "--instructions", str(table)]
    main(["convert", "mbeir", str(queries), "--out", str(out), *words])
    (row,), _ = check_rows(out, store_of(out))
    assert (row.id, row.instruction) == ("2:7", "Find a photo.")


def test_mmeb_as_published_by_subset(images, tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for subset in ("OK-VQA", "WebQA"):
        folder = tmp_path / "MMEB-train" / subset
        folder.mkdir(parents=True)
        columns = {
            "qry": [f"Represent this. {subset} {n}" for n in range(3)],
            "qry_image_path": ["a.png", "a.png", "none.png"],
            "pos_text": ["a", "b", "c"],
            "pos_image_path": ["", "", ""],
        }
        parquet.write_table(pyarrow.table(columns), folder / "original-00000-of-00001.parquet")
    out = tmp_path / "out" / "rows.jsonl"
    words = ["convert", "mmeb", str(tmp_path / "MMEB-train"), "--images", str(tmp_path)]
    main([*words, "--out", str(out), "--subsets", "WebQA"])
    rows, _ = check_rows(out, store_of(out))
    assert [(row.id, row.task) for row in rows] == [("WebQA-1", "WebQA"), ("WebQA-2", "WebQA")]
    assert "1 left out" in capsys.readouterr().out
    main([*words, "--out", str(out)])
    rows, _ = check_rows(out)
    assert len({row.id for row in rows}) == 4
    with pytest.raises(SystemExit, match="no subset WebQa; there are: OK-VQA, WebQA"):
        main([*words, "--out", str(out), "--subsets", "WebQa"])
    (tmp_path / "empty").mkdir()
    words[2] = str(tmp_path / "empty")
    with pytest.raises(SystemExit, match="empty: no subset, which is a folder with parquet files"):
        main([*words, "--out", str(out)])


def test_swift_pairs_that_are_not_alike_are_no_answers(images):
    pair = {"query": "sky", "response": "blue"}
    records = [
        {**pair, "label": 1.0},
        {**pair, "label": 0.0},
        {**pair, "label": 0.8},
        {**pair, "label": None},
        {"messages": [], "positive_messages": [], "label": 0},
    ]
    found = parted(from_swift(records, images, "s"))
    assert [row.id for row in found.rows] == ["s-1", "s-4"]
    assert found.problems[0] == "record 2: label is 0.0: only pairs with label 1 become rows"
    assert len(found.problems) == 3


def test_swift_images_may_be_one_path_and_must_be_as_many_as_are_named(images):
    said = [{"role": "user", "content": "<image>red?"}]
    records = [
        {
            "messages": said,
            "images": "a.png",
            "positive_messages": [said, [{"role": "user", "content": "no"}]],
            "positive_images": [{"path": "b.png"}, []],
        },
        {"query": "<image><image>both?", "images": ["a.png"], "response": "yes"},
        {"query": "either?", "images": ["a.png"], "response": "yes"},
    ]
    found = parted(from_swift(records, images, "s"))
    assert [len(row.query.images) for row in found.rows] == [1, 1]
    assert [item.modality for item in found.rows[0].positives] == ["fused", "text"]
    assert found.problems == ["record 2: 2 <image> in a text with 1 images"]


def test_null_is_a_field_that_is_not_there(images):
    side = {"image": None, "video": None, "start": None, "end": None}
    record = {
        "id": 7,
        "instruction": None,
        "query": {"text": "q", **side},
        "positives": [{"text": "p", **side}],
        "negatives": None,
        "positive_scores": None,
    }
    assert list(from_rows([record], images, "t")) == [
        Row(id="7", task="t", query=Item(text="q"), positives=[Item(text="p")])
    ]


def test_an_id_that_comes_again_is_left_out_where_it_is_told(images):
    record = {"id": "x", "query": {"text": "q"}, "positives": [{"text": "p"}]}
    found = parted(from_rows([record, {**record, "id": "y"}, record], images, "t"))
    assert [row.id for row in found.rows] == ["x", "y"]
    assert found.problems == ["record 3: id 'x' is that of an earlier record"]


def test_half_a_surrogate_pair_costs_its_record_only(images, tmp_path):
    path = tmp_path / "mine.jsonl"
    good = '{"query": {"text": "a \\ud83d\\ude00"}, "positives": [{"text": "b"}]}'
    path.write_text(good + "\n" + good.replace("\\ude00", "") + "\n")
    out = tmp_path / "rows.jsonl"
    main(["convert", "rows", str(path), "--out", str(out)])
    (row,) = read_rows(out)
    assert row.query.text == "a \N{GRINNING FACE}"


@pytest.mark.parametrize("layout", ["lines", "list"])
def test_a_byte_order_mark_is_no_part_of_the_records(tmp_path, layout):
    record = '{"query": {"text": "qu\u00e9"}, "positives": [{"text": "p"}]}'
    text = f"{record}\r\n\r\n" if layout == "lines" else f"[{record}]"
    path, out = tmp_path / "mine.json", tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8-sig")
    main(["convert", "rows", str(path), "--out", str(out)])
    assert [row.query.text for row in read_rows(out)] == ["qu\u00e9"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_records_in_another_encoding_are_refused_in_words(tmp_path, encoding):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"query": {"text": "qu\u00e9"}}\n', encoding=encoding)
    with pytest.raises(SystemExit, match=r"mine\.jsonl: neither JSON lines nor a JSON list"):
        main(["convert", "rows", str(path), "--out", str(tmp_path / "rows.jsonl")])


def test_without_any_row_there_is_an_error_and_the_rows_before_stay(tmp_path):
    path, out = tmp_path / "mine.jsonl", tmp_path / "rows.jsonl"
    path.write_text('{"query": {"image": "gone.png"}, "positives": [{"text": "p"}]}\n')
    out.write_text("before")
    with pytest.raises(SystemExit, match="none of its 1 records can be used"):
        main(["convert", "rows", str(path), "--out", str(out)])
    assert out.read_text() == "before"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["mine.jsonl", "rows.jsonl"]
