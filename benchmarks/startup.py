"""Seconds before anything happens: help, ``samseg info``, imports, and the first step of a training of pico.

Each is measured in fresh processes with one thread, of this checkout and of another one (``--before``) in turn. The
training is ``python -m monai.bundle run`` with the demo's settings on phantoms of 48 x 48 x 12 voxels, from the start
of the process to the end of its first iteration; what it is compared with is a process that does its imports alone.
Writes benchmarks/results/startup.json:

    python benchmarks/startup.py --before CHECKOUT
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measuring import record

HERE = Path(__file__).resolve().parents[1]
REPEATS = 3
NEEDED = (
    "torch, monai.bundle, ignite, samseg_monai.bundles.running, samseg_monai.bundles.record, samseg_monai.checkpoints, "
    "samseg_monai.data.slices, samseg_monai.handlers, samseg_monai.inferers, samseg_monai.metrics, "
    "samseg_monai.networks, samseg_monai.strategies, samseg_monai.training, samseg_monai.transforms"
)
SAMSEG = "from samseg_monai.cli import main; main()"
# leaves at the end of the first iteration
STEP = """
import os, runpy, sys
from ignite.engine import Engine, Events
fire = Engine._fire_event
def leave(self, event, *more, **named):
    if event == Events.ITERATION_COMPLETED:
        os._exit(0)
    return fire(self, event, *more, **named)
Engine._fire_event = leave
runpy.run_module("monai.bundle", run_name="__main__")
"""
ROWS = {
    "samseg --help": (SAMSEG, ["--help"]),
    "samseg predict --help": (SAMSEG, ["predict", "--help"]),
    "import samseg_monai": ("import samseg_monai", []),
    "samseg info": (SAMSEG, ["info"]),
    "imports of a training": (f"import {NEEDED}", []),
    "first step of a training": (STEP, []),
}


def measured(checkout: Path, code: str, words: list[str]) -> tuple[float, float]:
    """Seconds of the wall's clock and of processors of a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env=environment,
        cwd=Path(__file__).parent,  # Python looks for packages where it starts, before all other places
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    told = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(told.decode())
    return wall, usage.ru_utime + usage.ru_stime


def training(checkout: Path, data: Path, output: Path) -> list[str]:
    """Words of the command that trains pico."""
    configs = checkout / "bundles" / "meningioma_segmentation_lora" / "configs"
    files = [str(configs / f"{name}.json") for name in ("train", "demo")]
    return ["run", "--config_file", str(files), "--dataset_dir", str(data), "--output_dir", str(output)]


def main() -> None:
    """Measure both checkouts in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout to compare with")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    given = parser.parse_args()
    sides = {"now": HERE} if given.before is None else {"before": given.before.resolve(), "now": HERE}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {row: {side: [] for side in sides} for row in ROWS}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary) / "phantoms"
        measured(HERE, SAMSEG, ["phantom", "brats", "--output", str(data), "--cases", "6", "--shape", "48,48,12"])
        listed = str(data / "datalist.json")
        measured(HERE, SAMSEG, ["prepare", "brats-men", "--src", str(data), "--output", listed])
        for turn in range(given.repeats):
            for row, (code, words) in ROWS.items():
                for side, checkout in sides.items():
                    run = Path(temporary) / f"{side}{turn}"
                    more = training(checkout, data, run) if code == STEP else words
                    seconds = measured(checkout, code, more)
                    found[row][side].append(seconds)
                    print(row, side, *(f"{value:.2f}" for value in seconds), file=sys.stderr)
    rows: dict[str, Any] = {}
    for row, values in found.items():
        rows[row] = {
            f"{side}_{kind}_s": round(statistics.median(run[index] for run in runs), 2)
            for side, runs in values.items()
            for index, kind in enumerate(("wall", "processor"))
        }
        if "before" in sides:
            rows[row]["ratio"] = round(rows[row]["before_processor_s"] / rows[row]["now_processor_s"], 2)
    share = {
        side: round(
            rows["first step of a training"][f"{side}_processor_s"]
            / rows["imports of a training"][f"{side}_processor_s"],
            2,
        )
        for side in sides
    }
    record("startup", {"repeats": given.repeats, "rows": rows, "first_step_by_imports": share})


if __name__ == "__main__":
    main()
