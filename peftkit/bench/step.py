"""The training step of one adapted layer, forward and backward, over the same layer frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from peftkit.bench.cases import LayerShape
from peftkit.bench.peers import Host, adapted, ways
from peftkit.bench.rows import Row
from peftkit.bench.timing import Call, contest, ratios, require_accurate
from peftkit.wrapping.installed import adapted_modules

#: relative errors that only a mistake exceeds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def measure(
    shape: LayerShape, kind: str, dtype: torch.dtype, *, device: str = "cpu", peers: list[str], rounds: int = 11
) -> Row:
    """Time a step, ours and the peers', over the frozen layer's, and count what waits for backward.

    Args:
        shape: the layer.
        kind: one of `peers.KINDS`.
        dtype: of layer, adapter and input.
        device: "cpu" or "cuda".
        peers: of "lycoris" and "peft"; a peer that does not take the dtype is left out.
        rounds: turns of every way.

    Raises:
        BenchError: ours errs by more than rounding does; nothing was timed.
    """
    torch.manual_seed(0)
    layer = shape.layer(dtype, device)
    x = shape.input(dtype, device).requires_grad_()
    with torch.no_grad():
        g = torch.randn_like(layer(x))
    models = {way: adapted(way, kind, layer) for way in ways(peers, kind)}
    wrong = error(models["ours"], x, g)
    require_accurate(f"step {kind} on {shape} in {dtype}", wrong, TOLERANCE[dtype])
    models = {way: model for way, model in models.items() if way == "ours" or _runs(step(model, x, g))}
    steps = {"frozen": step(Host(layer), x, g), **{way: step(model, x, g) for way, model in models.items()}}
    seconds = contest(steps, rounds=rounds)
    frozen = seconds.pop("frozen")
    return Row(
        question="step",
        kind=kind,
        case=str(shape),
        dtype=str(dtype).removeprefix("torch."),
        reference="frozen layer",
        reference_ms=1e3 * sorted(frozen)[len(frozen) // 2],
        ratio=ratios(seconds, frozen),
        memory={way: kept(model, x) / 1e6 for way, model in models.items()},
        error=wrong,
    )


def _runs(call: Call) -> bool:
    """Whether a peer takes this kind in this dtype."""
    try:
        call()
    except RuntimeError:
        return False
    return True


def step(model: nn.Module, x: Tensor, g: Tensor) -> Call:
    """Return the call of a step: forward, and the gradients of the input and of all that is trained.

    Args:
        model: called with x.
        x: the input, which requires a gradient.
        g: the gradient of the output.
    """
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(x), wanted, g)


def error(model: nn.Module, x: Tensor, g: Tensor) -> float:
    """Return the largest relative error of output and gradients against W + ΔW by its definition in float64."""
    exact = copy.deepcopy(model).double()
    for host in adapted_modules(exact).values():
        host.adapter_state.route = "dense"
    x64 = x.detach().double().requires_grad_()
    with torch.no_grad():
        outputs = [(model(x), exact(x64))]
    pairs = [*outputs, *zip(step(model, x, g)(), step(exact, x64, g.double())(), strict=True)]  # type: ignore[call-overload]
    return max(((ours.double() - right).norm() / right.norm()).item() for ours, right in pairs)


def kept(model: nn.Module, x: Tensor) -> int:
    """Return the bytes that autograd keeps for backward, beyond the input and what the model holds anyway."""
    return saved_bytes(lambda: model(x), [*model.parameters(), *model.buffers(), x])


def saved_bytes(call: Callable[[], Tensor], held: Iterable[Tensor]) -> int:
    """Return the bytes that autograd keeps for the backward of a call, beyond tensors that are held anyway."""
    own = {t.untyped_storage().data_ptr() for t in held}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = call()  # alive until all is counted, so that no address is used twice
    del out
    return sum(found.values())
