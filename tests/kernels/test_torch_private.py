"""Every function of kernels/torch_private: the names of torch that it uses exist, and mean what it says."""

from __future__ import annotations

import _thread
import importlib
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel

from peftkit.kernels import torch_private

# what torch itself does for forward-mode AD and jit.trace
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def seen(answers: list[bool]) -> Any:
    """A function of a tensor that records what `eager` and `transformed` say while it runs."""

    def function(x: Tensor) -> Tensor:
        answers[:] = [torch_private.eager(), torch_private.transformed()]
        return x * 2

    return function


def test_eager_under_plain_autograd() -> None:
    answers: list[bool] = []
    seen(answers)(torch.ones(2, requires_grad=True)).sum().backward()
    assert answers == [True, False]


def test_not_eager_under_a_transform() -> None:
    answers: list[bool] = []
    torch.func.vmap(seen(answers))(torch.ones(2, 3))
    assert answers == [False, True]
    assert torch_private.eager(), "the transform is over"


def test_not_eager_under_a_dispatch_mode() -> None:
    answers: list[bool] = []
    make_fx(seen(answers))(torch.ones(2))
    assert answers == [False, False]


def test_not_eager_under_jit_trace() -> None:
    answers: list[bool] = []
    torch.jit.trace(seen(answers), (torch.ones(2),), check_trace=False)
    assert answers == [False, False]


def test_tracing() -> None:
    """Under torch.jit.trace alone, where a condition on a size is a tensor: true of this call, maybe not the next."""
    answers: list[bool] = []

    def function(x: Tensor) -> Tensor:
        answers.append(torch_private.tracing())
        if torch_private.tracing():
            assert isinstance(x.numel(), Tensor)
            assert not torch_private.known_true(x.numel() > 1)
        return x * 2

    function(torch.ones(2))
    make_fx(function)(torch.ones(2))
    torch.jit.trace(function, (torch.ones(2),), check_trace=False)
    assert answers == [False, False, True]


def test_not_eager_under_forward_mode() -> None:
    answers: list[bool] = []
    with forward_ad.dual_level():
        seen(answers)(torch.ones(2))
    assert answers == [False, True]


def test_not_eager_while_compiling() -> None:
    def function(x: Tensor) -> Tensor:
        return x * (2 if torch_private.eager() or torch_private.transformed() else 3)

    compiled = torch.compile(function, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))


def test_compiling_and_exporting() -> None:
    assert not torch_private.compiling()
    assert not torch_private.exporting()
    compiled = torch.compile(lambda x: x * (2 if torch_private.compiling() else 3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    compiled = torch.compile(lambda x: x * (2 if torch_private.exporting() else 3), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))

    class Exported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if torch_private.exporting() else 3)

    for strict in (False, True):
        program = torch.export.export(Exported(), (torch.ones(2),), strict=strict)
        known = torch.__version__ >= "2.7"
        assert torch.equal(program.module()(torch.ones(2)), torch.full((2,), 2.0 if known else 3.0))


def test_exporting_onnx_is_not_exporting(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []

    class Exported(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            answers.append(torch_private.exporting_onnx())
            return x * 2

    Exported()(torch.ones(2))
    torch.export.export(Exported(), (torch.ones(2),), strict=False)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)  # as its exporter has it around torch.export
    Exported()(torch.ones(2))
    assert not any(answers)
    torch.export.export(Exported(), (torch.ones(2),), strict=False)
    assert answers[-1] is (torch.__version__ >= "2.7")
    torch.jit.trace(Exported(), (torch.ones(2),), check_trace=False)
    assert answers[-1]


def test_once_while_compiling() -> None:
    calls: list[int] = []

    class Noted(nn.Module):
        @torch_private.once_while_compiling
        def note(self) -> bool:
            calls.append(1)
            return True

        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if self.note() else 3)

    torch._dynamo.reset()
    compiled = torch.compile(Noted(), backend="eager", fullgraph=True)
    for _ in range(3):
        compiled(torch.ones(2))
    assert calls == [1]


def test_known_true() -> None:
    """A condition on a size is answered where the size is fixed, and makes no guard where it is not."""

    def function(x: Tensor) -> Tensor:
        small, large = torch_private.known_true(len(x) < 10), torch_private.known_true(len(x) >= 10)
        return x * (2 if small else 3 if large else 4)

    counter, known = CompileCounter(), torch.__version__ >= "2.7"
    for dynamic, expected in ((True, (4, 4)), (False, (2, 3) if known else (4, 4))):
        torch._dynamo.reset()
        counter.clear()
        compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
        assert [compiled(torch.ones(n)).max().item() for n in (5, 20)] == [*expected]
        assert counter.frame_count == (1 if dynamic else 2)


def test_compiles_by_identity() -> None:
    """Whether another tensor in the place of a module's is other code."""

    class Scaled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * self.held["scale"]

    torch._dynamo.reset()
    module, counter = Scaled(), CompileCounter()
    compiled = torch.compile(module, backend=counter)
    for scale in (1.0, 2.0, 3.0):
        module.held = {"scale": torch.tensor(scale)}
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), scale))
    assert (counter.frame_count > 1) == torch_private.compiles_by_identity()


def test_in_autograd_thread() -> None:
    """On a CPU backward runs in the thread that calls it; a thread that Python did not start is a dummy to Python."""
    answers: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: answers.append(torch_private.in_autograd_thread()))
    y.sum().backward()
    foreign: list[bool] = []

    def run() -> None:
        dummy = isinstance(threading.current_thread(), threading._DummyThread)
        foreign.extend([dummy, torch_private.in_autograd_thread()])

    done = _thread.allocate_lock()
    done.acquire()
    _thread.start_new_thread(lambda: (run(), done.release()), ())
    assert done.acquire(timeout=60)
    assert answers == [False]
    assert foreign == [True, False], "no backward runs there"


def test_version_counts_writes() -> None:
    tensor = torch.ones(2)
    before = torch_private.version(tensor)
    assert before is not None
    tensor.mul_(2)
    assert torch_private.version(tensor) == before + 1
    tensor[:1].zero_()
    assert torch_private.version(tensor) == before + 2, "a write to a view counts"
    with torch.inference_mode():
        assert torch_private.version(torch.ones(2)) is None


def test_padding_by_side() -> None:
    conv = nn.Conv2d(2, 3, (3, 5), padding=(1, 2), padding_mode="reflect")
    assert torch_private.padding_by_side(conv) == [2, 2, 1, 1]
    x = torch.randn(1, 2, 7, 8)
    padded = F.pad(x, torch_private.padding_by_side(conv), mode="reflect")
    torch.testing.assert_close(F.conv2d(padded, conv.weight, conv.bias), conv(x))


@pytest.mark.parametrize("size", [9, 10])
def test_output_padding(size: int) -> None:
    conv = nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(1, 2, 5, 5)
    padding = torch_private.output_padding(conv, x, [size, size], 2)
    out = F.conv_transpose2d(x, conv.weight, conv.bias, 2, 1, tuple(padding))
    assert out.shape[2:] == (size, size)
    torch.testing.assert_close(out, conv(x, output_size=[size, size]))


def test_convolves_as() -> None:
    class Same(nn.Conv2d):
        pass

    class Other(nn.Conv2d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, 2 * weight, bias)

    assert torch_private.convolves_as(nn.Conv2d(2, 3, 1), nn.Conv2d)
    assert torch_private.convolves_as(Same(2, 3, 1), nn.Conv2d)
    other, x = Other(2, 3, 1, bias=False), torch.randn(1, 2, 4, 4)
    assert not torch_private.convolves_as(other, nn.Conv2d)
    torch.testing.assert_close(other(x), 2 * F.conv2d(x, other.weight))  # torch calls the method at every forward


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_outermost_step(base: type[torch.optim.Optimizer]) -> None:
    """A hook runs once for a plain step; twice for a step within a step, of which the second is the outermost."""

    class Own(base):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    parameter = nn.Parameter(torch.ones(1))
    base([parameter], lr=0.1)  # torch wraps the step of a class when its first instance is made
    for cls, expected in ((base, [True]), (Own, [False, True])):
        optimizer = cls([parameter], lr=0.1)
        answers: list[bool] = []

        def hook(stepped: torch.optim.Optimizer, *_: Any, answers: list[bool] = answers) -> None:
            answers.append(torch_private.is_outermost_step(stepped))

        optimizer.register_step_post_hook(hook)
        parameter.grad = torch.ones(1)
        optimizer.step()
        assert answers == expected
    assert torch_private.is_outermost_step(optimizer), "outside a step, none is running"


def test_set_training_reaches_this_module_alone() -> None:
    module = nn.Sequential(nn.Dropout(0.5))
    torch_private.set_training(module, False)
    assert not module.training
    assert module[0].training
    torch_private.set_training(module[0], False)
    x = torch.ones(16)
    assert torch.equal(module(x), x), "torch reads the plain attribute"
    torch_private.set_training(module[0], True)
    assert module[0].training
    assert module.eval().train()[0].training, "train() and eval() go on working"


def test_own_tensors_and_modules_by_name() -> None:
    """What torch itself reads, without what lies further inside, and open to writes past the attributes."""
    module = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    norm = module[0]
    assert torch_private.own_parameters(norm) == {"weight": norm.weight, "bias": norm.bias}
    assert torch_private.own_parameters(module[1])["bias"] is None, "a bias that is left out is there as None"
    assert torch_private.own_parameters(module) == {}
    assert torch_private.own_modules(module) == dict(module.named_children())
    assert torch_private.own_buffers(norm) == dict(norm.named_buffers(recurse=False))
    weight, mean, child = nn.Parameter(torch.ones(4)), torch.zeros(4), nn.Identity()
    torch_private.own_parameters(norm)["weight"] = weight
    torch_private.own_buffers(norm)["running_mean"] = mean
    torch_private.own_modules(module)["1"] = child
    assert norm.weight is weight
    assert norm.running_mean is mean
    assert module[1] is child


def test_wrapped() -> None:
    """The classes and the attributes of torch's wrappers are what they are called here."""
    layer = nn.Linear(2, 2)
    sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # a real one needs an accelerator
    nn.Module.__init__(sharded)
    sharded._fsdp_wrapped_module = layer
    assert FSDP_WRAPPED_MODULE == "_fsdp_wrapped_module"
    for wrapper, attribute in (
        (torch.compile(layer, backend="eager"), "_orig_mod"),
        (nn.DataParallel(layer), "module"),
        (checkpoint_wrapper(layer), "_checkpoint_wrapped_module"),
        (offload_wrapper(layer), "_checkpoint_wrapped_module"),
        (sharded, "_fsdp_wrapped_module"),
    ):
        assert torch_private.wrapped(wrapper) == (attribute, layer)
        assert f"{attribute}.weight" in [name for name, _ in nn.Module.named_parameters(wrapper)]
    averaged = AveragedModel(layer)
    assert torch_private.wrapped(averaged) == ("module", averaged.module)
    assert torch_private.wrapped(layer) is None
    assert torch_private.wrapped(nn.ModuleDict({"module": layer})) is None
    for where, name in torch_private._WRAPPERS:
        assert issubclass(getattr(importlib.import_module(where), name), nn.Module)


def test_every_function_has_a_test() -> None:
    names = {name for name, value in vars(torch_private).items() if callable(value) and not name.startswith("_")}
    own = {name for name in names if getattr(torch_private, name).__module__ == torch_private.__name__}
    assert own == {
        "calls_super_forward",
        "compiled",
        "compiles_by_identity",
        "convolves_as",
        "eager",
        "exporting",
        "exporting_onnx",
        "in_autograd_thread",
        "is_outermost_step",
        "is_view",
        "known_true",
        "once_while_compiling",
        "output_padding",
        "own_buffers",
        "own_modules",
        "own_parameters",
        "padding_by_side",
        "set_training",
        "tensor_without_memory",
        "tracing",
        "transformed",
        "uncompiled",
        "version",
        "wrapped",
    }


def test_a_tensor_without_memory() -> None:
    class Ones(Tensor):
        __torch_function__ = torch_private.without_torch_function

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            plain = [torch.ones(each.shape) if isinstance(each, cls) else each for each in args]
            return func(*plain, **(kwargs or {}))

    made = torch_private.tensor_without_memory(Ones, (2, 3), (3, 1), torch.float32, torch.device("cpu"))
    assert made.shape == (2, 3)
    with pytest.raises(RuntimeError, match=r"data pointer|storage"):
        made.untyped_storage().data_ptr()
    assert torch.equal(made + 1, torch.full((2, 3), 2.0))


def test_is_view() -> None:
    whole = torch.ones(4)
    assert torch_private.is_view(whole[:2])
    assert not torch_private.is_view(whole)
    assert not torch_private.is_view(whole[:2].clone())


def test_calls_super_forward() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class Own(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return self.weight[input]

    class Below(Own):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)

    assert torch_private.calls_super_forward(Scaled, nn.Embedding)
    assert torch_private.calls_super_forward(nn.Embedding, nn.Embedding)
    assert not torch_private.calls_super_forward(Own, nn.Embedding)
    assert not torch_private.calls_super_forward(Below, nn.Embedding)


def test_tree_map_only() -> None:
    found = torch_private.tree_map_only(int, lambda n: n + 1, ([1, "a"], {"b": 2.0, "c": 3}))
    assert found == ([2, "a"], {"b": 2.0, "c": 4})


def test_nothing_private_of_torch_is_used_elsewhere() -> None:
    package = Path(torch_private.__file__).parents[1]
    private = re.compile(r"\btorch(\.\w+)*\._[a-z]|\bTensor\._[a-z]|from torch(\.\w+)*\._")
    files = [path for path in package.rglob("*.py") if path.name != "torch_private.py"]
    assert [path.name for path in files if private.search(path.read_text())] == []


def test_what_runs_compiled() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert torch_private.compiled(model) == set()
    model[1].compile(backend="eager")
    model[2] = torch.compile(model[2], backend="eager")
    named = {id(module): name for name, module in model.named_modules()}
    assert {named[each] for each in torch_private.compiled(model)} == {"1", "1.0", "2", "2._orig_mod"}


def test_hooks_that_come_late_are_called_by_code_that_runs_as_it_is_written() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")
    x, calls = torch.ones(1, 2), []
    before = model(x)
    next(iter(model.modules())).get_submodule("_orig_mod.0").register_forward_pre_hook(lambda *_: calls.append(1))
    with torch_private.uncompiled():
        assert torch.equal(model(x), before)
    assert len(calls) == (torch.__version__ >= "2.6")
