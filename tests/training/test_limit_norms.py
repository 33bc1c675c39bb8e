"""Max-norm regularisation: what is too long has the bound as its norm and the direction it had; the rest stays."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import MergeStateError, NormError, OptionError, UnknownAdapterError
from peftkit.testing.laws import LAYERS, Cell, parts_of
from peftkit.training import LimitedNorm
from tests.support.files import State
from tests.support.zoo import ADAPTERS, train

#: kinds of which no parameter scales ΔW
REFUSED = {"loldu", "dora", "oft", "boft"}


def is_refused(case: str) -> bool:
    own = ADAPTERS[case]
    return own.kind in REFUSED or bool(own.options.get("decompose"))


@pytest.mark.parametrize("case", [case for case in ADAPTERS if not is_refused(case)])
def test_a_long_change_is_scaled_to_the_bound_and_keeps_its_direction(case: str) -> None:
    held = 0
    for layer in LAYERS:
        try:
            module, x = Cell(ADAPTERS[case].kind, ADAPTERS[case].options, layer).wrapped()
        except OptionError:
            continue
        adapter, W, _, _ = parts_of(module)
        before, base = adapter(W, 1.0).dense().detach(), W.clone()
        size = before.norm().item()
        assert pk.limit_norms_(module, size * 1.001) == ()
        assert torch.equal(adapter(W, 1.0).dense(), before)
        (limited,) = pk.limit_norms_(module, size / 7)
        after = adapter(W, 1.0).dense().detach()
        assert (limited.weight, limited.name) == ("", "default")
        assert math.isclose(limited.norm, size, rel_tol=1e-12)
        assert math.isclose(limited.factor, 1 / 7, rel_tol=1e-12)
        assert math.isclose(after.norm().item(), size / 7, rel_tol=1e-12)
        assert (7 * after - before).norm().item() <= 1e-12 * size
        assert torch.equal(parts_of(module).W, base)
        again = pk.limit_norms_(module, size / 7)
        assert again == () or math.isclose(again[0].factor, 1, rel_tol=1e-12)
        held += bool(torch.isfinite(module(x)).all())
    assert held >= 2


@pytest.mark.parametrize("case", [case for case in ADAPTERS if is_refused(case)])
def test_a_kind_that_no_parameter_scales_is_refused_with_nothing_changed(case: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 12))
    pk.wrap(model, "full", targets="0")
    pk.wrap(model, ADAPTERS[case].kind, targets=["1", "2"], **ADAPTERS[case].options)
    train(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NormError, match=r"1\[default\]: the ΔW of"):
        pk.limit_norms_(model, 1e-3)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def two_layers(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pk.wrap(model, "lora", rank=2, name="a", **options)
    pk.wrap(model, "full", targets="1", name="b")
    train(model)
    return model


def norms(model: nn.Module) -> State:
    return {
        f"{name}[{own}]": adapter(module.weight, 1.0).dense().detach().norm()
        for name, module in model.named_children()
        for own, adapter in module.adapters.items()
    }


def test_each_change_is_bounded_by_itself_and_reported() -> None:
    model = two_layers()
    before = norms(model)
    most = sorted(float(norm) for norm in before.values())[0] * 1.01
    reported = pk.limit_norms_(model, most)
    assert [f"{each.weight}[{each.name}]" for each in reported] == [k for k, norm in before.items() if norm > most]
    after = norms(model)
    for key, norm in before.items():
        assert float(after[key]) == pytest.approx(min(float(norm), most), rel=1e-5)
    model = two_layers()
    assert {each.name for each in pk.limit_norms_(model, 1e-3, "b")} == {"b"}
    assert torch.equal(norms(model)["0[a]"], before["0[a]"])


def test_the_norm_is_that_of_the_whole_change_at_strength_one() -> None:
    model = two_layers(rank_dropout=0.5, module_dropout=0.5)
    model.train()
    pk.set_strength(model, 0.1)
    model.eval()
    expected = norms(model)
    model.train()
    state = torch.get_rng_state()
    reported = {f"{each.weight}[{each.name}]": each.norm for each in pk.limit_norms_(model, 1e-3)}
    assert torch.equal(torch.get_rng_state(), state)
    assert reported == pytest.approx({key: float(norm) for key, norm in expected.items()}, rel=1e-6)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_bound_is_met_to_the_rounding_of_the_parameters(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 64)).to(dtype)
    pk.wrap(model, "lora", rank=4, dtype=dtype)
    train(model, size=300.0)
    (limited,) = pk.limit_norms_(model, 2.0)
    assert math.isfinite(limited.norm)
    adapter = model[0].adapters["default"].float()
    assert adapter(model[0].weight, 1.0).dense().norm().item() == pytest.approx(2.0, rel=4 * torch.finfo(dtype).eps)


def test_training_stays_inside_the_bound() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    pk.wrap(model, "loha", rank=2)
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.5)
    limited: list[LimitedNorm] = []
    optimizer.register_step_post_hook(lambda *_: limited.extend(pk.limit_norms_(model, 0.1)))
    x = torch.randn(16, 8)
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - 3).square().mean().backward()
        optimizer.step()
        assert float(norms(model)["0[default]"]) <= 0.1 * (1 + 1e-5)
    assert limited


def test_what_is_not_finite_is_refused() -> None:
    for value in (math.nan, math.inf):
        model = two_layers()
        with torch.no_grad():
            model[1].adapters["b"].change[0, 0] = value
        before = model[0].adapters["a"].up.clone()
        with pytest.raises(NormError, match=r"1\[b\]: ‖ΔW‖ is (nan|inf)"):
            pk.limit_norms_(model, 1e-3)
        assert torch.equal(model[0].adapters["a"].up, before)


@pytest.mark.parametrize("most", [0, -1.0, math.nan, math.inf, "1", True, None])
def test_what_is_no_bound_is_refused(most: Any) -> None:
    with pytest.raises(OptionError, match="most="):
        pk.limit_norms_(two_layers(), most)


def test_states_in_which_it_has_no_meaning() -> None:
    with pytest.raises(UnknownAdapterError):
        pk.limit_norms_(nn.Linear(4, 4), 1.0)
    with pytest.raises(UnknownAdapterError):
        pk.limit_norms_(two_layers(), 1.0, "c")
    model = two_layers()
    pk.merge(model, "b")
    with pytest.raises(MergeStateError, match="b is merged into 1"):
        pk.limit_norms_(model, 1.0)
    assert pk.limit_norms_(model, 1e-3, "a")
