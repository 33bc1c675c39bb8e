"""Every adapter kind in every place where people train: one function a column, which passes, or raises a typed error.

A column says what is right, by assertions; a refusal is a PeftkitError with its reason.
"""

from __future__ import annotations

import copy
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftkit as pk
from peftkit.errors import PeftkitError
from tests.support import matrix_quantised
from tests.support.experts import Bank
from tests.support.processes import distributed
from tests.support.zoo import OPTIONS, train


class Net(nn.Module):
    """A convolution and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def adapted(kind: str, seed: int = 1) -> nn.Module:
    """The net with trained adapters, the same each time."""
    torch.manual_seed(0)
    net = Net()
    pk.wrap(net, kind, **OPTIONS[kind])
    train(net, seed)
    return net


def batch(size: int = 3) -> Tensor:
    return torch.randn(size, 8, 2, 2, generator=torch.Generator().manual_seed(size))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(net: nn.Module, y: Tensor) -> list[Tensor]:
    """The gradients of all adapters, of the output's mean square."""
    return list(torch.autograd.grad(y.float().square().mean(), pk.adapter_parameters(net)))


def require_gradients(net: nn.Module, y: Tensor, twin: nn.Module, tolerance: float = 1e-4) -> None:
    """Fail unless an output has the gradients that the same model has as it stands."""
    for own, expected in zip(gradients(net, y), gradients(twin, twin(batch())), strict=True):
        close(own, expected, tolerance)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# -- columns --------------------------------------------------------------------------------------------------------


def compiled(kind: str) -> None:
    torch._dynamo.reset()
    net = adapted(kind)
    y = torch.compile(net, backend="aot_eager", fullgraph=True)(batch())
    close(y, net(batch()))
    require_gradients(net, y, adapted(kind))


def compiled_dynamic(kind: str) -> None:
    from torch._dynamo.testing import CompileCounter

    counts = []
    for net in (Net().eval(), adapted(kind).eval()):
        torch._dynamo.reset()
        counter = CompileCounter()
        fast = torch.compile(net, backend=counter, fullgraph=True, dynamic=True)
        for size in (2, 5, 9, 300):
            close(fast(batch(size)), net(batch(size)))
        counts.append(counter.frame_count)
    assert counts[1] <= counts[0], "as many graphs as the plain net takes, by the shapes of its convolution"


def exported(kind: str) -> None:
    net = adapted(kind).eval()
    shapes = ({0: torch.export.Dim("size", min=2, max=64)},)
    program = torch.export.export(net, (batch(),), dynamic_shapes=shapes)
    for size in (2, 9):
        close(program.module()(batch(size)), net(batch(size)))


def onnx(kind: str) -> None:
    import onnxruntime

    net = adapted(kind).eval()
    shapes = {"x": {0: torch.export.Dim("size", min=2, max=64)}}
    made = torch.onnx.export(net, (batch(),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert made is not None
    file = io.BytesIO()
    made.save(file)
    session = onnxruntime.InferenceSession(file.getvalue())
    (y,) = session.run(None, {"x": batch(9).numpy()})
    close(torch.from_numpy(y), net(batch(9)).detach())


def autocast(kind: str) -> None:
    net = adapted(kind)
    with torch.autocast("cpu", torch.bfloat16):
        y = net(batch())
    assert y.dtype is torch.bfloat16
    require_gradients(net, y, adapted(kind), tolerance=0.05)


def checkpointed(kind: str) -> None:
    net = adapted(kind)
    y = checkpoint(net, batch(), use_reentrant=False)
    assert isinstance(y, Tensor)
    require_gradients(net, y, adapted(kind), tolerance=0)


def resumed(kind: str) -> None:
    def steps(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for size in (2, 3):
            optimizer.zero_grad()
            net(batch(size)).square().mean().backward()
            optimizer.step()

    whole, other = adapted(kind), adapted(kind, seed=2)
    optimizer, again = (torch.optim.AdamW(pk.adapter_parameters(net), lr=1e-2) for net in (whole, other))
    steps(whole, optimizer)
    kept = {key: t.clone() for key, t in whole.state_dict().items() if "adapters" in key}
    other.load_state_dict(kept, strict=False)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer)
    steps(other, again)
    for own, theirs in zip(pk.adapter_parameters(whole), pk.adapter_parameters(other), strict=True):
        assert torch.equal(own, theirs)


def swapped(kind: str) -> None:
    net, other = adapted(kind), adapted(kind, seed=2)
    with folder() as at:
        pk.swap(net, pk.save(other, at / "other.safetensors"))
    assert torch.equal(net(batch()), other(batch()))


def four_bit(kind: str) -> None:
    _quantised(kind, "bitsandbytes nf4")


def eight_bit(kind: str) -> None:
    _quantised(kind, "bitsandbytes int8")


def torchao(kind: str) -> None:
    _quantised(kind, "torchao int8")


def _quantised(kind: str, base: str) -> None:
    model, plain = matrix_quantised.pair(kind, base)
    x = torch.randn(3, matrix_quantised.COLUMNS)
    close(model(x), plain(x), 0.1)
    assert all(g.isfinite().all() for g in gradients(model, model(x)))
    _saved(model, lambda: matrix_quantised.network(base), x)


def embedding(kind: str) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(12, 8))

    x = torch.tensor([[0, 3], [5, 3]])
    model = base()
    options = {"block_size": 6} if kind == "boft" else OPTIONS[kind]  # of 12 rows
    pk.wrap(model, kind, targets="0", **options)
    train(model)
    assert not torch.equal(model(x), base()(x))
    _saved(model, base, x)


def experts(kind: str) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Bank())

    x = torch.randn(4, 24)
    model = base()
    options = {"block_size": 6} if kind == "boft" else OPTIONS[kind]  # of 12 rows
    pk.wrap(model, kind, targets="0.weight", **options)
    train(model)
    assert not torch.equal(model(x), base()(x))
    _saved(model, base, x)


def _saved(model: nn.Module, base: Callable[[], nn.Module], x: Tensor) -> None:
    """Fail unless the file of a trained model makes the same of its base."""
    gradients(model, model(x))
    fresh = base()
    with folder() as at:
        pk.load(fresh, pk.save(model, at / "adapter.safetensors"))
    close(fresh(x), model(x), 1e-5)


def ddp(kind: str) -> None:
    net = adapted(kind)
    wrapper = nn.parallel.DistributedDataParallel(net)
    _divided(kind, net, wrapper)


def fsdp2(kind: str) -> None:
    from torch.distributed.fsdp import fully_shard

    net = adapted(kind)
    fully_shard(net)
    _divided(kind, net, net)


def _divided(kind: str, net: nn.Module, wrapper: nn.Module) -> None:
    """Fail unless two processes, each with half of a batch, train as one with all of it."""
    half = batch(4).chunk(2)[torch.distributed.get_rank()]
    wrapper(half).square().mean().backward()
    twin = adapted(kind)
    twin(batch(4)).square().mean().backward()
    for own, expected in zip(pk.adapter_parameters(net), pk.adapter_parameters(twin), strict=True):
        grad = own.grad
        assert grad is not None and expected.grad is not None
        close(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, expected.grad)


#: columns of one process, those that take a moment first
QUICK: dict[str, Callable[[str], None]] = {
    "autocast": autocast,
    "checkpointing": checkpointed,
    "resume": resumed,
    "swap": swapped,
    "embedding": embedding,
    "experts": experts,
}
LONG: dict[str, Callable[[str], None]] = {
    "compile": compiled,
    "dynamic compile": compiled_dynamic,
    "export": exported,
    "ONNX": onnx,
    "4-bit": four_bit,
    "8-bit": eight_bit,
    "torchao": torchao,
}
#: columns that take a process group
DIVIDED: dict[str, Callable[[str], None]] = {"DDP": ddp, "FSDP2": fsdp2}
#: in the order of the table
COLUMNS = (
    *("compile", "dynamic compile", "export", "ONNX", "autocast", "checkpointing", "DDP", "FSDP2"),
    *("resume", "swap", "4-bit", "8-bit", "torchao", "embedding", "experts"),
)


def cell(column: str, kind: str) -> str:
    """Why a column refuses a kind; "" where it passes. Raises where it does neither."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            (QUICK | LONG | DIVIDED)[column](kind)
        except PeftkitError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def cells(columns: Sequence[str], kinds: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield column, kind and why it was refused, of the columns of one process."""
    for column in columns:
        for kind in kinds:
            yield column, kind, cell(column, kind)


def _together(column: str, kinds: Sequence[str]) -> dict[str, int]:
    """The cells of a column in a process of several; why, by the number of its letters."""
    return {kind: len(cell(column, kind)) for kind in kinds}


def divided_cells(column: str, kinds: Sequence[str]) -> dict[str, str]:
    """The cells of a column that takes two processes."""
    with folder() as at:
        first, second = distributed(_together, column, kinds, folder=at)
    assert first == second
    return {kind: "" if not first[kind] else "refused in two processes" for kind in kinds}
