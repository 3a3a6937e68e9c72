"""One implementation, one process: ``python -m simba_lab.bench.peers NAME --d-model ...``.

It prints a line when it is ready, takes a turn and prints a line for every line it reads, and its row, a line of JSON,
at the end of its input: so that implementations are timed by turns, on a machine whose speed drifts.

A step is forward, mean cross-entropy in fp32 and backward, without an optimizer. Every implementation gets the same
random tokens, so its loss before any training must lie near ln(vocabulary).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Logits = Callable[[torch.Tensor], torch.Tensor]  # tokens (B, L) int64 -> logits (B, L, V)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of the timed model and of its batch (``batch`` sequences of ``length`` tokens)."""

    d_model: int = 256
    n_layer: int = 8
    d_state: int = 16
    vocab_size: int = 512
    batch: int = 4
    length: int = 512


def option(name: str) -> str:
    """Command-line option of a field of :class:`Shape`."""
    return "--" + name.replace("_", "-")


def ours(shape: Shape, backend: str) -> tuple[torch.nn.Module, Logits]:
    """Our language model on a backend asked for by name."""
    from simba_lab.model import LanguageModel, ModelConfig

    config = ModelConfig(
        d_model=shape.d_model, n_layer=shape.n_layer, vocab_size=shape.vocab_size, d_state=shape.d_state
    )
    model = LanguageModel(config, backend=backend)
    return model, lambda tokens: model(tokens).logits


def mambapy(shape: Shape) -> tuple[torch.nn.Module, Logits]:
    """mambapy's stack with its parallel scan, between an embedding and a tied head.

    Its own ``LM`` class is the same thing, but importing it needs einops, which mambapy does not declare.
    """
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm
    from torch import nn
    from torch.nn.functional import linear

    config = MambaConfig(d_model=shape.d_model, n_layers=shape.n_layer, d_state=shape.d_state, pscan=True)
    embedding = nn.Embedding(shape.vocab_size, shape.d_model)
    nn.init.normal_(embedding.weight, std=config.base_std)
    model = nn.Sequential(embedding, Mamba(config), RMSNorm(shape.d_model))
    return model, lambda tokens: linear(model(tokens), embedding.weight)


def transformers(shape: Shape) -> tuple[torch.nn.Module, Logits]:
    """transformers' Mamba on the path it takes where no CUDA kernels are installed."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        hidden_size=shape.d_model,
        num_hidden_layers=shape.n_layer,
        state_size=shape.d_state,
        vocab_size=shape.vocab_size,
        use_cache=False,
        use_mambapy=False,
    )
    model = MambaForCausalLM(config)
    return model, lambda tokens: model(tokens).logits


@dataclasses.dataclass(frozen=True)
class Implementation:
    """How one row is made: the installed distribution behind it, its builder and how many turns can be afforded."""

    distribution: str
    build: Callable[[Shape], tuple[torch.nn.Module, Logits]]
    warmups: int = 1
    turns: int | None = None


TURN_SECONDS, TURN_STEPS = 1.0, 20

# transformers runs one step without warm-up: a step takes minutes at the default shape.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "simba_lab": Implementation("simba-lab", lambda shape: ours(shape, "numba")),
    "simba_lab reference": Implementation("simba-lab", lambda shape: ours(shape, "reference")),
    "mambapy": Implementation("mambapy", mambapy),
    "transformers": Implementation("transformers", transformers, warmups=0, turns=1),
}


class Contestant:
    """One implementation in this process: built and warmed up, then timed a turn at a time."""

    def __init__(self, name: str, shape: Shape, threads: int, seed: int) -> None:
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        self.name, self.shape, self.seconds = name, shape, []
        self._implementation = IMPLEMENTATIONS[name]
        self._model, self._logits = self._implementation.build(shape)
        generator = torch.Generator().manual_seed(seed)
        self._text = torch.randint(shape.vocab_size, (shape.batch, shape.length + 1), generator=generator)
        for _ in range(self._implementation.warmups):
            training_step(self._model, self._logits, self._text)

    def turn(self) -> None:
        """Steps for about a second, one at least; none once this implementation has done what can be afforded."""
        end, most = time.perf_counter() + TURN_SECONDS, self._implementation.turns
        if most is not None and len(self.seconds) >= most:
            return
        for _ in range(TURN_STEPS):
            taken, self._loss = training_step(self._model, self._logits, self._text)
            self.seconds.append(taken)
            if time.perf_counter() > end:
                return

    def row(self) -> dict[str, Any]:
        """What its turns came to."""
        middle = median(self.seconds)
        return {
            "implementation": self.name,
            "version": importlib.metadata.version(self._implementation.distribution),
            "seconds_per_step": middle,
            "seconds_min": min(self.seconds),
            "seconds_max": max(self.seconds),
            "repeats": len(self.seconds),
            "warmups": self._implementation.warmups,
            "tokens_per_second": self.shape.batch * self.shape.length / middle,
            "peak_rss_bytes": peak_rss_bytes(),
            "parameters": sum(parameter.numel() for parameter in self._model.parameters()),
            "loss": self._loss,
        }


def training_step(model: torch.nn.Module, logits: Logits, text: torch.Tensor) -> tuple[float, float]:
    """Seconds and loss of forward and backward on ``text`` (B, L + 1): each token predicts the next."""
    from torch.nn.functional import cross_entropy

    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    loss = cross_entropy(logits(text[:, :-1]).float().flatten(0, 1), text[:, 1:].flatten())
    loss.backward()
    return time.perf_counter() - start, float(loss.detach())


def peak_rss_bytes() -> int:
    """Largest resident set of this process.

    Linux carries ``ru_maxrss`` over from the process that started this one, so the process's own mark goes first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one implementation, a turn for each line on standard input, and print its row."""
    parser = argparse.ArgumentParser(prog="python -m simba_lab.bench.peers")
    parser.add_argument("name", choices=list(IMPLEMENTATIONS))
    for field in dataclasses.fields(Shape):
        parser.add_argument(option(field.name), type=int, default=field.default)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    args = parser.parse_args(argv)
    shape = Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)})
    contestant = Contestant(args.name, shape, args.threads, args.seed)
    print("ready", flush=True)
    for _ in sys.stdin:
        contestant.turn()
        print("done", flush=True)
    print(json.dumps(contestant.row()))


if __name__ == "__main__":
    main()
