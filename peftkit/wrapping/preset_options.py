"""The algorithms and options of LyCORIS' presets under this library's names, for one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from peftkit.adapters import registry
from peftkit.adapters.lokr import factorize
from peftkit.errors import did_you_mean, require_file
from peftkit.geometry import is_layer, of
from peftkit.wrapping.preset import Override
from peftkit.wrapping.sites import slots


def algorithms() -> dict[str, str]:
    """Return LyCORIS' algorithms with the kinds that are the same, as these say.

    Example:
        >>> from peftkit.wrapping.preset_options import algorithms
        >>> algorithms()["diag-oft"]
        'oft'
    """
    said = {kind: registry.get(kind).facts.lycoris.split(", ") for kind in registry.kinds()}
    return {name: kind for kind, names in said.items() for name in names if name and " " not in name}


class Layer(NamedTuple):
    """What LyCORIS' options depend on: the sizes of a weight, and whether its rank is that of larger kernels."""

    rows: int
    channels: int
    positions: int
    large: bool


def layer_of(module: nn.Module) -> Layer | None:
    """Return the sizes of a layer that LyCORIS adapts, None of another module. A kernel is known by its first side."""
    if not is_layer(module):
        return None
    own = slots(module).get("")  # none where a layer cannot be adapted, which `wrap` then says
    geometry = of(module) if own is None else own.geometry
    shape = geometry.shape
    large = bool(shape.kernel) and shape.kernel[0] > 1
    return None if geometry.transposed else Layer(shape.rows, shape.channels, shape.positions, large)


def adapter_of(
    said: Override, kind: str, layer: Layer, sizes: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the kind and the options of the adapter of one layer.

    Args:
        said: what the preset says of it.
        kind: where the preset names no algorithm.
        layer: its sizes.
        sizes: rank and alpha, where they are given.
        options: of `kind`; another gets those that it has.

    Raises:
        FileError: an algorithm or an option that is not known, or that the kind does not have.
    """
    own = kind if said.algorithm is None else _kind(said.algorithm)
    cls = registry.get(own)
    _require_numbers(said.options)
    ranks = {ours: said.options[name] for name, ours in _RANKS.items() if said.options.get(name)}
    inherited = {name: value for name, value in options.items() if own == kind or registry.takes(cls, name)}
    asked: dict[str, Any] = {}
    for name, value in said.options.items():
        asked |= _translated(name, value, layer)
    has = (*registry.option_names(cls), *(() if cls.reads_base else ("decompose", "axis")))
    for name in asked:
        require_file(name in has, own, f"it has no option {name!r}; it has {', '.join(has) or 'none'}")
    made = _sized(own, layer, {**sizes, **ranks}) | inherited | asked
    return own, _FINISHED[own](made, layer) if own in _FINISHED else made


def _kind(algorithm: str) -> str:
    known = algorithms()
    hint = did_you_mean(algorithm, known, count=1)
    expected = f"one of {', '.join(known)} was expected.{hint}"
    require_file(algorithm.lower() in known, f"algo = {algorithm!r}", expected)
    return known[algorithm.lower()]


#: LyCORIS' sizes of every algorithm -> ours; as there, 0 is as if it was left out
_RANKS = {"dim": "rank", "alpha": "alpha"}


def _require_numbers(options: Mapping[str, Any]) -> None:
    """Sizes are positive integers, or −1 where it stands for an even split."""
    for name, least in (("dim", 0), ("factor", -1), ("block_size", 1)):
        value = options.get(name, 1)
        fits = isinstance(value, int) and value is not True and value is not False and value >= least
        fits = fits and not (name == "factor" and value == 0)
        require_file(fits, f"{name} = {value!r}", "an integer that is a size was expected")


def has_size(kind: str, name: str) -> bool:
    """Return whether a kind has an option that "rank" or "alpha" is for."""
    return registry.takes(registry.get(kind), name) or (kind in _BLOCKS and name == "rank")


def _sized(kind: str, layer: Layer, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a kind that rank and α are for."""
    if kind in _BLOCKS:
        return _BLOCKS[kind](layer, sizes["rank"]) if "rank" in sizes else {}
    return {name: value for name, value in sizes.items() if has_size(kind, name)}


#: what LyCORIS' dim is to kinds that have blocks and no rank
_BLOCKS: Mapping[str, Callable[[Layer, int], dict[str, Any]]] = {
    "oft": lambda layer, dim: {"block_size": divisor(layer.rows, dim)},
    "boft": lambda layer, dim: {"block_size": dim},
}


def divisor(size: int, bound: int) -> int:
    """Return the smaller of the two factors that LyCORIS splits a size into; −1 splits as evenly as possible.

    A bound that divides the size is one of the two, and else the smaller is the largest divisor up to it and √size.

    Example:
        >>> from peftkit.wrapping.preset_options import divisor
        >>> divisor(360, 16), divisor(12, 6)
        (15, 2)
    """
    divides = bound > 0 and size % bound == 0
    return min(bound, size // bound) if divides else factorize(size, bound)[0]


def _translated(name: str, value: Any, layer: Layer) -> dict[str, Any]:
    """An option of LyCORIS as ours."""
    known = (*_OPTIONS, *_REFUSED)
    hint = did_you_mean(name, known, count=1)
    require_file(name in known, f"unknown option {name!r}", f"LyCORIS' options are {', '.join(known)}.{hint}")
    require_file(name in _OPTIONS or not value, f"{name} = {value!r}", _REFUSED.get(name, ""))
    return _OPTIONS[name](value, layer) if name in _OPTIONS else {}


def _when(condition: object, **options: Any) -> dict[str, Any]:
    return options if condition else {}


_SIDES = ("in", "out")
_BASES = ("random", "base")
#: LyCORIS' options -> ours, of a value and a layer; dim is among the sizes
_OPTIONS: Mapping[str, Callable[[Any, Layer], dict[str, Any]]] = {
    "dim": lambda value, _: {},
    "alpha": lambda value, _: _when(value, alpha=value),
    "dropout": lambda value, _: {"dropout": value},
    "rank_dropout": lambda value, _: {"rank_dropout": value},
    "module_dropout": lambda value, _: {"module_dropout": value},
    "decompose_both": lambda value, _: {"decompose_both": value},
    "use_tucker": lambda value, layer: _when(value and layer.positions > 1, tucker=True),
    "weight_decompose": lambda value, _: {"decompose": value},
    "wd_on_out": lambda value, _: {"axis": _SIDES[bool(value)]},
    "wd_on_output": lambda value, _: {"axis": _SIDES[bool(value)]},
    "rs_lora": lambda value, _: {"rslora": value},
    "block_size": lambda value, _: {"block": value},
    "factor": lambda value, layer: {"factor": (divisor(layer.rows, value), divisor(layer.channels, value))},
    "unbalanced_factorization": lambda value, _: _when(value, outer=()),  # _kronecker says the sizes
    "full_matrix": lambda value, _: _when(value, full=True),
    "constraint": lambda value, _: {"constraint": value or None},
    "rescaled": lambda value, _: {"rescale": value},
    "train_on_input": lambda value, _: {"side": _SIDES[not value]},
    "sig_type": lambda value, _: {"start": value},
    "use_data_init": lambda value, _: {"of": _BASES[bool(value)]},
}

#: LyCORIS' options that no adapter has here, and what to do
_REFUSED: Mapping[str, str] = {
    "bypass_mode": "a route is chosen for the whole model, as by pk.wrap(…, route='factored')",
    "mask_group_id": "pk.training.use_timestep(model, t) tells all adapters of a model",
    "use_scalar": "no adapter has a trained scale of its own; leave it out",
}


def _kronecker(options: dict[str, Any], layer: Layer) -> dict[str, Any]:
    """LoKr's options where the rank decides, as in LyCORIS, whether C and D have factors of their own."""
    made = dict(options)
    factor = made.get("factor", 8)
    bounds = factor if isinstance(factor, tuple) else (factor, factor)
    rows, columns = (factorize(size, bound)[0] for size, bound in zip(layer[:2], bounds, strict=True))
    if "outer" in made:  # the larger of the rows' factors in C; beside a shape of C, it is split at any rank
        rows = layer.rows // rows
        made["outer"] = rows, columns
        made["decompose_both"] = bool(made.get("decompose_both")) and made.get("rank", rows) < max(rows, columns) / 2
    whole = made.get("full") or made.get("rank", layer.rows) >= max(layer.rows // rows, layer.channels // columns) / 2
    if whole:
        made.pop("tucker", None)
    return made


#: kinds whose options depend on one another
_FINISHED: Mapping[str, Callable[[dict[str, Any], Layer], dict[str, Any]]] = {"lokr": _kronecker}
