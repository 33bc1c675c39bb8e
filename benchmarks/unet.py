"""A training step of Stable Diffusion's whole U-Net, 282 adapted layers, over the frozen U-Net; and what it keeps.

    python benchmarks/unet.py [--rounds 3] [--latents 32] [--save]

The architecture is that of SD 1.5 (860M parameters, random weights), batch 1. Every way adapts a model of its own whose
frozen weights are shared. A way that is more than twice as slow as the frozen model takes its turn once; of those that
build ΔW of every layer in every step, LoRA's stands for all.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import importlib
import logging
import shlex
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from rich.progress import track
from torch import Tensor, nn

from peftkit.bench.peers import KINDS, LYCORIS_MODULES, randomize, ways, wrap
from peftkit.bench.rows import Row, dump, table
from peftkit.bench.timing import Call, Spread, contest, ratios
from peftkit.cli.terminal import OUT

RESULTS = Path(__file__).parent / "results" / "unet.json"
PEERS = ["lycoris", "peft"]
#: ways that take four to nine times the frozen model and keep 4 GB: several of them in a process pass 24 GiB
LEFT_OUT = {
    "loha": ("lycoris", "lycoris bypass", "peft"),
    "lokr": ("lycoris", "peft"),
    "dora": ("lycoris",),
    "oft": ("lycoris",),
}


class Denoiser(nn.Module):
    """The U-Net on one input, (1, 4, latents, latents), at one time step with 77 tokens."""

    def __init__(self, unet: nn.Module, latents: int) -> None:
        super().__init__()
        self.unet = unet
        self.inputs = torch.randn(1, 4, latents, latents), torch.tensor([500]), torch.randn(1, 77, 768)

    def forward(self) -> Tensor:
        return self.unet(*self.inputs).sample


def base(latents: int) -> Denoiser:
    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    model = Denoiser(unet.requires_grad_(False), latents)
    model.inputs[0].requires_grad_()  # so that the frozen model has a backward of its own, through every layer
    return model


def shared(model: Denoiser) -> Denoiser:
    """A copy with the very same weights and input."""
    kept = [*model.parameters(), *model.inputs]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in kept})


def adapted(way: str, kind: str, model: Denoiser) -> Denoiser:
    """The model with adapters on all its Linear and Conv2d layers."""
    _, of_lycoris, of_peft = KINDS[kind]
    layers = {name: m for name, m in model.unet.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    if way == "ours":
        wrap(model.unet, kind)
    elif way.startswith("lycoris"):
        assert of_lycoris is not None
        module = getattr(importlib.import_module(LYCORIS_MODULES[of_lycoris[0]]), of_lycoris[0])
        adapters = nn.ModuleList()
        for name, layer in layers.items():
            bypass = {"bypass_mode": way.endswith("bypass")}
            adapter = module(name.replace(".", "_"), layer, 1.0, **of_lycoris[1], **bypass)
            adapter.apply_to()
            adapters.append(adapter)
        model.add_module("adapters", adapters)
    else:
        assert of_peft is not None
        peft = importlib.import_module("peft")
        config = getattr(peft, of_peft[0])(target_modules=list(layers), **of_peft[1])
        peft.inject_adapter_in_model(config, model.unet)
    randomize(model)
    return model


def step(model: Denoiser) -> Call:
    wanted = [p for p in model.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(model().square().mean(), [model.inputs[0], *wanted], allow_unused=True)


def kept(model: Denoiser) -> float:
    """MB that autograd keeps for backward, beyond what the model holds anyway."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), *model.inputs)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model()
    del out
    return sum(found.values()) / 1e6


def measure(kind: str, rounds: int, latents: int) -> Row:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # of peers, about how they are used
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    frozen = base(latents)
    calls: dict[str, Call] = {"frozen": step(frozen)}
    memory = {"frozen": kept(frozen)}
    for way in ways(PEERS, kind):
        if way in LEFT_OUT.get(kind, ()):
            continue
        try:
            model = adapted(way, kind, shared(frozen))
            memory[way] = kept(model)
            trim()
        except (RuntimeError, ValueError) as error:  # not every peer takes every layer
            OUT.print(f"{way} {kind}: {error}", markup=False)
            continue
        calls[way] = step(model)
    once = {name: call for name, call in calls.items() if name not in ("frozen", "ours")}
    first = contest({"frozen": calls["frozen"], **once}, rounds=1, prepare=dict.fromkeys(("frozen", *once), trim))
    slow = {name for name in once if first[name][0] > 2 * first["frozen"][0]}
    seconds = contest(
        {name: call for name, call in calls.items() if name not in slow},
        rounds=rounds,
        prepare=dict.fromkeys(calls, _nothing),
    )
    found = ratios(seconds, seconds["frozen"]) | {
        name: Spread.of([first[name][0] / first["frozen"][0]]) for name in slow
    }
    del found["frozen"]
    return Row(
        question="unet",
        kind=kind,
        case=f"SD 1.5 U-Net, 282 layers, latents of {latents}²",
        dtype="float32",
        reference="frozen U-Net",
        reference_ms=1e3 * Spread.of(seconds["frozen"]).median,
        ratio={way: found[way] for way in calls if way != "frozen"},
        memory={way: memory[way] for way in ("frozen", *found)},
    )


def trim() -> None:
    """Give freed memory back: the heap of glibc grows without end between the gigabytes that some peers keep."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _nothing() -> None:
    """So that a contest makes one call a turn, without trying how long it takes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way")
    parser.add_argument("--latents", type=int, default=32, help="pixels of the latent image each way")
    parser.add_argument("--kinds", default="lora,loha,lokr,dora,oft,loldu")
    parser.add_argument("--save", action="store_true", help="keep the result in benchmarks/results")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for kind in track(arguments.kinds.split(","), description="measuring"):
        # A process of its own: what the peers' steps leave of the heap of one kind does not weigh on the next
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            rows.append(process.submit(measure, kind, arguments.rounds, arguments.latents).result())
        OUT.print(table(rows[-1:]))
        if arguments.save:
            RESULTS.write_text(dump(rows, "cpu", shlex.join(["python", *sys.argv])))


if __name__ == "__main__":
    main()
