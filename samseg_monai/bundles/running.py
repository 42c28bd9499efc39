"""What a bundle's config asks while it runs: where it lies, which weights to use, whether every key is known."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from monai.bundle import ConfigWorkflow
from monai.utils import optional_import

from samseg_monai.errors import ConfigError, SamsegError, raise_all

logger = logging.getLogger(__name__)
INTERNAL = {"_meta_"}


def current_workflow() -> ConfigWorkflow | None:
    """Return the workflow whose expression is being evaluated right now, if any.

    MONAI gives an expression no way to ask where its config file lies; the workflow that evaluates it is on the call
    stack and knows.
    """
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, ConfigWorkflow):
            return found
        frame = frame.f_back
    return None


def bundle_root() -> str:
    """Return the folder of the bundle that is running, from any working directory.

    Outside a workflow (``verify_net_in_out`` and the like parse the config alone) it is the working directory, as in
    MONAI's own bundles.
    """
    workflow = current_workflow()
    if workflow is None:
        return "."
    folder = Path(workflow.config_root_path).resolve()
    return str(folder.parent if folder.name == "configs" else folder)


def find_checkpoint(output_dir: str, root: str) -> str | None:
    """Choose what to evaluate: the adapter just trained in ``output_dir``, else the bundle's own ``models/model.pt``.

    Returns:
        A path, or None where neither exists (zero-shot: the base weights alone).
    """
    if (Path(output_dir) / "adapter.safetensors").is_file():
        return str(output_dir)
    model = Path(root) / "models" / "model.pt"
    return str(model) if model.is_file() else None


def extra_inputs(**wanted: Any) -> dict[str, str]:
    """Return what MONAI's ``PrepareBatchExtraInput`` hands to the network beside the image: the truthy ``wanted``."""
    return {name: name for name, value in wanted.items() if value}


def rank_device() -> torch.device:
    """Return the device of this process of a ``torchrun`` launch: its own GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def join_processes() -> None:
    """Join the process group that ``torchrun`` describes (NCCL with GPUs, gloo without); once is enough."""
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "multi_gpu config: this process was not started by torchrun; use "
            "torchrun --standalone --nproc_per_node=N -m monai.bundle run ..."
        )
    if not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def _ids(config: Any, prefix: str = "") -> dict[str, dict[str, Any]]:
    """Map every id in ``config`` to the object it is a key of."""
    found: dict[str, dict[str, Any]] = {}
    if isinstance(config, dict):
        for key, value in config.items():
            name = f"{prefix}{str(key).lstrip('+').replace('#', '::')}"
            found[name] = config
            found.update(_ids(value, f"{name}::"))
    elif isinstance(config, list):
        for i, value in enumerate(config):
            found.update(_ids(value, f"{prefix}{i}::"))
    return found


def _accepts(owner: dict[str, Any], key: str) -> bool:
    """Tell whether the component described by ``owner`` has an argument ``key``; unknown components pass."""
    target = owner.get("_target_")
    if not isinstance(target, str) or "." not in target:
        return isinstance(target, str)
    module, _, name = target.rpartition(".")
    component, found = optional_import(module, name=name)
    if not found:
        return True
    parameters = inspect.signature(component).parameters
    return key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def unknown_keys(config: dict[str, Any], known: dict[str, Any]) -> list[str]:
    """Describe each id of ``config`` that is not in ``known`` and is no argument of the component it was given to."""
    problems = []
    for name, owner in _ids(config).items():
        key = name.rpartition("::")[2]
        if (
            name in known
            or name.split("::")[0] in INTERNAL
            or key.startswith("_")
            or ("_target_" in owner and _accepts(owner, key))
        ):
            continue
        parent = name.rpartition("::")[0]
        if parent and (parent not in known or known[parent].get(parent.rpartition("::")[2], "") is None):
            continue  # its parent is reported, is a component given whole, or a mapping in place of null
        close = difflib.get_close_matches(name, known, n=1)
        problems.append(f"{name}" + (f" (did you mean {close[0]}?)" if close else ""))
    return problems


def guard() -> None:
    """Refuse override keys that no config of the bundle knows; call it first in ``run``.

    MONAI accepts a misspelt override silently: ``--epohcs 7`` trains with the default. Also lets our own errors end the
    program with their text alone, without a traceback.

    Raises:
        ConfigError: unknown keys; all are listed, each with the nearest known one.
    """
    sys.excepthook = _plain_errors
    workflow = current_workflow()
    if workflow is None:
        return
    known: dict[str, Any] = {}
    for path in sorted(Path(workflow.config_root_path).glob("*.json")):
        if path.name != "metadata.json":
            known.update(_ids(json.loads(path.read_text(encoding="utf-8"))))
    problems = unknown_keys(workflow.parser.get(), known)
    raise_all(problems, ConfigError, "config: keys that this bundle does not know")


def _plain_errors(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print one of our errors without its traceback, wherever MONAI has wrapped it; leave others as they are."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, SamsegError):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.write(f"{type(cause).__name__}: {cause}\n")
