"""torchao: layers whose weight `quantize_` has replaced by a tensor subclass."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import UnsupportedLayerError
from peftkit.kernels.torch_private import eager, is_view, own_parameters
from peftkit.wrapping.bases.base import Base
from peftkit.wrapping.bases.matrix import QuantisedMatrix

#: the tensor subclasses that can be cut into blocks of rows; the others are dequantised whole
_BY_ROWS = ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")


@dataclass(frozen=True)
class TorchAO(Base):
    """W of a layer of torchao: int8, int4 and other integers, or fp8, of any granularity.

    Attributes:
        weight: the tensor subclass.
    """

    title: ClassVar[str] = "torchao"

    weight: Any

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        weight = own_parameters(module).get("weight")
        return weight is not None and type(weight).__module__.startswith("torchao.")

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        weight, known = cast(Tensor, own_parameters(module)["weight"]), sys.modules["torchao.utils"].TorchAOBaseTensor
        if not isinstance(weight, known) or weight.dim() != 2:
            return f"its weight is a {type(weight).__name__} of torchao, in a format that peftkit does not read"
        return None

    @classmethod
    def of(cls, module: nn.Module) -> TorchAO:
        return cls(own_parameters(module)["weight"])  # as it is: inside inference_mode these cannot be detached

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.weight.shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self.weight, name) for name in self.weight.__tensor_flatten__()[0])

    def rows(self, start: int, stop: int) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            if type(self.weight).__name__ in _BY_ROWS:
                return self.weight[start:stop].dequantize()
            if hasattr(self.weight, "dequantize"):
                return self.weight.dequantize()[start:stop]
            # What the layer makes of the unit vectors are the columns of W
            return F.linear(torch.eye(self.shape[1], dtype=self.dtype, device=self.device), self.weight).mT[start:stop]

    @classmethod
    def run(cls, module: nn.Module, forward: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        bias = own_parameters(module).get("bias")
        trains = x.requires_grad or (bias is not None and bias.requires_grad)
        if not (torch.is_grad_enabled() and trains and eager()):
            return forward(x, *args, **kwargs)
        # By itself the layer keeps all of W dequantised for backward, and has no gradient where it quantises its input
        return _Frozen.apply(x, bias, QuantisedMatrix(cls.of(module)), lambda x: forward(x, *args, **kwargs))

    @classmethod
    def requantised(cls, module: nn.Module, W: Tensor) -> dict[str, Any]:
        old = cls.of(module).weight
        make = _REMADE.get(type(old).__name__)
        if make is None:
            raise UnsupportedLayerError(
                f"a {type(old).__name__} of torchao was to be quantised again, and peftkit knows its settings of "
                f"{', '.join(_REMADE)} only: merge with into='dequantised', and call torchao's quantize_ again"
            )
        return {"weight": nn.Parameter(make(old, W.to(old.dtype)), requires_grad=False)}


class _Frozen(torch.autograd.Function):
    """The output of a layer whose weight does not train: for backward, the stored numbers of the weight are enough."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, W: QuantisedMatrix, layer: Callable[[Tensor], Tensor]
    ) -> Tensor:
        del bias
        ctx.W = W
        y = layer(x)
        return y.clone() if is_view(y) else y  # autograd lets none write into a view that a function returns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = grads
        for_x, for_bias, *_ = ctx.needs_input_grad
        rows = g.reshape(-1, g.shape[-1])
        gx = (rows @ ctx.W.to(g.dtype)).view(*g.shape[:-1], ctx.W.shape[1]) if for_x else None
        return gx, rows.sum(0) if for_bias else None, None, None


# -- quantising again -------------------------------------------------------------------------------------------------


def _granularity(old: Any) -> Any:
    """The granularity that a block of scales stands for: all of W, a row, or a part of a row."""
    known, (rows, columns) = sys.modules["torchao.quantization.granularity"], old.block_size
    if rows > 1:
        return known.PerTensor()
    return known.PerRow() if columns == old.shape[1] else known.PerGroup(columns)


def _mapping(old: Any) -> Any:
    known = sys.modules["torchao.quantization.quant_primitives"].MappingType
    return known.SYMMETRIC if old.zero_point is None or not bool(old.zero_point.any()) else known.ASYMMETRIC


def _int8(old: Any, W: Tensor) -> Tensor:
    return type(old).from_hp(
        W,
        _granularity(old),
        mapping_type=_mapping(old),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


def _integers(old: Any, W: Tensor) -> Tensor:
    return type(old).from_hp(
        W,
        tuple(old.block_size),
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )


def _float8(old: Any, W: Tensor) -> Tensor:
    return type(old).from_hp(
        W,
        old.qdata.dtype,
        _granularity(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


#: tensor subclass -> what makes a tensor of the same settings of W
_REMADE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "IntxUnpackedToInt8Tensor": _integers,
    "Float8Tensor": _float8,
}
