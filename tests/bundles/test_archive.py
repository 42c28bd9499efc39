"""ZIPs from elsewhere: what unpacks to something else than it shows is refused, what computers leave behind is not."""

import io
import os
import random
import shutil
import stat
import struct
import subprocess
import warnings
import zipfile
from pathlib import Path

import pytest

from samseg_monai.bundles import archive as archives
from samseg_monai.bundles.archive import Archive, Folder, open_files
from samseg_monai.errors import BundleError

NAME = "meningioma_segmentation_lora"
FILES = {"configs/inference.json": b"{}", "configs/settings.json": b"{}", "docs/README.md": b"# hello\n" * 50,
         "LICENSE": b"free", "models/model.safetensors": bytes(range(256)) * 40}  # fmt: skip


def packed(path: Path, more: dict | None = None, *, root: str = f"{NAME}/", **attributes) -> Path:
    """A ZIP of ``FILES`` below ``root``, and ``more`` members, whose entries have ``attributes``."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as content, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a member given twice is meant
        for name, data in FILES.items():
            content.writestr(root + name, data)
        for name, data in (more or {}).items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for attribute, value in attributes.items():
                setattr(info, attribute, value)
            content.writestr(info, data)
    return path


def problems(path: Path) -> list[str]:
    files = open_files(path)
    files.close()
    return files.problems


def edited(path: Path, change) -> Path:
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def with_comment(path: Path) -> Path:
    with zipfile.ZipFile(path, "a") as content:
        content.comment = b"hello"
    return path


def declared(data: bytearray) -> bytearray:
    """Say in the table of contents that a member is smaller than it is."""
    start = data.find(b"PK\x01\x02")
    while data[start + 46 : start + 46 + struct.unpack_from("<H", data, start + 28)[0]] != f"{NAME}/LICENSE".encode():
        start = data.find(b"PK\x01\x02", start + 4)
    struct.pack_into("<I", data, start + 24, 2)
    return data


def local_name(data: bytearray) -> bytearray:
    """Another name before the data than in the table of contents."""
    at = data.find(f"{NAME}/LICENSE".encode())
    data[at + len(NAME) + 1] = ord("l")
    return data


def between(data: bytearray) -> bytearray:
    """Hide bytes between the last member and the table of contents, and let its end point behind them."""
    table = data.find(b"PK\x01\x02")
    data[table:table] = b"hidden!!"
    struct.pack_into("<I", data, len(data) - 6, table + 8)
    return data


def table_comment(data: bytearray) -> bytearray:
    """A comment at the last entry of the table of contents."""
    last = data.rfind(b"PK\x01\x02")
    struct.pack_into("<H", data, last + 32, 4)
    end = data.rfind(b"PK\x05\x06")
    data[end:end] = b"evil"
    struct.pack_into("<I", data, end + 4 + 12, struct.unpack_from("<I", data, end + 4 + 12)[0] + 4)
    return data


def many(path: Path) -> Path:
    return packed(path, {f"{NAME}/docs/{number}.md": b"" for number in range(1000)})


def nested(path: Path) -> Path:
    """A member that shares its data with another one, as in a bomb that is small."""
    data = bytearray(packed(path).read_bytes())
    first, second = (data.find(b"PK\x01\x02"), data.find(b"PK\x01\x02", data.find(b"PK\x01\x02") + 4))
    struct.pack_into("<I", data, second + 42, struct.unpack_from("<I", data, first + 42)[0])
    path.write_bytes(data)
    return path


def end(**values: int):
    """Other values in the record of a ZIP's end."""

    def change(data: bytearray) -> bytearray:
        for name, value in values.items():
            where, form = {"count": (10, "<H"), "size": (12, "<L"), "disk": (4, "<H")}[name]
            struct.pack_into(form, data, len(data) - 22 + where, value)
        return data

    return change


def two_tables(data: bytearray) -> bytearray:
    """The record that zip64 added tells the truth, which Python follows; the one behind it another table."""
    at = len(data) - 22
    count, size, table = struct.unpack_from("<HLL", data, at + 10)
    wide = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, table)
    data[at:at] = wide + struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
    struct.pack_into("<L", data, len(data) - 6, 0)
    return data


def wide_size(data: bytearray) -> bytearray:
    """A size before the data that stands in a zip64 field, which is not there."""
    struct.pack_into("<L", data, 18, 0xFFFFFFFF)
    return data


EXTRA = struct.pack("<HH", 0x7075, 9) + b"\x01" + bytes(4) + b"evil"  # another name in Unicode, which some readers take
LONG = "\u0300" * 16000 + "\u0316" * 16000  # marks that a normal form puts in order, pair by pair
ATTACKS = {
    "absolute path": (lambda p: packed(p, {"/etc/cron.d/x.md": b""}), "points outside"),
    "parent folder": (lambda p: packed(p, {f"{NAME}/docs/../../x.md": b""}), "points outside"),
    "drive": (lambda p: packed(p, {f"C:{NAME}/x.md": b""}), "points outside"),
    "share": (lambda p: packed(p, {"\\\\server\\x.md": b""}), "points outside"),
    "backslash": (lambda p: packed(p, {f"{NAME}/docs\\x.md": b""}), "another path"),
    "given twice": (lambda p: packed(p, {f"{NAME}/LICENSE": b"other"}), "given twice"),
    "given twice in other letters": (lambda p: packed(p, {f"{NAME}/docs/readme.md": b"other"}), "given twice"),
    "given twice in other forms": (
        lambda p: packed(p, {f"{NAME}/docs/e\u0301.md": b"", f"{NAME}/docs/\u00e9.md": b""}), "given twice"),
    "folder given twice in other letters": (
        lambda p: packed(p, {f"{NAME}/Docs/": b"", f"{NAME}/docs/": b""}), "given twice"),
    "file that is a folder": (lambda p: packed(p, {f"{NAME}/docs/README.md/x.md": b""}), "a file, too"),
    "empty part": (lambda p: packed(p, {f"{NAME}/docs//x.md": b""}), "another path"),
    "dot": (lambda p: packed(p, {f"{NAME}/./x.md": b""}), "another path"),
    "dot at the end": (lambda p: packed(p, {f"{NAME}/docs/evil.txt.": b""}), "another path"),
    "space at the end": (lambda p: packed(p, {f"{NAME}/docs/evil.py ": b""}), "another path"),
    "stream": (lambda p: packed(p, {f"{NAME}/docs/x.md:evil.exe": b""}), "another path"),
    "device": (lambda p: packed(p, {f"{NAME}/docs/NUL": b""}), "device"),
    "device with a suffix": (lambda p: packed(p, {f"{NAME}/docs/com1.md": b""}), "device"),
    "device as a folder": (lambda p: packed(p, {f"{NAME}/aux/x.md": b""}), "device"),
    "line break": (lambda p: packed(p, {f"{NAME}/docs/a\nb.md": b""}), "control characters"),
    "escape": (lambda p: packed(p, {f"{NAME}/docs/\x1b[2J.md": b""}), "control characters"),
    "text from right to left": (lambda p: packed(p, {f"{NAME}/docs/\u202edm.exe": b""}), "control characters"),
    "very long name": (lambda p: packed(p, {f"{NAME}/docs/{'x' * 600}.md": b""}), "too many"),
    "bomb": (lambda p: packed(p, {f"{NAME}/docs/zeros.csv": bytes(20 << 20)}), "bomb"),
    "shared data": (nested, "overlaps"),
    "link": (lambda p: packed(p, {f"{NAME}/docs/x.md": b"/etc"}, external_attr=(stat.S_IFLNK | 0o777) << 16), "link"),
    "pipe": (lambda p: packed(p, {f"{NAME}/docs/x.md": b""}, external_attr=(stat.S_IFIFO | 0o777) << 16), "link"),
    "other extra field": (lambda p: packed(p, {f"{NAME}/docs/x.md": b""}, extra=EXTRA), "0x7075"),
    "broken extra field": (lambda p: packed(p, {f"{NAME}/docs/x.md": b""}, extra=b"\x55\x54\xff\x00"), ""),
    "bytes before it": (lambda p: edited(packed(p), lambda data: b"#!/bin/sh\n" + data), "belong to no member"),
    "bytes behind it": (lambda p: edited(packed(p), lambda data: data + bytes(9)), ""),
    "bytes within it": (lambda p: edited(packed(p), between), "belong to none"),
    "comment": (lambda p: with_comment(packed(p)), "comment"),
    "comment in the table": (lambda p: edited(packed(p), table_comment), "comment"),
    "another name before the data": (lambda p: edited(packed(p), local_name), "says something else"),
    "another size before the data": (lambda p: edited(packed(p), declared), "says something else"),
    "another count at its end": (lambda p: edited(packed(p), end(count=1)), "another table"),
    "another disk at its end": (lambda p: edited(packed(p), end(disk=1)), "another table"),
    "another size at its end": (lambda p: edited(packed(p), end(size=46)), ""),
    "two tables": (lambda p: edited(packed(p), two_tables), "another table"),
    "a size that is nowhere": (lambda p: edited(packed(p), wide_size), "says something else"),
    "names that take long to compare": (
        lambda p: packed(p, {f"{NAME}/{n:03}{LONG}": b"" for n in range(20)}), "too many"),
    "beside the bundle": (lambda p: packed(p, {"setup.md": b""}), "outside the bundle's folder"),
    "code beside the bundle": (lambda p: packed(p, {"sitecustomize.py": b""}), "outside the bundle's folder"),
    "more than 1,000 members": (many, "1,005 members"),
    "encrypted": (lambda p: edited(packed(p), lambda d: d.replace(b"PK\x01\x02\x14\x03\x14\x00\x00\x00",
                                                                 b"PK\x01\x02\x14\x03\x14\x00\x01\x00")), "encrypted"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_archive_is_refused(name, tmp_path):
    make, expected = ATTACKS[name]
    path = make(tmp_path / "x.zip")
    with pytest.raises(BundleError) as caught:
        files = open_files(path)
        try:
            files.unpack(tmp_path / "out")
        finally:
            files.close()
    assert expected in str(caught.value) and "\x1b" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_large_and_unsized_members_are_read(tmp_path):
    """zip64 and sizes behind the data, as programs write them that do not know the length beforehand."""
    path, stream = tmp_path / "x.zip", io.BytesIO()

    class OneWay(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            return stream.write(data)

    with zipfile.ZipFile(OneWay(), "w", zipfile.ZIP_DEFLATED) as content:
        for number, (name, data) in enumerate(FILES.items()):
            with content.open(f"{NAME}/{name}", "w", force_zip64=number % 2 == 0) as member:
                member.write(data)
    path.write_bytes(stream.getvalue())
    assert problems(path) == []
    with zipfile.ZipFile(path, "w") as content, content.open(f"{NAME}/configs/a.json", "w", force_zip64=True) as member:
        member.write(b"{}")
    assert problems(path) == []


def test_what_operating_systems_leave_behind_is_passed_over(tmp_path):
    left = {"__MACOSX/._meningioma": b"x", f"__MACOSX/{NAME}/configs/._inference.json": b"x", ".DS_Store": b"x",
            f"{NAME}/.DS_Store": b"x", f"{NAME}/docs/Thumbs.db": b"x",
            f"{NAME}/configs/._inference.json": b"x"}  # fmt: skip
    files = open_files(packed(tmp_path / "x.zip", left))
    assert files.problems == [] and set(files.sizes) == set(FILES)
    folder = files.unpack(tmp_path / "out" / NAME)
    files.close()
    for name, data in left.items():
        target = tmp_path / "out" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    for place in (folder, folder.parent):  # the folder itself, and one folder above it
        files = open_files(place)
        assert files.problems == [] and set(files.sizes) == set(FILES) and files.place == folder


@pytest.mark.parametrize("root", ["", f"{NAME}/", f"my downloads/{NAME}/"])
def test_bundle_is_found_however_deep_it_was_packed(root, tmp_path):
    files = open_files(packed(tmp_path / "x.zip", root=root))
    assert files.problems == [] and files.read("LICENSE", 10) == FILES["LICENSE"]
    files.close()


@pytest.mark.skipif(shutil.which("zip") is None, reason="the program zip is not installed")
def test_archive_of_another_program_is_read(tmp_path):
    for name, data in FILES.items():
        (tmp_path / NAME / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / NAME / name).write_bytes(data)
    subprocess.run(["zip", "-qr", "x.zip", NAME], cwd=tmp_path, check=True)
    assert problems(tmp_path / "x.zip") == []


def test_links_of_a_folder_are_not_followed(tmp_path):
    bundle, outside = tmp_path / NAME, tmp_path / "outside.json"
    outside.write_text("{}")
    for name, data in FILES.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(data)
    (bundle / "configs" / "linked.json").symlink_to(outside)
    (bundle / "more").symlink_to(tmp_path, target_is_directory=True)
    os.mkfifo(bundle / "docs" / "pipe.md")  # opening it would wait for ever
    (bundle / "docs" / "a\nb.md").write_text("")
    files = Folder(bundle)
    assert sorted(p.partition(":")[0] for p in files.problems) == [
        "configs/linked.json", "docs/a\\nb.md", "docs/pipe.md", "more",
    ]  # fmt: skip
    assert set(files.sizes) == set(FILES)


@pytest.mark.parametrize("kind", ["nothing", "empty folder", "text file", "damaged", "other", "two bundles"])
def test_what_is_no_bundle_is_said_so(kind, tmp_path):
    path = tmp_path / "thing"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "text file":
        path.write_text("hello")
    elif kind == "damaged":
        path.write_bytes(packed(path).read_bytes()[:-200])
    elif kind != "nothing":
        with zipfile.ZipFile(path, "w") as content:
            names = ["a/configs/train.json", "b/configs/train.json"] if kind == "two bundles" else ["a.txt"]
            for name in names:
                content.writestr(name, "{}")
    with pytest.raises(BundleError, match="thing"):
        open_files(path)


def test_damage_anywhere_is_a_problem_or_a_clear_error(tmp_path):
    """Whatever the bytes are: no other exception, and nothing that goes on for ever."""
    path, rng = packed(tmp_path / "x.zip"), random.Random(0)
    good, seen = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(good)
        for _ in range(rng.choice((1, 3, 30))):
            damaged[rng.randrange(len(damaged))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        path.write_bytes(damaged[: rng.choice((len(damaged), rng.randrange(1, len(damaged))))])
        try:
            files = Archive(path)
            try:
                for name in files.sizes:
                    files.read(name, 1 << 20)
                seen += bool(files.problems)
            finally:
                files.close()
        except BundleError:
            seen += 1
    assert seen > 290  # times of members may change without harm


def test_member_that_is_longer_than_allowed_is_not_read(tmp_path):
    files = open_files(packed(tmp_path / "x.zip"))
    with pytest.raises(BundleError, match="at most 100"):
        files.read("docs/README.md", 100)
    files.close()
    assert archives.visible("a\x1b[2J" * 99, 13) == "a\\x1b[2Ja\\..."
