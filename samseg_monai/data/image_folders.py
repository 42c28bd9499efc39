"""From a folder of 2-D images and one of masks to a datalist, split by groups such as patients.

Names of 2-D images often hide which of them are neighbouring slices of one patient. Images of one group never stand in
two sections; without a group the summary says that nobody knows.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samseg_monai.data.checks import Summary, case_notes, check_all, duplicates, split_off_bad, summarise
from samseg_monai.data.codings import BACKGROUND, absent_labels
from samseg_monai.data.datalists import IMAGES, write_datalist
from samseg_monai.data.image_pairs import ImageCheck, check_pair, find_pairs
from samseg_monai.data.images import GREY, RGB, checked_spacing
from samseg_monai.data.splits import read_split, split_by_patient
from samseg_monai.errors import ConfigError, DataError

DEFAULT_FRACTIONS = (0.7, 0.1, 0.2)
OWN_CODING = "own"


def prepare_images(
    images: str | Path,
    masks: str | Path,
    output: str | Path,
    *,
    labels: Mapping[str, str],
    group: str | None = None,
    spacing: float | None = None,
    match: str | None = None,
    name: str | None = None,
    split_file: str | Path | None = None,
    fractions: Sequence[float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    skip_bad: bool = False,
    num_threads: int = 2,
    progress: bool = True,
) -> Summary:
    """Check every pair of image and mask and write a datalist; ``dataset_dir`` is the folder that holds both folders.

    Args:
        images, masks: folders of images, all in grey or all in RGB, and of masks, see ``image_pairs.find_pairs``.
        output: datalist to write.
        labels: value -> name for all values in the masks; the background (0) may be left out.
        group: regular expression; its first group, or all that it matches, in a case's name is the case's group.
        spacing: pixel size in mm; without it the files' own, and without either distances are in pixels.
        match: take only cases whose name matches this pattern of the shell, such as ``meningioma_*``.
        name: of the data set; default that of the folder.
        split_file: JSON with cases or groups under the section names, see ``splits.read_split``; wins over:
        fractions, seed: of groups for training, validation, testing; seed of the split.
        skip_bad: leave bad cases out and list them, instead of stopping.
        num_threads, progress: cases read at the same time; show a bar.

    Raises:
        ConfigError: a regular expression that is none, a spacing that is no size, no labels.
        DataError: folders without a common parent, no images, all defects of all cases at once (unless ``skip_bad``),
            only some images with a pixel size, or a split that does not fit the cases.
    """
    if not labels:
        raise ConfigError("nobody says what the values in the masks mean: give --labels '255=tumour'")
    spacing, table = checked_spacing(spacing), {"0": BACKGROUND, **labels}
    values = {int(value): text for value, text in table.items()}
    root, folders = _common_folder(Path(images), Path(masks))
    pairs = find_pairs(*folders, match)
    group_of = _groups(list(pairs.files), group, pairs.problems)

    def check(case: str) -> ImageCheck:
        return check_pair(case, pairs.files[case], pairs.problems[case], legal=values, spacing=spacing)

    checks = check_all(check, list(pairs.files), num_threads=num_threads, progress=progress)
    _check_channels(checks)
    good, left_out = split_off_bad(checks, folders[0], skip_bad=skip_bad, others=_unit_problems(checks, spacing))
    of = {check.case: check for check in good}
    split, unused, made_by = _split({case: group_of[case] for case in of}, group_of, group, split_file, fractions, seed)
    sections = {section: [of[case] for case in cases if case in of] for section, cases in split.items()}
    header = {"name": name or root.name, "labels": table, "spacing_mm": spacing, "split": made_by}
    warnings = [*_notes(good, spacing), *pairs.notes, *duplicates(good, lambda check: check.image_sha256)]
    warnings += absent_labels([check.voxels_per_label for check in good], values)
    warnings += [f"{case}: not named by the split file, not used" for case in unused]
    return _write(output, root, sections, header, group_of, warnings=warnings, left_out=left_out)


def _common_folder(images: Path, masks: Path) -> tuple[Path, tuple[Path, Path]]:
    """The folder that holds both, and both as absolute paths."""
    both = Path(os.path.abspath(images)), Path(os.path.abspath(masks))
    try:
        root = Path(os.path.commonpath(both))
    except ValueError:  # two drives of Windows
        root = Path(both[0].anchor)
    if root == Path(root.anchor):
        raise DataError(
            f"{images} and {masks} have no common parent folder, to which the paths of a datalist could be relative; "
            "put both (or links to them) into one folder"
        )
    return root, both


def _groups(cases: Sequence[str], group: str | None, problems: dict[str, list[str]]) -> dict[str, str]:
    """Group of each case; without a regular expression each is its own."""
    if group is None:
        return {case: case for case in cases}
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ConfigError(f"--group {group!r} is not a regular expression ({error})") from error
    groups = {}
    for case in cases:
        found = pattern.search(case)
        text = (found[1] if pattern.groups else found[0]) if found else None
        if not text:
            problems[case].append(f"its name does not tell its group: nothing in it matches --group {group!r}")
        groups[case] = text or case
    return groups


def _split(
    good: Mapping[str, str],
    group_of: Mapping[str, str],
    group: str | None,
    split_file: str | Path | None,
    fractions: Sequence[float],
    seed: int,
) -> tuple[dict[str, list[str]], list[str], dict[str, Any]]:
    """Section -> cases, cases that a split file does not name, and how it was made.

    ``good`` and ``group_of`` are case -> group, of the usable cases and of all.
    """
    what = "image" if group is None else "group"
    if split_file is None:
        made_by = {"by": what, "group": group, "seed": seed, "fractions": list(fractions)}
        return split_by_patient(good, fractions, seed=seed), [], made_by
    split, unused = read_split(Path(split_file), group_of, what=what)
    return split, unused, {"by": "file", "file": Path(split_file).name, "group": group}


def _check_channels(checks: Sequence[ImageCheck]) -> None:
    """A network takes grey or colour: of a mixed set the fewer are refused."""
    kinds = Counter(check.scans for check in checks if check.scans)
    if len(kinds) < 2:
        return
    kept = RGB if kinds[RGB] > kinds[GREY] else GREY
    for check in checks:
        if check.scans and check.scans != kept:
            what = ("is in grey", "RGB") if kept == RGB else ("is in RGB", "grey")
            check.problems.append(
                f"{check.files['image'].name}: {what[0]}, but {kinds[kept]} others are in {what[1]}; save all alike"
            )


def _unit_problems(checks: Sequence[ImageCheck], spacing: float | None) -> list[str]:
    usable = [check for check in checks if not check.problems]
    stated = [check for check in usable if check.own_spacing]
    if spacing is not None or len(stated) in (0, len(usable)):
        return []
    other = next(check for check in usable if not check.own_spacing)
    return [
        f"{len(stated)} of {len(usable)} images state their pixel size (such as {stated[0].case}), the others do not "
        f"(such as {other.case}): distances would mix mm and pixels; give --spacing"
    ]


def _notes(checks: Sequence[ImageCheck], spacing: float | None) -> list[str]:
    """Oddities of all cases, equal ones in one line."""
    named: dict[tuple[str, str], list[str]] = {}
    for check in checks:
        for role, file, note in check.notes:
            named.setdefault((role, note), []).append(file)
        if check.grey_rgb:
            text = "is stored in RGB, but its three channels are equal; usable, though in grey it needs a third"
            named.setdefault(("image", text), []).append(check.files["image"].name)
        if check.own_spacing and spacing is not None:
            named.setdefault(("image", f"states its own pixel size; {spacing:g} mm is used"), []).append(check.case)
    lines = []
    for (role, note), files in named.items():
        others = f" and {len(files) - 1} other {role}{'s' * (len(files) > 2)}" if len(files) > 1 else ""
        lines.append(f"{files[0]}{others}: {note}")
    return [*case_notes(checks), *lines]


def _write(
    output: str | Path,
    root: Path,
    sections: Mapping[str, Sequence[ImageCheck]],
    header: Mapping[str, Any],
    group_of: Mapping[str, str],
    *,
    warnings: list[str],
    left_out: list[str],
) -> Summary:
    used = [check for members in sections.values() for check in members]
    if not used:
        raise DataError("no image is left for any section; does the split file name the good ones?")
    in_mm = header["spacing_mm"] is not None or used[0].own_spacing
    datalist = {
        "name": header["name"],
        "kind": IMAGES,
        "modality": "",
        "phantoms": False,
        "scans": list(used[0].scans),
        "label_coding": OWN_CODING,
        "distance_unit": "mm" if in_mm else "px",
        **header,
        **{s: [_item(check, root, group_of[check.case]) for check in members] for s, members in sections.items()},
        "sizes": {check.case: list(check.shape) for check in used},
        "hashes": {check.case: check.sha256 for check in used},
    }
    write_datalist(datalist, output)
    grouped = header["split"]["group"] is not None
    patients = len({group_of[check.case] for check in used}) if grouped else None
    summary = summarise(
        Path(output), sections, patients=patients, labels=header["labels"], warnings=warnings, left_out=left_out
    )
    summary.things, summary.groups, summary.pixel = "images", "groups", "pixel"
    summary.unit = datalist["distance_unit"]
    summary.extra = [_values(used), f"dataset_dir (paths are relative to it): {root}"]
    return summary


def _item(check: ImageCheck, root: Path, group: str) -> dict[str, Any]:
    image, label = (check.files[kind].relative_to(root).as_posix() for kind in ("image", "label"))
    return {"case": check.case, "patient": group, "image": image, "label": label, "reference": label}


def _values(checks: Sequence[ImageCheck]) -> str:
    """Which numbers the images hold."""
    kinds = Counter(("RGB" if check.scans == RGB else "grey", check.dtype) for check in checks)
    shown = ", ".join(f"{colour} {dtype} ({count})" for (colour, dtype), count in kinds.most_common())
    low, high = min(check.low for check in checks), max(check.high for check in checks)
    return f"values of the images: {shown}, from {low:g} to {high:g}"
