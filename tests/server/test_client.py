"""Commands that find a running server and use it."""

import dataclasses
import json
import os
import shutil

import pytest
from fakes import make_image
from PIL import Image
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.errors import EndpointError
from mmrag.queries import MultimodalQuery, Where
from mmrag.server.address import Address, find_address, remove_address, write_address
from mmrag.server.client import ServerClient, find_server

from .conftest import build, is_warm, write_pdf

KEY = "a-long-random-key"


def run(*args, **environ):
    return CliRunner().invoke(app, [str(arg) for arg in args], env=environ)


@pytest.fixture
def served(listening, built):
    """The folder of a collection that a server holds."""
    url = listening(api_keys=(KEY,))
    write_address(built / "plans", Address(url, "plans"))
    yield built / "plans"
    remove_address(built / "plans")


def test_search_and_ask_go_to_the_server_that_holds_the_folder(served):
    found = run("search", "dental cleaning", "-c", served, "--json", MMRAG_API_KEY=KEY)
    assert found.exit_code == 0, found.stderr
    assert json.loads(found.stdout)["hits"][0]["page"] == 2
    asked = run("ask", "Who gets an eye examination a year?", "-c", served, MMRAG_API_KEY=KEY)
    assert asked.exit_code == 0
    assert "one eye examination" in asked.stdout
    assert "plans.pdf" in asked.stdout.split("Sources")[1]


def test_filters_and_images_go_along(served, tmp_path):
    only = ("--pages", "2", "--json")
    found = run("search", "eye dental", "-c", served, *only, MMRAG_API_KEY=KEY)
    assert {hit["page"] for hit in json.loads(found.stdout)["hits"]} == {2}
    image = make_image(tmp_path / "a.png")
    found = run("search", "-i", image, "-c", served, "--json", MMRAG_API_KEY=KEY)
    assert json.loads(found.stdout)["hits"]


def test_pages_are_saved_from_an_answer_of_the_server(served, tmp_path):
    question = "Who gets an eye examination a year?"
    options = ("-c", served, "--save-pages", tmp_path / "pages")
    assert run("ask", question, *options, MMRAG_API_KEY=KEY).exit_code == 0
    (saved,) = (tmp_path / "pages").iterdir()
    colours = Image.open(saved).convert("RGB").getcolors(1 << 24)
    assert (255, 214, 0) in {colour for _, colour in colours}


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("ask", ("--llm", "gpt-4o", "--plan")),
        ("search", ("--embedder", "other")),
        ("chat", ("--context-window", "4096")),
        ("index", ("--ocr", "off", "--watch")),
    ],
)
def test_options_that_the_server_does_not_take_are_refused(served, command, options):
    what = () if command == "chat" else ("eye",)
    refused = run(command, *what, "-c", served, *options, MMRAG_API_KEY=KEY)
    assert refused.exit_code == 2
    named = ", ".join(option for option in options if option.startswith("--"))
    assert f"does not take {named}." in refused.stderr
    assert "stop the server" in refused.stderr


def test_a_model_of_the_environment_is_no_option(served):
    asked = run(
        *("ask", "Who gets an eye examination?", "-c", served),
        MMRAG_API_KEY=KEY,
        MMRAG_LLM="gpt-4o",
        OPENAI_BASE_URL="http://127.0.0.1:9",
    )
    assert asked.exit_code == 0, asked.stderr


def test_an_explanation_is_as_it_would_be_here(listening, built, tmp_path):
    shutil.copytree(built / "plans", tmp_path / "plans")
    words = ("search", "dental cleaning", "-c", tmp_path / "plans", "--explain", "--json")
    here = json.loads(run(*words).stdout)
    assert here["hits"][0]["explanation"]["rankings"]
    write_address(tmp_path / "plans", Address(listening(), "plans"))
    there = json.loads(run(*words).stdout)
    assert [hit["explanation"] for hit in there["hits"]] == [
        hit["explanation"] for hit in here["hits"]
    ]


@pytest.fixture
def own(make_client, listening, tmp_path):
    """A collection of its own, served and announced; its folder and its library."""
    build(tmp_path)
    url = listening(locations=(str(tmp_path / "plans"),))
    (library,) = listening.libraries
    library.announce(url)
    return tmp_path / "plans", library


def test_files_are_indexed_listed_and_removed_at_the_server(own, tmp_path, monkeypatch):
    folder, library = own
    monkeypatch.setenv("COLUMNS", "500")  # temporary folders may have long names
    monkeypatch.chdir(tmp_path)
    write_pdf(tmp_path / "more" / "wells.pdf", "The well is nine metres deep.", "Second page.")
    (tmp_path / "more" / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    done = run("index", "more", "-c", folder, "--meta", "team=water")
    assert done.exit_code == 1  # one could not be read
    assert "1 indexed, 1 failed" in done.stdout and "2 pages" in done.stdout
    assert "bad.pdf" in done.stderr
    assert is_warm(library)
    report = json.loads(run("index", "more", "-c", folder, "--json").stdout)
    assert report["unchanged"] == [str(tmp_path / "more" / "wells.pdf")]
    listed = json.loads(run("list", "-c", folder, "--json").stdout)
    assert listed["embedder"] == "mmrag-nano"
    assert [vars(entry)["metadata"] for entry in library.files()] == [{}, {"team": "water"}]
    assert [row["nodes"] for row in listed["files"]] == [each.nodes for each in library.files()]
    assert "wells.pdf" in run("list", "-c", folder).stdout
    removed = run("remove", "wells.pdf", "nothing.pdf", "-c", folder)
    assert removed.stdout.strip() == f"removed {tmp_path / 'more' / 'wells.pdf'}"
    assert "No indexed file matches nothing.pdf." in removed.stderr
    assert len(library.files()) == 1


def test_files_are_indexed_by_path_for_who_may_read_the_folder_only(own, tmp_path):
    folder, library = own
    secret = folder / "server.secret"
    assert secret.stat().st_mode & 0o077 == 0
    secret.write_text("guessed")
    refused = run("index", tmp_path / "files", "-c", folder)
    assert refused.exit_code == 3
    assert "only for the user who started the server" in refused.stderr
    client = ServerClient(dataclasses.replace(find_address(str(folder)), secret=library.secret))
    with pytest.raises(EndpointError, match="absolute"):
        list(client._events("/api/index", {"paths": ["files"], "secret": library.secret}))


def test_indexing_waits_for_others_and_ends_when_nobody_waits(own, tmp_path):
    folder, library = own
    for n in range(30):
        (tmp_path / "files" / f"{n}.md").write_text(f"Words of {n}. " * 50)
    client = find_server(str(folder))

    class Left(Exception):
        pass

    seen = []

    def leave(now):
        seen.append(now)
        if len(seen) == 2:
            library.writer.lock.release()
        if now is not None:
            raise Left

    library.writer.lock.acquire()
    library.index.embedder  # noqa: B018 - loaded
    with pytest.raises(Left):
        client.index([tmp_path / "files"], leave)
    assert seen[0] is None and seen[1] is None
    # The lock is free again as soon as the server has noticed.
    assert library.writer.lock.acquire(timeout=20)
    library.writer.lock.release()


def test_snapshots_are_made_while_the_server_runs_and_restored_when_it_is_stopped(own):
    folder, library = own
    assert run("snapshot", "create", "first", "-c", folder).exit_code == 0
    assert run("snapshot", "create", "first", "-c", folder).exit_code == 3
    assert "first" in run("snapshot", "list", "-c", folder).stdout
    refused = run("snapshot", "restore", "first", "-c", folder)
    assert refused.exit_code == 3 and "Stop the server" in refused.stderr
    assert "Stop the server" in run("doctor", "-c", folder).stderr
    library.close()
    assert run("snapshot", "restore", "first", "-c", folder).exit_code == 0


def test_a_wrong_key_says_what_to_do(served):
    refused = run("search", "eye", "-c", served, MMRAG_API_KEY="another-long-key")
    assert refused.exit_code == 3
    assert "MMRAG_API_KEY" in refused.stderr


def test_a_server_that_was_killed_is_not_asked(built):
    write_address(built / "plans", Address("http://127.0.0.1:9", "plans"))
    try:
        assert find_server(str(built / "plans")) is None
        assert run("search", "eye", "-c", built / "plans").exit_code == 0
    finally:
        remove_address(built / "plans")


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"url": "http://evil.example:80", "collection": "a"}',
        '{"url": "file:///etc", "collection": "a"}',
        '{"url": 3, "collection": "a"}',
        '{"url": "http://127.0.0.1:1"}',
    ],
)
def test_a_file_that_leads_elsewhere_is_ignored(tmp_path, text):
    (tmp_path / "server.json").write_text(text)
    assert find_address(str(tmp_path)) is None


def test_an_address_is_taken_back_by_its_own_process_alone(tmp_path):
    address = Address("http://127.0.0.1:80", "a")
    write_address(tmp_path, address)
    assert find_address(str(tmp_path)) == address
    values = json.loads((tmp_path / "server.json").read_text())
    (tmp_path / "server.json").write_text(json.dumps(values | {"pid": os.getpid() + 1}))
    remove_address(tmp_path)
    assert find_address(str(tmp_path)) == address


def test_a_conversation_at_a_server(listening, chat_server):
    chat_server.answer = "Gold covers one eye examination a year [1]."
    client = ServerClient(Address(listening(llm=chat_server), "plans"))
    question, stream = client.ask(MultimodalQuery("Who gets an eye examination?"))
    assert len(list(stream.response_gen)) > 3
    answer = stream.get_response()
    assert answer.sources[0].cited
    history = [("user", question), ("assistant", answer.response)]
    question, _ = client.ask(MultimodalQuery("And gold?", where=Where(pages=(1, 1))), history)
    assert question == chat_server.answer  # the stand-in rewrites everything to this
    chat_server.mode = "cut"
    _, stream = client.ask(MultimodalQuery("eye"))
    with pytest.raises(EndpointError, match="broke off"):
        list(stream.response_gen)
