"""Kernels: each named op has a readable reference, fast versions and a cost.

Modules never pick an implementation. They call the ops of a :class:`Backend`, resolved once by :func:`resolve`; a
backend that is asked for by name and cannot run here is an error, only ``auto`` may choose.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, partial

import torch

from simba_lab.errors import InputError


@dataclass(frozen=True)
class Backend:
    """One implementation of every op; signatures and meaning are those of :mod:`simba_lab.kernels.reference`.

    ``scored_scan`` is a scan that scores tokens by their global impact on its way; None where that would save nothing.
    """

    name: str
    linear: Callable
    add_rms_norm: Callable
    selective_scan: Callable
    scored_scan: Callable | None
    causal_conv: Callable
    neighbour_conv: Callable
    true_neighbours: Callable
    global_impact: Callable
    ssd: Callable
    ssd_impact: Callable
    gated_rms_norm: Callable
    select_tokens: Callable
    keep_tokens: Callable
    keep_add_rms_norm: Callable
    cross_entropy: Callable


def _reference_reason(device: str) -> str | None:
    return None


def _triton_reason(device: str) -> str | None:
    if device != "cuda":
        return f"compiles for CUDA devices, not for {device}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; it comes with the CUDA build of torch"
    return None


def _numba_reason(device: str) -> str | None:
    if device not in ("cpu", "meta"):
        return f"compiles for CPUs, not for {device}"
    if importlib.util.find_spec("numba") is None:
        return "the package numba is not installed"
    return None


@cache
def _import_failure(module: str) -> str | None:
    """Why ``module`` cannot be imported, in one line; None if it can. Compiled extensions fail in many ways."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _peer_reason(package: str, modules: tuple[str, ...], device: str) -> str | None:
    """A peer needs its own package, installed and intact, and Triton for every op that it lacks."""
    if device != "cuda":
        return f"compiles for CUDA devices, not for {device}"
    if importlib.util.find_spec(modules[0].split(".")[0]) is None:
        return f"the package {package} is not installed"
    failure = next(filter(None, map(_import_failure, modules)), None)
    return _triton_reason(device) if failure is None else f"the package {package} cannot be imported: {failure}"


_MAMBA_SSM = ("mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.ssd_combined")

# Name -> (module with the ops, why it cannot run on a device or None). Fastest first: ``auto`` takes the first usable,
# and nothing behind the reference, which always is.
_BACKENDS: dict[str, tuple[str, Callable[[str], str | None]]] = {
    "triton": ("simba_lab.kernels.gpu", _triton_reason),
    "numba": ("simba_lab.kernels.cpu", _numba_reason),
    "reference": ("simba_lab.kernels.reference", _reference_reason),
    "mamba_ssm": ("simba_lab.kernels.peers.mamba_ssm", partial(_peer_reason, "mamba-ssm", _MAMBA_SSM)),
    "causal_conv1d": (
        "simba_lab.kernels.peers.causal_conv1d", partial(_peer_reason, "causal-conv1d", ("causal_conv1d",)),
    ),
}  # fmt: skip


def backend_names() -> list[str]:
    return ["auto", *_BACKENDS]


def available_backends(device: str | None = None) -> dict[str, str | None]:
    """Backend name -> None if it runs on ``device`` (default: CUDA if there is one, else CPU), else the reason."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {name: reason(device) for name, (_, reason) in _BACKENDS.items()}


def check_name(name: str) -> None:
    """Raises InputError for a backend nobody knows; whether a known one can run is decided per device."""
    if name not in backend_names():
        raise InputError(f"backend: {name!r} is unknown; use one of {', '.join(backend_names())}")


def resolve(name: str, device: str) -> Backend:
    """The backend ``name`` for a device type (``cpu``, ``cuda``, ``meta``).

    Raises InputError for an unknown name or a named backend that cannot run there.
    """
    check_name(name)
    if name == "auto":
        name = next(known for known, (_, reason) in _BACKENDS.items() if reason(device) is None)
    reason = _BACKENDS[name][1](device)
    if reason is not None:
        raise InputError(f"backend: {name!r} cannot run on {device}: {reason}")
    module = importlib.import_module(_BACKENDS[name][0])
    ops = (field.name for field in fields(Backend) if field.name != "name")
    return Backend(name, **{op: getattr(module, op) for op in ops})
