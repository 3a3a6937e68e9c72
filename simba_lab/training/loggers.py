"""What Lightning's loggers of a run folder have in common: their numbers lie in the folder and can be taken back."""

from __future__ import annotations

import argparse
from abc import abstractmethod
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class FolderLogger(Logger):
    """Keeps the numbers it is given, except the epoch, in ``folder``; the first process of a run alone writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    def log_hyperparams(self, params: argparse.Namespace | dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config has its own file."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.write({key: value for key, value in metrics.items() if key != "epoch"}, step)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Forget what was written from ``step`` on: a resumed run writes it again."""
        self.forget_from(step)

    @abstractmethod
    def write(self, metrics: dict[str, float], step: int | None) -> None:
        """Numbers of one step."""

    @abstractmethod
    def forget_from(self, step: int) -> None:
        """Take back the numbers of ``step`` and of those after it."""
