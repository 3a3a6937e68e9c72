"""How ``simba-lab bench`` shows its results to people: a clock while it runs, tables and lines after."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table


def console() -> Console:
    from rich.console import Console

    return Console()


def with_progress(measure: Callable[[Callable[[str], None]], dict[str, Any]]) -> dict[str, Any]:
    """A measurement with a clock on standard error that says what is running."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        current = progress.add_task("starting", total=None)

        def show(name: str) -> None:
            progress.reset(current, description=name, total=None)

        return measure(show)


def gpu_table(result: dict[str, Any]) -> Table:
    """Lines of a GPU bench with ratio and target; what failed or was left out says why."""
    from rich.table import Table

    from simba_lab.bench.table import HEADINGS, cells, source

    worst = max((check["error"] / check["allowed"] for check in result["checks"] if check["allowed"]), default=None)
    checked = f"{len(result['checks'])} checks passed"
    if worst is not None:
        checked += f", the closest at {worst:.0%} of what is allowed"
    table = Table(title=f"bench {result['bench']}", caption=f"{source(result)}\n{checked}; seed {result['seed']}")
    for heading in HEADINGS:
        table.add_column(heading, justify="right" if heading in ("ours", "peer", "figure") else "left")
    for line in result["lines"]:
        table.add_row(*cells(line), style="red" if line["failed"] else None)
    return table


def profile_tables(result: dict[str, Any]) -> Group:
    """A table for each profiled step: what costs most above or below what FLOPs promise, all others in one row."""
    from rich.console import Group
    from rich.table import Table

    shown = []
    for profile in result["profiles"]:
        dense, pruned, promise = profile["dense_step"], profile["pruned_step"], profile["promise"]
        reached = dense / pruned / promise
        title = f"{profile['what']}\ndense {dense:.3f} ms, pruned {pruned:.3f} ms: {reached:.2f} of {promise:.2f}x"
        table = Table(title=title, caption="ms of a step (calls); over: above dense / what FLOPs promise")
        table.add_column("kernel")
        for heading in ("dense", "pruned", "over"):
            table.add_column(heading, justify="right")
        for name, *cells in _profile_rows(profile["kernels"]):
            table.add_row(name, *cells)
        shown.append(table)
    return Group(*shown)


def _profile_rows(kernels: list[dict[str, Any]], most: int = 24) -> list[tuple[str, ...]]:
    rows = [*kernels[:most]]
    for name, of in (("all others", kernels[most:]), ("all", kernels)):
        sums = {key: sum(kernel[key] for kernel in of) for key in kernels[0] if key != "name"}
        rows.append({"name": name, **sums})
    return [
        (
            row["name"],
            f"{row['dense']:.3f} ({row['dense_calls']:.0f})",
            f"{row['pruned']:.3f} ({row['pruned_calls']:.0f})",
            f"{row['over']:+.3f}",
        )
        for row in rows
    ]


def prefill_line(result: dict[str, Any]) -> str:
    """Dense against pruned prefill on the CPU in one sentence."""
    shape = result["shape"]
    return (
        f"prefill of {shape['batch']} x {shape['length']} tokens: dense {result['dense_seconds']:.3f} s, "
        f"pruned {result['pruned_seconds']:.3f} s: {result['speedup']:.2f} times as fast; "
        f"FLOPs promise {result['promised_by_flops']:.2f}, {result['fraction']:.2f} of that was reached "
        f"(median of {result['repeats']} pairs, load {result['machine']['load_1min']})"
    )


def cpu_table(result: dict[str, Any]) -> Table:
    """A row per implementation of the training step on the CPU."""
    from rich.table import Table

    shape, machine = result["shape"], result["machine"]
    title = ", ".join(f"{key} {value}" for key, value in shape.items())
    caption = f"{machine['cpu']}, {result['threads']} threads, torch {machine['torch']}, load {machine['load_1min']}"
    table = Table(title=f"training step: {title}", caption=f"{result['convention']}\n{caption}")
    for heading in ("implementation", "version"):
        table.add_column(heading)
    for heading in ("s/step", "min - max (steps)", "tokens/s", "peak memory", "parameters", "loss"):
        table.add_column(heading, justify="right")
    for row in result["rows"]:
        if "skipped" in row:
            table.add_row(row["implementation"], row["skipped"])
        else:
            table.add_row(*_cpu_cells(row))
    return table


def _cpu_cells(row: dict[str, Any]) -> list[str]:
    return [
        row["implementation"],
        row["version"],
        f"{row['seconds_per_step']:.3f}",
        f"{row['seconds_min']:.3f} - {row['seconds_max']:.3f} ({row['repeats']})",
        f"{row['tokens_per_second']:,.0f}",
        f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
        f"{row['parameters']:,}",
        f"{row['loss']:.3f}",
    ]
