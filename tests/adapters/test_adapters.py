"""What each algorithm promises beyond the laws: counts, bounds, initialisations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import OFT, LoLDU, registry
from peftkit.adapters.cayley import cayley, skew_blocks, upper_triangle
from peftkit.adapters.loldu import INITS
from peftkit.adapters.options import factory
from peftkit.delta import Delta
from peftkit.geometry import Shape
from peftkit.kernels.ldu import factor, pivot
from tests.support.zoo import train


def count(layers: list[nn.Module], kind: str, **options: Any) -> int:
    return pk.plan(nn.ModuleList(layers), kind, **options).parameters


def meta(*shape: int, n: int) -> list[nn.Module]:
    return [nn.Linear(shape[1], shape[0], bias=False, device="meta") for _ in range(n)]


class TestCounts:
    """Parameter counts by formula, and those the papers print."""

    def test_loldu_paper(self) -> None:
        vit, llama = meta(768, 768, n=24), meta(4096, 4096, n=64)  # query and value of ViT-B and of LLaMA-2-7B
        assert count(vit, "loldu", rank=768, train_scale=False) == 18_432
        assert count(vit, "loldu", rank=768) == 18_456
        assert count(llama, "loldu", rank=256, train_scale=False) == 16_384
        assert count(llama, "loldu", rank=256) == 16_448

    @pytest.mark.parametrize(
        "kind, options, expected",
        [
            ("lora", {"rank": 4}, lambda p, q, K: 4 * (p + q * K)),
            ("lora", {"rank": 4, "tucker": True}, lambda p, q, K: 4 * (p + q) + 16 * K),
            ("loha", {"rank": 4}, lambda p, q, K: 8 * (p + q * K)),
            ("loha", {"rank": 4, "tucker": True}, lambda p, q, K: 8 * (p + q) + 32 * K),
            ("lokr", {"factor": 8}, lambda p, q, K: 64 + (p // 8) * (q // 8) * K),
            ("lokr", {"factor": 8, "rank": 2}, lambda p, q, K: 64 + 2 * (p // 8 + q // 8 * K)),
            ("lokr", {"factor": 8, "rank": 2, "decompose_both": True}, lambda p, q, K: 32 + 2 * (p // 8 + q // 8 * K)),
            ("dora", {"rank": 4}, lambda p, q, K: 4 * (p + q * K) + p),
            ("dora", {"rank": 4, "axis": "in"}, lambda p, q, K: 4 * (p + q * K) + q),
            ("oft", {"block_size": 8}, lambda p, q, K: p // 8 * 28),
            ("oft", {"blocks": 4, "rescale": True}, lambda p, q, K: 4 * (p // 4) * (p // 4 - 1) // 2 + p),
        ],
        ids=lambda value: "" if callable(value) else str(value),
    )
    def test_formulas(self, kind: str, options: dict[str, Any], expected: Any) -> None:
        assert count([nn.Conv2d(64, 96, 3)], kind, **options) == expected(96, 64, 9)


class TestLoLDU:
    @pytest.mark.parametrize("init", INITS)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_no_effect_at_the_start(self, init: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        layer, x = nn.Linear(12, 16).to(dtype), torch.randn(3, 12).to(dtype)
        before = layer(x)
        pk.wrap(layer, "loldu", rank=12, alpha=3, init=init)
        assert torch.equal(layer(x), before)
        adapter = layer.adapters["default"]
        start = adapter.start
        expected = {"zeros": 0.0, "ones": 1.0, "constant": start[0].item()}.get(init)
        if expected is not None:
            assert (start == expected).all()
        else:
            assert start.std() > 0

    @pytest.mark.parametrize(
        "matrix",
        [
            torch.randn(9, 6, generator=torch.Generator().manual_seed(0)),
            torch.randn(6, 9, generator=torch.Generator().manual_seed(0)),
            torch.zeros(4, 5),
            torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
            torch.outer(torch.arange(1.0, 6), torch.arange(2.0, 6)),
            torch.randn(6, 3, generator=torch.Generator().manual_seed(0))[:, [0, 0, 1, 2]],
            torch.tensor([[1e-30, 1.0], [1e-30, 1.0]]),
        ],
        ids=["tall", "wide", "zero", "nilpotent", "rank 1", "twin columns", "tiny pivot"],
    )
    def test_the_factors_are_bounded_and_rebuild_the_weight(self, matrix: Tensor) -> None:
        W = matrix.double()
        rank = min(W.shape)
        left, pivots, right = factor(W, pivot(W, rank))
        torch.testing.assert_close(left @ torch.diag(pivots) @ right, W, rtol=1e-12, atol=1e-12)
        assert left.abs().max() <= 1 + 1e-12
        assert right.abs().max() <= 1e3 + 1e-9

    def test_the_first_pivots_are_those_of_the_whole_matrix(self) -> None:
        torch.manual_seed(0)
        W = torch.randn(40, 30, dtype=torch.float64)
        P, L, U = torch.linalg.lu(W)
        left, pivots, right = factor(W, pivot(W, 7))
        torch.testing.assert_close(left, (P @ L)[:, :7])
        torch.testing.assert_close(pivots, U.diagonal()[:7])
        torch.testing.assert_close(pivots[:, None] * right, U[:7])

    def test_gradients_are_those_of_the_formula(self) -> None:
        """dL/dδ_k = l_kᵀ·G·u_k, dL/dz = σ·dL/dδ, dL/dσ = Σ z_k·dL/dδ_k."""
        torch.manual_seed(0)
        W = torch.randn(8, 6, dtype=torch.float64)
        adapter = registry.build("loldu", Shape(8, 6), W, rank=5, alpha=2)
        assert isinstance(adapter, LoLDU)
        G = torch.randn(8, 6, dtype=torch.float64)
        (adapter(W, 1.0).dense() * G).sum().backward()
        through = torch.einsum("mk,mn,kn->k", adapter.left, G, adapter.right)
        z, sigma = adapter.start + adapter.shift.detach(), adapter.start_scale + adapter.scale_shift.detach()
        torch.testing.assert_close(adapter.shift.grad, sigma * through)
        torch.testing.assert_close(adapter.scale_shift.grad, (z * through).sum()[None])

    @pytest.mark.parametrize("epsilon", [1e-3, 1e-6])
    @pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6)])
    @pytest.mark.parametrize("sigma", [None, 1e-9, -0.5, -50.0])
    def test_projection_is_exact(self, sigma: float | None, dtype: torch.dtype, bound: float, epsilon: float) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(12, 16).to(dtype)
        pk.wrap(layer, "loldu", rank=8, epsilon=epsilon)
        train(layer, size=1.0)
        adapter = layer.adapters["default"]
        if sigma is not None:
            with torch.no_grad():
                adapter.scale_shift.fill_(sigma - adapter.start_scale)
        before = adapter(layer.weight, 1.0).dense()
        assert before.norm() > epsilon
        pk.project_(layer)
        after = adapter(layer.weight, 1.0).dense()
        assert after.double().norm().item() == pytest.approx(epsilon, rel=bound)
        torch.testing.assert_close(after / epsilon, before / before.norm(), rtol=0, atol=10 * bound)
        pk.project_(layer)
        torch.testing.assert_close(adapter(layer.weight, 1.0).dense(), after, rtol=10 * bound, atol=0)

    def test_projection_from_an_optimiser_hook(self) -> None:
        torch.manual_seed(0)
        layer, x = nn.Linear(12, 16), torch.randn(32, 12)
        pk.wrap(layer, "loldu", rank=8, epsilon=0.1)
        optimizer = torch.optim.SGD(pk.adapter_parameters(layer), lr=1.0)
        optimizer.register_step_post_hook(lambda *_: pk.project_(layer))
        for _ in range(5):
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
        assert layer.adapters["default"](layer.weight, 1.0).sqnorm().sqrt() <= 0.1 * (1 + 1e-5)


class TestOFT:
    @pytest.mark.parametrize("side", ["out", "in"])
    @pytest.mark.parametrize("options", [{"block_size": 8}, {"blocks": 2, "constraint": 0.05}], ids=str)
    def test_orthogonal_after_training_in_bf16(self, side: str, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        layer, x = nn.Linear(32, 48).to(torch.bfloat16), torch.randn(16, 32).to(torch.bfloat16)
        target = torch.randn(16, 48).to(torch.bfloat16)
        pk.wrap(layer, "oft", side=side, dtype=torch.bfloat16, **options)
        optimizer = torch.optim.AdamW(pk.adapter_parameters(layer), lr=0.05)
        first = None
        for _ in range(50):
            loss = (layer(x) - target).square().mean()
            first = loss.item() if first is None else first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < first
        adapter = layer.adapters["default"]
        R = adapter(layer.weight, 1.0).K + torch.eye(adapter.size)
        assert R.dtype == torch.float32
        assert (R.mT @ R - torch.eye(adapter.size)).abs().max() <= 1e-5
        assert (R - torch.eye(adapter.size)).abs().max() > 1e-2

    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
    def test_the_cayley_map_is_its_definition_twice_differentiated(self, shape: tuple[int, ...]) -> None:
        *stages, size = shape
        skew = torch.randn(*stages, size * (size - 1) // 2, dtype=torch.float64, requires_grad=True)
        upper, eye = upper_triangle(size, skew.device), torch.eye(size, dtype=torch.float64)
        Q = skew_blocks(skew, upper, size)
        torch.testing.assert_close(cayley(skew, upper, size), (eye + Q) @ torch.linalg.inv(eye - Q) - eye)
        assert torch.autograd.gradcheck(lambda skew: cayley(skew, upper, size), skew)
        assert torch.autograd.gradgradcheck(lambda skew: cayley(skew, upper, size), skew)

    def test_the_constraint_bounds_the_generator(self) -> None:
        layer = nn.Linear(32, 48)
        pk.wrap(layer, "oft", block_size=8, constraint=1e-3)
        train(layer, size=1.0)
        assert layer.adapters["default"].generator().norm().item() == pytest.approx(1e-3 * 48)

    def test_geodesic_strength_is_a_rotation_and_minus_one_its_inverse(self) -> None:
        torch.manual_seed(0)
        layer = nn.Linear(8, 12).double()
        W = layer.weight.detach().clone()
        pk.wrap(layer, "oft", block_size=4, path="geodesic")
        train(layer, size=0.5)
        norms = W.norm(dim=0)
        for strength in (-1.0, 0.3, 0.7, 2.0):
            pk.set_strength(layer, strength)
            pk.merge(layer)
            torch.testing.assert_close(layer.weight.norm(dim=0), norms, rtol=1e-12, atol=1e-12)
            pk.restore(layer)
        pk.set_strength(layer, 1.0)
        pk.merge(layer)
        pk.unwrap(layer, keep_merged=True)
        rotated = layer.weight.detach().clone()
        pk.wrap(layer, "oft", block_size=4, path="geodesic")
        train(layer, size=0.5)  # the same draw
        pk.set_strength(layer, -1.0)
        pk.merge(layer)
        torch.testing.assert_close(layer.weight, W, rtol=1e-12, atol=1e-12)
        assert not torch.equal(rotated, W)

    @pytest.mark.parametrize(
        "options, size", [({}, 24), ({"block_size": 7}, 6), ({"blocks": 3}, 16), ({"block_size": 100}, 48)], ids=str
    )
    def test_block_sizes(self, options: dict[str, Any], size: int) -> None:
        adapter = registry.build("oft", Shape(48, 5), torch.randn(48, 5), **options)
        assert isinstance(adapter, OFT)
        assert adapter.size == size


class TestDoRA:
    def test_the_norms_are_those_of_the_dense_weight(self) -> None:
        torch.manual_seed(0)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)):
            layer = nn.Linear(64, 48).to(dtype)
            for inner in ("lora", "loha", "lokr"):
                options = {"factor": 4} if inner == "lokr" else {"rank": 4}
                pk.wrap(layer, inner, decompose=True, **options)
                train(layer, size=0.05)
                adapter = layer.adapters["default"]
                delta = adapter(layer.weight, 1.0)
                W = layer.weight.to(delta.dtype)
                norm = (W + delta.V.dense()).norm(dim=1)
                torch.testing.assert_close(delta.f, adapter.magnitude / norm, rtol=bound, atol=0)
                pk.unwrap(layer)

    def test_rows_of_zeros(self) -> None:
        layer, x = nn.Linear(6, 8), torch.randn(2, 6)
        with torch.no_grad():
            layer.weight[2] = 0
            layer.weight[:, 1] = 0
        before = layer(x)
        for axis in ("out", "in"):
            pk.wrap(layer, "dora", rank=2, axis=axis)
            assert torch.equal(layer(x), before)
            layer(x).square().sum().backward()
            train(layer, size=0.01)
            assert layer(x).isfinite().all()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in pk.adapter_parameters(layer))
            pk.unwrap(layer)

    def test_nothing_trains_through_a_held_norm(self) -> None:
        """The detached gradient is the full one with ‖W + V‖ taken for a constant."""
        torch.manual_seed(0)
        W, G = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
        held, full = (registry.build("dora", Shape(6, 5), W, rank=2, detach_norm=detach) for detach in (True, False))
        full.load_state_dict(held.state_dict())
        with torch.no_grad():
            for a, b in zip(held.parameters(), full.parameters(), strict=True):
                a.add_(0.1 * torch.randn_like(a))
                b.copy_(a)
        for adapter in (held, full):
            (adapter(W, 1.0).dense() * G).sum().backward()
        V = held.inner.delta(W).dense().detach()
        n = (W + V).norm(dim=1, keepdim=True)
        unit, m = (W + V) / n, held.magnitude.detach()[:, None]
        for adapter, dV in ((held, m / n * G), (full, m / n * (G - unit * (G * unit).sum(1, keepdim=True)))):
            torch.testing.assert_close(adapter.inner.up.grad, dV @ adapter.inner.down.mT.detach())
            torch.testing.assert_close(adapter.magnitude.grad, (G * unit).sum(1))


class TestScale:
    @pytest.mark.parametrize("alpha, rslora, gamma", [(None, False, 1), (2, False, 0.5), (2, True, 1), (None, True, 2)])
    def test_lora(self, alpha: float | None, rslora: bool, gamma: float) -> None:
        adapter = registry.build("lora", Shape(6, 5), torch.randn(6, 5), rank=4, alpha=alpha, rslora=rslora)
        with torch.no_grad():
            adapter.up.normal_()
        torch.testing.assert_close(adapter(torch.empty(0), 1.0).dense(), gamma * adapter.up @ adapter.down)

    def test_lokr_with_both_blocks_full(self) -> None:
        shape, W = Shape(16, 16), torch.randn(16, 16)
        assert registry.build("lokr", shape, W, factor=4, alpha=3).scale == 1
        assert registry.build("lokr", shape, W, factor=4, rank=64, alpha=8, full_scale="alpha/rank").scale == 0.125
        assert registry.build("lokr", shape, W, factor=4, rank=1, alpha=0.5).scale == 0.5

    def test_parameters_are_at_least_fp32_unless_asked(self) -> None:
        for base, own in (
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float64, torch.float64),
        ):
            for kind in pk.kinds():
                layer = nn.Linear(32, 32).to(base)
                pk.wrap(layer, kind)
                assert {p.dtype for p in pk.adapter_parameters(layer)} == {own}
                pk.unwrap(layer)
                pk.wrap(layer, kind, dtype=torch.bfloat16)
                assert {p.dtype for p in pk.adapter_parameters(layer)} == {torch.bfloat16}


def test_a_small_partial_factorisation_costs_little() -> None:
    """O(r²(m + n)): the panel's operations, counted, against those of a full LU."""
    from torch.utils.flop_counter import FlopCounterMode

    W = torch.randn(512, 512)
    with FlopCounterMode(display=False) as counter:
        factor(W, pivot(W, 16))
    assert counter.get_total_flops() < 2 / 3 * 512**3 / 20


@dataclass(frozen=True, eq=False)
class Rows(Delta):
    """ΔW = diag(s)·W, with nothing but what a structure must have."""

    s: Tensor
    W: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.W.shape[0], self.W.shape[1]

    def dense(self) -> Tensor:
        return self.s[:, None] * self.W

    def scaled(self, strength: float | Tensor) -> Rows:
        return Rows(self.s * strength, self.W)


class RowScale(pk.Adapter):
    """ΔW = diag(s)·W with s (m,) = 0 at the start."""

    reads_base = True

    def __init__(self, shape: Shape, weight: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(shape.rows, **factory(weight)))

    def delta(self, weight: Tensor) -> Rows:
        return Rows(self.s, weight)


def test_a_structure_needs_three_members_and_an_adapter_one_method(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    pk.register("rows")(RowScale)
    for make, x in (
        (lambda: nn.Linear(6, 8), torch.randn(3, 6)),
        (lambda: nn.Conv2d(4, 8, 3, groups=2, padding_mode="circular", padding=1), torch.randn(1, 4, 5, 5)),
        (lambda: nn.ConvTranspose1d(4, 8, 3, groups=2), torch.randn(1, 4, 5)),
    ):
        layer = make()
        before = layer(x)
        pk.wrap(layer, "rows")
        assert torch.equal(layer(x), before)
        train(layer)
        trained = layer(x)
        path = pk.save(layer, tmp_path / "rows.safetensors")
        pk.merge(layer)
        torch.testing.assert_close(layer(x), trained)
        pk.restore(layer)
        pk.unwrap(layer)
        assert torch.equal(layer(x), before)
        pk.load(layer, path)
        assert torch.equal(layer(x), trained)
        assert pk.check(layer, x).ok
