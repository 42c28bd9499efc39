"""2-D images as volumes of one slice: read completely, with a MONAI reader on top.

An image is an array (rows, columns, 1), in colour (rows, columns, 1, 3): the picture stands upright, rows downwards,
unlike MONAI's PILReader, which swaps the two axes. Its affine is the pixel size along rows and columns, nothing else.
What a decoder would change without a word is refused or told: Pillow drops half of 16-bit colours, spreads 1, 2 and 4
bits over 0 to 255, and leaves it to the caller to turn a photograph by its EXIF tag.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from PIL import Image

from samseg_monai.data.files.dicom import IS_NEGATIVE, NEGATIVE, is_dicom, modality_of, open_dicom
from samseg_monai.data.files.volumes import Volume, content_of, image_stem, parse_nifti
from samseg_monai.errors import ConfigError, DataError

GREY = ("image",)
RGB = ("red", "green", "blue")
# Pillow's formats and the suffixes of each; MPO is JPEG of several pictures, of which one is left
_SUFFIXES_OF = {
    "PNG": (".png",), "JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",), "DIB": (".bmp",),
}  # fmt: skip
_FORMATS = tuple(name for name in _SUFFIXES_OF if name != "MPO")
_GREY_MODES = ("1", "L", "I;16", "I;16L", "I;16B", "I", "F")
_ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
_ORIENTATION = 0x0112  # of EXIF and TIFF: 1 is upright, 2 to 8 are mirrored or turned
_PHOTOMETRIC = 262  # of TIFF: 0 means that 0 is white
warnings.filterwarnings("error", "Truncated|Corrupt|Possibly corrupt|Tag data larger", UserWarning)  # of Pillow
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # twice its limit is an error
_DAMAGED = (UserWarning, OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, struct.error, zlib.error)


@dataclass(frozen=True)
class Picture(Volume):
    """One 2-D image; ``array`` is (rows, columns, 1) or (rows, columns, 1, 3), ``notes`` do not name the file.

    Attributes:
        kind: the format, such as ``PNG``.
        own_spacing_mm: between rows and between columns as the file states it; None where it does not.
        stored_affine: of a NIfTI file: it tells whether image and mask are stored in the same direction.
    """

    kind: str = ""
    own_spacing_mm: tuple[float, float] | None = None
    stored_affine: np.ndarray | None = None

    @property
    def scans(self) -> tuple[str, ...]:
        """Names of the channels, as a datalist has them."""
        return GREY if self.array.ndim == 3 else RGB


def case_of(path: Path) -> str | None:
    """Name of the case that ``path`` is an image of; None when it is no image. DICOM files need no suffix."""
    return image_stem(path) or (path.name if is_dicom(path) else None)


def checked_spacing(spacing: float | None) -> float | None:
    """``spacing`` in mm as a float, or None; ConfigError for what is not a finite number above 0."""
    if spacing is None:
        return None
    if isinstance(spacing, bool) or not isinstance(spacing, (int, float)) or not 0 < spacing < math.inf:
        raise ConfigError(f"spacing must be a size in mm above 0, or null (distances are pixels then), got {spacing!r}")
    return float(spacing)


def read_image(path: str | Path, spacing: float | None = None) -> Picture:
    """Read a PNG, JPEG, TIFF, BMP, single-frame DICOM or one-slice NIfTI file to its last byte.

    Args:
        path: file; DICOM is recognised by its suffix or its content.
        spacing: pixel size in mm, which wins over the file's own; without either it is 1.

    Raises:
        DataError: ``<file name>: <reason>``: missing, empty, truncated, several frames or slices, an alpha channel,
            CMYK or other colours, 16 bits for each of three colours, an EXIF orientation other than upright.
    """
    path, spacing = Path(path), checked_spacing(spacing)
    content = content_of(path)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        found = _parse_slice(path, content)
    elif content[128:132] == b"DICM" or path.suffix.lower() == ".dcm":
        found = _parse_dicom(path, content)
    else:
        found = _parse_picture(path, content)
    array = found.pop("array")
    if array.size == 0:
        raise DataError(f"{path.name}: has no pixels: shape {array.shape}")
    sides = (spacing, spacing) if spacing is not None else found.get("own_spacing_mm") or (1.0, 1.0)
    affine, sha256 = np.diag([*sides, 1.0, 1.0]), hashlib.sha256(content).hexdigest()
    return Picture(np.expand_dims(array, 2), affine, sha256, **found)


def is_grey(array: np.ndarray) -> bool:
    """Whether the three channels (last axis) are equal everywhere."""
    return bool((array[..., :1] == array[..., 1:]).all())


def _parse_slice(path: Path, content: bytes) -> dict[str, Any]:
    """What a ``Picture`` holds, its array still (rows, columns[, 3]); a NIfTI file of shape (n, m), (n, m, 1) or, in
    colour, (n, m, 1, 3): x is along columns, y along rows."""
    array, affine, _ = parse_nifti(path, content)  # its notes are about left and right, which a picture does not tell
    if array.dtype.kind not in "buif":
        raise DataError(f"{path.name}: holds {array.dtype} values, expected real numbers; save it in grey, or as PNG")
    shape = array.shape
    if array.ndim < 2 or any(size != 1 for size in shape[2:3]) or shape[3:] not in ((), (1,), (3,)):
        raise DataError(f"{path.name}: has shape {shape}, expected one slice (n, m) or (n, m, 1); save the one meant")
    array = array.reshape((*shape[:2], *shape[3:]) if shape[3:] == (3,) else shape[:2])
    sides = np.linalg.norm(affine[:3, :2], axis=0)
    spacing = (float(sides[1]), float(sides[0])) if np.isfinite(sides).all() and sides.min() > 0 else None
    return {"array": np.swapaxes(array, 0, 1), "kind": "NIfTI", "own_spacing_mm": spacing, "stored_affine": affine}


def _parse_dicom(path: Path, content: bytes) -> dict[str, Any]:
    """As ``_parse_slice``: one frame, grey or RGB, in the units of its rescale slope and intercept."""
    tags, reader = open_dicom(path, content)
    if (frames := int(np.prod(reader.GetSize()[2:]))) != 1:
        raise DataError(f"{path.name}: holds {frames} frames, expected one image; save the one that is meant")
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except RuntimeError as error:
        raise DataError(f"{path.name}: truncated or damaged DICOM file, or one without an image") from error
    colours = reader.GetNumberOfComponents()
    if colours not in (1, 3):
        raise DataError(f"{path.name}: has {colours} values per pixel, expected 1 (grey) or 3 (RGB)")
    size = (reader.GetSize()[1], reader.GetSize()[0])
    spacing = (float(reader.GetSpacing()[1]), float(reader.GetSpacing()[0])) if tags.get("PixelSpacing") else None
    notes = []
    if spacing is None and (tags.get("ImagerPixelSpacing") or tags.get("NominalScannedPixelSpacing")):
        notes.append("states only the pixel size on the detector or film, which is not used")
    if tags.get("PhotometricInterpretation") == NEGATIVE:
        notes.append(IS_NEGATIVE)
    array = array.reshape(size if colours == 1 else (*size, 3))
    told = {"kind": "DICOM", "own_spacing_mm": spacing, "notes": tuple(notes), "modality": modality_of(tags)}
    return {"array": array, **told}


def _parse_picture(path: Path, content: bytes) -> dict[str, Any]:
    """As ``_parse_slice``: a PNG, JPEG, TIFF or BMP file, whatever its name says."""
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
    return {"array": array, "kind": kind, "notes": notes}


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


class ImageFileReader(ImageReader):
    """MONAI reader of 2-D images; see ``read_image`` for the formats.

    ``LoadImaged(reader="samseg_monai.data.files.images.ImageFileReader", ensure_channel_first=True, spacing=0.49)``
    gives (1, rows, columns, 1), in colour (3, rows, columns, 1).

    Args:
        spacing: pixel size in mm, which wins over the files' own.

    Raises:
        ConfigError: spacing is not a number above 0.
    """

    def __init__(self, spacing: float | None = None) -> None:
        super().__init__()
        self.spacing = checked_spacing(spacing)

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        """Whether every name is that of an image; DICOM files without a suffix are recognised by their content."""
        return all(case_of(Path(str(name))) is not None for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[Path]:
        """Only note the file: where a reader's ``read`` fails, MONAI goes on with its own readers without a word, and
        these would turn the picture, drop bits or take an alpha channel for a scan."""
        return [Path(str(name)) for name in ensure_tuple(data)]

    def get_data(self, img: list[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Array (rows, columns, 1) or (rows, columns, 1, 3) and metadata; DataError for several files for one image."""
        if len(img) != 1:
            names = ", ".join(path.name for path in img)
            raise DataError(f"an image is one file, got {len(img)} ({names}); colours are channels of one file")
        picture = read_image(img[0], self.spacing)
        meta: dict[str, Any] = {
            MetaKeys.AFFINE: picture.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: picture.affine.copy(),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.SPATIAL_SHAPE: np.asarray(picture.array.shape[:3]),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan") if picture.array.ndim == 3 else -1,
            "filename_or_obj": str(img[0]),
            "spacing_known": self.spacing is not None or picture.own_spacing_mm is not None,
        }
        return picture.array, meta
