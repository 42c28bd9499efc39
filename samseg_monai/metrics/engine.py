"""``CaseScores``: whole-volume scores of every case inside a MONAI trainer or evaluator, on any number of processes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine
from ignite.metrics import Metric
from ignite.metrics.metric import EpochWise, MetricUsage, reinit__is_reduced
from monai.data import MetaTensor

from samseg_monai.errors import ConfigError, DataError, raise_all
from samseg_monai.metrics.case import score_case, score_columns
from samseg_monai.metrics.lesions import lesion_columns, lesion_rules, score_lesions
from samseg_monai.metrics.regions import regions_of
from samseg_monai.metrics.rows import Row, aggregate

logger = logging.getLogger(__name__)


def _unchanged(items: Any) -> Any:
    return items


class CaseScores(Metric):
    """Ignite metric for MONAI's ``key_val_metric``, ``key_train_metric`` and ``additional_metrics``.

    After each epoch ``engine.state.metrics[name]`` is the mean of ``value`` over classes, then over cases that count;
    ``engine.state.metrics`` also gets everything of ``aggregate`` under ``prefix``, and
    ``engine.state.metric_details[name]`` the per-case rows, sorted by case. Works on decollated items and on CPU.
    Prediction and reference are channel-first: (C, H, W, D) with one channel of 0 and 1 for each class, or, for several
    classes, (1, H, W, D) with whole numbers: 0 background, 1 the first class ... The reference is a MetaTensor whose
    affine gives the spacing. Processes gather their rows; the copies that a distributed sampler adds to even out its
    shares are dropped by case name.

    Args:
        pred_key, reference_key, case_key: where an item holds the prediction, the reference and the case's name; an
            item is the engine's output with what it lacks taken from the engine's batch.
        classes: one name per channel.
        policy: ``honest`` or ``transunet``, see ``score_case``.
        value: score that ``compute`` returns, one of ``score_columns``; ``dice`` is the policy's own Dice.
        prefix: put before the published names; must differ between the CaseScores of one engine.
        surface: False computes Dice only (fast validation).
        lesions: add lesion-wise scores and counts to every row: True, or some of the numbers of ``LesionRules``.
        unit: of distances, ``mm``, or ``px`` for images of one slice whose pixels have no known size.
        regions: what has a row of its own: None for every class, ``"brats"`` for those of WT, TC and ET that the
            classes allow, or region -> list of classes.
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
        classes: Sequence[str] = ("tumour",),
        policy: str = "honest",
        value: str = "dice",
        prefix: str = "",
        surface: bool = True,
        lesions: bool | Mapping[str, Any] | None = None,
        regions: str | Mapping[str, Sequence[str]] | None = None,
        unit: str = "mm",
        output_transform: Callable = _unchanged,
    ) -> None:
        self.lesions = lesion_rules(lesions)
        self.columns = score_columns(policy, surface=surface, unit=unit)
        if self.lesions is not None and unit != "mm":
            raise ConfigError(f"lesion-wise scores need sizes in mm, not in {unit}; set lesion_wise to false")
        if self.lesions is not None:
            self.columns += lesion_columns(surface=surface)
        self.value = self.columns[0] if value == "dice" else value
        if self.value not in self.columns:
            raise ConfigError(f"value {value!r} is not computed here; choose one of {', '.join(self.columns)}")
        self.classes = (classes,) if isinstance(classes, str) else tuple(classes)
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise ConfigError(f"classes must be one distinct name per channel, got {list(self.classes)}")
        self.regions = regions_of(self.classes, regions)
        self.pred_key, self.reference_key, self.case_key = pred_key, reference_key, case_key
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
        """Forget all cases."""
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
        own = [row for rows in self._own.values() for row in rows]
        gathered: Any = idist.all_gather(own) if idist.get_world_size() > 1 else [own]
        self.rows = merge_rows(gathered)
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
        absent = [f"no {key!r}; there are {sorted(map(str, item))}" for key in keys if key not in item]
        raise_all(absent, DataError, "an item cannot be scored")
        case, pred, reference = (item[key] for key in keys)
        if not isinstance(case, str) or "/" in case or "\\" in case:
            raise DataError(f"{self.case_key!r} must be a name, not {case!r}: it goes into tables that travel")
        wrong = [
            f"{key} has shape {tuple(volume.shape)}, needs ({len(self.classes)}, H, W, D) for {list(self.classes)}, "
            "or one channel of whole numbers"
            for key, volume in ((self.pred_key, pred), (self.reference_key, reference))
            if volume.ndim != 4 or len(volume) not in (1, len(self.classes))
        ]
        if not isinstance(reference, MetaTensor):
            wrong.append(f"{self.reference_key} has no affine ({type(reference).__name__}); load it with LoadImaged")
        raise_all(wrong, DataError, f"case {case} cannot be scored")
        # plain tensors: indexing a MetaTensor carries its metadata along, which is slow and not needed here
        spacing_mm = reference.pixdim.tolist()
        pred, reference = (v.as_tensor() if isinstance(v, MetaTensor) else v for v in (pred, reference))
        wrong = [
            f"{key} holds other values than the whole numbers 0 to {len(self.classes)} of {list(self.classes)}"
            for key, volume in ((self.pred_key, pred), (self.reference_key, reference))
            if len(volume) < len(self.classes) and not self._is_map(volume)
        ]
        raise_all(wrong, DataError, f"case {case} cannot be scored")
        rows = []
        for name, parts in self.regions.items():
            try:
                scores = self._scores(self._mask(pred, parts), self._mask(reference, parts), spacing_mm)
            except DataError as error:
                raise DataError(f"case {case}, class {name}: {error}") from error
            rows.append({"case": case, "class": name, **scores})
        return rows

    def _scores(self, pred: torch.Tensor, reference: torch.Tensor, spacing_mm: Sequence[float]) -> dict[str, Any]:
        how: dict[str, Any] = {"spacing_mm": spacing_mm, "surface": self.surface}
        scores: dict[str, Any] = score_case(pred, reference, policy=self.policy, unit=self.unit, **how)
        if self.lesions is not None:
            scores |= score_lesions(pred, reference, rules=self.lesions, **how)
        return scores

    def _is_map(self, labels: torch.Tensor) -> bool:
        """Tell whether there is nothing but labels: a channel of logits, too, would be scored, as almost empty."""
        legal = (labels >= 0) & (labels <= len(self.classes))
        if labels.is_floating_point():
            legal &= labels == labels.round()
        return bool(legal.all())

    def _mask(self, volume: torch.Tensor, parts: Sequence[int]) -> torch.Tensor:
        """Mask (H, W, D) of some classes together, out of one channel per class or of a map of labels."""
        if len(volume) == len(self.classes):
            return volume[parts[0]] if len(parts) == 1 else volume[list(parts)].amax(0)
        masks = [volume[0] == part + 1 for part in parts]
        return functools.reduce(torch.logical_or, masks)


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
        for case, its_rows in of_process.items():
            merged.setdefault(case, its_rows)
    return [row for case in sorted(merged) for row in merged[case]]
