"""``simba-lab`` with ``fsdp`` allowed on a CPU, for tests: FSDP's own code, collectives by gloo.

The one thing that FSDP cannot do there is to move gathered weights to the CPU, on which they lie, before it frees them.
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.strategies import fsdp
from torch import nn
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType
from torch.distributed.fsdp.api import FullOptimStateDictConfig

from simba_lab.cli.main import main
from simba_lab.training import sharding


def _gathered_in_place(module: nn.Module, world_size: int, rank0_only: bool = True) -> Any:
    kinds = (FullStateDictConfig, FullOptimStateDictConfig)
    configs = [kind(offload_to_cpu=False, rank0_only=rank0_only) for kind in kinds]
    return FullyShardedDataParallel.state_dict_type(module, StateDictType.FULL_STATE_DICT, *configs)


if __name__ == "__main__":
    fsdp._get_full_state_dict_context = _gathered_in_place
    sharding.check_device = lambda trainer: None
    sys.exit(main())
