"""``trainer.strategy: fsdp``: weights, gradients and optimiser states divided among GPUs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, MixedPrecision, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.optim import Optimizer
from torchmetrics import Metric

from simba_lab.errors import InputError
from simba_lab.model.mamba import Block

NAME = "fsdp"


class ShardedLayers(FSDPStrategy):
    """Lightning's ``fsdp`` as a Mamba needs it.

    Every layer of a dense model is a unit, whose gradients are divided as soon as it is done. A pruned model is one
    unit: scores are taken with a layer's A and biases after it has run, when its own unit would be divided again.
    Units stay whole from forward to backward pass (``SHARD_GRAD_OP``, ZeRO stage 2). Weights keep fp32 and autocast
    casts what it casts under ``ddp``; Lightning's own choice for bf16-mixed would hold A, which is exponentiated, in
    bf16.
    """

    def __init__(self, **options: Any) -> None:
        full = MixedPrecision(param_dtype=torch.float32, reduce_dtype=torch.float32, buffer_dtype=torch.float32)
        super().__init__(sharding_strategy="SHARD_GRAD_OP", mixed_precision=full, **options)
        self._root: nn.Module | None = None

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Wraps a module once: the test after a fit goes on with what the fit has wrapped."""
        if self._root is None or self._root.module is not model:
            self._root = FullyShardedDataParallel(
                model, cpu_offload=self.cpu_offload, mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy, device_id=self.root_device,
                auto_wrap_policy=None if model.lm.pruning else ModuleWrapPolicy({Block}), **self.kwargs,
            )  # fmt: skip
            for metric in (module for module in model.modules() if isinstance(module, Metric)):
                metric.to(self.root_device)
        return self._root

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """A whole checkpoint, of any strategy and number of processes, each process taking its part.

        Lightning's own numbers the optimiser's states by the order of the model's parameters, not of the optimiser's
        groups, and so hands them to the wrong ones if another strategy saved them. Code is never unpickled, whatever
        ``weights_only`` says.
        """
        checkpoint = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        kinds = (FullStateDictConfig, FullOptimStateDictConfig)
        whole = [kind(offload_to_cpu=False, rank0_only=False) for kind in kinds]
        with FullyShardedDataParallel.state_dict_type(self.model, StateDictType.FULL_STATE_DICT, *whole):
            self.model.load_state_dict(checkpoint.pop("state_dict"))
            for optimizer, saved in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
                named = _by_name(saved, optimizer, self.model)
                own = FullyShardedDataParallel.optim_state_dict_to_load(self.model, optimizer, named)
                optimizer.load_state_dict(own)
        return checkpoint


def _by_name(saved: dict[str, Any], optimizer: Optimizer, model: nn.Module) -> dict[str, Any]:
    """An optimiser's saved states by the names of their parameters, which are told by their place in the groups."""
    names = {id(weight): plain_name(name) for name, weight in model.named_parameters()}
    told: dict[int, str] = {}
    groups = []
    for group, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        placed = [names[id(weight)] for weight in ours["params"]]
        told |= dict(zip(group["params"], placed, strict=True))
        groups.append(group | {"params": placed})
    return {"state": {told[number]: state for number, state in saved["state"].items()}, "param_groups": groups}


def sharded(trainer: Trainer) -> bool:
    """Whether this process holds a part of the weights only."""
    return isinstance(trainer.strategy, FSDPStrategy)


def plain_name(name: str) -> str:
    """A parameter's name as it was before its layer was wrapped."""
    return name.replace("_fsdp_wrapped_module.", "")


def clip_by_norm(trainer: Trainer, largest: float) -> None:
    """Scales gradients by their norm over all processes, of which each holds a part."""
    trainer.strategy.model.clip_grad_norm_(largest)


def whole_weights(trainer: Trainer) -> dict[str, Tensor]:
    """The language model's weights by name, for the first process; all must call this, since each may hold a part."""
    state = trainer.strategy.lightning_module_state_dict()
    return {name.removeprefix("lm."): weight for name, weight in state.items() if name.startswith("lm.")}


def check_device(trainer: Trainer) -> None:
    """Raises InputError if weights are to be divided where FSDP cannot: it frees what it still needs on a CPU."""
    device = trainer.strategy.root_device.type
    if sharded(trainer) and device == "cpu":
        raise InputError(f"trainer.strategy: {NAME} divides a model among GPUs, and there are none; give auto or ddp")


def check_strategy(strategy: Any) -> None:
    """Raises InputError for an ``FSDPStrategy`` of the user's own, whose defaults would change the model's numbers."""
    if isinstance(strategy, FSDPStrategy) and not isinstance(strategy, ShardedLayers):
        raise InputError(
            "trainer.strategy: FSDPStrategy by class path would hold A in bf16 and the model in one piece; "
            f"give the name {NAME}, which wraps every layer"
        )
