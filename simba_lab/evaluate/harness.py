"""The evaluation harness's view of a language model of ours: ``--model simba_lab``.

Importing this module imports lm_eval; nothing else in the package does. Every context is pruned with its boundary at
the last context token, everything after it is dense (protocol ``suffix`` of the model).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import model_registry
from tqdm import tqdm

from simba_lab import environment
from simba_lab.checkpoint import load, model_spec, tokenizer_path
from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.arguments import (
    DEFAULT_BATCH,
    DEFAULT_LENGTH,
    DEFAULT_SUFFIX,
    HARNESS_DEVICE,
    pruning_plan,
    read_batch_size,
    read_device,
    read_whole,
)
from simba_lab.evaluate.fingerprint import arm_hash, weights_hash
from simba_lab.evaluate.generation import Decoding, Prompt, generate
from simba_lab.evaluate.likelihood import score_pairs
from simba_lab.evaluate.scoring import Pair, encode_pairs, rolling_pairs
from simba_lab.kernels.cost import CONVENTION, Ledger, recording
from simba_lab.model import LanguageModel
from simba_lab.registry import Spec

NAME = "simba_lab"
_log = logging.getLogger(__name__)


def register() -> None:
    """Make ``simba_lab`` a model name of the harness in this process."""
    # The harness fills its table of models only while that is empty.
    import lm_eval.models  # noqa: F401

    if NAME not in model_registry:
        model_registry.register(NAME, target=f"{__name__}:{SimbaLabLM.__name__}")


class SimbaLabLM(LM):
    """A checkpoint of ours, dense or pruned, as a model of the harness.

    Args:
        checkpoint: a run folder, a .ckpt, or what else :func:`simba_lab.load` takes, with its tokenizer.
        criterion: registry name, class path or spec. Its scalar options are given beside it (``reduce=absmax``).
        schedule: likewise (``final_keep=0.1``). Whatever is not given stays as the checkpoint was saved, which is
            dense for most; a dense checkpoint for which only some of it is given is pruned by ``linear`` and
            ``global_impact``.
        mean_keep: mean share of the context over the layers, instead of the schedule's own parameter.
        protect_recent: share of the kept set that is its newest tokens.
        dense: run a checkpoint that was saved with pruning without it.
        batch_size: sequences at a time; "auto" is 8, at most ``max_batch_size``. Results do not depend on it.
        device: of torch, or auto; the harness's default, cuda:0, means auto too.
        backend: kernels to use.
        max_length: tokens fed at most; longer contexts lose their oldest tokens, which is logged.
        n_suffix: tokens scored per block by :meth:`loglikelihood_rolling`.
        pretrained: the harness's customary name for ``checkpoint``; it names the folder of its results.

    Raises InputError for an unknown argument (with the list), a bad value, or a checkpoint that cannot be used.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        criterion: Spec | None = None,
        schedule: Spec | None = None,
        mean_keep: float | None = None,
        protect_recent: float | None = None,
        dense: bool = False,
        batch_size: int | str = DEFAULT_BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
        backend: str = "auto",
        max_length: int = DEFAULT_LENGTH,
        n_suffix: int = DEFAULT_SUFFIX,
        pretrained: str | None = None,
        answers: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        checkpoint = checkpoint if checkpoint is not None else pretrained
        if checkpoint is None:
            raise InputError("model_args: checkpoint is required: a run folder or a .ckpt file")
        size, place = read_batch_size(batch_size, max_batch_size), read_device(device, unasked=HARNESS_DEVICE)
        self._settle(size, max_length, n_suffix, answers)
        saved = load(str(checkpoint), backend)
        plan = pruning_plan(saved, criterion, schedule, mean_keep, protect_recent, dense, options)
        tokenizer = Tokenizer.load(tokenizer_path(str(checkpoint)))
        self._equip(saved.with_pruning(plan).to(place), tokenizer)

    @classmethod
    def from_model(
        cls,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int | str = DEFAULT_BATCH,
        max_length: int = DEFAULT_LENGTH,
        n_suffix: int = DEFAULT_SUFFIX,
        answers: str | None = None,
        weights: str | None = None,
    ) -> SimbaLabLM:
        """A loaded model as it is: its own pruning plan, backend and device.

        Arms of one checkpoint share its weights: ``from_model(lm, tokenizer)``, ``from_model(lm.sparsified(...),
        tokenizer)``. ``weights`` is the hash of the weights where it is known already (:attr:`weights_hash` of another
        arm), for hashing large weights takes time. The rest is as in the constructor.
        """
        made = cls.__new__(cls)
        LM.__init__(made)
        made._settle(read_batch_size(batch_size, None), max_length, n_suffix, answers)
        made._equip(model, tokenizer)
        if weights is not None:
            made.weights_hash = weights
        return made

    def _settle(self, batch_size: int, max_length: int, n_suffix: int, answers: str | None) -> None:
        self.batch_size = batch_size
        self.max_length = read_whole("max_length", max_length, at_least=2)
        self.n_suffix = read_whole("n_suffix", n_suffix, at_least=1)
        if self.n_suffix >= self.max_length:
            raise InputError(f"model_args: n_suffix {n_suffix} must be below max_length {max_length}")

    def _equip(self, model: LanguageModel, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab_size > model.config.padded_vocab_size:
            known = model.config.padded_vocab_size
            raise InputError(f"tokenizer: it has {tokenizer.vocab_size} tokens, the model only {known}")
        model.keep_counts(self.max_length)
        self.model, self._tokenizer, self._device = model, tokenizer, model.device
        self.ledger = Ledger()
        self.computed: Counter[str] = Counter()

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eot_id

    @property
    def flops(self) -> int:
        """FLOPs of everything computed so far, padding included; answers from a response cache cost nothing."""
        return self.ledger.total

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is it the greedy continuation) of each (context, continuation)."""
        pairs = self._shortened(encode_pairs(self._tokenizer, [request.args for request in requests]))
        scores = score_pairs(self.model, pairs, self.batch_size)
        answers = ((index, (score.log_likelihood, score.greedy)) for index, score in scores)
        return self._collect("loglikelihood", requests, answers, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, every token scored exactly once.

        Protocol: the text follows the end-of-text token and is scored in blocks of ``n_suffix`` tokens. Before each
        block its context, all that precedes it up to ``max_length - n_suffix`` tokens, is prefilled and pruned; the
        block itself is dense. For a dense model that is perplexity by a sliding window of stride ``n_suffix``.
        """
        return self._collect("loglikelihood_rolling", requests, self._documents(requests), disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to the first stop string, the end-of-text token or the length limit.

        Sampling is keyed by the request and its repetition: the same text in any batch and any run.
        """
        prompts = self._prompts(requests)
        texts = generate(self.model, self._tokenizer, prompts, self.batch_size)
        return self._collect("generate_until", requests, texts, disable_tqdm)

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Give this arm a table of its own in the response cache.

        The harness keys its cache by request alone, so that all models which share a file would share answers. Raises
        InputError if the cache has no tables.
        """
        super().set_cache_hook(cache_hook)
        database = cache_hook.dbdict
        if database is None:
            return
        if not hasattr(database, "tablename"):
            raise InputError("use_cache: the response cache of this lm_eval has no tables to keep models apart")
        type(database)(database.filename, tablename=self.fingerprint).close()
        database.tablename = self.fingerprint

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything the answers depend on."""
        settings = {"max_length": self.max_length, "n_suffix": self.n_suffix, "device": self._device.type}
        return arm_hash(self.model, self.weights_hash, self._tokenizer.fingerprint(), settings)

    @cached_property
    def weights_hash(self) -> str:
        return weights_hash(self.model)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results, under ``config``."""
        spec = model_spec(self.model)
        return {
            "model_num_parameters": sum(weight.numel() for weight in self.model.parameters()),
            "model_dtype": str(self.model.lm_head.weight.dtype),
            "model_sha": self.weights_hash,
            "simba_lab": {
                "environment": environment.describe(),
                "arm": "dense" if self.model.pruning is None else self.model.pruning.name,
                "pruning": spec["pruning"],
                "protocol": "suffix",
                "max_length": self.max_length,
                "n_suffix": self.n_suffix,
                "backend": self.model.backend.name,
                "device": str(self._device),
                "fingerprint": self.fingerprint,
                "requests_computed": dict(self.computed),
                "flops": self.flops,
                "flops_by_op": self.ledger.by_op(),
                "convention": CONVENTION,
            },
        }

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        raise InputError("apply_chat_template: language models of ours have no chat template; leave the option out")

    def _shortened(self, pairs: list[Pair]) -> list[Pair]:
        shortened = [pair.shortened(self.max_length) for pair in pairs]
        cut = sum(len(short.context) < len(pair.context) for short, pair in zip(shortened, pairs, strict=True))
        self._note_cut(cut, len(pairs))
        return shortened

    def _note_cut(self, cut: int, of: int) -> None:
        if cut:
            _log.warning("%d of %d contexts lost their oldest tokens: max_length is %d", cut, of, self.max_length)

    def _documents(self, requests: Sequence[Instance]) -> Iterator[tuple[int, float]]:
        """(request, log-likelihood) as soon as the last block of its text is scored."""
        dense = self.model.pruning is None
        texts = self._tokenizer.encode_batch([request.args[0] for request in requests])
        blocks = [rolling_pairs(ids, self.eot_token_id, self.max_length, self.n_suffix, dense) for ids in texts]
        owners = [request for request, pairs in enumerate(blocks) for _ in pairs]
        missing = Counter(owners)
        total = [0.0] * len(requests)
        yield from ((request, 0.0) for request, pairs in enumerate(blocks) if not pairs)
        for block, score in score_pairs(self.model, [pair for pairs in blocks for pair in pairs], self.batch_size):
            request = owners[block]
            total[request] += score.log_likelihood
            missing[request] -= 1
            if not missing[request]:
                yield request, total[request]

    def _prompts(self, requests: Sequence[Instance]) -> list[Prompt]:
        prompts, seen, cut = [], Counter(), 0
        for context, options in (request.args for request in requests):
            decoding = Decoding.from_options(options)
            room = self.max_length - decoding.max_tokens
            if room < 1:
                raise InputError(
                    f"max_gen_toks {decoding.max_tokens} leaves no context within max_length {self.max_length}; "
                    "raise max_length"
                )
            ids = self._tokenizer.encode(context) or [self.eot_token_id]
            prompts.append(Prompt(np.array(ids[-room:], dtype=np.int64), decoding, seen[context, decoding]))
            seen[context, decoding] += 1
            cut += len(ids) > room
        self._note_cut(cut, len(requests))
        return prompts

    def _collect(
        self, kind: str, requests: Sequence[Instance], answers: Iterator[tuple[int, Any]], quiet: bool
    ) -> list[Any]:
        """All answers in the order of the requests; each goes to the response cache as soon as it is known."""
        collected: list[Any] = [None] * len(requests)
        with recording(self.ledger), tqdm(total=len(requests), desc=kind, disable=quiet) as progress:
            for index, answer in answers:
                collected[index] = answer
                self.cache_hook.add_partial(kind, requests[index].args, answer)
                progress.update()
        self.computed[kind] += len(requests)
        return collected
