"""Kernels of other packages as backends: chosen by name, never by ``auto``; what they lack is Triton's of ours."""
