"""Read a SAM weights file of any common layout into one flat state dict, or say what the file really is."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from samseg_monai.errors import WeightsError
from samseg_monai.sam.weights.layouts import official_names

WRAPPERS = ("model", "state_dict", "model_state_dict", "model_state")  # MedSAM saves "model", Lightning "state_dict"
ZIP_START, PICKLE_START = b"PK\x03\x04", b"\x80"  # torch.save since 1.6, and before


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.pth``/``.pt`` or ``.safetensors`` file by name, on the CPU, floating ones as float32.

    Knows plain SAM files, MedSAM's layouts (``{"model": ...}``, ``{"state_dict": ...}``), any prefix that all names
    share, and Hugging Face's names, which become SAM's own (see ``layouts``). Files of SAMed and SAM-LST keep their
    names. Never runs code from the file (``weights_only=True``).

    Raises: WeightsError if the file is absent, empty, truncated, a git-lfs pointer or a web page, or holds anything but
        tensors.
    """
    path = Path(path).expanduser()
    content = _unwrap(_read(path))
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds no state dict but {_describe(content)}: save the model's state_dict()")
    others = [str(name) for name, value in content.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise WeightsError(
            f"{path} holds no state dict of tensors; these entries are none: {', '.join(others)}. "
            "Save the model's state_dict()"
        )
    state = official_names({str(name): value for name, value in content.items()})
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _read(path: Path) -> object:
    if not path.is_file():
        raise WeightsError(f"{path} does not exist")
    with path.open("rb") as stream:
        head = stream.read(512)
    size = path.stat().st_size
    if not head:
        raise WeightsError(f"{path} is empty (0 bytes): get the file again")
    if head.startswith(b"version https://git-lfs"):
        raise WeightsError(
            f"{path} is a git-lfs pointer of {size} bytes, not the weights: run 'git lfs pull' where it came from"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise WeightsError(
            f"{path} is a web page ({size} bytes) saved under the name of a weights file: download it again"
        )
    damaged = f"{path} cannot be read ({size:,} bytes); it looks truncated or damaged: get it again"
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f"{damaged} ({error})") from error
    archive = zipfile.is_zipfile(path)
    if head.startswith(ZIP_START) and not archive:  # the table of contents is at the end of a zip file
        raise WeightsError(f"{damaged} (the end of the archive is missing)")
    if not head.startswith((ZIP_START, PICKLE_START)):
        raise WeightsError(f"{damaged} (neither torch.save nor safetensors wrote it)")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} is no file of tensors only, and reading anything else would run code from it: "
            f"save the model's state_dict() with torch.save ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise WeightsError(
            f"{damaged} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _unwrap(content: object) -> object:
    """The innermost state dict of a training checkpoint (next to which optimiser, epoch and the like are dropped)."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    return content


def _describe(content: object) -> str:
    return "an empty table" if isinstance(content, Mapping) else f"a {type(content).__name__}"
