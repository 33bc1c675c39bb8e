"""The layers and the adapters that the laws are run over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.experts import Bank

try:
    from transformers.pytorch_utils import Conv1D
except ImportError:  # where only the package's own dependencies are
    Conv1D = None


@dataclass(frozen=True)
class LayerCase:
    """A layer with the shape of an input to it."""

    make: Callable[[], nn.Module]
    input: tuple[int, ...]
    rows: int = 0  # of an embedding, whose input is numbers below it


class Outputs(nn.LSTM):
    """The outputs of an LSTM, without its last state."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(input, hx)[0]


class OnePlusNorm(nn.Module):
    """A norm that multiplies by 1 + w, as Gemma's does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (8,)) * (1 + self.weight)


class ScaledEmbedding(nn.Embedding):
    """Does what Gemma's embedding does: its forward scales what torch's has looked up."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * torch.tensor(3.0).to(self.weight.dtype)


class OwnLookup(nn.Embedding):
    """Reads its weight in a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return self.weight[input].tanh()


def _biased(layer: nn.Module) -> nn.Module:
    """A layer whose bias starts at zero, with another one."""
    nn.init.normal_(layer.get_parameter("bias"))
    return layer


LAYERS: dict[str, LayerCase] = {
    "linear": LayerCase(lambda: nn.Linear(8, 12), (2, 3, 8)),
    "linear no bias": LayerCase(lambda: nn.Linear(8, 12, bias=False), (3, 8)),
    "linear vector": LayerCase(lambda: nn.Linear(8, 12), (8,)),
    "conv1d k5 s2 d2": LayerCase(lambda: nn.Conv1d(8, 12, 5, stride=2, padding=4, dilation=2), (2, 8, 12)),
    "conv1d unbatched": LayerCase(lambda: nn.Conv1d(8, 12, 3, padding=1), (8, 7)),
    "conv2d k1": LayerCase(lambda: nn.Conv2d(8, 12, 1), (2, 8, 5, 4)),
    "conv2d k1 g2": LayerCase(lambda: nn.Conv2d(8, 12, 1, groups=2), (2, 8, 5, 4)),
    "conv2d k3": LayerCase(lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 5, 6)),
    "conv2d k3 no bias s2": LayerCase(lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (2, 8, 7, 6)),
    "conv2d k(1,3)": LayerCase(lambda: nn.Conv2d(8, 12, (1, 3), padding=(0, 1)), (2, 8, 4, 5)),
    "conv2d asymmetric": LayerCase(lambda: nn.Conv2d(8, 12, 3, (2, 1), (1, 3), dilation=(1, 2)), (1, 8, 6, 7)),
    "conv2d same": LayerCase(lambda: nn.Conv2d(8, 12, (2, 3), padding="same", dilation=2), (1, 8, 5, 6)),
    "conv2d g2 d2": LayerCase(lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=2), (2, 8, 5, 6)),
    "conv2d depthwise": LayerCase(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 5, 5)),
    "conv2d depthwise k1": LayerCase(lambda: nn.Conv2d(8, 8, 1, groups=8), (2, 8, 3, 3)),
    "conv2d depthwise ×2": LayerCase(lambda: nn.Conv2d(8, 16, 3, padding=1, groups=8), (2, 8, 4, 5)),
    "conv2d reflect": LayerCase(lambda: nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), (2, 8, 5, 6)),
    "conv2d circular g2": LayerCase(
        lambda: nn.Conv2d(8, 12, 3, padding=(1, 2), groups=2, padding_mode="circular"), (2, 8, 5, 6)
    ),
    "conv2d replicate same": LayerCase(
        lambda: nn.Conv2d(8, 12, 3, padding="same", padding_mode="replicate"), (2, 8, 4, 5)
    ),
    "conv3d k(1,1,3)": LayerCase(lambda: nn.Conv3d(8, 12, (1, 1, 3), padding=(0, 0, 1)), (1, 8, 2, 3, 4)),
    "conv3d k3 g2": LayerCase(lambda: nn.Conv3d(8, 12, 3, padding=1, groups=2), (1, 8, 3, 3, 4)),
    "transposed1d": LayerCase(lambda: nn.ConvTranspose1d(8, 12, 4, stride=2, padding=1), (2, 8, 5)),
    "transposed2d": LayerCase(
        lambda: nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1), (1, 8, 4, 3)
    ),
    "transposed2d g2": LayerCase(lambda: nn.ConvTranspose2d(8, 12, (3, 2), stride=(1, 2), groups=2), (2, 8, 3, 4)),
    "transposed2d k1": LayerCase(lambda: nn.ConvTranspose2d(8, 12, 1, bias=False), (1, 8, 5, 5)),
    "conv2d channels last": LayerCase(
        lambda: nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last), (2, 8, 5, 6)
    ),
    "transposed3d d2": LayerCase(lambda: nn.ConvTranspose3d(8, 12, 2, dilation=2, bias=False), (1, 8, 2, 3, 2)),
}

if Conv1D is not None:
    LAYERS["gpt2 conv1d"] = LayerCase(lambda: _biased(Conv1D(12, 8)), (2, 3, 8))

#: layers whose weights are read by their own code, and are no matrix of theirs alone
READ: dict[str, LayerCase] = {
    "lstm": LayerCase(lambda: Outputs(8, 3, batch_first=True), (2, 3, 8)),
    "layer norm": LayerCase(lambda: nn.LayerNorm(8), (2, 3, 8)),
    "layer norm of two dimensions": LayerCase(lambda: nn.LayerNorm((3, 8), bias=False), (2, 3, 8)),
    "group norm": LayerCase(lambda: nn.GroupNorm(2, 8), (2, 8, 3)),
    "rms norm": LayerCase(lambda: nn.RMSNorm(8), (2, 3, 8)),
    "one plus norm": LayerCase(OnePlusNorm, (2, 3, 8)),
    "batch norm": LayerCase(lambda: nn.BatchNorm2d(8), (4, 8, 3, 3)),
}

#: modules with a weight (E, out, in) or (E, in, out), which is read and not called
STACKS: dict[str, LayerCase] = {
    "experts": LayerCase(Bank, (2, 24)),
    "experts (in, out)": LayerCase(lambda: Bank(transposed=True), (2, 24)),
}


#: embeddings, which have a row for each number that their input may hold; bags have several numbers each
LOOKUPS: dict[str, LayerCase] = {
    "embedding": LayerCase(lambda: nn.Embedding(12, 8), (2, 5), 12),
    "embedding scaled": LayerCase(lambda: ScaledEmbedding(12, 8, padding_idx=3, scale_grad_by_freq=True), (3, 9), 12),
    "bag mean": LayerCase(lambda: nn.EmbeddingBag(12, 8, padding_idx=3), (3, 5), 12),
    "bag max": LayerCase(lambda: nn.EmbeddingBag(12, 8, mode="max"), (3, 5), 12),
}

#: an adapter of each structure that is made for embeddings, for the layers that are run over fewer than all
FEW = ("lora", "loha", "lokr rank", "dora", "dora in", "full")


def target_of(layer: nn.Module) -> str:
    """What to wrap of a layer alone: presets leave out embeddings, experts and norms."""
    if isinstance(layer, Bank):
        return "weight"
    if is_norm(layer):
        return "re:.*"
    if isinstance(layer, nn.LSTM):
        return "weight_ih_l0"
    return next((cls.__name__ for cls in (nn.Embedding, nn.EmbeddingBag) if isinstance(layer, cls)), "full")


def is_norm(layer: nn.Module) -> bool:
    """Whether it is a norm of the zoo, adapted or not."""
    return isinstance(layer, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.BatchNorm2d, OnePlusNorm))


@dataclass(frozen=True)
class AdapterCase:
    """A kind with its options."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)


ADAPTERS: dict[str, AdapterCase] = {
    "lora": AdapterCase("lora", {"rank": 3, "alpha": 1.5}),
    "lora rslora": AdapterCase("lora", {"rank": 4, "alpha": 2, "rslora": True}),
    "lora tucker": AdapterCase("locon", {"rank": 2, "tucker": True}),
    "loha": AdapterCase("loha", {"rank": 2, "alpha": 1}),
    "loha tucker": AdapterCase("loha", {"rank": 2, "tucker": True, "init": "peft"}),
    "lokr": AdapterCase("lokr", {"factor": 4}),
    "lokr rank": AdapterCase("lokr", {"rank": 1, "alpha": 0.5, "factor": (2, 4), "decompose_both": True}),
    "lokr tucker": AdapterCase("lokr", {"rank": 1, "factor": 2, "tucker": True, "init": "peft"}),
    "loldu": AdapterCase("loldu", {"rank": 4, "alpha": 2}),
    "loldu rank 1": AdapterCase("loldu", {"rank": 1, "init": "lu", "train_scale": False}),
    "dora": AdapterCase("dora", {"rank": 3, "alpha": 1.5}),
    "dora in": AdapterCase("dora", {"rank": 3, "axis": "in"}),
    "dora full norm": AdapterCase("dora", {"rank": 2, "detach_norm": False}),
    "dora of loha": AdapterCase("loha", {"rank": 2, "decompose": True}),
    "dora of lokr in": AdapterCase("lokr", {"rank": 1, "decompose": True, "axis": "in"}),
    "dora of loldu": AdapterCase("dora", {"inner": "loldu", "rank": 1}),
    "lokr as told": AdapterCase(
        "lokr", {"rank": 3, "alpha": 2, "outer": (4, 2), "decompose_both": True, "full": False}
    ),
    "full": AdapterCase("full"),
    "ia3": AdapterCase("ia3"),
    "ia3 in": AdapterCase("ia3", {"side": "in"}),
    "glora": AdapterCase("glora", {"rank": 2, "alpha": 1}),
    "boft": AdapterCase("boft", {"block_size": 6}),
    "boft rescaled": AdapterCase("boft", {"block_size": 6, "stages": 1, "rescale": True, "constraint": 0.02}),
    "oft": AdapterCase("oft", {"block_size": 4}),
    "oft series": AdapterCase("oft", {"block_size": 2, "side": "in", "terms": 5}),
    "oft in": AdapterCase("oft", {"block_size": 4, "side": "in"}),
    "oft bounded": AdapterCase("oft", {"blocks": 2, "constraint": 0.01}),
    "oft rescaled geodesic": AdapterCase("oft", {"block_size": 4, "rescale": True, "path": "geodesic"}),
}


#: kinds whose ΔW is of a structure that one of these has too: what differs is where its factors come from
METHODS: dict[str, AdapterCase] = {
    "svdlora": AdapterCase("svdlora", {"rank": 3, "alpha": 1.5}),
    "sora": AdapterCase("sora", {"rank": 2, "init": "sora"}),
    "lora-fa": AdapterCase("lora-fa", {"rank": 3, "alpha": 1.5, "rslora": True}),
    "mos": AdapterCase("mos", {"rank": 3, "alpha": 1.5}),
    "melora": AdapterCase("melora", {"rank": 2, "blocks": 2, "alpha": 1}),
    "block-lora": AdapterCase("block-lora", {"rank": 3, "blocks": 2, "alpha": 1.5}),
    "mora": AdapterCase("mora", {"rank": 1}),
    "mora rope": AdapterCase("mora", {"rank": 1, "mode": "rope"}),
    "miss": AdapterCase("miss", {"rank": 3}),
    "miss mini": AdapterCase("bone", {"rank": 3, "mini": 2}),
    "miss bat": AdapterCase("miss", {"rank": 2, "bat": True}),
    "vera": AdapterCase("vera", {"rank": 5, "seed": 3}),
    "randlora": AdapterCase("randlora", {"rank": 3, "alpha": 1.5}),
    "randlora of peft": AdapterCase("randlora", {"rank": 3, "alpha": 1.5, "pairing": "peft"}),
    "lora-xs": AdapterCase("lora-xs", {"rank": 3, "alpha": 1.5}),
    "svdiff": AdapterCase("svdiff"),
    "svft": AdapterCase("svft", {"off_diag": 1}),
    "svft random": AdapterCase("svft", {"pattern": "random", "off_diag": 2}),
    "pissa": AdapterCase("anchored", {"rank": 2, "alpha": 1}),
    "milora": AdapterCase("anchored", {"rank": 2, "start": "milora", "rslora": True}),
    "olora": AdapterCase("anchored", {"rank": 3, "start": "olora"}),
    "t-lora": AdapterCase("t-lora", {"rank": 3, "alpha": 1.5, "start": "last"}),
    "fourierft": AdapterCase("fourierft", {"frequencies": 2, "scaling": 40.0}),
    "fourierft dense": AdapterCase("fourierft", {"frequencies": 7, "scaling": 40.0}),
    "vb-lora": AdapterCase("vb-lora", {"rank": 2, "vectors": 12, "length": 5, "top": 3, "bound": 0.5, "seed": 3}),
    "tied-lora": AdapterCase("tied-lora", {"rank": 3, "alpha": 1.5, "seed": 3}),
    "tied-lora outputs": AdapterCase("tied-lora", {"rank": 2, "train_u": False}),
    "tiny-lora": AdapterCase("tiny-lora", {"rank": 3, "size": 5}),
    "dylora": AdapterCase(
        "dylora", {"rank": 4, "block": 4, "alpha": 2}
    ),  # of one block: what it draws is always all of it
}
#: the layers that these are run over in every run, one for each way to apply a matrix
TYPICAL = ("linear", "conv2d k3", "conv2d g2 d2", "conv2d reflect", "transposed2d g2", "embedding", "experts")

#: kinds with a structure of their own, for tests that ask nothing of where factors come from
STRUCTURES = ("lora", "loha", "lokr", "loldu", "dora", "oft", "boft", "ia3", "glora", "full")

#: beside them, what a few tests of files would take for another kind
CASES: dict[str, AdapterCase] = {**ADAPTERS, **METHODS, "full rows": AdapterCase("full", {"rows": [1, 4, 5]})}


#: every kind with options for layers of 8 channels, for tests of what is the same for all options of a kind
SMALL: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "loha": {"rank": 2},
    "lokr": {"rank": 1, "factor": 2},
    "loldu": {"rank": 2},
    "oft": {"block_size": 4},
    "boft": {"block_size": 4},
    "ia3": {},
    "glora": {"rank": 2},
    "full": {},
}
#: the same of all kinds; of a kind with several cases, those of the first
OPTIONS: dict[str, dict[str, Any]] = {**{case.kind: case.options for case in reversed(METHODS.values())}, **SMALL}


def make(layer: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """The layer and an input, both drawn from the seed."""
    case = {**LAYERS, **READ, **LOOKUPS, **STACKS}[layer]
    torch.manual_seed(seed)
    module = case.make().to(dtype)
    if case.rows:
        return module, torch.randint(case.rows, case.input)
    return module, torch.randn(case.input, dtype=dtype)


def train(model: nn.Module, seed: int = 1, size: float = 0.2, name: str | None = None) -> None:
    """What training does, as far as the algebra is concerned: move every adapter parameter."""
    import peftkit as pk

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model, name):
            step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((size * step).to(parameter.dtype))
