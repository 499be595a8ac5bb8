"""A server under load: time to ready, first token, latency and memory.

    python docs/benchmarks/serve_load.py build/demo/library            # of make demo
    python docs/benchmarks/serve_load.py FOLDER --seconds 20 --clients 1 8 32

The server and the clients share this machine. Questions are those of docs/samples. Without a
language model: answers quote sentences, so no time of a model is in them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import date
from functools import partial
from itertools import cycle
from pathlib import Path

import httpx
import psutil

SAMPLES = Path(__file__).parents[1] / "samples" / "questions.json"


def start(folder: Path) -> tuple[subprocess.Popen, str, float]:
    """The server, its address, and how many seconds it took to be ready."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", "from mmrag.cli.app import main; main()", "serve"]
    command += ["-c", str(folder), "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"Serving on (http://\S+)", line):
            return process, found[1], time.perf_counter() - begun
    raise SystemExit("".join(lines))


async def first_token(url: str, question: str) -> float:
    """Seconds from the request to the first piece of the answer."""
    begun = time.perf_counter()
    async with (
        httpx.AsyncClient(base_url=url, timeout=120) as client,
        client.stream("POST", "/api/ask", json={"query": question}) as reply,
    ):
        async for line in reply.aiter_lines():
            if line == "event: token":
                return time.perf_counter() - begun
    raise SystemExit("There was no answer.")


async def load(url: str, path: str, clients: int, seconds: float, questions: list[str]):
    """Latencies of all requests that came back, and how many were turned away."""
    took, refused = [], 0
    until = time.perf_counter() + seconds
    asked = cycle(questions)

    async def ask(client: httpx.AsyncClient) -> None:
        nonlocal refused
        while time.perf_counter() < until:
            body = {"query": next(asked)} | ({"stream": False} if path == "/api/ask" else {})
            begun = time.perf_counter()
            reply = await client.post(path, json=body)
            if reply.status_code == 429:
                refused += 1
                await asyncio.sleep(float(reply.headers["Retry-After"]))
            else:
                reply.raise_for_status()
                took.append(time.perf_counter() - begun)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        begun = time.perf_counter()
        await asyncio.gather(*(ask(client) for _ in range(clients)))
    return took, refused, time.perf_counter() - begun


def mebibytes(process: psutil.Process) -> int:
    """Resident memory."""
    return round(process.memory_info().rss / 2**20)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    questions = [row["question"] for row in json.loads(SAMPLES.read_text())]
    process, url, ready = start(arguments.folder)
    try:
        held = partial(mebibytes, psutil.Process(process.pid))
        tokens = [asyncio.run(first_token(url, question)) for question in questions[:5]]
        cores, busy = len(os.sched_getaffinity(0)), os.getloadavg()[0]
        print(f"{date.today()}, {cores} cores, load average {busy:.1f} at the start")
        first = statistics.median(tokens)
        print(f"ready after {ready:.1f} s, first token after {first:.2f} s, memory {held()} MiB\n")
        print("| | clients | requests/s | p50 ms | p99 ms | turned away | memory MiB |")
        print("|---|---|---|---|---|---|---|")
        for path in ("/api/search", "/api/ask"):
            for clients in arguments.clients:
                took, refused, seconds = asyncio.run(
                    load(url, path, clients, arguments.seconds, questions)
                )
                parts = statistics.quantiles(took, n=100, method="inclusive")
                p50, p99 = (f"{1000 * parts[n]:.0f}" for n in (49, 98))
                row = (path, clients, f"{len(took) / seconds:.1f}", p50, p99, refused, held())
                print(f"| {' | '.join(map(str, row))} |", flush=True)
    finally:
        process.terminate()
        process.wait(60)


if __name__ == "__main__":
    main()
