"""The scale α/r and the magnitudes of DoRA, as every writer means them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import AmbiguousFileError, FileError, OptionError
from tests.support.files import keyed, write
from tests.support.foreign import DOWN, HEAD, PRODUCT, UP, delta_of, dora_file, loaded_on_head, require_delta
from tests.support.models import conv_net

# -- the scale ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_is_one_number_of_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    model = loaded_on_head({**HEAD, "alpha": torch.full(shape, 6, dtype=dtype)}, tmp_path)
    require_delta(model, "heads.0", 2 * PRODUCT)


def test_without_an_alpha_the_scale_is_one(tmp_path: Path) -> None:
    require_delta(loaded_on_head(HEAD, tmp_path), "heads.0", PRODUCT)


def test_an_alpha_of_zero_is_asked_about(tmp_path: Path) -> None:
    """A1111, ComfyUI, Forge and diffusers read it as off, sd-scripts and LyCORIS as the rank."""
    tensors = {**HEAD, "alpha": torch.tensor(0.0)}
    with pytest.raises(AmbiguousFileError, match="alpha_zero"):
        loaded_on_head(tensors, tmp_path)
    require_delta(loaded_on_head(tensors, tmp_path, alpha_zero="rank"), "heads.0", PRODUCT)
    require_delta(loaded_on_head(tensors, tmp_path, alpha_zero="off"), "heads.0", 0 * PRODUCT)
    with pytest.raises(OptionError, match="alpha_zero"):
        loaded_on_head(tensors, tmp_path, alpha_zero="zero")


@pytest.mark.parametrize("alpha", [torch.tensor([1.0, 2.0]), torch.tensor(float("nan")), torch.tensor(float("inf"))])
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="alpha"):
        loaded_on_head({**HEAD, "alpha": alpha}, tmp_path)


def test_two_full_factors_of_lokr_have_no_scale(tmp_path: Path) -> None:
    """Alpha is ignored; with one factor of low rank it is divided by that, with two by w2's."""
    w1, w2 = torch.randn(4, 2), torch.randn(6, 8)
    model = loaded_on_head({"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(5.0)}, tmp_path)
    require_delta(model, "heads.0", torch.kron(w1, w2))
    a, b = torch.randn(6, 3), torch.randn(3, 8)
    model = loaded_on_head({"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}, tmp_path)
    require_delta(model, "heads.0", 2 * torch.kron(w1, a @ b))
    c, d = torch.randn(4, 2), torch.randn(2, 2)
    model = loaded_on_head({"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2": w2, "alpha": torch.tensor(6.0)}, tmp_path)
    require_delta(model, "heads.0", 3 * torch.kron(c @ d, w2))
    both = {"lokr_w1_a": c, "lokr_w1_b": d, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(6.0)}
    require_delta(loaded_on_head(both, tmp_path), "heads.0", 2 * torch.kron(c @ d, a @ b))


@pytest.mark.parametrize("old", [True, False])
def test_both_layouts_of_glora_are_read(old: bool, tmp_path: Path) -> None:
    a1, a2, b1, b2 = torch.randn(16, 3), torch.randn(3, 16), UP, DOWN
    file = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2, "alpha": torch.tensor(1.5)}
    if old:
        file |= {"a1.weight": a2, "a2.weight": a1, "b1.weight": b2, "b2.weight": b1}
    model = loaded_on_head(file, tmp_path)
    W = model.get_submodule("heads.0").weight.detach().double()
    expected = 0.5 * (W @ a1.double() @ a2.double() + b1.double() @ b2.double())
    require_delta(model, "heads.0", expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_factors_are_read_as_the_numbers_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in HEAD.items()}
    model = loaded_on_head(tensors, tmp_path)
    require_delta(model, "heads.0", tensors["lora_up.weight"].float() @ tensors["lora_down.weight"].float())


# -- DoRA --------------------------------------------------------------------------------------------------------------

DORA = {
    "heads.0": {"out": [(24, 1), (24,)], "in": [(1, 16), (16,)]},
    "stem": {"out": [(8, 1, 1, 1), (8,)], "in": [(1, 4, 1, 1), (4,)]},
    "block.down": {"out": [(16, 1, 1, 1)], "in": [(1, 16, 1, 1)]},
    "block.point": {"out": [(16, 1, 1, 1), (16,)], "in": [(1, 8, 1, 1), (8,)]},
}


@pytest.mark.parametrize(
    "name, axis, shape",
    [(name, axis, shape) for name, axes in DORA.items() for axis, shapes in axes.items() for shape in shapes],
)
def test_the_shape_of_a_magnitude_says_its_axis(name: str, axis: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    model, _ = conv_net()
    tensors, expected = dora_file(model.get_submodule(name), axis, shape)
    W: Any = model.get_submodule(name).weight
    pk.load(model, write(tmp_path / "a.safetensors", keyed(f"lycoris_{name.replace('.', '_')}", tensors)))
    assert (delta_of(model, name) - expected.flatten(1)).norm() <= 1e-6 * (expected.norm() + W.norm())


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_a_bare_vector_on_a_square_weight_asks(layer: str, axis: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"square": nn.Linear(6, 6) if layer == "linear" else nn.Conv2d(6, 6, 3)})
    tensors, expected = dora_file(model["square"], axis, (6,))
    path = write(tmp_path / "a.safetensors", keyed("lycoris_square", tensors))
    with pytest.raises(AmbiguousFileError, match="dora_axis"):
        pk.load(model, path)
    pk.load(model, path, dora_axis=axis)
    W: Any = model["square"].weight
    assert (delta_of(model, "square") - expected.flatten(1)).norm() <= 1e-6 * (expected.norm() + W.norm())


@pytest.mark.parametrize("tail", ["", ".weight", ".default.weight"])
@pytest.mark.parametrize("name, shape", [("heads.0", (24,)), ("stem", (1, 8, 1, 1))])
def test_pefts_magnitude_is_per_output_whatever_its_shape(
    name: str, shape: tuple[int, ...], tail: str, tmp_path: Path
) -> None:
    model, _ = conv_net()
    tensors, expected = dora_file(model.get_submodule(name), "out", shape)
    file = {
        f"unet.{name}.lora_B.weight": tensors["lora_up.weight"],
        f"unet.{name}.lora_A.weight": tensors["lora_down.weight"],
        f"unet.{name}.lora_magnitude_vector{tail}": tensors["dora_scale"],
    }
    W: Any = model.get_submodule(name).weight
    pk.load(model, write(tmp_path / "a.safetensors", file))
    assert (delta_of(model, name) - expected.flatten(1)).norm() <= 1e-6 * (expected.norm() + W.norm())
