"""What ``mmrag doctor`` says of the machine: versions, device, memory, and what can be reached."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx

from mmrag.cli.progress import Step
from mmrag.server.client import find_server

PACKAGES = ("mmrag", "torch", "transformers", "llama-index-core", "qdrant-edge-py", "qdrant-client")
_PATIENCE = 3.0  # seconds


def machine(collection: str, step: Step) -> dict[str, Any]:
    """Versions, device, memory and disk in GB, and whether hub and servers answer.

    collection: a folder or URL. Nothing here is a reason to fail: what cannot be reached is said.
    """
    step("Looking at the machine")
    is_url = "://" in collection
    server = None if is_url else find_server(collection)
    return {
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        "device": _device(),
        "memory": _memory(),
        "disk": None if is_url else _disk(Path(collection).expanduser().absolute()),
        "hub": _hub(),
        "server": server.address.url if server else None,
        "qdrant": _qdrant(collection) if is_url else None,
    }


def machine_lines(found: dict[str, Any]) -> list[str]:
    """The same for people."""
    versions = ", ".join(f"{name} {each or 'missing'}" for name, each in found["versions"].items())
    memory = "unknown"
    if found["memory"]:
        memory = "{available:.1f} of {total:.1f} GB available".format(**found["memory"])
    disk = "" if found["disk"] is None else f"; disk of the collection: {found['disk']:.1f} GB free"
    lines = [
        f"Versions: {versions}",
        f"Device: {found['device']}",
        f"Memory: {memory}{disk}",
        f"Model hub: {found['hub']}",
    ]
    if found["qdrant"]:
        lines.append(f"Qdrant: {found['qdrant']}")
    else:
        lines.append(f"mmrag serve: {found['server'] or 'none holds this collection'}")
    return lines


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device() -> str:
    from mmrag.errors import ModelError
    from mmrag.modeling.loading import device_name

    try:
        return device_name()
    except (ImportError, OSError, RuntimeError, ModelError) as error:  # a broken driver or library
        return f"unknown: {error}"


def _memory() -> dict[str, float] | None:
    """Memory in GB; None where the system does not tell."""
    try:
        page = os.sysconf("SC_PAGE_SIZE") / 1e9
        total = os.sysconf("SC_PHYS_PAGES") * page
        available = os.sysconf("SC_AVPHYS_PAGES") * page
    except (ValueError, OSError, AttributeError):
        return None
    # Free memory leaves out what the system keeps of files and would give back.
    info = Path("/proc/meminfo")
    for line in info.read_text(encoding="ascii").splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024 / 1e9
    return {"total": total, "available": available}


def _disk(folder: Path) -> float:
    # A collection that is not made yet goes to the disk of the folder above it.
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return shutil.disk_usage(there).free / 1e9


def _hub() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "not asked, since HF_HUB_OFFLINE is set; models on this machine work"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return _asked(
        address,
        lambda: httpx.head(address, timeout=_PATIENCE, follow_redirects=True),
        lambda _: "reachable",
        "; models on this machine work",
    )


def _qdrant(url: str) -> str:
    key = os.environ.get("QDRANT_API_KEY")
    headers = {"api-key": key} if key else {}
    return _asked(
        url,
        lambda: httpx.get(url, headers=headers, timeout=_PATIENCE).raise_for_status(),
        lambda reply: f"version {reply.json()['version']}",
        "",
    )


def _asked(
    address: str,
    ask: Callable[[], httpx.Response],
    told: Callable[[httpx.Response], str],
    otherwise: str,
) -> str:
    """What an address says of itself. otherwise: what follows where it says nothing."""
    try:
        return f"{address}: {told(ask())}"
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        return f"{address}: not reachable ({str(error) or type(error).__name__}){otherwise}"
