"""The harness adapter: what it answers equals token-by-token recomputation, whatever the batch."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from simba_lab.checkpoint import save_model
from simba_lab.data import train_bpe
from simba_lab.errors import InputError
from simba_lab.evaluate.generation import Decoding, sample
from simba_lab.evaluate.harness import SimbaLabLM
from simba_lab.evaluate.likelihood import score_pairs
from simba_lab.evaluate.scoring import Pair, encode_pair, rolling_pairs
from simba_lab.model import LanguageModel, ModelConfig

TEXT = "the quick brown fox jumps over the lazy dog while the other dog sleeps under a tree and dreams of foxes. "
ARMS: dict[str, dict[str, Any]] = {"dense": {}, "pruned": {"criterion": "global_impact", "mean_keep": 0.6}}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe([TEXT], 290)
    tokenizer.save(folder / "tokenizer.json")
    model = LanguageModel(ModelConfig(d_model=16, n_layer=3, vocab_size=tokenizer.vocab_size, d_state=4), seed=1)
    # At initialisation logits are almost flat; a larger embedding makes the model prefer some tokens over others.
    model.backbone.embedding.weight.data.mul_(10)
    save_model(folder, model)
    return folder


def adapter(folder: Path, **arguments: Any) -> SimbaLabLM:
    return SimbaLabLM(checkpoint=str(folder), device="cpu", backend="reference", **arguments)


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, args, 0) for args in arguments]


@torch.no_grad()
def one_by_one(model: LanguageModel, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Each token from a whole forward pass over what precedes it: no cached state, no batch."""
    total, greedy = 0.0, True
    for place, token in enumerate(continuation):
        logits = model(torch.tensor([[*context, *continuation[:place]]]), n_context=len(context)).logits[0, -1]
        total += float(torch.log_softmax(logits.double(), 0)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


CASES = [
    ("the quick brown fox", " jumps over the lazy dog"),
    ("the quick brown fox", " sleeps"),
    ("the quick brown fox", " q"),
    ("the other dog sleeps under a tree and", " dreams of foxes"),
    ("the other dog sleeps under a tree an", "d dreams"),
    ("a tree  ", "and dog"),
    ("", "the lazy dog"),
    (" \n", "dog"),
    (TEXT, "the"),
    (TEXT + "é", " fox"),
]


@pytest.mark.parametrize("arm", ARMS)
def test_loglikelihood_equals_recomputation_token_by_token(run_folder: Path, arm: str) -> None:
    lm = adapter(run_folder, batch_size=4, **ARMS[arm])
    answers = lm.loglikelihood(ask("loglikelihood", *CASES), disable_tqdm=True)
    for (context, continuation), (nats, greedy) in zip(CASES, answers, strict=True):
        pair = encode_pair(lm._tokenizer, context, continuation)
        expected = one_by_one(lm.model, pair.context.tolist(), pair.continuation.tolist())
        assert nats == pytest.approx(expected[0], abs=1e-4)
        assert greedy is expected[1]


def test_pruning_reaches_the_answers_and_spares_a_context_of_one_token(run_folder: Path) -> None:
    dense, pruned = (
        [nats for nats, _ in adapter(run_folder, **ARMS[arm]).loglikelihood(ask("", *CASES), disable_tqdm=True)]
        for arm in ("dense", "pruned")
    )
    assert abs(dense[0] - pruned[0]) > 1e-3
    assert dense[6] == pruned[6]


@pytest.mark.parametrize("arm", ARMS)
def test_batch_size_and_order_change_nothing(run_folder: Path, arm: str) -> None:
    cases = [(TEXT[start : start + 20 + start % 3], TEXT[start + 40 : start + 41 + start % 9]) for start in range(40)]
    alone = adapter(run_folder, batch_size=1, **ARMS[arm]).loglikelihood(ask("", *cases), disable_tqdm=True)
    for size in (7, 64):
        lm = adapter(run_folder, batch_size=size, **ARMS[arm])
        backwards = lm.loglikelihood(ask("", *cases[::-1]), disable_tqdm=True)[::-1]
        assert [nats for nats, _ in backwards] == pytest.approx([nats for nats, _ in alone], abs=1e-4)
        assert [greedy for _, greedy in backwards] == [greedy for _, greedy in alone]


def test_the_greedy_flag_is_exact(run_folder: Path) -> None:
    model = adapter(run_folder, **ARMS["pruned"]).model
    context, best = list(range(5, 25)), []
    with torch.no_grad():
        for _ in range(6):
            best.append(int(model(torch.tensor([context + best]), n_context=20).logits[0, -1].argmax()))
    pairs = [Pair(np.array(context), np.array(best))]
    for place in range(6):
        pairs.append(Pair(np.array(context), np.array([*best[:place], best[place] ^ 1, *best[place + 1 :]])))
    scores = dict(score_pairs(model, pairs, 2))
    assert [scores[index].greedy for index in range(7)] == [True] + [False] * 6


def test_long_continuations_are_scored_in_pieces(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapter(run_folder, **ARMS["pruned"]).model
    pairs = [Pair(np.arange(9, 20), np.arange(20, 20 + length)) for length in (1, 13, 30)]
    whole = dict(score_pairs(model, pairs, 8))
    monkeypatch.setattr("simba_lab.evaluate.prefixes.LONGEST_SCORED", 12)
    assert [dict(score_pairs(model, pairs, 8))[index].log_likelihood for index in range(3)] == pytest.approx(
        [whole[index].log_likelihood for index in range(3)], abs=1e-4
    )


def test_a_shared_context_is_paid_for_once(run_folder: Path) -> None:
    lm = adapter(run_folder, batch_size=2, **ARMS["pruned"])
    context = "the quick brown fox"
    n_context = len(lm._tokenizer.encode(context))
    lm.loglikelihood(ask("", *[(context, character) for character in "!?:;,"]), disable_tqdm=True)
    assert lm.flops == lm.model.flops(n_context, 0).total
    lm.loglikelihood(ask("", (context, "!?:;")), disable_tqdm=True)
    assert lm.flops == lm.model.flops(n_context, 0).total + lm.model.flops(n_context, 3).total


def test_spaces_move_to_the_continuation_and_nothing_is_lost(run_folder: Path) -> None:
    tokenizer = adapter(run_folder)._tokenizer
    pair = encode_pair(tokenizer, "the lazy  ", "dog")
    assert tokenizer.decode(pair.context) == "the lazy"
    assert tokenizer.decode(pair.continuation) == "  dog"
    empty = encode_pair(tokenizer, "", "dog")
    assert empty.context.tolist() == [tokenizer.eot_id]
    blank = encode_pair(tokenizer, " \n", "dog")
    assert blank.context.tolist() == [tokenizer.eot_id]
    assert tokenizer.decode(blank.continuation) == " \ndog"


def test_a_continuation_without_tokens_is_refused_by_name(run_folder: Path) -> None:
    lm = adapter(run_folder)
    for context in ("the lazy dog", ""):
        with pytest.raises(InputError, match=f"continuation '' after the context ending in '{context}'"):
            lm.loglikelihood(ask("", ("fox", " fox"), (context, "")), disable_tqdm=True)


def test_a_long_context_loses_its_oldest_tokens_and_says_so(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = adapter(run_folder, max_length=20, n_suffix=4, **ARMS["pruned"])
    pair = encode_pair(lm._tokenizer, TEXT, " the lazy dog")
    ((nats, _),) = lm.loglikelihood(ask("", (TEXT, " the lazy dog")), disable_tqdm=True)
    context = pair.context.tolist()[-(20 - len(pair.continuation) + 1) :]
    assert nats == pytest.approx(one_by_one(lm.model, context, pair.continuation.tolist())[0], abs=1e-4)
    assert "1 of 1 contexts lost their oldest tokens: max_length is 20" in caplog.text
    with pytest.raises(InputError, match="max_length: a continuation of"):
        lm.loglikelihood(ask("", ("fox", TEXT)), disable_tqdm=True)


@given(n=st.integers(0, 90), length=st.integers(2, 24), suffix=st.integers(1, 23), dense=st.booleans())
def test_rolling_scores_every_token_once_after_what_precedes_it(n: int, length: int, suffix: int, dense: bool) -> None:
    suffix = min(suffix, length - 1)
    tokens = list(range(1, n + 1))
    pairs = rolling_pairs(tokens, 0, length, suffix, dense)
    assert [token for pair in pairs for token in pair.continuation] == tokens
    for pair in pairs:
        block_starts = [(token - 1) // suffix * suffix + 1 for token in pair.continuation.tolist()]
        oldest = {max(0, start - (length - suffix)) for start in block_starts}
        assert oldest == {int(pair.context[0])}
        assert pair.context.tolist() == list(range(int(pair.context[0]), int(pair.continuation[0])))
        assert len(pair.context) + len(pair.continuation) - 1 <= length


@pytest.mark.parametrize("arm", ARMS)
def test_rolling_equals_its_protocol_computed_directly(run_folder: Path, arm: str) -> None:
    lm = adapter(run_folder, max_length=24, n_suffix=5, batch_size=3, **ARMS[arm])
    texts = [TEXT[:80], "", "fox", TEXT[:40]]
    answers = lm.loglikelihood_rolling(ask("", *[(text,) for text in texts]), disable_tqdm=True)
    assert [type(answer) for answer in answers] == [float] * 4
    for text, answer in zip(texts, answers, strict=True):
        stream, expected = [lm.eot_token_id, *lm._tokenizer.encode(text)], 0.0
        for start in range(1, len(stream), 5):
            context = stream[max(0, start - 19) : start]
            expected += one_by_one(lm.model, context, stream[start : start + 5])[0]
        assert answer == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
def written_out(lm: SimbaLabLM, context: str, count: int) -> list[int]:
    """Greedy tokens, each from a whole forward pass."""
    ids, written = lm._tokenizer.encode(context), []
    for _ in range(count):
        logits = lm.model(torch.tensor([ids + written]), n_context=len(ids)).logits[0, -1]
        written.append(int(logits[: lm._tokenizer.vocab_size].argmax()))
    return written


@pytest.mark.parametrize("arm", ARMS)
def test_generation_equals_recomputation(run_folder: Path, arm: str) -> None:
    lm = adapter(run_folder, batch_size=3, **ARMS[arm])
    contexts = ["the quick brown fox", "the lazy dog sleeps", "under a tree", "the quick brown dog", "dreams"]
    options = {"until": ["never in there"], "max_gen_toks": 9}
    texts = lm.generate_until(ask("", *[(context, options) for context in contexts]), disable_tqdm=True)
    for context, text in zip(contexts, texts, strict=True):
        tokens = written_out(lm, context, 9)
        assert lm.eot_token_id not in tokens
        assert text == lm._tokenizer.decode(tokens)
    stop = texts[0][3:6]
    (cut,) = lm.generate_until(ask("", (contexts[0], {"until": stop, "max_gen_toks": 9})), disable_tqdm=True)
    assert cut == texts[0][: texts[0].index(stop)]


def test_samples_depend_on_the_request_alone(run_folder: Path) -> None:
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.95}
    requests = ask("", *[(context, options) for context in ("fox", "dog", "fox", "tree")])
    first = adapter(run_folder, batch_size=1).generate_until(requests, disable_tqdm=True)
    again = adapter(run_folder, batch_size=8).generate_until(requests[::-1], disable_tqdm=True)[::-1]
    assert [first[1], first[3]] == [again[1], again[3]]
    assert sorted([first[0], first[2]]) == sorted([again[0], again[2]])
    assert first[0] != first[2]
    other_seed = ask("", ("dog", options | {"seed": 5}))
    assert adapter(run_folder).generate_until(other_seed, disable_tqdm=True) != first[1:2]


def test_sampling_follows_temperature_top_k_and_top_p() -> None:
    logits = torch.tensor([0.5, 0.1, 0.3, 0.1], dtype=torch.float64).log()
    generator = torch.Generator().manual_seed(0)

    def shares(**options: Any) -> list[float]:
        drawn = [sample(logits, Decoding(**options), generator) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.03)
    assert shares(temperature=1.0, top_k=2) == pytest.approx([0.625, 0, 0.375, 0], abs=0.03)
    assert shares(temperature=1.0, top_p=0.5) == [1, 0, 0, 0]
    assert shares(temperature=1.0, top_p=0.6) == pytest.approx([0.625, 0, 0.375, 0], abs=0.03)
    assert shares(temperature=0.5) == pytest.approx([25 / 36, 1 / 36, 9 / 36, 1 / 36], abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"untill": ["."]}, "generation option 'untill' is unknown; use until, max_gen_toks"),
        ({"top_p": 0}, "top_p in"),
        ({"temperature": "warm"}, "could not convert"),
        ({"max_gen_toks": 0}, "max_gen_toks must be at least 1"),
        ({"max_gen_toks": 4096}, "leaves no context within max_length 2048"),
    ],
)
def test_wrong_generation_options_are_named(run_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        adapter(run_folder).generate_until(ask("", ("fox", options)), disable_tqdm=True)


def test_arms_never_share_a_cache_entry(run_folder: Path, tmp_path: Path) -> None:
    database, requests = str(tmp_path / "answers.db"), ask("loglikelihood", *CASES)
    settings = [ARMS["dense"], ARMS["pruned"], {"mean_keep": 0.7}, {"criterion": "recency", "mean_keep": 0.6}]
    answers = [CachingLM(adapter(run_folder, **arm), database).loglikelihood(requests) for arm in settings]
    for one, other in permutations(answers, 2):
        assert one != other
    for arm, expected in zip(settings, answers, strict=True):
        lm = adapter(run_folder, **arm)
        assert CachingLM(lm, database).loglikelihood(requests) == expected
        assert (lm.flops, dict(lm.computed)) == (0, {})


def test_an_interrupted_run_keeps_what_it_scored(run_folder: Path, tmp_path: Path) -> None:
    database, requests = str(tmp_path / "answers.db"), ask("loglikelihood", *CASES)
    lm = adapter(run_folder)
    caching = CachingLM(lm, database)
    lm.loglikelihood(requests[:4], disable_tqdm=True)
    caching.dbdict.close()
    again = adapter(run_folder)
    CachingLM(again, database).loglikelihood(requests)
    assert again.computed["loglikelihood"] == len(CASES) - 4


def test_other_weights_are_another_arm(run_folder: Path) -> None:
    one, other = adapter(run_folder), adapter(run_folder)
    assert one.fingerprint == other.fingerprint
    changed = adapter(run_folder)
    changed.model.backbone.norm_f.weight.data[0] += math.ulp(1.0) * 2**30
    assert changed.fingerprint != one.fingerprint
    assert adapter(run_folder, max_length=1024).fingerprint != one.fingerprint


INTERRUPTED = """
import sys, time
from lm_eval.api.instance import Instance
from simba_lab.evaluate.harness import SimbaLabLM

class Told:
    def add_partial(self, *answer):
        print("answered", flush=True)
        time.sleep(0.2)

lm = SimbaLabLM(sys.argv[1], mean_keep=0.6, device="cpu", backend="reference", batch_size=1, answers=sys.argv[2])
lm.cache_hook = Told()
lm.loglikelihood([Instance("", {}, (f"the lazy dog {n}", " sleeps"), 0) for n in range(40)], disable_tqdm=True)
"""


def test_a_killed_run_continues_from_what_it_scored(run_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(run_folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(5):
            assert child.stdout.readline() == "answered\n"
        child.kill()
    (file,) = tmp_path.iterdir()
    kept = file.read_bytes()
    # As if the kill had come in the middle of a write.
    file.write_bytes(kept[:-20])
    known = kept[:-20].count(b"\n")
    assert 3 < known < 39
    requests = ask("", *[(f"the lazy dog {n}", " sleeps") for n in range(40)])
    again = adapter(run_folder, answers=str(tmp_path), **ARMS["pruned"])
    answers = again.loglikelihood(requests, disable_tqdm=True)
    assert again.computed["loglikelihood"] == 40 - known
    whole = adapter(run_folder, **ARMS["pruned"])
    assert [nats for nats, _ in answers] == pytest.approx(
        [nats for nats, _ in whole.loglikelihood(requests, disable_tqdm=True)], abs=1e-4
    )
    # What is reported does not depend on the interruption.
    assert again.get_model_info()["simba_lab"]["requests"] == whole.get_model_info()["simba_lab"]["requests"]


def test_kept_answers_are_of_one_arm_and_of_every_kind(run_folder: Path, tmp_path: Path) -> None:
    options = {"until": [], "max_gen_toks": 5, "temperature": 1.0}
    prompts = ask("", *[(context, options) for context in ("fox", "dog", "fox")])
    texts = ask("", (TEXT,), ("",))
    first, second, other = (
        adapter(run_folder, answers=str(tmp_path), **ARMS[arm]) for arm in ("dense", "dense", "pruned")
    )
    found, again = (
        [
            lm.loglikelihood(ask("", *CASES), disable_tqdm=True),
            lm.loglikelihood_rolling(texts, disable_tqdm=True),
            lm.generate_until(prompts, disable_tqdm=True),
        ]
        for lm in (first, second)
    )
    assert found == again and found[2][0] != found[2][2]
    assert isinstance(found[0][0], tuple)
    assert first.computed.total() == len(CASES) + 5
    assert (second.computed.total(), second.flops) == (0, 0)
    other.loglikelihood(ask("", *CASES), disable_tqdm=True)
    assert other.computed["loglikelihood"] == len(CASES)
    with pytest.raises(InputError, match="answers: .* cannot be written: (File exists|Not a directory)"):
        adapter(run_folder, answers=str(run_folder / "tokenizer.json")).loglikelihood(prompts[:0], disable_tqdm=True)


def test_a_dense_model_computes_shared_beginnings_once(run_folder: Path) -> None:
    start = TEXT * 2
    cases = [(start + " one fox", " sleeps"), (start + " two foxes", " sleep"), (start + " three", " dream")]
    dense, pruned = (adapter(run_folder, **ARMS[arm]) for arm in ARMS)
    pairs = [encode_pair(dense._tokenizer, *case) for case in cases]
    fed = [np.concatenate([pair.context, pair.continuation[:-1]]).tolist() for pair in pairs]
    shared = min(len(os.path.commonprefix(fed[:2])), len(os.path.commonprefix(fed[1:])))
    for lm in (dense, pruned):
        answers = lm.loglikelihood(ask("", *cases), disable_tqdm=True)
        for pair, (nats, _) in zip(pairs, answers, strict=True):
            expected = one_by_one(lm.model, pair.context.tolist(), pair.continuation.tolist())
            assert nats == pytest.approx(expected[0], abs=1e-4)
    assert shared > 40
    assert pruned.tokens_computed == sum(map(len, fed))
    assert dense.tokens_computed <= sum(map(len, fed)) - 2 * shared + 4


def test_contexts_beyond_the_training_length_are_noted_once(run_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run_folder / "config.yaml").write_text("data: {init_args: {length: 16}}", encoding="utf-8")
    try:
        lm = adapter(run_folder)
    finally:
        (run_folder / "config.yaml").unlink()
    for _ in range(2):
        lm.loglikelihood(ask("", (TEXT, " fox"), ("fox", " dog")), disable_tqdm=True)
    assert caplog.text.count("the model was trained on 16 at a time") == 1


def test_what_requests_cost_is_recorded_by_kind(run_folder: Path) -> None:
    lm = adapter(run_folder, **ARMS["pruned"])
    lm.loglikelihood(ask("", (TEXT, " fox"), (TEXT, " dog"), ("the fox", " sleeps under")), disable_tqdm=True)
    record = lm.get_model_info()["simba_lab"]["requests"]["loglikelihood"]
    lengths = [len(lm._tokenizer.encode(text)) for text in (TEXT.rstrip(), "the fox")]
    kept = np.mean([lm.model.keep_counts(length) for length in lengths], axis=0)
    assert record["kept_by_layer"] == pytest.approx(kept.tolist())
    assert (record["requests"], record["contexts"]) == (3, 2)
    assert record["flops_per_request"] == record["flops"] / 3
    assert record["flops"] >= sum(lm.model.flops(length, 0).total for length in lengths)
