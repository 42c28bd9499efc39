"""What a datalist and its files say of themselves: the facts that the settings of a new task follow from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from nibabel.orientations import io_orientation
from tqdm import tqdm

from samseg_monai.data import IMAGES
from samseg_monai.data.datalists import labels_of, load_datalist, read_datalist
from samseg_monai.data.datalists.label_maps import BACKGROUND, OTHER, is_ignored
from samseg_monai.data.datalists.splits import SECTIONS
from samseg_monai.data.files.dicom import read_any, read_any_grid
from samseg_monai.data.files.images import read_image
from samseg_monai.data.files.volumes import stored_like
from samseg_monai.errors import DataError, raise_all

MOST_READ = 20  # training cases whose intensities are read; the grid of every case is
_KEPT = 20_000  # labelled voxels of a case that percentiles are taken of
_PERCENTILES = (0.5, 99.5)  # as nnU-Net clips CT (Isensee et al., Nature Methods 2021)
Item = Mapping[str, Any]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """Facts of a data set.

    Attributes:
        dataset: name of the folder of the data.
        images: 2-D images, not volumes.
        modality: as the datalist names it; it may be empty.
        scans, classes: names, classes in the order of their values, without the background.
        cases: section -> number of cases.
        read: training cases whose voxels were read, evenly spread over the list.
        shapes: distinct sizes: of volumes along right-left, back-front and bottom-top; of images rows, columns.
        spacings_mm: median size of a voxel along the same axes.
        lowest, highest: median over the cases of their extreme intensities (first scan).
        zeros: median fraction of voxels that are exactly 0 in all scans of a case.
        inside: 0.5 and 99.5 percentile of the intensities (first scan) of labelled voxels; None without any.
        unit: of distances, "mm" or "px".
    """

    dataset: str
    images: bool
    modality: str
    scans: tuple[str, ...]
    classes: tuple[str, ...]
    cases: dict[str, int]
    read: int
    shapes: tuple[tuple[int, ...], ...]
    spacings_mm: tuple[float, ...]
    lowest: float
    highest: float
    zeros: float
    inside: tuple[float, float] | None
    unit: str


@dataclass(frozen=True)
class _Case:
    lowest: float
    highest: float
    zeros: float
    inside: np.ndarray  # (N,) intensities of labelled voxels
    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...]


def measure(datalist: str | Path, dataset_dir: str | Path, *, num_threads: int = 2, progress: bool = False) -> Measured:
    """Read the grids of all cases of a datalist, and the voxels of up to 20 training cases.

    Args:
        datalist: file that ``samseg prepare`` has written.
        dataset_dir: folder that its paths are relative to.
        num_threads: cases read at the same time.
        progress: show a bar.

    Raises:
        DataError: no such datalist, no training cases, labels or scans that nobody has named; missing and unreadable
            files, all at once.
    """
    content = read_datalist(datalist)
    labels = {int(value): name for value, name in labels_of(datalist).items()}
    classes = {value: name for value, name in sorted(labels.items()) if name not in (BACKGROUND, OTHER)}
    named = {value: name for value, name in classes.items() if value and not is_ignored(name)}
    if not named:
        raise DataError(f"{datalist}: its labels name no class, only {', '.join(labels.values())}; prepare it again")
    items = {section: load_datalist(datalist, dataset_dir, section) for section in SECTIONS if content[section]}
    if "training" not in items:
        raise DataError(f"{datalist}: no case to train with; prepare it with another split")
    images = content.get("kind") == IMAGES
    training = items["training"]
    chosen = [training[i] for i in np.linspace(0, len(training) - 1, min(MOST_READ, len(training)), dtype=int)]
    read = _each(
        lambda item: _read(item, images, set(named), content.get("spacing_mm")), chosen, datalist, num_threads, progress
    )
    if images:
        stored = content.get("sizes") or {}
        grids = [(tuple(size), read[0].spacing_mm) for size in stored.values()] or [
            (c.shape, c.spacing_mm) for c in read
        ]
    else:
        every = [item for members in items.values() for item in members]
        grids = _each(lambda item: _grid(_files(item)[0]), every, datalist, num_threads, progress)
    inside = np.concatenate([case.inside for case in read])
    return Measured(
        dataset=Path(dataset_dir).resolve().name,
        images=images,
        modality=str(content.get("modality") or ""),
        scans=tuple(content.get("scans") or _scans(training[0], datalist)),
        classes=tuple(dict.fromkeys(named.values())),
        cases={section: len(members) for section, members in items.items()},
        read=len(read),
        shapes=tuple(sorted({tuple(map(int, shape)) for shape, _ in grids})),
        spacings_mm=tuple(round(float(s), 3) for s in np.median([spacing for _, spacing in grids], axis=0)),
        lowest=float(np.median([case.lowest for case in read])),
        highest=float(np.median([case.highest for case in read])),
        zeros=float(np.median([case.zeros for case in read])),
        inside=tuple(map(float, np.percentile(inside, _PERCENTILES))) if inside.size else None,  # type: ignore[arg-type]
        unit=str(content.get("distance_unit") or "mm"),
    )


def _each(
    job: Callable[[Item], Result], items: Sequence[Item], datalist: str | Path, num_threads: int, progress: bool
) -> list[Result]:
    """``job`` of every case; DataError for all that fail."""

    def attempt(item: Item) -> tuple[Result | None, str]:
        try:
            return job(item), ""
        except DataError as error:
            return None, f"{item['case']}: {error}"

    with ThreadPoolExecutor(max_workers=max(1, num_threads)) as pool:
        done = list(tqdm(pool.map(attempt, items), "measuring cases", len(items), disable=not progress))
    bad = [problem for _, problem in done if problem]
    raise_all(bad, DataError, f"{datalist}: cases cannot be measured", cases=len(items))
    return [result for result, _ in done if result is not None]


def _files(item: Item) -> list[str]:
    return [item["image"]] if isinstance(item["image"], str) else list(item["image"])


def _scans(item: Item, datalist: str | Path) -> list[str]:
    if len(_files(item)) > 1:
        raise DataError(f'{datalist}: names no scans for the {len(_files(item))} files of a case; add "scans": [...]')
    return ["image"]


def _grid(file: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and size of a voxel in mm along right-left, back-front and bottom-top."""
    shape, affine = read_any_grid(file)
    axes = io_orientation(affine)[:, 0]
    if np.isnan(axes).any():
        raise DataError(f"{Path(file).name}: its affine is singular; mend the header")
    sides = np.linalg.norm(affine[:3, :3], axis=0)
    order = np.argsort(axes)
    return tuple(int(shape[i]) for i in order), tuple(float(sides[i]) for i in order)


def _read(item: Item, images: bool, values: set[int], spacing: float | None) -> _Case:
    def load(file: str) -> Any:
        return read_image(file, spacing) if images else read_any(Path(file))

    volumes = [load(file) for file in _files(item)]
    arrays = [volume.array for volume in volumes]
    first = arrays[0] if arrays[0].ndim == 3 else arrays[0][..., 0]
    if len({array.shape for array in arrays}) > 1:
        raise DataError(f"scans of unequal shape {' and '.join(str(array.shape) for array in arrays)}")
    zero = np.all([(array == 0) if array.ndim == 3 else (array == 0).all(axis=-1) for array in arrays], axis=0)
    label = np.zeros(first.shape)
    if item.get("label"):
        stored = load(item["label"])
        label = stored.array if images else stored_like(stored, volumes[0])[0].array
    if label.shape != first.shape:
        raise DataError(f"label has shape {label.shape}, the image has {first.shape}")
    inside = first[np.isin(label, list(values))].astype(float)
    return _Case(
        lowest=float(first.min()),
        highest=float(first.max()),
        zeros=float(zero.mean()),
        inside=inside[:: max(1, inside.size // _KEPT)],
        shape=first.shape[:2] if images else first.shape,
        spacing_mm=volumes[0].spacing_mm[:2] if images else volumes[0].spacing_mm,
    )
