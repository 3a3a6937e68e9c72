"""``simba-lab inspect``: the numbers against recomputation, hostile text, bad input, and the page in a real browser."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from chromium import browsing, needs_browser
from tiny import mistake, simba_lab

from simba_lab.checkpoint import load, save_model
from simba_lab.cli.inspect import _Lines as Lines
from simba_lab.data import Tokenizer, bytes_tokenizer, train_bpe
from simba_lab.errors import InputError
from simba_lab.inspection.groups import by_part, views
from simba_lab.inspection.passage import from_text_file
from simba_lab.inspection.pieces import kind_of, pieces
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.pruning import Criterion, Signals
from simba_lab.report.inspection import write_inspection

HOSTILE = (
    "<script>document.title = 'run'</script></script><!-- <script> <img src=x onerror=\"document.title='run'\">\n"
    "שלום עולם, مرحبا &amp; \u202eback\u202c 日本語 \U0001f642\U0001f469\u200d\U0001f467 naïve 12 $data ${title} "
    "\x07\x1b[31m\x7f\t.\r\n"
)
TEXT = HOSTILE + "def run(args):\n    return [args.one, 12, 345, args.two]\n" * 14
ARMS = ["linear:global_impact@0.55", "uniform:random@0.5", "dense"]
LAYERS, CONTEXT, SUFFIX = 4, 200, 12


class Wave(Criterion):
    """A user's own, some of whose scores are no finite numbers."""

    def score(self, signals: Signals) -> torch.Tensor:
        wave = torch.sin(signals.positions.float())
        return torch.where(signals.positions % 7 == 0, float("nan"), wave)


OWN = f"{__name__}.Wave"


def make_run(folder: Path, **shape: Any) -> Path:
    """A checkpoint with a byte-level BPE that splits what it has not seen into bytes."""
    tokenizer = train_bpe(["def run(args): return args.one " * 9], 300)
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    sizes = {"d_model": 16, "n_layer": LAYERS, "d_state": 4, "vocab_size": tokenizer.vocab_size}
    save_model(folder, LanguageModel(ModelConfig(**sizes, **shape), seed=2))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("models") / "run")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text <b>.txt"
    path.write_bytes(TEXT.encode())
    return path


def inspected(run: Path, text: Path, *flags: str, arms: list[str] = ARMS) -> tuple[dict[str, Any], str]:
    """What the command found, and its page."""
    page, found = text.with_name("page.html"), text.with_name("found.json")
    lengths = ("--n-context", str(CONTEXT), "--n-suffix", str(SUFFIX), "--device", "cpu")
    files = ("--text-file", text, "--out", page, "--json", found)
    assert simba_lab("inspect", "--checkpoint", run, *files, *lengths, "--arms", *arms, *flags) == 0
    return json.loads(found.read_text(encoding="utf-8")), page.read_text(encoding="utf-8")


@torch.no_grad()
def test_the_numbers_are_those_of_the_model(run: Path, text: Path) -> None:
    result, _ = inspected(run, text)
    tokens = torch.tensor([Tokenizer.load(run / "tokenizer.json").encode(TEXT)[: CONTEXT + SUFFIX]])
    assert result["tokens"]["id"] == tokens[0].tolist()
    model = load(str(run))
    for found, arm in zip(
        result["arms"],
        [model.sparsified(mean_keep=0.55), model.sparsified("random", "uniform", mean_keep=0.5), model],
        strict=True,
    ):
        out = arm(tokens, n_context=CONTEXT)
        kept = [set(positions[0].tolist()) for positions in out.kept]
        assert found["keep_counts"] == [len(positions) for positions in kept]
        for position, dropped in enumerate(found["dropped_before"]):
            entered = [position in positions for positions in kept]
            assert entered == [dropped is None or layer < dropped for layer in range(LAYERS)]
        nll = F.cross_entropy(out.logits[0, :-1], tokens[0, CONTEXT:], reduction="none")
        assert found["suffix_nll"] == pytest.approx(nll.tolist(), rel=1e-5)
        for layer, scores in found["scores"].items():
            check_scores(scores, sorted(kept[int(layer)]), sorted(kept[int(layer) + 1]))
    assert [len(arm["scores"]) for arm in result["arms"]] == [LAYERS - 1, 1, 0]
    assert result["dense_suffix_nll"] == result["arms"][2]["suffix_nll"]
    assert result["arms"][2]["dropped_before"] == [None] * CONTEXT
    assert result["highways"] is None


def check_scores(scores: list[float], present: list[int], survivors: list[int]) -> None:
    """One score per token present; those that go on are the boundary and the best of the others."""
    assert len(scores) == len(present)
    of = dict(zip(present, scores, strict=True))
    others = sorted(present[:-1], key=lambda position: (-of[position], -position))
    assert survivors == sorted([present[-1], *others[: len(survivors) - 1]])


def test_groups_count_what_is_kept(run: Path, text: Path) -> None:
    result, _ = inspected(run, text)
    assert [view["key"] for view in result["views"]] == ["part", "frequency", "kind"]
    kinds, ids = result["tokens"]["kind"][:CONTEXT], result["tokens"]["id"][:CONTEXT]
    occurrences = Counter(ids)
    for arm in result["arms"]:
        for layer in range(LAYERS):
            enters = [dropped is None or dropped > layer for dropped in arm["dropped_before"]]
            for view, kept in ((view, arm["kept"][view["key"]]) for view in result["views"]):
                for group, label in enumerate(view["labels"]):
                    span = [int(end) for end in label.split("\N{EN DASH}")] if view["key"] != "kind" else []
                    value = {"part": range(CONTEXT), "frequency": [occurrences[i] for i in ids], "kind": kinds}[
                        view["key"]
                    ]
                    mine = [
                        enter
                        for enter, v in zip(enters, value, strict=True)
                        if (v == label if not span else span[0] <= v <= span[-1])
                    ]
                    assert len(mine) == view["sizes"][group]
                    assert kept[group][layer] == (sum(mine) / len(mine) if mine else None)


def test_parts_cover_the_context_evenly() -> None:
    view = by_part(35)
    assert len(view.labels) == 16 and sum(view.sizes()) == 35 and set(view.sizes()) == {2, 3}
    assert view.labels[0] == "0\N{EN DASH}2" and view.labels[-1] == "33\N{EN DASH}34"
    assert by_part(3).labels == ["0", "1", "2"]


def test_frequencies_in_training_have_a_group_for_never() -> None:
    found = {view.key: view for view in views([5, 6, 6], ["word", "word", "number"], [0, 120, 120, 7])}
    assert found["training_frequency"].labels == ["never", "1\N{EN DASH}9", "10\N{EN DASH}99", "100\N{EN DASH}999"]
    assert found["training_frequency"].sizes() == [1, 0, 0, 2]
    assert found["training_frequency"].kept([1, None, None], 2)[1] == [None, None]
    assert (found["frequency"].labels, found["frequency"].sizes()) == (["1", "2\N{EN DASH}3"], [1, 2])


@pytest.mark.parametrize("tokenizer", [bytes_tokenizer(), train_bpe([TEXT], 300)], ids=["bytes", "bpe"])
def test_pieces_read_as_the_text_and_split_no_character(tokenizer: Tokenizer) -> None:
    spelled = tokenizer.spellings(tokenizer.encode(TEXT))
    assert b"".join(spelled) == TEXT.encode()
    runs = pieces(spelled)
    assert "".join(text for _, text in runs) == TEXT
    assert sum(count for count, _ in runs) == len(spelled)
    ends = [sum(count for count, _ in runs[: index + 1]) for index in range(len(runs))]
    for end in ends:
        b"".join(spelled[:end]).decode()
    assert len(runs) == sum(is_text(b"".join(spelled[: end + 1])) for end in range(len(spelled)))


def is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_halves_of_characters_at_the_edges_are_marked() -> None:
    smile = "\U0001f642".encode()
    assert pieces([smile[2:], b"a", smile[:3]]) == [(1, "\ufffd\ufffd"), (1, "a"), (1, "\ufffd")]
    assert pieces([smile[:1], smile[1:3], smile[3:] + b"!"]) == [(3, "\U0001f642!")]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        *((text, "word") for text in (" run", "_a1", "\u00e9t\u00e9")),
        *((text, "whitespace") for text in (" \n\t", "")),
        *((text, "punctuation") for text in ("():\n", "\U0001f642")),
        (" 12", "number"),
        ("a.b", "mixed"),
    ],
)
def test_kinds(text: str, kind: str) -> None:
    assert kind_of(text) == kind


@pytest.mark.parametrize("shape", [{}, {"layer": "mamba2", "headdim": 8}], ids=["mamba1", "mamba2"])
def test_a_users_criterion_and_both_generations_with_flow(tmp_path: Path, text: Path, shape: dict[str, Any]) -> None:
    made = make_run(tmp_path / "run", **shape)
    arms = [f"linear:{OWN}@0.55", "linear:norm@0.55"]
    result, page = inspected(made, text, "--flow", "--flow-windows", "2", arms=arms)
    scores = result["arms"][0]["scores"]["0"]
    assert scores[7] is None and scores[8] == pytest.approx(0.98936, abs=1e-4)
    assert [row["criterion"] for row in result["highways"]["loss_rise"]] == [OWN, "norm"]
    assert result["highways"]["windows"] == 2
    assert page.count("<figure") == 5 and page.count("<figcaption>") == 5


def test_the_same_command_gives_the_same_page(run: Path, text: Path) -> None:
    assert inspected(run, text)[1] == inspected(run, text)[1]


def test_the_page_is_inert_and_needs_no_network(run: Path, text: Path) -> None:
    _, page = inspected(run, text)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert page.count("</script>") == 2 and page.count("<script") == 2
    assert "default-src 'none'" in page and "text &lt;b&gt;.txt" in page
    assert "<img" not in page and "<!--" not in page and "\x1b" not in page and "\u202e" not in page


def test_a_long_page_leaves_out_scores_and_says_so(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, page = inspected(run, text)
    assert "--json FILE holds all" not in page
    target = tmp_path / "small.html"
    monkeypatch.setattr("simba_lab.report.inspection.LIMIT", len(page.encode()) - 1)
    assert write_inspection(result, target) < len(page.encode())
    data = json.loads(re.search(r'id="data">(.*?)</script>', target.read_text(encoding="utf-8")).group(1))
    assert "the scores of every 2nd scored layer" in target.read_text(encoding="utf-8")
    assert [list(arm["scores"]) for arm in data["arms"]] == [["0", "2"], ["0"], []]
    monkeypatch.setattr("simba_lab.report.inspection.LIMIT", 1000)
    target.unlink()
    with pytest.raises(InputError, match="--n-context: 212 tokens of 3 arms take more than"):
        write_inspection(result, target)
    assert not target.exists()


def test_a_passage_of_the_held_out_data(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    lab = tiny.lab(tmp_path_factory.getbasetemp())
    page, found = tmp_path / "page.html", tmp_path / "found.json"
    lengths = ("--n-context", tiny.N_CONTEXT, "--n-suffix", tiny.N_SUFFIX, "--windows", "9")
    files = ("--out", page, "--json", found)
    command = ("inspect", "--checkpoint", lab.run, *lengths, *files, "--device", "cpu", "--arms", "linear:norm@0.55")
    assert simba_lab(*command, "--passage", "3") == 0
    result = json.loads(found.read_text(encoding="utf-8"))
    data = tiny_data(lab)
    assert result["tokens"]["id"] == data.eval_windows("test", tiny.N_CONTEXT, tiny.N_SUFFIX, 9).tokens[3].tolist()
    train = Counter(data.shard("train").tokens.tolist())
    assert result["tokens"]["training_count"] == [train[token] for token in result["tokens"]["id"]]
    assert "training_frequency" in [view["key"] for view in result["views"]]


def tiny_data(lab: tiny.Lab) -> Any:
    from simba_lab.cli.eval import held_out_data

    return held_out_data(str(lab.run), None)


def test_short_and_long_texts(tmp_path: Path) -> None:
    tokenizer, path = bytes_tokenizer(), tmp_path / "text.txt"
    path.write_text("x" * 100_000)
    long = from_text_file(path, tokenizer, 50, 14, windows=3)
    assert long.windows.shape == (3, 64) and "first 64 tokens of" in long.notes[0]
    path.write_text("x" * 40)
    short = from_text_file(path, tokenizer, None, None, windows=3)
    assert (short.windows.shape, short.n_context, short.n_suffix, short.notes) == ((1, 40), 30, 10, [])
    assert from_text_file(path, tokenizer, 36, None).n_suffix == 4


MISTAKES: list[tuple[bytes | None, list[str], str]] = [
    (None, [], "--text-file: .* No such file or directory; name a text file"),
    (b"", [], "is empty; there is nothing to inspect"),
    (b"ab\0cd" * 99, [], "holds zero bytes, so it is no text"),
    (b"caf\xe9 au lait " * 9, [], "is not UTF-8 text: .* at byte 3; convert it"),
    (b"short", [], "has 5 tokens, too short a text: give 8 or more"),
    (b"q" * 60, ["--n-context", "60"], "has 60 tokens, too few for --n-context 60 and --n-suffix 1: lower them"),
    (b"q" * 60, ["--arms", "linear:nonsense@0.55"], "--arms: linear:nonsense@0.55: criterion: 'nonsense' is unknown"),
    (b"q" * 60, ["--arms", "linear"], "--arms: linear: 'linear' should be dense or schedule:criterion@mean_keep"),
    (b"q" * 60, ["--flow-keep", "0"], r"--flow-keep must lie in \(0, 1\], got 0.0"),
    (b"q" * 60, ["--n-suffix", "0"], "--n-suffix must be at least 1, got 0"),
]


@pytest.mark.parametrize(("content", "flags", "message"), MISTAKES)
def test_bad_input_takes_one_line_and_writes_nothing(
    run: Path, tmp_path: Path, capsys: Any, content: bytes | None, flags: list[str], message: str
) -> None:
    path, page = tmp_path / "text.txt", tmp_path / "page.html"
    if content is not None:
        path.write_bytes(content)
    error = mistake(capsys, "inspect", "--checkpoint", run, "--text-file", path, "--out", page, *flags)
    assert re.search(message, error), error
    assert not page.exists()


def test_other_bad_input(run: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    save_model(bare, load(str(run)))
    assert "tokenizer.json" in mistake(capsys, "inspect", "--checkpoint", bare, "--text-file", text)
    assert "--passage" in mistake(capsys, "inspect", "--checkpoint", run)
    assert "its data is not known" in mistake(capsys, "inspect", "--checkpoint", run, "--passage", "0")
    assert "is a folder" in mistake(capsys, "inspect", "--checkpoint", run, "--text-file", text, "--out", tmp_path)


def test_without_a_terminal_slow_pieces_are_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 12.0, 15.0, 30.0])
    monkeypatch.setattr("simba_lab.cli.inspect.time", SimpleNamespace(monotonic=lambda: next(now)))
    lines = Lines(4)
    for piece in ("first", "second", "third"):
        lines.say(piece)
    assert capsys.readouterr().err.splitlines() == ["first  (0 of 4)", "third  (2 of 4, 0:30 left)"]


@needs_browser
def test_the_page_in_a_browser(run: Path, text: Path, tmp_path: Path) -> None:
    result, _ = inspected(run, text, "--flow", "--flow-windows", "1")
    with browsing(text.with_name("page.html"), tmp_path / "profile") as page:
        assert page.run("document.title").startswith("text <b>.txt") and page.run("document.images.length") == 0
        shown = page.run("data.arms[0].spans.map(span => span.textContent).join('')")
        window = Tokenizer.load(run / "tokenizer.json").decode(result["tokens"]["id"])
        assert shown == window.translate(SHOWN)
        for layer in (LAYERS - 1, 1, 0):
            page.run(
                f"(s => {{ s.value = {layer}; s.dispatchEvent(new Event('input')) }})(document.getElementById('layer'))"
            )
            grey = page.run("document.querySelectorAll('.arm:first-child .t.gone').length")
            ends = deepest_layers(result)
            assert grey == sum(end <= layer for end in ends)
            assert f"{result['arms'][0]['keep_counts'][layer]} of {CONTEXT} tokens" in page.run(
                "data.arms[0].counter.textContent"
            )
        check_keyboard(page, result)
        page.run("(s => { s.value = 1; s.dispatchEvent(new Event('input')) })(document.getElementById('depth'))")
        share = result["arms"][1]["kept"]["kind"][0][1]
        assert (
            page.run(
                "document.querySelector('.group:last-child .bar ~ *, .group:last-child td:nth-child(4)').textContent"
            )
            == f"{100 * share:.0f} %"
        )
        assert page.troubles == []
        assert page.requests == [text.with_name("page.html").resolve().as_uri()]


SHOWN = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {
    0x7F: "\u2421", ord("\n"): "\u21b5\n", ord("\u202e"): "\ufffd", ord("\u202c"): "\ufffd",
}  # fmt: skip


def deepest_layers(result: dict[str, Any]) -> list[int]:
    """For every shown run of the context how many layers its longest-living token enters."""
    lives = [LAYERS if dropped is None else dropped for dropped in result["arms"][0]["dropped_before"]]
    ends, first = [], 0
    for count in result["tokens"]["run"]:
        if first < CONTEXT:
            ends.append(max(lives[first : first + count]))
        first += count
    return ends


def check_keyboard(page: Any, result: dict[str, Any]) -> None:
    page.run("data.arms[0].body.focus()")
    for key in ("Home", "ArrowRight", "ArrowRight"):
        page.press(key)
    told = page.run("document.getElementById('tip').innerText")
    assert "position 2 of 200" in told and ARMS[1] in told
    assert page.run("document.querySelectorAll('.t.here').length") == 1
    assert page.run("document.querySelectorAll('.t.same').length") == len(ARMS) - 1
    score = result["arms"][0]["scores"]["0"]
    assert f"{1 + sum(other > score[2] for other in score)}. of {CONTEXT}" in told
    page.press("Escape")
    assert page.run("document.getElementById('tip').hidden")


@needs_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_in_both_colours(run: Path, text: Path, tmp_path: Path, dark: bool) -> None:
    inspected(run, text)
    with browsing(text.with_name("page.html"), tmp_path / "profile", width=400, dark=dark) as page:
        assert page.run("document.documentElement.scrollWidth") <= 400
        brightness = page.run("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]")
        assert (brightness < 80) == dark
        assert page.troubles == []
