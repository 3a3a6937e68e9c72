"""MLPs behind the mixers (`d_intermediate` of state-spaces): exactness rules, cost and checkpoints."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from slow_oracle import assert_equal_to_the_oracle, random_tokens, tiny_model
from test_captured import outputs_equal
from test_formats import assert_same_bits, ours
from test_model import close, decoding_equals_one_pass, pruned, same_kept

import simba_lab
from simba_lab.budget import verify
from simba_lab.checkpoint import convert
from simba_lab.checkpoint.run_folder import save_model
from simba_lab.errors import InputError
from simba_lab.files import write_json
from simba_lab.inspection.observing import bypassed, watched
from simba_lab.kernels.cost import Ledger, recording
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import parameter_count

SHAPES: dict[str, dict[str, Any]] = {
    "mamba1": {"d_model": 6, "d_intermediate": 100},
    "mamba2": {"d_model": 8, "d_intermediate": 129, "layer": "mamba2", "headdim": 4, "ngroups": 2, "chunk_size": 8},
}
both_generations = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
both_backends = pytest.mark.parametrize("backend", ["numba", "reference"])


def config(shape: dict[str, Any], **others: Any) -> ModelConfig:
    return ModelConfig(**{"n_layer": 3, "vocab_size": 21, "d_state": 3, **shape, **others})


@both_generations
@both_backends
@pytest.mark.parametrize("n_context", [1, 13])
def test_pruned_logits_kept_and_gradients_equal_the_slow_oracle(
    shape: dict[str, Any], backend: str, n_context: int
) -> None:
    sparse = pruned(tiny_model(backend=backend, n_layer=3, **shape), "norm")
    assert_equal_to_the_oracle(sparse, "norm", random_tokens(2, n_context + 3), n_context)


@both_generations
def test_prefill_and_decoding_equal_one_pass(shape: dict[str, Any]) -> None:
    sparse, tokens = pruned(tiny_model(**shape), "global_impact", protect_recent=0.3), random_tokens(2, 21)
    decoding_equals_one_pass(sparse, tokens, 16, range(6), [0, 2, 5])


@both_generations
def test_keeping_everything_is_dense_and_a_suffix_token_decides_nothing_before_it(shape: dict[str, Any]) -> None:
    lm, tokens = tiny_model(dtype=torch.float32, **shape), random_tokens(2, 21)
    dense, whole = lm(tokens, n_context=16), lm.sparsified(final_keep=1.0)(tokens, n_context=16)
    assert torch.equal(whole.logits, dense.logits) and same_kept(whole, dense)
    changed = tokens.clone()
    changed[:, 18] = (changed[:, 18] + 1) % 19
    sparse = pruned(lm, "global_impact")
    before, after = (sparse(t, n_context=16) for t in (tokens, changed))
    assert same_kept(before, after) and torch.equal(before.logits[:, :3], after.logits[:, :3])
    close(sparse(tokens[1:], n_context=16).logits, before.logits[1:])


@both_generations
def test_half_precision_stays_near(shape: dict[str, Any]) -> None:
    """Mixer and MLP are added up in the precision of the stream."""
    lm, tokens = ours(config(shape)).bfloat16(), random_tokens(2, 19)
    wide = LanguageModel(lm.config, backend="reference", seed=None)
    wide.load_state_dict(lm.state_dict())
    for backend in ("reference", "auto"):
        lm.backend_name = backend
        out = pruned(lm, "norm")(tokens, n_context=16)
        assert out.logits.dtype == torch.bfloat16 and lm.backbone.layers[0](
            lm.backbone.embedding(tokens), None, lm.backend
        )[0].dtype == torch.float32  # fmt: skip
        torch.testing.assert_close(lm(tokens).logits.float(), wide(tokens).logits, rtol=0.1, atol=0.1)


@both_generations
def test_what_a_layer_adds_is_all_that_it_adds(shape: dict[str, Any]) -> None:
    """To those who watch a layer or go around it: the residual is what it saw."""
    lm, tokens, streams = tiny_model(**shape), random_tokens(1, 12), []
    with watched(lm, lambda layer, residual, signals: streams.append(residual)):
        expected = lm(tokens, n_context=9).logits
    assert torch.equal(streams[0], lm.backbone.embedding(tokens))
    first, _, _, _ = lm.backbone.layers[0](streams[0], None, lm.backend)
    torch.testing.assert_close(streams[1], streams[0] + first)
    with bypassed(lm, 1, torch.arange(9)[None], 9):
        torch.testing.assert_close(lm(tokens, n_context=9).logits, expected)
    with bypassed(lm, 1, torch.tensor([[8]]), 9):
        assert (lm(tokens, n_context=9).logits - expected).abs().max() > 1e-3


@both_generations
def test_fvcore_and_the_ledger_confirm_the_closed_form(shape: dict[str, Any]) -> None:
    model = LanguageModel(config(shape), backend="reference").sparsified(final_keep=0.2)
    closed, wide = verify(model, 17, 3), model.config.d_mlp
    tokens = sum(model.keep_counts(17)) + 3 * 3
    assert closed.by_op()["fc1"] == 2 * tokens * model.config.d_model * 2 * wide
    assert closed.by_op()["fc2"] == 2 * tokens * wide * model.config.d_model
    with recording(Ledger()) as ledger:
        model(random_tokens(2, 20), n_context=17).logits.sum().backward()
    assert ledger.by_op() == {op: 2 * flops for op, flops in closed.training().by_op().items()}
    assert parameter_count(model.config) == sum(weight.numel() for weight in model.parameters())


@pytest.mark.gpu
@both_generations
@torch.no_grad()
def test_a_gpu_gives_the_numbers_of_the_cpu_and_captures_them(shape: dict[str, Any]) -> None:
    lm, tokens = ours(config(shape, d_model=64)), random_tokens(2, 45)
    expected = pruned(lm, "recency")(tokens, n_context=40).logits
    sparse = pruned(lm.to("cuda"), "recency")
    sparse.backend_name = "auto"
    torch.testing.assert_close(sparse(tokens.cuda(), n_context=40).logits.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert outputs_equal(sparse.captured(2, 40)(tokens[:, :40]), sparse.prefill(tokens[:, :40].cuda()))


def test_weights_begin_as_published() -> None:
    """Everything that adds to the stream is scaled by the number of additions, two a layer."""
    model = LanguageModel(ModelConfig(64, 2, 9, d_intermediate=300))
    block = model.backbone.layers[1]
    assert block.mlp.fc1.weight.shape == (768, 64) and block.mlp.fc2.weight.shape == (64, 384)
    for weight, bound in (
        (block.mlp.fc1.weight, 64**-0.5), (block.mlp.fc2.weight, (384 * 4) ** -0.5),
        (block.mixer.out_proj.weight, (128 * 4) ** -0.5),
    ):  # fmt: skip
        assert 0.98 * bound < weight.abs().max() <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert block.norm2.weight.eq(1).all()


@both_generations
@pytest.mark.parametrize("untied", [False, True])
def test_state_spaces_there_and_back_keeps_every_bit(tmp_path: Path, shape: dict[str, Any], untied: bool) -> None:
    original = ours(config(shape, tie_embeddings=not untied))
    save_model(tmp_path / "run", original)
    convert(tmp_path / "run", tmp_path / "there", "state-spaces")
    convert(tmp_path / "there", tmp_path / "back", "run")
    for folder in ("there", "back"):
        loaded = simba_lab.load(tmp_path / folder, backend="reference")
        assert loaded.config == original.config
        assert_same_bits(loaded, original)
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("run", "back")]
    assert files[0] == files[1]
    with pytest.raises(InputError, match=r"d_intermediate \d+ has no place in the format transformers"):
        convert(tmp_path / "run", tmp_path / "theirs", "transformers")
    assert not (tmp_path / "theirs").exists()


def test_a_folder_as_mamba_ssm_writes_it(tmp_path: Path) -> None:
    """By its names: 100 channels are 128, value before gate."""
    sizes = {"d_model": 6, "n_layer": 1, "vocab_size": 8}
    plain, generator = ours(ModelConfig(**sizes)), torch.Generator().manual_seed(1)
    fc1, fc2, norm2 = (torch.randn(size, generator=generator) for size in ((256, 6), (6, 128), (6,)))
    layer = "backbone.layers.0."
    added = {f"{layer}norm2.weight": norm2, f"{layer}mlp.fc1.weight": fc1, f"{layer}mlp.fc2.weight": fc2}
    tmp_path.joinpath("theirs").mkdir()
    torch.save(plain.state_dict() | added, tmp_path / "theirs" / "pytorch_model.bin")
    write_json(tmp_path / "theirs" / "config.json", sizes | {"d_intermediate": 100, "ssm_cfg": {}, "rms_norm": True})
    loaded = simba_lab.load(tmp_path / "theirs", backend="reference")
    assert loaded.config == dataclasses.replace(plain.config, d_intermediate=100)
    tokens = random_tokens(1, 7, vocab_size=8)
    block, stream = plain.backbone.layers[0], plain.backbone.embedding(tokens)
    stream = stream + block(stream, None, plain.backend)[0]
    normed = stream * (stream.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm2
    value, gate = normed @ fc1[:128].T, normed @ fc1[128:].T
    stream = stream + (value * gate / (1 + torch.exp(-gate))) @ fc2.T
    torch.testing.assert_close(loaded(tokens).logits, plain._head(stream, torch.zeros_like(stream)))
    torch.save(plain.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"weight backbone.layers.0.norm2.weight \(6,\) is missing"):
        simba_lab.load(tmp_path / "theirs")


def test_shapes_without_an_mlp_are_told_as_before_there_was_one() -> None:
    """Or every stored arm would be another one to a release that knows MLPs."""
    plain = ModelConfig(8, 2, 9)
    assert "d_intermediate" not in plain.to_dict() and ModelConfig.from_dict(plain.to_dict()) == plain
    wide = dataclasses.replace(plain, d_intermediate=7)
    assert wide.to_dict()["d_intermediate"] == 7 and ModelConfig.from_dict(wide.to_dict()) == wide
