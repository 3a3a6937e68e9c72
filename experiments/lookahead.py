"""Look-ahead on rungs nobody taught, from experiments/results/lookahead.json: tables and experiments/lookahead.png.

.venv/bin/python experiments/lookahead.py            # prints the tables, draws the figure
.venv/bin/python experiments/lookahead.py --write    # and puts the tables between their markers
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from claim import HERE, LENGTHS, PAIRS, into, read

SKIP_MARKERS = ("<!-- skip table -->", "<!-- end of skip table -->")
MARKERS = ("<!-- look-ahead table -->", "<!-- end of look-ahead table -->")
AIM = 2  # 10^-3 nats: what plain text may cost
SERIES = {
    "ahead": ("look-ahead impact", "C2", "D"),
    "skip": ("look-ahead that does not read what is protected", "C0", "s"),
    "own": ("impact of the layer itself, else the same", "C3", "o"),
    "dense": ("dense, 1.7 times the FLOPs", "0.5", "v"),
}


def arms(rung: str, length: int) -> dict[str, dict[str, Any]]:
    """The arms of both sweeps; every difference is to the shorter context of the same rung."""
    measured = read("lookahead")
    found, skip = (measured[f"lookahead-{rung}-{what}-{length}"]["arms"] for what in ("untaught-first", "skip"))
    ahead = [arm for arm in found if arm.get("criterion") == "lookahead_impact"]
    by_kind = {arm["kind"]: arm for arm in found}
    return {
        "smaller": by_kind["smaller_dense"],
        "dense": by_kind["dense"],
        "ahead": next(arm for arm in ahead if "[" not in arm["name"]),
        "skip": next(arm for arm in skip if arm["kind"] == "pruned"),
        "own": next(arm for arm in found if arm.get("criterion") == "global_impact"),
    }


def table() -> list[str]:
    titles = (
        "smaller dense", "look-ahead", "the layer's own impact", "far: smaller dense",
        "far: look-ahead", "far: own impact", "far: dense, 1.7 times the FLOPs",
    )  # fmt: skip
    lines = [f"| pruned, dense | T | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    for rung, small in PAIRS:
        for length in LENGTHS:
            of = arms(rung, length)
            cells = [difference(of["smaller"], "", 0), difference(of["ahead"], "", 1), difference(of["own"], "", 1)]
            far = {"smaller": 0, "ahead": 1, "own": 1, "dense": 0}
            cells += [difference(of[name], "_far", digits) for name, digits in far.items()]
            lines.append(f"| {rung}, {small} | {length} | {' | '.join(cells)} |")
    return lines


def skip_table() -> list[str]:
    """Look-ahead that does not read what is protected; minus the shorter context too."""
    titles = ("windows", "smaller dense", "look-ahead", "far: smaller dense", "far: look-ahead")
    lines = [f"| pruned, dense | T | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    measured = read("lookahead")
    for rung, small in PAIRS:
        for length in LENGTHS:
            found = measured[f"lookahead-{rung}-skip-{length}"]
            smaller, ahead = (
                next(a for a in found["arms"] if a["kind"] == kind) for kind in ("smaller_dense", "pruned")
            )
            cells = [f"{found['windows']:,}", difference(smaller, "", 0), difference(ahead, "", 1)]
            cells += [difference(smaller, "_far", 0), difference(ahead, "_far", 1)]
            lines.append(f"| {rung}, {small} | {length} | {' | '.join(cells)} |")
    return lines


def difference(arm: dict[str, Any], which: str, digits: int) -> str:
    """10^-3 nats with a 95 % interval; in bold where it is clear of zero and corrected p below 0.05."""
    low, high = arm[f"difference{which}_interval"]
    text = f"{1e3 * arm[f'difference{which}']:+.{digits}f} [{1e3 * low:+.{digits}f}, {1e3 * high:+.{digits}f}]"
    return f"**{text}**" if (low > 0 or high < 0) and arm[f"p_value{which}"] < 0.05 else text


def draw(path: Path) -> None:
    """Above all scored tokens, below those last seen beyond the shorter context; a column for each pair of rungs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, len(PAIRS), figsize=(17, 5.6), sharex=True, sharey="row", layout="constrained")
    for column, (rung, small) in enumerate(PAIRS):
        measured = [arms(rung, length) for length in LENGTHS]
        for row, which in enumerate(("", "_far")):
            panel = panels[row][column]
            for shift, (name, (title, colour, marker)) in enumerate(SERIES.items()):
                if row == 0 and name == "dense":
                    continue
                middle = [1e3 * of[name][f"difference{which}"] for of in measured]
                ends = [[1e3 * of[name][f"difference{which}_interval"][end] for of in measured] for end in (0, 1)]
                reach = [[abs(m - e) for m, e in zip(middle, ends[end], strict=True)] for end in (0, 1)]
                places = [length * 1.06 ** (shift - 1.5) for length in LENGTHS]
                look = {"label": title, "color": colour, "marker": marker, "markersize": 4, "linewidth": 1}
                panel.errorbar(places, middle, reach, capsize=2, **look)
            panel.axhline(0, color="black", linewidth=0.8)
            panel.set_xscale("log")
            panel.set_xticks(LENGTHS, [str(length) for length in LENGTHS], fontsize=8)
            panel.minorticks_off()
        panels[0][column].axhline(AIM, color="0.4", linewidth=0.8, linestyle="--")
        panels[0][column].set_title(f"{rung}\nat the FLOPs of {small}")
        panels[1][column].set_xlabel("context + suffix, tokens")
    panels[0][0].set_ylabel("all tokens")
    panels[1][0].set_ylabel("far tokens")
    figure.supylabel("NLL minus the shorter context's, $10^{-3}$ nats per token, lower is better", fontsize=9)
    handles = panels[1][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(SERIES), frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    tables = {MARKERS: table(), SKIP_MARKERS: skip_table()}
    print("\n\n".join("\n".join(lines) for lines in tables.values()))
    draw(HERE / "lookahead.png")
    if args.write:
        for markers, lines in tables.items():
            into(HERE.parent / "README.md", markers, lines)


if __name__ == "__main__":
    main()
