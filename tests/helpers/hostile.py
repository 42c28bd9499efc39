"""Hostile configs for test_check.py and test_door.py: each is a clean bundle with one change."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One hostile bundle.

    Args:
        name: what is hostile about it.
        change: makes the clean bundle (a folder, or a ZIP for ``ARCHIVES``) hostile.
        value: of a new key in a config, where that is all there is to the case.
    """

    name: str
    change: Callable[[Path], Any]
    value: Any = None


def with_value(name: str, value: Any) -> Case:
    return Case(name, lambda root: add_keys(root, {"evil": value}), value)


def with_keys(name: str, keys: dict[str, Any], file: str = "configs/inference.json") -> Case:
    return Case(name, lambda root: add_keys(root, keys, file))


def with_file(name: str, file: str, content: str | bytes) -> Case:
    def change(root: Path) -> None:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content.encode() if isinstance(content, str) else content)

    return Case(name, change)


def add_keys(root: Path, keys: dict[str, Any], file: str = "configs/inference.json") -> None:
    path = root / file
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **keys}))


def extend(root: Path, file: str, text: str) -> None:
    path = root / file
    path.write_text(path.read_text(encoding="utf-8") + text)


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / file).read_text(encoding="utf-8")
        assert old in text
        (root / file).write_text(text.replace(old, new))

    return change


TARGETS = [
    with_value(f"target: {name}", {"_target_": target})
    for name, target in {
        "a foreign package": "subprocess.Popen",
        "a builtin": "eval",
        "a builtin module": "builtins.exec",
        "functools.partial": "functools.partial",
        "operator.methodcaller": "operator.methodcaller",
        "a module that torch imports": "torch.os.system",
        "pickle through torch": "torch.serialization.pickle.loads",
        "torch.load": "torch.load",
        "torch.hub": "torch.hub.load",
        "TorchScript": "torch.jit.load",
        "a shared library": "torch.ops.load_library",
        "a C++ extension": "torch.utils.cpp_extension.load_inline",
        "torch.package": "torch.package.PackageImporter",
        "spawning processes": "torch.multiprocessing.spawn",
        "unpickling in ignite": "ignite.handlers.ModelCheckpoint",
        "a logger to the network": "ignite.handlers.wandb_logger.WandBLogger",
        "importing by name": "monai.utils.module.import_module",
        "optional_import": "monai.utils.optional_import",
        "a bundle in a bundle": "monai.bundle.run",
        "a config in a config": "monai.bundle.ConfigParser",
        "a workflow by its short name": "ConfigWorkflow",
        "a function by its short name": "download_and_extract",
        "download in MONAI": "monai.apps.utils.download_url",
        "a data set that downloads": "DecathlonDataset",
        "a cache of pickles": "PersistentDataset",
        "a cache of pickles, whole name": "monai.data.LMDBDataset",
        "a loader of checkpoints": "monai.handlers.CheckpointLoader",
        "a loss that downloads": "PerceptualLoss",
        "a network that downloads": "monai.networks.nets.EfficientNetBN",
        "transforms by name": "TorchVisiond",
        "a merger by name": "PatchInferer",
        "a reader of pickles": "monai.data.NumpyReader",
        "a class of the standard library in our package": "samseg_monai.handlers.records.Path",
        "threads through our package": "samseg_monai.data.slices.ThreadPoolExecutor",
        "a module through our package": "samseg_monai.checkpoints.subprocess.run",
        "our own function": "samseg_monai.bundles.pack_bundle",
        "our command line": "samseg_monai.cli.main",
        "a private class of ours": "samseg_monai.handlers.validation._Worst",
        "an allowed name in another place": "monai.utils.module.LoadImaged",
        "a module below an allowed one": "monai.transforms.utils.np.load",
        "empty parts": "monai..bundle.run",
        "a space": "LoadImaged ",
        "an expression": "$'os.' + 'system'",
        "an allowed name as an expression": "$'LoadImaged'",
        "a reference to a name": "@scan_mode",
        "a list": ["os.system"],
        "nothing": None,
    }.items()
    if target not in ("$'os.' + 'system'",)
] + [
    with_value("target: in a list in a dictionary", {"a": [{"b": {"_target_": "os.system"}}]}),
    with_value("target: switched off", {"_target_": "os.system", "_disabled_": True}),
    with_value("target: put together", {"_target_": "$'os.' + 'system'", "command": "id"}),
    with_keys("target: as an override", {"network_def::_target_": "os.system"}),
    with_keys("target: with the old separator", {"network_def#_target_": "os.system"}),
    with_keys("target: merged", {"+network_def": {"_target_": "os.system"}}),
    with_keys("target: merged override", {"+postprocessing::transforms::0::_target_": "os.system"}),
    with_keys("target: in an overlay", {"train::optimizer::_target_": "os.system"}, "configs/demo.json"),
    with_keys("target: in the metadata", {"extra": {"_target_": "os.system"}}, "configs/metadata.json"),
    with_keys("target: in the card", {"extra": {"_target_": "os.system"}}, "models/card.json"),
    with_file("target: JSON in capitals", "docs/EVIL.JSON", '{"_target_": "os.system"}'),
]

ARGUMENTS = [
    with_value(
        "argument: reader by name", {"_target_": "LoadImaged", "keys": "image", "reader": "os.system"}
    ),
    with_value(
        "argument: reader of pickles", {"_target_": "LoadImageD", "keys": "i", "reader": "NumpyReader"}
    ),
    with_value("argument: one of the readers", {"_target_": "LoadImage", "reader": ["ITKReader", "a.b"]}),
    with_value("argument: reader by reference", {"_target_": "LoadImage", "reader": "@scan_mode"}),
    with_value("argument: writer by name", {"_target_": "SaveImaged", "keys": "pred", "writer": "pdb.run"}),
    with_value("argument: pickles in arrays", {"_target_": "LoadImage", "allow_pickle": True}),
    with_value("argument: pickles", {"_target_": "Identity", "weights_only": False}),
    with_value("argument: debugger", {"_target_": "Identityd", "keys": "image", "_mode_": "debug"}),
    with_value("argument: mode by expression", {"_target_": "Identity", "_mode_": "$'debug'"}),
    with_value("argument: breakpoint", {"_target_": "Identityd", "keys": "image", "_debug_": True}),
    with_value("argument: download", {"_target_": "monai.networks.nets.DenseNet", "pretrained": True}),
    with_value("argument: weights", {"_target_": "torchvision.models.resnet18", "weights": "DEFAULT"}),
    with_value("argument: weights by truth", {"_target_": "torchvision.models.swin_t", "weights": True}),
    with_keys("argument: weights as an override", {
        "evil": {"_target_": "torchvision.models.resnet18"}, "evil::weights": [1]}),
    with_value("argument: class that imports what a text names", {
        "_target_": "Dataset", "data": ["os.system"],
        "transform": {"_target_": "LoadImage", "_mode_": "callable", "command": "id"}}),
    with_value("argument: file of a shell", {
        "_target_": "samseg_monai.handlers.RunCard", "output_dir": "a", "settings": {}, "filename": ".bashrc"}),
    with_value("argument: file by reference", {
        "_target_": "CheckpointSaver", "save_dir": "a", "save_dict": {}, "final_filename": "@scan_mode"}),
    with_value("argument: beside the results", {
        "_target_": "SaveImaged", "keys": "pred", "data_root_dir": "a/b"}),
    with_file("argument: another logging.conf", "configs/args.json", '{"logging_file": "docs/a.txt"}'),
    with_value("argument: compiler", {"_target_": "SupervisedTrainer", "compile_kwargs": {"backend": "x"}}),
    with_keys("argument: as an override", {"preprocessing::transforms::0::reader": "os.system"}),
]  # fmt: skip

EXPRESSIONS = [
    with_value(f"expression: {name}", f"${source}")
    for name, source in {
        "call of a builtin": "exec('1')",
        "open": "open('x', 'w')",
        "import in an expression": "__import__('os')",
        "import by importlib": "importlib.import_module('os')",
        "getattr": "getattr(@network, 'a')",
        "setattr": "setattr(torch, 'a', 1)",
        "double underscores": "().__class__",
        "double underscores in a text": "@network['__class__']",
        "double underscores full width": "＿＿local_refs[__import__('os').system('id')]",
        "the references themselves": "__local_refs.clear()",
        "the references by hand": "__local_refs['network']",
        "the references in letters that Python takes for them": "__loc\uff41l_refs['imports::0'].load('x.nii')",
        "a module as a value": "torch",
        "a module in a list": "[monai.bundle]",
        "a module behind an allowed one": "torch.os.system('id')",
        "module of a module": "bundles.pack.shutil.rmtree('x')",
        "our own dangerous function": "bundles.pack_bundle('a', 'b')",
        "torch.load": "torch.load('model.pt')",
        "pickles in numpy": "np.load('a.npz', allow_pickle=True)",
        "a function as a value": "np.load",
        "method outside the list": "@network.register_forward_hook(@device)",
        "method of a text": "'{0}'.format(@network)",
        "call of a reference": "@network(1)",
        "call of an item": "@network[0]('id')",
        "call of a lambda": "(lambda: 1)()",
        "attribute outside the list": "@network.forward",
        "lambda that hides a builtin": "lambda len: len('id')",
        "comprehension that hides a module": "[torch.device for torch in [@network]]",
        "comprehension that assigns to an attribute": "[1 for @network.x in [2]]",
        "assignment": "(x := 1)",
        "f-string": "f'{@network}'",
        "star": "max(*@scans)",
        "double star in a call": "datalists.load_datalist(**@prompt)",
        "double star in a dictionary": "{**@prompt}",
        "bytes": "b'x'",
        "several statements": "1; 2",
        "no Python": "1 +",
        "nothing": "",
        "power": "9 ** 9 ** 9",
        "too long": "1 + " * 600 + "1",
        "too deep": "-" * 1500 + "1",
        "a text that ends where a reference begins": "'@or + exec(1) + @or'",
        "a module that nobody imported": "os.system('id')",
        "await": "await @network",
    }.items()
] + [
    with_value("expression: within an allowed call", "$len(exec('1'))"),
    with_value("expression: in a lambda", {"_target_": "Lambdad", "keys": "a", "func": "$lambda x: eval(x)"}),
    with_value("expression: as a description", {"_target_": "Identityd", "keys": "a", "_desc_": "$exec('1')"}),
    with_value("expression: as a requirement", {"_target_": "Identity", "_requires_": ["$exec('1')"]}),
    with_keys("expression: in the metadata", {"extra": "$exec('1')"}, "configs/metadata.json"),
    with_keys("expression: as the device", {"device": "$torch.os.system('id')"}),
]

IMPORTS = [
    with_value(f"import: {name}", [f"${source}"])
    for name, source in {
        "a module of the standard library": "import os",
        "within a module": "import torch.serialization as s",
        "from a module": "from samseg_monai.bundles import guard as g",
        "behind a line break": "\nimport os",
        "behind another name": "import os as bundles",
        "two at once": "import torch, os",
        "with more behind it": "import numpy as n\nimport os",
        "MONAI's bundles": "import monai.bundle as mb",
        "of a builtin's name": "import numpy as len",
        "of a module's name": "import numpy as torch",
        "an allowed one elsewhere": "import torch.distributed as dist",
    }.items()
] + [
    with_keys(
        "import: second meaning of a name",
        {"imports": ["$import numpy as n", "$import torch as n"]},
        "configs/demo.json",
    ),
    with_file("import: nothing else in a file", "configs/x.json", '"$import numpy as n"'),
    with_keys("import: in the metadata", {"extra": ["$import os"]}, "configs/metadata.json"),
]

REFERENCES = [
    with_value("reference: an imported module", "$@imports::1.type"),
    with_value("reference: an imported module whole", "@imports::0"),
    with_value("reference: with the old separator", "@imports#0"),
    with_value("reference: all imports", "$len(@imports)"),
    with_value("reference: imports within", "@_meta_::imports::0"),
    with_value("reference: the whole config", "$@['imports']"),
    with_value("reference: relative", {"a,@b": {"y": 1, "x": ["@::y"]}}),
    with_value("macro: another file", "%other.json::key"),
    with_value("macro: this file", {"reader": None, "x": "%scan_mode"}),
    with_value("macro: as a target", {"_target_": 3}),
]

PATHS = [
    with_value(f"path: {name}", text)
    for name, text in {
        "absolute": "/etc/passwd",
        "home": "~/.ssh/id_rsa",
        "parent": "../other/x.json",
        "parent within": "a/../../x",
        "parent at the end": "models/..",
        "drive": "C:\\Users\\x",
        "drive with slashes": "D:/x",
        "share": "\\\\server\\share",
        "URL": "https://example.org/model.pt",
        "bucket": "s3://bucket/model.pt",
        "file URL": "file:///etc/passwd",
        "in an expression": "$@bundle_root + '/../x'",
        "in a call": "$checkpoints.load_trained(@network, checkpoint='/x.pt')",
        "in a condition": "$'/etc' if @prompted else 'a'",
        "in an alternative": "$@missing or '/etc'",
        "from pieces": "$'.' + './x'",
        "behind an empty text": "$'' + '/etc/passwd'",
        "behind what gives no text": "$str() + '/etc/passwd'",
        "by multiplication": "$'.' * 2",
        "by a percent sign": "$'%s' % @scan_mode",
        "by letters of a text": "$[c for c in 'a.'][1]",
        "by sorting": "$sorted('./')",
        "by the largest": "$max(@scans)",
        "by an item of a list": "$['a', '.'][1] + './x'",
        "by an item of a dictionary": "${'a': '.'}['a'] + './x'",
        "URL in a lambda": "$lambda x: 'http://example.org'",
        "by a part of a referred text": "$@scan_mode[0] + './x'",
        "cut from a referred text": "$@dataset_dir[4:]",
        "cut from an item": "$('a/etc', '')[0][1:]",
        "stretched": "$bundles.settings()['scan_mode'] * 2",
        "behind an argument by name": "$dict(a='.')['a'] + './x'",
        "behind an array": "$np.array(['.'])[0] + './x'",
        "behind the settings": "$bundles.settings()['scan_mode'] + './x'",
        "cut from the settings": "$bundles.settings()['scan_mode'][1:]",
        "behind the names of labels": "$datalists.labels_of('x.json')['1'] + './x'",
        "behind a default of a lambda": "$lambda d='.': d + './x'",
        "behind an item of a condition": "$(['.'] if @prompted else ['a'])[0] + './x'",
        "behind an item of a sum": "$(['.'] + [])[0] + './x'",
        "behind a set": "$max({'.'}) + './x'",
        "by the keys of a dictionary": "$[key + './x' for key in {'.': 1}]",
    }.items()
] + [
    with_keys("path: behind an empty key", {"nought": "", "evil": "$@nought + '/etc/passwd'"}),
    with_keys("path: behind an item", {"many": ["a", "."], "evil": "$@many[1] + './x'"}),
    with_keys("path: behind keys of keys", {"a0": "$@a1", "a1": "@a2", "a2": ".", "evil": "$@a0 + @a0"}),
    with_keys("path: behind an item that is merged", {
        "many": ["a"], "+many": ["."], "evil": "$@many::1 + './x'"}),
    with_keys("path: behind items of items", {"many": [["."]], "evil": "$[x[0] + './x' for x in @many]"}),
    with_keys("path: in a key", {"many": {"/etc/passwd": 1}, "evil": "$list(@many)[0]"}),
    with_keys("path: a thousandfold text", {
        "t0": "x" * 64, **{f"t{i}": "$" + " + ".join([f"@t{i - 1}"] * 60) for i in range(1, 5)}}),
    with_keys("path: schema of the metadata", {"schema": "https://a.org/s.json"}, "configs/metadata.json"),
]  # fmt: skip

KEYS = [
    with_value("key: double underscores", {"_target_": "Identity", "__class__": 1}),
    Case("key: given twice", replace("configs/demo.json", "{", '{"epochs": 1,')),
    Case(
        "key: hidden target",
        lambda root: (root / "configs" / "x.json").write_text('{"_target_": "os.system"}'),
    ),
    with_value("format: double underscores", "{0.__class__.__init__.__globals__}"),
    with_file("config: broken", "configs/broken.json", '{"a": '),
    with_file("config: another encoding", "configs/latin.json", b'{"a": "\xe9"}'),
    with_file("config: byte order mark", "configs/bom.json", b'\xef\xbb\xbf{"a": 1}'),
    with_file("config: nested too deep", "configs/deep.json", "[" * 100_000 + "]" * 100_000),
    with_file("config: too long", "configs/long.json", "[" + "1," * (5 << 20) + "1]"),
]

CONFIGS = TARGETS + ARGUMENTS + EXPRESSIONS + IMPORTS + REFERENCES + PATHS + KEYS
