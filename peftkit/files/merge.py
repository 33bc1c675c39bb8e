"""Merge adapters into a checkpoint, file to file: planned first, streamed tensor by tensor, all or nothing.

Tensors that no adapter touches are copied undecoded, the others are merged one at a time by the very function that
merges in memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peftkit.delta.addition import refuse_inert
from peftkit.errors import FileError, error_context
from peftkit.files.folder import copy_rest
from peftkit.files.formats import container, disk
from peftkit.files.merge_plan import Adapters, MergePlan, plan_merge, require_adapters
from peftkit.files.merge_writer import Progress, Writer
from peftkit.files.read import Reading
from peftkit.files.weight_files import written_as
from peftkit.wrapping.merge import MergeReport

if TYPE_CHECKING:
    from typing_extensions import Unpack


def merge_checkpoint(
    base: str | os.PathLike[str],
    adapters: Adapters,
    out: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    rebase: str = "reapply",
    origin: str | os.PathLike[str] | None = None,
    other_base: bool = False,
    verify: bool = False,
    overwrite: bool | None = None,
    component: str | None = None,
    variant: str | None = None,
    progress: Progress | None = None,
    **reading: Unpack[Reading],
) -> MergeReport:
    """Write base + Σ strength·ΔW to `out`, a file for a file and a folder for shards or a pipeline.

    A parameter E that trained beside the adapters makes its tensor W + strength·(E − W); at strength 1, E itself.

    All or nothing: if anything raises, `out` is what it was before. The same weights come out, bit for bit, as from
    merging in memory.

    Args:
        base: the checkpoint: a *.safetensors file, an index, or a folder of shards or of a pipeline.
        adapters: {file: strength}, or {file: {pattern: strength}} over the names of the file's modules and the base's
            tensors, of which the first pattern that matches counts.
        out: the file or the folder to write.
        dtype: of the result's floating point tensors; by default each keeps its own. Quantised weights are dequantised
            to it: the result holds plain ones.
        rebase: what adapters that read their base do on this one: "reapply" what they learnt, or "transplant" the ΔW
            they have on `origin`.
        origin: the base that the adapters were trained on.
        other_base: accept a base that a file was not trained on.
        verify: read everything back before it takes its name.
        overwrite: replace what is at `out`, as `require_output` says; by default a file that is not an input.
        component: which part of a pipeline the files are for ("unet", "transformer_2", …), where their names fit
            several, or which one the base is; what they have for other parts is left alone.
        variant: of the base's files that are read and written, such as "fp16"; by default the plain ones.
        progress: called with bytes written and bytes in all.
        **reading: as in `read`.

    Returns:
        What happened to every weight that changed, and which files were not copied because they hold the base's weights
        in another form or variant.

    Raises:
        MismatchError: a tensor of an adapter file without a place in the base, or that does not fit there.
        WrongBaseError: a base that a file was not trained on.
        AmbiguousFileError: names that fit two parts of a pipeline, without `component`.
        QuantisedMergeError: a quantised weight, without `dtype`.
        UnsupportedLayerError: a weight in a quantised format that is not read.
        MergeError: a ΔW that is not finite, or that rounding loses whole.
        FileError: a damaged file, one that is replaced or written to while it is read, or an `out` that may not be
            written over.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> from safetensors.torch import save_file
        >>> save_file(nn.Sequential(nn.Linear(8, 8)).state_dict(), "base.safetensors")
        >>> report = pk.merge_checkpoint("base.safetensors", {path: 0.5}, "merged.safetensors", other_base=True)
        >>> report.changed, report.norm
        (('0.weight',), 2.0)
    """
    require_adapters(adapters)
    target = disk.require_output(out, [base, origin, *adapters], overwrite)
    chosen = {"component": component, "variant": variant, "other_base": other_base}
    plan = plan_merge(base, adapters, dtype=dtype, rebase=rebase, origin=origin, **chosen, **reading)
    with error_context(target, base, *adapters):
        return _merge(plan, target, verify, progress or (lambda done, total: None))


# -- parts ----------------------------------------------------------------------------------------------------------


def _merge(plan: MergePlan, out: Path, verify: bool, progress: Progress) -> MergeReport:
    writer = Writer(plan, verify, progress)
    if not plan.base.folder:
        container.require_name(out, "a merged file")
        (shard,) = plan.base.shards
        with disk.atomic(out) as file:
            writer.shard(shard, file)
            refuse_inert(writer.weights)
            file.flush()
            if verify:
                writer.verify(shard, Path(file.name))
        return MergeReport(tuple(writer.weights))
    if out.suffix == ".safetensors":
        raise FileError(
            f"{plan.base.path} is a folder, and merging into it makes a folder; {out} is a file's name: "
            "name one without a suffix"
        )
    with disk.atomic_folder(out) as folder:
        for shard in plan.base.shards:
            target = folder / written_as(shard)
            target.parent.mkdir(exist_ok=True)
            with target.open("xb") as file:
                writer.shard(shard, file)
            if verify:
                writer.verify(shard, target)
        refuse_inert(writer.weights)
        copy_rest(plan.base, folder, writer.sizes)
    return MergeReport(tuple(writer.weights), plan.base.copies)
