"""That a results file is what its sweep wrote, and rests on what its arms left: nothing in it is taken on trust.

A seal is a chain of SHA-256: one digest for every arm over its ledger and its likelihoods, and one over the content of
the results, those digests among it. It lies beside the results in a file of its own. Whoever edits a number breaks the
seal; whoever writes a new seal still has to agree with the ledgers, and the ledgers with the closed form of the model
and schedule they name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simba_lab.errors import AlteredRecord, InputError
from simba_lab.files import write_json
from simba_lab.model import ModelConfig, forward_flops
from simba_lab.pruning import PruningPlan

SEAL_FILE = "results.seal.json"
LEDGER_FILE, LIKELIHOOD_FILE = "arm.json", "nll.npy"
ARMS_FOLDER = "arms"
AGAIN = "run the sweep again: it keeps its finished arms and writes the results anew"


def seal(results: Mapping[str, Any], folder: Path) -> None:
    """Seals ``results`` and the files of their arms, which lie in ``folder`` under each arm's ``run``.

    Called before the results are written: killed in between, a sweep leaves results that its next run replaces.
    """
    arms = {arm["run"]: _digest_of_arm(_place(folder, arm["run"])) for arm in results["arms"]}
    write_json(folder / SEAL_FILE, {"arms": arms, "content": _digest(results, arms)})


def check_evidence(path: Path, results: Mapping[str, Any]) -> bool:
    """Raises AlteredRecord, naming the arm and the key where that is known, if ``path`` is not what a sweep wrote.

    ``results``: its content, of the right form. Arms whose files are not beside it, as in a copy, are covered by the
    seal alone. Returns whether there was anything to check: a file with neither seal nor arms beside it is not a
    sweep's, or an old one's.
    """
    if not (path.parent / SEAL_FILE).is_file() and not (path.parent / ARMS_FOLDER).is_dir():
        return False
    sealed = _read_seal(path)
    for arm in results["arms"]:
        place = _place(path.parent, arm["run"])
        if _digest_of_arm(place) is not None:
            _check_arm(path, arm, place)
            if sealed["arms"].get(arm["run"]) != _digest_of_arm(place):
                raise AlteredRecord(f"{place}: its files are not those that {path.name} was made from; {AGAIN}")
    if sealed.get("content") != _digest(results, sealed["arms"]):
        raise AlteredRecord(f"{path}: its content was changed after the sweep wrote it; {AGAIN}")
    return True


def _read_seal(path: Path) -> dict[str, Any]:
    place = path.with_name(SEAL_FILE)
    try:
        sealed = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        sealed = None
    if not (isinstance(sealed, dict) and isinstance(sealed.get("arms"), dict)):
        raise AlteredRecord(f"{path}: has no seal in {SEAL_FILE}, so nobody knows what the sweep wrote; {AGAIN}")
    return sealed


def _place(folder: Path, run: Any) -> Path:
    """The arm's folder, which a results file can only name below its own."""
    if not isinstance(run, str) or Path(run).is_absolute() or ".." in Path(run).parts or "\0" in run:
        raise AlteredRecord(f"{folder}: an arm's run is {str(run)[:60]!r}, it must name a folder below this one")
    return folder / run


def _digest(content: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
    text = json.dumps([dict(content), dict(arms)], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _digest_of_arm(place: Path) -> str | None:
    """Over both files; None where there are none."""
    if not (place / LEDGER_FILE).is_file() or not (place / LIKELIHOOD_FILE).is_file():
        return None
    total = hashlib.sha256()
    for name in (LEDGER_FILE, LIKELIHOOD_FILE):
        total.update(hashlib.sha256((place / name).read_bytes()).digest())
    return total.hexdigest()


def _check_arm(path: Path, arm: Mapping[str, Any], place: Path) -> None:
    """One row of the results against the ledger and the likelihoods it was made from."""
    for key, told, found in _differences(arm, place):
        if told != found:
            where = f"{path}: arm {arm['name']}: {key}"
            raise AlteredRecord(f"{where} is {told!r} here, but {place.name} gives {found!r}; {AGAIN}")


def _differences(arm: Mapping[str, Any], place: Path) -> Iterator[tuple[str, Any, Any]]:
    """(key, what the results say, what the arm's files give)."""
    ledger, mean = _ledger(place), _mean_likelihood(place)
    if arm.get("quality") is None or abs(arm["quality"] - mean) > 1e-9 * max(1.0, abs(mean)):
        yield "quality", arm.get("quality"), mean
    yield "flops", arm["flops"], sum(ledger["flops_by_op"].values())
    yield "wall_seconds", arm["wall_seconds"], ledger.get("wall_seconds")
    counts, flops = _closed_form(ledger)
    yield "keep_counts", arm["keep_counts"], counts
    for op, count in flops.items():
        yield f"FLOPs of {op} by the closed form", count, ledger["flops_by_op"].get(op, 0)


def _ledger(place: Path) -> dict[str, Any]:
    path = place / LEDGER_FILE
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
        flops = ledger["flops_by_op"].values()
        if all(isinstance(count, int) and not isinstance(count, bool) for count in flops):
            return ledger
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    raise AlteredRecord(f"{path}: is no ledger of an arm; delete its folder and {AGAIN}")


def _mean_likelihood(place: Path) -> float:
    path = place / LIKELIHOOD_FILE
    try:
        nll = np.load(path, mmap_mode="r")
        return float(nll.sum(1, dtype=np.float64).sum() / nll.size)
    except (OSError, ValueError, SyntaxError, TypeError, ArithmeticError, MemoryError):
        raise AlteredRecord(f"{path}: holds no likelihoods; delete its folder and {AGAIN}") from None


def _closed_form(ledger: Mapping[str, Any]) -> tuple[list[int], dict[str, int]]:
    """(tokens by layer, FLOPs by op) of the model, schedule and window that the ledger names; protocol suffix."""
    try:
        config = ModelConfig.from_dict(ledger["model"])
        plan = None if ledger["pruning"] is None else PruningPlan.from_spec(ledger["pruning"])
        n_context, n_suffix = ledger["n_context"], ledger["n_suffix"]
        counts = [n_context] * config.n_layer if plan is None else plan.schedule.counts(config.n_layer, n_context)
        return counts, forward_flops(config, counts, n_suffix, plan).by_op()
    except (KeyError, TypeError) as error:
        raise AlteredRecord(f"arm {ledger.get('name')}: its ledger does not say what ran: {error}; {AGAIN}") from None
    except InputError as error:
        raise InputError(f"arm {ledger.get('name')}: what ran cannot be rebuilt here: {error}") from None
