"""PEFT 0.21.2: PeftModel.from_pretrained of a directory, then merge: LORA, LOHA, LOKR, OFT, IA3 and Linears' others.

Everything follows from adapter_config.json: it says which modules are adapted and what shapes their parameters have;
the file only fills them. A parameter that is missing keeps its initialisation: zero where the method starts at zero
(then nothing changes), random elsewhere (then ΔW is NaN here).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import algebra
from .container import read_tensors
from .model import base_weights, split_components
from .result import Read, Refused, result

Config = Mapping[str, Any]
PREFIX = "base_model.model."


def read(path: Path, weights: Mapping[str, Tensor], family: str | None, strength: float = 1.0) -> Read:
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = read_tensors(path / "adapter_model.safetensors")
    kind = config.get("peft_type")
    if kind not in METHODS:
        raise NotImplementedError(f"peft_type {kind!r}: expected one of {sorted(METHODS)}")
    if kind in ("IA3", *SHARED, "FOURIERFT") and strength != 1:
        raise Refused(f"AttributeError: layers of {kind} have no scale")
    component, model = wrapped(weights, family, tensors)
    targets = [name for name in model if targeted(name, model[name], config)]
    if not targets:
        raise Refused(f"ValueError: target modules {config.get('target_modules')} not found in the base model")
    shared = {f"base_model.{name}" for name in SHARED.get(str(kind), ())}
    if shared:
        largest = [max(sizes) for sizes in zip(*(model[name].shape for name in targets), strict=True)]
        for key, size in zip(sorted(shared), table_sizes(config, *largest), strict=True):
            if tuple(tensors[key].shape) != size:
                raise Refused(f"size mismatch for {key}: {tuple(tensors[key].shape)} in the file, {size} in the model")
    deltas: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    used: list[str] = sorted(shared)
    for name in targets:
        layer = Layer(name, model[name].to(torch.float64), tensors, config, weights.get(f"{component}{name}.bias"))
        try:
            delta, bias = METHODS[kind](layer, strength)
        except Refused as error:
            raise Refused(f"{name}: {error}") from error
        used += layer.used
        deltas[component + name] = delta
        if bias is not None:
            biases[component + name] = bias
    return result(deltas, biases, tensors, used)


def wrapped(weights: Mapping[str, Tensor], family: str | None, keys: Iterable[str]) -> tuple[str, Mapping[str, Tensor]]:
    """The model handed to PeftModel, as (canonical prefix, its weights): the one whose modules the keys name most.

    Of a pipeline that is one component, or an object that holds them all; a generic model is itself.
    """
    choices: list[tuple[str, Mapping[str, Tensor]]] = [("", base_weights(weights))]
    choices += [(f"{name}.", paths) for name, paths in split_components(weights, family).items()]
    paths = [
        re.split(
            r"\.(?:lora_|hada_|lokr_|oft_|ia3_|miss_|vera_|randlora_|fourierft_|tinylora_)", key.removeprefix(PREFIX)
        )[0]
        for key in keys
    ]

    def hits(choice: tuple[str, Mapping[str, Tensor]]) -> int:
        return sum(path in choice[1] for path in paths)

    return max(choices, key=hits)


def targeted(name: str, weight: Tensor, config: Config) -> bool:
    """Whether the config adapts the module (tuners_utils.py:2337): its name, a dotted suffix of it, or a regex."""
    excluded = config.get("exclude_modules")
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _suffix(name, excluded)):
        return False
    wanted = config.get("target_modules")
    if wanted is None:
        raise Refused("ValueError: please specify target_modules")
    if isinstance(wanted, str):
        return weight.ndim == 2 if wanted == "all-linear" else bool(re.fullmatch(wanted, name))
    return _suffix(name, wanted)


def _suffix(name: str, choices: Iterable[str]) -> bool:
    return any(name == choice or name.endswith(f".{choice}") for choice in choices)


def patterned(patterns: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first pattern that matches the end of the name, from a dot on (other.py:1524)."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


class Layer:
    """One adapted module: its weight, its bias if known, its parameters in the file, its rank and alpha."""

    def __init__(
        self, name: str, weight: Tensor, tensors: Mapping[str, Tensor], config: Config, bias: Tensor | None
    ) -> None:
        self.name, self.weight, self.config, self.bias = name, weight, config, bias
        self.prefix = f"{PREFIX}{name}."
        common = {key: t for key, t in tensors.items() if not key.startswith(PREFIX)}
        self.shared = {key.removeprefix("base_model."): t for key, t in common.items()}
        self.own = {key.removeprefix(self.prefix): t for key, t in tensors.items() if key.startswith(self.prefix)}
        self.used: list[str] = []

    def rank(self) -> int:
        return int(patterned(self.config.get("rank_pattern"), self.name, self.config.get("r", 8)))

    def alpha(self, key: str) -> float:
        return patterned(self.config.get("alpha_pattern"), self.name, self.config.get(key, 8))

    def parameter(self, name: str, shape: Sequence[int], initial: float = math.nan) -> Tensor:
        """The parameter from the file, or its initial value; NaN stands for random."""
        tensor = self.own.get(name)
        if tensor is None:
            return torch.full(tuple(shape), initial, dtype=torch.float64)
        if tuple(tensor.shape) != tuple(shape):
            raise Refused(f"size mismatch for {name}: {tuple(tensor.shape)} in the file, {tuple(shape)} in the model")
        self.used.append(self.prefix + name)
        return tensor

    def require(self, *dims: int) -> None:
        if self.weight.ndim not in dims:
            raise Refused(f"TypeError: a layer with a {self.weight.ndim}-D weight is not supported")

    @property
    def unchanged(self) -> Tensor:
        return torch.zeros_like(self.weight)


Change = tuple[Tensor, "Tensor | None"]


def _lora(layer: Layer, strength: float) -> Change:
    layer.require(2, 3, 4, 5)
    weight, rank, alpha = layer.weight, layer.rank(), layer.alpha("lora_alpha")
    config = layer.config
    out, into, *kernel = weight.shape
    down = layer.parameter("lora_A.weight", (rank, into, *kernel))
    up = layer.parameter("lora_B.weight", (out, rank, *[1] * len(kernel)), 0.0)
    scaling = strength * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    bias = scaling * layer.parameter("lora_B.bias", (out,), 0.0) if config.get("lora_bias") else None
    magnitude = None
    if config.get("use_dora"):
        norms = algebra.row_norms(weight)
        shape = (out,) if not kernel else (1, out, *[1] * len(kernel))
        magnitude = layer.parameter("lora_magnitude_vector", shape)
        if magnitude.isnan().all():  # initialised from the base
            magnitude = norms
    if "lora_B.weight" not in layer.own:
        down = torch.zeros_like(down)
    return lora_delta(weight, down, up, scaling, magnitude), bias


def lora_delta(weight: Tensor, down: Tensor, up: Tensor, scaling: float, magnitude: Tensor | None) -> Tensor:
    """scaling·BA, or m·V/‖V‖ − W with V = W + scaling·BA per output row: the strength is inside V (dora.py:89)."""
    delta = scaling * algebra.product(up, down).reshape(weight.shape)
    if magnitude is None:
        return delta
    merged = weight + delta
    return merged * algebra.per_row(magnitude.flatten(), weight) / algebra.row_norms(merged) - weight


def _tucker_kernel(layer: Layer) -> tuple[int, ...] | None:
    """The kernel of the Tucker core if there is one: use_effective_conv2d and not 1×1. Conv1d's is (k, 1)."""
    kernel = tuple(layer.weight.shape[2:])
    if not layer.config.get("use_effective_conv2d") or all(size == 1 for size in kernel):
        return None
    return kernel if len(kernel) == 2 else (*kernel, 1)


def _loha(layer: Layer, strength: float) -> Change:
    layer.require(2, 3, 4)
    rank, alpha, core_kernel = layer.rank(), layer.alpha("alpha"), _tucker_kernel(layer)
    out, into, *kernel = layer.weight.shape
    if "hada_w2_b" not in layer.own:  # starts at zero
        return layer.unchanged, None
    halves = []
    for half in ("1", "2"):
        if core_kernel:
            core = layer.parameter(f"hada_t{half}", (rank, rank, *core_kernel))
            factor_out = layer.parameter(f"hada_w{half}_a", (rank, out))
            halves.append(algebra.tucker(core, factor_out.mT, layer.parameter(f"hada_w{half}_b", (rank, into))))
        else:
            factor_out = layer.parameter(f"hada_w{half}_a", (out, rank))
            halves.append(factor_out @ layer.parameter(f"hada_w{half}_b", (rank, into * math.prod(kernel))))
    return strength * alpha / rank * (halves[0] * halves[1]).reshape(layer.weight.shape), None


def _lokr(layer: Layer, strength: float) -> Change:
    """The shapes of the factors come from decompose_factor and r alone; alpha/r always (lokr/layer.py:189)."""
    layer.require(2, 3, 4)
    config, rank, alpha, core_kernel = layer.config, layer.rank(), layer.alpha("alpha"), _tucker_kernel(layer)
    out, into, *kernel = layer.weight.shape
    factor = config.get("decompose_factor", -1)
    (a, b), (c, d) = factorization(out, factor), factorization(into, factor)
    zeroed = "lokr_w2" if config.get("init_weights") == "lycoris" else "lokr_w1"
    if not layer.own or not any(name.startswith(zeroed) for name in layer.own):
        return layer.unchanged, None
    if config.get("decompose_both") and rank < max(a, c) / 2:
        first = layer.parameter("lokr_w1_a", (a, rank)) @ layer.parameter("lokr_w1_b", (rank, c))
    else:
        first = layer.parameter("lokr_w1", (a, c))
    if rank >= max(b, d) / 2:
        second = layer.parameter("lokr_w2", (b, d, *kernel))
    elif core_kernel:
        core = layer.parameter("lokr_t2", (rank, rank, *core_kernel))
        factors = layer.parameter("lokr_w2_a", (rank, b)), layer.parameter("lokr_w2_b", (rank, d))
        second = torch.einsum("ijkl,ip,jr->prkl", core, *factors)
    else:
        into_second = layer.parameter("lokr_w2_b", (rank, d * math.prod(kernel)))
        second = layer.parameter("lokr_w2_a", (b, rank)) @ into_second
    if second.ndim == 4:
        first = first[..., None, None]
    try:
        change = torch.kron(first, second.contiguous())  # of 2-D and 3-D (Conv1d): not C ⊗ D (lokr/layer.py:498)
    except RuntimeError as error:  # a Conv1d core of rank 1: contiguous by name only
        raise Refused(f"RuntimeError: {error}") from error
    return strength * alpha / rank * change.reshape(layer.weight.shape), None


def factorization(size: int, factor: int) -> tuple[int, int]:
    """The factor first if it divides, even if it is the larger; else the most balanced pair, the smaller first."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor == -1 else factor
    m = max((m for m in range(1, limit + 1) if size % m == 0 and m * m <= size), default=1)
    return m, size // m


def _oft(layer: Layer, strength: float) -> Change:
    """W' = W·Rᵀ over the flattened inputs. A strength is warned about and changes nothing (oft/layer.py:363)."""
    layer.require(2, 4)
    del strength
    config, weight = layer.config, layer.weight
    if weight.ndim == 4 and weight.shape[2] != weight.shape[3]:
        raise Refused("RuntimeError: the kernel is taken to be square")
    inputs = weight[0].numel()
    count, size = _blocks(inputs, config.get("r", 0), config.get("oft_block_size", 32))
    shared = bool(config.get("block_share"))
    vectors = layer.parameter("oft_R.weight", (1 if shared else count, size * (size - 1) // 2), 0.0)
    rows, columns = torch.triu_indices(size, size, 1)
    upper = torch.zeros(len(vectors), size, size, dtype=torch.float64)
    upper[:, rows, columns] = vectors
    skewed = algebra.skew(upper)
    if config.get("coft"):  # each block projected to ‖Q‖ ≤ eps/√blocks
        norms, eps = skewed.flatten(1).norm(dim=1)[:, None, None], config.get("eps", 6e-5) / math.sqrt(len(skewed))
        skewed = torch.where(norms <= eps, skewed, skewed * eps / norms)
    if config.get("use_cayley_neumann", True):
        blocks = _neumann(skewed, config.get("num_cayley_neumann_terms", 5))
    else:  # (I − Q)(I + Q)⁻¹, the inverse of what the series approximates
        blocks = algebra.cayley(-skewed)
    rotation = torch.block_diag(*(blocks.expand(count, size, size) if shared else blocks))
    return (weight.flatten(1) @ rotation.mT).reshape(weight.shape) - weight, None


def _neumann(skewed: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Qⁿ⁻¹, the last once (oft/layer.py:122)."""
    total = torch.eye(skewed.shape[-1], dtype=skewed.dtype).expand_as(skewed).clone()
    if terms > 1:
        total += 2 * skewed
    if terms > 2:
        power = skewed @ skewed
        total += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skewed
            total += 2 * power
        total += power @ skewed
    return total


def _blocks(inputs: int, count: int, size: int) -> tuple[int, int]:
    """(number, size) of the blocks from the one that is not 0, moved to the nearest divisor (oft/layer.py:488)."""
    if (count == 0) == (size == 0):
        raise Refused("ValueError: exactly one of r and oft_block_size must be set")
    wanted = size or count
    if wanted >= inputs:
        found = inputs
    else:
        above = next(n for n in range(wanted, inputs + 1) if inputs % n == 0)
        below = next(n for n in range(wanted, 0, -1) if inputs % n == 0)
        found = below if wanted - below <= above - wanted else above
    return (inputs // found, found) if size else (found, inputs // found)


def _ia3(layer: Layer, strength: float) -> Change:
    """W∘l over the outputs, and the bias with it, or over the inputs of a feedforward module."""
    layer.require(2, 4, 5)
    del strength
    weight, name = layer.weight, layer.name
    forward = layer.config.get("feedforward_modules")
    if forward is None:
        raise Refused("ValueError: please specify feedforward_modules")
    inward = bool(re.fullmatch(forward, name)) if isinstance(forward, str) else name.endswith(tuple(forward))
    size = weight.shape[1] if inward else weight.shape[0]
    if weight.ndim == 2:
        scale = layer.parameter("ia3_l", (1, size) if inward else (size, 1), 1.0)
    else:
        scale = layer.parameter("ia3_l", (1, size, *[1] * (weight.ndim - 2)), 1.0)
        scale = scale if inward else scale.transpose(0, 1)
    bias = None
    if not inward and layer.bias is not None:
        bias = layer.bias.to(torch.float64) * (scale.flatten() - 1)
    return weight * (scale - 1), bias


def _adalora(layer: Layer, strength: float) -> Change:
    """The rank is init_r, and α is divided by it and 1e-5 (adalora/layer.py:172)."""
    layer.require(2, 4)
    rank, alpha = layer.config["init_r"], layer.config["lora_alpha"]
    (out, into), weight = layer.weight.flatten(1).shape, layer.weight
    down, up = layer.parameter("lora_A", (rank, into)), layer.parameter("lora_B", (out, rank))
    delta = up @ (down * layer.parameter("lora_E", (rank, 1), 0.0))
    return strength * alpha / (rank + 1e-5) * delta.reshape(weight.shape), None


def _miss(layer: Layer, strength: float) -> Change:
    """Runs of r inputs under one matrix, or r×r blocks of W; a strength changes nothing (miss/layer.py:136)."""
    layer.require(2)
    del strength
    weight, rank, mode = layer.weight, layer.config["r"], layer.config["init_weights"]
    out, into = weight.shape
    if mode == "bat":
        blocks = layer.parameter("miss_block", (out // rank, rank, rank), 0.0)
        tiles = weight.reshape(out // rank, rank, into // rank, rank).permute(2, 0, 1, 3)
        return (tiles @ blocks + blocks).permute(1, 2, 0, 3).reshape(weight.shape), None
    width = layer.config["mini_r"] if mode == "mini" else out
    block = layer.parameter("miss_block", (rank, width), 0.0).repeat(-(-into // rank), out // width)
    return block[:into].mT, None


def _vera(layer: Layer, strength: float) -> Change:
    layer.require(2)
    del strength
    out, into = layer.weight.shape
    rank = layer.config["r"]
    b = layer.parameter("vera_lambda_b", (out,), 0.0)
    d = layer.parameter("vera_lambda_d", (rank,), layer.config.get("d_initial", 0.1))
    return b[:, None] * layer.shared["vera_B"][:out] @ (d[:, None] * layer.shared["vera_A"][:, :into]), None


def _randlora(layer: Layer, strength: float) -> Change:
    """Both are flattened as they lie: columns basis by basis, rows rank by rank (randlora/layer.py:296)."""
    layer.require(2)
    del strength
    rank, (short, long) = layer.config["r"], sorted(layer.weight.shape)
    count = math.ceil(short / rank)
    lambdas = layer.parameter("randlora_lambda", (rank, count), 0.0)
    gammas = layer.parameter("randlora_gamma", (count, short))
    columns = layer.shared["randlora_B"][:long, :count].flatten(1)
    rows = (lambdas[:, :, None] * layer.shared["randlora_A"][:, :1, :short] * gammas).flatten(0, 1)
    delta = layer.config["randlora_alpha"] / rank * columns @ rows
    return delta if layer.weight.shape[1] == short else delta.mT, None


def table_sizes(config: Config, rows: int, columns: int) -> list[tuple[int, ...]]:
    """The sizes of the tables A and B of a model whose targets have at most so many outputs and inputs."""
    rank = config["r"]
    if config["peft_type"] == "VERA":
        return [(rank, columns), (rows, rank)]
    if config["peft_type"] == "TINYLORA":
        return [(config["u"],)]
    short, long = sorted((rows, columns))
    return [(rank, 1, short), (long, math.ceil(short / rank), rank)]


def _fourierft(layer: Layer, strength: float) -> Change:
    layer.require(2)
    del strength
    weight, config = layer.weight, layer.config
    count = config.get("n_frequency_pattern", {}).get(layer.name, config["n_frequency"])
    generator = torch.Generator().manual_seed(config["random_loc_seed"])
    places = torch.randperm(weight.numel(), generator=generator)[:count]
    spectrum = torch.zeros(weight.numel(), dtype=torch.float64)
    spectrum[places] = layer.parameter("fourierft_spectrum", (count,), 0.0).to(torch.float64)
    return torch.fft.ifft2(spectrum.reshape(weight.shape)).real * config["scaling"], None


def _tinylora(layer: Layer, strength: float) -> Change:
    """One vector for all where weight_tying is 1; the frames are in the file (tinylora/layer.py)."""
    layer.require(2)
    del strength
    (out, into), config = layer.weight.shape, layer.config
    assert config["weight_tying"] == 1
    assert config["save_projection"]
    rank, size = config["r"], config["u"]
    projections = layer.parameter("tinylora_P", (size, rank, rank))
    core = torch.einsum("i,ijk->jk", layer.shared["tinylora_v.0"].to(projections.dtype), projections)
    return layer.parameter("tinylora_B", (out, rank)) @ core @ layer.parameter("tinylora_A", (rank, into)), None


#: the tables that all modules share
SHARED = {"TINYLORA": ("tinylora_v.0",), "VERA": ("vera_A", "vera_B"), "RANDLORA": ("randlora_A", "randlora_B")}
METHODS: dict[str, Callable[[Layer, float], Change]] = {
    "LORA": _lora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "OFT": _oft,
    "IA3": _ia3,
    "ADALORA": _adalora,
    "MISS": _miss,
    "VERA": _vera,
    "RANDLORA": _randlora,
    "FOURIERFT": _fourierft,
    "TINYLORA": _tinylora,
}
