"""Hostile files for test_check.py and test_door.py: a clean bundle with one change. ZIPs: test_archive.py."""

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from tests.helpers.hostile import CONFIGS, Case, extend, replace, with_file

NAME = "meningioma_segmentation_lora"


def safetensors(table: str) -> bytes:
    return struct.pack("<Q", len(table)) + table.encode()


FILES = [
    with_file(f"file: {name}", file, content)
    for name, (file, content) in {
        "a Python file": ("scripts/__init__.py", ""),
        "a Python file among results": ("eval/run.py", ""),
        "bytecode": ("torch.pyc", b"\xa7\r\r\n"),
        "a notebook": ("docs/demo.ipynb", "{}"),
        "a shell file": ("docs/install.sh", "echo"),
        "a library": ("monai.cpython-311-x86_64-linux-gnu.so", b"\x7fELF"),
        "a YAML config": ("configs/inference.yaml", "a: 1"),
        "a second logging.conf": ("docs/logging.conf", ""),
        "another list of large files": ("large_files.yaml", "large_files: []"),
        "an unknown kind": ("models/model.bin", b"\0"),
        "a hidden file": (".bashrc", "ls"),
        "a script that is called a text": ("docs/notes.txt", "#!/bin/sh\nid\n"),
        "a program that is called a table": ("metrics/x.csv", b"\x7fELF\x02"),
        "a pickle that is called a text": ("docs/notes.md", pickle.dumps({})),
        "a ZIP that is called a licence": ("LICENSE", b"PK\x03\x04"),
        "a pickle that is called an image": ("docs/x.png", pickle.dumps({})),
        "bytes that are called a text": ("docs/notes.txt", b"a\0b"),
        "weights that are no safetensors": ("models/adapter.safetensors", pickle.dumps({})),
        "safetensors that are cut": ("models/adapter.safetensors", struct.pack("<Q", 2) + b"{}" + b"\0"),
        "safetensors that end at a text": (
            "models/adapter.safetensors",
            safetensors('{"a": {"data_offsets": [0, "x"]}}'),
        ),
        "safetensors that end nowhere": (
            "models/adapter.safetensors",
            safetensors('{"a": {"data_offsets": [0, 1e999]}}'),
        ),
        "entry points of a package": ("evil-1.0.dist-info/entry_points.txt", "[torch.backends]\nx = pdb:set_trace\n"),
        "a folder that is imported": ("mlflow/readme.md", ""),
        "a starter among results": ("eval/results.desktop", "[Desktop Entry]"),
        "a name of the bundle that is a path": ("name.txt", "../x"),
        "a name with a line break": ("docs/a\nb.txt", ""),
        "a name that ends with a dot": ("docs/evil.txt.", ""),
        "a name that ends with a space": ("eval/evil.py ", ""),
        "an archive": ("models/more.zip", b"PK\x03\x04"),
        "a TorchScript file by name": ("models/model.ts", b"PK\x03\x04"),
        "a run's record of hostile JSON": ("eval/bundle/configs/inference.json", '{"run": ["$exec(\'1\')"]}'),
        "code in a folder that is called a record": ("eval/x/bundle/evil.py", ""),
        "a pickle in capitals among results": ("eval/x.PT", pickle.dumps({})),
        "a pickle that is called a cache": ("eval/x.bank", pickle.dumps({})),
        "a page among results": ("eval/report.html", "<script>alert(1)</script>"),
        "a lock that holds something": ("eval/x.lock", "x"),
        "a file that Windows acts upon": ("desktop.ini", "[.ShellClassInfo]\nIconResource=\\\\evil\\x"),
        "code in a folder of macOS": ("__MACOSX/evil.py", ""),
        "code in a folder that looks left behind": ("docs/._x/evil.py", ""),
    }.items()
]


class _Call:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def torch_file(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def rewritten(change: Callable[[str, bytes], tuple[str, bytes]], *more: tuple[str, bytes], method: int = 0) -> bytes:
    """A torch file whose entries went through ``change``, and ``more`` entries."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(torch_file({"a": torch.ones(2)}))) as old,
        zipfile.ZipFile(stream, "w", method) as new,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # an entry given twice is meant
        for entry in old.namelist():
            new.writestr(*change(entry, old.read(entry)))
        for name, content in more:
            new.writestr(name, content)
    return stream.getvalue()


def same(name: str, content: bytes) -> tuple[str, bytes]:
    return name, content


def evil_pickle(protocol: int = 2) -> bytes:
    return pickle.dumps(_Call(os.mkdir, "x"), protocol=protocol)


def scripted() -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would have us use torch.export
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), stream)
    return stream.getvalue()


PICKLES = [
    with_file(f"pickle: {name}", file, content)
    for name, (file, content) in {
        "a call": ("models/model.pt", torch_file({"a": torch.ones(1), "b": _Call(os.system, "id")})),
        "a call in protocol 4": ("models/model.pt", rewritten(
            lambda name, content: (name, evil_pickle(4) if name.endswith(".pkl") else content))),
        "a class": ("models/model.pt", torch_file(torch.nn.Linear(2, 2))),
        "a second pickle behind the first": ("models/model.pt", rewritten(
            lambda name, content: (name, content + evil_pickle() if name.endswith(".pkl") else content))),
        "a second folder": ("models/model.pt", rewritten(same, ("other/data.pkl", evil_pickle()))),
        "an entry given twice": ("models/model.pt", rewritten(same, ("archive/data.pkl", pickle.dumps({}, 2)))),
        "an entry more": ("models/model.pt", rewritten(same, ("archive/extra", b""))),
        "compressed": ("models/model.pt", rewritten(same, method=zipfile.ZIP_DEFLATED)),
        "a pickle before the ZIP": ("models/model.pt", evil_pickle() + torch_file({})),
        "bytes behind the ZIP": ("models/model.pt", torch_file({}) + b"\0" * 9),
        "a plain pickle": ("models/model.pt", evil_pickle()),
        "the layout before torch 1.6": ("models/old.pth", pickle.dumps(0x1950A86A20F9469CFC6C, 2) + evil_pickle()),
        "cut": ("models/model.pt", torch_file({"a": torch.ones(99)})[:-30]),
        "no pickle at all": ("models/model.pt", b"hello"),
        "TorchScript": ("models/model.pt", scripted()),
        "another suffix": ("models/last.ckpt", torch_file({"a": _Call(os.system, "id")})),
        "a pickle file": ("models/x.pkl", pickle.dumps({}, 2)),
        "an array file": ("docs/x.npy", b"\x93NUMPY"),
        "among results": ("eval/resume.pt", torch_file({"a": _Call(os.system, "id")})),
    }.items()
]  # fmt: skip

LOGGING, LARGE = "configs/logging.conf", "large_files.yml"
DOCUMENTS = [
    Case(f"logging: {name}", replace(LOGGING, old, new))
    for name, (old, new) in {
        "call in the arguments": ("(sys.stderr,)", "(__import__('os').system('id'),)"),
        "an attribute of os": ("(sys.stderr,)", "(os.environ,)"),
        "interpolation": ("args=(sys.stderr,)", "args=%(level)s"),
        "a handler by expression": ("class=StreamHandler", "class=__import__('os').system"),
        "a handler that writes files": ("class=StreamHandler", "class=FileHandler"),
        "a handler that sends": ("class=StreamHandler", "class=handlers.HTTPHandler"),
        "a handler behind a carriage return": ("level=INFO\nformatter", "level=INFO\rclass=FileHandler\nformatter"),
        "keyword arguments": ("args=(sys.stderr,)", "args=(sys.stderr,)\nkwargs={'a': exec('1')}"),
        "a formatter from elsewhere": ("datefmt=%H:%M:%S", "class=os.system"),
        "format with braces": ("datefmt=%H:%M:%S", "style={"),
        "arguments for all sections": ("[loggers]", "[DEFAULT]\nargs=(exec('1'),)\n[loggers]"),
        "no INI file": ("[loggers]", "loggers"),
    }.items()
] + [
    Case(f"download: {name}", replace(LARGE, old, new))
    for name, (old, new) in {
        "elsewhere": ("dl.fbaipublicfiles.com", "example.org"),
        "elsewhere behind a user": ("dl.fbaipublicfiles.com", "dl.fbaipublicfiles.com@example.org"),
        "elsewhere by suffix": ("dl.fbaipublicfiles.com", "dl.fbaipublicfiles.com.example.org"),
        "without encryption": ("https://", "http://"),
        "no hash": ('    hash_val: "', '    # hash_val: "'),
        "weak hash": ("sha256", "md5"),
        "to another folder": ("models/sam", "../sam"),
        "to the configs": ("models/sam", "configs/sam"),
        "YAML that is not understood": ("large_files:", "large_files: !!python/object/apply:os.system [id]"),
    }.items()
]

BUNDLES = CONFIGS + FILES + PICKLES + DOCUMENTS


SUMS = [
    Case("sums: changed", lambda root: extend(root, "LICENSE", " ")),
    Case("sums: missing", lambda root: (root / "LICENSE").unlink()),
    Case("sums: added", lambda root: (root / "docs" / "more.md").write_text("more")),
    Case("sums: no line of it", lambda root: extend(root, "SHA256SUMS", "hello\n")),
    Case("sums: out of the bundle", lambda root: extend(root, "SHA256SUMS", f"{'0' * 64}  ../../etc/passwd\n")),
]
