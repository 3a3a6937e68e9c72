"""The evaluation harness's view of a language model of ours: ``--model simba_lab``.

Importing this module imports lm_eval; nothing else in the package does. Every context is pruned with its boundary at
the last context token, everything after it is dense (protocol ``suffix`` of the model).
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import model_registry
from tqdm import tqdm

from simba_lab import environment
from simba_lab.checkpoint import load, model_spec, tokenizer_path
from simba_lab.data import Tokenizer
from simba_lab.errors import InputError
from simba_lab.evaluate.account import Account
from simba_lab.evaluate.answers import AnswerBook, request_keys
from simba_lab.evaluate.arguments import (
    DEFAULT_BATCH,
    DEFAULT_LENGTH,
    DEFAULT_SUFFIX,
    HARNESS_DEVICE,
    pruning_plan,
    read_batch_size,
    read_device,
    read_whole,
    trained_length,
)
from simba_lab.evaluate.fingerprint import arm_hash, weights_hash
from simba_lab.evaluate.generation import generate, read_prompts
from simba_lab.evaluate.likelihood import score_documents, score_pairs
from simba_lab.evaluate.scoring import Pair, encode_pairs, rolling_pairs
from simba_lab.kernels.cost import CONVENTION, Ledger, linear, recording
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
        convolution: compacted reads whatever stands beside a token now, adjacent its true neighbours only.
        dense: run a checkpoint that was saved with pruning without it.
        batch_size: sequences at a time; "auto" is 8, at most ``max_batch_size``. Results do not depend on it.
        device: of torch, or auto; the harness's default, cuda:0, means auto too.
        backend: kernels to use.
        max_length: tokens fed at most; longer contexts lose their oldest tokens, which is logged.
        n_suffix: tokens scored per block by :meth:`loglikelihood_rolling`.
        pretrained: the harness's customary name for ``checkpoint``; it names the folder of its results.
        answers: folder in which answers are kept as they come; the same arm continues from them. Without it an
            interrupted run starts again, unless the harness's own ``use_cache`` is on.

    Raises InputError for an unknown argument (with the list), a bad value, or a checkpoint that cannot be used.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        criterion: Spec | None = None,
        schedule: Spec | None = None,
        mean_keep: float | None = None,
        protect_recent: float | None = None,
        convolution: str | None = None,
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
        plan = pruning_plan(saved, criterion, schedule, mean_keep, protect_recent, convolution, dense, options)
        tokenizer = Tokenizer.load(tokenizer_path(str(checkpoint)))
        self._equip(saved.with_pruning(plan).to(place), tokenizer)
        self._trained_length = trained_length(Path(checkpoint))

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
        if answers is not None and not isinstance(answers, str):
            raise InputError(f"model_args: answers must be the name of a folder, got {answers!r}")
        self._folder = None if answers is None else Path(answers)
        self._trained_length: int | None = None
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
        self._account = Account(model)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eot_id

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells its stored requests apart by."""
        return self._tokenizer.fingerprint()

    @property
    def flops(self) -> int:
        """FLOPs of everything computed so far, padding included; answers from a response cache cost nothing."""
        return self.ledger.total

    @property
    def tokens_computed(self) -> int:
        """Tokens that entered the first layer so far, padding included."""
        projection = self.model.backbone.layers[0].mixer.in_proj
        each = linear(1, projection.in_features, projection.out_features)
        return self.ledger.entries["forward", 0, "in_proj"] // each

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is it the greedy continuation) of each (context, continuation)."""
        pairs = self._shortened(encode_pairs(self._tokenizer, [request.args for request in requests]))
        self._account.score("loglikelihood", pairs, len(requests))

        def compute(wanted: list[int]) -> Iterator[tuple[int, tuple[float, bool]]]:
            scores = score_pairs(self.model, [pairs[index] for index in wanted], self.batch_size)
            return ((wanted[place], (score.log_likelihood, score.greedy)) for place, score in scores)

        found = self._collect("loglikelihood", requests, compute, disable_tqdm)
        return [(float(nats), bool(greedy)) for nats, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood in nats of each whole text, every token scored exactly once.

        Protocol: the text follows the end-of-text token and is scored in blocks of ``n_suffix`` tokens. Before each
        block its context, all that precedes it up to ``max_length - n_suffix`` tokens, is prefilled and pruned; the
        block itself is dense. For a dense model that is perplexity by a sliding window of stride ``n_suffix``.
        """
        dense = self.model.pruning is None
        texts = self._tokenizer.encode_batch([request.args[0] for request in requests])
        blocks = [rolling_pairs(ids, self.eot_token_id, self.max_length, self.n_suffix, dense) for ids in texts]
        self._note_long([min(len(ids), self.max_length) for ids in texts])
        self._account.score("loglikelihood_rolling", [pair for pairs in blocks for pair in pairs], len(requests))

        def compute(wanted: list[int]) -> Iterator[tuple[int, float]]:
            return score_documents(self.model, {index: blocks[index] for index in wanted}, self.batch_size)

        return self._collect("loglikelihood_rolling", requests, compute, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Text after each context, up to the first stop string, the end-of-text token or the length limit.

        Sampling is keyed by the request and its repetition: the same text in any batch and any run.
        """
        texts, before = [request.args for request in requests], self.flops
        prompts, cut = read_prompts(self._tokenizer, texts, self.max_length)
        self._note_cut(cut, len(requests))
        self._note_long([len(prompt.context) for prompt in prompts])

        def compute(wanted: list[int]) -> Iterator[tuple[int, str]]:
            written = generate(self.model, self._tokenizer, [prompts[index] for index in wanted], self.batch_size)
            return ((wanted[place], text) for place, text in written)

        found = self._collect("generate_until", requests, compute, disable_tqdm)
        self._account.generate("generate_until", [prompt.context for prompt in prompts], self.flops - before)
        return found

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
                "requests": self._account.as_record(),
                "requests_computed": dict(self.computed),
                "tokens_computed": self.tokens_computed,
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
        self._note_long([len(pair.context) for pair in shortened])
        return shortened

    def _note_cut(self, cut: int, of: int) -> None:
        if cut:
            _log.warning("%d of %d contexts lost their oldest tokens: max_length is %d", cut, of, self.max_length)

    def _note_long(self, lengths: Sequence[int]) -> None:
        """Say, once for a model, that it reads more than it was trained on."""
        trained, longest = self._trained_length, max(lengths, default=0)
        if trained is not None and longest > trained:
            _log.warning("contexts of up to %d tokens; the model was trained on %d at a time", longest, trained)
            self._trained_length = None

    def _collect(
        self, kind: str, requests: Sequence[Instance], compute: Callable[[list[int]], Iterator[tuple[int, Any]]],
        quiet: bool,
    ) -> list[Any]:  # fmt: skip
        """All answers in the order of the requests.

        Those that ``answers`` knows are not computed; every other goes there and to the response cache at once.
        """
        book = self._book
        keys = request_keys(kind, [request.args for request in requests]) if book else []
        collected = [book.known.get(key) for key in keys] if book else [None] * len(requests)
        wanted = [index for index, answer in enumerate(collected) if answer is None]
        done = len(requests) - len(wanted)
        with recording(self.ledger), tqdm(total=len(requests), initial=done, desc=kind, disable=quiet) as progress:
            for index, answer in compute(wanted):
                collected[index] = answer
                if book:
                    book.add(keys[index], answer)
                self.cache_hook.add_partial(kind, requests[index].args, answer)
                progress.update()
        self.computed[kind] += len(wanted)
        return collected

    @cached_property
    def _book(self) -> AnswerBook | None:
        return None if self._folder is None else AnswerBook(self._folder / f"{self.fingerprint}.jsonl")
