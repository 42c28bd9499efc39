"""The same evaluation by one process and by two (gloo, as `torchrun` starts them) gives the same numbers."""

import csv
import os
import subprocess
import sys
from pathlib import Path

from samseg_monai.cli.workflow import run_workflow
from tests.conftest import TINY

CONFIGS = Path(__file__).parents[1] / "bundles" / "meningioma_segmentation_lora" / "configs"


def test_two_processes_evaluate_like_one(phantoms, tmp_path):
    shared = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "strategy::rank": 2}
    run_workflow([CONFIGS / "train.json"], {**shared, "epochs": 1, "batch_size": 2, "lr": 0.01})
    run_workflow([CONFIGS / "evaluate.json"], {**shared, "section": "training"})
    files = f"['{CONFIGS / 'evaluate.json'}','{CONFIGS / 'multi_gpu_evaluate.json'}']"
    overrides = {**shared, "section": "training", "results_dir": str(tmp_path / "two")}
    words = [part for k, v in overrides.items() for part in (f"--{k}", v if isinstance(v, str) else repr(v))]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, "--config_file", files, *words],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=env,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    tables = []
    for folder in (tmp_path / "evaluation", tmp_path / "two"):
        with open(folder / "cases.csv", newline="") as stream:
            tables.append(list(csv.DictReader(stream)))
    assert len(tables[0]) == 4
    assert tables[0] == tables[1]
