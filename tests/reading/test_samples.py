"""The sample PDFs of the demo, read as a user would."""

import json
from pathlib import Path

import pymupdf
import pytest

from mmrag.reading import locate_quote

QUESTIONS = Path(__file__).parents[2] / "docs" / "samples" / "questions.json"


def test_the_samples_are_the_same_each_time(samples, tmp_path) -> None:
    import make_samples  # the fixture has loaded it

    for path in make_samples.main(tmp_path):
        assert path.read_bytes() == (samples / path.name).read_bytes()


def test_questions_point_to_pages_that_are_there(samples) -> None:
    for row in json.loads(QUESTIONS.read_text()):
        assert row["question"] and row["answer"]
        for page in row["pages"]:
            with pymupdf.open(samples / page["file"]) as document:
                assert 1 <= page["page"] <= len(document)


def test_prose_tables_charts_and_the_scan_are_read(samples, read) -> None:
    readings = {path.stem: read(path, dpi=72) for path in sorted(samples.glob("*.pdf"))}
    assert all(reading.errors == [] for reading in readings.values())
    handbook = readings["handbook"]
    assert "Full plot 80 m2 150 euros 75 euros 40 euros" in handbook.text(4)
    assert handbook.kind("page")[1].metadata["section"] == "Joining and leaving"
    assert [n.metadata["page"] for n in readings["planting-guide"].kind("figure")] == [1, 2, 3]
    captions = [n.metadata["caption"] for n in readings["season-report"].kind("figure")]
    assert captions[0] == "Figure 1: Harvest of 2024 by crop, in kilograms."
    (letter,) = readings["well-letter"].nodes
    assert letter.metadata["text_layer"] == "none"


@pytest.mark.ocr
@pytest.mark.slow
def test_the_scan_is_recognised_and_its_lines_are_found(samples, read) -> None:
    path = samples / "well-letter.pdf"
    (node,) = read(path, ocr="auto").nodes
    assert node.metadata["text_layer"] == "ocr"
    assert "14.5 metres deep and the water stands at 9.2 metres" in node.text_resource.text
    first, second = locate_quote(path, 1, "The new pump delivers 38 litres a minute")
    assert first[0] > second[0] and first[1] < second[1]
    assert 350 < first[1] < 400
