"""Models on disk: what is saved comes back bit for bit, and every bad file is refused in one line that names it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file

import simba_lab
from simba_lab.checkpoint import SPEC_FILE, SPEC_KEY, WEIGHTS_FILE, model_spec, save_model, tokenizer_path
from simba_lab.errors import InputError
from simba_lab.files import write_json, writing
from simba_lab.model import LanguageModel, ModelConfig
from simba_lab.training import LanguageModeling, PrunedTraining

SHAPE = ModelConfig(d_model=12, n_layer=3, vocab_size=21, d_state=3, dt_rank=2)
UNTIED = ModelConfig(d_model=12, n_layer=3, vocab_size=21, d_state=3, tie_embeddings=False)
PLAN = {"criterion": {"class_path": "global_impact", "init_args": {"reduce": "l2"}}, "schedule": "geometric"}
TOKENS = torch.arange(34).view(2, 17) * 7 % 21


def model(config: ModelConfig = SHAPE, pruned: bool = True) -> LanguageModel:
    dense = LanguageModel(config, seed=3)
    return dense.sparsified(**PLAN, final_keep=0.3, protect_recent=0.25) if pruned else dense


def assert_same(loaded: LanguageModel, original: LanguageModel) -> None:
    """Weights, spec, logits and kept positions, bit for bit; and gradients can flow again."""
    assert model_spec(loaded) == model_spec(original)
    weights = loaded.state_dict()
    assert weights.keys() == original.state_dict().keys()
    for name, weight in original.state_dict().items():
        assert weights[name].dtype == weight.dtype and torch.equal(weights[name], weight), name
    out, expected = loaded(TOKENS, n_context=12), original(TOKENS, n_context=12)
    assert torch.equal(out.logits, expected.logits)
    assert all(torch.equal(*pair) for pair in zip(out.kept, expected.kept, strict=True))
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("config", [SHAPE, UNTIED], ids=["tied", "untied"])
def test_a_run_folder_gives_the_model_back_bit_for_bit(tmp_path: Path, config: ModelConfig, pruned: bool) -> None:
    original = model(config, pruned)
    save_model(tmp_path / "run", original)
    loaded = simba_lab.load(tmp_path / "run", backend="reference")
    original.backend_name = "reference"
    assert_same(loaded, original)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [SPEC_FILE, WEIGHTS_FILE]


def test_a_tied_head_is_stored_once_and_shared_again(tmp_path: Path) -> None:
    save_model(tmp_path / "tied", model())
    save_model(tmp_path / "untied", model(UNTIED))
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / WEIGHTS_FILE)
    assert "lm_head.weight" in load_file(tmp_path / "untied" / WEIGHTS_FILE)
    tied, untied = (simba_lab.load(tmp_path / name) for name in ("tied", "untied"))
    assert tied.lm_head.weight is tied.backbone.embedding.weight
    assert untied.lm_head.weight is not untied.backbone.embedding.weight


@pytest.fixture
def lightning_checkpoint(tmp_path: Path) -> tuple[Path, LanguageModel]:
    """A .ckpt as Lightning writes it, of a model that is trained with pruning on."""
    pruning = PrunedTraining(n_context=12, mean_keep=0.5, protect_recent=0.25, **PLAN)
    module = LanguageModeling(SHAPE, pruning, seed=5, backend="reference")
    module.ledger.add("forward", 0, "in_proj", 7)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "some.ckpt", weights_only=True)
    return tmp_path / "some.ckpt", module.lm


def test_a_lightning_checkpoint_gives_the_model_back_bit_for_bit(
    lightning_checkpoint: tuple[Path, LanguageModel],
) -> None:
    path, original = lightning_checkpoint
    assert_same(simba_lab.load(path, backend="reference"), original.eval())


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        simba_lab.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_safetensors_are_refused(tmp_path: Path, size: int) -> None:
    save_model(tmp_path, model())
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[:size])
    assert "truncated or not safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 3000, -30])
def test_a_truncated_lightning_checkpoint_is_refused(
    lightning_checkpoint: tuple[Path, LanguageModel], size: int
) -> None:
    path, _ = lightning_checkpoint
    path.write_bytes(path.read_bytes()[:size])
    assert "truncated or not a checkpoint" in refusal(path)


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("form", ["torch", "legacy", "pickle"])
def test_a_pickle_that_would_execute_code_is_not_executed(tmp_path: Path, form: str) -> None:
    path, sprung = tmp_path / "bad.ckpt", tmp_path / "sprung"
    trap = {"state_dict": {}, SPEC_KEY: Trap(sprung)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(trap))
    else:
        torch.save(trap, path, _use_new_zipfile_serialization=form == "torch")
    assert "could execute code" in refusal(path)
    assert not sprung.exists()
    pickle.loads(path.read_bytes()) if form == "pickle" else torch.load(path, weights_only=False)
    assert sprung.exists(), "the trap itself must work, or the test shows nothing"


def test_a_pickle_under_the_name_of_the_weights_is_not_executed(tmp_path: Path) -> None:
    save_model(tmp_path, model())
    (tmp_path / WEIGHTS_FILE).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "not safetensors" in refusal(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"layer.weight": torch.ones(2)}, "epoch": 3},
        {"layer.weight": torch.ones(2)},
        [torch.ones(2)],
        {SPEC_KEY: {}, "state_dict": {}},
        {SPEC_KEY: "ours", "state_dict": {}},
        {SPEC_KEY: model_spec(LanguageModel(SHAPE)), "state_dict": [1]},
    ],
    ids=["lightning", "weights", "list", "no spec", "text spec", "list of weights"],
)
def test_a_checkpoint_of_someone_else_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "foreign.ckpt")
    assert "not" in refusal(tmp_path / "foreign.ckpt")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"architectures": ["MambaForCausalLM"], "hidden_size": 768}', "not a simba_lab model spec"),
        ("[1, 2]", "not a simba_lab model spec"),
        ('{"format": 99, "model": {}}', "not a simba_lab model spec of format 1"),
        ('{"format": 1, "model": [3]}', "model"),
        ('{"format": 1, "model": {"d_model": 12, "n_layer": 3}}', "model.vocab_size is required"),
        ('{"format": 1, "model": {"d_modle": 12}}', "model.d_modle is not an option"),
        ('{"format": 1, "model": {"d_model": 12, "n_layer": 3, "vocab_size": 21, "dt_min": "slow"}}', "str"),
        ('{"format": 1, "model": {"d_model": "wide", "n_layer": 3, "vocab_size": 21}}', "model.d_model must be"),
        ("{", "not JSON"),
        ("\xff\xfe\x00", "not JSON"),
    ],
)
def test_a_model_json_that_is_not_ours_is_refused(tmp_path: Path, content: str, named: str) -> None:
    save_model(tmp_path, model())
    (tmp_path / SPEC_FILE).write_bytes(content.encode("latin-1"))
    assert named in refusal(tmp_path)


def test_an_unknown_criterion_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    save_model(tmp_path, model())
    spec = json.loads((tmp_path / SPEC_FILE).read_text())
    spec["pruning"]["criterion"]["class_path"] = "my_gone_file.OpenGate"
    write_json(tmp_path / SPEC_FILE, spec)
    with pytest.raises(InputError, match="my_gone_file.OpenGate"):
        simba_lab.load(tmp_path)


KEY = "backbone.layers.1.mixer.A_log"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda weights: weights.pop(KEY), "(24, 3) is missing"),
        (lambda weights: weights.update({KEY: torch.ones(24, 2)}), "has shape (24, 2), the model wants (24, 3)"),
        (lambda weights: weights.update({f"{KEY}_copy": torch.ones(1)}), "_copy (1,) is not part of the model"),
    ],
    ids=["missing", "shape", "extra"],
)
def test_a_weight_that_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], Any], problem: str
) -> None:
    save_model(tmp_path, model())
    weights = load_file(tmp_path / WEIGHTS_FILE)
    change(weights)
    save_file(weights, tmp_path / WEIGHTS_FILE)
    message = refusal(tmp_path)
    assert f"the weight {KEY}" in message and problem in message


@pytest.mark.parametrize("name", [SPEC_FILE, WEIGHTS_FILE])
def test_an_incomplete_folder_is_refused(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, model())
    (tmp_path / name).unlink()
    assert f"holds no {name}" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_the_tokenizer_is_found_beside_a_checkpoint_and_missed_by_name(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match="no tokenizer.json beside"):
        tokenizer_path(checkpoint)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert tokenizer_path(checkpoint) == tokenizer_path(tmp_path / "run") == tmp_path / "run" / "tokenizer.json"


class Crash(BaseException):
    pass


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    with writing(target) as partial:
        partial.write_text("old")
    with pytest.raises(Crash), writing(target) as partial:
        partial.write_text("half of the ne")
        raise Crash
    with pytest.raises(ValueError, match="JSON"):
        write_json(target, {"value": float("nan")})
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["file.txt"]


def test_an_interrupted_save_leaves_the_old_weights_loadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = model()
    save_model(tmp_path, original)

    def cut(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise Crash

    monkeypatch.setattr("simba_lab.checkpoint.run_folder.save_file", cut)
    with pytest.raises(Crash):
        save_model(tmp_path, LanguageModel(SHAPE, seed=9))
    assert_same(simba_lab.load(tmp_path), original)
    assert sorted(path.name for path in tmp_path.iterdir()) == [SPEC_FILE, WEIGHTS_FILE]
