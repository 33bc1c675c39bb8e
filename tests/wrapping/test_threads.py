"""A block of `disabled` or `enabled` holds for the thread and the async task that entered it, and for no other."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkit as pk
from peftkit.errors import MergeStateError
from peftkit.wrapping import state as states
from peftkit.wrapping.installed import adapted_modules
from tests.support.zoo import train

NAMES = ("a", "b", "c")


def model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 8)).eval()
    for seed, (name, kind) in enumerate(zip(NAMES, ("lora", "dora", "loha"), strict=True)):
        pk.wrap(net, kind, name=name, rank=2)
        train(net, seed, name=name)
    return net, torch.randn(2, 3, 8)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether they are equal to the rounding of torch, which differs from thread to thread."""
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def outputs(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of each adapter alone, one after another."""
    found = {}
    for name in NAMES:
        with pk.enabled(net, name):
            found[name] = net(x)
    assert not torch.equal(found["a"], found["b"])
    return found


@torch.no_grad()
def test_threads_with_blocks_of_their_own_at_once() -> None:
    net, x = model()
    everything, expected = net(x), outputs(net, x)
    together = threading.Barrier(len(NAMES) + 1, timeout=60)

    @torch.no_grad()
    def work(name: str) -> list[Tensor]:
        found = []
        for _ in range(30):
            with pk.enabled(net, name):
                together.wait()  # every thread is inside its block now
                found.append(net(x))
                together.wait()
        return found

    with ThreadPoolExecutor(len(NAMES)) as pool:
        jobs = {name: pool.submit(work, name) for name in NAMES}
        for _ in range(30):
            together.wait()
            assert torch.equal(net(x), everything), "this thread is inside no block"
            together.wait()
        for name, job in jobs.items():
            assert all(same(y, expected[name]) for y in job.result()), name
    assert torch.equal(net(x), everything)


@torch.no_grad()
def test_async_tasks_with_blocks_of_their_own_at_once() -> None:
    net, x = model()
    everything, expected = net(x), outputs(net, x)

    async def work(name: str) -> None:
        for _ in range(3):
            with pk.enabled(net, name):
                await asyncio.sleep(0)
                assert torch.equal(net(x), expected[name])
                with pk.disabled(net, name):
                    await asyncio.sleep(0)
                    inside = net(x)
                await asyncio.sleep(0)
                assert torch.equal(net(x), expected[name])
            with pk.enabled(net):
                assert torch.equal(net(x), inside)
            assert torch.equal(net(x), everything)

    async def main() -> None:
        tasks = [asyncio.create_task(work(name)) for name in NAMES]
        await asyncio.sleep(0)
        assert torch.equal(net(x), everything)
        await asyncio.gather(*tasks)
        with pk.enabled(net, "a"):  # a task inherits the block that it is started in, a thread does not
            assert torch.equal(await asyncio.create_task(call()), expected["a"])
            assert same(in_a_thread(lambda: net(x)), everything)

    async def call() -> Tensor:
        return net(x)

    asyncio.run(main())
    assert torch.equal(net(x), everything)


def in_a_thread(function: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(function)).result()


@torch.no_grad()
def test_strength_is_global() -> None:
    net, x = model()
    everything = net(x)
    with pk.enabled(net, "a"):
        in_a_thread(lambda: pk.set_strength(net, 0.5, "a") or x)
        halved = net(x)
    pk.set_strength(net, 0, "b")
    pk.set_strength(net, 0, "c")
    assert torch.equal(net(x), halved)
    pk.set_strength(net, 1)
    assert torch.equal(net(x), everything)


@torch.no_grad()
def test_blocks_that_close_in_another_order() -> None:
    """As an ExitStack and generators may: each hides its own adapters until it closes."""
    net, x = model()
    everything, expected = net(x), outputs(net, x)
    first, second = pk.disabled(net, "a"), pk.disabled(net, "b")
    first.__enter__()
    second.__enter__()
    assert torch.equal(net(x), expected["c"])
    first.__exit__(None, None, None)
    with pk.disabled(net, "b"):
        without_b = net(x)
    assert torch.equal(net(x), without_b)
    second.__exit__(None, None, None)
    assert torch.equal(net(x), everything)
    stack = ExitStack()
    stack.enter_context(pk.disabled(net))
    stack.enter_context(pk.enabled(net, "a"))
    stack.close()
    assert torch.equal(net(x), everything)


@torch.no_grad()
def test_copies_made_inside_a_block_are_inside_none() -> None:
    net, x = model()
    everything = net(x)
    saved = io.BytesIO()
    with pk.disabled(net, "a"), pk.disabled(net, "b"):
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        torch.save(net, saved)
        saved.seek(0)
        twins.append(torch.load(saved, weights_only=False))
        for twin in twins:
            assert torch.equal(twin(x), everything)
    for twin in twins:
        with pk.disabled(twin, "a"):
            assert torch.equal(net(x), everything)
        pk.merge(twin)


def test_merging_inside_any_block_that_hides_raises() -> None:
    net, _ = model()
    with pk.disabled(net, "a"):
        with pytest.raises(MergeStateError, match="a is disabled"):
            pk.merge(net)
        with ThreadPoolExecutor(1) as pool, pytest.raises(MergeStateError, match="a is disabled"):
            pool.submit(pk.merge, net, "a").result()
        pk.merge(net, "b")
        with pytest.raises(MergeStateError, match="b is merged"), pk.enabled(net, "a"):
            raise AssertionError("not reached")
        pk.restore(net)
    pk.merge(net)
    pk.restore(net)


@torch.no_grad()
def test_unwrapping_inside_a_block() -> None:
    net, x = model()
    expected = outputs(net, x)
    with pk.disabled(net, "a"):
        pk.unwrap(net, "a")
        pk.unwrap(net, "b")
        assert torch.equal(net(x), expected["c"])
    assert torch.equal(net(x), expected["c"])
    with pk.disabled(net):
        pk.unwrap(net)
    assert not adapted_modules(net)
    assert states._OPEN.get() is None


def test_what_is_recomputed_for_backward_is_inside_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd runs backward on a GPU in threads of its own, which know no context."""
    net, x = model()
    parameters = pk.adapter_parameters(net, "a")
    with pk.enabled(net, "a"):
        expected = torch.autograd.grad(net(x).square().sum(), parameters, allow_unused=True)
        loss = checkpoint(net, x, use_reentrant=False).square().sum()
        monkeypatch.setattr(states, "in_autograd_thread", lambda: True)
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(torch.autograd.grad, loss, parameters, allow_unused=True)
            found = job.result()
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or same(one, other)


def test_entering_and_leaving_visits_each_layer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many adapters there are: as many visits with 12 as with 3."""
    net, _ = model()
    visits: list[object] = []
    follow = states.AdapterState.follow_blocks
    counted = lambda own: (visits.append(own), follow(own))[1]  # noqa: E731
    for i in range(9):
        pk.wrap(net, "lora", name=f"more-{i}", rank=1)
    monkeypatch.setattr(states.AdapterState, "follow_blocks", counted)
    with pk.enabled(net, "a"):
        pass
    assert len(visits) == 2 * len(adapted_modules(net))


def test_no_block_leaves_no_trace() -> None:
    net, x = model()
    for host in adapted_modules(net).values():
        assert host.adapter_state.now() is host.adapter_state.always
    with pk.disabled(net, "a"):
        net(x)
    for host in adapted_modules(net).values():
        assert host.adapter_state.now() is host.adapter_state.always
        assert not host.adapter_state.blocks
