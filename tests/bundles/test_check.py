"""``samseg bundle check``: ours are as built, every change of one is named, and looking at it runs nothing."""

import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from safetensors.torch import save_file

from samseg_monai import __version__
from samseg_monai.bundles import build_bundle, recipe_names, wheel, write_bundle
from samseg_monai.bundles.check import ANOTHER_VERSION, AS_BUILT, EDITED, check_bundle
from samseg_monai.bundles.door import open_bundle
from samseg_monai.bundles.pack import write_sums
from samseg_monai.bundles.record import write_record
from samseg_monai.bundles.running import configured
from samseg_monai.bundles.wheel import INFO, WHEEL, build_wheel
from samseg_monai.errors import BundleError, ConfigError
from samseg_monai.settings import NOTHING, read_settings
from tests.helpers.commands import samseg
from tests.helpers.hostile_files import BUNDLES, FILES, NAME, SUMS
from tests.helpers.old_bundles import LORA, UNET, old_bundle, unpacked

ROOT = Path(__file__).parents[2]
COMMITTED = sorted((ROOT / "bundles").iterdir())


def with_weights(root: Path) -> Path:
    """A built bundle with all that a packed one has: weights, adapter, card, results."""
    (root / "models").mkdir()
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2).half())
    torch.save(layers.state_dict(), root / "models" / "model.pt")
    save_file({"lora_a": torch.ones(2, 3)}, root / "models" / "adapter.safetensors")
    card = {"strategy": {"_target_": "samseg_monai.strategies.LoRA", "arguments": {"rank": 2}}, "metrics": {"n": 2}}
    (root / "models" / "card.json").write_text(json.dumps(card))
    (root / "metrics").mkdir()
    (root / "metrics" / "cases.csv").write_text("case,dice\nBraTS-MEN-00001-000,0.9\n")
    return root


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    return with_weights(build_bundle("meningioma", "lora", tmp_path_factory.mktemp("clean")))


@pytest.fixture
def bundle(clean, tmp_path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(clean, tmp_path / NAME))


def pack(root: Path) -> Path:
    """ZIP a folder as ``samseg bundle pack`` does."""
    archive = root.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            content.write(path, path.relative_to(root.parent).as_posix())
    return archive


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.name)
def test_committed_bundles_are_as_built(path):
    verdict = check_bundle(path)
    assert (verdict.answer, verdict.problems, verdict.name) == (AS_BUILT, (), path.name)


def test_every_bundle_that_can_be_built_is_as_built(tmp_path):
    built = []
    for task, strategy in product(recipe_names("tasks"), recipe_names("strategies")):
        with suppress(BundleError):  # an ellipse for eight organs
            built.append(build_bundle(task, strategy, tmp_path))
    assert len(built) >= 21 and len(COMMITTED) >= 4
    assert {path.name: check_bundle(path).problems for path in built} == {path.name: () for path in built}


def test_packed_bundle_is_as_built_as_a_folder_and_as_a_zip(bundle):
    write_sums(bundle)
    for path in (bundle, pack(bundle)):
        verdict = check_bundle(path)
        assert (verdict.answer, verdict.problems) == (AS_BUILT, ()) and verdict.sums > 10


def test_what_a_run_was_started_with_is_no_edit(bundle, tmp_path):
    card = {"settings": {"network_def::net::channels": [8, 16], "train::named_handlers::keep::0": None}}
    (bundle / "metrics" / "run_card.json").write_text(json.dumps(card))
    assert check_bundle(bundle).problems == ()
    evil = {"network_def::net::_target_": "os.system", "a::b": "$1", "+a::b": 1, "a#b": 1}
    (bundle / "metrics" / "run_card.json").write_text(json.dumps({"settings": evil, "a::b": 1}))
    assert [line.split(": ")[1] for line in check_bundle(bundle).problems] == [
        *(f"settings::{key}" for key in evil),
        "a::b",
    ]
    # null as an expression is null in the record of the run
    configs = build_bundle("abdomen", "vnet", tmp_path) / "configs"
    ran = configured([configs / "train.json"], {"network_def::net::dropout_prob_down": NOTHING})
    write_record(ran, tmp_path / "run" / "bundle")
    assert check_bundle(tmp_path / "run" / "bundle").answer == AS_BUILT


def test_results_that_a_run_leaves_in_the_bundle_are_no_problem(bundle):
    write_sums(bundle)
    (bundle / "eval" / "predictions").mkdir(parents=True)
    (bundle / "eval" / "predictions" / "case_seg.nii.gz").write_bytes(b"\x1f\x8b")
    (bundle / "eval" / "events.out.tfevents.1").write_bytes(bytes(range(24)))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    torch.save({"epoch": 1, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()},
               bundle / "eval" / "resume.pt")  # fmt: skip
    for name in ("configs", "docs", "LICENSE", "large_files.yml"):
        copy = shutil.copytree if (bundle / name).is_dir() else shutil.copy
        (bundle / "eval" / "bundle").mkdir(exist_ok=True)
        copy(bundle / name, bundle / "eval" / "bundle" / name)
    assert check_bundle(bundle).problems == ()
    (bundle / "eval" / "bundle" / "configs" / "logging.conf").write_text("[handlers]\nkeys=a\n")
    assert check_bundle(bundle).problems == ("eval/bundle/configs/logging.conf: not what the package writes",)


def test_there_are_enough_hostile_cases():
    cases = BUNDLES + SUMS
    assert len({case.name for case in cases}) == len(cases) >= 200


@pytest.mark.parametrize("case", BUNDLES, ids=lambda case: case.name)
def test_hostile_bundle_is_caught(case, bundle):
    case.change(bundle)
    verdict = check_bundle(bundle)
    assert verdict.answer == EDITED and verdict.problems
    assert all(problem.isprintable() for problem in verdict.problems)


@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
def test_hostile_file_is_caught_in_a_zip(case, bundle):
    case.change(bundle)
    verdict = check_bundle(pack(bundle))
    assert verdict.answer == EDITED and all(problem.isprintable() for problem in verdict.problems)


@pytest.mark.parametrize("case", SUMS, ids=lambda case: case.name)
def test_bundle_that_is_not_the_packed_one_is_caught(case, bundle):
    write_sums(bundle)
    case.change(bundle)
    for path in (bundle, pack(bundle)):
        assert check_bundle(path).answer == EDITED


def test_edits_are_named_by_key(bundle):
    path = bundle / "configs" / "inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"seed": 7, "x\x1b[31m": "$exec('1')"}
    del config["handlers"]
    config["initialize"][0] = "$print(1)"
    path.write_text(json.dumps(config, indent=4))
    (bundle / "docs" / "README.md").write_text("hello")
    (bundle / "docs" / "data_license.txt").unlink()
    assert set(check_bundle(bundle).problems) == {
        "configs/inference.json: seed: 7 in place of 0",
        "configs/inference.json: x\\x1b[31m: added, \"$exec('1')\"",
        "configs/inference.json: handlers: taken out",
        'configs/inference.json: initialize::0: "$print(1)" in place of "$monai.utils.set_determinism(seed=@seed)"',
        "docs/README.md: not what the package writes",
        "docs/data_license.txt: missing",
    }


def test_settings_that_are_none_are_all_named(bundle):
    path = bundle / "configs" / "settings.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["run"] |= {"image_size": "$__import__('os').system('id')", "lr": -1}
    settings["strategy"]["method"]["_target_"] = "os.system"
    path.write_text(json.dumps(settings))
    problems = "\n".join(check_bundle(bundle).problems)
    assert check_bundle(bundle).answer == EDITED
    assert "run::image_size" in problems and "run::lr" in problems and "_target_" in problems


def test_another_version_is_not_judged_and_how_to_get_it_is_told(bundle, tmp_path, monkeypatch, capsys):
    path = bundle / "configs" / "settings.json"
    path.write_text(path.read_text(encoding="utf-8").replace(f'"engine": "{__version__}"', '"engine": "9.8.7"'))
    assert check_bundle(bundle).answer == ANOTHER_VERSION
    assert samseg(monkeypatch, "bundle", "check", bundle) == 3
    told = capsys.readouterr().out
    assert "another version" in told and "install samseg-monai 9.8.7" in told
    newer = json.loads(path.read_text(encoding="utf-8"))
    newer["run"]["key_of_tomorrow"] = 1
    path.write_text(json.dumps(newer))
    assert check_bundle(bundle).answer == ANOTHER_VERSION
    with pytest.raises(ConfigError, match=r"key_of_tomorrow(.|\n)*samseg-monai 9.8.7 made it"), open_bundle(bundle):
        pass
    (tmp_path / "old").mkdir()
    for name in (LORA, UNET):  # written by 0.1.0, before there were settings
        archive = old_bundle(name, tmp_path / "old")
        for old in (archive, unpacked(archive)):
            verdict = check_bundle(old)
            assert (verdict.answer, verdict.engine, verdict.problems) == (ANOTHER_VERSION, "0.1.0", ())


def test_looking_at_a_bundle_runs_nothing_of_it(bundle, tmp_path):
    """The control: MONAI itself makes the same file."""
    trace = tmp_path / "trace"
    expression = f"$open({str(trace)!r}, 'w').close()"
    config = {"imports": ["$import os"], "evil": expression, "call": {"_target_": "os.mkdir", "path": str(trace)}}
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    (bundle / "configs" / "logging.conf").write_text(f"[handlers]\nkeys=a\n[handler_a]\nclass={expression[1:]}\n")

    class Evil:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save(Evil(), bundle / "models" / "model.pt")
    for path in (bundle, pack(bundle)):
        problems = "\n".join(check_bundle(path).problems)
        for found in ("inference.json: evil: added", "inference.json: call: added", "logging.conf", "model.pt"):
            assert found in problems
    assert not trace.exists()
    ConfigParser(config).get_parsed_content("evil")
    assert trace.exists()
    trace.unlink()
    torch.load(bundle / "models" / "model.pt", weights_only=False)
    assert trace.exists()


def test_command_tells_its_answer_and_json(bundle, monkeypatch, capsys):
    write_sums(bundle)
    for words in (("bundle", "check"), ("lint",)):  # the name that it had
        assert samseg(monkeypatch, *words, bundle) == 0
        told = capsys.readouterr().out
        assert f"{NAME}: as built" in told and "they do not tell who sent it" in told
    (bundle / "configs" / "extra.json").write_text('{"x": "$exec(\'1\')"}')
    assert samseg(monkeypatch, "bundle", "check", bundle) == 1
    assert "configs/extra.json: no file of a bundle" in capsys.readouterr().out
    assert samseg(monkeypatch, "bundle", "check", "--json", bundle) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["answer"] == EDITED and "configs/extra.json: no file of a bundle" in told["problems"]
    assert samseg(monkeypatch, "bundle", "check", bundle / "nowhere") == 2
    assert samseg(monkeypatch, "bundle", "check") == 2


# ---- a wheel of the package, which is code ----


def with_wheel(bundle: Path, content: bytes | None = None) -> Path:
    settings = read_settings(json.loads((bundle / "configs" / "settings.json").read_text(encoding="utf-8")), "test")
    write_bundle(settings, bundle, wheel=True)
    (bundle / WHEEL).parent.mkdir()
    (bundle / WHEEL).write_bytes(build_wheel() if content is None else content)
    return bundle


def rewritten(change) -> bytes:
    """The package's wheel with its members changed: ``change`` gets their content by name."""
    with zipfile.ZipFile(io.BytesIO(build_wheel())) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in members.items():
            archive.writestr(name, value)
    return buffer.getvalue()


def test_a_wheel_holds_the_files_of_the_package_and_is_the_same_whenever_it_is_made():
    assert build_wheel() == build_wheel()
    with zipfile.ZipFile(io.BytesIO(build_wheel())) as archive:
        names = archive.namelist()
        told = archive.read(f"{INFO}/METADATA").decode()
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "samseg_monai"]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:  # in a checkout
        assert [name for name in names if not name.startswith(INFO)] == sorted(listed.stdout.split())
    assert f"Version: {__version__}\n" in told and "Requires-Dist: torch>=" in told
    assert f"{INFO}/licenses/LICENSE" in names


def test_pip_installs_the_wheel_of_a_packed_bundle_and_what_it_installs_makes_it_again(bundle, tmp_path, monkeypatch):
    content = build_wheel()
    with zipfile.ZipFile(pack(with_wheel(bundle))) as archive:
        archive.extractall(tmp_path / "sent")
    [line] = re.findall(r"^pip install (\S+)$", (tmp_path / "sent" / NAME / "docs" / "README.md").read_text(), re.M)
    bare = tmp_path / "bare"
    alone = ["--no-deps", "--no-index", "--target", str(bare), "--no-compile", "--disable-pip-version-check"]
    installing = [sys.executable, "-m", "pip", "install", line, *alone]
    done = subprocess.run(installing, cwd=tmp_path / "sent", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = f"import sys; sys.path.insert(0, {str(bare)!r}); import samseg_monai as s; print(s.__file__, s.__version__)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(bare / "samseg_monai" / "__init__.py"), __version__]
    monkeypatch.syspath_prepend(bare)
    monkeypatch.setattr(wheel, "RECIPES", bare / "samseg_monai" / "recipes")
    assert build_wheel() == content


def test_the_own_wheel_is_as_built_and_said_to_be_code(bundle, monkeypatch, capsys):
    for path in (with_wheel(bundle), pack(bundle)):
        verdict = check_bundle(path)
        assert (verdict.answer, verdict.problems) == (AS_BUILT, ())
        assert samseg(monkeypatch, "bundle", "check", path) == 0
        assert f"{WHEEL} is code, which runs once it is installed: byte for byte the" in capsys.readouterr().out
        with open_bundle(path) as opened:
            assert not opened.edited


MORE = b"Requires-Dist: x\n"
CHANGED = {
    "samseg_monai/__init__.py: not that": lambda m: m.update({"samseg_monai/__init__.py": b"import os"}),
    "samseg_monai/evil.py: added": lambda m: m.update({"samseg_monai/evil.py": b""}),
    "x.pth: added": lambda m: m.update({"x.pth": b"import os"}),
    "samseg_monai/files.py: taken out": lambda m: m.pop("samseg_monai/files.py"),
    f"{INFO}/METADATA: not that": lambda m: m.update({f"{INFO}/METADATA": m[f"{INFO}/METADATA"] + MORE}),
    "packed in another way": lambda m: m.update({f"{INFO}/RECORD": b""}),
}


@pytest.mark.parametrize("said", CHANGED)
def test_another_wheel_is_told_apart_by_file(said, bundle):
    verdict = check_bundle(with_wheel(bundle, rewritten(CHANGED[said])))
    assert verdict.answer == EDITED and any(WHEEL in line and said in line for line in verdict.problems)
    assert "is code, which runs once it is installed: not the" in verdict.code[0]


def test_wheels_that_cannot_be_compared_are_not_passed_over(bundle):
    with_wheel(bundle, b"PK\x03\x04 no wheel")
    assert any("no wheel" in line for line in check_bundle(bundle).problems)
    (bundle / WHEEL).rename(bundle / "wheel" / "samseg_monai-9.8.7-py3-none-any.whl")
    verdict = check_bundle(bundle)
    assert "wheel/samseg_monai-9.8.7-py3-none-any.whl: no file of a bundle" in verdict.problems
    assert "not compared" in verdict.code[0]
    path = bundle / "configs" / "settings.json"
    path.write_text(path.read_text(encoding="utf-8").replace(f'"engine": "{__version__}"', '"engine": "9.8.7"'))
    verdict = check_bundle(bundle)
    assert verdict.answer == ANOTHER_VERSION and "not compared" in verdict.code[0]


def test_a_package_that_is_not_installed_as_it_runs_makes_no_wheel(monkeypatch):
    monkeypatch.setattr(wheel, "__version__", "9.8.7")
    with pytest.raises(BundleError, match=r"9\.8\.7 runs; install it again"):
        build_wheel()
    monkeypatch.setattr(wheel, "PROJECT", "samseg-monai-that-nobody-has")
    with pytest.raises(BundleError, match="not installed here"):
        build_wheel()
