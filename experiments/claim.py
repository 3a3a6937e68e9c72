"""The claim on the ladder, from experiments/results/*.json: tables for README.md and LOG.md, and experiments/claim.png.

.venv/bin/python experiments/claim.py            # prints the tables, draws the figure
.venv/bin/python experiments/claim.py --write    # and puts the README's tables between their markers
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RUNGS = ("2m", "4m", "7m", "12m", "20m", "36m", "63m", "mamba2-6m", "mamba2-12m")
PAIRS = (("7m", "4m"), ("12m", "7m"), ("20m", "12m"), ("36m", "20m"), ("63m", "36m"), ("mamba2-12m", "mamba2-6m"))
LENGTHS = (512, 1024, 2048, 4096, 8192)
ARMS = {
    "linear:global_impact": ("the paper's setting", "C3", "o"),
    "linear:global_impact+adjacent": ("same, true neighbours", "C1", "s"),
    "uniform:blocks+adjacent": ("uniform, blocks of 64, true neighbours", "C2", "D"),
    "shorter_context": ("shorter context", "C0", "^"),
    "dense": ("dense, 1.7 times the FLOPs", "0.5", "v"),
}
MARKERS = ("<!-- claim table -->", "<!-- end of claim table -->")
AGAIN_MARKERS = ("<!-- again table -->", "<!-- end of again table -->")


def read(name: str) -> dict[str, Any]:
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def rungs_table() -> list[str]:
    """Every rung: parameters, tokens, FLOPs, seconds, and losses of the fit's own test."""
    lines = [
        "| rung | parameters | training FLOPs | seconds, shared GPU | validation | test | test, bits per byte |",
        "|---|---|---|---|---|---|---|",
    ]
    runs = read("runs")
    for name, run in ((name, runs[name]) for name in RUNGS):
        numbers = f"{run['val/loss']:.3f} | {run['test/loss']:.3f} | {run['test/bits_per_byte']:.3f}"
        lines.append(
            f"| {name} | {run['parameters']:,} | {run['training_flops']:.2e} | {run['seconds']:.0f} | {numbers} |"
        )
    return lines


def pairs() -> dict[tuple[str, int], dict[str, dict[str, Any]]]:
    """(rung, T) to the arms by name."""
    found = {}
    for sweep in read("pairs").values():
        rung, length = Path(sweep["config"]["experiment"]).stem, sweep["n_context"] + sweep["n_suffix"]
        found[rung, length] = {arm["name"]: arm for arm in sweep["arms"]}
    return found


def pairs_table() -> list[str]:
    """Differences to the smaller dense rung at its FLOPs, 10^-3 nats per token with 95 % intervals."""
    titles = [title for title, *_ in ARMS.values()]
    lines = [f"| pruned, dense | T | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    measured = pairs()
    for big, small in PAIRS:
        for length in sorted(length for rung, length in measured if rung == big):
            arms = measured[big, length]
            lines.append(f"| {big}, {small} | {length} | " + " | ".join(difference(arms[name]) for name in ARMS) + " |")
    return lines


def again_table() -> list[str]:
    """The first training of the larger rung, and its second: each minus the smaller model, on the same windows."""
    lines = pairs_table()[:2]
    first, second = pairs(), read("retrained")
    for big, small in PAIRS:
        for between, label in (("", f"{big}, {small}"), (f"-{small}", f"{big}, {small} again too")):
            for length in LENGTHS:
                sweep = second.get(f"retrained-{big}{between}-{length}")
                if sweep is not None:
                    arms = {arm["name"]: arm for arm in sweep["arms"]}
                    then = first[big, length]
                    cells = (f"{1e3 * then[name]['difference']:+.0f}, {difference(arms[name])}" for name in ARMS)
                    lines.append(f"| {label} | {length} | {' | '.join(cells)} |")
    return lines


def difference(arm: dict[str, Any]) -> str:
    """In bold where the interval is on the losing side of zero."""
    low, high = arm["difference_interval"]
    text = f"{1e3 * arm['difference']:+.0f} [{1e3 * low:+.0f}, {1e3 * high:+.0f}]"
    return f"**{text}**" if low > 0 else text


def draw(path: Path) -> None:
    """One panel for each pair of rungs, context length on the x axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = pairs()
    figure, panels = plt.subplots(1, len(PAIRS), figsize=(16, 3.6), sharex=True, sharey=True, layout="constrained")
    for panel, (big, small) in zip(panels, PAIRS, strict=True):
        lengths = sorted(length for rung, length in measured if rung == big)
        for shift, (name, (title, colour, marker)) in enumerate(ARMS.items()):
            arms = [measured[big, length][name] for length in lengths]
            middle = [1e3 * arm["difference"] for arm in arms]
            reach = [[1e3 * abs(arm["difference"] - arm["difference_interval"][end]) for arm in arms] for end in (0, 1)]
            places = [length * 1.04 ** (shift - 2) for length in lengths]
            panel.errorbar(
                places, middle, reach, label=title, color=colour, marker=marker, markersize=4, capsize=2, linewidth=1
            )
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(xscale="log", title=f"{big}\nat the FLOPs of {small}", xlabel="context + suffix, tokens")
        panel.set_xticks(LENGTHS, [str(length) for length in LENGTHS], fontsize=8)
        panel.minorticks_off()
    panels[0].set_ylabel("NLL minus the smaller dense model's\n$10^{-3}$ nats per token, lower is better")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ARMS), frameon=False)
    figure.savefig(path, dpi=110)


def into(path: Path, markers: tuple[str, str], lines: list[str]) -> None:
    """Replaces what stands between the markers. Raises ValueError if they are missing."""
    first, last = markers
    before, rest = path.read_text(encoding="utf-8").split(first)
    _, after = rest.split(last)
    path.write_text("".join((before, first, "\n", "\n".join(lines), "\n", last, after)), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md")
    args = parser.parse_args()
    tables = {MARKERS: pairs_table(), AGAIN_MARKERS: again_table()}
    print("\n\n".join("\n".join(lines) for lines in (rungs_table(), *tables.values())))
    draw(HERE / "claim.png")
    if args.write:
        for markers, lines in tables.items():
            into(HERE.parent / "README.md", markers, lines)


if __name__ == "__main__":
    main()
