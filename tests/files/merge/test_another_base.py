"""Merging into another base than the adapter was trained on: reapplied or transplanted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import MismatchError, OptionError, WrongBaseError
from tests.support.files import listing, load, require_bits, write
from tests.support.merging import other
from tests.support.models import adapt, net, state
from tests.support.numbers import close
from tests.support.zoo import ADAPTERS, train


def cayley(Q: Tensor) -> Tensor:
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return (identity + Q) @ torch.linalg.inv(identity - Q)


def skew(upper: Tensor, size: int) -> Tensor:
    """Q (k, b, b) of the upper triangles, row by row."""
    Q = torch.zeros(len(upper), size, size, dtype=torch.float64)
    i, j = torch.triu_indices(size, size, 1)
    Q[:, i, j] = upper.double()
    return Q - Q.mT


def rotated(W: Tensor, Q: Tensor) -> Tensor:
    return torch.cat([R @ rows for R, rows in zip(cayley(Q), W.split(Q.shape[1]), strict=True)])


def low_rank(p: Mapping[str, Tensor], up: str = "up", down: str = "down") -> Tensor:
    return p[up].double() @ p[down].double()


def dora_law(p: Mapping[str, Tensor], W0: Tensor, W: Tensor, strength: float) -> Tensor:
    """m counts relative to the norms of the base it was trained on: t = (m/‖W0‖)·‖W‖/‖W + V‖; V has α/r = 1/2."""
    V = W + 0.5 * low_rank(p, "inner.up", "inner.down")
    t = p["magnitude"].double() / W0.norm(dim=1) * W.norm(dim=1) / V.norm(dim=1)
    return strength * (t[:, None] * V - W)


#: case -> ΔW at a strength on a base W, of one trained on W0
LAWS: dict[str, Callable[[Mapping[str, Tensor], Tensor, Tensor, float], Tensor]] = {
    "dora": dora_law,
    "oft": lambda p, W0, W, s: s * (rotated(W, skew(p["skew"], 4)) - W),
    "oft geodesic": lambda p, W0, W, s: rotated(W, s * skew(p["skew"], 4)) - W,
    "ia3": lambda p, W0, W, s: s * p["gate"].double()[:, None] * W,
    "ia3 in": lambda p, W0, W, s: s * p["gate"].double() * W,
    "glora": lambda p, W0, W, s: 0.5 * s * (W @ low_rank(p, "base_up", "base_down") + low_rank(p)),
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "oft geodesic": ("oft", {"block_size": 4, "path": "geodesic"}),
    **{case: (ADAPTERS[case].kind, ADAPTERS[case].options) for case in ("dora", "oft", "ia3", "ia3 in", "glora")},
}


@pytest.mark.parametrize("strength", [0.7, -0.5])
@pytest.mark.parametrize("case", LAWS)
def test_on_another_base_adapters_are_reapplied_or_transplanted_as_the_formulas_say(
    case: str, strength: float, tmp_path: Path
) -> None:
    """MATH.md §6: W' + ΔW(W'), or W' + ΔW(W0) with the origin; and the plan says how far they are apart."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": nn.Linear(8, 12)})
    W0 = model["lin"].weight.detach().clone()
    changed = {k: t * 1.5 + 0.1 * torch.randn_like(t) for k, t in state(model).items()}
    origin, base = write(tmp_path / "origin.safetensors", state(model)), write(tmp_path / "base.safetensors", changed)
    kind, options = OPTIONS[case]
    pk.wrap(model, kind, **options)
    train(model)
    p = {key.removeprefix("lin."): t for key, t in pk.adapter_state_dict(model).items()}
    file = pk.save(model, tmp_path / "a.safetensors")
    W = changed["lin.weight"].double()
    law = LAWS[case]
    reapplied, transplanted = law(p, W0.double(), W, strength), law(p, W0.double(), W0.double(), strength)
    out = tmp_path / "out.safetensors"
    pk.merge_checkpoint(base, {file: strength}, out, other_base=True)
    close(load(out)["lin.weight"], W + reapplied, 1e-6, "reapply")
    with pytest.raises(OptionError, match="origin="):
        pk.merge_checkpoint(base, {file: strength}, out, rebase="transplant", other_base=True)
    pk.merge_checkpoint(base, {file: strength}, out, rebase="transplant", origin=origin)
    close(load(out)["lin.weight"], W + transplanted, 1e-6, "transplant")
    gap = law(p, W0.double(), W, 1.0) - law(p, W0.double(), W0.double(), 1.0)
    size = law(p, W0.double(), W0.double(), 1.0).norm()
    for rebase in ("reapply", "transplant"):
        plan = pk.plan_merge(base, {file: strength}, rebase=rebase, origin=origin)
        assert plan.patches[0].law == rebase
        assert plan.patches[0].difference == pytest.approx(float(gap.norm() / size), rel=1e-4)
    assert pk.plan_merge(base, {file: strength}, other_base=True).patches[0].difference is None
    pk.merge_checkpoint(base, {file: strength}, out, rebase="reapply", origin=origin)
    close(load(out)["lin.weight"], W + reapplied, 1e-6, "reapply with an origin")


def test_additive_adapters_are_the_same_on_any_base(tmp_path: Path) -> None:
    model = net()
    origin = write(tmp_path / "origin.safetensors", state(model))
    base = write(tmp_path / "base.safetensors", other(model, 0.1))
    adapt(model, "loha")
    file = pk.save(model, tmp_path / "a.safetensors")
    outs = []
    for options in ({"other_base": True}, {"rebase": "transplant", "origin": origin}, {"origin": origin}):
        pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors", **options)
        outs.append(load(tmp_path / "out.safetensors"))
    require_bits(outs[0], outs[1])
    require_bits(outs[0], outs[2])


@pytest.mark.parametrize("case", ["dora", "oft", "glora"])
def test_an_origin_that_is_not_the_base_the_file_was_trained_on_is_noticed(case: str, tmp_path: Path) -> None:
    model = net()
    base = write(tmp_path / "base.safetensors", other(model, 0.1))
    wrong = write(tmp_path / "wrong.safetensors", other(model, 0.3))
    adapt(model, case)
    file = pk.save(model, tmp_path / "a.safetensors")
    with pytest.raises(WrongBaseError):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", rebase="transplant", origin=wrong)


def test_an_origin_of_another_layout_or_shape_is_refused(tmp_path: Path) -> None:
    model = net()
    base = write(tmp_path / "base.safetensors", other(model, 0.1))
    adapt(model, "ia3", only=["lin"])
    file = pk.save(model, tmp_path / "a.safetensors")
    for i, changed in enumerate(({"bare.weight": torch.ones(2, 2)}, {"lin.weight": torch.ones(12, 9)})):
        origin = write(tmp_path / f"origin{i}.safetensors", changed)
        before = listing(tmp_path)
        with pytest.raises((MismatchError, WrongBaseError)):
            pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", rebase="transplant", origin=origin)
        assert listing(tmp_path) == before
