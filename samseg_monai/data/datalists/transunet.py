"""TransUNet's preprocessed Synapse as the volumes that it was made of: ``train_npz``, ``test_vol_h5`` and their lists.

Layout of TransUNet's Drive (arXiv:2102.04306; ``datasets/README.md`` and ``lists/lists_Synapse`` of its code):
``train_npz/case0005_slice000.npz`` and ``test_vol_h5/case0001.npy.h5``, each with ``image`` and ``label``. Scripts that
make such files clip BTCV's CT to -125 to 275 HU, scale that to 0 to 1 and turn (X, Y, Z) into (Z, Y, X). Values are
taken back to HU here. The size of a voxel is in none of these files: it is written as 1 mm, and the datalist says that
distances are in voxels.
"""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from samseg_monai.data.datalists.label_maps import BTCV_TESTING, BTCV_TRAINING
from samseg_monai.errors import DataError, raise_all
from samseg_monai.files import hash_file, write_whole

TRAIN, TEST = ("train_npz", "train"), ("test_vol_h5", "test_vol")  # MERIT and others shorten the names
VOLUMES = "volumes"
_LOWEST, _HIGHEST = -125, 275  # HU
_ROUNDED = 1e-3
_LISTS = ("lists/lists_Synapse", "lists_Synapse", "../lists/lists_Synapse", "../../lists/lists_Synapse")
_AFFINE = np.diag([-1.0, 1.0, 1.0, 1.0])  # BTCV's files point to the left, the front and the head
_MARK = "samseg-monai: of "


def is_preprocessed(src: Path) -> bool:
    """Whether ``src`` holds TransUNet's slices."""
    return any((src / name).is_dir() and next((src / name).glob("case*_slice*.npz"), None) for name in TRAIN)


def write_volumes(src: Path, *, progress: bool = True) -> list[str]:
    """Write ``volumes/img/img0005.nii.gz`` and ``volumes/label/label0005.nii.gz`` below ``src``, those that are new.

    Returns: what a person should know.

    Raises:
        DataError: slices that are missing, named by a list and absent, not numbered from 0, or of unequal size; files
            that cannot be read or hold other values; all at once; no package h5py for the test cases; a folder in which
            nothing can be written.
    """
    slices: dict[str, dict[int, Path]] = {}
    for path in sorted(_first(src, TRAIN).iterdir()):
        if match := re.fullmatch(r"case(\d{4})_slice(\d{3,4})\.npz", path.name):
            slices.setdefault(match[1], {})[int(match[2])] = path
    folder = next((src / name for name in TEST if (src / name).is_dir()), None)
    tests = {path.name[4:8]: path for path in sorted(folder.glob("case????.npy.h5"))} if folder else {}
    both = sorted(set(slices) & set(tests))
    problems = [f"case{case}: lies among the slices to train with and the volumes to test" for case in both]
    swapped = {"test": set(slices) & set(BTCV_TESTING), "train": set(tests) & set(BTCV_TRAINING)}
    problems += [
        f"case{case}: lies among the others, but is published as one to {use}"
        for use in swapped
        for case in swapped[use]
    ]
    notes = _compare_lists(src, slices, tests, problems)
    raise_all(problems, DataError, f"{src}: not TransUNet's preprocessed Synapse")
    target = src / VOLUMES
    sources = {**{case: list(files.values()) for case, files in slices.items()}, **{c: [p] for c, p in tests.items()}}
    for case, files in tqdm(sorted(sources.items()), "volumes", disable=not progress):
        mark = _mark(files)
        paths = {"image": target / f"img/img{case}.nii.gz", "label": target / f"label/label{case}.nii.gz"}
        if all(_is_marked(path, mark) for path in paths.values()):
            continue
        try:
            arrays = _stacked(slices[case]) if case in slices else _read_h5(files[0])
            for name, path in paths.items():
                _write(arrays[name], path, mark)
        except DataError as error:
            problems.append(f"case{case}: {error}")
        except OSError as error:
            raise DataError(f"{target}: cannot be written ({error.strerror}); copy {src} to where it can") from error
    raise_all(problems, DataError, f"{src}: cases that cannot be used")
    return [*notes, "the size of a voxel is not known: it is taken as 1 mm, and distances are in voxels"]


def _first(src: Path, names: Sequence[str]) -> Path:
    return next(src / name for name in names if (src / name).is_dir())


def _compare_lists(
    src: Path, slices: Mapping[str, Mapping[int, Path]], tests: Mapping[str, Path], problems: list[str]
) -> list[str]:
    """What the published lists name and is not there, as ``problems``; where there are none, each case is compared."""
    for case, files in slices.items():
        gaps = sorted(set(range(max(files) + 1)) - set(files))
        if gaps:
            problems.append(f"case{case}: no slices {', '.join(map(str, gaps[:5]))}{' ...' if len(gaps) > 5 else ''}")
    folder = next((src / name for name in _LISTS if (src / name).is_dir()), None)
    if folder is None:
        return ["no lists/lists_Synapse beside the data: whether the last slices of a case are there is not known"]
    for name in ("train.txt", "test_vol.txt"):
        try:
            named = (folder / name).read_text(encoding="utf-8-sig").split()
        except (OSError, ValueError) as error:
            problems.append(f"{folder.name}/{name}: cannot be read ({error})")
            continue
        found = {path.stem for files in slices.values() for path in files.values()} | {f"case{case}" for case in tests}
        if missing := sorted(set(named) - found):
            problems.append(f"{name} names {len(missing)} that are not there: {', '.join(missing[:5])}")
    return []


def _mark(files: Sequence[Path]) -> str:
    """What a volume is made of, for the 80 bytes of a header."""
    digests = "".join(hash_file(path) for path in files)
    return _MARK + hashlib.sha256(digests.encode()).hexdigest()[:40]


def _is_marked(path: Path, mark: str) -> bool:
    try:
        header: Any = nib.load(path).header
    except (OSError, nib.filebasedimages.ImageFileError):
        return False
    return bytes(header["descrip"].item()) == mark.encode()


def _stacked(files: Mapping[int, Path]) -> dict[str, np.ndarray]:
    """Arrays (Z, Y, X) of the slices of a case."""
    pairs = []
    for _, path in sorted(files.items()):
        try:
            with np.load(path, allow_pickle=False) as content:
                pairs.append({name: np.asarray(content[name]) for name in ("image", "label")})
        except (OSError, ValueError, KeyError, EOFError, SyntaxError) as error:
            raise DataError(f"{path.name}: cannot be read as image and label ({error}); copy it again") from error
        except Exception as error:  # zipfile and zlib have errors of their own
            raise DataError(f"{path.name}: damaged ({error}); copy it again") from error
    shapes = {array.shape for pair in pairs for array in pair.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        raise DataError(
            f"its slices have the shapes {', '.join(map(str, sorted(shapes)[:5]))}, expected one of two axes"
        )
    return {name: np.stack([pair[name] for pair in pairs]) for name in ("image", "label")}


def _read_h5(path: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError as error:
        raise DataError(
            f"{path.name}: reading it needs the package h5py; install samseg-monai[h5], or h5py itself"
        ) from error
    try:
        with h5py.File(path, "r") as content:
            arrays = {name: np.asarray(content[name]) for name in ("image", "label")}
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"{path.name}: cannot be read as image and label ({error}); copy it again") from error
    if arrays["image"].ndim != 3 or arrays["image"].shape != arrays["label"].shape:
        raise DataError(f"{path.name}: image and label have the shapes {[a.shape for a in arrays.values()]}")
    return arrays


def _write(array: np.ndarray, path: Path, mark: str) -> None:
    """Write (Z, Y, X) as a volume (X, Y, Z): an image of 0 to 1 in HU, a label as whole numbers."""
    if array.dtype.kind not in "buif" or not np.isfinite(array).all():
        raise DataError("holds values that are no finite numbers; copy it again")
    if path.name.startswith("img"):
        low, high = float(array.min()), float(array.max())
        if low < -_ROUNDED or high > 1 + _ROUNDED:
            raise DataError(f"its image has values from {low:g} to {high:g}, expected 0 to 1; was it made otherwise?")
        values = np.rint(array * (_HIGHEST - _LOWEST) + _LOWEST).astype(np.int16)  # CT numbers are whole
    else:
        values = np.rint(array).astype(np.uint8)
        if (np.abs(array - values) > _ROUNDED).any():
            raise DataError("its label holds other values than whole numbers from 0 to 255")
    image = nib.Nifti1Image(values.transpose(2, 1, 0), _AFFINE)
    image.header["descrip"] = mark.encode()
    content = gzip.compress(image.to_bytes(), compresslevel=3, mtime=0)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
