"""The server as a process: its start, its end, and what a stop in the middle leaves."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from mmrag.cli.app import app
from mmrag.server.run import _listen

HERE = Path(__file__).parent


@contextmanager
def serving(folder, *options, **environ):
    """A running server and its address; killed at the end if a test has not ended it."""
    paths = [str(HERE.parents[1]), str(HERE.parent)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), **environ}
    command = [sys.executable, str(HERE / "serve_fake.py"), "serve", "-c", str(folder)]
    process = subprocess.Popen(
        [*command, "--port", "0", *options], env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"Serving on (http://\S+)", line):
                yield process, found[1]
                return
        pytest.fail("".join(lines))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def stop(process, sign=signal.SIGTERM):
    process.send_signal(sign)
    return process.wait(120)


def indexed(url, name, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        files = httpx.get(f"{url}/api/files").json()["files"]
        if name in {row["name"] for row in files}:
            return True
        time.sleep(0.05)
    return False


def test_an_empty_collection_is_served_filled_and_closed(tmp_path):
    with serving(tmp_path / "c") as (process, url):
        assert httpx.get(f"{url}/ready").status_code == 200
        httpx.post(f"{url}/api/files", files={"file": ("a.txt", b"The pump was oiled.")})
        assert indexed(url, "a.txt")
        assert stop(process) == -signal.SIGTERM  # closed first: the next one gets its lock
    with serving(tmp_path / "c") as (process, url):
        assert indexed(url, "a.txt")
        assert stop(process, signal.SIGINT) == 130


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_lost_when_it_is_stopped_over_an_upload(tmp_path, sign):
    text = "\n\n".join(f"Passage {n}: " + "the pump was oiled again. " * 60 for n in range(20))
    with serving(tmp_path / "c", SLOW="1") as (process, url):
        reply = httpx.post(f"{url}/api/files", files={"file": ("long.txt", text.encode())})
        assert reply.status_code == 202
        stop(process, sign)
    with serving(tmp_path / "c") as (process, url):
        assert indexed(url, "long.txt")
        hits = httpx.post(f"{url}/api/search", json={"query": "passage 19"}).json()["hits"]
        assert hits
        stop(process)


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_half_an_upload_leaves_nothing_and_can_be_sent_again(tmp_path, sign):
    form = httpx.Request(
        "POST",
        "http://server/api/files",
        files={"file": ("a.txt", b"The pump was oiled. " * 5_000)},
    )
    body = form.read()
    with serving(tmp_path / "c") as (process, url):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /api/files HTTP/1.1\r\nHost: {host}:{port}\r\n"
            head += f"Content-Type: {form.headers['content-type']}\r\n"
            head += f"Content-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body[: len(body) // 2])
            assert httpx.get(f"{url}/ready").status_code == 200  # it goes on beside the upload
            assert stop(process, sign) == -sign
    with serving(tmp_path / "c") as (process, url):
        assert httpx.get(f"{url}/api/files").json()["files"] == []
        assert not [path for path in tmp_path.rglob("*") if ".incoming" in path.name]
        form.headers["host"] = url.removeprefix("http://")
        form.url = httpx.URL(f"{url}/api/files")
        assert httpx.Client().send(form).status_code == 202
        assert indexed(url, "a.txt")
        stop(process)


def test_wrong_use_is_told_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delenv("MMRAG_API_KEYS", raising=False)
    for options in (["--host", "0.0.0.0"], ["--api-keys", str(tmp_path / "none")]):
        result = CliRunner().invoke(app, ["serve", *options])
        assert result.exit_code == 2
        assert "Error:" in result.stderr


@pytest.mark.parametrize("command", ["serve", "mcp"])
def test_a_missing_extra_is_named(command, monkeypatch):
    monkeypatch.setattr("mmrag.server.find_spec", lambda name: None)
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    assert f"pip install 'mmrag[{command}]'" in result.stderr


def test_a_reply_is_sent_without_waiting_for_acknowledgement():
    """With Nagle's algorithm every request took 40 ms more."""

    async def accepted() -> int:
        listening = _listen("127.0.0.1", 0)
        found = asyncio.get_running_loop().create_future()

        async def serve(reader, writer):
            of_client = writer.get_extra_info("socket")
            found.set_result(of_client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(serve, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            option = await found
            writer.close()
        return option

    assert asyncio.run(accepted())
