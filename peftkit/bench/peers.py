"""The same adapter on the same layer in lycoris and peft, as users of these libraries train it."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from typing import Any

import torch
from torch import nn

import peftkit as pk
from peftkit.wrapping.sites import sites

#: kind -> our options, what lycoris calls it and its options, what peft calls it and its options
KINDS: dict[str, tuple[dict[str, Any], tuple[str, dict[str, Any]] | None, tuple[str, dict[str, Any]] | None]] = {
    "lora": ({"rank": 16}, ("LoConModule", {"lora_dim": 16, "alpha": 16}), ("LoraConfig", {"r": 16, "lora_alpha": 16})),
    "loha": ({"rank": 8}, ("LohaModule", {"lora_dim": 8, "alpha": 8}), ("LoHaConfig", {"r": 8, "alpha": 8})),
    "lokr": (
        {"rank": 16, "factor": 8},
        ("LokrModule", {"lora_dim": 16, "alpha": 16, "factor": 8}),
        ("LoKrConfig", {"r": 16, "alpha": 16, "decompose_factor": 8}),
    ),
    "dora": (
        {"rank": 16},
        ("LoConModule", {"lora_dim": 16, "alpha": 16, "weight_decompose": True}),
        ("LoraConfig", {"r": 16, "lora_alpha": 16, "use_dora": True}),
    ),
    "oft": (
        {"block_size": 32},
        ("DiagOFTModule", {"lora_dim": 32, "alpha": 0}),
        ("OFTConfig", {"oft_block_size": 32, "r": 0, "use_cayley_neumann": False}),
    ),
    "loldu": ({"rank": 16}, None, None),
}
LYCORIS_MODULES = {
    "LoConModule": "lycoris.modules.locon",
    "LohaModule": "lycoris.modules.loha",
    "LokrModule": "lycoris.modules.lokr",
    "DiagOFTModule": "lycoris.modules.diag_oft",
}


def missing(names: list[str]) -> list[str]:
    """Return the names among "lycoris" and "peft" that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def ways(peers: list[str], kind: str) -> list[str]:
    """Return what to compare: "ours", and every way in which peers train a kind.

    Args:
        peers: of "lycoris" and "peft".
        kind: one of `KINDS`.
    """
    _, of_lycoris, of_peft = KINDS[kind]
    found = ["ours"]
    if "lycoris" in peers and of_lycoris is not None:
        found.append("lycoris")
        if kind != "dora":  # the bypass of lycoris drops the decomposition
            found.append("lycoris bypass")
    if "peft" in peers and of_peft is not None:
        found.append("peft")
    return found


def wrap(model: nn.Module, kind: str, **ours: Any) -> None:
    """Put our adapters on every layer of a model; LoLDU's have no more pivots than the layer.

    Args:
        model: adapted in place.
        kind: one of `KINDS`.
        ours: other arguments of `pk.wrap`.
    """
    options = KINDS[kind][0]
    pivots = {name: min(site.matrix.shape) for name, site in sites(model).items() if kind == "loldu"}
    narrow = [pk.Rule(name, kind, rank=most) for name, most in pivots.items() if most < options["rank"]]
    pk.wrap(model, rules=[*narrow, pk.Rule("full", kind, **options)], **ours)


class Host(nn.Module):
    """A model of one layer, whose call is that of the layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def adapted(way: str, kind: str, layer: nn.Module, **ours: Any) -> nn.Module:
    """Return a model of a copy of the layer under one adapter, of which only the adapter requires gradients.

    Args:
        way: one of `ways`.
        kind: one of `KINDS`.
        layer: copied.
        ours: keyword arguments of `peftkit.wrap` that are not options of the adapter.
    """
    host = Host(copy.deepcopy(layer))
    _, of_lycoris, of_peft = KINDS[kind]
    if way == "ours":
        wrap(host, kind, **ours)
    elif way.startswith("lycoris"):
        assert of_lycoris is not None
        name, theirs = of_lycoris
        module = getattr(importlib.import_module(LYCORIS_MODULES[name]), name)
        adapter = module("adapted", host.layer, 1.0, **theirs, bypass_mode=way.endswith("bypass"))
        adapter.apply_to()
        adapter.to(next(layer.parameters()))  # device and dtype: some of its forwards take no mixture
        host.add_module("adapter", adapter)
    else:
        assert of_peft is not None
        peft = importlib.import_module("peft")
        name, theirs = of_peft
        host = peft.get_peft_model(host, getattr(peft, name)(target_modules=["layer"], **theirs)).base_model.model
    randomize(host)
    return host


@torch.no_grad()
def randomize(host: nn.Module) -> None:
    """Move trained parameters off their start, where a factor is zero and some work could be left out."""
    generator = torch.Generator().manual_seed(0)
    for parameter in host.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_((0.01 * noise).to(parameter))
