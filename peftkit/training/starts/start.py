"""start: give adapters the factors that the base, or some batches of data, show to be good ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.errors import OptionError, require_choice, require_integer, require_number, require_option
from peftkit.training.stand_in import require_finite
from peftkit.training.starts.corda import CorDA
from peftkit.training.starts.eva import EVA
from peftkit.training.starts.gradients import Gradient, gradients_of
from peftkit.training.starts.inputs import Inputs, inputs_of
from peftkit.training.starts.lora_ga import LoRAGA
from peftkit.training.starts.lora_one import LoRAOne
from peftkit.training.starts.lora_sb import LoRASB
from peftkit.training.starts.of_base import MiLoRA, OLoRA, PiSSA
from peftkit.training.starts.orthogonal import Orthogonal
from peftkit.training.starts.protocol import Factors, Seen, Start
from peftkit.training.starts.report import StartReport
from peftkit.wrapping.divided import gathered_base
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, names_of, one_name
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.resize import resize_
from peftkit.wrapping.spread import spread
from peftkit.wrapping.walk import dotted

STARTS: dict[str, type[Start]] = {
    each.name: each for each in (PiSSA, MiLoRA, OLoRA, LoRAGA, LoRAOne, LoRASB, EVA, CorDA, Orthogonal)
}


@of_models
def start(
    model: nn.Module,
    how: str | Start,
    batches: Iterable[Any] = (),
    backward: Callable[[nn.Module, Any], object] | None = None,
    *,
    name: str | None = None,
    oversample: int = 8,
    rho: float = 1.0,
    seed: int = 0,
) -> StartReport:
    r"""Give adapters the start that their base, or some batches of data, show to be a good one; ΔW stays exactly 0.

    Call it after `wrap` and before training. The base is never written: ΔW = γ·(B·A − B₀·A₀), and a start chooses B₀
    and A₀. Of the base alone are made "pissa", "milora" and "olora"; of nothing "orthogonal"; of gradients, one pass
    over the batches, "lora-ga", "lora-one" and "lora-sb"; of inputs "eva" and "corda". `peftkit.training.starts` has a
    class of each, with its formula, source and numbers, and `LoftQ`, for quantised bases.

    No gradient of a weight is kept: a sketch of (m + n + min(m, n))·k numbers a layer is, or of n·k of its inputs, with
    k = oversample·r, for every layer that can be adapted. In a group of processes the sketches are summed over all of
    them, each with its own batches: every process gets the same start.

    Args:
        model: wrapped with adapters that take such a start, "anchored" with start="given" for most.
        how: a start by name, or one of its class, as LoRAGA(stable=64).
        batches: what `backward` is called with, one after another.
        backward: called as backward(model, batch), it computes a loss and calls its backward(). Starts made of inputs
            need no backward, and by default call the model with the batch.
        name: of the adapters; by default all.
        oversample: k/r, 8 by default and at least 2.
        rho: above 1, each adapter may have up to ρ times its rank, and ranks go where data says, as many as before:
            EVA's redistribution, by the share of the inputs, or by σᵢ(G)² for starts made of gradients. An adapter may
            lose all of them, and is then taken off.
        seed: of the random matrices of the sketch.

    Returns:
        How much of the energy the start has of each layer, how near its first step is to the gradient, and the memory.

    Raises:
        OptionError: an option has a value it cannot take, an adapter takes no such start or does not act, or no
            gradient, or none that is finite, came to a layer.
        MergeStateError: an adapter is merged into its weight.
        UnsupportedLayerError: the model is inside DistributedDataParallel, or divided and rho is given.
        UnknownAdapterError: there is no adapter of that name, or none at all, or several and one is to be named for
            rho.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        >>> _ = pk.wrap(model, "anchored", rank=2, start="given")
        >>> batches = [torch.randn(8, 16) for _ in range(4)]
        >>> report = pk.start(model, "lora-ga", batches, lambda m, x: m(x).square().mean().backward())
        >>> sorted(report.energy)
        ['0', '2']
    """
    method = _method(how)
    require_integer("oversample", oversample, 2, "an integer")
    require_integer("seed", seed, 0, "an integer")
    require_number("rho", rho)
    require_option(1 <= rho <= oversample / 2, "rho", rho, f"a number from 1 to oversample/2, {oversample / 2:g}")
    names = names_of(model, name) if rho == 1 else (one_name(model, name),)  # ranks go from one weight to another
    found = list(installed_adapters(model, names))
    for at in found:
        _require_takes(at, method)
    k = [oversample * at.adapter.options["rank"] for at in found]
    seen, held = _look(model, method, found, batches, backward, k, seed)
    before = {_key(at, names): at.adapter.options["rank"] for at in found}
    ranks = before if rho == 1 else _ranks(found, seen, rho, method)
    kept = [(at, own) for at, own in zip(found, seen, strict=True) if ranks[_key(at, names)]]
    draws = torch.Generator().manual_seed(seed)
    made = [_made(at, method, _seen(at, ranks[_key(at, names)], draws, own)) for at, own in kept]
    if rho > 1:
        resize_(model, ranks, name=names[0])
    left = {_key(at, names): at for at in installed_adapters(model, names)}
    found, seen = [left[_key(at, names)] for at, _ in kept], [own for _, own in kept]
    alignment: dict[str, float] = {}
    for at, (up, down, _), own in zip(found, made, seen, strict=True):
        (at.adapter.begin_ if method.moves else at.adapter.anchor_)(up, down)
        if isinstance(own, Gradient):
            alignment[_key(at, names)] = own.alignment(up, down, framed=at.adapter.takes_start() == "frame")
    energy = {_key(at, names): own.energy for at, own in zip(found, made, strict=True) if own.energy is not None}
    changed = {key: (rank, ranks[key]) for key, rank in before.items() if ranks[key] != rank}
    return StartReport(method.name, len(found), energy, alignment, held, changed)


def _look(
    model: nn.Module,
    method: Start,
    found: Sequence[InstalledAdapter],
    batches: Iterable[Any],
    backward: Callable[[nn.Module, Any], object] | None,
    k: Sequence[int],
    seed: int,
) -> tuple[Sequence[Gradient | Inputs | None], int]:
    """What the start needs to see of each weight, and how many bytes the pass kept."""
    if method.needs == "gradient":
        seen, held = gradients_of(model, found, batches, backward, k=k, seed=seed, whole=method.whole)
        why = "no gradient came to it: give batches, and a loss of it"
    elif method.needs == "inputs":
        seen, held = inputs_of(model, found, batches, backward, k=k, seed=seed)
        why = "it was not called: give batches"
    else:
        return [None] * len(found), 0
    gone = next((at for at, own in zip(found, seen, strict=True) if own is None), None)
    if gone is not None:
        raise OptionError(f"{gone.site or 'the model'}: {why}")
    return seen, held


def _key(at: InstalledAdapter, names: Sequence[str]) -> str:
    """What the report calls an adapter: by its weight, and by its name where adapters of several are started."""
    return at.site if len(names) == 1 else f"{at.site}[{at.name}]"


def _ranks(
    found: Sequence[InstalledAdapter], seen: Sequence[Gradient | Inputs | None], rho: float, method: Start
) -> dict[str, int]:
    """As many ranks as there are, where they are worth most; up to ρ times its own for each weight."""
    worth: dict[str, list[float]] = {}
    total = 0
    for at, own in zip(found, seen, strict=True):
        if own is None:
            raise OptionError(f"rho was given, and {method.name} looks at no data that could say where ranks should go")
        shape, rank = at.slot.geometry.shape, at.adapter.options["rank"]
        worth[at.site] = own.worth()[: min(int(rho * rank), shape.rows, shape.columns)].tolist()
        total += rank
    ranks = spread(worth, dict.fromkeys(worth, 1), total)
    if not any(ranks.values()):
        raise OptionError(f"rho={rho:g} was given, and no rank is worth anything on these batches, which are all 0")
    return ranks


def _method(how: object) -> Start:
    if isinstance(how, Start):
        return how
    if how == "loftq":
        raise OptionError("how='loftq' was given, and it needs the weights before quantising: pass LoftQ(weights)")
    require_choice("how", how, STARTS)
    return STARTS[str(how)]()


def _require_takes(at: InstalledAdapter, method: Start) -> None:
    """Raise unless the adapter, as it was wrapped, takes such a start."""
    takes = at.adapter.takes_start()
    if takes not in method.gives:
        kinds = "'lora-xs'" if method.gives == {"frame"} else "'anchored'"
        raise OptionError(
            f"{at.site or 'the model'}: {at.adapter.kind} takes no such start as {method.name}: wrap with the kind "
            f"{kinds} and start='given'"
        )
    at.require_unmerged("giving it a start")
    at.require_values()
    if at.adapter.scale == 0:
        raise OptionError(f"{at.site or 'the model'}: alpha=0 makes every start 0: wrap with another")
    shape, rank = at.slot.geometry.shape, at.adapter.options["rank"]
    least = min(shape.rows, shape.columns)
    where = f"{at.site or 'the model'}: rank"
    require_option(rank <= least, where, rank, f"at most {least}, the singular values of this {shape} weight")


def _made(at: InstalledAdapter, method: Start, seen: Seen) -> Factors:
    """The factors of one weight, which fit it."""
    if method.needs != "gradient":
        require_finite(at, "its weight", [seen.weight], "load a base that is sound")
    made = method.factors(seen)
    (rows, columns), rank = seen.weight.shape, seen.rank
    shapes = tuple(made.up.shape), tuple(made.down.shape)
    if shapes != ((rows, rank), (rank, columns)):
        raise OptionError(
            f"{at.site or 'the model'}: {method.name} gave factors {shapes[0]} and {shapes[1]}, ({rows}, {rank}) and "
            f"({rank}, {columns}) were expected"
        )
    require_finite(at, f"the start that {method.name} found", made[:2], "give it another")
    return made


def _matrix(at: InstalledAdapter, parameter: Tensor) -> Tensor:
    """W (m, n) of a tensor in the place of the adapter's parameter."""
    geometry, part = at.slot.geometry, at.slot.of(parameter)
    if part.numel() != geometry.shape.rows * geometry.shape.columns:
        raise OptionError(
            f"{at.site or 'the model'}: a tensor {tuple(parameter.shape)} was given for its weight, which is "
            f"{geometry.shape}: give the weights of this model"
        )
    return geometry.matrix(part)


def _seen(at: InstalledAdapter, rank: int, draws: torch.Generator, own: Gradient | Inputs | None) -> Seen:
    host = at.site.removesuffix(at.slot_name).removesuffix(".") if at.slot_name else at.site
    return Seen(
        at.site,
        dotted(host, at.slot.parameter),
        gathered_base(at),
        rank,
        at.adapter.scale,
        lambda tensor: _matrix(at, tensor),
        draws,
        own if isinstance(own, Gradient) else None,
        own if isinstance(own, Inputs) else None,
    )
