import base64
import io
import re

import pymupdf
import pytest
from chat_server import ChatServer
from fakes import FakeEmbedder
from PIL import Image
from rich.console import Console
from rich.live import Live
from rich.text import Text
from typer.testing import CliRunner

import mmrag.cli.chat as chat_module
import mmrag.embedders
from mmrag.cli.app import app
from mmrag.cli.chat import show_page
from mmrag.cli.inline import image_codes, protocol
from mmrag.cli.streaming import LinkedMarkdown, Tail
from mmrag.index import UniversalIndex

EYES = "The gold plan covers one eye examination a year for every member of the family."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    with pymupdf.open() as document:
        document.new_page().insert_textbox((72, 72, 500, 200), EYES)
        document.save(folder / "plans.pdf")
    with UniversalIndex(folder / "c", FakeEmbedder("mmrag-nano", dim=64)) as index:
        index.add(folder / "plans.pdf")
    return folder / "c"


@pytest.fixture
def talk(folder, monkeypatch):
    """Runs a conversation of these lines."""
    for name in ("MMRAG_LLM", "OPENAI_BASE_URL", "OPENAI_API_BASE", "MMRAG_COLLECTION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(
        mmrag.embedders, "load_embedder", lambda name, **_: FakeEmbedder(str(name), dim=64)
    )

    def run(*lines, options=()):
        arguments = ["chat", "-c", str(folder), *options]
        return CliRunner().invoke(app, arguments, input="".join(f"{line}\n" for line in lines))

    return run


def test_questions_are_answered_until_the_end_of_the_input(talk):
    result = talk("The gold plan covers one eye examination a year", "", "/sources")
    assert result.exit_code == 0
    assert "one eye examination" in result.stdout
    assert result.stdout.count("plans.pdf") == 2
    assert "\x1b" not in result.stdout


def test_commands_are_explained_and_unknown_ones_named(talk):
    result = talk("/help", "/nothing", "/sources", "/open 1", "/new", "/quit", "never asked")
    assert "/open 1 shows page [1]" in " ".join(result.stdout.split())
    assert "no command /nothing" in result.stderr
    assert "Ask something first" in result.stderr
    assert "Which page?" in result.stderr
    assert "A new conversation" in result.stdout
    assert "never asked" not in result.stdout


def test_open_shows_the_marked_page(talk):
    result = talk("The gold plan covers one eye examination a year", "/open [1]", "/open 9")
    (path,) = re.findall(r"(/\S+\.png)$", result.stdout, re.MULTILINE)
    colours = Image.open(path).convert("RGB").getcolors(1 << 24)
    assert (255, 214, 0) in {colour for _, colour in colours}
    assert "/open with one of 1" in result.stderr


def test_a_follow_up_is_searched_in_its_own_words(talk):
    server = ChatServer("Gold covers one eye examination a year [1].")
    try:
        result = talk("Eye examination?", "And gold?", options=("--base-url", server.url))
        assert f"Searched for: {server.answer}" in result.stdout
        server.requests.clear()
        talk("Eye?", "/new", "Gold?", options=("--base-url", server.url))
        assert len(server.requests) == 2  # nothing was rewritten
    finally:
        server.close()


def test_one_question_that_fails_does_not_end_the_rest(talk):
    server = ChatServer("Gold [1].", mode="deny")
    try:
        result = talk("Eye?", "/sources", options=("--llm", "tiny", "--base-url", server.url))
        assert result.exit_code == 0
        assert "API key" in result.stderr
    finally:
        server.close()


@pytest.mark.parametrize(
    ("environ", "how"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, "kitty"),
        ({"TERM_PROGRAM": "ghostty"}, "kitty"),
        ({"TERM_PROGRAM": "iTerm.app"}, "iterm2"),
        ({"TERM_PROGRAM": "Apple_Terminal", "TERM": "xterm-256color"}, None),
        ({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}, None),
        ({"TERM": "xterm-kitty", "TMUX": "/tmp/x"}, None),
        ({}, None),
    ],
)
def test_terminals_that_show_images(environ, how):
    assert protocol(environ) == how


@pytest.mark.parametrize("how", ["kitty", "iterm2"])
def test_an_image_survives_the_terminals_protocol(how):
    image = Image.effect_noise((90, 90), 50).convert("RGB")
    codes = image_codes(image, how, 40)
    if how == "kitty":
        pieces = re.findall(r"\x1b_G(.*?);(.*?)\x1b\\", codes, re.DOTALL)
        assert len(pieces) > 1
        assert pieces[0][0] == "f=100,a=T,c=40,m=1"
        assert pieces[-1][0] == "m=0"
        assert all(len(piece) <= 4096 for _, piece in pieces)
        data = "".join(piece for _, piece in pieces)
    else:
        head, data = codes.strip("\x1b]\x07\n").split(":")
        assert "inline=1;width=40" in head
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == image.tobytes()


def test_what_a_terminal_cannot_show_is_opened_elsewhere(monkeypatch, tmp_path, capsys):
    launched = []
    monkeypatch.setattr(chat_module.typer, "launch", launched.append)
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(chat_module.sys, "platform", "linux")
    show_page(tmp_path / "a.txt", {"TERM": "xterm-kitty", "DISPLAY": ":0"})
    assert launched == [str(tmp_path / "a.txt")]
    assert "file://" in capsys.readouterr().out
    # Over SSH there is no window to open: the link has to do.
    show_page(tmp_path / "a.txt", {"TERM": "xterm-kitty"})
    assert len(launched) == 1
    assert "file://" in capsys.readouterr().out


def test_marks_in_a_terminal_are_links_to_the_files_cited_and_to_no_others():
    text = "It rained [[1]](file:///a%20b.pdf#page=3), see [this](file:///etc/passwd)."
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    console.print(LinkedMarkdown(text, {"file:///a%20b.pdf#page=3"}))
    shown = console.file.getvalue()
    assert re.search(r"\x1b]8;[^;]*;file:///a%20b\.pdf#page=3\x1b\\", shown)
    assert not re.search(r"\x1b]8;[^;]*;file:///etc", shown)


def test_an_answer_longer_than_the_screen_is_shown_once():
    words = [f"line{n}\n\n" for n in range(40)]
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, height=10, color_system=None)
    with Live(Tail(Text("")), console=console, vertical_overflow="visible") as live:
        for n in range(len(words)):
            live.update(Tail(LinkedMarkdown("".join(words[: n + 1]), ())), refresh=True)
        live.update(LinkedMarkdown("".join(words), ()))
    # What a terminal of ten lines would show, and keep above the screen.
    lines, cursor = [""], 0
    for code in re.findall(r"\x1b\[(?:\d+A|2K|\?\d+[hl])|\r?\n|\r|[^\x1b\r\n]+", stream.getvalue()):
        if code.endswith("A"):
            cursor -= 1
            assert cursor > len(lines) - 11, "the cursor cannot leave the screen"
        elif code.endswith("2K"):
            lines[cursor] = ""
        elif code.endswith("\n"):
            cursor += 1
            lines += [""] * (cursor == len(lines))
        elif code[0] not in "\x1b\r":
            lines[cursor] = code
    shown = [line.strip() for line in lines if line.strip()]
    assert shown == [word.strip() for word in words]
