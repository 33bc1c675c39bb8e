"""Merges into quantised weights: refused unless asked for, and never silently of nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import MergeError, MergeStateError, OptionError, QuantisedMergeError, WrongBaseError
from peftkit.wrapping.layer import Adapted
from tests.support.matrix_quantised import BASES, COLUMNS, OPTIONS, ROWS, dequantised, network, pair, quantised
from tests.support.zoo import train

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

FOUR_BITS = ["bitsandbytes nf4", "bitsandbytes nf4 double", "bitsandbytes fp4"]
EIGHT_BITS = ["bitsandbytes int8", "torchao int8", "torchao int8 groups"]


def original() -> nn.Sequential:
    """The network before it was quantised."""
    torch.manual_seed(0)
    first = nn.Linear(COLUMNS, ROWS)
    torch.manual_seed(1)
    return nn.Sequential(first, nn.GELU(), nn.Linear(ROWS, COLUMNS, bias=False))


def small_change(base: str, kind: str = "full", share: float = 0.03) -> nn.Sequential:
    """The quantised network with ΔW of 3 % of W, as training leaves them."""
    model = network(base)
    pk.wrap(model, kind, **OPTIONS.get(kind, {}))
    for i in (0, 2):
        weight = model[i].base_of("").float()[:]
        change = model[i].adapters["default"].change
        torch.manual_seed(i)
        with torch.no_grad():
            step = torch.randn_like(change)
            change.copy_(step * share * float(weight.norm() / step.norm()))
    return model


def close(got: Tensor, expected: Tensor, bound: float) -> bool:
    """Whether the difference of two tensors is within a share of the norm."""
    return float((got - expected).detach().norm()) <= bound * float(expected.detach().norm())


def state(model: nn.Module) -> dict[str, Tensor]:
    """Every stored number of the model, its adapters apart."""
    found = copy.deepcopy(model.state_dict())
    return {key: tensor for key, tensor in found.items() if ".adapters." not in key}


def same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Whether two models store the same bits."""
    return got.keys() == expected.keys() and all(
        all(torch.equal(a, b) for a, b in zip(parts(got[key]), parts(expected[key]), strict=True)) for key in got
    )


def parts(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of the plain tensors that a tensor is made of."""
    inside: Any = tensor
    names = inside.__tensor_flatten__()[0] if type(tensor).__module__.startswith("torchao") else ()
    for part in [getattr(tensor, name) for name in names] or [tensor.data]:
        yield part.contiguous().view(torch.uint8) if part.dim() else part


@pytest.mark.parametrize("base", BASES)
class TestEveryBase:
    def test_it_is_refused_with_the_ways_out(self, base: str) -> None:
        model = small_change(base)
        before = state(model)
        with pytest.raises(QuantisedMergeError, match=r"0: its weight is quantised \(.*into='dequantised'.*origin="):
            pk.merge(model)
        assert same(state(model), before)

    def test_dequantised_is_the_plain_layer_with_both(self, base: str) -> None:
        bound = 1e-3 if base == "bitsandbytes int8" else 1e-4  # which is read in 16 bits where it has no bias
        for kind in pk.kinds():
            model, plain = pair(kind, base)
            x = torch.randn(3, 5, COLUMNS)
            expected = plain(x)
            report = pk.merge(model, into="dequantised", dtype=torch.float32)
            pk.merge(plain)
            assert report.changed == ("0", "2")
            assert report.survived is None
            for i in (0, 2):
                assert close(model[i].weight, plain[i].weight, bound), kind
            assert close(model(x), expected, bound), kind

    def test_restore_gives_every_bit_back(self, base: str) -> None:
        model, x = small_change(base), torch.randn(3, COLUMNS)
        before, output, kinds = state(model), model(x), [type(m) for m in model]
        merges: list[dict[str, Any]] = [{"into": "dequantised", "dtype": torch.float32}]
        merges.append({"into": "requantised", "origin": original()})
        for options in merges:
            pk.merge(model, **options)
            assert not same(state(model), before)
            model(x)
            assert pk.restore(model) == ("0", "2")
            assert same(state(model), before)
            assert [type(m) for m in model] == kinds
            assert torch.equal(model(x), output)

    def test_from_the_original_weight_it_survives(self, base: str) -> None:
        model, x = small_change(base), torch.randn(64, COLUMNS)
        expected = copy.deepcopy(original())
        changes = [model[i].adapters["default"].change.detach() for i in (0, 2)]
        report = pk.merge(model, into="requantised", origin=original().state_dict())
        assert report.survived == pytest.approx(1, abs=0.1)
        assert "survived in the quantised weights" in str(report)
        for i, change in zip((0, 2), changes, strict=True):
            with torch.no_grad():
                expected[i].weight.add_(change)
        again = nn.Sequential(BASES[base](expected[0]), nn.GELU(), BASES[base](expected[2])).train()
        assert close(model(x), again(x), 1e-5)

    def test_for_good(self, base: str) -> None:
        kept, model, x = small_change(base), small_change(base), torch.randn(3, COLUMNS)
        pk.merge(kept, into="requantised", origin=original())
        pk.merge(model, into="requantised", origin=original(), backup=None)
        assert not any(isinstance(m, Adapted) for m in model)
        assert [type(m) for m in model] == [type(m) for m in network(base)]
        assert torch.equal(model(x), kept(x))
        plain = small_change(base)
        pk.merge(plain, into="dequantised", backup=None, dtype=torch.float32)
        assert [type(m) for m in plain] == [nn.Linear, nn.GELU, nn.Linear]
        assert set(plain.state_dict()) == {"0.weight", "0.bias", "2.weight"}

    def test_kept_after_unwrap(self, base: str) -> None:
        model, x = small_change(base), torch.randn(3, COLUMNS)
        pk.merge(model, into="dequantised", dtype=torch.float32)
        merged = model(x)
        pk.unwrap(model, keep_merged=True)
        assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
        assert torch.equal(model(x), merged)

    def test_the_others_act_on_the_base_they_were_made_for(self, base: str) -> None:
        for into in ("dequantised", "requantised"):
            # not in evaluation, where some CPUs get another layout, of fewer bits
            model, x = nn.Sequential(network(base)[0]), torch.randn(3, COLUMNS)
            for name, kind in (("a", "lora"), ("b", "oft"), ("c", "glora")):
                pk.wrap(model, kind, name=name, **OPTIONS.get(kind, {}))
            train(model, size=0.1)
            layer = model[0]
            with pk.enabled(model, "a"):
                alone = layer(x)
            change = layer(x) - alone
            options: dict[str, Any] = {"origin": original()} if into == "requantised" else {"dtype": torch.float32}
            pk.merge(model, "a", into=into, **options)
            both = layer(x)
            for name in ("b", "c"):
                pk.set_strength(model, 0.0, name)
            merged = layer(x)
            bound = 0.05 if base in ("bitsandbytes int8", "torchao int8 dynamic") else 1e-3
            assert close(both - merged, change, bound)
            pk.restore(model)


@pytest.mark.parametrize("base", FOUR_BITS)
def test_of_the_dequantised_weight_most_is_lost_and_refused(base: str) -> None:
    model = small_change(base)
    before = state(model)
    for backup in ("copy", None):
        with pytest.raises(QuantisedMergeError, match=r"of ΔW would survive its quantisation.*give .* as origin="):
            pk.merge(model, into="requantised", backup=backup)
        assert same(state(model), before)


@pytest.mark.parametrize("base", EIGHT_BITS)
def test_at_8_bits_the_dequantised_weight_is_enough(base: str) -> None:
    report = pk.merge(small_change(base), into="requantised")
    assert report.survived == pytest.approx(1, abs=0.02)
    assert all(0.1 < weight.lost < 0.4 for weight in report.weights)  # the noise of the grid, in units of ‖ΔW‖
    columns = report.table().columns[0]
    assert "survived" in str(columns.header)


def test_what_4_bits_keep_is_what_was_measured() -> None:
    """Of a ΔW of 3 % of W in the grid of the dequantised W next to nothing is kept; of the original W, all."""
    shares: list[float] = []
    for options in ({}, {"origin": original()}):
        model = small_change("bitsandbytes nf4")
        before = [model[i].base_of("").float()[:] for i in (0, 2)]
        changes = [model[i].adapters["default"].change.detach() for i in (0, 2)]
        try:
            pk.merge(model, into="requantised", **options)  # type: ignore[arg-type]
        except QuantisedMergeError as error:
            shares.append(float(str(error).split("%")[0].split(":")[-1]) / 100)
        else:
            moved = [
                a - b for a, b in zip((dequantised(model)[i].weight.detach() for i in (0, 2)), before, strict=True)
            ]
            shares.append(sum(float((m * c).sum()) for m, c in zip(moved, changes, strict=True)))
            shares[-1] /= sum(float(c.square().sum()) for c in changes)
    assert shares[0] < 0.2
    assert shares[1] == pytest.approx(1, abs=0.05)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "another word": ({"into": "quantised"}, OptionError, "Did you mean"),
    "origin without need": ({"into": "dequantised", "origin": {}}, OptionError, "None unless into='requantised'"),
    "dtype without need": ({"dtype": torch.float16}, OptionError, "None unless into='dequantised'"),
    "no such weight": ({"into": "requantised", "origin": {}}, OptionError, "'0.weight' of .* no such weight"),
    "another shape": (
        {"into": "requantised", "origin": {"0.weight": torch.zeros(2, 2)}},
        OptionError,
        r"one of \(2, 2\)",
    ),
    "another model": (
        {"into": "requantised", "origin": nn.Sequential(nn.Linear(COLUMNS, ROWS))},
        WrongBaseError,
        "of another model",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    options, error, message = WRONG[case]
    model = small_change("bitsandbytes nf4")
    before = state(model)
    with pytest.raises(error, match=message):
        pk.merge(model, **options)
    assert same(state(model), before)
    assert not model[0].adapter_state.merged


def test_a_model_of_both_sorts() -> None:
    model = nn.Sequential(nn.Linear(COLUMNS, COLUMNS), quantised("bitsandbytes nf4"))
    pk.wrap(model, "lora", rank=2)
    train(model)
    plain = model[0].weight.clone()
    with pytest.raises(QuantisedMergeError, match="as 1 of 2 are"):
        pk.merge(model)
    assert torch.equal(model[0].weight, plain)
    report = pk.merge(model, into="dequantised")
    assert report.changed == ("0", "1")
    pk.restore(model)
    assert torch.equal(model[0].weight, plain)


def test_into_says_nothing_of_a_model_without_quantised_weights() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, "lora", rank=2)
    train(model)
    assert pk.merge(model, into="requantised").changed == ("0",)


@pytest.mark.parametrize("change", [lambda m: setattr(m[0], "weight", copy.deepcopy(m[0].weight))])
def test_a_weight_that_was_replaced_since_is_not_restored(change: Callable[[nn.Sequential], None]) -> None:
    model = small_change("bitsandbytes nf4")
    pk.merge(model, into="requantised", origin=original())
    change(model)
    with pytest.raises(MergeStateError, match="has changed since the merge"):
        pk.restore(model)


def test_a_copy_of_a_merged_model_restores_too() -> None:
    model, x = small_change("bitsandbytes nf4"), torch.randn(2, COLUMNS)
    before = model(x)
    pk.merge(model, into="requantised", origin=original())
    other = copy.deepcopy(model)
    pk.restore(other)
    assert torch.equal(other(x), before)
    assert not torch.equal(model(x), before)


def test_overflow_and_infinity_are_refused() -> None:
    model = small_change("bitsandbytes nf4")
    with torch.no_grad():
        model[0].adapters["default"].change[0, 0] = 1e6
    with pytest.raises(MergeError, match=r"overflows torch\.float16"):
        pk.merge(model, into="dequantised", dtype=torch.float16)
    with torch.no_grad():
        model[0].adapters["default"].change[0, 0] = float("inf")
    with pytest.raises(MergeError, match="not finite"):
        pk.merge(model, into="dequantised")
