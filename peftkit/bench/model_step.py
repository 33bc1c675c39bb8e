"""The training step of a whole network with adapters on all its layers, over the frozen network, and what it keeps."""

from __future__ import annotations

import ctypes
import gc
import importlib
import sys
from collections.abc import Sequence

import torch
from torch import nn

from peftkit.bench.networks import Network
from peftkit.bench.peers import KINDS, LYCORIS_MODULES, randomize, ways, wrap
from peftkit.bench.rows import Row
from peftkit.bench.step import saved_bytes
from peftkit.bench.timing import Call, Spread, contest, ratios
from peftkit.geometry import is_layer


def adapted(way: str, kind: str, network: Network) -> Network:
    """Put adapters on all Linear and convolution layers of a network, in place, and return it.

    Args:
        way: one of `peers.ways`.
        kind: one of `peers.KINDS`.
        network: whose layers are adapted.
    """
    _, of_lycoris, of_peft = KINDS[kind]
    layers = {name: m for name, m in network.body.named_modules() if is_layer(m)}
    if way == "ours":
        wrap(network.body, kind)
    elif way.startswith("lycoris"):
        assert of_lycoris is not None
        module = getattr(importlib.import_module(LYCORIS_MODULES[of_lycoris[0]]), of_lycoris[0])
        adapters = nn.ModuleList()
        for name, layer in layers.items():
            bypass = {"bypass_mode": way.endswith("bypass")}
            adapter = module(name.replace(".", "_"), layer, 1.0, **of_lycoris[1], **bypass)
            adapter.apply_to()
            adapter.to(next(layer.parameters()))  # device and dtype, as `peers.adapted` has it
            adapters.append(adapter)
        network.add_module("adapters", adapters)
    else:
        assert of_peft is not None
        peft = importlib.import_module("peft")
        config = getattr(peft, of_peft[0])(target_modules=list(layers), **of_peft[1])
        peft.inject_adapter_in_model(config, network.body)
    randomize(network)
    return network


def step(network: Network) -> Call:
    """Return the call of a step: forward, and the gradients of the input and of all that is trained."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(network().square().mean(), [network.inputs[0], *wanted], allow_unused=True)


def measure(
    network: Network, kind: str, *, case: str, peers: Sequence[str], rounds: int, left_out: Sequence[str] = ()
) -> Row:
    """Time a step of a network under every way to adapt it, over a step of the frozen network.

    Every way adapts a twin of the network, so that frozen weights are held once. A way that is more than twice as slow
    as the frozen network takes its turn once.

    Args:
        network: frozen.
        kind: one of `peers.KINDS`.
        case: the network in words.
        peers: libraries to compare with, "lycoris" and "peft".
        rounds: turns of every way.
        left_out: ways that are not measured.

    Returns:
        A row with MB kept for backward, of the frozen network ("frozen") and of each way. A peer that does not take
        every layer of the network is left out, and its message is in the row's values.
    """
    memory = {"frozen": _kept(network)}
    refused: dict[str, str] = {}
    calls: dict[str, Call] = {"frozen": step(network)}
    for way in (way for way in ways(list(peers), kind) if way not in left_out):
        try:
            model = adapted(way, kind, network.twin())
            memory[way] = _kept(model)
        except (RuntimeError, ValueError) as error:
            if way == "ours":
                raise
            refused[way] = str(error)
            continue
        trim()
        calls[way] = step(model)
    milliseconds, found = _contest(calls, rounds)
    return Row(
        question="network step",
        kind=kind,
        case=case,
        dtype=str(network.inputs[0].dtype).removeprefix("torch."),
        reference="frozen network",
        reference_ms=milliseconds,
        ratio={way: found[way] for way in calls if way != "frozen"},
        memory=memory,
        values={"left out": refused} if refused else {},
    )


def _contest(calls: dict[str, Call], rounds: int) -> tuple[float, dict[str, Spread]]:
    """Milliseconds of "frozen", and what every way takes over it: in `rounds` turns, or in one where it is slow."""
    # The turn that finds the slow ways is also the first of all others: its allocations must not count
    first = contest(calls, rounds=1, prepare=dict.fromkeys(calls, trim))
    frozen = first["frozen"][0]
    slow = [name for name, (taken,) in first.items() if name not in ("frozen", "ours") and taken > 2 * frozen]
    fast = {name: call for name, call in calls.items() if name not in slow}
    seconds = contest(fast, rounds=rounds, prepare=dict.fromkeys(fast, _nothing))
    found = ratios(seconds, seconds["frozen"]) | {name: Spread.of([first[name][0] / frozen]) for name in slow}
    return 1e3 * Spread.of(seconds["frozen"]).median, found


def trim() -> None:
    """Give freed memory back: the heap of glibc grows without end between the gigabytes that some peers keep."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _kept(network: Network) -> float:
    """MB that autograd keeps for backward, beyond what the network holds anyway."""
    return saved_bytes(network, [*network.parameters(), *network.buffers(), *network.inputs]) / 1e6


def _nothing() -> None:
    """So that a contest makes one call a turn, without trying how long it takes."""
