"""Outputs named after their case: volumes with the geometry of their image's file, 2-D predictions as PNG, and beside
each a picture to look at. A file is there whole or not at all.

Colours are those of Okabe and Ito (2008, "Color universal design"), which people with a colour-vision deficiency can
tell apart: boxes of 2-D images sky blue, outlines of the classes orange, bluish green, reddish purple, yellow,
vermilion, blue, white, sky blue, and again from there.
"""

from __future__ import annotations

import gzip
import io
import logging
import os
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.distributed as dist
from monai.data import MetaTensor
from monai.transforms import LoadImage, SaveImaged
from nibabel.affines import voxel_sizes
from PIL import Image, ImageDraw

from samseg_monai import pictures
from samseg_monai.data.files.case_list import PICTURE
from samseg_monai.data.files.volumes import stem_of
from samseg_monai.data.slices.pickers import asked_slices
from samseg_monai.errors import ConfigError, DataError, reason_of
from samseg_monai.files import file_name, write_bytes
from samseg_monai.transforms.boxes import boxes_of, move_boxes
from samseg_monai.transforms.grids import EachKeyd, name_of, on_grid_of
from samseg_monai.transforms.pixels import bytes_of
from samseg_monai.transforms.points import INSIDE

BACKGROUND = "background"  # as datalists name it
BOX = (86, 180, 233)
CLASSES = (
    (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (0, 114, 178), (255, 255, 255), BOX,
)  # fmt: skip
_PIXELS_PER_LINE = 400  # of the longer side: an outline is one pixel wide in small images, three in 1200 pixels

# what a NIfTI header says of where its voxels lie; the rest belongs to the image
_GEOMETRY = (
    "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y",
    "qoffset_z", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_PANELS = 6  # slices of a picture at most
LOG = logging.getLogger(__name__)
_SAME_MM = 1e-3  # entries of affines before and after transforms that undo each other
_SCANNER = 1  # code of a form that says where voxels lie in the scanner


@SaveImaged.register  # whatever leaves the writing out, as MONAI Label does, finds it by that class
class SaveVolumed(EachKeyd):
    """Write ``<case>_<postfix>.nii.gz`` with the grid and the geometry of the image's own file.

    Of a NIfTI image shape, units and both forms with their codes are those of its header, bit for bit, so that every
    reader puts the two in the same place, whichever form it goes by. Of other formats, and of arrays, the sform (and
    the qform, where axes are at right angles) are the affine, in mm. A case without a name is called like its file.
    Items pass unchanged.

    Args:
        keys: segmentations on the grid of the file that "image" was loaded from, MetaTensors (1, X, Y, Z) of whole
            numbers from 0 to 255.
        output_dir: folder, made if need be.
        postfix: what follows the name of the case.
    Raises: DataError for another shape, grid or values, and when the file cannot be written.
    """

    def __init__(
        self,
        keys: str,
        output_dir: str | os.PathLike[str],
        postfix: str = "seg",
        *,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.folder, self.postfix = Path(output_dir), postfix

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        meta = d["image"].meta
        file = Path(meta["filename_or_obj"])
        case = str(d.get("case") or stem_of(file) or file.name)
        values = torch.as_tensor(d[key]).as_subclass(torch.Tensor).detach().cpu().numpy()
        if values.ndim != 4 or values.shape[0] != 1:
            raise DataError(f"{case}: {key} must be one volume (1, X, Y, Z), got {values.shape}")
        array = values[0].astype(np.uint8)
        if not np.array_equal(array, values[0]):
            raise DataError(f"{case}: {key} has values other than whole numbers from 0 to 255")
        affine, own = (np.asarray(torch.as_tensor(a).cpu(), float) for a in (d[key].affine, meta["original_affine"]))
        image = _nifti(array, own, file)
        if image is None or not np.allclose(affine, own, rtol=0, atol=_SAME_MM):
            raise DataError(f"{case}: {key} {array.shape} is not on the grid of its image's file; undo the transforms")
        name = file_name(case, f"_{self.postfix}.nii.gz")
        write_result(self.folder / name, gzip.compress(image.to_bytes(), 1, mtime=0))


def _nifti(array: np.ndarray, affine: np.ndarray, source: Path) -> Any:
    """NIfTI image of an array with the geometry of the file that it belongs to; None where its shape is another one."""
    if not source.name.lower().endswith((".nii", ".nii.gz")):
        image: Any = nib.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, _SCANNER)
        axes = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        upright = np.allclose(axes.T @ axes, np.eye(3), atol=1e-4)
        image.set_qform(affine, _SCANNER if upright else 0)
        return image
    stored: Any = nib.load(source)
    if stored.shape[:3] != array.shape:
        return None
    header = type(stored.header)()
    header.set_data_dtype(np.uint8)
    header.set_data_shape(array.shape)
    for name in _GEOMETRY:
        header[name] = stored.header[name]
    header["pixdim"][:4] = stored.header["pixdim"][:4]
    return type(stored)(array, None, header)


def write_result(path: Path, content: bytes) -> None:
    """Write a result whole and flushed, or not at all. Raises DataError, with the system's error as its cause."""
    try:
        write_bytes(path, content, shared=dist.is_initialized())  # processes may share a last case
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); free some space") from error


@SaveImaged.register  # whatever leaves the writing out, as MONAI Label does, finds it by that class
class SaveOverlayd(EachKeyd):
    """Write ``<case>_overlay.png``: slices of a volume with the outline of each class and the prompts that were given.

    Up to six slices, cut as the network cuts them, are spread over those where something was found, the one with most
    classes, and of these most of them, included; where nothing was found it is one in the middle of the prompt. The
    grid is that of the image's file, the intensities those that the network saw: what a crop leaves out is black.
    Items pass unchanged. A picture that cannot be drawn is told in the log, and costs nothing else.

    Args:
        keys: segmentations as of ``SaveVolumed``.
        classes: names of the values 1, 2, ...
        output_dir: folder, made if need be.
        scan: channel of "image" to be shown.
        per_component: a prompt of one channel is a box for each of its components, as of the inferer.
        wanted: False writes nothing.
    Raises: DataError when the file cannot be written.
    """

    def __init__(
        self,
        keys: str,
        classes: Sequence[str],
        output_dir: str | os.PathLike[str],
        *,
        scan: int = 0,
        per_component: bool = False,
        wanted: bool = True,
    ) -> None:
        super().__init__(keys)
        self.folder, self.classes = Path(output_dir), list(classes)
        self.scan, self.per_component, self.wanted = scan, per_component, wanted

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        if not self.wanted:
            return
        try:
            picture = self._picture(d, d[key])
        except Exception as error:  # noqa: BLE001  the segmentation is what was asked for
            LOG.warning("%s: no picture could be drawn: %s", name_of(d), reason_of(error))
            return
        write_result(self.folder / file_name(name_of(d), PICTURE), _png(Image.fromarray(picture)))

    def _picture(self, d: Mapping[Hashable, Any], pred: Any) -> np.ndarray:
        image, affine = d["image"], _array(pred.affine)
        labels = _array(pred)[0].astype(np.uint8)
        axis = slice_axis(image, affine, labels.shape)
        planes = np.moveaxis(labels, axis, 0)
        prompt, rows = d.get("prompt"), d.get("boxes")
        rows = rows.as_subclass(torch.Tensor).cpu() if isinstance(rows, torch.Tensor) else None
        if rows is not None:
            asked: Any = asked_slices(None, rows)
            prompt = on_grid_of(image, asked.expand(1, *image.shape[1:]))
        # whole slices have no box to be seen
        prompt = None if prompt is None or (rows is None and bool((prompt > 0).all())) else prompt
        panels, kinds = [], set()
        for index in _shown_slices(planes) or [_middle(image if prompt is None else prompt, affine, axis)]:
            place: Any = (affine, labels.shape, axis, index)
            grey = pictures.sampled(_bare(image)[self.scan], _array(image.affine), *place)
            boxes, clicks = ([], []) if rows is None else _rows_seen(rows, _array(image.affine), place)
            if rows is None and prompt is not None:
                boxes = self._boxes(prompt, place)
            kinds |= {word for word, there in (("box", boxes), ("click", clicks)) if there}
            picture = pictures.draw(
                pictures.as_seen(grey, affine, axis),
                [(pictures.as_seen(planes[index], affine, axis), CLASSES)],
                aspect=pictures.aspect_of(affine, axis),
                boxes=boxes,
                clicks=clicks,
            )
            picture = pictures.named(picture, pictures.letters_of(affine, axis))
            number = f"slice {index}" if axis == 2 else f"axis {axis}: {index}"  # boxes count slices along axis 2
            picture = pictures.noted(picture, number, pictures.BOTH, corner=True)
            panels.append(pictures.measured(picture, pictures.width_of(affine, labels.shape, axis)))
        whole = pictures.side_by_side(panels)
        ml = abs(np.linalg.det(affine[:3, :3])) / 1000
        sizes = {k: int((labels == k).sum()) for k in range(1, len(self.classes) + 1)}
        shown = [(f"{self.classes[k - 1]} {in_words(n * ml)} mL", k - 1) for k, n in sizes.items() if n]
        words = [(word, CLASSES[k % len(CLASSES)]) for word, k in shown]
        words += [] if words else [("nothing found", pictures.BOTH)]
        words += [(kind, pictures.BOX) for kind in sorted(kinds)]
        return np.concatenate([whole, pictures.legend(name_of(d), whole.shape[1], words)])

    def _boxes(self, prompt: Any, place: Any) -> list[list[float]]:
        """Boxes of a prompt (N, H, W, D) in a slice of another grid: left, top, right, bottom edge, as seen."""
        affine, _, axis, _ = place
        found = [pictures.sampled(channel, _array(prompt.affine), *place) > 0 for channel in _bare(prompt)]
        seen = [torch.from_numpy(pictures.as_seen(plane, affine, axis).astype(np.uint8)) for plane in found]
        boxes = torch.cat(
            [boxes_of(p, per_component=self.per_component and len(seen) == 1).reshape(-1, 4) for p in seen]
        )
        return boxes[~boxes.isnan().any(dim=1)].tolist()


def _rows_seen(
    rows: torch.Tensor, source: np.ndarray, place: Any
) -> tuple[list[list[float]], list[tuple[float, float, bool]]]:
    """Boxes and clicks, rows of each slice (D, N, 4 + 3 P) or of a single one, in a slice of another grid: the edges of
    each box, and the middle of the pixel of each click, as seen."""
    affine, shape, axis, index = place
    matrix, plane = np.linalg.inv(affine) @ source, np.delete(shape, axis).tolist()
    seen = np.stack([pictures.as_seen(each, affine, axis) for each in np.indices(plane)], axis=-1)

    def pixel(x: float, y: float, z: int) -> tuple[float, float] | None:
        voxel = np.rint((matrix @ [y - 0.5, x - 0.5, z, 1])[:3])
        if voxel[axis] != index:  # most are of other slices, and looking for a voxel takes milliseconds
            return None
        found = np.argwhere((seen == np.delete(voxel, axis)).all(axis=-1))
        return (found[0, 1] + 0.5, found[0, 0] + 0.5) if len(found) else None

    boxes, clicks = [], []
    for z, each in enumerate(rows if rows.ndim == 3 else rows[None]):
        for row in each[~each.isnan().all(dim=1)].tolist():
            x0, y0, x1, y1 = row[:4]
            ends = [] if np.isnan(x0) else [pixel(x0 + 0.5, y0 + 0.5, z), pixel(x1 - 0.5, y1 - 0.5, z)]
            if ends and None not in ends:
                low, high = np.min(ends, axis=0) - 0.5, np.max(ends, axis=0) + 0.5  # type: ignore[arg-type]
                boxes.append([*low.tolist(), *high.tolist()])
            for x, y, label in np.reshape(row[4:], (-1, 3)).tolist():
                if not np.isnan(x) and (at := pixel(x, y, z)) is not None:
                    clicks.append((*at, label == INSIDE))
    return boxes, clicks


def in_words(size: float) -> str:
    """A volume or area with three digits at least, never with an exponent."""
    return f"{size:.0f}" if size >= 100 else f"{size:.3g}" if size >= 0.001 or size == 0 else "less than 0.001"


def slice_axis(image: Any, affine: np.ndarray, shape: Sequence[int]) -> int:
    """Axis of a file across which the network cut its slices; that of its only slice, where it has no more.

    Args:
        image: MetaTensor (S, H, W, D) as the network saw it: slices lie along D.
        affine, shape: of the file's grid.
    """
    if 1 in shape:
        return list(shape).index(1)
    along = _array(image.affine)[:3, 2]
    return int(np.abs(along @ (affine[:3, :3] / voxel_sizes(affine))).argmax())


def _shown_slices(planes: np.ndarray) -> list[int]:
    """Which of the slices (N, H, W) are shown: none where all are empty."""
    filled = np.flatnonzero(planes.any(axis=(1, 2))).tolist()
    if len(filled) <= _PANELS:
        return filled
    best = max(filled, key=lambda k: (len(np.unique(planes[k])), np.count_nonzero(planes[k])))
    chosen = [filled[int((n + 0.5) * len(filled) / _PANELS)] for n in range(_PANELS)]
    return sorted({*(k for k in chosen if k != min(chosen, key=lambda k: abs(k - best))), best})


def _middle(volume: Any, affine: np.ndarray, axis: int) -> int:
    """Slice of another grid in the middle of what is marked in a volume (N, H, W, D)."""
    marked = (_bare(volume) > _bare(volume).min()).any(dim=0).nonzero()
    centre = marked.double().mean(dim=0).cpu().numpy() if len(marked) else np.array(volume.shape[1:]) / 2
    return int(np.rint((np.linalg.inv(affine) @ _array(volume.affine) @ [*centre, 1])[axis]))


def _bare(tensor: Any) -> torch.Tensor:
    return torch.as_tensor(tensor).as_subclass(torch.Tensor)


def _array(tensor: Any) -> np.ndarray:
    return np.asarray(_bare(tensor).detach().cpu())


@SaveImaged.register  # whatever leaves the writing out, as MONAI Label does, finds it by that class
class SaveImagePngd(EachKeyd):
    """Write ``<case>_seg.png`` with the values of the data's own labels, and ``<case>_overlay.png``.

    The overlay is the stored image with the outline of each class and the prompts that the network was given: "boxes"
    (N, 4 ...), if there are any, on the grid of "image", a MetaTensor with its file's name. Items pass unchanged.

    Args:
        keys: the prediction on the grid of the file, MetaTensor (1, H, W, 1): 0, and 1 to the number of classes.
        classes: names of the values 1, 2, ...
        output_dir: folder, made if need be.
        labels: what values mean in label files (``datalists.labels_of``): class k is written as the smallest value of
            its name, all else as that of the background, or 0. None writes 0 to K.
        reader: how the stored image is read, as of ``LoadImage``.
        overlay: False leaves the picture out.
    Raises: ConfigError for a class without a value that a PNG can hold (0 to 65535); DataError for a prediction of
        another shape or with other values, for a case whose name leads to another folder, and when a file cannot be
        written.
    """

    def __init__(
        self,
        keys: str,
        classes: Sequence[str],
        output_dir: str | os.PathLike[str],
        *,
        labels: Mapping[str, str] | None = None,
        reader: str | None = None,
        overlay: bool = True,
    ) -> None:
        super().__init__(keys)
        self.folder = Path(output_dir)
        self.table = _table(classes, labels)
        self.overlay = overlay
        self.load = LoadImage(reader=reader, image_only=True, ensure_channel_first=True)

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        pred, case = d[key], str(d["case"])
        plain = torch.as_tensor(pred).as_subclass(torch.Tensor).detach().cpu()
        numbers = plain.round().long()
        if plain.ndim != 4 or plain.shape[0] != 1 or plain.shape[-1] != 1 or not bool((numbers == plain).all()):
            raise DataError(f"{case}: an image of whole numbers (1, H, W, 1) is written, got {tuple(plain.shape)}")
        if "/" in case or "\\" in case:
            raise DataError(f"{case!r} is no name of a file; rename the case in the datalist")
        if int(numbers.min()) < 0 or int(numbers.max()) >= len(self.table):
            raise DataError(f"{case}: {key} has values beyond the {len(self.table) - 1} classes")
        plane = numbers[0, ..., 0].numpy()
        write_result(self.folder / file_name(case, "_seg.png"), _png(Image.fromarray(self.table[plane])))
        if self.overlay:
            write_result(self.folder / file_name(case, PICTURE), _png(self._picture(d, plane, pred)))

    def _picture(self, d: Mapping[Hashable, Any], plane: np.ndarray, pred: Any) -> Image.Image:
        image = d["image"]
        stored = np.asarray(self.load(image.meta["filename_or_obj"]))  # (C, H, W, 1)
        boxes = d.get("boxes")
        if boxes is not None:
            affine = pred.affine if isinstance(pred, MetaTensor) else torch.eye(4)
            boxes = move_boxes(torch.as_tensor(boxes).as_subclass(torch.Tensor), image.affine, affine)
        return overlay_picture(np.moveaxis(stored[..., 0], 0, -1), plane, boxes)


def overlay_picture(image: np.ndarray, labels: np.ndarray, boxes: torch.Tensor | None = None) -> Image.Image:
    """The image with the outline of each class, the boxes, and clicks: discs inside, crosses outside of an object.

    Args:
        image: (H, W, C) with three channels for colour, else the first channel is shown; any range of values.
        labels: (H, W) whole numbers, 0 is background.
        boxes: (N, 4) as x0 y0 x1 y1 in pixel edges; NaN is passed over; with clicks as of ``points``.
    Returns: RGB picture of W x H pixels.
    """
    greys = image if image.shape[-1] == 3 else image[..., :1].repeat(3, axis=-1)
    colours = bytes_of(greys).astype(np.uint8)
    width = max(1, round(max(labels.shape) / _PIXELS_PER_LINE))
    lines = pictures.outline_of(labels, width)
    colours[lines] = np.array(CLASSES, dtype=np.uint8)[(labels[lines] - 1) % len(CLASSES)]
    picture = Image.fromarray(colours)
    pen = ImageDraw.Draw(picture)
    rows = torch.empty(0, 4) if boxes is None else boxes
    for x0, y0, x1, y1 in rows[~rows[:, :4].isnan().any(dim=1), :4].tolist():
        left, top = round(x0), round(y0)
        pen.rectangle([left, top, max(left, round(x1) - 1), max(top, round(y1) - 1)], outline=BOX, width=width)
    clicks = rows[:, 4:].reshape(-1, 3)
    for x, y, label in clicks[~clicks.isnan().any(dim=1)].tolist():
        pictures.mark(pen, (int(x), int(y)), BOX, inside=label == INSIDE, width=width)
    return picture


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _table(classes: Sequence[str], labels: Mapping[str, str] | None) -> np.ndarray:
    """Values to be written for 0, 1, ..., K: uint8 where that holds them, else uint16."""
    if labels is None:
        values = list(range(len(classes) + 1))
    else:
        found = [sorted(int(value) for value, name in labels.items() if name == wanted) for wanted in classes]
        missing = [name for name, its in zip(classes, found, strict=True) if not its]
        if missing:
            raise ConfigError(f"label_values have no value for {', '.join(missing)}, got {dict(labels)}")
        nothing = sorted(int(value) for value, name in labels.items() if name == BACKGROUND)
        values = [nothing[0] if nothing else 0, *(its[0] for its in found)]
    if min(values) < 0 or max(values) > 65535:
        raise ConfigError(f"a PNG holds values from 0 to 65535, got {values}")
    if len(set(values)) < len(values):
        raise ConfigError(f"background and classes need values of their own in a PNG, got {values} of {labels}")
    return np.asarray(values, dtype=np.uint8 if max(values) <= 255 else np.uint16)


class NameAfterCased(EachKeyd):
    """Let ``SaveImaged`` call a file ``<case>_<postfix>``: a case of several scans has no one file to be named after.

    Args:
        keys: entries to be saved; MetaTensors.
    """

    def _change(self, d: dict[Hashable, Any], key: Hashable) -> None:
        item = d[key].clone() if isinstance(d[key], MetaTensor) else MetaTensor(d[key])
        # with a suffix: MONAI cuts off what looks like one, and names may hold dots, as those of DICOM folders do
        item.meta["filename_or_obj"] = f"{file_name(str(d['case']), '_')[:-1]}.nii.gz"
        d[key] = item
