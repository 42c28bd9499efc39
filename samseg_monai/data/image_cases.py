"""2-D images for prediction: found by their names, read to the last byte, matched with the boxes of a person."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samseg_monai.data.boxes import as_floats, box_problems
from samseg_monai.data.case_files import Found
from samseg_monai.data.image_pairs import MASK_ENDINGS, list_images
from samseg_monai.data.images import GREY, case_of, read_image
from samseg_monai.data.volumes import IMAGE_SUFFIXES, value_problem
from samseg_monai.errors import DataError, PromptError, raise_all

LOG = logging.getLogger(__name__)
_MADE_ENDINGS = (*MASK_ENDINGS, "_overlay")  # masks, and what a prediction writes beside them


def group_images(source: str | Path | Sequence[str | Path]) -> Found:
    """Find the images of ``source``: a folder of image files, a file, or a list of these; each file is a case.

    In a folder, masks (names ending in ``_mask`` or ``_seg``), overlays, sub-folders and other files are passed over.
    Files of one case, such as ``a.png`` and ``a.jpg``, are all bad: their results would overwrite each other.

    Raises:
        DataError: there is no image at all.
    """
    found = Found()
    sources = [Path(source)] if isinstance(source, (str, Path)) else [Path(path) for path in source]
    named: dict[str, list[Path]] = {}
    for path in dict.fromkeys(sources):  # one file listed twice is one case
        if path.is_dir():
            for case, file in _in_folder(path):
                named.setdefault(case, []).append(file)
        elif not path.is_file():
            found.bad[path.name] = f"no file or folder {path}"
        elif (case_name := case_of(path)) is None:
            found.bad[path.name] = f"is no 2-D image; expected one of {', '.join(IMAGE_SUFFIXES)}"
        else:
            named.setdefault(case_name, []).append(path)
    for case, paths in named.items():
        if len(paths) == 1:
            found.files[case] = paths
            continue
        same = len({path.name for path in paths}) < len(paths)
        for path in paths:
            others = " and ".join(str(other if same else other.name) for other in paths if other != path)
            found.bad[str(path) if same else path.name] = f"has the same name as {others}; rename or remove all but one"
    if not found.files and not found.bad:
        raise DataError(
            f"no 2-D image in {', '.join(map(str, sources)) or 'an empty list'}: expected files ending in "
            f"{', '.join(IMAGE_SUFFIXES)}, or DICOM files, in the folder itself"
        )
    return found


def _in_folder(folder: Path) -> list[tuple[str, Path]]:
    images, others, folders = list_images(folder)
    for path in [path for case, path in images if case.endswith(_MADE_ENDINGS)]:
        LOG.info("ignored %s: named like a mask or an overlay", path)
    for names, what in ((others, "no images"), (folders, "folders")):
        if names:
            LOG.warning("ignored in %s, as they are %s: %s", folder, what, ", ".join(names[:10]))
    return [(case, path) for case, path in images if not case.endswith(_MADE_ENDINGS)]


def check_image(case: str, path: Path, *, scans: Sequence[str], boxes: Mapping[str, Any] | None) -> dict[str, Any]:
    """Item of one image: ``{"case", "image"}`` and, with a table of boxes, its ``boxes`` as lists of four floats.

    Args:
        case: its name.
        path: its file.
        scans: names of the channels that the network wants: one for grey, three for RGB.
        boxes: content of a box file, see ``boxes``.

    Raises:
        DataError: the file cannot be used, or has another number of channels.
        PromptError: no boxes for this case, or boxes that are malformed or outside of the image, all at once.
    """
    picture = read_image(path)
    for note in picture.notes:
        LOG.warning("%s: %s", path.name, note)
    if len(picture.scans) != len(scans):
        kinds = ("in grey", "in RGB") if picture.scans == GREY else ("in RGB", "in grey")
        wants = kinds[1] if len(scans) in (1, 3) else f"of {len(scans)} channels"
        raise DataError(
            f"{path.name}: is {kinds[0]}, but the network was trained on images {wants} ({', '.join(scans)}); "
            f"save it {wants}"
        )
    if problem := value_problem(picture.array, "pixel"):
        raise DataError(f"{path.name}: {problem}")
    item: dict[str, Any] = {"case": case, "image": str(path.resolve())}
    if boxes is None:
        return item
    if case not in boxes:
        raise PromptError(f"no boxes are given for this image; add a list of them under the name {case!r}")
    size = picture.array.shape[:2]
    heading = f"bad boxes for an image of {size[1]} columns and {size[0]} rows"
    raise_all(box_problems(boxes[case], size), PromptError, heading)
    return {**item, "boxes": as_floats(boxes[case])}
