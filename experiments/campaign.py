"""Runs jobs of the ladder (experiments/jobs.py) on all GPUs of this machine, each as soon as what it needs is done.

    .venv/bin/python experiments/campaign.py --list                     # every job, and whether it is done
    .venv/bin/python experiments/campaign.py 'lookahead-63m-*'          # these and the trainings they need
    .venv/bin/python experiments/campaign.py --gpus 2 '*'               # everything that is missing

What is done is not run again, so that the same command goes on where it was stopped. Every configuration is read before
anything is trained: a misspelt key or a missing package is found in seconds, not behind hours of training. Ctrl-C and
SIGTERM reach all jobs, which save what they have. Logs lie in runs/campaign. Exit code 1: a job failed; those that do
not need it have run.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jobs import RUNS, Job, all_jobs

LOGS = RUNS / "campaign"
# On one H200 a 63m beside a Mamba-2 12m trains at 1.2e14 FLOP/s in all, alone at 1.6e14.
TRAININGS_PER_GPU, OTHERS_PER_GPU = 1, 4
SAY_EVERY = 60
"""Seconds between two looks at what is running."""


def selected(jobs: Mapping[str, Job], patterns: Sequence[str]) -> dict[str, Job]:
    """Jobs whose names match, and all that they need; raises SystemExit for a pattern that matches none."""
    wanted = set()
    for pattern in patterns:
        found = fnmatch.filter(jobs, pattern)
        if not found:
            raise SystemExit(f"campaign: no job matches {pattern!r}; --list shows all")
        wanted.update(found)
    while more := {need for name in wanted for need in jobs[name].needs} - wanted:
        wanted |= more
    return {name: job for name, job in jobs.items() if name in wanted}


def check(jobs: Mapping[str, Job]) -> None:
    """Reads every sweep's configuration and imports what the other commands import late."""
    from simba_lab.errors import InputError
    from simba_lab.sweep.config import read_sweep

    for module in ("simba_lab.evaluate.benchmarks", "simba_lab.inspection", "simba_lab.training.lightning_cli"):
        importlib.import_module(module)
    for job in jobs.values():
        if job.arguments[0] == "sweep":
            try:
                read_sweep(Path(job.arguments[2]), job.arguments[4::2])
            except InputError as error:
                raise SystemExit(f"campaign: {job.name}: {error}") from None


class Campaign:
    """The state of all jobs. ``start`` runs a command on a GPU (None: none) with its output in a file."""

    def __init__(self, jobs: Mapping[str, Job], gpus: int, start: Callable[..., subprocess.Popen]) -> None:
        self.jobs, self.gpus, self.start = jobs, gpus, start
        self.waiting = [name for name, job in jobs.items() if not job.is_done()]
        self.running: dict[str, tuple[subprocess.Popen, int, float]] = {}
        self.failed: list[str] = []

    def step(self) -> bool:
        """Notes what has ended and starts what can be started; False when nothing is left to wait for."""
        for name, (process, _, began) in list(self.running.items()):
            if process.poll() is not None:
                del self.running[name]
                self._ended(name, process.returncode, time.monotonic() - began)
        for name in list(self.waiting):
            missing = [need for need in self.jobs[name].needs if not self._has(need)]
            lost = [need for need in missing if need in self.failed]
            if lost:
                self.waiting.remove(name)
                self._fail(name, f"needs {lost[0]}, which failed")
            elif not missing and (gpu := self._free(self.jobs[name])) is not None:
                self.waiting.remove(name)
                self._begin(name, gpu)
        return bool(self.running or self.waiting)

    def say(self) -> None:
        """The last line that every running job has printed, which tells how far it is and what time is left."""
        for name in self.running:
            print(f"  {name}: {last_line(LOGS / f'{name}.log')}", flush=True)

    def stop(self) -> None:
        """SIGTERM to all jobs, and the time they need to save, which a second signal does not cut short."""
        if self.running:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            print(f"stopping: {', '.join(self.running)}", flush=True)
        for process, _, _ in self.running.values():
            process.terminate()
        for process, _, _ in self.running.values():
            process.wait()

    def _has(self, need: str) -> bool:
        """Whether a job is done; while it runs its record may be half written, and is not looked at."""
        return need not in self.running and self.jobs[need].is_done()

    def _free(self, job: Job) -> int | None:
        """The least loaded GPU with room for a job of this kind; a CPU takes one job at a time."""
        if not self.gpus:
            return None if self.running else 0
        room = TRAININGS_PER_GPU if job.training else OTHERS_PER_GPU
        loads: list[list[Job]] = [[] for _ in range(self.gpus)]
        for name, (_, place, _) in self.running.items():
            loads[place].append(self.jobs[name])
        places = [at for at, load in enumerate(loads) if sum(other.training == job.training for other in load) < room]
        return min(places, key=lambda at: len(loads[at]), default=None)

    def _begin(self, name: str, place: int) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        gpu = place if self.gpus else None
        self.running[name] = self.start(self.jobs[name].command(), gpu, LOGS / f"{name}.log"), place, time.monotonic()
        print(f"{name}: begun" + ("" if gpu is None else f" on GPU {gpu}"), flush=True)

    def _ended(self, name: str, code: int, seconds: float) -> None:
        if code == 0 and self.jobs[name].is_done():
            left = f"{len(self.running)} running, {len(self.waiting)} waiting"
            print(f"{name}: done in {seconds:.0f} s; {left}", flush=True)
        else:
            self._fail(name, f"exit code {code} after {seconds:.0f} s, see {LOGS / f'{name}.log'}")

    def _fail(self, name: str, why: str) -> None:
        self.failed.append(name)
        print(f"{name}: FAILED, {why}", flush=True)


def last_line(log: Path) -> str:
    """Of a log whose progress bar may rewrite its line, at most 120 characters."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 1000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "")


def start(command: Sequence[str], gpu: int | None, log: Path) -> subprocess.Popen:
    """On one of the GPUs that this process may use, with a share of the CPU's threads; else with all of them."""
    own = {}
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        threads = str(max(1, (os.cpu_count() or 1) // (2 * OTHERS_PER_GPU)))
        own = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        own["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **own})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of jobs; * and ? stand for anything")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs to use (default: all; 0: the CPU)")
    parser.add_argument("--list", action="store_true", help="print the jobs, and run none")
    args = parser.parse_args()
    jobs = all_jobs()
    chosen = selected(jobs, args.names) if args.names else jobs
    if args.list:
        for name, job in chosen.items():
            print(f"{'done' if job.is_done() else '-':5}{name}  {' '.join(job.arguments)}")
        return
    if not args.names:
        parser.error("name at least one job, or '*' for all; --list shows them")
    check(chosen)
    if args.gpus is None:
        import torch

        args.gpus = torch.cuda.device_count()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    campaign = Campaign(chosen, args.gpus, start)
    try:
        said = time.monotonic()
        while campaign.step():
            time.sleep(0.5)
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                campaign.say()
    finally:
        campaign.stop()
    if campaign.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
