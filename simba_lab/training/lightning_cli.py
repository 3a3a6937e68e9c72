"""Lightning's command line over our module and data.

The run folder is ``trainer.default_root_dir``. Everything an experiment file may say is typed here; an unknown key is
an error.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse.typing import register_type
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from simba_lab.errors import InputError
from simba_lab.files import clear_partial
from simba_lab.training import sharding
from simba_lab.training.events import EventsLogger
from simba_lab.training.folder import disk_errors, only_one
from simba_lab.training.guard import FiniteGuard
from simba_lab.training.mistakes import blaming_config, check_checkpoint, check_config_files, shortened
from simba_lab.training.module import LanguageModeling, PartSpec
from simba_lab.training.progress import Throughput, progress_callback
from simba_lab.training.record import MetricsFile, RunCheckpoint, RunRecord
from simba_lab.training.start import check_weights
from simba_lab.training.stopping import Stopping, WholeCheckpoints

CONFIG_FILE = "config.yaml"
SEEDS = 2**32


class Parser(LightningArgumentParser):
    """Errors in one line, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise _input_error(ex) or InputError(shortened(message, self))


def _input_error(error: BaseException | None) -> InputError | None:
    """Our own error among the causes of one that the config parser wrapped around it."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


class _SaveConfig(SaveConfigCallback):
    """Saves the resolved config of a fit; the other subcommands leave the run folder's own alone.

    What only ``fit`` understands, where it resumed, is left out: the file is an experiment file like any other.
    """

    def setup(self, trainer: Trainer, pl_module: LanguageModeling, stage: str) -> None:
        """Nothing yet: a checkpoint or data that does not fit must leave the folder as it was."""

    def on_train_start(self, trainer: Trainer, pl_module: LanguageModeling) -> None:
        self.config = self.config.clone()
        for key in ("ckpt_path", "weights_only"):
            self.config.pop(key, None)
        super().setup(trainer, pl_module, "fit")


class Cli(LightningCLI):
    """LightningCLI with the run folder's parts built in.

    Args:
        held: what a fit holds while it runs, the run folder; whoever made it lets go.
    """

    def __init__(self, *args: Any, held: ExitStack, **kwargs: Any) -> None:
        self.held = held
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        register_type(PartSpec, lambda part: part.spec, PartSpec, fail_already_registered=False)
        parser = Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="a YAML file; several are laid over each other")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        config = self._given()
        check_seed(config.seed_everything)
        if subcommand := self.config.get("subcommand"):
            check_checkpoint(config.ckpt_path, _run_folder(config), subcommand)
            check_weights(config.model.weights, _run_folder(config) if subcommand == "fit" else None)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("data.vocab_size", "model.model.vocab_size", apply_on="instantiate")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")

    def _given(self) -> Any:
        """The configuration of the subcommand; without one, all there is."""
        subcommand = self.config.get("subcommand")
        return self.config[subcommand] if subcommand else self.config

    def before_instantiate_classes(self) -> None:
        settle_seeds(self._given())

    def instantiate_classes(self) -> None:
        with blaming_config():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._given()
        folder = _run_folder(config)
        kwargs = {**kwargs, "default_root_dir": str(folder)}
        if config.trainer.logger is None:
            kwargs["logger"] = [MetricsFile(folder), EventsLogger(folder)]
        if config.trainer.plugins is None:
            kwargs["plugins"] = [WholeCheckpoints()]
        if config.trainer.strategy == sharding.NAME:
            kwargs["strategy"] = sharding.ShardedLayers()
        if config.trainer.enable_progress_bar is False:
            callbacks = self.trainer_defaults["callbacks"]
            self.trainer_defaults["callbacks"] = [c for c in callbacks if not isinstance(c, ProgressBar)]
        sharding.check_strategy(self._get(self.config_init, "trainer")["strategy"])
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Takes the run folder, in which a killed fit may have left half a file."""
        sharding.check_device(self.trainer)
        if self.trainer.is_global_zero:
            folder = Path(self.trainer.default_root_dir)
            self.held.enter_context(only_one(folder, "trainer.default_root_dir", "fit"))
            for place in (folder, folder / "checkpoints"):
                clear_partial(place)

    def before_validate(self) -> None:
        sharding.check_device(self.trainer)

    before_test = before_predict = before_validate

    def after_fit(self) -> None:
        """Completes the record; held-out quality in bits per byte beside a compressor's on the same text."""
        if self.trainer.interrupted:
            return
        for callback in self.trainer.callbacks:
            if isinstance(callback, RunRecord):
                callback.complete(self.trainer, self.model)
        print_held_out(self.trainer, self.model, self.datamodule)


def check_seed(seed: bool | int | None) -> None:
    """Raises InputError for a number that Lightning's ``seed_everything`` does not take, and for null."""
    if seed is None:
        raise InputError("seed_everything: null is no number; give one or leave the key out")
    if not 0 <= seed < SEEDS:
        raise InputError(f"seed_everything: {seed} must lie in 0..{SEEDS - 1}")


def settle_seeds(config: Any) -> None:
    """Seeds of the initial weights and of the data that nobody gave become that of ``seed_everything``."""
    seed = config.get("seed_everything", 0)
    for key in ("model.seed", "data.init_args.seed"):
        if key in config and config[key] is None:
            config[key] = 0 if isinstance(seed, bool) else seed


def _run_folder(config: Any) -> Path:
    return Path(config.trainer.default_root_dir or "runs/unnamed")


def print_held_out(trainer: Trainer, model: LanguageModeling, data: LightningDataModule) -> None:
    """Measures the test split and prints it; for text beside ``xz -9`` of the same text."""
    (measured,) = trainer.test(model, data, verbose=False)
    if not trainer.is_global_zero:
        return
    if "test/bits_per_byte" in measured:
        xz = data.xz_bits_per_byte("test")
        for logger in trainer.loggers:
            logger.log_metrics({"test/xz_bits_per_byte": xz}, trainer.global_step)
        print(f"test: {measured['test/bits_per_byte']:.4f} bits per byte; xz -9 of the same text: {xz:.4f}")
    print(f"test: loss {measured['test/loss']:.4f} nats per token, accuracy {measured['test/accuracy']:.4f}")
    print(f"run folder: {trainer.default_root_dir}")


def run_cli(arguments: Sequence[str], run: bool = True) -> Cli:
    """Parse, build and, with ``run``, carry out a Lightning subcommand.

    SIGTERM ends it with exit code 0, a fit after it has saved. Raises InputError for a wrong key or value, for a run
    folder that another fit is writing to, and for a disk that takes no more.
    """
    _quiet()
    check_config_files(arguments)
    stopping = Stopping()
    try:
        with ExitStack() as held, disk_errors():
            if run:
                held.enter_context(stopping.watching())
            return _built(arguments, run, stopping, held)
    except ValueError as error:
        mistake = _input_error(error)
        if mistake is None:
            raise
        raise mistake from None
    except SIGTERMException:
        print("stopped by SIGTERM; the same command with --ckpt_path last continues", flush=True)
        raise
    except SystemExit as stop:
        # Lightning shuts down after Ctrl-C and then exits with 1, as after an error.
        if isinstance(stop.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _built(arguments: Sequence[str], run: bool, stopping: Stopping, held: ExitStack) -> Cli:
    return Cli(
        LanguageModeling,
        LightningDataModule,
        subclass_mode_data=True,
        run=run,
        args=list(arguments),
        save_config_callback=_SaveConfig,
        save_config_kwargs={"config_filename": CONFIG_FILE, "overwrite": True},
        trainer_defaults={
            "enable_model_summary": False,
            "log_every_n_steps": 10,
            "callbacks": [FiniteGuard(), stopping, Throughput(), RunRecord(), progress_callback()],
        },
        parser_kwargs={"prog": "simba-lab"},
        held=held,
    )


def _quiet() -> None:
    """Silences Lightning's advertisements and advice that a reader of a run cannot act on."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*", ".*Checkpoint directory .* exists and is not empty.*", ".*srun.*",
        ".*args parameter is intended to run from within Python.*", ".*'set_vital' is deprecated.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
