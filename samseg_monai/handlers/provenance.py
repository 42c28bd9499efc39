"""Facts about a run that are safe to share: versions, commit, hardware, memory; plain JSON without anybody's paths.

Run cards travel with results and are published. An absolute path tells a user's name and a hospital's layout, so only
the last part of it is kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import samseg_monai
from samseg_monai import files
from samseg_monai.errors import CheckpointError
from samseg_monai.faults import peak_memory

PACKAGES = ("torch", "monai", "numpy", "pytorch-ignite", "segment-anything")
# where things lie on one machine; what they contain is recorded by hashes of contents instead
PLACES = ("bundle_root", "dataset_dir", "datalist", "output_dir", "sam_checkpoint", "cache_dir")

# user and password of a URL, and values of its query that open something
_LOGIN = re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*://)[^\s/'\"]*@")
_SECRET = re.compile(
    r"([?&;](?:[\w.-]*(?:token|passw(?:or)?d|pwd|secret|key|signature|credential|auth)[\w.-]*|sig)=)[^&;\s'\"]*", re.I
)
# The folders of a file in a URL, and of one on a drive or share: there, names with blanks are known by what is around.
_FOLDERS = r"[/\\]+(?:[^/\\:*?\"'<>|,;\n]+[/\\]+)*"
_FILE = re.compile(r"((?:sqlite(?:\+\w+)?:/|file:)//)(?:[A-Za-z]:)?" + _FOLDERS)
_DRIVE = re.compile(r"(?:(?<![A-Za-z])[A-Za-z]:|(?<![\w\\])\\(?=\\))" + _FOLDERS)
_DRIVE_HOME = re.compile(r"(?<![A-Za-z])[A-Za-z]:[/\\]+Users[/\\]+[^/\\'\":;,\n]+(?![^'\":;,\n])")
_HOME = re.compile(r"(?:[A-Za-z]:)?[/\\](?:home|Users)[/\\][^\s/\\:'\",;()]+(?![\w./\\-])")
_QUOTED = re.compile(r"(['\"])(?:~|[A-Za-z]:)?[/\\](?:[^'\"\n]*[/\\])?([^'\"/\\\n]*)\1")
_ABSOLUTE = re.compile(r"(?<![\w.:/\\])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\:'\",;()\[\]]+[/\\])+")
_WHOLE = re.compile(r"(?:~|[A-Za-z]:)?[/\\][^\n:,;'\"]*")


def without_secrets(text: str) -> str:
    """``text`` with no user, password or key in its URLs: ``postgresql://jane:secret@host/db`` has its host alone."""
    return _SECRET.sub(r"\1***", _LOGIN.sub(r"\1", text))


def scrub(text: str) -> str:
    """``text`` with every absolute path in it cut down to its last part and no secrets in its URLs; a home folder
    becomes ``~``.

    Paths with blanks are known as such when they are quoted or the whole text, or begin with a drive.
    """
    text = _FILE.sub(r"\1", without_secrets(text))
    home = str(Path.home())
    if len(home) > 1:
        text = re.sub(re.escape(home) + r"(?![\w./\\-])", "~", text)
    text = _DRIVE.sub("", _DRIVE_HOME.sub("~", text))
    text = _QUOTED.sub(r"\1\2\1", _HOME.sub("~", text))
    if _WHOLE.fullmatch(text):
        return re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return _ABSOLUTE.sub("", text)


def plain(value: Any) -> Any:
    """``value`` as JSON values: numbers out of tensors, no NaN or infinity (null), no absolute paths, else its text."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [plain(item) for item in value]
    return scrub(str(value))


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file, or no readable object in it."""
    try:
        return files.read_json(path, CheckpointError, "record of a run")
    except CheckpointError:
        return {}


def config_hash(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings without places: equal on every machine for the same recipe and values."""
    kept = {key: value for key, value in plain(settings).items() if key not in PLACES}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def file_hash(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a file's contents; None where there is no file."""
    return files.hash_file(path) if Path(path).is_file() else None


def versions() -> dict[str, str | None]:
    """Versions of this package, Python and what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"samseg_monai": samseg_monai.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Processor name, usable cores, system, and the GPUs' names."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": platform.system(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def peak_memory_mb() -> dict[str, float]:
    """Largest resident memory of this process so far, and largest GPU memory allocated, in MB (10^6 bytes)."""
    peak = {"ram": round(ram / 1e6, 1)} if (ram := peak_memory()) else {}
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peak
