"""``simba-lab convert`` and names on the hub: what is written is whole, what is missing is said in one line, soon."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tiny import mistake, simba_lab

from simba_lab.checkpoint import load, save_model, tokenizer_path
from simba_lab.checkpoint.state_spaces import write_state_spaces
from simba_lab.checkpoint.transformers_format import write_transformers
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, ModelConfig

CONFIG = ModelConfig(12, 2, 21, d_state=3)
NAME = "state-spaces/mamba-tiny"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    save_model(tmp_path / "run", LanguageModel(CONFIG))
    return tmp_path / "run"


@pytest.mark.parametrize("format", ["run", "state-spaces", "transformers"])
def test_the_command_writes_a_folder_that_loads(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    (run / "tokenizer.json").write_text('{"a": 1}')
    (run / "tokenizer_config.json").write_text("{}")
    target, report = tmp_path / "new" / "folder", tmp_path / "done.json"
    assert simba_lab("convert", run, target, "--format", format, "--dtype", "bf16", "--json", report) == 0
    done, printed = json.loads(report.read_text()), capsys.readouterr().out
    assert done["files"] == sorted(path.name for path in target.iterdir())
    assert {"tokenizer.json", "tokenizer_config.json"} < set(done["files"]) and done["remarks"] == []
    assert (done["format"], done["dtypes"]) == (format, ["bfloat16"])
    assert f"{done['parameters']:,} parameters in bfloat16, format {format}" in printed and "note:" not in printed
    original, loaded = LanguageModel(CONFIG).bfloat16().state_dict(), load(target).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in original.items())
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_what_stays_behind_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "sparse", LanguageModel(CONFIG).sparsified(final_keep=0.5))
    assert simba_lab("convert", tmp_path / "sparse", tmp_path / "there", "--format", "state-spaces") == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "pruning plan stays behind" in notes[0] and "no tokenizer.json" in notes[1]
    assert simba_lab("convert", tmp_path / "there", tmp_path / "back", "--format", "run") == 0
    assert "state-spaces' models use that of EleutherAI/gpt-neox-20b" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_nothing_is_overwritten(tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    target = tmp_path / "target"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "gone")
    assert "target exists; name a new folder" in mistake(capsys, "convert", run, target, "--format", "run")
    assert (kind == "link") == target.is_symlink() and (kind == "folder") == target.is_dir()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["RUN", "TO"], "--format"),
        (["RUN", "TO", "--format", "gguf"], "invalid choice: 'gguf'"),
        (["RUN", "TO", "--format", "run", "--dtype", "int8"], "invalid choice: 'int8'"),
        (["gone", "TO", "--format", "run"], "checkpoint: gone does not exist; give a run folder"),
        (["mamba-130m", "TO", "--format", "run"], "did you mean state-spaces/mamba-130m?"),
        (["tests/gone", "TO", "--format", "run"], "checkpoint: tests/gone does not exist; give a run folder"),
        (["RUN", "RUN/model.json/deep", "--format", "run"], "cannot be written: Not a directory"),
    ],
    ids=str,
)
def test_a_bad_argument_takes_one_line(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], problem: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(Path(__file__).parent.parent)
    places = {"RUN": run, "TO": tmp_path / "to", "RUN/model.json/deep": run / "model.json" / "deep"}
    assert problem in mistake(capsys, "convert", *(places.get(argument, argument) for argument in arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_model_that_the_format_cannot_express_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "run", LanguageModel(ModelConfig(12, 2, 21, norm_eps=1e-3)))
    problem = mistake(capsys, "convert", tmp_path / "run", tmp_path / "to", "--format", "state-spaces")
    assert "model.norm_eps 0.001 has no place in the format state-spaces, whose norms use 1e-05" in problem
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(weights: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("simba_lab.checkpoint.state_spaces.torch.save", cut)
    assert simba_lab("convert", run, tmp_path / "to", "--format", "state-spaces") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Hub(ThreadingHTTPServer):
    """As much of the hub as its client asks for: files of repositories, each with its commit and hash."""

    def __init__(self, root: Path, silent: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.silent, self.asked = root, silent, []


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.server.asked.append(self.path)
        if self.server.silent:
            time.sleep(60)
        owner_model, _, file = self.path.lstrip("/").partition("/resolve/main/")
        path = self.server.root / owner_model / file
        if not path.is_file():
            known = (self.server.root / owner_model).is_dir() or not owner_model
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("ETag", f'"{path.name}{len(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, and a cache and a working directory of its own."""
    (tmp_path / "hub").mkdir()
    server = Hub(tmp_path / "hub")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    constants, place = huggingface_hub.constants, f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", place)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def publish(hub: Hub, name: str = NAME, writer: object = write_state_spaces) -> LanguageModel:
    model = LanguageModel(CONFIG, seed=4)
    (hub.root / name).mkdir(parents=True)
    writer(hub.root / name, model)
    return model


def test_a_name_is_downloaded_once(hub: Hub) -> None:
    original = publish(hub).state_dict()
    loaded = load(NAME).state_dict()
    assert all(torch.equal(weight, loaded[name]) for name, weight in original.items())
    assert any(path.endswith("pytorch_model.bin") for path in hub.asked)
    hub.asked.clear()
    assert load(NAME).config == CONFIG and hub.asked == []


def test_a_sharded_model_is_downloaded_whole(hub: Hub) -> None:
    publish(hub, "someone/sharded", write_transformers)
    folder = hub.root / "someone" / "sharded"
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = {"weight_map": {"backbone.embeddings.weight": "part.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load("someone/sharded").config == CONFIG


def test_the_tokenizer_of_a_name(hub: Hub) -> None:
    publish(hub)
    with pytest.raises(InputError, match="EleutherAI/gpt-neox-20b does not exist"):
        tokenizer_path(NAME)
    (hub.root / "EleutherAI" / "gpt-neox-20b").mkdir(parents=True)
    (hub.root / "EleutherAI" / "gpt-neox-20b" / "tokenizer.json").write_text('{"neox": 1}')
    assert tokenizer_path(NAME).read_text() == '{"neox": 1}'
    publish(hub, "someone/else", write_transformers)
    (hub.root / "someone" / "else" / "tokenizer.json").write_text('{"own": 1}')
    assert tokenizer_path("someone/else").read_text() == '{"own": 1}'


def test_what_the_hub_does_not_have(hub: Hub) -> None:
    with pytest.raises(InputError, match="someone/gone does not exist, neither here nor on the hub"):
        load("someone/gone")
    (hub.root / "someone" / "empty").mkdir(parents=True)
    with pytest.raises(InputError, match="someone/empty on the hub has no config.json with model.safetensors or"):
        load("someone/empty")


def test_a_folder_of_the_name_comes_before_the_hub(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    write_state_spaces(tmp_path / NAME, LanguageModel(CONFIG))
    load(NAME)
    with pytest.raises(InputError, match="state-spaces' models use that of EleutherAI/gpt-neox-20b: copy it there"):
        tokenizer_path(NAME)
    assert hub.asked == []


@pytest.mark.parametrize("how", ["refused", "silent", "offline"])
def test_without_a_network_one_line_says_what_to_copy(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    monkeypatch.setattr("simba_lab.checkpoint.hub.REACH_SECONDS", 0.5)
    if how == "refused":
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.silent = how == "silent"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", how == "offline")
    began = time.perf_counter()
    problem = mistake(capsys, "convert", NAME, "to", "--format", "run")
    assert time.perf_counter() - began < 5
    assert f"{NAME} is not here and the hub cannot be reached (" in problem
    files = "config.json, model.safetensors or pytorch_model.bin and tokenizer.json"
    assert f"copy its {files} into a folder ./{NAME}" in problem
    assert how != "offline" or hub.asked == []
