"""Runs bundles in processes that can be killed for good, without paying for the imports each time.

``python -m tests.helpers.forked`` imports torch, MONAI and this package once and then forks a process for every job,
one JSON object per line of its stdin; it answers with a JSON list of exit codes (-9: killed), one per rank. ``Forked``
is its client.

A job's ``die`` says where a process kills itself with SIGKILL, which nothing can catch: before the ``call``-th call of
``at`` (``module:function`` or ``module:Class.method``), counting only calls whose second argument is a path named
``of``, if given; with ``torn`` it first cuts the file of the first argument in half, as if killed while writing it.
``by`` is another signal, or the number of an error of the system that is raised there.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPLACE = "os:replace"  # by which every file of a run gets its name
ITERATION = "monai.engines:SupervisedTrainer._iteration"
VOLUME = "samseg_monai.inferers:SliceVolumeInferer.__call__"
OURS = ("bundles", "checkpoints", "data.files.cases", "data.slices", "handlers", "inferers", "metrics", "strategies",
        "training", "transforms")  # fmt: skip
IMPORTS = ("monai.bundle", "torch.utils.tensorboard", *(f"samseg_monai.{name}" for name in OURS))


class Forked:
    """A running ``python -m tests.helpers.forked``; one core, so that results do not depend on its threads."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.forked"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip

    def run(self, files, overrides, log, *, ranks=1, die=None, cwd=ROOT) -> list[int]:
        """Run config files with overrides in ``cwd``; stdout and stderr of rank r are added to ``<log>.<r>``."""
        job = {"files": [str(f) for f in files], "overrides": overrides, "log": str(log), "ranks": ranks, "die": die}
        job["cwd"] = str(cwd)
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(timeout=60)


@functools.cache
def forked() -> Forked:
    """The one server of this test session."""
    server = Forked()
    atexit.register(server.close)
    return server


def _serve() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(_work(json.loads(line))), flush=True)


def _work(job: dict) -> list[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {}
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            os._exit(_child(job, rank, port))
        ranks[pid] = rank
    codes = [0] * len(ranks)
    left = set(ranks)
    while left:
        pid, status = os.wait()
        if pid not in left:  # a worker of a killed training
            continue
        left.remove(pid)
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
        if codes[ranks[pid]] != 0:  # as torchrun does: the others would wait for it
            for other in left:
                os.kill(other, signal.SIGKILL)
    return codes


def _child(job: dict, rank: int, port: int) -> int:
    log = os.open(f"{job['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(job["cwd"])
    if job["ranks"] > 1:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["ranks"], "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in places.items()}, MASTER_ADDR="127.0.0.1")
    die = dict(job["die"] or {})
    if die and die.pop("rank", 0) == rank:
        _arm(**die)
    from monai.bundle import run

    try:
        run(config_file=job["files"], **job["overrides"])
    except BaseException:  # noqa: BLE001  whatever it was, a forked process must not go on as its parent
        try:  # as Python itself does at the end of a program
            sys.excepthook(*sys.exc_info())
        except SystemExit as stop:
            return int(stop.code)
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _arm(at: str, call: int = 1, of: str | None = None, torn: bool = False, by: str | int = "SIGKILL") -> None:
    module, _, path = at.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real = getattr(owner, name)
    calls = itertools.count(1)
    if by == "SIGINT":  # a shell's background job ignores it, and so would what that starts
        signal.signal(signal.SIGINT, signal.default_int_handler)

    @functools.wraps(real)
    def deadly(*args, **kwargs):
        if (of is None or Path(args[1]).name == of) and next(calls) == call:
            if torn:
                os.truncate(args[0], os.stat(args[0]).st_size // 2)
            if isinstance(by, int):
                raise OSError(by, os.strerror(by))
            os.kill(os.getpid(), signal.Signals[by])
        return real(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    _serve()
