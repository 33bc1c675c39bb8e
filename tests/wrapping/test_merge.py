"""Merging: guards, partial merges, reports, and everything that must not lose a bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import MergeError, MergeStateError, OptionError
from peftkit.wrapping.backup import Packed
from tests.support.laws import bits
from tests.support.zoo import ADAPTERS, train


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 6)).to(dtype)


def trained(dtype: torch.dtype = torch.float32, size: float = 0.2) -> nn.Sequential:
    net = model(dtype)
    pk.wrap(net, "lora", name="a", rank=2)
    pk.wrap(net, "dora", name="b", rank=2)
    train(net, size=size)
    return net


X = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def test_guards() -> None:
    net = trained()
    with pytest.raises(OptionError, match="'copy', 'packed' or None"):
        pk.merge(net, backup="none")
    pk.merge(net, "a")
    for again in ("a", "b", None):
        with pytest.raises(MergeStateError, match="merged into 0 already"):
            pk.merge(net, again)
    with pytest.raises(MergeStateError, match="restore before changing"):
        pk.set_strength(net, 2.0)
    with pytest.raises(MergeStateError, match="restore before disabling"), pk.disabled(net):
        pass
    with pytest.raises(MergeStateError, match="restore before adding"):
        pk.wrap(net, "lora", name="c")
    with pytest.raises(MergeStateError, match=r"restore\(model\) first"):
        pk.unwrap(net)
    pk.set_strength(net, 2.0, "b")
    pk.restore(net)
    with pytest.raises(MergeStateError, match="nothing is merged"):
        pk.restore(net)
    with pk.disabled(net), pytest.raises(MergeStateError, match="disabled"):
        pk.merge(net)


@pytest.mark.parametrize("backup", ["copy", "packed"])
@pytest.mark.parametrize("subset", ["a", "b", ["b", "a"]], ids=str)
def test_a_partial_merge_keeps_the_function_and_the_gradients_of_the_rest(subset: Any, backup: str) -> None:
    net = trained(torch.float64)
    x = X.double()
    expected = net(x)
    pk.merge(net, subset, backup=backup)
    torch.testing.assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    rest = {"a", "b"} - set(subset)
    if rest:
        assert pk.check(net, x, name=rest.pop()).ok
    pk.restore(net)
    assert torch.equal(net(x), expected)


def test_modules_merge_and_restore_in_any_order() -> None:
    net = trained()
    before, output = [bits(p) for p in net.parameters()], net(X)
    pk.merge(net[0])
    pk.merge(net[2])
    pk.restore(net[0])
    pk.merge(net[0], "b")
    pk.restore(net)
    assert [bits(p) for p in net.parameters()] == before
    assert torch.equal(net(X), output)


def test_report() -> None:
    net = trained(torch.bfloat16)
    report = pk.merge(net, ["a", "b"])
    assert [w.site for w in report.weights] == ["0", "2"] == list(report.changed)
    assert all(w.adapters == ("a", "b") for w in report.weights)
    assert 0 < report.lost < 0.1
    assert "2 weights, 2 changed" in str(report)
    assert report.table().row_count == 2


def test_a_merge_that_would_do_nothing_raises_and_undoes_itself() -> None:
    net = trained(torch.bfloat16)
    before = [bits(p) for p in net.parameters()]
    pk.set_strength(net, 1e-9)
    with pytest.raises(MergeError, match="too small for its weight's dtype"):
        pk.merge(net)
    assert [bits(p) for p in net.parameters()] == before
    pk.set_strength(net, 1.0)
    pk.merge(net)
    pk.restore(net)
    assert [bits(p) for p in net.parameters()] == before


def test_a_delta_that_is_not_finite_raises_and_undoes_itself() -> None:
    net = trained()
    with torch.no_grad():
        net[2].adapters["a"].up[0, 0] = float("inf")
    before = [bits(p) for p in net.parameters()]
    with pytest.raises(MergeError, match="2: the ΔW of a, b is not finite"):
        pk.merge(net)
    assert [bits(p) for p in net.parameters()] == before
    net.eval()
    pk.merge(net[0])


@pytest.mark.parametrize("backup", ["copy", "packed"])
@pytest.mark.parametrize("change", ["train", "cast"])
def test_restore_notices_that_the_weight_changed(backup: str, change: str) -> None:
    net = trained()
    pk.merge(net, backup=backup)
    if change == "cast":
        net.to(torch.bfloat16)
    else:
        with torch.no_grad():
            net[2].weight[0, 0] += 1
    with pytest.raises(MergeStateError, match="has changed since the merge"):
        pk.restore(net)
    pk.unwrap(net, keep_merged=True)
    assert type(net[2]) is nn.Linear


def test_keep_merged_bakes_the_adapters_in() -> None:
    net = trained()
    expected = net(X)
    pk.merge(net, "a")
    with pytest.raises(MergeStateError):
        pk.unwrap(net, "a")
    pk.unwrap(net, "a", keep_merged=True)
    with pk.disabled(net):
        baked = net(X)
    pk.unwrap(net)
    assert torch.equal(net(X), baked)
    assert not torch.equal(baked, expected)


def test_a_merged_model_serves_with_no_grad_and_under_inference_mode() -> None:
    net = trained().eval()
    with torch.inference_mode():
        pk.merge(net)
        merged = net(X)
        pk.restore(net)
    torch.testing.assert_close(merged, net(X))


FLOATS = {
    torch.float16: st.integers(-(2**15), 2**15 - 1),
    torch.bfloat16: st.integers(-(2**15), 2**15 - 1),
    torch.float32: st.integers(-(2**31), 2**31 - 1),
    torch.float64: st.integers(-(2**63), 2**63 - 1),
}
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_packed_returns_any_bit_pattern(data: st.DataObject) -> None:
    """NaN payloads, infinities, denormals, both zeros: whatever the two weights are."""
    dtype = data.draw(st.sampled_from(list(FLOATS)))
    size = data.draw(st.integers(1, 12))
    pair = [
        torch.tensor(data.draw(st.lists(FLOATS[dtype], min_size=size, max_size=size)))
        .to(INTEGERS.get(dtype, torch.int64))
        .view(dtype)
        .reshape(1, size)
        for _ in range(2)
    ]
    before, after = pair
    assert bits(Packed.of(before, after).original(after)) == bits(before)


def test_packed_is_smaller_than_a_copy() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(512, 512).to(torch.bfloat16)
    pk.wrap(layer, "lora", rank=8)
    train(layer, size=0.01)
    pk.merge(layer, backup="packed")
    snapshot = layer.adapter_state.merged.backups[""]
    assert sum(len(plane) for plane in snapshot.planes) < 0.5 * layer.weight.nbytes


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "loldu", "dora", "oft"])
def test_in_place_and_in_any_memory_format(kind: str) -> None:
    """Row blocks of several sizes, channels_last and strided weights: written where they are."""
    torch.manual_seed(0)
    conv = nn.Conv2d(64, 96, 3).to(memory_format=torch.channels_last)
    strided = nn.Linear(1536, 1024)
    strided.weight = nn.Parameter(torch.randn(1536, 1024).mT)
    for layer in (conv, strided):
        pointer, stride = layer.weight.data_ptr(), layer.weight.stride()
        options: dict[str, Any] = (
            {"block_size": 32} if kind == "oft" else {"factor": 8} if kind == "lokr" else {"rank": 4}
        )
        pk.wrap(layer, kind, **options)
        train(layer, size=0.02)
        slot = layer.adapter_state.slots[""]
        W = slot.geometry.matrix(layer.weight.detach()).clone()
        expected = layer.adapters["default"](W, 1.0).added_to(W)
        before = bits(layer.weight)
        pk.merge(layer)
        # blocks of rows may sum a product in another order than the whole: one unit in the last place
        torch.testing.assert_close(slot.geometry.matrix(layer.weight), expected.detach(), rtol=3e-6, atol=1e-6)
        assert (layer.weight.data_ptr(), layer.weight.stride()) == (pointer, stride)
        pk.restore(layer)
        assert bits(layer.weight) == before


class Counting(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor any operation made, in elements."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.largest = max(self.largest, out.numel())
        return out


class TestForGood:
    """merge(backup=None): nothing is kept, and the adapters are gone."""

    @pytest.mark.parametrize("case", ["lora", "loha", "lokr", "loldu", "dora", "dora in", "oft", "boft", "ia3", "full"])
    def test_is_what_a_merge_with_a_backup_leaves(self, case: str) -> None:
        nets = [nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.Flatten(), nn.Linear(108, 8)) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        for net in nets:
            torch.manual_seed(2)
            pk.wrap(net, ADAPTERS[case].kind, **ADAPTERS[case].options)
            train(net)
        kept, baked = pk.merge(nets[0]), pk.merge(nets[1], backup=None)
        pk.unwrap(nets[0], keep_merged=True)
        assert kept.weights == baked.weights
        assert type(nets[1][0]) is nn.Conv2d
        for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
            assert torch.equal(a, b)

    def test_others_stay_and_act(self) -> None:
        net = model()
        for name in ("a", "b"):
            pk.wrap(net, "lora", name=name, rank=2)
        train(net)
        expected = net(X)
        pk.merge(net, "a", backup=None)
        torch.testing.assert_close(net(X), expected)
        with pytest.raises(pk.errors.UnknownAdapterError):
            pk.set_strength(net, 1.0, "a")
        with pytest.raises(MergeStateError):
            pk.restore(net)

    @pytest.mark.parametrize("spoil", ["nan", "overflow", "inert"])
    def test_what_fails_fails_before_anything_is_written(self, spoil: str) -> None:
        net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.float16)
        pk.wrap(net, "lora", rank=2)
        train(net)
        before = [layer.weight.clone() for layer in net]
        last = net[1].adapters["default"]
        with torch.no_grad():
            last.up.mul_({"nan": float("nan"), "overflow": 1e6, "inert": 1e-9}[spoil])
        message = {"nan": "not finite", "overflow": "may overflow", "inert": "too small"}[spoil]
        with pytest.raises(MergeError, match=message):
            pk.merge(net, backup=None)
        assert all(torch.equal(layer.weight, w) for layer, w in zip(net, before, strict=True))
        assert pk.check(net.float(), torch.randn(2, 8)).ok or spoil == "nan"

    @pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "loldu", "dora", "oft", "ia3"])
    @pytest.mark.parametrize("kernel", [(), (3, 3)])
    def test_a_long_weight_is_that_of_the_definition(self, kind: str, kernel: tuple[int, ...]) -> None:
        """Most of its rows are written straight; some are measured on the way."""
        layer = nn.Conv2d(300, 512, kernel) if kernel else nn.Linear(2700, 512)
        options: dict[str, Any] = {"oft": {"block_size": 32}, "lokr": {"factor": 8}, "ia3": {}}.get(kind, {"rank": 4})
        pk.wrap(layer, kind, **options)
        train(layer, size=0.02)
        exact = copy.deepcopy(layer).double()
        W = exact.weight.detach().flatten(1)
        delta = exact.adapters["default"].delta(W).dense().detach()
        (merged,) = pk.merge(layer, backup=None).weights
        torch.testing.assert_close(layer.weight.detach().flatten(1).double(), W + delta, rtol=3e-6, atol=3e-7)
        assert merged.norm == pytest.approx(float(delta.norm()), rel=1e-4)
        assert merged.change == pytest.approx(merged.norm, rel=1e-3)
        assert 0 < merged.lost < 1e-4

    def test_a_change_of_the_last_rows_is_found(self) -> None:
        layer = nn.Linear(2048, 2048)
        pk.wrap(layer, "lora", rank=4)
        train(layer, size=0.02)
        with torch.no_grad():
            layer.adapters["default"].up[:-3] = 0
        W, delta = layer.weight.detach().clone(), layer.adapters["default"].delta(layer.weight).dense().detach()
        with Counting() as counting:
            (merged,) = pk.merge(layer, backup=None).weights
        assert counting.largest <= layer.weight.numel() // 4
        torch.testing.assert_close(layer.weight.detach(), W + delta)
        assert merged.change == pytest.approx(merged.norm, rel=1e-3)

    @pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "loldu", "dora", "oft", "ia3"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_takes_no_memory_of_the_size_of_a_weight(self, kind: str, dtype: torch.dtype) -> None:
        layer = nn.Linear(2048, 2048).to(dtype)
        options: dict[str, Any] = {"oft": {"block_size": 32}, "lokr": {"factor": 8}, "ia3": {}}.get(kind, {"rank": 4})
        pk.wrap(layer, kind, **options)
        train(layer, size=0.02)
        with Counting() as counting:
            pk.merge(layer, backup=None)
        assert counting.largest <= layer.weight.numel() // 4


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "loldu", "dora", "oft"])
def test_no_dense_temporary_beside_the_backup(kind: str) -> None:
    layer = nn.Linear(2048, 2048).to(torch.bfloat16)
    options: dict[str, Any] = {"block_size": 32} if kind == "oft" else {"factor": 8} if kind == "lokr" else {"rank": 4}
    pk.wrap(layer, kind, **options)
    train(layer, size=0.02)
    snapshot = layer.weight.detach().clone()
    with Counting() as counting:
        from peftkit.delta.addition import add_

        slot = layer.adapter_state.slots[""]
        with torch.no_grad():
            delta = layer.adapters["default"](slot.geometry.matrix(layer.weight), 1.0)
            add_([delta], layer.weight.detach(), slot.geometry)
    assert not torch.equal(layer.weight, snapshot)
    assert counting.largest <= layer.weight.numel() // 4
