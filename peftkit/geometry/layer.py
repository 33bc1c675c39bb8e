"""Read a layer's weight as a matrix, and run the layer with another: the only file that knows Linear from Conv.

GPT-2's Conv1D (transformers.pytorch_utils) is a Linear that keeps its weight as (in, out); `transposed` says so of it
as of transposed convolutions.

A weight is read as a matrix with one row per output channel; its columns are the fan-in of one output,
(input channels of one group) × (kernel positions). An adapter sees nothing but that matrix and its `Shape`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.errors import UnsupportedLayerError
from peftkit.geometry.shape import Shape
from peftkit.kernels.torch_private import output_padding, own_parameters, padding_by_side, tracing

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED: tuple[type[nn.Module], ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVOLUTIONS, *_TRANSPOSED)
_CONVOLVE: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONVOLVE_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


class Geometry:
    """Runs a layer with any weight, and with a low-rank part of one; it has none of the layer's parameters.

    run(x, M)       the layer's own map with the matrix M (m, n) as its weight
    contract(x, A)  A (r, c·K) over every run of c input channels: (…, C, *s) -> (…, (C/c)·r, *s')
    expand(h, B)    B (m, r), pointwise, on h (…, groups·r, *s') -> (…, m, *s')

    Operands are cast to the dtype of the activation, so fp32 factors serve a bf16 layer.

    expand(contract(x, A), B) == run(x, B @ A), for every stride, dilation, padding mode and grouping.

    Args:
        weight_shape: The shape of the layer's weight.
        layer: The convolution, None for a plain matrix product.
    """

    shape: Shape
    spatial: int  # number of spatial dimensions; 0 for Linear, whose channels are the last dimension
    vector: bool = False  # whether it is of a norm's weight or a bias, which has no layer that runs it

    def __init__(self, weight_shape: torch.Size, layer: nn.Module | None = None) -> None:
        self.transposed = layer is not None and (isinstance(layer, _TRANSPOSED) or is_conv1d(layer))
        self.spatial = len(weight_shape) - 2 if isinstance(layer, (*CONVOLUTIONS, *_TRANSPOSED)) else 0
        if self.spatial:
            conv = cast(nn.Conv2d, layer)  # or one of its siblings: the attributes are the same
            self.groups = conv.groups
            self.stride, self.dilation, self.padding = conv.stride, conv.dilation, conv.padding
            self.output_padding = conv.output_padding
            # Conv layers with another padding mode pad by hand before they convolve; this is their own record of it
            self.pad_mode = conv.padding_mode
            self.pad_by = padding_by_side(conv) if self.pad_mode != "zeros" else []
        else:
            self.groups = 1
        outputs = weight_shape[1] * self.groups if self.transposed else weight_shape[0]
        channels = weight_shape[0] // self.groups if self.transposed else weight_shape[1]
        self.shape = Shape(outputs, channels, tuple(weight_shape[2:]), self.groups)

    @classmethod
    def of_weight(cls, weight_shape: tuple[int, ...], groups: int = 1, *, transposed: bool = False) -> Geometry:
        """Return the geometry of a weight in a file, which reads it as a matrix and cannot run."""
        geometry = cls(torch.Size(weight_shape))
        if transposed:
            geometry.transposed, geometry.groups, geometry.spatial = True, groups, len(weight_shape) - 2
            rows, channels = weight_shape[1] * groups, weight_shape[0] // groups
            geometry.shape = Shape(rows, channels, tuple(weight_shape[2:]), groups)
        return geometry

    # -- the weight as a matrix -------------------------------------------------------------------------------

    def bands(self, weight: Tensor) -> Tensor:
        """Return a view of the weight as (bands, rows of a band, channels, *kernel), all rows in order."""
        if not self.transposed:
            return weight.unsqueeze(0)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2)

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix (m, n): itself if it is one, else a view where its memory allows."""
        if self.transposed:
            return self.bands(weight).reshape(self.shape.rows, self.shape.columns)
        return weight if weight.dim() == 2 else weight.reshape(self.shape.rows, self.shape.columns)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (m, n) in the shape of the layer's weight; the inverse of `matrix`."""
        if not self.spatial:
            return matrix.t() if self.transposed else matrix
        return self._kernel(matrix, self.groups)

    def _kernel(self, matrix: Tensor, groups: int) -> Tensor:
        """(rows, c·K) -> a kernel that reads c channels in each of `groups` groups."""
        kernel = self.shape.kernel
        if not self.transposed:
            return matrix.reshape(matrix.shape[0], -1, *kernel)
        banded = matrix.reshape(groups, matrix.shape[0] // groups, -1, *kernel)
        return banded.transpose(1, 2).flatten(0, 1)

    # -- the layer as a map -----------------------------------------------------------------------------------

    def run(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Return the layer's output for input x with weight `matrix` (m, n) and no bias."""
        return self.call(x, self.weight(matrix.to(x.dtype)))

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output for input x with a weight in its own shape and a bias (m,)."""
        if self.spatial:
            return self._convolve(x, weight, bias, self.groups)
        if not self.transposed:
            return F.linear(x, weight, bias)
        if bias is None:
            return x @ weight
        rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)  # to the bit what the layer computes
        return rows.view(*x.shape[:-1], rows.shape[-1])

    @property
    def direct(self) -> bool:
        """Whether `gradients` knows this layer: whether it pads with zeros, by numbers."""
        return not self.spatial or (self.pad_mode == "zeros" and not isinstance(self.padding, str))

    @property
    def by_position(self) -> bool:
        """Whether an output reads one position of the input, its own: a Linear, or a kernel of one without strides."""
        if not self.spatial:
            return True
        in_step = {*self.stride} == {1} and self.padding in ((0,) * self.spatial, "same", "valid")
        return self.shape.positions == 1 and in_step and not self.transposed

    def gradients(self, gy: Tensor, x: Tensor, weight: Tensor, for_x: bool) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of the layer's input and of its weight.

        Args:
            gy: The gradient of the layer's output.
            x: The layer's input.
            weight: In its own shape.
            for_x: Whether the gradient of x is wanted; if not, None stands for it.
        """
        x = x.to(gy.dtype)
        if not self.spatial:
            gx, gM = _product_gradients(gy, x, self.matrix(weight), for_x)
            return gx, self.weight(gM)
        output_padding = self.output_padding if self.transposed else (0,) * self.spatial
        batched = (gy, x) if x.dim() == self.spatial + 2 else (gy[None], x[None])
        gx, gW, _ = torch.ops.aten.convolution_backward(
            *batched,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            output_padding,
            self.groups,
            (for_x, True, False),
        )
        return gx if gx is None else gx.reshape(x.shape), gW

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        if self.transposed:
            convolve = _CONVOLVE_TRANSPOSED[self.spatial]
            return convolve(x, weight, bias, self.stride, self.padding, self.output_padding, groups, self.dilation)
        padding = self.padding
        if self.pad_mode != "zeros":
            x, padding = F.pad(x, self.pad_by, mode=self.pad_mode), 0
        return _CONVOLVE[self.spatial](x, weight, bias, self.stride, padding, self.dilation, groups)

    def contract(self, x: Tensor, A: Tensor) -> Tensor:
        """Return A (r, c·K) over every run of c input channels: x (…, C, *s) -> (…, (C/c)·r, *s')."""
        A = A if A.dtype == x.dtype else A.to(x.dtype)
        if not self.spatial:
            runs = x.shape[-1] // A.shape[1]
            if runs == 1:
                return F.linear(x, A)
            h = F.linear(x.unflatten(-1, (runs, -1)), A)
            return h.reshape(*x.shape[:-1], runs * len(A))  # flatten would be of a fixed batch in older ONNX programs
        channels = A.shape[1] // self.shape.positions
        h = self._convolve(self._folded(x, channels), self._kernel(A, 1), None, 1)
        runs = x.shape[-self.spatial - 1] // channels
        return h.reshape(*x.shape[: -self.spatial - 1], runs * h.shape[1], *h.shape[2:])

    def contraction_gradients(self, gh: Tensor, x: Tensor, A: Tensor, for_x: bool) -> tuple[Tensor | None, Tensor]:
        """Return the gradients of x and of A in contract(x, A) of a `direct` layer: a convolution has no groups here.

        Args:
            gh: The gradient of contract(x, A).
            x: The layer's input.
            A: (r, n).
            for_x: Whether the gradient of x is wanted; if not, None stands for it.
        """
        if self.spatial:
            channels = A.shape[1] // self.shape.positions
            gx, gA = self.gradients(self._folded(gh, len(A)), self._folded(x, channels), self._kernel(A, 1), for_x)
        else:
            runs = x.shape[-1] // A.shape[1]  # counted, since a -1 is ambiguous in an empty batch
            own = gh.reshape(*gh.shape[:-1], runs, len(A)), x.reshape(*x.shape[:-1], runs, A.shape[1]).to(gh.dtype)
            gx, gA = _product_gradients(*own, A, for_x)
        return gx if gx is None else gx.reshape(x.shape), gA.reshape(len(gA), -1)

    def _folded(self, x: Tensor, channels: int) -> Tensor:
        """(…, a·channels, *s) -> (b·a, channels, *s): every run an item of the batch, one small convolution for all."""
        size = x.shape[-self.spatial :]
        return x.reshape(x.numel() // (channels * size.numel() or 1), channels, *size)

    def expand(self, h: Tensor, B: Tensor) -> Tensor:
        """Return B (m, r), pointwise, on h (…, groups·r, *s') -> (…, m, *s')."""
        B = B.to(h.dtype)
        if not self.spatial:
            return F.linear(h, B)
        return _CONVOLVE[self.spatial](h, B[(...,) + (None,) * self.spatial], groups=self.groups)

    # -- channels, whatever the layer -------------------------------------------------------------------------

    def pointwise(self, h: Tensor, B: Tensor) -> Tensor:
        """Return B (v, r) on every run of r channels: h (…, a·r, *s) -> (…, a·v, *s)."""
        B = B.to(h.dtype)
        if not self.spatial:
            runs = h.shape[-1] // B.shape[1]
            return F.linear(h.unflatten(-1, (runs, -1)), B).reshape(*h.shape[:-1], runs * len(B))
        size = h.shape[-self.spatial :]
        mixed = _CONVOLVE[self.spatial](
            h.reshape(h.numel() // (B.shape[1] * size.numel() or 1), B.shape[1], *size),
            B[(...,) + (None,) * self.spatial],
        )
        runs = h.shape[-self.spatial - 1] // B.shape[1]
        return mixed.reshape(*h.shape[: -self.spatial - 1], runs * B.shape[0], *size)

    def mix(self, y: Tensor, K: Tensor, width: int = 1) -> Tensor:
        """Return channels mixed block-diagonally, each block K_k ⊗ I_width.

        K (k, i, j); y (…, k·j·width, *s) -> (…, k·i·width, *s).
        """
        K = K if K.dtype == y.dtype else K.to(y.dtype)
        if y.numel() == K.shape[0] * K.shape[2] * width and not tracing():  # one position: a token that is generated
            mixed = torch.bmm(K, y.reshape(K.shape[0], K.shape[2], width))
            return mixed.view(*y.shape[: y.dim() - self.spatial - 1], -1, *(1,) * self.spatial)
        lead, size = y.shape[: y.dim() - self.spatial - 1], y.shape[y.dim() - self.spatial :]
        blocks = y.reshape(*lead, K.shape[0], K.shape[2], width * size.numel())
        mixed = torch.einsum("kij,...kjz->...kiz", K, blocks)
        return mixed.reshape(*lead, K.shape[0] * K.shape[1] * width, *size)

    def sized_for(self, layer: nn.Module, x: Tensor, output_size: list[int] | None = None) -> Geometry:
        """Return the geometry of one call of a transposed convolution that names the size of its output."""
        if output_size is None:
            return self
        sized = copy.copy(self)
        sized.output_padding = tuple(output_padding(layer, x, output_size, self.spatial))
        return sized

    def per_channel(self, v: Tensor) -> Tensor:
        """Return a vector over channels (c,), shaped to broadcast against an activation."""
        return v[(...,) + (None,) * self.spatial] if self.spatial else v

    def outputs(self, x: Tensor) -> int:
        """Return how many output positions the layer computes for x: tokens, or pixels of the whole batch."""
        if not self.spatial:
            return x.numel() // x.shape[-1]
        count = math.prod(x.shape[: -self.spatial - 1])
        for i, stride in enumerate(self.stride):  # a loop, since torch.compile follows no product of a generator
            n = x.shape[i - self.spatial]
            count *= n * stride if self.transposed else -(-n // stride)
        return count


def _product_gradients(gy: Tensor, x: Tensor, M: Tensor, for_x: bool) -> tuple[Tensor | None, Tensor]:
    """The gradients of x (…, n) and of M (m, n) in x·Mᵀ."""
    rows = gy.reshape(-1, gy.shape[-1])
    return gy @ M if for_x else None, rows.mT @ x.reshape(-1, x.shape[-1])


def is_conv1d(layer: nn.Module | type[nn.Module]) -> bool:
    """Return whether a layer, or a class, is the Conv1D of transformers, with W (n, m), without an import of it."""
    mro = (layer if isinstance(layer, type) else type(layer)).__mro__
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in mro)


def is_layer(layer: nn.Module | type[nn.Module]) -> bool:
    """Return whether a module, or a class, is a Linear, a convolution of any sort, or a Conv1D of GPT-2."""
    return issubclass(layer if isinstance(layer, type) else type(layer), LAYERS) or is_conv1d(layer)


def of(layer: nn.Module) -> Geometry:
    """Return the geometry of a Linear, a convolution or a Conv1D of GPT-2.

    Args:
        layer: With a weight of its own (`wrapping.support` says which layers have one).

    Raises:
        UnsupportedLayerError: It is no such layer.

    Example:
        >>> from peftkit import geometry
        >>> g, x = geometry.of(conv := nn.Conv2d(4, 6, 3, bias=False)), torch.randn(1, 4, 5, 5)
        >>> g.matrix(conv.weight).shape, torch.allclose(g.run(x, g.matrix(conv.weight)), conv(x))
        (torch.Size([6, 36]), True)
    """
    weight = own_parameters(layer).get("weight") if is_layer(layer) else None
    if weight is None:
        raise UnsupportedLayerError(
            f"a {type(layer).__name__} has no geometry: it is no Linear or convolution with a weight"
        )
    return Geometry(weight.shape, layer)
