"""Files of adapters that were trained on a quantised base: on the original weights, for PEFT, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import WrongBaseError
from tests.support.matrix_quantised import BASES, COLUMNS, OPTIONS, ROWS, network, pair
from tests.support.zoo import train

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")


def original() -> nn.Sequential:
    """The network before it was quantised."""
    torch.manual_seed(0)
    first = nn.Linear(COLUMNS, ROWS)
    torch.manual_seed(1)
    return nn.Sequential(first, nn.GELU(), nn.Linear(ROWS, COLUMNS, bias=False))


@pytest.mark.parametrize("base", BASES)
def test_a_file_goes_from_the_quantised_base_to_the_original_and_back(base: str, tmp_path: Path) -> None:
    for kind in pk.kinds():
        model, _ = pair(kind, base)
        if next(iter(model[0].adapters.values())).derived():  # its factors are those of the quantised weight
            continue
        path = pk.save(model, tmp_path / f"{kind}.safetensors")
        whole = original()
        report = pk.load(whole, path)
        assert report.complete
        assert 0 < report.base_distance < 0.2
        back = network(base)
        assert pk.load(back, pk.save(whole, tmp_path / "back.safetensors")).complete
        for got, expected in zip(pk.adapter_parameters(back), pk.adapter_parameters(model), strict=True):
            assert torch.equal(got, expected)


def test_factors_of_the_quantised_weight_are_of_no_other(tmp_path: Path) -> None:
    model, _ = pair("loldu", "bitsandbytes nf4")
    with pytest.raises(WrongBaseError, match="LDU factors"):
        pk.load(original(), pk.save(model, tmp_path / "a.safetensors"))
    assert pk.load(original(), pk.save(model, tmp_path / "b.safetensors", portable=True)).complete


def test_another_model_is_still_another_base(tmp_path: Path) -> None:
    model, _ = pair("lora", "bitsandbytes nf4")
    path = pk.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(7)
    other = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.GELU(), nn.Linear(ROWS, COLUMNS, bias=False))
    with pytest.raises(WrongBaseError):
        pk.load(other, path)


def test_a_file_of_full_precision_says_so(tmp_path: Path) -> None:
    """On weights that nothing has quantised, the old bound holds: another fine-tune of them is another base."""
    whole = original()
    pk.wrap(whole, "lora", rank=2)
    train(whole)
    path = pk.save(whole, tmp_path / "a.safetensors")
    near = original()
    with torch.no_grad():
        near[0].weight.mul_(1.05)
    with pytest.raises(WrongBaseError):
        pk.load(near, path)


def test_it_is_merged_into_the_checkpoint_that_was_quantised(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = network("bitsandbytes nf4")
    pk.wrap(model, "oft", block_size=4)
    train(model)
    path = pk.save(model, tmp_path / "a.safetensors")
    save_file(original().state_dict(), tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {path: 1.0}, tmp_path / "out.safetensors")
    whole = original()
    pk.load(whole, path)
    pk.merge(whole, backup=None)
    merged = load_file(tmp_path / "out.safetensors")
    assert torch.allclose(merged["0.weight"], whole[0].weight, atol=1e-6)


@pytest.mark.parametrize("base", ["bitsandbytes nf4", "bitsandbytes int8"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_export_is_what_peft_computes_on_the_same_base(kind: str, base: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = network(base)
    pk.wrap(model, kind, rank=4, **OPTIONS.get(kind, {}))
    train(model, size=0.05)
    pk.export(model, tmp_path / "peft", target="peft")
    theirs = peft.PeftModel.from_pretrained(network(base), tmp_path / "peft").train()
    x = torch.randn(5, COLUMNS)
    assert torch.allclose(model(x), theirs(x), rtol=1e-4, atol=1e-4)
