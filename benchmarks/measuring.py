"""What the benchmarks share: alternating timings in one process, peak memory in fresh ones, facts of the machine."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import samseg_monai
from samseg_monai.bundles.running import reuse_memory
from samseg_monai.faults import peak_memory

RESULTS = Path(__file__).parent / "results"
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_tile")


def seconds(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call, by the wall's clock or another."""
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def alternate(
    runs: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each after one warm-up; in turn, so that a busy machine slows all alike.

    With ``time.process_time`` it is the processors' time, which the work of others hardly changes.
    """
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, clock))
    return {name: statistics.median(values) for name, values in times.items()}


def resident_start_bytes() -> int:
    """What this process holds once the allocator has given back all that is free; the high-water mark starts here.

    Without it, what building a network left behind in the allocator would count for one side and not for the other.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def in_fresh_processes(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Results of ``function``, each from a process of its own, one after the other."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(function, arguments, 1)


def alone(make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...], repeats: int, ours: bool) -> float:
    """Median processor seconds, after one warm-up, of what ``make`` makes; on one thread."""
    torch.set_num_threads(1)
    if ours:
        reuse_memory()
    return alternate({"": make(*arguments)}, repeats, time.process_time)[""]


def in_own_processes(
    make: Callable[..., Callable[[], Any]],
    arguments: Mapping[str, tuple[Any, ...]],
    repeats: int,
    ours: Collection[str],
) -> dict[str, float]:
    """Processor seconds as ``alternate`` finds them, but each side in a process of its own, as it starts itself.

    What a process sets for all that runs in it is then that side's own: the sides named in ``ours`` tune the allocator
    as ``samseg`` does when it starts a run.
    """
    found = in_fresh_processes(alone, [(make, given, repeats, name in ours) for name, given in arguments.items()])
    return dict(zip(arguments, found, strict=True))


def machine() -> dict[str, Any]:
    """Processor, instruction sets that matter to bf16, and threads."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    found = set((re.search(r"^flags\s*:\s*(.+)$", text, re.MULTILINE) or ["", ""])[1].split())
    return {
        "processor": model[1].strip() if model else platform.machine(),
        "flags": {flag: flag in found for flag in FLAGS},
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }


def record(name: str, result: Mapping[str, Any]) -> None:
    """Write ``results/<name>.json`` and show it."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "samseg_monai": samseg_monai.__version__,
    }
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    entry = {"name": name, **result, "device": device, "machine": machine(), "versions": versions, "date": date}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(entry, indent=2) + "\n")
    print(json.dumps(entry, indent=2))
