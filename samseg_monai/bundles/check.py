"""Whether a bundle's own JSON is what this package writes from its settings, and its weights are nothing but tensors.

A bundle that is as built can be run by ``python -m monai.bundle run``, which evaluates its JSON.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from samseg_monai import __version__
from samseg_monai.bundles.archive import SUMS, TEXT_BYTES, BundleFiles, Within, open_files
from samseg_monai.bundles.build import LARGE_FILES, write_bundle
from samseg_monai.bundles.door import SETTINGS, WEIGHTS, differences, engine_of, name_of, settings_of
from samseg_monai.bundles.old import VERSION
from samseg_monai.bundles.pack import RESULTS
from samseg_monai.bundles.pickles import pickle_problems
from samseg_monai.bundles.record import NAME, PARTS, RECORD
from samseg_monai.bundles.wheel import WHEEL, wheel_problems
from samseg_monai.checkpoints import CARD, TENSORS
from samseg_monai.errors import BundleError, SamsegError, visible

AS_BUILT, EDITED, ANOTHER_VERSION = "as built", "edited", "made by another version"
RUNS = "eval/"  # what a run leaves in the bundle's folder, where MONAI bundles have it
MODELS = (*WEIGHTS, f"models/{TENSORS}", f"models/{CARD}")
OWN = (SETTINGS, SUMS, NAME, PARTS, WHEEL, *MODELS, *(f"metrics/{name}" for name in RESULTS))
# what runs write: predictions, tables, cards, weights (which are looked into), locks (empty), curves for TensorBoard
_DATA = re.compile(r".*\.(nii|nii\.gz|png|csv|json|pt|safetensors|lock)|(.*/)?events\.out\.tfevents\.[\w.-]+")

# what a run was started with, as its card keeps it: an id of plain names (no ``_target_``), whose value is looked into
_OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(::[a-z0-9][a-z0-9_]*)+")


@dataclass(frozen=True)
class Verdict:
    """What ``check_bundle`` found.

    Args:
        answer: ``AS_BUILT``, ``EDITED`` or ``ANOTHER_VERSION`` (its JSON was not judged, and nothing else was wrong).
        name: of the bundle.
        engine: version of samseg-monai that it says it was made by.
        problems: everything that is not as built, one line each.
        code: wheels in it, and whether they are what this package would build; empty for a bundle without one.
        sums: files whose sha256 was compared with ``SHA256SUMS``. Sums show damage, not who sent a bundle.
    """

    answer: str
    name: str
    engine: str
    problems: tuple[str, ...]
    code: tuple[str, ...]
    sums: int


def check_bundle(path: str | Path) -> Verdict:
    """Compare a bundle with what this package writes from its settings; nothing of it is run.

    Raises:
        BundleError: there is no such file or folder, or it is no bundle.
    """
    with closing(open_files(path)) as files:
        return _judged(files)


def _judged(files: BundleFiles) -> Verdict:
    with tempfile.TemporaryDirectory(prefix="samseg-") as scratch:
        problems = [*files.problems, *_sum_problems(files)]
        name, engine, built = name_of(files), VERSION, set()
        try:
            engine = engine_of(files)
            judged = SETTINGS in files.sizes and engine == __version__
            if judged or PARTS in files.sizes:
                settings = settings_of(files)
                name = settings.name
                root = write_bundle(settings, Path(scratch) / "built", wheel=WHEEL in files.sizes)
                built = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {SETTINGS}
                problems += [line for file in sorted(built) for line in _against(files, root, file)]
        except SamsegError as error:
            judged = SETTINGS in files.sizes
            problems += str(error).splitlines()
        problems += [line for file in sorted(files.sizes.keys() - built) for line in _own_file(files, file, judged)]
        problems += _record(files, judged)
        code = tuple(_code(files, problems))
        compared = 0 if problems else len(files.sums())
    answer = EDITED if problems else AS_BUILT if judged else ANOTHER_VERSION
    lines = [visible(problem, 500) for problem in problems]  # names in them are the sender's
    return Verdict(answer, name, engine, tuple(dict.fromkeys(lines)), code, compared)


def _code(files: BundleFiles, problems: list[str]) -> Iterator[str]:
    """One line for each wheel: what it is, and whether it was compared with the package that runs here."""
    for name in sorted(name for name in files.sizes if name.lower().endswith(".whl")):
        found = f"samseg-monai {__version__} that runs here"
        if name != WHEEL:
            found = f"not compared, as it is no wheel of the {found}"
        else:
            found = f"{'not' if any(WHEEL in problem for problem in problems) else 'byte for byte'} the {found}"
        yield f"{visible(name)} is code, which runs once it is installed: {found}"


def _against(files: BundleFiles, root: Path, name: str) -> list[str]:
    if name in files.sizes:
        return differences(files, root, name)
    whole = name == LARGE_FILES and any(weights in files.sizes for weights in WEIGHTS)
    return [] if whole or name == "configs/demo.json" else [f"{name}: missing"]  # a run's record has no demo


def _own_file(files: BundleFiles, name: str, judged: bool) -> Iterator[str]:
    """What is wrong with a file that the package does not build: weights, card, results, or what is none of these."""
    result, lower = name.startswith(RUNS), name.lower()
    if name.startswith(f"{RUNS}{RECORD}/"):
        return
    try:
        if name in WEIGHTS or name == f"models/{TENSORS}" or (result and lower.endswith((".pt", ".safetensors"))):
            yield from (f"{name}: {problem}" for problem in _weight_problems(files, name))
        elif name == f"models/{CARD}" or (name.startswith(("metrics/", RUNS)) and lower.endswith(".json")):
            yield from (f"{name}: {line}" for line in _evaluable(files.json(name)))
        elif name == NAME and not re.fullmatch(rb"[A-Za-z0-9][\w.-]*\n?", files.read(name, TEXT_BYTES)):
            yield f"{name}: no plain name"
        elif name == WHEEL:
            yield from wheel_problems(files)
        elif name in OWN and b"\0" in files.read(name, TEXT_BYTES):
            yield f"{name}: not the text that its name says"
        known = name in OWN or (
            result and _DATA.fullmatch(lower) and not (lower.endswith(".lock") and files.sizes[name])
        )
        if judged and not known:
            yield f"{name}: no file of a bundle"
    except BundleError as error:
        yield " ".join(str(error).split())


def _weight_problems(files: BundleFiles, name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="samseg-") as scratch:
        path = files.bring(name, Path(scratch))
        if path.suffix.lower() == ".pt":
            with path.open("rb") as stream:
                yield from pickle_problems(stream)
            return
        try:
            with safe_open(path, framework="pt") as content:
                content.keys()
        except (OSError, SafetensorError, ValueError) as error:
            yield f"no safetensors file ({error})"


def _evaluable(value: Any, where: str = "") -> Iterator[str]:
    """What MONAI would evaluate if it was handed this JSON; the classes of this package that cards name apart."""
    if isinstance(value, dict):
        for key, item in value.items():
            at = f"{where}::{key}".removeprefix("::")
            ours = key == "_target_" and re.fullmatch(r"samseg_monai\.[\w.]+", str(item))
            recorded = where == "settings" and _OVERRIDE.fullmatch(key)
            if (key.startswith(("_", "+", "$", "@", "%")) and not ours) or (re.search("::|#", key) and not recorded):
                yield f"{at}: a key that MONAI acts upon"
            yield from _evaluable(item, at)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _evaluable(item, f"{where}::{index}")
    elif isinstance(value, str) and value.startswith(("$", "@", "%")):
        yield f"{where}: {value!r}, which MONAI would evaluate"


def _sum_problems(files: BundleFiles) -> list[str]:
    """Files that are missing, changed or added since the sums were written, and lines that are no sums."""
    try:
        sums = files.sums()
        problems = [f"{SUMS}: no line of sha256sum: {line}  {name}" for name, line in sums.items()
                    if not re.fullmatch("[0-9a-f]{64}", line) or not name]  # fmt: skip
        problems += files.changed()
    except BundleError as error:
        return str(error).splitlines()
    added = sorted(files.sizes.keys() - sums.keys() - {SUMS}) if sums else []
    return problems + [f"{name}: added after it was packed" for name in added if not name.startswith(RUNS)]


def _record(files: BundleFiles, judged: bool) -> list[str]:
    """What is wrong with the record of a run within the bundle, which is a bundle of its own."""
    folder = f"{RUNS}{RECORD}/"
    record = Within(files, folder)
    if not record.sizes:
        return []
    try:
        verdict = _judged(record)
    except BundleError as error:
        return str(error).splitlines()
    unjudged = f"made by samseg-monai {verdict.engine}, so that its JSON was not judged"
    problems = verdict.problems or ((unjudged,) if judged and verdict.answer == ANOTHER_VERSION else ())
    return [f"{folder}{problem}" if ": " in problem else f"{folder}: {problem}" for problem in problems]
