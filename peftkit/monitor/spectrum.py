"""Spectra of ΔW: singular values, ranks, and the intruders among the leading singular vectors of W + ΔW."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftkit.delta import Delta, Hadamard, Kron, LowRank
from peftkit.delta.base import WeightCache
from peftkit.errors import OptionError, require_integer, require_option
from peftkit.kernels.blocks import accumulation_dtype, tiles
from peftkit.kernels.sharding import sharded
from peftkit.wrapping.installed import InstalledAdapter, installed_adapters, names_of

_OVERSAMPLE = 16
_ITERATIONS = 60  # of subspace iteration, at most
_CONVERGED = 1e-4  # residual of a singular pair, of σ; of a Ritz value, of the largest
_KERNEL = 1e-5  # eigenvalues of W·Wᵀ below this share of the largest are 0
_LANCZOS = 240  # steps, at most


@dataclass(frozen=True)
class Spectrum:
    """Holds the ranks of one ΔW, and its intruder dimensions.

    Attributes:
        effective_rank: exp of the entropy of σᵢ/Σσ (Roy and Vetterli, 2007); 0 for ΔW = 0, NaN if ΔW is not finite.
        stable_rank: ‖ΔW‖_F²/σ₁²; 0 for ΔW = 0, NaN if ΔW is not finite.
        similarity: For each of the leading left singular vectors of W + ΔW, the largest cosine to one of W's; exact
            where it is not below the threshold, else an upper bound.
        intruders: How many of them are below the threshold (Shuttleworth et al., https://arxiv.org/abs/2410.21228).

    Of a stack of experts the singular values are those of all experts, and the leading vectors those of each, in order.
    """

    effective_rank: float
    stable_rank: float
    similarity: tuple[float, ...] = ()
    intruders: int = 0


@torch.no_grad()
def spectra(
    model: nn.Module, name: str | None = None, *, leading: int = 0, threshold: float = 0.6
) -> dict[str, Spectrum]:
    """Compute the spectrum of the ΔW of every adapted weight.

    Singular values come from the factors of LoRA, LoHa, LoKr and LoLDU in milliseconds; for other adapters the Gram
    matrix of the smaller side is diagonalised. Intruders need no SVD: the leading vectors come from subspace iteration,
    and how W's own singular vectors share one of them from Lanczos steps on W·Wᵀ that start there, until either answer
    is certain.

    Args:
        model: A model with adapters.
        name: One adapter, measured at strength 1; None for all of them, with their strengths if a weight has several.
        leading: How many singular vectors of W + ΔW to look at for intruders; 0 for none.
        threshold: The cosine to W's own vectors below which a vector is an intruder.

    Returns:
        A Spectrum for every adapted weight by name.

    Raises:
        OptionError: `leading` or `threshold` is out of range, or a weight is divided among processes.
        UnknownAdapterError: The model has no adapter, or none of this name.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8))
        >>> report = pk.wrap(model, "lora", rank=2)
        >>> _ = nn.init.normal_(model[0].adapters["default"].up)
        >>> spectrum = pk.monitor.spectra(model, leading=2)["0"]
        >>> 1 <= spectrum.stable_rank <= spectrum.effective_rank <= 2, len(spectrum.similarity)
        (True, 2)
    """
    require_integer("leading", leading, 0, "a number of singular vectors")
    require_option(0 < threshold < 1, "threshold", threshold, "a cosine between 0 and 1")
    sites: dict[str, list[InstalledAdapter]] = {}
    for where in installed_adapters(model, names_of(model, name)):
        if sharded(where.base):
            raise OptionError(f"{where.site}: its weight is divided among processes; gather the model for its spectra")
        sites.setdefault(where.site, []).append(where)
    device = next(iter(sites.values()))[0].base.device.type
    with torch.autocast(device, enabled=False):
        return {site: _spectrum(here, leading, threshold) for site, here in sites.items()}


def _spectrum(here: Sequence[InstalledAdapter], leading: int, threshold: float) -> Spectrum:
    W = here[0].base
    deltas: list[Delta] = []
    for where in here:
        modes = [(module, module.training) for module in where.adapter.modules()]
        where.adapter.eval()
        deltas.append(where.adapter.at(W, 1.0 if len(here) == 1 else where.strength).upcast())
        for module, mode in modes:
            module.training = mode
    sqnorms = [float(delta.inner_and_sqnorm(W, WeightCache())[1]) for delta in deltas]
    if not all(map(math.isfinite, sqnorms)):  # the run has diverged
        return Spectrum(math.nan, math.nan)
    values = torch.cat([singular_values(own) for own in zip(*(delta.parts for delta in deltas), strict=True)])
    total = float(values.sum())
    if total == 0:
        return Spectrum(0.0, 0.0)
    share = values[values > 0] / total
    ranks = math.exp(float(-(share * share.log()).sum())), float(values.square().sum() / values.max().square())
    if not leading:
        return Spectrum(*ranks)
    matrices = W.unflatten(0, (len(deltas[0].parts), -1)).unbind()
    parts = zip(matrices, *(delta.parts for delta in deltas), strict=True)
    similarity = [cosine for M, *own in parts for cosine in similarities(M, own, leading, threshold)]
    return Spectrum(*ranks, tuple(similarity), sum(value < threshold for value in similarity))


def singular_values(deltas: Sequence[Delta]) -> Tensor:
    """Return the singular values of Σ ΔW in float64, in no order; zeros may be left out."""
    if len(deltas) == 1 and isinstance(deltas[0], Kron):
        kron = deltas[0]
        D = _values(kron.left, kron.right) if kron.left is not None else torch.linalg.svdvals(kron.right.double())
        return torch.outer(torch.linalg.svdvals(kron.C.double()), D).flatten()
    least = min(deltas[0].shape)
    low = [delta.khatri_rao if isinstance(delta, Hadamard) else delta for delta in deltas]
    factors = [delta for delta in low if isinstance(delta, LowRank)]
    if len(factors) == len(deltas) and sum(delta.rank for delta in factors) <= least:
        return _values(torch.cat([f.B for f in factors], 1), torch.cat([f.A for f in factors]))
    m, n = deltas[0].shape
    G = torch.zeros(least, least, dtype=torch.float64, device=deltas[0].device)
    for rows, columns in _whole_lines(m, n, deltas):
        tile = _tile(deltas, rows, columns).double()
        G += tile.mT @ tile if n <= m else tile @ tile.mT
    return torch.linalg.eigvalsh(G).clamp(min=0).sqrt()


def _values(B: Tensor, A: Tensor) -> Tensor:
    """Of B·A, from the core that QR leaves."""
    left, right = torch.linalg.qr(B.double())[1], torch.linalg.qr(A.double().mT)[1]
    return torch.linalg.svdvals(left @ right.mT)


def _whole_lines(m: int, n: int, deltas: Sequence[Delta]) -> list[tuple[slice, slice]]:
    """Tiles for a Gram matrix of the smaller side: whole rows where that is the columns, whole columns else."""
    multiple = min(m, math.lcm(*(delta.row_multiple for delta in deltas)))
    if n <= m:
        return [(rows, slice(0, n)) for rows, columns in tiles(m, n, multiple) if columns.start == 0]
    return [(slice(0, m), columns) for _, columns in tiles(m, n, m)]


def _tile(deltas: Sequence[Delta], rows: slice, columns: slice) -> Tensor:
    return sum((delta.tile(rows, columns) for delta in deltas[1:]), deltas[0].tile(rows, columns))


def similarities(W: Tensor, deltas: Sequence[Delta], leading: int, threshold: float) -> list[float]:
    """For the leading left singular vectors of W + Σ ΔW, in order, the largest |cos| to a left singular vector of W."""
    m, n = W.shape
    dtype = accumulation_dtype(W.dtype)
    multiple = min(m, math.lcm(*(delta.row_multiple for delta in deltas)))

    def changed(X: Tensor, transposed: bool) -> Tensor:
        """(W + Σ ΔW)·X, or its transpose by X, tile by tile."""
        Y = X.new_zeros(n if transposed else m, X.shape[1])
        for rows, columns in tiles(m, n, multiple):
            tile = W[rows, columns].to(dtype) + _tile(deltas, rows, columns).to(dtype)
            if transposed:
                Y[columns] += tile.mT @ X[rows]
            else:
                Y[rows] += tile @ X[columns]
        return Y

    def gram(X: Tensor) -> Tensor:
        """W·Wᵀ·X."""
        Y = X.new_zeros(m, X.shape[1])
        inner = X.new_zeros(n, X.shape[1])
        for rows, columns in tiles(m, n):
            inner[columns] += W[rows, columns].to(dtype).mT @ X[rows]
        for rows, columns in tiles(m, n):
            Y[rows] += W[rows, columns].to(dtype) @ inner[columns]
        return Y

    U = _leading(changed, m, n, min(leading, m, n), dtype, W.device)
    return _largest_cosines(gram, U, threshold)


def _leading(
    times: Callable[[Tensor, bool], Tensor], m: int, n: int, k: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The k leading left singular vectors (m, k), by subspace iteration until the pairs fit."""
    generator = torch.Generator(device=device).manual_seed(0)
    width = min(k + _OVERSAMPLE, m, n)
    Q = torch.linalg.qr(torch.randn(n, width, generator=generator, dtype=dtype, device=device))[0]
    U = Q
    for _ in range(_ITERATIONS):
        P = torch.linalg.qr(times(Q, False))[0]
        Z = times(P, True)  # (n, width): W'ᵀ·P, whose SVD rotates P to the singular vectors it approximates
        V, S, rotation = torch.linalg.svd(Z, full_matrices=False)
        U = P @ rotation.mT
        residual = torch.linalg.vector_norm(times(V[:, :k], False) - U[:, :k] * S[:k], dim=0)
        if bool((residual <= _CONVERGED * S[:k]).all()):
            break
        Q = V
    return U[:, :k]


def _largest_cosines(gram: Callable[[Tensor], Tensor], U: Tensor, threshold: float) -> list[float]:
    r"""max_j |<u, u_j>| over the eigenvectors u_j of W·Wᵀ outside its kernel, for every column u of U (m, k).

    t Lanczos steps from u give a quadrature of the measure Σ_j <u, u_j>²·δ(λ_j): nodes θ_i with weights ω_i. No mass at
    one point is more than ω_i + ω_{i+1} (Chebyshev, Markov, Stieltjes), and a node whose Ritz vector has converged is
    an eigenvector with <u, u_j>² = ω_i. Steps are added until one of the two decides about the threshold.
    """
    m, k = U.shape
    largest = torch.zeros(k, dtype=torch.float64)
    open_ = torch.ones(k, dtype=torch.bool)
    basis = [U]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for step in range(1, min(m, _LANCZOS) + 1):
        q = basis[-1]
        z = gram(q)
        alphas.append((q * z).sum(0))
        for _ in range(2):  # twice is enough to stay orthogonal
            for other in basis:
                z = z - other * (other * z).sum(0)
        beta = torch.linalg.vector_norm(z, dim=0)
        betas.append(beta)
        last = step == min(m, _LANCZOS)
        if step % 8 == 0 or last:
            diagonal, beside = torch.stack(alphas, 1).double().cpu(), torch.stack(betas, 1).double().cpu()
            T = torch.diag_embed(diagonal)
            T = T + torch.diag_embed(beside[:, :-1], 1) + torch.diag_embed(beside[:, :-1], -1)
            nodes, vectors = torch.linalg.eigh(T)
            size = nodes.abs().amax(1, keepdim=True)
            weights = vectors[:, 0].square() * (nodes > _KERNEL * size)
            above = torch.cat([weights[:, :1], weights[:, :-1] + weights[:, 1:], weights[:, -1:]], 1).amax(1)
            residual = beside[:, -1:] * vectors[:, -1].abs()
            converged = residual <= _CONVERGED * size
            sure = (weights * converged).amax(1)
            below, reached = above < threshold**2, sure >= threshold**2
            found = torch.where(reached, sure, torch.where(below, above, weights.amax(1)))
            largest = torch.where(open_, found, largest)
            open_ &= ~(below | reached)
            if last or not open_.any():
                break
        basis.append(z / beta.clamp(min=torch.finfo(z.dtype).tiny))
    return largest.clamp(max=1).sqrt().tolist()
