"""Checkpoints and adapter files for the tests of what works on files, and what other software makes of them.

Files are written and read with the reference implementation of safetensors. The model families are the library's own
with small weights under the genuine names: it tells a checkpoint by names and shapes, and real shapes are large. The
adapters written by hand are of small multiples of 1/8: their products and sums are exact in fp32, so that what a
formula gives in one line here must come out bit for bit.
"""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import OptionError, UnsupportedLayerError
from peftkit.files.families import names
from peftkit.files.families.denoisers import Component, ModuleSpec, flux, sd3, unet
from peftkit.files.families.encoders import clip, open_clip
from peftkit.files.families.names import FAMILIES, Family
from peftkit.wrapping.sites import sites
from tests.support.zoo import ADAPTERS, train

State = dict[str, Tensor]

# -- files -------------------------------------------------------------------------------------------------------------


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def load(path: Path) -> State:
    return load_file(path)


def load_folder(path: Path) -> State:
    """All shards of a folder."""
    return {key: tensor for file in sorted(path.rglob("*.safetensors")) for key, tensor in load(file).items()}


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


def metadata(path: Path) -> dict[str, str]:
    return header(path).get("__metadata__", {})


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    return torch.equal(*(t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, theirs)))


def require_bits(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    """Raise AssertionError unless both hold the same tensors, bit for bit."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    unlike = [key for key in ours if not same_bits(ours[key], theirs[key])]
    assert not unlike, f"{len(unlike)} of {len(ours)} tensors differ: {unlike[:5]}"


def listing(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- a model of every kind of layer ------------------------------------------------------------------------------------


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


# -- adapters by hand --------------------------------------------------------------------------------------------------


def exact(*shape: int, seed: int = 0, span: int = 4) -> Tensor:
    """Multiples of 1/8 within ±span/8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-span, span + 1, shape, generator=generator).float() / 8


@dataclass(frozen=True)
class Hand:
    """A module's tensors as kohya and LyCORIS name them, and its ΔW (rows, columns) on a weight by one formula."""

    tensors: State
    delta: Callable[[Tensor], Tensor]  # W (rows, columns), in fp64 -> ΔW

    def keyed(self, module: str) -> State:
        return {f"{module}.{name}": tensor for name, tensor in self.tensors.items()}


def lora(rows: int, columns: int, rank: int = 2, seed: int = 0, alpha: float = 1.0) -> Hand:
    up, down = exact(rows, rank, seed=seed), exact(rank, columns, seed=seed + 1)
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(alpha)}
    return Hand(tensors, lambda W: up.double() @ down.double() * alpha / rank)


def loha(rows: int, columns: int, rank: int = 2, seed: int = 0) -> Hand:
    a1, a2 = exact(rows, rank, seed=seed), exact(rows, rank, seed=seed + 1)
    b1, b2 = exact(rank, columns, seed=seed + 2), exact(rank, columns, seed=seed + 3)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(1.0)}
    return Hand(tensors, lambda W: (a1.double() @ b1.double()) * (a2.double() @ b2.double()) / rank)


def lokr(rows: int, columns: int, outer: tuple[int, int] = (2, 2), seed: int = 0) -> Hand:
    C, D = exact(*outer, seed=seed), exact(rows // outer[0], columns // outer[1], seed=seed + 1)
    tensors = {"lokr_w1": C, "lokr_w2": D, "alpha": torch.tensor(1.0)}
    return Hand(tensors, lambda W: torch.kron(C.double(), D.double()))


def full(rows: int, columns: int, seed: int = 0) -> Hand:
    diff = exact(rows, columns, seed=seed)
    return Hand({"diff": diff}, lambda W: diff.double())


def dora_out(rows: int, columns: int, rank: int = 2, seed: int = 0) -> Hand:
    """m/‖W + V‖·(W + V) − W, row by row, with any magnitudes."""
    inner, magnitude = lora(rows, columns, rank, seed), 1 + exact(rows, 1, seed=seed + 7)

    def delta(W: Tensor) -> Tensor:
        V = W + inner.delta(W)
        return magnitude.double() / V.norm(dim=1, keepdim=True) * V - W

    return Hand({**inner.tensors, "dora_scale": magnitude}, delta)


HANDS: dict[str, Callable[..., Hand]] = {"lora": lora, "loha": loha, "lokr": lokr, "full": full, "dora out": dora_out}


# -- small families under genuine names --------------------------------------------------------------------------------

#: columns of every matrix of the small Flux: its rows are the real ones, which diffusers' converter has written in it
FLUX_COLUMNS = 4


def _small_clip(build: Callable[..., Iterable[ModuleSpec]], width: int, projected: bool = False) -> list[ModuleSpec]:
    small = {49408: 64}
    return [replace(m, shape=tuple(small.get(n, n) for n in m.shape)) for m in build(width, 2, projected)]


def _small_flux() -> list[ModuleSpec]:
    modules = []
    for module in flux():
        block, _, rest = module.name.partition("transformer_blocks.")
        if block in ("", "single_") and rest and int(rest.partition(".")[0]) > 0:
            continue
        shape = module.shape if len(module.shape) < 2 else (module.shape[0], FLUX_COLUMNS)
        modules.append(replace(module, shape=shape))
    return modules


def _built(part: Component, build: Callable[[], Iterable[ModuleSpec]]) -> Component:
    return replace(part, build=lambda: iter(build()))


def _family(name: str, *builds: Callable[[], Iterable[ModuleSpec]]) -> Family:
    parts = FAMILIES[name].parts[: len(builds)]
    return replace(FAMILIES[name], parts=tuple(map(_built, parts, builds)))


@cache
def small_families() -> dict[str, Family]:
    """SD 1.5 and its text encoder, SDXL and both of its, SD 3.5 with normed and dual attention, Flux."""
    unet15 = partial(unet, (32, 64, 64), (1, 1, 0), middle=1, context=24, linear=False)
    unet_xl = partial(unet, (32, 64), (0, 1), middle=1, context=40, linear=True, added=48)
    return {
        "sd15": _family("sd15", unet15, partial(_small_clip, clip, 24)),
        "sdxl": _family(
            "sdxl", unet_xl, partial(_small_clip, clip, 16), partial(_small_clip, open_clip, 32, projected=True)
        ),
        "sd35-medium": _family("sd35-medium", partial(sd3, 2, normed=True, dual=1)),
        "flux": _family("flux", _small_flux),
    }


def use_small_families(monkeypatch: Any) -> dict[str, Family]:
    monkeypatch.setattr(names, "FAMILIES", small_families())
    return small_families()


def diffusers_state(family: Family, dtype: torch.dtype = torch.float32, component: str | None = None) -> State:
    """Random weights under diffusers' names, with the component before each unless one is asked for."""
    found: State = {}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / 2).to(dtype)

    for module in family.modules.values():
        own, _, path = module.name.partition(".")
        if component not in (None, own):
            continue
        name = module.name if component is None else path
        found[f"{name}.weight"] = random(*module.shape)
        if module.bias:
            found[f"{name}.bias"] = random(module.shape[0])
    return found


def original_state(family: Family, theirs: Mapping[str, Tensor]) -> State:
    """The same weights under the names and in the rows of the published file. theirs: of all components."""
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for module in family.modules.values():
        if f"{module.name}.weight" not in theirs:
            continue
        for key, name in ((module.original, "weight"), (module.original_bias, "bias")):
            if key is None:
                continue
            tensor = theirs[f"{module.name}.{name}"]
            if module.swapped:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            if module.transposed and name == "weight":
                tensor = tensor.mT
            rows.setdefault(key, []).append((module.start or 0, tensor))
    return {key: torch.cat([t for _, t in sorted(parts, key=lambda p: p[0])]) for key, parts in rows.items()}


def kohya(family: Family, name: str) -> str:
    """What kohya's tools call a module."""
    return family.spell(name, "kohya")


def matrix(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def hand_merge(base: Mapping[str, Tensor], hands: Mapping[str, Sequence[tuple[Hand, float]]]) -> State:
    """W + Σ λ·ΔW(W) in fp64, rounded to fp32 and then to the weight's dtype. hands: by key of the base."""
    out = dict(base)
    for key, added in hands.items():
        W = base[key].double().flatten(1)
        total = W + sum(strength * hand.delta(W) for hand, strength in added)
        out[key] = total.float().to(base[key].dtype).reshape(base[key].shape)
    return out
