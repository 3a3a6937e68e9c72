"""Which layers can do with fewer tokens: what the suffix loses when pruning begins at each layer, on a few windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simba_lab.data import EvalWindows
from simba_lab.errors import InputError
from simba_lab.evaluate.statistics import mean_interval
from simba_lab.evaluate.windows import Face, far_face, plain_face, score_windows
from simba_lab.model import LanguageModel
from simba_lab.pruning import CRITERIA, SCHEDULES
from simba_lab.registry import Spec

RATES = (0.5, 0.25, 0.1)
RESAMPLES = 2_000


@dataclass(frozen=True)
class Sensitivity:
    """Loss when all context tokens reach layer l and the share r of them goes on: what a single cut costs.

    rise (n_layer - 1, n_rates) in nats per token above dense, row l - 1 for layer l; low and high, of the same shape,
    the ends of its 95 % interval over documents (NaN if there is one document only); dense in nats per token;
    reach None if all suffix tokens count, else only those last seen more than so many tokens before its start.
    """

    criterion: dict[str, Any]
    rates: tuple[float, ...]
    rise: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    dense: float
    windows: int
    n_context: int
    n_suffix: int
    reach: int | None

    def schedule(self) -> dict[str, Any]:
        """Spec of the keep schedule ``calibrated`` made of this table; its free parameter is left to a budget."""
        return {"class_path": "calibrated", "init_args": {"rates": list(self.rates), "rise": self.rise.tolist()}}

    @property
    def reading_layer(self) -> int | None:
        """The last layer that needs the whole context; with planted facts, the one that looks them up.

        A cut before it, to the lowest rate, costs more than half of what the worst one costs. None if none costs any.
        """
        rise = self.rise[:, -1]
        needing = np.flatnonzero(rise > max(rise.max() / 2, 0))
        return int(needing[-1]) + 1 if needing.size else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; intervals that could not be computed are None."""
        ends = np.stack([self.low, self.high], axis=-1)
        return {
            "criterion": self.criterion,
            "rates": list(self.rates),
            "rise": self.rise.tolist(),
            "interval": ends.tolist() if np.isfinite(ends).all() else None,
            "dense": self.dense,
            "windows": self.windows,
            "n_context": self.n_context,
            "n_suffix": self.n_suffix,
            "reach": self.reach,
            "reading_layer": self.reading_layer,
            "unit": "nats per suffix token above dense; row l - 1: pruning begins at layer l",
            "schedule": self.schedule(),
        }


def layer_sensitivity(
    model: LanguageModel,
    windows: EvalWindows,
    rates: Sequence[float] = RATES,
    criterion: Spec = "global_impact",
    protect_recent: float = 0.0,
    batch_size: int = 8,
    reach: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """The table for every layer above the first and every rate; windows should be of a validation split.

    A pass over the windows for each (layer, rate), and a dense one. ``progress`` is told passes done and passes in all.
    Raises InputError for rates that do not fall from below 1, a model of one layer, and a ``reach`` beyond which no
    suffix token was last seen.
    """
    cuts = _cuts(model, rates)
    passes = 1 + len(cuts)
    tell = progress or (lambda done, of: None)
    dense = _face(model.with_pruning(None), windows, batch_size, reach)
    if dense.mean is None:
        raise InputError(f"reach: no suffix token was last seen more than {reach} tokens before the suffix; lower it")
    tell(1, passes)
    estimates = []
    for done, (layer, rate) in enumerate(cuts, start=2):
        schedule = {"class_path": "highway_top", "init_args": {"from_layer": layer, "keep": rate}}
        arm = model.sparsified(criterion, schedule, protect_recent=protect_recent)
        estimates.append(_rise(_face(arm, windows, batch_size, reach), dense, windows))
        tell(done, passes)
    table = np.array(estimates).reshape(model.config.n_layer - 1, len(rates), 3)
    return Sensitivity(
        criterion=CRITERIA.spec(CRITERIA.build(criterion)), rates=tuple(map(float, rates)),
        rise=table[..., 0], low=table[..., 1], high=table[..., 2], dense=dense.mean, windows=len(windows),
        n_context=windows.n_context, n_suffix=windows.tokens.shape[1] - windows.n_context, reach=reach,
    )  # fmt: skip


def _cuts(model: LanguageModel, rates: Sequence[float]) -> list[tuple[int, float]]:
    """(layer, rate) of every cut; the schedule made of the table is tried first, since it knows what it can take."""
    layers = range(1, model.config.n_layer)
    if not layers:
        raise InputError("sensitivity: a model of one layer has no layer at which pruning could begin")
    rise = [[0.0] * len(rates) for _ in layers]
    SCHEDULES.build({"class_path": "calibrated", "init_args": {"rates": list(rates), "rise": rise}})
    return [(layer, rate) for layer in layers for rate in rates]


def _face(model: LanguageModel, windows: EvalWindows, batch_size: int, reach: int | None) -> Face:
    nll = score_windows(model, windows, batch_size).nll
    return plain_face(nll, windows) if reach is None else far_face(nll, windows, reach)


def _rise(pruned: Face, dense: Face, windows: EvalWindows) -> tuple[float, float, float]:
    """Mean difference per token, paired by window, and the ends of its interval over documents."""
    estimate = mean_interval(
        pruned.nll - dense.nll, dense.tokens, windows.document, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    return estimate.mean, *(estimate.interval or (np.nan, np.nan))
