"""The page in a browser: it asks for nothing, may not, and its tables, viewer, schemes, widths and print work."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from samseg_monai.report.montage import pick_cases
from samseg_monai.report.page import write_report
from samseg_monai.report.runs import RunResult
from tests.helpers.browser import CHROMIUM, Browser
from tests.report.test_report import CASES, _overlay, made, runs  # noqa: F401 fixtures

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium or google-chrome on this machine")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def page(runs: list[RunResult], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    montage = [_overlay(case) for case in pick_cases(runs[2]).values()]
    path = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(path, title="T", runs=runs, montage=montage, commands=["a" * 300], shares=None)


@pytest.fixture
def shown(browser, page):
    browser.open(page)
    return browser


def column(shown: Browser, table: str, number: int) -> list[str]:
    return shown.run(
        f"[...document.querySelectorAll('#{table} tbody tr')].map(r => r.cells[{number}].textContent.trim())"
    )


def test_nothing_is_asked_for_and_nothing_may_be(shown):
    asked = [
        event["params"]["request"]["url"] for event in shown.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [shown.run("location.href")]
    told = [event for event in shown.events if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert told == []  # no style, script or picture was refused
    assert shown.run("fetch('http://127.0.0.1:9/').then(() => 'got', (e) => e.message)") == "Failed to fetch"
    assert shown.run(
        "new Promise(r => { addEventListener('securitypolicyviolation', e => r(e.effectiveDirective));"
        " const i = new Image(); i.src = 'http://127.0.0.1:9/a.png'; })"
    ) == "img-src"  # fmt: skip
    shown.run(
        "{ const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s); }"
    )
    assert shown.run("window.hacked") is None


def test_headings_sort(shown):
    click = "document.querySelectorAll('#results th button')[{}].click()"
    shown.run(click.format(2))
    best = column(shown, "results", 2)
    assert best == sorted(best, reverse=True) and "LoRA" in column(shown, "results", 0)[0]
    shown.run(click.format(2))
    assert column(shown, "results", 2) == best[::-1]
    assert shown.run("document.querySelectorAll('#results th')[2].getAttribute('aria-sort')") == "ascending"


def test_cases_stand_with_the_worst_first_by_any_measure(shown):
    for number, (name, better) in enumerate([("Dice", min), ("HD95 mm", max), ("NSD 1 mm", min)]):
        shown.run(f"measure.selectedIndex = {number}; measure.dispatchEvent(new Event('change'))")
        rows = [
            [float(v) for v in values] for values in zip(*(column(shown, "cases", n) for n in (2, 3, 4)), strict=True)
        ]
        worst = [better(row) for row in rows]
        assert worst == sorted(worst, reverse=better is max), name
    assert sorted(column(shown, "cases", 0)) == CASES[:-1]


def test_slices_outlines_window_and_close_up(shown):
    first = "document.querySelector('.viewer')."
    before = shown.run(f"{first}querySelector('image').getAttribute('href')")
    shown.run(
        f"{{ const s = {first}querySelector('[name=slice]'); s.value = 1; s.dispatchEvent(new Event('input')); }}"
    )
    assert shown.run(f"{first}querySelector('image').getAttribute('href')") != before
    assert shown.run(f"{first}querySelector('[name=place]').textContent") == "8"
    assert shown.run(f"{first}querySelector('path.reference').getAttribute('d')") == ""
    shown.run(f"{first}querySelector('[data-path=reference]').click()")
    assert shown.run(f"getComputedStyle({first}querySelector('path.reference')).display") == "none"
    assert shown.run(f"{first}querySelector('[name=shades]').textContent") == "level 100, width 40"
    shown.run(
        f"{{ const s = {first}querySelector('[name=width]'); s.value = 50; s.dispatchEvent(new Event('input')); }}"
    )
    assert shown.run(f"{first}querySelector('[name=shades]').textContent") == "level 100, width 20"
    assert shown.run(f"{first}querySelector('feFuncR').getAttribute('slope')") == "2"
    bar = shown.run(f"{first}querySelector('.bar rect').getBoundingClientRect().width")
    shown.run(f"{first}querySelector('[name=close]').click()")
    assert shown.run(f"{first}querySelector('svg svg').getAttribute('viewBox')") != "0 0 100 80"
    assert shown.run(f"{first}querySelector('.bar rect').getBoundingClientRect().width") > bar


def test_a_tap_on_a_point_names_its_case(shown):
    shown.run(
        "document.querySelector('figure use title').parentNode.dispatchEvent(new MouseEvent('click', {bubbles: true}))"
    )
    assert shown.run("document.querySelector('figure output').textContent").startswith(tuple(CASES))


def test_a_narrow_window_scrolls_down_only_and_the_dark_scheme_is_dark(shown):
    shown.ask("Emulation.setDeviceMetricsOverride", width=360, height=800, deviceScaleFactor=1, mobile=True)
    assert shown.run("document.documentElement.scrollWidth") == 360
    shown.ask("Emulation.clearDeviceMetricsOverride")
    colour = "getComputedStyle(document.body).backgroundColor"
    assert shown.run(colour) == "rgb(255, 255, 255)"
    shown.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert shown.run(colour) == "rgb(23, 25, 28)"
    shown.ask("Emulation.setEmulatedMedia", features=[])


def test_print_takes_few_pages(shown):
    content = base64.b64decode(shown.ask("Page.printToPDF", preferCSSPageSize=True)["data"])
    assert content.startswith(b"%PDF") and 2 <= content.count(b"/Type /Page\n") <= 5
