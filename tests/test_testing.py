"""`check_laws`: every kind of the library keeps the laws, and a planted defect is found by the law it breaks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import LoRA, factory, registry
from peftkit.delta import Delta, InputDependent, LowRank
from peftkit.errors import LawError, OptionError, UnknownAdapterError
from peftkit.geometry import Geometry, Shape
from peftkit.testing.laws import LAYERS

#: options small enough for a layer of 8×12
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 1.5},
    "loha": {"rank": 2},
    "lokr": {"factor": 4},
    "loldu": {"rank": 4},
    "dora": {"rank": 3},
    "oft": {"block_size": 4},
    "boft": {"block_size": 6},
    "glora": {"rank": 2},
}


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))


LowRankType = TypeVar("LowRankType", bound=LowRank)


def planted(structure: type[LowRankType], plain: LowRank) -> LowRankType:
    """B·A with the methods of another class."""
    defect = object.__new__(structure)
    defect.__dict__.update(plain.__dict__)
    return defect


@dataclass(frozen=True, repr=False, eq=False)
class ScaledRows(LowRank):
    """γ = α/r applied once more where rows are written."""

    def rows_(self, block: slice, out: Tensor) -> None:
        super().rows_(block, out)
        out.mul_(0.5)


@dataclass(frozen=True, repr=False, eq=False)
class Gated(LowRank):
    """A gate that is read from the input, and not declared."""

    def scaled(self, strength: float | Tensor) -> Gated:
        return planted(Gated, super().scaled(strength))

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        return super().apply(x, wx, g) * torch.sigmoid(x.mean())

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        return out + self.apply(x, None, g)


@dataclass(frozen=True, repr=False, eq=False)
class OfTheOutput(Delta):
    """diag(s)·W, by the layer's output: with the bias in it, or without."""

    s: Tensor
    W: Tensor

    reads_output = True

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.W.shape
        return m, n

    def dense(self) -> Tensor:
        return self.s[:, None] * self.W

    def scaled(self, strength: float | Tensor) -> OfTheOutput:
        return type(self)(strength * self.s, self.W)

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        assert wx is not None
        return g.per_channel(self.s) * wx


@dataclass(frozen=True, repr=False, eq=False)
class WithTheBias(OfTheOutput):
    """diag(s)·(W·x + b) in place of diag(s)·W·x."""

    def apply_onto(self, out: Tensor, x: Tensor, y: Tensor, bias: Tensor | None, g: Geometry) -> Tensor:
        return out + self.apply(x, y, g)


@dataclass(frozen=True, repr=False, eq=False)
class Router(InputDependent):
    """Declared: a gate in front of s·W·x."""

    s: Tensor
    m: int
    n: int

    reads_output = True

    @property
    def shape(self) -> tuple[int, int]:
        return self.m, self.n

    @property
    def dtype(self) -> torch.dtype:
        return self.s.dtype

    @property
    def device(self) -> torch.device:
        return self.s.device

    def scaled(self, strength: float | Tensor) -> Router:
        return Router(strength * self.s, self.m, self.n)

    def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
        assert wx is not None
        return g.per_channel(self.s) * wx * torch.sigmoid(x.mean())


class Gains(pk.Adapter):
    """s (m,), zero."""

    def __init__(self, shape: Shape, weight: Tensor) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(shape.rows, **factory(weight)))


class RowGains(Gains):
    reads_base = True

    def delta(self, weight: Tensor) -> Delta:
        return OfTheOutput(self.s, weight)


class BiasedGains(Gains):
    reads_base = True

    def delta(self, weight: Tensor) -> Delta:
        return WithTheBias(self.s, weight)


class RoutedGains(Gains):
    def delta(self, weight: Tensor) -> Delta:
        return Router(self.s, len(weight), weight.numel() // len(weight))


class Deaf(Gains):
    """Its parameters are not in ΔW."""

    def delta(self, weight: Tensor) -> Delta:
        return LowRank(weight.new_zeros(len(weight), 1), weight.new_zeros(1, weight.numel() // len(weight)))


class Early(Gains):
    """Not zero at the start."""

    reads_base = True

    def delta(self, weight: Tensor) -> Delta:
        return OfTheOutput(self.s + 1e-8, weight)


class Curved(Gains):
    """`scaled` takes the square of the strength."""

    reads_base = True

    def delta(self, weight: Tensor) -> Delta:
        class Squared(OfTheOutput):
            def scaled(self, strength: float | Tensor) -> OfTheOutput:
                return super().scaled(strength * abs(strength))

        return Squared(self.s, weight)


class Detached(Gains):
    """The gradient of the factored route does not reach the parameter; that of `dense` does."""

    reads_base = True

    def delta(self, weight: Tensor) -> Delta:
        class Cut(OfTheOutput):
            def apply(self, x: Tensor, wx: Tensor | None, g: Geometry) -> Tensor:
                return super().apply(x, wx, g).detach()

        return Cut(self.s, weight)


def lora_of(structure: type[LowRank]) -> type[pk.Adapter]:
    class Planted(LoRA):
        def delta(self, weight: Tensor) -> Delta:
            plain = super().delta(weight)
            assert isinstance(plain, LowRank)
            return planted(structure, plain)

    return Planted


@pytest.mark.parametrize("kind", [kind for kind in pk.kinds() if registry.get(kind).__module__.startswith("peftkit.")])
def test_every_kind_keeps_the_laws(kind: str) -> None:
    state = torch.get_rng_state()
    report = pk.testing.check_laws(registry.get(kind), **OPTIONS.get(kind, {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert report.kind == kind
    assert {*report.held, *report.refused} == set(LAYERS)
    assert not report.refused
    for laws in report.held.values():
        assert len(laws) > 30
        assert {"rows_", "apply", "factored route", "forward = merged", "merge and restore", "save and load"} <= {*laws}
    table = str(report).splitlines()
    assert len(table) == 1 + len(report.held["Linear"]) + len(report.refused)
    assert all(layer in table[0] for layer in LAYERS)


@pytest.mark.parametrize(
    "make, law",
    [
        (lambda: lora_of(ScaledRows), "rows_"),
        (lambda: lora_of(Gated), "apply"),
        (lambda: BiasedGains, "apply_onto"),
        (lambda: Deaf, "training changes the output"),
        (lambda: Early, "identity: output"),
        (lambda: Curved, "strength is linear"),
        (lambda: Detached, "gradients, factored"),
    ],
)
def test_a_defect_is_found_by_its_law(make: Callable[[], type[pk.Adapter]], law: str) -> None:
    cls = pk.register("planted")(make())
    options = {"rank": 2} if issubclass(cls, LoRA) else {}
    with pytest.raises(
        LawError, match=rf"planted on Linear: '{law}' does not hold: .*difference is .*expected at most"
    ):
        pk.testing.check_laws("planted", **options)
    with pytest.raises(AssertionError):
        pk.testing.check_laws(cls, **options)


def test_the_same_structures_without_a_defect_pass() -> None:
    pk.register("row-gains")(RowGains)
    assert not pk.testing.check_laws("row-gains").refused


def test_a_change_that_depends_on_the_input_is_held_to_what_needs_no_matrix() -> None:
    pk.register("routed-gains")(RoutedGains)
    report = pk.testing.check_laws(RoutedGains)
    assert set(report.held) == set(LAYERS)
    assert {"identity: output", "merge is refused", "save and load"} <= {*report.held["Conv2d 3×3"]}
    assert "forward = merged" not in report.held["Conv2d 3×3"]


def test_what_cannot_be_checked_raises() -> None:
    with pytest.raises(UnknownAdapterError, match="RowGains is not registered"):
        pk.testing.check_laws(RowGains)
    with pytest.raises(OptionError, match="no option 'rnak'"):
        pk.testing.check_laws("lora", rnak=2)

    @pk.register("picky")
    class Picky(RowGains):
        def __init__(self, shape: Shape, weight: Tensor) -> None:
            raise OptionError(f"picky: no layer will do, {shape} was given")

    with pytest.raises(OptionError, match="picky"):
        pk.testing.check_laws(Picky)
