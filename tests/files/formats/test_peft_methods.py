"""PEFT's folders of AdaLoRA, MiSS, VeRA, RandLoRA and FourierFT are read as PEFT's own model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError

CONFIGS: dict[str, Any] = {
    "adalora": lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=8, target_modules=["0", "2"], total_step=10),
    "miss": lambda: peft.MissConfig(r=5, target_modules=["0", "2"]),
    "miss ragged": lambda: peft.MissConfig(r=7, target_modules=["0", "2"]),
    "miss mini": lambda: peft.MissConfig(r=2, mini_r=2, target_modules=["0", "2"], init_weights="mini"),
    "vera": lambda: peft.VeraConfig(r=6, target_modules=["0", "2"]),
    "randlora": lambda: peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=["0", "2"]),
    "randlora sparse": lambda: peft.RandLoraConfig(r=5, randlora_alpha=5, target_modules=["0", "2"], sparse=True),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=30, scaling=40.0, target_modules=["0", "2"]),
    "fourierft by pattern": lambda: peft.FourierFTConfig(
        n_frequency=2, n_frequency_pattern={"2": 40}, target_modules=["0", "2"], random_loc_seed=3
    ),
    "miss bat": lambda: peft.MissConfig(r=2, target_modules=["0", "2"], init_weights="bat"),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 14), nn.ReLU(), nn.Linear(14, 12))


def saved(case: str, folder: Path) -> tuple[Tensor, Tensor]:
    """An input, and the output of PEFT's model, which is in the folder."""
    model: Any = peft.get_peft_model(net(), CONFIGS[case]())  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    model.save_pretrained(folder)
    x = torch.randn(3, 10)
    return x, model.eval()(x)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_is_the_model_that_peft_saved(case: str, tmp_path: Path) -> None:
    x, expected = saved(case, tmp_path)
    model = net()
    report = pk.load(model, tmp_path)
    assert report.complete
    assert torch.allclose(model.eval()(x), expected, atol=1e-5)
    found = pk.inspect(tmp_path)
    assert not found.problems and len(found.modules) == 2
    pk.merge(model, backup=None)
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_folder_is_saved_and_converted_as_it_is(case: str, tmp_path: Path) -> None:
    """With the parts of the tables that each layer has, in the files of this library too."""
    x, expected = saved(case, tmp_path / "theirs")
    model = net()
    pk.load(model, tmp_path / "theirs")
    pk.save(model, tmp_path / "ours.safetensors")
    again = net()
    pk.load(again, tmp_path / "ours.safetensors")
    assert torch.equal(again.eval()(x), model.eval()(x))
    if case == "miss bat":
        return
    pk.convert(tmp_path / "theirs", tmp_path / "lora.safetensors", "lora", base=net())
    as_lora = net()
    pk.load(as_lora, tmp_path / "lora.safetensors")
    assert torch.allclose(as_lora.eval()(x), expected, atol=1e-4)


def test_pruned_ranks_keep_their_scale(tmp_path: Path) -> None:
    """α is over the rank of the start, whatever is left."""
    x, _ = saved("adalora", tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept, zeroed = {}, {}
    for key, tensor in tensors.items():
        of_up, on = key.endswith("lora_B"), torch.tensor([0, 2, 3])
        kept[key] = (tensor[:, on] if of_up else tensor[on]).contiguous()
        zeroed[key] = tensor.clone()
        if key.endswith("lora_E"):
            zeroed[key][1] = 0
    outputs = []
    for each in (kept, zeroed):
        save_file(each, tmp_path / "adapter_model.safetensors")
        model = net()
        pk.load(model, tmp_path)
        outputs.append(model.eval()(x))
    assert torch.allclose(*outputs, atol=1e-6)


@pytest.mark.parametrize(
    "case, key, shape, entry, message",
    [
        ("adalora", "lora_E", (3, 1), {}, r"no B \(m, r\), E \(r, 1\) and A"),
        ("adalora", "lora_E", (4, 2), {}, "no B"),
        ("adalora", "", (), {"init_r": "x"}, "init_r is 'x', a number was expected"),
        ("miss", "miss_block", (2, 3, 4), {}, "is none of init_weights='plain'"),
        ("miss bat", "miss_block", (6, 2, 3), {}, "blocks that are not square"),
        ("vera", "lambda_d", (5,), {}, r"vectors of \(14,\) and \(5,\)"),
        ("vera", "vera_A", (6, 9), {}, r"right: \(6, 9\) in the file, \(6, 10\) expected"),
        ("randlora", "randlora_B", (14, 3), {}, "are no Λ"),
        ("randlora", "randlora_B", (14, 2, 4), {}, r"bases: \(14, 8\) in the file, \(14, 12\) expected"),
        ("randlora", "randlora_gamma", (3, 9), {}, "gammas"),
        ("randlora", "", (), {"randlora_alpha": None}, "randlora_alpha is None, a number was expected"),
        ("fourierft", "spectrum", (200,), {}, "frequencies=200 was given, 1 to 140, the numbers of 14×10"),
        ("fourierft", "spectrum", (3, 2), {}, "no list of frequencies"),
        ("fourierft", "", (), {"random_loc_seed": 0.5}, "random_loc_seed is 0.5, an integer was expected"),
        ("miss", "", (), {"peft_type": "ADALORA"}, "block was found, down, gate, up was expected"),
    ],
)
def test_a_damaged_folder_is_refused(
    case: str, key: str, shape: tuple[int, ...], entry: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved(case, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {k: torch.ones(shape) if key and k.endswith(key) else t for k, t in load_file(path).items()}
    save_file(tensors, path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **entry}))
    with pytest.raises(FileError, match=message):
        pk.load(net(), tmp_path)
