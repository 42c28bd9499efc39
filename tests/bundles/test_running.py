"""How an expression finds the bundle it belongs to: MONAI tells it nothing, so this stands on how MONAI is built.

Each test names one thing that ``samseg_monai.bundles.running`` takes for granted. A failure with a new version of MONAI
says what has changed there.
"""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow, run

from samseg_monai import bundles
from samseg_monai.bundles.running import MALLOC, reuse_memory, running

SEEN: list = []
LOOK = "$here.look()"


def look() -> str:
    """Take down what an expression finds, and which functions of MONAI's workflow are on the call stack."""
    frames = [frame for frame in inspect.stack() if isinstance(frame.frame.f_locals.get("self"), ConfigWorkflow)]
    SEEN.append((running(), bundles.bundle_root(), [frame.function for frame in frames]))
    return "seen"


@pytest.fixture
def config(tmp_path) -> Path:
    SEEN.clear()
    parts = {
        "imports": ["$import tests.bundles.test_running as here"],
        "epochs": 1,
        "value": LOOK,
        "component": {"_target_": "dict", "inner": [LOOK]},
        "initialize": [LOOK],
        "run": [LOOK, "$@value", "$@component"],
        "finalize": [LOOK],
    }
    folder = tmp_path / "some_bundle" / "configs"
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text("{}")
    (folder / "train.json").write_text(json.dumps(parts))
    return folder / "train.json"


def test_the_workflow_is_self_of_a_frame_of_every_expression_whatever_refers_to_it(config):
    run(config_file=str(config), epochs=3)
    assert [frames for _, _, frames in SEEN] == [
        ["_run_expr", "initialize"],
        *[["_run_expr", "run"]] * 3,
        ["_run_expr", "finalize"],
    ]
    for found, root, _ in SEEN:
        assert (found.configs, root) == (config.parent, str(config.parent.parent))
        assert found.config["epochs"] == 3 and found.parser.get("epochs") == 3  # overrides are in it


def test_the_workflow_knows_its_folder_and_its_parser(config):
    workflow = create_workflow(config_file=str(config))
    assert isinstance(workflow, ConfigWorkflow)
    assert isinstance(workflow.config_root_path, Path) and workflow.config_root_path == config.parent
    assert isinstance(workflow.parser, ConfigParser) and workflow.parser.get()["epochs"] == 1
    assert "self" in inspect.signature(ConfigWorkflow._run_expr).parameters


def test_of_a_workflow_within_a_workflow_the_inner_one_is_found(config, tmp_path):
    outer = tmp_path / "outer" / "configs" / "train.json"
    outer.parent.mkdir(parents=True)
    (outer.parent / "metadata.json").write_text("{}")
    within = f"$__import__('monai').bundle.run(config_file={str(config)!r})"
    outer.write_text(json.dumps({"imports": ["$import tests.bundles.test_running as here"], "run": [within, LOOK]}))
    run(config_file=str(outer))
    assert [found.configs for found, *_ in SEEN] == [*[config.parent] * 5, outer.parent]


def test_a_config_that_is_parsed_alone_has_no_workflow(config):
    parser = ConfigParser()
    parser.read_config(str(config))
    assert parser.get_parsed_content("value") == "seen"
    assert SEEN == [(None, ".", [])]


def test_overrides_come_before_any_expression_and_end_in_a_key_error_within_what_is_not_there(config):
    for key in ("epohcs::x", "component::inner::3::x", "epochs::x"):
        with pytest.raises((LookupError, ValueError, TypeError)):
            create_workflow(config_file=str(config), **{key: 1})
    assert SEEN == []


@pytest.mark.parametrize("chosen", [None, "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_glibc_is_told_to_keep_memory_unless_the_user_has_chosen(chosen, monkeypatch):
    told = []
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    library = SimpleNamespace(mallopt=lambda *values: told.append(values))
    monkeypatch.setattr("samseg_monai.bundles.running.ctypes.CDLL", lambda name: library)
    if chosen:
        monkeypatch.setenv(chosen, "131072")
    reuse_memory()
    assert told == ([] if chosen else list(MALLOC.items()))
    library = SimpleNamespace()  # musl has no such function
    reuse_memory()
