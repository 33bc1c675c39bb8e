"""Training rules with how each is set up, and how far it is from its definition, written another way.

`scripts/recipe_table.py` prints the distances; the tests hold them below the bounds.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import peftkit as pk
from peftkit.training import (
    GLAD,
    LISA,
    AdaLoRA,
    ALLoRA,
    Attachment,
    CompLoRA,
    LoRAFA,
    LoRAPro,
    LoRAProFull,
    Prefixes,
    Projection,
    Recipe,
    Riemannian,
    SoftThreshold,
)
from tests.support.zoo import train

Optimizers = Callable[[list[nn.Parameter]], Optimizer]


def adamw(parameters: list[nn.Parameter]) -> Optimizer:
    return AdamW(parameters, lr=0.05)


def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    return SGD(parameters, lr=0.05, weight_decay=0.1)


@dataclass(frozen=True)
class RuleCase:
    """A rule on a kind that it is for."""

    make: Callable[[nn.Module], Recipe]
    kind: str
    options: dict[str, Any]
    #: what it is compared with, and the distance: of the two results, over their size
    definition: str
    distance: Callable[[], float]
    bound: float = 1e-12
    optimizer: Optimizers = field(default=adamw)


class Run:
    """A model with an adapter, an optimiser and a rule at it."""

    def __init__(self, case: RuleCase, seed: int = 0) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
        torch.manual_seed(seed)
        pk.wrap(self.model, case.kind, **case.options)
        train(self.model, seed)
        self.optimizer = case.optimizer(pk.adapter_parameters(self.model))
        self.rule = case.make(self.model)
        self.handle: Attachment | None = None

    def attach(self) -> None:
        self.handle = self.rule.attach(self.optimizer)

    def train(self, batches: Sequence[Tensor], parts: int = 1, scale: float | None = None) -> None:
        """Take a step a batch, each in some parts, and under a GradScaler where there is a scale."""
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for batch in batches:
            self.optimizer.zero_grad()
            for part in batch.chunk(parts):
                scaler.scale(loss_of(self.model, part)).backward()
            if self.handle is not None and isinstance(self.rule, GLAD):
                with self.rule.perturbed():
                    for part in batch.chunk(parts):
                        scaler.scale(loss_of(self.model, part)).backward()
            scaler.step(self.optimizer)
            scaler.update()

    @property
    def result(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """A sum over the samples that is not convex."""
    return torch.cos(3 * model(batch)).sum()


def batches(count: int) -> Tensor:
    return torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Problem:
    """A layer with gradients, its adapter of two factors, and G, the gradient of the effective weight (m, n)."""

    def __init__(self, kind: str, *, trained: bool = True, **options: Any) -> None:
        torch.manual_seed(0)
        self.layer = nn.Linear(7, 9, bias=False).double()
        pk.wrap(self.layer, kind, **options)
        if trained:
            train(self.layer)
        adapter: Any = self.layer.adapters["default"]  # type: ignore[index]
        self.pair = getattr(adapter, "inner", adapter).pair()
        self.x, self.target = (torch.randn(5, size, dtype=torch.float64) for size in (7, 9))
        self.backward()

    def backward(self) -> None:
        """Give the factors their gradients where they are, and find G."""
        self.layer.zero_grad()
        y = self.layer(self.x)
        (y - self.target).square().sum().backward()
        self.G = (2 * (y - self.target)).detach().mT @ self.x

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.pair.factors()

    @property
    def gradients(self) -> tuple[Tensor, Tensor]:
        return self.pair.up.grad.clone(), self.pair.down.grad.clone()

    def moves(self) -> Tensor:
        """The matrix (m·n, r·(m + n)) that takes steps of B and A to the step of γ·B·A, to first order."""
        B, A = self.factors
        of_b = torch.kron(torch.eye(len(B), dtype=B.dtype), A.mT.contiguous())
        return self.pair.scale * torch.cat((of_b, torch.kron(B, torch.eye(A.shape[1], dtype=B.dtype))), dim=1)

    def nearest(self, G: Tensor, gB: Tensor, gA: Tensor) -> tuple[Tensor, Tensor]:
        """The steps nearest to gB and gA of all whose move of the weight is nearest to G, by a pseudo-inverse."""
        M, own = self.moves(), torch.cat((gB.flatten(), gA.flatten()))
        best = own + torch.linalg.pinv(M, rtol=1e-10) @ (G.flatten() - M @ own)
        return best[: gB.numel()].view_as(gB), best[gB.numel() :].view_as(gA)


def act(rule: Recipe) -> None:
    """Do what a rule does before and after a step that moves nothing."""
    optimizer = SGD([nn.Parameter(torch.zeros(1))])
    rule.attach(optimizer)
    optimizer.step()


def apart(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖found − expected‖/‖expected‖ over all tensors."""
    gap, size = (
        math.sqrt(sum(float(t.detach().square().sum()) for t in each))
        for each in ([f - e for f, e in zip(found, expected, strict=True)], expected)
    )
    return gap / size if size else gap


FACTORS: dict[str, Any] = {"rank": 3, "alpha": 6}


def lora_pro(kind: str = "lora") -> float:
    problem = Problem(kind, **FACTORS)
    expected = problem.nearest(problem.G, *problem.gradients)
    act(LoRAPro(problem.layer))
    return apart(problem.gradients, expected)


def lora_pro_full(kind: str = "lora", steps: int = 4) -> float:
    """Against Adam of torch on a weight, whose gradients and steps are projected by a pseudo-inverse."""
    problem, mine = Problem(kind, trained=False, **FACTORS), Problem(kind, trained=False, **FACTORS)
    optimizer = SGD([mine.pair.up, mine.pair.down], lr=0.1, weight_decay=0.2)
    LoRAProFull(mine.layer).attach(optimizer)
    weight = nn.Parameter(torch.zeros(9, 7, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=1.0)
    for _ in range(steps):
        mine.backward()
        optimizer.step()
        problem.backward()
        M, before = problem.moves(), weight.detach().clone()
        weight.grad = (M @ torch.linalg.pinv(M, rtol=1e-10) @ problem.G.flatten()).view_as(weight)
        adam.step()
        N = before - weight.detach()
        B, A = problem.factors
        gB, gA = problem.nearest(N, problem.pair.scale * N @ A.mT, problem.pair.scale * B.mT @ N)
        with torch.no_grad():
            for parameter, g in ((problem.pair.up, gB), (problem.pair.down, gA)):
                parameter.mul_(1 - 0.1 * 0.2).sub_(0.1 * g)  # AdamW's decay
    return apart(mine.factors, problem.factors)


def riemannian(kind: str = "lora") -> float:
    problem = Problem(kind, **FACTORS)
    (B, A), (gB, gA), eye = problem.factors, problem.gradients, 0.5 * torch.eye(3, dtype=torch.float64)
    act(Riemannian(problem.layer, delta=0.5))
    return apart(problem.gradients, (gB @ torch.linalg.inv(A @ A.mT + eye), torch.linalg.inv(B.mT @ B + eye) @ gA))


def lora_fa() -> float:
    problem = Problem("lora-fa", **FACTORS)
    act(LoRAFA(problem.layer))
    expected = torch.linalg.lstsq(problem.pair.scale * problem.pair.down.mT, problem.G.mT).solution.mT
    return apart([problem.pair.up.grad], [expected])


def allora(kind: str = "lora", eta: float = 3.0) -> float:
    mine, plain = Problem(kind, **FACTORS), Problem(kind, **FACTORS)
    B, up = plain.factors[0], plain.pair.up.detach().clone()
    for problem in (mine, plain):
        optimizer = AdamW([problem.pair.up, problem.pair.down], lr=0.1)
        if problem is mine:
            ALLoRA(problem.layer, eta).attach(optimizer)
        optimizer.step()
    rates = torch.stack([1 / torch.sqrt(row.norm() + 1 / eta**2) for row in B])
    expected = up + torch.diag(rates) @ (plain.pair.up - up)
    return apart([mine.pair.up, mine.pair.down], [expected, plain.pair.down])


def comp_lora(steps: int = 3) -> float:
    mine, plain = Problem("lora", **FACTORS), Problem("lora", **FACTORS)
    U = torch.linalg.svd(plain.layer.weight.detach())[0][:, :2]
    outside = torch.eye(9, dtype=torch.float64) - U @ U.mT
    optimizers = [AdamW([each.pair.up, each.pair.down], lr=0.1) for each in (mine, plain)]
    CompLoRA(mine.layer, k=2).attach(optimizers[0])
    for _ in range(steps):
        mine.backward()
        plain.backward()
        plain.pair.up.grad = outside @ plain.pair.up.grad
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            plain.pair.up.copy_(outside @ plain.pair.up)
    return apart(mine.factors, plain.factors)


def glad(rho: float = 1.0) -> float:
    """Against gradients of a function of all parameters in one vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    pk.wrap(model, "lora", rank=2)
    train(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    own = [model.get_parameter(name) for name in names]
    (batch,) = batches(1)

    def gradient(point: Tensor) -> Tensor:
        point = point.detach().requires_grad_()
        parts = [part.view_as(p) for part, p in zip(point.split([p.numel() for p in own]), own, strict=True)]
        y = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), (batch,))
        return torch.autograd.grad(torch.cos(3 * y).sum(), point)[0]

    start = nn.utils.parameters_to_vector(own).detach()
    g = gradient(start)
    sharp = gradient(start + rho * g / torch.linalg.vector_norm(g))
    assert g @ sharp < 0, "the case is one in which nothing is left out"
    expected = g - (g @ sharp) / (sharp @ sharp) * sharp
    rule = GLAD(model, rho)
    loss_of(model, batch).backward()
    with rule.perturbed():
        loss_of(model, batch).backward()
    assert torch.equal(nn.utils.parameters_to_vector(own), start)
    return apart([p.grad.flatten() for p in own if p.grad is not None], [*expected.split([p.numel() for p in own])])


def lisa(steps: int = 9) -> float:
    """Against optimisers of single blocks, each made anew when its block wakes."""
    torch.manual_seed(0)
    first = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5))).double()
    pk.wrap(first, "full")
    mine, plain = first, copy.deepcopy(first)
    rule = LISA(mine, every=3, awake=2, always="4", seed=1)
    optimizer = AdamW(pk.adapter_parameters(mine), lr=0.1)
    rule.attach(optimizer)
    by_block: dict[str, Optimizer] = {}
    for batch in batches(steps)[..., :4]:
        blocks = {*rule.awake, "4"}
        by_block = {block: by_block.get(block) or AdamW(plain[int(block)].parameters(), lr=0.1) for block in blocks}
        for model in (mine, plain):
            model.zero_grad()
            torch.cos(model(batch)).sum().backward()
        optimizer.step()
        for each in by_block.values():
            each.step()
    return apart([*mine.parameters()], [*plain.parameters()])


def soft_threshold() -> float:
    run = Run(RULES["SoftThreshold"])
    gates = [module.adapters["default"].gate for module in run.model if isinstance(module, nn.Linear)]  # type: ignore[union-attr,index]
    before = [gate.detach().clone() for gate in gates]
    act(run.rule)
    xi: float = run.rule.xi  # type: ignore[attr-defined]
    return apart(gates, [(g - xi).clamp(min=0) + (g + xi).clamp(max=0) for g in before])


def adalora(steps: int = 7) -> float:
    """Against a loop over ranks, with sums over all steps in the place of running averages."""
    mine, plain = Run(RULES["AdaLoRA"]), Run(RULES["AdaLoRA"])
    mine.attach()
    adapters = [m.adapters["default"] for m in plain.model if isinstance(m, nn.Linear)]  # type: ignore[union-attr,index]
    seen: list[list[dict[str, Tensor]]] = [[] for _ in adapters]
    for step, batch in enumerate(batches(steps), 1):
        mine.train(batch[None])
        plain.train(batch[None])
        for each, own in zip(adapters, seen, strict=True):
            own += [{n: (p * p.grad).abs().detach() for n, p in each.named_parameters()}] if step < 6 else []
        if step == 1 or (step % 2 and step <= 6):
            continue
        kept = {2: 6, 4: 4, 6: 4, 7: 4}[step]  # 4 + (8 − 4)·(1 − (t − 1)/5)³, rounded down
        ranked = []
        for index, own in enumerate(seen):
            score = {}
            for name in own[0]:
                average, uncertain = torch.zeros_like(own[0][name]), torch.zeros_like(own[0][name])
                for now in own:
                    average = 0.85 * average + 0.15 * now[name]
                    uncertain = 0.85 * uncertain + 0.15 * (now[name] - average).abs()
                score[name] = average * uncertain
            for i in range(4):
                worth = score["gate"][i] + score["up"][:, i].mean() + score["down"][i].mean()
                ranked.append((float(worth), index, i))
        for _, index, i in sorted(ranked)[: 8 - kept]:
            with torch.no_grad():
                adapters[index].gate[i] = 0
    return apart(mine.result, plain.result)


def projection() -> float:
    run = Run(RULES["Projection"])
    at = next(iter(run.rule.parts.values()))
    before = at.adapter.delta(at.at.base).dense().detach()
    act(run.rule)
    bound = min(1.0, 0.05 / float(torch.linalg.matrix_norm(before)))
    assert bound < 1, "the case is one in which nothing is projected"
    return apart([at.adapter.delta(at.at.base).dense()], [bound * before])


def prefixes() -> float:
    """Against the gradients of a LoRA with as many ranks as are drawn."""
    run = Run(RULES["Prefixes"])
    share = run.rule.draw()  # type: ignore[attr-defined]
    rank = 2 * (1 + math.floor(3 * share))
    plain = Run(RULES["Prefixes"]).model
    pk.unwrap(plain)
    pk.wrap(plain, "lora", rank=rank, alpha=rank / 2)
    mine, theirs = ([m.adapters["default"] for m in net if isinstance(m, nn.Linear)] for net in (run.model, plain))  # type: ignore[union-attr,index]
    with torch.no_grad():
        for own, other in zip(mine, theirs, strict=True):
            other.up.copy_(own.up[:, :rank])
            other.down.copy_(own.down[:rank])
    for model in (run.model, plain):
        loss_of(model, batches(1)[0]).backward()
    found = [g for own in mine for g in (own.up.grad, own.down.grad)]
    padded = [
        g for other in theirs for g in (nn.functional.pad(other.up.grad, (0, 6 - rank)), _rows(other.down.grad, 6))
    ]
    return apart(found, padded)


def _rows(tensor: Tensor, count: int) -> Tensor:
    return nn.functional.pad(tensor, (0, 0, 0, count - len(tensor)))


RULES: dict[str, RuleCase] = {
    "LoRAPro": RuleCase(
        LoRAPro, "lora", FACTORS, "the projection of the weight's gradient, by a pseudo-inverse", lora_pro
    ),
    "LoRAProFull": RuleCase(
        LoRAProFull,
        "lora",
        FACTORS,
        "Adam of torch on the weight, gradient and step projected by a pseudo-inverse, 4 steps",
        lora_pro_full,
        optimizer=sgd,
    ),
    "Riemannian": RuleCase(Riemannian, "lora", FACTORS, "gradients times inverse Gram matrices", riemannian),
    "LoRAFA": RuleCase(LoRAFA, "lora-fa", FACTORS, "the least-squares solution g_B of γ·g_B·A = G", lora_fa),
    "ALLoRA": RuleCase(
        functools.partial(ALLoRA, eta=3.0), "lora", FACTORS, "AdamW's step, its rows times the factors", allora
    ),
    "CompLoRA": RuleCase(
        functools.partial(CompLoRA, k=2), "lora", FACTORS, "AdamW between dense projections I − UUᵀ, 3 steps", comp_lora
    ),
    "GLAD": RuleCase(
        functools.partial(GLAD, rho=1.0), "lora", FACTORS, "the formula, on all parameters as one vector", glad
    ),
    "LISA": RuleCase(
        functools.partial(LISA, every=2, awake=1, seed=1),
        "full",
        {},
        "an AdamW for each block, made anew when the block wakes, 9 steps",
        lisa,
        0.0,
    ),
    "SoftThreshold": RuleCase(
        functools.partial(SoftThreshold, xi=0.03),
        "svdlora",
        {"rank": 4, "init": "sora"},
        "max(g − ξ, 0) + min(g + ξ, 0)",
        soft_threshold,
        0.0,
    ),
    "AdaLoRA": RuleCase(
        functools.partial(AdaLoRA, target=2, total=7, warmup=1, final=1, every=2),
        "svdlora",
        {"rank": 4},
        "a loop over ranks, 7 steps",
        adalora,
    ),
    "Projection": RuleCase(Projection, "loldu", {"rank": 4, "epsilon": 0.05}, "ΔW·min(1, ε/‖ΔW‖)", projection),
    "Prefixes": RuleCase(
        functools.partial(Prefixes, seed=3),
        "dylora",
        {"rank": 6, "block": 2, "alpha": 3},
        "the gradients of a LoRA of the first b ranks",
        prefixes,
    ),
}
