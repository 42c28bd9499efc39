"""JSON that people, other programs and damaged disks write: an error of ours in words, or a use without a surprise."""

import copy
import json
import random

import nibabel as nib
import numpy as np
import pytest

from samseg_monai.bundles.build import compose, read_recipe
from samseg_monai.checkpoints import CARD, card_differences, read_card, save_adapter
from samseg_monai.data.datalists import labels_of, load_datalist, read_datalist, spacing_of, unit_of
from samseg_monai.data.datalists.folders import prepare_folders
from samseg_monai.data.datalists.splits import choose_splits
from samseg_monai.errors import BundleError, CheckpointError, DataError, SamsegError
from samseg_monai.networks import SamSegmenter
from samseg_monai.strategies import LoRA
from samseg_monai.transforms import RecodeLabeld

WRONG = [
    None, True, 0, -1, 3, 1e400, float("nan"), 10**30, "", "x", "$1", "a/b", "\0", "\ud800", "x" * 5000, [], ["x"], [1],
    [[]], {}, {"x": "y"}, {"1": 2}, {"-5": "z"}, "volumes", "images", "samed",
]  # fmt: skip


def places(value, at=()):
    """Every place in a JSON value that can be changed."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in items for found in ((*at, key), *places(item, (*at, key)))]


def mutated(value, rng):
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        found = places(value)
        if not found:
            break
        *way, last = rng.choice(found)
        parent = value
        for key in way:
            parent = parent[key]
        if rng.random() < 0.2:
            del parent[last]
        elif isinstance(parent, dict) and rng.random() < 0.2:
            parent[rng.choice(["", "x", "-1", "99999999999", "²", "a" * 300])] = parent.pop(last)
        else:
            parent[last] = copy.deepcopy(rng.choice(WRONG))
    return value


def outcomes(value, write, use, count=400, seed=0):
    """How many mutations were used and how many refused; anything but an error of ours ends the test."""
    rng, found = random.Random(seed), {"used": 0, "refused": 0}
    for _ in range(count):
        changed = mutated(value, rng)
        write(json.dumps(changed))
        try:
            use(changed)
        except SamsegError as error:
            found["refused"] += 1
            assert len(str(error)) < 20_000
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} {error} of {json.dumps(changed)[:2000]}") from error
        else:
            found["used"] += 1
    return found


@pytest.fixture
def data(tmp_path):
    for n in range(4):
        for sub, array in (("imagesTr", np.arange(8) + n), ("labelsTr", np.arange(8) % 3)):
            (tmp_path / sub).mkdir(exist_ok=True)
            array = array.reshape(2, 2, 2).astype(np.uint8)
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / sub / f"c{n}.nii.gz")
    return tmp_path


@pytest.fixture
def datalist(data):
    options = {"labels": {"1": "a", "2": "b"}, "fractions": (0.5, 0.25, 0.25), "progress": False}
    prepare_folders(data, data / "d.json", **options)
    return json.loads((data / "d.json").read_text())


def test_datalists(data, datalist):
    path = data / "d.json"

    def use(changed):
        read = read_datalist(path)
        # the written rules, said again: whatever is accepted fulfils them
        for section in ("training", "validation", "testing"):
            for item in read[section]:
                assert all(isinstance(item[key], str) and item[key] for key in ("case", "patient"))
                assert item.get("label") is None or isinstance(item["label"], str)
        assert all(isinstance(name, str) and int(value) < 10**6 for value, name in (read.get("labels") or {}).items())
        assert unit_of(path) in ("mm", "px") and (spacing_of(path) is None or spacing_of(path) > 0)
        for section in ("training", "validation", "testing"):
            load_datalist(path, data, section, scans=["image"])
        labels = labels_of(path)
        RecodeLabeld("label", labels, [name for name in labels.values() if name != "background"][:1])

    found = outcomes(datalist, path.write_text, use)
    assert found["refused"] > 100 and found["used"] > 20, found
    for broken in ("[]", "null", "", '{"training": ' + "[" * 5000 + "]" * 5000 + "}", '{"a": 1, "a": 2}', '"x"'):
        path.write_text(broken)
        with pytest.raises(DataError):
            read_datalist(path)
    path.write_text(json.dumps({**datalist, "labels": {"1" * 5000: "a"}}))
    with pytest.raises(DataError, match="labels: expected"):
        read_datalist(path)


def test_tables_of_data_sets(data):
    pairs = [{"image": f"./imagesTr/c{n}.nii.gz", "label": f"./labelsTr/c{n}.nii.gz"} for n in range(4)]
    table = {
        "name": "x", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a", "2": "b"}, "training": pairs,
        "channel_names": {"0": "T1"}, "numTraining": 4,
    }  # fmt: skip

    def use(changed):
        prepare_folders(data, data / "d.json", fractions=(0.5, 0.5, 0), num_threads=1, progress=False)

    found = outcomes(table, (data / "dataset.json").write_text, use, count=150)
    assert found["refused"] > 30 and found["used"] > 10, found


def test_split_files(tmp_path):
    cases = {f"c{n}": f"p{n // 2}" for n in range(6)}
    split = {"training": ["c0", "p1"], "validation": [], "testing": [{"case": "c4"}]}
    found = outcomes(
        split,
        (tmp_path / "s.json").write_text,
        lambda _: choose_splits(cases, cases, split_file=tmp_path / "s.json"),
        count=150,
    )
    assert found["refused"] > 30, found


@pytest.mark.parametrize("kind", ["tasks", "strategies"])
def test_recipes(tmp_path, kind):
    recipe = read_recipe(kind, {"tasks": "meningioma", "strategies": "lora"}[kind])
    path = tmp_path / "mine.json"

    def use(_):
        compose(*((str(path), "lora") if kind == "tasks" else ("meningioma", str(path))))

    found = outcomes({**recipe, "extends": recipe["name"]}, path.write_text, use, count=200)
    assert found["refused"] > 50, found
    for text, reason in {
        json.dumps({"extends": str(path)}): "extends itself", json.dumps({"extends": "a\0.json"}): "is no name",
        json.dumps({**recipe, "run": [1]}): r"run: got \[1\]; expected an object",
        '{"run": ' + '{"x": ' * 500 + "1" + "}" * 501: "levels of lists and objects",
    }.items():  # fmt: skip
        path.write_text(text)
        with pytest.raises(BundleError, match=reason):
            read_recipe(kind, str(path))


def test_cards_of_adapters(tmp_path):
    network = SamSegmenter("tiny", LoRA(rank=2), image_size=32)
    network.load_base("random")
    save_adapter(network, tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    found = outcomes(card, (tmp_path / CARD).write_text, lambda _: card_differences(read_card(tmp_path), network))
    assert found["refused"] > 20, found
    (tmp_path / CARD).write_text(json.dumps({**card, "strategy": "LoRA", "values": "many"}))
    with pytest.raises(CheckpointError, match=r"strategy: got 'LoRA'[\s\S]*values: got 'many'"):
        read_card(tmp_path)
