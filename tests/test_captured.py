"""Captured prefill and decoding: on a CUDA device equal to eager bit for bit, elsewhere what makes capture possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from slow_oracle import random_tokens, tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simba_lab.errors import InputError
from simba_lab.model import CapturedDecoder, CapturedPrefill, LanguageModel, Output
from simba_lab.model.captured import CYCLE, frozen_matrices
from simba_lab.pruning import CRITERIA, Criterion, Signals

SHAPES = {"mamba1": {}, "mamba2": {"layer": "mamba2", "headdim": 4, "d_state": 4}}
# Operations whose result, or its shape, is known to the host only after the device has computed it.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "masked_select", "equal", "unique", "_unique2"}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


class NothingWaits(TorchDispatchMode):
    """Fails for operations that would make a host wait for its device, copies between devices among them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put") and any(_is_mask(index) for index in args[1] if index is not None)
        moved = (kwargs or {}).get("device") is not None and name in ("_to_copy", "to")
        assert name not in WAITS and not by_mask and not moved, name
        return func(*args, **(kwargs or {}))


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


class Waiting(Criterion):
    """A user's criterion that reads a number back."""

    op = "none"

    def score(self, signals: Signals) -> Tensor:
        return signals.x.sum(-1) * signals.x.sum().item()


def pruned(lm: LanguageModel, criterion: Any = "global_impact") -> LanguageModel:
    return lm.sparsified(criterion=criterion, schedule="linear", final_keep=0.2, protect_recent=0.3)


# Anywhere


@every_shape
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(
    "criterion", [*CRITERIA.names(), {"class_path": "global_impact", "init_args": {"gated": True}}]
)
def test_nothing_in_a_pruned_prefill_or_a_step_waits_for_the_device(
    shape: dict[str, Any], backend: str, criterion: Any
) -> None:
    sparse = pruned(tiny_model(dtype=torch.float32, backend=backend, **shape), criterion)
    tokens = random_tokens(2, 13)
    with torch.no_grad(), NothingWaits():
        out = sparse.prefill(tokens)
        sparse.extend(tokens[:, :1], out.states)
    assert [kept.shape[1] for kept in out.kept] == sparse.keep_counts(13)


def test_the_check_for_waits_sees_them() -> None:
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NothingWaits():
        pruned(tiny_model(), Waiting()).prefill(random_tokens(1, 9))
    with pytest.raises(AssertionError, match="index"), NothingWaits():
        x = torch.ones(3)
        x[x > 0]


@pytest.mark.parametrize("name", ["hidden", "sequence_key"])
def test_signals_that_cost_a_pass_are_computed_once_and_only_when_read(name: str) -> None:
    calls = []

    def compute() -> Tensor:
        calls.append(name)
        return torch.ones(1, 2, 3)

    fields = dict.fromkeys(Signals.__dataclass_fields__, torch.zeros(1, 2, 3))
    signals = Signals(**{**fields, name: compute})
    assert signals.x.sum() == 0 and calls == []
    assert torch.equal(getattr(signals, name), torch.ones(1, 2, 3))
    assert getattr(signals, name) is getattr(signals, name) and calls == [name]


@every_shape
def test_frozen_matrices_last_as_long_as_the_block(shape: dict[str, Any]) -> None:
    lm = tiny_model(**shape)
    mixers = [block.mixer for block in lm.backbone.layers]
    names = set(lm.state_dict())
    with frozen_matrices(lm) as matrices:
        assert all(mixer.A is matrix for mixer, matrix in zip(mixers, matrices, strict=True))
        assert set(lm.state_dict()) == names
    with torch.no_grad():
        for mixer, matrix in zip(mixers, matrices, strict=True):
            mixer.A_log += 1
            torch.testing.assert_close(mixer.A, matrix * torch.e)


def test_a_clone_shares_no_memory() -> None:
    out = pruned(tiny_model()).prefill(random_tokens(2, 11))
    copy = out.clone()
    assert outputs_equal(out, copy)
    kept = {t.data_ptr() for t in tensors(out)} & {t.data_ptr() for t in tensors(copy)}
    assert not kept and copy.acausal is out.acausal


@pytest.mark.parametrize(
    "capture", [lambda lm: lm.captured(1, 8), lambda lm: CapturedDecoder(lm, 1)], ids=["prefill", "decoder"]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that there is no device")
def test_a_model_on_the_cpu_is_refused(capture: Callable[[LanguageModel], Any]) -> None:
    with pytest.raises(InputError, match=r'CUDA device, not on cpu: \.to\("cuda"\)'):
        capture(tiny_model())


# On a CUDA device


def tensors(out: Output) -> list[Tensor]:
    return [out.logits, out.positions, *out.kept, *(t for state in out.states for t in (state.conv, state.ssm))]


def outputs_equal(a: Output, b: Output) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


def on_device(pruning: bool, dtype: torch.dtype = torch.bfloat16, **shape: Any) -> LanguageModel:
    sizes = {"d_model": 64, "d_state": 16, **({"layer": "mamba2", "headdim": 32, "d_state": 32} if shape else {})}
    lm = tiny_model(dtype=dtype, **sizes).to("cuda")
    return pruned(lm) if pruning else lm


@pytest.mark.gpu
@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pruning", [False, True], ids=["dense", "pruned"])
@torch.no_grad()
def test_captured_prefill_equals_eager_bit_for_bit(pruning: bool, dtype: torch.dtype, shape: dict[str, Any]) -> None:
    lm = on_device(pruning, dtype, **shape)
    captured = lm.captured(2, 131)
    for seed in range(2):
        tokens = random_tokens(2, 131, seed)
        assert outputs_equal(captured(tokens), lm.prefill(tokens.cuda()))


@pytest.mark.gpu
@torch.no_grad()
def test_several_sizes_share_memory_and_live_together() -> None:
    lm, dense = on_device(True), on_device(False)
    first = lm.captured(2, 131)
    others = [lm.captured(1, 7, beside=first), dense.captured(3, 64, beside=first), CapturedPrefill(lm, 2, 131, first)]
    assert all(other.pool == first.pool for other in others)
    cases = [(first, lm, 2, 131), (others[0], lm, 1, 7), (others[1], dense, 3, 64), (others[2], lm, 2, 131)]
    for seed, (captured, model, *size) in enumerate([*cases, *reversed(cases)]):
        tokens = random_tokens(*size, seed).cuda()
        assert outputs_equal(captured(tokens).clone(), model.prefill(tokens))


@pytest.mark.gpu
@every_shape
@pytest.mark.parametrize("pruning", [False, True], ids=["dense", "pruned"])
@torch.no_grad()
def test_captured_decoding_equals_extending_bit_for_bit(pruning: bool, shape: dict[str, Any]) -> None:
    lm = on_device(pruning, **shape)
    prefill = lm.captured(2, 50)
    decoder = prefill.decoder()
    assert decoder.pool == prefill.pool
    for seed in range(2):
        out = prefill(random_tokens(2, 50, seed))
        tokens, states = random_tokens(2, 20, seed + 5).cuda(), out.clone().states
        decoder.start(out.states, tokens[:, :1])
        for place in range(20):
            logits, states = lm.extend(tokens[:, place : place + 1], states)
            assert torch.equal(decoder.step(tokens[:, place : place + 1]), logits)
            assert all(torch.equal(a.ssm, b.ssm) for a, b in zip(decoder.states, states, strict=True))
            assert all(torch.equal(a.conv, b.conv) for a, b in zip(decoder.states, states, strict=True))


@pytest.mark.gpu
@torch.no_grad()
def test_greedy_decoding_feeds_its_own_choices() -> None:
    lm = on_device(True)
    decoder = CapturedDecoder(lm, 3)
    out = lm.prefill(random_tokens(3, 50).cuda())
    first = out.logits[:, :, : lm.config.vocab_size].argmax(-1)
    for _ in range(2):  # the second start finds the decoder in the middle of its cycle
        tokens, states, expected = first, out.states, []
        for _ in range(4 * CYCLE + 3):
            logits, states = lm.extend(tokens, states)
            tokens = logits[:, :, : lm.config.vocab_size].argmax(-1)
            expected.append(tokens)
        assert torch.equal(decoder.generate(out.states, first, 4 * CYCLE + 3), torch.cat(expected, 1))
        assert torch.equal(decoder.tokens, expected[-1])


@pytest.mark.gpu
def test_what_was_not_captured_is_refused() -> None:
    lm = on_device(True)
    prefill = lm.captured(2, 9)
    decoder = prefill.decoder()
    for tokens in (random_tokens(1, 9), random_tokens(2, 8), random_tokens(2, 9).float()):
        with pytest.raises(InputError, match=r"tokens must be integers of shape \(2, 9\)"):
            prefill(tokens)
    with pytest.raises(InputError, match=r"tokens must be integers of shape \(2, 1\)"):
        decoder.step(random_tokens(2, 2))
    states = lm.prefill(random_tokens(3, 9).cuda()).states
    with pytest.raises(InputError, match="states must be those of 2 sequences"):
        decoder.start(states, random_tokens(2, 1))
    with pytest.raises(InputError, match="batch and n_context must be at least 1"):
        lm.captured(0, 9)


@pytest.mark.gpu
def test_a_criterion_that_waits_for_the_device_is_named() -> None:
    sparse = pruned(on_device(False), Waiting())
    mode = torch.cuda.get_sync_debug_mode()
    with pytest.raises(InputError, match="pruned by linear:Waiting, waits for the device"):
        sparse.captured(1, 20)
    assert torch.cuda.get_sync_debug_mode() == mode
    assert sparse.prefill(random_tokens(1, 20).cuda()).logits.isfinite().all()  # eager it still runs
