"""Runs in MLflow: settings, curves, results and files of every training and evaluation, in one experiment of a task.

MONAI's ``MLFlowHandler`` knows neither the run card nor a resume, leaves the run RUNNING when an error ends it, and
joins whatever run of the experiment is unfinished; hence this one. What it records comes from the run's own files
(card, ``history.csv``), so that both always tell the same. A run is known by its id alone: no global active run, no
global address, so that no other run is ever met.

``mlflow`` is imported when a run is opened: it takes seconds and is an optional extra. Its usage statistics, which it
would send over the network, are off unless ``MLFLOW_DISABLE_TELEMETRY`` says otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from filelock import FileLock
from ignite.engine import Events

from samseg_monai.errors import ConfigError, TrainingError
from samseg_monai.files import write_json
from samseg_monai.handlers.provenance import plain, read_json, without_secrets
from samseg_monai.handlers.records import RunCard, read_curves

logger = logging.getLogger(__name__)

RUN_FILE = "mlflow_run.json"
TAGS = ("bundle", "bundle_version", "dataset", "phantoms", "sam_variant", "prompt_source", "git_commit", "config_hash",
        "data_hash")  # fmt: skip
SQLITE = "sqlite:///"
MAGIC = b"SQLite format 3\0"  # that every database begins with
SERVERS = ("http://", "https://", "postgresql", "mysql", "mssql", "databricks")

Point = tuple[str, int, float]  # name, step, value


def check_address(uri: str) -> None:
    """Refuse what cannot be a tracking store before anything is loaded: MLflow tries a file again for two minutes.

    Raises:
        ConfigError: no address of a database or server, the package that it needs is not installed, or the file of a
            sqlite database is none (or would be forgotten).
    """
    if not isinstance(uri, str) or not uri.startswith((SQLITE, *SERVERS)):
        got = without_secrets(repr(uri))
        raise ConfigError(f"mlflow::uri must be sqlite:///PATH or the address of an MLflow server, got {got}")
    needed = ("mlflow", "sqlalchemy", "alembic") if uri.startswith(SQLITE) else ("mlflow",)
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"mlflow::uri is set, but {', '.join(absent)} is not installed: pip install 'samseg-monai[mlflow]', or set "
            "mlflow::uri to null"
        )
    if not uri.startswith(SQLITE):
        return
    name = uri.removeprefix(SQLITE)
    path, problem = Path(name), None
    if not name or ":memory:" in name:
        problem = "names no file, so nothing would be kept"
    elif path.is_dir():
        problem = "is a folder"
    elif path.is_file() and path.stat().st_size:
        with path.open("rb") as stream:
            problem = None if stream.read(len(MAGIC)) == MAGIC else "is another file, no database"
    if problem:
        raise ConfigError(f"mlflow::uri {uri} {problem}; give the path of a file, such as {SQLITE}runs/mlflow.db")


class MlflowRun:
    """A run that is open: values, files and an end can be given to it.

    Opening raises ConfigError (see ``check_address``) or TrainingError (the store cannot be opened). What is raised
    later is in ``errors``, for the caller to pass over: a training must not end because a server is away.

    Args:
        uri: see ``check_address``. Files (artifacts) lie beside a sqlite file, in ``<its name>-artifacts``, else where
            the server keeps them.
        experiment, name, tags: of the run; the experiment is made if need be.
        run_id: go on with this run, if the store still has it, instead of a new one.
        parent: run below which a new one is shown, if the store has it.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        name: str,
        *,
        tags: Mapping[str, Any],
        run_id: str | None = None,
        parent: str | None = None,
    ) -> None:
        check_address(uri)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.utils import validation

        self.errors: tuple[type[Exception], ...] = (MlflowException, OSError)
        self._limits: Any = validation
        self._sent: set[tuple[str, int]] = set()
        place: str | None = None
        alone: AbstractContextManager[Any] = nullcontext()
        try:
            if uri.startswith(SQLITE):
                path = Path(uri.removeprefix(SQLITE)).resolve()
                # MLflow would put the files of a sqlite store into the working directory, wherever that is
                place = path.with_name(f"{path.stem}-artifacts").as_uri()
                # two processes that meet an empty file would both create its tables, and one would fail
                path.parent.mkdir(parents=True, exist_ok=True)
                alone = FileLock(path.with_name(f"{path.name}.lock"))
            with alone:
                self._client = MlflowClient(tracking_uri=uri)
                experiment_id = self._experiment(experiment, uri, place)
            self.resumed = self._has(run_id)
            if self.resumed and run_id is not None:
                self.id = run_id
                self._client.update_run(run_id, status="RUNNING")
                for metric in self._client.get_run(run_id).data.metrics:
                    self._sent.update((metric, p.step) for p in self._client.get_metric_history(run_id, metric))
            else:
                shown_below = {"mlflow.parentRunId": parent} if self._has(parent) else {}
                texts = {self._key(key): self._tag_text(value) for key, value in {**tags, **shown_below}.items()}
                self.id = str(self._client.create_run(experiment_id, run_name=name, tags=texts).info.run_id)
        except self.errors as error:
            first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise TrainingError(without_secrets(f"MLflow: {uri} cannot be used ({first_line})")) from error

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings. A resumed run keeps those it began with; a changed one becomes the tag ``resumed.<key>``."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.id).data.params if self.resumed else {}
        limit = self._limits.MAX_PARAM_VAL_LENGTH
        wanted = {self._key(key): _text(value, limit) for key, value in values.items()}
        new = [Param(key, text) for key, text in wanted.items() if key not in known]
        changed = {f"resumed.{key}": text for key, text in wanted.items() if known.get(key, text) != text}
        tags = [RunTag(self._key(key), self._tag_text(text)) for key, text in changed.items()]
        self._client.log_batch(self.id, params=new, tags=tags)

    def points(self, values: Iterable[Point]) -> None:
        """Record values of curves; those that the run has already are passed over."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {(self._key(name), step): value for name, step, value in values}
        left = [Metric(key, value, now, step) for (key, step), value in new.items() if (key, step) not in self._sent]
        self._client.log_batch(self.id, metrics=left)
        self._sent.update(new)

    def tag(self, key: str, value: str) -> None:
        self._client.set_tag(self.id, self._key(key), self._tag_text(value))

    def files(self, source: str | Path, folder: str | None = None) -> None:
        """Attach a file, or all files of a folder, below ``folder`` of the run; nothing where there is no source."""
        if Path(source).is_dir():
            self._client.log_artifacts(self.id, str(source), folder)
        elif Path(source).is_file():
            self._client.log_artifact(self.id, str(source), folder)

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.id, status)

    def _experiment(self, name: str, uri: str, place: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, artifact_location=place))
        if found.lifecycle_stage != "active":
            raise TrainingError(
                f"MLflow: experiment {name!r} was deleted in {without_secrets(uri)}; restore it there, or set "
                "mlflow::experiment to another name"
            )
        return str(found.experiment_id)

    def _has(self, run_id: str | None) -> bool:
        try:
            return run_id is not None and self._client.get_run(run_id).info.lifecycle_stage == "active"
        except self.errors:
            return False

    def _key(self, name: str) -> str:
        """A name that MLflow takes: letters, digits, ``_ - . : `` and blanks."""
        return re.sub(r"[^\w.\-: ]", "_", str(name))[: self._limits.MAX_ENTITY_KEY_LENGTH]

    def _tag_text(self, value: Any) -> str:
        return _text(value, self._limits.MAX_TAG_VAL_LENGTH)


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


class Tracking:
    """Keeps one MLflow run beside a training or an evaluation.

    A training is a run named after its strategy: settings are parameters, rows of ``history.csv`` and what the strategy
    tells of itself (the ladder's ``gate``) metrics by epoch, configs and card files. A resumed training goes on with
    its run. An evaluation is a run of its own, below that of the training in the same ``output_dir``. The status
    follows the card: FINISHED, FAILED, KILLED by an interrupt; a process killed without notice leaves RUNNING. A store
    that is away costs a warning, and values are sent again after the next epoch. Rank 0 alone writes.

    Args:
        card: the run's card, which stands before this handler. It raises an exception again, so that a handler behind
            would never hear of it: this one calls it then.
        output_dir: folder of the training; it keeps the id of the run.
        uri: ``sqlite:///PATH`` or an MLflow server, see ``check_address``; None tracks nothing.
        experiment: None is ``samseg-<task>``.
    """

    def __init__(
        self, card: RunCard, output_dir: str | os.PathLike[str], *, uri: str | None, experiment: str | None = None
    ) -> None:
        if uri is not None:
            check_address(uri)
        self.card = card
        self.folder = Path(output_dir)
        self.uri = uri
        self.experiment = experiment
        self.run: MlflowRun | None = None
        self._training = False

    def attach(self, engine: Any) -> None:
        """Attach to the trainer, or to the evaluator of a run without training; after its card."""
        if self.uri is None:
            return
        if engine.has_event_handler(self.card.fail, Events.EXCEPTION_RAISED):
            engine.remove_event_handler(self.card.fail, Events.EXCEPTION_RAISED)
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.COMPLETED, self._finish, "FINISHED")
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._fail)

    def _start(self, engine: Any) -> None:
        if idist.get_rank() != 0:
            return
        self._training = hasattr(engine, "optimizer")
        before = read_json(self.folder / RUN_FILE).get("run_id")
        resumed = before if self._training and engine.state.epoch > 0 else None
        parent = None if self._training else before
        self.run = self._open(resumed, parent)
        if resumed and not self.run.resumed:
            logger.warning("MLflow: %s has no run %s; a new one goes on", without_secrets(str(self.uri)), resumed)
        if self._training:
            write_json(self.folder / RUN_FILE, {"run_id": self.run.id})
            if not engine.has_event_handler(self._epoch, Events.EPOCH_COMPLETED):
                # now, so that it comes last: validation and history.csv of the epoch are done then
                engine.add_event_handler(Events.EPOCH_COMPLETED, self._epoch)
        self._try(self._describe)

    def _open(self, resumed: str | None, parent: str | None) -> MlflowRun:
        """The run, named after the strategy and what a reader of a table must not overlook."""
        card = plain(self.card.card)
        task = str(card.get("bundle") or "").partition("_segmentation_")[0]
        strategy = (card.get("strategy") or {}).get("name") or "network"
        section = "" if self._training else f", {card.get('settings', {}).get('section', 'evaluation')}"
        pico = " (pico, not SAM)" if str(card.get("sam_variant")).startswith("pico") else ""
        tags = {key: card[key] for key in TAGS if card.get(key) is not None}
        tags["kind"] = "training" if self._training else "evaluation"
        tags["output_dir"] = self.folder.resolve().name
        experiment = self.experiment or (f"samseg-{task}" if task else "samseg")
        name = f"{strategy}{section}{pico}"
        return MlflowRun(str(self.uri), experiment, name, tags=tags, run_id=resumed, parent=parent)

    def _describe(self, run: MlflowRun) -> None:
        card = self.card.card
        numbers = {key: card.get(key) for key in ("trainable_parameters", "processes")}
        run.params(plain(flat({**card.get("settings", {}), **numbers})))
        run.files(self.folder / "bundle" / "configs", "configs")
        run.files(self.card.path)

    def _curves(self) -> list[Point]:
        rows = read_curves(self.folder / "history.csv")
        return [(name, epoch, value) for (epoch, name), (_, value) in rows.items()]

    def _epoch(self, engine: Any) -> None:
        learnt = _scalars(self.card.learnt(), engine.state.epoch)
        self._try(lambda run: run.points([*self._curves(), *learnt]))

    def _fail(self, engine: Any, error: BaseException) -> None:
        try:
            self.card.fail(engine, error)  # writes the card and raises the error
        finally:
            self._finish(engine, "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _finish(self, engine: Any, status: str) -> None:
        def last(run: MlflowRun) -> None:
            card = plain(self.card.card)
            run.points(self._curves() if self._training else _scalars(engine.state.metrics))
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
            what = without_secrets(f"{self.uri} does not answer as it should, the run goes on without it: {error}")
            logger.warning("MLflow: %s", what)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: ``{"strategy": {"rank": 4}}`` to ``{"strategy.rank": 4}``; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return found


def _scalars(values: Any, step: int = 0) -> Iterator[Point]:
    for name, value in plain(values).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, step, float(value)
