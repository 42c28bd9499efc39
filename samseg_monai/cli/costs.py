"""What a training costs: measured in a process of its own, which is ended before it takes the machine's last memory."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from samseg_monai import errors
from samseg_monai.cli.places import overlays
from samseg_monai.faults import explain, free_memory, out_of_memory, save_memory
from samseg_monai.files import read_json, write_json
from samseg_monai.workflow import run_workflow

LEFT = 0.4e9  # bytes: a process that leaves the machine less is ended, before the system ends another one
PAUSE = 0.05  # seconds between two looks at the memory
# read once, by a process of which each measurement is a fork
_PARTS = ("bundles.door", "bundles.running", "data.datalists", "data.slices", "handlers", "inferers", "metrics",
          "networks", "training.cost", "transforms")  # fmt: skip
PRELOAD = ["monai.bundle", *(f"samseg_monai.{name}" for name in _PARTS)]
COST, GUARD = "samseg_monai.training.cost", "$bundles.guard()"
NO_TIME, NO_MEMORY, WRONG = "time", "memory", "wrong"
LOG, ADVICE, ANSWER = "log", "advice.txt", "answer.json"  # files of the process
HANDLERS = ("accumulation", "non_finite", "clip")  # of a training's: those that its steps need
FACTS = ("sam_variant", "image_size", "patch", "batch_size", "val_batch_size", "accumulation_steps", "epochs",
         "val_interval", "steps_per_epoch", "scans", "checkpointing", "autocast", "rectangular")  # fmt: skip


def forecast(
    job: Mapping[str, Any], given: Mapping[str, Any], places: Mapping[str, Any], *, limit: float, within: float | None
) -> dict[str, Any]:
    """What a step costs and, where ``places`` name its data, the whole training.

    Args:
        job: see ``answer``; without its overrides, which are ``given``.
        places: overrides of the places of the data, or none.
        limit: seconds of each of both measurements.
        within: see ``cost.whole_training``.

    Returns: what ``cost.measure`` and ``cost.whole_training`` tell, and as "data" what ``cost.count_slices`` tells.

    Raises:
        SamsegError: it could not be measured; of the class that the settings' error has.
    """
    from samseg_monai.training.cost import whole_training

    data: dict[str, Any] | None = None
    if places:
        data = _succeeded(measured({**job, "count": True, "overrides": {**given, **places}}, limit=limit))
        job = {**job, "size": data["size"]}
    cost = _succeeded(measured({**job, "overrides": given}, limit=limit))
    return {**cost, **({} if data is None else whole_training(cost, data, within)), "data": data}


def _succeeded(found: dict[str, Any]) -> dict[str, Any]:
    if "failed" not in found:
        return found
    kind, _, text = str(found["told"]).partition(": ")
    known = getattr(errors, kind, None) if found["failed"] == WRONG and kind.endswith("Error") else None
    raise known(text) if known is not None else errors.TrainingError(found["told"])


def measured(job: Mapping[str, Any], *, limit: float) -> dict[str, Any]:
    """What ``answer`` tells of ``job``, from a process of its own that is ended after ``limit`` seconds.

    Where processes can be forked, ``peak_gb`` leaves out what the process has of the libraries' files and has not used
    (0.3 GB): they are in memory once for all processes, and the system can drop them.

    Returns: that, or {"failed": why, "told": in words} where the time (``NO_TIME``) or the memory (``NO_MEMORY``) did
        not suffice or the settings are wrong (``WRONG``).
    """
    # a GPU's driver does not survive a fork
    forks = sys.platform == "linux" and not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/kfd")))
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory(prefix="samseg-") as scratch:
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
    if not ended and (scratch / ANSWER).is_file():
        return read_json(scratch / ANSWER, errors.BundleError, "answer")
    if ended or code == -9:
        by = "ended before it took the last of it" if ended else "the system has ended it"
        return {
            "failed": NO_MEMORY,
            "told": "; ".join(filter(None, [f"not enough memory ({by})", _text(scratch / ADVICE)])),
        }
    return {"failed": WRONG, "told": "; ".join([f"ended with code {code}", *_text(scratch / LOG).splitlines()[-1:]])}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.is_file() else ""


def _work(job: dict[str, Any], scratch: str) -> None:
    """What the process does: everything that is printed goes to a file."""
    folder = Path(scratch)
    with (folder / LOG).open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    try:
        found = answer(job, folder)
    except BaseException as error:  # noqa: BLE001  told to the process that waits
        told = explain(error, memory=lambda on_gpu: _text(folder / ADVICE) or save_memory(on_gpu))
        first = list(errors.behind(error, handled=False))[-1]  # of an error nobody has foreseen, and where it arose
        at = traceback.extract_tb(first.__traceback__)[-1]
        text = told.text if told else f"{errors.reason_of(error)} ({Path(at.filename).name}, line {at.lineno})"
        found = {"failed": NO_MEMORY if out_of_memory(error) else WRONG, "told": text}
    write_json(folder / ANSWER, found)


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
    import torch

    from samseg_monai.bundles.build import build_bundle
    from samseg_monai.bundles.door import open_bundle
    from samseg_monai.bundles.memory import saving
    from samseg_monai.bundles.running import configured
    from samseg_monai.handlers.provenance import hardware, versions

    bundle = job["bundle"] if "bundle" in job else build_bundle(job["task"], job["strategy"], scratch / "bundles")
    with open_bundle(bundle, trust=bool(job.get("trust"))) as opened:
        folder = opened.root / "configs"
        name = "train.json" if (folder / "train.json").is_file() else "inference.json"
        configs = [folder / name, *overlays(folder, job.get("overlay", ()))]
        overrides = {**job["overrides"], "output_dir": str(scratch / "out")}
        found = configured(configs, overrides)
        on_gpu = torch.cuda.is_available() and "cpu" not in str(overrides.get("device", ""))
        (scratch / ADVICE).write_text(saving(found, on_gpu), encoding="utf-8")
        changes = _counting(found.config) if job.get("count") else _measuring(found.config, job, scratch)
        changes["run"] = [GUARD, {**changes["run"], "report": str(scratch / "report.json")}]
        run_workflow(configs, {**overrides, **changes}, echo=False, logs=False)
        report = read_json(scratch / "report.json", errors.BundleError, "report")
        return {"bundle": opened.root.name, **report, "machine": {**hardware(), "versions": versions()}}


def _measuring(raw: Mapping[str, Any], job: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Overrides that let a config take a few steps with random slices and predict some, without any file of data."""
    from samseg_monai.data.slices.dataset import DEFAULT_VARIANTS
    from samseg_monai.settings import NOTHING

    volumes, patches = "resample" in raw, "patch" in raw
    batch = "@val_batch_size" if "train" in raw else "@batch_size"
    volume = {
        "_target_": f"{COST}.RandomVolume",
        "scans": "$getattr(@network_def, 'scans', len(@scans))",
        "classes": "$len(@classes)",
        "size": job.get("size") or ("@patch" if patches else "$@crop_size or @crop_mm or (256, 256)"),
        "depth": f"${batch} * getattr(@network_def, 'depth', 1)" if volumes else 1,
        "scale": "@input_scale",
    }
    facts: dict[str, Any] = {name: f"@{name}" for name in FACTS if name in raw}
    cost: dict[str, Any] = {"_target_": f"{COST}.measure", "facts": facts, "volume": volume}
    cost |= {name: f"@{name}" for name in ("network", "inferer", "device")}
    changes: dict[str, Any] = {"dataset_dir": str(scratch), "run": cost}
    if (embeddings := raw.get("embeddings")) is not None:
        stored = "train" in raw and (job.get("stored", False) or embeddings["cache_dir"] is not None)
        changes["embeddings::cache_dir"] = str(scratch / "embeddings") if stored else NOTHING
        if stored:
            looks = embeddings["variants"] or f"$min({DEFAULT_VARIANTS}, @epochs)"
            facts |= {"stored": True, "variants": looks}
            changes["embeddings::variants"] = 1
    if "train" not in raw:
        return changes
    write_json(scratch / "datalist.json", {})
    kept = [name for name in HANDLERS if name in raw["train"]["named_handlers"]]
    handlers = ", ".join(f"'{name}': @train::named_handlers::{name}" for name in kept)
    length = f"$@batch_size * {job['steps'] + 1}"
    changes |= {
        "datalist": str(scratch / "datalist.json"),
        "slices::cache_dir": str(scratch / "slices"),
        "train::dataset::data": [{"case": "random"}] if volumes else [{"case": f"random {i}"} for i in range(8)],
        "train::dataset::volume_transforms": {**volume, "depth": 8 if volumes else 1},
        **({} if patches else {"train::dataset::picker": {"_target_": "samseg_monai.data.slices.AllSlices"}}),
        "train::dataloader::dataset": {"_target_": f"{COST}.Repeated", "dataset": "@train::dataset", "length": length},
        "train::trainer::max_epochs": 1,
        "train::trainer::train_handlers": f"$bundles.in_order({{{handlers}}})",
    }
    if "averaging" in raw["train"]:
        changes["train::averaging::evaluator"] = NOTHING
        cost["averaging"] = "@train::averaging"
    cost |= {"trainer": "@train::trainer", "dataset": "@train::dataset"}
    return changes


def _counting(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides that let a config read some of its cases and count."""
    if "train" not in raw:
        raise errors.ConfigError("this bundle trains nothing, so that there are no training cases to count")
    count: dict[str, Any] = {"_target_": f"{COST}.count_slices", "prompted": "@prompted"}
    plain: dict[str, Any] = dict.fromkeys(("slice_transforms", "epoch_transforms", "embedding_dir", "length"))
    uncached = {"rate": 0.0, "cache_rate": 0.0}  # the latter of older configs
    for section, dataset, changed in (
        ("training", {"progress": False, **raw["train"]["dataset"]}, {**plain, "cache": "memory", "progress": False}),
        ("validation", raw["validate"]["dataset"], uncached),
    ):
        some = {"_target_": f"{COST}.spread", "items": dataset["data"]}
        changes = {key: value for key, value in changed.items() if key in dataset}
        count[section] = {**dataset, **changes, "_mode_": "callable", "data": some}
        count[f"{section}_cases"] = f"$len({dataset['data'].removeprefix('$')})"
    return {"run": count}
