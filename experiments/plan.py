"""Writes the tables of PLAN.md again: what training the published ladder would cost, from what was measured.

    .venv/bin/python experiments/plan.py

Reads experiments/bench/*.json (results of `simba-lab bench train|prefill --json`) and counts FLOPs by the closed form.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from simba_lab.bench.training import CASES
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import parameter_count, published_shape

HERE = Path(__file__).parent
PLAN = HERE / "PLAN.md"
BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"

LADDER = ("mamba-130m", "mamba-370m", "mamba-790m", "mamba-1.4b", "mamba-2.8b")
LENGTH, CONTEXT = 2048, 1792
TOKENS = 300e9
REFERENCE = "768"
"""The bench case whose training speed is carried over to larger shapes: the shape of mamba-130m."""

ONE_GPU, TWO_GPUS = 273_423, 525_644
"""Tokens per second of the 768 x 24 shape on one GPU and on two under ddp, measured in one session (README, Limits)."""
BETWEEN_HOSTS = 0.9
"""Assumed: what is left of the efficiency when eight hosts exchange gradients through a network."""


@functools.cache
def model_of(config: ModelConfig) -> LanguageModel:
    with torch.device("meta"):
        return LanguageModel(config, seed=None)


@functools.cache
def dense_flops(config: ModelConfig, length: int = LENGTH) -> float:
    """Training FLOPs per token, logits on all positions."""
    return model_of(config).flops(length, 0, head="all").training().total / length


@functools.cache
def pruned_flops(config: ModelConfig, length: int = LENGTH, context: int = CONTEXT) -> float:
    """The same with the context pruned linearly to 10 % by global impact, logits on the suffix."""
    sparse = model_of(config).sparsified(criterion="global_impact", schedule="linear", final_keep=0.1)
    return sparse.flops(context, length - context).training().total / length


def lines(name: str) -> list[dict]:
    return json.loads((HERE / "bench" / f"{name}.json").read_text(encoding="utf-8"))["lines"]


def trained(case: str) -> tuple[float, float]:
    """Tokens per second of a bench case, dense, and how much of what FLOPs promise its pruned form reached.

    Both with the loss that each is trained with, on all positions and on the suffix.
    """
    about, names = CASES[case], sorted(path.stem for path in (HERE / "bench").glob("train-*.json"))
    speeds = {line["what"]: line["ours"] for name in names for line in lines(name)}
    what = f"training, {about.what}, "
    dense, pruned = speeds[f"{what}dense"], speeds[f"{what}pruned linearly to 10% by global impact"]
    promise = dense_flops(about.config, about.length) / pruned_flops(about.config, about.length, about.context)
    return dense, pruned / dense / promise


def forward_rate(name: str) -> float:
    """FLOP/s of a dense prefill of 8 x 2048 tokens."""
    size = name.removeprefix("mamba-")
    (line,) = [line for line in lines(f"prefill-{size}") if line["what"] == f"{size} 8 x 2048, dense"]
    return 8 * model_of(published_shape(name)).flops(LENGTH, 0).total / (1e-3 * line["ours"])


@functools.cache
def forward_rates() -> dict[str, float]:
    """Of every rung; between two measured ones on a straight line over the logarithm of the FLOPs per token."""
    measured = {name: forward_rate(name) for name in ("mamba-130m", "mamba-1.4b", "mamba-2.8b")}
    low, high = (math.log(dense_flops(published_shape(name))) for name in ("mamba-130m", "mamba-1.4b"))

    def between(name: str) -> float:
        share = (math.log(dense_flops(published_shape(name))) - low) / (high - low)
        return measured["mamba-130m"] + share * (measured["mamba-1.4b"] - measured["mamba-130m"])

    return {name: measured[name] if name in measured else between(name) for name in LADDER}


def training_rates() -> dict[str, tuple[float, float]]:
    """(cautious, likely) FLOP/s of training: that of the 768 shape; as much faster as the forward pass becomes."""
    speed, _ = trained(REFERENCE)
    base = speed * dense_flops(CASES[REFERENCE].config)
    forward = forward_rates()
    return {name: (base, base * forward[name] / forward["mamba-130m"]) for name in LADDER}


def efficiency(gpus: int) -> float:
    """Of N GPUs: what two lost grows with the bytes of a ring all-reduce, 2 (N - 1) / N of the gradients."""
    lost = 2 * ONE_GPU / TWO_GPUS - 1
    share = 1 / (1 + lost * 2 * (gpus - 1) / gpus)
    return share * (BETWEEN_HOSTS if gpus > 8 else 1)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)) + "\n"


def measured_training() -> Iterator[list[str]]:
    for case, about in CASES.items():
        speed, share = trained(case)
        flops = dense_flops(about.config, about.length)
        yield [about.what, f"{flops / 1e9:.4f}", f"{speed:,.0f}", f"{speed * flops / 1e12:.0f}", f"{share:.2f}"]


def rates() -> Iterator[list[str]]:
    forward, training, measured = forward_rates(), training_rates(), ("mamba-130m", "mamba-1.4b", "mamba-2.8b")
    for name in LADDER:
        config, (low, high) = published_shape(name), training[name]
        flops = dense_flops(config)
        yield [
            name, f"{parameter_count(config) / 1e6:,.0f}", f"{flops / 1e9:.2f}", f"{pruned_flops(config) / 1e9:.2f}",
            f"{forward[name] / 1e12:.0f} ({'measured' if name in measured else 'between'})",
            f"{low / 1e12:.0f} to {high / 1e12:.0f}", f"{low / flops:,.0f} to {high / flops:,.0f}",
        ]  # fmt: skip


def costs() -> Iterator[list[str]]:
    """GPU-hours and days of each arm at 300 G tokens: at the likely rate, and hours at the cautious one."""
    total = [0.0] * 5
    for name in LADDER:
        config, (low, high) = published_shape(name), training_rates()[name]
        share = trained(REFERENCE)[1]
        for arm, flops in (("dense", dense_flops(config)), ("pruned", pruned_flops(config) / share)):
            hours, slow = (TOKENS * flops / rate / 3600 for rate in (high, low))
            days = [hours / 24 / (gpus * efficiency(gpus)) for gpus in (1, 8, 64)]
            total = [sum(pair) for pair in zip(total, (hours, slow, *days), strict=True)]
            yield [f"{name}, {arm}", *shown(hours, slow, *days)]
    yield ["all ten", *shown(*total)]


def shown(hours: float, slow: float, *days: float) -> list[str]:
    return [f"{hours:,.0f}", f"{slow:,.0f}", *(f"{number:,.1f}" for number in days)]


def tables() -> str:
    parts = (
        table(["measured on one H200", "GFLOPs a token", "tokens/s", "TFLOP/s", "pruned: share of promise"],
              [*measured_training()]),
        table(["rung", "10^6 parameters", "GFLOPs a token, dense", "pruned", "forward TFLOP/s", "training TFLOP/s",
               "tokens/s on one GPU, dense"], [*rates()]),
        table(["GPUs", "efficiency"], [[str(n), f"{efficiency(n):.2f}"] for n in (2, 8, 64)]),
        table(["300 G tokens", "GPU-hours", "cautious", "days on 1 GPU", "on 8", "on 64"], [*costs()]),
    )  # fmt: skip
    return "\n".join(parts)


def main() -> None:
    before, _, rest = PLAN.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PLAN.write_text(f"{before}{BEGIN}\n{tables()}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
