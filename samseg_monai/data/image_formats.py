"""Pixels of one 2-D image file as they are stored: Pillow's formats, DICOM of one frame, NIfTI of one slice.

Every array is (rows, columns) or, in colour, (rows, columns, 3), rows downwards. What a decoder would change without a
word is refused or told: Pillow drops half of 16-bit colours, spreads 1, 2 and 4 bits over 0 to 255, and leaves it to
the caller to turn a photograph by its EXIF tag.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from PIL import Image

from samseg_monai.data.dicom import other_object
from samseg_monai.data.volumes import parse_nifti
from samseg_monai.errors import DataError

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "DIB")
_SUFFIXES_OF = {
    "PNG": (".png",),
    "JPEG": (".jpg", ".jpeg"),
    "MPO": (".jpg", ".jpeg"),  # JPEG of several pictures, of which one is left
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "DIB": (".bmp",),
}
_GREY_MODES = ("1", "L", "I;16", "I;16L", "I;16B", "I", "F")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112  # of EXIF and TIFF: 1 is upright, 2 to 8 are mirrored or turned
_PHOTOMETRIC = 262  # of TIFF: 0 means that 0 is white
_PIXEL_SPACING, _OTHER_SPACINGS = "0028|0030", ("0018|1164", "0018|2010")
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    struct.error,
    zlib.error,
)


@dataclass(frozen=True)
class Pixels:
    """What a file holds.

    Attributes:
        array: (rows, columns) or (rows, columns, 3).
        kind: the format, such as ``PNG``.
        spacing_mm: distance between rows and between columns; None where the file states none.
        affine: (4, 4), of the stored NIfTI array; None in other formats.
        notes: oddities that do not prevent its use, without the name of the file.
    """

    array: np.ndarray
    kind: str
    spacing_mm: tuple[float, float] | None = None
    affine: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def parse_picture(path: Path, content: bytes) -> Pixels:
    """Decode the bytes of a PNG, JPEG, TIFF or BMP file, whatever its name says.

    Raises:
        DataError: ``<file name>: <reason>`` when it is truncated, has several frames, an alpha channel, CMYK or other
            colours, 16 bits for each of three colours, a 16-bit TIFF with white as 0, or is to be turned by EXIF.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.format == "PNG":  # decoding alone does not compare the check sums
                image.verify()
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            kind, raw = str(image.format), _raw_mode(image)
            reason = _refusal(image, raw)
            if not reason:
                image.load()
                array, notes = _decoded(image, raw)
    except Image.DecompressionBombError as error:
        raise DataError(f"{path.name}: is too large for Pillow ({error}); cut it into smaller images") from error
    except _DAMAGED as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, Image.UnidentifiedImageError):
            first_line = "no PNG, JPEG, TIFF or BMP file"
        raise DataError(f"{path.name}: truncated or damaged image ({first_line}); copy it again") from error
    if reason:
        raise DataError(f"{path.name}: {reason}")
    if not path.name.lower().endswith(_SUFFIXES_OF[kind]):
        notes = (f"is a {kind} file, whatever its name says", *notes)
    return Pixels(array, kind, notes=notes)


def parse_dicom(path: Path, content: bytes) -> Pixels:
    """Read a DICOM file of one frame, grey or RGB, in the units of its rescale slope and intercept.

    The pixel size is that of (0028,0030); those on the detector (0018,1164) or film (0018,2010) are not the patient's.

    Raises:
        DataError: no image, several frames, or damaged.
    """
    if reason := other_object(content):
        raise DataError(f"{path.name}: {reason}")
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("GDCMImageIO")
    try:
        reader.ReadImageInformation()
        frames = int(np.prod(reader.GetSize()[2:]))
        if frames != 1:
            raise DataError(f"{path.name}: holds {frames} frames, expected one image; save the one that is meant")
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise DataError(f"{path.name}: truncated or damaged DICOM file, or one without an image") from error
    colours = reader.GetNumberOfComponents()
    if colours not in (1, 3):
        raise DataError(f"{path.name}: has {colours} values per pixel, expected 1 (grey) or 3 (RGB)")
    rows, columns = reader.GetSize()[1], reader.GetSize()[0]
    array = array.reshape((rows, columns) if colours == 1 else (rows, columns, 3))

    def text(tag: str) -> str:
        return reader.GetMetaData(tag).strip(" \0") if reader.HasMetaDataKey(tag) else ""

    spacing = (float(reader.GetSpacing()[1]), float(reader.GetSpacing()[0])) if text(_PIXEL_SPACING) else None
    notes = []
    if spacing is None and any(text(tag) for tag in _OTHER_SPACINGS):
        notes.append("states only the pixel size on the detector or film, which is not used")
    if text("0028|0004") == "MONOCHROME1":
        notes.append(
            "is MONOCHROME1 (small values are white): it is read as its negative, in which large values are white"
        )
    return Pixels(array, "DICOM", spacing, notes=tuple(notes))


def parse_slice(path: Path, content: bytes) -> Pixels:
    """Read a NIfTI file of shape (n, m), (n, m, 1) or, in colour, (n, m, 1, 3): x is along columns, y along rows.

    Raises:
        DataError: another shape, values that are no real numbers, truncated or damaged.
    """
    array, affine, _ = parse_nifti(path, content)  # its notes are about left and right, which a picture does not tell
    if array.dtype.kind not in "buif":
        raise DataError(f"{path.name}: holds {array.dtype} values, expected real numbers; save it in grey, or as PNG")
    shape = array.shape
    if array.ndim < 2 or any(size != 1 for size in shape[2:3]) or shape[3:] not in ((), (1,), (3,)):
        raise DataError(f"{path.name}: has shape {shape}, expected one slice (n, m) or (n, m, 1); save the one meant")
    array = array.reshape((*shape[:2], *shape[3:]) if shape[3:] == (3,) else shape[:2])
    sides = np.linalg.norm(affine[:3, :2], axis=0)
    usable = np.isfinite(sides).all() and sides.min() > 0
    spacing = (float(sides[1]), float(sides[0])) if usable else None
    return Pixels(np.swapaxes(array, 0, 1), "NIfTI", spacing, affine=affine)


def _raw_mode(image: Image.Image) -> str:
    """How the pixels are packed in the file, such as ``L;4`` for four bits; to be asked before they are loaded."""
    tiles: Any = getattr(image, "tile", None)
    args = tiles[0][3] if tiles else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _refusal(image: Image.Image, raw: str) -> str:
    """Why this picture cannot be used; empty when it can."""
    frames = getattr(image, "n_frames", 1)
    if frames != 1:
        return f"holds {frames} frames or pages, expected one image; save the one that is meant"
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        return "has an alpha channel (transparency); save it without one, in grey or RGB"
    if image.mode == "CMYK":
        return "is in CMYK, the colours of printing; save it in grey or RGB"
    if image.mode not in (*_GREY_MODES, "P", "RGB"):
        return f"has colours of the kind {image.mode}, expected grey of 8 or 16 bits, or RGB"
    if re.match(r"RGB[XA]?;16", raw):
        return "has 16 bits for each of three colours, of which 8 would be lost; save it in grey, or in RGB of 8 bits"
    if image.mode.startswith("I") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0:
        return "is a 16-bit TIFF with white as 0, which would be read as a negative; save it with black as 0"
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation in range(2, 9):
        return (
            f"is to be turned or mirrored for display (EXIF orientation {orientation}), so that its mask or boxes may "
            "refer to either grid; turn its pixels and save it without the tag"
        )
    return ""


def _decoded(image: Image.Image, raw: str) -> tuple[np.ndarray, tuple[str, ...]]:
    if image.mode == "1":
        return np.asarray(image.convert("L")), ("has 1 bit a pixel: its values are read as 0 and 255",)
    if image.mode == "P":
        array = np.asarray(image.convert("RGB"))
        grey = is_grey(array)
        note = f"has a palette of {'greys' if grey else 'colours'}, which are read instead of the entries' numbers"
        return (array[..., 0] if grey else array), (note,)
    array = np.asarray(image)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    few = re.match(r"L;([24])", raw)
    return array, (f"has {few[1]} bits a pixel: its values are spread over 0 to 255",) if few else ()


def is_grey(array: np.ndarray) -> bool:
    """Whether the three channels (last axis) are equal everywhere."""
    return bool((array[..., :1] == array[..., 1:]).all())
