"""Files a run leaves behind for tables and figures: curves per epoch, rows per case, aggregates."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents

from samseg_monai.checkpoints import write_whole
from samseg_monai.errors import TrainingError
from samseg_monai.handlers.guards import case_rows
from samseg_monai.handlers.provenance import plain, write_json
from samseg_monai.metrics import read_history, write_rows

logger = logging.getLogger(__name__)

COLUMNS = ("epoch", "iteration", "name", "value")


class CurveLog:
    """``history.csv`` with columns epoch, iteration, name, value: mean loss and rate per epoch, metrics per validation.

    The file is rewritten whole after each epoch, so it is never torn. A resumed run keeps the rows up to the epoch it
    starts from; a run from scratch starts the file anew. In a distributed run the loss is the mean over all ranks'
    batches.

    Args:
        output_dir: folder of the run, made if need be.
        evaluator: the validation's engine, whose scalar metrics are recorded under their own names.
        filename: name of the file.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], *, evaluator: Any = None, filename: str = "history.csv"
    ) -> None:
        self.path = Path(output_dir) / filename
        self.evaluator = evaluator
        self._rows: dict[tuple[int, str], tuple[int, float]] = {}
        self._trainer: Any = None
        self._begun = False
        self._loss_sum: torch.Tensor | None = None
        self._losses = 0

    def attach(self, engine: Any) -> None:
        """Attach to the trainer."""
        self._trainer = engine
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self._end)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._validated)

    def _begin(self, engine: Any) -> None:
        # a validation at the start may come first: whichever does reads the earlier rows
        if self._begun:
            return
        self._begun = True
        start = self._trainer.state.epoch
        points, problems = read_history(self.path) if start > 0 and self.path.is_file() else ([], [])
        for problem in problems:
            logger.warning("%s, %s: not a row of curves, left out", self.path.name, problem)
        self._rows = {(p.epoch, p.name): (p.iteration, p.value) for p in points if p.epoch <= start}

    def _end(self, engine: Any) -> None:
        self._begun = False

    def _collect(self, engine: Any) -> None:
        # summed where it lies: reading every loss would make the CPU wait for the GPU
        loss = engine.state.output["loss"].detach().float().mean()
        self._loss_sum = loss if self._loss_sum is None else self._loss_sum + loss
        self._losses += 1

    def _epoch(self, engine: Any) -> None:
        if self._loss_sum is not None:
            loss = float(self._loss_sum) / self._losses
            if idist.get_world_size() > 1:  # every rank has as many batches
                loss = float(idist.all_reduce(loss)) / idist.get_world_size()
            self._add(engine.state.epoch, "train_loss", loss)
        self._loss_sum, self._losses = None, 0
        for index, group in enumerate(engine.optimizer.param_groups):
            self._add(engine.state.epoch, "lr" if index == 0 else f"lr_{index}", float(group["lr"]))
        self._write()

    def _validated(self, engine: Any) -> None:
        self._begin(engine)
        for name, value in plain(engine.state.metrics).items():
            if isinstance(value, (int, float)):
                self._add(engine.state.epoch, name, float(value))
        self._write()

    def _add(self, epoch: int, name: str, value: float) -> None:
        self._rows[(epoch, name)] = (self._trainer.state.iteration, value)

    def _write(self) -> None:
        if idist.get_rank() != 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, self._write_rows)

    def _write_rows(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            for (epoch, name), (iteration, value) in sorted(self._rows.items(), key=lambda item: item[0][0]):
                writer.writerow([epoch, iteration, name, repr(value)])


class CaseTable:
    """Writes the per-case rows of one metric to a CSV and the evaluator's metrics to a JSON, after each evaluation.

    Args:
        output_dir: folder of the run, made if need be.
        name: which metric's rows in ``engine.state.metric_details``; None takes all there are.
        filename: CSV, one row per case and class (``samseg_monai.metrics.write_rows``).
        metrics_filename: JSON with ``metrics`` (plain numbers), ``cases``, ``cases_file``, ``prompt_source``,
            ``policy``, ``epoch``.
        prompt_source: label, json, mask, image or none.
        policy: the empty-mask policy the rows follow.
        only_best: write only when the evaluator has just reached its best key metric (validations of a training).

    Raises:
        TrainingError: when the evaluator has no such rows.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        name: str | None = None,
        filename: str = "cases.csv",
        metrics_filename: str = "metrics.json",
        prompt_source: str | None = None,
        policy: str | None = None,
        only_best: bool = False,
    ) -> None:
        self.folder = Path(output_dir)
        self.name = name
        self.filename = filename
        self.metrics_filename = metrics_filename
        self.prompt_source = prompt_source
        self.policy = policy
        self.only_best = only_best

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if idist.get_rank() != 0:
            return
        if self.only_best and engine.state.best_metric_epoch != engine.state.epoch:
            return
        rows = case_rows(engine, self.name)
        if not rows:
            there = ", ".join(map(str, engine.state.metric_details)) or "none"
            raise TrainingError(f"CaseTable: no per-case rows under {self.name!r}; metric_details has {there}")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / self.filename, lambda temporary: write_rows(rows, temporary))
        write_json(
            self.folder / self.metrics_filename,
            {
                "metrics": engine.state.metrics,
                "cases": len({row["case"] for row in rows}),
                "cases_file": self.filename,
                "prompt_source": self.prompt_source,
                "policy": self.policy,
                "epoch": engine.state.epoch,
            },
        )
