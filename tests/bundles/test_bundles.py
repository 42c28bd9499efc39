"""Laws of every bundle: fresh from its recipes, valid for MONAI, runnable from anywhere, deaf to no typo."""

import filecmp
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, create_workflow, run, verify_metadata, verify_net_in_out

from samseg_monai import bundles
from samseg_monai.bundles.build import OVERLAYS, RECIPES, compose, render, write_bundle
from samseg_monai.bundles.door import own_errors
from samseg_monai.bundles.running import unknown_keys
from samseg_monai.bundles.values import effective_settings
from samseg_monai.errors import BundleError, CheckpointError, ConfigError, PromptError
from samseg_monai.metrics import read_rows
from samseg_monai.report.runs import RunResult
from samseg_monai.settings import read_settings
from samseg_monai.workflow import run_workflow
from tests.conftest import TINY
from tests.helpers.commands import samseg
from tests.helpers.packed import fits

ROOT = Path(__file__).parents[2] / "bundles"
COMMITTED = sorted(p.name for p in ROOT.iterdir() if p.is_dir())
BUILT = tempfile.TemporaryDirectory()  # bundles that are built on demand obey the same laws
ON_DEMAND = [
    bundles.build_bundle(*pair, BUILT.name).name
    for pair in (
        ("abdomen", "cnn_only"),
        ("abdomen", "sam_only"),
        ("brain_tumour_t1c", "lora"),
        ("hippocampus", "ladder"),
        ("hippocampus", "unet"),
    )
]
# they differ from ladder_paper and lora in strategy and run alone: that they are fresh is enough
PUBLISHED = [f"abdomen_segmentation_{name}" for name in ("cnn_only", "h_sam", "sam_only", "samed")]
PUBLISHED += [f"meningioma_segmentation_{name}" for name in ("full", "medsa")]
BUNDLES = [*(name for name in COMMITTED if name not in PUBLISHED), *ON_DEMAND]
LORA = "meningioma_segmentation_lora"


def root_of(bundle: str) -> Path:
    """Folder of a committed bundle, or of one built for these tests."""
    return (ROOT if bundle in COMMITTED else Path(BUILT.name)) / bundle


CONFIGS = [
    (b, p.stem)
    for b in BUNDLES
    for p in sorted((root_of(b) / "configs").glob("*.json"))
    if p.stem not in ("metadata", "settings")
]


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


NARROW = {"_target_": "samseg_monai.adapters.ResNetSide", "width": 8}
PICO = {"sam_variant": "pico", "image_size": 256}
RUNNABLE = [(b, c) for b, c in CONFIGS if c in ("train", "evaluate", "inference")]


def files_of(bundle: str, config: str) -> list[str]:
    """Config files of a run: evaluate.json changes inference.json."""
    names = ["inference", "evaluate"] if config == "evaluate" else [config]
    return [str(root_of(bundle) / "configs" / f"{name}.json") for name in names]


def recipes_of(bundle: str) -> tuple[str, str]:
    task, _, strategy = bundle.partition("_segmentation_")
    return task, strategy


def files_below(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_as_many_bundles_as_expected_are_tested():
    abdomen = ["abdomen_segmentation_ladder", "abdomen_segmentation_ladder_paper"]
    meningioma = ["meningioma_segmentation_lora", "meningioma_segmentation_zero_shot"]
    assert sorted([*PUBLISHED, *abdomen, *meningioma]) == COMMITTED
    assert len(ON_DEMAND) == 5
    assert len(CONFIGS) == 3 * 6 + 3 + 5 * 6
    assert len(RUNNABLE) == 3 * 3 + 2 + 5 * 3


@pytest.mark.parametrize("bundle", COMMITTED)
def test_committed_bundle_equals_a_fresh_build(bundle, tmp_path):
    task, strategy = recipes_of(bundle)
    fresh = bundles.build_bundle(task, strategy, tmp_path)
    assert files_below(fresh) == files_below(ROOT / bundle)
    _, differing, unreadable = filecmp.cmpfiles(fresh, ROOT / bundle, files_below(fresh), shallow=False)
    assert not differing and not unreadable, "run `make bundles` and commit the result"


def test_every_task_builds_with_every_strategy(tmp_path):
    tasks, strategies = bundles.recipe_names("tasks"), bundles.recipe_names("strategies")
    pairs = [(t, s) for t in tasks for s in strategies if fits(t, s)]
    built = [bundles.build_bundle(t, s, tmp_path) for t, s in pairs]
    assert {"meningioma", "brain_tumour_t1c"} <= {t for t, s in pairs if s == "ellipse"}
    assert len(built) == len(pairs) >= 4 * 21 - 2
    assert all((b / "configs" / "inference.json").is_file() for b in built)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_bundle_holds_what_the_specification_asks_for(bundle):
    root = root_of(bundle)
    for name in (
        "LICENSE",
        "configs/metadata.json",
        "configs/inference.json",
        "configs/logging.conf",
        "large_files.yml",
    ):
        assert (root / name).is_file(), name
    assert (root / "docs" / "README.md").is_file() and (root / "docs" / "data_license.txt").is_file()
    assert not (root / "scripts").exists()
    metadata = read_json(root / "configs" / "metadata.json")
    assert metadata["version"] in metadata["changelog"]
    assert isinstance(metadata["supported_apps"], dict)
    assert "samseg-monai" in metadata["required_packages_version"]
    large = (root / "large_files.yml").read_text(encoding="utf-8")
    assert large == "large_files: []\n" if "_unet" in bundle else "hash_type" in large  # without SAM nothing is large


@pytest.mark.realdata
@pytest.mark.parametrize("bundle", BUNDLES)
def test_metadata_is_valid_for_the_newest_schema(bundle, realdata, tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_bytes((realdata / "monai" / "meta_schema_20240725.json").read_bytes())
    digest = "cd64aa8a5904426f6fc6855dabe46af8c742d5bad644b4e9cfb78ebad09ad678"
    meta = str(root_of(bundle) / "configs" / "metadata.json")
    verify_metadata(meta_file=meta, filepath=str(schema), hash_val=digest, hash_type="sha256")


@pytest.mark.parametrize("bundle", BUNDLES)
def test_network_has_the_stated_input_and_output(bundle):
    configs = root_of(bundle) / "configs"
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(configs / "metadata.json"),
        config_file=str(configs / "inference.json"),
        device="cpu",
        any=40,
        **(PICO if "_unet" not in bundle else {"image_size": 64}),
    )


@pytest.mark.parametrize(("bundle", "config"), RUNNABLE)
def test_workflow_has_every_property_monai_wants(bundle, config, phantoms_of, tmp_path):
    kind = "train" if config == "train" else "infer"
    data = phantoms_of(bundle)
    data = data / "unlabelled" if config == "inference" else data
    workflow = create_workflow(
        workflow_type=kind,
        config_file=files_of(bundle, config),
        dataset_dir=str(data),
        output_dir=str(tmp_path),
        **(PICO if "_unet" not in bundle else {"image_size": 64}),
    )
    assert workflow.check_properties() == []


@pytest.mark.parametrize(("bundle", "config"), [(b, c) for b, c in RUNNABLE if b not in ON_DEMAND])
@pytest.mark.parametrize(
    ("key", "value", "named"),
    [("image_sise", 64, "image_size"), ("prompt::sorce", "label", "prompt::source"), ("network_def::scns", 4, "scans")],
)
def test_a_misspelt_override_is_refused_by_name(bundle, config, key, value, named, phantoms_of, tmp_path):
    configs = [root_of(bundle) / "configs" / f"{config}.json"]
    with pytest.raises(ConfigError, match=key) as caught:
        data = str(phantoms_of(bundle))
        run_workflow(configs, {"dataset_dir": data, "output_dir": str(tmp_path), key: value})
    assert named in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing may have been written before the refusal"


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("promt::source", "did you mean prompt::source?"),
        ("promt#source", "did you mean prompt::source?"),
        ("embeddings::cache_dir", "other bundles have 'embeddings'"),
        ("volume_transforms::7::keys", "did you mean volume_transforms::"),
        ("epochs::x", "did you mean epochs?"),
    ],
)
def test_an_override_within_what_is_not_there_is_refused_by_name_with_all_others(key, named, tmp_path):
    """MONAI itself answers these with a KeyError, before it evaluates anything of a bundle."""
    overrides = {"output_dir": str(tmp_path), key: "json", "image_sise": 64}
    with pytest.raises(ConfigError) as caught:
        run_workflow(files_of(LORA, "train"), overrides)
    text = str(caught.value)
    assert f"- {key.replace('#', '::')}" in text and named in text and "did you mean image_size?" in text
    assert not list(tmp_path.iterdir())


def test_find_lr_refuses_such_a_key_without_a_traceback(tmp_path, monkeypatch, capsys):
    words = ["find-lr", root_of(LORA), "--output_dir", tmp_path / "out", "--promt::source", "json"]
    assert samseg(monkeypatch, *words) == 1
    told = capsys.readouterr().err
    assert "promt::source (did you mean prompt::source?)" in told and "Traceback" not in told


WRONG = {
    "image_size": "512", "batch_size": 0, "epochs": 2.5, "prompt::source": "labels", "strategy::rank": "four",
    "strategy::targets": ["w"], "slices::picker": {"_target_": "samseg_monai.data.slices.EveryNth", "n": 0},
    "loss::dice": -1, "augmentation": 3, "train::optimizer::weight_decay": "x", "crop_size": [64], "scans": [],
    "device": "cuda:7", "datalist": "~/mine.json", "classes": ["tumour", "oedema"],
}  # fmt: skip


def test_every_wrong_override_is_told_at_once_before_anything_is_written(phantoms, tmp_path):
    configs = [root_of(LORA) / "configs" / "train.json"]
    with pytest.raises(ConfigError) as caught:
        run_workflow(configs, {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), **WRONG})
    text = str(caught.value)
    named = {key: key for key in WRONG} | {"train::optimizer::weight_decay": "optimizer::weight_decay"}
    assert [key for key, name in named.items() if f"- {name}" not in text] == [], text
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_is_told_once_and_in_one_answer_whatever_its_kind(phantoms, tmp_path):
    """Unknown keys, types, what does not go together, and places; twice told or told in the next run is too late."""
    wrong = {
        "strategy::rnk": 4, "lr": "abc", "image_size": 500, "batch_size": 0, "sam_variant": "vit_x",
        "dataset_dir": str(tmp_path / "nowhere"), "sam_checkpoint": str(tmp_path / "absent.pth"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="7 problems") as caught:
        run_workflow([root_of(LORA) / "configs" / "train.json"], {"output_dir": str(tmp_path / "run"), **wrong})
    text = str(caught.value)
    for part in ("strategy::rnk (did you mean strategy::rank?)", "image_size: got 500; SAM needs a multiple of 16",
                 "lr: got", "batch_size: got 0", "dataset_dir: got", "sam_checkpoint: got"):  # fmt: skip
        assert text.count(part) == 1, (part, text)
    assert text.count("rnk") == 1 and text.count("absent.pth") == 1
    assert '"medsam" or "pico"' in text and "tiny" not in text.replace(str(tmp_path), "")


@pytest.mark.parametrize("config", ["train", "evaluate"])
def test_a_datalist_that_is_not_there_is_told_with_the_rest_before_anything_is_loaded(config, tmp_path, monkeypatch):
    monkeypatch.setattr("samseg_monai.networks.SamSegmenter.load_base", lambda *_, **__: pytest.fail("too late"))
    (tmp_path / "file").touch()
    wrong = {"dataset_dir": str(tmp_path), "batch_size": 0, "output_dir": str(tmp_path / "file" / "run")}
    wrong |= {"sam_checkpoint": str(tmp_path / "absent.pth")} if config == "train" else {"checkpoint": "nowhere"}
    with pytest.raises(ConfigError, match="4 problems") as caught:
        run_workflow([Path(file) for file in files_of(LORA, config)], wrong)
    text = str(caught.value)
    for part in (
        f"datalist: got '{tmp_path}/datalist.json'; no such file; 'samseg prepare' or", "batch_size: got 0",
        f"{tmp_path}/file: a file is where a folder is wanted",
        "absent.pth" if config == "train" else "checkpoint: got",
    ):  # fmt: skip
        assert text.count(part) == 1, (part, text)


@pytest.mark.parametrize(
    ("place", "said"),
    [(20241126, "write ./20241126"), ("~/runs", "only known to shells"), ("runs/#3", "use another name")],
)
def test_places_that_would_be_taken_for_something_else_are_refused(place, said, phantoms, tmp_path):
    workflow = create_workflow(
        workflow_type="train",
        config_file=files_of(LORA, "train"),
        dataset_dir=str(phantoms),
        output_dir=place,
    )
    with pytest.raises((ConfigError, RuntimeError)) as caught:
        workflow.run()
    error = caught.value
    while not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    assert "output_dir" in str(error) and said in str(error)


def test_evaluate_alone_stops_with_the_line_to_type(phantoms, tmp_path, monkeypatch, capsys):
    folder = ROOT / LORA / "configs"
    words = [
        "--config_file",
        str(folder / "evaluate.json"),
        "--dataset_dir",
        str(phantoms),
        "--output_dir",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", *words])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(RuntimeError) as stop:  # as in a process of its own, which would end so
        runpy.run_module("monai.bundle", run_name="__main__")
    sys.excepthook(stop.type, stop.value, stop.tb)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "inference.json','" in told and "evaluate.json']\"" in told
    with pytest.raises(ConfigError, match=r"only changes inference\.json"), own_errors():
        run(config_file=str(folder / "evaluate.json"), network_def="$None", output_dir=str(tmp_path))


def test_values_of_a_command_line_that_are_read_as_another_type_are_all_told_in_one_answer(
    phantoms, monkeypatch, capsys
):
    """MONAI's command line makes numbers of what looks like one: 2024_11_26 is 20241126."""
    wrong = {"output_dir": "2024_11_26", "image_size": "32.0", "batch_size": "0", "crop_size": "64", "lr": "abc"}
    wrong |= {} if torch.cuda.is_available() else {"device": "cuda"}
    words = [word for pair in wrong.items() for word in (f"--{pair[0]}", pair[1])]
    train = str(root_of(LORA) / "configs" / "train.json")
    words = ["--config_file", train, "--dataset_dir", str(phantoms), *words]
    monkeypatch.setattr(sys, "argv", ["monai.bundle", "run", *words])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises(RuntimeError) as stop:
        runpy.run_module("monai.bundle", run_name="__main__")
    sys.excepthook(stop.type, stop.value, stop.tb)
    told = capsys.readouterr().err
    assert "Traceback" not in told and f"{len(wrong)} problems" in told
    assert all(f"- {key}: got" in told for key in wrong), told


def test_a_class_that_is_called_as_brats_calls_one_is_trained_evaluated_and_predicted(hippocampi, tmp_path):
    names = ["NCR/NET", "edema"]
    content = read_json(hippocampi / "datalist.json")
    content |= {"labels": {"0": "background", "1": names[0], "2": names[1]}}
    (tmp_path / "d.json").write_text(json.dumps(content))
    configs = root_of("hippocampus_segmentation_unet") / "configs"
    shared = {"dataset_dir": str(hippocampi), "output_dir": str(tmp_path / "run"), "image_size": 32, "classes": names}
    own = {"datalist": str(tmp_path / "d.json"), "crop_size": [32, 32]}
    run_workflow([configs / "train.json"], {**shared, **own, "epochs": 1, "val_interval": 1})
    run_workflow([configs / "evaluate.json"], {**shared, **own})
    assert {row["class"] for row in read_rows(tmp_path / "run" / "evaluation" / "cases.csv")} == set(names)
    run_workflow(
        [configs / "inference.json"], {**shared, "crop_size": [32, 32], "dataset_dir": str(hippocampi / "images")}
    )
    assert len(list((tmp_path / "run" / "predictions").glob("*_seg.nii.gz"))) == 6


def test_prompts_of_a_training_are_those_of_its_prediction(phantoms, tmp_path):
    overrides = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "strategy::rank": 2, "epochs": 1}
    overrides |= {"prompt::source": "none", "strategy::decoder": True}
    run_workflow([root_of(LORA) / "configs" / "train.json"], overrides)
    assert read_json(tmp_path / "run_card.json")["warnings"][0].startswith("LoRA without boxes: this task has none")
    record = tmp_path / "bundle"
    assert read_json(record / "configs" / "inference.json")["prompt"]["source"] == "none"
    metadata, page = read_json(record / "configs" / "metadata.json"), (record / "docs" / "README.md").read_text()
    assert "without prompts" in metadata["task"] and "rank 2" in metadata["description"] and "rank 2" in page
    assert "the mask decoder learns, too" in page and "tiny" in page and "64 in" not in metadata["description"]
    assert read_json(record / "configs" / "settings.json")["run"]["sam_variant"] == "tiny"
    (record / "configs" / "metadata.json").write_text(json.dumps(metadata | {"network_data_format": {}}))
    run_workflow([root_of(LORA) / "configs" / "evaluate.json"], overrides)
    with pytest.raises(BundleError, match=r"metadata.json: network_data_format::inputs: taken out"):
        bundles.pack_bundle(tmp_path, tmp_path / "x.zip", sam_checkpoint="random")


def test_an_override_takes_a_setting_away():
    configs = root_of(LORA) / "configs"
    built = read_settings(read_json(configs / "settings.json"), "test")
    given = {**read_json(configs / "inference.json"), "crop_mm": "$None", "prompt": {"loosen": ["$None", 0.1]}}
    found = effective_settings(given, built)
    assert built.run.crop_mm and found["run"]["crop_mm"] is None and found["run"]["prompt"]["loosen"] == [None, 0.1]
    assert given["crop_mm"] == "$None"  # the config itself stays


def test_a_component_given_whole_is_no_typo():
    known = {"loss": {}, "loss::_target_": {}, "loss::sigmoid": {}}
    assert unknown_keys({"loss": {"_target_": "monai.losses.DiceLoss", "softmax": True}}, known) == []
    assert unknown_keys({"loss": {"_target_": "monai.losses.DiceLoss", "sofmax": True}}, known) != []


@pytest.mark.parametrize("bundle", BUNDLES)
def test_configs_hold_no_path_of_a_machine_and_no_code(bundle):
    for path in (root_of(bundle) / "configs").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert '"/' not in text
        assert "__" not in text.replace("_target_", "").replace("_desc_", "")


def test_everything_that_is_wrong_with_recipes_is_told_at_once_and_nothing_is_written(tmp_path):
    task = read_json(RECIPES / "tasks" / "hippocampus.json")
    del task["modality"], task["data_license"]
    task["classes"] = ["liver"]
    task["run"] = {**task["run"], "imagesize": 64, "batch_size": 0}
    (tmp_path / "mine.json").write_text(json.dumps(task))
    with pytest.raises(BundleError, match="4 problems") as caught:
        bundles.build_bundle(str(tmp_path / "mine.json"), "lora", tmp_path / "out")
    for part in (
        "modality: missing",
        "data_license: missing",
        "imagesize: no such key; did you mean image_size",
        "batch_size",
    ):
        assert part in str(caught.value), part
    assert not (tmp_path / "out").exists()


def test_recipes_of_tasks_are_short():
    lines = {path.stem: len(path.read_text().splitlines()) for path in (RECIPES / "tasks").glob("*.json")}
    assert len(lines) == 4 and max(lines.values()) <= 25


@pytest.mark.parametrize("task", bundles.recipe_names("tasks"))
def test_pages_tell_that_no_images_are_part_and_whose_phantoms_are_drawn(task):
    texts = render(compose(task, "lora"))
    terms = " ".join(texts["docs/data_license.txt"].split())
    drawn = "generated by the package" in terms
    assert terms.startswith("This bundle contains no images.") and "No images are part" in texts["docs/README.md"]
    assert drawn == ("samseg phantom" in texts["docs/README.md"]) == (task in ("abdomen", "meningioma"))
    assert json.loads(texts["configs/metadata.json"])["data_source"].rstrip(".") in terms


def test_a_demo_has_no_optimiser_which_its_overlay_could_not_reach(tmp_path):
    how = {"extends": "lora", "demo": {"run": {"optimizer": {"name": "SGD"}}}}
    (tmp_path / "mine.json").write_text(json.dumps(how))
    with pytest.raises(BundleError, match="demo::run::optimizer: no such key"):
        bundles.build_bundle("meningioma", str(tmp_path / "mine.json"), tmp_path / "out")


def test_words_about_other_classes_are_refused(tmp_path):
    """A copied recipe with three changed values once made a ZIP that told of a hippocampus, not of a liver."""
    task = read_json(RECIPES / "tasks" / "hippocampus.json") | {
        "classes": ["liver"],
        "modality": "CT",
        "channels": ["ct"],
    }
    (tmp_path / "liver.json").write_text(json.dumps(task))
    with pytest.raises(BundleError, match="does not name liver"):
        bundles.build_bundle(str(tmp_path / "liver.json"), "lora", tmp_path)
    task |= {"title": "Liver on CT", "text": "The liver is segmented."}
    (tmp_path / "liver.json").write_text(json.dumps(task))
    root = bundles.build_bundle(str(tmp_path / "liver.json"), "lora", tmp_path)
    metadata = read_json(root / "configs" / "metadata.json")
    said = json.dumps({key: metadata[key] for key in ("task", "image_classes", "label_classes", "pred_classes")})
    assert "liver" in said and "anterior" not in said and "hippocampus" not in said
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert (outputs["num_channels"], outputs["channel_def"]) == (1, {"0": "liver"})


def test_same_settings_give_the_same_bytes(tmp_path):
    settings = compose("meningioma", "lora")
    one, other = (write_bundle(settings, tmp_path / name) for name in ("one", "other"))
    assert files_below(one) == files_below(other)
    for name in files_below(one):
        assert (one / name).read_bytes() == (other / name).read_bytes() == render(settings)[name].encode()


def test_a_bundle_holds_what_it_can_use_and_no_more(tmp_path):
    sizes = {
        name: len((ROOT / LORA / "configs" / name).read_text().splitlines()) for name in ("train.json", "evaluate.json")
    }
    assert sizes["train.json"] <= 480 and sizes["evaluate.json"] <= 180
    for bundle in BUNDLES:
        for path in (root_of(bundle) / "configs").glob("*.json"):
            assert "_disabled_" not in path.read_text(), path
    train = read_json(ROOT / LORA / "configs" / "train.json")
    assert "embeddings" not in json.dumps(train) and "handlers::0" not in json.dumps(train)
    components = {
        key for part in ("train", "validate") for key, value in train[part].items() if isinstance(value, dict)
    }
    components |= {name for part in ("train", "validate") for name in train[part]["named_handlers"]} - {
        "lr",
        "early_stop",
    }
    # a group of settings is called like the handler that validates
    assert not components & set(train) - {"preprocessing", "inferer", "validation"}


def test_key_given_twice_is_named(tmp_path):
    (tmp_path / "twice.json").write_text('{"lr": 1, "lr": 2}')
    with pytest.raises(BundleError, match="lr"):
        bundles.build_bundle(str(tmp_path / "twice.json"), "lora", tmp_path)


def test_unknown_recipe_says_which_was_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_task.json").write_text("{}")
    for task, strategy, told in (
        ("menigioma", "lora", "did you mean meningioma[?] There are abdomen, "),
        ("hippocampus", "lorra", "did you mean lora[?]"),
        ("my_task", "lora", "there is a file my_task.json: give my_task.json"),
        ("my_tsk.json", "lora", "my_tsk.json: no such file; did you mean my_task.json[?]"),
        (str(tmp_path / "none" / "x.json"), "lora", "no such file; give the path"),
    ):
        with pytest.raises(BundleError, match=told):
            bundles.build_bundle(task, strategy, tmp_path)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_overlays_change_only_what_exists(bundle):
    configs = root_of(bundle) / "configs"
    kinds = [kind for kind in ("train", "inference", "evaluate") if (configs / f"{kind}.json").is_file()]
    pairs = [(overlay, kind) for overlay in OVERLAYS for kind in kinds if overlay in ("demo", f"multi_gpu_{kind}")]
    for overlay, kind in (pair for pair in pairs if (configs / f"{pair[0]}.json").is_file()):
        parser = ConfigParser(ConfigParser.load_config_files(files_of(bundle, kind)))
        keys = list(read_json(configs / f"{overlay}.json"))
        parents = [key.removeprefix("+").rpartition("::")[0] for key in keys]
        assert [p for p in parents if p and p not in parser] == []
        assert [key for key in keys if key.startswith("+") and key[1:] not in parser] == []  # "+" adds to what is there


def test_train_evaluate_inference_from_another_folder(phantoms, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = Path(os.path.relpath(ROOT / "meningioma_segmentation_lora" / "configs", tmp_path))
    shared = {**TINY, "dataset_dir": str(phantoms), "output_dir": "run"}
    run_workflow([configs / "train.json"], {**shared, "epochs": 2, "batch_size": 2, "strategy::rank": 2})
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
    card = json.loads(Path("run/run_card.json").read_text())
    assert card["status"] == "completed"
    assert card["settings"]["strategy"]["rank"] == 2
    assert card["settings"]["slices"]["picker"]["_target_"].endswith("MaxArea")
    assert not {"dataset_dir", "output_dir", "train", "network_def", "load_transforms"} & set(card["settings"])
    rank = {"strategy::rank": 2}
    run_workflow([configs / "evaluate.json"], {**shared, **rank})
    metrics = json.loads(Path("run/evaluation/metrics.json").read_text())
    assert metrics["cases"] == 2
    assert 0 <= metrics["metrics"]["dice_mean"] <= 1
    shared["dataset_dir"] = str(phantoms / "unlabelled")
    with pytest.raises(PromptError, match="prompt::source image"):
        run_workflow([configs / "inference.json"], {**shared, **rank})
    run_workflow([configs / "inference.json"], {**shared, **rank, "prompt::source": "image"})
    assert len(list(Path("run/predictions").glob("*_seg.nii.gz"))) == 1


def test_a_strategy_that_trains_is_not_evaluated_untrained(phantoms, tmp_path):
    configs = [ROOT / "meningioma_segmentation_lora" / "configs" / "evaluate.json"]
    overrides = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "strategy::rank": 2}
    with pytest.raises(CheckpointError, match="train first"):
        run_workflow(configs, overrides)


def test_three_named_scans_become_sams_three_channels(phantoms, tmp_path):
    configs = ROOT / "meningioma_segmentation_lora" / "configs"
    overrides = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "strategy::rank": 2}
    overrides |= {"scans": ["t2f", "t1c", "t1n"], "scan_mode": "channels"}
    run_workflow([configs / "train.json"], {**overrides, "epochs": 1})
    run_workflow([configs / "evaluate.json"], overrides)
    assert read_json(tmp_path / "card.json")["scan_mode"] == "channels"
    overrides["dataset_dir"] = str(phantoms / "unlabelled")
    run_workflow([configs / "inference.json"], {**overrides, "prompt::source": "image"})
    assert len(list((tmp_path / "predictions").glob("*_seg.nii.gz"))) == 1


def test_slices_of_one_scan_and_their_neighbours_become_sams_three_channels(phantoms, tmp_path):
    configs = ROOT / "meningioma_segmentation_lora" / "configs"
    overrides = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "strategy::rank": 2}
    with pytest.raises(ConfigError, match=r"scan_mode: 'neighbours' is for slices of one scan .* there are 4 scans"):
        run_workflow([configs / "train.json"], {**overrides, "scan_mode": "neighbours"})
    overrides |= {"scans": ["t1c"], "scan_mode": "neighbours"}
    run_workflow([configs / "train.json"], {**overrides, "epochs": 1})
    run_workflow([configs / "evaluate.json"], overrides)
    card = read_json(tmp_path / "card.json")
    assert (card["scan_mode"], card["scans"], card["scan_names"]) == ("neighbours", 3, ["t1c"])
    overrides["dataset_dir"] = str(phantoms / "unlabelled")
    run_workflow([configs / "inference.json"], {**overrides, "prompt::source": "image"})
    assert len(list((tmp_path / "predictions").glob("*_seg.nii.gz"))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"train::optimizer::_target_": "torch.optim.AdamW", "clip_norm": 1.0, "accumulation_steps": 2},
        {"schedule": {"warmup": 2, "decay": "poly", "power": 0.9}, "early_stop": 1},
        {"schedule::decay": "cosine", "prompt::per_component": True, "prompt::loosen": [0.1, 0.2]},
        {"slices::picker": {"_target_": "samseg_monai.data.slices.RandomN", "n": 2}, "slices::cache": "disk"},
        {"input_scale": "sam", "rectangular": True, "checkpointing": True, "slices::num_workers": 1},
        {"input_scale": "unit", "strategy::targets": ["q", "k", "v", "proj", "lin1", "lin2"], "strategy::dropout": 0.1},
    ],
    ids=[
        "adamw-clip-accumulate",
        "warmup-poly-stop",
        "cosine-components",
        "random-slices-disk",
        "sam-scale",
        "unit-all",
    ],
)
def test_every_option_trains(options, phantoms, tmp_path):
    configs = ROOT / "meningioma_segmentation_lora" / "configs"
    overrides = {**TINY, "dataset_dir": str(phantoms), "output_dir": str(tmp_path), "strategy::rank": 2, **options}
    if options.get("slices::cache") == "disk":
        overrides["slices::cache_dir"] = str(tmp_path / "cache")
    run_workflow([configs / "train.json"], {**overrides, "epochs": 2, "batch_size": 2, "val_interval": 1})
    assert read_json(tmp_path / "run_card.json")["status"] == "completed"
    assert (tmp_path / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {
            "embeddings::variants": 2,
            "val_interval": 1,
            "slices::picker::_target_": "samseg_monai.data.slices.AllSlices",
        },
        # narrow: processors without AVX-512 emulate bf16
        {
            "val_interval": 0,
            "accumulation_steps": 2,
            "strategy::decoder": "full",
            "autocast": "bf16",
            "strategy::side": NARROW,
        },
        {"input_scale": "sam", "strategy::masks": "random", "store_size": 32, "slices::num_workers": 1},
    ],
    ids=["embeddings", "last-epoch-accumulate-bf16", "stored-small-workers"],
)
def test_every_option_trains_the_ladder(options, abdomen, tmp_path):
    configs = ROOT / "abdomen_segmentation_ladder" / "configs"
    shared = {**TINY, "dataset_dir": str(abdomen), "output_dir": str(tmp_path), "batch_size": 8}
    if "embeddings::variants" in options:
        shared["embeddings::cache_dir"] = str(tmp_path / "embeddings")
    training = {"epochs": 2, "schedule::warmup": 1, "strategy::side_weights": "random", **shared, **options}
    run_workflow([configs / "train.json"], training)
    card = read_json(tmp_path / "run_card.json")
    assert card["status"] == "completed" and 0.4 < card["gate"] < 0.6
    assert (tmp_path / "adapter.safetensors").is_file()
    same = ("input_scale", "store_size", "strategy::masks", "strategy::side", "autocast")
    kept = {key: options[key] for key in same if key in options}
    kept |= {"strategy::decoder": options.get("strategy::decoder", "masks")}
    run_workflow([configs / "evaluate.json"], {**shared, **kept})
    metrics = read_json(tmp_path / "evaluation" / "metrics.json")
    assert metrics["cases"] == 2 and metrics["prompt_source"] == "none"
    assert (tmp_path / "evaluation" / "transunet_cases.csv").is_file()


@pytest.mark.parametrize("strategy", ["unet_box", "unet_crop", "ellipse"])
def test_networks_without_sam_take_the_boxes_of_a_prompted_task(strategy, phantoms, tmp_path):
    configs = bundles.build_bundle("meningioma", strategy, tmp_path / "bundles") / "configs"
    shared = {"dataset_dir": str(phantoms), "output_dir": str(tmp_path), "image_size": 32, "crop_size": [32, 36]}
    shared |= {"network_def::crop_size": 16} if strategy == "unet_crop" else {}
    run_workflow([configs / "train.json"], {**shared, "epochs": 2, "val_interval": 1})
    run_workflow([configs / "evaluate.json"], shared)
    card = read_json(tmp_path / "evaluation" / "run_card.json")
    assert (card["sam_variant"], card["strategy"]["name"]) == ("no SAM", strategy)
    adapter = read_json(tmp_path / "card.json")
    assert adapter["prompt"] == "box" and adapter["metrics"]["val_loss"] > 0
    names = [line.split(",")[2] for line in (tmp_path / "history.csv").read_text().splitlines()]
    assert names.count("val_loss") == names.count("train_loss") == 2
    places = {"dataset_dir": str(phantoms / "unlabelled"), "prompt::source": "image"}
    run_workflow([configs / "inference.json"], {**shared, **places})
    assert len(list((tmp_path / "predictions").glob("*_seg.nii.gz"))) == 1


def test_zero_shot_can_choose_sams_best_mask_from_the_command_line(phantoms, tmp_path):
    configs = [ROOT / "meningioma_segmentation_zero_shot" / "configs" / "evaluate.json"]
    tables = []
    for masks in ("single", "best"):
        folder = tmp_path / masks
        run_workflow(configs, {**TINY, "dataset_dir": str(phantoms), "output_dir": str(folder), "masks": masks})
        tables.append((folder / "evaluation" / "cases.csv").read_text())
        card = read_json(folder / "evaluation" / "run_card.json")
        assert card["settings"]["masks"] == masks
        noise = "nothing learns, its scores are those of noise"
        assert card["warnings"] == [f"ZeroShot on random weights (sam_checkpoint random): {noise}"]
    assert tables[0] != tables[1]
    alerts = RunResult.load(folder / "evaluation").warnings
    assert [text.partition(": ")[2] for text in alerts] == [
        "SAM's weights are random, and nothing has learnt: its scores are those of noise"
    ]


def test_zero_shot_of_several_classes_is_noise_and_has_to_be_asked_for(abdomen, tmp_path):
    configs = bundles.build_bundle("abdomen", "zero_shot", tmp_path / "bundles") / "configs"
    shared = {"dataset_dir": str(abdomen), "output_dir": str(tmp_path / "run"), "sam_variant": "pico", "image_size": 64}
    with pytest.raises(ConfigError, match=r"predictions would be noise.*strategy::random_masks true"):
        run_workflow([configs / "evaluate.json"], shared)
    with pytest.raises(ConfigError, match=r"predictions would be noise.*strategy::random_masks true"):
        run_workflow([configs / "evaluate.json"], {**shared, "sam_checkpoint": "random"})
    run_workflow([configs / "evaluate.json"], {**shared, "batch_size": 8, "strategy::random_masks": True})
    card = read_json(tmp_path / "run" / "evaluation" / "run_card.json")
    assert card["strategy"]["arguments"] == {"random_masks": True}
    assert card["warnings"] == [
        "ZeroShot without boxes: this task has none (prompt::source none), SAM segments the image alone"
    ]


def test_hippocampus_trains_evaluates_and_predicts_without_sam(hippocampi, tmp_path):
    configs = root_of("hippocampus_segmentation_unet") / "configs"
    shared = {"dataset_dir": str(hippocampi), "output_dir": str(tmp_path), "image_size": 32, "crop_size": [32, 32]}
    run_workflow([configs / "train.json"], {**shared, "epochs": 1, "val_interval": 1})
    run_workflow([configs / "evaluate.json"], shared)
    card = read_json(tmp_path / "evaluation" / "run_card.json")
    assert (card["sam_variant"], card["strategy"]["name"]) == ("no SAM", "unet")
    run_workflow([configs / "evaluate.json"], {**shared, "results_dir": str(tmp_path / "again"), "calibration": True})
    plain, more = (read_rows(tmp_path / folder / "cases.csv") for folder in ("evaluation", "again"))
    assert plain == [{key: value for key, value in row.items() if key not in ("ece", "brier")} for row in more]
    assert all(0 < row["brier"] < 1 and 0 <= row["ece"] <= 1 for row in more)
    run_workflow([configs / "inference.json"], {**shared, "dataset_dir": str(hippocampi / "images")})
    assert len(list((tmp_path / "predictions").glob("*_seg.nii.gz"))) == 6
