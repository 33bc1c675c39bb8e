"""Which modules can be adapted, why the others cannot, and how a module uses its weight."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from peftkit.geometry import CONVOLUTIONS, LAYERS, is_conv1d, is_layer
from peftkit.kernels.torch_private import calls_super_forward, convolves_as, own_parameters
from peftkit.wrapping.bases.formats import format_of
from peftkit.wrapping.hooks import replaced_forward
from peftkit.wrapping.lookup import EMBEDDINGS


def supported(module: nn.Module) -> bool:
    """Return whether the module is a Linear, a convolution or an embedding of an ordinary matrix of numbers."""
    return refusal(module) is None


def refusal(module: nn.Module) -> str | None:
    """Return why this module cannot be adapted, or None if it can."""
    if not is_layer(module) and not isinstance(module, EMBEDDINGS):
        return f"{type(module).__name__} is not a Linear or a convolution"
    weight = own_parameters(module).get("weight")
    if weight is None:
        return f"its weight is not a parameter (a lazy, fused, weight-normed or parametrized {type(module).__name__})"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet: run one batch through the model first"
    quantised = format_of(module)
    if quantised is not None:
        unreadable = quantised.refusal(module)
        if unreadable is not None:
            return unreadable
    elif not weight.dtype.is_floating_point or weight.dtype.itemsize < 2:
        return f"its weight is {weight.dtype}, quantised in a format that peftkit does not read, or complex"
    if weight.numel() == 0:
        return "its weight is empty (DeepSpeed's ZeRO-3 leaves it so: wrap inside deepspeed.zero.GatheredParameters)"
    if replaced_forward(module):
        return "its forward was replaced on the instance by a patch, which would bypass ΔW"
    if isinstance(module, EMBEDDINGS) and module.max_norm is not None:
        return (
            f"its max_norm={module.max_norm} writes to the weight at every call, also to what is merged into it; "
            "scale the weight once (torch.renorm), and set max_norm to None"
        )
    return None


def calls_its_weight(module: nn.Module) -> bool:
    """Return whether the module's class computes exactly what torch's own layer computes, y = W·x + b.

    A subclass that overrides `forward` (weight standardisation, own padding, …) may do anything with its weight. An
    embedding may do anything with what `super().forward(…)` looks up for it (scaled, shifted), and not with the weight.
    """
    if isinstance(module, NonDynamicallyQuantizableLinear):  # the out_proj of an nn.MultiheadAttention, never called
        return False
    if is_conv1d(module):
        own = next(c for c in type(module).__mro__ if c.__name__ == "Conv1D")
    else:
        own = next(c for c in (*LAYERS, *EMBEDDINGS) if isinstance(module, c))
    cls = getattr(type(module), "_base", type(module))  # of an adapted module, the class that it had
    plain = cls.forward is own.forward
    if isinstance(module, EMBEDDINGS):
        return plain or calls_super_forward(cls, own)
    if isinstance(module, CONVOLUTIONS):
        plain = plain and convolves_as(module, own)
    return plain
