"""The ops of the GPU bench at given sizes, each with oracle, peer and least work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from simba_lab.bench.floors import Work
from simba_lab.bench.lines import Target, package_version
from simba_lab.bench.subject import Outputs, Peer, Subject, Tensors
from simba_lab.kernels import Backend, reference

# Beyond one exponential per state: two for the softplus of the step size, one for the gate.
_SCAN_EXPS = 3
_WIDTH = 4
_EPS = 1e-5
# Oracles that hold (batch, length, channel, state) at once take this many channels at a time.
_CHUNK = 256


@dataclass(frozen=True)
class Size:
    """Activations (batch, length, channels) and states per channel."""

    batch: int
    length: int
    channels: int
    states: int = 16
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.batch} x {self.length} x {self.channels}, {str(self.dtype).removeprefix('torch.')}"

    @property
    def cells(self) -> int:
        return self.batch * self.length * self.channels

    @property
    def bytes(self) -> int:
        """Of one activation."""
        return self.cells * self.dtype.itemsize


def missing(module: str, package: str) -> str | None:
    """Why a peer cannot run here; None if it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        return f"{package} cannot be imported: {error}"
    return None


def peer_name(package: str) -> str:
    version = package_version(package)
    return f"{package} {version}" if version else package


def scan(backend: Backend, size: Size, device: torch.device) -> Subject:
    """Selective scan with step size, skip and gate fused, beside mamba-ssm's; x is its own tensor, the rest slices."""

    def draw(generator: torch.Generator) -> Tensors:
        normal = _normal(generator, device, size.dtype)
        wide = normal(size.batch, size.length, 2 * size.channels)
        vectors = normal(size.batch, size.length, 2 * size.states + 8)
        rates = torch.arange(1, size.states + 1, device=device, dtype=torch.float32).repeat(size.channels, 1)
        return {
            "x": normal(size.batch, size.length, size.channels),
            "dt": normal(size.batch, size.length, size.channels),
            "dt_bias": torch.randn(size.channels, generator=generator, device=device) - 4,
            "A": -rates * (0.5 + torch.rand(rates.shape, generator=generator, device=device)),
            "B": vectors[..., 8 : 8 + size.states],
            "C": vectors[..., 8 + size.states :],
            "D": torch.randn(size.channels, generator=generator, device=device),
            "z": wide[..., size.channels :],
        }

    order = ("x", "dt", "dt_bias", "A", "B", "C", "D", "z")
    exps = size.cells * (size.states + _SCAN_EXPS)
    flops = 9 * size.cells * size.states
    vectors = 2 * size.batch * size.length * size.states * size.dtype.itemsize
    return Subject(
        what=f"selective scan, {size}",
        draw=draw,
        ours=lambda t: (backend.selective_scan(*(t[name] for name in order))[0],),
        oracle=lambda t: (reference.selective_scan(*(t[name] for name in order))[0],),
        forward=Work(4 * size.bytes + vectors, flops=flops, exps=exps),
        backward=Work(7 * size.bytes + 2 * vectors, flops=2 * flops, exps=exps),
        peer=_scan_peer(),
        differentiated=order,
        channel_axis={"x": 2, "dt": 2, "dt_bias": 0, "A": 0, "D": 0, "z": 2},
        targets=(Target(2.0), Target(1.5)),
    )


def _scan_peer() -> Peer:
    name, reason = peer_name("mamba-ssm"), missing("mamba_ssm.ops.selective_scan_interface", "mamba-ssm")
    if reason is not None:
        return Peer(name, missing=reason)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    def call(t: Tensors) -> Outputs:
        out = selective_scan_fn(
            t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], z=t["z"], delta_bias=t["dt_bias"], delta_softplus=True
        )
        return (out,)

    return Peer(name, _channels_second, call, lambda out: out.transpose(1, 2))


def conv(backend: Backend, size: Size, device: torch.device) -> Subject:
    """Depthwise causal convolution with SiLU beside causal-conv1d's; x is a slice of a wider tensor."""
    return Subject(
        what=f"causal conv, {size}",
        draw=_conv_inputs(size, device),
        ours=lambda t: (backend.causal_conv(t["x"], t["weight"], t["bias"])[0],),
        oracle=lambda t: (reference.causal_conv(t["x"], t["weight"], t["bias"])[0],),
        forward=Work(2 * size.bytes, flops=2 * _WIDTH * size.cells, exps=2 * size.cells),
        backward=Work(3 * size.bytes, flops=6 * _WIDTH * size.cells, exps=2 * size.cells),
        peer=_conv_peer(),
        differentiated=("x", "weight", "bias"),
        channel_axis={"x": 2, "weight": 0, "bias": 0},
    )


def _conv_inputs(size: Size, device: torch.device) -> Callable[[torch.Generator], Tensors]:
    def draw(generator: torch.Generator) -> Tensors:
        normal = _normal(generator, device, size.dtype)
        return {
            "x": normal(size.batch, size.length, 2 * size.channels)[..., : size.channels],
            "weight": normal(size.channels, _WIDTH),
            "bias": normal(size.channels),
        }

    return draw


def adjacent(backend: Backend, size: Size, device: torch.device) -> Subject:
    """The same of true neighbours, of which most tokens have lost some, beside the reference's torch ops."""
    shared = conv(backend, size, device)

    def draw(generator: torch.Generator) -> Tensors:
        known = torch.randint(_WIDTH, (size.batch, size.length), generator=generator, device=device)
        first = torch.arange(size.length, device=device)
        return shared.draw(generator) | {"neighbours": torch.minimum(known, first)}

    def call(op: Callable[..., tuple[Tensor, Tensor]], t: Tensors) -> Outputs:
        return (op(t["x"], t["weight"], t["bias"], t["neighbours"])[0],)

    return replace(
        shared,
        what=f"conv of true neighbours, {size}",
        draw=draw,
        ours=lambda t: call(backend.neighbour_conv, t),
        oracle=lambda t: call(reference.neighbour_conv, t),
        peer=Peer("torch ops", call=lambda t: call(reference.neighbour_conv, t)),
    )


def _conv_peer() -> Peer:
    name, reason = peer_name("causal-conv1d"), missing("causal_conv1d", "causal-conv1d")
    if reason is not None:
        return Peer(name, missing=reason)
    from causal_conv1d import causal_conv1d_fn

    return Peer(
        name,
        _channels_second,
        lambda t: (causal_conv1d_fn(t["x"], t["weight"], t["bias"], activation="silu"),),
        lambda out: out.transpose(1, 2),
    )


def norm(backend: Backend, size: Size, device: torch.device) -> Subject:
    """Residual add and RMS norm, the residual stream in fp32, beside mamba-ssm's fused norm."""

    def draw(generator: torch.Generator) -> Tensors:
        normal = _normal(generator, device, size.dtype)
        return {
            "hidden": normal(size.batch, size.length, size.channels),
            "residual": torch.randn(size.batch, size.length, size.channels, generator=generator, device=device),
            "weight": 1 + 0.1 * normal(size.channels),
        }

    stream = 4 * size.cells
    return Subject(
        what=f"residual add + RMS norm, {size}",
        draw=draw,
        ours=lambda t: backend.add_rms_norm(t["hidden"], t["residual"], t["weight"], _EPS),
        oracle=lambda t: reference.add_rms_norm(t["hidden"], t["residual"], t["weight"], _EPS),
        forward=Work(2 * size.bytes + 2 * stream, flops=5 * size.cells),
        backward=Work(2 * size.bytes + 3 * stream, flops=10 * size.cells),
        peer=_norm_peer(),
        differentiated=("hidden", "residual", "weight"),
    )


def _norm_peer() -> Peer:
    name, reason = peer_name("mamba-ssm"), missing("mamba_ssm.ops.triton.layer_norm", "mamba-ssm")
    if reason is not None:
        return Peer(name, missing=reason)
    from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

    def call(t: Tensors) -> Outputs:
        return rms_norm_fn(
            t["hidden"], t["weight"], None, residual=t["residual"], prenorm=True, residual_in_fp32=True, eps=_EPS
        )

    return Peer(name, call=call)


def impact(backend: Backend, size: Size, device: torch.device, reduce: str = "max") -> Subject:
    """Token scores by global impact, signed, absolute or gated (``max``, ``absmax``, ``gated``)."""
    shared, gated = scan(backend, size, device), reduce == "gated"

    def draw(generator: torch.Generator) -> Tensors:
        tensors = shared.draw(generator)
        drawn = {name: tensors[name] for name in ("x", "dt", "dt_bias", "A", "B")} | {"C": tensors["C"][:, -1]}
        return drawn | ({"gate": torch.nn.functional.silu(tensors["z"][:, -1].float())} if gated else {})

    def call(op: Callable[..., Tensor], t: Tensors) -> Tensor:
        inputs = (t[name] for name in ("x", "dt", "dt_bias", "A", "B", "C"))
        return op(*inputs, gate=t.get("gate"), reduce="max" if gated else reduce)

    def oracle(t: Tensors) -> Outputs:
        axes = {"x": 2, "dt": 2, "dt_bias": 0, "A": 0, "gate": 1}
        chunks = [
            call(reference.global_impact, {n: t[n].narrow(axes[n], at, min(_CHUNK, size.channels - at)) if n in axes
                                           else t[n] for n in t})
            for at in range(0, size.channels, _CHUNK)
        ]  # fmt: skip
        return (torch.stack(chunks).amax(0),)

    return Subject(
        what=f"global impact ({reduce}), {size}",
        draw=draw,
        ours=lambda t: (call(backend.global_impact, t),),
        oracle=oracle,
        forward=Work(
            2 * size.bytes + size.batch * size.length * (size.states * size.dtype.itemsize + 4),
            flops=4 * size.cells * size.states,
            exps=size.cells * (size.states + 2),
        ),
    )


def select(backend: Backend, size: Size, device: torch.device) -> Subject:
    """Nine tenths of the tokens by score; scores with ties."""
    kept = max(1, 9 * size.length // 10)

    def draw(generator: torch.Generator) -> Tensors:
        scores = torch.randn(size.batch, size.length, generator=generator, device=device)
        return {"scores": (scores * 512).round() / 512}

    return Subject(
        what=f"select {kept} of {size.batch} x {size.length} tokens",
        draw=draw,
        ours=lambda t: backend.select_tokens(t["scores"], kept, 1),
        oracle=lambda t: reference.select_tokens(t["scores"], kept, 1),
        forward=Work(size.batch * (4 * size.length + 16 * kept)),
        exact=True,
    )


def keep(backend: Backend, size: Size, device: torch.device) -> Subject:
    """Nine tenths of the tokens of both streams."""
    kept = max(1, 9 * size.length // 10)

    def draw(generator: torch.Generator) -> Tensors:
        scores = torch.randn(size.batch, size.length, generator=generator, device=device)
        return {
            "hidden": _normal(generator, device, size.dtype)(size.batch, size.length, size.channels),
            "residual": torch.randn(size.batch, size.length, size.channels, generator=generator, device=device),
            "chosen": reference.select_tokens(scores, kept, 1)[0],
        }

    return Subject(
        what=f"keep {kept} tokens of both streams, {size}",
        draw=draw,
        ours=lambda t: backend.keep_tokens(t["hidden"], t["residual"], t["chosen"], size.length),
        oracle=lambda t: reference.keep_tokens(t["hidden"], t["residual"], t["chosen"], size.length),
        forward=Work(size.batch * kept * (2 * size.channels * (size.dtype.itemsize + 4) + 8)),
        exact=True,
    )


def keep_norm(backend: Backend, size: Size, device: torch.device) -> Subject:
    """Residual add and RMS norm of nine tenths of the tokens, read where they lie, beside gathering them first."""
    kept, shared = keep(backend, size, device), norm(backend, size, device)
    count = max(1, 9 * size.length // 10)

    def call(op: Callable[..., Outputs], t: Tensors) -> Outputs:
        return op(t["hidden"], t["residual"], t["chosen"], size.length, t["weight"], _EPS)

    def apart(t: Tensors) -> Outputs:
        streams = backend.keep_tokens(t["hidden"], t["residual"], t["chosen"], size.length)
        return backend.add_rms_norm(*streams, t["weight"], _EPS)

    cells = size.batch * count * size.channels
    return replace(
        shared,
        what=f"norm of {count} kept tokens, {size}",
        draw=lambda generator: kept.draw(generator) | {"weight": shared.draw(generator)["weight"]},
        ours=lambda t: call(backend.keep_add_rms_norm, t),
        oracle=lambda t: call(reference.keep_add_rms_norm, t),
        forward=Work(cells * 2 * (size.dtype.itemsize + 4), flops=5 * cells),
        backward=Work(cells * (size.dtype.itemsize + 8) + size.cells * (size.dtype.itemsize + 4), flops=10 * cells),
        peer=Peer("ours in two kernels", call=apart),
    )


def _channels_second(tensors: Tensors) -> Tensors:
    """Activations as (batch, channel, length), contiguous, which is what the peers' fast kernels want."""
    return {n: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for n, t in tensors.items()}


def _normal(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, generator=generator, device=device).to(dtype)
