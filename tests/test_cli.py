"""The frame of the command line, and doctor."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from simba_lab.cli import doctor
from simba_lab.cli import main as frame

COMMAND = """
import argparse
from simba_lab.errors import BudgetMismatch, InputError

def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what")
    parser.add_argument("--level", type=int, default=3)

def run(args):
    if args.what == "mistake":
        raise InputError("data.files: no file\\nmatches books/*.txt")
    if args.what == "budget":
        raise BudgetMismatch("budget 100 FLOPs\\n  deep: 140 (+40.0 %)\\n  wide: 90 (-10.0 %)")
    if args.what == "interrupt":
        raise KeyboardInterrupt
    if args.what == "bug":
        raise ZeroDivisionError("a bug")
    if args.what == "unfit":
        return {"exit_code": 2}
    print("measured")
    return {"what": args.what, "level": args.level, "nats": [0.5, float("nan"), float("inf")]}
"""
DELEGATE = """
def main(argv):
    print(argv)
    return 3 if "fail" in argv else None
"""


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with two real command modules of its own, offered as `probe`, `fit` and `lm-eval`."""
    (tmp_path / "probe_command.py").write_text(COMMAND, encoding="utf-8")
    (tmp_path / "delegate_command.py").write_text(DELEGATE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    importlib.invalidate_caches()
    absent = ("no_such_command", "not written yet")
    monkeypatch.setattr(frame, "COMMANDS", {"probe": ("probe_command", "a probe"), "absent": absent})
    delegate = ("delegate_command", "hands over")
    monkeypatch.setattr(frame, "DELEGATED", {"fit": delegate, "lm-eval": delegate})
    yield tmp_path
    for name in ("probe_command", "delegate_command"):
        sys.modules.pop(name, None)


def code_of(*argv: str) -> int:
    try:
        return frame.main(argv)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_result_is_written_as_json(commands: Path) -> None:
    assert code_of("probe", "x", "--level", "5", "--json", "out.json") == 0
    assert json.loads(Path("out.json").read_text()) == {"what": "x", "level": 5, "nats": [0.5, None, None]}
    assert sorted(path.name for path in commands.glob("*out.json*")) == ["out.json"]


def test_result_may_decide_the_exit_code(commands: Path) -> None:
    assert code_of("probe", "unfit", "--json", "out.json") == 2
    assert json.loads(Path("out.json").read_text()) == {"exit_code": 2}


@pytest.mark.parametrize("target", ["missing/out.json", ".", "/dev/null/out.json"])
def test_unwritable_json_is_refused_before_the_work(
    commands: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code_of("probe", "bug", "--json", target) == 2
    error = capsys.readouterr().err
    assert error.startswith("simba-lab: error: --json: ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("what", "code", "error"),
    [
        ("mistake", 2, "simba-lab: error: data.files: no file matches books/*.txt\n"),
        ("budget", 3, "simba-lab: error: budget 100 FLOPs\n  deep: 140 (+40.0 %)\n  wide: 90 (-10.0 %)\n"),
        ("interrupt", 130, "simba-lab: interrupted\n"),
    ],
)
def test_outcomes_become_exit_codes(
    commands: Path, capsys: pytest.CaptureFixture[str], what: str, code: int, error: str
) -> None:
    assert code_of("probe", what, "--json", "out.json") == code
    assert capsys.readouterr() == ("", error)
    assert not Path("out.json").exists()


def test_bugs_keep_their_traceback(commands: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        frame.main(["probe", "bug"])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["prob"], "'prob'"),
        (["absent"], "'absent'"),
        (["--", "probe"], "COMMAND"),
        (["probe"], "what"),
        (["probe", "x", "--level", "high"], "'high'"),
        (["probe", "x", "--lev", "4"], "--lev"),
    ],
)
def test_wrong_arguments_take_one_line(
    commands: Path, capsys: pytest.CaptureFixture[str], argv: list[str], named: str
) -> None:
    assert code_of(*argv) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and named in error


def test_delegated_commands_get_their_arguments(commands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("fit", "--config", "base.yaml") == 0
    assert code_of("lm-eval", "run", "--fail", "fail") == 3
    assert capsys.readouterr().out == "['fit', '--config', 'base.yaml']\n['run', '--fail', 'fail']\n"


def test_help_offers_what_exists(commands: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("--help") == code_of() == 0
    listed = capsys.readouterr().out
    assert listed.count("a probe") == 2 and "absent" not in listed


@pytest.mark.parametrize("name", list(frame.COMMANDS))
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if name not in frame._offered(frame.COMMANDS):
        pytest.skip(f"{name} is not part of this version")
    assert code_of(name, "--help") == 0
    text = capsys.readouterr().out
    assert "--json FILE" in text and f"simba-lab {name}" in text and "examples:" in text


def test_version() -> None:
    done = subprocess.run([sys.executable, "-c", _MAIN, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"simba-lab {importlib.metadata.version('simba-lab')}\n"


def test_help_does_not_load_torch() -> None:
    code = f"{_MAIN.replace('sys.exit(main())', 'main([])')}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")


def test_a_closed_pipe_is_quiet(commands: Path) -> None:
    code = "import simba_lab.cli.main as m, sys; m.COMMANDS['probe'] = ('probe_command', ''); sys.exit(m.main())"
    reader = subprocess.Popen(["true"], stdin=subprocess.PIPE)
    reader.wait()
    command = [sys.executable, "-c", code, "probe", "x"]
    done = subprocess.run(command, stdout=reader.stdin, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (141, b"")


_MAIN = "import sys; from simba_lab.cli.main import main; sys.exit(main())"


def test_doctor_reports_the_installed_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of("doctor", "--json", str(tmp_path / "doctor.json")) == 0
    result = json.loads((tmp_path / "doctor.json").read_text())
    found = {entry["name"]: entry for entry in result["packages"]}
    assert found["torch"]["installed"] == importlib.metadata.version("torch") and found["torch"]["problem"] is None
    assert found["mamba-ssm"]["extra"] == "cuda"
    assert result["backends"]["cpu"]["reference"] is None
    assert result["machine"]["cores"] >= 1 and result["machine"]["memory_bytes"] > 1e9
    assert "kernel backends" in capsys.readouterr().out


def test_doctor_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = [("", Requirement("torch<2")), ("", Requirement("no-such-package>=1")), ("cuda", Requirement("nor-this"))]
    monkeypatch.setattr(doctor, "_requirements", lambda: iter(needs))
    assert code_of("doctor", "--json", str(tmp_path / "doctor.json")) == 2
    error = capsys.readouterr().err
    torch = importlib.metadata.version("torch")
    assert f"torch ({torch} is not in <2), no-such-package (not installed);" in error
    assert error.count("\n") == 1 and "nor-this" not in error
    assert len(json.loads((tmp_path / "doctor.json").read_text())["packages"]) == 3
