"""The GPU benches, run on the CPU at tiny sizes: what a line means, and that what is wrong gets no number."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from simba_lab.bench import decode, kernels, models, ops, prefill_cuda, table, training, training_profile
from simba_lab.bench.checks import RedCheck, poisoned_memory, relative_norm, require
from simba_lab.bench.floors import Ceilings, Work, floor, floor_of_sequence
from simba_lab.bench.lines import Line, Target, attempt, beside, throughput
from simba_lab.bench.model_work import decoding_work, prefill_work
from simba_lab.bench.ops import Size
from simba_lab.bench.session import Session
from simba_lab.bench.subject import Peer, Subject, check, measure
from simba_lab.bench.timing import Timing, inputs_needed, time_calls
from simba_lab.cli.bench_views import profile_tables
from simba_lab.cli.main import main
from simba_lab.errors import InputError
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.model.shapes import published_shape

CPU = torch.device("cpu")
UNIT = Ceilings(1e9, 1e9, 1e9, 1e9)
# An H200: bandwidth as its users measure it, special functions as 132 multiprocessors at 1980 MHz have them.
H200 = Ceilings(bytes=4.25e12, matrix_flops=7.8e14, flops=6.7e13, exps=16 * 132 * 1.98e9)
TINY = ModelConfig(24, 3, 40)
ROOT = Path(__file__).parents[1]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@pytest.fixture(autouse=True)
def _short_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The readable reference takes its time on the small model that is checked before anything is timed."""
    monkeypatch.setattr(models, "_ODD_CONTEXT", 13)


def session(backend: str = "reference") -> Session:
    return Session(CPU, seed=1, backend=backend, progress=lambda name: None, repeats=3, given_ceilings=UNIT)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def double(name: str = "doubling", **changes: Any) -> Subject:
    """An op simple enough to be wrong in one way at a time."""
    subject = Subject(
        what=name,
        draw=lambda g: {"x": torch.randn(2, 5, 3, generator=g)},
        ours=lambda t: (t["x"] * 2,),
        oracle=lambda t: (t["x"] + t["x"],),
        forward=Work(240),
        backward=Work(240),
        differentiated=("x",),
    )
    return dataclasses.replace(subject, **changes)


# --- checks


def test_a_right_op_passes_and_says_how_close_it_was() -> None:
    forward, backward = check(double(), generator())
    assert forward == {"check": "doubling, forward", "worst": "output 0", "error": 0.0, "allowed": 1e-4}
    assert backward["check"] == "doubling, backward" and backward["worst"] == "x"


def test_a_wrong_gradient_is_red_though_the_output_is_right() -> None:
    wrong = double(ours=lambda t: (t["x"] + t["x"].detach(),))
    with pytest.raises(RedCheck, match="doubling, backward: x is off by 5.00e-01"):
        check(wrong, generator())


def test_an_element_that_nobody_wrote_is_red() -> None:
    def forgets_the_last(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        out = torch.empty_like(t["x"])
        out[:, :-1] = 2 * t["x"][:, :-1]
        return (out,)

    with pytest.raises(RedCheck, match="output 0 is off by inf"):
        check(double(ours=forgets_the_last, backward=None), generator())


def test_poisoned_memory_ends_with_its_block() -> None:
    with poisoned_memory():
        assert torch.empty(7).isnan().all() and torch.empty(7, dtype=torch.bfloat16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_few_channels_stand_for_all_where_each_is_its_own() -> None:
    """At full size the oracle follows some channels; a sum over channels that misses one of them must still be seen."""
    scan = ops.scan(kernels.resolve("reference", "cpu"), Size(1, 5, 41, 3, torch.float32), CPU)
    records = check(scan, generator())
    assert records[1]["check"].endswith("backward of 37 channels") and records[1]["error"] < 1e-5

    def half_of_B(t: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        return scan.ours(t | {"B": (t["B"] + t["B"].detach()) / 2})

    with pytest.raises(RedCheck, match="B is off by 5.0"):
        check(dataclasses.replace(scan, ours=half_of_B), generator())


def test_norms_see_shapes_and_nan() -> None:
    ones = torch.ones(2, 3)
    assert relative_norm(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_norm(ones, torch.zeros(2, 3)) == pytest.approx(6**0.5)
    assert relative_norm(ones, torch.ones(3, 2)) == relative_norm(ones * float("nan"), ones) == float("inf")
    with pytest.raises(RedCheck, match="thing: b is off"):
        require("thing", {"a": ones, "b": ones * 2}, {"a": ones, "b": ones}, 0.1)


# --- lines


def test_the_peer_stands_beside_ours_and_a_wrong_one_gets_no_number() -> None:
    right = double(peer=Peer("twice", call=lambda t: (t["x"].mul(2),)), targets=(Target(1e-9), Target(1e9)))
    forward, backward = measure(right, generator(), UNIT, repeats=5)
    assert [forward.what, backward.what] == ["doubling, forward", "doubling, forward + backward"]
    assert forward.figure == pytest.approx(forward.theirs / forward.ours)
    assert forward.to_dict()["met"] is True and backward.to_dict()["met"] is False
    assert forward.floor.ms == pytest.approx(240e-6) and forward.fraction == pytest.approx(240e-6 / forward.ours)
    assert backward.floor.ms == pytest.approx(480e-6)

    wrong = dataclasses.replace(right, peer=Peer("thrice", call=lambda t: (t["x"].mul(3),)))
    line = measure(wrong, generator(), UNIT, repeats=5)[0]
    assert (
        line.theirs is None
        and line.figure is None
        and line.note == "thrice differs from ours by 5.0e-01 (allowed 2e-04)"
    )
    breaks = dataclasses.replace(right, peer=Peer("brittle", call=lambda t: t["y"]))
    line = measure(breaks, generator(), UNIT, repeats=5)[0]
    assert line.ours > 0 and line.note == "brittle failed: KeyError: 'y'"
    missing = dataclasses.replace(right, peer=Peer("absent", missing="absent cannot be imported: so it is"))
    assert measure(missing, generator(), UNIT, repeats=5)[0].note == "absent cannot be imported: so it is"


def test_tokens_per_second_turn_times_round() -> None:
    line = throughput("t", 640, Timing(4.0, 2.0, 8.0, 5), "peer", Timing(8.0, 8.0, 8.0, 5), Target(1.5))
    assert (line.ours, line.spread, line.theirs) == (160_000.0, (80_000.0, 320_000.0), 80_000.0)
    assert line.figure == 2.0 and line.unit == "tokens/s" and line.to_dict()["met"]


def test_what_breaks_is_a_line_without_a_number() -> None:
    def broken() -> Iterator[Line]:
        yield Line("before", ours=1.0)
        raise MemoryError("none left\nand more")

    before, line = attempt("thing", broken)
    assert before.ours == 1.0 and not before.failed
    assert line.failed and line.ours is None and line.note == "MemoryError: none left"


def test_times_are_medians_of_every_call_in_turn() -> None:
    called: list[int] = []
    timing = time_calls([lambda: called.append(0), lambda: called.append(1)], CPU, repeats=5)
    assert called == [0, 1, 0, 1, 0, 1, 0] and timing.repeats == 5
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, pytest.approx(1.2), pytest.approx(2.8), 3)
    assert inputs_needed(1, CPU) == 2
    with pytest.raises(ValueError, match="no median"):
        Timing.of([1.0, 2.0])


# --- floors


def test_floors_are_those_of_the_scan_on_an_h200() -> None:
    backend = kernels.resolve("reference", "cpu")
    for size, by_bytes, by_exps in ((Size(8, 2048, 1536), 0.047, 0.114), (Size(1, 16384, 5120), 0.158, 0.381)):
        work = ops.scan(backend, size, CPU).forward
        assert 1e3 * work.bytes / H200.bytes == pytest.approx(by_bytes, rel=0.02)
        assert floor(work, H200).ms == pytest.approx(by_exps, rel=0.02) and floor(work, H200).bound == "exps"


def test_floors_of_a_model_follow_its_counts() -> None:
    config = published_shape("mamba-2.8b")
    dense = floor_of_sequence(prefill_work(config, [2048] * 64, 8), H200)
    halved = floor_of_sequence(prefill_work(config, [1024] * 64, 8), H200)
    assert dense.bound == "matrix_flops" and 1.9 < dense.ms / halved.ms < 2.0
    step = floor_of_sequence(decoding_work(config, 1), H200)
    assert step.bound == "bytes" and step.ms == pytest.approx(1e3 * 2 * 2.77e9 / 4.25e12, rel=0.05)


# --- kernels


TINY_SUITE = {name: (make, [Size(2, 13, 24, 3, torch.float32)]) for name, (make, _) in kernels.SUITE.items()}


@pytest.fixture
def _fp32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_DTYPES", (torch.float32,))


@pytest.mark.usefixtures("_fp32_only")
def test_every_kernel_is_checked_then_timed() -> None:
    here, kept = session(), []
    here.keep = kept.append
    result = kernels.bench_kernels(here, TINY_SUITE, odd=Size(1, 7, 10, 3))
    # What a time limit would cut short is not lost: the result so far is handed on after every op.
    assert len(kept) == len(TINY_SUITE) and kept[-1] == result
    assert [len(so_far["lines"]) for so_far in kept] == sorted(len(so_far["lines"]) for so_far in kept)
    assert result["exit_code"] == 0 and len(result["checks"]) == 30
    assert all(record["error"] <= record["allowed"] for record in result["checks"])
    names = [line["what"].split(",")[0] for line in result["lines"]]
    assert names == [
        *2 * ["selective scan"], *2 * ["causal conv"], *2 * ["conv of true neighbours"],
        *2 * ["residual add + RMS norm"], "global impact (max)", "global impact (absmax)", "global impact (gated)",
        "select 11 of 2 x 13 tokens", "keep 11 tokens of both streams",
        *2 * ["norm of 11 kept tokens"],
    ]  # fmt: skip
    assert all(line["ours"] > 0 and line["fraction"] > 0 for line in result["lines"])
    assert [line["target"]["value"] for line in result["lines"][:2]] == [2.0, 1.5]
    json.dumps(result)


@pytest.mark.usefixtures("_fp32_only")
def test_a_red_kernel_costs_its_own_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from simba_lab.kernels import reference

    right = reference.causal_conv
    monkeypatch.setattr(
        kernels, "resolve",
        lambda *_: dataclasses.replace(
            RESOLVE("reference", "cpu"), causal_conv=lambda *a: (right(*a)[0] * 1.001, right(*a)[1])
        ),
    )  # fmt: skip
    suite = {name: TINY_SUITE[name] for name in ("scan", "conv", "norm")}
    result = kernels.bench_kernels(session(), suite, odd=Size(1, 7, 10, 3))
    failed = [line for line in result["lines"] if line["failed"]]
    assert result["exit_code"] == 1 and [line["what"] for line in failed] == ["conv"]
    assert failed[0]["ours"] is None and "RedCheck: causal conv, 1 x 7 x 10, float32, forward" in failed[0]["note"]
    assert sum(line["ours"] is not None for line in result["lines"]) == 4


RESOLVE = kernels.resolve


# --- whole models


def test_weights_made_on_the_device_are_the_model_s_own() -> None:
    made, own = models.ours(TINY, CPU, torch.float32, 3, "auto"), LanguageModel(TINY, seed=3)
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in made.state_dict().items())


def test_prefill_holds_the_speedup_against_flops() -> None:
    case = prefill_cuda.PrefillCase("tiny", TINY, 2, 33, scoring=Target(0.02, at_most=True))
    result = session("auto").bench("prefill", [case], prefill_cuda.measure_prefill)
    dense, pruned, seldom, scoring, choosing = result["lines"]
    assert seldom["what"] == f"{pruned['what']}, every 4 layers" and "FLOPs promise" in seldom["note"]
    assert result["exit_code"] == 0 and [c["check"] for c in result["checks"]] == ["model, dense", "model, pruned"]
    lm = LanguageModel(TINY)
    sparse = lm.sparsified("global_impact", "linear", final_keep=0.1)
    promised = lm.flops(33, 0).total / sparse.flops(33, 0).total
    assert pruned["figure"] == pytest.approx(dense["ours"] / pruned["ours"] / promised)
    assert f"FLOPs promise {promised:.2f}x" in pruned["note"]
    assert scoring["figure"] == pytest.approx(scoring["ours"] / dense["ours"]) and scoring["target"]["at_most"]
    assert choosing["what"] == "tiny 2 x 33, scoring, selection and gather"
    assert "mamba-ssm cannot be imported" in dense["note"] or dense["theirs"] > 0


def test_slicing_for_free_is_the_dense_pass_where_nothing_is_dropped() -> None:
    model = models.ours(TINY, CPU, torch.float32, 0, "reference")
    tokens = models.random_tokens(TINY, (2, 9), CPU, 0)
    with torch.no_grad():
        assert torch.equal(prefill_cuda._sliced(model, tokens, [9, 9, 9]), model.prefill(tokens).logits)


def test_training_times_whole_steps_and_pruned_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WARMUP", 1), monkeypatch.setattr(training, "STRETCH", 1)
    monkeypatch.setattr(training, "STEPS", 5)
    case = training.TrainingCase(TINY, 2, 16, deterministic=True)
    result = session("auto").bench("train", [case], training.measure_training)
    dense, alike, pruned, seldom, adjacent, same_bits = result["lines"]
    assert result["exit_code"] == 0, result["lines"]
    assert dense["unit"] == "tokens/s" and dense["ours"] > 0 and dense["target"]["value"] == 1.5
    assert alike["what"].endswith("loss on the last 2 tokens") and alike["theirs"] == pytest.approx(dense["ours"])
    speedup = float(pruned["note"].split("x ")[0])
    assert speedup == pytest.approx(pruned["ours"] / alike["ours"], abs=0.006), "over dense with the same loss"
    promised = pruned["note"].split()[-1]
    assert 1.1 < float(promised.removesuffix("x")) < 2 and pruned["target"]["value"] == 0.9
    assert [line["what"].partition("by global impact")[2] for line in (pruned, seldom, adjacent)] == [
        "", ", every 4 layers", ", convolution adjacent"
    ]  # fmt: skip
    assert adjacent["note"].split()[-1] == pruned["note"].split()[-1] != seldom["note"].split()[-1]
    assert same_bits["what"].endswith("dense, deterministic") and same_bits["theirs"] == pytest.approx(dense["ours"])
    assert same_bits["figure"] == pytest.approx(same_bits["ours"] / dense["ours"])
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_profile_says_where_a_pruned_step_spends_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the kernels are operators: a pruned step scores in its scans, and has as many matrix products."""
    monkeypatch.setattr(training, "WARMUP", 1), monkeypatch.setattr(training, "STRETCH", 2)
    monkeypatch.setattr(training, "STEPS", 7)
    case = training.TrainingCase(TINY, 2, 16)
    result = training_profile.profile_training([case], session("auto"))
    first, seldom = result["profiles"]
    assert seldom["what"].endswith("every 4 layers") and 1 < first["promise"] < 2 and first["dense_step"] > 0
    rows = {row["name"]: row for row in first["kernels"]}
    for row in first["kernels"]:
        assert row["over"] == pytest.approx(row["pruned"] - row["dense"] / first["promise"])
    sizes = [abs(row["over"]) for row in first["kernels"]]
    assert sizes == sorted(sizes, reverse=True)
    products, scored = rows["simba_lab::linear"], rows["simba_lab::scored_scan"]
    assert products["dense_calls"] == products["pruned_calls"] == 4 * TINY.n_layer + 1
    assert (scored["dense_calls"], scored["pruned_calls"]) == (0, TINY.n_layer - 1)  # the last layer prunes nothing
    assert {row["name"]: row for row in seldom["kernels"]}["simba_lab::scored_scan"]["pruned_calls"] == 1
    shown = Console(width=120, record=True)
    shown.print(profile_tables(result))
    text = shown.export_text()
    assert "simba_lab::linear" in text and "all others" in text and f"of {first['promise']:.2f}x" in text


def test_nothing_is_profiled_after_a_red_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def red(*_: Any) -> None:
        raise RedCheck("the logits are wrong")

    monkeypatch.setattr(training_profile, "check_models", red)
    with pytest.raises(InputError, match="bench train: the logits are wrong"):
        training_profile.profile_training([training.CASES["256"]], session("auto"))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, at::native::Foo>(int)", "vectorized_elementwise_kernel"),
        ("scan_backward", "scan_backward"), ("(anonymous namespace)::elementwise<int>", "elementwise"),
    ],
)  # fmt: skip
def test_kernels_are_called_by_short_names(name: str, short: str) -> None:
    assert training_profile.short_name(name) == short


def test_decoding_goes_on_from_the_pruned_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "GENERATED", 3)
    result = session("auto").bench("decode", [decode.DecodingCase("tiny", TINY, 2, 12)], decode.measure_decoding)
    (line,) = result["lines"]
    assert result["exit_code"] == 0 and line["what"] == "decoding, tiny, batch 2" and line["ours"] > 0
    model = models.ours(TINY, CPU, torch.float32, 0, "auto").sparsified("norm", "linear", final_keep=0.3)
    tokens = models.random_tokens(TINY, (2, 12), CPU, 0)
    with torch.no_grad():
        before = model.prefill(tokens)
        greedy = decode._eager(model, before, 3)
        first = before.logits[:, -1:, :40].argmax(-1)
        after = model(torch.cat([tokens, first, greedy], 1), n_context=12).logits[..., :40]
    assert torch.equal(after[:, 1:4].argmax(-1), greedy)


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from simba_lab.kernels import cpu

    scan = cpu.scored_scan

    def upside_down(*arguments: Any) -> tuple[torch.Tensor, ...]:
        *outputs, scores = scan(*arguments)
        return *outputs, -scores

    monkeypatch.setattr(cpu, "scored_scan", upside_down)
    case = prefill_cuda.PrefillCase("tiny", TINY, 2, 33)
    result = session("numba").bench("prefill", [case], lambda *_: pytest.fail("timed after a red check"))
    (line,) = result["lines"]
    assert result["exit_code"] == 1 and "RedCheck: model, pruned" in line["note"] and line["ours"] is None


# --- command and table


@needs_no_gpu
@pytest.mark.parametrize("target", [["kernels"], ["train"], ["decode"], ["prefill", "--device", "cuda"]])
def test_without_a_gpu_one_line_says_so(target: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *target]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"bench {target[0]}: needs a CUDA device" in error


@pytest.mark.parametrize("target", ["kernels", "train", "decode", "prefill"])
def test_an_unknown_case_lists_the_known(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", target, "--case", "nosuch", *(["--device", "cuda"] if target == "prefill" else [])]
    assert main(arguments) == 2
    assert "--case: 'nosuch' is unknown; use one of" in capsys.readouterr().err


@needs_no_gpu
def test_published_shapes_are_not_for_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "prefill", "--case", "130m:1x2048"]) == 2
    assert "--case: published shapes need a CUDA device" in capsys.readouterr().err


def result_of(*lines: Line) -> dict[str, Any]:
    machine = {"gpu": "NVIDIA X", "driver": "1.2", "torch": "2.11.0", "cores": 4}
    return {"bench": "kernels", "date": "2026-01-02", "machine": machine, "lines": [line.to_dict() for line in lines]}


def test_the_table_shows_figure_and_target_of_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fast = beside(
        "scan", Timing(0.25, 0.2, 0.3, 9), "mamba-ssm", Timing(0.5, 0.5, 0.5, 9), Target(2.5), floor(Work(50_000), UNIT)
    )
    share = Line("scoring", ours=1.5, figure=0.013, figure_kind="share", target=Target(0.02, at_most=True))
    red = Line("conv", note="RedCheck: off | by much", failed=True)
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(result_of(fast, share, red)))
    assert main(["bench", "table", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Measured on 2026-01-02: NVIDIA X, driver 1.2, torch 2.11.0.\n\n| measured | ours |")
    assert "| scan | 0.250 ms | 0.500 ms | 2.00x | at least 2.50x: missed | 20% (bytes) |  |" in printed
    assert "| scoring | 1.500 ms |  | 1.3% | at most 2.0%: met |  |  |" in printed
    assert "| conv |  |  |  |  |  | RedCheck: off \\| by much |" in printed
    assert main(["bench", "table", str(path), "--aimed"]) == 0
    aimed = capsys.readouterr().out
    assert "| scan |" in aimed and "| scoring |" in aimed and "| conv |" not in aimed


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    page, path = tmp_path / "page.md", tmp_path / "kernels.json"
    path.write_text(json.dumps(result_of(Line("scan", ours=12.34))))
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):  # doing it again changes nothing
        assert main(["bench", "table", str(path), "--into", str(page)]) == 0
        text = page.read_text()
        assert text == f"before\n{table.BEGIN}\n{table.markdown(table.read([path]))}{table.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(InputError, match="page.md: must hold the markers"):
        table.insert("text", page)


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []}'])
def test_a_file_that_is_no_result_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(InputError, match="other.json"):
        table.read([path])


def test_the_readme_shows_what_the_committed_results_say() -> None:
    results = sorted((ROOT / "experiments" / "bench").glob("*.json"))
    _, begin, rest = (ROOT / "README.md").read_text(encoding="utf-8").partition(table.BEGIN)
    shown, end, _ = rest.partition(table.END)
    assert begin and end
    assert shown.strip() == table.markdown(table.read(results), aimed=True).strip()
    page = (ROOT / "experiments" / "bench" / "README.md").read_text(encoding="utf-8")
    assert table.markdown(table.read(results)) in page and len(page) > len(shown)
