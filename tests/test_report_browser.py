"""The report in a real browser: what a reader sees, sorts, prints and saves."""

from __future__ import annotations

import base64
import csv
import io
import re
import struct
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import made_results
import pytest
from chromium import PATIENCE, Page, browsing, needs_browser

from simba_lab.report import write_report

pytestmark = needs_browser

HOSTILE = "</script><script>window.hit=1</script><img src=x onerror=window.hit=1>\"'&\u202eabc\U0001f40d\x07"
SECTIONS = [
    "answer", "arms-section", "flops", "seconds", "keep-section", "context", "differences", "importance", "made",
    "limits",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = made_results.example(search=True)
    hostile = results["arms"][5]
    results["conclusion"]["not_separable"] = [HOSTILE]
    hostile |= {"name": HOSTILE, "criterion": HOSTILE}
    return write_report(made_results.folder(tmp_path_factory.mktemp("report") / "sweep", results))


@pytest.fixture(scope="module")
def chromium(page: Path) -> Iterator[Page]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        with browsing(page, Path(profile)) as shown:
            shown.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(page.parent))
            yield shown


@pytest.fixture
def opened(chromium: Page, page: Path) -> Page:
    chromium.troubles.clear()
    chromium.requests.clear()
    show(chromium, page)
    return chromium


def media(opened: Page, scheme: str, medium: str = "screen") -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.call("Emulation.setEmulatedMedia", media=medium, features=features)


def show(opened: Page, page: Path, width: int = 1200, scheme: str = "light") -> None:
    """The page anew, as it is when a reader opens it."""
    opened.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    media(opened, scheme)
    opened.run("window.old = true")
    opened.call("Page.navigate", url=page.as_uri())
    opened.until("!window.old && document.readyState === 'complete'")


def saved(opened: Page, page: Path, button: str, name: str) -> bytes:
    """What the browser saves as `name` when the button is pressed."""
    opened.run(f"document.querySelector('#figure-forest {button}').click()")
    end = time.monotonic() + PATIENCE
    while not (page.parent / name).is_file():
        assert time.monotonic() < end, f"{name} was not saved"
        opened.run("new Promise(done => setTimeout(done, 20))")
    return (page.parent / name).read_bytes()


def column(opened: Page, index: int) -> list[str]:
    return opened.run(f"[...document.querySelectorAll('#arms tbody tr')].map(row => row.cells[{index}].dataset.value)")


def sort(opened: Page, index: int) -> str:
    opened.run(f"document.querySelectorAll('#arms thead button')[{index}].click()")
    return opened.run(f"document.querySelectorAll('#arms thead th')[{index}].ariaSort")


def test_it_opens_from_disk_in_silence_and_asks_for_nothing_else(opened: Page, page: Path) -> None:
    opened.run("new Promise(done => setTimeout(done, 200))")
    assert opened.troubles == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [page.as_uri()]
    assert opened.run("[...document.querySelectorAll('section')].map(s => s.id)") == SECTIONS
    heights = opened.run("[...document.querySelectorAll('figure svg')].map(s => s.getBoundingClientRect().height)")
    assert len(heights) == 9 and min(heights) > 100


def test_hostile_text_is_seen_and_never_run(opened: Page) -> None:
    assert opened.run("window.hit === undefined && document.images.length === 0 && document.scripts.length === 1")
    shown = opened.run("[...document.querySelectorAll('#arms tbody th')].map(th => th.innerText).join()")
    assert "<script>window.hit=1</script>" in shown and "\U0001f40d" in shown
    assert "\u202e" not in shown and "\x07" not in shown


def test_every_column_sorts_both_ways(opened: Page) -> None:
    assert opened.run("document.querySelectorAll('#arms thead th button').length") == 10
    for index in range(1, 10):
        if sort(opened, index) == "descending":
            sort(opened, index)
        given = column(opened, index)
        up = [float(v) for v in given if v]
        assert up == sorted(up) and given[len(up) :] == [""] * (len(given) - len(up)), index
        assert sort(opened, index) == "descending"
        assert [float(v) for v in column(opened, index) if v] == up[::-1]
    assert sort(opened, 0) == "ascending"
    assert column(opened, 0)[-1].startswith("uniform") and "small-dense" in column(opened, 0)
    assert opened.run("document.querySelectorAll('#arms th[aria-sort]:not([aria-sort=none])').length") == 1


def test_a_heading_is_pressed_by_keyboard(opened: Page) -> None:
    opened.run("document.querySelector('#arms thead th:nth-child(10) button').focus()")
    for kind in ("keyDown", "keyUp"):
        opened.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13)
    seconds = [float(value) for value in column(opened, 9)]
    assert seconds == sorted(seconds)


def test_every_number_leads_to_an_embedded_configuration(opened: Page) -> None:
    broken = """[...document.querySelectorAll('td[data-value]:not([data-value=""]), .tiles dd')]
        .filter(cell => { const link = cell.querySelector('a[href^="#config-"]');
                          return !link || !document.querySelector(link.getAttribute('href')); }).length"""
    assert opened.run(broken) == 0
    markers = "[...document.querySelectorAll('svg a')].map(a => a.href.baseVal)"
    links = opened.run(markers)
    assert len(links) > 100 and opened.run(f"{markers}.every(link => document.querySelector(link))")
    opened.run("document.querySelector('#arms tbody tr:nth-child(3) td a').click()")
    opened.until("document.querySelector(location.hash).getBoundingClientRect().height > 0")
    name = opened.run("document.querySelector('#arms tbody tr:nth-child(3) th').dataset.value")
    assert opened.run("document.querySelector(location.hash).innerText") == name


def luminance(colour: str) -> float:
    parts = [int(number) / 255 for number in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(opened: Page, selector: str) -> float:
    """Of the element's text against the page's paper."""
    colour, paper = f"document.querySelector('{selector}')", "document.body"
    colours = opened.run(f"[getComputedStyle({colour}).color, getComputedStyle({paper}).backgroundColor]")
    dark, light = sorted(luminance(colour) for colour in colours)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_legible(opened: Page, page: Path, scheme: str) -> None:
    show(opened, page, scheme=scheme)
    paper = luminance(opened.run("getComputedStyle(document.body).backgroundColor"))
    assert paper > 0.9 if scheme == "light" else paper < 0.02
    for selector in ("h1", "#arms td", "#arms small", "figcaption", ".winner", "#made dt", "figure svg text"):
        assert contrast(opened, selector) >= 4.5, selector


@pytest.mark.parametrize(("scheme", "least"), [("light", 2.2), ("dark", 5)])
def test_the_colours_of_figures_stand_out(opened: Page, page: Path, scheme: str, least: float) -> None:
    """Against the card; on white the lighter ones of a palette for the colour-blind do so least."""
    show(opened, page, scheme=scheme)
    card = luminance(opened.run("getComputedStyle(document.querySelector('figure')).backgroundColor"))
    for number in range(5):
        find = f"""document.querySelector('#flops svg [style*="fill: var(--c{number}"]')"""
        colour = luminance(opened.run(f"getComputedStyle({find}).fill"))
        assert (max(colour, card) + 0.05) / (min(colour, card) + 0.05) >= least, number


def test_the_button_overrules_the_system_s_colours(opened: Page) -> None:
    seen = [opened.run("getComputedStyle(document.body).backgroundColor")]
    for _ in range(3):
        opened.run("document.querySelector('#theme').click()")
        seen.append(opened.run("getComputedStyle(document.body).backgroundColor"))
    assert seen[0] == seen[1] == seen[3] != seen[2]


def test_a_phone_shows_it_without_scrolling_sideways(opened: Page, page: Path) -> None:
    show(opened, page, width=400)
    assert opened.run("document.documentElement.scrollWidth") <= 400
    assert opened.run("parseFloat(getComputedStyle(document.body).fontSize)") >= 14


def test_print_is_black_on_white_and_whole(opened: Page) -> None:
    media(opened, "dark", "print")
    assert opened.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert opened.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    width = "document.querySelector('#flops svg').getBoundingClientRect().width"
    assert opened.run(f"{width} <= document.body.getBoundingClientRect().width")
    printed = base64.b64decode(opened.call("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 5


def test_figures_are_saved_as_svg_png_and_csv(opened: Page, page: Path) -> None:
    root = ElementTree.fromstring(saved(opened, page, "[data-save=svg]", "forest.svg"))
    texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "short-context" in texts and float(root.get("width") or 0) > 500
    assert not list(root.iter("{http://www.w3.org/2000/svg}a")), "a picture by itself has nowhere to lead"
    assert "fill: #0072b2" in (svg := (page.parent / "forest.svg").read_text()) and "var(" not in svg
    png = saved(opened, page, "[data-save=png]", "forest.png")
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and min(struct.unpack(">II", png[16:24])) > 1000
    text = saved(opened, page, "a[download]", "forest.csv").decode()
    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO(text))}
    wanted = {arm["name"]: arm["difference"] for arm in made_results.example()["arms"]}
    assert len(rows) == 23 and float(rows["dense"]["difference"]) == wanted["dense"]
    assert opened.troubles == []
