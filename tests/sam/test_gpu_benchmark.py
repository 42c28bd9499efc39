"""The script that measures a GPU, tried at the smallest size on a CPU, with Triton's kernels interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.mark.whole
def test_every_row_of_the_gpu_script_works_at_the_smallest_size(tmp_path):
    pytest.importorskip("triton")
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(tmp_path)]
    run = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    wrong = [row for row in rows if "left_out" in row or "error" in row]
    assert wrong == []
    assert {row["kind"].split(",")[0] for row in rows} == {
        "correctness", "gradients", "encoder", "lora_step", "attention", "ladder_step",
    }  # fmt: skip
    close = [row["relative"] for row in rows if row.get("precision") == "fp32" and "relative" in row]
    assert len(close) == 10 and max(close) < 1e-5  # all ways, forwards and backwards
    assert all("ratio" in row for row in rows if row["kind"] in ("encoder", "lora_step") and "ms" in row)
