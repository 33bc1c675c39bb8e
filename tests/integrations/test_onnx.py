"""Programs of ONNX, by torch's exporters: adapted and merged models of every kind, for any batch size."""

from __future__ import annotations

import io
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from tests.support.zoo import SMALL, train

# what the exporter itself does with torch and with Python's copyreg
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)


class Net(nn.Module):
    """A convolution and a Linear, as in a small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def adapted(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    pk.wrap(net, kind, **options)
    train(net)
    return net.eval()


def program(net: nn.Module) -> onnxruntime.InferenceSession:
    """The model as ONNX, of a symbolic batch size."""
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=64)}}
    made = torch.onnx.export(net, (torch.randn(3, 4, 5, 5),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert made is not None
    buffer = io.BytesIO()
    made.save(buffer)
    return onnxruntime.InferenceSession(buffer.getvalue())


def older_program(net: nn.Module, x: Tensor) -> onnxruntime.InferenceSession:
    """The model as ONNX by torch's older exporter, which traces it, of any batch size."""
    buffer = io.BytesIO()
    axes = {"x": {0: "batch"}}
    torch.onnx.export(net, (x,), buffer, dynamo=False, input_names=["x"], dynamic_axes=axes)  # type: ignore[arg-type]
    return onnxruntime.InferenceSession(buffer.getvalue())


def require_same(session: onnxruntime.InferenceSession, net: nn.Module) -> None:
    for batch in (1, 3, 17):
        x = torch.randn(batch, 4, 5, 5)
        with torch.no_grad():
            expected = net(x)
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", SMALL)
def test_adapted(kind: str) -> None:
    net = adapted(kind, **SMALL[kind])
    require_same(program(net), net)


@pytest.mark.parametrize(
    "kind", ["dora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SMALL if kind not in ("dora", "glora"))]
)
def test_merged(kind: str) -> None:
    net = adapted(kind, **SMALL[kind])
    pk.merge(net)
    session = program(net)
    require_same(session, net)
    names = [each.name for each in session.get_inputs()]
    assert names == ["x"]


class Tokens(nn.Module):
    """A convolution with a kernel, an attention, and a Linear on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Linear(8, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return self.head(self.attention(tokens, tokens, tokens)[0])


@pytest.mark.parametrize("route", ["factored", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SMALL)
def test_adapted_by_the_older_exporter(kind: str, route: str) -> None:
    torch.manual_seed(0)
    net = Tokens()
    pk.wrap(net, kind, route=route, **SMALL[kind])
    train(net)
    require_same(older_program(net.eval(), torch.randn(1, 4, 5, 5)), net)  # no step is that of one item alone


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_embeddings_by_the_older_exporter(kind: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4))
    pk.wrap(net, kind, targets=["full", "0"], **SMALL[kind])
    train(net)
    session = older_program(net.eval(), torch.tensor([[1, 2, 3]]))
    x = torch.arange(12).view(4, 3)
    with torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected)
