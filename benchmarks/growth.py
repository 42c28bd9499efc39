"""How time and memory grow with the number of cases: 200, 2,000 and 20,000 of 8 x 8 x 2 voxels.

Of every part of the package that goes over all cases: processor seconds, and how far its memory rises above what it
was before. Each runs in a process of its own, one after the other, behind a small run that pays for imports. Cases are
tiny, so that what is measured is the bookkeeping; an exponent of 1 is linear (seconds ~ cases ** exponent). Files lie
in a temporary folder; of DICOM there are 5,000 series at most. Writes benchmarks/results/growth.json, where the parts
that are not asked for stay as they are:

    OMP_NUM_THREADS=1 python benchmarks/growth.py
    OMP_NUM_THREADS=1 python benchmarks/growth.py --parts report boxes
    python benchmarks/growth.py --parts report --sizes 200 2000 --show
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import logging
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samseg_monai.faults import peak_memory

SIZES = (200, 2000, 20000)
MOST_SERIES = 5000
RESULT = Path(__file__).parent / "results" / "growth.json"
WARM = 12  # cases of the run that pays for imports
SHAPE = (8, 8, 2)
CLASSES = ("tumour", "oedema")
LABELS = {"0": "background", "1": "tumour", "2": "oedema"}
MIB = 1 << 20


# what lies on the disk


def name_of(number: int) -> str:
    """A case; two exams of each patient."""
    return f"case-{number // 2:05d}-{number % 2:03d}"


def nifti(voxels: bytes, code: int) -> bytes:
    """A NIfTI file of int16 (4) or uint8 (2) voxels of 1 mm, made by hand: nibabel would need as long as the rest."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *SHAPE, 1, 1, 1, 1)
    struct.pack_into("<hh", header, 70, code, 8 * (2 if code == 4 else 1))
    struct.pack_into("<8f", header, 76, 1, 1, 1, 1, 1, 1, 1, 1)
    struct.pack_into("<ff", header, 108, 352, 1)
    header[123] = 2  # mm
    struct.pack_into("<hh", header, 252, 0, 1)
    for row in range(3):
        struct.pack_into("<4f", header, 280 + 16 * row, *(float(row == axis) for axis in range(4)))
    header[344:348] = b"n+1\0"
    return bytes(header) + voxels


def volume(number: int) -> tuple[bytes, bytes]:
    """Image and label of a case as NIfTI; no two images are equal."""
    rng = __import__("random").Random(number)
    image = struct.pack("<128h", *(rng.randrange(1000) for _ in range(128)))
    label = bytearray(128)
    for z in range(2):
        label[64 * z + 27 : 64 * z + 30] = b"\1\1\2"
    return nifti(image, 4), nifti(bytes(label), 2)


def make_nnunet(folder: Path, count: int) -> None:
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    said = {"name": "growth", "channel_names": {"0": "T1"}, "labels": {name: int(v) for v, name in LABELS.items()}}
    (folder / "dataset.json").write_text(json.dumps(said))
    for number in range(count):
        image, label = volume(number)
        (folder / "imagesTr" / f"{name_of(number)}_0000.nii").write_bytes(image)
        (folder / "labelsTr" / f"{name_of(number)}.nii").write_bytes(label)
    rows = [(name_of(number), f"patient-{number // 2}") for number in range(count)]
    with (folder / "patients.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case", "patient"), *rows])
    names = [name for name, _ in rows]
    cut = count // 4 * 2, count // 4 * 2 + count // 8 * 2
    split = {"training": names[: cut[0]], "validation": names[cut[0] : cut[1]], "testing": names[cut[1] :]}
    (folder / "split.json").write_text(json.dumps(split))


def make_folders(folder: Path, count: int) -> None:
    for number in range(count):
        case = folder / name_of(number)
        case.mkdir(parents=True)
        for name, content in zip(("t1n", "seg"), volume(number), strict=True):
            (case / f"{case.name}-{name}.nii").write_bytes(content)


def make_images(folder: Path, count: int) -> None:
    from PIL import Image

    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True)
    mask = Image.new("L", (8, 8))
    mask.paste(255, (2, 2, 5, 5))
    for number in range(count):
        rng = __import__("random").Random(number)
        Image.frombytes("L", (8, 8), rng.randbytes(64)).save(folder / "images" / f"{name_of(number)}.png")
        mask.save(folder / "masks" / f"{name_of(number)}_mask.png")


def make_dicom(folder: Path, count: int) -> None:
    """PATIENT/SERIES with two slices; numbers of a template are written over, as pydicom would need long."""
    import pydicom
    from pydicom.dataset import FileDataset, FileMetaDataset

    def uid(kind: int, number: int, piece: int = 0) -> str:
        return f"1.2.826.0.1.3680043.9.{kind}.{number + 1000000}.{piece + 1}"

    def slices(number: int) -> list[bytes]:
        found = []
        for k in range(2):
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
            meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = uid(1, number, k), "1.2.840.10008.1.2.1"
            tags = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
            tags.SOPClassUID, tags.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
            tags.StudyInstanceUID, tags.SeriesInstanceUID = uid(2, number), uid(3, number)
            tags.PatientID, tags.Modality, tags.SeriesDescription = f"P{number + 1000000}", "MR", "T1 axial"
            tags.SeriesNumber, tags.InstanceNumber, tags.ImageType = 1, k + 1, ["ORIGINAL", "PRIMARY"]
            tags.ImagePositionPatient, tags.ImageOrientationPatient = [0, 0, 2 * k], [1, 0, 0, 0, 1, 0]
            tags.PixelSpacing, tags.SliceThickness, tags.Rows, tags.Columns = [1, 1], 2, 8, 8
            tags.SamplesPerPixel, tags.PhotometricInterpretation = 1, "MONOCHROME2"
            tags.BitsAllocated = tags.BitsStored = 16
            tags.HighBit, tags.PixelRepresentation, tags.PixelData = 15, 0, bytes(range(128))
            stream = io.BytesIO()
            pydicom.dcmwrite(stream, tags, enforce_file_format=True)
            found.append(stream.getvalue())
        return found

    template, label = slices(0), volume(0)[1]
    for number in range(count):
        home = folder / f"patient-{number:05d}"
        (home / "series").mkdir(parents=True)
        for k, content in enumerate(template):
            own = content.replace(b"1000000", b"%d" % (number + 1000000))
            (home / "series" / f"{k}.dcm").write_bytes(own)
        (home / "seg.nii").write_bytes(label)


def make_datalist(folder: Path, count: int) -> None:
    """The nnU-Net folder with a datalist, its facts as prepare writes them (which another part measures)."""
    import hashlib

    from samseg_monai.data.datalists import case_hashes, write_datalist

    make_nnunet(folder, count)
    sections: dict[str, list[Any]] = {"training": [], "validation": [], "testing": []}
    hashes = {}
    for number in range(count):
        case, files = name_of(number), volume(number)
        hashes[case] = case_hashes(
            dict(zip(("T1", "label"), (hashlib.sha256(content).hexdigest() for content in files), strict=True))
        )[0]
        image, label = f"imagesTr/{case}_0000.nii", f"labelsTr/{case}.nii"
        item = {"case": case, "patient": f"patient-{number // 2}", "image": [image], "label": label}
        sections["training"].append({**item, "reference": label})
    header = {"name": "growth", "scans": ["T1"], "labels": LABELS, "label_coding": "own"}
    write_datalist({**header, **sections, "hashes": hashes}, folder / "datalist.json")


def make_runs(folder: Path, count: int) -> None:
    """Three evaluated runs: two classes a case, Dice and HD95, and a training's card with the hashes of its cases."""
    import random

    from samseg_monai.data.datalists import case_hash
    from samseg_monai.files import write_json
    from samseg_monai.metrics import write_rows

    rng = random.Random(0)
    for run in ("zero_shot", "lora", "decoder"):
        rows = []
        for number in range(count):
            for name in CLASSES:
                dice = rng.betavariate(8, 2)
                flags = {"excluded": False, "empty_prediction": False, "empty_reference": False}
                sizes = {"prediction_ml": 3.0 * dice, "reference_ml": 3.0}
                scores = {"dice": dice, "hd95_mm": 20 * (1 - dice)}
                rows.append({"case": name_of(number), "class": name, **scores, **flags, **sizes})
        (folder / run).mkdir(parents=True)
        write_rows(rows, folder / run / "cases.csv")
        write_json(folder / run / "metrics.json", {"metrics": {}, "cases": count, "cases_file": "cases.csv"})
        known = {"training": [case_hash(f"train-{n}") for n in range(count)], "validation": []}
        card: dict[str, Any] = {"strategy": {"name": run}, "sam_variant": "vit_b", "status": "completed"}
        card |= {"prompt_source": "none", "settings": {"section": "testing"}, "cases": known, "data_hash": "0" * 64}
        write_json(folder / run / "run_card.json", card)


# what is done with it


def prepare(folder: Path, **how: Any) -> None:
    from samseg_monai.data.datalists.folders import prepare_folders

    prepare_folders(folder, folder / "datalist.json", num_threads=1, progress=False, **how)


def prepare_folders_(folder: Path, count: int) -> None:
    prepare(folder, labels=LABELS)


def prepare_nnunet(folder: Path, count: int) -> None:
    prepare(folder, table=folder / "patients.csv", folds=5)


def split(folder: Path, count: int) -> None:
    from samseg_monai.data.datalists.splits import choose_splits

    patients = {name_of(number): f"patient-{number // 2}" for number in range(count)}
    for way in ({"split_file": folder / "split.json"}, {"folds": 5}, {"fractions": (0.5, 0.3, 0.2)}):
        choose_splits(patients, patients, **way)  # type: ignore[arg-type]


def prepare_images_(folder: Path, count: int) -> None:
    from samseg_monai.data.datalists.images import prepare_images

    how: dict[str, Any] = {"group": r"case-\d+", "labels": {"255": "tumour"}, "num_threads": 1, "progress": False}
    prepare_images(folder / "images", folder / "masks", folder / "datalist.json", **how)


def find_export(folder: Path, count: int) -> None:
    """Layout of an export of an archive, its patients and labels; the voxels are not read."""
    from samseg_monai.data.datalists.layouts import find_layout

    found = find_layout(folder, scans={"t1": "T1"})
    assert len(found.cases) == len(set((found.patients or {}).values())) == count


def load_datalist_(folder: Path, count: int) -> None:
    from samseg_monai.data.datalists import load_datalist

    assert len(load_datalist(folder / "datalist.json", folder)) == count


def dataset(folder: Path, **how: Any) -> Any:
    from samseg_monai.data.datalists import load_datalist
    from samseg_monai.data.slices import Foreground, SliceDataset
    from samseg_monai.transforms import LoadCased

    items = load_datalist(folder / "datalist.json", folder)
    load = LoadCased(["image", "label"], ensure_channel_first=True)
    return SliceDataset(items, [load], picker=Foreground(), num_threads=1, progress=False, **how)


def tenth(dataset: Any) -> list[Any]:
    """A part of an epoch: items are taken by their numbers."""
    return [dataset[number] for number in range(0, len(dataset), 10)]


def slices_memory(folder: Path, count: int) -> None:
    assert all(item["label"].shape == (1, 8, 8) for item in tenth(dataset(folder)))


def slices_disk(folder: Path, count: int) -> None:
    """Twice: the second start finds the files."""
    for _ in range(2):
        found = dataset(folder, cache="disk", cache_dir=folder / "slices")
    assert all(item["label"].shape == (1, 8, 8) for item in tenth(found))


def embeddings(folder: Path, count: int) -> None:
    """Filled once, found by the second call, and read."""
    import torch
    from torch import nn

    class Encoder(nn.Module):
        encoder_frozen = True

        def encode(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.avg_pool2d(image.flatten(0, 1)[:, None], 4)

        def embedding_identity(self) -> dict[str, Any]:
            return {"weights": 0}

    found = dataset(folder, variants=1, embedding_dir=folder / "embeddings")
    for _ in range(2):
        found.fill(Encoder(), progress=False)
    assert all(item["embedding"].shape == (1, 1, 2, 2) for item in tenth(found))


def evaluator_of(folder: Path, items: list[dict[str, Any]], dataset: Any, keys: list[str], **how: Any) -> Any:
    import torch
    from monai.data import DataLoader
    from monai.inferers import SimpleInferer

    from samseg_monai.handlers.cases import CaseEvaluator
    from samseg_monai.transforms import LoadCased

    class Network(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return (image > 500).to(torch.uint8)

    loader = DataLoader(dataset(items, LoadCased(keys, ensure_channel_first=True)), batch_size=1)
    return CaseEvaluator(torch.device("cpu"), loader, network=Network(), inferer=SimpleInferer(), **how)


def evaluate(folder: Path, count: int) -> None:
    """CaseScores, its tables and the card, seen cases compared, around a network that compares with a number."""
    from monai.data import Dataset

    from samseg_monai import bundles
    from samseg_monai.data.datalists import load_datalist
    from samseg_monai.handlers import CaseTable, RunCard
    from samseg_monai.metrics import CaseScores

    items = load_datalist(folder / "datalist.json", folder)
    scores = CaseScores(classes=CLASSES, surface=False)
    card = RunCard(folder / "evaluation", settings={"section": "training"}, datalist=folder / "datalist.json")
    tables = [card, CaseTable(folder / "evaluation", name="dice")]
    how: dict[str, Any] = {"key_val_metric": {"dice": scores}, "val_handlers": tables}
    evaluator = evaluator_of(folder, items, Dataset, ["image", "reference"], prepare_batch=_image_alone, **how)
    bundles.note_cases(evaluator.network, [{"case": f"train-{n}"} for n in range(count)], [])
    bundles.seen_cases(evaluator.network, items)
    evaluator.run()


def merge_ranks(folder: Path, count: int) -> None:
    """Rows of two classes from eight processes, some cases in two of them, and the means of three scores."""
    from samseg_monai.metrics import aggregate
    from samseg_monai.metrics.engine import merge_rows

    flags = {"excluded": False, "empty_prediction": False, "empty_reference": False}
    names = [name_of(n) for n in range(count)] + [name_of((n + 1) % 8) for n in range(8)]
    scores = dict.fromkeys(("dice", "hd95_mm", "nsd_1mm"), 0.5)
    ranks = [
        [{"case": case, "class": name, **scores, **flags} for case in names[rank::8] for name in CLASSES]
        for rank in range(8)
    ]
    assert aggregate(merge_rows(ranks))["n"] == count


def report(folder: Path, count: int) -> None:
    from samseg_monai.report.page import write_report
    from samseg_monai.report.runs import RunResult
    from samseg_monai.report.tables import table_text, write_results

    runs = [RunResult.load(folder / name) for name in ("zero_shot", "lora", "decoder")]
    write_report(folder / "report.html", title="growth", runs=runs)
    write_results(folder / "report_results.json", runs)
    table_text(runs)


def boxes(folder: Path, count: int) -> None:
    """``samseg boxes from-mask --image``: the image of every mask is looked for in a folder of all."""
    from samseg_monai.data.files.boxes import write_boxes
    from samseg_monai.data.files.drawn_boxes import boxes_from_masks

    drawn = boxes_from_masks([folder / "labelsTr"], images=folder / "imagesTr")
    write_boxes(folder / "boxes.json", drawn.boxes)
    assert len(drawn.boxes) == count and not drawn.bad


def predict_folders(folder: Path, count: int) -> None:
    from samseg_monai.data.files.cases import find_cases

    assert len(find_cases(folder, scans=["t1n"]).good) == count


def predict_volumes(folder: Path, count: int) -> None:
    """A folder of files, with a folder of coarse masks as prompts."""
    from samseg_monai.data.files.cases import find_cases

    prompts = folder / "prompts"
    if not prompts.exists():
        prompts.mkdir()
        for number in range(count):
            os.link(folder / "labelsTr" / f"{name_of(number)}.nii", prompts / f"{name_of(number)}_0000_seg.nii")
    assert len(find_cases(folder / "imagesTr", scans=["T1"], prompts=prompts).good) == count


def predict_images(folder: Path, count: int) -> None:
    """Images and their masks in one folder, as many tools leave them."""
    from samseg_monai.data.files.cases import find_cases

    mixed = folder / "mixed"
    if not mixed.exists():
        mixed.mkdir()
        for path in (*(folder / "images").iterdir(), *(folder / "masks").iterdir()):
            os.link(path, mixed / path.name)
    assert len(find_cases(mixed, scans=["image"], kind="images").good) == count


def predict_dicom(folder: Path, count: int) -> None:
    """A folder with one series for each case, every slice read."""
    from samseg_monai.data.files.cases import find_cases

    flat = folder.with_name(f"{folder.name}-flat")
    if not flat.exists():
        for place in folder.glob("*/series"):
            (home := flat / place.parent.name).mkdir(parents=True)
            for path in place.iterdir():
                os.link(path, home / path.name)
    assert len(find_cases(flat, scans=["image"]).good) == count


def predict_run(folder: Path, count: int) -> None:
    """The run behind the finding of cases: results, the table of them, and cases of which every tenth fails."""
    import torch

    from samseg_monai.data.files.case_list import CaseList
    from samseg_monai.errors import DataError
    from samseg_monai.handlers.cases import CaseDataset
    from samseg_monai.handlers.predictions import PredictionTable
    from samseg_monai.transforms import SaveVolumed

    cases = CaseList()
    cases.good = [
        {"case": name_of(n), "image": [str(folder / "imagesTr" / f"{name_of(n)}_0000.nii")]} for n in range(count)
    ]
    out = folder / "predictions"
    save = SaveVolumed("pred", out)

    def finish(item: dict[str, Any]) -> Any:
        if item["case"].endswith("7-000"):
            raise DataError("an odd case")
        return save({**item, "pred": item["pred"].to(torch.uint8)})

    table = PredictionTable(cases, out, classes=("tumour",), prompt_source="none")
    how = {"cases": cases, "postprocessing": finish, "val_handlers": [table]}
    evaluator = evaluator_of(folder, cases.good, CaseDataset, ["image"], prepare_batch=_image_alone, **how)
    cases.run(evaluator, out)
    table.write()
    with (out / "predictions.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == count + 1


def _image_alone(batch: dict[str, Any], device: Any, non_blocking: bool, **named: Any) -> Any:
    return batch["image"], None  # no label: references are what is compared


PARTS: dict[str, tuple[str, Callable[[Path, int], None], str]] = {
    "prepare_folders": ("folders", prepare_folders_, "`samseg prepare folders`, a folder for each case"),
    "prepare_nnunet": ("nnunet", prepare_nnunet, "the same, nnU-Net's raw data, table of patients, five folds"),
    "split": ("nnunet", split, "splits by a file, in folds and by fractions"),
    "prepare_images": ("images", prepare_images_, "`samseg prepare images` (PNG)"),
    "find_export": ("dicom", find_export, "`samseg prepare folders --scan`: finding DICOM series and patients"),
    "load_datalist": ("datalist", load_datalist_, "reading and checking a datalist and its files"),
    "slices_memory": ("datalist", slices_memory, "cache of slices in memory"),
    "slices_disk": ("datalist", slices_disk, "cache of slices on disk, two starts"),
    "embeddings": ("datalist", embeddings, "stored embeddings, filled and found again"),
    "evaluate": ("datalist", evaluate, "evaluation around the network"),
    "merge_ranks": ("", merge_ranks, "its rows of eight processes, merged and summed up"),
    "report": ("runs", report, "`samseg report` of three runs"),
    "boxes": ("boxes", boxes, "`samseg boxes from-mask --image FOLDER`"),
    "predict_folders": ("folders", predict_folders, "`samseg predict`: finding cases in folders"),
    "predict_volumes": ("nnunet", predict_volumes, "finding files, and masks as their prompts"),
    "predict_images": ("images", predict_images, "finding 2-D images beside masks"),
    "predict_dicom": ("dicom", predict_dicom, "finding DICOM series, and reading them"),
    "predict_run": ("nnunet", predict_run, "its run: results, table, failed cases"),
}


def make_boxes(folder: Path, count: int) -> None:
    """Masks and images of equal names."""
    make_nnunet(folder, count)
    for path in (folder / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace("_0000", "")))


MAKERS = {
    "nnunet": make_nnunet, "folders": make_folders, "images": make_images, "dicom": make_dicom, "boxes": make_boxes,
    "datalist": make_datalist, "runs": make_runs,
}  # fmt: skip


def one(part: str, folder: Path, warm: Path, count: int) -> None:
    """Run a part in this process and print its seconds and bytes as JSON."""
    logging.disable(logging.CRITICAL)
    run = PARTS[part][1]
    with contextlib.redirect_stdout(io.StringIO()):
        run(warm, WARM)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before, start = peak_memory(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        run(folder, count)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": round(seconds, 3), "mib": round((peak_memory() - before) / MIB, 1)}))


def measure(parts: list[str], sizes: list[int], limit: float | None) -> dict[str, dict[int, dict[str, float]]]:
    """Seconds and MiB of each part at each size; folders of a kind are shared by the parts that want it."""
    found: dict[str, dict[int, dict[str, float]]] = {part: {} for part in parts}
    for count in sizes:
        for kind in dict.fromkeys(PARTS[part][0] for part in parts):
            cases = min(count, MOST_SERIES) if kind == "dicom" else count
            with tempfile.TemporaryDirectory(prefix="growth-") as temporary:
                for folder, number in (("data", cases), ("warm", WARM)):
                    if kind:
                        MAKERS[kind](Path(temporary, folder), number)
                for part in (part for part in parts if PARTS[part][0] == kind):
                    line = [sys.executable, __file__, "--one", part, temporary, str(cases)]
                    try:
                        done = subprocess.run(line, capture_output=True, text=True, timeout=limit, check=True)
                        found[part][cases] = json.loads(done.stdout.splitlines()[-1])
                    except subprocess.TimeoutExpired:
                        found[part][cases] = {"seconds": math.nan, "mib": math.nan}
                    except subprocess.CalledProcessError as error:
                        raise SystemExit(f"{part}, {count} cases:\n{error.stderr[-3000:]}") from error
                    print(f"{part}, {cases} cases: {found[part][cases]}", file=sys.stderr, flush=True)
    return found


def exponents(values: dict[int, dict[str, float]]) -> list[float]:
    pairs = zip(list(values.items())[:-1], list(values.items())[1:], strict=True)
    return [round(math.log(b["seconds"] / a["seconds"]) / math.log(m / n), 2) for (n, a), (m, b) in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES))
    parser.add_argument("--limit", type=float, default=None, help="seconds after which a part is given up")
    parser.add_argument("--show", action="store_true", help="write no file")
    parser.add_argument("--one", nargs=3, metavar=("PART", "FOLDER", "CASES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        part, folder, count = options.one
        one(part, Path(folder, "data"), Path(folder, "warm"), int(count))
        return
    found = measure(options.parts, options.sizes, options.limit)
    known = json.loads(RESULT.read_text())["parts"] if RESULT.exists() and not options.show else {}
    parts = {part: known.get(part, {}) for part in PARTS if part in known or part in found}
    for part, values in found.items():
        sizes = list(values)
        first, last, more = values[sizes[0]], values[sizes[-1]], sizes[-1] - sizes[0]
        parts[part] = {
            "what": PARTS[part][2],
            "seconds": {str(size): one["seconds"] for size, one in values.items()},
            "mib": {str(size): one["mib"] for size, one in values.items()},
            "exponents": exponents(values),
            "ms_per_case": round(1000 * (last["seconds"] - first["seconds"]) / more, 3) if more else None,
            "kib_per_case": round(1024 * (last["mib"] - first["mib"]) / more, 2) if more else None,
        }
    worst = max((max(part["exponents"][-1:], default=0.0) for part in parts.values()), default=0.0)
    result = {"ratio": None, "memory_ratio": None, "largest_exponent": worst, "shape": list(SHAPE), "parts": parts}
    if options.show:
        print(json.dumps(result, indent=2))
        return
    from measuring import record

    record("growth", result)


if __name__ == "__main__":
    main()
