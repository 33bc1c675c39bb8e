"""Adapters of experts one by one, as of transformers 4, onto the stacks of a model that keeps them in one parameter.

`experts.3.w1` and `experts.3.w3` of Mixtral, `experts.3.gate_proj` and `experts.3.up_proj` of others, are the upper and
the lower half of the rows of expert 3 of `experts.gate_up_proj`; `w2` and `down_proj` are its matrix of
`experts.down_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.delta import LowRank
from peftkit.delta.as_low_rank import as_low_rank, block_diagonal
from peftkit.delta.stack import stack_of
from peftkit.errors import MismatchError, require_file
from peftkit.files.bind import bind, described, fits, misfit, placeholder_weight
from peftkit.files.fingerprint import samples
from peftkit.files.formats import native
from peftkit.files.formats.patch import AdapterFile, OnDemand, Patch
from peftkit.geometry import Shape
from peftkit.wrapping.sites import Site

#: what a matrix of one expert is called -> the stack that it is in, its place among the rows there, of how many
_PLACES = {
    "gate_proj": ("gate_up_proj", 0, 2),
    "w1": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
    "w3": ("gate_up_proj", 1, 2),
    "down_proj": ("down_proj", 0, 1),
    "w2": ("down_proj", 0, 1),
}
_NAME = re.compile(rf"(?P<block>.+)\.experts\.(?P<expert>\d{{1,6}})\.(?P<matrix>{'|'.join(_PLACES)})")
#: the blocks of Mixtral, in transformers 4 and in transformers 5
_BLOCKS = (".block_sparse_moe", ".mlp")


class _Member(NamedTuple):
    """One adapter of a file: of which expert it is, and of which part of the rows of its matrix."""

    name: str
    expert: int
    place: int
    places: int


class Fused(NamedTuple):
    """A file whose adapters of experts are put together, and how far their bases are from those of the file."""

    file: AdapterFile
    distances: Mapping[str, float]


def fused(path: object, file: AdapterFile, ours: Mapping[str, Site]) -> Fused:
    """Put a file's adapters of experts one by one together, as adapters of the stacks that a model has of them.

    Args:
        path: of the file, for errors.
        file: what it holds.
        ours: the weights of the model.

    Returns:
        The file with one LoRA for each stack, of the same ΔW, under the name of the stack; as it is where the model has
        a weight for each expert, or no such stack.

    Raises:
        MismatchError: an adapter does not fit its expert.
        FileError: an adapter depends on its base, or a stack has its halves in turns.
    """
    members: dict[str, list[_Member]] = {}
    for name in file.patches:
        found = None if name in ours else _placed(name, ours)
        if found is not None:
            members.setdefault(found[0], []).append(found[1])
    if not members:
        return Fused(file, {})
    taken = {member.name for own in members.values() for member in own}
    names = [*(name for name in file.patches if name not in taken), *members]

    def patch(name: str) -> Patch:
        if name not in members:
            return file.patches[name]
        return _fuse(f"{path}: {name}", file, members[name], ours[name])

    distances = {name: d for name, own in members.items() if (d := _distance(file, own, ours[name])) is not None}
    return Fused(replace(file, patches=OnDemand(Path(str(path)), names, patch)), distances)


def _placed(name: str, ours: Mapping[str, Site]) -> tuple[str, _Member] | None:
    """The stack of a model that an adapter is of; None where the model has none, or not so many experts."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    stack, place, places = _PLACES[found["matrix"]]
    expert = int(found["expert"])
    for block in (found["block"], found["block"].replace(*_BLOCKS)):
        site = ours.get(f"{block}.experts.{stack}")
        if site is not None and expert < site.slot.geometry.shape.experts:
            return site.name, _Member(name, expert, place, places)
    return None


def _fuse(where: str, file: AdapterFile, members: list[_Member], site: Site) -> Patch:
    """One LoRA of a stack, whose experts without an adapter have zeros."""
    shape = site.slot.geometry.shape
    in_turns = vars(site.module).get("is_concatenated") is False and members[0].places > 1
    require_file(not in_turns, where, "the model has the rows of its two matrices in turns, and the file one by one")
    factors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for member in members:
        require_file((member.expert, member.place) not in factors, where, f"{member.name} is there under two names")
        factors[member.expert, member.place] = _factors(where, file, member, shape.one)
    places, rows = members[0].places, shape.one.rows // members[0].places
    none = torch.zeros(rows, 0), torch.zeros(0, shape.columns)
    experts = [block_diagonal([factors.get((e, place), none) for place in range(places)]) for e in range(shape.experts)]
    options, tensors = stack_of([LowRank(*factors) for factors in experts]).as_parameters()
    options["alpha"] = float(options["rank"])
    transposed = site.slot.geometry.transposed
    return Patch("lora", options, shape, tensors, scale="of the adapters of its experts", transposed=transposed)


def _factors(where: str, file: AdapterFile, member: _Member, one: Shape) -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, n) of one adapter, in fp32."""
    patch, shape = file.patches[member.name], Shape(one.rows // member.places, one.channels)
    needs = registry.get(patch.kind).reads_base
    require_file(not needs, where, f"{patch.kind} of {member.name} depends on its base, and one LoRA was to hold all")
    if not fits(patch, shape):
        raise MismatchError(f"{where}: {member.name} adapts a {described(patch)} weight, the model's expert is {shape}")
    found = misfit(patch, shape, torch.float32, portable=file.portable, where=where)
    if found:
        raise MismatchError(f"{where}: {member.name}: {found.first}")
    weight = placeholder_weight(shape)
    adapter = bind(patch, shape, weight, where)
    require_file(not adapter.derived() or file.portable, where, f"{patch.kind} of {member.name} is made of its base")
    with torch.no_grad():
        low = as_low_rank(adapter(weight, 1.0))
    return low.B.float(), low.A.float()


def _distance(file: AdapterFile, members: list[_Member], site: Site) -> float | None:
    """How far the matrices of the experts are from those that the file was trained on; None where it does not say."""
    known = [member for member in members if member.name in file.base]
    if not known or site.parameter.is_meta:
        return None
    experts = site.slot.geometry.bands(site.parameter.detach())
    rows = experts.shape[1] // known[0].places
    own = {m.name: experts[m.expert, m.place * rows : (m.place + 1) * rows] for m in known}
    return max(native.distance(samples(W.contiguous()), file.base[name]) for name, W in own.items())
