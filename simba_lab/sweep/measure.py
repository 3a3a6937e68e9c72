"""The measurement of one arm: the same whether the sweep's own process does it or one of its workers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from simba_lab.checkpoint import SPEC_FILE, WEIGHTS_FILE, load
from simba_lab.checkpoint.tokenizer_file import tokenizer_beside
from simba_lab.data import EvalWindows, TextData
from simba_lab.data.recall_windows import plant
from simba_lab.errors import InputError
from simba_lab.evaluate.arguments import read_device
from simba_lab.evaluate.windows import far_face, plain_face, score_windows
from simba_lab.model import LanguageModel
from simba_lab.sweep.config import SweepConfig
from simba_lab.sweep.plan import PlannedArm, SweepPlan, model_of
from simba_lab.sweep.progress import SweepProgress
from simba_lab.sweep.store import ArmStore, StoredArm, digest
from simba_lab.training import Experiment
from simba_lab.training.experiment import same_tokens


class Measurement:
    """Weights, windows and the store of finished arms.

    Windows are cut at once: a file that asks for windows the data does not have, or for a device that is not here, is
    refused before training.
    """

    def __init__(self, config: SweepConfig, plan: SweepPlan, folder: Path, base: Experiment) -> None:
        self.config, self.plan, self.base = config, plan, base
        self.store, self.device = ArmStore(folder / "arms"), read_device(config.device)
        self.windows = self._windows(config.split, config.windows)
        self.search_windows = self._windows(config.search.split, config.search.windows) if config.search else None
        self._weights: dict[Path, LanguageModel] = {}

    def _windows(self, split: str, count: int) -> EvalWindows:
        windows = self.base.data.eval_windows(split, self.config.n_context, self.config.n_suffix, count)
        if self.config.recall is None:
            return windows
        if not isinstance(self.base.data, TextData):
            raise InputError(f"recall: facts are planted in text, which {self.base.path} does not read")
        return plant(windows, self.base.data.tokenizer, **dataclasses.asdict(self.config.recall))

    def weights(self, experiment: Experiment) -> LanguageModel:
        if experiment.folder not in self._weights:
            self._refuse_other_tokens(experiment)
            self._weights[experiment.folder] = load(experiment.folder, dtype=self.config.dtype).to(self.device)
        return self._weights[experiment.folder]

    def _refuse_other_tokens(self, experiment: Experiment) -> None:
        """All arms read the windows of the base's tokenizer."""
        ours, theirs = (tokenizer_beside(folder) for folder in (self.base.folder, experiment.folder))
        if ours and theirs and not same_tokens(ours, theirs):
            raise InputError(f"arms: {experiment.path} was trained with another tokenizer than {self.base.path}")

    def fingerprint(self, arm: PlannedArm) -> str:
        """Changes with whatever decides the arm's numbers, up to the rounding in which devices differ."""
        folder = arm.experiment.folder
        spec = arm.spec() | {"dtype": self.config.dtype}
        return digest(spec, folder / SPEC_FILE, folder / WEIGHTS_FILE, self.windows.tokens.numpy())

    def stored(self, arm: PlannedArm) -> StoredArm | None:
        return self.store.load(arm.name, self.fingerprint(arm))

    def measure(self, arm: PlannedArm, fingerprint: str, progress: SweepProgress | None = None) -> StoredArm:
        """Scores the windows and stores the arm."""
        model = model_of(arm, self.weights(arm.experiment))
        told = progress.windows_done if progress else None
        scores = score_windows(model, self.windows, self.config.batch_size, arm.arm.n_context, told)
        made_with = {"backend": model.backend.name, "device": str(self.device), "dtype": self.config.dtype}
        details = arm.spec() | {"weights": str(arm.experiment.folder)} | made_with
        return self.store.save(arm.name, fingerprint, scores, details)

    def faces(self, kept: StoredArm) -> tuple[float, float | None]:
        """Quality on all suffix tokens and on the far ones, nats per token."""
        return plain_face(kept.nll, self.windows).mean, far_face(kept.nll, self.windows, self.plan.reach).mean
