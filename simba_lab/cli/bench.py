"""``simba-lab bench``: kernels, prefill, training and decoding of ours beside other implementations, in one run."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simba_lab.bench.cpu import BASELINE, Plan, compare
from simba_lab.bench.peers import Shape, option
from simba_lab.cli.bench_views import console, cpu_table, gpu_table, prefill_line, profile_tables, with_progress
from simba_lab.errors import InputError

if TYPE_CHECKING:
    import torch

    from simba_lab.bench.session import Session

EXAMPLES = """examples:
  simba-lab bench cpu --skip transformers --json bench.json
  simba-lab bench prefill --length 2048                (without a GPU: dense against pruned linearly to 10 %)
  simba-lab bench kernels --json kernels.json          (with a GPU, as are the following)
  simba-lab bench prefill --case 130m:1x2048 --json prefill.json
  simba-lab bench train --case 256 --profile           (where the time of a pruned step goes)
  simba-lab bench table kernels.json prefill.json      (Markdown)
"""
TARGETS = {
    "cpu": "a training step on the CPU beside mambapy and transformers",
    "prefill": "pruned prefill beside dense and what FLOPs promise; on a GPU beside mamba-ssm",
    "kernels": "every GPU kernel beside mamba-ssm's and causal-conv1d's",
    "train": "tokens per second of training on a GPU beside mamba-ssm",
    "decode": "tokens per second of decoding on a GPU beside mamba-ssm",
    "table": "results of the GPU benches as Markdown",
}
HELP = {
    "d_model": "width of the model",
    "n_layer": "layers",
    "d_state": "states per channel",
    "vocab_size": "vocabulary",
    "batch": "sequences in the batch",
    "length": "tokens in a sequence",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the targets of ``bench`` and their arguments."""
    parser.description = (
        "Times ours beside other implementations. Correctness comes first: what differs from the readable reference "
        "gets no number, and the exit code is 1."
    )
    parser.epilog = EXAMPLES
    targets = parser.add_subparsers(dest="target", metavar="TARGET", required=True, title="targets")
    for name, summary in TARGETS.items():
        sub = targets.add_parser(name, help=summary, description=summary)
        sub.add_argument("--json", metavar="FILE", type=Path, help="write the result to FILE as JSON")
        _ARGUMENTS[name](sub)


def _add_cpu(parser: argparse.ArgumentParser) -> None:
    _add_shape(parser)
    parser.add_argument("--threads", type=int, help="threads of each implementation (all cores)")
    parser.add_argument(
        "--skip", action="append", default=[], choices=["mambapy", "transformers"], help="leave out (repeatable)"
    )
    parser.add_argument("--include-reference", action="store_true", help="also time our readable reference, slow")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and tokens (%(default)s)")


def _add_shape(parser: argparse.ArgumentParser) -> None:
    for field in dataclasses.fields(Shape):
        text = f"{HELP[field.name]} (%(default)s)"
        parser.add_argument(option(field.name), type=int, default=field.default, help=text)
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats, after a warm-up (%(default)s)")


def _add_prefill(parser: argparse.ArgumentParser) -> None:
    _add_shape(parser)
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="(auto: CUDA if there is one)"
    )
    parser.add_argument("--criterion", default="global_impact", help="CPU: how tokens are scored (%(default)s)")
    parser.add_argument("--final-keep", type=float, default=0.1, help="CPU: share kept at the top (%(default)s)")
    _add_gpu(parser, "GPU: a published shape and its batch, e.g. 130m:1x2048 (repeatable; all)")


def _add_gpu(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--case", action="append", default=[], metavar="NAME", help=what)
    parser.add_argument("--seed", type=int, help="seed of weights and inputs (a fresh one, recorded)")
    parser.add_argument("--backend", default="triton", help="our kernels on the GPU (%(default)s)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_gpu(parser, "a width: 256, 384, 512 or 768 (repeatable; all)")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--deterministic", action="store_true", help="also dense with trainer.deterministic: its cost")
    either.add_argument(
        "--profile", action="store_true", help="instead: the kernels of a pruned step beside those of a dense one"
    )


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="RESULT", help="what --json of a GPU bench wrote")
    parser.add_argument("--into", type=Path, metavar="FILE", help="put the table between the markers in FILE")
    parser.add_argument("--aimed", action="store_true", help="only lines that have a target")


_ARGUMENTS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "cpu": _add_cpu,
    "prefill": _add_prefill,
    "kernels": lambda parser: _add_gpu(parser, "an op, e.g. scan (repeatable; all)"),
    "train": _add_train,
    "decode": lambda parser: _add_gpu(parser, "a published shape and a batch, e.g. 130m:64 (repeatable; all)"),
    "table": _add_table,
}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, print a table, return the measurements."""
    return _RUN[args.target](args)


def _run_cpu(args: argparse.Namespace) -> dict[str, Any]:
    plan = Plan(
        shape=_shape(args),
        repeats=args.repeats,
        threads=args.threads,
        skip=tuple(args.skip),
        include_reference=args.include_reference,
        seed=args.seed,
    )
    result = with_progress(lambda show: compare(plan, show))
    console().print(cpu_table(result))
    if result["speedup_over_mambapy"] is not None:
        console().print(f"simba_lab is {result['speedup_over_mambapy']:.1f} times as fast as {BASELINE}")
    return result


def _shape(args: argparse.Namespace) -> Shape:
    return Shape(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Shape)})


def _run_prefill(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    from simba_lab.bench.prefill import compare_prefill

    if args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available()):
        from simba_lab.bench.prefill_cuda import measure_prefill, published_cases

        chosen = _chosen(args, published_cases())
        return _gpu(args, lambda session: session.bench("prefill", [*chosen.values()], measure_prefill))
    if args.case:
        raise InputError("--case: published shapes need a CUDA device; on the CPU say --d-model, --length and so on")
    plan = Plan(shape=_shape(args), repeats=args.repeats)
    result = with_progress(
        lambda show: compare_prefill(
            plan.shape, plan.shape.length, args.criterion, args.final_keep, 4 * plan.repeats, show
        )
    )
    console().print(prefill_line(result), highlight=False)
    return result


def _run_kernels(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.bench.kernels import SUITE, bench_kernels

    chosen = _chosen(args, SUITE)
    return _gpu(args, lambda session: bench_kernels(session, chosen))


def _run_train(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.bench.training import CASES, measure_training

    chosen = [dataclasses.replace(case, deterministic=args.deterministic) for case in _chosen(args, CASES).values()]
    if args.profile:
        from simba_lab.bench.training_profile import profile_training

        return _gpu(args, lambda session: profile_training(chosen, session), profile_tables)
    return _gpu(args, lambda session: session.bench("train", chosen, measure_training))


def _run_decode(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.bench.decode import measure_decoding, published_cases

    chosen = _chosen(args, published_cases())
    return _gpu(args, lambda session: session.bench("decode", [*chosen.values()], measure_decoding))


def _chosen(args: argparse.Namespace, cases: Mapping[str, Any]) -> dict[str, Any]:
    """The cases asked for, by default all. Raises InputError for one that is not known."""
    for name in args.case:
        if name not in cases:
            raise InputError(f"--case: {name!r} is unknown; use one of {', '.join(cases)}")
    return {name: case for name, case in cases.items() if not args.case or name in args.case}


def _gpu(
    args: argparse.Namespace,
    measure: Callable[[Session], dict[str, Any]],
    view: Callable[[dict[str, Any]], Any] = gpu_table,
) -> dict[str, Any]:
    """A bench on the CUDA device, ``view`` of it printed.

    Raises InputError without such a device or for a backend that cannot run there.
    """
    device = _cuda_device(args.target)
    from simba_lab.bench.session import Session
    from simba_lab.files import finite, write_json
    from simba_lab.kernels import resolve

    resolve(args.backend, device.type)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed

    def keep(so_far: dict[str, Any]) -> None:
        if args.json is not None:
            write_json(args.json, finite(so_far))

    result = with_progress(lambda show: measure(Session(device, seed, args.backend, show, keep)))
    console().print(view(result))
    return result


def _cuda_device(target: str) -> torch.device:
    import torch

    if not torch.cuda.is_available():
        raise InputError(f"bench {target}: needs a CUDA device, and torch {torch.__version__} sees none here")
    return torch.device("cuda", torch.cuda.current_device())


def _run_table(args: argparse.Namespace) -> dict[str, Any]:
    from simba_lab.bench.table import insert, markdown, read

    text = markdown(read(args.files), args.aimed)
    if args.into is None:
        print(text, end="")
    else:
        insert(text, args.into)
    return {"markdown": text}


_RUN: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "cpu": _run_cpu,
    "prefill": _run_prefill,
    "kernels": _run_kernels,
    "train": _run_train,
    "decode": _run_decode,
    "table": _run_table,
}
