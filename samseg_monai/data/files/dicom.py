"""Read a folder of DICOM slices as one volume, and say in plain words why it is none.

MONAI gives a folder to ITK's GDCM reader, which without an error takes one of several series, passes over damaged files
and spreads the slices evenly across a gap. Here every file is read and all positions are compared first, so that what
passes is what ``LoadImaged`` loads: the same voxels in the same order with the same affine.

The distance between slices comes from their positions (0020,0032), never from the slice thickness (0018,0050), which
is the larger of the two where slices overlap.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os.path
import warnings
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pydicom.config
import pydicom.misc
import SimpleITK as sitk
from pydicom.dataelem import RawDataElement

from samseg_monai.data.files.volumes import (
    Volume,
    content_of,
    from_itk,
    is_dead_link,
    last_line,
    read_grid,
    read_volume,
    size_problem,
    stem_of,
)
from samseg_monai.errors import DataError, raise_all
from samseg_monai.files import known_hash

# what both would tell on stderr of contradictory tags is checked and told here
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
logging.getLogger("pydicom").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pydicom")
sitk.ProcessObject.SetGlobalWarningDisplay(False)
_SAME_PLACE_MM = 0.01
_SAME_DIRECTION = 1e-3  # of direction cosines; 0.06 degrees
_EVEN = 0.05  # of the distance between slices: positions are stored rounded
_CONVERT = "convert it to NIfTI with a tool that handles this, such as dcm2niix, and give that file"
NEGATIVE = "MONOCHROME1"
IS_NEGATIVE = f"is {NEGATIVE} (small values are white): it is read as its negative, in which large values are white"
# what MONAI's ITKReader tells series apart by; where one of these varies it loads only a part
_SERIES_TAGS = {
    "series instance UID": "SeriesInstanceUID",
    "series number": "SeriesNumber",
    "series date": "SeriesDate",
    "sequence name": "SequenceName",
    "slice thickness": "SliceThickness",
    "rows": "Rows",
    "columns": "Columns",
}
# beginnings of the media storage class (0002,0002), PS3.4 annex B.5
_NOT_IMAGES = {
    "1.2.840.10008.5.1.4.1.1.481.3": "a radiotherapy structure set (RTSTRUCT)",
    "1.2.840.10008.5.1.4.1.1.481": "a radiotherapy object",
    "1.2.840.10008.5.1.4.1.1.88": "a structured report",
    "1.2.840.10008.5.1.4.1.1.11": "a presentation state",
    "1.2.840.10008.5.1.4.1.1.104": "an encapsulated document",
    "1.2.840.10008.5.1.4.1.1.66": "raw, registration or segmentation data",
    "1.2.840.10008.5.1.4.1.1.9": "a waveform",
}


@dataclass(frozen=True)
class Slice:
    """Header of one file.

    Attributes:
        position: (3,) of the first pixel, and ``axes`` (2, 3): directions of rows and columns, in LPS mm.
        instance: instance number (0020,0013) as it stands there: viewers show it, and it may run either way.
    """

    name: str
    details: tuple[str, ...]
    position: np.ndarray
    axes: np.ndarray
    pixel_mm: tuple[float, float]
    pixel_type: str
    digest: bytes
    modality: str
    instance: str

    @property
    def place_mm(self) -> float:
        """Position along the normal of the slices."""
        return float(self.position @ np.cross(*self.axes))


def is_dicom(path: str | Path) -> bool:
    """Whether a file calls itself DICOM: ``DICM`` at byte 128, or the suffix .dcm; a DICOMDIR is but an index."""
    path = Path(path)
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or stem_of(path) is not None or not path.is_file():
        return False
    try:
        return path.suffix.lower() == ".dcm" or pydicom.misc.is_dicom(path)
    except OSError:
        return False


def holds_series(folder: str | Path) -> bool:
    """Whether a DICOM file, whatever its name, lies in ``folder`` itself."""
    return any(is_dicom(path) for path in sorted(Path(folder).iterdir()))


def read_series(folder: str | Path) -> Volume:
    """Read the one series in ``folder``, every file to its last byte, slices in the order of their positions.

    Returns: array (X, Y, Z) = (column, row, slice), in the units of the rescale slope and intercept (HU for CT); slices
        ascend along the cross product of the row and column directions (0020,0037): in the usual axial slices from the
        feet upwards, in the usual coronal ones from the front, in the usual sagittal ones from the patient's left.
        ``sha256`` is that of ``hash_of``. ``notes`` says when there are only two slices.

    Raises:
        DataError: a file is damaged, a link that leads nowhere, no image, in colour or multi-frame, or its pixels are
            not as many as its tags say; several series or orientations; slices at one place, a gap, a gantry tilt;
            fewer than two slices; voxels of a size that is none.
    """
    folder = Path(folder)
    slices = slices_of(folder)
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames([str(folder / piece.name) for piece in slices])
    try:
        array, affine = from_itk(reader.Execute())
    except RuntimeError as error:
        raise DataError(f"{folder.name}: its pixels cannot be decoded ({last_line(error)}); {_CONVERT}") from error
    if problem := size_problem(affine, array.shape):
        raise DataError(f"{folder.name}: {problem}")
    sha256 = _together(piece.digest for piece in slices)
    notes = [f"{folder.name}: has only 2 slices; is the series complete?"] if len(slices) == 2 else []
    if slices[0].pixel_type.endswith(NEGATIVE):
        notes.append(f"{folder.name}: {IS_NEGATIVE}")
    return Volume(array, affine, sha256, tuple(notes), slices[0].modality)


def _headers(folder: Path, paths: Collection[Path]) -> list[Slice]:
    found, problems = [], []
    for path in sorted(paths):
        try:
            found.append(_read_header(path, content_of(path)))
        except DataError as error:
            problems.append(str(error))
    raise_all(problems, DataError, f"{folder.name}: not every file is a slice; copy them again, or move them elsewhere")
    return found


def slices_of(folder: Path) -> list[Slice]:
    """Headers of the slices of the one series in ``folder``, in the order in which ``read_series`` stacks them.

    Number k of a box file is the k-th of them, from 0. Raises: as ``read_series``, but for pixels and sizes.
    """
    found = _headers(folder, _files(folder, []))
    listed = _listed_by_gdcm(folder)  # which takes much memory for a damaged file
    found += _headers(folder, {*_files(folder, listed)} - {folder / piece.name for piece in found})
    if len(found) < 2:
        raise DataError(f"{folder.name}: {len(found)} DICOM slice, which is no volume; give the whole series")
    _check_one_series(folder.name, found, len(listed))
    return _in_order(folder.name, found)


def read_any(path: Path) -> Volume:
    """Read one volume: a folder as the DICOM series in it, a file as what it is; DataError as its reader's."""
    return read_series(path) if os.path.isdir(path) else read_volume(path)  # which raises for no name, however long


def read_any_grid(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine as of ``volumes.read_grid``; of a folder those of its series, which is read for it."""
    if not Path(path).is_dir():
        return read_grid(path)
    volume = read_series(path)
    return volume.array.shape, volume.affine


def hash_of(path: str | Path) -> str:
    """Hexadecimal sha256 of a file, or of the sorted SHA-256 digests of a folder's DICOM files, whatever their names;
    computed again only where sizes or times of change differ.
    """
    path = Path(path)
    if not path.is_dir():
        return known_hash(path)
    return _together(bytes.fromhex(known_hash(file)) for file in _files(path, _listed_by_gdcm(path)))


def _together(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def _files(folder: Path, listed: Sequence[Sequence[Path]]) -> list[Path]:
    """DICOM files in ``folder``, by their names, their content or GDCM, and links that lead nowhere."""
    dead = {path for path in folder.iterdir() if is_dead_link(path) and not path.name.startswith(".")}
    return sorted({path for path in folder.iterdir() if is_dicom(path)}.union(dead, *listed))


def _listed_by_gdcm(folder: Path) -> list[list[Path]]:
    """Files of each series that GDCM sees, told apart as MONAI's ITKReader does (but for the date)."""
    reader, name = sitk.ImageSeriesReader, str(folder)
    # relative names would come back in GDCM's own spelling
    return [
        [folder / Path(file).name for file in reader.GetGDCMSeriesFileNames(name, series, True)]
        for series in reader.GetGDCMSeriesIDs(name, True)
    ]


def open_dicom(path: Path, content: bytes) -> tuple[pydicom.Dataset, sitk.ImageFileReader]:
    """Tags of a DICOM file, and ITK's reader for its image, which has seen the file to its end.

    Raises:
        DataError: ``<file name>: <reason>``: an object without an image, truncated or damaged.
    """
    try:
        tags: pydicom.Dataset = pydicom.dcmread(io.BytesIO(content), force=True)
        cut = any(len(e.value or b"") < e.length < 0xFFFFFFFF for e in tags.values() if isinstance(e, RawDataElement))
        list(tags)  # each value is parsed when it is first looked at
        uid = str(tags.file_meta.get("MediaStorageSOPClassUID", ""))
    except Exception:  # noqa: BLE001  pydicom has no error of its own for what is no DICOM; ITK says below what it is
        tags, uid, cut = pydicom.Dataset(), "", content.startswith(b"DICM", 128)
    if cut:  # GDCM would take the memory that a damaged length speaks of
        raise DataError(f"{path.name}: truncated or damaged DICOM file; copy it again")
    if kind := without_image(uid):
        raise DataError(f"{path.name}: is {kind}, not a slice of an image")
    if "PixelData" not in tags:
        raise DataError(f"{path.name}: truncated or damaged DICOM file, or one without an image")
    if problem := _pixel_problem(tags):
        raise DataError(f"{path.name}: truncated or damaged DICOM file ({problem}); copy it again")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise DataError(f"{path.name}: truncated or damaged DICOM file, or one without an image") from error
    return tags, reader


def without_image(uid: str) -> str:
    """What the objects of a storage class (SOP class UID) are that hold no image; empty where they may hold one."""
    return next((text for stem, text in _NOT_IMAGES.items() if f"{uid}.".startswith(f"{stem}.")), "")


def _pixel_problem(tags: pydicom.Dataset) -> str:
    """How the length of pixels that are not packed, or the numbers that scale them, contradict the other tags; GDCM
    fills up what is missing and passes over the rest."""
    try:
        told = [int(tags.get(name) or 0) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated")]
        frames, found = int(tags.get("NumberOfFrames") or 1), len(tags.get("PixelData") or b"")
        packed = pydicom.uid.UID(tags.file_meta.TransferSyntaxUID).is_compressed
    except (AttributeError, TypeError, ValueError, OverflowError):
        return ""  # ITK says what it is
    needed, line = math.prod(told) * frames // 8, math.prod(told[1:]) // 8
    half = str(tags.get("PhotometricInterpretation", "")).startswith("YBR_FULL_422")
    if not packed and not half and not needed <= found < needed + max(2, line):
        return f"{found} bytes of pixels, where its tags speak of {needed}"
    scale = [_numbers(tags, f"Rescale{name}", 1) for name in ("Slope", "Intercept") if f"Rescale{name}" in tags]
    if any(number is None for number in scale) or ("RescaleSlope" in tags and not np.any(scale[0])):
        return f"rescaled by {_text(tags, 'RescaleSlope')} and {_text(tags, 'RescaleIntercept')}"
    spacing = _numbers(tags, "PixelSpacing", 2)
    if _text(tags, "PixelSpacing") and not (spacing is not None and spacing.min() > 0):
        return f"pixels of {_text(tags, 'PixelSpacing')} mm"
    return ""


def _text(tags: pydicom.Dataset, name: str) -> str:
    try:
        return str(tags.get(name) or "").strip()
    except (TypeError, ValueError):  # a number that is none
        return "nonsense"


def modality_of(tags: pydicom.Dataset) -> str:
    """Modality (0008,0060), empty where the file does not tell it."""
    return _text(tags, "Modality")


def _read_header(path: Path, content: bytes) -> Slice:
    tags, reader = open_dicom(path, content)
    if not content.startswith(b"DICM", 128):  # GDCM lists such a file, but ITK then finds no reader for it
        raise DataError(f"{path.name}: has no DICOM preamble (DICM at byte 128); {_CONVERT}")
    if reader.GetNumberOfComponents() != 1:
        raise DataError(f"{path.name}: is in colour ({reader.GetNumberOfComponents()} values per pixel)")
    if (frames := int(np.prod(reader.GetSize()[2:]))) != 1:
        raise DataError(f"{path.name}: holds {frames} frames in one file, expected one slice; {_CONVERT}")
    colours = _text(tags, "PhotometricInterpretation")
    if colours not in (NEGATIVE, "MONOCHROME2"):
        raise DataError(f"{path.name}: its grey values are {colours or 'not told'} (0028,0004), expected MONOCHROME2")
    position, axes = (_numbers(tags, f"Image{what}Patient", n) for what, n in (("Position", 3), ("Orientation", 6)))
    if position is None or axes is None:
        raise DataError(f"{path.name}: has no position or orientation in the patient (0020,0032 and 0020,0037)")
    if not _text(tags, "PixelSpacing"):
        raise DataError(f"{path.name}: does not tell the size of its pixels (0028,0030)")
    return Slice(
        name=path.name,
        details=tuple(_text(tags, name) for name in _SERIES_TAGS.values()),
        position=position,
        axes=axes.reshape(2, 3),
        pixel_mm=(float(reader.GetSpacing()[0]), float(reader.GetSpacing()[1])),
        pixel_type=sitk.GetPixelIDValueAsString(reader.GetPixelID()) + f", {NEGATIVE}" * (colours == NEGATIVE),
        digest=hashlib.sha256(content).digest(),
        modality=modality_of(tags),
        instance=_text(tags, "InstanceNumber"),
    )


def _numbers(tags: pydicom.Dataset, name: str, count: int) -> np.ndarray | None:
    try:
        values = np.array(tags.get(name), dtype=float).reshape(-1)
    except (TypeError, ValueError):
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def _check_one_series(folder: str, slices: Sequence[Slice], listed: int) -> None:
    """Refuse what ITK would divide, or would stack although it does not belong together."""
    first = slices[0]
    for other in slices:
        if np.abs(other.axes - first.axes).max() > _SAME_DIRECTION:
            cosines = " and ".join(f"{np.round(s.axes, 3).ravel().tolist()} ({s.name})" for s in (first, other))
            raise DataError(f"{folder}: holds slices of two orientations, {cosines}; put each into its own folder")
    for number, tag in enumerate(_SERIES_TAGS):
        examples = {piece.details[number]: piece.name for piece in reversed(slices)}
        if len(examples) > 1:
            parts = ", ".join(
                f"{value or 'none'} ({sum(s.details[number] == value for s in slices)} slices, such as {name})"
                for value, name in sorted(examples.items())
            )
            raise DataError(
                f"{folder}: holds {len(examples)} series, which differ in their {tag}: {parts}; put each into its own "
                f"folder or, if they are one volume, {_CONVERT}"
            )
    for what, values in (
        ("pixel sizes", {tuple(np.round(s.pixel_mm, 4).tolist()): s.name for s in slices}),
        ("kinds of numbers", {s.pixel_type: s.name for s in slices}),
    ):
        if len(values) > 1:
            parts = ", ".join(f"{value} ({name})" for value, name in values.items())
            raise DataError(f"{folder}: its slices have different {what}: {parts}; {_CONVERT}")
    if listed > 1:
        raise DataError(f"{folder}: ITK divides it into {listed} series; {_CONVERT}")


def _in_order(folder: str, found: Sequence[Slice]) -> list[Slice]:
    """Slices by ascending position along their normal; refused unless evenly spaced and stacked at right angles."""
    normal = np.cross(*found[0].axes)
    slices = sorted(found, key=lambda piece: float(piece.position @ normal))
    places = np.array([piece.position @ normal for piece in slices])
    steps = np.diff(places)
    if steps.min() < _SAME_PLACE_MM:
        k = int(steps.argmin())
        here = [
            piece.name for piece, place in zip(slices, places, strict=True) if abs(place - places[k]) < _SAME_PLACE_MM
        ]
        raise DataError(
            f"{folder}: {len(here)} slices lie at the same position ({places[k]:.2f} mm): {', '.join(here[:4])}; they "
            "are copies, phases or time points: keep one slice for each position"
        )
    _check_even(folder, slices, places)
    _check_upright(folder, slices, normal)
    return slices


def _check_even(folder: str, slices: Sequence[Slice], places: np.ndarray) -> None:
    steps = np.diff(places)
    uneven = np.abs(places - np.linspace(places[0], places[-1], len(places))).max()
    if uneven <= _EVEN * steps.min():
        return
    k, usual = int(steps.argmax()), float(np.median(steps)) if len(steps) > 2 else float(steps.min())
    between = f"{steps[k]:.4g} mm lie between {slices[k].name} and {slices[k + 1].name}"
    missing = round(float(steps[k]) / usual) - 1
    if missing > 0 and abs(steps[k] - (missing + 1) * usual) <= _EVEN * usual:
        raise DataError(
            f"{folder}: its slices are {usual:.4g} mm apart, but {between}: {missing} missing; copy the whole series"
        )
    raise DataError(
        f"{folder}: its slices are not evenly spaced, {steps.min():.4g} to {steps.max():.4g} mm apart ({between}); "
        "copy the whole series, or resample it to even spacing"
    )


def _check_upright(folder: str, slices: Sequence[Slice], normal: np.ndarray) -> None:
    """Sheared stacks are read by ITK as if they were upright: no voxel may be misplaced by more than half a pixel."""
    offsets = np.array([piece.position - slices[0].position for piece in slices])
    sideways = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if sideways.max() > 0.5 * min(slices[0].pixel_mm):
        k = int(sideways.argmax())
        angle = float(np.degrees(np.arctan2(sideways[k], offsets[k] @ normal)))
        raise DataError(
            f"{folder}: its slices are not stacked at right angles (gantry tilt of {angle:.1f} degrees, up to "
            f"{sideways[k]:.2f} mm sideways); {_CONVERT}"
        )
