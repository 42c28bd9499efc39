"""Perform the runs of a plan, each by ``python -m monai.bundle run`` in processes of its own.

A run's folder ends in the hash of what its numbers depend on. ``done.json`` is written there last: a run that has it is
kept, one that was interrupted goes on (a training resumes at its last epoch), one that failed is tried again.
"""

from __future__ import annotations

import itertools
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from samseg_monai import __version__
from samseg_monai.bundles.build import write_bundle
from samseg_monai.bundles.running import problems_of_overrides
from samseg_monai.comparison.plan import Run, former
from samseg_monai.errors import BundleError, ConfigError, raise_all
from samseg_monai.files import kept_hashes, read_json, write_json
from samseg_monai.workflow import config_files, from_here, shell_command

DONE, LOG = "done.json", "log.txt"
HASHES = "hashes.json"  # of files of data and weights, which are not read again while size and time are the same
EVALUATION = "evaluation"
_TOLD = 12  # lines of a log that tell why a run failed


@dataclass(frozen=True)
class Job:
    """One run as plain values, which can travel to another machine that sees the same files."""

    name: str
    folder: str
    commands: dict[str, str]  # step -> shell line
    overrides: dict[str, dict[str, Any]] = field(repr=False)  # step -> values in it
    identity: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """What came of a run: "done", "kept" (it was there already), "failed" or "busy" (another command performs it) with
    its ``error``, or "elsewhere" (of another shard, and not there yet)."""

    run: Run
    folder: Path
    status: str
    error: str = ""
    commands: Sequence[str] = ()


def jobs(runs: Sequence[Run], output: Path) -> list[Job]:
    """Write the bundles that the runs need, and check every value that a run overrides, before anything is run.

    Raises:
        ConfigError: a key that a bundle does not have, or a value that it does not take; all rows at once.
    """
    with kept_hashes(output / HASHES):
        return _jobs(runs, output)


def _jobs(runs: Sequence[Run], output: Path) -> list[Job]:
    found, problems = [], []
    built: dict[Path, dict[str, set[str]]] = {}
    for run in runs:
        bundle = output / "bundles" / run.settings.name
        if bundle not in built:
            write_bundle(run.settings, bundle)
            steps = (["train"] if run.settings.trains else []) + ["evaluate"]
            built[bundle] = {step: _keys(bundle / "configs" / f"{step}.json") for step in steps}
        folder = _folder_of(run, output / "runs")
        commands, overrides = {}, {}
        for step in built[bundle]:
            files = config_files([bundle / "configs" / f"{step}.json"])
            if run.plan.demo and run.settings.demo is not None:
                files.append(bundle / "configs" / "demo.json")
            given = overrides[step] = run.overrides(folder, step, built[bundle])
            problems += [f"{run.row.name}: {line}" for line in problems_of_overrides(files, given)]
            commands[step] = shell_command(files, given)
        found.append(Job(run.name, str(folder), commands, overrides, run.identity))
    raise_all(list(dict.fromkeys(problems)), ConfigError, "plan: these rows cannot run as asked")
    folders = {Path(job.folder) for job, run in zip(found, runs, strict=True) if not job.folder.endswith(run.key)}
    if older := sorted(path.name for path in folders if "data" not in (_recorded(path) or {})):
        logging.getLogger(__name__).warning(
            "An earlier version, which recorded no contents of images and labels, wrote %s. They count because no "
            "image or label is younger; delete them if one was replaced by a file with an older date",
            ", ".join(older),
        )
    return found


def _keys(config: Path) -> set[str]:
    """Keys of a config and of what it builds upon."""
    return {key for path in config_files([config]) for key in read_json(path, ConfigError, "config")}


def _folder_of(run: Run, within: Path) -> Path:
    """Folder of a run: its own, or that of the same run under a former name."""
    own = within / run.name
    if own.is_dir():
        return own
    named = sorted(within.glob(f"*_{run.key}"))
    older = [path for key in run.former_keys for path in sorted(within.glob(f"*_{key}")) if _of_these_data(path, run)]
    return next(iter([*named, *older]), own)


def _of_these_data(folder: Path, run: Run) -> bool:
    """Whether a folder whose name does not tell the contents of images and labels is of those that are there now: by
    its record, else because none of them was changed since it was written last."""
    identity = _recorded(folder) or {}
    if "data" in identity:
        return bool(identity == run.identity)
    written = [path.stat().st_mtime for path in (folder / DONE, folder / LOG) if path.is_file()]
    return max(written, default=0.0) > run.newest


def perform(
    runs: Sequence[Run],
    output: Path,
    *,
    shard: tuple[int, int] = (0, 1),
    workers: int = 1,
    ray_address: str | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Outcome]:
    """Perform all runs that are not there yet; one that fails does not stop the others.

    Args:
        runs: of a plan.
        output: folder of the comparison.
        shard: (i, n): of the runs every n-th from the i-th on is performed here.
        workers: runs at the same time; each gets its share of the processor's cores, and the GPUs in turn.
        ray_address: of a Ray cluster whose machines see ``output`` and the data under the same paths; "local" starts
            one on this machine.
        tell: called with a line whenever a run begins or ends.

    Returns:
        An outcome for each run, in their order.

    Raises:
        ConfigError: as ``jobs``; Ray is asked for and not installed.
    """
    todo = jobs(runs, output)
    results: dict[str, dict[str, Any]] = {}
    start = _on_ray(ray_address, workers) if ray_address else _on_threads(workers)
    with start as submit:
        waiting = []
        for number, job in enumerate(todo):
            if done(Path(job.folder), job.identity):
                results[job.name] = {"status": "kept"}
                tell(f"{job.name}: kept")
            elif number % shard[1] != shard[0]:
                results[job.name] = {"status": "elsewhere", "error": "of another shard, not there yet"}
            else:
                waiting.append(job)
        for number, (job, result) in enumerate(submit(waiting), start=1):
            results[job.name] = result
            seconds = f" in {result['seconds']:.0f} s" if "seconds" in result else ""
            tell(f"[{number}/{len(waiting)}] {job.name}: {result['status']}{seconds}")
            if result.get("error"):
                tell("    " + result["error"].replace("\n", "\n    "))
    return [
        Outcome(
            run,
            Path(job.folder),
            results[job.name]["status"],
            results[job.name].get("error", ""),
            [from_here(command) for command in job.commands.values()],
        )
        for run, job in zip(runs, todo, strict=True)
    ]


def done(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether this very run was performed to its end."""
    ended = (folder / EVALUATION / "metrics.json").is_file()
    return ended and _recorded(folder) in [identity, *former(identity)]


def _recorded(folder: Path) -> dict[str, Any] | None:
    """Identity of the run that came to its end in a folder; None where none did."""
    path = folder / DONE
    record = read_json(path, BundleError, "record of a run", f"delete {path}") if path.is_file() else {}
    return record.get("identity")


def do(job: Job, *, threads: int, gpu: str | None = None, started: Callable[[Any], Any] = lambda process: None) -> Any:
    """Train and evaluate in processes of their own; returns status, seconds and, where it failed, why."""
    folder, began = Path(job.folder), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder) as lock:
        if lock is None:
            return {"status": "busy", "error": "another command performs this run; wait for it"}
        seconds = {}
        for step, command in job.commands.items():
            if step == "train" and _trained(folder):
                continue
            since = time.monotonic()
            code = _run(command, folder / LOG, threads, gpu, started, lock)
            seconds[step] = round(time.monotonic() - since, 1)
            if code:
                told = _why(folder / LOG, code)
                return {"status": "failed", "error": f"{step}: {told}", "seconds": time.monotonic() - began}
        record = {"identity": job.identity, "commands": job.commands, "seconds": seconds, "version": __version__}
        write_json(folder / DONE, record)
    return {"status": "done", "seconds": time.monotonic() - began}


def _trained(folder: Path) -> bool:
    """Whether the training of a folder, which is this run's alone, came to its end."""
    card = folder / "run_card.json"
    if not card.is_file() or not (folder / "adapter.safetensors").is_file():
        return False
    return read_json(card, BundleError, "run card", f"delete {folder}").get("status") == "completed"


def _run(command: str, log: Path, threads: int, gpu: str | None, started: Callable[[Any], Any], lock: IO[str]) -> int:
    """Run a shell line; its process holds the lock, too, and so keeps it where this one is killed before it."""
    words = shlex.split(command)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with log.open("ab") as stream:
        stream.write(f"$ {command}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            [sys.executable, *words[1:]], stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, pass_fds=() if os.name == "nt" else (lock.fileno(),),
        )  # fmt: skip
        started(process)
        return process.wait()


def _why(log: Path, code: int) -> str:
    """The last lines of a log, or the signal that ended the process."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    begun = max(
        (number for number, line in enumerate(lines) if line.startswith("$ python -m monai.bundle")), default=-1
    )
    told = [line.rstrip() for line in lines[begun + 1 :] if line.strip() and "it/s]" not in line and "\r" not in line]
    ended = f"ended by signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return "\n".join([f"{ended}; the end of {log.parent.name}/{log.name}:", *told[-_TOLD:]])


@contextmanager
def _locked(folder: Path) -> Iterator[IO[str] | None]:
    """Hold a folder while a run is performed in it, by a file; None where another does. The lock goes with the last
    process that has the file open, however that ends."""
    with (folder / ".lock").open("w") as file:
        yield file if _lock(file) else None


def _lock(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows has none
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


Submit = Callable[[Sequence[Job]], Iterator[tuple[Job, dict[str, Any]]]]


@contextmanager
def _on_threads(workers: int) -> Iterator[Submit]:
    """Runs in processes of this machine, ``workers`` at a time; they end when this command is interrupted."""
    threads, gpus, numbers = _threads(workers), _gpus(), itertools.count()
    processes: list[subprocess.Popen[bytes]] = []
    lock, stopped = threading.Lock(), threading.Event()

    def started(process: subprocess.Popen[bytes]) -> None:
        with lock:
            processes.append(process)
            if stopped.is_set():
                process.terminate()

    def one(job: Job) -> dict[str, Any]:
        if stopped.is_set():
            return {"status": "failed", "error": "interrupted"}
        gpu = gpus[next(numbers) % len(gpus)] if gpus and workers > 1 else None
        return do(job, threads=threads, gpu=gpu, started=started)

    pool = ThreadPoolExecutor(workers)

    def submit(todo: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        futures = {pool.submit(one, job): job for job in todo}
        for future in as_completed(futures):
            yield futures[future], future.result()

    try:
        yield submit
    except BaseException:
        with lock:
            stopped.set()
            for process in processes:
                if process.poll() is None:
                    process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _threads(workers: int) -> int:
    """Threads of each of so many runs at the same time."""
    return max(1, (os.cpu_count() or 1) // workers)


def _gpus() -> list[str]:
    """Names of the GPUs that this process may use."""
    import torch

    count = torch.cuda.device_count()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return shown.split(",")[:count] if shown else [str(number) for number in range(count)]


@contextmanager
def _on_ray(address: str, workers: int) -> Iterator[Submit]:
    """Runs on a Ray cluster, each with a GPU where it has any, else with its share of the cores."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError('--ray: Ray is not installed; pip install "samseg-monai[ray]"') from error
    local = address == "local"
    ray.init(address=None if local else address, include_dashboard=False, log_to_driver=False)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    threads = _threads(workers)
    remote = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(do)

    def submit(todo: Sequence[Job]) -> Iterator[tuple[Job, dict[str, Any]]]:
        waiting = {remote.remote(job, threads=threads): job for job in todo}
        while waiting:
            [ready], _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(ready)
            try:
                yield job, ray.get(ready)
            except ray.exceptions.RayError as error:  # its machine is gone, say
                yield job, {"status": "failed", "error": f"Ray: {str(error).splitlines()[-1]}"}

    try:
        yield submit
    finally:
        ray.shutdown()


def raise_failed(outcomes: Sequence[Outcome]) -> None:
    """Raise BundleError naming every run that was not performed to its end, and why."""
    failed = [f"{one.folder.name}: {one.error}" for one in outcomes if one.status in ("failed", "busy")]
    raise_all(failed, BundleError, "these runs are missing in the table; give the command again to try them once more")
