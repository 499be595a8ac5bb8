"""Commands of the recipes under two processes, as torchrun starts them."""

import os
import socket
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    return ports


def run_on_two(command: list[str], seconds: float, **environ: str) -> None:
    """Run a command as rank 0 and rank 1 at once; both have to succeed."""
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": free_ports(1)[0], **environ}
    shared["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'recipes'}"
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=seconds)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()  # one that waits for the other would stay
