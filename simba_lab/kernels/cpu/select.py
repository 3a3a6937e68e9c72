"""The tokens that go on, one sequence after the other, for CPUs, compiled by Numba: no full sort."""

from __future__ import annotations

import numba
import numpy as np

from simba_lab.kernels.cpu.compiled import kernel


@kernel
def select(scores, protected, positions, chosen, kept):
    """``chosen`` and ``kept`` (B, k): indices of the highest of ``scores`` (B, L), ascending, and their ``positions``.

    The ``protected`` newest win against everything and NaN loses against all. The k-th highest is a threshold; of the
    tokens that equal it the latest fill what those above leave free.
    """
    tokens, k = scores.shape[1], chosen.shape[1]
    for i in numba.prange(scores.shape[0]):
        ranked = scores[i].copy()
        ranked[np.isnan(ranked)] = -np.inf
        ranked[tokens - protected :] = np.inf
        limit, above, equal = np.partition(ranked, tokens - k)[tokens - k], 0, 0
        for t in range(tokens):
            above += ranked[t] > limit
            equal += ranked[t] == limit
        losing, to = equal - (k - above), 0
        for t in range(tokens):
            if ranked[t] == limit and losing > 0:
                losing -= 1
            elif ranked[t] >= limit:
                chosen[i, to], kept[i, to] = t, positions[i, t]
                to += 1
