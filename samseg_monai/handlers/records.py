"""Files a run leaves behind for tables and figures: its card, curves per epoch, rows per case, aggregates."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Events
from monai.data import MetaTensor
from monai.engines.utils import IterationEvents

from samseg_monai.checkpoints import git_commit, read_card
from samseg_monai.choices import PICKED
from samseg_monai.data import CUT
from samseg_monai.data.slices import SliceDataset
from samseg_monai.errors import CheckpointError, TrainingError
from samseg_monai.faults import what_failed
from samseg_monai.files import StrPath, unwrap, write_json, write_whole
from samseg_monai.handlers import provenance
from samseg_monai.handlers.keeping import case_rows
from samseg_monai.handlers.provenance import peak_memory_mb, plain
from samseg_monai.metrics import read_history, write_rows
from samseg_monai.metrics.rows import Curves, write_cell
from samseg_monai.training.cost import Clock, duration
from samseg_monai.training.losses import judged_slices
from samseg_monai.training.owned import count_trainable

logger = logging.getLogger(__name__)

COLUMNS = ("epoch", "iteration", "name", "value")
FIRST_STEPS = 5  # whose time is told, behind the very first


@dataclass(eq=False, repr=False)
class RunCard:
    """Writes ``run_card.json``: what a run was, on what, with what result; at its start, and kept true to its end.

    Its status is ``running``, then ``completed``, ``interrupted`` or ``failed`` (with the message). No absolute path
    and no user name gets into it. Put it first among the handlers: of several handlers of an exception (MONAI's
    StatsHandler is one) ignite reaches only those before the first that raises it again, as this one does, too.

    Args:
        output_dir: folder of the run, made if need be.
        settings: values of the config's public keys; hashed (places left out) into ``config_hash``.
        seed, prompt_source, cases_file: recorded as they are.
        network: SamSegmenter (or DDP of it): strategy, SAM variant, base weights' hash and counts are read from it.
        evaluator: engine whose last and best metrics are recorded; not needed when attached to the evaluator.
        best: BestAdapter, whose epoch and score then count as the best.
        whole: WholeVolumes: where validations see picked slices, "best" says so, and is of whole volumes at the end.
        datalist: datalist JSON, whose hash is recorded.
        cut: case -> what the crop leaves out of it (``SliceDataset.cut``); None: the batches of the evaluator tell.
        facts: more keys for the card's top level, e.g. ``{"dataset": "phantoms", "phantoms": true}``.
    """

    output_dir: StrPath
    _: KW_ONLY
    settings: Mapping[str, Any]
    seed: int | None = None
    prompt_source: str | None = None
    network: Any = None
    evaluator: Any = None
    best: Any = None
    whole: Any = None
    datalist: StrPath | None = None
    cases_file: str | None = "cases.csv"
    cut: Mapping[str, Any] | None = None
    facts: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.path = Path(self.output_dir) / "run_card.json"
        self.network = None if self.network is None else unwrap(self.network)
        self.card: dict[str, Any] = {}
        self._began = 0.0
        self._before: dict[str, Any] = {}  # the card of the run that is resumed

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, or to the evaluator of a run without training."""
        engine.add_event_handler(Events.STARTED, self.start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._note_cut)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._progress)
        engine.add_event_handler(Events.COMPLETED, self.complete)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self.fail)

    def start(self, engine: Any) -> None:
        """Write the card with all that is known beforehand."""
        self._began = time.perf_counter()
        resumed = engine.state.epoch if hasattr(engine, "optimizer") else 0
        self._before = provenance.read_json(self.path) if resumed else {}
        self.card = {
            **(self.facts or {}),
            "status": "running",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "resumed_from_epoch": resumed or None,
            **self._of_network(),
            "prompt_source": self.prompt_source,
            "seed": self.seed,
            "settings": self.settings,
            "config_hash": provenance.config_hash(self.settings),
            "data_hash": None if self.datalist is None else provenance.file_hash(self.datalist),
            "versions": provenance.versions(),
            "git_commit": git_commit(changes=True),
            "hardware": provenance.hardware(),
            "processes": idist.get_world_size(),
            "cases_file": self.cases_file,
            "cut": dict(self.cut or {}),
        }
        if resumed:  # the next kill may come before the first epoch ends
            self._progress(engine)
        else:
            self._write()

    def _of_network(self) -> dict[str, Any]:
        """What the network says of itself, under the keys that tables read."""
        if self.network is None:
            return {}
        strategy = getattr(self.network, "strategy", None)
        return {
            "sam_variant": getattr(getattr(self.network, "spec", None), "name", None),
            "base_sha256": getattr(self.network, "base_sha256", None),
            "image_size": getattr(self.network, "image_size", None),
            "spacing": getattr(self.network, "spacing", None),
            "precision": getattr(self.network, "precision", None),
            "strategy": None if strategy is None else {"name": strategy.name, "arguments": strategy.arguments()},
            "trainable_parameters": count_trainable(self.network),
            **({"cases": self.network.cases} if getattr(self.network, "cases", None) else {}),
        }

    def _note_cut(self, engine: Any) -> None:
        """What the crop left out of the cases of an evaluation, and the longest side of their voxels, where known."""
        for item in engine.state.batch if isinstance(engine.state.batch, list) else []:
            counts = dict(zip(CUT, item["cut"].tolist(), strict=True)) if "cut" in item else {}
            if counts.get("image") or counts.get("label"):
                self.card["cut"][str(item["case"])] = counts
            reference = item.get("reference")
            if isinstance(reference, MetaTensor) and reference.meta.get("spacing_known", True):
                side = float(reference.pixdim[: 2 if reference.shape[-1] == 1 else 3].max())
                self.card["voxel_mm"] = max(self.card.get("voxel_mm", 0.0), round(side, 5))

    def _progress(self, engine: Any) -> None:
        # a run that is killed gets no chance to write its end
        self.card.update(seconds=self._seconds(), epochs=engine.state.epoch, **self._seen(engine))
        self._write()

    def complete(self, engine: Any) -> None:
        """Write results, time and memory."""
        self._finish(engine, "completed")

    def fail(self, engine: Any, error: BaseException) -> None:
        """Write why the run ended, and raise that again."""
        # ignite hands an error on through two levels: the first record is the true one
        if self.card and "error" not in self.card:
            self.card["error"] = f"{type(error).__name__}: {error}"
            try:
                self._finish(engine, "interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            except OSError as fault:  # a full disk, perhaps what the run failed of: that is what has to be told
                logger.warning("the card of this run could not be written: %s", what_failed(fault))
        raise error

    def _finish(self, engine: Any, status: str) -> None:
        state = engine.state
        measured = (self.evaluator or engine).state
        metrics, best = dict(measured.metrics), None
        if self.best is not None:
            best = {"metric": self.best.score, "epoch": self.best.epoch}
        elif getattr(measured, "best_metric_epoch", -1) >= 0:
            best = {"metric": measured.best_metric, "epoch": measured.best_metric_epoch}
        if self.whole is not None and self.whole.picker is not None:
            metrics |= self.whole.metrics
            best = self.whole.told(best)
        self.card.update(
            status=status,
            iterations=state.iteration,
            stop_reason=getattr(state, "stop_reason", None),
            peak_memory_mb=peak_memory_mb(),
            metrics=metrics,
            best=best,
            **self._learnt(),
        )
        self._progress(engine)

    def _seen(self, engine: Any) -> dict[str, Any]:
        """Reports that are made once, at the training's start or in its course: an earlier one stays after a resume."""
        collapsed = getattr((self.evaluator or engine).state, "collapsed", None)
        flow = self._before.get("gradient_flow") or getattr(engine.state, "gradient_flow", None)
        warnings = dict.fromkeys((self.facts or {}).get("warnings", []))
        for state in (engine.state, (self.evaluator or engine).state):
            warnings |= dict.fromkeys(getattr(state, "warnings", []))
        return {
            "gradient_flow": flow,
            "collapsed_classes": collapsed or self._before.get("collapsed_classes"),
            "warnings": list(warnings),
        }

    def _learnt(self) -> dict[str, Any]:
        """What the strategy says of the weights that are kept, such as the ladder's ``gate``.

        Those are the weights of the best epoch, or their average: the card of the adapter in the same folder knows.
        Without an adapter there (an evaluation) it is what the network says now.
        """
        try:
            saved = read_card(self.path.parent)
        except CheckpointError:
            saved = {}
        return {key: saved.get(key, value) for key, value in self.learnt().items()}

    def learnt(self) -> dict[str, Any]:
        """What the network's strategy says now of what it has learnt, such as the ladder's ``gate``."""
        strategy = getattr(self.network, "strategy", None)
        return {} if strategy is None else dict(strategy.facts(self.network))

    def _seconds(self) -> float:
        """Seconds of the whole training, those before a resume included."""
        earlier = self._before.get("seconds")
        earlier = float(earlier) if isinstance(earlier, (int, float)) else 0.0
        return round(earlier + time.perf_counter() - self._began, 2)

    def _write(self) -> None:
        if idist.get_rank() == 0:
            write_json(self.path, plain(self.card))


class CurveLog:
    """``history.csv`` with columns epoch, iteration, name, value: mean loss and rate per epoch, metrics per validation.

    The log gets a line at the start with slices and epochs, one behind the first steps with what a step takes in time
    and memory (of an epoch of one step there is none), a line per epoch with the loss and the time that is left over
    all epochs at most, and a line per validation with Dice, of each class where there are several.

    The file is rewritten whole after each epoch. A resumed run keeps the rows up to the epoch it starts from; a run
    from scratch starts the file anew. In a distributed run the loss is the mean over all ranks' batches. Batches in
    which no pixel counts in the loss, as slices without a box, are left out of it, and their number is told.

    Args:
        output_dir: folder of the run, made if need be.
        evaluator: the validation's engine, whose scalar metrics are recorded under their own names.
        whole: engine of the validation of whole volumes at the end, where the others see picked slices.
    """

    def __init__(self, output_dir: StrPath, *, evaluator: Any = None, whole: Any = None) -> None:
        self.path = Path(output_dir) / "history.csv"
        self.evaluator, self.whole = evaluator, whole
        self._rows: Curves = {}
        self._trainer: Any = None
        self._begun = False
        self._losses: torch.Tensor | None = None  # sum over the batches that count, and their number
        self._batches = 0

    def attach(self, engine: Any) -> None:
        """Attach to the trainer."""
        self._trainer = engine
        engine.add_event_handler(Events.STARTED, self._announce)
        engine.add_event_handler(Events.STARTED, self._begin)
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self._collect)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._first_steps)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        engine.add_event_handler(Events.COMPLETED, self._end)
        for evaluator in (self.evaluator, self.whole):
            if evaluator is not None:
                evaluator.add_event_handler(Events.EPOCH_COMPLETED, self._validated)

    def _announce(self, engine: Any) -> None:
        data, start = getattr(engine.state.dataloader, "dataset", None), engine.state.epoch
        size = (
            f"{len(data)} {data.picker.units[1]} of {len(data.data)} cases"
            if isinstance(data, SliceDataset)
            else f"{engine.state.epoch_length} batches"
        )
        if idist.get_rank() == 0:
            more = f", going on behind epoch {start}" if start else ""
            logger.info("training: %s an epoch, %d epochs%s", size, engine.state.max_epochs, more)

    def _begin(self, engine: Any) -> None:
        # a validation at the start may come first: whichever does reads the earlier rows
        if not self._begun:
            self._begun = True
            start = self._trainer.state.epoch
            self._started = (start, time.monotonic())
            self._rows = {key: row for key, row in read_curves(self.path).items() if start and key[0] <= start}

    def _end(self, engine: Any) -> None:
        self._begun = False

    def _collect(self, engine: Any) -> None:
        # summed where it lies: reading every loss would make the CPU wait for the GPU
        output = engine.state.output
        loss, label = output["loss"].detach().float().mean(), output.get("label")
        counts = judged_slices(label).any() if isinstance(label, torch.Tensor) else torch.ones((), dtype=torch.bool)
        counted = torch.stack([torch.where(counts.to(loss.device), loss, 0.0), counts.to(loss)])
        self._losses = counted if self._losses is None else self._losses + counted
        self._batches += 1

    def _first_steps(self, engine: Any) -> None:
        """Tell what a step takes, and what all will, while most of them are still ahead."""
        state = engine.state
        step, last = (state.iteration - 1) % state.epoch_length + 1, min(1 + FIRST_STEPS, state.epoch_length)
        if idist.get_rank() != 0 or state.epoch != self._started[0] + 1 or step not in (1, last) or last == 1:
            return
        if step == 1:
            self._clock = Clock(torch.device(state.device))
        self._clock.read()
        if step == last:
            seconds = self._clock.medians("step", of=last - 1)["seconds_per_step"]
            left = duration(seconds * (state.max_epochs * state.epoch_length - state.iteration) / 60)
            memory = " and ".join(
                f"{mb / 1000:.2f} GB of {kind.upper()}" for kind, mb in peak_memory_mb().items() if mb
            )
            text = "a step takes %.3g s, memory so far at most %s; all steps take %s more, validations come on top"
            logger.info(text, seconds, memory or "unknown", left)

    def _epoch(self, engine: Any) -> None:
        if self._losses is not None:
            totals = [*self._losses.tolist(), float(self._batches)]
            if idist.get_world_size() > 1:
                totals = [float(idist.all_reduce(total)) for total in totals]
            loss, counted, batches = totals
            without = f" ({batches - counted:.0f} of {batches:.0f} batches have nothing to learn from)"
            told = f"loss {loss / counted:.4g}" if counted else "no loss"
            if counted:
                self._add(engine.state.epoch, "train_loss", loss / counted)
            self._tell(f"{told}{without if counted < batches else ''}; {self._time_left()}")
        self._losses, self._batches = None, 0
        for index, group in enumerate(engine.optimizer.param_groups):
            self._add(engine.state.epoch, "lr" if index == 0 else f"lr_{index}", float(group["lr"]))
        self._write()

    def _validated(self, engine: Any) -> None:
        self._begin(engine)
        metrics = {k: float(v) for k, v in plain(engine.state.metrics).items() if isinstance(v, (int, float))}
        for name, value in metrics.items():
            self._add(engine.state.epoch, name, value)
        prefix = PICKED if f"{PICKED}dice_mean" in metrics else ""
        if f"{prefix}dice_mean" in metrics:
            classes = {row["class"]: metrics.get(f"{prefix}{row['class']}_dice_mean") for row in case_rows(engine)}
            each = ", ".join(f"{name} {value:.3f}" for name, value in classes.items() if value is not None)
            whole = f" of whole volumes, weights of epoch {engine.state.epoch}" if engine is self.whole else ""
            of = " of picked slices" if prefix else whole
            self._tell(f"validation Dice {metrics[f'{prefix}dice_mean']:.3f}{of}" + (f" ({each})" if each else ""))
        self._write()

    def _tell(self, what: str) -> None:
        if idist.get_rank() == 0:
            logger.info("epoch %d of %d: %s", self._trainer.state.epoch, self._trainer.state.max_epochs, what)

    def _time_left(self) -> str:
        """Of all epochs, as long as those of this process took on average, validations included."""
        state, (epoch, began) = self._trainer.state, self._started
        seconds = (time.monotonic() - began) / (state.epoch - epoch) * (state.max_epochs - state.epoch)
        return f"at most {duration(seconds / 60)} left"

    def _add(self, epoch: int, name: str, value: float) -> None:
        state = self._trainer.state
        # of an earlier epoch where whole volumes are validated at the end
        iteration = state.iteration if epoch == state.epoch else epoch * state.epoch_length
        self._rows[(epoch, name)] = (iteration, value)

    def _write(self) -> None:
        def write(path: Path) -> None:
            ordered = sorted(self._rows.items(), key=lambda item: item[0][0])
            with path.open("w", newline="", encoding="utf-8") as stream:
                rows = ([epoch, it, write_cell(name), repr(value)] for (epoch, name), (it, value) in ordered)
                csv.writer(stream).writerows([COLUMNS, *rows])

        if idist.get_rank() == 0:
            write_whole(self.path, write)


def read_curves(path: Path) -> Curves:
    """Rows of a ``history.csv``, none without one; lines that cannot be read are reported and left out."""
    rows, problems = read_history(path) if path.is_file() else ({}, [])
    for problem in problems:
        logger.warning("%s, %s: not a row of curves, left out", path.name, problem)
    return rows


@dataclass(eq=False, repr=False)
class CaseTable:
    """Writes the per-case rows of one metric to a CSV and the evaluator's metrics to a JSON, after each evaluation.

    Args:
        output_dir: folder of the run, made if need be.
        name: which metric's rows in ``engine.state.metric_details``, TrainingError if there are none; None takes all.
        filename: CSV, one row per case and class (``samseg_monai.metrics.write_rows``).
        metrics_filename: JSON with ``metrics`` (plain numbers) and what is known of them.
        prompt_source, policy, precision: recorded beside the numbers.
    """

    output_dir: StrPath
    _: KW_ONLY
    name: str | None = None
    filename: str = "cases.csv"
    metrics_filename: str = "metrics.json"
    prompt_source: str | None = None
    policy: str | None = None
    precision: str | None = None

    def attach(self, engine: Any) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if idist.get_rank() != 0:
            return
        rows = case_rows(engine, self.name)
        if not rows:
            there = ", ".join(map(str, engine.state.metric_details)) or "none"
            raise TrainingError(f"CaseTable: no per-case rows under {self.name!r}; metric_details has {there}")
        folder = Path(self.output_dir)
        write_whole(folder / self.filename, lambda temporary: write_rows(rows, temporary))
        content = {
            "metrics": engine.state.metrics,
            "cases": len({row["case"] for row in rows}),
            "cases_file": self.filename,
            "prompt_source": self.prompt_source,
            "policy": self.policy,
            "precision": self.precision,
            "epoch": engine.state.epoch,
        }
        write_json(folder / self.metrics_filename, plain(content))
