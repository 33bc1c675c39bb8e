"""Embeddings: which targets take them, what a call may hold, their gradients, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import TargetError, TiedWeightsError, UnsupportedLayerError
from peftkit.wrapping.sites import sites
from tests.support.zoo import OwnLookup, ScaledEmbedding, train


class Tower(nn.Module):
    """Tokens, their positions, a bag of tags and a layer of each other sort."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(12, 8, padding_idx=0)
        self.block = nn.ModuleDict({"positions": nn.Embedding(6, 8), "mix": nn.Linear(8, 8)})
        self.tags = nn.EmbeddingBag(5, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.block["positions"](torch.arange(ids.shape[1])) + self.tags(ids % 5)[:, None]
        return self.block["mix"](x)


def tower() -> tuple[Tower, Tensor]:
    torch.manual_seed(0)
    return Tower(), torch.randint(12, (3, 6))


def effective(layer: nn.Module) -> Tensor:
    """W + ΔW of a layer alone, with the graph of its adapter."""
    adapter = layer.adapters["default"]
    return layer._parameters["weight"] + adapter(layer._parameters["weight"], 1.0).dense()


# -- which targets take them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("Embedding", ("tokens", "block.positions")),
        ("EmbeddingBag", ("tags",)),
        ("tokens", ("tokens",)),
        ("*.positions", ("block.positions",)),
        ("positions", ("block.positions",)),
        ("re:t.*s", ("tokens", "tags")),
        ("full", ("block.mix",)),
        ("*", ("block.mix",)),
        ("block", ("block.mix",)),
        ("Tower", ("block.mix",)),
        (["full", "tokens"], ("block.mix", "tokens")),
    ],
)
def test_a_target_takes_embeddings_if_it_takes_nothing_else(targets: Any, expected: tuple[str, ...]) -> None:
    assert pk.plan(tower()[0], "lora", targets=targets, rank=2).modules == expected


def test_an_embedding_that_is_left_out_is_listed_with_the_reason() -> None:
    skipped = dict(pk.plan(tower()[0], "lora", targets="*", rank=2).skipped)
    assert set(skipped) == {"tokens", "block.positions", "tags"}
    assert "a target that matches nothing but embeddings" in skipped["tokens"]


def test_a_preset_takes_no_embedding_even_of_a_model_that_has_nothing_else() -> None:
    with pytest.raises(UnsupportedLayerError, match="it is an embedding"):
        pk.wrap(nn.Embedding(4, 2), "lora")


def test_exclude_leaves_out_embeddings_whatever_else_it_matches() -> None:
    model, _ = tower()
    assert pk.plan(model, "lora", targets="Embedding", exclude="block", rank=2).modules == ("tokens",)
    with pytest.raises(TargetError, match="excluded"):
        pk.plan(model, "lora", targets="Embedding", exclude="*", rank=2)


# -- what they compute ------------------------------------------------------------------------------------------------


BAGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sum": ({"mode": "sum"}, {}),
    "weighted sum": ({"mode": "sum"}, {"per_sample_weights": torch.linspace(-1, 1, 9, dtype=torch.float64)}),
    "mean": ({"mode": "mean"}, {}),
    "max": ({"mode": "max"}, {}),
    "last offset": ({"mode": "sum", "include_last_offset": True}, {"offsets": torch.tensor([0, 4, 4, 9])}),
    "padded": ({"mode": "mean", "padding_idx": 3}, {}),
}


@pytest.mark.parametrize("route", ["factored", "dense"])
@pytest.mark.parametrize("case", BAGS)
def test_bags_of_every_mode_are_those_of_the_changed_weight(case: str, route: str) -> None:
    torch.manual_seed(0)
    options, call = BAGS[case]
    bag = nn.EmbeddingBag(12, 4, **options).double()
    ids = torch.tensor([1, 3, 3, 0, 3, 11, 7, 7, 2])
    call = {"offsets": torch.tensor([0, 2, 2, 7]), **call}
    pk.wrap(bag, "loha", targets="EmbeddingBag", rank=2, route=route)
    train(bag)
    parameters = pk.adapter_parameters(bag)
    y = bag(ids, **call)
    expected = F.embedding_bag(ids, effective(bag), padding_idx=bag.padding_idx, **options_of(options), **call)
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad(out, parameters, upstream) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b)


def options_of(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "padding_idx"}


def test_positional_arguments_and_weights_of_samples_have_their_gradient() -> None:
    bag = nn.EmbeddingBag(6, 4, mode="sum").double()
    ids, offsets = torch.tensor([1, 2, 4, 4]), torch.tensor([0, 2])
    weights = torch.rand(4, dtype=torch.float64, requires_grad=True)
    pk.wrap(bag, "full", targets="EmbeddingBag")
    train(bag)
    own = torch.autograd.grad(bag(ids, offsets, weights).square().sum(), weights)
    expected = F.embedding_bag(ids, effective(bag), offsets, mode="sum", per_sample_weights=weights)
    torch.testing.assert_close(own, torch.autograd.grad(expected.square().sum(), weights))


@pytest.mark.parametrize("route", ["factored", "dense"])
def test_gradients_leave_out_padding_and_are_divided_by_frequency_as_the_layers(route: str) -> None:
    layer = nn.Embedding(12, 4, padding_idx=3, scale_grad_by_freq=True).double()
    ids = torch.tensor([[1, 3, 1], [1, 5, 3]])
    pk.wrap(layer, "lora", targets="Embedding", rank=2, route=route)
    train(layer)
    parameters = pk.adapter_parameters(layer)
    upstream = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = F.embedding(ids, effective(layer), padding_idx=3, scale_grad_by_freq=True)
    torch.testing.assert_close(layer(ids), expected)
    for a, b in zip(
        torch.autograd.grad(layer(ids), parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_the_row_of_padding_stays_as_it_is() -> None:
    layer = nn.Embedding(12, 4, padding_idx=3)
    pk.wrap(layer, "lora", targets="Embedding", rank=2)
    optimizer = torch.optim.AdamW(pk.adapter_parameters(layer), lr=0.1)
    for _ in range(3):
        layer(torch.tensor([3, 3, 1])).sum().backward()
        optimizer.step()
    assert torch.equal(layer(torch.tensor([3])), torch.zeros(1, 4))
    assert layer(torch.tensor([1])).ne(layer._parameters["weight"][1]).any()


def test_a_forward_builds_no_matrix_of_the_size_of_the_weight() -> None:
    """A vocabulary of a million rows on the meta device's terms: the peak of memory is that of the rows looked up."""
    largest: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            largest.append(out.numel() if isinstance(out, Tensor) else 0)
            return out

    layer = nn.Embedding(5000, 16)
    for kind, options in (("lora", {"rank": 2}), ("loha", {"rank": 2}), ("lokr", {"factor": 4}), ("full", {})):
        pk.wrap(layer, kind, targets="Embedding", **options)
        train(layer)
        largest.clear()
        with Watch(), torch.no_grad():
            layer(torch.tensor([1, 4999]))
        assert max(largest) <= 5000 * 2, kind  # B of the scale, and never W
        pk.unwrap(layer)


# -- subclasses, dtypes, compilers ------------------------------------------------------------------------------------


def test_a_subclass_that_acts_on_what_is_looked_up_is_adapted_where_it_is_called() -> None:
    layer, ids = ScaledEmbedding(12, 8), torch.tensor([[1, 2, 2]])
    assert not sites(layer)[""].read
    before = layer.state_dict().keys()
    pk.wrap(layer, "lora", targets="Embedding", rank=2)
    train(layer)
    assert isinstance(layer, ScaledEmbedding)
    torch.testing.assert_close(layer(ids), 3 * F.embedding(ids, effective(layer)))
    assert isinstance(layer.weight, nn.Parameter)
    pk.unwrap(layer)
    assert type(layer) is ScaledEmbedding
    assert layer.state_dict().keys() == before


def test_a_subclass_that_reads_its_weight_is_adapted_where_it_is_read() -> None:
    layer, ids = OwnLookup(12, 8), torch.tensor([[1, 2, 2]])
    assert sites(layer)[""].read
    assert pk.wrap(layer, "lora", targets="OwnLookup", rank=2).entries[0].route == "weight"
    train(layer)
    torch.testing.assert_close(layer(ids), F.embedding(ids, effective(layer)).tanh())


def test_read_adapts_an_embedding_where_other_code_reads_it() -> None:
    layer, h = nn.Embedding(12, 8), torch.randn(3, 8)
    pk.wrap(layer, rules=[pk.Rule("Embedding", "lora", rank=2, read=True)])
    train(layer)
    torch.testing.assert_close(F.linear(h, layer.weight), F.linear(h, effective(layer)))
    torch.testing.assert_close(layer(torch.tensor([4])), effective(layer)[[4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_are_summed_in_fp32_and_rounded_once_under_autocast_too(dtype: torch.dtype) -> None:
    layer, ids = nn.Embedding(12, 8, dtype=dtype), torch.tensor([3, 5, 5])
    pk.wrap(layer, "lora", targets="Embedding", rank=2)
    train(layer, size=0.01)
    change = layer.adapters["default"](layer.weight, 1.0).lookup(ids)
    expected = (layer.weight[ids].float() + change).to(dtype)
    assert torch.equal(layer(ids), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(ids), expected)


def test_compiled_for_any_number_of_tokens() -> None:
    model, ids = tower()
    pk.wrap(model, "lora", targets=["Embedding", "EmbeddingBag"], rank=2)
    train(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (ids, ids[:1], torch.cat([ids, ids])):
        torch.testing.assert_close(compiled(each), model(each))
        with pk.disabled(model):
            torch.testing.assert_close(compiled(each), model(each))
    own, expected = (torch.autograd.grad(m(ids).sum(), pk.adapter_parameters(model)) for m in (compiled, model))
    torch.testing.assert_close(own, expected)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_max_norm_is_refused_with_the_remedy() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"max_norm=1.0 writes to the weight .* set max_norm to None"):
        pk.wrap(nn.Embedding(4, 2, max_norm=1.0), "lora", targets="Embedding", rank=1)


def test_dropout_of_the_input_is_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"numbers of rows; use rank_dropout"):
        pk.wrap(nn.Embedding(4, 2), "lora", targets="Embedding", rank=1, dropout=0.1)
    layer = nn.Embedding(4, 2)
    pk.wrap(layer, "lora", targets="Embedding", rank=1, rank_dropout=0.5)
    assert layer.train()(torch.tensor([1])).requires_grad


def test_a_weight_that_is_tied_is_refused_as_any_other() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model.head.weight = model.embed.weight
    with pytest.raises(TiedWeightsError, match=r"embed shares its weight with head.weight"):
        pk.wrap(model, "lora", targets="embed", rank=1)


# -- the other verbs --------------------------------------------------------------------------------------------------


def test_check_the_monitor_and_checkpoints_take_them(tmp_path: Any) -> None:
    model, ids = tower()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    pk.wrap(model, "dora", targets=["Embedding", "EmbeddingBag"], rank=2)
    assert pk.check(model, ids).ok
    train(model)
    assert set(pk.monitor.CSMonitor(model).measure().per_module) == {"tokens", "block.positions", "tags"}
    path = pk.save(model, tmp_path / "a.safetensors")
    y = model(ids)
    pk.merge(model)
    merged = {key: value.clone() for key, value in model.state_dict().items() if "adapters" not in key}
    torch.testing.assert_close(model(ids), y)
    pk.restore(model)
    from safetensors.torch import load_file, save_file

    save_file(base, tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {path: 1.0}, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for key, value in merged.items():
        torch.testing.assert_close(found[key], value)
