"""Files made to harm: code in pickles, headers that lie, names that lead elsewhere, aliases without end."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_checkpoint import model

import simba_lab
from simba_lab.checkpoint import save_model
from simba_lab.errors import InputError
from simba_lab.sweep import read_sweep

ROOT = Path(simba_lab.__file__).parent


class Payload:
    """Runs a function of the attacker's choice when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


PAYLOADS = {
    "system": lambda mark: Payload(os.system, f"touch {mark}"),
    "open": lambda mark: Payload(open, str(mark), "w"),
    "exec": lambda mark: Payload(exec, f"open({str(mark)!r}, 'w')"),
    "eval": lambda mark: Payload(eval, f"open({str(mark)!r}, 'w')"),
    "import": lambda mark: Payload(__import__, "antigravity"),
    "torch": lambda mark: Payload(torch.save, {}, str(mark)),
}


@pytest.mark.parametrize("name", PAYLOADS)
@pytest.mark.parametrize("form", ["zip", "legacy", "raw", "in weights"])
def test_a_pickle_that_executes_code_is_refused_before_it_does(tmp_path: Path, name: str, form: str) -> None:
    mark, path = tmp_path / "fired", tmp_path / "x.ckpt"
    payload = PAYLOADS[name](mark)
    if form == "raw":
        path.write_bytes(pickle.dumps(payload))
    else:
        content = {"state_dict": {"lm.w": payload}} if form == "in weights" else {"simba_lab_model": payload}
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    with pytest.raises(InputError, match="could execute code"):
        simba_lab.load(path)
    assert not mark.exists()


def test_the_payloads_are_live(tmp_path: Path) -> None:
    """Or their not firing would prove nothing."""
    for name in ("system", "open", "exec", "eval", "torch"):
        mark = tmp_path / name
        pickle.loads(pickle.dumps(PAYLOADS[name](mark)))
        assert mark.exists(), name


def run_folder(folder: Path) -> tuple[Path, dict[str, Any], bytes]:
    """A run folder, the header of its weights and what follows it."""
    save_model(folder, model())
    raw = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return folder, json.loads(raw[8 : 8 + length]), raw[8 + length :]


def lie(key: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(header: dict[str, Any]) -> dict[str, Any]:
        header["backbone.norm_f.weight"][key] = value
        return header

    return change


def overlapping(header: dict[str, Any]) -> dict[str, Any]:
    header["backbone.norm_f.weight"]["data_offsets"] = header["backbone.embedding.weight"]["data_offsets"]
    return header


@pytest.mark.parametrize(
    "change",
    [
        overlapping, lie("data_offsets", [0, 2**62]), lie("data_offsets", [48, 0]), lie("data_offsets", [-48, 0]),
        lie("shape", [2**40, 2**40]), lie("shape", [-12]), lie("shape", [13]), lie("dtype", "F64"), lie("dtype", "F99"),
        lie("shape", "wide"), lambda header: {"a": 1}, lambda header: [], lambda header: {},
    ],
)  # fmt: skip
def test_a_header_that_lies_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    folder, header, body = run_folder(tmp_path / "run")
    text = json.dumps(change(header)).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    with pytest.raises(InputError, match="run"):
        simba_lab.load(folder)


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_length_that_lies_takes_no_memory(tmp_path: Path, length: int) -> None:
    folder, header, body = run_folder(tmp_path / "run")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + json.dumps(header).encode() + body)
    with pytest.raises(InputError, match="is truncated or not safetensors"):
        simba_lab.load(folder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", ".", "a/b", "a\0b", "x" * 300, ["a"], {}])
def test_a_shard_lies_beside_its_index(tmp_path: Path, name: Any) -> None:
    simba_lab.checkpoint.convert(run_folder(tmp_path / "run")[0], tmp_path / "out", "transformers")
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "x.safetensors")
    index = tmp_path / "out" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(InputError, match="has no weight_map from weights to files beside it"):
        simba_lab.load(tmp_path / "out")


def test_members_of_an_archive_are_never_unpacked(tmp_path: Path) -> None:
    """A .ckpt is a zip; names in it that lead outside stay names."""
    buffer = io.BytesIO()
    torch.save({"simba_lab_model": {}, "state_dict": {}}, buffer)
    path = tmp_path / "in" / "x.ckpt"
    path.parent.mkdir()
    path.write_bytes(buffer.getvalue())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../escaped", "x")
        archive.writestr("/tmp/escaped-simba-lab", "x")
    with pytest.raises(InputError):
        simba_lab.load(path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["in", "x.ckpt"]
    assert not Path("/tmp/escaped-simba-lab").exists()


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{now}: &{now} [{', '.join([f'*{before}'] * 9)}]\n" for before, now in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (LAUGHS, "its aliases stand for more than 100,000 values"),
        ("arms: " + "[" * 5000, "not YAML"),
        ("n_context: " + "9" * 5000, "not YAML"),
        ("experiment: !!python/object/apply:os.system ['touch fired']", "not YAML"),
        ("experiment: !!python/name:os.system", "not YAML"),
        ("a: &a {b: *a}", "its aliases stand for more"),
    ],
)
def test_hostile_yaml_is_refused_in_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        read_sweep(Path("s.yaml"))
    assert len(str(caught.value)) < 2000 and "\n" not in str(caught.value)
    assert not Path("fired").exists()


FORBIDDEN = {"eval", "exec", "compile", "__import__"}
UNSAFE = {
    "pickle": {"load", "loads", "Unpickler"}, "marshal": {"load", "loads"}, "shelve": {"open"},
    "yaml": {"load", "load_all", "unsafe_load", "full_load", "Loader", "UnsafeLoader", "FullLoader"},
    "os": {"system", "popen"}, "joblib": {"load"}, "dill": {"load", "loads"},
}  # fmt: skip


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_our_source_executes_nothing_it_reads(path: Path) -> None:
    """No eval, exec or unsafe loader; torch.load with weights_only, np.load without pickles; no trust_remote_code."""
    for call in calls(ast.parse(path.read_text(encoding="utf-8"))):
        keywords = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
        where = f"{path}:{call.lineno}"
        if isinstance(call.func, ast.Name):
            assert call.func.id not in FORBIDDEN, where
        elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
            owner, name = call.func.value.id, call.func.attr
            assert name not in UNSAFE.get(owner, ()), where
            assert (owner, name) != ("torch", "load") or keywords.get("weights_only") is True, where
            assert (owner, name) != ("subprocess", "run") or not keywords.get("shell"), where
        assert not keywords.get("allow_pickle") and not keywords.get("trust_remote_code"), where


def test_yaml_of_ours_is_read_by_the_safe_loader() -> None:
    with pytest.raises(yaml.YAMLError):
        yaml.safe_load("!!python/object/apply:os.system ['true']")
