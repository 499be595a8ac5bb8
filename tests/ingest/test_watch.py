"""Watching folders."""

import threading
from pathlib import Path

import pytest

from mmrag.errors import ConfigError
from mmrag.ingest.watch import require, watch
from mmrag.reading.files import IMAGES_MARK

pytest.importorskip("watchfiles")


@pytest.fixture
def changes(tmp_path, monkeypatch):
    """Does something in the watched folder ``in``, and gives the first change that is told."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    stop = threading.Event()

    def after(act):
        timers = [threading.Timer(0.5, act), threading.Timer(20, stop.set)]
        for timer in timers:
            timer.start()
        try:
            return next(watch(["in"], stop), None)
        finally:
            for timer in timers:
                timer.cancel()

    return after


def test_new_files_are_named_below_the_folder_as_it_was_given(changes):
    def act():
        library = Path("in/library/images")
        library.mkdir(parents=True)
        (library / IMAGES_MARK).touch()
        for name in ("library/images/p1.png", "a.txt", ".hidden.txt", "program.exe", "b.md"):
            Path("in", name).write_text("x")

    assert changes(act) == [Path("in/a.txt"), Path("in/b.md")]


def test_files_that_went_are_told_by_an_empty_list(changes):
    Path("in/a.txt").write_text("x")
    assert changes(Path("in/a.txt").unlink) == []


def test_metadata_of_a_file_counts_as_its_change(changes):
    Path("in/a.txt").write_text("x")
    assert changes(lambda: Path("in/a.txt.meta.json").write_text("{}")) == [Path("in/a.txt")]


def test_only_folders_are_watched(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="no folder"):
        require([tmp_path / "a.txt"])
