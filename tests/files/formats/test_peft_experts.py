"""PEFT's `target_parameters`, in and out, with PEFT itself as the oracle."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError, FileError, MismatchError
from tests.support.experts import FAMILIES, language_model, tokens
from tests.support.laws import agree
from tests.support.zoo import train

# the newest transformers warns of an attribute that PEFT reads
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    # PEFT says so of patterns for parameters, and follows them
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
each_family = pytest.mark.parametrize("family", FAMILIES)


def trained_by_peft(family: str, folder: Path, parameters: list[str], **options: Any) -> tuple[nn.Module, torch.Tensor]:
    """The base, and the logits of the model that PEFT has trained and written to the folder."""
    base = language_model(family)
    config = LoraConfig(target_parameters=parameters, init_lora_weights=False, **{"target_modules": [], **options})
    model = get_peft_model(copy.deepcopy(base), config)
    model.save_pretrained(folder)
    with torch.no_grad():
        return base, model(tokens()).logits


@each_family
@pytest.mark.parametrize("parameters", [BOTH, BOTH[1:], BOTH[:1]], ids=["both", "down", "up"])
def test_a_folder_of_peft_loads(family: str, parameters: list[str], tmp_path: Path) -> None:
    base, expected = trained_by_peft(family, tmp_path, parameters, r=3, lora_alpha=5)
    before = base(tokens()).logits
    report = pk.load(base, tmp_path)
    assert len(report.loaded) == 2 * len(parameters)
    assert {name.partition("layers.0.")[2].partition(".")[2] for name in report.loaded if "layers.0" in name} == {
        *parameters
    }
    assert not torch.allclose(before, expected, atol=1e-3)
    agree(base(tokens()).logits, expected, torch.float32, family)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 3, "use_rslora": True},
        {"r": 2, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"experts.down_proj": 3}},
        {"r": 2, "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 7}},
    ],
    ids=["rslora", "modules and ranks", "alphas"],
)
def test_its_options_count(options: dict[str, Any], tmp_path: Path) -> None:
    base, expected = trained_by_peft("qwen3_moe", tmp_path, BOTH, **options)
    pk.load(base, tmp_path)
    agree(base(tokens()).logits, expected, torch.float32, str(options))


@each_family
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_peft_loads_an_export(family: str, kind: str, tmp_path: Path) -> None:
    model = language_model(family)
    base = copy.deepcopy(model)
    options = {"rank": 2, "alpha": 3} if kind == "lora" else {"factor": 4}
    rules = [pk.Rule("*.experts.*", kind, **options)]
    rules += [pk.Rule("*.q_proj", "lora", rank=3)] if family == "mixtral" else []
    pk.wrap(model, rules=rules)
    train(model, size=0.1)
    report = pk.export(model, tmp_path / "out", "peft")
    assert all(w.error is not None and w.error < 1e-5 and w.bytes > 0 for w in report.weights)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert [name.rpartition(".")[2] for name in config["target_parameters"]] == ["gate_up_proj", "down_proj"] * 2
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    agree(theirs(tokens()).logits, model(tokens()).logits, torch.float32, "in PEFT")
    pk.load(base, tmp_path / "out")
    agree(base(tokens()).logits, model(tokens()).logits, torch.float32, "read back")


@pytest.mark.parametrize("target", ["down_proj", "gate_up_proj"])
def test_one_parameter_is_exported_alone(target: str, tmp_path: Path) -> None:
    model = language_model("gpt_oss")
    base = copy.deepcopy(model)
    pk.wrap(model, "lora", targets=f"model.layers.1.mlp.experts.{target}", rank=2)
    train(model)
    pk.export(model, tmp_path / "out", "peft")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    agree(theirs(tokens()).logits, model(tokens()).logits, torch.float32, target)


def test_what_reads_its_base_is_baked_and_says_so(tmp_path: Path) -> None:
    model = language_model("llama4")
    base = copy.deepcopy(model)
    pk.wrap(model, "dora", targets="*.experts.*", rank=2)
    train(model)
    report = pk.export(model, tmp_path / "out", "peft")
    assert {(w.how, w.note) for w in report.weights} == {
        ("baked", "PEFT has no dora of this form: holds for this base only")
    }
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    agree(theirs(tokens()).logits, model(tokens()).logits, torch.float32, "baked")


@pytest.mark.parametrize("target", ["kohya", "comfyui", "lycoris", "diffusers", "a1111", "forge"])
def test_no_other_program_has_stacks(target: str, tmp_path: Path) -> None:
    model = language_model("mixtral")
    pk.wrap(model, "lora", targets="*.experts.*", rank=2)
    train(model)
    with pytest.raises(ExportError, match=r"stack of 4 experts .* export it for peft"):
        pk.export(model, tmp_path / "out.safetensors", target)
    assert not list(tmp_path.iterdir())


def test_a_folder_goes_through_files(tmp_path: Path) -> None:
    """PEFT -> export of the file for PEFT -> the same numbers; and the native file of a model goes there too."""
    base, expected = trained_by_peft("qwen3_moe", tmp_path / "theirs", BOTH, r=2)
    pk.export(tmp_path / "theirs", tmp_path / "again", "peft")
    model = copy.deepcopy(base)
    pk.load(model, tmp_path / "again")
    agree(model(tokens()).logits, expected, torch.float32, "exported again")
    native = pk.save(model, tmp_path / "native.safetensors")
    pk.export(native, tmp_path / "from_native", "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "from_native")).eval()
    agree(theirs(tokens()).logits, expected, torch.float32, "from the native file")


def test_how_matrices_lie_is_not_guessed(tmp_path: Path) -> None:
    model = language_model("gpt_oss")
    pk.wrap(model, "lora", targets="*.experts.*", rank=2)
    train(model)
    native = pk.save(model, tmp_path / "native.safetensors")
    with pytest.raises(ExportError, match="onto the model and export that"):
        pk.export(native, tmp_path / "out", "peft")


def test_a_damaged_folder_is_refused(tmp_path: Path) -> None:
    base, _ = trained_by_peft("mixtral", tmp_path, BOTH, r=2)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    said, tensors = json.loads(config.read_text()), load_file(weights)

    def write(changes: dict[str, Any], held: dict[str, torch.Tensor] = tensors) -> None:
        config.write_text(json.dumps(said | changes))
        save_file(held, weights)

    write({"target_parameters": BOTH[:1]})
    with pytest.raises(FileError, match="2 of gate_up_proj are in the file"):
        pk.load(base, tmp_path)
    write({"target_parameters": [*BOTH, "experts.other"]})
    with pytest.raises(FileError, match="Give a file for each parameter"):
        pk.load(base, tmp_path)
    write({"target_parameters": "experts.down_proj"})
    with pytest.raises(FileError, match="a list of names was expected"):
        pk.load(base, tmp_path)
    write({"r": 3})
    with pytest.raises(FileError, match="a multiple of 3 expected"):
        pk.load(base, tmp_path)
    write({"r": 4})
    with pytest.raises(MismatchError):
        pk.load(base, tmp_path)
    write({}, {key: t for key, t in tensors.items() if "layers.0.mlp.experts.base_layer" not in key})
    with pytest.raises(FileError, match="1 of gate_up_proj, down_proj"):
        pk.load(base, tmp_path)
