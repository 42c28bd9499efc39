"""Read one image file completely, and say in plain words what is wrong with it.

A file is read once: the same bytes are hashed, unpacked and parsed, so that a truncated gzip stream or a damaged check
sum is found here and not in the middle of a run. NIfTI goes through nibabel, MHA and NRRD through SimpleITK; both give
arrays in (i, j, k) order and affines to RAS mm, as MONAI's loaders do. Folders of DICOM slices: see ``dicom``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from samseg_monai.errors import DataError

SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".nii.gz", ".nii")
AFFINE_TOLERANCE_MM = 1e-3
_FORM_TOLERANCE_MM = 0.1
_SHEAR_TOLERANCE = 1e-2
_GZIP_MAGIC = b"\x1f\x8b"
_POSTSCRIPT = (b"%!", b"\xc5\xd0\xd3\xc6")  # the latter with a preview, as DOS had it
_HEADER_BYTES = 1 << 20
PHANTOM_MARK = b"samseg-monai phantom"  # in the header of every phantom of the demos


@dataclass(frozen=True)
class Volume:
    """One file, or one series of DICOM slices, as it is stored.

    Attributes:
        array: (X, Y, Z) or (X, Y, Z, C) with C > 1, numbers scaled as the header says.
        affine: (4, 4) float64, voxel indices to RAS mm.
        sha256: of the file's bytes; for a series see ``dicom.read_series``.
        notes: oddities that do not prevent its use.
    """

    array: np.ndarray
    affine: np.ndarray
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size along the three axes."""
        x, y, z = (round(float(length), 4) for length in np.linalg.norm(self.affine[:3, :3], axis=0))
        return x, y, z


def stem_of(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> str | None:
    """File name without a known suffix; None when it is no image or a hidden file (``._`` files of macOS)."""
    name = Path(path).name
    if name.startswith("."):
        return None
    for suffix in suffixes:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


def image_stem(path: str | Path) -> str | None:
    """``stem_of`` a 2-D image: PNG, JPEG, TIFF, BMP, DICOM with a suffix, or NIfTI."""
    return stem_of(path, IMAGE_SUFFIXES)


def read_volume(path: str | Path) -> Volume:
    """Read a NIfTI, MHA or NRRD file to its last byte.

    Raises:
        DataError: ``<file name>: <reason>`` when the file is missing, empty, a git-lfs pointer or a web page, truncated
            or damaged, has fewer than three axes or a singular affine, or holds something other than real numbers.
    """
    path = Path(path)
    content = content_of(path)
    is_nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    array, affine, notes = parse_nifti(path, content) if is_nifti else (*_parse_itk(path, content), ())
    if reason := _unusable(array, affine):
        raise DataError(f"{path.name}: {reason}")
    if array.ndim == 4 and array.shape[3] == 1:  # one scan, as MONAI loads it, too
        array = array[..., 0]
    return Volume(array, affine, hashlib.sha256(content).hexdigest(), notes)


def content_of(path: Path) -> bytes:
    """All bytes of a file that may be an image.

    Raises:
        DataError: ``<file name>: <reason>``: it cannot be read, or is what a failed copy leaves behind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror or error})") from error
    if not content:
        raise DataError(f"{path.name}: the file is empty (0 bytes); copy it again")
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{path.name}: is a git-lfs pointer, not the image; run 'git lfs pull' where it came from")
    if content[:1000].lstrip()[:5].lower() in (b"<html", b"<!doc", b"<?xml"):
        raise DataError(f"{path.name}: is a web page, not an image: the download failed; log in and download it again")
    refuse_foreign(path, content)
    return content


def refuse_foreign(path: Path, content: bytes | None = None) -> None:
    """Refuse a file whose loader would read another file in its place, or run it.

    Args:
        path: file, whatever its name says.
        content: its bytes; None: the first of them are read, which hold any header.

    Raises:
        DataError: ``<file name>: <reason>``: a MetaImage or NRRD header without its voxels, or one that is damaged; a
            PostScript program.
    """
    if content is None:
        with path.open("rb") as stream:
            content = stream.read(_HEADER_BYTES)
    if content.startswith(_POSTSCRIPT):
        raise DataError(f"{path.name}: is a PostScript program, no PNG, JPEG, TIFF or BMP file; save it as an image")
    if not content.startswith(b"NRRD") and not path.name.lower().endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        return
    try:
        named = named_file(content)
    except ValueError as error:
        raise DataError(f"{path.name}: truncated or damaged file ({error}); copy it again") from error
    if named is not None:
        raise DataError(
            f"{path.name}: its header names another file ({named!r}) that would be read in its place; save header and "
            "voxels as one file"
        )


def value_problem(array: np.ndarray, what: str = "voxel") -> str:
    """What makes these intensities unusable: NaN, infinity, one value everywhere; empty when nothing does."""
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            return f"{bad} {what}s are NaN or infinite; replace them, for example with 0"
    low, high = array.min(), array.max()
    return f"every {what} has the value {low:g}: there is no image in it" if low == high else ""


def is_phantom(path: str | Path) -> bool:
    """Whether a NIfTI file was written by ``samseg phantom``; reads its header only."""
    header: Any = nib.load(path).header
    return "descrip" in header and bytes(header["descrip"].item()).startswith(PHANTOM_MARK)


def grid_difference(volume: Volume, reference: Volume) -> str:
    """How the grid of ``volume`` differs from that of ``reference``; empty when shape and affine agree."""
    if volume.array.shape != reference.array.shape:
        return f"shape {volume.array.shape} differs from {reference.array.shape}"
    gap = float(np.abs(volume.affine - reference.affine).max())
    if gap > AFFINE_TOLERANCE_MM:
        texts = (np.array2string(v.affine[:3], precision=3, separator=",") for v in (volume, reference))
        mine, other = (" ".join(text.split()) for text in texts)
        return f"affine differs (by up to {gap:.4g}): {mine} against {other}"
    return ""


def read_grid(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (X, Y, Z) and affine (4, 4) to RAS mm of a file, by its header alone: quick, and blind to damaged voxels.

    Raises:
        DataError: ``<file name>: <reason>``: no header can be read, or it has fewer than three axes.
    """
    path = Path(path)
    try:
        if path.name.lower().endswith((".nii", ".nii.gz")):
            image: Any = nib.load(path)
            shape, affine = tuple(image.shape), np.asarray(image.affine, dtype=float)
        else:
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            shape = reader.GetSize()
            affine = _affine_of(reader) if len(shape) == 3 else np.eye(4)
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise DataError(f"{path.name}: its header cannot be read; copy it again") from error
    if len(shape) < 3:
        raise DataError(f"{path.name}: has {len(shape)} axes, expected 3; save one volume")
    return shape[:3], affine


def from_itk(image: sitk.Image) -> tuple[np.ndarray, np.ndarray]:
    """Array (X, Y, Z[, C]) and affine to RAS mm of a SimpleITK image of three axes, as MONAI's ITKReader gives them."""
    array = sitk.GetArrayFromImage(image)  # (Z, Y, X) or (Z, Y, X, C)
    return array.transpose(2, 1, 0, *range(3, array.ndim)), _affine_of(image)


def _affine_of(image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * np.asarray(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    affine[:2] *= -1  # ITK counts towards left and posterior, NIfTI towards right and anterior
    return affine


def parse_nifti(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Array as stored (any number of axes), affine (4, 4) to RAS mm and notes of a NIfTI file's bytes.

    Raises:
        DataError: truncated or damaged, or packed with gzip although the name says otherwise.
    """
    name = path.name
    packed = content.startswith(_GZIP_MAGIC)
    if packed != name.lower().endswith(".gz"):
        kind, suffix = ("a gzip file", ".nii.gz") if packed else ("not a gzip file", ".nii")
        raise DataError(f"{name}: is {kind}, whatever its name says; rename it to {suffix} if it is a NIfTI file")
    try:
        raw = gzip.decompress(content) if packed else content
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{name}: truncated or damaged gzip file ({error}); copy it again") from error
    if raw[344:347] == b"ni1" or raw[4:7] == b"ni2":
        raise DataError(f"{name}: is the header of a pair of files (.hdr and .img); save it as one NIfTI file")
    version_2 = int.from_bytes(raw[:4], "little") == 540 or int.from_bytes(raw[:4], "big") == 540
    kind_class = nib.Nifti2Image if version_2 else nib.Nifti1Image
    try:
        image = kind_class.from_stream(io.BytesIO(raw))
        told = math.prod(image.shape) * image.get_data_dtype().itemsize
        if told > len(raw):  # before an array of that size is made
            raise ValueError(f"its header tells of {told:,} bytes of voxels, there are {len(raw):,}")
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, ImageFileError, HeaderDataError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{name}: truncated or damaged NIfTI file ({first_line}); copy it again") from error
    return array, np.asarray(image.affine, dtype=float), tuple(f"{name}: {text}" for text in _header_notes(image))


def _header_notes(image: nib.Nifti1Image) -> list[str]:
    qform, sform = image.get_qform(coded=True)[0], image.get_sform(coded=True)[0]
    notes = []
    if qform is None and sform is None:
        notes.append("has neither qform nor sform: left and right are a guess")
    if qform is not None and sform is not None and np.abs(qform - sform).max() > _FORM_TOLERANCE_MM:
        notes.append("qform and sform differ: the sform is used")
    axes = image.affine[:3, :3] / np.maximum(np.linalg.norm(image.affine[:3, :3], axis=0), 1e-12)
    if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR_TOLERANCE:
        notes.append("its axes are not at right angles: distances in mm will be off")
    return notes


def named_file(content: bytes) -> str | None:
    """What the header of an MHA or NRRD file names as the file with its voxels; None where they follow the header.

    Raises:
        ValueError: neither of the two formats, or a header without an end.
    """
    if content.startswith(b"NRRD"):
        header, *data = re.split(rb"\n\r?\n", content, maxsplit=1)
        found = re.search(rb"(?im)^\s*data *file\s*:\s*(.*)$", header)
        if not found and not data:
            raise ValueError("its header has no end")
    else:
        before, key, rest = content.partition(b"ElementDataFile")
        found = re.match(rb"[ \t]*[=:][ \t]*(.*)", rest)
        if not key or not found or before.rpartition(b"\n")[2].strip():
            raise ValueError("neither an MHA nor a NRRD file")
        if found[1].strip().upper() == b"LOCAL":
            return None
    return found[1].decode("utf-8", "replace").strip() if found else None


def _parse_itk(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = sitk.ReadImage(str(path), imageIO="NrrdImageIO" if content.startswith(b"NRRD") else "MetaImageIO")
    except RuntimeError as error:
        raise DataError(f"{path.name}: truncated or damaged file ({last_line(error)}); copy it again") from error
    if image.GetDimension() != 3:
        raise DataError(f"{path.name}: has {image.GetDimension()} axes, expected 3; save one volume, or use NIfTI")
    return from_itk(image)


def last_line(error: Exception) -> str:
    """What ITK says in the end, behind the places in its code."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]


def _unusable(array: np.ndarray, affine: np.ndarray) -> str:
    if array.dtype.kind not in "buif":
        return f"holds {array.dtype} values, expected real numbers; save it as a grey-scale volume"
    if array.ndim not in (3, 4):
        return f"has {array.ndim} axes {array.shape}, expected 3"
    if array.size == 0:
        return f"has no voxels: shape {array.shape}"
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        return f"its affine is singular: {affine[:3].tolist()}; mend the header"
    return ""
