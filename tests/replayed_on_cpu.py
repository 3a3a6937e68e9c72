"""``simba-lab`` whose training steps take the way of captured ones on a CPU, for tests of several processes.

In the place of a graph stands what a capture would have recorded; gradients are exchanged after the backward pass.
"""

from __future__ import annotations

import contextlib
import sys

from test_graphed_training import Uncaptured

from simba_lab.cli.main import main
from simba_lab.training import exchange, graphs

if __name__ == "__main__":
    graphs._Graph = Uncaptured
    graphs._waiting_is_an_error = contextlib.nullcontext
    graphs.refusal = lambda mode, trainer, backend: exchange.refusal(trainer.strategy)
    code = main()
    assert Uncaptured.made == 1
    sys.exit(code)
