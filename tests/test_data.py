"""The data room on text: sources, tokenizers, splits, shards, windows, evidence distances, exact resume."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from simba_lab.data import (
    CorpusSettings,
    Document,
    Shard,
    TextData,
    Tokenizer,
    TrainingWindows,
    bytes_tokenizer,
    corpus,
    cut_eval_windows,
    evidence_groups,
    find_last_occurrence,
    group_bounds,
    is_far,
    load_documents,
    open_corpus,
    split_documents,
    train_bpe,
    xz_bits_per_byte,
)
from simba_lab.data.split import without_repeats
from simba_lab.errors import InputError

WORDS = "alpha beta gamma delta layer token prune score keep drop state scan".split()
ODD_TEXTS = [
    "",
    "\n\t  x",
    "<|endoftext|>",
    "a<|endoftext|>b",
    "naïve ☃ 漢字 🐍\u200d",
    "\r\n\x00\x7f",
    "    \u2028é" * 5,
]


def prose(seed: int, n_words: int) -> str:
    generator = np.random.default_rng(seed)
    return " ".join(f"{WORDS[i]}{i % 5}" for i in generator.integers(len(WORDS), size=n_words)) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Fourteen text files of different sizes."""
    for index in range(14):
        (tmp_path / f"text{index:02}.txt").write_text(prose(index, 120 + 40 * index))
    return tmp_path


def text_data(folder: Path, **options: object) -> TextData:
    options = {"vocab_size": 300, "length": 32, "batch_size": 4, "cache_dir": str(folder / "cache")} | options
    return TextData(**({"source": str(folder / "*.txt")} | options))


# Sources


def test_stdlib_is_the_modules_of_this_python() -> None:
    documents = load_documents("stdlib")
    names = [document.name for document in documents]
    assert names == sorted(set(names)) and {"argparse", "json.decoder", "asyncio"} <= set(names)
    assert not any(name.split(".")[0] in ("test", "site-packages", "sitecustomize") for name in names)
    assert not any(".test." in name or ".tests." in name or ".idle_test." in name for name in names)
    assert sum(len(document.text) for document in documents) > 6_000_000
    import argparse

    assert documents[names.index("argparse")].text.encode() == Path(argparse.__file__).read_bytes()


@pytest.mark.parametrize(
    "suffix, pack", [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)]
)
def test_json_lines_in_every_compression(tmp_path: Path, suffix: str, pack) -> None:
    lines = [json.dumps({"id": 1, "body": "first\u2028line"}, ensure_ascii=False), "", json.dumps({"body": "second"})]
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(pack("\n".join(lines).encode()))
    expected = [Document(f"rows.jsonl{suffix}:1", "first\u2028line"), Document(f"rows.jsonl{suffix}:3", "second")]
    assert load_documents(str(path), "body") == expected


def test_parquet_and_hub_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "train.parquet")
    assert [d.text for d in load_documents(str(tmp_path / "train.parquet"))] == ["one", "three"]
    assert [d.text for d in load_documents(f"hf:{tmp_path}")] == ["one", "three"]
    with pytest.raises(InputError, match=r"no field 'body' \(present: text, n\)"):
        load_documents(str(tmp_path / "train.parquet"), "body")
    with pytest.raises(InputError, match="no field 'body'"):
        load_documents(f"hf:{tmp_path}", "body")


def test_folder_and_glob_give_relative_names_in_order(tmp_path: Path) -> None:
    for name, text in {
        "b/z.md": "zed",
        "a.txt": "ay",
        "b/__init__.py": "",
        "skip.bin": "\0",
        ".hidden.txt": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    expected = [Document("a.txt", "ay"), Document("b/z.md", "zed")]
    assert load_documents(str(tmp_path)) == expected
    assert load_documents(f"{tmp_path}/**/*.[mt]*") == expected


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n", "holds no text"),
        ("binary.txt", b"ab\0c", r"binary file \(NUL byte at offset 2\)"),
        ("latin.txt", "é".encode("latin-1"), "not UTF-8 at byte 0"),
        ("broken.txt.gz", gzip.compress(b"hello" * 99, mtime=0)[:-9], "cannot be read"),
        ("broken.jsonl.bz2", bz2.compress(b"{}")[:-3], "cannot be read"),
        ("broken.parquet", b"PAR1 no", "not a readable parquet"),
        ("bad.jsonl", b'{"text": "a"}\nnot json', "bad.jsonl:2: not JSON"),
        (
            "field.jsonl",
            b'{"text": "a"}\n{"title": "t", "body": "b"}',
            r"field.jsonl:2: no field 'text' \(present: body, title\)",
        ),
        ("number.jsonl", b'{"text": 3}', "number.jsonl:1: field 'text' is int"),
        ("list.jsonl", b"[1]", "list.jsonl:1: a JSON list"),
        ("half.jsonl", b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_documents(str(tmp_path / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", ["missing.txt", "*.nothing", "", "hf:", "hf:a:b:c:d", "."])
def test_sources_that_are_not_there(tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="data.source"):
        load_documents(source)


# Tokenizers


@pytest.fixture(scope="module")
def tokenizers() -> list[Tokenizer]:
    return [train_bpe([prose(seed, 400) for seed in range(5)], 300), bytes_tokenizer()]


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(ODD_TEXTS))
def test_round_trip_is_lossless(tokenizers: list[Tokenizer], text: str) -> None:
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) and tokenizer.eot_id not in ids
        assert tokenizer.encode_batch([text, "x"]) == [ids, tokenizer.encode("x")]


def test_vocabularies(tokenizers: list[Tokenizer]) -> None:
    bpe, plain = tokenizers
    assert (bpe.vocab_size, bpe.eot_id, plain.vocab_size, plain.eot_id) == (300, 0, 257, 0)
    assert plain.encode("a\n é") == [b + 1 for b in "a\n é".encode()]
    assert len(bpe.encode(prose(9, 100))) < 0.6 * len(prose(9, 100))


def test_save_and_load(tokenizers: list[Tokenizer], tmp_path: Path) -> None:
    for tokenizer in tokenizers:
        tokenizer.save(tmp_path / "t.json")
        again = Tokenizer.load(tmp_path / "t.json")
        assert all(again.encode(text) == tokenizer.encode(text) for text in [*ODD_TEXTS, prose(3, 50)])
        assert again.decode(again.encode("a<|endoftext|>")) == "a<|endoftext|>" and again.eot_id == 0


def test_bpe_does_not_depend_on_threads(tmp_path: Path) -> None:
    code = (
        "import sys; from simba_lab.data import load_documents, train_bpe;"
        "train_bpe([d.text for d in load_documents('stdlib')[:40]], 600).save(sys.argv[1])"
    )
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "one")], check=True, env=environment)
    train_bpe([d.text for d in load_documents("stdlib")[:40]], 600).save(tmp_path / "many")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{}")
    from tokenizers import Tokenizer as Inner
    from tokenizers import models

    Inner(models.WordLevel({"<|endoftext|>": 0, "naïve word": 1}, unk_token="naïve word")).save(
        str(tmp_path / "w.json")
    )
    for path, message in [("no.json", "not a tokenizer json"), ("w.json", "not byte-level"), ("gone.json", "no file")]:
        with pytest.raises(InputError, match=f"data.tokenizer: .*{message}"):
            Tokenizer.load(tmp_path / path)
    with pytest.raises(InputError, match="data.vocab_size: 256"):
        train_bpe(["a"], 256)


# Splits


def test_split_holds_the_shares_and_ignores_the_order() -> None:
    documents = [Document(f"d{i}", prose(i, 20 + i % 50)) for i in range(300)]
    splits = split_documents(documents, 0.08, 0.20)
    total = sum(len(document.text) for document in documents)
    shares = [sum(len(d.text) for d in splits[split]) / total for split in ("train", "validation", "test")]
    assert shares == pytest.approx([0.72, 0.08, 0.20], abs=0.005)
    assert sorted(d.name for split in splits.values() for d in split) == sorted(d.name for d in documents)
    mirrored = split_documents(documents[::-1], 0.08, 0.20)
    assert {s: {d.name for d in ds} for s, ds in mirrored.items()} == {
        s: {d.name for d in ds} for s, ds in splits.items()
    }


def test_few_documents_are_cut_at_line_ends() -> None:
    text = "".join(f"line {i} of this text\n" for i in range(500))
    splits = split_documents([Document("one", text)], 0.1, 0.2)
    parts = [splits[split][0] for split in ("train", "validation", "test")]
    assert [part.name for part in parts] == ["one#train", "one#validation", "one#test"]
    assert "".join(part.text for part in parts) == text and all(part.text.endswith("\n") for part in parts)
    assert [len(part.text) / len(text) for part in parts] == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert [d.text for d in split_documents([Document("s", "0123456789")], 0.1, 0.2)["test"]] == ["89"]


def test_repeated_text_stays_in_the_held_out_split() -> None:
    def copies(split: str) -> list[Document]:
        return [Document(f"{split}1", "same  text"), Document(f"{split}2", "same\ntext"), Document(f"{split}3", split)]

    kept = without_repeats({split: copies(split) for split in ("train", "validation", "test")})
    assert {split: [d.name for d in ds] for split, ds in kept.items()} == {
        "train": ["train3"],
        "validation": ["validation3"],
        "test": ["test1", "test3"],
    }


# Shards and their cache


def test_shards_hold_the_documents(folder: Path) -> None:
    data = text_data(folder)
    texts = {path.name: path.read_text() for path in folder.glob("*.txt")}
    for split in ("train", "validation", "test"):
        shard = data.shard(split)
        assert shard.texts(data.tokenizer) == [texts.pop(name) for name in shard.names]
        assert isinstance(shard.tokens, np.memmap) and shard.tokens.dtype == np.uint16
        assert (shard.tokens[shard.offsets[1:] - 1] == 0).all() and (shard.tokens == 0).sum() == len(shard.names)
        assert shard.lengths.sum() + len(shard.names) == len(shard.tokens)
    assert texts == {}


def test_cache_is_reused_until_something_that_matters_changes(folder: Path) -> None:
    base = CorpusSettings(source=str(folder), vocab_size=300)
    first = open_corpus(base, folder / "runs")
    written = (first.folder / "train.npy").stat().st_mtime_ns
    assert open_corpus(base, folder / "runs").folder == first.folder
    assert (first.folder / "train.npy").stat().st_mtime_ns == written
    tokenizer_file = folder / "tokenizer.tok"
    first.tokenizer.save(tokenizer_file)
    changes = {"vocab_size": 301, "test_share": 0.3, "validation_share": 0.1, "tokenizer": str(tokenizer_file)}
    changes |= {"text_field": "body", "test_source": str(folder / "text03.txt"), "source": str(folder / "*.txt")}
    keys = {corpus.cache_key(CorpusSettings(**(base.__dict__ | {key: value}))) for key, value in changes.items()}
    assert corpus.cache_key(base) == first.folder.name
    (folder / "text00.txt").write_text("another text")
    keys |= {first.folder.name, corpus.cache_key(base)}
    assert len(keys) == len(changes) + 2


def test_an_interrupted_build_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(corpus, "write_shard", interrupt)
        text_data(folder).setup()
    assert [path.name for path in (folder / "cache").iterdir()] == ["CACHEDIR.TAG"]
    opened = text_data(folder).corpus
    assert [path for path in (folder / "cache").iterdir() if path.is_dir()] == [opened.folder]
    (opened.folder / "test.npy").write_bytes(b"")
    with pytest.raises(InputError, match="damaged cache"):
        text_data(folder).setup()


def test_simultaneous_builds_agree(folder: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        opened = list(pool.map(lambda _: text_data(folder).corpus, range(3)))
    assert len({corpus.folder for corpus in opened}) == 1
    assert len({corpus.shards["train"].tokens.tobytes() for corpus in opened}) == 1
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 1


def test_separate_sources_and_tokenizer_file(folder: Path) -> None:
    (folder / "held.jsonl").write_text(json.dumps({"text": prose(77, 300)}))
    text_data(folder).tokenizer.save(folder / "given.tok")
    data = text_data(folder, test_source=str(folder / "held.jsonl"), tokenizer=str(folder / "given.tok"))
    assert data.shard("test").names == ("held.jsonl:1",) and data.shard("test").texts(data.tokenizer) == [
        prose(77, 300)
    ]
    train, validation = data.shard("train").names, data.shard("validation").names
    assert len(train) + len(validation) == 14 and len(validation) >= 1
    assert data.tokenizer.encode("keep") == text_data(folder).tokenizer.encode("keep")


def test_no_training_text_left(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the same")
    data = text_data(
        tmp_path, source=str(tmp_path / "a.txt"), test_source=str(tmp_path / "a.txt"), validation_share=0.0
    )
    with pytest.raises(InputError, match="no training text is left"):
        data.setup()


# Windows and evidence


def make_shard(lengths: list[int], seed: int = 0, vocab_size: int = 9) -> Shard:
    generator = np.random.default_rng(seed)
    pieces = [np.append(generator.integers(1, vocab_size, length), 0) for length in lengths]
    offsets = np.cumsum([0, *map(len, pieces)])
    names = tuple(f"doc{i}" for i in range(len(lengths)))
    sizes = np.arange(vocab_size) % 4
    return Shard("test", np.concatenate(pieces).astype(np.uint16), offsets, names, sizes)


def test_training_windows_cover_the_stream() -> None:
    shard = make_shard([10, 25, 7])
    windows = TrainingWindows(shard, 11)
    assert len(windows) == 4
    stream = np.concatenate([item["tokens"] for item in windows])
    assert (stream == shard.tokens[:44]).all() and stream.dtype == np.int64
    assert all((item["labels"][:-1] == item["tokens"][1:]).all() for item in windows)
    assert windows[3]["labels"][-1] == shard.tokens[44] and (windows[-1]["tokens"] == windows[3]["tokens"]).all()
    assert len(TrainingWindows(shard, 44)) == 1
    with pytest.raises(InputError, match="data.length: a window of 45"):
        TrainingWindows(shard, 45)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    n_context=st.integers(1, 20),
    n_suffix=st.integers(1, 7),
    count=st.integers(1, 30),
    extra=st.none() | st.integers(0, 9),
    seed=st.integers(0, 3),
)
def test_eval_windows_against_brute_force(lengths, n_context, n_suffix, count, extra, seed) -> None:
    shard, length = make_shard(lengths, seed), n_context + n_suffix
    stride = None if extra is None else n_suffix + extra
    if max(lengths) < length:
        with pytest.raises(InputError, match="n_context"):
            cut_eval_windows(shard, n_context, n_suffix, count, stride, seed)
        return
    possible = [
        (index, shard.document(index)[start : start + length].tolist())
        for index in range(len(lengths))
        for start in range(0, lengths[index] - length + 1, stride or n_suffix)
    ]
    windows = cut_eval_windows(shard, n_context, n_suffix, count, stride, seed)
    cut = list(zip(windows.document.tolist(), windows.tokens.tolist(), strict=True))
    assert len(cut) == min(count, len(possible)) and windows.tokens.dtype == torch.int64
    places = iter(possible)
    assert all(window in places for window in cut)
    assert windows.n_bytes.tolist() == [sum(t % 4 for t in tokens[n_context:]) for _, tokens in cut]
    for row, (_, tokens) in enumerate(cut):
        for j in range(n_suffix):
            earlier = [p for p in range(n_context + j) if tokens[p] == tokens[n_context + j]]
            assert windows.last_occurrence[row, j] == max(earlier, default=-1)


def test_eval_windows_spread_evenly_and_follow_the_seed() -> None:
    shard = make_shard([1000, 1000, 1000, 1000])
    picks = [cut_eval_windows(shard, 90, 10, 40, seed=seed) for seed in (0, 0, 1)]
    assert np.bincount(picks[0].document).tolist() == [10, 10, 10, 10] and len(picks[0]) == 40
    assert torch.equal(picks[0].tokens, picks[1].tokens) and not torch.equal(picks[0].tokens, picks[2].tokens)


@pytest.mark.parametrize(
    "numbers, key", [((0, 5, 5), "n_context"), ((5, 0, 5), "n_suffix"), ((5, 5, 0), "count"), ((5, 5, 5, 4), "stride")]
)
def test_eval_windows_out_of_range(numbers, key: str) -> None:
    with pytest.raises(InputError, match=f"^{key}: "):
        cut_eval_windows(make_shard([100]), *numbers)


def test_too_long_a_window_names_the_longest_document() -> None:
    with pytest.raises(InputError, match="every test document .longest: doc1, 60 tokens"):
        cut_eval_windows(make_shard([20, 60, 30]), 58, 3, 1)


@settings(deadline=None)
@given(seed=st.integers(0, 99), n_context=st.integers(1, 40), n_suffix=st.integers(1, 9), reach=st.integers(0, 45))
def test_evidence_against_brute_force(seed: int, n_context: int, n_suffix: int, reach: int) -> None:
    tokens = np.random.default_rng(seed).integers(0, 70_000 if seed % 2 else 12, (5, n_context + n_suffix)) // (
        seed % 9 + 1
    )
    last, edges = find_last_occurrence(tokens, n_context), [2, 5, 17]
    groups, far = evidence_groups(last, n_context, edges), is_far(last, n_context, reach)
    bounds = group_bounds(edges)
    for w, row in enumerate(tokens.tolist()):
        for j in range(n_suffix):
            target = n_context + j
            earlier = [p for p in range(target) if row[p] == row[target]]
            assert last[w, j] == max(earlier, default=-1)
            in_reach = [p for p in earlier if p >= n_context - reach]
            assert far[w, j] == bool(earlier and not in_reach)
            low, high = bounds[groups[w, j]]
            assert (groups[w, j] == -1) if not earlier else low <= target - max(earlier) < (high or np.inf)


def test_edges_must_ascend() -> None:
    assert group_bounds([4, 8]) == [(1, 4), (4, 8), (8, None)] and group_bounds([]) == [(1, None)]
    for edges in ([1], [4, 4], [8, 4]):
        with pytest.raises(InputError, match="edges"):
            group_bounds(edges)


# The data module


class Recorder(LightningModule):
    """A tiny real model that keeps what it was fed."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Embedding(300, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 300))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], _: int) -> torch.Tensor:
        self.seen.append(batch["tokens"].tolist())
        return torch.nn.functional.cross_entropy(self.net(batch["tokens"]).mT, batch["labels"])

    def validation_step(self, batch: dict[str, torch.Tensor], _: int) -> None:
        self.log("loss", self.net(batch["tokens"]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TextData, saving: list[ModelCheckpoint] | None = None, resume: Path | None = None, **options) -> Recorder:
    torch.manual_seed(1)
    model = Recorder()
    options |= {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=saving, enable_checkpointing=bool(saving), **options)
    trainer.fit(model, data, ckpt_path=resume)
    return model


def saved(folder: Path, name: str, **when) -> ModelCheckpoint:
    return ModelCheckpoint(folder, name + "-{step}", save_top_k=-1, **when)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_sees_the_same_batches_into_the_next_epochs(folder: Path, workers: int) -> None:
    def data() -> TextData:
        return text_data(folder, num_workers=workers, length=64, batch_size=9)

    per_epoch = len(data().train_dataloader())
    middle = per_epoch // 2 + 1
    saving = [saved(folder, "middle", every_n_train_steps=middle), saved(folder, "last", every_n_train_steps=per_epoch)]
    whole = fit(data(), [*saving, saved(folder, "end", save_on_train_epoch_end=True)], max_epochs=3)
    assert len(whole.seen) == 3 * per_epoch and len({str(batch) for batch in whole.seen}) == 3 * per_epoch
    assert whole.seen[0] == fit(data(), max_steps=1).seen[0]
    places = [("middle", middle), ("last", per_epoch), ("end", per_epoch), ("middle", 2 * middle)]
    for name, step in places if not workers else places[:2]:
        rest = fit(data(), None, folder / f"{name}-step={step}.ckpt", max_epochs=3)
        assert rest.seen == whole.seen[step:] and rest.trainer.current_epoch == 3


@pytest.mark.filterwarnings("ignore")
def test_resume_with_shortened_epochs_and_overfitting(folder: Path) -> None:
    def run(saving: list[ModelCheckpoint] | None = None, resume: Path | None = None) -> Recorder:
        return fit(text_data(folder), saving, resume, max_steps=9, limit_train_batches=4)

    whole = run([saved(folder, "at", every_n_train_steps=1)])
    assert len({str(batch) for batch in whole.seen}) == 9
    for step in (3, 4, 5):
        assert run(None, folder / f"at-step={step}.ckpt").seen == whole.seen[step:]
    again = fit(text_data(folder), max_epochs=2, overfit_batches=2)
    assert again.seen[:2] == again.seen[2:] and len(again.seen) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_used_for_validation_does_not_move_the_next_fit(folder: Path) -> None:
    first = fit(text_data(folder), [saved(folder, "at", every_n_train_steps=3)], max_steps=3)
    torch.load(folder / "at-step=3.ckpt", weights_only=True)
    data = text_data(folder)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    trainer.validate(Recorder(), data, ckpt_path=folder / "at-step=3.ckpt")
    assert fit(data, max_steps=3).seen == first.seen


def test_order_follows_from_seed_and_epoch_alone(folder: Path) -> None:
    def order(loader) -> list[list[int]]:
        return [batch["tokens"][:, 0].tolist() + batch["tokens"][:, 1].tolist() for batch in loader]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    loader = text_data(folder, seed=3).train_dataloader()
    epochs = [order(loader), order(loader)]
    loader.load_state_dict({"epoch": 0, "batches": 0})
    assert order(loader) == epochs[0] != epochs[1]
    assert order(text_data(folder, seed=4).train_dataloader()) not in epochs
    order(text_data(folder).val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_processes_share_an_epoch(folder: Path) -> None:
    from simba_lab.data.loading import EpochShuffle

    shares = [list(EpochShuffle(range(11), 2, 7, 2, rank)) for rank in (0, 1)]
    assert [len(share) for share in shares] == [4, 4] and len({*shares[0], *shares[1]}) == 8


def test_held_out_loaders_repeat_and_do_not_overlap(folder: Path) -> None:
    data = text_data(folder, validation_windows=3, test_share=0.5)
    windows = [torch.cat([batch["tokens"] for batch in data.val_dataloader()]) for _ in range(2)]
    assert torch.equal(*windows) and windows[0].shape == (3, 32)
    test = torch.cat([batch["tokens"] for batch in data.test_dataloader()])
    assert (test.flatten().numpy() == data.shard("test").tokens[: test.numel()]).all()
    assert len(data.shard("test").tokens) - test.numel() <= 32
    assert len(text_data(folder, test_windows=2, test_share=0.5).test_dataloader().dataset) == 2


def test_setup_is_idempotent_and_eval_windows_come_along(folder: Path) -> None:
    data = text_data(folder)
    data.prepare_data()
    opened = data.corpus
    data.setup("fit")
    data.setup("test")
    assert data.corpus is opened and data.vocab_size == 300
    windows = data.eval_windows("train", 40, 10, 20)
    assert len(windows) == 20 and (windows.n_context, windows.n_suffix) == (40, 10)
    with pytest.raises(InputError, match="it is one of train, validation, test"):
        data.shard("dev")


@pytest.mark.parametrize(
    "key, value",
    [
        ("length", 0),
        ("batch_size", 0),
        ("validation_windows", 0),
        ("test_windows", -1),
        ("seed", -1),
        ("num_workers", -2),
        ("validation_share", 1.0),
        ("test_share", -0.1),
        ("test_share", 0.95),
        ("vocab_size", 256),
    ],
)
def test_values_out_of_range_name_their_key(key: str, value: float) -> None:
    with pytest.raises(InputError, match=f"data.{key}"):
        TextData(**{key: value})


def test_batch_larger_than_the_data(folder: Path) -> None:
    with pytest.raises(InputError, match="data.batch_size: 9999"):
        text_data(folder, batch_size=9999).train_dataloader()


def test_configuration_files_can_name_it(folder: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextData, "data")
    parsed = parser.parse_args(
        ["--data=simba_lab.data.TextData", f"--data.source={folder}", "--data.test_windows=null"]
    )
    data = parser.instantiate(parsed).data
    assert isinstance(data, TextData) and data.settings.source == str(folder) and data.length == 1024


def test_xz_bits_per_byte(folder: Path) -> None:
    text = prose(1, 3000)
    assert xz_bits_per_byte(text) == 8 * len(lzma.compress(text.encode(), preset=9)) / len(text.encode())
    assert 1 < text_data(folder).xz_bits_per_byte("train") < 5
    with pytest.raises(InputError):
        xz_bits_per_byte("")


@pytest.mark.parametrize("key", ["length", "batch_size", "vocab_size", "validation_share"])
def test_null_where_a_number_belongs_is_named(key: str) -> None:
    with pytest.raises(InputError, match=f"^data.{key}: null is no number"):
        TextData(**{key: None})
