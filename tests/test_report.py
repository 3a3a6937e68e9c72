"""The report from a generated results.json of 24 arms: table, figures, page, and what hostile or broken input does."""

from __future__ import annotations

import base64
import copy
import csv
import hashlib
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_results import BUDGET, COUNTS, example, written
from rich.console import Console

from simba_lab.errors import BudgetMismatch, InputError
from simba_lab.report import load_results, print_table, write_report
from simba_lab.report.context_figure import context_figure
from simba_lab.report.curve_figures import distance_figure, keep_figure, search_figure
from simba_lab.report.drawing import Figure
from simba_lab.report.figures import flops_figure, seconds_figure
from simba_lab.report.folders import Comparison, Gathered
from simba_lab.report.forest_figure import forest_figure
from simba_lab.report.html import render as render_gathered
from simba_lab.report.importance import importance_figure


def render(results: dict[str, Any]) -> str:
    return render_gathered(Gathered([Comparison(results)]))


def all_figures(results: dict[str, Any]) -> list[Figure]:
    one = Comparison(results)
    made = [flops_figure([one], "quality"), flops_figure([one], "quality_far"), seconds_figure([one])]
    made += [keep_figure(one), search_figure(one), context_figure([one]), distance_figure(one), forest_figure(one)]
    made += [importance_figure(one)]
    return [figure for figure in made if figure is not None]


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on tags that are not closed in order."""

    VOID = {"meta", "wbr", "link", "br", "img"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]


@pytest.fixture(scope="module")
def text() -> str:
    return render(example(search=True))


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def printed(results: dict[str, Any], width: int = 100, terminal: bool = False) -> str:
    out = io.StringIO()
    print_table(results, Console(file=out, width=width, force_terminal=terminal))
    return out.getvalue()


def test_terminal_table_lists_arms_by_quality_within_100_columns() -> None:
    text = printed(example(), width=80)
    assert max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
    ranked = sorted(example()["arms"], key=lambda arm: arm["quality"])
    places = [re.search(rf"^. {re.escape(arm['name'])} .*", text, re.M) for arm in ranked]
    assert all(places) and [p.start() for p in places if p] == sorted(p.start() for p in places if p)
    assert re.search(r"^! dense +71\.78 2\.576±0\.050 5\.210 -34\.0 \[-38\.0, -30\.0\] 0\.005", text, re.M)
    assert re.search(r"^\* short-context ", text, re.M) and re.search(r"^= uniform/global_impact ", text, re.M)
    assert "FLOPs = 2 x multiply-adds" in text and "41.25 GFLOPs ±0.5 %" in text
    assert "The best pruned arm, uniform/global_impact, loses" in text.replace("\n", " ")


def test_terminal_table_puts_what_may_not_be_claimed_in_parentheses() -> None:
    line = next(line for line in printed(example()).splitlines() if "highway_top/local_delta" in line)
    assert "(-2.0 [-6.0, +2.0])" in line and " -56.0 " in line


def test_terminal_shows_markup_and_control_characters_inertly() -> None:
    results = example()
    results["arms"][4]["name"] = "[red]\x1b[31mx[/red]"
    assert "[red]\ufffd[31mx[/red]" in printed(results, terminal=True)


def test_page_is_whole_small_and_needs_no_network(page: Page, text: str) -> None:
    assert len(text.encode()) < 3_000_000
    names = {arm["name"] for arm in example()["arms"]}
    assert all(name in page.text for name in names)
    for value in page.values("href") + page.values("src") + page.values("xlink:href"):
        assert value.startswith(("#", "./", "data:text/csv", "data:text/yaml")), value
    assert re.findall(r"https?://[^\s\"<]+", text) == re.findall(r"http://www\.w3\.org/[^\s\"<]+", text)
    assert "url(http" not in text and "@import" not in text
    ids = page.values("id")
    assert len(ids) == len(set(ids))


def test_page_says_the_answer_first_and_how_it_was_made(page: Page) -> None:
    results = example(search=True)
    order = [
        page.text.index(part)
        for part in ("The best pruned arm", "2.5760", "NLL by evidence", results["command"], "nothing here says")
    ]
    assert order == sorted(order)
    for fact in ("2.13.0", "41,250,000,000 FLOPs", "±0.5 %", '"d_model": 256', results["convention"]):
        assert fact in page.text
    assert "65,536 scored tokens, 3,871 of them (5.9 %) far" in page.text
    assert "up to 0.0240 nats/token apart" in page.text


def test_rows_link_to_the_arms_configuration_and_carry_sortable_numbers(page: Page, text: str) -> None:
    assert "./arms/linear-global_impact/arm.json" in page.values("href")
    rows = re.findall(r'<tr class="\w+">(.*?)</tr>', text, re.S)
    assert len(rows) == 24
    values = [[float(v) for v in re.findall(r'<td data-value="([^"]+)"', row)] for row in rows]
    assert [row[1] for row in values] == sorted(arm["quality"] for arm in example()["arms"])
    headers = [attrs for tag, attrs in page.tags if tag == "th" and attrs.get("scope") == "col"]
    assert [h["aria-sort"] for h in headers].count("ascending") == 1
    assert {h["data-type"] for h in headers} == {"text", "number"}


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e$x_1^2$\x07\ud800"


@pytest.mark.filterwarnings("error:Glyph")
def test_hostile_text_is_shown_and_never_run(tmp_path: Path) -> None:
    results = example(search=True)
    hostile = results["arms"][5]
    hostile |= {"name": HOSTILE, "criterion": HOSTILE, "schedule": HOSTILE, "run": 'javascript:alert(1)//" onclick=x'}
    results |= {"name": HOSTILE, "command": HOSTILE, "created": HOSTILE, "config": {HOSTILE: HOSTILE}}
    results["conclusion"] |= {"sentence": HOSTILE, "best": HOSTILE, "not_separable": [HOSTILE]}
    results["environment"][HOSTILE] = HOSTILE
    text = write_report(written(tmp_path, results)).read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [tag for tag, attrs in page.tags if tag == "img" or any(name.startswith("on") for name in attrs)]
    assert all(value.startswith(("#", "./", "data:text/csv", "data:text/yaml")) for value in page.values("href"))
    assert "\u202e" not in text and "\x07" not in text
    assert "alert(1)" in page.text and "$x_1^2$" in page.text


def test_policy_admits_this_script_only(text: str) -> None:
    script = re.search(r"<script>(.*?)</script>", text, re.S)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text and "default-src 'none'" in text


def test_same_results_give_the_same_page(text: str) -> None:
    assert render(example(search=True)) == text


def test_figures_are_searchable_svg_with_their_numbers_as_csv() -> None:
    results = example(search=True)
    figures = {figure.key: figure for figure in all_figures(results)}
    assert list(figures) == [
        "flops", "far-flops", "seconds", "keep", "search", "context", "distance", "forest", "importance",
    ]  # fmt: skip
    for figure in figures.values():
        root = ElementTree.fromstring(figure.svg)
        texts = ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert len(texts) > 10 and "width" not in root.attrib
        assert "currentColor" in figure.svg and "#010203" not in figure.svg
        assert len(figure.caption) > 100 and (
            "nats/token" in figure.caption or figure.key in ("keep", "importance")
        )
        if figure.key == "forest":
            assert {arm["name"] for arm in results["arms"][1:]} <= set(texts)
    table = list(csv.DictReader(io.StringIO(figures["forest"].csv)))
    by_name = {arm["name"]: arm for arm in results["arms"]}
    assert len(table) == 23
    assert all(float(row["difference_far"]) == by_name[row["arm"]]["difference_far"] for row in table)
    keep = list(csv.reader(io.StringIO(figures["keep"].csv)))
    assert [int(cell) for cell in keep[-1][1:]] == COUNTS["highway_top"]


def test_marks_differ_without_colour() -> None:
    from simba_lab.report.marks import Marks

    arms = example()["arms"]
    marks = Marks(arms)
    looks = {
        (arm["criterion"], arm["schedule"], arm["kind"]): (marks.of(arm)["marker"], marks.of(arm).get("fillstyle"))
        for arm in arms
    }
    assert len(set(looks.values())) == len(looks) == 18


def test_forest_fills_only_what_may_be_claimed() -> None:
    from simba_lab.report.results import differs_from_first

    arm = example()["arms"][3]
    assert differs_from_first(arm) and differs_from_first(arm, far=True)
    for doubt in ({"p_value": 0.05}, {"p_value": None}, {"difference_interval": [-0.1, 0.0]}):
        assert not differs_from_first(arm | doubt)
        assert differs_from_first(arm | doubt, far=True)


def without_far(results: dict[str, Any]) -> None:
    results["conclusion"] |= {"best_far": None, "not_separable_far": []}
    for arm in results["arms"]:
        keys = [key for key in arm if "_far" in key]
        arm |= dict.fromkeys([*keys, "by_distance"])


def only_the_first(results: dict[str, Any]) -> None:
    results["arms"] = results["arms"][:1]


def unmatched_and_unmeasured(results: dict[str, Any]) -> None:
    for arm in results["arms"]:
        arm |= {"matched": False, "quality": None, "quality_interval": None, "wall_seconds": None}
    results["conclusion"]["best"] = None


@pytest.mark.parametrize("change", [without_far, only_the_first, unmatched_and_unmeasured])
def test_missing_faces_leave_out_their_figures_and_nothing_else(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    results = example()
    change(results)
    page = Page(write_report(written(tmp_path, results)).read_text(encoding="utf-8"))
    figures = [value for value in page.values("id") if value.startswith("figure-")]
    assert "figure-keep" in figures and "figure-search" not in figures
    assert ("figure-distance" in figures) is (change is not without_far)
    assert ("figure-forest" in figures) is (change is not only_the_first)
    assert "nan" not in re.findall(r"\bnan\b", page.text.lower())
    assert printed(results).count("dense") >= 1


def test_a_wide_range_of_flops_is_drawn_on_a_log_axis() -> None:
    results = example()
    results["arms"][2]["flops"] = 60 * BUDGET
    figure = all_figures(results)[0]
    texts = ["".join(e.itertext()) for e in ElementTree.fromstring(figure.svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"100", "1000"} <= set(texts)


def broken(change: Callable[[dict[str, Any]], Any]) -> str:
    results = copy.deepcopy(example(search=True))
    change(results)
    return json.dumps(results)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "'arms'"),
        ("\x00", "not JSON"),
        (broken(lambda r: r.pop("budget_flops")), "key budget_flops is missing"),
        (broken(lambda r: r["arms"][3].pop("quality_far")), r"key arms\[3\].quality_far is missing"),
        (broken(lambda r: r["arms"][2].update(quality=float("nan"))), r"arms\[2\].quality is 'nan'"),
        (broken(lambda r: r["arms"][2].update(difference_interval=[1])), r"difference_interval is '\[1\]'"),
        (broken(lambda r: r["conclusion"].pop("sentence")), "key conclusion.sentence is missing"),
        (broken(lambda r: r.update(arms=[])), "arms is empty"),
        (broken(lambda r: r["arms"].append(1)), r"arms\[24\] must be a mapping"),
        (broken(lambda r: r["arms"][0]["by_distance"][1].pop("nll")), r"arms\[0\].by_distance\[1\].nll"),
        (broken(lambda r: r["search"]["trials"][4].pop("value")), r"search.trials\[4\].value"),
        (broken(lambda r: r.update(n_context=0)), "n_context is '0', it must be a positive number"),
    ],
)
def test_broken_results_are_refused_in_one_line_and_the_old_report_stays(text: str, says: str, tmp_path: Path) -> None:
    path, old = tmp_path / "results.json", tmp_path / "report.html"
    path.write_text(text)
    old.write_text("old")
    with pytest.raises(InputError, match=says) as error:
        write_report(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert old.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "results.json"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="results.json: no such file"):
        load_results(tmp_path / "results.json")


def test_arms_that_left_the_budget_are_never_put_in_one_table(tmp_path: Path) -> None:
    results = example()
    results["arms"][6]["flops"] = round(BUDGET * 1.006)
    with pytest.raises(BudgetMismatch, match=r"uniform/random/seed0 41497500000 \(\+0.60 %\)"):
        load_results(written(tmp_path, results))


def test_importing_the_room_does_not_import_matplotlib() -> None:
    check = "import sys, simba_lab.report; sys.exit('matplotlib' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[1]).returncode == 0


def test_a_name_with_dollar_signs_is_not_typeset_as_mathematics() -> None:
    results = example()
    results["arms"][5]["name"] = r"a$\nosuch{x}_1$"
    forest = next(figure for figure in all_figures(results) if figure.key == "forest")
    assert r">a$\nosuch{x}_1$</text>" in forest.svg
