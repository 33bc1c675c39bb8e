"""Run an Embedding or an EmbeddingBag, whose input is numbers of rows, with any weight and with rows of a ΔW.

W (V, d) has a row for every token, as the weight of a head `Linear(d, V)` has: a tied head and its embedding have one
ΔW. Only the rows that are looked up are computed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftkit.delta import Delta
from peftkit.delta.base import recomputed
from peftkit.delta.base import total as sum_of
from peftkit.errors import LostAdapterError
from peftkit.geometry import Geometry
from peftkit.kernels.blocks import accumulation_dtype
from peftkit.wrapping.routes import total

EMBEDDINGS: tuple[type[nn.Module], ...] = (nn.Embedding, nn.EmbeddingBag)


class Lookup(Geometry):
    """Runs an Embedding or an EmbeddingBag with any weight (V, d), and with rows that were looked up.

    Args:
        weight_shape: The shape (V, d) of the layer's weight.
        layer: The layer, read for its options; none of its parameters is kept.
    """

    def __init__(self, weight_shape: torch.Size, layer: nn.Module) -> None:
        super().__init__(weight_shape)
        own = cast(nn.EmbeddingBag, layer)  # or an Embedding, which has no mode
        self.padding_idx, self.by_frequency = own.padding_idx, own.scale_grad_by_freq
        self.mode: str | None = getattr(layer, "mode", None)
        self.include_last_offset = bool(getattr(layer, "include_last_offset", False))
        self.offsets: Tensor | None = None
        self.sample_weights: Tensor | None = None

    @property
    def additive(self) -> bool:
        """Whether the output for W + ΔW is that for W plus that for ΔW: not so of the largest of several rows."""
        return self.mode != "max"

    def of_call(self, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Lookup:
        """Return the geometry of one call of an EmbeddingBag with its bags and the weights of its samples."""
        own = copy.copy(self)
        own.offsets, own.sample_weights = offsets, per_sample_weights
        return own

    def run(self, x: Tensor, matrix: Tensor) -> Tensor:
        return self.call(x, matrix)

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the layer's output for indices x with a weight (V, d). bias: None, as these layers have none."""
        del bias
        return self.pooled(x, self.trained(x, F.embedding(x, weight)))

    def pooled(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the output of the layer for indices x whose rows (*x.shape, d) are these: the rows, or their bags."""
        if self.mode is None:
            return rows
        # A bag of rows by their places, with a row of zeros before them for what is padding
        places = torch.arange(1, x.numel() + 1, device=x.device).view(x.shape)
        if self.padding_idx is not None:
            places = places.masked_fill(x == self.padding_idx, 0)
        rows = torch.cat([rows.new_zeros(1, rows.shape[-1]), rows.flatten(0, -2)])
        weights = self.sample_weights
        return F.embedding_bag(
            places,
            rows,
            None if self.offsets is None else self.offsets.to(places.dtype),
            mode=self.mode,
            per_sample_weights=weights if weights is None else weights.to(rows.dtype),
            include_last_offset=self.include_last_offset,
            padding_idx=0,
        )

    def trained(self, x: Tensor, rows: Tensor) -> Tensor:
        """Return the rows (*x.shape, d), with the layer's gradient: none of padding, or divided by frequency."""
        if not torch.is_grad_enabled():
            return rows
        if self.padding_idx is not None:
            rows = torch.where((x == self.padding_idx)[..., None], rows.detach(), rows)
        if self.by_frequency:
            counts = torch.zeros(self.shape.rows, dtype=rows.dtype, device=x.device)
            counts = counts.scatter_add(0, x.flatten().long(), counts.new_ones(x.numel()))
            rows = rows + (1 / counts[x] - 1)[..., None] * (rows - rows.detach())  # adds 0, and scales the gradient
        return rows

    def outputs(self, x: Tensor) -> int:
        """Return how many rows are looked up for x."""
        return x.numel()


def require_size(weight: Tensor, g: Geometry, where: str = "an embedding") -> None:
    """Raise LostAdapterError if a weight has other rows than when it was adapted."""
    if weight.dim() == 2 and weight.numel() not in (0, g.shape.rows * g.shape.columns):
        raise LostAdapterError(
            f"{where} has {weight.shape[0]} rows, and had {g.shape.rows} when it was adapted (resize_token_embeddings "
            "gives it others in place): give it these back, and resize before wrapping. Rows that were added then are "
            'trained by Rule(targets, "full", rows=[…])'
        )


def adapted_output(
    y: Tensor | None, x: Tensor, weight: Tensor, deltas: Sequence[Delta], g: Lookup, route: str
) -> Tensor:
    """Return the layer's output with the ΔW of its adapters, rounded once to the dtype of the weight.

    Args:
        y: The layer's own output; None where it is not `additive`.
        x: Indices.
        weight: W (V, d).
        deltas: The ΔW to add.
        g: The geometry of the call.
        route: "factored" computes the rows of ΔW that are looked up, "dense" all of ΔW once.
    """
    with torch.autocast(weight.device.type, enabled=False):  # which lookups take no part in, as their products here
        change = _rows(x, deltas, route)
        if y is None:
            own = F.embedding(x, weight)
            return g.pooled(x, g.trained(x, (own.to(change.dtype) + change).to(weight.dtype)))
        pooled = g.pooled(x, g.trained(x, change))
        return (y.to(pooled.dtype) + pooled).to(y.dtype)


def _rows(x: Tensor, deltas: Sequence[Delta], route: str) -> Tensor:
    """Σ ΔW[x], (*x.shape, d), in at least fp32."""
    if route == "dense":
        factors = [factor for delta in deltas for factor in delta.factors]
        return recomputed(lambda x: F.embedding(x, total(deltas)), x, lambda: factors)
    found = [delta.lookup(x) for delta in deltas]
    return sum_of([rows.to(accumulation_dtype(rows.dtype)) for rows in found])
