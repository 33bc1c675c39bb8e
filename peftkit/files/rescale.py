"""ΔW times a factor, in its own file: one tensor of each module changes, and all else stays."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from peftkit.adapters import registry
from peftkit.errors import ExportError, OptionError, error_context, require_file
from peftkit.files.convert import Converted, ConvertReport, Source
from peftkit.files.export.write import HASHES, require_safetensors
from peftkit.files.formats import container, disk, kohya, native, peft, peft_projections
from peftkit.files.formats.container import Container
from peftkit.files.formats.disk import Stamp
from peftkit.files.patterns import Strength, Strengths


def rescale(
    source: Source, factor: Strength, out: str | os.PathLike[str], *, overwrite: bool | None = None
) -> ConvertReport:
    """Write an adapter file again with ΔW times a factor; every other tensor and entry stays as it is.

    Parameters that trained beside the adapters are other tensors: they stay whole.

    Args:
        source: the adapter file, or a folder of PEFT.
        factor: one number, or numbers by patterns over modules, of which the first that matches counts; a module that
            no pattern matches stays as it is.
        out: the file or the folder to write.
        overwrite: replace what is at `out`, as `require_output` says; by default a file that is not `source`.

    Returns:
        A report of every module. Its errors are those of the tensors that were scaled, in their dtype.

    Raises:
        ExportError: a module whose ΔW is not proportional to a tensor of the file (DoRA, OFT): give its strength where
            the file is merged.
        FileError: a scaled tensor that its dtype cannot hold, or a source that is no adapter file.
        OptionError: a pattern that matches no module, or a factor that is no finite number.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> pk.rescale(path, 0.5, "weaker.safetensors").error
        0.0
        >>> pk.inspect(path).modules[0].norm, pk.inspect("weaker.safetensors").modules[0].norm
        (4.0, 2.0)
    """
    path = disk.require_output(out, [source], overwrite)
    with error_context(source, out):
        return _rescale(source, Strengths(factor), path)


def _rescale(source: Source, factor: Strengths, target: Path) -> ConvertReport:
    folder = Path(source) if os.path.isdir(source) else None
    path = Path(source) if folder is None else folder / peft.WEIGHTS
    config = None if folder is None else _configuration(folder / peft.CONFIG)
    file = container.read(path)
    keys = _native_keys(path, file) if native.KEY in file.metadata else _foreign_keys(path, file)
    factors = {module: factor.of(module, default=1.0) for module in keys}
    if factor.unmatched:
        raise OptionError(f"the pattern {factor.unmatched[0]!r} matches no module of {path}")
    tensors, report = file.tensors(), []
    for module, by in factors.items():
        errors = [_scale(tensors, key, by, path) for key in keys[module]]
        report.append(Converted(module, "", f"× {by:g}", max(errors)))
    entries = {name: value for name, value in file.metadata.items() if not name.startswith(HASHES)}
    if config is None:
        require_safetensors(target)
        container.write(target, tensors, entries)
    else:
        text, stamp = config
        disk.require_stamp(path.with_name(peft.CONFIG), stamp)  # both are of one moment
        _write_folder(target, text, tensors, entries)
    size = sum(info.size for info in file.infos.values())
    return ConvertReport(target, tuple(report), size, size)


def _configuration(path: Path) -> tuple[bytes, Stamp]:
    with disk.opened(path) as file:
        return file.read(), Stamp.of(file.fileno())


def _native_keys(path: Path, file: Container) -> dict[str, list[str]]:
    """Weight -> the tensors of a file of this library that its whole ΔW is proportional to."""
    header = native.decode(file.metadata, path)
    owned = native.sorted_by_weight([key for key in file.infos if key not in header.extras], header.records)
    found: dict[str, list[str]] = {}
    for weight, record in header.records.items():
        factors = registry.get(record.kind).scaling_parameters
        found[weight] = [key for key in owned.get(weight, ()) if key[len(weight) :].removeprefix(".") in factors]
        _require_keys(found[weight], path, weight, record.kind)
    return found


def _foreign_keys(path: Path, file: Container) -> dict[str, list[str]]:
    """Module -> the tensors of a foreign file that its whole ΔW is proportional to."""
    modules, others = peft.modules(list(file.infos)) if path.name == peft.WEIGHTS else kohya.split(file.infos)
    modules, _ = peft_projections.tables(modules)
    for key in (key for key in others if ".lora_B." in key):
        raise ExportError(f"{path}: {key} goes with ΔW and not with its tensors; give its strength where it is merged")
    found: dict[str, list[str]] = {}
    for module, roles in modules.items():
        bound = kohya.DISPROPORTIONATE & set(roles)
        found[module] = (
            []
            if bound
            else [key for role, key in roles.items() if role in kohya.PROPORTIONAL | peft_projections.PROPORTIONAL]
        )
        _require_keys(found[module], path, module, ", ".join(sorted(bound or roles)))
    return found


def _require_keys(keys: list[str], path: Path, module: str, what: str) -> None:
    if not keys:
        raise ExportError(
            f"{path}: {module} ({what}) has no tensor that scales its ΔW alone; give its strength where it is merged, "
            "or convert it to lora first"
        )


def _scale(tensors: dict[str, Tensor], key: str, by: float, path: Path) -> float:
    """Multiply a tensor in its dtype; ‖error‖/‖exact‖."""
    exact = tensors[key].double() * by
    tensors[key] = exact.to(tensors[key].dtype)
    require_file(
        bool(torch.isfinite(tensors[key].float()).all()),
        path,
        f"{key} times {by:g} is not finite as {tensors[key].dtype}",
    )
    norm, gap = exact.norm().item(), (tensors[key].double() - exact).norm().item()
    return gap / norm if norm else 0.0


def _write_folder(out: Path, config: bytes, tensors: Mapping[str, Tensor], entries: Mapping[str, str]) -> None:
    with disk.atomic_folder(out) as folder:
        (folder / peft.CONFIG).write_bytes(config)
        with (folder / peft.WEIGHTS).open("xb") as file:
            container.emit(file, tensors, entries)
