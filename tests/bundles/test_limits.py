"""Bundles and runs made to hurt whoever opens them: time, memory, files beside them, terminals, tracebacks."""

import json
import logging
import os
import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from safetensors.torch import load_file, save_file

from samseg_monai.bundles import build_bundle, load_bundle, pack_bundle, recipe_names, write_bundle
from samseg_monai.bundles.check import check_bundle
from samseg_monai.bundles.door import open_bundle
from samseg_monai.bundles.tensors import WithoutValues, described_tensors
from samseg_monai.checkpoints import load_model
from samseg_monai.errors import BundleError, DataError, SamsegError, log_visibly, raise_all
from samseg_monai.files import read_json
from samseg_monai.report.runs import RunResult
from samseg_monai.sam.weights import read_state
from samseg_monai.settings import merged, read_settings
from samseg_monai.transforms import CropInPlaned
from tests.bundles.test_door import small
from tests.helpers.commands import samseg
from tests.helpers.hostile_files import NAME

ESCAPE = "\x1b]0;title\x07"


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Path:
    """A bundle that predicts within a second."""
    return small(build_bundle("meningioma", "lora", tmp_path_factory.mktemp("running")))


@pytest.fixture
def mine(running, tmp_path) -> Path:
    return Path(shutil.copytree(running, tmp_path / NAME))


def edit(bundle: Path, change) -> None:
    path = bundle / "configs" / "settings.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    change(settings)
    path.write_text(json.dumps(settings))


def network(**given):
    def change(settings):
        settings["strategy"] |= {"method": {"name": "scratch"}, "network": given, "name": "net"}
        settings["run"] |= {"sam_variant": None, "image_size": 256, "prompt": {"source": "none"}}

    return change


def told(call, *arguments) -> str:
    """Text of the error of ours that a call raises, which no terminal obeys."""
    with pytest.raises(SamsegError) as caught:
        call(*arguments)
    assert str(caught.value).replace("\n", "").isprintable()
    return str(caught.value)


# --- settings

SETTINGS = {
    "a large SegResNet": (
        network(name="SegResNet", init_filters=512, blocks_down=[1] * 8, blocks_up=[1] * 7), "does not fit"),
    "a large SwinUNETR": (
        network(name="SwinUNETR", feature_size=768, depths=[24] * 4, num_heads=[3, 6, 12, 24]), "does not fit"),
    "a large UNet": (network(name="UNet", channels=[2048] * 8, strides=[2] * 7, num_res_units=8), "does not fit"),
    "a large UNETR": (network(name="UNETR", hidden_size=2048, mlp_dim=8192, num_heads=16), "does not fit"),
    "heads that do not divide": (network(name="UNETR", num_heads=7), "num_heads"),
    "kernels that MONAI refuses": (
        network(name="DynUNet", kernel_size=[1] * 3, strides=[1, 4, 4], upsample_kernel_size=[4, 4]), "can be built"),
    "large slices": (lambda s: s["run"].update(image_size=4096), "image_size"),
    "large stored slices": (lambda s: s["run"].update(store_size=4096), "store_size"),
    "many processes": (lambda s: s["run"].update(num_workers=256), "num_workers"),
    "many keys": (lambda s: s.update({f"k{i}": 0 for i in range(20_000)}), "20,000 problems"),
    "an escape as a key": (lambda s: s.update({ESCAPE: 1}), "no such key"),
    "an escape as a name": (lambda s: s["strategy"]["method"].update(name=ESCAPE), "zero_shot"),
    "references in a text": (lambda s: s["task"].update(title="A tumour @####x and %::::y"), "reference"),
    "one axis twice": (lambda s: s["task"].update(orientation="RLS"), "orientation"),
    "a window upside down": (lambda s: s["task"]["intensity"].update(window=[5, -5]), "smaller number"),
    "percentiles upside down": (lambda s: s["task"]["intensity"].update(percentiles=[99, 1]), "smaller number"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_hurt_are_refused_before_anything_is_made(name, mine):
    change, expected = SETTINGS[name]
    edit(mine, change)
    assert expected in told(load_bundle, mine)


@pytest.mark.parametrize("strategy", recipe_names("strategies"))
def test_a_network_without_values_has_the_shapes_of_the_real_one(strategy, tmp_path):
    try:
        bundle = build_bundle("meningioma", strategy, tmp_path)
    except BundleError:
        pytest.skip("not for this task")
    settings = read_json(bundle / "configs" / "settings.json", BundleError, "settings")
    changes = {"run": {"image_size": 64, **({"sam_variant": "tiny"} if settings["run"]["sam_variant"] else {})}}
    if settings["strategy"]["method"]["name"] == "lora":
        changes["strategy"] = {"method": {"rank": 2}}
    if settings["demo"] and settings["demo"].get("network"):
        changes["strategy"] = {"network": settings["demo"]["network"]}
    bundle = write_bundle(read_settings(merged({**settings, "demo": None}, changes), "test"), tmp_path / "small")
    with open_bundle(bundle) as opened:
        state, random = torch.get_rng_state(), opened.network().state_dict()
        torch.set_rng_state(state)
        opened.check()
        assert torch.equal(torch.get_rng_state(), state)
        with WithoutValues():
            shapes = opened.network().state_dict()
    assert {n: v.shape for n, v in shapes.items()} == {n: v.shape for n, v in random.items()}
    # Swin UNETR counts its tables of positions, whole numbers, when it is built
    counted = 8 * 7**6 if strategy == "swin_unetr_3d" else 20_000
    assert sum(v.numel() for v in shapes.values() if v.device.type == "cpu") <= counted


def test_keys_given_twice_are_told_and_not_obeyed(mine):
    path = mine / "configs" / "settings.json"
    text = path.read_text(encoding="utf-8")
    for key in ("\\u001b]0;x\\u0007", "\\ud800"):
        path.write_text(text.replace("{", f'{{"{key}": 1, "{key}": 2,', 1))
        assert "given twice" in told(load_bundle, mine)


def test_processes_of_a_prediction_are_the_receivers(mine):
    edit(mine, lambda s: s["run"].update(num_workers=3))
    with open_bundle(mine) as opened:
        assert opened.parser().get("num_workers") == 0 and opened.settings.run.num_workers == 3


def test_a_crop_pads_within_memory():
    crop = CropInPlaned(["image"], size=[8, 8])
    assert crop({"image": MetaTensor(torch.ones(1, 4, 9, 3))})["image"].shape == (1, 8, 8, 3)
    with pytest.raises(DataError, match="crop_size"):
        CropInPlaned(["image"], size=[8192, 8192])({"image": torch.ones(1, 4, 4, 9)})


# --- weights


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def saved(program: bytes, records: dict[str, bytes] | None = None) -> bytes:
    """A file of torch.save whose pickle is ``program``."""
    import io

    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return stream.getvalue()


def tensor(kind: str, count: int, shape: tuple, strides: tuple) -> bytes:
    numbers = [b"(" + b"".join(b"J" + struct.pack("<i", n) for n in some) + b"t" for some in (shape, strides)]
    storage = b"(" + text("storage") + f"ctorch\n{kind}Storage\n".encode() + text("0") + text("cpu")
    storage += b"J" + struct.pack("<i", count) + b"tQ"
    made = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00" + b"".join(numbers)
    return b"}" + text("a") + made + b"\x89ccollections\nOrderedDict\n)RtRs."


def doubled() -> bytes:
    """A key whose hash takes 2^60 steps: a tuple of itself twice, and so on."""
    steps = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    return b")q\x00" + steps + b"}h" + bytes([60]) + text("v") + b"s."


PICKLES = {
    "a table of itself": saved(b"}q\x00" + text("model") + b"h\x00s."),
    "a key that takes for ever": saved(doubled()),
    "a called tuple that takes for ever": saved(doubled()[:-1].replace(b"}h", b"h") + b")R."),
    "more values than are stored": saved(tensor("Half", 1, (40000, 40000), (0, 0)), {"0": b"\0\0"}),
    "a storage that is not there": saved(tensor("Float", 1, (1,), (1,))),
    "a storage that is cut": saved(tensor("Float", 9, (9,), (1,)), {"0": b"\0" * 4}),
    "a tensor behind its storage": saved(tensor("Float", 4, (2,), (9,)), {"0": b"\0" * 16}),
    "fewer values than none": saved(tensor("Float", -5, (1,), (1,)), {"0": b"\0" * 4}),
    "steps backwards": saved(tensor("Float", 1, (1,), (-1,)), {"0": b"\0" * 4}),
    "a list as a key": saved(b"}]K\x01s."),
    "a table of a number": saved(b"ccollections\nOrderedDict\n(K\x01tR."),
    "a parameter of numbers": saved(b"ctorch._utils\n_rebuild_parameter\n(K\x01K\x01K\x01tR."),
    "values that are missing": saved(b"s."),
    "no table": saved(b"K\x01."),
    "a name that is an escape": saved(b"}" + text(ESCAPE) + b"K\x01s."),
    "a global that is an escape": saved(b"cos\nsys\x1b]0;x\x07tem\n."),
}


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_hurt_are_refused_before_they_are_loaded(name, mine):
    (mine / "models" / "model.safetensors").unlink()
    (mine / "models" / "model.pt").write_bytes(PICKLES[name])
    told(load_bundle, mine)


def test_what_torch_saves_of_a_module_is_described(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2).half())
    module[0].weight.requires_grad_(False)
    state = module.state_dict()
    more = {**state, "x": torch.nn.Parameter(torch.ones(4, 5).T)}
    for name, content in {"a": state, "b": dict(state), "c": more}.items():
        torch.save(content, tmp_path / f"{name}.pt")
        found = described_tensors(tmp_path / f"{name}.pt")
        assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in content.items()}


WEIGHTS = {
    "whole numbers": (lambda s: {n: v.long() for n, v in s.items()}, "int64 in the file"),
    "truths": (lambda s: {n: v.bool() for n, v in s.items()}, "bool in the file"),
    "an escape": (lambda s: {**s, ESCAPE: torch.zeros(1)}, "\\x1b"),
    "many names": (lambda s: {f"t{n}": torch.zeros(0) for n in range(30_000)}, "30,000 tensors"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_refused(name, mine):
    change, expected = WEIGHTS[name]
    path = mine / "models" / "model.safetensors"
    save_file(change(load_file(path)), path)
    assert expected in told(load_bundle, mine)


def test_weights_that_are_no_numbers_are_refused(mine):
    path = mine / "models" / "model.safetensors"
    save_file({name: value * float("nan") for name, value in load_file(path).items()}, path)
    with open_bundle(mine) as opened:
        assert "not finite" in told(load_model, opened.network(), path)


@pytest.mark.parametrize("names", [("w_a_000", "w_b_000"), ("CNN_encoder.x", "alpha")], ids=["SAMed", "SAM-LST"])
def test_single_numbers_in_files_of_others_are_refused(names, mine, tmp_path, monkeypatch, capsys):
    more = ("mask_decoder.mask_tokens.weight", "sam.mask_decoder.mask_tokens.weight")
    save_file({name: torch.tensor(1.0) for name in (*names, *more)}, mine / "models" / "model.safetensors")
    assert samseg(monkeypatch, "export", mine, "--format", "pth", "--output", tmp_path / "out") == 1
    assert "CheckpointError" in capsys.readouterr().err


def test_base_weights_that_hurt_are_refused(tmp_path):
    path = tmp_path / "x.pt"
    itself: dict = {}
    itself["model"] = itself
    torch.save(itself, path)
    assert "these entries are none: model" in told(read_state, path)
    torch.save({"a": torch.ones(1).expand(4000, 4000)}, path)
    assert "more values" in told(read_state, path)


# --- files beside a bundle


def test_links_to_a_bundle_are_not_followed(mine, tmp_path):
    for name in ("outer", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "outer" / "b").symlink_to(mine)
    (tmp_path / "run" / "bundle").symlink_to(mine)
    assert "a link" in told(check_bundle, tmp_path / "outer") and "a link" in told(load_bundle, tmp_path / "run")


def finished(folder: Path, settings: dict, card: dict) -> Path:
    """The folder of a zero-shot run that was evaluated."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "metrics.json").write_text("{}")
    told = {"settings": {}, "seed": 0, "prompt_source": "image"} | card
    (folder / "evaluation" / "run_card.json").write_text(json.dumps(told))
    zero_shot = merged(settings, {"strategy": {"method": {"name": "zero_shot"}}})
    write_bundle(read_settings(zero_shot, "test"), folder / "bundle")
    return folder


@pytest.fixture
def settings(running) -> dict:
    return json.loads((running / "configs" / "settings.json").read_text(encoding="utf-8"))


def test_nothing_is_packed_through_a_link_or_awaited(settings, tmp_path):
    run = finished(tmp_path / "run", settings, {})
    (tmp_path / "secret").write_text("secret")
    link = run / "evaluation" / "cases.csv"
    link.symlink_to(tmp_path / "secret")
    assert "cases.csv: a link" in told(pack_bundle, run, tmp_path / "x.zip")
    link.unlink()
    for name in (".card.json.tmp", "evaluation/cases.csv"):
        os.mkfifo(run / name)
        assert "no regular file" in told(pack_bundle, run, tmp_path / "x.zip")
        (run / name).unlink()
    os.mkfifo(tmp_path / "pipe.json")
    assert "no regular file" in told(read_json, tmp_path / "pipe.json", BundleError, "card")
    assert not (tmp_path / "x.zip").exists()


CARDS = {"a seed of text": {"seed": "x"}, "a huge seed": {"seed": 10**30}, "settings of a list": {"settings": [1]},
         "an escape": {"settings": {"classes": ESCAPE}}}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_cards_of_other_types_are_told(name, settings, tmp_path):
    told(pack_bundle, finished(tmp_path / "run", settings, CARDS[name]), tmp_path / "x.zip")


def test_settings_that_are_null_are_none(settings, tmp_path):
    run = finished(tmp_path / "run", settings, {"settings": None})
    assert pack_bundle(run, tmp_path / "x.zip", sam_checkpoint="random", pt=False).is_file()


@pytest.mark.parametrize("card", [{"strategy": "x"}, {"strategy": {"arguments": [1]}}, {"base_sha256": [1]},
                                  {"strategy": {"arguments": {ESCAPE: 1}}}], ids=str)  # fmt: skip
def test_cards_of_adapters_of_other_types_are_told(card, mine, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(mine, run / "bundle", ignore=shutil.ignore_patterns("models"))
    tensors = load_file(mine / "models" / "model.safetensors")
    save_file({n: v for n, v in tensors.items() if "lora" in n}, run / "adapter.safetensors")
    (run / "card.json").write_text(json.dumps({"format_version": 1, **card}))
    words = ("export", run, "--format", "pth", "--output", tmp_path / "out", "--sam-checkpoint", "random")
    assert samseg(monkeypatch, *words) == 1
    captured = capsys.readouterr().err
    assert "CheckpointError" in captured and "\x1b" not in captured


def test_a_link_among_results_is_replaced_and_a_linked_folder_refused(mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "elsewhere").mkdir()
    (mine / "eval").symlink_to(tmp_path / "elsewhere")
    assert samseg(monkeypatch, "find-lr", mine.parent, "--dataset_dir", tmp_path) == 1
    (mine.parent / "eval").symlink_to(tmp_path / "elsewhere")
    assert samseg(monkeypatch, "find-lr", mine.parent, "--dataset_dir", tmp_path) == 1
    assert "is a link" in capsys.readouterr().err and not list((tmp_path / "elsewhere").iterdir())


def test_a_report_opens_no_file_elsewhere(tmp_path):
    for name in ("metrics.json", "run_card.json"):
        (tmp_path / name).write_text("{}")
    for place in ("/etc/passwd", "../x.csv", ".."):
        (tmp_path / "run_card.json").write_text(json.dumps({"cases_file": place}))
        assert "cases_file" in told(RunResult.load, tmp_path)


# --- terminals


def test_errors_and_logs_hold_nothing_that_a_terminal_obeys(caplog, monkeypatch):
    shown = told(raise_all, [f"{ESCAPE}: one\nline", "\udc80"] + ["x"] * 300, BundleError, f"heading {ESCAPE}")
    assert "\n    line\n" in shown and shown.endswith("... and 102 more")
    before = logging.getLogRecordFactory()
    try:
        log_visibly()
        with caplog.at_level("INFO"):
            logging.getLogger("anyone").info("case %s\nsecond line", ESCAPE)
    finally:
        logging.setLogRecordFactory(before)
    assert "\x1b" not in caplog.text and "\nsecond line" in caplog.text


def test_boxes_that_nobody_draws_are_refused(tmp_path):
    from samseg_monai.data.files.boxes import read_table

    (tmp_path / "b.json").write_text(json.dumps({ESCAPE: [[0, 0, 1, 1]] * 20_000}))
    assert "20,000 boxes" in told(read_table, tmp_path / "b.json")


def test_a_header_of_more_voxels_than_there_are_is_told(tmp_path):
    import gzip

    import nibabel as nib

    from samseg_monai.data.files.volumes import read_volume

    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30))
    header.set_data_dtype(np.float32)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(header.binaryblock + b"\0" * 1000))
    assert "its header speaks of 27000000000 voxels" in told(read_volume, tmp_path / "x.nii.gz")
