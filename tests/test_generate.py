"""``simba-lab generate``: what it writes equals recomputation of everything for every token."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import mistake, simba_lab

from simba_lab.checkpoint import load, save_model
from simba_lab.data import Tokenizer, bytes_tokenizer, train_bpe
from simba_lab.evaluate.generation import Decoding, TextStream, continuation
from simba_lab.model import LanguageModel, ModelConfig

TEXT = "the quick brown fox jumps over the lazy dog while the other dog sleeps under a tree and dreams of foxes. "
PROMPT = TEXT[:70]
ARMS = {"dense": [], "pruned": ["--mean-keep", "0.6"], "by recency": ["--criterion", "recency", "--final-keep", "0.2"]}
NEW = 12
every_arm = pytest.mark.parametrize("flags", ARMS.values(), ids=ARMS.keys())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tokenizer = train_bpe([TEXT], 290)
    tokenizer.save(folder / "tokenizer.json")
    sizes = {"d_model": 16, "n_layer": 3, "d_state": 4, "vocab_size": tokenizer.vocab_size}
    model = LanguageModel(ModelConfig(**sizes, pad_vocab_size_multiple=64, tie_embeddings=False), seed=2)
    # At initialisation logits are almost flat and layers whisper; louder, every step of every state shows in the text.
    model.backbone.embedding.weight.data.mul_(10)
    model.lm_head.weight.data.mul_(10)
    for block in model.backbone.layers:
        block.mixer.out_proj.weight.data.mul_(3)
    save_model(folder, model)
    return folder


@pytest.fixture
def generate(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Result of the command, whose standard output is asserted to be the text."""

    def call(*flags: str, prompt: str = PROMPT) -> dict[str, Any]:
        source, target = tmp_path / "prompt.txt", tmp_path / "out.json"
        source.write_bytes(prompt.encode())
        common = ("--checkpoint", checkpoint, "--prompt-file", source, "--device", "cpu", "--json", target)
        capsys.readouterr()
        assert simba_lab("generate", *common, "--max-new-tokens", str(NEW), *flags) == 0
        result = json.loads(target.read_text(encoding="utf-8"))
        assert capsys.readouterr().out == result["text"] + "\n"
        return result

    return call


def pruned_by(flags: list[str], checkpoint: Path) -> LanguageModel:
    model = load(checkpoint)
    if not flags:
        return model
    named = dict(zip(flags[::2], flags[1::2], strict=True))
    options = {flag[2:].replace("-", "_"): float(value) for flag, value in named.items() if flag.endswith("keep")}
    return model.sparsified(criterion=named.get("--criterion", "global_impact"), **options)


@torch.no_grad()
def recomputed(model: LanguageModel, tokenizer: Tokenizer, ids: list[int], count: int) -> list[int]:
    """Most likely tokens, each from a whole forward pass."""
    written: list[int] = []
    for _ in range(count):
        logits = model(torch.tensor([ids + written]), n_context=len(ids)).logits[0, -1]
        written.append(int(logits[: tokenizer.vocab_size].argmax()))
    return written


@every_arm
def test_greedy_equals_recomputation(checkpoint: Path, generate: Any, flags: list[str]) -> None:
    result = generate(*flags)
    tokenizer, model = Tokenizer.load(checkpoint / "tokenizer.json"), pruned_by(flags, checkpoint)
    ids = tokenizer.encode(PROMPT)
    expected = recomputed(model, tokenizer, ids, NEW)
    assert tokenizer.eot_id not in expected
    assert result["text"] == tokenizer.decode(expected)
    assert (result["prompt_tokens"], result["new_tokens"], result["stopped"]) == (len(ids), NEW, "length")
    assert result["kept"] == model.keep_counts(len(ids))
    assert result["prefill_flops"] == model.flops(len(ids), 0).total
    assert result["tokens_per_second"] > 0
    assert (result["kept"][-1] < len(ids)) is bool(flags)


def test_pruning_reaches_the_text(generate: Any) -> None:
    assert len({generate(*flags)["text"] for flags in ARMS.values()}) == len(ARMS)


def test_samples_follow_the_seed(generate: Any) -> None:
    warm = ["--mean-keep", "0.6", "--temperature", "1.5", "--top-p", "0.95", "--seed"]
    first = generate(*warm, "3")["text"]
    torch.rand(7)
    assert generate(*warm, "3")["text"] == first
    assert generate(*warm, "4")["text"] != first


def test_a_tiny_top_p_is_greedy(generate: Any) -> None:
    assert generate("--temperature", "1.7", "--top-p", "1e-9")["text"] == generate()["text"]


@pytest.mark.parametrize("source", ["stdin", "flag"])
def test_the_prompt_comes_from_anywhere(
    checkpoint: Path, generate: Any, source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "the dög\r\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    expected = generate(prompt=prompt)["text"]
    given = ("--prompt-file", "-") if source == "stdin" else ("--prompt", prompt)
    flags = ("--max-new-tokens", NEW, "--device", "cpu")
    assert simba_lab("generate", "--checkpoint", checkpoint, *given, *flags) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_the_end_of_text_token_ends_the_text(checkpoint: Path) -> None:
    model, tokenizer = load(checkpoint), Tokenizer.load(checkpoint / "tokenizer.json")
    ids = tokenizer.encode(PROMPT)
    expected = recomputed(model, tokenizer, ids, NEW)

    class StopsAtTheThird(Tokenizer):
        eot_id = expected[2]

    tokenizer = StopsAtTheThird(tokenizer._inner)
    tokens = continuation(model, model.prefill(torch.tensor([ids])), Decoding(), tokenizer, torch.Generator())
    assert list(tokens) == expected[: expected.index(expected[2])]


@pytest.mark.parametrize(
    "raw",
    ["naïve 猫 🦊 é".encode(), b"\xff\xfea\xe7\x8c b \xf0\x9f", "\ufffd ok".encode(), b"cut \xe7\x8c", b""],
    ids=["whole", "broken", "replacement", "cut", "empty"],
)
def test_a_stream_never_cuts_a_character_in_two(raw: bytes) -> None:
    tokenizer = bytes_tokenizer()
    stream, ids = TextStream(tokenizer), [byte + 1 for byte in raw]
    pieces = [stream.push(token) for token in ids]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids) == raw.decode(errors="replace")


def test_a_character_appears_with_its_last_byte() -> None:
    stream = TextStream(bytes_tokenizer())
    assert [stream.push(byte + 1) for byte in "a🦊é".encode()] == ["a", "", "", "", "🦊", "", "é"]


def test_random_bytes_stream_as_their_text(generate: Any) -> None:
    text = generate("--temperature", "50", "--max-new-tokens", "80")["text"]
    assert any(ord(character) > 127 for character in text)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-0.1"], "--temperature must be at least 0, got -0.1"),
        (["--temperature", "nan"], "--temperature must be"),
        (["--temperature", "1", "--top-p", "0"], "--top-p must lie in (0, 1], got 0.0"),
        (["--temperature", "1", "--top-p", "1.01"], "--top-p must lie in (0, 1], got 1.01"),
        (["--top-p", "0.9"], "give a --temperature above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must lie in 0.."),
        (["--prompt-file", "absent.txt"], "absent.txt: No such file"),
        (["--prompt-file", "."], ".: Is a directory"),
        (["--prompt", "fox"], "not allowed with"),
        (["--mean-keep", "1.5"], "--mean-keep: "),
        (["--criterion", "norms"], "--criterion: criterion: 'norms' is unknown"),
        (["--criterion", "norm"], "final_keep"),
        (["--schedule", "uniform", "--final-keep", "0.5"], "unknown option 'final_keep'"),
        (["--checkpoint", "absent"], "absent"),
    ],
)
def test_a_bad_value_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(PROMPT, encoding="utf-8")
    assert message in mistake(capsys, "generate", "--checkpoint", checkpoint, "--prompt-file", prompt, *flags)


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"fox \xff\xfe", "not UTF-8 text")])
def test_a_bad_prompt_file_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_bytes(content)
    error = mistake(capsys, "generate", "--checkpoint", checkpoint, "--prompt-file", prompt)
    assert message in error and "prompt.txt" in error


def test_a_missing_or_foreign_tokenizer_is_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "outer" / "middle" / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "tokenizer.json").unlink()
    assert "copy the tokenizer.json" in mistake(capsys, "generate", "--checkpoint", bare, "--prompt", "fox")
    words = " ".join(f"{first}{second}{first}" for first in "abcdefghijklmnop" for second in "qrstuvwxyz")
    train_bpe([words], 400).save(bare / "tokenizer.json")
    assert "tokens, the model only" in mistake(capsys, "generate", "--checkpoint", bare, "--prompt", "fox")


@pytest.mark.gpu
@every_arm
def test_graphs_decode_what_plain_steps_decode(checkpoint: Path, flags: list[str]) -> None:
    tokenizer, model = Tokenizer.load(checkpoint / "tokenizer.json"), pruned_by(flags, checkpoint)
    ids = tokenizer.encode(PROMPT)
    expected = recomputed(model.double(), tokenizer, ids, NEW)
    model = model.to("cuda", torch.float32)
    with torch.no_grad():
        out = model.prefill(torch.tensor([ids], device="cuda"))
    assert list(continuation(model, out, Decoding(max_tokens=NEW), tokenizer, torch.Generator())) == expected
