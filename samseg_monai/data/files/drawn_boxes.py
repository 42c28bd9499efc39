"""Boxes out of what a person has drawn elsewhere: masks of any tool, and regions (ROI) of 3D Slicer.

Both become what ``boxes`` reads: voxel indices of the stored image for volumes, pixels for 2-D images. Masks are to lie
on the grid of their image. Where that image is given, masks that are stored in other directions, or cut to a part of
it, as Slicer's ``.seg.nrrd`` and masks of DICOM series mostly are, are moved onto its grid first, voxel by voxel.

Slicer's files are those of its markups module: schema ``markups-schema-v1.0.4.json`` and
``vtkMRMLMarkupsROIJsonStorageNode.cxx`` in Slicer/Slicer. ``orientation`` has the axes of a ROI in its columns, in the
same coordinate system as its centre, and ``size`` the whole lengths of its edges in mm.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from samseg_monai.data import BRATS_OLD, BRATS_SCANS
from samseg_monai.data.files.boxes import MOST_BOXES, is_number, rectangles
from samseg_monai.data.files.case_list import case_name
from samseg_monai.data.files.cases import MASK_NAME
from samseg_monai.data.files.dicom import holds_series, read_any_grid
from samseg_monai.data.files.images import is_grey, read_image
from samseg_monai.data.files.volumes import (
    SUFFIXES,
    Volume,
    affine_difference,
    image_stem,
    read_volume,
    stem_of,
    stored_like,
)
from samseg_monai.errors import ConfigError, DataError, PromptError
from samseg_monai.files import read_json

PER_SLICE, PER_COMPONENT = "slice", "component"
_MARGIN = re.compile(r"(\d+(?:\.\d+)?) *(mm|voxels?|pixels?|px)", re.IGNORECASE)
_WHOLE = 1e-4  # labels that another tool has resampled are off by rounding
_EDGE = 1e-3  # voxels: an edge that a person put onto that of a voxel is there, but for rounding
_OF_SCAN = re.compile(rf"(.+)[-_]({'|'.join([*BRATS_SCANS, *BRATS_OLD])}|\d{{4}})", re.IGNORECASE | re.DOTALL)
_TURNED = 0.5  # voxels by which an edge of a ROI may leave its row of voxels
_FAR = 1e9  # mm or microns: no patient is as large, and sums of more could overflow
_LPS_TO_RAS = np.array([-1.0, -1.0, 1.0])
_EXPECTED = "save the ROI from Slicer's module Markups as .mrk.json"
Grid = tuple[tuple[int, ...], np.ndarray]  # shape and affine to RAS mm


@dataclass
class Drawn:
    """Boxes that were made.

    Attributes:
        boxes: case -> boxes, as a box file holds them.
        bad: case or file -> why there are none.
        notes: what a person should know, one line each.
        others: those of cases without boxes whose masks have none of the labels, but other ones.
    """

    boxes: dict[str, list[Any]] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def parse_margin(text: str) -> tuple[float, str]:
    """``3mm``, ``2voxels`` or ``2px`` as a number and ``mm`` or ``voxels``; ConfigError for another text."""
    found = _MARGIN.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"margin: expected a number with its unit, 3mm, 2voxels or 2px, got {text!r}")
    return float(found[1]), "mm" if found[2].lower() == "mm" else "voxels"


def boxes_from_masks(
    sources: Sequence[Path],
    *,
    labels: Sequence[int] = (),
    per: str = PER_SLICE,
    margin: tuple[float, str] = (0.0, "voxels"),
    images: Path | None = None,
    flat: bool = False,
    empty: bool = False,
) -> Drawn:
    """Boxes around the foreground of masks, slice by slice: without a margin tight ones.

    Args:
        sources: mask files, or folders of ``<case>.nii.gz``, ``<case>_seg.nii.gz`` or ``<case>/<case>-seg.nii.gz``; a
            folder with names like masks has its other files passed over. Files of 2-D images give boxes in pixels.
        labels: values that are the foreground, together; without any, all values above 0.
        per: ``slice``: one box around all of a slice's foreground; ``component``: one for each 8-connected component.
        margin: added on each side within the slice, in mm (rounded up to voxels in volumes) or voxels.
        images: the image that the only mask belongs to, its DICOM folder, or a folder with those of all cases.
        flat: NIfTI files of one slice are masks of 2-D images, too.
        empty: a mask of a 2-D image without foreground is a case with no boxes, in place of a bad one.

    Raises:
        DataError: there is no mask.
        ConfigError: an unknown ``per``; images for masks of 2-D images, whose pixels are the images'.
    """
    if per not in (PER_SLICE, PER_COMPONENT):
        raise ConfigError(f"per: expected {PER_SLICE} or {PER_COMPONENT}, got {per!r}")
    drawn = Drawn()
    listed = _masks(sources, drawn)
    cases = Counter(case for case, _ in listed)
    pictured = None if images is None else Images(images)
    for case, path in listed:
        planar = flat or stem_of(path) is None
        if planar and images is not None:
            raise ConfigError(
                f"images: {path.name} is a mask of a 2-D image, whose pixels are the image's; leave it out"
            )
        try:
            if cases[case] > 1:
                raise DataError(f"several masks are of the case {case}; keep one of them")
            if planar:
                found, notes = _of_image(path, labels, per, margin, empty)
            else:
                found, notes = _of_volume(path, labels, per, margin, None if pictured is None else pictured.of(case))
            if len(found) > MOST_BOXES:
                raise DataError(f"{len(found):,} boxes, more than {MOST_BOXES:,}; remove specks, or take one per slice")
        except (DataError, PromptError) as error:
            drawn.bad[case if cases[case] == 1 else str(path)] = str(error)
        else:
            drawn.boxes[case] = found
            drawn.notes += [f"{case}: {note}" for note in notes]
            drawn.others += [f"{case}: {note}" for note in notes if note.startswith("no pixel has the value")]
    return drawn


def boxes_from_slicer(paths: Sequence[Path], image: Path, case: str | None = None) -> Drawn:
    """Boxes out of the ROI in markups files of 3D Slicer, all of them drawn on one image.

    A ROI becomes the voxels whose centres it holds: ``slices`` [k0, k1] and a ``box`` of the stored image. One that is
    turned against the grid becomes the box around it, with a note.

    Args:
        paths: files ``.mrk.json``; markups of other kinds in them are passed over with a note.
        image: file, or folder of a DICOM series, whose grid the boxes are for.
        case: name that the case has in a prediction; default: that of the image.

    Raises:
        DataError: the image cannot be read.
        ConfigError: the image has no stored slices.
    """
    if image.is_file() and stem_of(image) is None:
        raise ConfigError(f"image: {image.name} is no volume; expected {', '.join(SUFFIXES)}, or a DICOM folder")
    grid, drawn = read_any_grid(image), Drawn()
    name = case_name(case or _case_of(image))
    boxes: list[dict[str, Any]] = []
    for path in paths:
        try:
            regions = _regions(path, drawn.notes)
            found = [_of_region(corners, grid, f"{path.name}: {roi}") for roi, corners in regions]
        except PromptError as error:
            drawn.bad[path.name] = str(error)
        else:
            boxes += [box for box, _ in found]
            drawn.notes += [note for _, notes in found for note in notes]
    if boxes:
        drawn.boxes[name] = boxes
    return drawn


class Images:
    """Finds the images of cases: a file or DICOM folder that is the only one, or those in a folder, listed once."""

    def __init__(self, place: Path) -> None:
        self._place, self._alone = place, place.is_file() or holds_series(place)
        self._called: dict[str, list[Path]] = {}  # name of the file without its suffix, or of the folder
        self._scans: dict[str, list[Path]] = {}  # what stands before the name of a scan, in small letters
        self._begins: dict[str, list[Path]] = {}  # what stands before any - or _
        for path in [] if self._alone else sorted(place.iterdir()):
            stem = stem_of(path)
            if path.is_dir():
                self._called.setdefault(path.name, []).append(path)
            if stem is None:
                continue
            self._called.setdefault(stem, []).append(path)
            if MASK_NAME.search(stem):
                continue
            for found in re.finditer("[-_]", stem):
                self._begins.setdefault(stem[: found.start()], []).append(path)
            if of_scan := _OF_SCAN.fullmatch(stem):
                self._scans.setdefault(of_scan[1].lower(), []).append(path)

    def of(self, case: str) -> Path:
        """The image of ``case``: the only one, or the file or folder that is called so.

        Of ``<case>/`` or ``<case>-<scan>`` it is the first scan: all of a case are on one grid. What goes on with
        something else may be another case: it counts where nothing else is there. DataError without any, or with
        several of these.
        """
        if self._alone:
            return self._place
        for path in self._called.get(case, ()):
            if (found := _first_in(path, case) if path.is_dir() and path.name == case else path) is not None:
                return found
        if scans := self._scans.get(case.lower()):
            return scans[0]
        begins = self._begins.get(case, [])
        if len(begins) > 1:
            names = ", ".join(path.name for path in begins[:4])
            raise DataError(
                f"several images in {self._place} begin like this case ({names}); call its own {case}{SUFFIXES[0]}"
            )
        if not begins:
            raise DataError(f"no image of this case in {self._place}; expected {case}{SUFFIXES[0]}, or a folder {case}")
        return begins[0]


def _first_in(folder: Path, case: str) -> Path | None:
    """The first image in the folder of a case, or that folder itself."""
    for path in (folder, *sorted(folder.iterdir())):
        stem = stem_of(path) or "_seg"
        if (path.is_dir() and holds_series(path)) or stem == case or not MASK_NAME.search(stem):
            return path
    return None


def _case_of(path: Path) -> str:
    """Name of the case that a file or DICOM folder is the image of, as predictions have it."""
    if path.is_dir():
        return path.absolute().name
    stem = stem_of(path) or image_stem(path) or path.name
    return re.sub(rf"[-_]({'|'.join(BRATS_SCANS)})$", "", stem)


def _masks(sources: Sequence[Path], drawn: Drawn) -> list[tuple[str, Path]]:
    """Case and path of every mask; DataError without any."""
    found: list[tuple[str, Path]] = []
    for source in sources:
        if not source.is_dir():
            found.append((_case_named(_stem(source) or source.name), source))
            continue
        inside = [path for path in sorted(source.iterdir()) if not path.is_dir() and _stem(path) is not None]
        for folder in (path for path in sorted(source.iterdir()) if path.is_dir() and not path.name.startswith(".")):
            inside += [p for p in sorted(folder.iterdir()) if not p.is_dir() and MASK_NAME.search(_stem(p) or "")]
        masks = [path for path in inside if MASK_NAME.search(_stem(path) or "")] or inside
        known = set(masks)
        if others := [path.name for path in inside if path not in known]:
            drawn.notes.append(
                f"passed over, as others in {source.name} are named like masks: {', '.join(others[:20])}"
            )
        found += [(_case_named(_stem(path) or path.name), path) for path in masks]
    if not found:
        raise DataError(f"no mask in {', '.join(map(str, sources))}: expected <case>{SUFFIXES[0]} or <case>.png")
    return found


def _stem(path: Path) -> str | None:
    stem = stem_of(path)
    return image_stem(path) if stem is None else stem


def _case_named(stem: str) -> str:
    return case_name(MASK_NAME.sub("", stem) or stem)


def _foreground(
    array: np.ndarray, labels: Sequence[int], what: str, empty: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Where a mask (any shape) has the asked values, and notes; DataError for what is no mask or, unless it may be, an
    empty one."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"some of its {what}s are NaN or infinite; save whole numbers")
    values = np.unique(array)
    if odd := [value for value in values if abs(value - round(float(value))) > _WHOLE]:
        raise DataError(f"holds values such as {odd[0]:.4g}, so it is no mask; save whole numbers, 0 for background")
    present = sorted({round(float(value)) for value in values})
    above = [value for value in present if value > 0]
    missing = [value for value in labels if value not in present]
    lack = f"no {what} has the value {', '.join(map(str, missing))}; it holds {_few(present)}"
    if missing and not empty:
        raise DataError(lack)
    if not labels and not above and not empty:
        raise DataError(f"the mask is empty: no {what} is above 0")
    notes = [f"values {_few(above)} are taken together; --label chooses"] if not labels and len(above) > 1 else []
    notes += [lack] if labels and above and len(missing) == len(labels) else []
    return np.isin(np.rint(array), [*labels] or above), notes


def _few(values: Sequence[int]) -> str:
    return ", ".join(map(str, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")


def _of_image(
    path: Path, labels: Sequence[int], per: str, margin: tuple[float, str], empty: bool
) -> tuple[list[Any], list[str]]:
    picture = read_image(path)
    array = picture.array[:, :, 0]
    if array.ndim == 3:
        if not is_grey(array):
            raise DataError("is in colour; save the mask in grey, 0 for background")
        array = array[..., 0]
    mask, notes = _foreground(array, labels, "pixel", empty)
    if margin[1] == "mm" and margin[0] and picture.own_spacing_mm is None:
        raise DataError(
            f"states no pixel size, so that {margin[0]:g} mm are not known in pixels; give the margin in px"
        )
    rows, columns = mask.shape
    y, x = (margin[0] / side if margin[1] == "mm" else margin[0] for side in picture.own_spacing_mm or (1.0, 1.0))
    return [
        [max(0.0, x0 - x), max(0.0, y0 - y), min(float(columns), x1 + x), min(float(rows), y1 + y)]
        for x0, y0, x1, y1 in rectangles(mask, per_component=per == PER_COMPONENT)
    ], [*picture.notes, *notes]


def _of_volume(
    path: Path, labels: Sequence[int], per: str, margin: tuple[float, str], image: Path | None
) -> tuple[list[Any], list[str]]:
    volume = read_volume(path)
    if volume.array.ndim != 3:
        raise DataError(f"has {volume.array.shape[3]} channels, expected one mask; save the one that is meant")
    mask, notes = _foreground(volume.array, labels, "voxel")
    affine = volume.affine
    if image is not None:
        shape, affine = read_any_grid(image)
        mask, note = _moved(replace(volume, array=mask), (shape, affine), image.name)
        notes += [note] if note else []
    sides = np.linalg.norm(affine[:3, :2], axis=0)
    i, j = (int(np.ceil(margin[0] / side - _EDGE if margin[1] == "mm" else margin[0])) for side in sides)
    found = []
    for k in np.flatnonzero(mask.any(axis=(0, 1))).tolist():
        # rectangles count along rows and columns of a picture, axes 0 and 1 of a slice
        for j0, i0, j1, i1 in rectangles(mask[..., k], per_component=per == PER_COMPONENT):
            box = [max(0, i0 - i), max(0, j0 - j), min(mask.shape[0], i1 + i) - 1, min(mask.shape[1], j1 + j) - 1]
            found.append({"slice": k, "box": box})
    return found, notes


def _moved(mask: Volume, grid: Grid, name: str) -> tuple[np.ndarray, str]:
    """A mask (X, Y, Z) on the ``grid`` of an image, and a note where it was stored in another way.

    Raises: DataError where that is no turn or shift by whole voxels, or leaves voxels outside.
    """
    shape, target = grid
    turned, note = stored_like(mask, Volume(np.broadcast_to(False, shape), target, ""))
    whole = np.eye(4)
    whole[:3, 3] = np.rint((np.linalg.inv(target) @ turned.affine)[:3, 3])
    if difference := affine_difference(target @ whole, turned.affine, turned.array.shape)[0]:
        raise DataError(f"lies on another grid than {name} ({difference}); resample it to that of the image")
    if not whole[:3, 3].any() and turned.array.shape == tuple(shape):
        return turned.array, note
    places = np.argwhere(turned.array) + whole[:3, 3].astype(int)
    if outside := int(((places < 0) | (places >= np.array(shape))).any(axis=1).sum()):
        raise DataError(f"{outside} of its {len(places)} foreground voxels lie outside of {name}")
    moved = np.zeros(shape, bool)
    moved[tuple(places.T)] = True
    return moved, "; ".join(filter(None, (note, f"it is cut to a part of {name}, and put into its place there")))


def _regions(path: Path, notes: list[str]) -> list[tuple[str, np.ndarray]]:
    """Name and corners (8, 3) in RAS mm of each ROI of a markups file; PromptError where one is no plain box."""
    content = read_json(path, PromptError, "markups", _EXPECTED)
    markups = content.get("markups")
    if not isinstance(markups, list) or not all(isinstance(markup, Mapping) for markup in markups):
        raise PromptError(f"has no list of markups; {_EXPECTED}")
    found = []
    for number, markup in enumerate(markups):
        name = f"markups[{number}]" + (f" ({markup['name']})" if isinstance(markup.get("name"), str) else "")
        if markup.get("type") == "ROI":
            found.append((name, _corners(markup, name)))
        else:
            notes.append(f"{path.name}: {name} is no ROI ({markup.get('type')!r}): passed over")
    if not found:
        raise PromptError(f"holds no ROI; {_EXPECTED}")
    return found


def _corners(markup: Mapping[str, Any], name: str) -> np.ndarray:
    system, units, kind = (markup.get(key, default) for key, default in (
        ("coordinateSystem", "LPS"), ("coordinateUnits", "mm"), ("roiType", "Box")))  # fmt: skip
    units = units[0] if isinstance(units, list) and units else units
    if system not in ("LPS", "RAS"):
        raise PromptError(f"{name}: its coordinateSystem is {system!r}, expected LPS or RAS")
    if units not in ("mm", "um"):
        raise PromptError(f"{name}: its coordinateUnits are {units!r}, expected mm or um")
    if kind not in ("Box", "BoundingBox") or markup.get("insideOut"):
        raise PromptError(f"{name}: is a ROI of type {kind!r}{', inside out' if markup.get('insideOut') else ''}, "
                          "expected a box")  # fmt: skip
    points = markup.get("controlPoints")
    first = points[0] if isinstance(points, list) and points and isinstance(points[0], Mapping) else {}
    centre = _vector(markup.get("center", first.get("position")), 3)
    size, axes = _vector(markup.get("size"), 3), _vector(markup.get("orientation", np.eye(3).ravel().tolist()), 9)
    if centre is None or size is None or not (size > 0).all():
        raise PromptError(f"{name}: needs a center of three numbers and a size of three numbers above 0, got "
                          f"{markup.get('center')!r} and {markup.get('size')!r}")  # fmt: skip
    turn = None if axes is None else axes.reshape(3, 3)
    if turn is None or np.abs(turn.T @ turn - np.eye(3)).max() > _EDGE:
        raise PromptError(f"{name}: its orientation is no rotation: {markup.get('orientation')!r}")
    offsets = np.array(list(product((-0.5, 0.5), repeat=3))) * size
    corners = centre + offsets @ turn.T
    return corners * (_LPS_TO_RAS if system == "LPS" else 1.0) * (1e-3 if units == "um" else 1.0)


def _vector(value: Any, count: int) -> np.ndarray | None:
    if not isinstance(value, list) or len(value) != count or not all(is_number(number) for number in value):
        return None
    try:
        numbers = np.array(value, dtype=float)
    except OverflowError:  # whole numbers of JSON have no end
        return None
    return numbers if (np.abs(numbers) < _FAR).all() else None


def _of_region(corners: np.ndarray, grid: Grid, name: str) -> tuple[dict[str, Any], list[str]]:
    """The box of one ROI, and notes; PromptError for one outside of the image."""
    shape, affine = grid
    inverse = np.linalg.inv(affine)
    places = corners @ inverse[:3, :3].T + inverse[:3, 3]  # in voxels, whose centres are whole numbers
    low, high, sizes = places.min(axis=0), places.max(axis=0), np.array(shape)
    if (high <= -0.5).any() or (low >= sizes - 0.5).any():
        spans = " ".join(f"{a:.1f} to {b:.1f}" for a, b in zip(low, high, strict=True))
        raise PromptError(f"{name} lies outside of the image of {tuple(shape)} voxels, at {spans}; is it of this exam?")
    notes = []
    edges = places[[4, 2, 1]] - places[0]  # the corners beside the first one, along each axis of the ROI
    if np.sort(np.abs(edges), axis=1)[:, :2].max() > _TURNED:
        across = np.abs((corners[[4, 2, 1]] - corners[0]) @ (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)))
        cosine = float((across.max(axis=1) / np.linalg.norm(corners[[4, 2, 1]] - corners[0], axis=1)).min())
        angle = np.degrees(np.arccos(min(1.0, cosine)))
        notes.append(f"{name} is turned against the image by {angle:.0f} degrees: the box around it is larger than it")
    first, last = np.ceil(low - _EDGE).astype(int), np.floor(high + _EDGE).astype(int)
    if thin := [axis for axis in range(3) if last[axis] < first[axis]]:
        first[thin] = last[thin] = np.rint((low + high) / 2).astype(int)[thin]
        notes.append(f"{name} is thinner than a voxel: the nearest one is taken")
    if (first < 0).any() or (last >= sizes).any():
        notes.append(f"{name} reaches beyond the image: it is cut off there")
    (i0, j0, k0), (i1, j1, k1) = (np.clip(ends, 0, sizes - 1).tolist() for ends in (first, last))
    return {"slices": [k0, k1], "box": [i0, j0, i1, j1]}, notes
