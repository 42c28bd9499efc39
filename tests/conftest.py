"""Shared fixtures: seeded draws, tiny phantoms in the BraTS layout, real volumes where they are at hand."""

import logging
import os
import shutil
from pathlib import Path

# before torch is imported: threads that wait by spinning slow a busy machine many times over
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import nibabel as nib
import numpy as np
import pytest
import torch

from tests.helpers.pictures import make_pictures

os.environ.setdefault("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, 2 // WORKERS))

# the smallest SAM with every part in it, on the smallest phantoms: whole workflows in seconds
TINY = {
    "sam_variant": "tiny",
    "sam_checkpoint": "random",
    "image_size": 64,
    "crop_size": [32, 36],
}


# files that train, predict through whole bundles, export, or run the pages' commands: ``make check`` leaves them out
SLOW = {
    "audit_classes", "audit_geometry", "augmentation", "banked_slices", "broken_runs", "bundles", "contributing",
    "cost", "demo_abdomen", "demo_mobile", "docs", "door", "experiment", "export", "foreign_layouts", "kill_resume",
    "own_data", "pico", "planar", "processes", "published_plans", "realdata", "sam_parity", "site",
    "strategy_laws", "tracking", "travel", "tutorial", "zoo",
}  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark what is slow, and begin with the longest files, or one worker would be left alone with one of them."""
    long = ("strategy_laws", "export", "docs", "bundles", "demo_abdomen", "contributing")
    order = {name: place for place, name in enumerate([*long, *sorted(SLOW - set(long))])}
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: order.get(item.path.stem.removeprefix("test_"), len(order)))


def pytest_runtest_setup():
    """Drop what an earlier workflow logs to: the stream that pytest caught for that test is closed by now."""
    for logger in [logging.root, *map(logging.getLogger, list(logging.root.manager.loggerDict))]:
        for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
            logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Eight labelled cases and one unlabelled, with a datalist: 4 to train, 2 to validate, 2 to test."""
    from samseg_monai.data.datalists.brats import prepare_brats_men
    from samseg_monai.demo.brain_phantoms import write_brats_cases

    folder = tmp_path_factory.mktemp("phantoms")
    write_brats_cases(folder, 8, shape=(32, 36, 12), seed=3, unlabelled=1)
    prepare_brats_men(folder, folder / "datalist.json", fractions=(0.5, 0.25, 0.25), seed=0)
    return folder


@pytest.fixture(scope="session")
def abdomen(tmp_path_factory) -> Path:
    """Six labelled abdominal phantoms and one unlabelled, with a datalist: 3 to train, 1 to validate, 2 to test."""
    from samseg_monai.data.datalists.synapse import prepare_synapse
    from samseg_monai.demo.abdomen_phantoms import write_btcv_cases

    folder = tmp_path_factory.mktemp("abdomen")
    write_btcv_cases(folder, 6, shape=(40, 32, 16), seed=3, unlabelled=1)
    prepare_synapse(folder, folder / "datalist.json", validation=1, allow_missing=True, progress=False)
    return folder


@pytest.fixture(scope="session")
def hippocampi(tmp_path_factory) -> Path:
    """Six volumes of unequal size in plain folders, two touching blobs in each: 3 train, 1 validates, 2 test."""
    from samseg_monai.data.datalists.folders import prepare_folders

    folder = tmp_path_factory.mktemp("hippocampi")
    rng = np.random.default_rng(0)
    for number in range(6):
        shape = (20 + number % 3, 28, 9)
        label = np.zeros(shape, dtype=np.uint8)
        label[6:14, 5:14, 2:7], label[6:14, 14:22, 2:7] = 1, 2
        image = (100 * label + rng.normal(0, 20, shape)).astype(np.float32)
        for kind, array in (("images", image), ("labels", label)):
            (folder / kind).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / kind / f"volume_{number}.nii.gz")
    prepare_folders(
        folder,
        folder / "datalist.json",
        labels={"1": "anterior", "2": "posterior"},
        counts=(3, 1, 2),
        progress=False,
    )
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Folder of seven small PNG images with labels 0 and 255, and their datalist; distances in pixels."""
    return make_pictures(tmp_path_factory.mktemp("pictures") / "discs")


@pytest.fixture(scope="session")
def phantoms_of(phantoms, abdomen, hippocampi, pictures):
    """Folder of tiny cases of the task that a bundle is named after; ``images`` of single scans are its unlabelled."""
    unlabelled = hippocampi / "unlabelled"
    if not unlabelled.exists():
        shutil.copytree(hippocampi / "images", unlabelled)
    folders = {"meningioma": phantoms, "abdomen": abdomen, "hippocampus": hippocampi}
    folders["brain_tumour_t1c"] = pictures
    return lambda bundle: folders[bundle.partition("_segmentation_")[0]]


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of real volumes; tests that need it are skipped where it is not set."""
    folder = os.environ.get("SAMSEG_REALDATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SAMSEG_REALDATA is not set to a folder of real volumes")
    return Path(folder)
