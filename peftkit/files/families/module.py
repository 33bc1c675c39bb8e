"""What a model family is made of: each module's name and shape, and its place in the published checkpoint.

Names are those of diffusers and transformers, and of the checkpoint that the model was published in. A generator states
the structure of one network once, in both namings side by side. `entry` is one line of it: the diffusers name, the
original name, the shape of the weight. In both names `{}` may stand for the number of a block; a family that is
published in several sizes gives no shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

#: stands for the number of a block in a name
NUMBER = "{}"


@dataclass(frozen=True)
class ModuleSpec:
    """One module that has a weight, or the same module of every block.

    `original` names a tensor of the published checkpoint, suffix included. Rows [start, stop) of it are this weight,
    all of them if they are None; then its two halves are exchanged if `swapped`; or it is transposed, if `transposed`.
    The bias follows, except that it is never transposed.
    """

    name: str  # "<component>.<path in the diffusers or transformers class>"
    shape: tuple[int, ...]  # () where the family has several sizes
    bias: bool
    original: str
    original_bias: str | None
    start: int | None = None
    stop: int | None = None
    of: int | None = None  # how many equal parts `start` and `stop` count of; None where they count rows
    swapped: bool = False  # diffusers has (scale, shift) where the original has (shift, scale)
    transposed: bool = False  # a bare parameter that is multiplied from the right
    optional: bool = False  # a model of the family may lack it
    spelled: str = ""  # its path in adapter files, where these name parts of an original layer by themselves

    @property
    def path(self) -> str:
        """The name inside its component."""
        return self.name.partition(".")[2]

    @property
    def share(self) -> int:
        """How many of the rows it has where the original has several modules in one: rows, or equal parts of them."""
        if self.start is not None and self.stop is not None:
            return self.stop - self.start
        return self.shape[0] if self.shape else 1

    def fits(self, sizes: Sequence[int]) -> bool:
        """Whether a weight of these sizes can be this module's."""
        return not self.shape or tuple(sizes) == self.shape

    def rows_of(self, rows: int) -> tuple[int | None, int | None]:
        """Return the first row and the one after the last, of an original tensor of so many rows."""
        if self.of is None or self.start is None or self.stop is None:
            return self.start, self.stop
        return rows * self.start // self.of, rows * self.stop // self.of

    def numbered(self, number: str) -> ModuleSpec:
        """Return the module of one block."""
        return replace(
            self,
            name=self.name.replace(NUMBER, number),
            original=self.original.replace(NUMBER, number),
            original_bias=self.original_bias and self.original_bias.replace(NUMBER, number),
            spelled=self.spelled.replace(NUMBER, number),
        )


@dataclass(frozen=True, eq=False)
class Component:
    """One network of a pipeline, and what its names begin with in the files that hold it.

    Attributes:
        name: as in a diffusers pipeline.
        original: what its keys begin with in the published checkpoint.
        comfy: what its modules begin with in ComfyUI's own dotted spelling.
        webui: what its modules begin with in underscored spellings, the one to write first.
        anchor: a path: this weight's shape tells the network from others of the same class.
        build: yields its modules, with names relative to the component.
        webui_ldm: whether sd-scripts trains the original network, and the first of `webui` goes with its paths.
        depths: path of a list of blocks -> how long it is at most.
        prefixes: what the keys of other published checkpoints begin with.
        respelled: parts of original names -> what ComfyUI has in their place, in its files and in its paths.
        complete: whether a checkpoint without all of its modules is of another family.
        unlike: a module that only models of another family have beside all of these.
        general: whether people use it by itself too: no path is of this family without one of the prefixes.
    """

    name: str
    original: str
    comfy: str
    webui: tuple[str, ...]
    anchor: str
    build: Callable[[], Iterator[ModuleSpec]]
    webui_ldm: bool = False
    depths: Mapping[str, int] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    respelled: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False
    unlike: str = ""
    general: bool = False

    @property
    def denoiser(self) -> bool:
        """Whether it is the network that denoises."""
        return self.name in ("unet", "transformer", "prior")

    @cached_property
    def specs(self) -> tuple[ModuleSpec, ...]:
        """Its modules, once for all blocks where these are alike."""

        def placed(module: ModuleSpec) -> ModuleSpec:
            bias = None if module.original_bias is None else self.original + module.original_bias
            return replace(
                module, name=f"{self.name}.{module.name}", original=self.original + module.original, original_bias=bias
            )

        return tuple(map(placed, self.build()))

    @cached_property
    def modules(self) -> Mapping[str, ModuleSpec]:
        """Path -> module, of all blocks."""
        return MappingProxyType({module.path: module for spec in self.specs for module in self.blocks(spec)})

    def blocks(self, spec: ModuleSpec) -> Iterator[ModuleSpec]:
        """Yield a module of every block."""
        yield from (spec.numbered(str(i)) for i in range(self.depth(spec))) if NUMBER in spec.name else (spec,)

    def depth(self, spec: ModuleSpec) -> int:
        """Return how many blocks have a module at most, 0 for one that is in no numbered block."""
        blocks, number, _ = spec.path.partition(f".{NUMBER}")
        return self.depths[blocks] if number else 0

    def comfy_path(self, original: str) -> str:
        """Return what ComfyUI has in place of an original name."""
        for theirs, own in self.respelled.items():
            original = original.replace(theirs, own)
        return original

    def ldm(self, module: ModuleSpec) -> str:
        """Return the path in the original naming, as adapter files spell it; transformers' for text encoders."""
        if not self.denoiser:
            return module.path
        return module.spelled or module.original.removeprefix(self.original).rpartition(".")[0]


def entry(name: str, original: str, *shape: int, bias: bool = True, weight: str = "weight", **rows: Any) -> ModuleSpec:
    """Return one module by its diffusers name, its original name and its shape. rows: start, stop, of, swapped."""
    return ModuleSpec(name, shape, bias, f"{original}.{weight}", f"{original}.bias" if bias else None, **rows)


def fused(parts: Mapping[str, int], original: str, columns: int | None = None, **options: Any) -> Iterator[ModuleSpec]:
    """Yield the modules whose rows lie one after another in one original Linear.

    parts: name -> its rows; or, without columns, how many of equal parts it has.
    """
    start, total = 0, sum(parts.values())
    for name, rows in parts.items():
        shape, of = ((), total) if columns is None else ((rows, columns), None)
        yield entry(name, original, *shape, start=start, stop=start + rows, of=of, **options)
        start += rows


def embedder(name: str, original: str, first: str, second: str, inputs: int, width: int) -> Iterator[ModuleSpec]:
    """Yield the two layers of a TimestepEmbedding of diffusers."""
    yield entry(f"{name}.linear_1", f"{original}.{first}", width, inputs)
    yield entry(f"{name}.linear_2", f"{original}.{second}", width, width)


def renamed(paths: Mapping[str, str], name: str = "", original: str = "", **options: Any) -> Iterator[ModuleSpec]:
    """Yield modules of any size.

    paths: diffusers path -> original path. name, original: what they begin with. options: see `entry`.
    """
    for ours, theirs in paths.items():
        yield entry(name + ours, original + theirs, **options)


def same(*paths: str, name: str = "", **options: Any) -> Iterator[ModuleSpec]:
    """Yield modules of any size whose two names agree. name: what the paths begin with."""
    yield from renamed({path: path for path in paths}, name, name, **options)
