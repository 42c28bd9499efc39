"""DICOM series: tags that are missing or contradict each other, slices that are missing, doubled or damaged.

The oracle reads every file with pydicom and compares the tags by the rules of ``dicom.read_series``.
"""

from __future__ import annotations

import copy
import io
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from samseg_monai.data.files.dicom import read_series
from samseg_monai.data.files.volumes import value_problem
from samseg_monai.errors import DataError
from tests.mutations.harness import Trial, damaged, pick

ROWS, COLUMNS, SLICES = 6, 8, 5
SERIES = ("SeriesInstanceUID", "SeriesNumber", "SeriesDate", "SequenceName", "SliceThickness", "Rows", "Columns")


def a_slice(number: int, uid: str, pixels: np.ndarray) -> FileDataset:
    """One axial slice of MR, 2.5 mm above the one before it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", f"{uid}.{number + 1}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset(io.BytesIO(), {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    ds.Modality, ds.PatientID, ds.PatientName = "MR", "1", "A"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = f"{uid}.8", f"{uid}.9", 3
    ds.InstanceNumber, ds.SliceThickness, ds.PixelSpacing = number + 1, 3, [0.9, 1.1]
    ds.ImagePositionPatient, ds.ImageOrientationPatient = [-40, -50, 2.5 * number], [1, 0, 0, 0, 1, 0]
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = ROWS, COLUMNS, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleSlope, ds.RescaleIntercept = 2, -10
    ds.PixelData = pixels.astype("<i2").tobytes()
    return ds


def bytes_of(ds: FileDataset) -> bytes:
    """The file."""
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # values that no standard allows are meant
        ds.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def change(slices: list[FileDataset], rng: random.Random) -> str:
    """Change one or all slices in one way; returns what was done."""
    chosen = slices if rng.random() < 0.3 else [rng.choice(slices)]
    who = "all" if chosen is slices else f"slice {slices.index(chosen[0])}"
    how = rng.choice(["tag", "tag", "tag", "gap", "twice", "move", "turn", "pixels", "gone", "size"])
    if how == "gone":
        slices.remove(chosen[0])
        return f"{who}: first taken away"
    if how == "twice":
        slices.append(copy.deepcopy(chosen[0]))
        return f"{who}: doubled"
    if how in ("gap", "move"):
        by = pick(rng, 0.01, 0.1, 0.2, 1.0, 2.5, 5.0, -2.5, 1e6)
        axis = 2 if how == "gap" else rng.choice((0, 1))
        for ds in chosen:
            if "ImagePositionPatient" in ds and ds.ImagePositionPatient is not None:
                place = [float(x) for x in ds.ImagePositionPatient]
                place[axis] += by
                ds.ImagePositionPatient = place
        return f"{who}: moved by {by} on axis {axis}"
    name, value = "", None
    if how == "turn":
        name, value = "ImageOrientationPatient", pick(
            rng, [1, 0, 0, 0, 0, -1], [0.9999, 0.0141, 0, -0.0141, 0.9999, 0], [1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0],
            [2, 0, 0, 0, 2, 0], [1, 0, 0, 0, 1],
        )  # fmt: skip
    elif how == "pixels":
        for ds in chosen:
            ds.PixelData = pick(rng, ds.PixelData[:-2], ds.PixelData[:10], b"", ds.PixelData + b"\0\0", bytes(96))
        return f"{who}: other pixels"
    elif how == "size":
        name, value = rng.choice([
            ("Rows", 4), ("Columns", 3), ("BitsAllocated", 8), ("PixelRepresentation", 0), ("SamplesPerPixel", 3),
            ("NumberOfFrames", 2), ("BitsStored", 12), ("HighBit", 3), ("Rows", 0), ("Columns", 60000),
        ])  # fmt: skip
    else:
        name = rng.choice([
            "SeriesInstanceUID", "SeriesNumber", "SliceThickness", "PixelSpacing", "ImagePositionPatient",
            "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept", "Modality", "Rows", "PixelData",
            "InstanceNumber", "PhotometricInterpretation", "SeriesDate", "SequenceName",
        ])  # fmt: skip
        value = {
            "SeriesInstanceUID": "1.2.3", "SeriesNumber": 4, "SliceThickness": pick(rng, 1, 0, -3),
            "PixelSpacing": pick(rng, [0.9, 1.2], [0, 1], [-0.9, 1.1], [0.001, 0.001], [30, 30], [0.9]),
            "ImagePositionPatient": pick(rng, [0, 0], [1, 2, 3], []), "RescaleSlope": pick(rng, 0, 1, -1, 1e30, 3),
            "RescaleIntercept": pick(rng, 0, 1e30, -1024), "Modality": pick(rng, "CT", ""), "InstanceNumber": 7,
            "PhotometricInterpretation": pick(rng, "MONOCHROME1", "RGB", "PALETTE COLOR"), "SeriesDate": "20200101",
            "SequenceName": "ep2d",
        }.get(name)  # fmt: skip
        value = None if rng.random() < 0.25 else value
    for ds in chosen:
        if value is None and name in ds:
            delattr(ds, name)
        elif value is not None:
            setattr(ds, name, value)
    return f"{who}: {name} -> {value}"


def _text(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Another text of the same length in place of a number of the header, which no library would write."""
    old, new = rng.choice([
        (b"0.9\\1.1 ", b"nan\\1.1 "), (b"0.9\\1.1 ", b"0.9\\inf "), (b"0.9\\1.1 ", b"0.9,1.1 "), (b"-10 ", b"nan "),
        (b"-10 ", b"abc "), (b"-40\\-50\\", b"-40\\nan\\"), (b"-40\\-50\\", b"-40\\abc\\"),
        (b"MONOCHROME2 ", b"MONOCHROMEX "),
    ])  # fmt: skip
    return f"{old!r} -> {new!r}", content.replace(old, new, 1)


def rule_of(files: dict[str, bytes]) -> tuple[str | None, dict[str, Any]]:
    """Why the rules refuse a folder, None where damage cannot be seen; what has to come of it: array and affine."""
    found = []
    for name, content in files.items():
        reason, ds = _one(name, content)
        if reason:
            return reason, {}
        found.append(ds)
    if len(found) < 2:
        return "fewer than two slices", {}
    first = found[0]
    axes = np.array(first.ImageOrientationPatient, dtype=float)
    for ds in found:
        if np.abs(np.array(ds.ImageOrientationPatient, dtype=float) - axes).max() > 1e-3:
            return "two orientations", {}
        for tag in SERIES:
            if str(ds.get(tag) or "").strip() != str(first.get(tag) or "").strip():
                return f"two values of {tag}", {}
        for tag in ("PixelSpacing", "BitsAllocated"):
            if np.abs(np.subtract(_list(ds.get(tag)), _list(first.get(tag)))).max() > 5e-5:
                return f"two values of {tag}", {}
    row, column = axes[:3], axes[3:]
    if abs(np.linalg.norm(row) - 1) > 1e-2 or abs(np.linalg.norm(column) - 1) > 1e-2 or abs(row @ column) > 1e-2:
        return "directions that are none", {}
    normal = np.cross(row, column)
    places = [(float(np.dot(np.array(ds.ImagePositionPatient, dtype=float), normal)), n) for n, ds in enumerate(found)]
    order = [n for _, n in sorted(places)]
    heights = np.sort([place for place, _ in places])
    steps = np.diff(heights)
    if steps.min() < 0.01:
        return "two slices at one place", {}
    if np.abs(heights - np.linspace(heights[0], heights[-1], len(heights))).max() > 0.05 * steps.min():
        return "a gap", {}
    stack = [found[n] for n in order]
    starts = np.array([np.array(ds.ImagePositionPatient, dtype=float) for ds in stack])
    offsets = starts - starts[0]
    spacing = [float(x) for x in _list(first.PixelSpacing)]
    aside = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1).max()
    if aside > 0.5 * min(spacing):
        return "a gantry tilt", {}
    distance = (heights[-1] - heights[0]) / (len(heights) - 1)
    if not all(0.05 <= side <= 20 for side in (*spacing, distance)):
        return f"voxels of {spacing} and {distance} mm", {}
    arrays = [_pixels(ds) for ds in stack]
    array = np.stack(arrays, axis=-1)
    if not np.isfinite(array).all() or np.abs(array).max() > np.finfo(np.float32).max or array.min() == array.max():
        return "values of no image", {}
    affine = np.eye(4)
    affine[:3, :3] = np.stack([row * spacing[1], column * spacing[0], normal * distance], axis=1)
    affine[:3, 3] = starts[0]
    affine[:2] *= -1
    kinds = {(ds.get("BitsStored"), ds.get("HighBit"), ds.PixelRepresentation, str(ds.get("RescaleSlope")),
              str(ds.get("RescaleIntercept")), ds.PhotometricInterpretation) for ds in found}  # fmt: skip
    if len({kind[-1] for kind in kinds}) > 1:
        return "a slice in negative", {}
    # ITK chooses the type of numbers by these, and other types are refused
    rule = None if len(kinds) > 1 else ""
    return rule, {"array": array, "affine": affine, "aside": aside}


def _list(value: Any) -> list[float]:
    return [float(x) for x in (value if isinstance(value, (list, pydicom.multival.MultiValue)) else [value])]


def _pixels(ds: Any) -> np.ndarray:
    """Values (column, row) in the units of slope and intercept."""
    kind = {(16, 1): "<i2", (16, 0): "<u2", (8, 0): "u1", (8, 1): "i1"}[ds.BitsAllocated, ds.PixelRepresentation]
    raw = np.frombuffer(ds.PixelData, kind, ds.Rows * ds.Columns).reshape(ds.Rows, ds.Columns).astype(float)
    if ds.PhotometricInterpretation == "MONOCHROME1":  # the negative: its lowest value for its highest
        raw = 2.0 ** ds.get("BitsStored", 16) - 1 - raw if ds.PixelRepresentation == 0 else -1 - raw
    return (raw * float(ds.get("RescaleSlope", 1)) + float(ds.get("RescaleIntercept", 0))).T


def _one(name: str, content: bytes) -> tuple[str | None, Any]:
    """Why one file is no slice, and its tags."""
    if content[128:132] != b"DICM":
        return f"{name}: no DICOM", None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(io.BytesIO(content))
            ds.decode()
            numbers = {n: _list(ds.get(n)) for n in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")}
            scale = [float(ds.get("RescaleSlope", 1)), float(ds.get("RescaleIntercept", 0))]
            size = [int(ds[n].value) for n in ("Rows", "Columns", "BitsAllocated", "PixelRepresentation")]
            kind = (int(ds.get("SamplesPerPixel", 1)), int(ds.get("NumberOfFrames") or 1))
            length = len(ds.PixelData)
    except Exception as error:  # noqa: BLE001  pydicom has no error of its own
        return f"{name}: {type(error).__name__} {error}"[:200], None
    if any(len(numbers[n]) != count for n, count in
           (("ImagePositionPatient", 3), ("ImageOrientationPatient", 6), ("PixelSpacing", 2))):  # fmt: skip
        return f"{name}: {numbers}", None
    if (
        not all(math.isfinite(number) for group in (*numbers.values(), scale) for number in group)
        or min(numbers["PixelSpacing"]) <= 0
    ):
        return f"{name}: {numbers} {scale}", None
    if kind != (1, 1) or min(size[:2]) < 1 or size[2] not in (8, 16) or size[3] not in (0, 1) or scale[0] == 0:
        return f"{name}: {kind} {size} {scale}", None
    if str(ds.get("PhotometricInterpretation")) not in ("MONOCHROME1", "MONOCHROME2"):
        return f"{name}: {ds.get('PhotometricInterpretation')}", None
    line = size[1] * size[2] // 8
    if not size[0] * line <= length < size[0] * line + line:
        return f"{name}: {length} bytes of pixels for {size}", None
    return "", ds


def make(folder: Path) -> Any:
    """Folders of five slices, one of which may be damaged as a file."""
    uid = generate_uid(prefix="1.2.826.0.1.3680043.8.498.", entropy_srcs=["mutations"])[:50]
    count = [0]

    def trial(rng: random.Random) -> Trial:
        values = np.array([rng.randrange(-300, 300) for _ in range(ROWS * COLUMNS * SLICES)])
        slices = [a_slice(n, uid, part) for n, part in enumerate(values.reshape(SLICES, ROWS, COLUMNS))]
        told = [change(slices, rng) for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        files = {f"s{rng.randrange(1000):03d}_{n}.dcm": bytes_of(ds) for n, ds in enumerate(slices)}
        hurt = None
        if files and rng.random() < 0.25:
            hurt = rng.choice(sorted(files))
            how, files[hurt] = (_text if rng.random() < 0.4 else damaged)(files[hurt], rng)
            told.append(f"{hurt}: {how}")
        count[0] += 1
        place = folder / f"series{count[0]}"
        place.mkdir()
        for name, content in files.items():
            (place / name).write_bytes(content)
        rule, expected = rule_of(files)
        if told and "bytes [" in told[-1]:  # of tags that nobody uses, or of pixels
            rule = None
        return Trial("; ".join(told), lambda: _read(place), rule, lambda found: _differs(found, expected))

    return trial


def _read(place: Path) -> Any:
    volume = read_series(place)
    if problem := value_problem(volume.array):
        raise DataError(problem)
    return volume


def _differs(volume: Any, expected: dict[str, Any]) -> str:
    if not expected:  # left open
        return ""
    array, affine = expected["array"], expected["affine"]
    if volume.array.shape != array.shape or not np.allclose(volume.array, array, rtol=1e-5):
        return f"array {volume.array.shape} is not that of the files {array.shape}"
    if not np.allclose(volume.affine, affine, rtol=1e-3, atol=0.02 + expected["aside"]):
        return f"affine {volume.affine.round(4).tolist()} in place of {affine.round(4).tolist()}"
    return ""
