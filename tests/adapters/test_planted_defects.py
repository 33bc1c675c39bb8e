"""The laws are only as good as what they catch: three defects that real libraries have shipped, planted."""

from __future__ import annotations

import pytest
from torch import Tensor

from peftkit.delta import Hadamard
from peftkit.geometry import Geometry
from peftkit.kernels import outputs
from peftkit.wrapping.backup import Copy
from tests.support import laws


def test_the_laws_hold_before_anything_is_planted() -> None:
    laws.forward_is_merged("loha", "linear")
    laws.forward_is_merged("oft", "linear")
    laws.forward_is_merged("lora", "conv2d reflect")
    laws.routes_agree("lora", "conv2d reflect")


def test_scaling_twice_when_merging_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Hadamard.rows_

    def scaled_again(self: Hadamard, block: slice, out: Tensor) -> None:
        original(self, block, out)
        out.mul_(0.5)  # γ = α/r of this case, applied once more

    monkeypatch.setattr(Hadamard, "rows_", scaled_again)
    for law in (laws.forward_is_merged, laws.algebra_is_dense, laws.restore_is_exact):
        with pytest.raises(AssertionError):
            law("loha", "linear")


def test_rotating_the_bias_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = outputs.rotated

    def with_bias(y: Tensor, K: Tensor, bias: Tensor | None, spatial: int) -> Tensor:
        del bias
        return original(y, K, None, spatial)  # R·(Wx + b)

    monkeypatch.setattr(outputs, "rotated", with_bias)
    for law in (laws.routes_agree, laws.forward_is_merged):
        with pytest.raises(AssertionError):
            law("oft", "linear")


def test_ignoring_the_padding_mode_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Geometry.contract

    def zero_padded(self: Geometry, x: Tensor, A: Tensor) -> Tensor:
        plain = object.__new__(Geometry)
        plain.__dict__.update(self.__dict__, pad_mode="zeros")
        return original(plain, x, A)

    monkeypatch.setattr(Geometry, "contract", zero_padded)
    for law in (laws.routes_agree, laws.forward_is_merged):
        for layer in ("conv2d reflect", "conv2d circular g2"):
            with pytest.raises(AssertionError):
                law("lora", layer)
        law("lora", "conv2d k3")


def test_forgetting_a_group_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Geometry.expand
    monkeypatch.setattr(Geometry, "expand", lambda self, h, B: original(self, h, B.roll(len(B) // self.groups, 0)))
    with pytest.raises(AssertionError):
        laws.routes_agree("lora", "conv2d k1 g2")


def test_an_inexact_restore_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Copy.original
    monkeypatch.setattr(Copy, "original", lambda self, merged: original(self, merged) * (1 + 2**-20))
    with pytest.raises(AssertionError, match="bits differ"):
        laws.restore_is_exact("lora", "linear")
