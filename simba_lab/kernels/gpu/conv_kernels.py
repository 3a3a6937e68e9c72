"""Depthwise causal convolution with SiLU in Triton (Mamba, Gu & Dao 2023, section 3.4), forward and backward.

A program takes one block of channels of one piece (a stretch of consecutive tokens) of one sequence. It walks along
the piece in groups of tokens: all rows of a group are asked for before the first is used, and the last W-1 rows stay
in registers, so that memory sees every input once. Reductions have a fixed order: results do not change between runs.

Where tokens are missing, ``neighbours`` (B, L) counts for every token those directly before it that were directly
before it in the text: a tap that would reach further sees nothing. Without it (None) all are neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _taps(weight, d, inside, W: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Columns of ``weight`` (D, W) as a tuple, read along the rows: a column by itself is a strided read."""
    PADDED: tl.constexpr = 2 if W == 2 else 4
    tap = tl.arange(0, PADDED)
    tile = tl.load(weight + d[:, None] * W + tap[None, :], mask=inside[:, None] & (tap[None, :] < W), other=0).to(ACC)
    if W == 2:
        zeroth, first = tl.split(tile)
        taps = (zeroth, first)
    else:
        even, odd = tl.split(tl.reshape(tile, (BLOCK, 2, 2)))
        zeroth, second = tl.split(even)
        first, third = tl.split(odd)
        taps = (zeroth, first, second, third)
    return taps


@triton.jit
def _row(x, initial, i, token, x_row, d, inside, channels, W: tl.constexpr):
    """Inputs of ``token``, the piece's i-th: those of x, before token 0 the initial ones, and zeros before those."""
    row = tl.load(x + i * x_row + d, mask=inside & (token >= 0), other=0)
    if initial is not None:
        early = (token < 0) & (token > -W)
        row = tl.where(
            early, tl.load(initial + (token + W - 1) * channels + d, mask=inside & early, other=0).to(row.dtype), row
        )
    return row


@triton.jit
def _known(neighbours, token, length, W: tl.constexpr):
    """True neighbours of ``token``, a scalar; without any counts, as many as a tap can reach."""
    if neighbours is not None:
        known = tl.load(neighbours + token, mask=(token >= 0) & (token < length), other=0).to(tl.int32)
    else:
        known = tl.full((), W, tl.int32)
    return known


@triton.jit
def _across(value, known, distance: tl.constexpr, ADJACENT: tl.constexpr):
    """``value`` of a token ``distance`` away, or zeros if it is a stranger; chosen, since strangers may hold NaN."""
    if ADJACENT and distance > 0:
        value = tl.where(known >= distance, value, 0)
    return value


@triton.jit
def _sigmoid(x):
    """The square of a reciprocal root instead of a quotient: one special-function instruction without its guards."""
    root = tl.rsqrt(1 + tl.exp(-x))
    return root * root


@triton.jit
def _preactivation(rows, known, taps, offset, at: tl.constexpr, W: tl.constexpr, ADJACENT: tl.constexpr):
    """Bias plus the weighted sum of W rows, the oldest of which is ``rows[at]``, so far as the last knows them."""
    total = offset
    for tap in tl.static_range(W):
        total += _across(rows[at + tap], known, W - 1 - tap, ADJACENT).to(offset.dtype) * taps[tap]
    return total


@triton.jit
def _before_silu(rows, known, dout, taps, offset, at: tl.constexpr, W: tl.constexpr, ADJACENT: tl.constexpr):
    """Gradient before SiLU from the one after it; the sum that went into SiLU is computed again."""
    total = _preactivation(rows, known, taps, offset, at, W, ADJACENT)
    opened = _sigmoid(total)
    return dout.to(offset.dtype) * opened * (1 + total * (1 - opened))


@triton.jit(do_not_specialize=["length", "span"])
def convolve(
    x, weight, bias, initial, neighbours, out, last, length, channels, span, x_batch, x_row,
    W: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output (B, L, D) and the last W-1 inputs (B, W-1, D); grid (blocks of channels x pieces, B)."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    ADJACENT: tl.constexpr = neighbours is not None
    blocks = tl.cdiv(channels, BLOCK)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) // blocks * span
    batch = tl.program_id(1).to(tl.int64)
    inside = d < channels
    x += batch * x_batch + first.to(tl.int64) * x_row
    out += (batch * length + first) * channels
    if initial is not None:
        initial += batch * (W - 1) * channels
    if ADJACENT:
        neighbours += batch * length
    taps = _taps(weight, d, inside, W, BLOCK, ACC)
    offset = tl.load(bias + d, mask=inside, other=0).to(ACC)
    rows = ()
    for k in tl.static_range(W - 1):
        rows = rows + (_row(x, initial, k + 1 - W, first + k + 1 - W, x_row, d, inside, channels, W),)
    for start in range(0, tl.minimum(span, length - first), GROUP):
        counts = ()
        for k in tl.static_range(GROUP):
            wanted = inside & (first + start + k < length)
            rows = rows + (tl.load(x + (start + k) * x_row + d, mask=wanted, other=0),)
            counts = counts + (_known(neighbours, first + start + k, length, W),)
        for k in tl.static_range(GROUP):
            total = _preactivation(rows, counts[k], taps, offset, k, W, ADJACENT)
            y = (total * _sigmoid(total)).to(out.dtype.element_ty)
            tl.store(out + (start + k) * channels + d, y, mask=inside & (first + start + k < length))
        rows = rows[GROUP:]
    if first + span >= length:
        last += batch * (W - 1) * channels
        known = _known(neighbours, length - 1, length, W)
        for k in tl.static_range(W - 1):
            token = length + k + 1 - W
            row = _row(x, initial, token - first, token, x_row, d, inside, channels, W)
            tl.store(last + k * channels + d, _across(row, known, W - 2 - k, ADJACENT), mask=inside)


@triton.jit(do_not_specialize=["length", "span"])
def convolve_backward(
    x, weight, bias, initial, neighbours, dout, dlast, dx, dinitial, partial, length, channels, span,
    x_batch, x_row, dout_batch, dout_row,
    W: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x and initial, and per piece those of weight and bias: partial (pieces, W + 1, D), bias last.

    The gradient of an input is known once the W-1 tokens after it have been seen. A piece that holds the tokens
    t, .. therefore writes the inputs t-(W-1), ..: the first piece those of ``initial`` too, and pieces together run
    W-1 tokens past the end. Grid (blocks of channels x pieces, B).
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    ADJACENT: tl.constexpr = neighbours is not None
    blocks = tl.cdiv(channels, BLOCK)
    piece = tl.program_id(0) // blocks
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = piece * span
    batch = tl.program_id(1).to(tl.int64)
    inside = d < channels
    x += batch * x_batch + first.to(tl.int64) * x_row
    dout += batch * dout_batch + first.to(tl.int64) * dout_row
    dx += (batch * length + first) * channels
    if initial is not None:
        initial += batch * (W - 1) * channels
        dinitial += batch * (W - 1) * channels
    if dlast is not None:
        dlast += batch * (W - 1) * channels
    if ADJACENT:
        neighbours += batch * length
    newest = _known(neighbours, length - 1, length, W)
    taps = _taps(weight, d, inside, W, BLOCK, ACC)
    offset = tl.load(bias + d, mask=inside, other=0).to(ACC)
    # The W-1 tokens before the piece. The first piece has none; the others are too far from token 0 to need initial.
    # The last piece may begin behind the end: what lies there must not be read, for nothing times NaN is NaN.
    rows, inner, counts, dtaps = (), (), (), ()
    for k in tl.static_range(2 * W - 2):
        i = k + 2 - 2 * W
        rows = rows + (tl.load(x + i * x_row + d, mask=inside & (first + i >= 0) & (first + i < length), other=0),)
    for k in tl.static_range(W - 1):
        i = k + 1 - W
        slope = tl.load(dout + i * dout_row + d, mask=inside & (first + i >= 0) & (first + i < length), other=0)
        counts = counts + (_known(neighbours, first + i, length, W),)
        inner = inner + (_before_silu(rows, counts[k], slope, taps, offset, k, W, ADJACENT),)
    rows = ()
    for k in tl.static_range(W - 1):
        token = first + k + 1 - W
        rows = rows + (_row(x, initial, k + 1 - W, token, x_row, d, inside & (token < length), channels, W),)
    for _ in tl.static_range(W):
        dtaps = dtaps + (tl.zeros((BLOCK,), ACC),)
    dbias = tl.zeros((BLOCK,), ACC)
    for start in range(0, tl.minimum(span, length + W - 1 - first), GROUP):
        slopes = ()
        for k in tl.static_range(GROUP):
            wanted = inside & (first + start + k < length)
            rows = rows + (tl.load(x + (start + k) * x_row + d, mask=wanted, other=0),)
            slopes = slopes + (tl.load(dout + (start + k) * dout_row + d, mask=wanted, other=0),)
            counts = counts + (_known(neighbours, first + start + k, length, W),)
        for k in tl.static_range(GROUP):
            known = counts[k + W - 1]
            inner = inner + (_before_silu(rows, known, slopes[k], taps, offset, k, W, ADJACENT),)
            dbias += inner[k + W - 1]
            sums = ()
            for tap in tl.static_range(W):
                row = _across(rows[k + tap], known, W - 1 - tap, ADJACENT).to(ACC)
                sums = sums + (dtaps[tap] + inner[k + W - 1] * row,)
            dtaps = sums
            i = start + k + 1 - W
            source = first + i
            dinput = inner[k] * taps[W - 1]
            for tap in tl.static_range(1, W):
                dinput += _across(inner[k + tap], counts[k + tap], tap, ADJACENT) * taps[W - 1 - tap]
            if dlast is not None:
                at = source - length + W - 1
                given = inside & (at >= 0) & (source < length)
                if ADJACENT:
                    given = given & (newest >= length - 1 - source)
                dinput += tl.load(dlast + at * channels + d, mask=given, other=0).to(ACC)
            kept = inside & (source >= 0) & (source < length)
            tl.store(dx + i * channels + d, dinput.to(dx.dtype.element_ty), mask=kept)
            if initial is not None:
                early = inside & (source < 0)
                to = dinitial + (source + W - 1) * channels + d
                tl.store(to, dinput.to(dinitial.dtype.element_ty), mask=early)
        rows = rows[GROUP:]
        inner = inner[GROUP:]
        counts = counts[GROUP:]
    pieces = tl.num_programs(0) // blocks
    partial += (batch * pieces + piece) * (W + 1) * channels
    for tap in tl.static_range(W):
        tl.store(partial + tap * channels + d, dtaps[tap], mask=inside)
    tl.store(partial + W * channels + d, dbias, mask=inside)


@triton.jit
def add_up(
    partial, dweight, dbias, parts, channels, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums ``partial`` (parts, W + 1, D) over its parts into dweight (D, W) and dbias (D,); grid (blocks, W + 1)."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tap = tl.program_id(1)
    inside = d < channels
    total = tl.zeros((ROWS, BLOCK), partial.dtype.element_ty)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        at = (part.to(tl.int64) * (W + 1) + tap) * channels
        total += tl.load(partial + at[:, None] + d[None, :], mask=(part < parts)[:, None] & inside[None, :], other=0)
    gradient = tl.sum(total, 0)
    tl.store(dweight + d * W + tap, gradient.to(dweight.dtype.element_ty), mask=inside & (tap < W))
    tl.store(dbias + d, gradient.to(dbias.dtype.element_ty), mask=inside & (tap == W))
