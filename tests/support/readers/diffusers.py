"""diffusers 0.42.1: pipe.load_lora_weights of Stable Diffusion 1, 2, XL, 3 and Flux, then PEFT's layers.

Every key is renamed to PEFT's spelling, step by step as loaders/lora_conversion_utils.py and utils/state_dict_utils.py
do; `State` carries the keys of the file along. Ranks come from lora_B, alphas from the file, and a LoraConfig with
patterns is made of them (utils/peft_utils.py:153); that is where the alphas of attention layers get lost.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import algebra, dit_names
from .container import read_raw
from .model import TEXT, split_components
from .peft import lora_delta, patterned
from .result import Read, Refused, result

KOHYA = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
METADATA = "lora_adapter_metadata"


Entry = tuple[Tensor, tuple[str, ...]]


@dataclass
class State:
    """A state dict under renaming: name -> (tensor, the keys of the file it came from); and the alphas by name."""

    tensors: dict[str, Entry]
    alphas: dict[str, float] = field(default_factory=dict)

    def renamed(self, rename: Callable[[str], str]) -> State:
        return State({rename(name): value for name, value in self.tensors.items()}, self.alphas)


def read(path: Path, weights: Mapping[str, Tensor], family: str | None, strength: float = 1.0) -> Read:
    raw, header = read_raw(path)
    components = split_components(weights, family)
    state = State({key: (tensor, (key,)) for key, tensor in raw.items() if "dora_scale" not in key})  # with a warning
    if family == "flux":
        state = _flux(state, components)
        if not any("lora" in name for name in state.tensors):
            raise Refused("ValueError: invalid LoRA checkpoint")
    elif family == "sd3":
        _all_lora(state)
    else:  # a generic model fits no pipeline: every key is one the model lacks
        state = _stable_diffusion(state, family)
        _all_lora(state)
    config = json.loads(header[METADATA]) if header.get(METADATA) else None
    if config and state.alphas:
        raise Refused("ValueError: both network_alphas and metadata cannot be specified")
    outcome = Outcome(strength, config)
    core = "transformer" if family in dit_names.TABLES else "unet"
    _load_core(outcome, state, core, components.get(core, {}))
    for name in _text_encoders(family):
        _load_text_encoder(outcome, state, name, components.get(name, {}))
    return result(outcome.deltas, {}, raw, outcome.used)


def _all_lora(state: State) -> None:
    wrong = [name for name in state.tensors if "lora" not in name]
    if wrong:
        raise Refused(f"ValueError: invalid LoRA checkpoint, names without 'lora': {wrong}")


def _text_encoders(family: str | None) -> tuple[str, ...]:
    """sd3 leaves T5 out."""
    return {"sdxl": TEXT[:2], "sd3": TEXT[:2]}.get(family or "", TEXT[:1])


# Stable Diffusion: kohya's names to diffusers' (lora_conversion_utils.py) ---------------------------------------------


def _stable_diffusion(state: State, family: str | None) -> State:
    if not all(name.startswith(KOHYA) for name in state.tensors):
        return state
    if family == "sdxl":
        state = _from_sgm(state)
    left = dict(state.tensors)
    converted = State({})
    for name in list(left):
        if not name.endswith("lora_down.weight") or name not in left:
            continue
        module = name.split(".")[0]
        up = f"{module}.lora_up.weight"
        if up not in left:
            raise Refused(f"KeyError: {up}")
        if module.startswith("lora_unet_"):
            component, new = "unet", _unet_name(name)
        else:
            component = "text_encoder_2" if module.startswith("lora_te2_") else "text_encoder"
            new = _text_name(name)
        down, keys = left.pop(name)
        if alpha := left.pop(f"{module}.alpha", None):
            keys += alpha[1]
            # attention names hold no ".lora.", so the alpha's name ends in "_lora.down.weight.alpha" (:364)
            converted.alphas[f"{component}.{new.split('.lora.')[0]}.alpha"] = _item(alpha[0])
        converted.tensors[f"{component}.{new}"] = (down, keys)
        converted.tensors[f"{component}.{new.replace('.down.', '.up.')}"] = left.pop(up)
    if left:
        raise Refused(f"ValueError: keys not correctly renamed: {sorted(left)}")
    return converted


def _item(alpha: Tensor) -> float:
    if alpha.numel() != 1:
        raise Refused("RuntimeError: an alpha of several elements")
    return float(alpha.item())


def _from_sgm(state: State) -> State:
    """ldm block numbers to diffusers', two layers a block. Of a mixed file all ldm names are dropped (:55)."""
    names = list(state.tensors)
    ldm = [name for name in names if re.search("input_blocks|middle_block|output_blocks", name)]
    if any(re.search("down_blocks|mid_block|up_blocks", name) for name in names if name not in ldm):
        return State({name: value for name, value in state.tensors.items() if name not in ldm})

    def rename(name: str) -> str:
        if name not in ldm or "text" in name or "input_blocks_0_0" in name:
            return name
        match = re.fullmatch(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_(.+)", name)
        if match is None:
            raise Refused(f"ValueError: {name} is not supported")
        side, number, rest = match[1], int(match[2]), match[3]
        if side == "middle_block":
            if number > 2:
                raise Refused(f"ValueError: invalid middle block id {number}")
            return f"lora_unet_middle_block_{('resnets_0', 'attentions_0', 'resnets_1')[number]}_{rest}"
        inner, _, rest = rest.partition("_")
        block, layer = divmod(number - 1 if side == "input_blocks" else number, 3)
        kind = ("resnets", "attentions", "upsamplers")[int(inner)]
        if side == "input_blocks" and "op" in name:
            kind, layer = "downsamplers", 0
        elif kind == "upsamplers":
            layer = 0
        return f"lora_unet_{side}_{block}_{kind}_{layer}_{rest}"

    return state.renamed(rename)


# Replaced one after the other in the name with "." for "_" (_convert_unet_lora_key)
UNET_RULES = [
    ("input.blocks.0.0", "conv_in"),
    ("out.2", "conv_out"),
    ("input.blocks", "down_blocks"),
    ("down.blocks", "down_blocks"),
    ("middle.block", "mid_block"),
    ("mid.block", "mid_block"),
    ("output.blocks", "up_blocks"),
    ("up.blocks", "up_blocks"),
    ("transformer.blocks", "transformer_blocks"),
    ("to.q.lora", "to_q_lora"),
    ("to.k.lora", "to_k_lora"),
    ("to.v.lora", "to_v_lora"),
    ("to.out.0.lora", "to_out_lora"),
    ("proj.in", "proj_in"),
    ("proj.out", "proj_out"),
    ("emb.layers", "time_emb_proj"),
    ("conv.in", "conv_in"),
    ("conv.out", "conv_out"),
    ("time.embed.0", "time_embedding.linear_1"),
    ("time.embed.2", "time_embedding.linear_2"),
    ("label.emb.0.0", "add_embedding.linear_1"),
    ("label.emb.0.2", "add_embedding.linear_2"),
    ("time.embedding.linear.1", "time_embedding.linear_1"),
    ("time.embedding.linear.2", "time_embedding.linear_2"),
]


def _unet_name(key: str) -> str:
    name = key.replace("lora_unet_", "").replace("_", ".")
    for old, new in UNET_RULES:
        name = name.replace(old, new)
    if "emb" in name and "time.emb.proj" not in name:
        name = re.sub(r"\.\d+(?=\D*$)", "", name, count=1)
    if ".in." in name:
        name = name.replace("in.layers.2", "conv1")
    if ".out." in name:
        name = name.replace("out.layers.3", "conv2")
    if "downsamplers" in name or "upsamplers" in name:
        name = name.replace("op", "conv")
    name = name.replace("skip.connection", "conv_shortcut")
    name = name.replace("time.emb.proj", "time_emb_proj").replace("conv.shortcut", "conv_shortcut")
    if "transformer_blocks" in name and ("attn1" in name or "attn2" in name):
        name = name.replace("attn1", "attn1.processor").replace("attn2", "attn2.processor")
    return name


TEXT_RULES = [
    ("text.model", "text_model"),
    ("self.attn", "self_attn"),
    ("q.proj.lora", "to_q_lora"),
    ("k.proj.lora", "to_k_lora"),
    ("v.proj.lora", "to_v_lora"),
    ("out.proj.lora", "to_out_lora"),
    ("text.projection", "text_projection"),
]


def _text_name(key: str) -> str:
    name = re.sub("^lora_te[12]?_", "", key).replace("_", ".")
    for old, new in TEXT_RULES:
        name = name.replace(old, new)
    if "self_attn" in name or "text_projection" in name or "mlp" not in name:
        return name
    return name.replace(".lora.", ".lora_linear_layer.")


# Flux -----------------------------------------------------------------------------------------------------------------


def _flux(state: State, components: Mapping[str, Mapping[str, Tensor]]) -> State:
    names = list(state.tensors)
    if any(".lora_down.weight" in name for name in names):
        return _flux_kohya(state, components)
    if any("processor" in name or "query_norm.scale" in name or "base_model" in name for name in names):
        raise NotImplementedError("Flux files of XLabs, BFL and fal")
    plain = State({})
    for name, (tensor, keys) in state.tensors.items():
        if "alpha" not in name:
            plain.tensors[name] = (tensor, keys)
        elif tensor.is_floating_point():
            plain.alphas[name] = _item(tensor)
        else:
            raise Refused(f"ValueError: the alpha key {name} seems to be incorrect")
    for alpha in plain.alphas:  # so that the key counts as used where its module is
        for name in (f"{alpha.removesuffix('.alpha')}{end}" for end in (".lora_A.weight", ".lora.down.weight")):
            if name in plain.tensors:
                tensor, keys = plain.tensors[name]
                plain.tensors[name] = (tensor, (*keys, alpha))
    return _padded(plain, components)


def _flux_kohya(state: State, components: Mapping[str, Mapping[str, Tensor]]) -> State:
    """Alphas are folded into the factors; fused layers are cut by rows; what is left over is an error."""
    names = list(state.tensors)
    if any(name.startswith("transformer.") for name in names):
        spelled = state.renamed(lambda name: name.replace("lora_down.", "lora_A.").replace("lora_up.", "lora_B."))
        return _padded(
            State({name: value for name, value in spelled.tensors.items() if name.startswith("transformer.")}),
            components,
        )
    if any(name.startswith("lora_transformer_") for name in names):
        raise NotImplementedError("Flux files with lora_transformer_ names")
    left = _flux_spelling(state).tensors
    converted = State({})
    for path, weight in components.get("transformer", {}).items():
        place = dit_names.place(path, "flux")
        if place is None:
            continue
        module = "lora_unet_" + place.module.replace(".", "_")
        if f"{module}.lora_down.weight" not in left:
            continue
        down, up, keys = _folded(left, module, pop=False)
        rows = _rows(up, place, path, weight, components["transformer"])
        # the modules outside the blocks are given names without "transformer." and so reach no component
        prefix = "transformer." if "_blocks." in path else ""
        converted.tensors[f"{prefix}{path}.lora_A.weight"] = (down, keys)
        converted.tensors[f"{prefix}{path}.lora_B.weight"] = (rows, keys)
    for module in _flux_modules():
        if f"{module}.lora_down.weight" in left:
            _folded(left, module, pop=True)
    left = {name: v for name, v in left.items() if not ("final_layer" in name and name.endswith(".alpha"))}
    if not all(name.startswith("lora_te") for name in left):
        raise Refused(f"ValueError: incompatible keys: {sorted(left)}")
    for module in [name.split(".")[0] for name in left if name.endswith("lora_down.weight")]:
        down, up, keys = _folded(left, module, pop=True)
        name = _text_name(f"{module}.lora_down.weight")
        converted.tensors[f"text_encoder.{name}"] = (down, keys)
        converted.tensors[f"text_encoder.{name.replace('.down.', '.up.')}"] = (up, keys)
    return _padded(converted, components)


def _flux_modules() -> set[str]:
    """kohya's names of all the layers of Flux: 19 double blocks, 38 single ones."""
    names: set[str] = set()
    for place in dit_names.FLUX.values():
        count = 38 if place.module.startswith("single") else 19
        names |= {"lora_unet_" + place.module.format(number).replace(".", "_") for number in range(count)}
    return names


def _flux_spelling(state: State) -> State:
    """ComfyUI's dotted names to kohya's; T5, position embeddings, diff_b, norms and projections are filtered out."""
    state = state.renamed(lambda name: name.replace("diffusion_model.", "lora_unet_"))
    state = state.renamed(lambda name: name.replace("text_encoders.clip_l.transformer.", "lora_te_"))
    norms = any(".norm" in name and ".diff" in name for name in state.tensors)

    def kept(name: str) -> bool:
        if "position_embedding" in name or ".diff_b" in name or "text_projection" in name:
            return False
        if norms and (".norm" in name or ".diff" in name):
            return False
        return name.startswith(("lora_unet_", "lora_te_", "lora_te1_"))

    def rename(name: str) -> str:
        match = re.search(r"\.?(lora_down|lora_up|alpha)", name)
        return name[: match.start()].replace(".", "_") + name[match.start() :] if match else name.replace(".", "_")

    return State({name: value for name, value in state.tensors.items() if kept(name)}).renamed(rename)


def _folded(left: dict[str, Entry], module: str, pop: bool) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """down·alpha/rank, up, and the keys of the file."""
    take = left.pop if pop else left.get
    down, up, alpha = (take(f"{module}.{name}", None) for name in ("lora_down.weight", "lora_up.weight", "alpha"))
    if down is None or up is None:
        raise Refused(f"KeyError: {module}.lora_up.weight")
    rank = down[0].shape[0]
    scale = 1.0 if alpha is None else _item(alpha[0]) / rank
    keys = down[1] + up[1] + (alpha[1] if alpha else ())
    return down[0].to(torch.float64) * scale, up[0].to(torch.float64), keys


def _rows(up: Tensor, place: dit_names.Place, path: str, weight: Tensor, model: Mapping[str, Tensor]) -> Tensor:
    """The rows of a fused up that belong to `path`: by the sizes of the model's layers, which must add up."""
    if place.swapped:
        return torch.cat(up.chunk(2)[::-1])
    if place.parts == 1:
        return up
    sizes: dict[int, int] = {}
    for other, its in model.items():
        found = dit_names.place(other, "flux")
        if found and found.module == place.module:
            sizes[found.part] = its.shape[0]
    if len(sizes) != place.parts:
        raise ValueError(f"the file names a fused weight; the base holds only parts {sorted(sizes)} of {path}'s")
    if sum(sizes.values()) != up.shape[0]:
        raise Refused(f"AssertionError: the rows of {path}'s fused layer")
    return up.split([sizes[part] for part in sorted(sizes)])[place.part]


def _padded(state: State, components: Mapping[str, Mapping[str, Tensor]]) -> State:
    """A lora_A with fewer inputs than its layer is padded with zeros; a larger one makes the layer grow (:2028)."""
    padded = State(dict(state.tensors), state.alphas)
    for path, weight in components.get("transformer", {}).items():
        name = f"transformer.{path}.lora_A.weight"
        if name not in state.tensors or weight.ndim != 2:
            continue
        tensor, keys = state.tensors[name]
        if tensor.shape[1] > weight.shape[1]:
            raise Refused(f"{path} would be expanded to {tensor.shape[1]} inputs")
        padded.tensors[name] = (torch.nn.functional.pad(tensor, (0, weight.shape[1] - tensor.shape[1])), keys)
    return padded


# Into PEFT's layers ---------------------------------------------------------------------------------------------------


class Outcome:
    """What the components add up to."""

    def __init__(self, strength: float, config: Mapping[str, Any] | None) -> None:
        self.strength, self.config = strength, config
        self.deltas: dict[str, Tensor] = {}
        self.used: list[str] = []


def _component(state: State, prefix: str) -> State:
    start = f"{prefix}."
    return State(
        {name.removeprefix(start): value for name, value in state.tensors.items() if name.startswith(start)},
        {name.removeprefix(start): value for name, value in state.alphas.items() if name.startswith(start)},
    )


UNET_TO_PEFT = [
    (".to_out_lora.up", ".to_out.0.lora_B"),
    (".to_out_lora.down", ".to_out.0.lora_A"),
    (".to_q_lora.down", ".to_q.lora_A"),
    (".to_q_lora.up", ".to_q.lora_B"),
    (".to_k_lora.down", ".to_k.lora_A"),
    (".to_k_lora.up", ".to_k.lora_B"),
    (".to_v_lora.down", ".to_v.lora_A"),
    (".to_v_lora.up", ".to_v.lora_B"),
    (".lora.up", ".lora_B"),
    (".lora.down", ".lora_A"),
    (".to_out.lora_magnitude_vector", ".to_out.0.lora_magnitude_vector"),
]


def _mapped(state: State, rules: list[tuple[str, str]]) -> State:
    """The first rule that fits each name, after ".processor." has gone (state_dict_utils.py:153)."""

    def rename(name: str) -> str:
        name = name.replace(".processor.", ".")
        for old, new in rules:
            if old in name:
                return name.replace(old, new)
        return name

    return state.renamed(rename)


def _load_core(outcome: Outcome, state: State, core: str, model: Mapping[str, Tensor]) -> None:
    own = _component(state, core)
    if not own.tensors:  # "No LoRA keys associated to …"
        return
    if any(".lokr_" in name for name in own.tensors):
        raise NotImplementedError("LoKr of newer pipelines")
    if "lora_A" not in next(iter(own.tensors)):
        own = _mapped(own, UNET_TO_PEFT)
    ranks = {f"^{n}": t.shape[1] for n, (t, _) in own.tensors.items() if "lora_B" in n and t.ndim > 1}
    alphas = {name.split(".lora_A.")[0].replace(".alpha", ""): value for name, value in own.alphas.items()}
    _inject(outcome, own, core, model, ranks, alphas, alphas)


TO_DIFFUSERS_OLD = [
    (f".to_{short}_lora.{way}", f".{long}.lora_linear_layer.{way}")
    for short, long in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("out", "out_proj"))
    for way in ("up", "down")
]
TO_DIFFUSERS_PEFT = [
    (f".{long}.lora_{letter}", f".{long}.lora_linear_layer.{way}")
    for long in ("q_proj", "k_proj", "v_proj", "out_proj")
    for letter, way in (("B", "up"), ("A", "down"))
]
TO_PEFT = [
    (".lora_linear_layer.up", ".lora_B"),
    (".lora_linear_layer.down", ".lora_A"),
    ("text_projection.lora.down.weight", "text_projection.lora_A.weight"),
    ("text_projection.lora.up.weight", "text_projection.lora_B.weight"),
]
CLIP = (".q_proj", ".k_proj", ".v_proj", ".out_proj", ".fc1", ".fc2")


def _load_text_encoder(outcome: Outcome, state: State, component: str, model: Mapping[str, Tensor]) -> None:
    own = _component(state, component)
    if not own.tensors:
        return
    if any("to_out_lora" in name for name in own.tensors):
        own = _mapped(own, TO_DIFFUSERS_OLD)
    elif any(".lora_A.weight" in name for name in own.tensors):
        own = _mapped(own, TO_DIFFUSERS_PEFT)
    if not any("lora_linear_layer" in name for name in own.tensors):
        raise Refused("ValueError: could not automatically infer state dict type")
    own = _mapped(own, TO_PEFT)
    flat = not any(path.startswith("text_model.") for path in model)
    if flat:  # transformers 5's CLIPTextModel; the names of the alphas keep their text_model.
        own = own.renamed(lambda name: name.removeprefix("text_model."))
    ranks = {}
    for path in model:
        if path.endswith(CLIP) and f"{path}.lora_B.weight" in own.tensors:
            ranks[f"{path}.lora_B.weight"] = own.tensors[f"{path}.lora_B.weight"][0].shape[1]
    patterns = {".".join(name.split(".down.")[0].split(".")[:-1]): value for name, value in own.alphas.items()}
    _inject(outcome, own, component, model, ranks, patterns, own.alphas)


def _inject(
    outcome: Outcome,
    own: State,
    component: str,
    model: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    patterns: Mapping[str, float],
    alphas: Mapping[str, float],
) -> None:
    """LoraConfig from ranks and alphas, or from the metadata; then PEFT's layers on the modules the names hold."""
    if outcome.config is not None:
        start = f"{component}."
        config = {k.removeprefix(start): v for k, v in outcome.config.items() if k.startswith(start)}
    else:
        config = _config(ranks, patterns, alphas, own)
    adapted = {name.rsplit(".lora_", 1)[0] for name in own.tensors}
    targets = [path for path in model if path in adapted]
    if not targets:
        raise Refused(f"ValueError: target modules of {component} not found in the base model")
    for path in targets:
        weight = model[path].to(torch.float64)
        rank = int(patterned(config.get("rank_pattern"), path, config.get("r", 8)))
        alpha = patterned(config.get("alpha_pattern"), path, config.get("lora_alpha", 8))
        out, into, *kernel = weight.shape
        shapes = {
            "lora_A.weight": (rank, into, *kernel),
            "lora_B.weight": (out, rank, *[1] * len(kernel)),
            "lora_magnitude_vector": (1, out, *[1] * len(kernel)) if kernel else (out,),
        }
        found: dict[str, Tensor] = {}
        for suffix, shape in shapes.items():
            if f"{path}.{suffix}" not in own.tensors:
                continue
            tensor, keys = own.tensors[f"{path}.{suffix}"]
            if tuple(tensor.shape) != shape:
                raise Refused(f"RuntimeError: size mismatch for {component}.{path}.{suffix}: {tuple(tensor.shape)}")
            found[suffix] = tensor.to(torch.float64)
            outcome.used += keys
        down, up = found.get("lora_A.weight"), found.get("lora_B.weight")
        up = torch.zeros(shapes["lora_B.weight"], dtype=torch.float64) if up is None else up
        if down is None:
            down = torch.full(shapes["lora_A.weight"], 0.0 if not up.any() else torch.nan, dtype=torch.float64)
        magnitude = None
        if config.get("use_dora"):
            magnitude = found.get("lora_magnitude_vector", algebra.row_norms(weight))
        scaling = outcome.strength * alpha / (rank**0.5 if config.get("use_rslora") else rank)
        outcome.deltas[f"{component}.{path}"] = lora_delta(weight, down, up, scaling, magnitude)


def _config(
    ranks: Mapping[str, int],
    patterns: Mapping[str, float],
    alphas: Mapping[str, float],
    own: State,
) -> dict[str, Any]:
    """get_peft_kwargs: the most frequent rank and alpha, and patterns for the others."""
    if not ranks:
        raise Refused("IndexError: no lora_B from which to know the rank")
    rank = Counter(ranks.values()).most_common()[0][0] if len(set(ranks.values())) > 1 else next(iter(ranks.values()))
    rank_pattern = {name.split(".lora_B.")[0]: value for name, value in ranks.items() if value != rank}
    values = list(alphas.values())
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank, "rank_pattern": rank_pattern, "alpha_pattern": {}}
    if values:
        config["lora_alpha"] = Counter(values).most_common()[0][0]
        config["alpha_pattern"] = {n: value for n, value in patterns.items() if value != config["lora_alpha"]}
    else:
        config["alpha_pattern"] = dict(rank_pattern)
    config["use_dora"] = any("lora_magnitude_vector" in name for name in own.tensors)
    return config
