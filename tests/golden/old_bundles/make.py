"""How the ZIPs in this folder were made: by the code of commit 5ea1a42, the last that wrote bundles without settings.

    git worktree add OLD 5ea1a42 && PYTHONPATH=OLD python tests/golden/old_bundles/make.py FOLDER

trains two small bundles for few epochs on drawn cases, packs them, predicts one unlabelled case each with
``samseg predict``, and writes what is committed here: the ZIPs (``models/model.pt`` of the one with SAM reduced to what
was trained; the rest of it are the weights of pico, which are part of the package), the cases and their masks.
"""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from safetensors.torch import load
from samseg_monai.cli.workflow import run_workflow
from samseg_monai.data.brats import prepare_brats_men
from samseg_monai.data.folders import prepare_folders

from samseg_monai.bundles import build_bundle, pack_bundle
from samseg_monai.demo.brain_phantoms import write_brats_cases

MODEL, OWNED = "models/model.pt", "models/adapter.safetensors"
LORA = {"image_size": 128, "crop_size": [28, 32], "strategy::rank": 4, "strategy::decoder": False, "seed": 3}
UNET = {"image_size": 48, "crop_size": [40, 40], "network_def::net::channels": [4, 8, 16], "seed": 3,
        "network_def::net::strides": [2, 2], "network_def::net::num_res_units": 1}  # fmt: skip


def phantoms(folder: Path) -> None:
    write_brats_cases(folder, 8, shape=(32, 36, 12), seed=3, unlabelled=1)
    prepare_brats_men(folder, folder / "datalist.json", fractions=(0.5, 0.25, 0.25), seed=0)


def hippocampi(folder: Path) -> None:
    """As in tests/conftest.py: two touching blobs of different brightness, and a seventh without a label."""
    rng = np.random.default_rng(0)
    for number in range(7):
        shape = (20 + number % 3, 28, 9)
        label = np.zeros(shape, dtype=np.uint8)
        label[6:14, 5:14, 2:7], label[6:14, 14:22, 2:7] = 1, 2
        image = (100 * label + rng.normal(0, 20, shape)).astype(np.int16)
        affine = np.diag([-1.0, -1.0, 1.5, 1.0])  # not the orientation of the bundle
        labelled = [("images", image), ("labels", label)] if number < 6 else [("unlabelled", image)]
        for kind, array in labelled:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, affine), folder / kind / f"volume_{number}.nii.gz")
    labels = {"1": "anterior", "2": "posterior"}
    prepare_folders(folder, folder / "datalist.json", labels=labels, counts=(3, 1, 2), progress=False)


def archive(bundle: Path, data: Path, run: Path, settings: dict, training: dict, evaluation: dict) -> Path:
    """Train, evaluate and pack."""
    shared = {"dataset_dir": str(data), "output_dir": str(run), **settings}
    demo = bundle / "configs" / "demo.json"
    run_workflow([bundle / "configs" / "train.json", demo], {**shared, **training})
    run_workflow([bundle / "configs" / "evaluate.json", demo], {**shared, **evaluation})
    return pack_bundle(run, run.parent / f"{bundle.name}.zip")


def predict(bundle: Path, cases: Path, output: Path, *words: str) -> None:
    command = [sys.executable, "-m", "samseg_monai", "predict", bundle, "--input", cases, "--output", output, *words]
    subprocess.run([*map(str, command)], check=True)


def without_base(path: Path, target: Path) -> None:
    """Copy a packed ZIP, its model.pt with the trained tensors only."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith(MODEL):
                owned = load(old.read(member.filename.replace(MODEL, OWNED)))
                state = torch.load(io.BytesIO(content), weights_only=True)
                assert all(torch.equal(state[name], value) for name, value in owned.items())
                stream = io.BytesIO()
                torch.save({name: state[name] for name in state if name in owned}, stream)
                content = stream.getvalue()
            new.writestr(member, content)


def main(folder: Path) -> None:
    work = folder / "work"
    phantoms(work / "brats")
    hippocampi(work / "hippocampus")
    lora = archive(build_bundle("meningioma", "lora", work / "bundles"), work / "brats", work / "runs" / "lora", LORA,
                   {"epochs": 2, "batch_size": 4, "lr": 0.01}, {})  # fmt: skip
    unet = archive(build_bundle("hippocampus", "unet", work / "bundles"), work / "hippocampus",
                   work / "runs" / "unet", {**UNET, "sam_variant": None}, {"epochs": 30, "batch_size": 4, "lr": 0.02},
                   {"min_component_mm3": 9})  # fmt: skip
    shutil.copytree(work / "brats" / "unlabelled", folder / "brats")
    shutil.copytree(work / "hippocampus" / "unlabelled", folder / "hippocampus")
    case = next((folder / "brats").iterdir()).name
    (folder / "boxes.json").write_text(json.dumps({case: [{"slices": [3, 8], "box": [8, 8, 24, 26]}]}))
    predict(lora, folder / "brats", folder / "masks" / "boxes", "--boxes", folder / "boxes.json")
    predict(lora, folder / "brats", folder / "masks" / "image")
    predict(unet, folder / "hippocampus", folder / "masks" / "hippocampus")
    without_base(lora, folder / lora.name)
    shutil.copy(unet, folder / unet.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
