"""Selective scan, backward: states are recomputed from those the forward pass kept, gradients run back in time.

With g_t = dL/dh_t (symbols as in :mod:`simba_lab.kernels.reference`):
g_t = C_t dy_t + exp(delta_{t+1} A) g_{t+1}, and from it dB_t = sum_d g_t delta_t x_t, dC_t = sum_d h_t dy_t,
d(delta_t x_t) = sum_n g_t B_t, dL/d(delta_t A) = g_t exp(delta_t A) h_{t-1}. Sums over channels leave one partial per
block of channels, added afterwards in a fixed order, so that gradients do not depend on the run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simba_lab.kernels.gpu.elementary import (
    LN2,
    LOG2E,
    STEPS,
    exp2,
    pin,
    sigmoid,
    softplus,
    stack,
    sum_channels,
    unstack,
)
from simba_lab.kernels.gpu.scan_forward import vectors


@triton.jit
def _tile(ptr, t0, length, stride, live, mask_below):
    """A tile (8, BLOCK) of the rows t0.. of one sequence in fp32, zeros outside."""
    t = t0 + tl.arange(0, STEPS)
    inside = (t < length)[:, None] & live[None, :] & mask_below
    return tl.load(ptr + t[:, None].to(tl.int64) * stride, inside, 0.0).to(tl.float32), inside


@triton.jit
def scan_carry(
    dt_ptr, z_ptr, C_ptr, dt_bias_ptr, A_ptr, dout_ptr, carry_ptr,
    length, channels, sdb, sdl, szb, szl, sCb, sCl, span, segments,
    N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
    PAIRED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dL/dh at the end of every segment of ``span`` steps but the last, whose carry (B, S, D, N) is given.

    The only part of the backward pass that is sequential, and a small one: segments then run side by side.
    """
    batch = tl.program_id(1).to(tl.int64)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    live = d < channels
    cell = live[:, None] & (n[None, :] < N)
    dt_bias = tl.load(dt_bias_ptr + d, live, 0.0).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * N + n[None, :], cell, 0.0).to(tl.float32) * LOG2E
    dt_ptr += batch * sdb + d[None, :]
    z_ptr += batch * szb + d[None, :]
    dout_ptr += batch * length * channels + d[None, :]
    padded = tl.cdiv(length, STEPS) * STEPS
    C_ptr += batch * sCb
    carry_ptr += ((batch * segments + segments - 1) * channels + d[:, None]) * N + n[None, :]
    g = tl.load(carry_ptr, cell, 0.0)
    for back in tl.range(0, padded - span, STEPS, num_stages=STAGES):
        t0 = padded - STEPS - back
        dt, inside = _tile(dt_ptr, t0, length, sdl, live, True)
        z, _ = _tile(z_ptr, t0, length, szl, live, True)
        dout, _ = _tile(dout_ptr, t0, length, channels, live, True)
        t = t0 + tl.arange(0, STEPS)
        c_rows = vectors(C_ptr, t[:, None].to(tl.int64), sCl, t < length, N, STATES, PAIRED)
        delta = tl.where(inside, softplus(dt + dt_bias[None, :], FAST), 0.0)
        sizes = unstack(pin(delta, STEPS, BLOCK), BLOCK)
        dys = unstack(pin(dout * z * sigmoid(z, FAST), STEPS, BLOCK), BLOCK)
        for i in tl.static_range(STEPS - 1, -1, -1):
            g = (g + dys[i][:, None] * c_rows[i][None, :]) * exp2(sizes[i][:, None] * A, FAST)
        if t0 % span == 0:
            carry_ptr -= channels * N
            tl.store(carry_ptr, g, cell)


@triton.jit
def scan_backward(
    x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, dt_bias_ptr, A_ptr, D_ptr, starts_ptr, dout_ptr, carry_ptr,
    dx_ptr, ddt_ptr, dz_ptr, dB_ptr, dC_ptr, dA_ptr, dD_ptr, dbias_ptr, dinitial_ptr, scratch_ptr,
    length, channels, sxb, sxl, sdb, sdl, szb, szl, sBb, sBl, sCb, sCl, span,
    N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, EVERY: tl.constexpr, FAST: tl.constexpr,
    PAIRED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of one segment of a sequence (``span`` windows of EVERY steps) and one block of channels.

    carry (B, S, D, N) is dL/dh at the end of every segment. dx, ddt, dz (B, L, D); dB, dC (blocks, B, L, N); dA
    (B, S, D, N); dD, dbias (B, S, D); dinitial (B, D, N) by the first segment; scratch holds the states at the starts
    of the tiles of one window: (B, S, blocks, EVERY / 8, BLOCK, STATES).
    """
    batch = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(2)
    part = batch * tl.num_programs(2) + segment
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    live = d < channels
    cell = live[:, None] & (n[None, :] < N)
    dt_bias = tl.load(dt_bias_ptr + d, live, 0.0).to(tl.float32)
    skip = tl.load(D_ptr + d, live, 0.0).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * N + n[None, :], cell, 0.0).to(tl.float32) * LOG2E
    states = (batch * channels + d[:, None]) * N + n[None, :]
    part_states = (part * channels + d[:, None]) * N + n[None, :]
    g = tl.load(carry_ptr + part_states, cell, 0.0)
    x_ptr += batch * sxb + d[None, :]
    dt_ptr += batch * sdb + d[None, :]
    z_ptr += batch * szb + d[None, :]
    dense = batch * length * channels + d[None, :]
    steps = tl.arange(0, STEPS)
    B_ptr += batch * sBb
    C_ptr += batch * sCb
    starts_ptr += (batch * tl.cdiv(length, EVERY) * channels + d[:, None]) * N + n[None, :]
    WINDOW: tl.constexpr = EVERY // STEPS
    cells = tl.arange(0, BLOCK)[:, None] * STATES + n[None, :]
    scratch_ptr += (part * tl.num_programs(0) + block) * WINDOW * BLOCK * STATES + cells
    sums = (block * tl.num_programs(1) + batch) * length * N
    dA = tl.zeros((BLOCK, STATES), tl.float32)
    dD = tl.zeros((STEPS, BLOCK), tl.float32)
    dbias = tl.zeros((STEPS, BLOCK), tl.float32)
    after = tl.minimum((segment + 1) * span, tl.cdiv(length, EVERY))
    for back in range(segment * span, after):
        window = after - 1 - (back - segment * span)
        first = window * EVERY
        tiles = tl.minimum(tl.cdiv(length - first, STEPS), WINDOW)
        h = tl.load(starts_ptr + window.to(tl.int64) * channels * N, cell, 0.0)
        for k in tl.range(0, tiles, num_stages=STAGES):
            tl.store(scratch_ptr + k * BLOCK * STATES, h)
            t0 = first + k * STEPS
            x, inside = _tile(x_ptr, t0, length, sxl, live, k + 1 < tiles)
            dt, _ = _tile(dt_ptr, t0, length, sdl, live, k + 1 < tiles)
            t = t0 + steps
            b_rows = vectors(B_ptr, t[:, None].to(tl.int64), sBl, t < length, N, STATES, PAIRED)
            delta = tl.where(inside, softplus(dt + dt_bias[None, :], FAST), 0.0)
            sizes = unstack(pin(delta, STEPS, BLOCK), BLOCK)
            drives = unstack(pin(delta * x, STEPS, BLOCK), BLOCK)
            for i in tl.static_range(STEPS):
                h = exp2(sizes[i][:, None] * A, FAST) * h + drives[i][:, None] * b_rows[i][None, :]
        tl.debug_barrier()
        for j in tl.range(0, tiles, num_stages=STAGES):
            k = tiles - 1 - j
            t0 = first + k * STEPS
            h = tl.load(scratch_ptr + k * BLOCK * STATES)
            x, inside = _tile(x_ptr, t0, length, sxl, live, True)
            dt, _ = _tile(dt_ptr, t0, length, sdl, live, True)
            z, _ = _tile(z_ptr, t0, length, szl, live, True)
            dout, _ = _tile(dout_ptr + dense, t0, length, channels, live, True)
            t = t0 + steps
            row = t[:, None].to(tl.int64)
            b_rows = vectors(B_ptr, row, sBl, t < length, N, STATES, PAIRED)
            c_rows = vectors(C_ptr, row, sCl, t < length, N, STATES, PAIRED)
            v = dt + dt_bias[None, :]
            delta = tl.where(inside, softplus(v, FAST), 0.0)
            gate = sigmoid(z, FAST)
            dy = dout * z * gate
            sizes = unstack(pin(delta, STEPS, BLOCK), BLOCK)
            drives = unstack(pin(delta * x, STEPS, BLOCK), BLOCK)
            dys = unstack(pin(dy, STEPS, BLOCK), BLOCK)
            decays, before, ys, dcs = (), (), (), ()
            for i in tl.static_range(STEPS):
                decay = exp2(sizes[i][:, None] * A, FAST)
                decays, before = decays + (decay,), before + (h,)
                h = decay * h + drives[i][:, None] * b_rows[i][None, :]
                ys = ys + (tl.sum(h * c_rows[i][None, :], 1),)
                dcs = dcs + (h * dys[i][:, None],)
            ddrives, dsizes, dbs = (), (), ()
            for i in tl.static_range(STEPS - 1, -1, -1):
                g += dys[i][:, None] * c_rows[i][None, :]
                ddrives = (tl.sum(g * b_rows[i][None, :], 1),) + ddrives
                dbs = (g * drives[i][:, None],) + dbs
                g = g * decays[i]
                w = g * before[i]
                dsizes = (tl.sum(w * A, 1),) + dsizes
                dA += w * sizes[i][:, None]
            y = pin(stack(ys, BLOCK), STEPS, BLOCK) + skip[None, :] * x
            ddrive = pin(stack(ddrives, BLOCK), STEPS, BLOCK)
            ddelta = pin(stack(dsizes, BLOCK), STEPS, BLOCK) * LN2 + ddrive * x
            ddt = tl.where(inside, ddelta * sigmoid(v, FAST), 0.0)
            rows = sums + row * N + n[None, :]
            present = (t < length)[:, None] & (n < N)[None, :]
            tl.store(dB_ptr + rows, sum_channels(dbs, BLOCK, STATES).to(dB_ptr.dtype.element_ty), present)
            tl.store(dC_ptr + rows, sum_channels(dcs, BLOCK, STATES).to(dC_ptr.dtype.element_ty), present)
            dD += dy * x
            dbias += ddt
            offset = dense + row * channels
            tl.store(dx_ptr + offset, (ddrive * delta + dy * skip[None, :]).to(dx_ptr.dtype.element_ty), inside)
            tl.store(ddt_ptr + offset, ddt.to(ddt_ptr.dtype.element_ty), inside)
            dz = dout * y * gate * (1.0 + z * (1.0 - gate))
            tl.store(dz_ptr + offset, dz.to(dz_ptr.dtype.element_ty), inside)
        tl.debug_barrier()
    tl.store(dA_ptr + part_states, dA, cell)
    tl.store(dinitial_ptr + states, g, cell & (segment == 0))
    tl.store(dD_ptr + part * channels + d, tl.sum(dD, 0), live)
    tl.store(dbias_ptr + part * channels + d, tl.sum(dbias, 0), live)
