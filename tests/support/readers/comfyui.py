"""ComfyUI 0.28.0, comfy/lora.py and comfy/weight_adapter. forge.py takes what is the same there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import algebra
from .container import read_tensors
from .model import (
    Module,
    as_is,
    base_weights,
    core_places,
    dotted,
    ldm_core,
    named,
    own_core,
    split_components,
    text_encoder,
    turn,
)
from .result import Read, Refused, result
from .unet_names import UNETS

Tensors = dict[str, Tensor]


class Unpatched(Exception):  # noqa: N818
    """A warning is printed and the tensor is not merged. (Any other error is a RuntimeError: logged here, too.)"""


def read(path: Path, weights: Mapping[str, Tensor], family: str | None, strength: float = 1.0) -> Read:
    tensors = read_tensors(path)
    patches, _ = load(tensors, names(weights, family), ADAPTERS, Diff(same_shape, turns=True))
    deltas: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    used: list[str] = []
    for patch in patches:
        try:
            change = patch.delta(patch.module.weight, strength)
        except (Unpatched, RuntimeError):
            continue
        (biases if patch.of_bias else deltas).update(patch.module.split(change))
        used += patch.keys
    return result(deltas, biases, tensors, used)


# Names ----------------------------------------------------------------------------------------------------------------

CLIP_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
# The text encoders as they are called in the state dict
CLIPS = {
    "sd15": {"text_encoder": "clip_l"},
    "sd2": {"text_encoder": "clip_h"},
    "sdxl": {"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
    "sd3": {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
    "flux": {"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
}


def names(weights: Mapping[str, Tensor], family: str | None) -> dict[str, Module]:
    """The key map: what a file may call each weight, or each row slice of a fused one."""
    if family is None:
        own = as_is(base_weights(weights))
        return {**named("lora_unet_", own), **named("diffusion_model.", own, dotted)}
    components = split_components(weights, family)
    ldm, diffusers = ldm_core(components, family), slices(weights, family)
    found = {**named("lora_unet_", ldm), **named("diffusion_model.", ldm, dotted), **named("lycoris_", diffusers)}
    if family in UNETS:
        found.update({**unet_names(diffusers)})
    else:
        found.update(named("lora_transformer_", diffusers))
        found.update(named("transformer.", diffusers, dotted))
    if family == "sd3":
        found.update(named("base_model.model.", diffusers, dotted))
    for component, clip in CLIPS[family].items():
        encoder = text_encoder(components, component)
        found.update(named(f"text_encoders.{clip}.transformer.", encoder, dotted))
    return {**found, **text_names(components, family)}


def unet_names(diffusers: Mapping[str, Module]) -> dict[str, Module]:
    """Diffusers' own names of a U-Net, whose attention must be spelled attn1.processor.to_q, to_out (lora.py:208)."""

    def spelled(path: str) -> str:
        path = path.replace(".to_", ".processor.to_")
        return path.removesuffix(".0") if path.endswith(".to_out.0") else path

    return {
        **named("lora_unet_", diffusers),
        **named("unet.", diffusers, spelled),
        **named("", diffusers, spelled),
    }


def text_names(components: Mapping[str, Mapping[str, Tensor]], family: str) -> dict[str, Module]:
    """lora_te_, lora_te1_ for CLIP-L and -H, lora_te2_ for CLIP-G: six layers a block; lora_te3_ for all of T5."""
    found: dict[str, Module] = {}
    for component, clip in CLIPS[family].items():
        encoder = text_encoder(components, component)
        if clip == "t5xxl":
            found.update(named("lora_te3_", encoder))
            continue
        layers = {
            path: module
            for path, module in encoder.items()
            if path.endswith(CLIP_LAYERS) or (path == "text_projection" and clip != "clip_h")
        }
        prefixes = ("lora_te2_",) if clip == "clip_g" else ("lora_te_", "lora_te1_")
        for prefix in prefixes:
            found.update(named(prefix, layers))
    return found


def slices(weights: Mapping[str, Tensor], family: str) -> dict[str, Module]:
    """Diffusers' modules, as (key, offset, function) where the model fuses them or has their halves the other way.

    Such a triple has no bias (lora.py:446). The weight is the model's, and the function turns what is added to it.
    """
    components = split_components(weights, family)
    places = core_places(components, family)
    slices = own_core(components)
    for path, module in slices.items():
        if path in places:
            module.turned = places[path].swapped
            module.sliced = places[path].parts > 1 or module.turned
            module.parts = {i: (name, weight, module.turned) for i, (name, weight, _) in module.parts.items()}
    return slices


# Which tensors of a file make which patch -----------------------------------------------------------------------------

Delta = Callable[[Tensor, float], Tensor]


@dataclass
class Patch:
    """The patch of a weight or of its bias: the change as a function of (W, strength), and the keys it comes from."""

    module: Module
    delta: Delta
    keys: list[str]
    of_bias: bool = False


@dataclass
class Found:
    """What an adapter's loader takes for one module: its tensors' names, and ΔW of (W, strength)."""

    taken: list[str]
    delta: Delta


@dataclass
class Set:
    """All the tensors of a file whose name starts with one module's."""

    own: Tensors
    alpha: float | None
    dora_scale: Tensor | None
    turned: bool = False

    def function(self, change: Tensor) -> Tensor:
        """What the key map does to a change before it is added: the two halves of the rows change places."""
        return turn(change, self.turned)

    def take(self, name: str) -> Tensor:
        if name not in self.own:
            raise Refused(f"KeyError: {name} is missing")
        return self.own[name]

    def scale(self, rank: int) -> float:
        return 1.0 if self.alpha is None else self.alpha / rank


Adapter = Callable[[Set], "Found | None"]


@dataclass
class Diff:
    """How a whole ΔW is added. fit: brings it to the shape of the weight; turns: the function is applied to it."""

    fit: Callable[[Tensor, Tensor], Tensor]
    turns: bool

    def added(self, change: Tensor, module: Module) -> Delta:
        turned = self.turns and module.turned
        return lambda weight, strength: turn(self.fit(change, weight), turned) * strength


def load(
    tensors: Tensors,
    modules: Mapping[str, Module],
    adapters: list[Adapter],
    diff: Diff,
) -> tuple[list[Patch], set[str]]:
    """The patches, and the keys the loader counts as loaded (comfy/lora.py:53). The last adapter that matches wins."""
    sets = _sets(tensors)
    patches: list[Patch] = []
    loaded: set[str] = set()
    for name, module in modules.items():
        own = sets.get(name)
        if own is None:
            continue
        alpha = own.get("alpha")
        if alpha is not None and alpha.numel() != 1:
            raise Refused(f"alpha of {name} has {alpha.numel()} elements")
        group = Set(own, None if alpha is None else alpha.item(), own.get("dora_scale"), module.turned)
        loaded |= {f"{name}.{key}" for key in ("alpha", "dora_scale") if key in own}
        won = None
        for adapter in adapters:
            if found := adapter(group):
                won = found
                loaded |= {_key(name, key) for key in found.taken}
        for key in ("w_norm", "diff", "set_weight"):
            if key in own:
                won = Found([key], _replaced(own[key]) if key == "set_weight" else diff.added(own[key], module))
                loaded.add(f"{name}.{key}")
        if won:
            patches.append(Patch(module, won.delta, [_key(name, key) for key in won.taken if key in own]))
        bias = "diff_b" if "diff_b" in own else "b_norm" if "b_norm" in own and "w_norm" in own else None
        if bias:
            loaded.add(f"{name}.{bias}")
            if not module.sliced and len(own[bias]) == len(module.weight):  # a slice has no bias to patch
                patches.append(Patch(module, _scaled(own[bias]), [f"{name}.{bias}"], of_bias=True))
    return patches, loaded


def _key(module: str, name: str) -> str:
    return module + name if name.startswith("_lora.") else f"{module}.{name}"


PAIRS = [  # up, down (weight_adapter/lora.py:159), the first that is there
    ("lora_up.weight", "lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    ("lora_B.weight", "lora_A.weight"),
    ("lora.up.weight", "lora.down.weight"),
    ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
]
PAIRS_COMFYUI = [*PAIRS, ("lora_B", "lora_A"), ("lora_B.default.weight", "lora_A.default.weight")]
SUFFIXES = (
    *("alpha", "dora_scale", "reshape_weight"),
    *(name for pair in PAIRS_COMFYUI for name in pair if not name.startswith("_")),
    *("lora_mid.weight", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "rescale"),
    *("w_norm", "b_norm", "diff", "diff_b", "set_weight"),
)


def _sets(tensors: Tensors) -> dict[str, Tensors]:
    """Module -> its tensors, for every way to part a key; the key map picks the modules that exist."""
    sets: dict[str, Tensors] = {}
    for key, tensor in tensors.items():
        for suffix in SUFFIXES:
            if key.endswith(f".{suffix}"):
                sets.setdefault(key.removesuffix(f".{suffix}"), {})[suffix] = tensor
        for suffix in ("_lora.up.weight", "_lora.down.weight"):
            if key.endswith(suffix):
                sets.setdefault(key.removesuffix(suffix), {})[suffix] = tensor
    return sets


def _scaled(bias: Tensor) -> Delta:
    return lambda _, strength: bias * strength


def same_shape(diff: Tensor, weight: Tensor) -> Tensor:
    """A printed warning and nothing merged where the shapes differ (lora.py:483)."""
    if diff.shape != weight.shape:
        raise Unpatched("shape mismatch, weight not merged")
    return diff


def _replaced(new: Tensor) -> Delta:
    def delta(weight: Tensor, strength: float) -> Tensor:
        return same_shape(new, weight) - weight

    return delta


# DoRA (base.py:284) ---------------------------------------------------------------------------------------------------


def decomposed(weight: Tensor, delta: Tensor, magnitude: Tensor | None, strength: float) -> Tensor:
    """s·ΔW, or s·(DoRA − W): per output row if the magnitude has o of them, and then by the norm of W, not of V."""
    if magnitude is None:
        return strength * delta
    merged = weight + delta
    per_output = magnitude.shape[0] == weight.shape[0]
    norm = algebra.row_norms(weight) if per_output else algebra.column_norms(merged)
    scaled = merged * (magnitude / (norm + torch.finfo(torch.float32).eps))
    if scaled.shape != weight.shape:
        raise RuntimeError("the magnitude does not broadcast in place")
    return strength * (scaled - weight)


# Algorithms -----------------------------------------------------------------------------------------------------------


def lora(pairs: list[tuple[str, str]], reshapes: bool, fit: Callable[[Tensor, Tensor], Tensor]) -> Adapter:
    """LoRA, LoCon. `fit` brings up·down to the shape of the weight."""

    def adapter(group: Set) -> Found | None:
        pair = next((pair for pair in pairs if pair[0] in group.own), None)
        if pair is None:
            return None
        up, down = group.own[pair[0]], group.take(pair[1])
        mid = group.own.get("lora_mid.weight") if pair == PAIRS[0] else None
        target = group.own.get("reshape_weight") if reshapes else None

        def delta(weight: Tensor, strength: float) -> Tensor:
            if target is not None and [int(size) for size in target] != list(weight.shape):
                raise Refused("reshape_weight changes the shape of the weight")
            factor = down
            if mid is not None:
                if mid.ndim != 4:  # dims 2 and 3 are indexed outside the error guard
                    raise Refused("lora_mid of a Conv1d or Conv3d: the generation fails")
                factor = torch.einsum("mnkl,ni->mikl", mid, down.flatten(1))
            change = fit(algebra.product(up, factor), weight) * group.scale(down.shape[0])
            return decomposed(weight, group.function(change), group.dora_scale, strength)

        extras = ["alpha", "dora_scale", *(["lora_mid.weight"] if mid is not None else [])]
        return Found([*pair, *extras, *(["reshape_weight"] if target is not None else [])], delta)

    return adapter


def same_count(delta: Tensor, weight: Tensor) -> Tensor:
    """Only the number of elements is checked: another shape of the same size is applied garbled."""
    return delta.reshape(weight.shape)


def loha(group: Set) -> Found | None:
    if "hada_w1_a" not in group.own:
        return None
    out1, into1, out2, into2 = (group.take(f"hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
    core1 = group.own.get("hada_t1")
    core2 = None if core1 is None else group.take("hada_t2")

    def delta(weight: Tensor, strength: float) -> Tensor:
        if core1 is None or core2 is None:
            change = (out1 @ into1) * (out2 @ into2)
        elif core1.ndim != 4:  # a four-letter einsum, outside the error guard
            raise Refused("hada_t1 of a Conv1d or Conv3d: the generation fails")
        else:
            change = algebra.tucker(core1, out1.mT, into1) * algebra.tucker(core2, out2.mT, into2)
        change = change.reshape(weight.shape) * group.scale(into1.shape[0])
        return decomposed(weight, group.function(change), group.dora_scale, strength)

    taken = ["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "alpha", "dora_scale"]
    return Found(taken, delta)


def lokr(group: Set) -> Found | None:
    own = group.own
    if not any(name in own for name in ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w2_a")):
        return None

    def delta(weight: Tensor, strength: float) -> Tensor:
        rank = None
        if "lokr_w1" in own:
            first = own["lokr_w1"]
        else:
            first, rank = group.take("lokr_w1_a") @ group.take("lokr_w1_b"), own["lokr_w1_b"].shape[0]
        if "lokr_w2" in own:
            second = own["lokr_w2"]
        else:
            second_a, second_b = group.take("lokr_w2_a"), group.take("lokr_w2_b")
            rank = second_b.shape[0]
            if "lokr_t2" in own:  # torch.kron is given a tensor that is not contiguous (lokr.py:324)
                raise RuntimeError("view size is not compatible")
            second = second_a @ second_b
        if second.ndim == 4:
            first = first[..., None, None]
        change = torch.kron(first, second.contiguous())  # of 2-D and 3-D or 5-D: not C ⊗ D, but of the right size
        change = change.reshape(weight.shape) * (1.0 if rank is None else group.scale(rank))
        return decomposed(weight, group.function(change), group.dora_scale, strength)

    factors = ["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"]
    return Found([*factors, "alpha", "dora_scale"], delta)


def glora(group: Set) -> Found | None:
    if "a1.weight" not in group.own:
        return None
    a1, a2, b1, b2 = (group.take(f"{name}.weight") for name in ("a1", "a2", "b1", "b2"))

    def delta(weight: Tensor, strength: float) -> Tensor:
        fa1, fa2, fb1, fb2 = (tensor.flatten(1) for tensor in (a1, a2, b1, b2))
        old = fa1.shape[0] == fa2.shape[1] == fb1.shape[0] == fb2.shape[1]
        new = fa1.shape[1] == fa2.shape[0] == fb1.shape[1] == fb2.shape[0]
        square = fa2.shape[0] == weight.shape[0] == weight.shape[1]
        if old and not (new and not square):  # (r, i), (i, r), (r, i), (o, r)
            change = (fb2 @ fb1) + (weight.flatten(1) @ fa2) @ fa1
            rank = a1.shape[0]
        else:
            change = torch.einsum("oi...,ir,rj->oj...", weight, fa1, fa2) + (fb1 @ fb2).reshape(weight.shape)
            rank = a2.shape[0]
        return strength * group.scale(rank) * group.function(change.reshape(weight.shape))

    return Found(["a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"], delta)


def oft(group: Set) -> Found | None:
    blocks = group.own.get("oft_blocks")
    if blocks is None or blocks.ndim != 3:
        return None

    def delta(weight: Tensor, strength: float) -> Tensor:
        limit = group.alpha or 0.0  # alpha is the constraint itself, not times o (oft.py:223)
        rotation = algebra.cayley(algebra.clamp_norm(algebra.skew(blocks), limit))
        change = strength * (algebra.rotate_rows(rotation, weight) - weight)
        return _multiplied(group, weight, change, strength)  # strength a second time (oft.py:249)

    return Found(["oft_blocks", "alpha", "dora_scale"], delta)  # rescale is loaded and not used


def boft(group: Set) -> Found | None:
    blocks = group.own.get("oft_blocks")
    if blocks is None or blocks.ndim != 4:
        return None

    def delta(weight: Tensor, strength: float) -> Tensor:
        if group.alpha is None:
            raise RuntimeError("alpha is None (boft.py:81)")
        rotation = algebra.cayley(algebra.clamp_norm(algebra.skew(blocks), group.alpha))
        identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
        merged = algebra.butterfly(strength * rotation + (1 - strength) * identity, weight)
        if "rescale" in group.own:
            merged = algebra.per_row(group.own["rescale"].flatten(), weight) * merged
        return _multiplied(group, weight, merged - weight, strength)

    return Found(["oft_blocks", "rescale", "alpha", "dora_scale"], delta)


def _multiplied(group: Set, weight: Tensor, change: Tensor, strength: float) -> Tensor:
    """A dora_scale beside OFT makes the constraint a factor of ΔW."""
    if group.dora_scale is None:
        return strength * group.function(change)
    return decomposed(weight, group.function((group.alpha or 0.0) * change), group.dora_scale, strength)


ADAPTERS: list[Adapter] = [lora(PAIRS_COMFYUI, True, same_count), loha, lokr, glora, oft, boft]
