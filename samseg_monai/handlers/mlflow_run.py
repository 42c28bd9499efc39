"""One run in MLflow, by its id alone: no global active run, no global address, so that no other run is ever met.

``mlflow`` is imported when a run is opened: it takes seconds and is an optional extra. Its usage statistics, which it
would send over the network, are off unless ``MLFLOW_DISABLE_TELEMETRY`` says otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from samseg_monai.errors import ConfigError, TrainingError

SQLITE = "sqlite:///"
MAGIC = b"SQLite format 3\0"  # that every database begins with
SERVERS = ("http://", "https://", "postgresql", "mysql", "mssql", "databricks")
# MLflow's own limits (mlflow/utils/validation.py)
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 5000
PER_BATCH = 100

Point = tuple[str, int, float]  # name, step, value


def check_address(uri: str) -> None:
    """Refuse what cannot be a tracking store before anything is loaded.

    Raises:
        ConfigError: no address of a database or server, the package that it needs is not installed, or the file of a
            sqlite database is none.
    """
    if not isinstance(uri, str) or not uri.startswith((SQLITE, *SERVERS)):
        raise ConfigError(f"mlflow::uri must be sqlite:///PATH or the address of an MLflow server, got {uri!r}")
    needed = ("mlflow", "sqlalchemy", "alembic") if uri.startswith(SQLITE) else ("mlflow",)
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"mlflow::uri is set, but {', '.join(absent)} is not installed: pip install 'samseg-monai[mlflow]', or set "
            "mlflow::uri to null"
        )
    if uri.startswith(SQLITE):
        _check_database(uri.removeprefix(SQLITE))


def _check_database(name: str) -> None:
    """Refuse what sqlite cannot open, or would forget: MLflow tries again for two minutes before it says so."""
    path = Path(name)
    problem = None
    if not name or ":memory:" in name:
        problem = "names no file, so nothing would be kept"
    elif path.is_dir():
        problem = "is a folder"
    elif path.is_file() and path.stat().st_size and not _begins(path, MAGIC):
        problem = "is another file, no database"
    if problem:
        raise ConfigError(
            f"mlflow::uri {SQLITE}{name} {problem}; give the path of a file, such as {SQLITE}runs/mlflow.db"
        )


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(magic)) == magic


class MlflowRun:
    """A run that is open: values, files and an end can be given to it.

    Opening fails with one of our errors; later failures raise what is in ``errors``, for the caller to pass over: a
    training must not end because a server is away.

    Args:
        uri: see ``check_address``; of a relative sqlite path the working directory is the root. Files (artifacts) lie
            beside a sqlite file, in a folder ``<name of the file>-artifacts``, else where the server keeps them.
        experiment: its name; made if need be.
        name: name of the run.
        tags: values to find it by.
        run_id: go on with this run, if the store still has it, instead of a new one.
        parent: run below which a new one is shown, if the store has it.

    Raises:
        ConfigError: see ``check_address``. TrainingError: the store cannot be opened.
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

        self.errors: tuple[type[Exception], ...] = (MlflowException, OSError)
        self.resumed = False
        self._sent: set[tuple[str, int]] = set()
        try:
            with _alone(uri):
                self._client = MlflowClient(tracking_uri=uri)
                experiment_id = self._experiment(experiment, uri)
            if self._has(parent):
                tags = {**tags, "mlflow.parentRunId": parent}
            self.id = self._resume(run_id) or self._begin(experiment_id, name, tags)
            self._sent.update(self._stored() if self.resumed else ())
        except self.errors as error:
            raise TrainingError(f"MLflow: {uri} cannot be used ({_first_line(error)})") from error

    def params(self, values: Mapping[str, Any]) -> None:
        """Record settings. A resumed run keeps those it began with; a changed one becomes the tag ``resumed.<key>``."""
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.id).data.params if self.resumed else {}
        wanted = {_key(key): _text(value, PARAM_LENGTH) for key, value in values.items()}
        new = [Param(key, text) for key, text in wanted.items() if key not in known]
        changed = [RunTag(_key(f"resumed.{k}"), t[:TAG_LENGTH]) for k, t in wanted.items() if known.get(k, t) != t]
        for batch in _batches(new):
            self._client.log_batch(self.id, params=batch)
        for batch in _batches(changed):
            self._client.log_batch(self.id, tags=batch)

    def points(self, values: Iterable[Point]) -> None:
        """Record values of curves; those that the run has already are passed over."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new = {(_key(name), step): value for name, step, value in values}
        left = [(place, value) for place, value in new.items() if place not in self._sent]
        for batch in _batches(left):
            self._client.log_batch(self.id, metrics=[Metric(k, value, now, step) for (k, step), value in batch])
            self._sent.update(place for place, _ in batch)

    def tag(self, key: str, value: str) -> None:
        """Record or replace a tag."""
        self._client.set_tag(self.id, _key(key), _text(value, TAG_LENGTH))

    def files(self, source: str | Path, folder: str | None = None) -> None:
        """Attach a file, or all files of a folder, below ``folder`` of the run; nothing where there is no source."""
        if Path(source).is_dir():
            self._client.log_artifacts(self.id, str(source), folder)
        elif Path(source).is_file():
            self._client.log_artifact(self.id, str(source), folder)

    def close(self, status: str) -> None:
        """End the run as FINISHED, FAILED or KILLED."""
        self._client.set_terminated(self.id, status)

    def _experiment(self, name: str, uri: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            return str(self._client.create_experiment(name, artifact_location=_artifacts(uri)))
        if found.lifecycle_stage != "active":
            raise TrainingError(
                f"MLflow: experiment {name!r} was deleted in {uri}; restore it there, or set mlflow::experiment to "
                "another name"
            )
        return str(found.experiment_id)

    def _begin(self, experiment_id: str, name: str, tags: Mapping[str, Any]) -> str:
        texts = {_key(key): _text(value, TAG_LENGTH) for key, value in tags.items()}
        return str(self._client.create_run(experiment_id, run_name=name, tags=texts).info.run_id)

    def _has(self, run_id: str | None) -> bool:
        try:
            return run_id is not None and self._client.get_run(run_id).info.lifecycle_stage == "active"
        except self.errors:
            return False

    def _resume(self, run_id: str | None) -> str | None:
        self.resumed = self._has(run_id)
        if not self.resumed or run_id is None:
            return None
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _stored(self) -> Iterator[tuple[str, int]]:
        for name in self._client.get_run(self.id).data.metrics:
            yield from ((name, point.step) for point in self._client.get_metric_history(self.id, name))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level: ``{"strategy": {"rank": 4}}`` to ``{"strategy.rank": 4}``; lists stay whole."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found.update(flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value})
    return found


def _artifacts(uri: str) -> str | None:
    """MLflow would put the files of a sqlite store into the working directory, wherever that is."""
    if not uri.startswith(SQLITE):
        return None
    path = Path(uri.removeprefix(SQLITE)).resolve()
    return path.with_name(f"{path.stem}-artifacts").as_uri()


def _alone(uri: str) -> AbstractContextManager[Any]:
    """Two processes that meet an empty sqlite file would both create its tables, and one would fail."""
    if not uri.startswith(SQLITE):
        return nullcontext()
    path = Path(uri.removeprefix(SQLITE)).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_name(f"{path.name}.lock"))


def _key(name: str) -> str:
    """A name that MLflow takes: letters, digits, ``_ - . : `` and blanks."""
    return re.sub(r"[^\w.\-: ]", "_", str(name))[:KEY_LENGTH]


def _text(value: Any, limit: int) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _batches(items: Iterable[Any]) -> Iterator[Sequence[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, PER_BATCH)):
        yield batch


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
