"""Vectors of the CPU kernels: what NumPy says of the same numbers, lane by lane, NaN included."""

from __future__ import annotations

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from simba_lab.kernels.cpu.elementary import exp, exp2, larger, log1p, sigmoid, softplus  # noqa: E402 - needs Numba
from simba_lab.kernels.cpu.vectors import LANES, all_at_most, entry, highest, load, maximum, store, total  # noqa: E402


@numba.njit(error_model="numpy")
def compute(a, b, one, out):  # noqa: ANN001, ANN202 - compiled
    """One row of ``out`` per function; ``b`` lies in [0, 1]. The numbers that come of whole vectors."""
    x, y = load(a, 1), load(b, 0)  # from an address that is no multiple of a vector's size
    rows = (x + y, x - y, x * one, x / (one + y), -x, exp(x), exp2(x), log1p(y), sigmoid(x, one), softplus(x, one))
    for i, row in enumerate(numba.literal_unroll(rows)):
        store(out, i * LANES, row)
    store(out, 10 * LANES, larger(x, y))
    store(out, 11 * LANES, highest(x, y))
    return total(x), maximum(x), entry(a, 1), all_at_most(x, one), all_at_most(y, one)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_vectors_are_numpys_lane_by_lane(dtype: type, tolerance: float) -> None:
    draw = np.random.default_rng(0)
    a, b = (10 * draw.standard_normal(LANES + 1)).astype(dtype), draw.random(LANES).astype(dtype)
    out = np.empty(12 * LANES, dtype)
    summed, top, first, below, above = compute(a, b, dtype(1), out)
    x, y = a[1:].astype(np.float64), b.astype(np.float64)
    truth = (x + y, x - y, x, x / (1 + y), -x, np.exp(x), np.exp2(x), np.log1p(y), 1 / (1 + np.exp(-x)),
             np.logaddexp(x, 0), np.maximum(x, y), np.maximum(x, y))  # fmt: skip
    np.testing.assert_allclose(out.reshape(12, LANES), truth, rtol=tolerance, atol=1e-7 if dtype == np.float32 else 0)
    assert (top, first, below, above) == (a[1:].max(), a[1], False, True)
    assert abs(summed - x.sum()) <= tolerance * np.abs(x).sum()


def test_a_nan_is_no_bound_and_stays() -> None:
    a, b, out = np.zeros(LANES + 1, np.float32), np.ones(LANES, np.float32), np.empty(12 * LANES, np.float32)
    a[3] = np.nan
    summed, top, _, below, _ = compute(a, b, np.float32(1), out)
    assert np.isnan(summed) and top == 0 and not below
    rows = np.isnan(out.reshape(12, LANES))
    assert not rows[7].any() and (rows[[*range(7), *range(8, 12)]] == (np.arange(LANES) == 2)).all()
