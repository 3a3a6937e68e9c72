"""One step of the selective scan from a given state (Mamba, Gu & Dao 2023, section 3): decoding.

Nothing follows anything here, so every program takes one block of channels of one sequence and is done. What counts is
that the states are read and written once, and that nothing waits: eight steps of which seven are empty, as the scan
would do, take some twice as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simba_lab.kernels.gpu.elementary import LOG2E, exp2, sigmoid, softplus


@triton.jit
def scan_step(
    x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, dt_bias_ptr, A_ptr, D_ptr, initial_ptr, out_ptr, final_ptr,
    channels, sxb, sdb, szb, sBb, sCb,
    N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Gated output (B, 1, D) and state (B, D, N) after one token of B sequences; grid: blocks of channels, B."""
    batch = tl.program_id(1).to(tl.int64)
    d, n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STATES)
    live = d < channels
    cell, place = live[:, None] & (n[None, :] < N), d[:, None] * N + n[None, :]
    h = tl.load(initial_ptr + batch * channels * N + place, cell, 0.0).to(tl.float32)
    A = tl.load(A_ptr + place, cell, 0.0).to(tl.float32) * LOG2E
    b = tl.load(B_ptr + batch * sBb + n, n < N, 0.0).to(tl.float32)
    c = tl.load(C_ptr + batch * sCb + n, n < N, 0.0).to(tl.float32)
    x = tl.load(x_ptr + batch * sxb + d, live, 0.0).to(tl.float32)
    z = tl.load(z_ptr + batch * szb + d, live, 0.0).to(tl.float32)
    dt = tl.load(dt_ptr + batch * sdb + d, live, 0.0).to(tl.float32)
    dt_bias = tl.load(dt_bias_ptr + d, live, 0.0).to(tl.float32)
    skip = tl.load(D_ptr + d, live, 0.0).to(tl.float32)
    delta = softplus(dt + dt_bias, FAST)
    h = exp2(delta[:, None] * A, FAST) * h + (delta * x)[:, None] * b[None, :]
    y = (tl.sum(h * c[None, :], 1) + skip * x) * z * sigmoid(z, FAST)
    tl.store(out_ptr + batch * channels + d, y.to(out_ptr.dtype.element_ty), live)
    tl.store(final_ptr + batch * channels * N + place, h, cell)
