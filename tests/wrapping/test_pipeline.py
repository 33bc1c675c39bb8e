"""A pipeline is one model: its denoiser and its text encoders, one set of adapters, one file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import LostAdapterError, MismatchError, UnknownAdapterError, UnsupportedLayerError
from tests.support.real import sd15_unet, stable_diffusion
from tests.support.zoo import train

ATTENTION = ["*.attn1.to_q", "*.self_attn.q_proj"]


def outputs(pipe: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    with torch.no_grad():
        text = pipe.text_encoder(torch.tensor([[0, 5, 1]])).last_hidden_state
        return text, pipe.unet(torch.randn(1, 4, 8, 8), torch.tensor(3), text).sample


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def wrapped(seed: int = 1) -> Any:
    pipe = stable_diffusion()
    pk.wrap(pipe, "lora", rank=2, targets=ATTENTION)
    for part in (pipe.unet, pipe.text_encoder):
        train(part, seed)
    return pipe


def test_every_verb_takes_the_pipeline(tmp_path: Path) -> None:
    pipe = stable_diffusion()
    flags = [p.requires_grad for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters())]
    before = outputs(pipe)
    assert pk.plan(pipe, "lora", targets=ATTENTION).modules == pk.wrap(pipe, "lora", rank=2, targets=ATTENTION).modules
    sites = [name for name in pk.adapter_state_dict(pipe) if name.endswith(".up")]
    assert {name.partition(".")[0] for name in sites} == {"unet", "text_encoder"}
    assert same(outputs(pipe), before)
    trainable = [p for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()) if p.requires_grad]
    assert {id(p) for p in pk.adapter_parameters(pipe)} == {id(p) for p in trainable}
    assert sum(len(group["params"]) for group in pk.parameter_groups(pipe, lr=1e-3, ratio=4)) == len(trainable)
    for part in (pipe.unet, pipe.text_encoder):
        train(part)
    full = outputs(pipe)
    assert not torch.equal(full[0], before[0]) and not torch.equal(full[1], before[1])
    with pk.disabled(pipe):
        assert same(outputs(pipe), before)
    with pk.enabled(pipe, "default"):
        assert same(outputs(pipe), full)
    pk.set_strength(pipe, 0.0)
    assert same(outputs(pipe), before)
    pk.set_strength(pipe, 1.0)
    assert pk.limit_norms_(pipe, most=1e9) == ()
    pk.project_(pipe)
    path = pk.save(pipe, tmp_path / "set.safetensors")
    pk.export(pipe, tmp_path / "kohya.safetensors", "kohya", family="sd15")
    assert {name[:7] for name in load_file(tmp_path / "kohya.safetensors")} == {"lora_te", "lora_un"}
    assert pk.merge(pipe).weights
    for now, then in zip(outputs(pipe), full, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-4, atol=1e-5)
    pk.restore(pipe)
    assert same(outputs(pipe), full)
    pk.reset_adapters(pipe)
    assert same(outputs(pipe), before)
    assert pk.swap(pipe, path).complete
    assert same(outputs(pipe), full)
    pk.unwrap(model=pipe)
    assert same(outputs(pipe), before)
    assert [p.requires_grad for p in (*pipe.unet.parameters(), *pipe.text_encoder.parameters())] == flags
    assert pk.load(pipe, path).complete
    assert same(outputs(pipe), full)


def test_files_of_the_set_and_of_a_part_go_to_each_other(tmp_path: Path) -> None:
    pipe = wrapped()
    full = outputs(pipe)
    path = pk.save(pipe, tmp_path / "set.safetensors")
    parts = stable_diffusion()
    pk.load(parts.unet, path, component="unet")
    pk.load(parts.text_encoder, path, component="text_encoder")
    assert same(outputs(parts), full)
    alone = pk.save(parts.unet, tmp_path / "unet.safetensors")
    fresh = stable_diffusion()
    with pytest.raises(MismatchError):
        pk.load(fresh, alone)
    pk.load(fresh, alone, component="unet")
    pk.load(fresh, path, component="text_encoder")
    assert same(outputs(fresh), full)
    pk.load(sd15_unet(), alone, component="unet", other_base=True)


def test_a_part_that_is_replaced_is_noticed_and_a_copy_is_its_own() -> None:
    pipe = wrapped()
    twin = copy.deepcopy(pipe)
    full = outputs(pipe)
    pk.set_strength(twin, 0.0)
    assert same(outputs(pipe), full) and not same(outputs(twin), full)
    pk.unwrap(twin)
    assert all(p.requires_grad for p in twin.unet.parameters())
    pipe.unet = sd15_unet()
    with pytest.raises(LostAdapterError):
        pk.merge(pipe)


class Other:
    """Another library's pipeline."""

    def __init__(self, **components: nn.Module | None) -> None:
        self.components = components


def test_only_the_parts_of_a_pipeline_are_taken() -> None:
    pipe = Other(unet=nn.Linear(4, 4), vae=nn.Linear(4, 4), scheduler=None)
    assert pk.plan(pipe, "lora").modules == ("unet",)
    with pytest.raises(UnknownAdapterError):
        pk.unwrap(pipe)
    pk.wrap(pipe, "lora", rank=2)
    with pytest.raises(UnsupportedLayerError, match="check its parts"):
        pk.check(pipe, torch.randn(2, 4))
    with pytest.raises(UnsupportedLayerError, match="has vae, and a unet"):
        pk.wrap(Other(vae=nn.Linear(4, 4)), "lora")
