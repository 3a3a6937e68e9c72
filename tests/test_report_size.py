"""A page stays under 3 MB for any size of sweep, by rules that it states, or is refused with what is too large."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import made_results
import numpy as np
import pytest

from simba_lab.errors import InputError
from simba_lab.report import write_report
from simba_lab.report.curve_figures import search_figure
from simba_lab.report.folders import Comparison, Gathered
from simba_lab.report.provenance import differing
from simba_lab.report.thinning import LIMIT, versions

LAYERS = 19


def of_size(arms: int, trials: int = 0) -> dict[str, Any]:
    """Results of a sweep over one criterion's option, the names as long as real ones."""
    draw, results = np.random.default_rng(0), made_results.example(search=trials > 0)
    del results["arms"][3:]
    for n in range(arms - 3):
        arm = made_results.arm_dict(draw, "linear/x", "pruned", 0.03 * draw.normal(), 0.1 * draw.normal())
        final = 0.05 + 0.9 * n / arms
        arm |= {"name": f"linear:simba_lab.banded_impact(bands={n},reduce=absmax)", "run": f"arms/{n}"}
        arm |= {"keep_counts": np.linspace(960, 960 * final, LAYERS).astype(int).tolist()}
        arm |= {"spec": {"d_model": 256, "n_layer": LAYERS, "pruning": {"criterion": {"bands": n}, "final": final}}}
        results["arms"].append(arm)
    ranked = sorted(results["arms"][3:], key=lambda arm: arm["quality"])
    names = {"best": ranked[0]["name"], "best_far": ranked[-1]["name"]}
    results["conclusion"] |= names | {"not_separable": [], "not_separable_far": []}
    if trials:
        row = results["search"]["trials"][0]
        results["search"] = {"trials": [row | {"number": n, "value": 3 - n / trials} for n in range(trials)], "best": 0}
    return results


def downloaded(page: str, name: str) -> list[dict[str, str]]:
    (address,) = re.findall(rf'download="{name}" href="data:text/csv;charset=utf-8,([^"]*)"', page)
    return list(csv.DictReader(io.StringIO(unquote(address))))


def test_five_hundred_arms_and_a_thousand_trials_take_less_than_3_mb(tmp_path: Path) -> None:
    results = of_size(500, trials=1000)
    page = write_report(made_results.written(tmp_path, results)).read_text(encoding="utf-8")
    assert len(page.encode()) < LIMIT == 3_000_000
    assert 'id="left-out"' not in page and page.count('<tr class="') == 500
    assert page.count("Drawn are 60 of 500 arms: the first, the best, the controls and those of the lowest NLL") == 5
    forest = re.search(r'<figure id="figure-forest">.*?</svg>', page, re.S)
    assert forest is not None and forest[0].count("<title>") == 2 * 59
    assert len(downloaded(page, "forest.csv")) == 499 and len(downloaded(page, "keep.csv")) == 500
    assert len(downloaded(page, "search.csv")) == 1000
    assert "The CSV of the keep curves holds the keep counts of every arm." in page
    assert "after the first arm, only what differs from it" in page
    config = re.search(r'id="config-7".*?</pre>', page, re.S)
    assert config is not None and "bands&quot;: 4" in config[0] and "d_model" not in config[0]
    links = set(re.findall(r'href="#(config-[^"]*)"', page))
    assert len(links) == 501 and links == set(re.findall(r'id="(config-[^"]*)"', page))


def test_what_still_is_too_much_is_left_out_from_the_worst_arm_on() -> None:
    results = of_size(200)
    *_, fewest = versions(Gathered([Comparison(results)]))
    (left,) = fewest.comparisons
    arms, ranked = left.results["arms"], sorted(results["arms"][3:], key=lambda arm: arm["quality"])
    assert len(arms) == 32 and len(results["arms"]) == 200
    assert [arm["name"] for arm in arms[:3]] == ["small-dense", "short-context", "dense"]
    assert {arm["name"] for arm in arms[3:]} == {arm["name"] for arm in (*ranked[:28], ranked[-1])}
    assert "168 of its 200 arms, those with the highest NLL that are no controls" in fewest.skipped[0].reason


def test_a_page_that_cannot_shrink_is_refused_by_its_largest_section(tmp_path: Path) -> None:
    results = of_size(5)
    results["config"]["notes"] = "x" * LIMIT
    path, old = made_results.written(tmp_path, results), tmp_path / "report.html"
    old.write_text("old")
    with pytest.raises(InputError, match="the section 'How it was made' alone takes 6.0 MB; name fewer folders"):
        write_report(path)
    assert old.read_text() == "old"


def test_a_long_search_is_drawn_with_fewer_points_and_the_whole_line() -> None:
    figure = search_figure(Comparison(of_size(4, trials=999)))
    assert figure is not None and figure.svg.count("<title>trial ") == 200
    assert "every 5th is drawn, the line is that of all" in figure.caption
    assert len(figure.csv.splitlines()) == 1000


def test_only_what_differs_is_kept_at_every_depth() -> None:
    first = {"a": 1, "b": {"c": [1, 2], "d": {"e": None}}, "only": 3}
    other = {"a": 1, "b": {"c": [1, 3], "d": {"e": None}}, "new": {}}
    assert differing(other, first) == {"b": {"c": [1, 3]}, "new": {}}
    assert differing(first, first) == {}
