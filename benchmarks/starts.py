"""How near to the gradient each start's first step goes, what it keeps, and how long it takes; and a whole U-Net.

    python benchmarks/starts.py [--rounds 5] [--no-unet] [--save]

"alignment": the cosine of the first step of gradient descent, B₀·B₀ᵀ·G + G·A₀ᵀ·A₀, and of the weight's gradient G over
three batches whose channels fall off as 0.8ⁱ; "best": that of the best step of rank 2r; "peft": that of PEFT's start of
that name, where PEFT has it for the layer. "memory": what the pass keeps, over what all gradients would take. Time is
over one forward and backward pass of the batches. For the U-Net of Stable Diffusion 1.5, "memory" is over the model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn

import peftkit as pk
from peftkit.bench.networks import unet
from peftkit.bench.rows import Row
from peftkit.bench.script import Script
from peftkit.bench.timing import Spread, contest, ratios

RANK = 8
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear 768×768": (lambda: nn.Linear(768, 768), (512, 768)),
    "conv 128×128 k3": (lambda: nn.Conv2d(128, 128, 3, padding=1), (4, 128, 16, 16)),
    "conv 128×128 k3, 4 groups": (lambda: nn.Conv2d(128, 128, 3, padding=1, groups=4), (4, 128, 16, 16)),
    "transposed conv 128×64 k4": (lambda: nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1), (4, 128, 8, 8)),
}
STARTS = ("random", "orthogonal", "pissa", "milora", "olora", "eva", "corda", "lora-one", "lora-ga")


class Problem:
    """A layer, batches, and a loss against another layer, with the gradient G (m, n) of its weight."""

    def __init__(self, layer: str) -> None:
        make, size = LAYERS[layer]
        torch.manual_seed(0)
        self.layer, self.target = make(), make()
        mix = torch.linalg.qr(torch.randn(size[1], size[1]))[0] * 0.8 ** torch.arange(size[1])
        self.batches = [torch.einsum("nc...,dc->nd...", torch.randn(size), mix) for _ in range(3)]
        twin = copy.deepcopy(self.layer)
        for x in self.batches:
            self.backward(twin, x)
        grad = twin.weight.grad
        assert isinstance(grad, Tensor)
        pk.wrap(twin, "lora", rank=1)
        self.G = next(iter(twin.adapter_state.slots.values())).geometry.matrix(grad).double()  # pyright: ignore

    def backward(self, model: nn.Module, x: Tensor) -> None:
        (model(x) - self.target(x)).square().mean().backward()

    def alignment(self, B: Tensor, A: Tensor) -> float:
        B, A = B.detach().double(), A.detach().double()
        first = B @ (B.mT @ self.G) + (self.G @ A.mT) @ A
        return float((first * self.G).sum() / (first.norm() * self.G.norm()))

    def best(self) -> float:
        values = torch.linalg.svdvals(self.G).square()
        return float((values[: 2 * RANK].sum() / values.sum()).sqrt())


def started(problem: Problem, how: str) -> tuple[Any, int]:
    """Return the adapter of a layer that was given a start, and the bytes that the pass kept."""
    layer = copy.deepcopy(problem.layer)
    kind: dict[str, Any] = {"kind": "lora"} if how == "random" else {"kind": "anchored", "start": "given"}
    pk.wrap(layer, rank=RANK, **kind)
    held = 0
    if how != "random":
        needs = how in ("lora-ga", "lora-one")
        data = problem.batches if needs or how in ("eva", "corda") else []
        held = pk.start(layer, how, data, problem.backward if needs else None).extra_bytes
    return layer.adapters["default"], held  # pyright: ignore


def of_peft(problem: Problem, how: str) -> float | None:
    """Return the alignment of PEFT's start, or None where it has none for the layer."""
    if not isinstance(problem.layer, nn.Linear) or how in ("milora", "lora-one", "eva"):
        return None
    net = nn.Sequential(copy.deepcopy(problem.layer))
    named = {"random": True, "lora-ga": "lora_ga"}.get(how, how)
    more: dict[str, Any] = {"lora-ga": {"lora_ga_config": LoraGAConfig()}, "corda": {"corda_config": CordaConfig()}}
    config = peft.LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=["0"], init_lora_weights=named, **more.get(how, {})
    )
    if how == "lora-ga":

        def steps() -> None:
            for x in problem.batches:
                problem.backward(net, x.requires_grad_())

        preprocess_loraga(net, config, steps)
    if how == "corda":
        preprocess_corda(net, config, run_model=lambda: [net(x) for x in problem.batches])  # pyright: ignore
    found: Any = peft.get_peft_model(net, config).base_model.model[0]  # pyright: ignore
    return problem.alignment(found.lora_B["default"].weight, found.lora_A["default"].weight)


def measure(layer: str, how: str, rounds: int) -> Row:
    """Take one cell of the table."""
    problem = Problem(layer)
    adapter, held = started(problem, how)
    B, A = (adapter.up, adapter.down) if how == "random" else (adapter.up0, adapter.down0)
    values: dict[str, Any] = {"alignment": round(problem.alignment(B, A), 3), "best": round(problem.best(), 3)}
    theirs = of_peft(problem, how)
    if theirs is not None:
        values["peft"] = round(theirs, 3)
    values["memory"] = round(held / (4 * problem.G.numel()), 3)
    model = copy.deepcopy(problem.layer)
    calls = {
        "pass": lambda: [problem.backward(model, x) for x in problem.batches],
        "ours": lambda: started(problem, how),
    }
    seconds = contest(calls, rounds=rounds, least=0.01)
    base = seconds.pop("pass")
    return Row(
        "starts", how, layer, "float32", "a pass", 1e3 * Spread.of(base).median, ratios(seconds, base), values=values
    )


def whole(how: str) -> Row:
    """Give every weight of SD 1.5's U-Net a start, after one image, and find what is kept beside the model."""
    network = unet("sd15", 32)
    size = sum(p.nbytes for p in network.parameters())
    begin = time.perf_counter()
    network().square().mean().backward()
    one = time.perf_counter() - begin
    pk.wrap(network, "anchored", rank=RANK // 2, start="given")
    begin = time.perf_counter()
    report = pk.start(network, how, [None], lambda model, _: model().square().mean().backward())
    values = {
        "layers": report.modules,
        "memory": round(report.extra_bytes / size, 4),
        "passes": round((time.perf_counter() - begin) / one, 1),
    }
    return Row("starts of a U-Net", how, f"SD 1.5, rank {RANK // 2}", "float32", values=values)


def main() -> None:
    script = Script(__file__, __doc__, rounds=5)
    script.parser.add_argument("--no-unet", action="store_true", help="leave the U-Net out")
    arguments = script.parse()
    cells = [lambda layer=layer, how=how: measure(layer, how, arguments.rounds) for layer in LAYERS for how in STARTS]
    cells += [] if arguments.no_unet else [lambda how=how: whole(how) for how in ("lora-ga", "eva")]
    script.run(cells)


if __name__ == "__main__":
    main()
