"""What a chunk of the Mamba-2 scan does entry by entry, between its matrix products; for CPUs, compiled by Numba.

The decay from token s to a later t is exp of a difference of running sums. The sums are fp64 in any case: a long run
of large steps would leave their fp32 difference without digits where the small steps behind it need them.
"""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.compiled import kernel
from simba_lab.kernels.cpu.denormals import flush_denormals, restore_denormals
from simba_lab.kernels.cpu.elementary import exp

ROWS = 16


@kernel
def weigh(logs, scores, weights):
    """``weights`` (B, H, q, q): ``scores`` (B, G, q, q) times the decay from column to row, 0 above the diagonal.

    ``logs`` (B, H, q), fp64: running sums of delta A, the token's own included.
    """
    batch, heads, length = logs.shape
    per_group = heads // scores.shape[1]
    cast = weights.dtype.type
    for job in numba.prange(batch * heads):
        i, h = job // heads, job % heads
        log, before = logs[i, h], flush_denormals()
        for t in range(length):
            row, score = weights[i, h, t], scores[i, h // per_group, t]
            for s in range(t + 1):
                row[s] = exp(cast(log[t] - log[s])) * score[s]
            row[t + 1 :] = 0
        restore_denormals(before)


@kernel
def spread(logs, scores, dweights, dscores, rows, columns):
    """Gradients of ``scores`` (B, G, q, q), and sums of ``dweights`` times weights for t > s.

    ``rows`` (B, H, q) sums over s; ``columns`` (blocks, B, H, q) over the t of each block, to be added up. Both fp64:
    who takes their difference wants paths that both count to cancel.
    """
    batch, heads, length = logs.shape
    blocks, groups = columns.shape[0], scores.shape[1]
    per_group = heads // groups
    cast = scores.dtype.type
    for job in numba.prange(batch * groups * blocks):
        i, g, block = job // (groups * blocks), job // blocks % groups, job % blocks
        before = flush_denormals()
        columns[block, i, g * per_group : (g + 1) * per_group] = 0
        for t in range(block * ROWS, min(length, (block + 1) * ROWS)):
            score, dscore = scores[i, g, t], dscores[i, g, t]
            dscore[:] = 0
            for h in range(g * per_group, (g + 1) * per_group):
                log, dweight, column = logs[i, h], dweights[i, h, t], columns[block, i, h]
                total = 0.0
                for s in range(t):
                    share = dweight[s] * exp(cast(log[t] - log[s]))
                    dscore[s] += share
                    path = np.float64(share * score[s])
                    column[s] += path
                    total += path
                dscore[t] += dweight[t]
                rows[i, h, t] = total
        restore_denormals(before)
