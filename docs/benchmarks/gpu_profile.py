"""Where the time of a model goes, by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_table import synchronize, timed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What a kernel, or an operator of the CPU, does, by parts of its name; the first that fits.
GROUPS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "gemv", "::mm", "::addmm"),
    "fused by the compiler": ("triton",),
    "copies": ("memcpy", "memset", "copy", "cat", "gather", "scatter", "index", "::clone"),
}
REST = "elementwise and the rest"


def kernels(work: Callable[[], object]) -> dict[str, Any]:
    """Shares of the time of ``work`` by group and by kernel; by operator without a card.

    The time is that of a run without the profiler, or the sum of the kernels where that is more.
    """
    work()
    wall = timed(work)
    on_card = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_card else ProfilerActivity.CPU]) as record:
        work()
        synchronize()
    spent: dict[str, tuple[float, int]] = {}
    for event in record.key_averages():
        if on_card and event.device_type == DeviceType.CUDA:
            spent[event.key] = (event.self_device_time_total / 1e6, event.count)
        elif not on_card:
            spent[event.key] = (event.self_cpu_time_total / 1e6, event.count)
    groups = dict.fromkeys([*GROUPS, REST], 0.0)
    for name, (seconds, _) in spent.items():
        groups[group_of(name)] += seconds
    busy = sum(groups.values())
    whole = max(wall, busy)
    groups["nothing runs"] = whole - busy
    longest = sorted(spent, key=lambda name: -spent[name][0])[:12]
    return {
        "wall_ms": wall * 1e3,
        "launches": sum(count for _, count in spent.values()),
        "groups": {name: seconds / whole for name, seconds in groups.items()},
        "longest": [
            {"name": name, "share": spent[name][0] / whole, "calls": spent[name][1]}
            for name in longest
        ],
    }


def group_of(kernel: str) -> str:
    """The group of a kernel by its name."""
    name = kernel.lower()
    fits = (group for group, parts in GROUPS.items() if any(part in name for part in parts))
    return next(fits, REST)


def show(found: dict[str, Any]) -> None:
    """Print a profile."""
    print(f"\n{found['launches']} launches in {found['wall_ms']:.0f} ms\n")
    print("| kernels | share of the time |\n|---|---|")
    for name, share in found["groups"].items():
        print(f"| {name} | {share:.3f} |")
    print("\n| the longest | share | calls |\n|---|---|---|")
    for row in found["longest"]:
        print(f"| {row['name'][:90]} | {row['share']:.3f} | {row['calls']} |")
