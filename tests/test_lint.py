"""``samseg lint``: our own bundles are clean, hostile ones are caught, and looking at them runs nothing."""

import contextlib
import inspect
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser, ReferenceResolver
from safetensors.torch import save_file

from samseg_monai import cli
from samseg_monai.bundles import build_bundle, recipe_names
from samseg_monai.bundles.pack import write_sums
from samseg_monai.errors import BundleError
from samseg_monai.lint import RULES, expressions, lint_bundle
from samseg_monai.lint.files import Folder
from samseg_monai.lint.paths import Texts, leaving
from tests.hostile_files import ARCHIVES, BUNDLES, NAME, SUMS

ROOT = Path(__file__).parents[1]
COMMITTED = sorted((ROOT / "bundles").iterdir())


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Path:
    """A bundle with all that a packed one has, but few configs: texts, weights, adapter, card, results."""
    root = build_bundle("meningioma", "lora", tmp_path_factory.mktemp("clean"))
    for name in ("train", "evaluate", "multi_gpu_train", "multi_gpu_evaluate"):
        (root / "configs" / f"{name}.json").unlink()
    (root / "models").mkdir()
    layers = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2).half())
    torch.save(layers.state_dict(), root / "models" / "model.pt")
    save_file({"lora_a": torch.ones(2, 3)}, root / "models" / "adapter.safetensors")
    card = {"strategy": {"_target_": "samseg_monai.strategies.LoRA", "arguments": {"rank": 2}}, "metrics": {"n": 2}}
    (root / "models" / "card.json").write_text(json.dumps(card))
    (root / "metrics").mkdir()
    (root / "metrics" / "cases.csv").write_text("case,dice\nBraTS-MEN-00001-000,0.9\n")
    (root / "name.txt").write_text(f"{NAME}\n")
    return root


@pytest.fixture
def bundle(clean, tmp_path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(clean, tmp_path / NAME))


def rules_of(findings) -> set[str]:
    return {finding.rule for finding in findings}


def pack(root: Path) -> Path:
    """ZIP a folder as ``samseg bundle pack`` does."""
    archive = root.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as content:
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            content.write(path, path.relative_to(root.parent).as_posix())
    return archive


def samseg(monkeypatch, *words: object) -> int:
    """Run the command line in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["samseg", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


# --- what must pass


@pytest.mark.parametrize("path", COMMITTED, ids=lambda p: p.name)
def test_committed_bundles_are_clean(path):
    assert lint_bundle(path) == []


def test_every_bundle_that_can_be_built_is_clean(tmp_path):
    for task in recipe_names("tasks"):
        for strategy in recipe_names("strategies"):
            build_bundle(task, strategy, tmp_path)
    built = sorted(tmp_path.iterdir())
    assert len(built) >= 21 and len(COMMITTED) >= 4
    assert {path.name: lint_bundle(path) for path in built} == {path.name: [] for path in built}


def test_packed_bundle_is_clean_as_a_folder_and_as_a_zip(bundle):
    write_sums(bundle)
    assert lint_bundle(bundle) == lint_bundle(pack(bundle)) == []


def test_results_that_a_run_leaves_in_the_bundle_are_no_findings(bundle):
    write_sums(bundle)
    (bundle / "eval" / "predictions").mkdir(parents=True)
    (bundle / "eval" / "predictions" / "case_seg.nii.gz").write_bytes(b"\x1f\x8b")
    (bundle / "eval" / "events.out.tfevents.1").write_bytes(bytes(range(24)))
    bank = {"format": 1, "key": {"image": "/data/case/t1c.nii.gz"}, "rows": 1, "row_shape": [1]}
    (bundle / "eval" / "bank.json").write_text(json.dumps(bank))
    for suffix in ("bank", "rows", "lock"):
        (bundle / "eval" / f"bank.{suffix}").write_bytes(b"")
    for name in ("configs", "large_files.yml"):
        copy = shutil.copytree if (bundle / name).is_dir() else shutil.copy
        (bundle / "eval" / "bundle").mkdir(exist_ok=True)
        copy(bundle / name, bundle / "eval" / "bundle" / name)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))])
    torch.save({"epoch": 1, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()},
               bundle / "eval" / "resume.pt")  # fmt: skip
    assert lint_bundle(bundle) == []


def test_ordinary_expressions_and_arguments_are_no_findings(bundle):
    """What people write in configs of their own; a linter that cries wolf is switched off."""
    values = [
        "$@crop_size[0] // 2", "$@crop_size[0] * 2", "$@image_size - 1", "$list(range(3)) + list(range(2))",
        "$@scans[0]", "$@scans[1:]", "$@dataset_dir + '/images'", "$@bundle_root + '/models/' + 'model.pt'",
        "$torch.distributed.get_rank() + torch.cuda.device_count()", "$max(1, @batch_size) * 2",
        "$lambda x: x > 0", "$lambda x: x * 255", "$lambda x: x[1:] / 2", "$lambda x: x + 1", "$lambda d: d['pred']",
        "$[{'image': i, 'label': l} for i, l in zip(@crop_size[:-1], @crop_size[1:])]",
        "$datalists.load_datalist(@dataset_dir + '/datalist.json', @dataset_dir, 'training')[:10]",
        {"_target_": "OneOf", "transforms": [], "weights": [0.5, 0.5]},
        {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "data_root_dir": "@dataset_dir"},
        {"_target_": "CheckpointSaver", "save_dir": "@output_dir", "save_dict": {}, "key_metric_filename": "model.pt"},
    ]  # fmt: skip
    path = bundle / "configs" / "inference.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "own": values}))
    zoo = (bundle / "large_files.yml").read_text(encoding="utf-8").replace("\n  ", "\n")
    (bundle / "large_files.yml").write_text(zoo)
    assert lint_bundle(bundle) == []


def test_folders_however_deep_are_entered(bundle):
    inner = bundle / "docs" / "/".join("a" * 100)
    inner.mkdir(parents=True)
    (inner / "x.md").write_text("")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 80)
    try:
        files = Folder(bundle)
    finally:
        sys.setrecursionlimit(limit)
    assert (inner / "x.md").relative_to(bundle).as_posix() in files.sizes and not files.findings


# --- what must be caught


def ids(case):
    return case.name


def test_there_are_enough_hostile_cases_and_every_rule_has_one():
    cases = BUNDLES + ARCHIVES + SUMS
    assert len({case.name for case in cases}) == len(cases) >= 120
    assert {case.rule for case in cases} == set(RULES)


@pytest.mark.parametrize("case", BUNDLES, ids=ids)
def test_hostile_bundle_is_caught(case, bundle):
    case.change(bundle)
    findings = lint_bundle(bundle)
    assert rules_of(findings) == {case.rule}, findings
    assert all(finding.file and finding.what and finding.why for finding in findings)


@pytest.mark.parametrize("case", ARCHIVES, ids=ids)
def test_hostile_archive_is_caught(case, bundle):
    archive = pack(bundle)
    case.change(archive)
    findings = lint_bundle(archive)
    assert rules_of(findings) == {case.rule}, findings


@pytest.mark.parametrize("case", SUMS, ids=ids)
def test_bundle_that_is_not_the_packed_one_is_caught(case, bundle):
    write_sums(bundle)
    case.change(bundle)
    for path in (bundle, pack(bundle)):
        assert rules_of(lint_bundle(path)) == {case.rule}


def test_value_that_a_second_one_hides_is_judged_too(bundle):
    """MONAI uses the second; another reader may use the first."""
    (bundle / "configs" / "demo.json").write_text('{"x": {"_target_": "os.system"}, "x": 1}')
    assert [(f.where, f.rule) for f in lint_bundle(bundle)] == [("x", "key"), ("x::_target_", "target")]


def test_all_hostile_configs_at_once_are_all_listed(bundle):
    """One bundle with every hostile value: a finding must not hide another one."""
    values = {f"x{i}": value for i, value in enumerate(c.value for c in BUNDLES if c.value is not None)}
    path = bundle / "configs" / "inference.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}))
    found = {finding.where.split("::")[0] for finding in lint_bundle(bundle)}
    assert len(values) >= 60
    assert set(values) <= found


def test_looking_at_a_bundle_runs_nothing_of_it(bundle, tmp_path):
    """The control: MONAI itself makes the same file."""
    trace = tmp_path / "trace"
    expression = f"$open({str(trace)!r}, 'w').close()"
    path = bundle / "configs" / "inference.json"
    config = {"imports": ["$import os"], "evil": expression, "call": {"_target_": "os.mkdir", "path": str(trace)}}
    path.write_text(json.dumps(config))
    (bundle / "configs" / "logging.conf").write_text(f"[handlers]\nkeys=a\n[handler_a]\nclass={expression[1:]}\n")

    class Evil:
        def __reduce__(self):
            return open, (str(trace), "w")

    torch.save(Evil(), bundle / "models" / "model.pt")
    assert {"expression", "target", "import", "pickle", "logging"} <= rules_of(lint_bundle(bundle))
    assert rules_of(lint_bundle(pack(bundle))) >= {"expression", "pickle"}
    assert not trace.exists()
    torch.load(bundle / "models" / "model.pt", weights_only=False)
    assert trace.exists()


@pytest.mark.parametrize("way", ["description", "key", "module", "line break", "text", "class", "letters"])
def test_ways_that_look_harmless_do_run_code_in_monai(way, bundle, tmp_path):
    """The control of the stranger rules: what they refuse really runs."""
    trace = tmp_path / "trace"
    call = f"os.mkdir({str(trace)!r})"
    pickled = tmp_path / "scan.nii"  # in the oldest protocol, which has no magic bytes
    pickled.write_bytes(f"cos\nmkdir\n(V{trace}\ntR.".encode())
    config = {
        "description": {"x": {"_target_": "Identity", "_desc_": f"$__import__('os').{call[3:]}"}},
        "key": {f"n,open({str(trace)!r},'w'),@n": {"y": 1, "x": "$(@::y)"}, "n": {"y": 1}},
        "module": {"imports": ["$import samseg_monai.checkpoints as c"], "m": "@imports::0", "x": f"$@m.{call}"},
        "line break": {"imports": ["$\nimport os"], "x": f"${call}"},
        "text": {"imports": ["$import os"], "and": 1, "x": f"$'@and' + str({call}) + '@and'"},
        "class": {
            "data": {"_target_": "Dataset", "data": ["os.mkdir"], "transform": {
                "_target_": "LoadImage", "_mode_": "callable", "path": str(trace)}},
            "x": "$@data[0]",
        },
        "letters": {
            "imports": ["$import torch"],
            "x": f"$__loc\uff41l_refs['imports::0'].load({str(pickled)!r}, weights_only=False)",
        },
    }[way]  # fmt: skip
    (bundle / "configs" / "x.json").write_text(json.dumps(config))
    assert lint_bundle(bundle)
    assert not trace.exists()
    parser = ConfigParser(config)
    with contextlib.suppress(RuntimeError, ValueError):
        for key in config:
            parser.get_parsed_content(key)
            for child in config[key] if isinstance(config[key], dict) else ():
                parser.get_parsed_content(f"{key}::{child}")
    assert trace.exists()


def test_expressions_are_read_as_monai_reads_them():
    """MONAI's own replacement of references is the oracle, on texts made of what matters to it."""
    rng = random.Random(1)
    pieces = [
        "@",
        "@a",
        "@or",
        "@a::b",
        "#",
        "::",
        "'",
        '"',
        " + ",
        "x",
        "(",
        ")",
        "[0]",
        "import os",
        "é",
        "$",
        "%",
        "_",
    ]
    for _ in range(3000):
        text = "$" + "".join(rng.choices(pieces, k=rng.randrange(1, 9)))
        known = dict.fromkeys(ReferenceResolver.match_refs_pattern(text), "value")
        assert set(expressions.references(text)) == set(known)
        assert expressions.evaluated(text) == ReferenceResolver.update_refs_pattern(text, known)[1:]
        assert set(expressions.references(text[1:])) == set(ReferenceResolver.match_refs_pattern(text[1:]))


def test_no_expression_gives_a_path_that_leads_out_unseen():
    """Python itself is the oracle, on expressions put together at random of texts that are harmless alone."""
    items = {"many": [".", "./x", "a"], "keyed": {"k": ".", "j": "a/b"}, "mixed": [".", 1]}
    texts = {"dot": {"."}, "cut": {"a/etc"}, "empty": {""}, "other": {"@dot"}, "sum": {"$@dot + @empty"}}
    texts |= {"many::0": {"."}, "many::1": {"./x"}, "many::2": {"a"}, "mixed::0": {"."}}
    texts |= {f"keyed::{key}": {text} for key, text in items["keyed"].items()} | {"": {None}, "mixed::": {None}}
    values = {"dot": ".", "cut": "a/etc", "empty": "", "other": ".", "sum": ".", "many::1": "./x", **items}
    atoms = ["'.'", "'./x'", "'a/etc'", "''", "1", *(f"@{name}" for name in values)]
    forms = ["({} + {})", "({} + {})", "({} * {})", "{}[0]", "{}[1:]", "[{}, {}]", "{{'k': {}}}", "{}['k']",
             "({} or {})", "({} if {} else {})", "str({})", "max({})", "list({})", "dict(k={})",
             "[x + {} for x in {}]"]  # fmt: skip
    followed = Texts(texts, ())
    rng = random.Random(3)

    def source(depth: int) -> str:
        if depth == 0:
            return rng.choice(atoms)
        form = rng.choice(forms)
        return form.format(*(source(depth - 1) for _ in range(form.replace("{{", "").count("{}"))))

    leading = 0
    while leading < 60:
        expression = f"${source(rng.randrange(1, 4))}"
        value = None
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python's, of numbers that are indexed
            value = eval(expressions.evaluated(expression), {expressions.REFS: values})
        if isinstance(value, str) and len(value) > 1 and leaving(value):
            leading += 1
            seen = [*expressions.problems(expression, {}), *followed.leaving(expression)]
            assert seen, (expression, value)


def test_linter_needs_neither_torch_nor_monai(bundle):
    code = f"""
import sys
from samseg_monai.lint import lint_bundle
assert lint_bundle({str(bundle)!r}) == []
print(sorted({{"torch", "monai", "numpy", "ignite", "yaml"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_lists_name_what_exists_where_they_say():
    """A name that MONAI finds elsewhere, or not at all, would be judged by its name only."""
    from importlib import import_module

    from monai.bundle import ComponentLocator

    from samseg_monai.lint import names

    tables = {**names.MONAI, **names.OTHERS}
    listed = [(module, name) for module, text in tables.items() for name in names.words(text)]
    missing = [
        f"{module}.{name}" for module, name in listed if not callable(getattr(import_module(module), name, None))
    ]
    transforms = import_module("monai.transforms")
    missing += [n for n in names.TRANSFORMS if not any(hasattr(transforms, n + suffix) for suffix in ("", "d"))]
    dotted = [name.rpartition(".") for name in names.CALLS | names.VALUES if "." in name]
    missing += [f"{module}.{name}" for module, _, name in dotted if not hasattr(import_module(module), name)]
    assert len(listed) > 150 and not missing
    locator = ComponentLocator()
    short = [name for text in names.MONAI.values() for name in names.words(text)]
    short += [name + suffix for name in names.TRANSFORMS for suffix in ("", "d", "D", "Dict")]
    for name in short:
        found = locator.get_component_module_name(name)
        modules = [found] if isinstance(found, str) else found or []
        assert all(module.startswith((*names.MONAI, "monai.transforms")) for module in modules), name


# --- the command line


def test_command_prints_a_table_and_json(bundle, monkeypatch, capsys):
    assert samseg(monkeypatch, "lint", bundle) == 0
    assert capsys.readouterr().out.endswith("nothing found\n")
    (bundle / "configs" / "extra.json").write_text('{"x": "$exec(\'1\')", "y\\u001b[31m": {"_target_": "os.system"}}')
    assert samseg(monkeypatch, "lint", bundle) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "where", "rule", "what", "why"] and len(lines) == 3
    assert lines[1].split()[:3] == ["configs/extra.json", "x", "expression"] and "\x1b" not in lines[2]
    assert samseg(monkeypatch, "lint", "--json", bundle) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [(f["file"], f["rule"]) for f in findings] == [("configs/extra.json", r) for r in ("expression", "target")]
    assert samseg(monkeypatch, "lint", bundle / "nowhere") == 2
    assert samseg(monkeypatch, "lint") == 2


@pytest.mark.parametrize("kind", ["empty folder", "text file", "damaged ZIP", "ZIP of something else", "two bundles"])
def test_what_is_no_bundle_is_said_so(kind, bundle, tmp_path, monkeypatch, capsys):
    path = tmp_path / "thing"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "text file":
        path.write_text("hello")
    elif kind == "damaged ZIP":
        path.write_bytes(pack(bundle).read_bytes()[:-200])
    else:
        with zipfile.ZipFile(path, "w") as content:
            names = ["a/configs/train.json", "b/configs/train.json"] if kind == "two bundles" else ["a.txt"]
            for name in names:
                content.writestr(name, "{}")
    assert samseg(monkeypatch, "lint", path) == 1
    message = capsys.readouterr().err
    assert message.startswith("BundleError") and "thing" in message and "Traceback" not in message


def test_predict_refuses_a_bundle_with_findings(bundle, tmp_path, monkeypatch, capsys):
    """``--trust`` goes on: here to an inference.json that asks for nothing but to leave a trace."""
    trace = tmp_path / "trace"
    config = {"prompt": {"source": "none"}, "initialize": [], "run": [f"$open({str(trace)!r}, 'w').close()"]}
    config |= dict.fromkeys(("checkpoint", "dataset_dir", "output_dir", "predictions_dir"))
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))
    for path in (bundle, pack(bundle)):
        words = ["predict", path, "--input", tmp_path, "--output", tmp_path / "out"]
        assert samseg(monkeypatch, *words) == 1
        message = capsys.readouterr().err
        assert "--trust" in message and "configs/inference.json: calls open" in message and "run::0" in message
        assert not trace.exists()
        monkeypatch.setattr(sys, "argv", ["samseg", *map(str, words), "--trust"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code and trace.exists()
        trace.unlink()


def test_export_builds_no_network_of_a_bundle_with_findings(bundle, tmp_path, monkeypatch, capsys):
    """Nor that of a run, whose record of its bundle anybody may have changed."""
    trace = tmp_path / "trace"
    (bundle / "configs" / "inference.json").write_text(json.dumps({"network_def": f"$open({str(trace)!r}, 'w')"}))
    shutil.copytree(bundle, tmp_path / "run" / "bundle")
    for path in (bundle, pack(bundle), tmp_path / "run"):
        assert samseg(monkeypatch, "export", path, "--format", "pth", "--output", tmp_path / "out") == 1
        message = capsys.readouterr().err
        assert message.startswith("BundleError: export:") and "--trust" in message and "calls open" in message
        assert not trace.exists()


def as_is(bundle: Path, *run: str) -> None:
    """Replace inference.json by one that ``predict`` can give its values to, and that does nothing but ``run``."""
    keys = dict.fromkeys(("checkpoint", "dataset_dir", "output_dir", "predictions_dir"))
    config = {**keys, "prompt": {"source": "none"}, "initialize": [], "run": run}
    (bundle / "configs" / "inference.json").write_text(json.dumps(config))


def test_zip_exchanged_after_it_was_looked_through_is_refused(bundle, tmp_path, monkeypatch, capsys):
    trace = tmp_path / "trace"
    as_is(bundle)
    good = pack(bundle).read_bytes()
    as_is(bundle, f"$open({str(trace)!r}, 'w').close()")
    archive = pack(bundle)
    evil = archive.read_bytes()
    archive.write_bytes(good)
    unpack = cli.bundle.unpack
    monkeypatch.setattr(cli.bundle, "unpack", lambda *args: archive.write_bytes(evil) and unpack(*args))
    assert samseg(monkeypatch, "predict", archive, "--input", tmp_path, "--output", tmp_path / "out") == 1
    assert "calls open" in capsys.readouterr().err and not trace.exists()


def test_names_of_folders_are_not_evaluated(bundle, tmp_path, monkeypatch):
    """MONAI evaluates an override that begins with ``$``, and ``predict`` hands over paths as overrides."""
    as_is(bundle, "@checkpoint", "@dataset_dir")
    monkeypatch.chdir(tmp_path)
    evil = bundle.rename("$open('trace','w')")
    monkeypatch.setattr(sys, "argv", ["samseg", "predict", str(evil), "--input", str(evil), "--output", "out"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code and not (tmp_path / "trace").exists()


@pytest.mark.parametrize("content", ["[]", '{"prompt": []}', '"text"'])
def test_predict_names_an_inference_config_that_is_none(content, bundle, tmp_path, monkeypatch, capsys):
    (bundle / "configs" / "inference.json").write_text(content)
    assert samseg(monkeypatch, "predict", bundle, "--input", tmp_path, "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith("BundleError")


def test_links_of_a_folder_are_not_followed(bundle, tmp_path):
    (tmp_path / "outside.json").write_text('{"x": "$exec(1)"}')
    (bundle / "configs" / "linked.json").symlink_to(tmp_path / "outside.json")
    (bundle / "more").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(bundle / "docs" / "pipe.md")  # opening it would wait for ever
    findings = lint_bundle(bundle)
    assert [(f.file, f.rule) for f in findings] == [
        ("configs/linked.json", "link"), ("docs/pipe.md", "link"), ("more", "link"),
    ]  # fmt: skip


def test_damage_anywhere_is_a_finding_or_a_clear_error(bundle):
    """Whatever the bytes are: no other exception, and nothing that goes on for ever."""
    (bundle / "configs" / "inference.json").write_text("{}")  # long, and judged anew each time
    archive = pack(bundle)
    good = {path: path.read_bytes() for path in (archive, bundle / "models" / "model.pt", bundle / "configs/demo.json",
                                                 bundle / "models" / "adapter.safetensors")}  # fmt: skip
    rng = random.Random(0)
    seen = 0
    for path, content in good.items():
        for _ in range(25):
            damaged = bytearray(content)
            for _ in range(rng.choice((1, 3, 30))):
                place = rng.randrange(max(0, len(damaged) - 600) if rng.random() < 0.5 else 0, len(damaged))
                damaged[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            path.write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(1, len(damaged))))])
            try:
                seen += bool(lint_bundle(archive if path == archive else bundle))
            except BundleError:
                seen += 1
        path.write_bytes(content)
    assert lint_bundle(bundle) == lint_bundle(archive) == []
    assert seen > 50  # a changed number in a tensor or a config is a valid one, too


def test_missing_bundle_is_named(tmp_path):
    with pytest.raises(BundleError, match="there is no bundle"):
        lint_bundle(tmp_path / "nowhere")
