"""Every adapter exports and compiles with a batch of any size: no route is chosen by a size that is symbolic."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import peftkit as pk
from tests.support.laws import REFUSALS, agree, wrapped
from tests.support.zoo import ADAPTERS

# what torch itself does to trace an autograd function, and to export
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
    pytest.mark.filterwarnings("ignore:Node .* does not reference:UserWarning"),
]

LAYERS = ("linear", "conv2d k3")
SIZES = (2, 3, 17, 200)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def cell(adapter: str, layer: str) -> tuple[nn.Module, Tensor]:
    try:
        return wrapped(adapter, layer)
    except REFUSALS as refusal:
        pytest.skip(str(refusal))


def batches(x: Tensor) -> list[Tensor]:
    return [torch.randn(size, *x.shape[1:], dtype=x.dtype) for size in SIZES]


@pytest.mark.parametrize(
    "layer", ["linear", *(pytest.param(name, marks=pytest.mark.slow) for name in LAYERS if name != "linear")]
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_export_takes_any_batch(adapter: str, layer: str) -> None:
    if torch.__version__ < "2.5":
        pytest.skip("torch.export of 2.4 cannot hold the autocast regions of torch's own checkpoint")
    module, x = cell(adapter, layer)
    size = torch.export.Dim("size", min=1, max=4096)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: size},))
    for batch in batches(x):
        agree(program.module()(batch), module(batch), torch.float64, f"{adapter}, {len(batch)}")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_one_graph_is_compiled_for_any_batch(adapter: str, layer: str) -> None:
    """As many graphs as the plain layer takes, and the gradients of eager mode."""
    module, x = cell(adapter, layer)
    plain = copy.deepcopy(module)
    pk.unwrap(plain)
    counts = []
    for net in (plain, module):
        for dynamic in (True, None):
            torch._dynamo.reset()
            counter = CompileCounter()
            compiled = torch.compile(net, backend=counter, fullgraph=True, dynamic=dynamic)
            for batch in batches(x):
                y = compiled(batch)
                agree(y, net(batch), torch.float64, f"{adapter}, {len(batch)}")
            counts.append(counter.frame_count)
        parameters = [p for p in net.parameters() if p.requires_grad]
        ours = torch.autograd.grad(y.square().sum(), parameters)
        for one, other in zip(ours, torch.autograd.grad(net(batch).square().sum(), parameters), strict=True):
            agree(one, other, torch.float64, adapter, *ours)
    assert counts[:2] == counts[2:], "the plain layer's, and the adapted one's"
