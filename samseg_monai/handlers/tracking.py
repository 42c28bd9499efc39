"""Runs in MLflow: settings, curves, results and files of every training and evaluation, in one experiment of a task.

MONAI's ``MLFlowHandler`` knows neither the run card nor a resume, leaves the run RUNNING when an error ends it, and
joins whatever run of the experiment is unfinished; hence this one. What it records comes from the run's own files
(card, ``history.csv``), so that both always tell the same.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Events

from samseg_monai.handlers.mlflow_run import MlflowRun, Point, check_address, flat
from samseg_monai.handlers.provenance import plain, read_json, write_json
from samseg_monai.handlers.run_card import RunCard, strategy_facts

logger = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
TAGS = ("bundle", "bundle_version", "dataset", "phantoms", "sam_variant", "prompt_source", "git_commit", "config_hash",
        "data_hash")  # fmt: skip


class Tracking:
    """Keeps one MLflow run beside a training or an evaluation.

    A training is a run named after its strategy, with the card's settings as parameters, the rows of ``history.csv``
    and the numbers that the strategy tells of itself (the ladder's ``gate``) as metrics by epoch, the bundle's configs
    and the card as files. A resumed training goes on with its run. An evaluation is a run of its own, below that of the
    training in the same ``output_dir`` if there was one, with the evaluator's metrics. The status follows the card:
    FINISHED, FAILED with an error, KILLED by an interrupt. Only a process that is killed without notice leaves RUNNING.

    Opening the run fails loudly; a store that is away later costs a warning, and values are sent again after the next
    epoch. Rank 0 alone writes.

    Args:
        card: the run's card. Put it before this handler, which takes over its part at an exception: the card raises the
            exception again, so that a handler behind it would never hear of it.
        output_dir: folder of the training; it keeps the id of the run.
        uri: ``sqlite:///PATH`` or an MLflow server; None tracks nothing.
        experiment: None is ``samseg-<task>``.
        history: name of the curves' file in ``output_dir``.

    Raises:
        ConfigError: the address is none, or mlflow is not installed. TrainingError: at the start, when the store cannot
            be opened.
    """

    def __init__(
        self,
        card: RunCard,
        output_dir: str | os.PathLike[str],
        *,
        uri: str | None,
        experiment: str | None = None,
        history: str = "history.csv",
    ) -> None:
        if uri is not None:
            check_address(uri)
        self.card = card
        self.folder = Path(output_dir)
        self.uri = uri
        self.experiment = experiment
        self.history = self.folder / history
        self.run: MlflowRun | None = None
        self._training = False

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, or to the evaluator of a run without training; after its card."""
        if self.uri is None:
            return
        if engine.has_event_handler(self.card.fail, Events.EXCEPTION_RAISED):
            engine.remove_event_handler(self.card.fail, Events.EXCEPTION_RAISED)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._complete)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Any) -> None:
        if idist.get_rank() != 0:
            return
        self._training = hasattr(engine, "optimizer")
        before = read_json(self.folder / RUN_FILE).get("run_id")
        resumed = before if self._training and engine.state.epoch > 0 else None
        parent = None if self._training else before
        self.run = MlflowRun(
            str(self.uri), self._experiment(), self._name(), tags=self._tags(), run_id=resumed, parent=parent
        )
        if resumed and not self.run.resumed:
            logger.warning("MLflow: %s has no run %s; a new one goes on", self.uri, resumed)
        if self._training:
            write_json(self.folder / RUN_FILE, {"run_id": self.run.id})
            if not engine.has_event_handler(self._epoch, Events.EPOCH_COMPLETED):
                # now, so that it comes last: validation and history.csv of the epoch are done then
                engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        self._try(self._describe)

    def _describe(self, run: MlflowRun) -> None:
        card = self.card.card
        numbers = {key: card.get(key) for key in ("trainable_parameters", "processes")}
        run.params(plain(flat({**card.get("settings", {}), **numbers})))
        run.files(self.folder / "bundle" / "configs", "configs")
        run.files(self.card.path)

    def _epoch(self, engine: Any) -> None:
        learnt = _scalars(strategy_facts(self.card.network), engine.state.epoch)
        self._try(lambda run: run.points([*_rows(self.history), *learnt]))

    def _complete(self, engine: Any) -> None:
        self._finish(engine, "FINISHED")

    def _fail(self, engine: Any, error: BaseException) -> None:
        try:
            self.card.fail(engine, error)  # writes the card and raises the error
        finally:
            self._finish(engine, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _finish(self, engine: Any, status: str) -> None:
        def last(run: MlflowRun) -> None:
            card = plain(self.card.card)
            run.points(_rows(self.history) if self._training else _scalars(engine.state.metrics))
            best = card.get("best") or {}
            run.points(_scalars({"best": best.get("metric"), "best_epoch": best.get("epoch")}, engine.state.epoch))
            run.files(self.card.path)
            for key in ("error", "stop_reason"):
                if card.get(key):
                    run.tag(key, card[key])

        # an error of ignite's passes here twice: once per level of its loops
        self._try(last)
        self._try(lambda run: run.close(status))
        self.run = None

    def _try(self, send: Callable[[MlflowRun], None]) -> None:
        """Do something to the run, if there is one; say it when that fails, and go on."""
        if self.run is None:
            return
        try:
            send(self.run)
        except self.run.errors as error:
            logger.warning("MLflow: %s does not answer as it should, the run goes on without it: %s", self.uri, error)

    def _experiment(self) -> str:
        task = str(self.card.facts.get("bundle") or "").partition("_segmentation_")[0]
        return self.experiment or (f"samseg-{task}" if task else "samseg")

    def _name(self) -> str:
        """The strategy, and what a reader of a table must not overlook."""
        card = self.card.card
        strategy = (card.get("strategy") or {}).get("name") or "network"
        section = "" if self._training else f", {card.get('settings', {}).get('section', 'evaluation')}"
        pico = " (pico, not SAM)" if str(card.get("sam_variant")).startswith("pico") else ""
        return f"{strategy}{section}{pico}"

    def _tags(self) -> dict[str, Any]:
        card = plain(self.card.card)
        kind = "training" if self._training else "evaluation"
        known = {key: card[key] for key in TAGS if card.get(key) is not None}
        return {**known, "kind": kind, "output_dir": self.folder.resolve().name}


def _rows(path: Path) -> Iterator[Point]:
    """Points of ``history.csv``: name, epoch, value."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            yield row["name"], int(row["epoch"]), float(row["value"])


def _scalars(values: Any, step: int = 0) -> Iterator[Point]:
    for name, value in plain(values).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, step, float(value)
