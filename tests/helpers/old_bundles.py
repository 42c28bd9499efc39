"""The ZIPs of commit 5ea1a42 in tests/golden/old_bundles, made whole: pico's weights are part of the package."""

import hashlib
import io
import zipfile
from pathlib import Path

import torch

from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import LoRA

FOLDER = Path(__file__).parents[1] / "golden" / "old_bundles"
LORA, UNET = "meningioma_segmentation_lora", "hippocampus_segmentation_unet"


def old_bundle(name: str, folder: Path) -> Path:
    """The ZIP as 5ea1a42 wrote it, below ``folder``: ``models/model.pt`` with all weights, and the sum of that."""
    target = folder / f"{name}.zip"
    with zipfile.ZipFile(FOLDER / f"{name}.zip") as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        model, sums = f"{name}/models/model.pt", f"{name}/SHA256SUMS"
        content = old.read(model)
        whole = _with_base(content) if name == LORA else content
        for member in old.infolist():
            data = {model: whole, sums: b""}.get(member.filename, old.read(member))
            if member.filename == sums:
                lines = old.read(member).decode().splitlines(keepends=True)
                digest = hashlib.sha256(whole).hexdigest()
                data = "".join(f"{digest}  models/model.pt\n" if "model.pt" in x else x for x in lines).encode()
            new.writestr(member, data)
    return target


def _with_base(trained: bytes) -> bytes:
    network = SamSegmenter("pico", strategy=LoRA(rank=4), image_size=128, scans=4)
    network.load_base()
    state = network.state_dict()
    owned = torch.load(io.BytesIO(trained), weights_only=True)
    assert set(owned) == set(network.owned)
    stream = io.BytesIO()
    torch.save({**state, **owned}, stream)
    return stream.getvalue()


def unpacked(archive: Path) -> Path:
    """The folder of a ZIP, beside it."""
    with zipfile.ZipFile(archive) as content:
        content.extractall(archive.parent)
    return archive.with_suffix("")
