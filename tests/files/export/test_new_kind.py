"""A kind that other programs read is stated in one file, its own: nothing in the export has to know of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.adapters.form import Additive, Form
from peftkit.adapters.options import factory
from peftkit.delta import Delta, Dense
from peftkit.errors import ExportError
from peftkit.files.export import programs
from peftkit.files.export.encode import encode
from peftkit.files.export.programs import Target
from peftkit.files.export.tensors import ModuleTensors, tensors_of
from peftkit.geometry import Shape

SHAPE = Shape(6, 4)


@dataclass(frozen=True)
class GainForm(Form):
    """One factor of the whole weight, for programs that have "gain"."""

    gain: Tensor

    def structure(self, program: Target) -> str:
        return "gain"

    def refusal(self, program: Target, shape: Shape) -> str:
        return "" if "gain" in program.reads else f"{program.title} has no gain"

    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        return {"gain": self.gain}


@dataclass(frozen=True, repr=False, eq=False)
class Outer(Dense):
    """ΔW = u·vᵀ, of which this library has no other structure."""

    structure: ClassVar[str] = "outer"


@dataclass(frozen=True)
class OuterForm(Additive):
    def tensors(self, program: Target, shape: Shape, alpha: float) -> dict[str, Tensor]:
        return {"outer": self.delta.dense()}


class Gain(Adapter):
    """ΔW = g·W."""

    reads_base: ClassVar[bool] = True

    def __init__(self, shape: Shape, weight: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(1, **factory(weight)))

    def delta(self, weight: Tensor) -> Delta:
        return Dense(self.gain * weight)

    def form(self, weight: Tensor) -> GainForm:
        return GainForm(self.gain.detach())


class OuterProduct(Adapter):
    """ΔW = u·vᵀ."""

    additive = OuterForm

    def __init__(self, shape: Shape, weight: Tensor) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.ones(shape.rows, 1, **factory(weight)))
        self.v = nn.Parameter(torch.ones(1, shape.columns, **factory(weight)))

    def delta(self, weight: Tensor) -> Outer:
        return Outer(self.u @ self.v)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    registry.register("gain")(Gain)
    registry.register("outer")(OuterProduct)


def written(kind: str, target: Target, base: Tensor | None = None) -> tuple[str, str, dict[str, Tensor]]:
    """How the adapter goes out, as what, and the tensors of its module."""
    adapter = registry.build(kind, SHAPE, torch.ones(6, 4))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.5)
    encoding = encode(adapter, target, SHAPE, base)
    tensors = tensors_of([ModuleTensors("m", encoding, SHAPE)], target, 1.0, None, Path("out"))
    return encoding.how, encoding.structure, tensors


@pytest.mark.parametrize("kind", ["gain", "outer"])
def test_a_program_that_reads_it_gets_its_own_tensors(kind: str) -> None:
    comfyui = programs.get("comfyui")
    how, structure, tensors = written(kind, replace(comfyui, reads=comfyui.reads | {kind}))
    assert (how, structure, set(tensors)) == ("exact", kind, {f"m.{kind}"})


def test_other_programs_get_the_same_change_in_another_structure() -> None:
    how, structure, tensors = written("outer", programs.get("comfyui"))
    assert (how, structure) == ("low rank", "full")
    torch.testing.assert_close(tensors["m.diff"], torch.full((6, 4), 2.25))


def test_what_reads_its_base_is_baked_or_refused_with_the_programs_reason() -> None:
    how, structure, tensors = written("gain", programs.get("comfyui"), torch.ones(6, 4))
    assert (how, structure) == ("baked", "full")
    torch.testing.assert_close(tensors["m.diff"], torch.full((6, 4), 0.5))
    with pytest.raises(ExportError, match=r"ComfyUI has no gain; give the base"):
        written("gain", programs.get("comfyui"))
