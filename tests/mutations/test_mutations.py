"""Mutated inputs over all readers: no traceback, nothing that the written rules refuse, and what was found before."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from samseg_monai.bundles.archive import open_files
from samseg_monai.bundles.build import read_recipe
from samseg_monai.checkpoints import CARD, read_card
from samseg_monai.data.datalists import read_datalist
from samseg_monai.data.datalists.layouts import read_csv
from samseg_monai.data.files.dicom import read_series
from samseg_monai.data.files.volumes import read_grid, read_volume
from samseg_monai.errors import BundleError, CheckpointError, DataError, WeightsError
from samseg_monai.files import parse_json
from samseg_monai.metrics.rows import read_history
from samseg_monai.sam.weights.read import read_state
from tests.mutations import nifti
from tests.mutations.archives import member, zipped
from tests.mutations.dicom import a_slice, bytes_of
from tests.mutations.harness import Reader, Trial, bad, run, table
from tests.mutations.itk_files import mha, nrrd, text_of
from tests.mutations.readers import READERS

ROOT = Path(__file__).parents[2]
SHAPE = (8, 7, 4)
VOXELS = np.arange(224, dtype="<i2")


@pytest.mark.slow
def test_a_sample():
    results = run(READERS, 600, seed=11)
    assert not bad(results), "\n".join([table(results), *bad(results)])
    assert sum(sum(found.counts.values()) for found in results.values()) >= 590
    assert all(found.counts["accepted"] for found in results.values()), table(results)


@pytest.mark.whole
def test_ten_thousand():
    """By the command itself: pytest has filters of warnings of its own."""
    done = subprocess.run([sys.executable, "-m", "tests.mutations"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_harness_sees_what_must_not_be(capfd):
    def fails() -> None:
        raise KeyError("x")

    def prints() -> None:
        warnings.warn("raw", stacklevel=1)

    def refuses() -> None:
        raise DataError("no")

    outcomes = {
        "traceback": Trial("a", fails, ""), "raw output": Trial("b", prints, ""),
        "false alarm": Trial("c", refuses, ""),
        "accepted wrongly": Trial("d", dict, "a rule"), "other content": Trial("e", dict, "", lambda found: "other"),
        "memory": Trial("f", lambda: len(b"x" * (600 << 20)), ""), "refused": Trial("g", refuses, "a rule"),
        "accepted": Trial("h", dict, ""), "left open": Trial("i", refuses, None),
    }  # fmt: skip
    for outcome, trial in outcomes.items():
        found = run([Reader("x", 1, lambda folder, trial=trial: lambda rng: trial)], 1, 0)["x"]
        assert found.counts == {outcome: 1}, (outcome, found)
    assert capfd.readouterr() == ("", "")


def written(path, fields, array=VOXELS):
    path.write_bytes(nifti.build(fields, array.tobytes()))
    return path


def test_a_nifti_header_is_not_mended_in_silence(tmp_path, capfd):
    good, path = nifti.good(VOXELS.reshape(SHAPE, order="F")), tmp_path / "a.nii"
    negative = {"pixdim": [1, 0.9, -1.1, 3, 0, 0, 0, 0]}
    assert "pixdim[1,2,3] should be positive" in read_volume(written(path, good | negative)).notes[0]
    assert "sform_code 300 not valid" in read_volume(written(path, good | {"sform": 300})).notes[0]
    # MONAI goes by the form whose voxels have the size in pixdim, even by one that nobody wrote
    other = {"pixdim": [1, 1, 1, 1, 0, 0, 0, 0]}
    volume = read_volume(written(path, good | other))
    assert "the qform is used" in volume.notes[0] and np.linalg.norm(volume.affine[:3, :3], axis=0).max() < 1.01
    np.testing.assert_array_equal(read_grid(path)[1], volume.affine)
    with pytest.raises(DataError, match="pixdim is not the size of its voxels by the sform, its only form"):
        read_volume(written(path, good | other | {"qform": 0, "quatern": [0, 0, 0]}))
    for fields, reason in (
        ({"sizeof_hdr": 7}, "does not begin with the size"), ({"vox_offset": 0}, "begin at byte 0"),
        ({"vox_offset": math.nan}, "begin at byte nan"), ({"slope": -1e38}, None),
        ({"sform": 0, "pixdim": [1, 0, 1, 1, 0, 0, 0, 0]}, "its voxels are 0 x 1 x 1 mm"),
        ({"sform": 0, "quatern": [2, 0, 0]}, "damaged NIfTI file"),
    ):  # fmt: skip
        if reason:
            with pytest.raises(DataError, match=reason):
                read_volume(written(path, good | fields))
        else:
            read_volume(written(path, good | fields))
    assert capfd.readouterr() == ("", "")


def test_headers_of_mha_and_nrrd_are_judged_before_itk_sees_them(tmp_path, capfd):
    path, data = tmp_path / "a.mha", VOXELS.tobytes()

    def refused(lines, reason, content=data):
        path.write_bytes(text_of(lines) + content)
        with pytest.raises(DataError, match=reason):
            read_volume(path)

    def changed(**fields):
        return [[key, fields.get(key, value)] for key, value in mha(SHAPE) if fields.get(key, "") is not None]

    for axes in ("1000", "-3"):  # the process ended
        refused(changed(NDims=axes), "NDims")
    for fields in (
        {"Offset": "-40 -50"},
        {"ElementSpacing": "1,5 1 1"},
        {"CompressedData": "yes"},
        {"DimSize": "8 7 3x"},
    ):
        refused(changed(**fields), next(iter(fields)))  # a default in its place
    refused(changed(ElementSpacing="0.9 -1.1 3"), "its voxels are")
    packed = zlib.compress(data)
    refused(changed(CompressedData="True"), "no CompressedDataSize", packed)  # memory that nobody had written
    refused([["CompressedDataSize", "9"], *changed(CompressedData="True")], "no end", packed)
    refused(changed(), "447 of 448 bytes", data[:-1])
    refused(changed(ElementType="MET_LONG_LONG"), "64-bit signed integers", VOXELS.astype("<i8").tobytes())
    path.write_bytes(text_of(changed(ElementSpacing=None, TransformMatrix=None)) + data)
    assert [note.rpartition(": ")[2] for note in read_volume(path).notes] == [
        "taken as 1 mm", "left and right are a guess"]  # fmt: skip
    path = tmp_path / "a.nrrd"
    refused(nrrd(SHAPE), "440 of 448 bytes", data[:440])  # voxels of 0 in their place
    refused(nrrd(SHAPE, encoding="gzip"), "cannot be unpacked")
    refused([["sizes", "8 7 1e30"] if key == "sizes" else [key, value] for key, value in nrrd(SHAPE)], "sizes")
    path.write_bytes(text_of(nrrd(SHAPE)) + data)
    assert read_volume(path).notes == ()
    assert capfd.readouterr() == ("", "")


def test_slices_whose_pixels_are_not_what_their_tags_say(tmp_path, capfd):
    def series(name, **tags):
        for n in range(3):
            ds = a_slice(n, "1.2.3", VOXELS[:48].reshape(6, 8) + n)
            for tag, value in tags.items() if n == 1 or name == "all" else ():
                setattr(ds, tag, value) if value is not None else delattr(ds, tag)
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{n}.dcm").write_bytes(bytes_of(ds))
        return tmp_path / name

    for tags, reason in (
        ({"PixelData": bytes(10)}, "10 bytes of pixels, where its tags speak of 96"), ({"Columns": 60000}, "96 bytes"),
        ({"SamplesPerPixel": 3}, "speak of 288"), ({"RescaleSlope": 0}, "rescaled by"),
        ({"PixelData": None}, "without an"),
        ({"PhotometricInterpretation": None}, "grey values are not told"), ({"PixelSpacing": [0, 1]}, "pixels of"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "different kinds of numbers"),
        ({"PixelSpacing": None}, "the size"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=reason):
            read_series(series(f"{reason}", **tags))
    assert "as its negative" in read_series(series("all", PhotometricInterpretation="MONOCHROME1")).notes[0]
    assert capfd.readouterr() == ("", "")


def test_json_has_no_numbers_beyond_floats_and_no_halves_of_characters():
    for text, reason in {
        '{"a": 1%s}' % ("0" * 400): "a number of 401 digits",
        '{"a": ["\\ud800"]}': "half of a char",
    }.items():
        with pytest.raises(DataError, match=reason):
            parse_json(text, DataError, "x")


def test_tables_with_rows_of_another_length(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text(
        "epoch,iteration,name,value\n1,5,loss,0.5\n1,5,loss,0.5,7\n2,1_0,loss,0.5\n٣,1,loss,1\n3,1,lo", encoding="utf-8"
    )
    points, problems = read_history(path)
    assert list(points) == [(1, "loss")] and len(problems) == 4
    path.write_text('case,patient\n"a\nb",p\u2028q\n', encoding="utf-8")
    assert read_csv(path) == [{"case": "a\nb", "patient": "p\u2028q"}]


def test_weights_that_are_damaged_or_not_all_there(tmp_path):
    path, state = tmp_path / "a.pt", {"a": torch.arange(4.0)}
    torch.save(state, path)
    content = path.read_bytes()
    at = content.index(struct.pack("<f", 3.0))
    path.write_bytes(content[:at] + b"\x01" + content[at + 1 :])
    with pytest.raises(WeightsError, match=r"the check sum of .* differs"):
        read_state(path)
    for other in (torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.ones(2, device="meta")):
        torch.save({**state, "b": other}, path)
        with pytest.raises(WeightsError, match="these entries are none: b"):
            read_state(path)


def test_bundles_with_a_member_without_a_name(tmp_path):
    (tmp_path / "b.zip").write_bytes(zipped([member(b"b/configs/a.json", b"{}"), member(b"", b"x")]))
    with pytest.raises(BundleError):
        files = open_files(tmp_path / "b.zip")
        assert not files.problems, files.close()
        raise AssertionError
    assert zipfile.is_zipfile(tmp_path / "b.zip")


def test_reasons(tmp_path):
    path = tmp_path / "mine.json"
    recipe = read_recipe("tasks", "meningioma")
    for value, reason in (
        ({"extends": str(path)}, "extends itself"), ({"extends": "a\0.json"}, "is no name"),
        ({"extends": "x" * 300}, "no rec"),
        ({**recipe, "run": [1]}, r"run: got \[1\]; expected an object"),
    ):  # fmt: skip
        path.write_text(json.dumps(value))
        with pytest.raises(BundleError, match=reason):
            read_recipe("tasks", str(path))
    path.write_text('{"run": ' + '{"x": ' * 500 + "1" + "}" * 501)
    with pytest.raises(BundleError, match="levels of lists and objects"):
        read_recipe("tasks", str(path))
    path.write_text(json.dumps({"labels": {"1" * 5000: "a"}, "training": []}))
    with pytest.raises(DataError, match="labels: expected"):
        read_datalist(path)
    card = {"format_version": 1, "strategy": "LoRA", "values": "many", "scan_names": [1], "cases": [2]}
    (tmp_path / CARD).write_text(json.dumps(card))
    with pytest.raises(
        CheckpointError, match=r"strategy: got 'LoRA'[\s\S]*values: got 'many'[\s\S]*scan_names[\s\S]*cases"
    ):
        read_card(tmp_path)
