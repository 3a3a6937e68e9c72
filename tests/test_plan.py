"""The plan of what the whole ladder would cost: its tables are those that its script computes from the benches."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

PLACE = Path(__file__).parents[1] / "experiments" / "plan.py"


def test_the_tables_are_those_of_the_benches() -> None:
    spec = importlib.util.spec_from_file_location("plan", PLACE)
    plan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plan)
    text = PLACE.with_name("PLAN.md").read_text(encoding="utf-8")
    assert f"{plan.BEGIN}\n{plan.tables()}{plan.END}" in text
    assert plan.efficiency(1) == 1 and plan.efficiency(2) == pytest.approx(525_644 / (2 * 273_423))
    hours = plan.TOKENS * plan.dense_flops(plan.published_shape("mamba-130m")) / plan.training_rates()["mamba-130m"][0]
    assert hours / 3600 == pytest.approx(plan.TOKENS / plan.trained(plan.REFERENCE)[0] / 3600)
