"""Pack a run into one ZIP that runs alone: configs, full weights, adapter, card, metrics, licences, checksums."""

from __future__ import annotations

import csv
import io
import logging
import shutil
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from samseg_monai import __version__, checkpoints
from samseg_monai.bundles.archive import SUMS
from samseg_monai.bundles.build import LARGE_FILES, install_words, write_bundle
from samseg_monai.bundles.door import WEIGHTS, Opened, open_bundle
from samseg_monai.bundles.record import RECORD, SEEN
from samseg_monai.bundles.wheel import WHEEL, build_wheel
from samseg_monai.errors import BundleError, raise_all
from samseg_monai.faults import output_problem
from samseg_monai.files import foreign_problems, hash_file, open_regular, read_json, write_json, write_text, write_whole
from samseg_monai.metrics import read_rows
from samseg_monai.settings import BundleSettings, dump_settings, merged, read_settings

STORED = (".pt", ".safetensors")  # floating-point numbers hardly shrink, and large files take half a minute to try
CASES = ("cases.csv", "ellipse_cases.csv", "transunet_cases.csv")  # they name cases: of patients, perhaps
RESULTS = ("metrics.json", *CASES, "run_card.json")
PREDICTING = ("configs/inference.json", "configs/metadata.json")  # what a prediction depends on
LOG = logging.getLogger(__name__)
FIX = "run the bundle's evaluation with this output_dir"


def write_sums(folder: Path) -> None:
    """Write ``SHA256SUMS`` over every other file of ``folder``, in the format of ``sha256sum --check``."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SUMS)
    lines = [f"{hash_file(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def _check_run(run: Path, *, allow_seen: bool = False) -> list[str]:
    problems = foreign_problems(run, ("evaluation", *(f"evaluation/{name}" for name in RESULTS)))
    problems += [] if allow_seen or problems else _seen(run)
    configs = run / RECORD / "configs"
    if not (configs / "inference.json").is_file():
        problems.append(f"{RECORD}/configs/inference.json is missing: train or evaluate with this output_dir first")
    if not (run / "evaluation" / "metrics.json").is_file():
        problems.append(f"evaluation/metrics.json is missing: {FIX}")
    if (configs / "train.json").is_file() and not (run / checkpoints.TENSORS).is_file():
        problems.append(f"{checkpoints.TENSORS} is missing: training has saved no best epoch yet")
    return problems


def _seen(run: Path) -> list[str]:
    """Why the scores of an evaluation are not those of new cases."""
    table = run / "evaluation" / "cases.csv"
    if not table.is_file() or not (run / checkpoints.TENSORS).is_file():
        return []
    trained = SimpleNamespace(cases=checkpoints.read_card(run).get("cases"))
    seen = checkpoints.seen_cases(trained, dict.fromkeys(row["case"] for row in read_rows(table)))
    fix = "evaluate other cases with this output_dir, or pack nevertheless with --allow-seen"
    return [f"the evaluated cases {', '.join(names)} {SEEN[section]}: {fix}" for section, names in seen.items()]


def pack_bundle(
    run: str | Path,
    output: str | Path,
    *,
    sam_checkpoint: str | None = None,
    pt: bool = True,
    package: bool = False,
    cases: bool = True,
    trust: bool = False,
    allow_seen: bool = False,
) -> Path:
    """Pack the run in folder ``run`` as ``output`` (a ZIP that holds one folder, the bundle).

    Args:
        run: ``output_dir`` of a training and its evaluation, or of a zero-shot evaluation.
        output: the ZIP to write; replaced if it exists.
        sam_checkpoint: base weights, where they are not found by name (see ``find_weights``).
        pt: write ``models/model.pt``, too, which MONAI's own loaders read.
        package: put a wheel of this package into it, and the line that installs it into its README.
        cases: put the tables per case into it, which name the test cases.
        trust: pack the configs of the run as they are, however they came about (see ``open_bundle``).
        allow_seen: pack it though its evaluation is of cases that it was trained on, or that chose its epoch.

    Returns:
        The ZIP's path.

    Raises:
        BundleError: the run is not complete, or its configs are not those of its settings; everything is listed. Or
            ``output`` cannot be written.
        WeightsError, CheckpointError: base weights or adapter are absent or do not fit.
    """
    run, output = Path(run), Path(output)
    if not run.is_dir():
        raise BundleError(f"pack: there is no folder {run}; give the output_dir of a run")
    if problem := output_problem(output, folder=False):
        raise BundleError(f"pack: {problem}")
    raise_all(_check_run(run, allow_seen=allow_seen), BundleError, f"pack: {run} is not a finished run")
    card = _run_card(run / "evaluation" / "run_card.json")
    wheel = build_wheel() if package else None
    with open_bundle(run, trust=trust) as opened, tempfile.TemporaryDirectory() as temporary:
        opened.check()
        raise_all(_mismatches(opened, card), BundleError, f"pack: {run} cannot be packed as one bundle")
        root = Path(temporary) / opened.name
        steps = _write_configs(run, opened, card, root, package)
        with torch.random.fork_rng():
            torch.manual_seed(int(card.get("seed") or 0))  # a random base is that of the evaluation
            _write_models(run, opened, root / "models", sam_checkpoint, steps, pt)
        (root / LARGE_FILES).unlink(missing_ok=True)
        (root / "metrics").mkdir()
        for result in RESULTS:
            if (run / "evaluation" / result).is_file() and (cases or result not in CASES):
                with open_regular(run / "evaluation" / result) as stream:  # and no link that was put there meanwhile
                    (root / "metrics" / result).write_bytes(stream.read())
        if wheel is not None:
            (root / WHEEL).parent.mkdir()
            (root / WHEEL).write_bytes(wheel)
        write_sums(root)
        write_whole(output, lambda path: _zip(root, path))
    return output


def named_cases(archive: Path) -> dict[str, int]:
    """Tables in a packed bundle that name cases, and how many each names."""
    with zipfile.ZipFile(archive) as packed:
        found = {name.partition("/")[2]: name for name in packed.namelist() if Path(name).name in CASES}
        return {
            short: len({row["case"] for row in csv.DictReader(io.TextIOWrapper(packed.open(name), encoding="utf-8"))})
            for short, name in found.items()
        }


def _run_card(path: Path) -> dict[str, Any]:
    """The card of the evaluation, with ``settings``; BundleError where what is used of it has another type."""
    card = read_json(path, BundleError, "run card", FIX)
    card["settings"] = card.get("settings") or {}
    prompt, seed = (card["settings"].get("prompt") if isinstance(card["settings"], dict) else None), card.get("seed")
    problems = [
        f"{key}: got {value!r}, expected {kind}"
        for key, value, kind, good in (
            ("settings", card["settings"], "an object", isinstance(card["settings"], dict)),
            ("settings::prompt", prompt, "an object", prompt is None or isinstance(prompt, dict)),
            ("seed", seed, "a whole number below 2^32", seed is None or (type(seed) is int and 0 <= seed < 1 << 32)),
        )
        if not good
    ]
    raise_all(problems, BundleError, f"{path}: no run card; {FIX}")
    return card


def _zip(root: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            kind = zipfile.ZIP_STORED if path.suffix in STORED else zipfile.ZIP_DEFLATED
            archive.write(path, path.relative_to(root.parent).as_posix(), kind)


def _mismatches(opened: Opened, card: dict[str, Any]) -> list[str]:
    """Why the bundle would not predict as the run did."""
    if opened.settings is None:
        return []
    task, source = opened.settings.task, opened.settings.run.prompt.source
    had, prompted = card["settings"], card.get("prompt_source")
    problems = [
        f"{key}: evaluated with {had[key]}, trained with {value}"
        for key, value in {"classes": task.classes, "scans": task.scans}.items()
        if key in had and had[key] != value
    ]
    if prompted is not None and (prompted == "none") != (source == "none"):
        problems.append(f"prompt::source: evaluated with {prompted!r}, trained with {source!r}")
    fix = "its settings do not tell this; --trust packs the configs as they are, and receivers need it, too"
    return problems + [f"{edit}: {fix}" for edit in opened.edited if edit.startswith(PREDICTING)]


def _write_configs(run: Path, opened: Opened, card: dict[str, Any], root: Path, package: bool) -> dict[str, Any]:
    """Write everything but weights and results to ``root``, so that it predicts as it was evaluated.

    Returns: the steps of the evaluation that belong to its numbers and to every prediction.
    """
    settings = card["settings"]
    steps = {key: settings[key] for key in ("min_component_mm3",) if key in settings}
    if opened.settings is None:
        shutil.copytree(opened.root, root, ignore=shutil.ignore_patterns("models", "metrics", SUMS))
        for path in (opened.config(name) for name in ("evaluate", "inference")):
            if path.is_file():
                write_json(root / "configs" / path.name, {**read_json(path, BundleError, "config"), **steps}, indent=4)
        if package:
            _tell_of_wheel(root / "docs" / "README.md", opened.name)
        return steps
    trained = run if (run / checkpoints.TENSORS).is_file() else None
    write_bundle(evaluated(opened.settings, card, checkpoints.spacing_of(trained)), root, wheel=package)
    edited = {edit.partition(": ")[0] for edit in opened.edited}
    for name in sorted(edited & {"configs/train.json", "configs/evaluate.json"}):  # wiring changed in training travels
        LOG.warning("%s: wiring of the run's own travels as it is; whoever checks the bundle sees it as edited", name)
        shutil.copy(run / RECORD / name, root / name)
    return steps


def _tell_of_wheel(readme: Path, name: str) -> None:
    """Tell in the README of a bundle that is packed as it is how its wheel is installed, in front of all else."""
    text = readme.read_text(encoding="utf-8") if readme.is_file() else f"# {name}\n"
    title, _, rest = text.partition("\n")
    readme.parent.mkdir(exist_ok=True)
    write_text(readme, f"{title}\n\n{install_words(name, __version__, wheel=True)}\n{rest}")


def evaluated(settings: BundleSettings, card: dict[str, Any], spacing: dict[str, Any] | None = None) -> BundleSettings:
    """The settings of a run with what its evaluation did and every prediction does, too.

    Args:
        settings: of the training.
        card: the evaluation's run card.
        spacing: that the adapter was trained on.
    """
    told = card["settings"]
    changes: dict[str, Any] = {"engine": __version__, "run": {}, "task": {"trained_spacing": spacing}}
    if "min_component_mm3" in told:
        changes["run"]["min_component_mm3"] = told["min_component_mm3"]
    if settings.task.kind == "images":
        changes["task"]["label_values"] = card.get("label_values")
        changes["run"]["prompt"] = {"shrink": (told.get("prompt") or {}).get("shrink", 0.0)}
    return read_settings(merged(dump_settings(settings), changes), "pack: settings of the run")


def _write_models(
    run: Path, opened: Opened, models: Path, sam_checkpoint: str | None, steps: dict[str, Any], pt: bool
) -> None:
    """Write all weights, and adapter and card of a trained run, with the test metrics."""
    network = opened.network()
    trained = (run / checkpoints.TENSORS).is_file()
    checkpoints.load_trained(network, checkpoint=str(run) if trained else None, sam_checkpoint=sam_checkpoint)
    for name in WEIGHTS:
        if pt or not name.endswith(".pt"):
            checkpoints.save_model(network, models.parent / name)
    metrics = read_json(run / "evaluation" / "metrics.json", BundleError, "metrics", FIX)
    checkpoints.save_adapter(network, models, metrics=metrics, extra=steps)
