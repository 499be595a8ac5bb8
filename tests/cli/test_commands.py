import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder, make_image, make_node
from judge_server import JudgeServer
from llama_index.core.schema import NodeWithScore
from PIL import Image
from rerank_server import RerankServer
from rich.console import Console
from typer.testing import CliRunner

import mmrag.embedders
from mmrag.answering.context import Source
from mmrag.answering.response import CitedResponse
from mmrag.cli import display
from mmrag.cli.app import app
from mmrag.cli.ask import _save_pages
from mmrag.cli.chat import _page_file
from mmrag.errors import EndpointError, MMRagError, ReadError
from mmrag.index import UniversalIndex
from mmrag.nodes import Hit

EYES = "The gold plan covers one eye examination a year for every member of the family."
TEETH = "Dental cleaning is free of charge for children who are under twelve years old."
HEAVY = ("torch", "transformers", "llama_index", "pymupdf", "qdrant_client")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """No endpoint in the environment, and a small embedder that needs no weights."""
    for name in ("MMRAG_LLM", "OPENAI_BASE_URL", "OPENAI_API_BASE", "MMRAG_COLLECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    # Words alone decide here: the fake embedder takes no meaning from them.
    monkeypatch.setattr(
        mmrag.embedders,
        "load_embedder",
        lambda name, **_: FakeEmbedder(str(name), dim=64, modalities=("text",)),
    )


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    with pymupdf.open() as document:
        for text in (EYES, TEETH):
            document.new_page().insert_textbox((72, 72, 500, 200), text)
        document.save(folder / "plans.pdf")
    (folder / "notes.md").write_text("# Boilers\n\nThe boiler near the harbour exploded in May.\n")
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    return folder


@pytest.fixture(scope="module")
def library(docs, tmp_path_factory):
    """A collection of the three files, and what indexing them printed."""
    folder = tmp_path_factory.mktemp("library") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mmrag.embedders,
            "load_embedder",
            lambda name, **_: FakeEmbedder(str(name), dim=64, modalities=("text",)),
        )
        patch.setenv("COLUMNS", "100")
        return folder, run("index", docs, "-c", folder)


@pytest.fixture
def folder(library):
    return library[0]


def test_indexing_tells_what_failed_and_exits_with_1(library, docs):
    _, result = library
    assert result.exit_code == 1
    assert "Files: 2 indexed, 1 failed" in result.stdout
    assert re.search(r"Stored: \d pages, \d+ nodes in .* pages/s", result.stdout)
    assert "1 could not be read" in result.stderr
    assert "broken.pdf" in result.stderr.split("could not be read")[1]


def test_indexing_again_costs_nothing_and_says_so_in_json(folder, docs):
    result = run("index", docs / "plans.pdf", "-c", folder, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [len(report[k]) for k in ("indexed", "unchanged", "failed", "errors")] == [0, 1, 0, 0]


def test_json_of_failures(tmp_path, docs):
    result = run("index", docs / "broken.pdf", "-c", tmp_path / "c", "--json")
    (error,) = json.loads(result.stdout)["errors"]
    assert error["file"].endswith("broken.pdf")
    assert set(error) == {"file", "page", "error"}


def test_search_shows_place_and_words(folder):
    result = run("search", "eye examination", "-c", folder, "-k", 2)
    assert result.exit_code == 0
    first = result.stdout.splitlines()[0]
    assert "plans.pdf  page 1" in first
    assert "bm25 #1" in first
    assert "gold plan covers one eye examination" in result.stdout


def test_search_json_has_the_agreed_fields(folder):
    result = run("search", "dental cleaning", "-c", folder, "--json")
    found = json.loads(result.stdout)
    assert found["query"] == "dental cleaning"
    best = found["hits"][0]
    assert set(best) == {
        *("file", "page", "label", "page_name", "kind", "score", "snippet", "box", "metadata"),
    }
    assert best["file"].endswith("plans.pdf")
    assert best["page"] == 2
    assert best["snippet"].startswith("Dental cleaning")


@pytest.mark.parametrize(
    ("options", "pages"),
    [
        (("--pages", "2"), {2}),
        (("--pages", "2-9"), {2}),
        (("--pages", "-1"), {1}),
        (("--pages", "1-"), {1, 2}),
        (("--file", "notes.md"), {None}),
        (("--file", "*.pdf", "--kind", "page"), {1, 2}),
    ],
)
def test_filters(folder, options, pages):
    result = run("search", "eye dental boiler", "-c", folder, "--json", *options)
    assert {hit["page"] for hit in json.loads(result.stdout)["hits"]} == pages


def test_a_pattern_without_a_file_is_warned_of_once(folder):
    result = run("search", "eye", "-c", folder, "--file", "nope*")
    assert result.stderr.count("nope*") == 1


def test_nothing_found_is_1(folder):
    result = run("search", "eye", "-c", folder, "--file", "other.pdf")
    assert (result.exit_code, result.stdout) == (1, "Nothing found.\n")


def test_asking_without_a_model_quotes_and_says_so(folder):
    result = run("ask", "What does the gold plan cover for the eye?", "-c", folder)
    assert result.exit_code == 0
    assert "No language model is configured" in result.stdout
    assert f"\u201c{EYES}\u201d [1]" in " ".join(result.stdout.split())
    assert re.search(r"Sources\n \[1\]  .*plans.pdf  page 1", result.stdout)


def test_ask_json_has_the_agreed_fields(folder):
    result = run("ask", "What does the gold plan cover for the eye?", "-c", folder, "--json")
    answer = json.loads(result.stdout)
    assert set(answer) == {"question", "found", "answer", "extractive", "certain", "sources"}
    source = answer["sources"][0]
    assert (source["n"], source["page"], source["quote"]) == (1, 1, EYES)
    x0, y0, x1, y1 = source["box"]
    assert 70 < x0 < x1 < 510
    assert 60 < y0 < y1 < 200


def test_metadata_is_stored_shown_and_filtered(tmp_path):
    for name, year in (("old", 2020), ("new", 2024)):
        (tmp_path / f"{name}.txt").write_text(f"The {name} plan covers the teeth.")
        options = ("--meta", f"year={year}", "--meta", f"draft={str(name == 'new').lower()}")
        assert run("index", tmp_path / f"{name}.txt", "-c", tmp_path / "c", *options).exit_code == 0

    def found(*conditions):
        options = [part for condition in conditions for part in ("--where", condition)]
        result = run("search", "teeth", "-c", tmp_path / "c", "--json", *options)
        return {row["metadata"]["year"] for row in json.loads(result.stdout)["hits"]}

    assert found() == {2020, 2024}
    assert found("year>=2021") == found("draft=true") == found("text~NEW plan") == {2024}
    assert found("year != 2024", "draft=false") == {2020}
    assert found("year=2024", "draft=false") == set()
    shown = run("search", "teeth", "-c", tmp_path / "c", "--where", "year=2020").stdout
    assert "year: 2020  draft: False" in shown
    answer = run("ask", "What covers the teeth?", "-c", tmp_path / "c", "--where", "year<2021")
    assert "old.txt" in answer.stdout and "new.txt" not in answer.stdout
    rows = json.loads(run("list", "-c", tmp_path / "c", "--json").stdout)["files"]
    assert [row["metadata"] for row in rows] == [
        {"year": 2024, "draft": True},
        {"year": 2020, "draft": False},
    ]


@pytest.mark.parametrize(
    "options", [("--where", "year"), ("--where", "=3"), ("--where", "year>=soon"), ("--where", "~")]
)
def test_a_condition_that_cannot_be_used_is_refused(folder, options):
    result = run("search", "teeth", "-c", folder, *options)
    assert result.exit_code == 2
    assert "condition" in result.stderr or "GTE takes a number" in result.stderr


def test_metadata_without_a_key_is_refused(folder, docs):
    result = run("index", docs, "-c", folder, "--meta", "2024")
    assert result.exit_code == 2 and "KEY=VALUE" in result.stderr


def test_asking_what_is_not_there(folder):
    result = run("ask", "Who won the football match in Denver?", "-c", folder)
    assert result.exit_code == 1
    assert result.stdout.startswith("Not found in these documents.")
    assert "Nearest pages" in result.stdout
    as_json = run("ask", "Who won the football match in Denver?", "-c", folder, "--json")
    assert json.loads(as_json.stdout)["found"] is False
    assert json.loads(as_json.stdout)["sources"] == []


def test_cited_pages_are_saved_with_the_lines_marked(folder, tmp_path):
    question = "What does the gold plan cover for the eye?"
    result = run("ask", question, "-c", folder, "--save-pages", tmp_path / "out")
    (saved,) = (tmp_path / "out").iterdir()
    assert saved.name == "01-plans-p1.png"
    assert "saved as" in result.stdout
    image = Image.open(saved).convert("RGB")
    # A page of black on white has colour only where it is marked, and that is over the words.
    coloured = [
        (x, y)
        for x in range(0, image.width, 4)
        for y in range(0, image.height, 2)
        if max(image.getpixel((x, y))) - min(image.getpixel((x, y))) > 40
    ]
    assert coloured
    assert max(y for _, y in coloured) < image.height / 2


def test_pages_that_cannot_be_saved_do_not_cost_the_answer(folder, tmp_path):
    (tmp_path / "file").touch()
    question = "What does the gold plan cover for the eye?"
    result = run("ask", question, "-c", folder, "--save-pages", tmp_path / "file")
    assert result.exit_code == 0
    assert "eye examination" in result.stdout
    assert "cannot be saved" in result.stderr


def test_a_cited_image_keeps_its_format(tmp_path):
    image = make_image(tmp_path / "p0001.jpg")
    node = make_node("", file="photo.jpg", page=1, kind="picture", image=image)
    source = Source(1, "photo.jpg", 1, NodeWithScore(node=node), "", image, cited=True)
    saved = _save_pages(CitedResponse("[1]", sources=[source]), tmp_path / "out")
    assert saved == {1: str(tmp_path / "out/01-photo-p1.jpg")}
    assert Image.open(saved[1]).format == "JPEG"


def test_a_file_that_was_not_indexed_is_not_saved(tmp_path, capsys):
    """A collection from somebody else may name any PDF of the user's."""
    with pymupdf.open() as document:
        document.new_page().insert_text((72, 72), "Private: the safe opens with 4711.")
        document.save(tmp_path / "private.pdf")
    node = make_node("The safe", file="plans.pdf", sha256="0" * 64)
    node.metadata["file_path"] = str(tmp_path / "private.pdf")
    source = Source(1, "plans.pdf", 1, NodeWithScore(node=node), "The safe", cited=True)
    assert _save_pages(CitedResponse("[1]", sources=[source]), tmp_path / "out") == {}
    assert list((tmp_path / "out").iterdir()) == []
    assert "is not the one that was indexed" in capsys.readouterr().err
    with pytest.raises(ReadError, match="not the one that was indexed"):
        _page_file(source)
    (tmp_path / "private.txt").write_text("4711")
    node.metadata |= {"file_path": str(tmp_path / "private.txt")}
    with pytest.raises(ReadError, match="not the one that was indexed"):
        _page_file(source)


@pytest.fixture
def server():
    server = ChatServer("The gold plan covers one eye examination a year [1]. Cheese is green [9].")
    yield server
    server.close()


def test_asking_a_model(folder, server):
    result = run(
        "ask", "What covers the eye?", "-c", folder, "--llm", "tiny", "--base-url", server.url
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("The gold plan covers one eye examination a year [1].")
    assert "[9] points to no source" in result.stdout
    assert "image_url" in json.dumps(server.requests[0])


def test_the_model_at_the_server_can_judge_the_pages_first(folder):
    """The words of the question are those of the other page."""
    judge = JudgeServer(lambda text: 0.95 if "Dental" in text else 0.02)
    judge.answer = "It is free of charge for children [1]."
    try:
        given = ("--llm", "tiny", "--base-url", judge.url, "--context-window", 9000, "--json")
        question = "gold plan family member"
        plain = run("ask", question, "-c", folder, *given)
        assert json.loads(plain.stdout)["sources"][0]["page"] == 1
        judged = run("ask", question, "-c", folder, *given, "--rerank", "llm")
        assert json.loads(judged.stdout)["sources"][0]["page"] == 2
    finally:
        judge.close()


def test_two_rerankers_at_endpoints_judge_in_a_row(folder, server, monkeypatch):
    """The first sees nine times as many pages and hands on a third; the second decides."""
    monkeypatch.setenv("MMRAG_RERANK_KEY", "key")
    by_words = RerankServer(lambda query, text: 0.2 + 0.5 * ("Dental" in text), key="key")
    by_eye = RerankServer(lambda query, text: 0.9 - 0.5 * ("Dental" in text), "cohere", key="key")
    with by_words, by_eye:
        cascade = ("--rerank", f"one@{by_words.url}", "--rerank", f"two@{by_eye.url}")
        given = ("--llm", "tiny", "--base-url", server.url, "-c", folder, "-k", 1, "--json")
        question = ("gold plan family member", *given)
        first = run("ask", *question, *cascade[:2])
        both = run("ask", *question, *cascade)
    assert [source["page"] for source in json.loads(first.stdout)["sources"]] == [2]
    assert [source["page"] for source in json.loads(both.stdout)["sources"]] == [1]
    judged = [len(body["documents"]) for body in by_words.requests + by_eye.requests]
    assert judged[1] >= judged[2] >= 2


def test_planning_shows_the_searches(folder, server):
    given = ("--llm", "tiny", "--base-url", server.url, "--plan")
    shown = run("ask", "What covers the eye?", "-c", folder, *given)
    assert shown.exit_code == 0
    assert "Searches" in shown.stdout
    assert "What covers the eye?: " in shown.stdout
    plan = json.loads(run("ask", "What covers the eye?", "-c", folder, *given, "--json").stdout)
    assert plan["plan"]["searches"][0]["pages"]
    assert run("ask", "eye", "-c", folder, "--plan").exit_code == 2


def test_judging_by_a_model_that_is_not_there(folder, tmp_path):
    assert run("ask", "eye", "-c", folder, "--rerank", "llm").exit_code == 2
    result = run("ask", "eye", "-c", folder, "--rerank", tmp_path / "nowhere")
    assert result.exit_code == 3
    assert "nowhere" in result.stderr


def test_the_usual_variables_name_the_model(folder, server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_BASE", server.url)
    result = run("ask", "What covers the eye?", "-c", folder, "--no-images", "--json")
    assert json.loads(result.stdout)["sources"][0]["page"] == 1
    assert server.requests[0]["model"] == "tiny"
    assert "image_url" not in json.dumps(server.requests[0])


def test_a_failing_server_is_3_and_one_line(folder, server):
    server.mode = "deny"
    result = run("ask", "eye", "-c", folder, "--llm", "tiny", "--base-url", server.url, "--json")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.splitlines()[-1].startswith("Error: tiny: the server needs an API key")


def test_debug_shows_the_error_itself(tmp_path):
    result = run("search", "eye", "-c", tmp_path / "none", "--debug")
    assert isinstance(result.exception, MMRagError)


def test_a_missing_collection_is_3_and_one_line(tmp_path):
    for command in (["search", "eye"], ["ask", "eye"], ["list"], ["remove", "a.pdf"]):
        result = run(*command, "-c", tmp_path / "none")
        assert result.exit_code == 3
        assert result.stderr.count("\n") == 1
        assert "mmrag index" in result.stderr
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["search"],
        ["search", " "],
        ["ask"],
        ["search", "x", "--pages", "a-b"],
        ["search", "x", "--pages", "-"],
        ["search", "x", "--pages", "9-3"],
        ["search", "x", "--kind", "table"],
        ["search", "x", "--top-k", "0"],
        ["nonsense"],
        ["index"],
    ],
)
def test_wrong_use_is_2(folder, command):
    extra = [] if command[0] == "nonsense" else ["-c", folder]
    assert run(*command, *extra).exit_code == 2


def test_an_image_for_an_embedder_of_texts_is_2(folder, tmp_path):
    result = run("search", "-c", folder, "--image", make_image(tmp_path / "q.png"))
    assert result.exit_code == 2
    assert "cannot embed a query of kind 'image'" in result.stderr


def test_listing_and_removing(docs, tmp_path):
    folder = tmp_path / "c"
    run("index", docs / "plans.pdf", docs / "notes.md", "-c", folder)
    listed = json.loads(run("list", "-c", folder, "--json").stdout)
    assert listed["embedder"] == "mmrag-nano"
    assert {"file", "sha256", "pages", "nodes", "errors"} <= set(listed["files"][0])
    shown = run("list", "-c", folder).stdout
    assert "2 files, " in shown
    assert "plans.pdf" in shown
    gone = run("remove", "*.md", "nothing.pdf", "-c", folder, "--json")
    assert gone.exit_code == 0
    assert gone.stderr == "No indexed file matches nothing.pdf.\n"
    assert [path.endswith("notes.md") for path in json.loads(gone.stdout)["removed"]] == [True]
    assert run("remove", "*.md", "-c", folder).exit_code == 1
    assert "1 files, " in run("list", "-c", folder).stdout


def test_ctrl_c_is_130_and_the_collection_still_works(docs, tmp_path, monkeypatch):
    folder = tmp_path / "c"
    run("index", docs / "notes.md", "-c", folder)
    encode = FakeEmbedder.encode

    def stopped(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeEmbedder, "encode", stopped)
    result = run("index", docs / "plans.pdf", "-c", folder)
    assert result.exit_code == 130
    assert "run the same command to go on" in result.stderr
    monkeypatch.setattr(FakeEmbedder, "encode", encode)
    assert run("search", "boiler", "-c", folder).exit_code == 0
    assert run("index", docs / "plans.pdf", "-c", folder).exit_code == 0
    assert "page 1" in run("search", "eye examination", "-c", folder).stdout


@pytest.fixture
def terminal(monkeypatch):
    """Sets the columns of a terminal that shows no colours."""

    def columns(n):
        # LINES too: rich takes a dumb terminal without both for one of 80 columns.
        values = {"FORCE_COLOR": "1", "TERM": "dumb", "COLUMNS": str(n), "LINES": "40"}
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return columns


@pytest.mark.parametrize("columns", [50, 80, 140])
def test_names_of_models_can_be_copied(terminal, columns):
    terminal(columns)
    lines = [line.rstrip() for line in run("models").stdout.splitlines()]
    rows = json.loads(run("models", "--json").stdout)["models"]
    assert {row["name"] for row in rows} <= set(lines)
    assert max(map(len, lines)) <= columns
    assert {"name", "dim", "license", "modalities"} <= set(rows[0])


def test_the_language_of_keyword_search(docs, tmp_path):
    folder = tmp_path / "c"
    assert run("index", docs / "notes.md", "-c", folder, "--language", "german").exit_code == 0
    with UniversalIndex(folder) as library:
        assert library.collection.settings.language == "german"
    other = run("index", docs / "notes.md", "-c", folder, "--language", "french")
    assert (other.exit_code, "language: 'german', not 'french'" in other.stderr) == (3, True)
    wrong = run("index", docs / "notes.md", "-c", tmp_path / "d", "--language", "klingon")
    assert (wrong.exit_code, "klingon" in wrong.stderr) == (2, True)


def test_piped_output_has_no_control_codes_and_no_padding(folder):
    for command in (["search", "eye"], ["ask", "the eye examination"], ["list"]):
        shown = run(*command, "-c", folder).output
        assert "\x1b" not in shown
        assert not [line for line in shown.splitlines() if line != line.rstrip()]


def test_narrow_terminals_lose_no_words(folder, terminal):
    terminal(40)
    shown = run("search", "eye examination", "-c", folder, "-k", 1).stdout
    assert max(map(len, shown.splitlines())) <= 40
    assert EYES in " ".join(shown.split())


def test_piped_lines_are_not_wrapped(folder):
    assert EYES in run("search", "eye examination", "-c", folder, "-k", 1).stdout
    assert max(map(len, run("list", "-c", folder).stdout.splitlines())) < 300


def test_piped_paths_stay_whole(tmp_path, monkeypatch):
    """Whatever COLUMNS says, and whichever command prints the path."""
    monkeypatch.setenv("COLUMNS", "40")
    place = tmp_path / f"[x] {'long ' * 12}folder"
    place.mkdir()
    note, broken = place / f"{'a note ' * 10}.md", place / f"{'broken ' * 10}.pdf"
    note.write_text(EYES)
    broken.write_bytes(b"%PDF-1.7 nothing")
    made = place / "c"

    def lines(*words, text=None):
        result = CliRunner().invoke(app, [*map(str, words), "-c", str(made)], input=text)
        return [line for line in result.output.splitlines() if str(place) in line]

    assert f" - {broken}: " in lines("index", place)[-1]
    assert lines("list")[0].startswith(f"{note}  ")
    assert str(note) in lines("search", "eye examination")[0]
    assert str(note) in lines("ask", "eye examination")[0]
    sources, opened = lines("chat", text="eye examination\n/open 1\n")
    assert str(note) in sources
    assert str(note) in opened
    run("snapshot", "create", "-c", made)
    assert lines("snapshot", "list") == [f"1 snapshots in {made / 'snapshots'}"]
    assert lines("convert", place / "d") == [f"2 points copied to {place / 'd'}."]
    assert f"{place / 'none.jsonl'}" in lines("eval", place / "none.jsonl")[0]
    assert lines("remove", note) == [f"removed {note}"]


def test_a_document_cannot_steer_the_terminal():
    node = make_node(
        "Red \x1b[31m alert \x07 [bold]not markup[/bold] \u202e backwards", file="a\x1b.pdf"
    )
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=False, width=80)
    console.print(display.hits_view([Hit(node=node, score=0.5)], "alert"))
    shown = stream.getvalue()
    assert not re.search("[\x1b\x07\u202e]", shown)
    assert "[bold]not markup[/bold]" in shown


def test_a_snippet_is_the_nearest_sentence():
    text = f"{EYES} {TEETH} " + "The claims are sent by mail to the office. " * 9
    assert display.snippet(text, "dental cleaning").startswith(TEETH)
    assert len(display.snippet(text, "dental cleaning")) <= 240
    assert display.snippet("", "x") == ""


def test_an_embedder_that_cannot_be_loaded_is_3(monkeypatch, folder):
    def broken(*_, **__):
        raise EndpointError("the embedding server is away")

    monkeypatch.setattr(mmrag.embedders, "load_embedder", broken)
    result = run("search", "eye", "-c", folder)
    assert result.exit_code == 3
    assert result.stderr == "Error: the embedding server is away\n"


@pytest.mark.parametrize("args", [["--help"], ["ask", "--help"], ["--version"], ["models"]])
def test_starting_up_imports_nothing_heavy(args):
    code = (
        "import sys\n"
        "from mmrag.cli.app import app\n"
        f"app({args!r}, standalone_mode=False)\n"
        f"heavy = sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_the_exit_codes():
    for command in (["--help"], ["index", "--help"], ["search", "--help"], ["ask", "--help"]):
        shown = " ".join(run(*command).stdout.split())
        assert "Exit codes: 0 done; 1 nothing found" in shown
        assert "130 stopped by Ctrl-C" in shown


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "mmrag", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == run("--version").stdout


def test_upgrading_what_is_up_to_date(folder):
    done = run("upgrade", "-c", folder)
    assert (done.exit_code, done.stdout) == (0, "Already up to date.\n")
    assert json.loads(run("upgrade", "-c", folder, "--json").stdout)["nodes"] == 0


def test_search_explains_each_hit(folder):
    shown = run("search", "eye examination", "-c", folder, "--explain").stdout
    assert re.search(r"bm25: rank 1, score \d+\.\d+, credit 0\.\d+", shown)
    hits = json.loads(run("search", "eye examination", "-c", folder, "--explain", "--json").stdout)
    (first, *_) = hits["hits"]
    assert first["explanation"]["rankings"]["bm25"]["rank"] == 1
    assert first["explanation"]["evidence"][0]["kind"] in ("page", "passage", "text")


def test_tuning_saves_weights_and_says_what_they_are_worth(docs, tmp_path):
    folder = tmp_path / "c"
    assert run("index", docs, "-c", folder).exit_code in (0, 1)
    with UniversalIndex(folder) as library:
        hits = library.as_retriever().search("the")
        places = {(hit.metadata["file"], hit.metadata.get("page")) for hit in hits}
    rows = [
        {"question": "eye examination", "pages": [{"file": file, "page": page or 1}]}
        for file, page in sorted(places)
    ]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(json.dumps(row) for row in rows))
    shown = run("tune", questions, "-c", folder)
    assert shown.exit_code == 0, shown.stderr
    assert "documents left out" in shown.stdout
    found = json.loads(run("tune", questions, "-c", folder, "--json", "--dry-run").stdout)
    assert found["saved"] is False
    with UniversalIndex(folder) as library:
        assert library.collection.weights


def test_watching_indexes_what_changes_until_it_is_stopped(tmp_path, monkeypatch):
    from mmrag.ingest import watch

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "old.md").write_text("The old boiler.\n")

    def changes(folders, stop):
        (folder / "new.md").write_text("The new boiler.\n")
        yield [folder / "new.md"]
        (folder / "old.md").unlink()
        yield []
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch", changes)
    result = run("index", folder, "-c", tmp_path / "c", "--watch")
    assert result.exit_code == 130 and "Watching" in result.stderr
    assert result.stdout.count("1 indexed") == 2 and "1 removed" in result.stdout
    listed = json.loads(run("list", "-c", tmp_path / "c", "--json").stdout)
    assert [Path(each["file"]).name for each in listed["files"]] == ["new.md"]
