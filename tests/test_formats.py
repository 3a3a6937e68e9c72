"""Folders of others: their numbers equal their own classes', every bit comes back, and what we lack is refused by name.

Weights of every test are perturbed, so that no bias or norm keeps the value that would hide it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

import simba_lab
from simba_lab.checkpoint import convert, model_spec
from simba_lab.checkpoint.run_folder import save_model
from simba_lab.checkpoint.state_spaces import config_values, write_state_spaces
from simba_lab.checkpoint.transformers_format import write_transformers
from simba_lab.cli.main import main
from simba_lab.errors import InputError
from simba_lab.files import write_json
from simba_lab.model import LanguageModel, ModelConfig, forward_flops
from simba_lab.model.shapes import PUBLISHED, parameter_count

FIRST = ModelConfig(12, 2, vocab_size=21, d_state=3)
SECOND = ModelConfig(16, 2, vocab_size=21, d_state=3, layer="mamba2", headdim=4, ngroups=2, chunk_size=8)
CONFIGS = {
    "first": FIRST,
    "second": SECOND,
    "first-flags": dataclasses.replace(FIRST, dt_rank=5, bias=True, conv_bias=False, tie_embeddings=False, d_conv=3),
    "second-flags": dataclasses.replace(SECOND, bias=True, conv_bias=False, tie_embeddings=False, dt_max=0.2),
    "first-padding": dataclasses.replace(FIRST, pad_vocab_size_multiple=16, expand=3),
    "second-padding": dataclasses.replace(SECOND, pad_vocab_size_multiple=1, expand=4),
}
TOKENS = torch.arange(38).view(2, 19) * 7 % 21
WRITERS = {"state-spaces": write_state_spaces, "transformers": write_transformers}


@torch.no_grad()
def perturb(model: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float32).to(weight.dtype))
    return model.eval()


def ours(config: ModelConfig) -> LanguageModel:
    return perturb(LanguageModel(config, backend="reference", seed=3))


def assert_same_bits(one: torch.nn.Module, other: torch.nn.Module) -> None:
    weights = other.state_dict()
    assert one.state_dict().keys() == weights.keys()
    for name, weight in one.state_dict().items():
        assert weight.dtype == weights[name].dtype and torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("format", WRITERS)
def test_ours_there_and_back_keeps_every_bit(tmp_path: Path, format: str, config: ModelConfig) -> None:
    original = ours(config)
    save_model(tmp_path / "run", original)
    convert(tmp_path / "run", tmp_path / "there", format)
    convert(tmp_path / "there", tmp_path / "back", "run")
    for folder in ("there", "back"):
        loaded = simba_lab.load(tmp_path / folder, backend="reference")
        assert loaded.config == config
        assert_same_bits(loaded, original)
        assert torch.equal(loaded(TOKENS).logits, original(TOKENS).logits)
        assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) == config.tie_embeddings
    run = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert run == (tmp_path / "back" / "model.safetensors").read_bytes()


# The flags of both classes, one by one and together.
TWINS: dict[str, tuple[type[PreTrainedModel], dict[str, Any]]] = {
    "mamba": (MambaForCausalLM, {}),
    "mamba-bias": (MambaForCausalLM, {"use_bias": True, "time_step_rank": 3}),
    "mamba-conv": (MambaForCausalLM, {"use_conv_bias": False, "conv_kernel": 2, "expand": 3}),
    "mamba-untied": (MambaForCausalLM, {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3}),
    "mamba-all": (
        MambaForCausalLM,
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False, "residual_in_fp32": False,
         "use_mambapy": True, "rescale_prenorm_residual": True, "time_step_init_scheme": "constant"},
    ),
    "mamba2": (Mamba2ForCausalLM, {}),
    "mamba2-groups": (Mamba2ForCausalLM, {"n_groups": 2, "chunk_size": 4}),
    "mamba2-bias": (Mamba2ForCausalLM, {"use_bias": True, "n_groups": 3, "layer_norm_epsilon": 1e-3}),
    "mamba2-conv": (Mamba2ForCausalLM, {"use_conv_bias": False, "conv_kernel": 2, "expand": 4, "num_heads": 24}),
    "mamba2-all": (
        Mamba2ForCausalLM,
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "residual_in_fp32": False,
         "n_groups": 6, "chunk_size": 32, "rescale_prenorm_residual": True},
    ),
}  # fmt: skip


def twin(name: str) -> PreTrainedModel:
    kind, flags = TWINS[name]
    sizes = {"vocab_size": 21, "hidden_size": 24, "state_size": 5, "num_hidden_layers": 2}
    if kind is MambaForCausalLM:
        return perturb(kind(MambaConfig(**sizes | flags)))
    sizes |= {"num_heads": 12, "head_dim": 4, "n_groups": 1, "chunk_size": 8}
    return perturb(kind(Mamba2Config(**sizes | flags)))


@contextmanager
def casts_to_single_lifted() -> Iterator[None]:
    """The twin computes its norms and scan in fp32 whatever its weights are; here in fp64, by its own code."""
    float_, to = torch.Tensor.float, torch.Tensor.to

    def wide(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        swapped = [torch.float64 if argument is torch.float32 else argument for argument in args]
        return to(tensor, *swapped, **options)

    torch.Tensor.float, torch.Tensor.to = torch.Tensor.double, wide
    try:
        yield
    finally:
        torch.Tensor.float, torch.Tensor.to = float_, to


@pytest.mark.parametrize("name", TWINS)
def test_logits_equal_those_of_the_twin_and_it_gets_its_bits_back(tmp_path: Path, name: str) -> None:
    theirs = twin(name)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="8KB" if name.endswith("all") else "1GB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == name.endswith("all")
    convert(tmp_path / "theirs", tmp_path / "run", "run")
    with torch.no_grad():
        expected = theirs(TOKENS, use_cache=False).logits
        for backend in ("reference", "auto"):
            torch.testing.assert_close(
                simba_lab.load(tmp_path / "run", backend=backend)(TOKENS).logits, expected, rtol=0, atol=1e-4
            )
        wide = simba_lab.load(tmp_path / "run", backend="reference", dtype="fp64")(TOKENS).logits
        with casts_to_single_lifted():
            expected = copy.deepcopy(theirs).double()(TOKENS, use_cache=False).logits
        torch.testing.assert_close(wide, expected, rtol=0, atol=1e-9)
    convert(tmp_path / "run", tmp_path / "back", "transformers")
    returned, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_bits(returned, theirs)
    for key in ("hidden_size", "vocab_size", "tie_word_embeddings", "use_bias", "use_conv_bias", "layer_norm_epsilon"):
        assert getattr(returned.config, key) == getattr(theirs.config, key), key


def test_the_casts_of_the_twin_matter(tmp_path: Path) -> None:
    """Or the test above would show 1e-9 for fp32 arithmetic too."""
    theirs = twin("mamba").double()
    with torch.no_grad():
        narrow = theirs(TOKENS, use_cache=False).logits
        with casts_to_single_lifted():
            assert (theirs(TOKENS, use_cache=False).logits - narrow).abs().max() > 1e-9


# config.json as published beside state-spaces/mamba-130m and state-spaces/mamba2-130m.
PUBLISHED_FIRST = {
    "d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
PUBLISHED_SECOND = {
    "d_model": 768, "d_intermediate": 0, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip


def test_published_configs_are_those_of_the_shapes() -> None:
    assert config_values(PUBLISHED["mamba2-130m"]) == PUBLISHED_SECOND
    first = config_values(PUBLISHED["mamba-130m"])
    assert first | PUBLISHED_FIRST == first
    assert PUBLISHED["mamba2-2.7b"].padded_vocab_size == 50288


PARAMETERS = {
    "mamba-130m": 129_135_360, "mamba-370m": 371_516_416, "mamba-790m": 793_204_224, "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600, "mamba2-130m": 128_989_632, "mamba2-370m": 368_346_624, "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312, "mamba2-2.7b": 2_702_599_680,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = LanguageModel(PUBLISHED[name], seed=None)
    assert sum(weight.numel() for weight in model.parameters()) == parameter_count(PUBLISHED[name]) == PARAMETERS[name]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_counted_with_every_flag(config: ModelConfig) -> None:
    assert sum(weight.numel() for weight in ours(config).parameters()) == parameter_count(config)


def state_spaces_folder(folder: Path, config: ModelConfig, values: dict[str, Any] | None = None) -> Path:
    """A folder as mamba_ssm writes it: every name spelled out here, the tied head stored under both of its names."""
    folder.mkdir()
    model = ours(config)
    table = model.backbone.embedding.weight.detach()
    weights = {"backbone.embedding.weight": table, "backbone.norm_f.weight": model.backbone.norm_f.weight.detach()}
    weights["lm_head.weight"] = table if config.tie_embeddings else model.lm_head.weight.detach()
    shared = "in_proj.weight conv1d.weight conv1d.bias out_proj.weight A_log D".split()
    own = "x_proj.weight dt_proj.weight dt_proj.bias" if config.layer == "mamba1" else "dt_bias norm.weight"
    for layer, block in enumerate(model.backbone.layers):
        weights[f"backbone.layers.{layer}.norm.weight"] = block.norm.weight.detach()
        for name in shared + own.split():
            weights[f"backbone.layers.{layer}.mixer.{name}"] = block.mixer.get_parameter(name).detach()
    torch.save(weights, folder / "pytorch_model.bin")
    write_json(folder / "config.json", values or config_values(config))
    return folder


@pytest.mark.parametrize("config", [FIRST, SECOND, dataclasses.replace(SECOND, tie_embeddings=False)])
def test_a_state_spaces_folder_from_scratch(tmp_path: Path, config: ModelConfig) -> None:
    loaded = simba_lab.load(state_spaces_folder(tmp_path / "published", config), backend="reference")
    assert loaded.config == config
    assert_same_bits(loaded, ours(config))


def test_missing_optional_keys_mean_the_defaults(tmp_path: Path) -> None:
    config = ModelConfig(d_model=12, n_layer=2, vocab_size=21)
    values = {"d_model": 12, "n_layer": 2, "vocab_size": 21}
    assert simba_lab.load(state_spaces_folder(tmp_path / "bare", config, values)).config == config
    values |= {"ssm_cfg": {"dt_rank": "auto", "use_fast_path": True, "dt_init": "random"}, "attn_cfg": None}
    assert simba_lab.load(state_spaces_folder(tmp_path / "spelled", config, values)).config == config


def test_defaults_that_transformers_leaves_out_are_those_of_its_classes(tmp_path: Path) -> None:
    for kind, written in (("mamba", MambaConfig()), ("mamba2", Mamba2Config())):
        folder = tmp_path / kind
        folder.mkdir()
        write_json(folder / "config.json", {"model_type": kind})
        save_file({"backbone.embeddings.weight": torch.ones(1, 1)}, folder / "model.safetensors")
        shape = (written.vocab_size, written.hidden_size)
        with pytest.raises(InputError) as caught:
            simba_lab.load(folder)
        assert f"{shape}" in str(caught.value) or f"{(shape[1],)}" in str(caught.value)


@pytest.mark.parametrize("name", ["first", "second"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("format", WRITERS)
def test_dtypes_are_kept_or_changed_when_asked(tmp_path: Path, format: str, dtype: str, name: str) -> None:
    original = ours(CONFIGS[name])
    save_model(tmp_path / "run", original)
    convert(tmp_path / "run", tmp_path / "there", format, dtype)
    kind = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    loaded = simba_lab.load(tmp_path / "there", backend="reference")
    assert {weight.dtype for weight in loaded.parameters()} == {kind}
    assert_same_bits(loaded, ours(CONFIGS[name]).to(kind))
    assert loaded(TOKENS).logits.isfinite().all()
    wide = simba_lab.load(tmp_path / "there", backend="reference", dtype="fp32")
    tolerance = 0.0 if dtype == "fp32" else 0.25
    torch.testing.assert_close(wide(TOKENS).logits, original(TOKENS).logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["first", "second"])
def test_a_file_that_keeps_the_recurrence_in_single_precision(tmp_path: Path, name: str) -> None:
    folder = state_spaces_folder(tmp_path / "mixed", CONFIGS[name])
    weights = torch.load(folder / "pytorch_model.bin")
    kept = ("A_log", ".D", "dt_bias")
    mixed = {key: weight if key.endswith(kept) else weight.bfloat16() for key, weight in weights.items()}
    torch.save(mixed, folder / "pytorch_model.bin")
    for backend in ("reference", "auto"):
        loaded = simba_lab.load(folder, backend=backend)
        assert loaded.backbone.layers[0].mixer.A_log.dtype == torch.float32
        expected = simba_lab.load(folder, backend="reference", dtype="fp32")(TOKENS).logits
        torch.testing.assert_close(loaded(TOKENS).logits.float(), expected, rtol=0, atol=0.25)


def refusal(path: str | Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        simba_lab.load(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"attn_layer_idx": [1]}, "attn_layer_idx [1] is not supported"),
        ({"attn_cfg": {"num_heads": 2}}, 'attn_cfg {"num_heads": 2} is not supported'),
        ({"d_intermediate": -1}, "model.d_intermediate must be an integer of at least 0, got -1"),
        ({"d_intermediate": "wide"}, "model.d_intermediate must be an integer of at least 0, got 'wide'"),
        ({"rms_norm": False}, "rms_norm false is not supported; true is"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, 'ssm_cfg.layer "Mamba3" is not supported; "Mamba1" or "Mamba2" is'),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "ssm_cfg.norm_before_gate true is not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "ssm_cfg.rmsnorm false is not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "ssm_cfg.D_has_hdim true is not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 64}}, "ssm_cfg.d_ssm 64 is not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 0.1]}}, "ssm_cfg.dt_limit [0.0, 0.1] is not supported"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_rank": 4}}, "ssm_cfg.dt_rank 4 is not a known key"),
        ({"ssm_cfg": {"headdim": 4}}, "ssm_cfg.headdim 4 is not a known key"),
        ({"ssm_cfg": {"d_state": "many"}}, "model.d_state must be an integer of at least 1, got 'many'"),
        ({"ssm_cfg": [1]}, "ssm_cfg must be a JSON object"),
        ({"bidirectional": True}, "bidirectional true is not a known key"),
        ({"vocab_size": None}, "model.vocab_size must be an integer"),
    ],
    ids=str,
)
def test_a_state_spaces_config_that_we_cannot_run_is_refused(
    tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    config = ModelConfig(d_model=64, n_layer=2, vocab_size=21)
    folder = state_spaces_folder(tmp_path / "published", config, config_values(config) | change)
    message = refusal(folder)
    assert problem in message and str(folder / "config.json") in message


def test_a_missing_key_of_the_shape_is_named(tmp_path: Path) -> None:
    folder = state_spaces_folder(tmp_path / "published", FIRST)
    write_json(folder / "config.json", {"d_model": 12, "vocab_size": 21})
    assert "n_layer is required" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("mamba", {"model_type": "jamba"}, 'model_type "jamba" is not supported; "mamba" or "mamba2" is'),
        ("mamba", {"architectures": ["MambaModel"]}, 'architectures ["MambaModel"] is not supported'),
        ("mamba", {"hidden_act": "gelu"}, 'hidden_act "gelu" is not supported; "silu" or "swish" is'),
        ("mamba", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("mamba", {"attn_layer_idx": [0]}, "attn_layer_idx [0] is not supported"),
        ("mamba", {"expand": 1.5}, "model.expand must be an integer"),
        ("mamba", {"use_bias": "yes"}, "model.bias must be true or false, got 'yes'"),
        ("mamba", {"use_bias": True}, "the weight backbone.layers.0.mixer.in_proj.bias (96,) is missing"),
        ("mamba", {"use_conv_bias": False}, "backbone.layers.0.mixer.conv1d.bias (48,) is not part of the model"),
        ("mamba2", {"time_step_limit": [0.0, 0.5]}, "time_step_limit [0.0, 0.5] is not supported"),
        ("mamba2", {"num_heads": 6}, "num_heads 6 is not supported; 12, expand x hidden_size / head_dim, is"),
        ("mamba2", {"head_dim": 5, "num_heads": 12}, "model.d_model must be a multiple of"),
    ],
    ids=str,
)
def test_a_transformers_config_that_we_cannot_run_is_refused(
    tmp_path: Path, name: str, change: dict[str, Any], problem: str
) -> None:
    twin(name).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | change
    write_json(tmp_path / "config.json", values)
    assert problem in refusal(tmp_path)


@pytest.mark.parametrize("limit", [[0.0, float("inf")], [0, "Infinity"], [0.0, {"__float__": "Infinity"}], None])
def test_every_spelling_of_no_limit_on_steps(tmp_path: Path, limit: Any) -> None:
    twin("mamba2").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"time_step_limit": limit}
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert simba_lab.load(tmp_path).config.layer == "mamba2"


def test_the_order_of_gate_and_norm_is_that_of_their_class_whatever_the_config_says(tmp_path: Path) -> None:
    """Mamba-Codestral's config.json has norm_before_gate true; Mamba2ForCausalLM gates first all the same."""
    theirs = twin("mamba2")
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text()) | {"norm_before_gate": True}
    write_json(tmp_path / "config.json", values)
    with torch.no_grad():
        expected = Mamba2ForCausalLM.from_pretrained(tmp_path)(TOKENS).logits
        torch.testing.assert_close(simba_lab.load(tmp_path)(TOKENS).logits, expected, rtol=0, atol=1e-4)


def test_a_narrow_residual_stream_is_refused_for_narrow_weights_alone(tmp_path: Path) -> None:
    values = config_values(FIRST) | {"residual_in_fp32": False}
    folder = state_spaces_folder(tmp_path / "published", FIRST, values)
    assert_same_bits(simba_lab.load(folder), ours(FIRST))
    message = refusal(folder, dtype="bf16")
    assert "residual_in_fp32 false is not supported with weights in bfloat16; load it with dtype fp32" in message


def test_neither_format(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1]")
    assert "has neither model_type (transformers) nor d_model (state-spaces)" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refusal(tmp_path)
    assert "dtype: int8 is unknown; use one of fp64, fp32, bf16, fp16" in refusal(tmp_path, dtype="int8")


KEY = "backbone.layers.1.mixer.A_log"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda w: w.pop(KEY), f"{KEY} (24, 3) is missing"),
        (lambda w: w.update({KEY: torch.ones(24, 4)}), f"{KEY} has shape (24, 4), the model wants (24, 3)"),
        (lambda w: w.update({"backbone.layers.2.mlp.fc1.weight": torch.ones(3)}), "fc1.weight (3,) is not part of"),
        (lambda w: w.update({KEY: torch.ones(24, 3, dtype=torch.int8)}), f"{KEY} is of torch.int8"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(24, 12)}),
            "lm_head.weight is not backbone.embedding.weight, though the config ties them",
        ),
        (lambda w: w.update({"lm_head.weight": torch.ones(3, 12)}), "lm_head.weight has shape (3, 12)"),
    ],
    ids=["missing", "shape", "extra", "integers", "head", "head shape"],
)
def test_a_weight_that_does_not_fit_is_named(tmp_path: Path, change: Callable[[Any], Any], problem: str) -> None:
    folder = state_spaces_folder(tmp_path / "published", FIRST)
    weights = torch.load(folder / "pytorch_model.bin")
    change(weights)
    torch.save(weights, folder / "pytorch_model.bin")
    assert problem in refusal(folder)


def test_a_weight_is_named_as_in_its_file(tmp_path: Path) -> None:
    twin("mamba").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["backbone.embeddings.weight"] = torch.ones(22, 24)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "the weight backbone.embeddings.weight has shape (22, 24), the model wants (21, 24)" in refusal(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": {}}', '{"weight_map": {"a": "../../etc/passwd"}}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    folder = state_spaces_folder(tmp_path / "published", FIRST)
    (folder / "pytorch_model.bin").unlink()
    assert "holds no model.safetensors or pytorch_model.bin" in refusal(folder)
    (folder / "pytorch_model.bin.index.json").write_text(content)
    assert "has no weight_map from weights to files beside it" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    twin("mamba").save_pretrained(tmp_path, max_shard_size="8KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"holds no {shard.name}, a shard that model.safetensors.index.json names" in refusal(tmp_path)


def test_weights_alone_point_to_their_folder_and_the_old_form_is_read(tmp_path: Path) -> None:
    folder = state_spaces_folder(tmp_path / "published", FIRST)
    assert f"give its folder, {folder}" in refusal(folder / "pytorch_model.bin")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same_bits(simba_lab.load(folder), ours(FIRST))


MEASURE = """
import sys, torch, simba_lab
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
import simba_lab.checkpoint
before = peak()
model = simba_lab.load(sys.argv[1], dtype=sys.argv[2] or None)
loaded = peak()
total = sum(float(weight.detach().sum()) for weight in model.parameters())
size = sum(weight.nbytes for weight in model.parameters())
print((loaded - before) / size, (peak() - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize(("format", "dtype"), [("run", ""), ("state-spaces", ""), ("run", "bf16")])
def test_loading_takes_no_more_memory_than_the_weights(tmp_path: Path, format: str, dtype: str) -> None:
    """Mapped: next to nothing before the weights are read, then their own size; in another dtype that of the result."""
    (tmp_path / "big").mkdir()
    writer = WRITERS.get(format, save_model)
    writer(tmp_path / "big", LanguageModel(ModelConfig(d_model=512, n_layer=12, vocab_size=1000), seed=None))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, read = map(float, done.stdout.split())
    assert loaded < (1.25 if dtype else 0.3) and 0.9 < read < 1.25


def test_spec_of_a_converted_model_has_no_pruning(tmp_path: Path) -> None:
    save_model(tmp_path / "run", ours(FIRST).sparsified(final_keep=0.5))
    done = convert(tmp_path / "run", tmp_path / "there", "transformers")
    assert any("pruning plan stays behind" in remark for remark in done["remarks"])
    assert model_spec(simba_lab.load(tmp_path / "there"))["pruning"] is None
    assert not any("pruning" in remark for remark in convert(tmp_path / "run", tmp_path / "kept", "run")["remarks"])
    assert model_spec(simba_lab.load(tmp_path / "kept"))["pruning"] is not None


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m"])
def test_flops_of_a_published_shape(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "flops.json"
    assert main(["flops", "--shape", name, "--n-context", "256", "--json", str(report)]) == 0
    done, printed = json.loads(report.read_text()), capsys.readouterr().out
    assert done["parameters"] == PARAMETERS[name] and f"{PARAMETERS[name]:,} parameters" in printed
    assert done["verified"] is True and done["model"]["layer"] == PUBLISHED[name].layer


# FLOPs of 2048 tokens and one position's logits, as `simba-lab flops --shape NAME --n-context 2048` printed them, after
# fvcore had counted the same in every layer and op.
FLOPS = {
    "mamba-130m": 378_772_549_632, "mamba-370m": 1_332_079_706_112, "mamba-790m": 2_964_487_200_768,
    "mamba-1.4b": 5_241_139_789_824, "mamba-2.8b": 10_882_630_819_840, "mamba2-130m": 437_459_263_488,
    "mamba2-370m": 1_477_236_195_328, "mamba2-780m": 3_148_298_403_840, "mamba2-1.3b": 5_441_057_128_448,
    "mamba2-2.7b": 11_140_597_334_016,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_flops_of_every_published_shape(name: str) -> None:
    config = PUBLISHED[name]
    assert forward_flops(config, [2048] * config.n_layer, 0, None).total == FLOPS[name]
