"""Which adapters act, and how strongly, is data to torch.compile: one graph for all of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peftkit as pk
from peftkit.errors import ConcurrentBlocksError
from tests.support.zoo import SMALL, train

# what torch.compile itself does to trace an autograd function
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(kind: str, *names: str, **options: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    for seed, name in enumerate(names or ("default",)):
        pk.wrap(net, kind, name=name, **SMALL[kind], **options)
        train(net, seed, name=name)
    return net.eval(), torch.randn(3, 8)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("route", ["auto", "dense"])
@pytest.mark.parametrize("kind", SMALL)
def test_a_strength_of_zero_and_back_is_one_graph(kind: str, route: str) -> None:
    if kind == "glora" and route == "dense":
        pytest.skip("its change depends on the layer's input")
    net, x = model(kind, route=route)
    net(x)  # libraries that are imported at the first call are code to torch.compile too
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    with torch.no_grad(), pk.disabled(net):
        base = net(x)
    for strength in (1.0, 0.5, 2.0, 0.0, -1.0, 1.0):
        pk.set_strength(net, strength)
        close(compiled(x), net(x))
        with pk.disabled(net):
            assert torch.equal(compiled(x), base), "nothing of a hidden adapter is left"
    pk.set_strength(net, 0)
    assert torch.equal(net(x), base)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "oft"])
def test_twelve_acting_sets_are_one_graph(kind: str) -> None:
    names = [f"a{i}" for i in range(12)]
    net, x = model(kind, *names)
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    compiled(x)
    for i, name in enumerate(names):
        for block in (pk.enabled(net, name), pk.disabled(net, name), pk.enabled(net, *names[:i])):
            with block:
                close(compiled(x), net(x))
    close(compiled(x), net(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["lora", "dora", "oft"])
def test_the_sets_have_the_gradients_of_eager_mode(kind: str) -> None:
    net, x = model(kind, "a", "b")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    compiled(x)
    graphs = counter.frame_count
    parameters = pk.adapter_parameters(net)
    for block in (nullcontext(), pk.enabled(net, "a"), pk.disabled(net, "a"), pk.enabled(net, "a", "b")):
        with block:
            found = torch.autograd.grad(compiled(x).square().sum(), parameters)
            expected = torch.autograd.grad(net(x).square().sum(), parameters, allow_unused=True)
        for one, other in zip(found, expected, strict=True):
            close(one, torch.zeros_like(one) if other is None else other)
    assert counter.frame_count == graphs


@pytest.mark.skipif(torch.__version__ < "2.5", reason="torch knows tensors by identity, and raises")
def test_a_backward_that_comes_late_has_the_strengths_of_its_forward() -> None:
    net, x = model("dora", "a", "b")
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    parameters = pk.adapter_parameters(net, "a")
    with pk.enabled(net, "a"):
        loss, expected = compiled(x).square().sum(), net(x).square().sum()
    pk.set_strength(net, 0.25)
    close(net(x), compiled(x))
    pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for one, other in pairs:
        close(one, other)


def test_a_weight_that_is_read_is_one_graph() -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 2)
    pk.wrap(net, "lora", targets="q_proj", rank=2, name="a")
    pk.wrap(net, "lora", targets=["q_proj", "k_proj"], rank=2, name="b")
    train(net)
    x, counter = torch.randn(3, 1, 8), CompileCounter()

    def call(x: Tensor) -> Tensor:
        return net(x, x, x, need_weights=False)[0]

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for names in (("a", "b"), ("a",), ("b",), ()):
        with pk.enabled(net, *names):
            close(compiled(x), call(x))
    assert counter.frame_count == 1


def test_a_checkpointed_block_is_one_graph() -> None:
    net, x = model("dora", "a", "b")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: checkpoint(net, x, use_reentrant=False), backend=counter, fullgraph=True)
    compiled(x)
    graphs = counter.frame_count
    for names in (("a", "b"), ("a",), ()):
        with pk.enabled(net, *names):
            close(compiled(x), net(x))
    assert counter.frame_count == graphs


@torch.no_grad()
def test_blocks_of_a_model_share_one_graph() -> None:
    """Compiled block by block, as large models are: equal blocks with different strengths are one code."""
    torch.manual_seed(0)
    counter = CompileCounter()
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)]
    net = nn.Sequential(*blocks)
    pk.wrap(net, "lora", rank=2)
    train(net)
    for block in blocks:
        block.compile(backend=counter, fullgraph=True)
    x = torch.randn(3, 8)
    for strength in (0.0, 0.5, 1.0):
        pk.set_strength(net, strength)
        net(x)
        with pk.disabled(net):
            net(x)
    assert counter.frame_count == (1 if torch.__version__ >= "2.5" else len(blocks))


def test_a_merged_adapter_is_no_part_of_the_code() -> None:
    net, x = model("lora", "a", "b")
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    expected = compiled(x)
    pk.merge(net, "a")
    close(compiled(x), expected)
    with pk.disabled(net, "b"):
        close(compiled(x), net(x))
    pk.restore(net)
    close(compiled(x), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_holds_what_acts_now(strict: bool) -> None:
    """A program is final: a block that closes later changes nothing in it."""
    if torch.__version__ < "2.7":
        pytest.skip("torch does not say whether it compiles or exports")
    net, x = model("dora", "a", "b")
    with pk.enabled(net, "a"):
        program = torch.export.export(net, (x,), strict=strict)
        expected = net(x)
    pk.set_strength(net, 0.1)
    close(program.module()(x), expected)
    used = {node.name for node in program.graph.nodes if node.users}
    names = [name for key, name in program.graph_signature.inputs_to_parameters.items() if key in used]
    assert any(".a." in name for name in names)
    assert not any(".b." in name for name in names)


class TestTwoThreads:
    """Compiled code knows one block at a time."""

    def other(self, function: Any) -> Any:
        result: list[Any] = []

        def run() -> None:
            try:
                result.append(function())
            except ConcurrentBlocksError as error:
                result.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return result[0]

    def test_different_blocks_of_a_compiled_model_raise(self) -> None:
        net, x = model("lora", "a", "b")
        compiled = torch.compile(net, backend="eager")
        compiled(x)

        def block(*names: str) -> Tensor:
            with pk.enabled(net, *names):
                return compiled(x)

        both = net(x)
        with pk.enabled(net, "a"):
            only_a = net(x)
            assert isinstance(self.other(lambda: block("b")), ConcurrentBlocksError)
            assert "threading.Lock" in str(self.other(lambda: block("a", "b")))
            close(self.other(lambda: block("a")), only_a)
            close(compiled(x), only_a)
            with pk.disabled(net):
                close(compiled(x), net(x))
            assert torch.equal(self.other(lambda: net(x)), both), "eager calls have no part in it"
        close(compiled(x), both)
        assert not isinstance(self.other(lambda: block("b")), ConcurrentBlocksError)

    def test_a_model_that_shares_the_code_of_another_raises_too(self) -> None:
        (net, x), (twin, _) = model("lora", "a", "b"), model("lora", "a", "b")
        torch.compile(net, backend="eager")(x)

        def block() -> None:
            with pk.enabled(twin, "b"):
                pass

        with pk.enabled(twin, "a"):
            assert isinstance(self.other(block), ConcurrentBlocksError)

    def test_a_model_that_is_not_compiled_does_not(self) -> None:
        net, x = model("lora", "eager-a", "eager-b")
        with pk.enabled(net, "eager-a"):
            only_b = self.other(lambda: TestTwoThreads.inside(net, x))
        with pk.enabled(net, "eager-b"):
            assert torch.equal(only_b, net(x))

    @staticmethod
    def inside(net: nn.Module, x: Tensor) -> Tensor:
        with pk.enabled(net, "eager-b"):
            return net(x)

    def test_the_first_call_inside_two_blocks_raises(self) -> None:
        net, x = model("lora", "first-a", "first-b")
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            with pk.enabled(net, "first-a"):
                entered.set()
                leave.wait(60)

        thread = threading.Thread(target=hold)
        thread.start()
        entered.wait(60)
        with ExitStack() as stack:
            stack.callback(thread.join)
            stack.callback(leave.set)
            # torch.compile makes an error of its own of any that is raised while it reads the model
            with pk.enabled(net, "first-b"), pytest.raises(Exception, match="another thread or async task"):
                compiled(x)
        with pk.enabled(net, "first-b"):
            close(compiled(x), net(x))
