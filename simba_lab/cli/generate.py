"""``simba-lab generate``: text after a prompt, which is pruned once; then tokens are decoded from cached states."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from simba_lab.checkpoint import load, tokenizer_path
from simba_lab.cli.pruning_flags import configure_pruning, described_plan
from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.arguments import read_device
from simba_lab.evaluate.generation import Decoding, TextStream, continuation
from simba_lab.kernels.cost import CONVENTION
from simba_lab.model import LanguageModel, Output

EXAMPLES = """examples:
  simba-lab generate --checkpoint runs/base --prompt 'def main(' --max-new-tokens 100
  simba-lab generate --checkpoint runs/base --prompt-file long.txt --mean-keep 0.55
  simba-lab generate --checkpoint state-spaces/mamba-130m --prompt-file - --criterion norm --schedule linear \\
      --final-keep 0.1 --temperature 0.8 --top-p 0.95 --seed 7 --json out.json < long.txt
The text goes to standard output as it is produced, a line of figures to standard error."""
SEEDS = 2**63


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``generate``."""
    parser.epilog = EXAMPLES
    text = "run folder, .ckpt, state-spaces or transformers folder or hub name, a tokenizer.json beside it"
    parser.add_argument("--checkpoint", metavar="PATH", required=True, help=text)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text to go on from, as it is; - reads stdin")
    prompt.add_argument("--prompt", metavar="TEXT", help="the text itself")
    configure_pruning(parser.add_argument_group("pruning of the prompt; without any, as the checkpoint was saved"))
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most (%(default)s)")
    text = "0 takes the most likely token; above, tokens are drawn (%(default)s)"
    decoding.add_argument("--temperature", type=float, default=0.0, metavar="T", help=text)
    text = "draw among the fewest most likely tokens of this probability (%(default)s)"
    decoding.add_argument("--top-p", type=float, default=1.0, metavar="P", help=text)
    decoding.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (%(default)s)")
    parser.add_argument("--device", metavar="NAME", help="of torch (cuda where there is one, else cpu)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Stream the text, then return it with what it took."""
    decoding = _decoding(args)
    prompt = _prompt(args)
    device = read_device(args.device)
    model = load(args.checkpoint).to(device)
    plan = described_plan(args, model.config.n_layer)
    model = model if plan is None else model.with_pruning(plan)
    tokenizer = checkpoint_tokenizer(args.checkpoint, model)
    ids = tokenizer.encode(prompt)
    out, prefill_seconds = _prefill(model, ids)
    text, moments = _write(model, out, decoding, tokenizer)
    # The first token is that of the prefill: only those after it cost a decoding step.
    rate = (len(moments) - 1) / (moments[-1] - moments[0]) if len(moments) > 1 else None
    result = {
        "arm": "dense" if model.pruning is None else model.pruning.name,
        "prompt_tokens": len(ids),
        "new_tokens": len(moments),
        "text": text,
        "stopped": "length" if len(moments) == decoding.max_tokens else "end_of_text",
        "prefill_seconds": prefill_seconds,
        "tokens_per_second": rate,
        "kept": [positions.shape[1] for positions in out.kept],
        "prefill_flops": model.flops(len(ids), 0).total,
        "convention": CONVENTION,
    }
    print(_figures(result), file=sys.stderr)
    return result


def _decoding(args: argparse.Namespace) -> Decoding:
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not (args.temperature >= 0 and math.isfinite(args.temperature)):
        raise InputError(f"--temperature must be at least 0, got {args.temperature}")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p must lie in (0, 1], got {args.top_p}")
    if args.temperature == 0 and args.top_p < 1:
        raise InputError("--top-p is for drawing tokens: give a --temperature above 0 too")
    if not 0 <= args.seed < SEEDS:
        raise InputError(f"--seed must lie in 0..{SEEDS - 1}, got {args.seed}")
    return Decoding((), args.max_new_tokens, args.temperature, args.top_p, seed=args.seed)


def _prompt(args: argparse.Namespace) -> str:
    """The prompt, line ends as they are."""
    source, raw = _prompt_bytes(args)
    if not raw:
        raise InputError(f"{source} is empty; there is nothing to go on from")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}; convert it") from None


def _prompt_bytes(args: argparse.Namespace) -> tuple[str, bytes]:
    """(where from, content)."""
    if args.prompt is not None:
        return "--prompt", os.fsencode(args.prompt)
    if args.prompt_file == "-":
        return "--prompt-file: standard input", sys.stdin.buffer.read()
    source = f"--prompt-file: {args.prompt_file}"
    try:
        return source, Path(args.prompt_file).read_bytes()
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}; name a text file, or - for standard input") from None


def checkpoint_tokenizer(checkpoint: str, model: LanguageModel) -> Tokenizer:
    """The tokenizer beside a checkpoint; raises InputError without one, or with one of more tokens than the model."""
    try:
        path = tokenizer_path(checkpoint)
    except InputError as error:
        raise InputError(f"{error}; copy the tokenizer.json that the model was trained with there") from None
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > model.config.padded_vocab_size:
        raise InputError(
            f"{path} has {tokenizer.vocab_size} tokens, the model only {model.config.padded_vocab_size}: "
            "copy the tokenizer.json that it was trained with there"
        )
    return tokenizer


@torch.no_grad()
def _prefill(model: LanguageModel, ids: list[int]) -> tuple[Output, float]:
    """The prompt's output and the seconds it took. It runs once, which is less work than capturing a graph of it."""
    start = time.perf_counter()
    out = model.prefill(torch.tensor([ids], device=model.device))
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return out, time.perf_counter() - start


def _write(model: LanguageModel, out: Output, decoding: Decoding, tokenizer: Tokenizer) -> tuple[str, list[float]]:
    """Print the text as it comes; returns it with the time at which each token was known."""
    stream, pieces, moments = TextStream(tokenizer), [], []
    for token in continuation(model, out, decoding, tokenizer, torch.Generator().manual_seed(decoding.seed)):
        moments.append(time.perf_counter())
        pieces.append(stream.push(token))
        print(pieces[-1], end="", flush=True)
    pieces.append(stream.finish())
    print(pieces[-1], flush=True)
    return "".join(pieces), moments


def _figures(result: dict[str, Any]) -> str:
    rate = result["tokens_per_second"]
    return (
        f"{result['arm']}: {result['prompt_tokens']:,} prompt tokens in {result['prefill_seconds']:.2f} s "
        f"({result['prefill_flops'] / 1e9:,.3f} GFLOPs, {result['kept'][-1]:,} reach the last layer), "
        f"{result['new_tokens']:,} new tokens" + ("" if rate is None else f", {rate:,.1f} a second")
    )
