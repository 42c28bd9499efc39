"""2-D images: kinds of pixels, names, frames, orientation, damage. What a file holds is known as it is made here.

Damaged PNG are judged by their chunks (https://www.w3.org/TR/png-3), JPEG by SimpleITK's decoder.
"""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from PIL import Image

from samseg_monai.data.files.images import read_image
from samseg_monai.data.files.volumes import value_problem
from samseg_monai.errors import DataError
from tests.mutations import nifti
from tests.mutations.dicom import a_slice, bytes_of
from tests.mutations.harness import Trial, damaged, pick

SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "BMP": ".bmp", "GIF": ".png", "WEBP": ".jpg", "PPM": ".bmp"}
MODES = {
    "PNG": ("L", "RGB", "I;16", "1", "P", "LA", "RGBA"), "JPEG": ("L", "RGB", "CMYK"), "BMP": ("L", "RGB", "1"),
    "TIFF": ("L", "RGB", "I;16", "F", "RGBA", "CMYK", "1"), "GIF": ("L",), "WEBP": ("RGB",), "PPM": ("L",),
}  # fmt: skip
USABLE = ("L", "RGB", "I;16", "F", "1", "P")


def array_of(mode: str, rng: random.Random, size: tuple[int, int]) -> np.ndarray:
    """Random pixels (rows, columns[, colours]) of a mode."""
    count = {"RGB": 3, "RGBA": 4, "CMYK": 4, "LA": 2}.get(mode, 1)
    top = {"I;16": 65535, "1": 1, "F": 1000}.get(mode, 255)
    values = np.array([rng.randrange(top + 1) for _ in range(size[0] * size[1] * count)])
    kind = {"I;16": np.uint16, "F": np.float32, "1": bool}.get(mode, np.uint8)
    return (
        values.astype(kind).reshape(*size, count)[..., 0] if count == 1 else values.astype(kind).reshape(*size, count)
    )


def picture(kind: str, mode: str, array: np.ndarray, **options: Any) -> bytes:
    """The file of an array."""
    image = Image.fromarray(array, None if mode in ("I;16", "1", "F") else "L" if mode == "P" else mode)
    if mode == "P":
        image = image.convert("P")
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png_rule(content: bytes) -> str | None:
    """Why the chunks of a PNG file are damaged; "" for a whole file, None where only its end is."""
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return "no PNG"
    at, data, head = 8, b"", b""
    while True:
        if content[at + 4 : at + 8] == b"IEND" or b"IEND" in content[at : at + 20]:
            break
        if len(content) < at + 12:
            return "cut"
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        if len(content) < at + 12 + length:
            return "cut"
        if zlib.crc32(body) != struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0]:
            return "a check sum that differs"
        if body[:4] == b"IHDR":
            head = body[4:]
        if body[:4] == b"IDAT":
            data += body[4:]
        at += 12 + length
    try:
        if not head or not zlib.decompress(data):
            return "no pixels"
        return "" if content[at:] == b"\0\0\0\0IEND\xaeB`\x82" else None
    except zlib.error as error:
        return f"damaged pixels ({error})"


def make(folder: Path) -> Any:
    """Files of all formats, some of them called like another one."""

    def trial(rng: random.Random) -> Trial:
        if rng.random() < 0.15:
            return _other(folder, rng)
        kind = rng.choice(["PNG"] * 4 + ["JPEG"] * 3 + ["TIFF"] * 3 + ["BMP"] * 2 + ["GIF", "WEBP", "PPM"])
        mode, size = rng.choice(MODES[kind]), (rng.randrange(3, 12), rng.randrange(3, 12))
        array = array_of(mode, rng, size)
        rule: str | None = "" if mode in USABLE else f"pixels of kind {mode}"
        options: dict[str, Any] = {}
        how = rng.random()
        if kind in ("GIF", "WEBP", "PPM"):
            rule = f"a {kind} file"
        elif how < 0.1 and kind in ("PNG", "JPEG", "TIFF"):
            turned = rng.randrange(0, 10)
            exif = Image.Exif()
            exif[0x0112] = turned
            options["exif"] = exif
            rule = rule or ("to be turned" if 2 <= turned <= 8 else "")
        elif how < 0.15 and kind == "TIFF":
            options |= {"save_all": True, "append_images": [Image.fromarray(array_of("L", rng, size))]}
            rule = rule or "two pages"
        elif how < 0.2 and mode == "L" and kind == "PNG":
            options["transparency"] = 3
            rule = "transparency"
        elif how < 0.24:
            array = np.full_like(array, 1)
            rule = rule or "one value everywhere"
        if array.min() == array.max():
            rule = rule or "one value everywhere"
        if mode == "P" and array.max() == 1 == array.min():
            rule = "one value everywhere"
        if kind == "JPEG":  # decoders differ in how they spread colours that are stored for 2 x 2 pixels
            options |= {"quality": 95} | ({"subsampling": 0} if mode == "RGB" else {})
        content = picture(kind, mode, array, **options)
        told, expected = f"{kind} {mode} {size} {list(options)}", _expected(kind, mode, array, content)
        if rng.random() < 0.35:
            how_hurt, hurt = damaged(content, rng)
            told += f"; {how_hurt}"
            rule = _hurt_rule(kind, content, hurt, rule)
            content = hurt
        suffix = SUFFIXES[kind] if rng.random() < 0.85 else pick(rng, ".png", ".jpeg", ".tiff", ".bmp", ".JPG")
        path = folder / f"a{suffix}"
        path.write_bytes(content)
        wrong = (lambda found: "") if rule is None else lambda found: _differs(found, expected)
        return Trial(f"{suffix}: {told}", lambda: _read(path), rule, wrong)

    return trial


def _hurt_rule(kind: str, content: bytes, hurt: bytes, rule: str | None) -> str | None:
    if content.startswith(hurt) and len(hurt) < len(content):
        lost = len(content) - len(hurt)
        if kind == "PNG":
            return rule or png_rule(hurt)
        # the last bytes may be padding, or a mark that all pixels need not
        return rule or ("cut" if lost > (2 if kind == "JPEG" else 60 if kind == "TIFF" else 3) else None)
    if len(hurt) != len(content) or hurt.count(0) == len(hurt) or hurt[:4] == b"PK\x03\x04":
        return rule or "another file"
    return rule or (png_rule(hurt) or None) if kind == "PNG" else None


def _expected(kind: str, mode: str, array: np.ndarray, content: bytes) -> np.ndarray | None:
    if kind == "JPEG":
        image = sitk.ReadImage(_written(content), imageIO="JPEGImageIO")
        return sitk.GetArrayFromImage(image) if mode in ("L", "RGB") else None
    if mode == "1":
        return array.astype(np.uint8) * 255
    return array


def _written(content: bytes) -> str:
    path = Path("/dev/shm" if Path("/dev/shm").is_dir() else ".") / "mutations-oracle.jpg"
    path.write_bytes(content)
    return str(path)


def _other(folder: Path, rng: random.Random) -> Trial:
    """A DICOM or NIfTI file of one slice."""
    if rng.random() < 0.5:
        shape = rng.choice([(8, 7), (8, 7, 1), (8, 7, 2), (8, 7, 1, 3), (8, 7, 1, 2), (8,), (8, 7, 1, 1, 1)])
        array = np.array([rng.randrange(-300, 300) for _ in range(int(np.prod(shape)))], dtype="<i2").reshape(shape)
        fields = nifti.good(np.zeros((8, 7, 1)))
        fields["dim"] = [len(shape), *shape, *[1] * (7 - len(shape))]
        content = nifti.build(fields, array.tobytes(order="F"))
        good = shape in ((8, 7), (8, 7, 1), (8, 7, 1, 3))
        plain = array.reshape(8, 7, 3) if shape[3:] == (3,) else array.reshape(-1, 7 if good else 1)
        expected = np.swapaxes(plain, 0, 1)
        rule, suffix, told = "" if good else f"shape {shape}", ".nii", f"NIfTI {shape}"
    else:
        values = np.array([rng.randrange(-300, 300) for _ in range(48)]).reshape(6, 8)
        ds = a_slice(0, "1.2.3.4", values)
        rule, expected, suffix = "", values * 2 - 10, ".dcm"
        told = rng.choice(["", "frames", "colour", "cut", "negative", "slope", "photometric"])
        if told == "frames":
            ds.NumberOfFrames, ds.PixelData = 2, ds.PixelData * 2
        elif told == "colour":
            ds.SamplesPerPixel, ds.PhotometricInterpretation = 3, "RGB"
        elif told == "cut":
            ds.PixelData = ds.PixelData[: rng.randrange(48) * 2]
        elif told == "negative":
            ds.PhotometricInterpretation = "MONOCHROME1"
            expected = (-1 - values) * 2 - 10
        elif told == "slope":
            ds.RescaleSlope = 0
        rule = "" if told in ("", "negative", "photometric") else told
        content = bytes_of(ds)
    path = folder / f"a{suffix}"
    path.write_bytes(content)
    return Trial(f"{suffix}: {told}", lambda: _read(path), rule, lambda found: _differs(found, expected))


def _read(path: Path) -> Any:
    found = read_image(path)
    if problem := value_problem(found.array, "pixel"):
        raise DataError(problem)
    return found


def _differs(found: Any, expected: np.ndarray | None) -> str:
    if expected is None:
        return ""
    array = found.array[..., 0] if found.array.ndim == 3 else found.array[:, :, 0]
    if array.shape != expected.shape:
        return f"shape {array.shape} for {expected.shape}"
    far = np.abs(array.astype(float) - expected.astype(float)).max()
    return "" if far <= (3 if found.kind == "JPEG" else 0) else f"pixels differ by up to {far}"
