"""What the hardware allows: ceilings of a device, and the least time that given work can take on it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import torch

from simba_lab.bench.timing import time_calls

# Per multiprocessor and clock of compute capability 8.0 and 9.0 (CUDA programming guide, arithmetic throughput): fp32
# results of one instruction, doubled below for multiply-adds, and results of the special function unit.
_FP32_LANES = {(8, 0): 64}
_FP32_LANES_DEFAULT = 128
_SPECIAL_RESULTS = 16
_COPIED_BYTES = 1 << 30
_MATRIX_SIDE = 8192


@dataclass(frozen=True)
class Work:
    """The least that an op must do: each input read once, each output written once, and its arithmetic.

    matrix_flops run in the matrix units, flops in fp32 outside of them, exps (exponentials, logarithms, reciprocals)
    in the special function units.
    """

    bytes: int
    matrix_flops: int = 0
    flops: int = 0
    exps: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.bytes + other.bytes,
            self.matrix_flops + other.matrix_flops,
            self.flops + other.flops,
            self.exps + other.exps,
        )


@dataclass(frozen=True)
class Ceilings:
    """Rates per second; the names are those of :class:`Work`."""

    bytes: float
    matrix_flops: float
    flops: float
    exps: float


@dataclass(frozen=True)
class Floor:
    """Least milliseconds and which ceiling sets them."""

    ms: float
    bound: str


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """The slowest part of the work, as if all others ran beside it."""
    parts = ("bytes", "matrix_flops", "flops", "exps")
    ms, bound = max((1e3 * getattr(work, part) / getattr(ceilings, part), part) for part in parts)
    return Floor(ms, bound)


def floor_of_sequence(works: list[Work], ceilings: Ceilings) -> Floor:
    """Ops that run one after the other: their floors add up; the bound is that of the largest share."""
    floors = [floor(work, ceilings) for work in works]
    shares: dict[str, float] = {}
    for part in floors:
        shares[part.bound] = shares.get(part.bound, 0.0) + part.ms
    return Floor(sum(shares.values()), max(shares, key=shares.__getitem__))


def measure_ceilings(device: torch.device) -> Ceilings:
    """Bandwidth and bf16 matrix rate measured now, on random data; the other two from multiprocessors and clock."""
    source = torch.randn(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, repeats=20)
    a, b = (torch.randn(_MATRIX_SIDE, _MATRIX_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = time_calls([lambda: a @ b], device, repeats=20)
    properties = torch.cuda.get_device_properties(device)
    ticks = properties.multi_processor_count * sm_clock_hz(device)
    lanes = _FP32_LANES.get((properties.major, properties.minor), _FP32_LANES_DEFAULT)
    return Ceilings(
        bytes=2e3 * _COPIED_BYTES / copy.median,
        matrix_flops=2e3 * _MATRIX_SIDE**3 / product.median,
        flops=2 * lanes * ticks,
        exps=_SPECIAL_RESULTS * ticks,
    )


def sm_clock_hz(device: torch.device) -> float:
    """Highest clock of the multiprocessors."""
    return 1e6 * float(ask_driver("clocks.max.sm", device))


def ask_driver(field: str, device: torch.device) -> str:
    """One field of ``nvidia-smi --query-gpu``. Raises RuntimeError where the tool does not answer."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={index}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"nvidia-smi does not tell {field}: {error}") from error
    return done.stdout.strip()
