"""Shared fixtures: seeded draws, tiny phantoms in the BraTS layout, real volumes where they are at hand."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("MONAI_FAIL_ON_DUPLICATE_CONFIG", "1")
torch.set_num_threads(2)

# the smallest SAM with every part in it, on the smallest phantoms: whole workflows in seconds
TINY = {
    "sam_variant": "tiny",
    "sam_checkpoint": "random",
    "image_size": 64,
    "crop_size": [32, 36],
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory) -> Path:
    """Eight labelled cases and one unlabelled, with a datalist: 4 to train, 2 to validate, 2 to test."""
    from samseg_monai.data.brats import prepare_brats_men
    from samseg_monai.data.phantoms import write_brats_cases

    folder = tmp_path_factory.mktemp("phantoms")
    write_brats_cases(folder, 8, shape=(32, 36, 12), seed=3, unlabelled=1)
    prepare_brats_men(folder, folder / "datalist.json", fractions=(0.5, 0.25, 0.25), seed=0)
    return folder


@pytest.fixture(scope="session")
def realdata() -> Path:
    """Folder of real volumes; tests that need it are skipped where it is not set."""
    folder = os.environ.get("SAMSEG_REALDATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("SAMSEG_REALDATA is not set to a folder of real volumes")
    return Path(folder)
