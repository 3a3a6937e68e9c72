"""Models that benches time: ours with random weights made on the device, and mamba-ssm's with the same weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from simba_lab.bench.checks import ALLOWED, poisoned_memory, require
from simba_lab.model import LanguageModel, ModelConfig

# Small, and no side a multiple of a block or of another side.
ODD = ModelConfig(d_model=100, n_layer=3, vocab_size=203, d_state=16)
_ODD_BATCH, _ODD_CONTEXT, _ODD_SUFFIX = 2, 129, 5


def ours(config: ModelConfig, device: torch.device, dtype: torch.dtype, seed: int, backend: str) -> LanguageModel:
    """Our model with Mamba's own initialisation, drawn on the device: billions of numbers take a moment there."""
    with torch.device(device):
        model = LanguageModel(config, backend=backend, seed=None)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            model.backbone.embedding.weight.normal_(std=0.02, generator=generator)
            if not config.tie_embeddings:
                model.lm_head.weight.normal_(std=0.02, generator=generator)
            model.backbone.norm_f.weight.fill_(1.0)
            for block in model.backbone.layers:
                block.initialise(config, generator)
    return model.to(dtype)


def mamba_ssm(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """mamba-ssm's language model of the same shape."""
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    peer_config = MambaConfig(
        d_model=config.d_model,
        n_layer=config.n_layer,
        vocab_size=config.vocab_size,
        ssm_cfg=_ssm_options(config),
        rms_norm=True,
        residual_in_fp32=True,
        fused_add_norm=True,
        pad_vocab_size_multiple=config.pad_vocab_size_multiple,
        tie_embeddings=config.tie_embeddings,
    )
    return MambaLMHeadModel(peer_config, device=device, dtype=dtype)


def _ssm_options(config: ModelConfig) -> dict[str, Any]:
    options = {"d_state": config.d_state, "d_conv": config.d_conv, "expand": config.expand}
    if config.layer == "mamba2":
        heads = {"headdim": config.headdim, "ngroups": config.ngroups, "chunk_size": config.chunk_size}
        return {"layer": "Mamba2"} | options | heads
    return {"layer": "Mamba1"} | options


def same_weights(peer: nn.Module, model: LanguageModel) -> nn.Module:
    """The peer with our weights; the parameters are called alike."""
    peer.load_state_dict(model.state_dict())
    return peer


def random_tokens(config: ModelConfig, shape: tuple[int, int], device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator, device=device)


def check_models(device: torch.device, seed: int, backend: str) -> list[dict[str, object]]:
    """A small model of odd sizes on ``backend`` in fp32 against the oracle in fp64: dense, pruned, decoded, trained.

    Returns the records of the checks. Raises RedCheck.
    """
    fast = ours(ODD, device, torch.float32, seed, backend)
    slow = ours(ODD, device, torch.float32, seed, "reference").double()
    tokens = random_tokens(ODD, (_ODD_BATCH, _ODD_CONTEXT + _ODD_SUFFIX), device, seed + 1)
    pruning = {"criterion": "global_impact", "schedule": "linear", "final_keep": 0.1}
    records = []
    for name, models in {
        "dense": (fast, slow),
        "pruned": (fast.sparsified(**pruning), slow.sparsified(**pruning)),
    }.items():
        with poisoned_memory():
            got = _everything(models[0], tokens)
        records.append(require(f"model, {name}", got, _everything(models[1], tokens), ALLOWED[torch.float32]))
    return records


def _everything(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    """Logits of one pass, the gradient of every parameter, the kept positions, logits of decoding token by token."""
    logits = model(tokens, n_context=_ODD_CONTEXT).logits
    weights = dict(model.named_parameters())
    weighing = torch.linspace(-1, 1, logits.numel(), device=logits.device, dtype=torch.float64).view_as(logits)
    gradients = torch.autograd.grad((logits * weighing.to(logits)).sum(), list(weights.values()))
    with torch.no_grad():
        before = model.prefill(tokens[:, :_ODD_CONTEXT])
        steps, states = [before.logits], before.states
        for at in range(_ODD_CONTEXT, tokens.shape[1]):
            step, states = model.extend(tokens[:, at : at + 1], states)
            steps.append(step)
    named = {f"the gradient of {name}": gradient for name, gradient in zip(weights, gradients, strict=True)}
    kept = {"the kept positions": before.kept[-1].double()}
    return {"the logits": logits.detach(), "the decoded logits": torch.cat(steps, 1)} | kept | named
