"""Read one image file completely, and say in plain words what is wrong with it.

A file is read once: the same bytes are hashed, unpacked and parsed, so that a truncated gzip stream or a damaged check
sum is found here and not in the middle of a run. NIfTI goes through nibabel, MHA and NRRD through SimpleITK; both give
arrays in (i, j, k) order and affines to RAS mm, as MONAI's loaders do. Folders of DICOM slices: see ``dicom``.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import logging
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from nibabel.orientations import aff2axcodes, apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from samseg_monai.data.files.headers import check_voxels, memory_problem, read_header
from samseg_monai.errors import DataError

SUFFIXES = (".nii.gz", ".nii", ".mha", ".nrrd")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm", ".nii.gz", ".nii")
AFFINE_TOLERANCE = 0.05  # of a voxel: how far a corner of one grid may lie from that of another
_NOTED = 1e-3  # of a voxel: more than rounding of a header's 32 bits
_FORM_TOLERANCE_MM = 0.1
_SHEAR_TOLERANCE = 1e-2
_GZIP_MAGIC = b"\x1f\x8b"
_VOXEL_MM = (0.05, 20.0)  # sides that scanners of people give; others are a wrong unit or a damaged header
_HEADERS = {348: nib.Nifti1Image, 540: nib.Nifti2Image}  # by their size in bytes, with which they begin
_MENDED = ("pixdim[1,2,3]", "qform_code", "sform_code")  # what nibabel replaces and goes on
nib.imageglobals.logger.setLevel(logging.CRITICAL)  # it would tell on stderr what is refused or noted here
_UNITS = {1: ("metres", 1000), 3: ("microns", 0.001)}  # NIfTI codes of units other than mm, and what one is in mm
_NO_MODALITY = {"", "OT", "SC"}  # of DICOM files that do not tell: none, other, secondary capture
# intensities that only Hounsfield units give: lung and fat, and the air around a patient
_LUNG_AND_FAT, _AIR = (-950.0, -40.0), (-1100.0, -900.0)
_FEW_LUNG_AND_FAT, _MUCH_AIR = 1e-3, 0.05  # parts of all voxels
_POSTSCRIPT = (b"%!", b"\xc5\xd0\xd3\xc6")  # the latter with a preview, as DOS had it
_NOT_WRAPPED = ("8-bit signed integer", "64-bit signed integer")
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
        modality: as a DICOM series states it, such as ``CT``; empty where nobody does.
    """

    array: np.ndarray
    affine: np.ndarray
    sha256: str
    notes: tuple[str, ...] = ()
    modality: str = ""

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
    """Read a NIfTI, MHA or NRRD file to its last byte; ``notes`` say what of its header was mended or left out.

    Raises:
        DataError: ``<file name>: <reason>`` when the file is missing, empty, a git-lfs pointer or a web page, truncated
            or damaged, has fewer than three axes or a singular affine, voxels of a size that is none, another unit than
            mm, a header that contradicts itself, or holds something other than real numbers.
    """
    path = Path(path)
    content = content_of(path)
    is_nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    array, affine, notes = parse_nifti(path, content) if is_nifti else _parse_itk(path, content)
    if reason := _unusable(array, affine):
        raise DataError(f"{path.name}: {reason}")
    axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    if np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR_TOLERANCE:
        notes += (f"{path.name}: its axes are not at right angles: distances in mm will be off",)
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
        if is_dead_link(path):
            raise DataError(
                f"{path.name}: cannot be read, as it is a link to {os.readlink(path)}, which is not there; get the "
                "file itself (such as by 'git annex get'), or connect the disk"
            ) from error
        raise DataError(f"{path.name}: cannot be read ({error.strerror or error})") from error
    if not content:
        raise DataError(f"{path.name}: the file is empty (0 bytes); copy it again")
    if content.startswith(b"version https://git-lfs"):
        raise DataError(f"{path.name}: is a git-lfs pointer, not the image; run 'git lfs pull' where it came from")
    if content[:1000].lstrip()[:5].lower() in (b"<html", b"<!doc", b"<?xml"):
        raise DataError(f"{path.name}: is a web page, not an image: the download failed; log in and download it again")
    refuse_foreign(path, content)
    return content


def is_dead_link(path: Path) -> bool:
    """Whether ``path`` is a link that leads nowhere, as git-annex leaves behind for files that were not fetched."""
    return os.path.islink(path) and not os.path.exists(path)


def refuse_foreign(path: Path, content: bytes | None = None) -> None:
    """Refuse a file whose loader would read another file in its place, or run it.

    Args:
        path: file, whatever its name says.
        content: its bytes; None: the first of them are read, which hold any header.

    Raises:
        DataError: ``<file name>: <reason>``: a MetaImage or NRRD header without its voxels, or one that is damaged
            (``headers``); with ``content`` voxels that are cut off, too; a PostScript program.
    """
    whole = content is not None
    if content is None:
        with path.open("rb") as stream:
            content = stream.read(_HEADER_BYTES)
    if content.startswith(_POSTSCRIPT):
        raise DataError(f"{path.name}: is a PostScript program, no PNG, JPEG, TIFF or BMP file; save it as an image")
    if not content.startswith(b"NRRD") and not path.name.lower().endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        return
    try:
        header = read_header(content)
        if whole and header.named is None:
            check_voxels(header, content)
    except ValueError as error:
        raise DataError(f"{path.name}: truncated or damaged file ({error}); copy it again") from error
    if header.named is not None:
        raise DataError(
            f"{path.name}: its header names another file ({header.named!r:.200}) that would be read in its place; save "
            "header and voxels as one file"
        )


def value_problem(array: np.ndarray, what: str = "voxel") -> str:
    """What makes these intensities unusable: NaN, infinity, one value everywhere, more than float32 holds (which is how
    images are loaded); empty when nothing does."""
    if array.dtype.kind == "f":
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            return f"{bad} {what}s are NaN or infinite; replace them, for example with 0"
    low, high = array.min(), array.max()
    if max(abs(float(low)), abs(float(high))) > float(np.finfo(np.float32).max):
        return f"its values go from {low:g} to {high:g}, beyond what float32 holds; scale them"
    return f"every {what} has the value {low:g}: there is no image in it" if low == high else ""


def size_problem(affine: np.ndarray, shape: Sequence[int]) -> str:
    """What is wrong with the size of a voxel, in mm; empty when nothing is. An axis of one voxel may be of any size."""
    sides = np.linalg.norm(np.asarray(affine, dtype=float)[:3, :3], axis=0)
    odd = [not _VOXEL_MM[0] <= side <= _VOXEL_MM[1] and n > 1 for side, n in zip(sides, shape, strict=False)]
    if not any(odd):
        return ""
    shown = " x ".join(f"{side:.4g}" for side in sides)
    return f"its voxels are {shown} mm, expected {_VOXEL_MM[0]:g} to {_VOXEL_MM[1]:g}; is its header in another unit?"


def refuse_too_large(path: str | Path) -> None:
    """Raise DataError for a NIfTI, MHA or NRRD file whose header speaks of more voxels than the memory holds; of a file
    that has no readable header whoever reads it tells."""
    path = Path(path)
    if not path.is_file():
        return
    try:
        if path.name.lower().endswith((".nii", ".nii.gz")):
            header: Any = nib.load(path).header
            voxels, itemsize = math.prod(map(int, header.get_data_shape())), header.get_data_dtype().itemsize
        else:
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            voxels = math.prod(reader.GetSize()) * reader.GetNumberOfComponents()
            itemsize = 4
    except Exception:  # noqa: BLE001  see above
        return
    if problem := memory_problem(voxels, itemsize):
        raise DataError(f"{path.name}: its header {problem}")


def unit_problem(xyzt_units: int) -> str:
    """What is wrong with the unit of length of a NIfTI header (its ``xyzt_units``); empty for mm and where it is not
    told, which everybody takes for mm."""
    if (code := int(xyzt_units) & 7) not in _UNITS:
        return ""
    name, mm = _UNITS[code]
    return f"its header is in {name}, which would be taken for mm; save it in mm (sizes times {mm:g}, unit code 2)"


def modality_problem(stated: str, wanted: str) -> str:
    """How the modality that DICOM files state contradicts that of a bundle; empty where it does not, or one is unknown.

    Both are abbreviations of DICOM (CT, MR, PT ...).
    """
    told, task = ("MR" if name.upper() in ("MRI", "MR") else name.upper() for name in (stated, wanted))
    if told in _NO_MODALITY or task in _NO_MODALITY or told == task:
        return ""
    return f"its DICOM files say that it is {told}, this is for {task}; --allow-modality goes on all the same"


def modality_doubt(array: np.ndarray, modality: str) -> str:
    """Why these intensities do not look like those of ``modality``; empty where they do, or where nobody can tell.

    CT is in Hounsfield units, of which lung and fat (about -900 to -50) are in every picture of a body. What was stored
    with 1024 added, as greys from 0 to 255 or normalised has nearly no voxel there. MR in turn has no air of -1000.

    Args:
        array: any shape, finite.
        modality: as DICOM abbreviates it; others than CT and MR are not judged.
    """
    step = max(1, array.size // 2_000_000)
    values = array.reshape(-1)[::step]

    def part(low: float, high: float) -> float:
        return float(np.count_nonzero((values >= low) & (values <= high)) / max(1, values.size))

    kind, text = modality.upper(), ""
    if kind == "CT" and part(*_LUNG_AND_FAT) < _FEW_LUNG_AND_FAT:
        text = "do not look like a CT in Hounsfield units (fat is about -100, air -1000)"
    elif kind in ("MR", "MRI") and part(*_AIR) > _MUCH_AIR:
        text = "look like a CT in Hounsfield units (air of -1000), not like MR"
    return text and f"its values (from {array.min():g} to {array.max():g}) {text}"


def is_phantom(path: str | Path) -> bool:
    """Whether a NIfTI file was written by ``samseg phantom``; reads its header only."""
    header: Any = nib.load(path).header
    return "descrip" in header and bytes(header["descrip"].item()).startswith(PHANTOM_MARK)


def stored_like(volume: Volume, reference: Volume) -> tuple[Volume, str]:
    """A mask with its axes in the order and direction of ``reference``, and a note if they were others.

    Masks drawn on DICOM come back with their rows the other way round as NIfTI (dcm2niix, ITK-SNAP, 3D Slicer): every
    voxel stays where it is in the patient, and no value is interpolated.
    """
    codes = axes_to_turn(volume.affine, reference.affine, volume.array.shape)
    if not codes:
        return volume, ""
    turn = ornt_transform(io_orientation(volume.affine), io_orientation(reference.affine))
    array = np.ascontiguousarray(apply_orientation(volume.array, turn))
    affine = volume.affine @ inv_ornt_aff(turn, volume.array.shape)
    stored = "".join(aff2axcodes(volume.affine))
    return replace(volume, array=array, affine=affine), f"its axes are stored as {stored}, and turned to {codes}"


def axes_to_turn(affine: np.ndarray, reference: np.ndarray, shape: Sequence[int]) -> str:
    """Axcodes of ``reference``, such as "LPS", where the axes of a volume of three axes run another way; else ""."""
    ways = [aff2axcodes(which) for which in (affine, reference)]
    if len(shape) != 3 or ways[0] == ways[1] or None in (*ways[0], *ways[1]):
        return ""
    if not affine_difference(affine, reference, shape)[0]:  # both close to 45 degrees, where rounding decides
        return ""
    return "".join(map(str, ways[1]))


def grid_difference(volume: Volume, reference: Volume) -> tuple[str, str]:
    """How the grid of ``volume`` differs from that of ``reference``: why it is another one, and what is to be noted.

    Both are empty when shape and affine agree to rounding; see ``affine_difference``.
    """
    if volume.array.shape != reference.array.shape:
        return f"shape {volume.array.shape} differs from {reference.array.shape}", ""
    return affine_difference(volume.affine, reference.affine, volume.array.shape[:3])


def affine_difference(affine: np.ndarray, reference: np.ndarray, shape: Sequence[int]) -> tuple[str, str]:
    """Whether two affines (4, 4) place a volume of ``shape`` (up to three axes) alike: a refusal, a note, or neither.

    What counts is the corner of the volume that is displaced most, in voxels of ``reference``: an error of the spacing
    adds up over a volume, and a shift does not.

    Returns: why the two are different grids (0.05 voxel or more) or "", and what is to be noted (less) or "".
    """
    ends = [(-0.5, side - 0.5) for side in (*shape, 1, 1)[:3]]
    corners = np.stack(np.meshgrid(*ends, [1.0], indexing="ij")).reshape(4, -1)
    moved = np.linalg.pinv(reference[:3, :3]) @ ((affine - reference) @ corners)[:3]
    gap = float(np.linalg.norm(moved, axis=0).max())
    if not gap < AFFINE_TOLERANCE:  # NaN is a difference, too
        texts = (np.array2string(a[:3], precision=4, separator=",") for a in (affine, reference))
        mine, other = (" ".join(text.split()) for text in texts)
        return f"affine differs, by {gap:.3g} voxels at a corner of the volume: {mine} against {other}", ""
    note = f"affine differs by {gap:.2g} voxels at a corner of the volume: taken as the same"
    return "", note if gap > _NOTED else ""


def read_grid(path: str | Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (X, Y, Z) and affine (4, 4) to RAS mm of a file, by its header alone: quick, and blind to damaged voxels.

    Raises:
        DataError: ``<file name>: <reason>``: no header can be read, or it has fewer than three axes.
    """
    path = Path(path)
    try:
        if path.name.lower().endswith((".nii", ".nii.gz")):
            image: Any = nib.load(path)
            shape, affine = tuple(image.shape), _placed(image)[0]
        else:
            reader = sitk.ImageFileReader()
            reader.SetFileName(str(path))
            reader.ReadImageInformation()
            shape = reader.GetSize()
            affine = _affine_of(reader) if len(shape) == 3 else np.eye(4)
    except Exception as error:
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


def spacing_in_plane(affine: np.ndarray, orientation: str) -> tuple[float, float]:
    """Voxel size in mm along the first two axes of a volume of this affine (4, 4) once it is turned to ``orientation``
    (MONAI's axcodes).
    """
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    axes = list(nib.orientations.io_orientation(affine)[:, 0])
    wanted = nib.orientations.axcodes2ornt(orientation)[:2, 0]
    first, second = (round(float(sizes[axes.index(axis)]), 5) for axis in wanted)
    return first, second


@np.errstate(all="ignore")  # numbers beyond all bounds are refused, or told, once they are read
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
    stream: Any = gzip.GzipFile(fileobj=io.BytesIO(content)) if packed else io.BytesIO(content)
    try:
        image, notes = _whole(stream)
        array = np.asanyarray(image.dataobj)
        affine, more = _placed(image)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    except Exception as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kind = "gzip" if packed and isinstance(error, (EOFError, gzip.BadGzipFile, zlib.error)) else "NIfTI"
        raise DataError(f"{name}: truncated or damaged {kind} file ({first_line}); copy it again") from error
    if problem := unit_problem(image.header["xyzt_units"]):
        raise DataError(f"{name}: {problem}")
    return array, affine, tuple(f"{name}: {text}" for text in notes + more)


def _whole(stream: Any) -> tuple[Any, list[str]]:
    """The NIfTI image in a stream, which has to end where its header says, and what nibabel mends in that header; no
    more is unpacked, and nothing that the memory does not hold: a small file can unpack to more than any disk."""
    start = stream.read(540)
    if start[344:347] == b"ni1" or start[4:7] == b"ni2":
        raise DataError("is the header of a pair of files (.hdr and .img); save it as one NIfTI file")
    sizes = (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big"))
    size = next((size for size in sizes if size in _HEADERS), 348)
    kind = _HEADERS[size]
    told = kind.header_class.diagnose_binaryblock(start[:size]).splitlines()
    if any(line.startswith("sizeof_hdr") for line in told):
        raise DataError("does not begin with the size of a NIfTI header: damaged, or another format")
    header = kind.header_class(start[:size])  # without the extensions, which may follow
    first = float(header["vox_offset"])
    if not first >= header.single_vox_offset or first % 1:
        raise DataError(f"its header says that voxels begin at byte {first:g}, not behind it: damaged")
    sides = np.array(kind.header_class(start[:size], check=False)["pixdim"][1:4])  # as nibabel has not mended them
    if header["sform_code"] == 0 and not all(math.isfinite(header[f"quatern_{axis}"]) for axis in "bcd"):
        raise DataError("its qform, which says how it lies, is no rotation; mend its header")
    used = np.array(header["dim"][1:4]) > 1
    if header["sform_code"] == 0 and not (np.abs(sides[used]) > 0).all():
        raise DataError(f"its voxels are {' x '.join(f'{side:g}' for side in sides)} mm; mend pixdim in its header")
    voxels = math.prod(map(int, header.get_data_shape()))
    if problem := memory_problem(voxels, header.get_data_dtype().itemsize):
        raise DataError(f"its header {problem}")
    needed = int(header.get_data_offset()) + voxels * header.get_data_dtype().itemsize
    raw = start + stream.read(max(0, needed - len(start)))
    if len(raw) < needed:
        raise OSError(f"{len(raw)} bytes of {needed}")
    if len(raw) > needed or stream.read(1):  # where nothing follows this compares the check sum at the very end
        raise DataError(f"goes on behind the {needed} bytes that its header speaks of: damaged; copy it again")
    mended = [f"its header: {line}; mended" for line in told if line.startswith(_MENDED)]
    return kind.from_stream(io.BytesIO(raw)), mended


def _placed(image: nib.Nifti1Image) -> tuple[np.ndarray, list[str]]:
    """The affine that MONAI goes by, and notes. Of two forms it takes the one whose voxels have the size that the
    header states (pixdim), even where that one has no code and nobody ever wrote it."""
    sform, sform_code = image.get_sform(coded=True)
    try:
        qform, qform_code = image.get_qform(coded=True)
    except ValueError:  # of its quaternion
        qform, qform_code = None, 0
    notes = []
    if qform is None and sform is None:
        notes.append("has neither qform nor sform: left and right are a guess")
    stated = np.array(image.affine, dtype=float)
    from monai.data.utils import correct_nifti_header_if_necessary  # which brings torch with it

    affine = np.asarray(correct_nifti_header_if_necessary(image).affine, dtype=float)
    if sform_code and not qform_code and (far := affine_difference(affine, stated, image.shape)[0]):
        raise DataError(f"its pixdim is not the size of its voxels by the sform, its only form, so that its {far}")
    if qform is not None and sform is not None and not np.abs(qform - sform).max() <= _FORM_TOLERANCE_MM:
        used = "sform" if np.array_equal(affine, stated) else "qform"
        notes.append(f"qform and sform differ: the {used} is used")
    return affine, notes


def _parse_itk(path: Path, content: bytes) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    refuse_too_large(path)
    try:
        notes = tuple(f"{path.name}: {text}" for text in read_header(content).notes)
        image = sitk.ReadImage(str(path), imageIO="NrrdImageIO" if content.startswith(b"NRRD") else "MetaImageIO")
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{path.name}: truncated or damaged file ({last_line(error)}); copy it again") from error
    if image.GetDimension() != 3:
        raise DataError(f"{path.name}: has {image.GetDimension()} axes, expected 3; save one volume, or use NIfTI")
    if (kind := image.GetPixelIDTypeAsString()) in _NOT_WRAPPED:  # MONAI's reader for these files is ITK in Python
        raise DataError(f"{path.name}: holds {kind}s, which ITK in Python does not load; save int16 or int32, or NIfTI")
    return (*from_itk(image), notes)


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
    return size_problem(affine, array.shape)
