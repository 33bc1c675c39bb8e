"""Adapter files of every kind and spelling, and the ΔW that they hold."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit as pk
from tests.support.files import State, load, write
from tests.support.hands import HANDS, Hand, lycoris_tensors
from tests.support.models import Net, adapt, net, state, tree
from tests.support.zoo import ADAPTERS


def outputs(model: Net) -> list[Tensor]:
    """Of every layer that can be adapted, on inputs of its own."""
    generator = torch.Generator().manual_seed(5)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    flat, image = x(3, 8), x(2, 8, 5, 6)
    with torch.no_grad():
        found = [model.lin(flat), model.bare(flat)]
        found += [layer(image) for layer in (model.k1, model.k3, model.transposed)]
        found += [layer(x(2, 8, 5, 6)) for layer in (model.grouped, model.transposed_grouped)]
        found.append(model.attention(x(4, 2, 8), x(5, 2, 8), x(5, 2, 8))[0])
        found.append(model.cross(x(4, 2, 8), x(5, 2, 4), x(5, 2, 12))[0])
    return found


def loaded(path: Path, **options: Any) -> Net:
    model = net().double()
    pk.load(model, path, **options)
    return model.eval()


def deltas_of(path: Path, base: Mapping[str, Tensor] | None = None) -> State:
    """ΔW of a file on `Net`, by weight, as merging it in fp64 shows it."""
    model = net().double()
    if base is not None:
        model.load_state_dict({k: v.double() for k, v in base.items()})
    before = state(model)
    pk.load(model, path, other_base=True)
    pk.merge(model)
    pk.unwrap(model, keep_merged=True)
    after = state(model)
    return {k: after[k] - before[k] for k in before if not torch.equal(before[k], after[k])}


def slices(deltas: State) -> State:
    """By the names adapters have: the projections of an attention are rows of one weight."""
    found: State = {}
    for key, delta in deltas.items():
        name = key.removesuffix(".weight")
        if name == "attention.in_proj_weight":
            for part, rows in zip("qkv", delta.chunk(3), strict=True):
                if bool(rows.any()):
                    found[f"attention.{part}_proj"] = rows
        else:
            found[name.removesuffix("_weight") if name.startswith("cross") else name] = delta
    return found


def flat(name: str, delta: Tensor) -> Tensor:
    """(rows, columns) as the layer of `Net` reads its weight."""
    if name == "transposed":
        return delta.transpose(0, 1).flatten(1)
    if name == "transposed_grouped":
        return delta.unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 1).flatten(1)
    return delta.flatten(1)


def matrices(path: Path) -> State:
    return {name: flat(name, delta) for name, delta in slices(deltas_of(path)).items()}


def optimum(X: Tensor, k: int) -> float:
    """‖X − X_k‖/‖X‖ of the best X_k of rank k."""
    values = torch.linalg.svdvals(X.double())
    return float(values[k:].norm() / values.norm())


@cache
def saved(case: str, portable: bool = True) -> bytes:
    model = net()
    adapt(model, case)
    with tempfile.TemporaryDirectory() as folder:
        return pk.save(model, Path(folder) / "a.safetensors", portable=portable, training={"steps": 5}).read_bytes()


@cache
def moved(case: str) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of `Net`, and those with the zoo's adapter of `source`."""
    with tempfile.TemporaryDirectory() as folder:
        return outputs(net().double().eval()), outputs(loaded(source(Path(folder), case)))


@cache
def truth(case: str) -> State:
    """ΔW of the zoo's adapter of `source`, by weight."""
    with tempfile.TemporaryDirectory() as folder:
        return matrices(source(Path(folder), case))


@cache
def merged(case: str) -> tuple[State, State]:
    """`Net`, and it with the zoo's adapter of `source` merged into its file."""
    with tempfile.TemporaryDirectory() as folder:
        base, out = base_of(Path(folder)), Path(folder) / "out.safetensors"
        pk.merge_checkpoint(base, {source(Path(folder), case): 1.0}, out)
        return load(base), load(out)


def source(tmp_path: Path, case: str, portable: bool = True, name: str = "source.safetensors") -> Path:
    """A native file of an adapter of the zoo on every weight of `Net` that can have it."""
    path = tmp_path / name
    path.write_bytes(saved(case, portable))
    return path


def base_of(tmp_path: Path) -> Path:
    return write(tmp_path / "base.safetensors", state(net()))


READS_BASE = tuple(
    case
    for case, adapter in ADAPTERS.items()
    if adapter.kind in ("dora", "oft", "boft", "ia3", "glora") or adapter.options.get("decompose")
)
ADDITIVE = tuple(case for case in ADAPTERS if case not in READS_BASE)

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
SD15: dict[str, Callable[[], nn.Module]] = {
    f"{ATTENTION}.attn2.to_k": lambda: nn.Linear(768, 320, bias=False),
    f"{ATTENTION}.attn1.to_q": lambda: nn.Linear(320, 320, bias=False),
    "down_blocks.0.attentions.0.proj_in": lambda: nn.Conv2d(320, 320, 1),
}
KOHYA = {path: f"lora_unet_{path.replace('.', '_')}" for path in SD15}
ENTRIES = {
    "ss_base_model_version": "sd_v1",
    "ss_tag_frequency": '{"a": {"b": 1}}',
    "ss_output_name": "style",
    "ss_network_dim": "4",
    "ss_network_alpha": "2",
    "ss_network_module": "lycoris.kohya",
    "ss_network_args": '{"algo": "loha", "preset": "full"}',
    "modelspec.title": "Stil ☃",
    "modelspec.hash_sha256": "0x12",
    "sshs_model_hash": "34",
    "sshs_legacy_hash": "56",
}


def sd15_model() -> nn.Module:
    torch.manual_seed(0)
    return tree({path: make() for path, make in SD15.items()})


def kohya_hands(kind: str = "lora") -> dict[str, Hand]:
    shapes = {path: make().weight.shape[:2] for path, make in SD15.items()}
    return {path: HANDS[kind](*shape, seed=10 * i) for i, (path, shape) in enumerate(shapes.items())}


def kohya_file(path: Path, hands: Mapping[str, Hand], entries: dict[str, str] | None = None) -> Path:
    """The kernel has dimensions in the tensors that know it: LoHa's factors are flat, as is LoKr's small one."""
    tensors: State = {}
    for name, hand in hands.items():
        for key, tensor in hand.keyed(KOHYA[name]).items():
            shaped = key.rpartition(".")[2] in ("weight", "diff", "lokr_w2") and "proj_in" in name
            tensors[key] = tensor.reshape(*tensor.shape, 1, 1) if shaped else tensor
    return write(path, tensors, entries)


def require_deltas(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        error = (found[name].double() - expected[name].double()).norm() / expected[name].double().norm()
        assert error <= bound, f"{name}: {error:.2e}"


def true_deltas(hands: Mapping[str, Hand]) -> State:
    return {name: hand.delta(torch.zeros(0)) for name, hand in hands.items()}


LYCORIS = ("lin", "bare", "attention.out_proj")


def lycoris_file(path: Path, hands: Mapping[str, Hand]) -> Path:
    return write(path, lycoris_tensors(hands))


def lycoris_hands(kind: str) -> dict[str, Hand]:
    return {name: HANDS[kind](12 if name == "lin" else 8, 8, seed=i) for i, name in enumerate(LYCORIS)}


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.block = nn.Linear(8, 12), nn.ModuleDict({"lin": nn.Linear(12, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["lin"](torch.tanh(self.lin(x)))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
