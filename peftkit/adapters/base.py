"""Adapter: parameters -> Delta. The whole contract of an algorithm, with one required method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from peftkit.adapters.facts import Facts
from peftkit.adapters.form import Additive, Form
from peftkit.adapters.in_common import Common, held_together
from peftkit.adapters.pair import Pair
from peftkit.delta.base import Delta, WeightCache
from peftkit.errors import OptionError, UnsetAdapterError
from peftkit.geometry import Shape
from peftkit.kernels.sharding import divided_as, sharded
from peftkit.kernels.torch_private import own_buffers

#: `on_another_base` of kinds whose derived tensors a file has with portable=True alone
MADE_OF_BASE = "is made of the first base's own {}, which this file does not hold: save it with portable=True"


class Adapter(nn.Module, ABC):
    """An algorithm's parameters for one weight matrix W (m, n), and the ΔW they stand for.

    A subclass has an `__init__(self, shape, weight, *, options…)` that makes its parameters, and `delta`. It reads
    W but never keeps or writes it, and knows neither layers nor files. Laws: `delta` is zero after `__init__`;
    in eval mode it is a function of the parameters and W alone.
    """

    #: the name it is registered under
    kind: ClassVar[str] = ""
    #: where the algorithm is described
    paper: ClassVar[str] = ""
    #: what tables say of it
    facts: ClassVar[Facts] = Facts()
    #: what the stored numbers mean; changes with their meaning, so that an old file is refused, never misread
    convention: ClassVar[str] = "1"
    #: whether ΔW depends on the values of W when it is computed; without it, `delta` may be given W in any shape
    reads_base: bool = False
    #: entries that hold what the base was when the adapter was made; a file without them is taken to be of this base
    from_base: ClassVar[tuple[str, ...]] = ()
    #: whether it replaces what it changes, whatever that was before: no base is another one than it was made for
    replaces: bool = False
    #: what the same file means on another base, for the error a user meets there
    on_another_base: ClassVar[str] = "adds the same ΔW"

    #: whether `delta` takes parameters with a leading dimension too, those of several experts, and gives ΔW of them all
    batched: ClassVar[bool] = False
    #: whether it adapts a norm's weight and a bias too, as matrices of one column
    vectors: ClassVar[bool] = False
    #: how files hold a ΔW of this kind's structure; None for kinds whose ΔW is of another kind's structure, or of none
    additive: ClassVar[type[Additive] | None] = None
    #: the tensors to which all of ΔW is proportional: times c, those that are there make it c·ΔW; none if ΔW is not so
    scaling_parameters: ClassVar[frozenset[str]] = frozenset()
    #: what `row_parameters` returns, of kinds where it is the same under all options
    by_row: ClassVar[frozenset[str] | None] = None
    #: the options that say only shapes, the start, γ or dropout: under one γ, tensors of a smaller rank are the same ΔW
    #: as those with zeros behind them
    resizable: ClassVar[frozenset[str]] = frozenset()
    #: the parameters that the adapters of one wrap have in common where they are of one shape, and for each the options
    #: that must agree too; they start as functions of these and of their shape, whichever layer comes first
    shares: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})

    #: every option with its value, and the shape of W, as `registry.build` resolved them
    options: dict[str, Any]
    shape: Shape
    #: γ, of kinds that have one
    scale: float
    #: whether it was made on the meta device, and has been given no values since
    unset: bool = False
    #: the parameters that it has in common with other adapters, each with the mark that they all have
    common: Mapping[str, Common] = MappingProxyType({})
    #: how many adapters share a parameter at most, one after another in the order of the model; None for all
    shared_by: int | None = None
    #: the trained factors that start at 0 beside others that do not, which have no gradient until these have moved
    starts_at_zero: frozenset[str] = frozenset()
    #: the parameters that weight decay may shrink: with the others as they start, ΔW goes to 0 with them
    decays: frozenset[str] = frozenset()
    #: probability of dropping an element of the layer's input before ΔW is applied to it
    input_dropout: float = 0.0
    #: whether a strength λ means λ·ΔW
    linear: bool = True
    #: whether `delta` draws random numbers in training
    stochastic: bool = False
    #: whether training draws how many of its ranks it uses, which `use_prefix` may say for a whole model
    draws_prefixes: ClassVar[bool] = False
    #: whether the timestep of a diffusion says how many of its ranks it uses, through `use_prefix`
    follows_timesteps: ClassVar[bool] = False
    #: the parameter that scales each of its ranks, and takes a rank out at 0
    gates: ClassVar[str | None] = None
    #: whether `project_` may move its parameters
    projects: bool = False

    @abstractmethod
    def delta(self, weight: Tensor) -> Delta:
        """Return ΔW at strength 1.

        Args:
            weight: W (m, n), read only.
        """

    def at(self, weight: Tensor, strength: float | Tensor) -> Delta:
        """Return ΔW at a strength λ: λ·ΔW, unless an option names another path, as `oft` has in path="geodesic"."""
        delta = self.delta(weight)
        return delta if isinstance(strength, float) and strength == 1 else delta.scaled(strength)

    def inner_and_sqnorm(self, weight: Tensor, cache: WeightCache) -> tuple[Tensor, Tensor]:
        """Return <ΔW, W>_F and ‖ΔW‖_F² at strength 1, scalars, which a kind may know without making ΔW.

        Args:
            weight: W (m, n).
            cache: what is known of W and of the adapter's buffers.
        """
        return self.delta(weight).upcast().inner_and_sqnorm(weight, cache)

    def forward(self, weight: Tensor, strength: float | Tensor) -> Delta:
        """Return `at` in the precision of the parameters, whatever the autocast state."""
        if self.unset:
            self.require_values()
        if torch.is_autocast_enabled(weight.device.type):
            with torch.autocast(weight.device.type, enabled=False):
                return self.at(weight, strength)
        return self.at(weight, strength)

    def parts(self) -> Iterator[tuple[str, Adapter]]:
        """Return the adapter under "", and those inside it by name."""
        return ((name, module) for name, module in self.named_modules() if isinstance(module, Adapter))

    def require_values(self) -> None:
        """Raise UnsetAdapterError if the adapter was made on the meta device, and no values came since."""
        if self.unset:
            raise UnsetAdapterError(
                f"a {self.kind} adapter was made on the meta device and its parameters have no values: load the "
                "adapter's state dict, or give it its start with pk.reset_adapters(model) once the base is loaded"
            )

    def reset_parameters(self, weight: Tensor | None = None) -> None:
        """Give the adapter the values that it starts with, in place; ΔW is then zero.

        Args:
            weight: W (m, n), which kinds that start from the base need.

        Raises:
            OptionError: the kind starts from the base, and no weight was given.
        """
        own = self.state_dict()
        if weight is None and (self.derived() or self.from_base or self.reads_base):
            raise OptionError(f"{self.kind} starts from its base: call pk.reset_adapters(model), which gives it")
        if any(sharded(tensor) or tensor.is_meta for tensor in own.values()):
            raise UnsetAdapterError(
                f"the parameters of a {self.kind} adapter are on the meta device or divided among processes: reset "
                "between to_empty and fully_shard, or load the adapter's state dict"
            )
        if weight is None:
            weight = placeholder_weight(self.shape).to(next(iter(own.values())).device)
        fresh = type(self)(self.shape, weight, **self.options)
        with torch.no_grad():
            for key, tensor in fresh.state_dict().items():
                own[key].copy_(tensor)
        for module, made in zip(self.modules(), fresh.modules(), strict=True):
            _set_constants(module, made)
            vars(module).pop("unset", None)

    def _apply(self, *args: Any, **kwargs: Any) -> Adapter:
        with held_together(self):
            super()._apply(*args, **kwargs)
        self._refresh()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Once, as named_parameters has it: files refuse tensors that share memory
        for name, mark in self.common.items():
            if not mark.is_first(destination, f"{prefix}{name}"):
                del destination[f"{prefix}{name}"]

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
        **kwargs: Any,
    ) -> None:
        with held_together(self):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args, **kwargs)
        keys = {f"{prefix}{name}": mark for name, mark in self.common.items()}
        loaded = {key for key, mark in keys.items() if mark.is_loaded(key in state_dict, missing_keys)}
        missing_keys[:] = [key for key in missing_keys if key not in loaded]
        self._refresh()
        if not self.unset:
            return
        own = {f"{prefix}{key}": tensor for key, tensor in self.state_dict().items() if "." not in key}
        if all(key in state_dict or key in loaded for key in own):
            weight = placeholder_weight(self.shape).to(next(iter(own.values())).device)
            _set_constants(self, type(self)(self.shape, weight, **self.options))
            vars(self).pop("unset", None)
            self._refresh()

    def refresh_parts_(self) -> None:
        """Refresh the adapter and those inside it, after numbers were written into their tensors."""
        for _, part in self.parts():
            part._refresh()

    def _refresh(self) -> None:
        """Refresh, unless the numbers that it takes are not there."""
        if not self.unset and not any(tensor.is_meta for tensor in own_buffers(self).values() if tensor is not None):
            self.refresh_()

    def refresh_(self) -> None:
        """Recompute the buffers that no file holds from those that files hold, which were loaded, moved or cast."""

    @classmethod
    def needs_base(cls, options: Mapping[str, Any]) -> bool:
        """Return whether the adapter that these options make reads W.

        Args:
            options: as in `Stored`.
        """
        del options
        return cls.reads_base

    @classmethod
    def row_parameters(cls, options: Mapping[str, Any]) -> frozenset[str] | None:
        """Return the tensors with a row for every row of W, where row i of ΔW needs no other row; None if it does.

        Args:
            options: as in `Stored`.
        """
        del options
        return cls.by_row

    @classmethod
    def of_rows(cls, stored: Stored, shape: Shape, rows: Tensor) -> Stored | None:
        """Take the adapter of some rows of W, with the same ΔW row by row; None where the algorithm mixes rows.

        Args:
            stored: the adapter of the whole W.
            shape: of W.
            rows: (k,) the numbers of the rows.
        """
        del shape
        by_row = cls.row_parameters(stored.options)
        if by_row is None:
            return None
        tensors = {key: t[rows] if key in by_row else t.clone() for key, t in stored.tensors.items()}
        return stored._replace(tensors=tensors)

    def pair(self) -> Pair | None:
        """Return the two factors of kinds whose ΔW is their product, of which B trains; None of others."""
        return None

    def takes_start(self) -> str:
        """Return what `anchor_` may give it: "" nothing, and "input" A₀ alone, with B₀ = 0.

        "factors" are B₀ and A₀, from which both train; "frame" the same, which stay, with a matrix between.
        """
        return ""

    def anchor_(self, up: Tensor, down: Tensor) -> None:
        """Start again from other factors, B₀ (m, r) and A₀ (r, n), at ΔW = 0; of kinds that take a start."""
        raise OptionError(f"{self.kind} starts as it is made: wrap with the kind 'anchored' and start='given'")

    @torch.no_grad()
    def begin_(self, up: Tensor, down: Tensor) -> None:
        """Start again at ΔW = γ·B₀·A₀; of kinds that take A₀, or factors."""
        self.anchor_(torch.zeros_like(up), down)
        own = self.get_parameter("up")
        own.copy_(divided_as(own, up))

    def use_prefix(self, share: float | None) -> None:
        """Use, in training, the ranks that a number in [0, 1) stands for; None: draw anew at each call."""
        del share

    @classmethod
    def least(cls, options: Mapping[str, Any]) -> tuple[int, int]:
        """Return the least rows and columns that a weight has which these options are for.

        Args:
            options: as in `Stored`.
        """
        del options
        return 1, 1

    def project_(self) -> None:
        """Move the parameters, in place, into the set that the algorithm allows; most algorithms allow everything."""

    def rebase_(self, weight: Tensor) -> None:
        """Recompute what is derived from W, after parameters and buffers came from a file."""
        del weight

    def derived(self) -> dict[str, Tensor]:
        """Return what `rebase_` would recompute: with it, a file needs no base to say what ΔW is."""
        return {}

    def refused(self, tensors: Mapping[str, Tensor]) -> str:
        """Return why a file's tensors, of the right shapes, are none of this adapter, "" where they are.

        Args:
            tensors: as `state_dict` names them.
        """
        del tensors
        return ""

    def form(self, weight: Tensor) -> Form | None:
        """Return what files of other programs hold of an adapter that reads its base; None where they hold none of it.

        weight: (m, n), of the right shape and device; its numbers are not read.
        """
        del weight
        return None

    @classmethod
    def structure(cls, options: Mapping[str, Any]) -> str:
        """Return what `Target.reads` calls the adapter that these options make, as it stands in a file."""
        return f"{cls.kind} tucker" if options.get("tucker") else cls.kind

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _set_constants(module: nn.Module, made: nn.Module) -> None:
    """Give a module the buffers that no state dict holds, from one that was made like it."""
    held = module.state_dict()
    own_buffers(module).update({name: b for name, b in own_buffers(made).items() if b is not None and name not in held})


class Stored(NamedTuple):
    """An adapter as a file holds it: its kind, its options and its tensors as `state_dict` names them."""

    kind: str
    options: dict[str, Any]
    tensors: dict[str, Tensor]


def placeholder_weight(shape: Shape) -> Tensor:
    """Return a weight (m, n) of zeros, one number in memory, for adapters that do not read the values of W."""
    return torch.zeros(()).expand(shape.rows, shape.columns)
