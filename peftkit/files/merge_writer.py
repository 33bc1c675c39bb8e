"""The shards of a merged checkpoint, streamed tensor by tensor."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from peftkit._version import __version__
from peftkit.delta import Delta, Dense
from peftkit.delta.addition import MergedWeight, add_, overflows, rounded_to
from peftkit.delta.window import window
from peftkit.errors import MergeError, require_file
from peftkit.files.bind import bind
from peftkit.files.extras import blend_
from peftkit.files.formats import container
from peftkit.files.formats.container import Info
from peftkit.files.formats.patch import Patch
from peftkit.files.merge_plan import MergePlan
from peftkit.files.merge_steps import Planned, PlannedExtra, PlannedVector
from peftkit.files.place import FLOATS, Span, as_matrix, spans, stack_of, whole
from peftkit.geometry import Geometry
from peftkit.kernels.blocks import accumulation_dtype

#: called with bytes written and bytes in all
Progress = Callable[[int, int], None]

#: header entries that a change of the tensors makes untrue
_STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")


class Writer:
    """Streams the shards of a plan. weights: what happened to each, as it goes."""

    def __init__(self, plan: MergePlan, verifies: bool, progress: Progress) -> None:
        self.plan, self.verifies, self.progress, self.done = plan, verifies, progress, 0
        self.weights: list[MergedWeight] = []
        # One buffer for every tensor that changes: fresh memory costs more than what is done with it
        largest = max((plan.base.info(key).size for key in plan.touched), default=0)
        self.buffer = torch.empty(largest, dtype=torch.uint8) if plan.dtype is None else None
        self.checksums: dict[str, str] = {}
        self.sizes: dict[str, int] = {}
        self.claims: defaultdict[str, list[tuple[Planned, Span]]] = defaultdict(list)
        for planned in plan.patches:
            for span in spans(plan.base, planned.parts):
                self.claims[span.key].append((planned, span))
        self.vectors: defaultdict[str, list[tuple[PlannedVector, Span]]] = defaultdict(list)
        for vector in plan.vectors:
            for span in vector.spans:
                self.vectors[span.key].append((vector, span))
        self.extras: defaultdict[str, list[PlannedExtra]] = defaultdict(list)
        for extra in plan.extras:
            self.extras[extra.key].append(extra)
        self.changed = self.claims.keys() | self.vectors.keys() | self.extras.keys()

    def shard(self, name: str, file: BinaryIO) -> None:
        """Write one shard: its header, then its tensors in the order they had."""
        shard, prefix = self.plan.base.shards[name]
        order = sorted(shard.infos, key=lambda key: (shard.infos[key].start, shard.infos[key].stop, key))
        head = {key: self._entry(shard.infos[key]) for key in order}
        file.write(container.header(head, self._metadata(shard.metadata, [prefix + key for key in order])))
        self.sizes[name] = sum(size for _, _, size in head.values())
        total = self.plan.base.size
        for key in order:
            info = shard.infos[key]
            if prefix + key in self.changed or self._entry(info)[0] != info.dtype:
                data = container.raw(self._merged(prefix + key))
                if self.verifies:
                    self.checksums[prefix + key] = hashlib.sha256(data).hexdigest()
                container.put(file, data)
            else:
                shard.copy(key, file)
            self.done += info.size
            self.progress(self.done, total)

    def verify(self, name: str, path: Path) -> None:
        """Read a shard back: every tensor as it was meant, or as it was."""
        shard, prefix = self.plan.base.shards[name]
        back = container.read(path)
        for key in back.infos:
            require_file(
                back.digest(key) == self.checksums.get(prefix + key, shard.digest(key)),
                path.name,
                f"{key} was read back other than it was written: the disk is at fault",
            )

    def _entry(self, info: Info) -> tuple[str, tuple[int, ...], int]:
        dtype = self.plan.dtype
        if dtype is None or info.dtype not in FLOATS:
            return info.dtype, info.shape, info.size
        return container.NAMES[dtype], info.shape, info.numel * dtype.itemsize

    def _metadata(self, own: Mapping[str, str], keys: Sequence[str]) -> dict[str, str]:
        kept = {key: value for key, value in own.items() if key not in _STALE}
        if not self.changed & set(keys):
            return dict(own) if self.plan.dtype is None else kept
        steps = (*self.plan.patches, *self.plan.vectors, *self.plan.extras)
        strengths = [(each.file, each.strength) for each in steps]
        files = [[Path(f).name, sorted({s for file, s in strengths if file == f})] for f in self.plan.bundles]
        recipe = json.dumps({"version": __version__, "adapters": files}, ensure_ascii=False)
        return kept | {"peftkit_merge": recipe}

    @torch.no_grad()
    def _merged(self, key: str) -> Tensor:
        """One tensor of the base with all that is added to it, in its new dtype."""
        weight = self.plan.base.tensor(key, self.buffer)
        own = weight.dtype
        target = self.plan.dtype if self.plan.dtype is not None and weight.is_floating_point() else own
        layouts = {self._patch(planned).transposed for planned, _ in self.claims[key]}
        before, changes = weight, key in self.changed
        if target != own or len(layouts) > 1:  # sums are formed in a dtype that holds both, and rounded once
            wide = torch.promote_types(accumulation_dtype(own), accumulation_dtype(target))
            weight = weight.clone() if wide == own and changes else weight.to(wide)
        if self.claims[key]:
            self._add_claims(key, as_matrix(weight))
        elif self.vectors[key]:
            self._add_vectors(key, weight)
        elif self.extras[key]:
            values = [(e.file, e.strength, self.plan.bundles[e.file].extras[e.name]) for e in self.extras[key]]
            self.weights.append(blend_(weight, key, values))
        if target == weight.dtype:
            return weight
        if overflows(weight, target):
            raise MergeError(f"{key}: {weight.dtype} to {target} overflows; nothing was merged. Choose a wider dtype")
        if not changes:
            return weight.to(target)
        rounded, change, missed = rounded_to(target, before, weight)
        told = self.weights[-1]
        self.weights[-1] = replace(told, change=change, lost=missed / told.norm if told.norm else 0.0)
        return rounded

    def _add_claims(self, key: str, weight: Tensor) -> None:
        """All patches of one tensor."""
        claims = self.claims[key]
        transposed = any(part.transposed for planned, _ in claims for part in planned.parts if part.weight == key)
        matrix = weight.mT.contiguous() if transposed else weight
        stacks = [c for c in claims if self._patch(c[0]).shape.experts > 1]
        convolutions = [c for c in claims if c not in stacks and self._patch(c[0]).transposed and matrix.dim() > 2]
        others = [c for c in claims if c not in convolutions and c not in stacks]
        before = matrix.clone() if convolutions and others else matrix
        sums = self._add_convolutions(matrix, convolutions) + self._add_stacks(matrix, stacks)
        sums += self._add_regions(matrix, before, others)
        if transposed:
            weight.copy_(matrix.mT)
        norm, change, missed = np.sqrt(sums)
        if before is not matrix:  # two ways to read one weight: what both did together
            norm = change = float(torch.linalg.vector_norm(matrix - before, dtype=torch.float64))
        files = tuple(dict.fromkeys(Path(planned.file).name for planned, _ in claims))
        if not math.isfinite(norm):
            raise MergeError(f"{key}: the ΔW of {', '.join(files)} is not finite; nothing was merged")
        if not math.isfinite(change):
            raise MergeError(f"{key}: W + ΔW overflows {weight.dtype}, or was not finite before; nothing was merged")
        self.weights.append(MergedWeight(key, files, norm, change, missed / norm if norm else 0.0))

    def _add_convolutions(self, weight: Tensor, claims: Sequence[tuple[Planned, Span]]) -> np.ndarray:
        """Patches of a transposed convolution, whose weight is kept as (in, out, *kernel)."""
        if not claims:
            return np.zeros(3)
        geometry = Geometry.of_weight(tuple(weight.shape), claims[0][0].shape.groups, transposed=True)
        return _squares(
            add_([self._delta(planned, geometry.matrix(weight)) for planned, _ in claims], weight, geometry)
        )

    def _add_stacks(self, weight: Tensor, claims: Sequence[tuple[Planned, Span]]) -> np.ndarray:
        """Patches of a stack of experts, all of which read the base as it was."""
        if not claims:
            return np.zeros(3)
        ways = [stack_of(self.plan.base, planned.parts[0], self._patch(planned)) for planned, _ in claims]
        if len({way.transposed for way in ways}) > 1:
            where = claims[0][0].parts[0].weight
            raise MergeError(f"{where}: one file reads its matrices as (in, out), and another as (out, in)")
        matrix = ways[0].matrix(weight)
        return _squares(add_([self._delta(planned, matrix) for planned, _ in claims], weight, ways[0]))

    def _add_regions(self, weight: Tensor, before: Tensor, claims: Sequence[tuple[Planned, Span]]) -> np.ndarray:
        """Patches of a weight (rows, …), region by region where they cover different rows. before: as it was."""
        edges = sorted({edge for _, span in claims for edge in (span.start, span.start + span.size)})
        regions = list(itertools.pairwise(edges))
        # Rows that are written may be read for the rows of another region: those patches get a base of their own
        deltas = [self._delta(planned, before.flatten(1), len(regions) > 1) for planned, _ in claims]
        sums = np.zeros(3)
        for start, stop in regions:
            here = [
                window(delta, span.first + start - span.start, stop - start)
                for delta, (_, span) in zip(deltas, claims, strict=True)
                if span.start <= start and stop <= span.start + span.size
            ]
            if here:
                region = weight[start:stop]
                sums += _squares(add_(here, region, Geometry.of_weight(tuple(region.shape))))
        return sums

    def _add_vectors(self, key: str, weight: Tensor) -> None:
        total = torch.zeros(len(weight), dtype=accumulation_dtype(weight.dtype))
        for vector, span in self.vectors[key]:
            entries = self.plan.bundles[vector.file].vectors[vector.name][span.first : span.first + span.size]
            total[span.start : span.start + span.size] += vector.strength * entries.to(total.dtype)
        sums = add_([Dense(total[:, None])], weight[:, None], Geometry.of_weight((len(total), 1)))
        files = tuple(dict.fromkeys(Path(vector.file).name for vector, _ in self.vectors[key]))
        if not all(map(math.isfinite, sums)):
            raise MergeError(f"{key}: its sum with {', '.join(files)} is not finite; nothing was merged")
        self.weights.append(MergedWeight(key, files, *sums))

    def _patch(self, planned: Planned) -> Patch:
        return self.plan.bundles[planned.file].patches[planned.name]

    def _delta(self, planned: Planned, matrix: Tensor, apart: bool = False) -> Delta:
        """λ·ΔW of a patch; where it reads the base, of the weight it is on, or of the one it was on.

        matrix: the weight (m, n), for a patch that is of all of it. apart: rows may be written before they are read.
        """
        plan, patch, where = self.plan, self._patch(planned), f"{planned.file}: {planned.name}"
        first, *others = planned.parts
        if planned.law == "transplant" and plan.origin is not None:
            W = whole(plan.origin, planned.parts, patch)
        elif others or first.start is not None or first.swapped:
            W = whole(plan.base, planned.parts, patch)
        else:
            W = matrix.clone() if apart and planned.law != "additive" else matrix
        if W.itemsize < 2:
            W = W.float()
        return bind(patch, planned.shape, W, where)(W, torch.tensor(planned.strength, dtype=torch.float64))


def _squares(result: tuple[float, float, float]) -> np.ndarray:
    """‖ΔW‖², ‖moved‖² and ‖lost‖², which add up over regions."""
    norm, change, lost = result
    return np.array([norm, change, lost * norm]) ** 2
