"""Small models: one of every kind of layer, one that runs; wrapped, trained and merged in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError, UnsupportedLayerError
from peftkit.wrapping.sites import sites
from tests.support.files import State
from tests.support.zoo import ADAPTERS, train


class ConvNet(nn.Module):
    """A small model that runs, of the layers adapters go on."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(4, 8, 3, padding=1)
        self.block = nn.ModuleDict({"point": nn.Conv2d(8, 16, 1), "down": nn.Conv2d(16, 16, 3, stride=2)})
        self.heads = nn.ModuleList([nn.Linear(16, 24), nn.Linear(24, 8, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        x = torch.tanh(self.block["down"](torch.tanh(self.block["point"](x))))
        return self.heads[1](torch.tanh(self.heads[0](x.mean((2, 3)))))


CONV_NET_LAYERS = ("stem", "block.point", "block.down", "heads.0", "heads.1")


def conv_net(seed: int = 0) -> tuple[ConvNet, Tensor]:
    """The small model and an input."""
    torch.manual_seed(seed)
    return ConvNet().eval(), torch.randn(3, 4, 7, 7)


def tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A model that has these layers at these paths, and nothing else."""
    root = nn.Module()
    for path, layer in layers.items():
        *parents, last = path.split(".")
        at = root
        for parent in parents:
            if parent not in at._modules:
                at.add_module(parent, nn.Module())
            at = at.get_submodule(parent)
        at.add_module(last, layer)
    return root


class Net(nn.Module):
    """Layers that can be adapted and some that cannot, with a weight of each sort to read."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 12)
        self.bare = nn.Linear(8, 8, bias=False)
        self.k1 = nn.Conv2d(8, 12, 1)
        self.k3 = nn.Conv2d(8, 12, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.transposed = nn.ConvTranspose2d(8, 12, 3)
        self.transposed_grouped = nn.ConvTranspose2d(8, 12, (3, 2), groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=12)
        self.norm = nn.LayerNorm(12)
        self.bands = nn.GroupNorm(4, 12)
        self.register_buffer("steps", torch.arange(5))

    def forward(self, *inputs: Tensor) -> Tensor:
        raise NotImplementedError


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> Net:
    torch.manual_seed(seed)
    model = Net().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: nothing is 0 or 1 by chance
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def state(model: nn.Module) -> State:
    return {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}


def key_of(site: str) -> str:
    """The key in the state dict of `Net` of a weight: the projections of an attention may be rows of one."""
    parent, _, last = site.rpartition(".")
    if last in ("q_proj", "k_proj", "v_proj"):
        return f"{parent}.in_proj_weight" if parent == "attention" else f"{parent}.{last}_weight"
    return f"{site}.weight"


def taken(tensors: Mapping[str, Tensor], site: str) -> Tensor:
    """A weight of `Net`, or its rows where it shares one."""
    tensor = tensors[key_of(site)]
    return tensor.chunk(3)["qkv".index(site[-6])] if key_of(site).endswith("in_proj_weight") else tensor


@cache
def accepting(case: str) -> tuple[str, ...]:
    """The weights of `Net` that can have an adapter of the zoo."""
    model, found = net(), []
    for site in sites(model):
        try:
            pk.plan(model, rules=[pk.Rule(site, ADAPTERS[case].kind, **ADAPTERS[case].options)])
        except (OptionError, UnsupportedLayerError):
            continue
        found.append(site)
    return tuple(found)


def adapt(model: nn.Module, case: str, name: str = "default", only: Iterable[str] | None = None, seed: int = 1) -> None:
    """Wrap the weights that can have it and train the adapter."""
    own = [site for site in accepting(case) if only is None or site in only]
    pk.wrap(model, rules=[pk.Rule(own, ADAPTERS[case].kind, **ADAPTERS[case].options)], name=name)
    train(model, seed, name=name)


def merged_in_memory(model: nn.Module, strengths: Mapping[str, float]) -> tuple[State, pk.MergeReport]:
    """The state dict after `set_strength` and `merge`; the model stays as it was."""
    model = copy.deepcopy(model)
    for name, strength in strengths.items():
        pk.set_strength(model, strength, name)
    report = pk.merge(model, list(strengths))
    pk.unwrap(model, keep_merged=True)
    return state(model), report


def language_model(tied: bool = False) -> Any:
    """A Llama of one layer and 20 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).eval()
