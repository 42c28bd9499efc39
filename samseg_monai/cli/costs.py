"""Measure what a training costs in a process of its own, which is ended before it takes the machine's last memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from samseg_monai import errors
from samseg_monai.faults import explain, free_memory, out_of_memory, save_memory
from samseg_monai.files import read_json, write_json
from samseg_monai.workflow import run_workflow

LEFT = 0.4e9  # bytes: a process that leaves the machine less is ended, before the system ends another one
PAUSE = 0.05  # seconds between two looks at the memory
# read once, by a process of which each measurement is a fork
_PARTS: tuple[str, ...] = ("bundles.door", "bundles.running", "data.datalists", "data.slices", "handlers", "inferers")
_PARTS += ("metrics", "networks", "training.cost", "transforms")
PRELOAD = ["monai.bundle", *(f"samseg_monai.{name}" for name in _PARTS)]
COST, GUARD = "samseg_monai.training.cost", "$bundles.guard()"
NO_TIME, NO_MEMORY, WRONG = "time", "memory", "wrong"
LOG, ADVICE, ANSWER = "log", "advice.txt", "answer.json"  # files of the process
HANDLERS = ("accumulation", "non_finite", "clip")  # of a training's: those that its steps need
FACTS = ("sam_variant", "image_size", "patch", "batch_size", "val_batch_size", "accumulation_steps", "epochs",
         "val_interval", "steps_per_epoch", "scans", "checkpointing", "autocast", "rectangular")  # fmt: skip


def measured(job: Mapping[str, Any], *, limit: float) -> dict[str, Any]:
    """What ``answer`` tells of ``job``, from a process of its own.

    Args:
        job: see ``answer``.
        limit: seconds after which the process is ended.

    Where processes can be forked, ``peak_gb`` leaves out what the process has of the libraries' files and has not used
    (0.3 GB): they are in memory once for all processes, and the system can drop them.

    Returns: that, or {"failed": why, "told": in words} where the time (``NO_TIME``) or the memory (``NO_MEMORY``) did
        not suffice or the settings are wrong (``WRONG``).
    """
    with tempfile.TemporaryDirectory(prefix="samseg-") as scratch:
        context: Any = multiprocessing.get_context("forkserver" if _can_fork() else "spawn")
        if _can_fork():
            context.set_forkserver_preload(PRELOAD)
        process: BaseProcess = context.Process(target=_work, args=(dict(job), scratch))
        process.start()
        try:
            ended = _watch(process, Path(scratch) / LOG, limit)
        finally:
            process.kill()
            process.join()
        if ended == NO_TIME:
            return {"failed": NO_TIME, "told": f"takes more than {limit:g} s; give it more time: --limit"}
        return _told(Path(scratch), ended, process.exitcode or 0)


def _can_fork() -> bool:
    """Whether a process that has read the libraries can be forked: a GPU's driver does not survive that."""
    return sys.platform == "linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")))


def _watch(process: BaseProcess, log: Path, limit: float) -> str:
    """Wait for the end of a process; why it has to be ended before, or nothing. Reading libraries is no part of it."""
    end = math.inf
    while process.is_alive():
        process.join(PAUSE)
        if free_memory() < LEFT:
            return NO_MEMORY
        if end == math.inf and log.is_file():
            end = time.monotonic() + limit
        if time.monotonic() > end:
            return NO_TIME
    return ""


def _told(scratch: Path, ended: str, code: int) -> dict[str, Any]:
    """The answer in ``scratch``, or what happened in place of it."""
    path, advice = scratch / ANSWER, scratch / ADVICE
    if not ended and path.is_file():
        return read_json(path, errors.BundleError, "answer")
    if ended or code == -9:
        by = "ended before it took the last of it" if ended else "the system has ended it"
        more = f"; {advice.read_text(encoding='utf-8')}" if advice.is_file() else ""
        return {"failed": NO_MEMORY, "told": f"not enough memory ({by}){more}"}
    path = scratch / LOG
    log = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    return {"failed": WRONG, "told": log[-1] if log else f"ended with code {code}", "log": log}


def _work(job: dict[str, Any], scratch: str) -> None:
    """What the process does: everything that is printed goes to a file."""
    with (Path(scratch) / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        found = answer(job, Path(scratch))
    except BaseException as error:  # noqa: BLE001  told to the process that waits
        path = Path(scratch) / ADVICE
        advice = path.read_text(encoding="utf-8") if path.is_file() else ""
        told = explain(error, memory=lambda on_gpu: advice or save_memory(on_gpu))
        if told is None:
            traceback.print_exc()
            raise SystemExit(1) from None
        found = {"failed": NO_MEMORY if out_of_memory(error) else WRONG, "told": told.text}
    write_json(Path(scratch) / ANSWER, found)


def answer(job: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Measure what a bundle's training, or the prediction of one that trains nothing, costs; in this process.

    Args:
        job: "bundle" (a path) or "task" and "strategy"; "overrides" of its configs; "overlay", names of further
            configs; "trust"; "steps" to take; "count", to count the slices of a datalist instead, whose place the
            overrides tell; "size" (optional), height and width of a slice in pixels, or all sides of a volume;
            "stored": with stored embeddings.
        scratch: folder that may be filled.

    Returns: see ``cost.measure`` and ``cost.count_slices``.

    Raises:
        SamsegError: the bundle is none, or cannot run as asked.
    """
    from samseg_monai.bundles.memory import saving
    from samseg_monai.bundles.running import configured

    with _opened(job, scratch) as root:
        name = "train" if (root / "configs" / "train.json").is_file() else "inference"
        names = [name, *(Path(name).stem for name in job.get("overlay", ()))]
        configs = [root / "configs" / f"{name}.json" for name in names]
        (scratch / "datalist.json").write_text("{}", encoding="utf-8")
        overrides = {**job["overrides"], "output_dir": str(scratch / "out")}
        found = configured(configs, overrides)
        (scratch / ADVICE).write_text(saving(found, _on_gpu(overrides)), encoding="utf-8")
        report = scratch / "report.json"
        if job.get("count"):
            changes = _counting(found.config, report)
        else:
            changes = _measuring(found.config, job, scratch, report)
        run_workflow(configs, {**overrides, **changes}, echo=False, logs=False)
        return {"bundle": root.name, **read_json(report, errors.BundleError, "report"), "machine": _machine()}


@contextmanager
def _opened(job: Mapping[str, Any], scratch: Path) -> Iterator[Path]:
    """Folder of the bundle of a job, as long as it is needed."""
    if "bundle" not in job:
        from samseg_monai.bundles.build import build_bundle

        yield build_bundle(job["task"], job["strategy"], scratch / "bundles")
        return
    from samseg_monai.bundles.door import open_bundle

    with open_bundle(job["bundle"], trust=bool(job.get("trust"))) as opened:
        yield opened.root


def _measuring(raw: Mapping[str, Any], job: Mapping[str, Any], scratch: Path, report: Path) -> dict[str, Any]:
    """Overrides that let a config take a few steps with random slices and predict some, without any file of data."""
    from samseg_monai.data.slices.dataset import DEFAULT_VARIANTS
    from samseg_monai.settings import NOTHING

    volumes, patches = "resample" in raw, "patch" in raw
    batch = "@val_batch_size" if "train" in raw else "@batch_size"
    usual = "@patch" if patches else "$@crop_size or @crop_mm or (256, 256)"
    volume = {
        "_target_": f"{COST}.RandomVolume",
        "scans": "$getattr(@network_def, 'scans', len(@scans))",
        "classes": "$len(@classes)",
        "size": job.get("size") or usual,
        "depth": f"${batch} * getattr(@network_def, 'depth', 1)" if volumes else 1,
        "scale": "@input_scale",
    }
    cost: dict[str, Any] = {
        "_target_": f"{COST}.measure",
        "network": "@network",
        "inferer": "@inferer",
        "volume": volume,
        "device": "@device",
        "report": str(report),
        "facts": {name: f"@{name}" for name in FACTS if name in raw},
    }
    changes: dict[str, Any] = {"dataset_dir": str(scratch)}
    embeddings = raw.get("embeddings")
    if embeddings is not None:
        stored = "train" in raw and (job.get("stored", False) or embeddings["cache_dir"] is not None)
        changes["embeddings::cache_dir"] = str(scratch / "embeddings") if stored else NOTHING
        looks = embeddings["variants"] or f"$min({DEFAULT_VARIANTS}, @epochs)"
        cost["facts"] |= {"stored": True, "variants": looks} if stored else {}
        if stored:
            changes["embeddings::variants"] = 1
    if "train" not in raw:
        return {**changes, "run": [GUARD, cost]}
    handlers = ", ".join(
        f"'{name}': @train::named_handlers::{name}" for name in HANDLERS if name in raw["train"]["named_handlers"]
    )
    changes |= {
        "datalist": str(scratch / "datalist.json"),
        "slices::cache_dir": str(scratch / "slices"),
        "train::dataset::data": [{"case": "random"}] if volumes else [{"case": f"random {i}"} for i in range(8)],
        "train::dataset::volume_transforms": {**volume, "depth": 8 if volumes else 1},
        **({} if patches else {"train::dataset::picker": {"_target_": "samseg_monai.data.slices.AllSlices"}}),
        "train::dataloader::dataset": {
            "_target_": f"{COST}.Repeated",
            "dataset": "@train::dataset",
            "length": f"$@batch_size * {job['steps'] + 1}",
        },
        "train::trainer::max_epochs": 1,
        "train::trainer::train_handlers": f"$bundles.in_order({{{handlers}}})",
    }
    if "averaging" in raw["train"]:
        changes["train::averaging::evaluator"] = NOTHING
        cost["averaging"] = "@train::averaging"
    cost |= {"trainer": "@train::trainer", "dataset": "@train::dataset"}
    return {**changes, "run": [GUARD, cost]}


def _counting(raw: Mapping[str, Any], report: Path) -> dict[str, Any]:
    """Overrides that let a config read some of its cases and count."""
    if "train" not in raw:
        raise errors.ConfigError("this bundle trains nothing, so that there are no training cases to count")
    training, validation = raw["train"]["dataset"], raw["validate"]["dataset"]
    some = {"_target_": f"{COST}.spread"}
    plain: dict[str, Any] = {
        "cache": "memory",
        **dict.fromkeys(("slice_transforms", "epoch_transforms", "embedding_dir", "length")),
    }
    count: dict[str, Any] = {
        "_target_": f"{COST}.count_slices",
        "training": {
            **training,
            **{key: value for key, value in plain.items() if key in training},
            "progress": False,
            "_mode_": "callable",
            "data": {**some, "items": training["data"]},
        },
        "training_cases": f"$len({training['data'].removeprefix('$')})",
        "validation": {
            **validation,
            "_mode_": "callable",
            "data": {**some, "items": validation["data"]},
            **dict.fromkeys({"rate", "cache_rate"} & validation.keys(), 0.0),  # the latter of older configs
        },
        "validation_cases": f"$len({validation['data'].removeprefix('$')})",
        "prompted": "@prompted",
        "report": str(report),
    }
    return {"run": [GUARD, count]}


def _on_gpu(overrides: Mapping[str, Any]) -> bool:
    import torch

    return torch.cuda.is_available() and "cpu" not in str(overrides.get("device", ""))


def _machine() -> dict[str, Any]:
    from samseg_monai.handlers.provenance import hardware, versions

    return {**hardware(), "versions": versions()}
