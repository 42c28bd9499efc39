"""2-D images as volumes of one slice: read completely, with a MONAI reader on top.

An image is an array (rows, columns, 1), in colour (rows, columns, 1, 3): the picture stands upright, rows downwards,
unlike MONAI's PILReader, which swaps the two axes. Its affine is the pixel size along rows and columns, nothing else.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from samseg_monai.data.dicom import is_dicom
from samseg_monai.data.image_formats import parse_dicom, parse_picture, parse_slice
from samseg_monai.data.volumes import Volume, content_of, image_stem
from samseg_monai.errors import ConfigError, DataError

GREY = ("image",)
RGB = ("red", "green", "blue")


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
    """``spacing`` in mm as a float, or None.

    Raises:
        ConfigError: not a finite number above 0.
    """
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
            CMYK, an EXIF orientation other than upright (see ``image_formats``).
    """
    path = Path(path)
    spacing = checked_spacing(spacing)
    content = content_of(path)
    if path.name.lower().endswith((".nii", ".nii.gz")):
        pixels = parse_slice(path, content)
    elif content[128:132] == b"DICM" or path.suffix.lower() == ".dcm":
        pixels = parse_dicom(path, content)
    else:
        pixels = parse_picture(path, content)
    if pixels.array.size == 0:
        raise DataError(f"{path.name}: has no pixels: shape {pixels.array.shape}")
    sides = (spacing, spacing) if spacing is not None else pixels.spacing_mm or (1.0, 1.0)
    return Picture(
        array=np.expand_dims(pixels.array, 2),
        affine=np.diag([*sides, 1.0, 1.0]),
        sha256=hashlib.sha256(content).hexdigest(),
        notes=pixels.notes,
        kind=pixels.kind,
        own_spacing_mm=pixels.spacing_mm,
        stored_affine=pixels.affine,
    )


class ImageFileReader(ImageReader):
    """MONAI reader of 2-D images; see ``read_image`` for the formats.

    ``LoadImaged(reader="samseg_monai.data.images.ImageFileReader", ensure_channel_first=True, spacing=0.49)`` gives
    (1, rows, columns, 1), in colour (3, rows, columns, 1).

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
        """Array (rows, columns, 1) or (rows, columns, 1, 3) and metadata.

        Raises:
            DataError: several files for one image, or as ``read_image``.
        """
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
        }
        return picture.array, meta
