"""transformers: FP8Linear, 8-bit floats with a scale for every block of the matrix, as DeepSeek's checkpoints are."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.bases.base import Base


@dataclass(frozen=True)
class FineGrainedFP8(Base):
    """W of an FP8Linear: W_ij = N_ij·s_kl, where (k, l) is the block of (i, j).

    Attributes:
        numbers: N (m, n), float8.
        scales: s (blocks of rows, blocks of columns), or one number.
        block: the rows and columns of a block, None where there is one scale.
        bias: of the layer, or None.
    """

    title: ClassVar[str] = "transformers fp8"
    beside: ClassVar[tuple[str, ...]] = ("weight_scale_inv", "activation_scale")

    numbers: Tensor
    scales: Tensor
    block: tuple[int, int] | None
    bias: Tensor | None

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        library = sys.modules.get("transformers.integrations.finegrained_fp8")
        layer = getattr(library, "FP8Linear", None)
        return layer is not None and isinstance(module, layer) and _weight(module).itemsize == 1

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        grouped = getattr(sys.modules["transformers.integrations.finegrained_fp8"], "FP8GroupedLinear", None)
        if grouped is not None and isinstance(module, grouped):
            return "an FP8GroupedLinear has a weight for every group of its input, in a form that peftkit does not read"
        if not _weight(module).dtype.is_floating_point:
            return f"its weight is {_weight(module).dtype}, quantised in a format that peftkit does not read"
        return None

    @classmethod
    def of(cls, module: nn.Module) -> FineGrainedFP8:
        own = own_parameters(module)
        block = cast(Any, module).block_size
        scales = cast(Tensor, own["weight_scale_inv"]).detach()
        return cls(_weight(module).detach(), scales, block and (block[0], block[1]), own.get("bias"))

    @property
    def shape(self) -> tuple[int, int]:
        m, n = self.numbers.shape
        return m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.original_dtype or torch.bfloat16  # of which such checkpoints are made

    @property
    def original_dtype(self) -> torch.dtype | None:
        return None if self.bias is None else self.bias.dtype

    @property
    def stored(self) -> tuple[Tensor, ...]:
        return self.numbers, self.scales

    def rows(self, start: int, stop: int) -> Tensor:
        rows, scales = self.numbers[start:stop].float(), self.scales.float()
        if self.block is None:
            return rows * scales
        blocks = torch.arange(start, stop, device=self.device) // self.block[0]
        return rows * scales[blocks].repeat_interleave(self.block[1], 1)[:, : self.shape[1]]

    @classmethod
    def requantised(cls, module: nn.Module, W: Tensor) -> dict[str, Any]:
        old = cls.of(module)
        (m, n), (height, width) = old.shape, old.block or old.shape
        most = torch.finfo(old.numbers.dtype).max
        padded = torch.zeros(-(-m // height) * height, -(-n // width) * width, device=W.device)
        padded[:m, :n] = W
        blocks = padded.view(padded.shape[0] // height, height, padded.shape[1] // width, width)
        scales = blocks.abs().amax((1, 3)).clamp(min=torch.finfo(torch.float32).tiny) / most
        scales = scales.to(old.scales.dtype)
        numbers = (blocks / scales.float()[:, None, :, None]).clamp(-most, most).view_as(padded)[:m, :n]
        return {
            "weight": nn.Parameter(numbers.to(old.numbers.dtype), requires_grad=False),
            "weight_scale_inv": nn.Parameter(scales.view_as(old.scales), requires_grad=False),
        }


def _weight(module: nn.Module) -> Tensor:
    return cast(Tensor, own_parameters(module)["weight"])
