"""What a prediction does before its first slice: weights are read once and kept where they lie, no network is drawn."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser
from safetensors.torch import load_file

from samseg_monai import files
from samseg_monai.bundles import archive, recipe_names
from samseg_monai.bundles.build import read_recipe
from samseg_monai.bundles.door import open_bundle
from samseg_monai.bundles.pack import _zip, write_sums
from samseg_monai.bundles.running import build_bare
from samseg_monai.checkpoints import load_trained, save_adapter, save_model
from samseg_monai.errors import BundleError, SamsegError
from samseg_monai.settings import RunPatch, RunSettings
from tests.helpers.packed import packed

HEAVY = {"torch", "monai", "numpy", "pandas", "matplotlib", "nibabel", "jinja2"}
OF_SAM = [name for name in recipe_names("strategies") if "network" not in read_recipe("strategies", name)]


def parser_of(root: Path, **changes) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config(str(root / "configs" / "inference.json"))
    for key, value in changes.items():
        parser[key] = value
    return parser


def tensors_of(network) -> dict:
    """Parameters, buffers, also those of no state dict, and tensors that are mere attributes."""
    found = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for prefix, module in network.named_modules():
        found |= {f"{prefix}.{name}": value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}
    return found


def same(one, other) -> None:
    mine, theirs = tensors_of(one), tensors_of(other)
    assert mine.keys() == theirs.keys() and not any(tensor.is_meta for tensor in mine.values())
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype, name
        assert tensor.requires_grad == theirs[name].requires_grad and tensor.is_contiguous(), name
    assert [m.training for m in one.modules()] == [m.training for m in other.modules()]


@pytest.mark.parametrize(
    ("strategy", "task", "variant"),
    [
        *((name, "meningioma", "tiny") for name in OF_SAM),
        ("lora", "meningioma", "tiny_t"),
        ("ladder", "abdomen", "tiny"),
    ],
)
def test_a_network_that_was_not_drawn_becomes_the_one_that_was(strategy, task, variant, tmp_path):
    try:
        root = packed(task, strategy, tmp_path, sam_variant=variant)
        network = parser_of(root).get_parsed_content("network_def")
        network.load_base("random", start=False)
    except SamsegError:
        pytest.skip("not for this task")
    save_model(network, root / "models" / "model.safetensors")
    ways = [{"checkpoint": root / "models" / name} for name in ("model.safetensors", "model.pt")]
    own = {"checkpoint": save_adapter(network, tmp_path / "run")} if network.owned else {}
    for way in (*ways, {**own, "sam_checkpoint": "random"}):
        found = []
        for bare in (False, True):
            parser = parser_of(root)
            torch.manual_seed(5)
            if bare:
                build_bare(parser)
            network = parser.get_parsed_content("network_def")
            assert bare == any(tensor.is_meta for tensor in network.state_dict().values())
            load_trained(network, **way)
            found.append((network, torch.rand(3)))
        same(found[1][0], found[0][0])
        assert found[1][0].drawn is None
        assert ("sam_checkpoint" not in way) or torch.equal(found[0][1], found[1][1])  # what is drawn next, too


@pytest.mark.parametrize("key", ["strategy::_target_", "loaded"])
def test_a_user_s_own_network_is_drawn(key, tmp_path):
    root = packed("meningioma", "lora", tmp_path)
    parser = parser_of(root)
    ours = parser[key]
    parser[key] = "elsewhere.Own"
    build_bare(parser)
    parser[key] = ours
    assert not any(tensor.is_meta for tensor in parser.get_parsed_content("network_def").state_dict().values())


@pytest.fixture(scope="module")
def zipped(tmp_path_factory) -> Path:
    """A ZIP with both files of weights, larger than what is kept of a bundle's files."""
    root = packed("meningioma", "lora", tmp_path_factory.mktemp("zipped"))
    network = parser_of(root).get_parsed_content("network_def")
    for name in ("model.pt", "model.safetensors"):
        save_model(network, root / "models" / name)
    write_sums(root)
    _zip(root, root.with_suffix(".zip"))
    return root.with_suffix(".zip")


def test_weights_in_a_zip_are_read_once_and_used_where_they_lie(zipped, monkeypatch):
    opened: list[str] = []
    plain = archive.Archive.open
    monkeypatch.setattr(archive.Archive, "open", lambda self, name: opened.append(name) or plain(self, name))
    monkeypatch.setattr(archive, "KEPT_BYTES", 1 << 16)
    monkeypatch.setattr(files, "hash_file", lambda path: pytest.fail(f"{path} is hashed once more"))
    with open_bundle(zipped) as bundle:
        assert opened.count("models/model.safetensors") == opened.count("models/model.pt") == 1
        assert bundle.checkpoint is not None and not bundle.checkpoint.stat().st_mode & 0o222
        bundle.check()
        parser = bundle.parser()
        build_bare(parser)
        network = parser.get_parsed_content("network_def")
        load_trained(network, checkpoint=bundle.checkpoint)
        maps = Path("/proc/self/maps")
        assert not maps.exists() or str(bundle.checkpoint) in maps.read_text()
        expected = load_file(bundle.checkpoint)
        assert network.base_sha256 == bundle_sums(zipped)["models/model.safetensors"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in network.state_dict().items())
    with torch.no_grad():
        network(torch.zeros(1, 4, 64, 64), torch.tensor([[8.0, 8, 40, 40]]))  # the folder is gone


def bundle_sums(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as packed_files:
        name = next(name for name in packed_files.namelist() if name.endswith("SHA256SUMS"))
        return {line[66:]: line[:64] for line in packed_files.read(name).decode().splitlines()}


@pytest.mark.parametrize("name", ["models/model.safetensors", "models/model.pt"])
def test_one_changed_bit_of_weights_is_found_though_the_zip_is_whole(name, zipped, tmp_path):
    changed = tmp_path / "changed.zip"
    with zipfile.ZipFile(zipped) as old, zipfile.ZipFile(changed, "w") as new:
        for member in old.infolist():
            content = bytearray(old.read(member))
            if member.filename.endswith(name):
                content[-5] ^= 1
            new.writestr(member.filename, bytes(content))
    with pytest.raises(BundleError, match=f"{name}: changed since it was packed"), open_bundle(changed):
        pass


def test_files_that_someone_may_write_to_are_copied(tmp_path):
    root = packed("meningioma", "lora", tmp_path)
    network = parser_of(root).get_parsed_content("network_def")
    path = save_model(network, root / "models" / "model.safetensors")
    parser = parser_of(root)
    build_bare(parser)
    network = parser.get_parsed_content("network_def")
    load_trained(network, checkpoint=path)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with path.open("r+b") as stream:
        stream.truncate(100)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("words", ["--help", "predict --help", "bundle --help", "--version"])
def test_help_imports_nothing_heavy(words):
    code = (
        "import sys\nfrom samseg_monai.cli import main\n"
        "try: main()\nexcept SystemExit as end: print('=code', end.code, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, encoding="utf-8", check=True
    )
    told = done.stdout.rsplit("=code ", 1)[1].split()
    assert told[0] == "0" and not HEAVY & {name.partition(".")[0] for name in told}


def test_settings_of_a_demo_are_described_as_those_of_a_run():
    for name, field in RunPatch.model_fields.items():
        assert field.description == RunSettings.model_fields[name].description, name
