"""`full` with rows: trained tokens and new tokens, which take the place of rows of the weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.delta import Delta, SelectedRows
from peftkit.errors import ExportError, LostAdapterError, NormError, OptionError
from tests.support.models import language_model
from tests.support.zoo import train

IDS = torch.tensor([[1, 2, 11], [9, 9, 0]])


def model(words: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(words, 8), nn.Linear(8, 4))


@pytest.mark.parametrize("rows", [[12], [-1], [2, 2], [], "12", [1.0], 3, [True]])
def test_rows_are_distinct_numbers_of_rows(rows: Any) -> None:
    with pytest.raises(OptionError, match=r"rows=.* distinct numbers from 0 to 11"):
        pk.wrap(model(), "full", targets="0", rows=rows)


def test_only_they_change_and_only_they_are_trained() -> None:
    net = model()
    before = net[0].weight.clone()
    plan = pk.wrap(net, "full", targets="0", rows=(9, 2))
    assert plan.parameters == 16
    assert torch.equal(net[0](IDS), before[IDS])
    optimizer = torch.optim.SGD(pk.adapter_parameters(net), lr=0.1)
    net(IDS).square().sum().backward()
    optimizer.step()
    pk.merge(net)
    changed = (net[0]._parameters["weight"] != before).any(1).nonzero().flatten()
    assert changed.tolist() == [2, 9]
    assert torch.equal(net[0]._parameters["weight"][[2, 9]], pk.adapter_parameters(net)[0])
    pk.restore(net)
    assert torch.equal(net[0]._parameters["weight"], before)


def test_a_file_puts_the_rows_in_place_whatever_they_were(tmp_path: Path) -> None:
    """New tokens are drawn anew in every model that is made, and mean what was trained in all of them."""
    net = model()
    pk.wrap(net, "full", targets="0", rows=[10, 11])
    train(net)
    path = pk.save(net, tmp_path / "a.safetensors")
    fresh = model()
    with torch.no_grad():
        fresh[0].weight[10:] = torch.randn(2, 8)
    pk.load(fresh, path)
    torch.testing.assert_close(fresh(IDS), net(IDS))
    value = pk.adapter_parameters(fresh)[0]
    torch.testing.assert_close(fresh[0](torch.tensor([10, 11])), value)
    from safetensors.torch import load_file, save_file

    save_file({key: tensor.clone() for key, tensor in model(seed=5).state_dict().items()}, tmp_path / "b.safetensors")
    pk.merge_checkpoint(tmp_path / "b.safetensors", {path: 1.0}, tmp_path / "c.safetensors")
    merged = load_file(tmp_path / "c.safetensors")["0.weight"]
    torch.testing.assert_close(merged[10:], value.detach())
    assert torch.equal(merged[:10], model(seed=5)[0].weight[:10])


def test_rows_beside_an_adapter_of_the_whole_weight() -> None:
    net = model()
    pk.wrap(net, "lora", targets="0", rank=2, name="style")
    pk.wrap(net, "full", targets="0", rows=[3], name="word")
    train(net, name="word")
    train(net, name="style")
    y = net(torch.tensor([3, 4]))
    pk.merge(net, "word")
    torch.testing.assert_close(net(torch.tensor([3, 4])), y)


def test_what_has_no_meaning_is_refused(tmp_path: Path) -> None:
    net = model()
    with pytest.raises(OptionError, match="dora: rows="):
        pk.wrap(net, "full", targets="0", rows=[1], decompose=True)
    pk.wrap(net, "full", targets="0", rows=[1])
    train(net, size=5)
    with pytest.raises(NormError):
        pk.limit_norms_(net, most=0.1)
    path = pk.save(net, tmp_path / "a.safetensors")
    with pytest.raises(ExportError, match="no tensor that scales its ΔW alone"):
        pk.rescale(path, 0.5, tmp_path / "b.safetensors")
    with pytest.raises(ExportError, match="depends on the base"):
        pk.convert(path, tmp_path / "b.safetensors", "lora")
    pk.convert(path, tmp_path / "b.safetensors", "lora", base=model())
    assert pk.read(tmp_path / "b.safetensors").patches["0"].rank == 1


@pytest.mark.parametrize("block", [slice(0, 5), slice(3, 6), slice(1, 12, 4), slice(0, 0)])
def test_blocks_of_rows(block: slice) -> None:
    delta = SelectedRows(torch.randn(3, 4), (torch.tensor([1, 5, 9]),), 12)
    assert torch.equal(delta.rows(block), Delta.rows(delta, block))
    B, A = delta.low_rank_factors()
    assert torch.equal(B @ A, delta.dense())


def test_new_tokens_of_a_language_model(tmp_path: Path) -> None:
    """Resize first, then wrap: the rows that were added, on a tied head too, beside adapters of the other layers."""
    net = language_model(tied=True)
    net.resize_token_embeddings(22, mean_resizing=False)
    rules = [pk.Rule("attn-mlp", "lora", rank=2), pk.Rule("*.embed_tokens", "full", rows=[20, 21])]
    pk.wrap(net, rules=rules, tied="share")
    train(net)
    ids = torch.tensor([[1, 20, 21, 3]])
    path = pk.save(net, tmp_path / "a.safetensors")
    again = language_model(tied=True)
    again.resize_token_embeddings(22, mean_resizing=False)
    with torch.no_grad():
        again.model.embed_tokens.weight[20:] = 1.0
    pk.load(again, path)
    torch.testing.assert_close(again(ids).logits, net(ids).logits)
    net.resize_token_embeddings(24, mean_resizing=False)
    for verb in (lambda: net(ids), lambda: pk.merge(net), lambda: pk.save(net, tmp_path / "b.safetensors")):
        with pytest.raises(LostAdapterError, match="resize_token_embeddings"):
            verb()
    net.resize_token_embeddings(22, mean_resizing=False)
    torch.testing.assert_close(net(ids).logits, again(ids).logits)
    pk.merge(net)
