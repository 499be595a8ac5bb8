import json
import logging
import os
import pty
import select
import subprocess
import sys
import time

import pytest
import typer

from mmrag.cli.console import errors, print_json, say
from mmrag.errors import ConfigError, EndpointError

STEERING = "a\x1b[31m\x07\x9b2J\u202eb"


def test_json_cannot_steer_a_terminal(capsys):
    print_json({"file": STEERING})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"file": STEERING}
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


def test_neither_can_warnings_or_errors(capsys):
    with pytest.raises(typer.Exit), errors(debug=False):
        logging.getLogger("mmrag.reading").warning("%s is damaged", STEERING)
        raise EndpointError(f"no {STEERING}")
    assert capsys.readouterr().err == "WARNING: a[31m2Jb is damaged\nError: no a[31m2Jb\n"


def test_a_long_line_stays_one_line(capsys):
    say("word " * 100)
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), [(ConfigError("x"), 2), (EndpointError("x"), 3)])
def test_exit_codes(error, code):
    with pytest.raises(typer.Exit) as exit_, errors(debug=False):
        raise error
    assert exit_.value.exit_code == code


def test_a_terminal_shows_what_is_waited_for_before_the_heavy_imports(tmp_path):
    """What is imported when the first step is shown: the packages that take seconds are not."""
    code = (
        "import sys\n"
        "from mmrag.cli import progress\n"
        "from mmrag.cli.app import app\n"
        "first = progress.Step.__call__\n"
        "def show(self, text):\n"
        "    first(self, text)\n"
        "    heavy = {'torch', 'llama_index', 'numpy', 'qdrant_edge'} & set(sys.modules)\n"
        "    print('HEAVY', sorted(heavy), file=sys.stderr)\n"
        "    import time; time.sleep(0.5)\n"
        "    sys.exit(0)\n"
        "progress.Step.__call__ = show\n"
        f"app(['search', 'eye', '-c', {str(tmp_path / 'none')!r}])"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child)
    os.close(child)
    shown = _read(parent, process)
    assert "Opening" in shown
    assert "HEAVY []" in shown


def test_a_log_gets_steps_only_where_asked_for():
    code = (
        "from mmrag.cli.progress import working\n"
        "with working(log=True) as step: step('Opening x')\n"
        "with working() as step: step('Searching')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "Opening x\n"


def test_indexing_reports_to_a_log_though_no_file_is_done(monkeypatch, capsys):
    from mmrag.cli import progress

    monkeypatch.setattr(progress, "_LINE_EVERY", 0.01)
    with progress.indexing():
        deadline = time.monotonic() + 10
        while "Reading (" not in capsys.readouterr().err:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def _read(terminal: int, process: subprocess.Popen) -> str:
    """All that a process writes to a terminal."""
    shown = b""
    while True:
        ready, _, _ = select.select([terminal], [], [], 60)
        assert ready, shown
        try:
            piece = os.read(terminal, 4096)
        except OSError:  # Linux's end of a terminal
            piece = b""
        if not piece:
            break
        shown += piece
    process.wait(10)
    return shown.decode()
