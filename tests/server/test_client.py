"""Commands that find a running server and use it."""

import json
import os

import pytest
from fakes import make_image
from PIL import Image
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.errors import EndpointError
from mmrag.queries import MultimodalQuery, Where
from mmrag.server.address import Address, find_address, remove_address, write_address
from mmrag.server.client import ServerClient, find_server

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


def test_options_that_the_server_does_not_take_are_named(served):
    options = ("-c", served, "--llm", "gpt-4o", "--plan")
    asked = run("ask", "Who gets an eye examination?", *options, MMRAG_API_KEY=KEY)
    assert "ignored here: --llm, --plan" in asked.stderr


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
