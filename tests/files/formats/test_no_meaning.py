"""Files that mean nothing, or more than one thing, are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import AmbiguousFileError, FileError, MismatchError, OptionError
from tests.support.files import State, keyed, write
from tests.support.foreign import DOWN, HEAD, PRODUCT, UP, loaded_on_head, require_delta
from tests.support.models import conv_net, tree

BROKEN: dict[str, tuple[State, str]] = {
    "a lone up": ({"lora_up.weight": UP}, "down"),
    "a lone down": ({"lora_down.weight": DOWN}, "up"),
    "a lone alpha": ({"alpha": torch.tensor(1.0)}, "alpha"),
    "a lone magnitude": ({"dora_scale": torch.ones(24, 1)}, "dora_scale"),
    "a lone magnitude with its alpha": ({"dora_scale": torch.ones(24, 1), "alpha": torch.tensor(1.0)}, "dora_scale"),
    "half a LoHa": ({"hada_w1_a": UP, "hada_w1_b": DOWN}, "hada_w2_a"),
    "half a core": ({**{f"hada_w{i}_{ab}": UP for i in "12" for ab in "ab"}, "hada_t1": UP}, "hada_t2"),
    "a lone w1": ({"lokr_w1": UP}, "lokr_w2"),
    "a w1 in one half": ({"lokr_w1_a": UP, "lokr_w2": DOWN}, "lokr_w1_b"),
    "a w2 twice": ({"lokr_w1": UP, "lokr_w2": DOWN, "lokr_w2_a": UP, "lokr_w2_b": DOWN}, "lokr_w2_a"),
    "two structures": ({**HEAD, "lokr_w1": UP, "lokr_w2": DOWN}, "lokr_w1"),
    "a change and factors": ({**HEAD, "diff": PRODUCT}, "diff"),
    "two magnitudes": ({**HEAD, "dora_scale": UP[:, :1], "lora_magnitude_vector": UP[:, 0]}, "magnitude"),
    "ranks that differ": ({"lora_up.weight": UP[:, :2], "lora_down.weight": DOWN}, "ranks"),
    "factors of LoHa that differ": (
        {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": UP, "hada_w2_b": DOWN[:, :8]},
        "differ",
    ),
    "part of a GLoRA": ({"a1.weight": DOWN.mT, "a2.weight": DOWN, "b1.weight": UP}, "b2"),
    "a lone rescale": ({"rescale": torch.ones(24, 1)}, "oft_blocks"),
    "numbers that are whole": ({"lora_up.weight": UP.long(), "lora_down.weight": DOWN}, "int64"),
    "a magnitude of another size": ({**HEAD, "dora_scale": torch.ones(7, 1)}, "dora_scale"),
}


@pytest.mark.parametrize("label", BROKEN)
def test_a_set_that_is_no_adapter_is_refused_by_name(label: str, tmp_path: Path) -> None:
    """The message names the module and the tensor, and nothing is changed."""
    tensors, what = BROKEN[label]
    model, _ = conv_net()
    with pytest.raises(FileError, match=what) as error:
        pk.load(model, write(tmp_path / "a.safetensors", keyed("lora_unet_heads_0", tensors)))
    assert "heads_0" in str(error.value)
    assert not any(hasattr(module, "adapters") for module in model.modules())


WRONG: dict[str, tuple[State, str]] = {
    "other rows": ({"lora_up.weight": torch.randn(12, 3), "lora_down.weight": DOWN}, "12×16"),
    "other columns": ({"lora_up.weight": UP, "lora_down.weight": torch.randn(3, 8)}, "24×8"),
    "the transpose, of as many numbers": ({"lora_up.weight": torch.randn(16, 3), "lora_down.weight": UP.mT}, "16×24"),
    "a kernel on a Linear": (
        {"lora_up.weight": UP[..., None, None], "lora_down.weight": torch.randn(3, 4, 2, 2)},
        "2×2",
    ),
    "a change of another shape": ({"diff": PRODUCT.mT}, "16×24"),
    "NaN": ({"lora_up.weight": UP, "lora_down.weight": DOWN * float("nan")}, "non-finite"),
    "infinity": ({"lora_up.weight": UP / 0, "lora_down.weight": DOWN}, "non-finite"),
    "a magnitude that is NaN": ({**HEAD, "dora_scale": torch.full((24, 1), float("nan"))}, "non-finite"),
}


@pytest.mark.parametrize("label", WRONG)
def test_an_adapter_of_another_weight_is_refused(label: str, tmp_path: Path) -> None:
    """A1111, Forge and ComfyUI apply one of as many numbers garbled."""
    tensors, what = WRONG[label]
    model, _ = conv_net()
    with pytest.raises(MismatchError, match=what) as error:
        pk.load(model, write(tmp_path / "a.safetensors", keyed("lora_unet_heads_0", tensors)))
    assert "heads.0" in str(error.value)


def test_a_kernel_of_as_many_numbers_is_another_weight(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layer": nn.Conv2d(4, 8, (1, 3))})
    file = keyed(
        "lycoris_layer", {"lora_up.weight": torch.randn(8, 2, 1, 1), "lora_down.weight": torch.randn(2, 4, 3, 1)}
    )
    with pytest.raises(MismatchError, match="3×1"):
        pk.load(model, write(tmp_path / "a.safetensors", file))


def test_flattened_factors_fit_the_weight_they_are_of(tmp_path: Path) -> None:
    """A 2-dimensional down on a convolution, and a 4-dimensional one on a Linear, as the WebUIs read them."""
    up, down = torch.randn(8, 2), torch.randn(2, 4, 3, 3)
    for tensors in (
        {"lora_up.weight": up, "lora_down.weight": down.flatten(1)},
        {"lora_up.weight": up[..., None, None], "lora_down.weight": down},
    ):
        model, _ = conv_net()
        pk.load(model, write(tmp_path / "a.safetensors", keyed("lycoris_stem", tensors)))
        require_delta(model, "stem", up @ down.flatten(1))
    four = {"lora_up.weight": UP[..., None, None], "lora_down.weight": DOWN[..., None, None]}
    require_delta(loaded_on_head(four, tmp_path), "heads.0", PRODUCT)


def test_two_keys_of_one_role_are_refused(tmp_path: Path) -> None:
    file = {**keyed("heads.0", HEAD), "heads.0.lora_B.weight": UP}
    with pytest.raises(FileError, match=r"lora_up.*lora_B|lora_B.*lora_up"):
        pk.load(conv_net()[0], write(tmp_path / "a.safetensors", file))


def test_two_names_of_one_weight_are_refused(tmp_path: Path) -> None:
    """Which would win depends on the program."""
    file = {**keyed("lora_unet_heads_0", HEAD), **keyed("lycoris_heads_0", HEAD)}
    with pytest.raises(FileError, match=r"heads.0"):
        pk.load(conv_net()[0], write(tmp_path / "a.safetensors", file))


@pytest.mark.parametrize(
    "suffix", ["scale", "reshape_weight", "set_weight", "bias", "bm.weight", "oft_diag", "lora_up"]
)
def test_a_tensor_of_no_known_role_is_listed(suffix: str, tmp_path: Path) -> None:
    """Some programs read these; a file that has them means something else without."""
    with pytest.raises(MismatchError, match=f"lora_unet_heads_0.{suffix}"):
        loaded_on_head({**HEAD, suffix: torch.ones(2)}, tmp_path)


def test_tensors_that_are_no_adapters_are_listed_and_can_be_ignored(tmp_path: Path) -> None:
    file = {**keyed("lora_unet_heads_0", HEAD), "logit_scale": torch.ones(1), "emb.token": torch.ones(3)}
    path = write(tmp_path / "a.safetensors", file)
    with pytest.raises(MismatchError) as error:
        pk.load(conv_net()[0], path)
    assert all(part in str(error.value) for part in ("logit_scale", "emb.token", "ignore="))
    with pytest.raises(MismatchError, match=r"emb\.token"):
        pk.load(conv_net()[0], path, ignore="logit_scale")
    model, _ = conv_net()
    pk.load(model, path, ignore=["logit_scale", "emb.*"])
    require_delta(model, "heads.0", PRODUCT)
    with pytest.raises(OptionError, match="nothing_like"):
        pk.load(conv_net()[0], path, ignore=["logit_scale", "emb.*", "nothing_like*"])


def test_modules_the_model_lacks_are_listed_and_the_rest_loads_if_told(tmp_path: Path) -> None:
    file = {**keyed("lora_unet_heads_0", HEAD), **keyed("lora_unet_heads_7", HEAD)}
    path = write(tmp_path / "a.safetensors", file)
    with pytest.raises(MismatchError, match="lora_unet_heads_7"):
        pk.load(conv_net()[0], path)
    model, _ = conv_net()
    report = pk.load(model, path, strict=False)
    assert report.loaded == ("heads.0",)
    assert all("heads_7" in key for key in report.unexpected)
    assert report.unexpected
    require_delta(model, "heads.0", PRODUCT)


def test_weights_of_peft_without_their_configuration_ask_for_it(tmp_path: Path) -> None:
    file = {"base_model.model.heads.0.lora_B.weight": UP, "base_model.model.heads.0.lora_A.weight": DOWN}
    with pytest.raises(AmbiguousFileError, match=r"adapter_config\.json"):
        pk.load(conv_net()[0], write(tmp_path / "adapter_model.safetensors", file))


def test_a_scale_that_is_said_twice_asks(tmp_path: Path) -> None:
    """diffusers refuses a file with its configuration and with alphas."""
    config = json.dumps({"unet.r": 3, "unet.lora_alpha": 6})
    file = {"unet.heads.0.lora_B.weight": UP, "unet.heads.0.lora_A.weight": DOWN}
    model, _ = conv_net()
    pk.load(model, write(tmp_path / "a.safetensors", file, {"lora_adapter_metadata": config}))
    require_delta(model, "heads.0", 2 * PRODUCT)
    file["unet.heads.0.alpha"] = torch.tensor(6.0)
    with pytest.raises(AmbiguousFileError, match="twice"):
        pk.load(conv_net()[0], write(tmp_path / "a.safetensors", file, {"lora_adapter_metadata": config}))


def test_an_ambiguous_underscored_name_asks(tmp_path: Path) -> None:
    model = tree({"a.b_c": nn.Linear(16, 24), "a_b.c": nn.Linear(16, 24)})
    with pytest.raises(AmbiguousFileError, match=r"a\.b_c or a_b\.c"):
        pk.load(model, write(tmp_path / "a.safetensors", keyed("lycoris_a_b_c", HEAD)))
    pk.load(model, write(tmp_path / "b.safetensors", keyed("a.b_c", HEAD)))
    require_delta(model, "a.b_c", PRODUCT)
