"""Guards against trainings that fail silently: non-finite numbers, and predictions that are empty everywhere."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents

from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.handlers.stepping import optimised, steps_now, unscale_once

logger = logging.getLogger(__name__)

# torch.amp.GradScaler starts at 65536 and halves at each skipped step: 16 skips reach 1, where scaling explains nothing
MAX_SKIPPED_STEPS = 16


class NonFiniteGuard:
    """Stops the training at the first loss (or gradient) that is not finite and names the cases of that batch.

    It acts before the backward pass (the optimiser step for gradients), so the weights are those of the step before.
    Under amp a ``GradScaler`` skips steps with infinite gradients on purpose; then only 16 of them running raise.

    Args:
        gradients: also look at the gradients on every stepping batch (reads all of them once).

    Raises:
        TrainingError: during the run.
    """

    def __init__(self, *, gradients: bool = True) -> None:
        self.gradients = gradients
        self._skipped = 0

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI ``SupervisedTrainer``; before GradientClip, whose scaling would spread a NaN over all."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self.check_loss)
        if self.gradients:
            engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.check_gradients)

    def check_loss(self, engine: Any) -> None:
        """Raise if the loss of this batch is not finite."""
        loss = engine.state.output["loss"]
        if bool(torch.isfinite(loss).all()):
            return
        names = batch_names(engine.state.batch)
        guilty = _non_finite_items(engine.state.output.get("pred"), names)
        where = f"; the prediction itself is not finite for {', '.join(guilty)}" if guilty else ""
        raise TrainingError(
            f"{_place(engine)}: the loss is {float(loss.detach().float().mean())} for {', '.join(names)}{where}. "
            "Look for NaN or constant images there, else lower the learning rate or add GradientClip"
        )

    def check_gradients(self, engine: Any) -> None:
        """Raise if a gradient is not finite when the optimiser is about to step."""
        if not steps_now(engine):
            return
        unscale_once(engine)
        gradients = [parameter.grad for parameter in optimised(engine.optimizer) if parameter.grad is not None]
        if all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            self._skipped = 0
            return
        self._skipped += 1
        if getattr(engine, "scaler", None) is not None and self._skipped < MAX_SKIPPED_STEPS:
            logger.warning("%s: infinite gradients, step skipped (%d running)", _place(engine), self._skipped)
            return
        raise TrainingError(
            f"{_place(engine)}: gradients are not finite for {', '.join(batch_names(engine.state.batch))}, "
            "though the loss is. Lower the learning rate, add GradientClip, or train without amp"
        )


class CollapseDetector:
    """Warns, or stops the training, when a class is predicted empty in all cases for some validations running.

    A collapsed class costs no error and, averaged with others, little Dice: it has to be looked for. Cases whose
    reference holds nothing of the class do not count. Rows come from ``engine.state.metric_details``: lists of dicts
    with ``case``, ``class``, ``prediction_ml`` and, if known, ``reference_ml`` (rows without a volume are ignored).

    Args:
        patience: validations running after which it speaks, at least 1.
        stop: terminate the trainer as well (``set_trainer`` from ``run``, or ``trainer``).
        details: name within ``metric_details``; ``None`` reads every list of rows there.
        trainer: the engine to be stopped.
    """

    def __init__(
        self, patience: int = 3, *, stop: bool = False, details: str | None = None, trainer: Any | None = None
    ) -> None:
        if patience < 1:
            raise ConfigError(f"CollapseDetector: patience must be at least 1 validation, got {patience}")
        self.patience = patience
        self.stop = stop
        self.details = details
        self.trainer = trainer
        self.empty_runs: dict[str, int] = {}

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator, on every rank: all must stop together."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def set_trainer(self, trainer: Any) -> None:
        """The engine that ``stop`` terminates."""
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The counters, for ResumeSaver."""
        return {"empty_runs": dict(self.empty_runs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the counters up again."""
        self.empty_runs = {str(key): int(value) for key, value in state["empty_runs"].items()}

    def __call__(self, engine: Any) -> None:
        found = _found_per_class(case_rows(engine, self.details))
        if not found:
            logger.debug("CollapseDetector: no rows with prediction_ml in metric_details")
        for name, any_found in found.items():
            self.empty_runs[name] = 0 if any_found else self.empty_runs.get(name, 0) + 1
        collapsed = sorted(name for name, count in self.empty_runs.items() if count >= self.patience)
        if not collapsed:
            return
        engine.state.collapsed = collapsed
        message = (
            f"COLLAPSE: predicted empty in every case for {self.patience} or more validations running: "
            f"{', '.join(collapsed)}. The network has stopped finding them; "
            "lower the learning rate, weight the class or look at its labels"
        )
        logger.warning(message)
        if self.stop and self.trainer is not None:
            self.trainer.state.stop_reason = message
            self.trainer.terminate()


def case_rows(engine: Any, name: str | None = None) -> list[dict[str, Any]]:
    """Per-case rows (dicts with a ``case``) of one metric, or of all, in ``engine.state.metric_details``."""
    details = getattr(engine.state, "metric_details", None) or {}
    lists = details.values() if name is None else [details.get(name, [])]
    return [row for rows in lists if isinstance(rows, list) for row in rows if isinstance(row, dict) and "case" in row]


def batch_names(batch: Any) -> list[str]:
    """``"case BraTS-MEN-00001-000 slice 12"`` for every item of a collated or decollated batch."""
    if isinstance(batch, Mapping):
        cases = _as_list(batch.get("case"))
        slices = _as_list(batch.get("slice"))
        count = max(len(cases), len(slices))
        pairs: Iterable[tuple[Any, Any]] = (
            (cases[i] if i < len(cases) else None, slices[i] if i < len(slices) else None) for i in range(count)
        )
    elif isinstance(batch, (list, tuple)) and all(isinstance(item, Mapping) for item in batch):
        pairs = ((item.get("case"), item.get("slice")) for item in batch)
    else:
        pairs = ()
    names = []
    for case, index in pairs:
        parts = [f"case {case}" if case is not None else "", f"slice {int(index)}" if index is not None else ""]
        names.append(" ".join(part for part in parts if part))
    return names or ["a batch that names no case"]


def _found_per_class(rows: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    found: dict[str, bool] = {}
    for row in rows:
        volume = row.get("prediction_ml")
        if volume is None or row.get("reference_ml", 1.0) == 0:
            continue
        name = str(row.get("class", "all classes"))
        found[name] = found.get(name, False) or float(volume) > 0
    return found


def _non_finite_items(prediction: Any, names: list[str]) -> list[str]:
    if not isinstance(prediction, torch.Tensor) or prediction.shape[0] != len(names):
        return []
    finite = torch.isfinite(prediction.detach()).flatten(1).all(dim=1).tolist()
    return [name for name, good in zip(names, finite, strict=True) if not good]


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, torch.Tensor):
        return value.flatten().tolist()
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _place(engine: Any) -> str:
    return f"epoch {engine.state.epoch}, iteration {engine.state.iteration}"
