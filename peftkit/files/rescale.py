"""ΔW times a factor, in its own file: one tensor of each module changes, and all else stays."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peftkit.errors import ExportError, FileError, OptionError, error_context
from peftkit.files.convert import Converted, ConvertReport, Source
from peftkit.files.export.write import HASHES, require_safetensors
from peftkit.files.formats import container, kohya, native, peft
from peftkit.wrapping.strength import require_strength


def rescale(source: Source, factor: float | Mapping[str, float], out: str | os.PathLike[str]) -> ConvertReport:
    """Write the file with ΔW times a factor, or factors by patterns over modules; the first that matches counts.

    Every other tensor and entry stays as it is. The error is of the tensors that were scaled, in their dtype. Adapters
    whose ΔW does not scale by a tensor of theirs (DoRA, OFT) raise ExportError: their strength is given where they are
    merged.
    """
    with error_context(source, out):
        return _rescale(source, factor, Path(out))


def _rescale(source: Source, factor: float | Mapping[str, float], target: Path) -> ConvertReport:
    path = _one_file(source)
    file = container.read(path)
    modules = _scaling_keys(path, file)
    used: set[str] = set()
    factors = {module: _factor(factor, module, used) for module in modules}
    if isinstance(factor, Mapping) and set(factor) - used:
        raise OptionError(f"the pattern {sorted(set(factor) - used)[0]!r} matches no module of {path}.")
    tensors = file.tensors()
    errors = dict.fromkeys(modules, 0.0)
    for module, keys in modules.items():
        for key in keys:
            exact = tensors[key].double() * factors[module]
            tensors[key] = exact.to(tensors[key].dtype)
            if not torch.isfinite(tensors[key].float()).all():
                raise FileError(f"{path}: {key} times {factors[module]:g} is not finite as {tensors[key].dtype}")
            norm, gap = exact.norm().item(), (tensors[key].double() - exact).norm().item()
            errors[module] = max(errors[module], gap / norm if norm else 0.0)
    if not os.path.isdir(source):
        require_safetensors(target)
    _write_like(source, target, tensors, {k: v for k, v in file.metadata.items() if not k.startswith(HASHES)})
    entries = tuple(Converted(m, "", f"× {f:g}", errors[m]) for m, f in factors.items())
    size = sum(info.size for info in file.infos.values())
    return ConvertReport(target, entries, size, size)


def _scaling_keys(path: Path, file: container.Container) -> dict[str, list[str]]:
    """Module -> the tensors that multiply its whole ΔW."""
    if native.KEY in file.metadata:
        header = native.decode(file.metadata, path)
        owned = native.sorted_by_weight(file.infos, header.records)
        found = {w: [k for k in owned.get(w, ()) if k.rpartition(".")[2] in _NATIVE] for w in header.records}
        kinds = {w: record.kind for w, record in header.records.items()}
    else:
        modules, _ = peft.modules(list(file.infos)) if path.name == peft.WEIGHTS else kohya.split(file.infos)
        found = {m: [key for role, key in roles.items() if role in _ROLES] for m, roles in modules.items()}
        bound = ("dora_scale", "magnitude", "oft_blocks", "oft_R", "ia3_l")
        kinds = {m: next((role for role in roles if role in bound), "lora") for m, roles in modules.items()}
    for module, kind in kinds.items():
        if (
            kind in ("dora", "oft", "boft", "loldu", "dora_scale", "magnitude", "oft_blocks", "oft_R", "ia3_l")
            or not found[module]
        ):
            raise ExportError(
                f"{path}: {module} ({kind}) has no tensor that scales its ΔW alone; give its strength where it is "
                "merged, or convert it to lora first"
            )
    return found


#: tensors that are a factor of the whole ΔW, by role in other formats and by name in this library's
_ROLES = frozenset(
    {"up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "diff_b", "w_norm", "b_norm", "a1", "b1", "ia3_weight"}
)


_NATIVE = frozenset({"up", "up1", "outer", "outer_left", "change", "gate", "base_up"})


def _factor(factor: float | Mapping[str, float], module: str, used: set[str]) -> float:
    if not isinstance(factor, Mapping):
        require_strength(factor)
        return float(factor)
    for pattern, value in factor.items():
        if fnmatch.fnmatchcase(module, pattern):
            require_strength(value)
            used.add(pattern)
            return float(value)
    return 1.0


def _one_file(source: Source) -> Path:
    path = Path(source)
    return path / peft.WEIGHTS if os.path.isdir(path) else path


def _write_like(source: Source, out: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> None:
    if not os.path.isdir(source):
        container.write(out, tensors, entries)
        return
    with container.atomic_folder(out) as folder:
        (folder / peft.CONFIG).write_bytes((Path(source) / peft.CONFIG).read_bytes())
        with (folder / peft.WEIGHTS).open("xb") as file:
            container.emit(file, tensors, entries)
