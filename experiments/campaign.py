"""Runs jobs of the ladder (experiments/jobs.py) on all GPUs of this machine, each as soon as what it needs is done.

    .venv/bin/python experiments/campaign.py --list                     # every job, and whether it is done
    .venv/bin/python experiments/campaign.py 'lookahead-63m-*'          # these and the trainings they need
    .venv/bin/python experiments/campaign.py --gpus 2 '*'               # everything that is missing

Of the jobs that could begin, the one named first does. What is done is not run again, so that the same command goes
on where it was stopped. Before anything is trained every sweep is read, every training that goes on from no other, and
what commands import late: a misspelt key, a missing file or package is found in seconds, not behind hours of training.
Ctrl-C and SIGTERM reach all jobs, which save what they have. Logs lie in runs/campaign. Exit code 1: a job failed;
those that do not need it have run.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from jobs import LADDER, RUNS, Job, all_jobs

from simba_lab.sweep.children import shares, start

LOGS = RUNS / "campaign"
# On one H200 a 63m beside a Mamba-2 12m trains at 1.2e14 FLOP/s in all, alone at 1.6e14.
TRAININGS_PER_GPU, OTHERS_PER_GPU = 1, 4
SAY_EVERY = 60
"""Seconds between two looks at what is running."""


def selected(jobs: Mapping[str, Job], patterns: Sequence[str]) -> dict[str, Job]:
    """Jobs whose names match, in the order of the patterns, each behind what it needs.

    Raises SystemExit for a pattern that matches none.
    """
    found: dict[str, Job] = {}

    def add(name: str) -> None:
        for need in jobs[name].needs:
            add(need)
        found.setdefault(name, jobs[name])

    for pattern in patterns:
        names = fnmatch.filter(jobs, pattern)
        if not names:
            raise SystemExit(f"campaign: no job matches {pattern!r}; --list shows all")
        for name in names:
            add(name)
    return found


def check(jobs: Mapping[str, Job]) -> None:
    """Reads configurations and imports what commands import late; raises SystemExit for the first that is wrong."""
    from simba_lab.errors import InputError
    from simba_lab.sweep.config import read_sweep
    from simba_lab.training import read_experiment

    for module in ("simba_lab.cli.eval_tasks", "simba_lab.inspection", "lm_eval"):
        importlib.import_module(module)
    for job in jobs.values():
        path = Path(job.arguments[2])
        try:
            if job.arguments[0] == "sweep":
                read_sweep(path, job.arguments[4::2])
            elif job.training and not job.needs and not job.is_done():
                read_experiment(path)
        except InputError as error:
            raise SystemExit(f"campaign: {job.name}: {error}") from None


class Campaign:
    """The state of all jobs. ``gpus`` has the settings of the environment that put a job on each; none: the CPU."""

    def __init__(self, jobs: Mapping[str, Job], gpus: Sequence[Sequence[str]]) -> None:
        self.jobs, self.gpus = jobs, gpus
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
        loads: list[list[Job]] = [[] for _ in self.gpus]
        for name, (_, place, _) in self.running.items():
            loads[place].append(self.jobs[name])
        places = [at for at, load in enumerate(loads) if sum(other.training == job.training for other in load) < room]
        return min(places, key=lambda at: len(loads[at]), default=None)

    def _begin(self, name: str, place: int) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        with (LOGS / f"{name}.log").open("w") as log:
            settings = self.gpus[place] if self.gpus else ()
            # In a session of its own Ctrl-C does not reach it, but SIGTERM from here, upon which it saves.
            output = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
            process = start(self.jobs[name].command(), settings, **output)
        self.running[name] = process, place, time.monotonic()
        print(f"{name}: begun" + (f" on GPU {place}" if self.gpus else ""), flush=True)

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


def places(gpus: int | None) -> list[list[str]]:
    """Settings that put a job on each of so many GPUs (None: all), with its share of the CPU's threads."""
    import torch

    found = torch.cuda.device_count()
    if gpus is not None and not 0 <= gpus <= found:
        raise SystemExit(f"campaign: --gpus {gpus}: this machine has {found}")
    gpus = found if gpus is None else gpus
    return shares(found * (TRAININGS_PER_GPU + OTHERS_PER_GPU))[:gpus] if gpus else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="names of jobs; * and ? stand for anything")
    parser.add_argument("--gpus", type=int, default=None, help="GPUs to use (default: all; 0: the CPU)")
    parser.add_argument("--list", action="store_true", help="print the jobs, and run none")
    args = parser.parse_args()
    if not LADDER.is_dir():
        raise SystemExit(f"campaign: no folder {LADDER} here; run it in the root of the repository")
    jobs = all_jobs()
    chosen = selected(jobs, args.names) if args.names else jobs
    if args.list:
        for name, job in chosen.items():
            print(f"{'done' if job.is_done() else '-':5}{name}  {' '.join(job.arguments)}")
        return
    if not args.names:
        parser.error("name at least one job, or '*' for all; --list shows them")
    check(chosen)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    campaign = Campaign(chosen, places(args.gpus))
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
