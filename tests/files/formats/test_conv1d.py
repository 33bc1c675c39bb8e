"""GPT-2's Conv1D, a Linear that keeps its weight as (in, out): adapted as one, in files too. The oracle is PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import peftkit as pk
from peftkit.errors import ExportError, MismatchError, OptionError
from tests.support.cells import TARGETS, require_same_forward
from tests.support.foreign import randomized
from tests.support.zoo import ADAPTERS, train

LORA: dict[str, Any] = {"r": 3, "lora_alpha": 2, "target_modules": ["0", "2"], "fan_in_fan_out": True}
#: What PEFT trains on such layers
PEFT: dict[str, Any] = {
    "LoRA": peft.LoraConfig(**LORA),
    "LoRA, rank-stabilised": peft.LoraConfig(**LORA, use_rslora=True, rank_pattern={"2": 5}),
    "DoRA": peft.LoraConfig(**LORA, use_dora=True),
    "AdaLoRA": peft.AdaLoraConfig(init_r=3, target_modules=["0", "2"], total_step=10, fan_in_fan_out=True),
    "VeRA": peft.VeraConfig(r=3, target_modules=["0", "2"], fan_in_fan_out=True),
    "RandLoRA": peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["0", "2"], fan_in_fan_out=True),
    "FourierFT": peft.FourierFTConfig(n_frequency=9, target_modules=["0", "2"], fan_in_fan_out=True),
    "(IA)³ per input": peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["0", "2"], fan_in_fan_out=True),
}


def base_model() -> tuple[Any, Tensor]:
    """Two such layers, the second of them square, and a Linear."""
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(12, 8), nn.GELU(), Conv1D(12, 12), nn.Linear(12, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(5, 8)


@pytest.mark.parametrize("label", PEFT)
@torch.no_grad()
def test_a_folder_of_peft_means_on_the_model_and_on_its_checkpoint_what_it_does_there(
    label: str, tmp_path: Path
) -> None:
    base, x = base_model()
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), PEFT[label])
    randomized((name, p) for name, p in theirs.named_parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    ours = copy.deepcopy(base)
    assert pk.load(ours, tmp_path / "theirs").loaded == ("0", "2")
    require_same_forward(ours(x), theirs.eval()(x), base(x))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {tmp_path / "theirs": 1.0}, tmp_path / "merged.safetensors")
    merged = copy.deepcopy(base)
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(merged(x), ours(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "dora", "loha", "full", "lokr", "ia3", "oft"])
@pytest.mark.parametrize("targets", [("0", "2"), ("0", "3")], ids=["alone", "beside a Linear"])
@torch.no_grad()
def test_peft_reads_an_export_as_it_is(adapter: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """LoRA and DoRA as they are, other kinds as a LoRA of the same ΔW: PEFT has no others on a Conv1D."""
    base, x = base_model()
    ours, case = copy.deepcopy(base), ADAPTERS[adapter]
    pk.wrap(ours, case.kind, targets=targets, **case.options)
    train(ours)
    report = pk.export(ours, tmp_path / "out", "peft", bake=adapter in ("ia3", "oft"))
    assert {w.structure for w in report.weights} == {"dora" if adapter == "dora" else "lora"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that it goes by each layer's own class
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    require_same_forward(ours(x), theirs(x), base(x))
    file = pk.save(ours, tmp_path / "ours.safetensors")
    pk.export(file, tmp_path / "again", "peft", base=base, bake=adapter != "dora")
    keys = [load_file(tmp_path / name / "adapter_model.safetensors").keys() for name in ("out", "again")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "peft"])
def test_a_program_without_such_layers_is_refused(target: str, tmp_path: Path) -> None:
    model, _ = base_model()
    pk.wrap(model, "lora", targets="0", rank=2)
    train(model)
    with pytest.raises(ExportError, match=r"0: its layer keeps the weight as \(in, out\)"):
        pk.export(model, tmp_path / "out.safetensors", target)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3 in", "oft", "loldu"])
@torch.no_grad()
def test_a_native_file_merges_into_the_checkpoint_as_in_memory(adapter: str, tmp_path: Path) -> None:
    base, _ = base_model()
    ours, case = copy.deepcopy(base), ADAPTERS[adapter]
    pk.wrap(ours, case.kind, targets=["0", "2"], **case.options)
    train(ours)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    file = pk.save(ours, tmp_path / "ours.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {file: 0.7}, tmp_path / "merged.safetensors")
    pk.set_strength(ours, 0.7)
    pk.merge(ours)
    for key, tensor in load_file(tmp_path / "merged.safetensors").items():
        torch.testing.assert_close(tensor, ours.get_parameter(key), rtol=1e-5, atol=1e-6)


def test_two_files_that_read_one_weight_in_two_ways_are_refused(tmp_path: Path) -> None:
    base, _ = base_model()
    pk.wrap(ours := copy.deepcopy(base), "lora", targets="2", rank=2)
    train(ours)
    file = pk.save(ours, tmp_path / "ours.safetensors")
    linear = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(12, 12))
    pk.wrap(linear, "lora", targets="2", rank=2)
    train(linear)
    other = pk.save(linear, tmp_path / "linear.safetensors")
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(MismatchError, match=r"reads 2.weight as \(in, out\)"):
        pk.plan_merge(tmp_path / "base.safetensors", {file: 1.0, other: 1.0}, other_base=True)


def test_what_is_extracted_from_a_checkpoint_is_of_its_weight_as_it_lies_there(tmp_path: Path) -> None:
    base, _ = base_model()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[2].weight += torch.randn(12, 12)
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("tuned", "base", "difference")]
    pk.extract(*paths, "full")
    with pytest.raises(MismatchError, match="as it lies in a checkpoint"):
        pk.load(base, paths[2])
    pk.merge_checkpoint(paths[1], {paths[2]: 1.0}, tmp_path / "merged.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "merged.safetensors")["2.weight"], tuned[2].weight.data)


def test_a_file_of_kohya_does_not_take_such_a_layer(tmp_path: Path) -> None:
    base, _ = base_model()
    pk.wrap(base, "lora", targets="0", rank=2)
    train(base)
    file = pk.save(base, tmp_path / "ours.safetensors")
    pk.wrap(linear := nn.ModuleDict({"3": nn.Linear(12, 4)}), "lora", targets="3", rank=2)
    train(linear)
    pk.export(linear, tmp_path / "kohya.safetensors", "lycoris")
    with pytest.raises(OptionError, match=r"keep their weight as \(in, out\)"):
        pk.combine({tmp_path / "kohya.safetensors": 1.0, file: 1.0}, tmp_path / "sum.safetensors")


def test_gpt2_is_adapted_merged_and_restored() -> None:
    config = transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        before = model(ids).logits
    report = pk.wrap(model, "lora", rank=4)
    assert [name.removeprefix("transformer.h.") for name in report.modules] == [
        f"{i}.{layer}" for i in (0, 1) for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert pk.plan(model, "lora", targets="Conv1D", rank=1, name="other").modules == report.modules
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    train(model)
    assert pk.check(model, {"input_ids": ids}).ok
    with torch.no_grad():
        adapted = model(ids).logits
        pk.merge(model)
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
        pk.restore(model)
        assert torch.equal(model(ids).logits, adapted)
