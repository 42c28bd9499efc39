"""``CaseScores``: whole-volume scores of every case inside a MONAI trainer or evaluator, on any number of processes.

What is scored of a case is a region: a class, or a union of classes as the nested ones of BraTS.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import EpochWise, MetricUsage, reinit__is_reduced
from monai.data import MetaTensor

from samseg_monai.choices import IGNORE
from samseg_monai.errors import ConfigError, DataError, raise_all
from samseg_monai.metrics.case import CALIBRATION, dice_of, score_calibration, score_case, score_columns
from samseg_monai.metrics.lesions import LESION_SCORES, lesion_rules, score_lesions
from samseg_monai.metrics.rows import Row, aggregate, mean_of

logger = logging.getLogger(__name__)

# The parts are called as in ``data.datalists.label_maps``, so that both codings of BraTS (enhancing 3 or 4) fit.
_CORE, _OEDEMA, _ENHANCING = "non-enhancing core", "oedema", "enhancing tumour"
BRATS_REGIONS: dict[str, tuple[tuple[str, ...], ...]] = {
    "WT": ((_CORE, _OEDEMA, _ENHANCING), ("tumour",)),
    "TC": ((_CORE, _ENHANCING),),
    "ET": ((_ENHANCING,),),
}


class CaseScores(Metric):
    """Ignite metric for MONAI's ``key_val_metric``, ``key_train_metric`` and ``additional_metrics``.

    After each epoch ``engine.state.metrics[name]`` is the mean of ``value`` over classes, then over cases that count;
    ``engine.state.metrics`` also gets everything of ``aggregate`` under ``prefix``, and
    ``engine.state.metric_details[name]`` the per-case rows, sorted by case. Works on decollated items and on CPU.
    Prediction and reference are channel-first: (C, H, W, D) with one channel of 0 and 1 for each class, or, for several
    classes, (1, H, W, D) with whole numbers: 0 background, 1 the first class ... The reference is a MetaTensor whose
    affine gives the spacing; voxels where it is 255 (nobody has judged them) are in no score: both masks are empty
    there, and ``ignored_ml`` of a row says how many there were. Processes gather their rows; the copies that a
    distributed sampler adds to even out its shares are dropped by case name.

    Args:
        pred_key, reference_key, case_key: where an item, the engine's output completed by its batch, holds them.
        probability_key: where an item holds the foreground's probability (1, H, W, D): every row has the case's
            ``score_calibration``, too.
        classes: one name per channel.
        policy, surface, unit: as of ``score_case``.
        value: score that ``compute`` returns, one of ``columns``; ``dice`` is the policy's own Dice.
        prefix: put before the published names; must differ between the CaseScores of one engine.
        lesions: add lesion-wise scores and counts to every row: True, or some of the numbers of ``LesionRules``.
        regions: what has a row of its own: None for every class, ``"brats"`` for those of WT (whole tumour), TC (tumour
            core) and ET (enhancing tumour) whose parts are all among the classes, or region -> list of classes.
        output_transform: applied to the list of items.

    Raises:
        ConfigError: no or repeated classes, a value that is not computed, a prefix used twice, bad rules or regions,
            lesion-wise scores in pixels.
        DataError: an item lacks a key, has the wrong shape or values, no affine, or a case name twice.
    """

    def __init__(
        self,
        *,
        pred_key: str = "pred",
        reference_key: str = "reference",
        case_key: str = "case",
        probability_key: str | None = None,
        classes: Sequence[str] = ("tumour",),
        policy: str = "honest",
        value: str = "dice",
        prefix: str = "",
        surface: bool = True,
        lesions: bool | Mapping[str, Any] | None = None,
        regions: str | Mapping[str, Sequence[str]] | None = None,
        unit: str = "mm",
        output_transform: Callable = lambda items: items,
    ) -> None:
        self.lesions = lesion_rules(lesions)
        self.columns = score_columns(policy, surface=surface, unit=unit)
        if self.lesions is not None:
            if unit != "mm":
                raise ConfigError(f"lesion-wise scores need sizes in mm, not in {unit}; set lesion_wise to false")
            self.columns += LESION_SCORES if surface else LESION_SCORES[:1]
        self.columns += CALIBRATION if probability_key else ()
        self.value = self.columns[0] if value == "dice" else value
        if self.value not in self.columns:
            raise ConfigError(f"value {value!r} is not computed here; choose one of {', '.join(self.columns)}")
        self.classes = (classes,) if isinstance(classes, str) else tuple(classes)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"classes must be one distinct name per channel, got {list(self.classes)}")
        self.regions = regions_of(self.classes, regions)
        self.pred_key, self.reference_key, self.case_key = pred_key, reference_key, case_key
        self.probability_key = probability_key
        self.policy, self.prefix, self.surface, self.unit = policy, prefix, surface, unit
        self.rows: list[dict[str, Any]] = []
        super().__init__(output_transform=output_transform)

    def attach(self, engine: Engine, name: str, usage: str | MetricUsage = EpochWise()) -> None:
        """Attach under ``name``; refuses a prefix that another CaseScores of this engine publishes under."""
        owners = engine.__dict__.setdefault("_case_scores_prefixes", {})
        owner = owners.setdefault(self.prefix, name)
        if owner != name:
            raise ConfigError(f"{owner!r} already publishes under prefix {self.prefix!r}; give {name!r} another prefix")
        super().attach(engine, name, usage)

    @reinit__is_reduced
    def reset(self) -> None:
        self._own: dict[str, list[dict[str, Any]]] = {}

    @torch.no_grad()
    def iteration_completed(self, engine: Engine) -> None:
        """Score this iteration's items: the output, completed by what MONAI leaves in the batch."""
        batch, output = engine.state.batch, engine.state.output
        if not isinstance(output, Sequence) or not all(isinstance(item, Mapping) for item in output):
            raise DataError(f"CaseScores needs a list of items (decollate=True), got {type(output).__name__} as output")
        if isinstance(batch, Sequence) and len(batch) == len(output):
            output = [{**b, **o} if isinstance(b, Mapping) else o for b, o in zip(batch, output, strict=True)]
        self.update(self._output_transform(output))

    @reinit__is_reduced
    def update(self, output: Sequence[Mapping[str, Any]]) -> None:
        """Score items (see the class); each case once per epoch and process."""
        for item in output:
            rows = self._score(item)
            case = rows[0]["case"]
            # A sampler's copies go to other processes, so two results here are two cases of one name. str: NaN is NaN.
            if str(self._own.setdefault(case, rows)) != str(rows):
                raise DataError(f"two different results for case {case!r}; case names must be unique in a datalist")

    def compute(self) -> float:
        """Gather all processes' rows; mean of ``value`` over classes, then cases (NaN when no case counts)."""
        self.rows = merge_rows(of_all_ranks([row for rows in self._own.values() for row in rows]))
        return aggregate(self.rows, columns=[self.value])[f"{self.value}_mean"]

    def completed(self, engine: Engine, name: str) -> None:
        """Publish the key value, all aggregates and the rows on ``engine.state``."""
        super().completed(engine, name)
        summary = aggregate(self.rows, columns=self.columns, prefix=self.prefix)
        if not summary[f"{self.prefix}n"]:
            logger.warning("%s: no case could be scored (%d excluded)", name, summary[f"{self.prefix}n_excluded"])
        engine.state.metrics.update(summary)
        details = engine.state.__dict__.setdefault("metric_details", {})  # MONAI's engines have it, plain ones do not
        details[name] = [dict(row) for row in self.rows]

    def _score(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        keys = (self.case_key, self.pred_key, self.reference_key)
        more_keys = [self.probability_key] if self.probability_key else []
        absent = [f"no {key!r}; there are {sorted(map(str, item))}" for key in (*keys, *more_keys) if key not in item]
        raise_all(absent, DataError, "an item cannot be scored")
        case, pred, reference = (item[key] for key in keys)
        if isinstance(pred, torch.Tensor) and isinstance(reference, torch.Tensor):
            pred = pred.to(reference.device)  # once: a GPU would wait for every question below
        if not isinstance(case, str) or "/" in case or "\\" in case:
            raise DataError(f"{self.case_key!r} must be a name, not {case!r}: it goes into tables that travel")
        wrong = self._shape_problems(self.pred_key, pred) + self._shape_problems(self.reference_key, reference)
        if not isinstance(reference, MetaTensor):
            wrong.append(f"{self.reference_key} has no affine ({type(reference).__name__}); load it with LoadImaged")
        raise_all(wrong, DataError, f"case {case} cannot be scored")
        how: dict[str, Any] = {"spacing_mm": reference.pixdim.tolist(), "surface": self.surface}
        rows = []
        ignored = ignored_in(reference)
        voxel_ml = float(np.prod(how["spacing_mm"])) / 1000
        left_out = {} if ignored is None else {"ignored_ml": float(ignored.sum()) * voxel_ml}
        left_out |= self._calibration(item, pred, reference, ignored)
        for name, parts in self.regions.items():
            masks = [_judged(mask_of(v, parts, len(self.classes)), ignored) for v in (pred, reference)]
            try:
                scores = score_case(*masks, policy=self.policy, unit=self.unit, **how)
                more = {} if self.lesions is None else score_lesions(*masks, rules=self.lesions, **how)
            except DataError as error:
                raise DataError(f"case {case}, class {name}: {error}") from error
            rows.append({"case": case, "class": name, **scores, **more, **left_out})
        return rows

    def _calibration(
        self, item: Mapping[str, Any], pred: torch.Tensor, reference: MetaTensor, ignored: torch.Tensor | None
    ) -> dict[str, float]:
        """Of all classes together, the same in each one's row."""
        if self.probability_key is None:
            return {}
        everything = range(len(self.classes))
        masks = [mask_of(volume, everything, len(self.classes)) > 0 for volume in (pred, reference)]
        counts = torch.ones_like(masks[1]) if ignored is None else ~ignored
        spacing = [1.0] * 3 if self.unit == "px" else reference.pixdim.tolist()
        probability = torch.as_tensor(item[self.probability_key]).as_subclass(torch.Tensor)[0]
        return score_calibration(probability, *masks, counts=counts, spacing=spacing)

    def _shape_problems(self, key: str, volume: torch.Tensor) -> list[str]:
        """What is wrong with a volume; a channel of logits, too, would be scored as labels, as almost empty."""
        count = len(self.classes)
        if volume.ndim != 4 or len(volume) not in (1, count):
            return [
                f"{key} has shape {tuple(volume.shape)}, needs ({count}, H, W, D) for {list(self.classes)}, "
                "or one channel of whole numbers"
            ]
        fits = (volume >= 0) & (volume <= count) & (volume == volume.long())
        if len(volume) == count or bool((fits | (volume == IGNORE) if key == self.reference_key else fits).all()):
            return []
        return [f"{key} holds other values than the whole numbers 0 to {count} of {list(self.classes)}"]


def mask_of(volume: torch.Tensor, parts: Sequence[int], classes: int) -> torch.Tensor:
    """Mask (H, W, D) of some classes together, out of one channel per class or of a map of labels (1, H, W, D)."""
    # a plain tensor: indexing a MetaTensor carries its metadata along, which is slow and not needed here
    volume = volume.as_tensor() if isinstance(volume, MetaTensor) else volume
    if len(volume) == classes:
        return volume[parts[0]] if len(parts) == 1 else volume[list(parts)].amax(0)
    return torch.stack([volume[0] == part + 1 for part in parts]).any(0)


def ignored_in(reference: torch.Tensor) -> torch.Tensor | None:
    """Voxels (H, W, D) of a reference (C, H, W, D) that nobody has judged; None if all are."""
    ignored = (reference.as_subclass(torch.Tensor) == IGNORE).any(0)
    return ignored if bool(ignored.any()) else None


def _judged(mask: torch.Tensor, ignored: torch.Tensor | None) -> torch.Tensor:
    return mask if ignored is None else torch.where(ignored.to(mask.device), 0, mask)


def mean_dice(pred: torch.Tensor, reference: torch.Tensor, classes: int) -> float:
    """Mean Dice over the classes that are in either volume; both as ``CaseScores`` takes them, on CPU.

    Returns: 0 to 1; NaN when both are empty.
    """
    ignored = ignored_in(reference)
    pairs = ((_judged(mask_of(v, [part], classes), ignored) > 0 for v in (pred, reference)) for part in range(classes))
    found = [dice_of(*pair) for pair in pairs]
    return mean_of([dice for dice in found if not math.isnan(dice)])


def regions_of(classes: Sequence[str], regions: str | Mapping[str, Sequence[str]] | None) -> dict[str, tuple[int, ...]]:
    """Name of each region -> positions of its classes; ``regions`` as ``CaseScores`` takes it.

    Raises:
        ConfigError: a region names an absent class or none, or no region of BraTS can be made of the classes.
    """
    position = {name: index for index, name in enumerate(classes)}
    if regions is None:
        return {name: (index,) for name, index in position.items()}
    if regions == "brats":
        possible = ((region, parts) for region, ways in BRATS_REGIONS.items() for parts in ways)
        regions = {region: parts for region, parts in possible if set(parts) <= set(classes)}
        if not regions:
            raise ConfigError(
                f"no region of BraTS can be made of {', '.join(classes)}; name classes tumour, or some of "
                f"{', '.join((_CORE, _OEDEMA, _ENHANCING))}"
            )
    if not isinstance(regions, Mapping) or not regions:
        raise ConfigError(f"regions must be null, 'brats' or an object of region -> list of classes, got {regions!r}")
    problems = [
        f"{region}: {parts!r}"
        for region, parts in regions.items()
        if isinstance(parts, str) or not parts or not set(parts) <= set(classes)
    ]
    raise_all(problems, ConfigError, f"regions must be lists of the classes {', '.join(classes)}")
    return {region: tuple(position[name] for name in parts) for region, parts in regions.items()}


def of_all_ranks(own: list[Any]) -> list[list[Any]]:
    """One list from each process."""
    gathered: Any = idist.all_gather(own) if idist.get_world_size() > 1 else [own]
    return gathered


def merge_rows(gathered: Sequence[Sequence[Row]]) -> list[dict[str, Any]]:
    """One list of rows, sorted by case, out of the lists of all processes.

    A case that several processes hold (padded samplers) is taken from the first of them, so that the result depends on
    neither the number of processes nor their order of work.
    """
    merged: dict[str, list[dict[str, Any]]] = {}
    for rows in gathered:
        of_process: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            of_process.setdefault(row["case"], []).append(dict(row))
        merged = of_process | merged
    return [row for case in sorted(merged) for row in merged[case]]
