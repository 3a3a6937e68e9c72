"""Selective scan, forward (Mamba, Gu & Dao 2023, section 3): one program walks one block of channels through time.

A program holds the states (BLOCK, N) of its channels in registers, several states of a channel in one thread, so that
the sum over states is mostly a sum within a thread. Time is the sequential loop, eight steps at a time: everything
that is per token and channel (step size, gate) is computed once for a tile (8, BLOCK), spread over all threads; the
recurrence then takes the tile's rows one by one. No length is special: a tail is a tile whose steps have size zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from simba_lab.kernels.gpu.elementary import LOG2E, STEPS, exp2, pin, sigmoid, softplus, stack, unstack


@triton.jit
def vectors(ptr, row, stride, inside, N: tl.constexpr, STATES: tl.constexpr, PAIRED: tl.constexpr):
    """Eight vectors (STATES,) fp32: the rows of B or C (of one sequence) whose numbers (8, 1) are ``row``.

    PAIRED reads two neighbouring bf16 at once: a shift or a mask then makes each an fp32.
    """
    if PAIRED:
        m = tl.arange(0, STATES // 2)
        words = ptr.to(tl.pointer_type(tl.int32)) + row * (stride // 2) + m[None, :]
        tile = tl.load(words, inside[:, None] & (m < N // 2)[None, :], 0)
        w0, w1, w2, w3, w4, w5, w6, w7 = unstack(tile, STATES // 2)
        return (
            _widen(w0, STATES), _widen(w1, STATES), _widen(w2, STATES), _widen(w3, STATES),
            _widen(w4, STATES), _widen(w5, STATES), _widen(w6, STATES), _widen(w7, STATES),
        )  # fmt: skip
    else:
        n = tl.arange(0, STATES)
        tile = tl.load(ptr + row * stride + n[None, :], inside[:, None] & (n < N)[None, :], 0.0)
        return unstack(tile.to(tl.float32), STATES)


@triton.jit
def _widen(words, STATES: tl.constexpr):
    even, odd = (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)
    return tl.reshape(tl.join(even, odd), (STATES,))


@triton.jit
def _states_at(ptr, part, d, n, channels, N: tl.constexpr):
    """Addresses (BLOCK, STATES) of the states of one sequence, or of one part of it, in a tensor (parts, D, N)."""
    return ptr + (part.to(tl.int64) * channels + d[:, None]) * N + n[None, :]


@triton.jit
def scan_states(
    x_ptr, dt_ptr, B_ptr, dt_bias_ptr, A_ptr, initial_ptr, boundaries_ptr,
    length, channels, sxb, sxl, sdb, sdl, sBb, sBl, first, span, segments,
    N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, INITIAL: tl.constexpr, FAST: tl.constexpr,
    PAIRED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States at the ends of all segments of ``span`` steps but the last: (blocks - first, segments - 1, BLOCK, STATES).

    The recurrence of :func:`scan_forward` in the same order, so that its results do not depend on the split.
    """
    blocks = tl.cdiv(channels, BLOCK)
    batch = (first + tl.program_id(0)) // blocks
    d = (first + tl.program_id(0)) % blocks * BLOCK + tl.arange(0, BLOCK)
    n = tl.arange(0, STATES)
    live = d < channels
    cell = live[:, None] & (n[None, :] < N)
    dt_bias = tl.load(dt_bias_ptr + d, live, 0.0).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * N + n[None, :], cell, 0.0).to(tl.float32) * LOG2E
    if INITIAL:
        h = tl.load(_states_at(initial_ptr, batch, d, n, channels, N), cell, 0.0).to(tl.float32)
    else:
        h = tl.zeros((BLOCK, STATES), tl.float32)
    x_ptr += batch.to(tl.int64) * sxb + d[None, :]
    dt_ptr += batch.to(tl.int64) * sdb + d[None, :]
    B_ptr += batch.to(tl.int64) * sBb
    steps = tl.arange(0, STEPS)
    cells = tl.arange(0, BLOCK)[:, None] * STATES + n[None, :]
    boundaries_ptr += tl.program_id(0) * (segments - 1) * BLOCK * STATES + cells
    for t0 in tl.range(0, span * (segments - 1), STEPS, num_stages=STAGES):
        t = t0 + steps
        inside = (t < length)[:, None] & live[None, :]
        row = t[:, None].to(tl.int64)
        x = tl.load(x_ptr + row * sxl, inside, 0.0).to(tl.float32)
        dt = tl.load(dt_ptr + row * sdl, inside, 0.0).to(tl.float32)
        b_rows = vectors(B_ptr, row, sBl, t < length, N, STATES, PAIRED)
        delta = tl.where(inside, softplus(dt + dt_bias[None, :], FAST), 0.0)
        sizes = unstack(pin(delta, STEPS, BLOCK), BLOCK)
        drives = unstack(pin(delta * x, STEPS, BLOCK), BLOCK)
        for i in tl.static_range(STEPS):
            h = exp2(sizes[i][:, None] * A, FAST) * h + drives[i][:, None] * b_rows[i][None, :]
        if (t0 + STEPS) % span == 0:
            tl.store(boundaries_ptr, h)
            boundaries_ptr += BLOCK * STATES


@triton.jit
def scan_forward(
    x_ptr, dt_ptr, z_ptr, B_ptr, C_ptr, dt_bias_ptr, A_ptr, D_ptr, initial_ptr, boundaries_ptr, out_ptr, final_ptr,
    starts_ptr, length, channels, sxb, sxl, sdb, sdl, szb, szl, sBb, sBl, sCb, sCl, first, span, segments,
    N: tl.constexpr, STATES: tl.constexpr, BLOCK: tl.constexpr, EVERY: tl.constexpr, INITIAL: tl.constexpr,
    SPLIT: tl.constexpr, FAST: tl.constexpr, PAIRED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gated output (B, L, D) and final state (B, D, N); states at every EVERY-th step (B, L/EVERY, D, N) unless 0.

    A program does one segment of ``span`` steps of one block of channels of one sequence; blocks are counted over all
    sequences, from ``first``. The states at the starts of later segments are :func:`scan_states`'.
    """
    blocks = tl.cdiv(channels, BLOCK)
    batch = ((first + tl.program_id(0)) // blocks).to(tl.int64)
    d = (first + tl.program_id(0)) % blocks * BLOCK + tl.arange(0, BLOCK)
    segment = tl.program_id(1)
    begin, end = segment * span, tl.minimum(segment * span + span, length)
    n = tl.arange(0, STATES)
    live = d < channels
    cell = live[:, None] & (n[None, :] < N)
    dt_bias = tl.load(dt_bias_ptr + d, live, 0.0).to(tl.float32)
    skip = tl.load(D_ptr + d, live, 0.0).to(tl.float32)
    A = tl.load(A_ptr + d[:, None] * N + n[None, :], cell, 0.0).to(tl.float32) * LOG2E
    if INITIAL:
        h = tl.load(_states_at(initial_ptr, batch, d, n, channels, N), cell & (segment == 0), 0.0).to(tl.float32)
    else:
        h = tl.zeros((BLOCK, STATES), tl.float32)
    if SPLIT:
        part = tl.program_id(0) * (segments - 1) + segment - 1
        cells = (part * BLOCK + tl.arange(0, BLOCK))[:, None] * STATES + n[None, :]
        h += tl.load(boundaries_ptr + cells, cell & (segment > 0), 0.0)
    x_ptr += batch * sxb + d[None, :]
    dt_ptr += batch * sdb + d[None, :]
    z_ptr += batch * szb + d[None, :]
    out_ptr += batch * length * channels + d[None, :]
    steps = tl.arange(0, STEPS)
    B_ptr += batch * sBb
    C_ptr += batch * sCb
    if EVERY > 0:
        starts_ptr = _states_at(starts_ptr, batch * tl.cdiv(length, EVERY) + begin // EVERY, d, n, channels, N)
    for t0 in tl.range(begin, end, STEPS, num_stages=STAGES):
        if EVERY > 0:
            if t0 % EVERY == 0:
                tl.store(starts_ptr, h, cell)
                starts_ptr += channels * N
        t = t0 + steps
        inside = (t < length)[:, None] & live[None, :]
        row = t[:, None].to(tl.int64)
        x = tl.load(x_ptr + row * sxl, inside, 0.0).to(tl.float32)
        z = tl.load(z_ptr + row * szl, inside, 0.0).to(tl.float32)
        dt = tl.load(dt_ptr + row * sdl, inside, 0.0).to(tl.float32)
        b_rows = vectors(B_ptr, row, sBl, t < length, N, STATES, PAIRED)
        c_rows = vectors(C_ptr, row, sCl, t < length, N, STATES, PAIRED)
        delta = tl.where(inside, softplus(dt + dt_bias[None, :], FAST), 0.0)
        sizes = unstack(pin(delta, STEPS, BLOCK), BLOCK)
        drives = unstack(pin(delta * x, STEPS, BLOCK), BLOCK)
        ys = ()
        for i in tl.static_range(STEPS):
            h = exp2(sizes[i][:, None] * A, FAST) * h + drives[i][:, None] * b_rows[i][None, :]
            ys = ys + (tl.sum(h * c_rows[i][None, :], 1),)
        y = (pin(stack(ys, BLOCK), STEPS, BLOCK) + skip[None, :] * x) * z * sigmoid(z, FAST)
        tl.store(out_ptr + row * channels, y.to(out_ptr.dtype.element_ty), inside)
    tl.store(_states_at(final_ptr, batch, d, n, channels, N), h, cell & (end == length))
