"""Depthwise causal convolution with SiLU in Triton (Mamba, Gu & Dao 2023, section 3.4), forward and backward.

A program takes one block of channels of one piece (a stretch of consecutive tokens) of one sequence. It walks along
the piece in groups of tokens: all rows of a group are asked for before the first is used, and the last W-1 rows stay
in registers, so that memory sees every input once. Reductions have a fixed order: results do not change between runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from simba_lab.errors import InputError
from simba_lab.kernels.gpu.launch import last_contiguous


@dataclass(frozen=True)
class Tiling:
    """Tokens per group, most tokens per piece, and the number of programs up to which pieces are made shorter."""

    group: int
    longest: int
    programs: int


BLOCK = 512  # channels per program
FORWARD = Tiling(group=8, longest=32, programs=4096)
# Every piece of the backward leaves partial sums for weight and bias, hence longer pieces.
BACKWARD = Tiling(group=8, longest=128, programs=1024)
_WIDTHS = (2, 3, 4)


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
def _sigmoid(x):
    """The square of a reciprocal root instead of a quotient: one special-function instruction without its guards."""
    root = tl.rsqrt(1 + tl.exp(-x))
    return root * root


@triton.jit
def _preactivation(rows, taps, offset, at: tl.constexpr, W: tl.constexpr):
    """Bias plus the weighted sum of W rows, the oldest of which is ``rows[at]``."""
    total = offset
    for tap in tl.static_range(W):
        total += rows[at + tap].to(offset.dtype) * taps[tap]
    return total


@triton.jit
def _before_silu(rows, dout, taps, offset, at: tl.constexpr, W: tl.constexpr):
    """Gradient before SiLU from the one after it; the sum that went into SiLU is computed again."""
    total = _preactivation(rows, taps, offset, at, W)
    opened = _sigmoid(total)
    return dout.to(offset.dtype) * opened * (1 + total * (1 - opened))


@triton.jit(do_not_specialize=["length", "span"])
def _forward_kernel(
    x, weight, bias, initial, out, last, length, channels, span, x_batch, x_row,
    W: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output (B, L, D) and the last W-1 inputs (B, W-1, D); grid (blocks of channels x pieces, B)."""
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    blocks = tl.cdiv(channels, BLOCK)
    d = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(0) // blocks * span
    batch = tl.program_id(1).to(tl.int64)
    inside = d < channels
    x += batch * x_batch + first.to(tl.int64) * x_row
    out += (batch * length + first) * channels
    if initial is not None:
        initial += batch * (W - 1) * channels
    taps = _taps(weight, d, inside, W, BLOCK, ACC)
    offset = tl.load(bias + d, mask=inside, other=0).to(ACC)
    rows = ()
    for k in tl.static_range(W - 1):
        rows = rows + (_row(x, initial, k + 1 - W, first + k + 1 - W, x_row, d, inside, channels, W),)
    for start in range(0, tl.minimum(span, length - first), GROUP):
        for k in tl.static_range(GROUP):
            wanted = inside & (first + start + k < length)
            rows = rows + (tl.load(x + (start + k) * x_row + d, mask=wanted, other=0),)
        for k in tl.static_range(GROUP):
            total = _preactivation(rows, taps, offset, k, W)
            y = (total * _sigmoid(total)).to(out.dtype.element_ty)
            tl.store(out + (start + k) * channels + d, y, mask=inside & (first + start + k < length))
        rows = rows[GROUP:]
    if first + span >= length:
        last += batch * (W - 1) * channels
        for k in tl.static_range(W - 1):
            token = length + k + 1 - W
            row = _row(x, initial, token - first, token, x_row, d, inside, channels, W)
            tl.store(last + k * channels + d, row, mask=inside)


@triton.jit(do_not_specialize=["length", "span"])
def _backward_kernel(
    x, weight, bias, initial, dout, dlast, dx, dinitial, partial, length, channels, span,
    x_batch, x_row, dout_batch, dout_row,
    W: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of x and initial, and per piece those of weight and bias: partial (pieces, W + 1, D), bias last.

    The gradient of an input is known once the W-1 tokens after it have been seen. A piece that holds the tokens
    t, .. therefore writes the inputs t-(W-1), ..: the first piece those of ``initial`` too, and pieces together run
    W-1 tokens past the end. Grid (blocks of channels x pieces, B).
    """
    ACC: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
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
    taps = _taps(weight, d, inside, W, BLOCK, ACC)
    offset = tl.load(bias + d, mask=inside, other=0).to(ACC)
    # The W-1 tokens before the piece. The first piece has none; the others are too far from token 0 to need initial.
    # The last piece may begin behind the end: what lies there must not be read, for nothing times NaN is NaN.
    rows, inner, dtaps = (), (), ()
    for k in tl.static_range(2 * W - 2):
        i = k + 2 - 2 * W
        rows = rows + (tl.load(x + i * x_row + d, mask=inside & (first + i >= 0) & (first + i < length), other=0),)
    for k in tl.static_range(W - 1):
        i = k + 1 - W
        slope = tl.load(dout + i * dout_row + d, mask=inside & (first + i >= 0) & (first + i < length), other=0)
        inner = inner + (_before_silu(rows, slope, taps, offset, k, W),)
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
        for k in tl.static_range(GROUP):
            inner = inner + (_before_silu(rows, slopes[k], taps, offset, k, W),)
            dbias += inner[k + W - 1]
            sums = ()
            for tap in tl.static_range(W):
                sums = sums + (dtaps[tap] + inner[k + W - 1] * rows[k + tap].to(ACC),)
            dtaps = sums
            i = start + k + 1 - W
            source = first + i
            dinput = inner[k] * taps[W - 1]
            for tap in tl.static_range(1, W):
                dinput += inner[k + tap] * taps[W - 1 - tap]
            if dlast is not None:
                at = source - length + W - 1
                given = inside & (at >= 0) & (source < length)
                dinput += tl.load(dlast + at * channels + d, mask=given, other=0).to(ACC)
            kept = inside & (source >= 0) & (source < length)
            tl.store(dx + i * channels + d, dinput.to(dx.dtype.element_ty), mask=kept)
            if initial is not None:
                early = inside & (source < 0)
                to = dinitial + (source + W - 1) * channels + d
                tl.store(to, dinput.to(dinitial.dtype.element_ty), mask=early)
        rows = rows[GROUP:]
        inner = inner[GROUP:]
    pieces = tl.num_programs(0) // blocks
    partial += (batch * pieces + piece) * (W + 1) * channels
    for tap in tl.static_range(W):
        tl.store(partial + tap * channels + d, dtaps[tap], mask=inside)
    tl.store(partial + W * channels + d, dbias, mask=inside)


@triton.jit
def _reduce_kernel(
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


def _layout(batch: int, tokens: int, channels: int, tiling: Tiling, per_thread: int) -> tuple[int, int, int, int]:
    """Channels per program, tokens per piece, pieces of a sequence and warps: fixed by the shape alone."""
    block = min(BLOCK, triton.next_power_of_2(channels))
    span = triton.next_power_of_2(batch * tokens * triton.cdiv(channels, block) // tiling.programs)
    span = min(tiling.longest, max(tiling.group, span))
    return block, span, max(1, triton.cdiv(tokens, span)), max(1, block // (32 * per_thread))


@torch.library.custom_op("simba_lab::causal_conv_triton", mutates_args=())
def _conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, length, channels = x.shape
    width = weight.shape[1]
    out, last = x.new_empty(batch, length, channels), x.new_empty(batch, width - 1, channels)
    if last.numel() == 0:
        return out, last
    x = last_contiguous(x)
    group = min(FORWARD.group, triton.next_power_of_2(max(1, length)))
    block, span, pieces, warps = _layout(batch, length, channels, FORWARD, per_thread=16 // x.element_size())
    with torch.cuda.device_of(x):
        _forward_kernel[(triton.cdiv(channels, block) * pieces, batch)](
            x, weight.contiguous(), bias.contiguous(), None if initial is None else initial.contiguous(), out, last,
            length, channels, span, x.stride(0), x.stride(1), width, group, block, num_warps=warps,
        )  # fmt: skip
    return out, last


@_conv.register_fake
def _(x, weight, bias, initial):  # noqa: ANN001, ANN202
    batch, _, channels = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, weight.shape[1] - 1, channels)


@torch.library.custom_op("simba_lab::causal_conv_triton_backward", mutates_args=())
def _conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None, dout: Tensor, dlast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    width = weight.shape[1]
    dx, dweight, dbias, dinitial = _gradients_like(x, weight, bias, initial)
    if batch * channels == 0:
        return dx, dweight.zero_(), dbias.zero_(), dinitial
    x, dout = last_contiguous(x), last_contiguous(dout)
    # Four channels per thread: the sums and windows of eight do not fit into registers.
    block, span, pieces, warps = _layout(batch, length + width - 1, channels, BACKWARD, per_thread=4)
    partial = x.new_empty(batch * pieces, width + 1, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    with torch.cuda.device_of(x):
        _backward_kernel[(triton.cdiv(channels, block) * pieces, batch)](
            x, weight.contiguous(), bias.contiguous(), None if initial is None else initial.contiguous(), dout,
            None if dlast is None else dlast.contiguous(), dx, None if initial is None else dinitial, partial,
            length, channels, span, x.stride(0), x.stride(1), dout.stride(0), dout.stride(1), width,
            BACKWARD.group, block, num_warps=warps,
        )  # fmt: skip
        _reduce_kernel[(triton.cdiv(channels, 64), width + 1)](
            partial, dweight, dbias, batch * pieces, channels, width, ROWS=32, BLOCK=64
        )
    return dx, dweight, dbias, dinitial


def _gradients_like(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None) -> tuple[Tensor, ...]:
    """Unfilled gradients, contiguous; that of a missing ``initial`` is empty."""
    dinitial = x.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dinitial


@_conv_backward.register_fake
def _(x, weight, bias, initial, dout, dlast):  # noqa: ANN001, ANN202
    return _gradients_like(x, weight, bias, initial)


def _context(ctx, inputs, output) -> None:  # noqa: ANN001
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _gradients(ctx, dout, dlast):  # noqa: ANN001, ANN202
    x, weight, bias, initial = ctx.saved_tensors
    dout = x.new_zeros(x.shape) if dout is None else dout
    dx, dweight, dbias, dinitial = _conv_backward(x, weight, bias, initial, dout, dlast)
    return dx, dweight, dbias, None if initial is None else dinitial


_conv.register_autograd(_gradients, setup_context=_context)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor, initial: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """See :func:`simba_lab.kernels.reference.causal_conv`: ``x`` (B, L, D), ``weight`` (D, W), W from 2 to 4.

    Raises InputError for other widths.
    """
    if weight.shape[1] not in _WIDTHS:
        raise InputError(f"d_conv: the triton backend takes 2, 3 or 4, not {weight.shape[1]}; use another backend")
    return _conv(x, weight, bias, initial)
