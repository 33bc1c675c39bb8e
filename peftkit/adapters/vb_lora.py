"""VB-LoRA: factors whose pieces are mixed of a few vectors of one bank, which all layers train together."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftkit.adapters.bank import bank
from peftkit.adapters.base import Adapter
from peftkit.adapters.facts import Facts
from peftkit.adapters.options import Factory, factory, require, require_rank
from peftkit.adapters.peft_form import CommonForm, PeftForm
from peftkit.adapters.registry import register
from peftkit.delta import LowRank
from peftkit.errors import FileError
from peftkit.geometry import Shape


@register("vb-lora", "vblora")
class VBLoRA(Adapter):
    r"""Mixes factors of the vectors of one bank: ΔW = B·A − B₀·A₀, each piece of B and A = Σ_k softmax(s)_k·v_k.

    Columns of B and rows of A are cut into pieces of b numbers, the last one shorter where b does not divide them.
    Each piece is the sum of the `top` vectors with the largest logits, by the softmax s of these. Parameters are
    `bank` (h, b), from U(±bound), which all layers have in common; `logits_up` (⌈m/b⌉, r, h) and `logits_down`
    (r, ⌈n/b⌉, h), in which each piece starts with the quantiles of N(0, deviation²) in an order of its own. B₀ and A₀
    are B and A at the start, which the paper and PEFT leave in: here ΔW starts at exactly 0, with the same gradients.
    ΔW is of rank up to 2r. A file has the numbers of the vectors that the start was mixed of; −1 where it is left in,
    as in what PEFT has trained.

    Paper: https://arxiv.org/abs/2405.15179.

    Args:
        shape: The shape of the weight.
        weight: W (m, n), read for its device and dtype.
        rank: r, 4 by default.
        vectors: h, how many vectors the bank has.
        length: b, how long they are.
        top: How many vectors each piece is mixed of.
        bound: Of what the bank starts with.
        deviation: Of what the logits start with.
        seed: Of the bank at the start; layers with another seed have a bank of their own.

    Raises:
        OptionError: An option has a value that it cannot take.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 16))
        >>> report = pk.wrap(model, "vb-lora", rank=2, vectors=10, length=8)
        >>> sum(p.numel() for p in pk.adapter_parameters(model))  # h·b + 2·r·h·(m + n)/b
        200
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.15179"
    facts: ClassVar[Facts] = Facts(
        "frozen factors",
        "B·A − B₀·A₀, in pieces of one bank",
        "many layers are to learn from few numbers in common",
        peft="VBLoRAConfig",
    )
    convention: ClassVar[str] = "mixed(logits_up)@mixed(logits_down)-start, bank 1"
    shares: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({"bank": ("seed", "bound")})
    chosen_up: Tensor
    chosen_down: Tensor
    up0: Tensor
    down0: Tensor

    def __init__(
        self,
        shape: Shape,
        weight: Tensor,
        *,
        rank: int = 4,
        vectors: int = 256,
        length: int = 256,
        top: int = 2,
        bound: float = 0.02,
        deviation: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_rank("vb-lora", rank)
        for name, number in (("vectors", vectors), ("length", length)):
            require(number > 0, "vb-lora", name, number, "a positive integer")
        require(0 < top <= vectors, "vb-lora", "top", top, f"an integer from 1 to {vectors}, the vectors of the bank")
        require(bound > 0, "vb-lora", "bound", bound, "a number above 0, as a bank of zeros has no gradient")
        require(deviation > 0, "vb-lora", "deviation", deviation, "a number above 0")
        self.rows, self.columns = shape.rows, shape.columns
        self.bound, self.deviation, self.seed = float(bound), float(deviation), seed
        new = factory(weight)
        self.bank = nn.Parameter(_bank(seed, vectors, length, self.bound, torch.empty(0, **new)))
        up, down = -(-shape.rows // length), -(-shape.columns // length)
        self.logits_up = nn.Parameter(_logits((up, rank, vectors), self.deviation, new))
        self.logits_down = nn.Parameter(_logits((rank, down, vectors), self.deviation, new))
        self.register_buffer("chosen_up", self.logits_up.detach().topk(top).indices.int())
        self.register_buffer("chosen_down", self.logits_down.detach().topk(top).indices.int())
        self.register_buffer("up0", torch.empty(shape.rows, rank, **new), persistent=False)
        self.register_buffer("down0", torch.empty(rank, shape.columns, **new), persistent=False)
        if not weight.is_meta:
            VBLoRA.refresh_(self)  # of this matrix alone, where it is one of a stack

    def delta(self, weight: Tensor) -> LowRank:
        del weight
        top = self.chosen_up.shape[-1]
        (s, i), (t, j) = self.logits_up.topk(top), self.logits_down.topk(top)
        up, down = self._up(s, self.bank[i]), self._down(t, self.bank[j])
        return LowRank(torch.cat((up - self.up0, self.up0), dim=1), torch.cat((down, down - self.down0)))

    def form(self, weight: Tensor) -> PeftForm | None:
        (h, b), started = self.bank.shape, bool((self.chosen_up >= 0).any() or (self.chosen_down >= 0).any())
        if started or self.rows % b or self.columns % b:
            return None  # PEFT takes no start off, and cuts no vector
        top, rank = self.chosen_up.shape[-1], len(self.logits_down)
        options = {"r": rank, "topk": top, "num_vectors": h, "vector_length": b, "init_vector_bank_bound": self.bound}
        own = {"vblora_logits_A": self.logits_down, "vblora_logits_B": self.logits_up}
        common = {"vblora_vector_bank": self.bank}
        return CommonForm("vb-lora", ("VBLORA", options), own, self.delta(weight), common)

    @torch.no_grad()
    def refresh_(self) -> None:
        h, b = self.bank.shape
        start, top = _bank(self.seed, h, b, self.bound, self.bank), self.chosen_up.shape[-1]
        largest = _quantiles(h, self.deviation, self.bank).flip(0)[:top]
        s, t = (largest.expand(chosen.shape).contiguous() for chosen in (self.chosen_up, self.chosen_down))
        start = torch.cat((start, torch.zeros_like(start[:1])))  # of number −1
        # Numbers that `to_empty` leaves are no numbers of vectors
        i, j = (chosen.long().clamp(-1, h - 1) for chosen in (self.chosen_up, self.chosen_down))
        self.up0.copy_(self._up(s, start[i]))
        self.down0.copy_(self._down(t, start[j]))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        for name in ("chosen_up", "chosen_down"):
            chosen, count = state_dict.get(f"{prefix}{name}"), self.bank.shape[-2]
            if chosen is not None and not chosen.is_meta and not bool(((chosen >= -1) & (chosen < count)).all()):
                raise FileError(f"vb-lora: {name} has numbers that are none of the {count} vectors: it is damaged")

    def _up(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """B (m, r) of the largest logits (⌈m/b⌉, r, k) and their vectors (⌈m/b⌉, r, k, b)."""
        return _mixed(logits, vectors).mT.flatten(0, 1)[: self.rows]

    def _down(self, logits: Tensor, vectors: Tensor) -> Tensor:
        """A (r, n) of the largest logits (r, ⌈n/b⌉, k) and their vectors (r, ⌈n/b⌉, k, b)."""
        return _mixed(logits, vectors).flatten(1)[:, : self.columns]


def _mixed(logits: Tensor, vectors: Tensor) -> Tensor:
    """Σ_k softmax(s)_k·v_k (…, b) of logits s (…, k) and vectors v (…, k, b)."""
    return (logits.softmax(-1)[..., None] * vectors).sum(-2)


def _bank(seed: int, vectors: int, length: int, bound: float, like: Tensor) -> Tensor:
    """The bank (h, b) at the start: in every dtype what is of fp32, so that a cast start is the start."""
    return (bank(seed, "vb-lora", vectors, length, like.new_empty(0, dtype=torch.float32)) * bound).to(like.dtype)


def _quantiles(vectors: int, deviation: float, like: Tensor) -> Tensor:
    """The quantiles of N(0, deviation²) at (i + ½)/h, i = 0 … h − 1, in rising order, of fp32 too."""
    levels = (torch.arange(vectors, dtype=torch.float64, device="cpu") + 0.5) / vectors
    return (torch.special.ndtri(levels) * deviation).float().to(like.device, like.dtype)


def _logits(size: tuple[int, int, int], deviation: float, new: Factory) -> Tensor:
    """The quantiles in an order of its own for each piece."""
    # No two are equal: the largest are the same ones on every device and in every dtype
    order = torch.rand(size, device=new["device"]).argsort(-1)
    return _quantiles(size[-1], deviation, torch.empty(0, **new))[order]
