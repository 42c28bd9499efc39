"""A bundle in Python: loaded once, asked as often as one likes."""

from __future__ import annotations

import json
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image

from samseg_monai.bundles.door import literal, open_bundle, own_errors
from samseg_monai.bundles.running import build_bare
from samseg_monai.data.files.case_list import CaseList
from samseg_monai.data.files.cases import NO_PROMPTS
from samseg_monai.errors import BundleError, DataError, PromptError
from samseg_monai.files import write_text

BOXES, MASK, WHOLE = "json", "mask", "image"  # sources of prompts
CASE = "image"  # name of a case that has no file


def load_bundle(
    path: str | Path,
    *,
    sam_checkpoint: str | None = None,
    device: str | None = None,
    trust: bool = False,
    int8: bool = False,
) -> LoadedBundle:
    """Load a bundle for prediction.

    Args:
        path: folder or ZIP of a bundle, or ``output_dir`` of a run.
        sam_checkpoint: base weights, if the bundle holds none.
        device: cpu, cuda, cuda:1 ...; None: a GPU if there is one.
        trust: run the JSON of the bundle itself, which can do whatever its maker likes.
        int8: compute with 8-bit numbers in SAM's image encoder, on a CPU.

    Raises: as ``open_bundle``; BundleError: a bundle that knows no int8.
    """
    return LoadedBundle(path, sam_checkpoint=sam_checkpoint, device=device, trust=trust, int8=int8)


class LoadedBundle:
    """What ``load_bundle`` gives.

    Attributes:
        name: of the bundle.
        classes, scans: names, in the order of labels 1, 2, ... and of channels.
        prompted: whether it takes boxes or masks.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sam_checkpoint: str | None = None,
        device: str | None = None,
        trust: bool = False,
        int8: bool = False,
    ) -> None:
        stack = ExitStack()
        weakref.finalize(self, stack.close)
        self._opened = stack.enter_context(open_bundle(path, trust=trust))
        self._opened.check()
        self._scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="samseg-")))
        self._given = {"sam_checkpoint": sam_checkpoint, "device": device, **(self._opened.int8() if int8 else {})}
        self._ready: dict[str, Any] = {}
        config = self._opened.parser().get()
        self.name, self.prompted = self._opened.name, self._opened.prompted
        self.classes, self.scans = tuple(config["classes"]), tuple(config["scans"])
        self._images = "spacing_mm" in config

    def __repr__(self) -> str:
        prompts = "boxes or masks" if self.prompted else "none"
        return f"<{self.name}: {', '.join(self.scans)} -> {', '.join(self.classes)}; prompts: {prompts}>"

    def predict(
        self,
        image: str | Path | np.ndarray,
        *,
        boxes: str | Path | Sequence[Any] | Mapping[str, Any] | None = None,
        mask: str | Path | None = None,
        whole_slice: bool = False,
        affine: np.ndarray | None = None,
        allow_modality: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Segment one case.

        Args:
            image: file, folder of a case or DICOM series; or an array: a volume (X, Y, Z), of several scans
                (X, Y, Z, S); a 2-D image (rows, columns), or uint8 (rows, columns, 3) for RGB.
            boxes: for a bundle that takes prompts: of a volume ``[{"slices": [k0, k1], "box": [i0, j0, i1, j1]}]`` in
                voxels, both ends inclusive; of a 2-D image ``[[x0, y0, x1, y1]]`` in pixels; of both also
                clicks (``files.boxes``). Or the JSON file of ``samseg predict``, or its content.
            mask: file of a coarse mask on the image's grid.
            whole_slice: take the whole of each slice as the prompt.
            affine: (4, 4), voxels to RAS mm, of an array that is a volume; default: 1 mm.
            allow_modality: go on with an image that is, or by its values seems to be, of another modality than those
                that the bundle was trained on.

        Returns:
            Labels (0 is the background) with the shape of one scan, and the affine of the image; for a 2-D image the
            values of the labels that the bundle was trained on, and the unit matrix.

        Raises:
            PromptError: prompts for a bundle that takes none, none for one that takes some, or two kinds of them.
            DataError: image or prompts cannot be used, there are several cases, or ``affine`` of what needs none.
        """
        given = {BOXES: boxes is not None, MASK: mask is not None, WHOLE: whole_slice}
        sources = [source for source, there in given.items() if there]
        if len(sources) > 1:
            raise PromptError("predict: got several of boxes, mask and whole_slice; give one source of prompts")
        if not self.prompted and sources:
            raise PromptError(f"predict: {self.name} takes no prompts; leave boxes, mask and whole_slice out")
        if affine is not None and (self._images or isinstance(image, (str, Path))):
            raise DataError("predict: affine is for arrays that are volumes: files have their own, 2-D images none")
        if self.prompted and not sources:
            raise PromptError(f"predict: {NO_PROMPTS}")
        source = sources[0] if sources else "none"
        with own_errors(), tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            place = Path(image) if isinstance(image, (str, Path)) else self._written(image, affine, Path(folder))
            places: dict[str, Any] = {"dataset_dir": place, "boxes": None, "prompts": None}
            self._parser(source)["allow_modality"] = allow_modality
            places["prompts"] = None if mask is None else Path(mask)
            if isinstance(boxes, (str, Path)):
                places["boxes"] = Path(boxes)
            elif boxes is not None:
                case = self._cases(WHOLE, places).good[0]["case"] if isinstance(image, (str, Path)) else CASE
                places["boxes"] = table = Path(folder) / "boxes.json"
                try:  # numbers and arrays of NumPy and PyTorch, too
                    named = boxes if isinstance(boxes, Mapping) else {case: list(boxes)}
                    write_text(table, json.dumps(named, default=lambda value: value.tolist(), allow_nan=False))
                except (TypeError, ValueError, AttributeError) as error:
                    raise PromptError(f"predict: boxes are no lists of finite numbers: got {boxes!r:.200}") from error
            return self._run(source, places)

    def _cases(self, source: str, places: Mapping[str, Any]) -> CaseList:
        """The one case that there is."""
        parser = self._parser(source)
        for key, value in places.items():
            parser[key] = None if value is None else literal(str(Path(value).absolute()))
        found = parser.get_parsed_content("case_list")
        found.finish()
        if len(found.good) != 1:
            names = ", ".join(item["case"] for item in found.good[:5])
            raise DataError(f"predict: takes one case at a time, there are {len(found.good)} ({names} ...)")
        return found

    def _parser(self, source: str) -> Any:
        """The bundle's inference config for one source of prompts; what was built from it before stays built."""
        if source not in self._ready:
            parser = self._opened.parser()
            parser["predictions_dir"] = parser["output_dir"] = literal(str(self._scratch / "predictions"))
            for key in {"handlers", "named_handlers"} & parser.get().keys():
                parser[key] = type(parser[key])()  # no progress, no table
            if "pictures" in parser:
                parser["pictures"] = False
            if self.prompted:
                parser["prompt::source"] = source
            if self._opened.checkpoint is not None:
                parser["checkpoint"] = literal(str(self._opened.checkpoint))
            for key, value in self._given.items():
                if value is not None:
                    parser[key] = literal(value)
            self._ready[source] = parser
        return self._ready[source]

    def _run(self, source: str, places: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        cases = self._cases(source, places)
        parser = self._parser(source)
        if f"{source} engine" not in self._ready:
            build_bare(parser)
            parser.get_parsed_content("loaded")
            self._ready[f"{source} engine"] = (
                parser.get_parsed_content("evaluator"),
                parser.get_parsed_content("dataset"),
            )
        evaluator, dataset = self._ready[f"{source} engine"]
        dataset.data, evaluator.cases = cases.good, cases
        folder = self._scratch / "predictions"
        evaluator.run()
        cases.refuse("predict: the case failed")
        made = sorted(folder.glob("*_seg.*"))
        if len(made) != 1:
            raise BundleError(f"predict: {self.name} wrote {len(made)} segmentations, expected one")
        if made[0].suffix == ".png":
            result = np.asarray(Image.open(made[0])), np.eye(4)
        else:
            volume: Any = nib.load(made[0])
            result = np.asarray(volume.dataobj), np.asarray(volume.affine)
        for path in folder.iterdir():
            path.unlink()
        return result

    def _written(self, array: np.ndarray, affine: np.ndarray | None, folder: Path) -> Path:
        """A file that holds an array as the bundle reads it."""
        array = np.asarray(array)
        grey = array.ndim == 2 and array.dtype.kind in "buif"
        if self._images and not grey and (array.shape[2:] != (3,) or array.dtype != np.uint8):
            got = f"an array {array.shape} of {array.dtype}"
            raise DataError(
                f"predict: got {got}, expected numbers (rows, columns), or uint8 (rows, columns, 3) for RGB"
            )
        if self._images:
            kept = array.dtype in (np.uint8, np.uint16)
            path = folder / f"{CASE}{'.png' if kept else '.tif'}"
            Image.fromarray(array if kept else array.astype(np.float32)).save(path)
            return path
        if array.ndim not in (3, 4) or array.dtype.kind not in "buif":
            raise DataError(f"predict: got an array {array.shape} of {array.dtype}, expected numbers (X, Y, Z[, S])")
        wide = np.float64 if array.dtype.itemsize > 4 else np.float32
        kind = (
            np.uint8
            if array.dtype == bool
            else array.dtype
            if array.dtype.kind in "ui" and wide == np.float32
            else wide
        )
        path = folder / f"{CASE}.nii.gz"
        nib.save(nib.Nifti1Image(array.astype(kind), np.eye(4) if affine is None else affine), path)
        return path
