"""What all makers of datalists share: read the files of a case to the last byte, collect what is wrong, sum it up."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from samseg_monai.data import IMAGES
from samseg_monai.data.datalists import case_hashes, too_few_to_choose, write_datalist
from samseg_monai.data.datalists.label_maps import BACKGROUND, ROUNDED, is_ignored
from samseg_monai.data.datalists.splits import Split
from samseg_monai.data.files.dicom import read_any
from samseg_monai.data.files.volumes import (
    Volume,
    grid_difference,
    is_phantom,
    modality_doubt,
    stored_like,
    value_problem,
)
from samseg_monai.errors import DataError, raise_all, reason_of

LOG = logging.getLogger(__name__)
Check = TypeVar("Check", bound="CaseCheck")


@dataclass
class CaseCheck:
    """What is known of a case, by its names and then by its files; ``problems`` forbid its use, ``warnings`` do not.

    ``files`` maps scan or label to its path, ``sha256`` is that of the lines ``<name> <sha256 of the file>``,
    ``label_dtype`` how the label's numbers are stored.
    """

    case: str
    files: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    voxels_per_label: dict[int, int] = field(default_factory=dict)
    label_dtype: str = ""
    sha256: str = ""

    def take(self, kind: str, paths: Sequence[Path], *, absent: str, several: str) -> None:
        """Note the one file of a kind, or as a problem why there is not one."""
        if len(paths) == 1:
            self.files[kind] = paths[0]
        else:
            self.problems.append(several if paths else absent)


Hint = Callable[[CaseCheck, list[int]], str]


@dataclass
class Summary:
    """What a maker of datalists found and wrote; counts are of cases unless named otherwise, and of the first fold.

    ``header`` is that of the datalist; ``patients`` is None where the data do not tell which cases share a patient (or
    images a group); ``extra`` are further facts, one a line.
    """

    datalists: list[Path]
    header: Mapping[str, Any]
    sections: dict[str, int]
    patients: int | None
    shapes: dict[str, int]
    spacings_mm: dict[str, int]
    voxels_per_label: dict[str, int]
    cases_per_label: dict[str, int]
    warnings: list[str]
    left_out: list[str]
    extra: Sequence[str]

    def lines(self) -> list[str]:
        """The summary as text, one fact a line."""
        images, voxels = self.header.get("kind") == IMAGES, sum(self.voxels_per_label.values()) or 1
        cases, pixel, groups = ("images", "pixel", "groups") if images else ("cases", "voxel", "patients")
        members = f"{cases} of {self.patients} {groups}"
        if self.patients is None:
            members = f"{'images' if images else 'volumes'}, it is not known which share a patient"
        spacings = f"spacings in mm: {_commonest(self.spacings_mm)}"
        if self.header.get("distance_unit") == "px":
            spacings = "pixel size: not known, so that distances are in pixels"
        return [
            f"{sum(self.sections.values())} {members}: "
            + ", ".join(f"{n} {s}" for s, n in self.sections.items())
            + (f", in the first of {len(self.datalists)} folds" if len(self.datalists) > 1 else ""),
            f"shapes: {_commonest(self.shapes)}",
            spacings,
            *(
                f"label {label} {self.header['labels'].get(label, '')}".rstrip()
                + f": {n} {pixel}s ({100 * n / voxels:.3f} %), in {self.cases_per_label[label]} {cases}"
                for label, n in self.voxels_per_label.items()
            ),
            *self.extra,
            *(f"warning: {text}" for text in self.warnings),
            *(f"left out: {text}" for text in self.left_out),
            f"wrote {' '.join(map(str, self.datalists))}",
        ]


def _commonest(counts: Mapping[str, int], shown: int = 6) -> str:
    """The first few of ``counts``, which come with the most frequent first: cropped sets have a shape per volume."""
    listed = ", ".join(f"{name} ({n})" for name, n in list(counts.items())[:shown])
    return listed + (f" and {len(counts) - shown} others" if len(counts) > shown else "")


def check_files(
    check: CaseCheck,
    *,
    label: str,
    legal: Collection[int],
    hint: Hint = lambda check, strange: "",
    channels: int = 1,
    modality: str = "",
) -> None:
    """Read ``check.files`` completely and add to ``check`` all that is known and everything that is wrong.

    The first file gives the grid of all; ``label`` names the label among them, ``legal`` are its values, ``hint`` makes
    an advice of the case and of those that are not (sorted), ``channels`` are scans on a fourth axis of an image;
    values that do not look like the ``modality`` are a warning.
    """
    hashes = {}
    first: Volume | None = None
    for name, path in check.files.items():
        try:
            volume = read_any(path)
        except DataError as error:
            check.problems.append(str(error))
            continue
        hashes[name] = volume.sha256
        check.warnings += volume.notes
        scans = np.moveaxis(volume.array, 3, 0) if volume.array.ndim == 4 else volume.array[None]
        if len(scans) != (wanted := 1 if name == label else channels):
            expected = "three axes" if wanted == 1 else f"{wanted} scans on a fourth axis"
            check.problems.append(f"{path.name}: has shape {volume.array.shape}, expected {expected}")
            continue
        grid = replace(volume, array=scans[0])
        if name == label and first is not None:
            grid, note = stored_like(grid, first)
            check.warnings += [f"{path.name}: {note}"] if note else []
        if first is None:
            first, first_name = grid, path.name
            check.shape, check.spacing_mm = grid.array.shape, grid.spacing_mm
        else:
            difference, note = grid_difference(grid, first)
            check.problems += [f"{path.name}: {difference} of {first_name}"] if difference else []
            check.warnings += [f"{path.name}: {note} as that of {first_name}"] if note else []
        if name == label:
            check_label(volume.array, path.name, check, legal=legal, hint=hint)
        else:
            for number, scan in enumerate(scans):
                where = f"{path.name}: scan {number}" if wanted > 1 else path.name
                if problem := value_problem(scan):
                    check.problems.append(f"{where}: {problem}")
                elif doubt := modality_doubt(scan, modality):
                    check.warnings.append(f"{where}: {doubt}")
    check.sha256 = case_hashes(hashes)[0]


def check_label(array: np.ndarray, name: str, check: CaseCheck, *, legal: Collection[int], hint: Hint) -> None:
    """Count the values of a label and add to ``check`` what is wrong with them; ``hint`` as in ``check_files``."""
    if not np.isfinite(array).all():
        check.problems.append(f"{name}: labels are NaN or infinite")
        return
    if array.dtype.kind == "f" and (array != (whole := np.rint(array))).any():
        fractional = np.unique(array[np.abs(array - whole) > ROUNDED])
        if fractional.size:
            shown = ", ".join(f"{value:g}" for value in fractional[:4])
            problem = f"{name}: labels are not whole numbers ({shown}): resampled without nearest neighbour?"
            check.problems.append(problem)
            return
        off = f"by up to {np.abs(array - whole).max():.1g}"
        check.warnings.append(f"{name}: {(array != whole).sum()} labels are no whole numbers {off}: they are rounded")
        array = whole
    values, counts = np.unique(array, return_counts=True)
    check.label_dtype = array.dtype.name
    check.voxels_per_label = {int(v): int(n) for v, n in zip(values, counts, strict=True)}
    strange = sorted(set(check.voxels_per_label) - set(legal))
    if strange:
        check.problems.append(f"{name}: labels {_ranges(strange)} are outside {_ranges(legal)}{hint(check, strange)}")
    elif check.voxels_per_label.keys() <= _without_class(legal):
        check.warnings.append(f"{name}: the mask is empty: no training slice, and no Dice in an evaluation")


def _without_class(legal: Collection[int]) -> set[int]:
    """Values of background and of voxels that nobody has judged; only names tell the latter."""
    names = legal if isinstance(legal, Mapping) else {}
    return {0, *(value for value, name in names.items() if name == BACKGROUND or is_ignored(name))}


def _ranges(values: Collection[int]) -> str:
    """All values while they fit into a line, else the ends."""
    listed = sorted(values)
    return str(listed) if len(listed) <= 20 else f"[{listed[0]} to {listed[-1]}]"


def read_all(
    checks: Sequence[Check],
    read: Callable[[Check], None],
    src: Path,
    *,
    judge: Callable[[Sequence[Check]], Sequence[str]] = lambda checks: (),
    skip_bad: bool = False,
    num_threads: int = 2,
    progress: bool = True,
) -> tuple[list[Check], list[str]]:
    """Read cases at the same time (unpacking and hashing release the interpreter lock) and set the bad ones aside.

    Args:
        checks: what the names of files tell of each case.
        read: adds what the files of a case tell.
        src: folder, for the message.
        judge: asked when all are read: the problems of the data set that belong to no case; they are never left out.
        skip_bad: leave bad cases out and list them, instead of stopping.
        num_threads: cases read at the same time.
        progress: show a bar.

    Returns: good cases, and the problems of the bad ones as lines ``<case>: <problem>``.

    Raises:
        DataError: all problems at once, unless ``skip_bad`` and some case is good.
    """

    def attempt(check: Check) -> None:
        try:
            read(check)
        except Exception as error:  # noqa: BLE001  whatever is wrong with one case must not hide the others
            check.problems.append(reason_of(error))

    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        list(tqdm(pool.map(attempt, checks), total=len(checks), desc="checking cases", disable=not progress))
    others = judge(checks)
    good = [check for check in checks if not check.problems]
    problems = [f"{check.case}: {problem}" for check in checks for problem in check.problems]
    if others or not skip_bad or not good:
        fix = "" if not good or others else "; mend them, or leave these cases out with --skip-bad"
        bad = f"{len(checks) - len(good)} of {len(checks)} cases in {src} cannot be used{fix}"
        raise_all([*others, *problems], DataError, bad if problems else f"{src} cannot be used")
    return good, problems


def labelled(checks: Sequence[Check], label: str, src: Path) -> tuple[list[Check], list[str]]:
    """The cases that have a label, or a defect; and a warning that counts those with images alone, which are left out.

    Raises:
        DataError: no case has a label.
    """
    alone = [check.case for check in checks if check.files and label not in check.files and not check.problems]
    if alone and len(alone) == len(checks):
        raise DataError(f"{src}: none of {len(checks)} cases has a label; 'samseg predict' takes images alone")
    shown = ", ".join(alone[:10]) + (" ..." if len(alone) > 10 else "")
    warnings = [f"{len(alone)} of {len(checks)} cases have no label and are left out: {shown}"] if alone else []
    unlabelled = set(alone)
    return [check for check in checks if check.case not in unlabelled], warnings


def _notes(checks: Sequence[CaseCheck]) -> list[str]:
    """Warnings of all cases, and one line for labels stored as fractions, which a strict reader would refuse."""
    kinds = Counter(check.label_dtype for check in checks if check.label_dtype.startswith("float"))
    return [f"{check.case}: {warning}" for check in checks for warning in check.warnings] + [
        f"{count} labels are stored as {kind} and hold whole numbers only: they are read as integers"
        for kind, count in sorted(kinds.items())
    ]


def duplicates(checks: Sequence[Check], what: Callable[[Check], str] = lambda check: check.sha256) -> list[str]:
    """One sentence for each content (by its hash ``what``) under two names: it would leak from training to testing."""
    by_content: dict[str, list[str]] = {}
    for check in checks:
        by_content.setdefault(what(check), []).append(check.case)
    return [f"{' and '.join(cases)} have the same content" for cases in by_content.values() if len(cases) > 1]


def write_checked(
    output: str | Path,
    src: Path,
    good: Sequence[CaseCheck],
    splits: Sequence[Split],
    *,
    header: Mapping[str, Any],
    label: str = "label",
    patient: Callable[[str], str] | None,
    warnings: Sequence[str],
    left_out: list[str],
    extra: Sequence[str] = (),
) -> Summary:
    """Write the datalist of checked cases, or one for each fold, log every warning and sum it all up.

    Args:
        output: datalist to write; of several folds ``d.json`` becomes ``d_fold1.json``, ``d_fold2.json`` ...
        src: folder that its paths are relative to.
        good: usable cases.
        splits: which of them are used for what, once or for each fold.
        header: what stands above the sections: ``labels`` and ``scans`` at least.
        label: which of a case's files the label is; the others are its image.
        patient: case -> patient; None where nobody knows: each case is its own.
        warnings, left_out, extra: to be shown; see ``Summary``. Warnings of the cases come before these.
    """
    of = {check.case: check for check in good}
    checks = [of[case] for cases in splits[0].sections.values() for case in cases]
    images = header.get("kind") == IMAGES
    labels = [check.files[label] for check in checks]
    drawn = all(path.name.endswith((".nii", ".nii.gz")) and is_phantom(path) for path in labels)
    facts = {**header, "phantoms": drawn and not images}
    path = Path(output)
    folds = [path.with_name(f"{path.stem}_fold{n}{path.suffix}") for n in range(1, len(splits) + 1)]
    written = folds if len(splits) > 1 else [path]
    hashes = {check.case: check.sha256 for check in checks}
    few: list[str] = []
    for target, split in zip(written, splits, strict=True):
        sections = {
            section: [_item(of[case], src, label, header, patient) for case in cases]
            for section, cases in split.sections.items()
        }
        datalist = {**facts, "split": dict(split.made_by), **sections, "hashes": hashes}
        write_datalist(datalist, target)
        few = few or too_few_to_choose(datalist)
    warnings = [*_notes(good), *warnings, *few]
    for text in warnings:
        LOG.warning("%s", text)
    return Summary(
        datalists=written,
        header=header,
        sections={section: len(cases) for section, cases in splits[0].sections.items()},
        patients=None if patient is None else len({patient(check.case) for check in checks}),
        warnings=warnings,
        left_out=left_out,
        extra=extra,
        **_counts(checks),
    )


def _item(
    check: CaseCheck, src: Path, label: str, header: Mapping[str, Any], patient: Callable[[str], str] | None
) -> dict[str, Any]:
    """What a datalist says of a case; the arguments are those of ``write_checked``."""
    files = {name: path.relative_to(src).as_posix() for name, path in check.files.items()}
    stored, images = files.pop(label), list(files.values())
    one_file = header.get("kind") == IMAGES or len(images) < len(header["scans"])
    owner = check.case if patient is None else patient(check.case)
    image = images[0] if one_file else images
    return {"case": check.case, "patient": owner, "image": image, "label": stored, "reference": stored}


def _counts(checks: Sequence[CaseCheck]) -> dict[str, dict[str, int]]:
    voxels = sum((Counter(check.voxels_per_label) for check in checks), Counter())
    cases = Counter(value for check in checks for value in check.voxels_per_label)
    return {
        "shapes": dict(Counter("x".join(map(str, check.shape)) for check in checks).most_common()),
        "spacings_mm": dict(Counter("x".join(f"{s:g}" for s in check.spacing_mm) for check in checks).most_common()),
        "voxels_per_label": {str(value): voxels[value] for value in sorted(voxels)},
        "cases_per_label": {str(value): cases[value] for value in sorted(voxels)},
    }
