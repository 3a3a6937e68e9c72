"""One number of threads for torch and Numba."""

from __future__ import annotations

import torch


def use_torch_threads() -> None:
    """Numba follows ``torch.set_num_threads``, so that one setting rules the process; freed memory stays in it."""
    import numba

    from simba_lab.kernels.cpu.memory import keep_freed

    keep_freed()

    threads = torch.get_num_threads()
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if torch.get_num_threads() != threads:  # Numba's OpenMP pool, started just now, has set torch's number to its own
        torch.set_num_threads(threads)
