"""Programs of ONNX, by torch's exporter: adapted and merged models of every kind, for any batch size."""

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
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


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
