"""Lesion-wise Dice and HD95 of one case and one region, as the official script of BraTS 2023 defines them.

The algorithm is that of ``metrics.py`` in github.com/rachitsaluja/BraTS-2023-Metrics (commit 43c9052):

1. Reference voxels whose dilations are connected (26 neighbours) are one lesion; the lesion keeps its own voxels. One
   step of dilation reaches the 18 neighbours that share a face or an edge.
2. Components of the prediction (26 neighbours) that touch a dilated lesion are its match, as a whole; a component may
   match several lesions.
3. A lesion with a match is found (TP): Dice and HD95 are those of the lesion against all of its match. One without is
   missed (FN): Dice 0, HD95 the penalty. A component that matches no lesion is false (FP), whatever its size: likewise.
4. Lesions of ``ignored_mm3`` or less do not count, neither found nor missed; what matches them is no FP.
5. Both scores are means over TP + FN + FP; where there is none of these, Dice is 1 and HD95 0.

This HD95 is the third definition in this package: the larger of the two directed 95th percentiles of the distances of
surface elements, weighted by their area (DeepMind's surface-distance, ``compute_robust_hausdorff``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.metrics.utils import get_code_to_measure_table
from scipy.ndimage import binary_dilation, distance_transform_edt, find_objects, generate_binary_structure, label
from scipy.spatial import KDTree

from samseg_monai.errors import ConfigError, raise_all
from samseg_monai.metrics.case import PERCENTILE, Mask, box_around, checked_masks, checked_spacing

LESION_SCORES = ("lesion_dice", "lesion_hd95_mm")
LESION_COUNTS = ("lesion_tp", "lesion_fn", "lesion_fp")
_FACES_AND_EDGES = generate_binary_structure(3, 2)
_ALL_NEIGHBOURS = generate_binary_structure(3, 3)

Box = tuple[slice, ...]
Surface = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class LesionRules:
    """What the challenges of BraTS 2023 set differently; the defaults are those of meningioma (BraTS-MEN).

    Glioma (GLI), sub-Saharan Africa (SSA) and paediatric tumours (PED) have ``dilation=3``, metastases (MET)
    ``ignored_mm3=2``; everything else is the same for all.

    Args:
        dilation: steps of dilation, in voxels; at least 1.
        ignored_mm3: reference lesions of this volume or less do not count (the challenge's voxels are 1 mm^3).
        penalty_mm: HD95 of a missed and of a false lesion, about the diagonal of BraTS's 240 x 240 x 155 mm.

    Raises:
        ConfigError: a value out of its range; all are listed.
    """

    dilation: int = 1
    ignored_mm3: float = 50.0
    penalty_mm: float = 374.0

    def __post_init__(self) -> None:
        problems = []
        if not isinstance(self.dilation, int) or isinstance(self.dilation, bool) or self.dilation < 1:
            problems.append(f"dilation must be a whole number of voxels from 1, got {self.dilation!r}")
        for name, value in (("ignored_mm3", self.ignored_mm3), ("penalty_mm", self.penalty_mm)):
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
                problems.append(f"{name} must be a number from 0, got {value!r}")
        raise_all(problems, ConfigError, "rules of lesion-wise scores")


def lesion_rules(lesions: bool | Mapping[str, Any] | None) -> LesionRules | None:
    """Rules out of a config's value: True for the defaults, a mapping with some of them, False or None for no scores.

    Raises:
        ConfigError: a name that ``LesionRules`` does not have, or a value out of its range.
    """
    if lesions is None or isinstance(lesions, bool):
        return LesionRules() if lesions else None
    known = LesionRules.__dataclass_fields__
    if not isinstance(lesions, Mapping) or not lesions.keys() <= known.keys():
        raise ConfigError(f"lesions must be true, false or an object with some of {', '.join(known)}; got {lesions!r}")
    return LesionRules(**lesions)


def score_lesions(
    prediction: Mask,
    reference: Mask,
    *,
    spacing_mm: Sequence[float],
    rules: LesionRules = LesionRules(),
    surface: bool = True,
) -> dict[str, float]:
    """Score one region of one case lesion by lesion; ``prediction``, ``reference`` and ``spacing_mm`` as ``score_case``
    takes them, ``surface=False`` leaves out HD95.

    Returns:
        ``LESION_SCORES`` (Dice in [0, 1], HD95 in mm), and the counts ``LESION_COUNTS`` as floats.

    Raises:
        DataError: as of ``score_case``.
    """
    pred, ref = (mask.numpy() for mask in checked_masks(prediction, reference))
    spacing = checked_spacing(spacing_mm)
    box = box_around(pred | ref, rules.dilation)
    pred, ref = pred[box], ref[box]
    parts, n_parts = label(pred, structure=_ALL_NEIGHBOURS)
    inner = box_around(ref, rules.dilation)  # all that follows but the surfaces happens near the lesions
    ref, near = ref[inner], parts[inner]
    grown = binary_dilation(ref, structure=_FACES_AND_EDGES, iterations=rules.dilation)
    extents, n_lesions = label(grown, structure=_ALL_NEIGHBOURS)
    lesions = np.where(ref, extents, 0)
    # an extent is the dilation of its lesion alone: that of a union is the union of dilations, and each is connected
    both = (extents > 0) & (near > 0)
    touches = np.unique(extents[both].astype(np.int64) * (n_parts + 1) + near[both])
    touching, touched = np.divmod(touches, n_parts + 1)
    voxels, overlaps = (np.bincount(lesions[where], minlength=n_lesions + 1) for where in (ref, ref & both))
    part_voxels = np.bincount(parts.ravel(), minlength=n_parts + 1)
    counting = np.flatnonzero(voxels * np.prod(spacing) > rules.ignored_mm3)
    matches = {int(lesion): touched[touching == lesion] for lesion in counting}
    dice = [2 * overlaps[lesion] / (voxels[lesion] + part_voxels[its].sum()) for lesion, its in matches.items()]
    missed = sum(not len(match) for match in matches.values())
    false = n_parts - len(np.unique(touched))
    count = len(matches) + false
    scores = [math.fsum(dice) / count if count else 1.0]
    if surface:
        hd95 = [*_distances(matches, parts, lesions, inner, spacing), rules.penalty_mm * (missed + false)]
        scores.append(math.fsum(hd95) / count if count else 0.0)
    counts = (len(matches) - missed, missed, false)
    named = zip((*LESION_SCORES[: len(scores)], *LESION_COUNTS), (*scores, *counts), strict=True)
    return {name: float(value) for name, value in named}


def _distances(
    matches: Mapping[int, np.ndarray], parts: np.ndarray, lesions: np.ndarray, inner: Box, spacing: np.ndarray
) -> list[float]:
    """HD95 of every lesion that has a match (its number -> numbers of its parts), in no order.

    ``lesions`` is the ``inner`` box of the grid of ``parts``.
    """
    lesion_boxes, part_boxes = find_objects(lesions), find_objects(parts)
    of_match: dict[bytes, list[int]] = {}  # a match that reaches over many lesions is measured once
    for lesion, match in matches.items():
        if len(match):
            of_match.setdefault(match.tobytes(), []).append(lesion)
    hd95 = []
    for theirs in of_match.values():
        match = matches[theirs[0]]
        sides = zip(*(part_boxes[part - 1] for part in match), strict=True)
        box = tuple(slice(min(s.start for s in side), max(s.stop for s in side)) for side in sides)
        belongs = np.zeros(len(part_boxes) + 1, dtype=bool)
        belongs[match] = True
        places, areas = _surface(belongs[parts[box]], box, spacing)
        surfaces = []
        for lesion in theirs:
            box = lesion_boxes[lesion - 1]
            there = tuple(slice(i.start + s.start, i.start + s.stop) for i, s in zip(inner, box, strict=True))
            surfaces.append(_surface(lesions[box] == lesion, there, spacing))
        to_match = _to_nearest(np.concatenate([its for its, _ in surfaces]), places, spacing)
        ends = np.cumsum([len(its) for its, _ in surfaces])
        for (its, its_areas), distances in zip(surfaces, np.split(to_match, ends[:-1]), strict=True):
            directed = ((distances, its_areas), (_to_nearest(places, its, spacing), areas))
            hd95.append(max(_percentile(*one) for one in directed))
    return hd95


def _surface(mask: np.ndarray, box: Box, spacing: np.ndarray) -> Surface:
    """Places (n, 3) on the grid of corners of voxels and areas (n,) in mm^2 of the surface elements of ``mask``.

    The mask lies in ``box``. Elements are on the half-voxel grid (Nikolov et al. 2018, arXiv:1809.04430): the area of
    one follows from which of the eight voxels around it are inside. Codes and areas are MONAI's ``get_mask_edges``,
    whose convolution takes a hundred times as long.
    """
    table, kernel = get_code_to_measure_table(spacing.tolist())
    padded = np.pad(mask, 1).view(np.uint8)
    shape = [length + 1 for length in mask.shape]
    weights: np.ndarray = kernel[0, 0].numpy().astype(np.uint8)
    code = np.zeros(shape, dtype=np.uint8)
    for corner in np.ndindex(2, 2, 2):
        around = tuple(slice(start, start + length) for start, length in zip(corner, shape, strict=True))
        code += padded[around] * weights[corner]
    places = np.argwhere((code > 0) & (code < 255))
    areas: np.ndarray = table.double().numpy()[code[tuple(places.T)]]
    return places + [side.start for side in box], areas


def _to_nearest(places: np.ndarray, targets: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Distance in mm from each place to the nearest target; both (n, 3) on one grid."""
    if len(targets) <= len(places):
        tree = KDTree(targets * spacing, leafsize=32)
        return np.asarray(tree.query(places * spacing)[0])
    # from inside a large surface nearly all of it is equally far, and a tree saves nothing: a map of distances does
    low = np.minimum(places.min(axis=0), targets.min(axis=0))
    size = np.maximum(places.max(axis=0), targets.max(axis=0)) - low + 1
    elsewhere = np.ones(size, dtype=bool)
    elsewhere[tuple((targets - low).T)] = False
    return np.asarray(distance_transform_edt(elsewhere, sampling=spacing)[tuple((places - low).T)])


def _percentile(distances: np.ndarray, areas: np.ndarray) -> float:
    order = np.lexsort((areas, distances))
    share = np.cumsum(areas[order]) / areas.sum()
    index = min(int(np.searchsorted(share, PERCENTILE / 100)), len(order) - 1)  # shares may end just below 1
    return float(distances[order[index]])
