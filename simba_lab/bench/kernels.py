"""Kernels of the GPU backend beside their peers: every op checked at every size, then timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from simba_lab.bench import ops
from simba_lab.bench.floors import measure_ceilings
from simba_lab.bench.lines import Line, attempt, result
from simba_lab.bench.ops import Size
from simba_lab.bench.session import Session
from simba_lab.bench.subject import Subject, check, measure
from simba_lab.kernels import Backend, resolve

Entry = tuple[Callable[[Backend, Size, torch.device], Subject], Sequence[Size]]

# What a published shape asks of the op, and lengths that are no multiple of anything.
SCANNED = [
    Size(8, 2048, 1536),
    Size(8, 2047, 1536),
    Size(8, 1125, 1536),
    Size(1, 16384, 5120),
    Size(1, 16383, 5120),
]
_WIDE = [Size(8, 2048, 5120), Size(1, 16384, 5120)]
_STREAMS = [Size(8, 2048, 768), Size(8, 2047, 768), Size(8, 2048, 2560), Size(1, 16384, 2560)]
SUITE: dict[str, Entry] = {
    "scan": (ops.scan, SCANNED),
    "conv": (ops.conv, SCANNED),
    "conv-adjacent": (ops.adjacent, [*SCANNED[:1], *SCANNED[2:4]]),
    "norm": (ops.norm, _STREAMS),
    "impact": (ops.impact, _WIDE),
    "impact-absmax": (partial(ops.impact, reduce="absmax"), _WIDE[:1]),
    "impact-gated": (partial(ops.impact, reduce="gated"), _WIDE[:1]),
    "select": (ops.select, _WIDE),
    "keep": (ops.keep, _STREAMS[2:]),
    "keep-norm": (ops.keep_norm, _STREAMS[2:]),
}
# All gradients of all channels at once, in every dtype: more than an fp64 oracle can hold at full size.
ODD = Size(2, 301, 1000)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def bench_kernels(session: Session, suite: Mapping[str, Entry], odd: Size = ODD) -> dict[str, Any]:
    """The bench's JSON. An op with a red check gives no time at any size, only a line that says so."""
    backend = resolve(session.backend, session.device.type)
    session.progress("ceilings of the device")
    ceilings = session.given_ceilings or measure_ceilings(session.device)
    generator = torch.Generator(session.device).manual_seed(session.seed)
    lines: list[Line] = []
    for name, (make, sizes) in suite.items():
        session.progress(f"{name}: checks")
        small = [make(backend, replace(odd, dtype=dtype), session.device) for dtype in _DTYPES]
        subjects = [make(backend, size, session.device) for size in sizes]
        everything = [*(replace(subject, channel_axis={}) for subject in small), *subjects]
        red = attempt(name, partial(_check_all, everything, generator, session))
        lines += red
        for subject in [] if red else subjects:
            session.progress(subject.what)
            lines += attempt(subject.what, partial(measure, subject, generator, ceilings, 3 * session.repeats))
        so_far = result("kernels", lines, session.checks, backend=backend.name, seed=session.seed, ceilings=ceilings)
        session.keep(so_far)
    return so_far


def _check_all(subjects: Sequence[Subject], generator: torch.Generator, session: Session) -> list[Line]:
    """No line; the records of the checks go to the session. Raises RedCheck."""
    for subject in subjects:
        session.checks += check(subject, generator)
    return []
