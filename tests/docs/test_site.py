"""The documentation site builds without a warning, has every public name, and asks no server for anything."""

import importlib
import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

import samseg_monai as sm

ROOT = Path(__file__).parents[2]
# besides the face: packages whose names bundles and scripts use
PUBLIC = ("adapters", "bundles", "export", "handlers", "metrics", "networks", "sam.weights", "strategies")
PUBLIC += ("training", "transforms")


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", errors="replace")
    assert done.returncode == 0, done.stderr
    return folder


def test_every_public_name_is_on_an_api_page(site):
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]  # four lines of header, then zlib
    entries = [line.split() for line in zlib.decompress(packed).decode().splitlines()]
    shown = {name for name, *_ in entries}
    assert all(place.startswith("api/") for _, _, _, place, *_ in entries)
    missing = [name for name in sm.__all__ if name != "__version__" and f"samseg_monai.{name}" not in shown]
    documented = {id(getattr(sm, name)) for name in sm.__all__}
    for package in PUBLIC:
        module = importlib.import_module(f"samseg_monai.{package}")
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value) and id(value) not in documented and f"{module.__name__}.{name}" not in shown:
                missing.append(f"{package}.{name}")
    assert missing == []


def test_pages_load_nothing_from_elsewhere(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    loads = r"<(?:script|img|iframe|source)[^>]*src=\"?https?:|<link[^>]*rel=\"?(?:stylesheet|preload|icon)[^>]*https?:"
    assert [page.name for page in pages if re.search(loads, page.read_text(encoding="utf-8"))] == []
    styles = [
        path for path in site.rglob("*.css") if re.search(r"url\(\"?https?:|@import", path.read_text(encoding="utf-8"))
    ]
    assert styles == []


def test_every_page_of_the_folder_is_in_the_menu():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert listed == {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
