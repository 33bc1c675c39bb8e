"""Parity with what users of LyCORIS and PEFT train: their forward, their gradients, their initial parameters.

The oracle is always the peer's *forward*, never its merge: LyCORIS merges LoHa and LoKr with α/r applied twice.
A peer's module is built on a copy of the same layer, its parameters are drawn at random, and `translated` gives the
same parameters in the shapes and signs of peftkit. Errors are relative to what the adapter changes, not to the whole
output.

Cells left out because the peer is wrong or refuses there:

- LyCORIS: `padding_mode` (its forward drops it); LoCon bypass with dilation (raises); LoKr bypass with groups and OFT
  bypass with a bias (both differ from its own rebuild); DoRA at a multiplier other than 1 (at 0 it keeps ΔW);
  `rs_lora` of a LoKr with both blocks full (scales by √r where 1 is meant).
- PEFT: LoRA and DoRA with dilation or groups (raises, or is not a grouped weight); LoKr with a full block on Conv1d
  (its Kronecker product lacks a dimension); OFT on kernels larger than 1 (a fresh adapter changes the output); the
  gradients of two Tucker factors of LoHa, named in the table.

Left out because peftkit has no such option: `use_scalar` and `unbalanced_factorization` of LyCORIS, COFT and shared
blocks of PEFT, and factors above √size, where each library splits differently.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import peft
import pytest
import torch
from lycoris.functional.general import factorization as lycoris_factorization
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft.tuners.lokr.layer import factorization as peft_factorization
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters.lokr import factorize

# Relative errors. The largest measured are 4e-6 and 1.3e-6, in fp32
FORWARD, GRADIENT = 1e-5, 1e-5

MODULES = {"locon": LoConModule, "loha": LohaModule, "lokr": LokrModule, "oft": DiagOFTModule}
CONFIGS = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig, "oft": peft.OFTConfig}

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "linear": (nn.Linear, {"in_features": 24, "out_features": 36}),
    "unbiased": (nn.Linear, {"in_features": 24, "out_features": 36, "bias": False}),
    "conv1": (nn.Conv2d, {"in_channels": 24, "out_channels": 36, "kernel_size": 1}),
    "strided1": (nn.Conv2d, {"in_channels": 24, "out_channels": 36, "kernel_size": 1, "stride": 2, "padding": 1}),
    "conv3": (nn.Conv2d, {"in_channels": 24, "out_channels": 36, "kernel_size": 3}),
    "strided3": (nn.Conv2d, {"in_channels": 24, "out_channels": 36, "kernel_size": 3, "stride": 2, "padding": 1}),
    "oblong": (nn.Conv2d, {"in_channels": 24, "out_channels": 36, "kernel_size": (3, 2), "padding": (1, 0)}),
    "conv1d": (nn.Conv1d, {"in_channels": 24, "out_channels": 36, "kernel_size": 3, "padding": 1}),
    "dilated": (nn.Conv2d, {"in_channels": 24, "out_channels": 36, "kernel_size": 3, "dilation": 2, "padding": 2}),
    "grouped": (nn.Conv2d, {"in_channels": 24, "out_channels": 36, "kernel_size": 3, "groups": 2, "padding": 1}),
    # large enough for statistics
    "wide": (nn.Linear, {"in_features": 256, "out_features": 384}),
    "wide3": (nn.Conv2d, {"in_channels": 128, "out_channels": 256, "kernel_size": 3}),
}
POINTWISE = ("linear", "unbiased", "conv1", "strided1")
KERNELS = ("conv3", "strided3", "oblong", "conv1d")
PLAIN = (*POINTWISE, *KERNELS)
SPECIAL = ("dilated", "grouped")


@dataclass(frozen=True)
class Case:
    """One adapter in the options of a peer and in those of peftkit, on one layer."""

    peer: str
    label: str
    algorithm: str
    theirs: Mapping[str, Any]
    kind: str
    ours: Mapping[str, Any]
    layer: str = ""
    strength: float = 1.0
    #: standard deviation of what is added to the peer's initial parameters
    spread: float = 0.3
    forward: float = FORWARD
    gradient: float = GRADIENT
    #: parameters whose gradient the peer gets wrong
    wrong: frozenset[str] = field(default=frozenset())

    def __str__(self) -> str:
        return f"{self.peer}-{self.label}-{self.layer}"

    def on(self, *layers: str) -> Iterator[Case]:
        return (replace(self, layer=layer) for layer in layers)


def lycoris(label: str, algorithm: str, theirs: dict[str, Any], kind: str, **ours: Any) -> Case:
    return Case("lycoris", label, algorithm, theirs, kind, ours)


def of_peft(label: str, algorithm: str, theirs: dict[str, Any], kind: str, **ours: Any) -> Case:
    return Case("peft", label, algorithm, theirs, kind, ours)


LORA = {"lora_dim": 4, "alpha": 3}
LOHA = {"lora_dim": 3, "alpha": 2}
LOKR = {"lora_dim": 2, "alpha": 3, "factor": 3}  # 24 = 3·8, 36 = 3·12: a low-rank second block
BOTH = {"lora_dim": 2, "alpha": 3, "factor": -1, "decompose_both": True}  # 24 = 4·6, 36 = 6·6: two low-rank blocks
FULL = {"lora_dim": 6, "alpha": 3, "factor": 3}  # half of 12, the first rank that keeps the second block full
EDGE = {**BOTH, "lora_dim": 3}  # half of 6, the first rank that keeps both blocks full
TUCKER, BYPASS, DECOMPOSED = {"use_tucker": True}, {"bypass_mode": True}, {"weight_decompose": True}
COLUMNS = {**DECOMPOSED, "wd_on_out": False}

OUR_LORA = {"rank": 4, "alpha": 3}
OUR_LOHA = {"rank": 3, "alpha": 2}
OUR_LOKR = {"rank": 2, "alpha": 3, "factor": 3}
OUR_BOTH = {"rank": 2, "alpha": 3, "factor": -1, "decompose_both": True}
OUR_FULL = {"rank": 6, "alpha": 3, "factor": 3}
OUR_EDGE = {**OUR_BOTH, "rank": 3}
# LyCORIS differentiates the norm of DoRA, PEFT does not
THROUGH_NORM = {"detach_norm": False}

LYCORIS_CASES = [
    *lycoris("lora", "locon", LORA, "lora", **OUR_LORA).on(*PLAIN, *SPECIAL),
    *lycoris("lora-rslora", "locon", {**LORA, "rs_lora": True}, "lora", **OUR_LORA, rslora=True).on("linear", "conv3"),
    *lycoris("lora-tucker", "locon", {**LORA, **TUCKER}, "lora", **OUR_LORA, tucker=True).on(*KERNELS, *SPECIAL),
    *lycoris("lora-bypass", "locon", {**LORA, **BYPASS}, "lora", **OUR_LORA).on(*PLAIN, "grouped"),
    *lycoris("lora-tucker-bypass", "locon", {**LORA, **TUCKER, **BYPASS}, "lora", **OUR_LORA, tucker=True).on(*KERNELS),
    *lycoris("loha", "loha", LOHA, "loha", **OUR_LOHA).on(*PLAIN, *SPECIAL),
    *lycoris("loha-tucker", "loha", {**LOHA, **TUCKER}, "loha", **OUR_LOHA, tucker=True).on(*KERNELS, *SPECIAL),
    *lycoris("loha-bypass", "loha", {**LOHA, **BYPASS}, "loha", **OUR_LOHA).on("linear", "strided3"),
    *lycoris("lokr", "lokr", LOKR, "lokr", **OUR_LOKR).on(*PLAIN, *SPECIAL),
    *lycoris("lokr-both", "lokr", BOTH, "lokr", **OUR_BOTH).on(*PLAIN, *SPECIAL),
    *lycoris("lokr-full", "lokr", FULL, "lokr", **OUR_FULL, full_scale="one").on(*PLAIN, *SPECIAL),
    *lycoris("lokr-edge", "lokr", EDGE, "lokr", **OUR_EDGE, full_scale="one").on("linear", "strided3"),
    *lycoris("lokr-full-matrix", "lokr", {**LOKR, "full_matrix": True}, "lokr", factor=3).on("linear", "strided3"),
    *lycoris("lokr-tucker", "lokr", {**LOKR, **TUCKER}, "lokr", **OUR_LOKR, tucker=True).on(*KERNELS, *SPECIAL),
    *lycoris("lokr-both-tucker", "lokr", {**BOTH, **TUCKER}, "lokr", **OUR_BOTH, tucker=True).on(*KERNELS, *SPECIAL),
    *lycoris("lokr-bypass", "lokr", {**LOKR, **BYPASS}, "lokr", **OUR_LOKR).on(*PLAIN, "dilated"),
    *lycoris("dora", "locon", {**LORA, **DECOMPOSED}, "dora", **OUR_LORA, **THROUGH_NORM).on(*PLAIN, *SPECIAL),
    *lycoris(
        "dora-rslora", "locon", {**LORA, **DECOMPOSED, "rs_lora": True}, "dora", **OUR_LORA, **THROUGH_NORM, rslora=True
    ).on("linear", "conv3"),
    *lycoris(
        "dora-tucker", "locon", {**LORA, **DECOMPOSED, **TUCKER}, "dora", **OUR_LORA, **THROUGH_NORM, tucker=True
    ).on(*KERNELS),
    *lycoris("dora-columns", "locon", {**LORA, **COLUMNS}, "dora", **OUR_LORA, **THROUGH_NORM, axis="in").on(
        *PLAIN, *SPECIAL
    ),
    *lycoris("doha", "loha", {**LOHA, **DECOMPOSED}, "dora", inner="loha", **OUR_LOHA, **THROUGH_NORM).on(
        *PLAIN, *SPECIAL
    ),
    *lycoris("dokr", "lokr", {**LOKR, **DECOMPOSED}, "dora", inner="lokr", **OUR_LOKR, **THROUGH_NORM).on(
        *PLAIN, *SPECIAL
    ),
    *lycoris(
        "dokr-columns", "lokr", {**LOKR, **COLUMNS}, "dora", inner="lokr", **OUR_LOKR, **THROUGH_NORM, axis="in"
    ).on("linear", "strided3"),
    *lycoris("oft", "oft", {"lora_dim": 4}, "oft", block_size=4).on(*PLAIN, *SPECIAL),
    *lycoris("oft-rescaled", "oft", {"lora_dim": 4, "rescaled": True}, "oft", block_size=4, rescale=True).on(*PLAIN),
    # ‖Q‖ is about 4.8 here, so a bound of 0.05·36 acts
    *lycoris("oft-constraint", "oft", {"lora_dim": 4, "constraint": 0.05}, "oft", block_size=4, constraint=0.05).on(
        "linear", "strided3"
    ),
    *lycoris("oft-bypass", "oft", {"lora_dim": 4, **BYPASS}, "oft", block_size=4).on("unbiased"),
]

P_LORA, P_DORA = {"r": 4, "lora_alpha": 3}, {"r": 4, "lora_alpha": 3, "use_dora": True}
P_LOHA = {"r": 3, "alpha": 2}
P_LOKR = {"r": 2, "alpha": 3, "decompose_factor": 3}
P_BOTH = {"r": 2, "alpha": 3, "decompose_factor": -1, "decompose_both": True}
P_FULL = {"r": 6, "alpha": 3, "decompose_factor": 3}
P_EDGE = {**P_BOTH, "r": 3}
P_TUCKER = {"use_effective_conv2d": True}
P_OFT = {"r": 0, "oft_block_size": 8}

PEFT_CASES = [
    *of_peft("lora", "lora", P_LORA, "lora", **OUR_LORA).on(*PLAIN),
    *of_peft("lora-rslora", "lora", {**P_LORA, "use_rslora": True}, "lora", **OUR_LORA, rslora=True).on(*PLAIN),
    *of_peft("dora", "lora", P_DORA, "dora", **OUR_LORA).on(*PLAIN),
    *of_peft("dora-rslora", "lora", {**P_DORA, "use_rslora": True}, "dora", **OUR_LORA, rslora=True).on(
        "linear", "conv3"
    ),
    *of_peft("loha", "loha", P_LOHA, "loha", **OUR_LOHA).on(*PLAIN, *SPECIAL),
    *(
        replace(case, wrong=frozenset({"hada_w1_a", "hada_w2_a"}))
        for case in of_peft("loha-tucker", "loha", {**P_LOHA, **P_TUCKER}, "loha", **OUR_LOHA, tucker=True).on(
            *KERNELS, *SPECIAL
        )
    ),
    *of_peft("lokr", "lokr", P_LOKR, "lokr", **OUR_LOKR).on(*PLAIN, *SPECIAL),
    *of_peft("lokr-both", "lokr", P_BOTH, "lokr", **OUR_BOTH).on(*PLAIN, *SPECIAL),
    *of_peft("lokr-full", "lokr", P_FULL, "lokr", **OUR_FULL, full_scale="alpha/rank").on(
        *POINTWISE, "conv3", "strided3", "oblong", *SPECIAL
    ),
    *of_peft("lokr-edge", "lokr", P_EDGE, "lokr", **OUR_EDGE, full_scale="alpha/rank").on("linear", "strided3"),
    *of_peft("lokr-tucker", "lokr", {**P_LOKR, **P_TUCKER}, "lokr", **OUR_LOKR, tucker=True).on(*KERNELS, *SPECIAL),
    *of_peft("lokr-both-tucker", "lokr", {**P_BOTH, **P_TUCKER}, "lokr", **OUR_BOTH, tucker=True).on(*KERNELS),
    *of_peft("oft-exact", "oft", {**P_OFT, "use_cayley_neumann": False}, "oft", block_size=8, side="in").on(*POINTWISE),
    *of_peft(
        "oft-exact-blocks",
        "oft",
        {"r": 4, "oft_block_size": 0, "use_cayley_neumann": False},
        "oft",
        blocks=4,
        side="in",
    ).on("linear", "conv1"),
    # The series converges for ‖Q‖₂ < 1, here about 0.2: 30 terms leave nothing that fp32 can hold
    *(
        replace(case, spread=0.05)
        for case in of_peft(
            "oft-neumann-30", "oft", {**P_OFT, "num_cayley_neumann_terms": 30}, "oft", block_size=8, side="in"
        ).on(*POINTWISE)
    ),
    # The default of five terms leaves about Q⁴ of 2Q, with ‖Q‖₂ about 0.04 here: 3e-5
    *(
        replace(case, spread=0.01, forward=1e-4, gradient=2e-4)
        for case in of_peft("oft-neumann-5", "oft", P_OFT, "oft", block_size=8, side="in").on(*POINTWISE)
    ),
]

# λ is LyCORIS' multiplier and PEFT's `scale_layer`
HALF = ("lora", "loha", "lokr", "oft")
CASES = [*LYCORIS_CASES, *PEFT_CASES]
CASES += [
    replace(case, label=f"{case.label}-half", strength=0.5)
    for case in CASES
    if case.label in HALF and case.layer in ("linear", "strided3") and (case.peer, case.label) != ("peft", "oft")
]

BIG = {"lora_dim": 16, "alpha": 3}
P_BIG = {"r": 16, "alpha": 3}
OUR_BIG = {"rank": 16, "alpha": 3}
INITIAL_CASES = [
    *lycoris("lora", "locon", BIG, "lora", **OUR_BIG).on("wide", "wide3"),
    *lycoris("lora-tucker", "locon", {**BIG, **TUCKER}, "lora", **OUR_BIG, tucker=True).on("wide3"),
    *lycoris("dora", "locon", {**BIG, **DECOMPOSED}, "dora", **OUR_BIG).on("wide", "wide3"),
    *lycoris("dora-columns", "locon", {**BIG, **COLUMNS}, "dora", **OUR_BIG, axis="in").on("wide", "wide3"),
    *lycoris("loha", "loha", BIG, "loha", **OUR_BIG).on("wide", "wide3"),
    *lycoris("loha-tucker", "loha", {**BIG, **TUCKER}, "loha", **OUR_BIG, tucker=True).on("wide3"),
    *lycoris("lokr", "lokr", {**BIG, "factor": 4}, "lokr", **OUR_BIG, factor=4).on("wide", "wide3"),
    *lycoris("lokr-tucker", "lokr", {**BIG, "factor": 4, **TUCKER}, "lokr", **OUR_BIG, factor=4, tucker=True).on(
        "wide3"
    ),
    *lycoris("lokr-full", "lokr", {**BIG, "factor": -1, "full_matrix": True}, "lokr", factor=-1).on("wide", "wide3"),
    *lycoris("lokr-both", "lokr", BOTH, "lokr", **OUR_BOTH).on("wide", "wide3"),
    *lycoris("oft", "oft", {"lora_dim": 4}, "oft", block_size=4).on("wide", "wide3"),
    *of_peft("lora", "lora", {"r": 16, "lora_alpha": 3}, "lora", **OUR_BIG).on("wide", "wide3"),
    *of_peft("dora", "lora", {"r": 16, "lora_alpha": 3, "use_dora": True}, "dora", **OUR_BIG).on("wide", "wide3"),
    *of_peft("loha", "loha", P_BIG, "loha", **OUR_BIG, init="peft").on("wide", "wide3"),
    *of_peft("loha-tucker", "loha", {**P_BIG, **P_TUCKER}, "loha", **OUR_BIG, tucker=True, init="peft").on("wide3"),
    *of_peft("lokr", "lokr", {**P_BIG, "decompose_factor": 4}, "lokr", **OUR_BIG, factor=4, init="peft").on(
        "wide", "wide3"
    ),
    *of_peft(
        "lokr-tucker",
        "lokr",
        {**P_BIG, "decompose_factor": 4, **P_TUCKER},
        "lokr",
        **OUR_BIG,
        factor=4,
        tucker=True,
        init="peft",
    ).on("wide3"),
    *of_peft(
        "lokr-full", "lokr", {"r": 999, "alpha": 3}, "lokr", rank=999, factor=-1, full_scale="alpha/rank", init="peft"
    ).on("wide", "wide3"),
    *of_peft("lokr-both", "lokr", P_BOTH, "lokr", **OUR_BOTH, init="peft").on("wide", "wide3"),
    *of_peft(
        "lokr-lycoris", "lokr", {**P_BIG, "decompose_factor": 4, "init_weights": "lycoris"}, "lokr", **OUR_BIG, factor=4
    ).on("wide", "wide3"),
    *of_peft("oft", "oft", P_OFT, "oft", block_size=8, side="in").on("wide"),
]

every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_route = pytest.mark.parametrize("route", ["factored", "dense"])

# -- the peers' parameters and ours ------------------------------------------------------------------------------------

NAMES = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "core",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "magnitude",
    "hada_w1_a": "up1",
    "hada_w1_b": "down1",
    "hada_t1": "core1",
    "hada_w2_a": "up2",
    "hada_w2_b": "down2",
    "hada_t2": "core2",
    "lokr_w1": "outer",
    "lokr_w1_a": "outer_left",
    "lokr_w1_b": "outer_right",
    "lokr_w2": "block",
    "lokr_w2_a": "left",
    "lokr_w2_b": "right",
    "lokr_t2": "core",
    "oft_blocks": "skew",
    "oft_R.weight": "skew",
    "rescale": "rescale",
}


def translated(case: Case, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The peer's parameters under our names, in our shapes and signs: a differentiable function of them."""
    tucker = any(name in theirs for name in ("hada_t1", "lokr_t2"))
    ours: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        own = NAMES[name]
        if name == "oft_blocks":  # W' = RᵀW with R the Cayley transform of A − Aᵀ, ours is RW
            i, j = torch.triu_indices(*tensor.shape[1:], 1)
            tensor = (tensor.mT - tensor)[:, i, j]
        elif name == "oft_R.weight":  # the exact transform of PEFT is that of −Q, its series that of Q
            tensor = tensor if case.theirs.get("use_cayley_neumann", True) else -tensor
        elif own in ("magnitude", "rescale"):
            tensor = tensor.flatten()
        elif own.startswith("core"):
            tensor = tensor.flatten(2)
        else:
            tensor = tensor.flatten(1)
            if tucker and name in ("hada_w1_a", "hada_w2_a", "lokr_w2_a"):
                tensor = tensor.mT
        ours[f"inner.{own}" if case.kind == "dora" and own != "magnitude" else own] = tensor
    return ours


@dataclass
class Peer:
    """The peer's layer, called like the plain one, and its parameters by the names in its files."""

    layer: nn.Module
    parameters: dict[str, nn.Parameter]

    @property
    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}


def base_layer(case: Case) -> nn.Module:
    kind, arguments = LAYERS[case.layer]
    torch.manual_seed(0)
    return kind(**arguments).requires_grad_(False)


def example(case: Case) -> Tensor:
    kind = LAYERS[case.layer][0]
    size = {nn.Linear: (4, 7, 24), nn.Conv1d: (4, 24, 11), nn.Conv2d: (3, 24, 9, 8)}[kind]
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def peer_of(case: Case, layer: nn.Module, spread: float = 0.0) -> Peer:
    """The peer's adapter on a copy of the layer, its parameters moved by `spread`."""
    layer = copy.deepcopy(layer)
    torch.manual_seed(2)
    if case.peer == "lycoris":
        module = MODULES[case.algorithm]("oracle", layer, multiplier=case.strength, **case.theirs)
        module.apply_to()
        own = module
    else:
        config = CONFIGS[case.algorithm](target_modules=["0"], **case.theirs)
        layer = own = cast(nn.Module, peft.inject_adapter_in_model(config, nn.Sequential(layer))[0])
        if case.strength != 1:
            own.scale_layer(case.strength)
    found = {name.replace(".default", ""): p for name, p in own.named_parameters() if p.requires_grad}
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in found.values():
            parameter.add_(spread * torch.randn(parameter.shape, generator=noise))
    return Peer(layer, found)


def ours_of(case: Case, layer: nn.Module, values: Mapping[str, Tensor] | None, route: str = "auto") -> nn.Sequential:
    """peftkit's adapter on a copy of the layer, fresh or with the given parameters."""
    model = nn.Sequential(copy.deepcopy(layer))
    torch.manual_seed(4)
    pk.wrap(model, case.kind, route=route, **case.ours)
    if values is not None:
        parameters = dict(adapter_of(model).named_parameters())
        assert {name: p.shape for name, p in parameters.items()} == {name: v.shape for name, v in values.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[name])
        pk.set_strength(model, case.strength)
    return model


def adapter_of(model: nn.Sequential) -> pk.Adapter:
    return cast(Any, model[0]).adapters["default"]


def distance(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """‖found − expected‖ as a part of ‖scale‖."""
    return ((found - expected).norm() / scale.norm()).item()


# -- parity ------------------------------------------------------------------------------------------------------------


@every_case
@every_route
def test_forward_is_the_peers(case: Case, route: str) -> None:
    """Both routes compute the peer's output to 1e-5 of what its adapter changes."""
    layer, x = base_layer(case), example(case)
    peer = peer_of(case, layer, case.spread)
    model = ours_of(case, layer, translated(case, peer.values), route)
    with torch.no_grad():
        theirs = peer.layer(x)
        assert distance(model(x), theirs, theirs - layer(x)) < case.forward


@every_case
def test_delta_is_what_the_peer_trains(case: Case) -> None:
    """The layer with our ΔW as its whole weight computes what the peer's adapter adds, to 1e-5."""
    layer, x = base_layer(case), example(case)
    peer = peer_of(case, layer, case.spread)
    adapter = adapter_of(ours_of(case, layer, translated(case, peer.values)))
    weight = cast(Tensor, layer.weight)
    alone = copy.deepcopy(layer)
    with torch.no_grad():
        effect = peer.layer(x) - layer(x)
        delta = adapter(weight.flatten(1), case.strength).dense()
        cast(Tensor, alone.weight).copy_(delta.reshape(weight.shape))
        if alone.bias is not None:
            cast(Tensor, alone.bias).zero_()
        assert distance(alone(x), effect, effect) < case.forward


@every_case
@every_route
def test_gradients_are_the_peers(case: Case, route: str) -> None:
    """Gradients of a random linear loss, of the input and of every parameter, agree to 1e-5."""
    layer = base_layer(case)
    peer = peer_of(case, layer, case.spread)
    leaves = {name: value.clone().requires_grad_() for name, value in peer.values.items()}
    values = translated(case, leaves)
    model = ours_of(case, layer, values, route)
    probe = torch.Generator().manual_seed(5)

    their_x, our_x = example(case).requires_grad_(), example(case).requires_grad_()
    theirs, ours = peer.layer(their_x), model(our_x)
    loss = torch.randn(theirs.shape, generator=probe)
    (theirs * loss).sum().backward()
    (ours * loss).sum().backward()

    assert their_x.grad is not None
    assert our_x.grad is not None
    found = {"x": our_x.grad}
    expected = {"x": their_x.grad, **{name: cast(Tensor, p.grad) for name, p in peer.parameters.items()}}
    # Our gradients, pulled back to the peer's parameters through the translation
    gradients = {name: cast(Tensor, p.grad) for name, p in adapter_of(model).named_parameters()}
    pulled = torch.autograd.grad([values[name] for name in gradients], list(leaves.values()), [*gradients.values()])
    found |= dict(zip(leaves, pulled, strict=True))
    errors = {name: distance(found[name], expected[name], expected[name]) for name in expected}
    too_far = {name for name, error in errors.items() if not error < case.gradient}
    assert too_far <= case.wrong, errors


# -- initial parameters ------------------------------------------------------------------------------------------------


def kolmogorov_smirnov(a: Tensor, b: Tensor) -> float:
    """The largest distance of two empirical distributions, as a multiple of √(1/|a| + 1/|b|)."""
    a, b = a.flatten().sort().values, b.flatten().sort().values
    at = torch.cat([a, b])
    gap = torch.searchsorted(a, at, right=True) / len(a) - torch.searchsorted(b, at, right=True) / len(b)
    return gap.abs().max().item() / math.sqrt(1 / len(a) + 1 / len(b))


@pytest.mark.parametrize("case", INITIAL_CASES, ids=str)
def test_initial_parameters_are_drawn_as_the_peer_draws_them(case: Case) -> None:
    """Zeros are zeros, magnitudes agree to 1e-6, the rest passes a Kolmogorov-Smirnov test at a level of 0.001."""
    layer = base_layer(case)
    theirs = translated(case, peer_of(case, layer).values)
    ours = dict(adapter_of(ours_of(case, layer, None)).named_parameters())
    assert {name: p.shape for name, p in ours.items()} == {name: v.shape for name, v in theirs.items()}
    assert {name for name, p in ours.items() if not p.any()} == {name for name, v in theirs.items() if not v.any()}
    if "magnitude" in ours:
        torch.testing.assert_close(ours.pop("magnitude").detach(), theirs["magnitude"], rtol=1e-6, atol=0)
    apart = {name: kolmogorov_smirnov(p.detach(), theirs[name]) for name, p in ours.items()}
    assert {name: gap for name, gap in apart.items() if gap > 1.95} == {}


@pytest.mark.parametrize("layer", ["wide", "wide3"])
def test_lora_starts_uniform_by_fan_in(layer: str) -> None:
    """down ~ U(±1/√n): inside the bound, its standard deviation 1/√(3n) to 5 %; up = 0."""
    case = next(of_peft("lora", "lora", {}, "lora", rank=16).on(layer))
    adapter = dict(adapter_of(ours_of(case, base_layer(case), None)).named_parameters())
    down, n = adapter["down"].detach(), adapter["down"].shape[1]
    assert down.abs().max() <= 1 / math.sqrt(n)
    assert down.std().item() == pytest.approx(1 / math.sqrt(3 * n), rel=0.05)
    assert abs(down.mean().item()) < 0.05 / math.sqrt(n)
    assert not adapter["up"].any()


@pytest.mark.parametrize("layer", ["wide", "wide3"])
def test_loha_starts_as_lycoris_says(layer: str) -> None:
    """up1 ~ N(0, 0.1²), down1 and down2 ~ N(0, 1), to 5 % of their standard deviations; up2 = 0."""
    case = next(lycoris("loha", "loha", {}, "loha", rank=16).on(layer))
    adapter = dict(adapter_of(ours_of(case, base_layer(case), None)).named_parameters())
    deviations = {name: p.std().item() for name, p in adapter.items()}
    assert deviations == pytest.approx({"up1": 0.1, "down1": 1, "up2": 0, "down2": 1}, rel=0.05)


# -- the factors of LoKr -----------------------------------------------------------------------------------------------

SIZES, FACTORS = range(1, 601), (-1, *range(1, 41), 64, 600)


def equation_5(size: int, factor: int) -> tuple[int, int]:
    """u = max{u ≤ min(factor, √size) : u divides size}, by trying every u."""
    divisors = [u for u in range(1, size + 1) if u * u <= size and size % u == 0]
    u = max(u for u in divisors if factor == -1 or u <= factor)
    return u, size // u


@pytest.mark.parametrize("factor", FACTORS)
def test_factorize_is_equation_5_of_the_lycoris_paper(factor: int) -> None:
    assert {size: factorize(size, factor) for size in SIZES} == {size: equation_5(size, factor) for size in SIZES}


@pytest.mark.parametrize("factorization", [lycoris_factorization, peft_factorization], ids=["lycoris", "peft"])
@pytest.mark.parametrize("factor", FACTORS)
def test_factorize_is_the_peers_up_to_the_root(factor: int, factorization: Any) -> None:
    """Above √size the peers part: 768 by 64 is (12, 64) in LyCORIS, (64, 12) in PEFT and (24, 32) by equation 5."""
    sizes = [size for size in SIZES if factor * factor <= size]
    assert {size: factorize(size, factor) for size in sizes} == {size: factorization(size, factor) for size in sizes}
