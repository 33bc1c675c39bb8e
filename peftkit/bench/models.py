"""Whole models: merging adapters into their weights, watching them train, and merging into a checkpoint file."""

from __future__ import annotations

import copy
import importlib
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import KINDS, LYCORIS_MODULES, randomize, wrap
from peftkit.bench.rows import Row
from peftkit.bench.step import step
from peftkit.bench.timing import Call, Spread, contest, peak_bytes, ratios
from peftkit.errors import BenchError
from peftkit.monitor import CSMonitor
from peftkit.wrapping.installed import installed_adapters


def merge(
    shapes: Sequence[LayerShape],
    case: str,
    kind: str,
    dtype: torch.dtype,
    *,
    device: str,
    peers: list[str],
    rounds: int,
) -> Row:
    """Time merging for good into a model, over reading and writing each of its weights once.

    Args:
        shapes: the model's layers.
        case: the model's name.
        kind: one of `peers.KINDS`.
        dtype: of the weights.
        device: "cpu" or "cuda".
        peers: of "lycoris" and "peft".
        rounds: turns of every way.

    Raises:
        BenchError: a merged weight errs by more than its rounding.
    """
    base = _model(shapes, dtype, device)
    prepare: dict[str, Call] = {}
    calls: dict[str, Call] = {}
    for way in ("ours", *(peer for peer in peers if KINDS[kind][1 if peer == "lycoris" else 2] is not None)):
        prepare[way], calls[way] = _merging(way, kind, copy.deepcopy(base))
    weights = [p for p in base.parameters() if p.dim() > 1]

    def touch() -> None:
        for weight in weights:
            weight.mul_(1.0)

    with torch.no_grad():
        seconds = contest({"touch": touch, **calls}, rounds=rounds, prepare=prepare)
        memory = {}
        for way, call in calls.items():
            prepare[way]()
            memory[way] = peak_bytes(call, device) / 1e6
    touched = seconds.pop("touch")
    return Row(
        question="merge",
        kind=kind,
        case=f"{case}: {len(shapes)} layers, {sum(w.numel() for w in weights) / 1e6:.0f}M",
        dtype=str(dtype).removeprefix("torch."),
        reference="touching every weight",
        reference_ms=1e3 * Spread.of(touched).median,
        ratio=ratios(seconds, touched),
        memory=memory,
        error=_merge_error(shapes[0], kind, dtype, device),
    )


def _merging(way: str, kind: str, model: nn.Module) -> tuple[Call, Call]:
    """A call that puts adapters on the model, and one that merges them into it."""
    _, of_lycoris, of_peft = KINDS[kind]
    held: list[Any] = []

    def wrap_ours() -> None:
        wrap(model, kind)
        randomize(model)

    def make_lycoris() -> None:
        assert of_lycoris is not None
        name, theirs = of_lycoris
        module = getattr(importlib.import_module(LYCORIS_MODULES[name]), name)
        held[:] = [module("adapted", layer, 1.0, **theirs) for layer in model.children()]
        for adapter in held:
            randomize(adapter)

    def make_peft() -> None:
        assert of_peft is not None
        peft = importlib.import_module("peft")
        name, theirs = of_peft
        targets = [name for name, _ in model.named_children()]
        held[:] = [peft.get_peft_model(model, getattr(peft, name)(target_modules=targets, **theirs))]
        randomize(held[0])

    def merge_lycoris() -> None:
        for adapter in held:
            adapter.merge_to(1.0)

    if way == "ours":
        return wrap_ours, lambda: pk.merge(model, backup=None)
    if way == "lycoris":
        return make_lycoris, merge_lycoris
    return make_peft, lambda: held[0].merge_and_unload()


def _merge_error(shape: LayerShape, kind: str, dtype: torch.dtype, device: str) -> float:
    """The relative error of one merged weight against W + ΔW in float64, which may be that of its rounding."""
    layer = shape.layer(dtype, device)
    wrap(layer, kind)
    randomize(layer)
    adapter, W = cast(Any, layer.adapters)["default"], cast(Tensor, layer.weight).detach()
    W = W.flatten(1).double()
    expected = W + copy.deepcopy(adapter).double().delta(W).dense().detach()
    pk.merge(layer, backup=None)
    error = ((cast(Tensor, layer.weight).flatten(1).double() - expected).norm() / expected.norm()).item()
    return _refused(error, kind, str(shape), dtype)


def monitor(shapes: Sequence[LayerShape], case: str, kind: str, dtype: torch.dtype, *, device: str, rounds: int) -> Row:
    """Time measuring CS once on all layers, over a training step of each.

    Args:
        shapes: the layers.
        case: the name of the model they are of.
        kind: one of `peers.KINDS`.
        dtype: of layers and inputs.
        device: "cpu" or "cuda".
        rounds: turns of both.

    Raises:
        BenchError: CS is not what float64 gives; nothing was timed.
    """
    model = _model(shapes, dtype, device)
    wrap(model, kind)
    randomize(model)
    steps = []
    for layer, shape in zip(model.children(), shapes, strict=True):
        x = shape.input(dtype, device).requires_grad_()
        with torch.no_grad():
            g = torch.randn_like(layer(x))
        steps.append(step(layer, x, g))
    watching = CSMonitor(model)
    cs = watching.measure().cs
    exact = _cosine(model)
    if abs(cs - exact) > 1e-5:
        raise BenchError(f"monitor {kind} in {dtype}: CS is {cs:.8f}, {exact:.8f} in float64; nothing was timed")

    def train() -> None:
        for each in steps:
            each()

    seconds = contest({"step": train, "ours": watching.measure}, rounds=rounds)
    trained = seconds.pop("step")
    return Row(
        question="monitor",
        kind=kind,
        case=f"{case}: {len(shapes)} layers",
        dtype=str(dtype).removeprefix("torch."),
        reference="training step",
        reference_ms=1e3 * Spread.of(trained).median,
        ratio=ratios(seconds, trained),
        memory={"ours": peak_bytes(watching.measure, device) / 1e6},
        error=abs(cs - exact),
    )


@torch.no_grad()
def _cosine(model: nn.Module) -> float:
    """The mean cosine of W and ΔW by its definition in float64."""
    cosines = []
    for layer in model.children():
        W = cast(Tensor, layer.weight).detach().flatten(1).double()
        delta = copy.deepcopy(cast(Any, layer.adapters)["default"]).double().delta(W).dense()
        cosines.append(((delta * W).sum() / delta.norm() / W.norm()).item())
    return sum(cosines) / len(cosines)


def checkpoint(shapes: Sequence[LayerShape], case: str, kind: str, dtype: torch.dtype, *, rounds: int) -> Row:
    """Time merging an adapter file into a checkpoint file, over copying that file.

    Args:
        shapes: the checkpoint's layers.
        case: its name.
        kind: one of `peers.KINDS`.
        dtype: of the checkpoint.
        rounds: turns of both.

    Raises:
        BenchError: not every weight was merged, or one errs by more than its rounding.
    """
    model = _model(shapes, dtype, "cpu")
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, out, copied = (
            Path(folder) / f"{name}.safetensors" for name in ("base", "adapter", "out", "copy")
        )
        save_file({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, base)
        wrap(model, kind)
        randomize(model)
        pk.save(model, adapter, portable=kind == "loldu")
        merging: Callable[[], Any] = lambda: pk.merge_checkpoint(base, {adapter: 0.8}, out)  # noqa: E731
        report = merging()
        if len(report.weights) != len(shapes):
            raise BenchError(f"{kind}: {len(report.weights)} of {len(shapes)} weights were merged; nothing was timed")
        seconds = contest({"copy": lambda: shutil.copyfile(base, copied), "ours": merging}, rounds=rounds, least=0)
        size = base.stat().st_size
        merged = load_file(out)["layer0.weight"].flatten(1).double()
    first = next(installed_adapters(model))
    W = first.base.double()
    expected = W + 0.8 * copy.deepcopy(first.adapter).double().delta(W).dense().detach()
    wrong = _refused(((merged - expected).norm() / expected.norm()).item(), kind, case, dtype)
    copying = seconds.pop("copy")
    return Row(
        question="checkpoint",
        kind=kind,
        case=f"{case}: {size / 1e6:.0f} MB",
        dtype=str(dtype).removeprefix("torch."),
        reference="copying the file",
        reference_ms=1e3 * Spread.of(copying).median,
        ratio=ratios(seconds, copying),
        error=wrong,
    )


def _refused(error: float, kind: str, case: str, dtype: torch.dtype) -> float:
    """The error, if it is no more than that of rounding; else BenchError."""
    if not error < 2 * torch.finfo(dtype).eps:
        raise BenchError(f"{kind} into {case} in {dtype}: merged with an error of {error:.1e}; nothing was reported")
    return error


def _model(shapes: Sequence[LayerShape], dtype: torch.dtype, device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({f"layer{i}": shape.layer(dtype, device) for i, shape in enumerate(shapes)})
