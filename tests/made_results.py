"""Results as a sweep writes them, made up: 24 arms at one budget, with or without a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, CONTEXT, BUDGET = 8, 960, 41_250_000_000
BINS = [(1, 16), (16, 64), (64, 256), (256, 512), (512, None), (None, None)]
COUNTS = {
    "uniform": [CONTEXT] + [490] * 7,
    "linear": [960, 837, 713, 590, 466, 343, 219, 96],
    "highway_top": [960, 960, 960, 960, 100, 100, 100, 100],
}
CRITERIA = ["global_impact", "local_delta", "norm", "random/seed0", "random/seed1", "random/seed2", "recency"]


def arm_dict(draw: np.random.Generator, name: str, kind: str, offset: float, far_offset: float) -> dict[str, Any]:
    """One arm whose differences have an interval of +-0.004 (plain) and +-0.03 (far)."""
    first = kind == "smaller_dense"

    def face(base: float, gap: float, half: float, spread: float, far: str) -> dict[str, Any]:
        value, gap = base + gap, 0.0 if first else gap
        return {
            f"quality{far}": value,
            f"quality{far}_interval": [value - spread, value + spread],
            f"difference{far}": None if first else gap,
            f"difference{far}_interval": None if first else [gap - half, gap + half],
            f"p_value{far}": None if first else (0.0046 if abs(gap) > half else 0.61),
        }

    schedule, _, criterion = name.partition("/")
    counts = COUNTS[schedule] if kind == "pruned" else [545 if kind == "shorter_context" else CONTEXT] * LAYERS
    nlls = 1.2 + 0.9 * np.arange(len(BINS)) + offset + draw.normal(0, 0.02, len(BINS))
    return {
        "name": name,
        "kind": kind,
        "criterion": criterion.partition("/")[0] if kind == "pruned" else None,
        "schedule": schedule if kind == "pruned" else None,
        "matched": kind != "dense",
        "flops": round(BUDGET * (1.74 if kind == "dense" else 1 + draw.uniform(-0.003, 0.003))),
        **face(2.61, offset, 0.004, 0.05, ""),
        **face(5.42, far_offset, 0.03, 0.16, "_far"),
        "windows": 1024,
        "wall_seconds": float(draw.uniform(11, 19)),
        "run": f"arms/{name.replace('/', '-')}",
        "keep_counts": counts,
        "mean_keep": float(np.mean(counts) / CONTEXT),
        "final_keep": counts[-1] / CONTEXT,
        "by_distance": [
            {"low": low, "high": high, "tokens": 9000 // (i + 1), "nll": float(nlls[i])}
            for i, (low, high) in enumerate(BINS)
        ],
        "flops_by_op": {"in_proj": 18_000_000_000, "scan": 9_000_000_000},
        "spec": {"d_model": 256, "n_layer": LAYERS},
    }


def example(search: bool = False) -> dict[str, Any]:
    """A results.json as a sweep writes it: 24 arms, the smaller dense model first."""
    draw = np.random.default_rng(0)
    arms = [arm_dict(draw, "small-dense", "smaller_dense", 0.0, 0.0)]
    arms.append(arm_dict(draw, "short-context", "shorter_context", -0.031, 0.11))
    arms.append(arm_dict(draw, "dense", "dense", -0.034, -0.21))
    for s, schedule in enumerate(COUNTS):
        for c, criterion in enumerate(CRITERIA):
            gap = 0.012 * c - 0.022 + 0.004 * s
            arms.append(arm_dict(draw, f"{schedule}/{criterion}", "pruned", gap, 3 * gap - 0.05))
    ranked = sorted((arm for arm in arms if arm["matched"]), key=lambda arm: arm["quality_far"])
    results = {
        "name": "hierarchy_ablation",
        "created": "2026-05-04T10:11:12+00:00",
        "command": "simba-lab sweep --config sweeps/hierarchy_ablation.yaml",
        "budget_flops": BUDGET,
        "tolerance": 0.005,
        "budget_reference": "dense model of 5 layers on 960 + 64 tokens",
        "convention": "FLOPs = 2 x multiply-adds, head on the scored positions.",
        "metric": "mean NLL of the suffix tokens, nats/token",
        "protocol": "suffix",
        "n_context": CONTEXT,
        "n_suffix": 64,
        "far_distance": 545,
        "windows": 1024,
        "far_tokens": 3871,
        "environment": {"python": "3.11.9", "torch": "2.13.0", "cpu": "two cores", "platform": "Linux"},
        "config": {"schedules": list(COUNTS), "criteria": CRITERIA, "model": {"d_model": 256, "n_layer": LAYERS}},
        "conclusion": {
            "sentence": "At equal FLOPs, the same model on a shorter context (short-context) has the lowest NLL: "
            "2.5790 nats/token. The best pruned arm, uniform/global_impact, loses to it: difference +0.0090 "
            "nats/token, 95 % interval +0.0050 to +0.0130, corrected p = 0.005.",
            "best": "short-context",
            "not_separable": ["uniform/global_impact", "linear/global_impact"],
            "far_sentence": f"At equal FLOPs, {ranked[0]['name']} has the lowest far-token NLL. It beats "
            "the smaller dense model (small-dense) on far tokens: difference -0.1160 nats/token, 95 % interval "
            "-0.1460 to -0.0860, corrected p = 0.005.",
            "best_far": ranked[0]["name"],
            "not_separable_far": [ranked[1]["name"], ranked[2]["name"]],
        },
        "arms": arms,
    }
    if search:
        trials = [
            {
                "number": n,
                "value": None if n == 7 else 2.6 - 0.03 * (1 - np.exp(-n / 10)) + float(draw.normal(0, 0.004)),
                "knots": [1.0, 0.6, 0.2],
                "keep_counts": [960, 900, 800, 640, 420, 240, 130, 60],
                "flops": BUDGET,
                "state": "FAIL" if n == 7 else "COMPLETE",
            }
            for n in range(30)
        ]
        results["search"] = {"trials": trials, "best": 22}
    return results


def written(tmp_path: Path, results: dict[str, Any]) -> Path:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    return path


def folder(path: Path, results: dict[str, Any]) -> Path:
    """A sweep's folder with the run folder of every arm."""
    for arm in results["arms"]:
        run = path / arm["run"]
        run.mkdir(parents=True)
        (run / "arm.json").write_text(json.dumps({"name": arm["name"], "flops_by_op": arm["flops_by_op"]}))
        (run / "nll.npy").write_bytes(b"")
    written(path, results)
    return path
