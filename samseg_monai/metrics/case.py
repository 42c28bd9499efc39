"""Dice, HD95 and NSD of one case and one class, in mm or pixels, with a named rule for empty masks.

Two definitions of HD95 are in use and their numbers are not interchangeable:

- ``hd95_mm``: the larger of the two directed 95th percentiles (MONAI's ``compute_hausdorff_distance``);
- ``hd95_medpy_mm``: the 95th percentile of both directions' distances pooled (medpy's ``hd95``).

NSD (Nikolov et al. 2018, arXiv:1809.04430) weighs surface elements by their area, as DeepMind's surface-distance does
(MONAI's ``use_subvoxels=True``). The ``transunet`` policy follows Chen et al. 2021 (arXiv:2102.04306): voxel units,
medpy's definitions, and its special cases for empty masks.

A volume of one slice, as a 2-D image is, is scored in two dimensions: in three, every pixel of it would be an edge.
Where nobody knows how large its pixels are, distances are in pixels (``px``), and the names of the scores say so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from monai.metrics.utils import get_mask_edges, get_surface_distance
from scipy.ndimage import find_objects

from samseg_monai.errors import ConfigError, DataError

POLICIES = ("honest", "transunet")
UNITS = ("mm", "px")
PERCENTILE = 95
CALIBRATION = ("ece", "brier")
BINS, MARGIN = 15, 10.0  # of the ECE; mm, or pixels, around reference and prediction
NSD_TOLERANCES = (1.0, 2.0)  # in the unit of the distances; the names of the scores hold both
# Headers hold spacing in float32 and norms of affine columns add noise (1.0000001). Unrounded, neighbours one voxel
# apart would fall just outside a 1 mm tolerance and NSD would collapse.
SPACING_DECIMALS = 5

Mask = torch.Tensor | np.ndarray


def score_columns(policy: str = "honest", *, surface: bool = True, unit: str = "mm") -> tuple[str, ...]:
    """Names of the scores that ``score_case`` gives under ``policy`` with distances in ``unit``; Dice comes first.

    Raises:
        ConfigError: unknown policy or unit.
    """
    if policy not in POLICIES:
        raise ConfigError(f"unknown metric policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if unit not in UNITS:
        raise ConfigError(f"unknown unit of distances {unit!r}; choose one of {', '.join(UNITS)}")
    if policy == "transunet":
        return ("dice_transunet", "hd95_transunet_voxel") if surface else ("dice_transunet",)
    nsd = (f"nsd_{tolerance:g}{unit}" for tolerance in NSD_TOLERANCES)
    return ("dice", f"hd95_{unit}", f"hd95_medpy_{unit}", *nsd) if surface else ("dice",)


def score_case(
    prediction: Mask,
    reference: Mask,
    *,
    spacing_mm: Sequence[float],
    policy: str = "honest",
    surface: bool = True,
    unit: str = "mm",
) -> dict[str, float | bool]:
    """Score one predicted mask against its reference, both (H, W, D) of booleans or of 0 and 1; D = 1 is scored in 2-D.

    Empty masks under ``honest``: both empty, the case is ``excluded`` and every score is NaN; one empty, Dice 0, NSD 0
    and both HD95 are the image's diagonal (norm of shape times spacing). Under ``transunet`` nothing is excluded:
    only the reference empty, Dice 1 and HD95 0; prediction empty, Dice 0 and HD95 0.

    Args:
        spacing_mm: distance of neighbouring voxels along H, W and D, in mm (rounded to 1e-5 mm).
        policy: ``honest`` or ``transunet``.
        surface: False leaves out HD95 and NSD (fast validation).
        unit: of distances, ``mm``, or ``px`` for images of one slice: pixels of side 1, whatever ``spacing_mm`` is.

    Returns:
        ``score_columns(policy, surface=surface, unit=unit)`` as floats (Dice and NSD in [0, 1]; HD95 in the unit, or in
        voxels when the name says so), ``excluded``, ``empty_prediction``, ``empty_reference`` as bool, volumes
        ``prediction_ml``, ``reference_ml``, for ``px`` areas ``prediction_px``, ``reference_px``.

    Raises:
        DataError: shapes differ or are not 3-D, a mask holds other values than 0 and 1, the spacing is not positive,
            or distances in pixels are asked of several slices.
        ConfigError: unknown policy or unit.
    """
    columns = score_columns(policy, surface=surface, unit=unit)
    pred, ref = checked_masks(prediction, reference)
    spacing = checked_spacing(spacing_mm)
    if unit == "px" and pred.shape[-1] != 1:
        raise DataError(f"distances in px are for images of one slice, got {tuple(pred.shape)}; use mm")
    sizes = {"prediction": _count(pred), "reference": _count(ref)}
    scale, name = (1.0, "px") if unit == "px" else (float(np.prod(spacing)) / 1000.0, "ml")
    if pred.shape[-1] == 1:
        pred, ref, spacing = pred[..., 0], ref[..., 0], np.ones(2) if unit == "px" else spacing[:2]
    scores = _scores(pred, ref, spacing, policy=policy, surface=surface)
    return {
        **dict(zip(columns, scores, strict=False)),  # without surface only Dice is wanted of the empty cases' scores
        "excluded": policy == "honest" and not any(sizes.values()),
        **{f"empty_{mask}": not size for mask, size in sizes.items()},
        **{f"{mask}_{name}": size * scale for mask, size in sizes.items()},
    }


def dice_of(pred: torch.Tensor, ref: torch.Tensor) -> float:
    """Dice of two boolean CPU masks of one shape; NaN where both are empty."""
    both = _count(pred) + _count(ref)
    return 2 * _count(pred & ref) / both if both else float("nan")


def _scores(pred: torch.Tensor, ref: torch.Tensor, spacing: np.ndarray, *, policy: str, surface: bool) -> list[float]:
    """Dice and, of masks of which one is empty or with ``surface``, what follows it in ``score_columns``."""
    n_pred, n_ref = _count(pred), _count(ref)
    if not n_pred or not n_ref:
        if policy == "transunet":
            return [float(n_pred > 0), 0.0]
        if not n_pred and not n_ref:
            return [float("nan")] * len(score_columns(policy))
        diagonal = float(np.linalg.norm(np.asarray(pred.shape) * spacing))
        return [0.0, diagonal, diagonal, *(0.0 for _ in NSD_TOLERANCES)]
    dice = dice_of(pred, ref)
    if not surface:
        return [dice]
    box = box_around((pred | ref).numpy(), 1)  # one voxel wider where possible: no edge is lost
    pred, ref = pred[box], ref[box]
    if policy == "transunet":
        return [dice, _percentile(torch.cat(_edge_distances(pred, ref, np.ones(pred.ndim))))]
    distances = _edge_distances(pred, ref, spacing)
    hd95 = [max(map(_percentile, distances)), _percentile(torch.cat(distances))]
    return [dice, *hd95, *_surface_dice(pred, ref, spacing)]


def score_calibration(
    probability: Mask, prediction: Mask, reference: Mask, *, counts: Mask, spacing: Sequence[float]
) -> dict[str, float]:
    """How well a probability of the foreground fits what is there, near reference and prediction.

    A whole volume is background by far, and easily right. So only voxels count within the box around both masks, 10 mm
    (or pixels) wider on each side.

    Args:
        probability: (H, W, D), 0 to 1.
        prediction, reference: (H, W, D), True where any class is.
        counts: (H, W, D), False for voxels that nobody has judged.
        spacing: distance of neighbouring voxels along each axis.

    Returns:
        ``ece``: expected calibration error in 15 bins of equal width (Guo et al. 2017, arXiv:1706.04599, equation 3,
        of the probability of the foreground): mean distance of probability and share of foreground, each bin by its
        number of voxels. ``brier``: mean squared distance of probability and truth (Brier 1950). 0 to 1, 0 the best;
        NaN where both masks are empty.
    """
    p, found, truth, judged = (
        np.asarray(torch.as_tensor(one).cpu()) for one in (probability, prediction, reference, counts)
    )
    margins = [math.ceil(MARGIN / side) for side in spacing]
    either = (found | truth) & judged
    if not either.any():
        return dict.fromkeys(CALIBRATION, math.nan)
    box = box_around(either, margins)
    kept = judged[box]
    p, y = p[box][kept].astype(np.float64), truth[box][kept]
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, p - y)
    return dict(zip(CALIBRATION, (float(np.abs(gaps).sum() / p.size), float(((p - y) ** 2).mean())), strict=True))


def checked_masks(prediction: Mask, reference: Mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Both masks as boolean CPU tensors of one shape (H, W, D); raises DataError as ``score_case`` says."""
    found = []
    for name, mask in (("prediction", prediction), ("reference", reference)):
        # plain and on CPU: every machine then measures with the same code, and metadata costs no time
        tensor = torch.as_tensor(np.asarray(mask.detach().cpu()) if isinstance(mask, torch.Tensor) else mask)
        if tensor.ndim != 3:
            raise DataError(f"{name} must be a volume (H, W, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype != torch.bool and not bool(((tensor == 0) | (tensor == 1)).all()):
            raise DataError(f"{name} holds other values than 0 and 1; threshold it or take one class of it")
        found.append(tensor if tensor.dtype == torch.bool else tensor == 1)
    pred, ref = found
    if pred.shape != ref.shape:
        raise DataError(
            f"prediction {tuple(pred.shape)} and reference {tuple(ref.shape)} differ in shape; "
            "bring the prediction back to the reference's grid first"
        )
    return pred, ref


def _count(mask: torch.Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()))  # on booleans much faster than torch's sum


def checked_spacing(spacing_mm: Sequence[float]) -> np.ndarray:
    """Three positive float64, rounded to 1e-5 mm; raises DataError as ``score_case`` says."""
    spacing = np.round(np.asarray(spacing_mm, dtype=np.float64), SPACING_DECIMALS)
    if spacing.shape != (3,) or not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise DataError(f"spacing_mm must be three positive numbers, got {list(spacing_mm)}; check the image's affine")
    return spacing


def box_around(mask: np.ndarray, margin: int | Sequence[int]) -> tuple[slice, ...]:
    """Box of all that is True, ``margin`` voxels wider (one for all axes, or for each) where the image allows; at
    the first voxel where nothing is."""
    margins = [margin] * mask.ndim if isinstance(margin, int) else margin
    (box,) = find_objects(mask.view(np.uint8)) or [(slice(0, 0),) * mask.ndim]
    return tuple(slice(max(side.start - more, 0), side.stop + more) for side, more in zip(box, margins, strict=True))


def _edge_distances(pred: torch.Tensor, ref: torch.Tensor, spacing: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of every edge voxel of one mask to the nearest of the other: prediction to reference, and back."""
    edges: tuple[torch.Tensor, ...] = get_mask_edges(pred, ref)
    return _to_each_other(edges[0], edges[1], spacing)


def _surface_dice(pred: torch.Tensor, ref: torch.Tensor, spacing: np.ndarray) -> list[float]:
    # with a spacing MONAI returns edge elements on the half-voxel grid and the area of each
    measured: tuple[torch.Tensor, ...] = get_mask_edges(pred, ref, spacing=spacing.tolist())
    edges, maps = measured[:2], measured[2:]
    distances = torch.cat(_to_each_other(edges[0], edges[1], spacing))
    areas = torch.cat([area[edge].double() for area, edge in zip(maps, edges, strict=True)])
    return [float(areas[distances <= tolerance].sum() / areas.sum()) for tolerance in NSD_TOLERANCES]


def _to_each_other(first: torch.Tensor, second: torch.Tensor, spacing: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.as_tensor(get_surface_distance(first, second, spacing=spacing)),
        torch.as_tensor(get_surface_distance(second, first, spacing=spacing)),
    )


def _percentile(distances: torch.Tensor) -> float:
    return float(np.percentile(distances.double().numpy(), PERCENTILE))
