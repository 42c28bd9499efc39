"""Which 2-D images and masks two folders hold, by their names, and whether each pair can be used."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from samseg_monai.data.checks import CaseCheck, check_label
from samseg_monai.data.image_formats import is_grey
from samseg_monai.data.images import Picture, case_of, read_image
from samseg_monai.data.volumes import AFFINE_TOLERANCE_MM, value_problem
from samseg_monai.errors import DataError

MASK_ENDINGS = ("_mask", "-mask", "_seg", "-seg")
LOG = logging.getLogger(__name__)
_LEFTOVERS = ("thumbs.db", "desktop.ini")  # of file managers; names with a dot in front are passed over, too


@dataclass
class Pairs:
    """``files``: case -> ``image`` and ``label``, those of them there are; ``problems``: case -> what its names show;
    ``notes``: what was seen and not used."""

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class ImageCheck(CaseCheck):
    """Result of ``check_pair``; ``shape`` and ``spacing_mm`` are (rows, columns).

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


def find_pairs(images: Path, masks: Path, match: str | None = None) -> Pairs:
    """Match images and masks by their names without suffix; a mask may also end in ``_mask`` or ``_seg``.

    Args:
        images: folder of images.
        masks: folder of masks; the same one when the masks' names have one of these endings.
        match: take only cases whose name, with or without suffix, matches this pattern of the shell.

    Raises:
        DataError: one of them is no folder, or there is no image.
    """
    found = Pairs()
    images_of: dict[str, list[Path]] = {}
    masks_of: dict[str, list[Path]] = {}
    together = os.path.abspath(images) == os.path.abspath(masks)
    for case, path in _listed(images, found):
        is_mask = together and case.endswith(MASK_ENDINGS)
        (masks_of if is_mask else images_of).setdefault(case, []).append(path)
    if not together:
        for case, path in _listed(masks, found):
            masks_of.setdefault(case, []).append(path)
    matched: dict[str, list[Path]] = {}
    for stem, paths in masks_of.items():
        matched.setdefault(stem if stem in images_of else without_ending(stem), []).extend(paths)
    for case in sorted({*images_of, *matched}):
        kinds = {"image": (images_of.get(case, []), images), "label": (matched.get(case, []), masks)}
        if _chosen(case, [path.name for paths, _ in kinds.values() for path in paths], match):
            found.files[case] = {kind: paths[0] for kind, (paths, _) in kinds.items() if len(paths) == 1}
            found.problems[case] = [
                text for kind, (paths, folder) in kinds.items() if (text := _name_problem(kind, paths, folder))
            ]
    if not any("image" in files for files in found.files.values()):
        which = f" whose name matches {match!r}" if match else ""
        raise DataError(f"{images}: no image{which} in it; expected PNG, JPEG, TIFF, BMP, DICOM or NIfTI files")
    return found


def without_ending(stem: str) -> str:
    """Name of the image that a mask called ``stem`` belongs to."""
    ending = next((ending for ending in MASK_ENDINGS if stem.endswith(ending) and stem != ending), "")
    return stem.removesuffix(ending)


def list_images(folder: Path) -> tuple[list[tuple[str, Path]], list[str], list[str]]:
    """Case and path of every image in ``folder``, by name; names of other files; names of sub-folders.

    Links that lead nowhere are among the images when they are called so: they must be named, not passed over.
    """
    images, others, folders = [], [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.lower() in _LEFTOVERS:
            continue
        if path.is_dir():
            folders.append(path.name)
        elif (case := case_of(path)) is not None:
            images.append((case, path))
        else:
            others.append(path.name)
    return images, others, folders


def _listed(folder: Path, found: Pairs) -> list[tuple[str, Path]]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    images, others, folders = list_images(folder)
    for names, what in ((others, "are no images"), (folders, "are folders, which are not looked into")):
        if names:
            shown = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
            found.notes.append(f"{len(names)} entries of {folder.name} {what}: {shown}")
    return images


def _chosen(case: str, names: list[str], match: str | None) -> bool:
    return match is None or any(fnmatch.fnmatchcase(name, match) for name in (case, *names))


def _name_problem(kind: str, paths: list[Path], folder: Path) -> str:
    if not paths:
        return f"no {'image' if kind == 'image' else 'mask'} of this name in {folder.name}"
    if len(paths) == 1:
        return ""
    names = " and ".join(path.name for path in paths)
    if kind == "label":
        return f"{names} in {folder.name} are masks of one image: keep one"
    return f"{names} in {folder.name} differ by their suffix only: keep one"


def check_pair(
    case: str,
    files: Mapping[str, Path],
    problems: Collection[str],
    *,
    legal: Collection[int],
    spacing: float | None,
) -> ImageCheck:
    """Read image and mask of a case completely and collect all that is known and everything that is wrong.

    Args:
        case: its name.
        files: ``image`` and ``label``, those of them that there are.
        problems: what is already known.
        legal: values that the mask may have.
        spacing: pixel size in mm that a person gave.
    """
    check = ImageCheck(case, files=dict(files), problems=list(problems))
    pictures: dict[str, Picture] = {}
    for kind, path in check.files.items():
        try:
            picture = read_image(path, spacing)
        except DataError as error:
            role = "mask " if kind == "label" else ""
            check.problems.append(f"{role}{error}")
            continue
        pictures[kind] = picture
        check.notes += [("mask" if kind == "label" else "image", path.name, note) for note in picture.notes]
    if "image" in pictures:
        _take_image(check, pictures["image"])
    if "label" in pictures:
        _take_mask(check, pictures["label"], legal)
    if len(pictures) == 2:
        _compare(check, pictures["image"], pictures["label"], spacing)
    lines = "".join(f"{kind} {picture.sha256}\n" for kind, picture in pictures.items())
    check.sha256 = hashlib.sha256(lines.encode()).hexdigest()
    return check


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

    def hint(strange: list[int]) -> str:
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
        gap = float(np.abs(affines[0] - affines[1]).max())
        if gap > AFFINE_TOLERANCE_MM:
            check.problems.append(
                f"mask {name}: its affine differs by up to {gap:.4g} mm from that of {other}, so that it may be stored "
                "in another direction; resample it to the image's grid"
            )
