"""bitsandbytes: Linear4bit (NF4 and FP4, with or without double quantisation) and Linear8bitLt."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.bases.base import Base, aligned


def _layer(name: str) -> type[nn.Module] | None:
    """A layer class of bitsandbytes; None where the library is not imported, and no module can be of it."""
    library = sys.modules.get("bitsandbytes.nn")
    return getattr(library, name, None)


def _is(module: nn.Module, name: str) -> bool:
    layer = _layer(name)
    return layer is not None and isinstance(module, layer)


@dataclass(frozen=True)
class FourBit(Base):
    """W of a Linear4bit: two numbers in a byte, scaled by blocks of `state.blocksize` numbers, row after row.

    Attributes:
        packed: the bytes, in the storage dtype.
        state: bitsandbytes' QuantState.
    """

    title: ClassVar[str] = "bitsandbytes 4-bit"

    packed: Tensor
    state: Any

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return _is(module, "Linear4bit")

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if getattr(own_parameters(module)["weight"], "quant_state", None) is None:
            return "its weight is not quantised yet: move the model to its device first, which quantises it"
        return None

    @classmethod
    def of(cls, module: nn.Module) -> FourBit:
        weight = cast(Any, own_parameters(module)["weight"])
        return cls(weight.data, weight.quant_state)

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.state.shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.state.dtype

    @property
    def stored(self) -> tuple[Tensor, ...]:
        second = getattr(self.state, "state2", None)
        own = (self.packed, self.state.absmax)
        return own if second is None else (*own, second.absmax, second.code, self.state.offset)

    def rows(self, start: int, stop: int) -> Tensor:
        if getattr(self.state, "packing_format_for_cpu", False):
            return self._interleaved_rows(start, stop)
        state, n = self.state, self.shape[1]
        if n % state.blocksize and self.packed.is_cpu:
            # bitsandbytes 0.50 reads them wrongly on some CPUs, its layer too: W is what the layer computes with
            return _functional().dequantize_4bit(self.packed, state)[start:stop]
        nested = state.state2.blocksize if state.nested else 1
        first, last = aligned(start * n, stop * n, self.shape[0] * n, state.blocksize * nested)
        packed = self.packed.reshape(-1).view(torch.uint8)[first // 2 : (last + 1) // 2]
        part = _part(state, first // state.blocksize, -(-last // state.blocksize), torch.Size((1, last - first)))
        values = _functional().dequantize_4bit(packed, part).reshape(-1)
        return values[start * n - first : stop * n - first].reshape(-1, n)

    def _interleaved_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the layout that some CPUs get in evaluation: 32 rows side by side, with scales (n/blocksize, m)."""
        first, last = aligned(start, stop, self.shape[0], _SIDE_BY_SIDE)
        low_high = self.packed[first:last].reshape(-1, _SIDE_BY_SIDE)
        numbers = torch.cat([low_high & 15, low_high >> 4], -1).reshape(-1, self.shape[1] // 2, _SIDE_BY_SIDE, 2)
        numbers = numbers.transpose(1, 2).reshape(last - first, self.shape[1])
        scales = self.state.absmax[:, first:last].mT.repeat_interleave(self.state.blocksize, 1)
        levels = self.state.code.to(self.device)[numbers.int()]
        return (levels * scales)[start - first : stop - first].to(self.dtype)

    @classmethod
    def prepare(cls, module: nn.Module, x: Tensor) -> None:
        weight = cast(Any, own_parameters(module)["weight"])
        interleaved = getattr(weight.quant_state, "packing_format_for_cpu", False)
        if interleaved and torch.is_grad_enabled() and x.requires_grad:
            # That layout has no backward, and the layer itself, once evaluated, never leaves it
            convert = _functional()._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = convert(weight.data, weight.quant_state)

    @classmethod
    def requantised(cls, module: nn.Module, W: Tensor) -> dict[str, Any]:
        old, state = cast(Any, own_parameters(module)["weight"]), cls.of(module).state
        dtype = getattr(state, "original_dtype", state.dtype)  # where the layout of evaluation has changed it
        stand_in = nn.Module()  # the weight writes its state to its module
        weight = type(old)(
            W.to(dtype),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested or getattr(state, "original_nested", False),
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=stand_in,
        ).to(W.device)
        weight.module = module
        return {"weight": weight, "quant_state": weight.quant_state}


#: how many rows lie side by side in the layout that some CPUs get in evaluation
_SIDE_BY_SIDE = 32


def _part(state: Any, first: int, last: int, shape: torch.Size) -> Any:
    """The state of some blocks of numbers, from the first on; doubly quantised scales go in whole blocks too."""
    make = type(state)
    own = {"blocksize": state.blocksize, "quant_type": state.quant_type, "dtype": state.dtype, "code": state.code}
    if not state.nested:
        return make(absmax=state.absmax[first:last], shape=shape, **own)
    second = state.state2
    scales = second.absmax[first // second.blocksize : -(-last // second.blocksize)]
    inner = make(absmax=scales, code=second.code, blocksize=second.blocksize, dtype=second.dtype)
    return make(absmax=state.absmax[first:last], shape=shape, offset=state.offset, state2=inner, **own)


def _functional() -> Any:
    return sys.modules["bitsandbytes.functional"]


@dataclass(frozen=True)
class EightBit(Base):
    """W of a Linear8bitLt: int8 numbers with a scale for every row, W_ij = C_ij·s_i/127.

    Attributes:
        numbers: C (m, n).
        scales: s (m,).
        bias: of the layer, or None.
    """

    title: ClassVar[str] = "bitsandbytes 8-bit"

    numbers: Tensor
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return _is(module, "Linear8bitLt") and not cast(Any, module).state.has_fp16_weights

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        if own_parameters(module)["weight"].dtype != torch.int8:  # type: ignore[union-attr]
            return "its weight is not quantised yet: move the model to its device first, which quantises it"
        return None

    @classmethod
    def of(cls, module: nn.Module) -> EightBit:
        weight, state = cast(Any, own_parameters(module)["weight"]), cast(Any, module).state
        scales = state.SCB if weight.SCB is None else weight.SCB
        return cls(weight.data, scales, own_parameters(module).get("bias"))

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.numbers.shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.original_dtype or torch.float16  # through which the library quantises

    @property
    def original_dtype(self) -> torch.dtype | None:
        return None if self.bias is None else self.bias.dtype  # which the layer casts to what it computes with

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.numbers, self.scales

    def rows(self, start: int, stop: int) -> Tensor:
        return self.numbers[start:stop].float() * (self.scales[start:stop, None].float() / 127)

    @classmethod
    def requantised(cls, module: nn.Module, W: Tensor) -> dict[str, Any]:
        old, state = cast(Any, own_parameters(module)["weight"]), copy.copy(cast(Any, module).state)
        state.CB = state.SCB = None  # the layer takes them from its weight at its next call
        weight = type(old)(W.to(torch.float16), requires_grad=False, has_fp16_weights=False).to(W.device)
        return {"weight": weight, "state": state}
