"""Folders that a server watches."""

import logging
import shutil
import time
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.errors import ConfigError
from mmrag.server.app import create_app
from mmrag.server.library import open_libraries

pytest.importorskip("watchfiles")


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A client of a server that watches the folder ``in``, in which ``old.txt`` is."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Path("in/old.txt").write_text("the words of old")
    libraries = open_libraries(["library"])
    libraries.get().watch([Path("in")])
    with TestClient(create_app(libraries), base_url="http://localhost") as client:
        yield client
    shutil.rmtree("library")


def until(client, holds, seconds=20):
    """The reply of /api/files, once something holds for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        reply = client.get("/api/files").json()
        if holds(reply):
            return reply
        time.sleep(0.1)
    raise AssertionError(reply)


def names(reply):
    return {row["file"] for row in reply["files"]}


def test_changes_are_indexed_and_what_went_is_forgotten(watched):
    reply = until(watched, lambda reply: names(reply) == {"in/old.txt"})
    assert reply["watched"] == ["in"]
    Path("in/new.txt").write_text("the words of new")
    until(watched, lambda reply: names(reply) == {"in/old.txt", "in/new.txt"})
    Path("in/old.txt").rename("in/renamed.txt")
    until(watched, lambda reply: names(reply) == {"in/renamed.txt", "in/new.txt"})
    Path("in/new.txt").unlink()
    until(watched, lambda reply: names(reply) == {"in/renamed.txt"})
    notes = [job["note"] for job in watched.get("/api/jobs").json()["jobs"]]
    assert "Files that are gone and were forgotten: 1." in notes


def test_what_cannot_be_read_is_listed_until_it_can(watched, caplog):
    caplog.set_level(logging.WARNING, "mmrag.server")
    until(watched, lambda reply: reply["files"])
    Path("in/broken.pdf").write_bytes(b"%PDF-1.7 nothing")
    reply = until(watched, lambda reply: reply["unread"])
    [unread] = reply["unread"]
    assert (unread["file"], unread["name"]) == ("in/broken.pdf", "broken.pdf")
    assert "not a readable PDF" in unread["errors"][0]
    assert "in/broken.pdf: not a readable PDF" in caplog.text
    Path("in/broken.pdf").unlink()
    until(watched, lambda reply: not reply["unread"])


def test_watching_ends_with_the_server(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    libraries = open_libraries(["library"])
    library = libraries.get()
    library.watch([Path("in")])
    started = time.monotonic()
    libraries.close()
    assert time.monotonic() - started < 10
    assert library.watched == []


def test_watching_that_fails_is_logged_and_no_longer_named(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    monkeypatch.setattr("mmrag.server.watching.watch", lambda *_: 1 / 0)
    libraries = open_libraries(["library"])
    library = libraries.get()
    library.watch([Path("in")])
    end = time.monotonic() + 10
    while library.watched and time.monotonic() < end:
        time.sleep(0.05)
    assert library.watched == []
    assert "Watching stopped" in caplog.text
    libraries.close()


def test_a_folder_that_is_not_there_is_refused_before_models_are_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", "-c", "library", "--watch", "missing"])
    assert result.exit_code == 2
    assert not Path("library").exists()


def test_only_folders_are_watched(opened):
    with pytest.raises(ConfigError, match="no folder"):
        opened().get().watch([Path("missing")])
