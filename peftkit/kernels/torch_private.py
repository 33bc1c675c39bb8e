"""What peftkit uses of torch that is not public, in one place; tests check that each name exists and means this."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only as tree_map_only

_F = TypeVar("_F")
_T = TypeVar("_T", bound=Tensor)

# looked up once: they are asked at every call of a layer, where a look-up would cost as much as the answer
_compiling = compiling = torch.compiler.is_compiling
_exporting = getattr(torch.compiler, "is_exporting", None)  # torch 2.7
_transforming = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_can_ask = torch.__version__ >= "2.7"
_by_identity = torch.__version__ < "2.5"
_graph_task = torch._C._current_graph_task_id

#: what a subclass of Tensor has as `__torch_function__` to see operations in `__torch_dispatch__` alone
without_torch_function = torch._C._disabled_torch_function_impl


def exporting() -> bool:
    """Return whether torch.export reads the code; False before torch 2.7, where that cannot be known."""
    return _exporting is not None and _exporting()


def exporting_onnx() -> bool:
    """Return whether the code is read for a program of ONNX, by its exporter on torch.export or the older one."""
    return (exporting() or tracing()) and torch.onnx.is_in_onnx_export()


def eager() -> bool:
    """Return whether operations run as they are written.

    Not so under torch.compile, torch.jit.trace, a transform of torch.func, a TorchDispatchMode or forward-mode AD:
    these follow plain operations only, and what is remembered between calls must stay unknown to them.
    """
    return not (_compiling() or _transforming() or _dispatch_modes() or forward_ad._current_level >= 0 or tracing())


def tracing() -> bool:
    """Return whether torch.jit.trace follows the operations, for calls with inputs of other sizes."""
    return _tracing() is not None


def once_while_compiling(function: _F) -> _F:
    """Have a function called when torch.compile reads the call, and not when compiled code runs.

    As torch.compiler.assume_constant_result, which imports the whole compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def known_true(condition: bool | Tensor) -> bool:
    """Return whether a condition on sizes is true for every size that is possible, in code that is not run as written.

    Always False before torch 2.7, whose compiler cannot ask, and of a tensor, which torch.jit.trace makes of sizes.
    """
    if not _can_ask or isinstance(condition, Tensor):
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes half as long as torch to import

    return statically_known_true(condition)


def compiles_by_identity() -> bool:
    """Return whether another tensor in a module's attribute is other code to torch.compile, as before torch 2.5."""
    return _by_identity


def in_autograd_thread() -> bool:
    """Return whether backward runs in this thread of autograd's own, as on a GPU: it has no context variables."""
    return _graph_task() >= 0 and isinstance(threading.current_thread(), threading._DummyThread)


def transformed() -> bool:
    """Return whether a transform of torch.func or forward-mode AD runs: neither follows a function's own backward."""
    return not _compiling() and (_transforming() or forward_ad._current_level >= 0)


def version(tensor: Tensor) -> int | None:
    """Return how often autograd has seen the tensor written to; None for an inference tensor, which counts nothing."""
    return None if tensor.is_inference() else tensor._version


def is_view(tensor: Tensor) -> bool:
    """Return whether autograd knows the tensor as a view of another, into which a custom function may not write."""
    return tensor._base is not None


def padding_by_side(conv: nn.Module) -> list[int]:
    """Return how far a convolution pads each side, last dimension first, as `torch.nn.functional.pad` takes it."""
    return list(cast(nn.Conv2d, conv)._reversed_padding_repeated_twice)


def output_padding(conv: nn.Module, x: Tensor, output_size: Sequence[int], spatial: int) -> list[int]:
    """Return the output padding with which a transposed convolution gives an output of `output_size`."""
    layer = cast(nn.ConvTranspose2d, conv)
    sizes = (layer.stride, cast("tuple[int, ...]", layer.padding), layer.kernel_size)
    stride, padding, kernel = (list(size) for size in sizes)
    return list(layer._output_padding(x, list(output_size), stride, padding, kernel, spatial, list(layer.dilation)))


def convolves_as(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Return whether a convolution computes its output by the method of `cls`."""
    return type(module)._conv_forward is cls._conv_forward  # type: ignore[attr-defined]


def calls_super_forward(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """Return whether every `forward` between a class and its base says `super().forward(…)`, by its compiled code."""
    own = [c.__dict__["forward"] for c in cls.__mro__[: cls.__mro__.index(base)] if "forward" in c.__dict__]
    codes = [getattr(function, "__code__", None) for function in own]
    return all(code is not None and "__class__" in code.co_freevars and "forward" in code.co_names for code in codes)


#: the module and the class of each wrapper of torch -> the attribute that holds what it wraps
_WRAPPERS = {
    ("torch._dynamo.eval_frame", "OptimizedModule"): "_orig_mod",
    ("torch.nn.parallel.distributed", "DistributedDataParallel"): "module",
    ("torch.nn.parallel.data_parallel", "DataParallel"): "module",
    ("torch.optim.swa_utils", "AveragedModel"): "module",
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
    ): "_checkpoint_wrapped_module",
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"): "_fsdp_wrapped_module",
}


@functools.cache
def _attribute_of_wrapper(cls: type[nn.Module]) -> str | None:
    """The attribute of what instances of the class wrap. A wrapper that no code has imported has no instance."""
    for (where, name), attribute in _WRAPPERS.items():
        wrapper = getattr(sys.modules.get(where), name, None)
        if wrapper is not None and issubclass(cls, wrapper):
            return attribute
    return None


def wrapped(module: nn.Module) -> tuple[str, nn.Module] | None:
    """Return what a wrapper of torch wraps, and the wrapper's attribute for it; None for a module that is no wrapper.

    Wrappers are what torch.compile returns, DistributedDataParallel, DataParallel, AveragedModel, checkpoint_wrapper
    with its like, and FullyShardedDataParallel: classes that add a segment to every name inside them.
    """
    attribute = _attribute_of_wrapper(type(module))
    inside = None if attribute is None else own_modules(module).get(attribute)
    return None if attribute is None or inside is None else (attribute, inside)


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by name, to read and to write past the properties of an adapted class."""
    return module._parameters


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's own children by name, in half the time that attributes take."""
    return module._modules


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by name, to read and to write."""
    return module._buffers


def is_outermost_step(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether, in a hook of an optimiser's step, no other step of the same optimiser is running.

    The step of a subclass that calls `super().step()` runs the hooks twice, and only the outer time counts.
    """
    frame, running = inspect.currentframe(), 0
    while frame is not None:  # torch wraps the step of each class in a function of this name
        running += frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return running <= 1


def compiled(model: nn.Module) -> set[int]:
    """Return the ids of modules that run as parts of compiled code, by `module.compile()` or inside torch.compile's."""
    whole = (m for m in model.modules() if m._compiled_call_impl is not None or "_orig_mod" in own_modules(m))
    return {id(inside) for module in whole for inside in module.modules()}


def uncompiled() -> AbstractContextManager[Any]:
    """Return a context in which compiled code runs as it is written, with hooks that came later; from torch 2.6 on."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def set_training(module: nn.Module, mode: bool) -> None:
    """Set `module.training`, of this module alone, without the checks of `nn.Module.__setattr__`."""
    object.__setattr__(module, "training", mode)  # nn.Module's own takes as long as a matrix product of an adapter


def tensor_without_memory(
    cls: type[_T], size: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> _T:
    """Make a tensor of a subclass that has a shape and no memory, whose operations `__torch_dispatch__` answers."""
    return Tensor._make_wrapper_subclass(cls, size, strides=strides, dtype=dtype, device=device, requires_grad=False)
