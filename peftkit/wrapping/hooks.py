"""Modules with hooks of accelerate, as `device_map` and `cpu_offload` put them: a forward on the instance.

Such a hook moves inputs to the layer's device, loads weights that are kept elsewhere, and calls `_old_forward`, a
method that was bound when the hook came. Nothing here needs accelerate.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from peftkit.kernels.torch_private import own_parameters

#: where a forward is kept on an instance
_FORWARDS = ("forward", "_old_forward")


def replaced_forward(module: nn.Module) -> bool:
    """Return whether a module runs another forward than its class's, but for hooks around that one."""
    own = module.__dict__
    if "_hf_hook" in own and "_old_forward" in own:
        return not _is_of(own["_old_forward"], module, type(module))
    return "forward" in own and not _is_of(own["forward"], module, type(module))


def follow_class(module: nn.Module, before: type[nn.Module]) -> None:
    """Bind the forwards that are kept on a module anew, after its class changed from another."""
    own = module.__dict__
    for name in _FORWARDS:
        if name in own and _is_of(own[name], module, before):
            own[name] = MethodType(type(module).forward, module)


def present(module: nn.Module, key: str) -> Tensor | None:
    """Return a parameter with its values, which a hook may keep elsewhere and load for each call; None without one."""
    parameter = own_parameters(module).get(key)
    if parameter is None or not parameter.is_meta:
        return parameter
    hook: Any = module.__dict__.get("_hf_hook")
    for each in getattr(hook, "hooks", (hook,)):  # several may be chained in one
        weights = getattr(each, "weights_map", None)
        if weights is not None and getattr(each, "offload", False):
            return weights[key].detach().to(each.execution_device, parameter.dtype)
    return parameter


def _is_of(method: object, module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a method is a class's own forward, bound to the module."""
    return getattr(method, "__self__", None) is module and getattr(method, "__func__", None) is cls.forward
