"""A packed bundle in MONAI Label, which builds transforms, network and inferer of inference.json by their keys.

Without MONAI Label the contract of ``monailabel.tasks.infer.bundle.BundleInferTask`` (0.8.5) is walked through; where
``make test-all`` could install it, MONAI Label itself is asked. Both must find what ``samseg predict`` finds.
"""

import json
import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import LoadImaged, SaveImaged

from samseg_monai.errors import DataError, PromptError
from tests.helpers.commands import samseg
from tests.helpers.packed import packed

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".venv_monailabel"
BOX = [{"slices": [3, 6], "box": [5, 6, 20, 22]}, {"slice": 6, "box": [22, 6, 30, 20]}]
ROI = [{"slices": [2, 11], "box": [5, 0, 20, 22]}]
LADDER, UNET, ZERO_SHOT, LORA = "abdomen ladder", "hippocampus unet", "meningioma zero_shot", "meningioma lora"
# entries of a request -> options of samseg predict
ASKED = {
    "none": ({}, []),
    "whole slice": ({"whole_slice": True}, ["--whole-slice"]),
    "boxes": ({"boxes": BOX}, BOX),
    "text": ({"boxes": json.dumps(BOX), "whole_slice": "false", "roi": []}, BOX),
    "roi": ({"roi": [20, 5, -3, 22, 2, 40]}, ROI),
}
PROMPTED = [(ZERO_SHOT, name) for name in ASKED if name != "none"]
PAIRS = [(LADDER, "none"), (UNET, "none"), (LORA, "whole slice"), *PROMPTED]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bundles")
    crops = {"meningioma": {"crop_size": [40, 30]}}  # pads along one axis and cuts along the other
    return {pair: packed(*pair.split(), folder, **crops.get(pair.split()[0], {}))
            for pair in (LADDER, UNET, ZERO_SHOT, LORA)}  # fmt: skip


@pytest.fixture(scope="module")
def images(phantoms, abdomen, hippocampi, tmp_path_factory):
    """One file for each task: what MONAI Label gives a bundle. Four scans are one file with four channels."""
    folder = tmp_path_factory.mktemp("images")
    case = next(path for path in sorted((phantoms / "unlabelled").iterdir()) if path.is_dir())
    scans = [nib.load(case / f"{case.name}-{scan}.nii.gz") for scan in ("t1n", "t1c", "t2w", "t2f")]
    array = np.stack([np.asarray(scan.dataobj, np.float32) for scan in scans], axis=-1)
    four = folder / "p.7_tumour.nii.gz"
    nib.save(nib.Nifti1Image(array, scans[0].affine), four)
    return {
        "meningioma": four,
        "abdomen": next(path for path in sorted((abdomen / "unlabelled").rglob("*.nii.gz"))),
        "hippocampus": sorted((hippocampi / "images").iterdir())[0],
    }


@pytest.fixture
def predicted(bundles, images, tmp_path_factory, monkeypatch):
    """The labels that ``samseg predict`` finds for a bundle and the boxes or options it takes, and their affine."""

    def predict(pair: str, prompts: list) -> tuple[np.ndarray, np.ndarray]:
        image, out = images[pair.split()[0]], tmp_path_factory.mktemp("predicted")
        if prompts and isinstance(prompts[0], dict):
            (out / "boxes.json").write_text(json.dumps({image.name.removesuffix(".nii.gz"): prompts}))
            prompts = ["--boxes", out / "boxes.json"]
        assert samseg(monkeypatch, "predict", bundles[pair], "--input", image, "--output", out, *prompts) == 0
        [file] = out.glob("*_seg.nii.gz")
        assert file.name == image.name.replace(".nii.gz", "_seg.nii.gz")
        volume = nib.load(file)
        labels = np.asarray(volume.dataobj)
        assert len(np.unique(labels)) > 1, "nothing would be compared"
        return labels, volume.affine

    return predict


def ask(root: Path, image: Path, **request) -> tuple[torch.Tensor, dict]:
    """The result of BundleInferTask's steps, before its own writer, and the data at their end."""
    parser = ConfigParser()
    parser.read_config(root / "configs" / "inference.json")
    parser["bundle_root"], parser["use_click"] = str(root), False
    network = parser.get_parsed_content("network_def", instantiate=True)
    network.load_state_dict(torch.load(root / "models" / "model.pt", weights_only=True), strict=True)
    data = {"model_filename": ["model.pt"], "device": "cpu", "image": str(image), "image_path": str(image), **request}
    if options := parser.get("displayable_configs"):
        data = {**options, **data}
        parser["displayable_configs"].update({key: data[key] for key in options})
        parser.parse()
    for step in parser.get_parsed_content("preprocessing", instantiate=True).transforms:
        assert not isinstance(step, LoadImaged) or all(isinstance(data[key], str) for key in step.keys)
        data = step(data)
    inferer = parser.get_parsed_content("inferer", instantiate=True)
    with torch.no_grad():
        data["pred"] = inferer(data["image"][None], network.eval())[0]
    written = []
    for step in parser.get_parsed_content("postprocessing", instantiate=True).transforms:
        if isinstance(step, SaveImaged):
            written.append(step)
        else:
            data = step(data)
    assert len(written) == 2 and not list(root.rglob("*_seg.nii.gz"))  # what writes is MONAI Label's to leave out
    return data["pred"], data


@pytest.mark.parametrize(("pair", "asked"), PAIRS)
def test_the_parts_that_monai_label_takes_find_what_predict_finds(pair, asked, bundles, images, predicted):
    request, prompts = ASKED[asked]
    labels, affine = predicted(pair, prompts)
    found, data = ask(bundles[pair], images[pair.split()[0]], **request)
    assert found.shape == (1, *labels.shape) and np.array_equal(found[0].numpy(), labels)
    np.testing.assert_allclose(found.affine, affine, atol=1e-6)
    assert tuple(data["image"].meta["spatial_shape"]) == labels.shape  # to which MONAI Label resizes what differs


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        ({}, 'trained with a box around each object and got none; .*"whole_slice"'),
        ({"boxes": []}, "got none"),
        ({"boxes": "70 90"}, "boxes of the request: no JSON"),
        ({"boxes": '{"slice": 1}'}, "must be a list of boxes"),
        ({"boxes": [{"slice": 99, "box": [0, 0, 5, 5]}]}, "p.7_tumour.nii.gz: bad boxes"),
        ({"roi": [1, 2, 3, 4]}, r"roi of the request: got \[1, 2, 3, 4\]"),
        ({"roi": [1, 2, 3, 4, 90, 99]}, "lies outside a volume of"),
        ({"roi": [1, 2, 3, 4, 5, float("nan")]}, "roi of the request"),
        ({"boxes": BOX, "whole_slice": True}, "got boxes and whole_slice"),
    ],
)
def test_a_request_that_is_no_prompt_is_refused(request_, told, bundles, images):
    with pytest.raises(PromptError, match=told):
        ask(bundles[ZERO_SHOT], images["meningioma"], **request_)


def test_an_image_without_prompts_is_none_of_the_ladder_and_its_options(bundles):
    for pair, options in ((LADDER, None), (ZERO_SHOT, {"boxes": "", "whole_slice": False})):
        config = json.loads((bundles[pair] / "configs" / "inference.json").read_text(encoding="utf-8"))
        assert config.get("displayable_configs") == options
        assert "label" not in json.dumps(config["load_transforms"])


def test_two_dimensional_images_are_refused(pictures, tmp_path):
    image = next(path for path in sorted(pictures.rglob("*.png")))
    for strategy in ("unet", "lora"):
        with pytest.raises(DataError, match=rf"{image.name}: a 2-D image without the name of its case.*samseg predict"):
            ask(packed("brain_tumour_t1c", strategy, tmp_path), image)


@pytest.mark.whole
def test_monai_label_itself_finds_what_predict_finds(bundles, images, predicted, tmp_path):
    log = PLACE / "install.log"
    if not (PLACE / ".installed").is_file():
        why = log.read_text(errors="replace").strip().splitlines()[-1:] if log.is_file() else ["make test-all does it"]
        pytest.skip(f"MONAI Label is not installed in {PLACE.name}: {' '.join(why)}")
    jobs = [(pair, asked) for pair, asked in [*PAIRS, (ZERO_SHOT, "none")]]
    requests = [
        {"bundle": str(bundles[pair]), "request": {"image": str(images[pair.split()[0]]), **ASKED[asked][0]}}
        for pair, asked in jobs
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    words = [PLACE / "bin" / "python", ROOT / "tests" / "helpers" / "ask_monailabel.py", json.dumps(requests)]
    answer = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    *answers, refused = json.loads(answer.stdout.splitlines()[-1])
    assert "PromptError" in refused["error"] and '"whole_slice"' in refused["error"]
    assert {key: refused["options"][key] for key in ("boxes", "whole_slice")} == {"boxes": "", "whole_slice": False}
    for (pair, asked), found in zip(jobs[:-1], answers, strict=True):
        assert "error" not in found, (pair, asked, found)
        labels, affine = predicted(pair, ASKED[asked][1])
        volume = nib.load(found["file"])
        assert np.array_equal(np.asarray(volume.dataobj), labels), (pair, asked)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
        assert found["type"] == "segmentation"
    assert list(answers[0]["labels"].items())[:2] == [("spleen", 1), ("right kidney", 2)]
    assert not [path for root in bundles.values() for path in root.rglob("*_seg.nii.gz")]
