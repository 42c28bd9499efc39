"""From a folder of 2-D images and one of masks to a datalist, split by groups such as patients.

Names of 2-D images often hide which of them are neighbouring slices of one patient. Images of one group never stand in
two sections; without a group the summary says that nobody knows.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from samseg_monai.data import IMAGES
from samseg_monai.data.datalists import case_hashes
from samseg_monai.data.datalists.checks import (
    CaseCheck,
    Summary,
    check_label,
    duplicates,
    labelled,
    read_all,
    write_checked,
)  # fmt: skip
from samseg_monai.data.datalists.label_maps import BACKGROUND, OWN_CODING, absent_labels, check_names
from samseg_monai.data.datalists.layouts import composed, patients_in, read_csv
from samseg_monai.data.datalists.owners import alike
from samseg_monai.data.datalists.splits import Split, choose_splits
from samseg_monai.data.files.cases import MASK_ENDINGS, list_images
from samseg_monai.data.files.images import GREY, RGB, Picture, checked_spacing, is_grey, read_image
from samseg_monai.data.files.volumes import affine_difference, value_problem
from samseg_monai.errors import ConfigError, DataError


@dataclass
class ImageCheck(CaseCheck):
    """What is known of a pair of image and mask; ``shape`` and ``spacing_mm`` are (rows, columns).

    ``image_sha256`` is of the image alone, ``scans`` the names of its channels, ``dtype``, ``low`` and ``high`` say
    which numbers it holds, ``grey_rgb`` whether its three channels are equal; ``own_spacing`` whether it states its
    pixel size; ``notes`` are (``image`` or ``mask``, file name, oddity).
    """

    image_sha256: str = ""
    scans: tuple[str, ...] = ()
    dtype: str = ""
    low: float = 0.0
    high: float = 0.0
    grey_rgb: bool = False
    own_spacing: bool = False
    notes: list[tuple[str, str, str]] = field(default_factory=list)


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
    table: str | Path | None = None,
    split_file: str | Path | None = None,
    fractions: Sequence[float] | None = None,
    folds: int | None = None,
    seed: int = 0,
    **reading: Any,
) -> Summary:
    """Check every pair of image and mask and write a datalist; ``dataset_dir`` is the folder that holds both folders.

    Args:
        images, masks: folders of images, all in grey or all in RGB, and of masks with the same names, which may also
            end in ``_mask`` or ``_seg``; one folder may hold both.
        output: datalist to write.
        labels: value -> name for all values in the masks; the background (0) may be left out.
        group: regular expression; its first group, or all that it matches, in a case's name is the case's group.
        spacing: pixel size in mm; without it the files' own, and without either distances are in pixels.
        match: take only cases whose name matches this pattern of the shell, such as ``meningioma_*``.
        name: of the data set; default that of the folder.
        table: CSV with the columns ``case`` and ``patient`` in place of ``group``.
        split_file, fractions, folds, seed: see ``splits.choose_splits``, with groups in place of patients.
        reading: ``skip_bad``, ``num_threads``, ``progress``, see ``checks.read_all``.

    Raises:
        ConfigError: no regular expression, size or name of a class; a group and a table; several ways to split.
        DataError: folders without a common parent, no images, all defects of all cases at once (unless ``skip_bad``),
            only some images with a pixel size, a split that does not fit the cases.
    """
    names = _names(labels)
    spacing = checked_spacing(spacing)
    values = {int(value): text for value, text in names.items()}
    root, folders = _common_folder(Path(images), Path(masks))
    found, unpaired = _find_pairs(*folders, match)
    checks, alone = labelled(found, "label", folders[0])
    group_of = _groups(found, group, table)
    read, judge = partial(_read_pair, legal=values, spacing=spacing), partial(_judge, spacing=spacing)
    good, left_out = read_all(checks, read, folders[0], judge=judge, **reading)
    of = {check.case: check for check in good}
    usable, grouped = {case: group_of[case] for case in of}, group is not None or table is not None
    ways: dict[str, Any] = {"split_file": split_file, "fractions": fractions, "folds": folds}
    splits, unused = choose_splits(usable, group_of, **ways, seed=seed, what="group" if grouped else "image")
    splits = [Split(split.sections, {**split.made_by, "group": group}) for split in splits]
    used = [of[case] for cases in splits[0].sections.values() for case in cases]
    header = _header(used, name or root.name, names, spacing)
    warnings = [*alone, *_notes(good, spacing), *unpaired, *duplicates(good, lambda c: c.image_sha256), *unused]
    warnings += [*absent_labels([c.voxels_per_label for c in good], values), *alike(group_of.values() if table else ())]
    extra = [_values(used), f"dataset_dir (paths are relative to it): {root}"]
    patient = group_of.__getitem__ if grouped else None
    return write_checked(
        output, root, good, splits, header=header, patient=patient, warnings=warnings, left_out=left_out, extra=extra
    )


def _header(used: Sequence[ImageCheck], name: str, labels: Mapping[str, str], spacing: float | None) -> dict[str, Any]:
    if not used:
        raise DataError("no image is left for any section; does the split file name the good ones?")
    return {
        "name": name,
        "kind": IMAGES,
        "modality": "",
        "scans": list(used[0].scans),
        "label_coding": OWN_CODING,
        "labels": labels,
        "spacing_mm": spacing,
        "distance_unit": "mm" if spacing is not None or used[0].own_spacing else "px",
        "sizes": {check.case: list(check.shape) for check in used},
    }


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


def _names(labels: Mapping[str, str]) -> dict[str, str]:
    if not labels:
        raise ConfigError("nobody says what the values in the masks mean: give --labels '255=tumour'")
    check_names(labels)
    return {"0": BACKGROUND, **labels}


def _groups(checks: Sequence[ImageCheck], group: str | None, table: str | Path | None) -> dict[str, str]:
    """Group of each case; without a regular expression or a table each is its own."""
    if group is not None and table is not None:
        raise ConfigError("got a group and a table of patients: give one of them")
    if table is not None:
        return patients_in(read_csv(Path(table)), [check.case for check in checks], Path(table).name)
    if group is None:
        return {check.case: check.case for check in checks}
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise ConfigError(f"--group {group!r} is not a regular expression ({error})") from error
    groups = {}
    for check in checks:
        found = pattern.search(check.case)
        text = (found[1] if pattern.groups else found[0]) if found else None
        if not text:
            check.problems.append(f"its name does not tell its group: nothing in it matches --group {group!r}")
        groups[check.case] = text or check.case
    return groups


def _judge(checks: Sequence[ImageCheck], spacing: float | None) -> list[str]:
    """What the images are together: of a mixed set the fewer, in grey or colour, are refused, and no unit is mixed."""
    kinds = Counter(check.scans for check in checks if check.scans)
    kept = RGB if kinds[RGB] > kinds[GREY] else GREY
    colour, other = ("grey", "RGB") if kept == RGB else ("RGB", "grey")
    for check in checks:
        if check.scans and check.scans != kept:
            name = check.files["image"].name
            check.problems.append(f"{name}: is in {colour}, but {kinds[kept]} others are in {other}; save all alike")
    usable = [check for check in checks if not check.problems]
    stated, silent = ([check.case for check in usable if check.own_spacing is own] for own in (True, False))
    if spacing is not None or not stated or not silent:
        return []
    return [
        f"{len(stated)} of {len(usable)} images state their pixel size (such as {stated[0]}), the others do not "
        f"(such as {silent[0]}): distances would mix mm and pixels; give --spacing"
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
    return lines


def _find_pairs(images: Path, masks: Path, match: str | None) -> tuple[list[ImageCheck], list[str]]:
    """Images and masks matched by their names without suffix, and what else lies there.

    ``match`` is a pattern of the shell, or None.
    """
    notes: list[str] = []
    images_of: dict[str, list[Path]] = {}
    masks_of: dict[str, list[Path]] = {}
    for case, path in _listed(images, notes):
        is_mask = images == masks and case.endswith(MASK_ENDINGS)
        (masks_of if is_mask else images_of).setdefault(case, []).append(path)
    for case, path in _listed(masks, notes) if images != masks else []:
        masks_of.setdefault(case, []).append(path)
    matched: dict[str, list[Path]] = {}
    for stem, paths in masks_of.items():
        free = "" if stem in images_of else stem  # an image called a_mask has a mask of that name
        ending = next((end for end in MASK_ENDINGS if free.endswith(end) and free != end), "")
        matched.setdefault(stem.removesuffix(ending), []).extend(paths)
    checks = []
    for case in sorted({*images_of, *matched}):
        check = ImageCheck(case)
        kinds = {"image": (images_of.get(case, []), images), "label": (matched.get(case, []), masks)}
        for kind, (paths, folder) in kinds.items():
            what, why = (
                ("image", "differ by their suffix only") if kind == "image" else ("mask", "are masks of one image")
            )
            several = f"{' and '.join(path.name for path in paths)} in {folder.name} {why}: keep one"
            if paths or kind == "image":  # an image alone is a case without a label, which is no defect
                check.take(kind, paths, absent=f"no {what} of this name in {folder.name}", several=several)
        names = [case, *(path.name for paths, _ in kinds.values() for path in paths)]
        if match is None or any(fnmatch.fnmatchcase(name, match) for name in names):
            checks.append(check)
    if not any("image" in check.files for check in checks):
        which = f" whose name matches {match!r}" if match else ""
        raise DataError(f"{images}: no image{which} in it; expected PNG, JPEG, TIFF, BMP, DICOM or NIfTI files")
    return checks, notes


def _listed(folder: Path, notes: list[str]) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    images, others, folders = list_images(folder)
    for names, what in ((others, "are no images"), (folders, "are folders, which are not looked into")):
        if names:
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            notes.append(f"{len(names)} entries of {folder.name} {what}: {shown}")
    return [(composed(case), path) for case, path in images]


def _read_pair(check: ImageCheck, legal: Collection[int], spacing: float | None) -> None:
    """Read image and mask completely and add all that is known and everything that is wrong."""
    pictures: dict[str, Picture] = {}
    for kind, path in check.files.items():
        role = "mask" if kind == "label" else "image"
        try:
            pictures[kind] = read_image(path, spacing)
        except DataError as error:
            check.problems.append(f"mask {error}" if kind == "label" else str(error))
        else:
            check.notes += [(role, path.name, note) for note in pictures[kind].notes]
    if "image" in pictures:
        _take_image(check, pictures["image"])
    if "label" in pictures:
        _take_mask(check, pictures["label"], legal)
    if len(pictures) == 2:
        _compare(check, pictures["image"], pictures["label"], spacing)
    check.sha256 = case_hashes({kind: picture.sha256 for kind, picture in pictures.items()})[0]


def _take_image(check: ImageCheck, picture: Picture) -> None:
    array = picture.array
    check.shape, check.spacing_mm = array.shape[:2], picture.spacing_mm[:2]
    check.image_sha256, check.scans, check.dtype = picture.sha256, picture.scans, array.dtype.name
    check.own_spacing = picture.own_spacing_mm is not None
    if problem := value_problem(array, "pixel"):
        check.problems.append(f"{check.files['image'].name}: {problem}")
        return
    check.low, check.high = float(array.min()), float(array.max())
    check.grey_rgb = array.ndim == 4 and is_grey(array)


def _take_mask(check: ImageCheck, picture: Picture, legal: Collection[int]) -> None:
    name = check.files["label"].name
    if picture.array.ndim != 3:
        what = "its three channels are equal" if is_grey(picture.array) else "colours are not label values"
        what = "; ".join([what, *(f"it {note}" for note in picture.notes)])
        check.problems.append(
            f"mask {name}: is an RGB picture ({what}); save it in grey, with one value for each label"
        )
        return

    def hint(_: CaseCheck, strange: list[int]) -> str:
        shown = ", ".join(f"{value} ({check.voxels_per_label[value]} pixels)" for value in strange[:8])
        more = f" and {len(strange) - 8} other values" if len(strange) > 8 else ""
        lossy = "; JPEG is lossy and smears the values of a mask: save masks as PNG" if picture.kind == "JPEG" else ""
        return f": {shown}{more}{lossy or '; name every value with --labels'}"

    check_label(picture.array, name, check, legal=legal, hint=hint)
    if picture.kind == "JPEG" and not check.problems:
        check.warnings.append(f"{name}: the mask is a JPEG file, whose values are not kept exactly in general")


def _compare(check: ImageCheck, image: Picture, mask: Picture, spacing: float | None) -> None:
    name, other = check.files["label"].name, check.files["image"].name
    (rows, columns), wanted = mask.array.shape[:2], image.array.shape[:2]
    if (rows, columns) != wanted:
        check.problems.append(
            f"mask {name}: has {rows} rows and {columns} columns, but {other} has {wanted[0]} and {wanted[1]}"
        )
    own, its = image.own_spacing_mm, mask.own_spacing_mm
    if spacing is None and own != its and not (own and its and np.allclose(own, its, rtol=1e-3)):
        sizes = [f"{pair[0]:.4g} x {pair[1]:.4g} mm" if pair else "nothing" for pair in (its, own)]
        check.problems.append(
            f"mask {name}: states {sizes[0]} as pixel size, {other} states {sizes[1]}; give it with --spacing"
        )
    affines = (image.stored_affine, mask.stored_affine)
    if affines[0] is not None and affines[1] is not None:
        difference, note = affine_difference(affines[1], affines[0], (*wanted[::-1], 1))
        if difference:
            check.problems.append(
                f"mask {name}: its {difference} of {other}, so that it may be stored in another direction; resample it "
                "to the image's grid"
            )
        check.warnings += [f"mask {name}: {note} as that of {other}"] if note else []


def _values(checks: Sequence[ImageCheck]) -> str:
    """Which numbers the images hold."""
    kinds = Counter(("RGB" if check.scans == RGB else "grey", check.dtype) for check in checks)
    shown = ", ".join(f"{colour} {dtype} ({count})" for (colour, dtype), count in kinds.most_common())
    low, high = min(check.low for check in checks), max(check.high for check in checks)
    return f"values of the images: {shown}, from {low:g} to {high:g}"
