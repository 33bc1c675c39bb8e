"""What sd-scripts' network_args ask for: a kind with its options, layers, and factors of learning rates."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from peftkit.adapters import registry
from peftkit.errors import OptionError, TargetError
from peftkit.integrations.kohya_blocks import SD, SDXL, Layout, block_numbers, block_of, block_rates, number
from peftkit.wrapping.preset_options import algorithms, has_size
from peftkit.wrapping.preset_rules import preset_rules
from peftkit.wrapping.rule import Rule
from peftkit.wrapping.select import Selector
from peftkit.wrapping.sites import Site

#: the blocks whose layers sd-scripts adapts, by class: of its own networks and of diffusers'
_BLOCKS = (
    "Transformer2DModel",
    "DoubleStreamBlock",
    "SingleStreamBlock",
    "SingleDiTBlock",
    "DiTBlock",
    "JointTransformerBlock",
)
_BLOCKS += ("FluxTransformerBlock", "FluxSingleTransformerBlock", "MMDoubleStreamBlock", "MMSingleStreamBlock")
#: those that conv_dim adds
_CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
_ENCODERS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP", "T5Attention", "T5DenseGatedActDense", "T5DenseActDense")

_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold")
_RATIOS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
_RANKS = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
_OWN = frozenset({*_RATES, *_RATIOS, *_RANKS, "kind", "algo", "targets", "preset", "train_t5xxl", "train_llm_adapter"})
#: what chooses layers and ranks in another way than a preset
_OTHER_WAYS = ("targets", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")


class Recipe:
    """The arguments of one network.

    Args:
        rank: network_dim, 4 by default.
        alpha: network_alpha, 1 by default.
        dropout: network_dropout.
        arguments: network_args.

    Raises:
        OptionError: a value that an argument cannot take.
        UnknownAdapterError: no adapter is called `kind`.
    """

    def __init__(
        self, rank: int | None, alpha: float | None, dropout: float | None, arguments: Mapping[str, Any]
    ) -> None:
        given = {name: value for name, value in arguments.items() if value is not None}
        self.arguments = {name: str(given[name]) for name in given if name in _OWN}
        kind = self.arguments.get("kind", self.arguments.get("algo", "lora"))
        self.kind = registry.get(algorithms().get(kind, kind)).kind
        options = {name: _value(value) for name, value in given.items() if name not in _OWN}
        options |= {"dropout": options.get("dropout") if dropout is None else dropout}
        self.options = {name: value for name, value in options.items() if name != "dropout" or value}
        self.rank, self.alpha = 4 if rank is None else rank, 1.0 if alpha is None else alpha
        #: what describes adapters, which a network made from a file has from there
        self.given = sorted({*self.options, *({*self.arguments} & {*_RANKS, "kind", "algo", "targets", "preset"})})
        self.t5 = _value(self.arguments.get("train_t5xxl", "False")) is True

    def ratio(self, part: str) -> float | None:
        """Return the factor of LoRA+ for a part's parameters that start at 0; None without one."""
        own = "loraplus_unet_lr_ratio" if part == "unet" else "loraplus_text_encoder_lr_ratio"
        given = self.arguments.get(own, self.arguments.get("loraplus_lr_ratio"))
        return None if given is None else number(own, given)

    def block_rates(self, base: nn.ModuleDict) -> list[float] | None:
        """Return the factor of the learning rate of every block of the U-Net; None where all are 1."""
        return block_rates(self.arguments, self._layout(base)) if {*_RATES} & {*self.arguments} else None

    def rules(self, base: nn.ModuleDict) -> list[Rule]:
        """Return what goes on which layers, layer by layer.

        Raises:
            TargetError: no layer of the models is one that sd-scripts, `targets` or `preset` adapts.
            FileError: there is no such preset, or it is none.
            OptionError: arguments that exclude one another.
        """
        if "preset" in self.arguments:
            return self._preset_rules(base, self.arguments["preset"])
        groups: defaultdict[tuple[int, float], list[str]] = defaultdict(list)
        for site in self._sites(base):
            rank, alpha = self._rank(site, base)
            if rank:
                groups[rank, alpha].append(site.name)
        if not groups:
            raise TargetError(f"no layer of {', '.join(base)} is adapted: name some by targets=")
        has = {name for name in ("rank", "alpha") if registry.takes(registry.get(self.kind), name)}
        return [
            Rule(names, self.kind, **self._options({"rank": rank, "alpha": alpha}, has))
            for (rank, alpha), names in groups.items()
        ]

    def _preset_rules(self, base: nn.ModuleDict, preset: str) -> list[Rule]:
        """What a preset of LyCORIS says, with the rank and α of kinds that have them."""
        other = next((name for name in _OTHER_WAYS if name in self.arguments), None)
        if other is not None:
            raise OptionError(f"preset and {other} were given: each says which layers get which rank, so give one")
        given = {
            name: number(name, self.arguments[name]) for name in ("conv_dim", "conv_alpha") if name in self.arguments
        }
        sizes = {"rank": self.rank, "alpha": self.alpha, "conv_alpha": given.get("conv_alpha")}
        sizes["conv_rank"] = int(given.get("conv_dim", self.rank))
        has = {name: value for name, value in sizes.items() if has_size(self.kind, name.removeprefix("conv_"))}
        llm_adapter = _value(self.arguments.get("train_llm_adapter", "False")) is True
        return preset_rules(base, preset, self.kind, train_llm_adapter=llm_adapter, **has, **self.options)

    def _options(self, sizes: Mapping[str, Any], has: Collection[str]) -> dict[str, Any]:
        """The kind's options: its own, and those of rank and α that it has."""
        return {name: value for name, value in sizes.items() if name in has} | self.options

    def _sites(self, base: nn.ModuleDict) -> Iterator[Site]:
        """The weights that the arguments, or sd-scripts' habits, mean."""
        selector, seen = Selector(base), set[str]()
        convolutions = {"conv_dim", "conv_block_dims"} & {*self.arguments}
        classes = (*_BLOCKS, *_ENCODERS, *(_CONVOLUTIONS if convolutions else ()))
        there = {kind.__name__ for module in base.modules() for kind in type(module).__mro__}
        patterns = self.arguments["targets"].split(",") if "targets" in self.arguments else there.intersection(classes)
        for pattern in patterns or ["attn-mlp"]:
            for name in selector.find(pattern).sites:
                if name not in seen and name in selector.sites:
                    seen.add(name)
                    yield selector.sites[name]

    def _rank(self, site: Site, base: nn.ModuleDict) -> tuple[int, float]:
        """The rank and α of a weight; a rank of 0 leaves it out."""
        part, _, path = site.name.partition(".")
        large = site.slot.geometry.shape.positions > 1
        first = "conv_" if large else ""
        rank, alpha = float(self.rank), self.alpha
        if large and "targets" not in self.arguments:
            rank, alpha = (
                number(f"conv_{n}", self.arguments.get(f"conv_{n}", d)) for n, d in (("dim", 0), ("alpha", 1))
            )
        block = block_of(path) if part == "unet" else None
        if block is not None:
            layout = self._layout(base)
            dims, alphas = (self.arguments.get(f"{first}block_{what}") for what in ("dims", "alphas"))
            rank = rank if dims is None else block_numbers(f"{first}block_dims", dims, layout)[block]
            alpha = alpha if alphas is None else block_numbers(f"{first}block_alphas", alphas, layout)[block]
            rates = self.block_rates(base)
            rank = 0 if rates is not None and not rates[block] else rank
        return int(rank), alpha

    def _layout(self, base: nn.ModuleDict) -> Layout:
        """How sd-scripts counts the blocks of this U-Net."""
        unet = base["unet"] if "unet" in base else nn.Module()
        if hasattr(unet, "input_blocks"):
            return SDXL
        if hasattr(unet, "down_blocks"):
            return SD
        raise OptionError(
            f"a {type(unet).__name__} has no blocks of a U-Net: leave out block_dims, *_lr_weight and the like"
        )


def _value(text: object) -> Any:
    """What an argument's text stands for: a number, True, False, None, a tuple, or the text itself."""
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
