"""What a file does not say of its adapters: the scale, which the user is asked for, and which way the factors lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peftkit as pk
from peftkit.errors import AmbiguousFileError, FileError, OptionError
from tests.support.files import State, write
from tests.support.foreign import DOWN, HEAD, PRODUCT, UP, delta_of, loaded_on_head, require_delta
from tests.support.models import conv_net

# -- scales ------------------------------------------------------------------------------------------------------------


def on_head(tensors: State, folder: Path, metadata: dict[str, str] | None = None, **options: Any) -> nn.Module:
    model, _ = conv_net()
    pk.load(model, write(folder / "a.safetensors", tensors, metadata), **options)
    return model


def peft_keys(prefix: str = "base_model.model.") -> State:
    return {f"{prefix}heads.0.lora_A.weight": DOWN, f"{prefix}heads.0.lora_B.weight": UP}


@pytest.mark.parametrize("prefix", ["base_model.model.", "unet.base_model.model."])
def test_pefts_keys_without_a_configuration_are_asked_about(prefix: str, tmp_path: Path) -> None:
    """fal and the script of PixArt write them so, and diffusers reads them at a scale of 1; PEFT's α is lost."""
    with pytest.raises(AmbiguousFileError, match=r"alpha='rank' for 1.* number that was lora_alpha"):
        on_head(peft_keys(prefix), tmp_path)
    if prefix == "base_model.model.":
        require_delta(on_head(peft_keys(prefix), tmp_path, alpha="rank"), "heads.0", PRODUCT)
        require_delta(on_head(peft_keys(prefix), tmp_path, alpha=6), "heads.0", 2 * PRODUCT)


def test_and_the_configuration_beside_them_says_it(tmp_path: Path) -> None:
    """The message's other way: the file under PEFT's own name in a folder with its configuration."""
    write(tmp_path / "folder" / "adapter_model.safetensors", peft_keys())
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["heads.0"]}
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(config))
    model, _ = conv_net()
    pk.load(model, tmp_path / "folder")
    require_delta(model, "heads.0", 2 * PRODUCT)
    with pytest.raises(OptionError, match=r"alpha=6 was given, no alpha was expected\. .* say every scale"):
        pk.read(tmp_path / "folder", alpha=6)


@pytest.mark.parametrize("entry", ["lora_alpha", "network_alpha", "alpha", "ss_network_alpha"])
def test_an_alpha_in_the_metadata_alone_is_asked_about(entry: str, tmp_path: Path) -> None:
    """sglang scales by it, kohya and ComfyUI do not look there."""
    tensors = {f"diffusion_model.{key.removeprefix('base_model.model.')}": t for key, t in peft_keys().items()}
    with pytest.raises(AmbiguousFileError, match=rf"{entry} = 12 at rank 3.*alpha=12 or alpha='rank'"):
        on_head(tensors, tmp_path, {entry: "12.0"})
    require_delta(on_head(tensors, tmp_path, {entry: "12"}, alpha=12), "heads.0", 4 * PRODUCT)
    require_delta(on_head(tensors, tmp_path, {entry: "12"}, alpha="rank"), "heads.0", PRODUCT)


@pytest.mark.parametrize("said", ["3", "3.0", "Dynamic", "", "nan", "0", "-1"])
def test_metadata_that_mean_no_other_scale_are_no_question(said: str, tmp_path: Path) -> None:
    model = on_head({f"lora_unet_heads_0.{k}": t for k, t in HEAD.items()}, tmp_path, {"ss_network_alpha": said})
    require_delta(model, "heads.0", PRODUCT)


def test_an_alpha_tensor_goes_before_the_metadata(tmp_path: Path) -> None:
    tensors = {f"lora_unet_heads_0.{k}": t for k, t in {**HEAD, "alpha": torch.tensor(6.0)}.items()}
    require_delta(on_head(tensors, tmp_path, {"ss_network_alpha": "12"}), "heads.0", 2 * PRODUCT)
    with pytest.raises(OptionError, match="no alpha was expected"):
        on_head(tensors, tmp_path, alpha=4)


@pytest.mark.parametrize("alpha", [True, 0, -1, float("nan"), float("inf"), "ranks", [1]])
def test_an_alpha_that_is_none_is_refused(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="alpha="):
        loaded_on_head(HEAD, tmp_path, alpha=alpha)


VERBS: dict[str, Callable[..., object]] = {
    "convert": lambda path, out, **o: pk.convert(path, out, "lora", **o),
    "resize": lambda path, out, **o: pk.resize(path, out, rank=3, **o),
    "combine": lambda path, out, **o: pk.combine({path: 1.0, path.with_name("b.safetensors"): 0.0}, out, **o),
    "export": lambda path, out, **o: pk.export(path, out, "lycoris", **o),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_written_says_its_scale(verb: str, tmp_path: Path) -> None:
    """The entry of the metadata goes with the tensors that it was said of."""
    tensors = {key.removeprefix("base_model.model."): t for key, t in peft_keys().items()}
    write(tmp_path / "b.safetensors", tensors)
    path, out = write(tmp_path / "a.safetensors", tensors, {"lora_alpha": "12"}), tmp_path / "out.safetensors"
    with pytest.raises(AmbiguousFileError, match="alpha=12"):
        VERBS[verb](path, out)
    VERBS[verb](path, out, alpha=12)
    model, _ = conv_net()
    pk.load(model, out)
    assert float((delta_of(model, "heads.0") - 4 * PRODUCT.double()).norm()) < 1e-5


# -- biases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["lora_B.bias", "lora_B.default.bias"])
def test_a_bias_of_lora_b_changes_the_layers(end: str, tmp_path: Path) -> None:
    """Flux' control adapters have one, which ComfyUI adds as it is, at their scale of 1; PEFT scales it as B·A."""
    shift = torch.arange(24.0)
    tensors = {f"heads.0.{k}": t for k, t in HEAD.items()} | {f"heads.0.{end}": shift}
    for extra, factor in (({}, 1.0), ({"heads.0.alpha": torch.tensor(6.0)}, 2.0)):
        path = write(tmp_path / "a.safetensors", tensors | extra)
        assert torch.equal(pk.read(path).vectors["heads.0.bias"], factor * shift)
    pk.rescale(path, 0.5, tmp_path / "half.safetensors")
    half = pk.read(tmp_path / "half.safetensors")
    assert torch.equal(half.vectors["heads.0.bias"], shift)
    base = write(tmp_path / "base.safetensors", {"heads.0.weight": torch.zeros(24, 16), "heads.0.bias": shift})
    pk.merge_checkpoint(base, {path: 1.0}, tmp_path / "merged.safetensors")
    assert torch.equal(load_file(tmp_path / "merged.safetensors")["heads.0.bias"], 3 * shift)


# -- factors that lie the other way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(16, 16), (24, 16)])
def test_factors_as_mlx_has_them_are_called_by_what_they_are(rows: int, columns: int, tmp_path: Path) -> None:
    """A as (in, rank) and B as (rank, out): of a square layer they would make a LoRA of rank 16 on a weight of 4."""
    A, B = torch.randn(columns, 4), torch.randn(4, rows)
    path = write(tmp_path / "a.safetensors", {"q.lora_A": A, "q.lora_B": B, "q.alpha": torch.tensor(4.0)})
    with pytest.raises(FileError, match=r"\(in, rank\) and \(rank, out\), as MLX") as refused:
        pk.inspect(path)
    assert pk.doctor(path).code == 2
    out = tmp_path / "upright.safetensors"
    save_file({key: t.mT.contiguous() if t.dim() == 2 else t for key, t in load_file(path).items()}, out)
    assert "save_file({key: t.mT.contiguous() if t.dim() == 2 else t for key, t in load_file(path).items()}, out)" in (
        str(refused.value)
    )
    base = write(tmp_path / "base.safetensors", {"q.weight": torch.zeros(rows, columns)})
    pk.merge_checkpoint(base, {out: 1.0}, tmp_path / "merged.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "merged.safetensors")["q.weight"], (A @ B).mT)


def test_factors_that_lie_upright_are_read_under_bare_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"q.lora_A": torch.randn(4, 16), "q.lora_B": torch.randn(16, 4)})
    assert pk.inspect(path).modules[0].rank == 4


# -- XLabs -------------------------------------------------------------------------------------------------------------


def test_xlabs_keys_of_double_blocks_have_a_number_before_the_factor(tmp_path: Path) -> None:
    tensors: State = {}
    for name in ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"):
        rows = 9216 if name.startswith("qkv") else 3072
        tensors[f"double_blocks.0.processor.{name}.down.weight"] = torch.ones(1, 3072)
        tensors[f"double_blocks.0.processor.{name}.up.weight"] = torch.ones(rows, 1)
    found = pk.inspect(write(tmp_path / "a.safetensors", tensors))
    assert found.family == "Flux.1" and len(found.modules) == 4
    assert pk.read(tmp_path / "a.safetensors").patches["double_blocks.0.processor.qkv_lora1"].rank == 1
