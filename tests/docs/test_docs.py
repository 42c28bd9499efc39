"""Every command that README and the bundles' pages show is run, at toy size, in a folder laid out as they assume."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import monai.bundle
import pytest

import samseg_monai as sm
from samseg_monai import bundles, cli
from tests.conftest import TINY
from tests.helpers.forked import forked

ROOT = Path(__file__).parents[2]
TOPICS = [ROOT / "docs" / name for name in ("learning_options.md", "tracking.md")]
ALIKE = ("full", "medsa", "cnn_only", "sam_only")  # bundles whose pages show the commands of lora and ladder_paper
OF_BUNDLES = [page for page in sorted(ROOT.glob("bundles/*/docs/README.md")) if not page.parts[-3].endswith(ALIKE)]
PAGES = [ROOT / "README.md", *TOPICS, *OF_BUNDLES]
NAMES = ("index", "your_own_data", "from_the_clinic", "strategies", "bundles", "evaluation", "speed")
GUIDES = [ROOT / "docs" / f"{name}.md" for name in NAMES]
# not run here: the file that does, or why none can
ELSEWHERE = {
    "samseg bench": "training/test_cost.py",
    "samseg compare": "comparison/test_comparison.py",
    "#SBATCH": "a line for a cluster's scheduler",
    "samseg train-cost": "training/test_cost.py",
    "samseg demo": "demo/test_demo_abdomen.py",
    "samseg export": "bundles/test_export.py",
    "samseg boxes": "data/test_boxes.py",
    "samseg task schema": "bundles/test_task.py",
    "samseg info": "package/test_face.py",
    "samseg --version": "package/test_face.py",
    "samseg --help": "package/test_face.py",
    "samseg --install-completion": "package/test_face.py",
    "make ": "docs/test_docs.py",
    "mlflow ui": "a server that does not end; test_tracking.py reads what it shows",
    "tensorboard ": "a server that does not end; test_tracking.py reads what it shows",
    "pip install": "needs an index of packages; the Makefile does it",
    "unzip ": "bundles/test_travel.py unpacks one",
    "monailabel ": "a server that does not end; bundles/test_label.py asks the part of it that runs a bundle",
    "python -m monai.bundle verify_metadata": "bundles/test_zoo.py",
    "python -m monai.bundle verify_net_in_out": "bundles/test_zoo.py",
}
LAUNCHER = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"]
SMALL = {
    "train": {"epochs": 1, "batch_size": 2},
    "lora": {"strategy::rank": 2},
    "ladder": {"strategy::side_weights": "random"},
    "ladder train": {"schedule": {"warmup": 0, "decay": "poly", "power": 0.9}, "batch_size": 8},
    "bank": {"embeddings::variants": 2},  # by default every slice is encoded eight times
}


def fenced(page: Path) -> list[tuple[str, str]]:
    """Kind and text of each block between lines of three backticks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(page: Path) -> list[str]:
    blocks = [text for kind, text in fenced(page) if kind in ("", "bash")]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


def python_blocks(page: Path) -> list[str]:
    return [text for kind, text in fenced(page) if kind == "python"]


@pytest.fixture(scope="module")
def folder(phantoms, abdomen, hippocampi, pictures, tmp_path_factory) -> Path:
    """A working folder with data, unlabelled cases, boxes and bundles where the pages expect them."""
    where, drawn = tmp_path_factory.mktemp("docs"), pictures
    shutil.copytree(phantoms, where / "data" / "brats-men", ignore=shutil.ignore_patterns("unlabelled"))
    shutil.copytree(phantoms / "unlabelled", where / "CASES")
    shutil.copytree(abdomen, where / "data" / "synapse", ignore=shutil.ignore_patterns("unlabelled"))
    shutil.copytree(abdomen / "unlabelled", where / "CASES_CT")
    for part in ("images", "labels"):
        shutil.copytree(hippocampi / part, where / "data" / "hippocampus" / part)
    shutil.copytree(ROOT / "bundles", where / "bundles")
    for bundle in (ROOT / "bundles").iterdir():
        shutil.copytree(bundle, where / bundle.name)
    boxes = {"BraTS-MEN-00008-000": [{"slices": [4, 8], "box": [8, 8, 24, 24]}]}
    (where / "boxes.json").write_text(json.dumps(boxes))
    pictures = where / "data" / "brain_tumour_t1c"
    for part in ("images", "labels"):  # names as of the real set: the first two digits are the block
        (pictures / part).mkdir(parents=True)
        for number, path in enumerate(sorted((drawn / part).iterdir())):
            shutil.copy(path, pictures / part / f"meningioma_{number:02d}10.png")
    shutil.copytree(drawn / "unlabelled", where / "NEW_IMAGES")
    (where / "boxes_2d.json").write_text(json.dumps({"new": [[8.5, 9.25, 22.0, 30.5], [33, 12, 44, 26]]}))
    return where


def value(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def small(words: list[str]) -> dict:
    """Turn the words of a ``monai.bundle run`` into keyword arguments, with toy sizes on top."""
    given = {k.removeprefix("--"): value(v) for k, v in zip(words[::2], words[1::2], strict=True)}
    files = " ".join(given["config_file"]) if isinstance(given["config_file"], list) else given["config_file"]
    ladder, train = "_ladder" in files, "train.json" in files
    parts = {"train": train, "lora": "_lora/" in files, "ladder": ladder, "ladder train": ladder and train}
    parts["bank"] = parts["ladder train"] and ("demo.json" in files or "embeddings::cache_dir" in given)
    extra = {key: value for name, wanted in parts.items() if wanted for key, value in SMALL[name].items()}
    if train and re.search("abdomen_segmentation_(samed|h_sam)/", files):
        extra["schedule::warmup"] = 0  # of 250 iterations
    if "abdomen_" in files and given.get("dataset_dir") == "CASES":
        extra["dataset_dir"] = "CASES_CT"
    return {**given, **TINY, **extra}


def run_line(line: str, monkeypatch, *, launch: bool = False) -> None:
    """Run one shown command at toy size; with ``launch`` two processes are started by torchrun itself."""
    words = shlex.split(line)
    if words[:4] == ["python", "-m", "monai.bundle", "run"]:
        monai.bundle.run(**small(words[4:]))
    elif words[0] == "torchrun":
        assert words[: len(LAUNCHER)] == LAUNCHER
        run_two_processes(small(words[len(LAUNCHER) :]), launch)
    else:
        assert words[0] == "samseg"
        words = [{"44": "8", "15": "6"}.get(w, w) for w in words]
        shapes = {"brats": "32,36,12", "btcv": "40,32,16"}
        words += ["--shape", shapes[words[2]]] if words[1] == "phantom" else []
        words += ["--fractions", "0.5,0.25,0.25"] if words[1:3] == ["prepare", "brats-men"] else []
        words += ["--allow-missing"] if words[1:3] == ["prepare", "synapse"] else []
        if "--validation" in words:  # of four patients: two processes need two cases on either side
            words[words.index("--validation") + 1] = "2"
        evaluates = words[1] == "report" and not words[2].endswith("/evaluation")
        words += ["--sam-checkpoint", "random"] if words[1:3] == ["bundle", "pack"] or evaluates else []
        if words[1] == "find-lr":
            extra = {**TINY, **SMALL["lora"], "batch_size": 2}
            words += ["--steps", "10", *(f"--{key}={val}" for key, val in extra.items())]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, line


def run_two_processes(overrides: dict, launch: bool) -> None:
    """Run a bundle on two ranks: by the launcher, which imports everything twice more, or by forks."""
    if launch:
        texts = {key: val if isinstance(val, str) else repr(val) for key, val in overrides.items()}
        tail = [part for key, text in texts.items() for part in (f"--{key}", text)]
        command = [sys.executable, "-m", "torch.distributed.run", *LAUNCHER[1:], *tail]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env=env, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    files, log = overrides.pop("config_file"), Path("ranks").resolve()
    codes = forked().run(files, overrides, log, ranks=2, cwd=Path.cwd())
    told = [Path(f"{log}.{rank}").read_text(encoding="utf-8", errors="replace") for rank in (0, 1)]
    assert codes == [0, 0], "".join(text[-3000:] for text in told)


def test_pages_show_commands():
    assert len(PAGES) == 9 and all(len(commands(page)) > 2 for page in PAGES)
    assert any(line.startswith("samseg bundle check ") for line in commands(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_shown_command_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for made in ("runs", "demo"):
        shutil.rmtree(folder / made, ignore_errors=True)
    shown = [line for line in commands(page) if not line.startswith(tuple(ELSEWHERE))]
    assert shown
    trained = set()
    for line in shown:
        if "train.json" in line:  # a page may train twice into one folder; a finished training is not trained again
            target = re.search(r"--output_dir (\S+)", line)[1]
            if target in trained:
                shutil.rmtree(target)
            trained.add(target)
        # the launcher itself once: it imports everything three times
        run_line(line, monkeypatch, launch="segmentation_lora" in str(page) and "train.json" in line)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_guides_show_what_is_run(page, tmp_path, monkeypatch):
    """A command of a guide stands on a page above, word for word; its Python is run here, block after block."""
    run = {line for page in PAGES for line in commands(page)}
    assert [line for line in commands(page) if line not in run and not line.startswith(tuple(ELSEWHERE))] == []
    monkeypatch.chdir(tmp_path)
    for block in python_blocks(page):
        exec(compile(block, page.name, "exec"), {"__name__": "__main__"})


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [block] = python_blocks(ROOT / "README.md")
    exec(compile(block, "README.md", "exec"), {})
    assert block in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")  # one example, in two places


def test_strategies_that_python_does_not_make_are_marked():
    text = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    listed = {name: "bundles only" in row for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert listed.keys() == set(bundles.recipe_names("strategies"))
    assert {name for name, marked in listed.items() if not marked} == set(sm.list_strategies())


def test_commands_named_in_a_sentence_are_run_somewhere():
    """README explains some in its prose: each is in a block of a page above, or in a test of its own."""
    prose = re.sub(r"^```.*?^```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S | re.M)
    named = set(re.findall(r"`(samseg [a-z-]+)", prose))
    run = {" ".join(line.split()[:2]) for page in PAGES for line in commands(page)} - set(ELSEWHERE)
    assert {"samseg find-lr", "samseg export", "samseg bundle", "samseg predict"} <= named <= run | set(ELSEWHERE)
    for command, where in ELSEWHERE.items():
        if where.endswith(".py"):
            assert command.split()[-1] in (ROOT / "tests" / where).read_text(encoding="utf-8"), command


def test_makefile_has_the_targets_that_are_shown():
    shown = {word for page in PAGES for line in commands(page) if line.startswith("make ") for word in line.split()[1:]}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert {"demo", "test"} <= shown <= targets


def test_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert len(links) > 3
    assert [link for link in links if not (ROOT / link).exists()] == []
