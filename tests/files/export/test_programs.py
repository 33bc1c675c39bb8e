"""Exported files in the programs themselves: LyCORIS, PEFT and diffusers load them, and their forward is compared."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lycoris import create_lycoris_from_weights
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, PeftkitError
from tests.support.architectures import outputs
from tests.support.cells import require_same_forward
from tests.support.models import CONV_NET_LAYERS, conv_net
from tests.support.readers.kohya import made
from tests.support.real import stable_diffusion
from tests.support.zoo import ADAPTERS, train


def adapted_net(adapter: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """The base, the same with the adapter on every layer that can have it, and an input."""
    base, x = conv_net()
    model, case = copy.deepcopy(base), ADAPTERS[adapter]
    fitting = []
    for name in CONV_NET_LAYERS:
        try:
            pk.plan(model, case.kind, targets=name, **case.options)
        except PeftkitError:
            continue
        fitting.append(name)
    pk.wrap(model, case.kind, targets=fitting, **case.options)
    train(model, size=0.6 if "tucker" in adapter else 0.2)
    return base, model.eval(), x


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_lycoris_itself_computes_what_we_do(adapter: str, tmp_path: Path) -> None:
    base, model, x = adapted_net(adapter)
    path = tmp_path / "adapter.safetensors"
    report = pk.export(model, path, "lycoris")
    theirs = copy.deepcopy(base)
    network, _ = create_lycoris_from_weights(1.0, str(path), theirs)
    network.apply_to()
    assert {lora.lora_name for lora in network.loras} == {w.written for w in report.weights}
    require_same_forward(model(x), theirs(x), base(x))


@pytest.mark.parametrize("adapter", ADAPTERS)
@torch.no_grad()
def test_peft_itself_computes_what_we_do(adapter: str, tmp_path: Path) -> None:
    base, model, x = adapted_net(adapter)
    report = pk.export(model, tmp_path / "adapter", "peft")
    theirs: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    adapted = [name for name, module in theirs.named_modules() if isinstance(module, BaseTunerLayer)]
    assert sorted(adapted) == sorted(w.written for w in report.weights)
    require_same_forward(model(x), theirs(x), base(x))


@pytest.mark.parametrize("adapter", ["loha", "lokr", "lokr rank"])
@torch.no_grad()
def test_peft_itself_computes_what_we_do_on_a_grouped_convolution(adapter: str, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, groups=2))
    model, x = copy.deepcopy(base), torch.randn(2, 8, 5, 5)
    pk.wrap(model, ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
    train(model, size=0.2)
    pk.export(model, tmp_path / "adapter", "peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter")).eval()
    require_same_forward(model(x), theirs(x), base(x))


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "adapter, unet_targets",
    [
        ("lora", "full"),
        ("loha", "*.attn1.*"),
        ("dora", "re:.*(attn2|resnets).*"),
        ("oft", "*.conv*"),
        ("loldu", "*ff*"),
    ],
)
@torch.no_grad()
def test_diffusers_itself_computes_what_we_do(adapter: str, unet_targets: str, target: str, tmp_path: Path) -> None:
    """A pipeline's U-Net, all of it once, and its text encoder, from one file; every module gets its adapter."""
    pipe, case = stable_diffusion(), ADAPTERS[adapter]
    base = outputs(pipe.unet, pipe.text_encoder)
    model = nn.ModuleDict({"unet": copy.deepcopy(pipe.unet), "text_encoder": copy.deepcopy(pipe.text_encoder)})
    unet_modules = [
        site.site.name
        for site in pk.plan(model["unet"], case.kind, targets=unet_targets, **case.options).entries
        if target != "kohya" or made(f"unet.{site.site.name}", "sd15")
    ]
    text_modules = [f"text_encoder.{site.site.name}" for site in pk.plan(model["text_encoder"], "lora").entries]
    pk.wrap(model, case.kind, targets=[*(f"unet.{name}" for name in unet_modules), *text_modules], **case.options)
    train(model, size=0.05)
    report = pk.export(model, tmp_path / "adapter.safetensors", target, family="sd15")
    pipe.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    adapted = {
        f"{component}.{name}"
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipe, component).named_modules()
        if isinstance(module, BaseTunerLayer)
    }
    assert adapted == {w.weight for w in report.weights}
    ours, theirs = outputs(model["unet"], model["text_encoder"]), outputs(pipe.unet, pipe.text_encoder)
    for own, real, before in zip(ours, theirs, base, strict=True):
        require_same_forward(own, real, before)


@pytest.mark.parametrize("target", ["diffusers", "kohya"])
@pytest.mark.parametrize(
    "component, rules",
    [
        ("unet", {"*.attn1.to_q": "lora", "*.attn1.to_k": "dora", "*.proj_in": "loha", "*.conv1": "dora in"}),
        ("text_encoder", {"*.self_attn.q_proj": "lora", "*.self_attn.out_proj": "loha", "*.mlp.fc2": "dora"}),
    ],
    ids=["unet", "text_encoder"],
)
@torch.no_grad()
def test_diffusers_itself_reads_files_of_many_kinds_and_of_few_modules(
    component: str, rules: dict[str, str], target: str, tmp_path: Path
) -> None:
    """Of sd-scripts' files it knows the attention of a text encoder by its out_proj, and loses it without."""
    pipe = stable_diffusion()
    base = outputs(pipe.unet, pipe.text_encoder)
    model = copy.deepcopy(getattr(pipe, component))
    pk.wrap(model, rules=[pk.Rule(at, ADAPTERS[name].kind, **ADAPTERS[name].options) for at, name in rules.items()])
    train(model, size=0.1)
    parts = (model, pipe.text_encoder) if component == "unet" else (pipe.unet, model)
    ours = outputs(*parts)
    pk.export(model, tmp_path / "adapter.safetensors", target, family="sd15", component=component)
    pipe.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    theirs, own = outputs(pipe.unet, pipe.text_encoder), ("text_encoder", "unet").index(component)
    require_same_forward(ours[own], theirs[own], base[own])


def test_a_text_encoder_without_attention_is_refused_for_diffusers(tmp_path: Path) -> None:
    """diffusers takes the ranks of a text encoder from its attention layers, and fails where a file has none."""
    model = copy.deepcopy(stable_diffusion().text_encoder)
    pk.wrap(model, "lora", targets=["*.mlp.fc1"])
    with pytest.raises(ExportError, match="without attention"):
        pk.export(model, tmp_path / "adapter.safetensors", "diffusers", family="sd15", component="text_encoder")
    assert not list(tmp_path.iterdir())


def test_names_of_a_model_that_is_not_known_lose_what_a_program_put_before_them(tmp_path: Path) -> None:
    """lycoris_lycoris_… is nobody's; and underscores do not say where the dots of PEFT's names are."""
    path, name = tmp_path / "x.safetensors", "lycoris_layers_0_q_proj"
    factors = {f"{name}.lora_up.weight": torch.ones(8, 2), f"{name}.lora_down.weight": torch.ones(2, 8)}
    save_file({**factors, f"{name}.alpha": torch.tensor(2.0)}, path)
    report = pk.export(path, tmp_path / "out.safetensors", "lycoris")
    assert [w.written for w in report.weights] == [name]
    for target in ("comfyui", "peft"):
        with pytest.raises(ExportError, match="where its dots were"):
            pk.export(path, tmp_path / f"out-{target}.safetensors", target)
