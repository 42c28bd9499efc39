"""What the crop of a task leaves out of the cases of a datalist: counted before anything is trained, by what trains."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser

from samseg_monai.bundles.build import compose, write_bundle
from samseg_monai.bundles.door import literal, own_errors
from samseg_monai.bundles.running import mute_readers
from samseg_monai.data.datalists import load_datalist, read_datalist, write_datalist
from samseg_monai.data.datalists.splits import SECTIONS
from samseg_monai.data.slices import EveryNth, SliceDataset
from samseg_monai.settings import RunSettings

SHOWN = 10  # cases of a summary; the datalist has all of them
TRAINED = "lora"  # any strategy that is trained: the crop is the task's
ONE = EveryNth(1_000_000)  # of a case only one slice stays in memory


@dataclass(frozen=True)
class Cut:
    """What a crop leaves out.

    Attributes:
        task: name of the task whose crop it is.
        crop: as its settings give it, with the unit; empty for none.
        of: number of cases that were read.
        cases: those of which something is left out: voxels of the image's foreground and of the label, and of how many
            (``samseg_monai.data.CUT``).
    """

    task: str
    crop: str
    of: int
    cases: dict[str, dict[str, int]]

    def lines(self) -> list[str]:
        """The summary as text, cases that lose most of their label first."""
        if not self.crop:
            return [f"crop of task {self.task}: none, slices are seen whole"]
        labels = sum(1 for counts in self.cases.values() if counts["label"])
        worst = sorted(self.cases.items(), key=lambda pair: (-pair[1]["label"], -pair[1]["image"], pair[0]))
        more = len(worst) - SHOWN
        return [
            f"crop of task {self.task}, {self.crop}: cuts something of {len(self.cases)} of {self.of} cases, "
            f"of the label of {labels}",
            *(
                f"  {case}: {n['image']} of {n['image_of']} voxels of the image's foreground, {n['label']} of "
                f"{n['label_of']} of the label"
                for case, n in worst[:SHOWN]
            ),
            *([f'  and {more} more, see "cut" in the datalist'] if more > 0 else []),
        ]


def count_cut(
    task: str, datalist: str | Path, dataset_dir: str | Path, *, num_threads: int = 2, progress: bool = True
) -> Cut:
    """Count it for every case, with the transforms of a training (section training) or of an evaluation (the others).

    A task without a crop reads nothing.

    Args:
        task: name of a task's recipe, or path of one.
        datalist: of volumes; it gets the counts as "cut".
        dataset_dir: folder that its paths are relative to.
        num_threads: cases read at the same time.
        progress: show bars.

    Raises:
        BundleError: no such recipe.
        ConfigError: classes of the task are not among the labels.
        DataError: files that cannot be read, or that are not those that were prepared; all of a section.
    """
    settings = compose(task, TRAINED)
    mute_readers()
    name, crop = settings.task.name, _crop(settings.run)
    content = read_datalist(datalist)
    sections = [section for section in SECTIONS if content[section]] if crop else []
    cut: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory(prefix="samseg-") as scratch, own_errors():
        parser = ConfigParser()
        parser.read_config(str(write_bundle(settings, Path(scratch) / "bundle") / "configs" / "train.json"))
        changes: dict[str, Any] = {"dataset_dir": literal(str(dataset_dir)), "datalist": literal(str(datalist))}
        changes["scans"] = [s for s in settings.task.scans if s in content.get("scans", ())] or content.get("scans")
        changes |= {} if content["training"] else {"trained_spacing": None}
        parser.update({key: value for key, value in changes.items() if key != "scans" or value})
        for section in sections:
            transforms = parser.get_parsed_content("train::preprocessing" if section == "training" else "preprocessing")
            items = load_datalist(datalist, dataset_dir, section, scans=changes["scans"])
            dataset = SliceDataset(
                items, transforms, picker=ONE, keys=["label"], num_threads=num_threads, progress=progress
            )
            cut |= dataset.cut
    if crop:
        content["cut"] = {"task": name, "crop": crop, "cases": cut}
        write_datalist(content, datalist)
    return Cut(name, crop, sum(len(content[section]) for section in sections), cut)


def _crop(run: RunSettings) -> str:
    size, unit = (run.crop_size, "voxels") if run.crop_size is not None else (run.crop_mm, "mm")
    return "" if size is None else f"{' x '.join(f'{side:g}' for side in size)} {unit}"
