"""Adapters of norms and biases for LyCORIS and PEFT, held against the packages; for other programs a typed refusal."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris.wrapper import create_lycoris_from_weights
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, LossyError
from tests.support.cells import TARGETS, require_same_forward
from tests.support.zoo import train


def base_model() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Tanh(), nn.Linear(12, 6), nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model[1].weight.add_(0.3 * torch.randn(12))
    return model, torch.randn(5, 8)


def trained(*rules: pk.Rule) -> tuple[nn.Sequential, nn.Sequential, Tensor]:
    model, x = base_model()
    base = copy.deepcopy(model)
    pk.wrap(model, rules=list(rules))
    train(model)
    return model, base, x


NORM = pk.Rule("1", "full")


@pytest.mark.parametrize("of_file", [False, True])
@torch.no_grad()
def test_lycoris_applies_changes_of_norms_and_of_biases_beside_a_whole_change(of_file: bool, tmp_path: Path) -> None:
    model, base, x = trained(pk.Rule("0", "full"), pk.Rule("3", "lora", rank=2), NORM, pk.Rule("0.bias", "full"))
    source: Any = pk.save(model, tmp_path / "own.safetensors") if of_file else model
    path = tmp_path / "out.safetensors"
    pk.export(source, path, "lycoris", base=base if of_file else None)
    assert {key.partition(".")[2] for key in load_file(path)} >= {"diff", "diff_b", "w_norm", "b_norm"}
    theirs = copy.deepcopy(base)
    network, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    network.apply_to()
    require_same_forward(model(x), theirs(x), base(x))
    ours = copy.deepcopy(base)
    pk.load(ours, path)
    torch.testing.assert_close(ours(x), model(x))


@torch.no_grad()
def test_peft_gets_them_as_the_values_they_make(tmp_path: Path) -> None:
    model, base, x = trained(pk.Rule(["0", "3"], "lora", rank=2), NORM, pk.Rule(["0.bias", "4.bias"], "full"))
    report = pk.export(model, tmp_path / "out", "peft")
    assert set(report.extras) == {"1.weight", "1.bias", "0.bias", "4.bias"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "out")).eval()
    require_same_forward(model(x), theirs(x), base(x))
    again = pk.export(pk.save(model, tmp_path / "own.safetensors"), tmp_path / "again", "peft", base=base)
    assert set(again.extras) == set(report.extras)


@pytest.mark.parametrize("target", [target for target in TARGETS if target not in ("lycoris", "peft")])
def test_other_programs_are_refused(target: str, tmp_path: Path) -> None:
    model, _, _ = trained(pk.Rule("0", "lora", rank=2), NORM)
    with pytest.raises(ExportError, match="1: it is a norm's weight or a bias"):
        pk.export(model, tmp_path / "out.safetensors", target)


def test_what_a_program_has_no_place_for_is_refused(tmp_path: Path) -> None:
    beside_lora, base, _ = trained(pk.Rule("0", "lora", rank=2), pk.Rule("0.bias", "full"))
    with pytest.raises(ExportError, match=r"0\.bias: LyCORIS has a bias beside a whole ΔW only"):
        pk.export(beside_lora, tmp_path / "out.safetensors", "lycoris")
    alone, _, _ = trained(pk.Rule("0", "lora", rank=2), pk.Rule("1.bias", "full"))
    with pytest.raises(ExportError, match=r"1\.bias: LyCORIS has a bias beside its weight only"):
        pk.export(alone, tmp_path / "out.safetensors", "lycoris")
    rms = nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8))
    pk.wrap(rms, rules=[pk.Rule("0", "lora", rank=2), NORM])
    train(rms)
    with pytest.raises(ExportError, match="1: LyCORIS adapts LayerNorm and GroupNorm"):
        pk.export(rms, tmp_path / "out.safetensors", "lycoris")
    only, _, _ = trained(NORM)
    with pytest.raises(ExportError, match="without adapters of matrices"):
        pk.export(only, tmp_path / "out", "peft")
    file = pk.save(beside_lora, tmp_path / "own.safetensors")
    with pytest.raises(ExportError, match="give base="):
        pk.export(pk.save(trained(pk.Rule("0", "lora", rank=2), NORM)[0], file), tmp_path / "out", "peft")
    tuned, _, _ = trained(pk.Rule("0", "loha", rank=2), pk.Rule("0.bias", "full"))
    with pytest.raises(LossyError, match="weights under adapters"):
        pk.export(tuned, tmp_path / "out", "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["own.safetensors"]
    assert base is not beside_lora


@pytest.mark.parametrize("verb", ["convert", "resize", "combine"])
@torch.no_grad()
def test_the_verbs_on_files_leave_them_whole(verb: str, tmp_path: Path) -> None:
    model, base, x = trained(pk.Rule("0", "lora", rank=2), NORM)
    file = pk.save(model, tmp_path / "own.safetensors")
    out = tmp_path / "out.safetensors"
    if verb == "convert":
        pk.convert(file, out, "lora", rank=2)
    elif verb == "resize":
        pk.resize(file, out, rank=2)
    else:
        twin = tmp_path / "twin.safetensors"
        twin.write_bytes(file.read_bytes())
        pk.combine({file: 0.25, twin: 0.75}, out, method="svd", rank=2)
    ours = copy.deepcopy(base)
    pk.load(ours, out, other_base=True)
    torch.testing.assert_close(ours(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_trained_beside_the_adapters_goes_to_lycoris_as_changes_of_the_base(tmp_path: Path) -> None:
    model, base, x = trained(pk.Rule("0", "lora", rank=2))
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):  # a norm, and a head with its bias
        parameter = model.get_parameter(name).requires_grad_(True)
        parameter += 0.1 * torch.randn(parameter.shape)
    path = tmp_path / "out.safetensors"
    with pytest.raises(LossyError, match=r"give base= the model before training"):
        pk.export(model, path, "lycoris")
    with pytest.raises(LossyError, match=r"3\.weight trained beside the adapters, and is no matrix"):
        pk.export(model, path, "lycoris", base=nn.Sequential(base[0], base[1]))
    assert not path.exists()
    pk.export(model, path, "lycoris", base=base)
    ends = {key.partition(".")[2] for key in load_file(path)}
    assert ends >= {"diff", "diff_b", "w_norm", "b_norm"}
    theirs = copy.deepcopy(base)
    network, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    network.apply_to()
    require_same_forward(model(x), theirs(x), base(x))
    pk.export(model, tmp_path / "without.safetensors", "lycoris", base=base, extras=False)
    assert not {key for key in load_file(tmp_path / "without.safetensors") if "diff" in key or "norm" in key}
