"""Trainings and predictions of ``python -m monai.bundle run`` on a machine that fails: one line, and what it was."""

from __future__ import annotations

import errno
import json
import os

import pytest

from samseg_monai.bundles import build_bundle
from tests.conftest import TINY
from tests.helpers.forked import ITERATION, VOLUME, forked

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs forked processes")

RUN = {
    **TINY, "scans": ["t1c"], "epochs": 2, "batch_size": 2, "lr": 0.01, "val_interval": 1, "strategy::rank": 2,
}  # fmt: skip
SLICE = "samseg_monai.data.slices:SliceDataset.__getitem__"
AGAIN = "; the same command goes on behind the last epoch that was finished"
KEYS = (
    "what saves most here: --checkpointing True (38% less memory, 160% of the time), or --batch_size 1 "
    "--accumulation_steps 2 (29% less memory, in the same time), or --rectangular True (18% less memory, 68% of "
    "the time)"
)
# name -> (overrides, moment and fault, exit code, status in the run card or None without one, last line)
FAULTS = {
    "SIGTERM": (
        {},
        {"at": ITERATION, "call": 3, "by": "SIGTERM"},
        143,
        "interrupted",
        f"interrupted by SIGTERM{AGAIN}",
    ),
    "Ctrl-C": ({}, {"at": VOLUME, "by": "SIGINT"}, 130, "interrupted", f"interrupted{AGAIN}"),
    "disk full": (
        {},
        {"at": "torch:save", "by": errno.ENOSPC},
        1,
        "failed",
        "OSError: {out}/resume.pt: the disk is full; free some space, or choose a folder on another disk",
    ),
    "no memory": (
        {},
        {"at": ITERATION, "call": 3, "by": errno.ENOMEM},
        1,
        "failed",
        f"not enough memory ([Errno 12] Cannot allocate memory); {KEYS}",
    ),
    "a worker that is killed": (
        {"slices::num_workers": 1, "slices::cache": "disk", "slices::cache_dir": "{out}/slices"},
        {"at": SLICE, "call": 2, "by": "SIGKILL"},
        1,
        "failed",
        f"most likely by the system, as the memory was used up; {KEYS}",
    ),
    "a file in place of the folder": (
        {"output_dir": "{out}/log.0/run"},
        None,
        1,
        None,
        "  - output_dir: {out}/log.0: a file is where a folder is wanted; move it away, or choose another place",
    ),
}


@pytest.fixture(scope="module")
def start(phantoms, tmp_path_factory):
    """Train into a folder; gives the exit code and what was printed."""
    configs = build_bundle("meningioma", "lora", tmp_path_factory.mktemp("bundles")) / "configs"

    def train(folder, overrides=(), die=None):
        given = {key: v.format(out=folder) if isinstance(v, str) else v for key, v in dict(overrides).items()}
        values = {**RUN, "dataset_dir": str(phantoms), "output_dir": str(folder), **given}
        codes = forked().run([configs / "train.json"], values, folder / "log", die=die)
        return codes[0], (folder / "log.0").read_text(encoding="utf-8", errors="replace")

    return train


@pytest.mark.parametrize("name", FAULTS)
def test_a_training_tells_what_ended_it_in_its_last_line(name, start, tmp_path):
    overrides, die, expected, status, line = FAULTS[name]
    code, printed = start(tmp_path, overrides, die)
    assert code == expected, printed[-3000:]
    assert printed.rstrip().splitlines()[-1].endswith(line.format(out=tmp_path))
    assert "Traceback" not in printed and "terminating due to exception" not in printed
    assert not list(tmp_path.glob("*.tmp"))
    card = tmp_path / "run_card.json"
    assert (json.loads(card.read_text())["status"] if card.is_file() else None) == status
    if name == "SIGTERM":
        code, printed = start(tmp_path, overrides)
        assert code == 0 and "Resumed: epoch 1 of 2 is done" in printed
        assert json.loads(card.read_text())["status"] == "completed"
    if status is None:
        assert "Caching slices" not in printed
