"""Which programs read an adapter file as it is, and why the others do not."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from peftkit.errors import ExportError
from peftkit.files.export import programs
from peftkit.files.export.names import require_readable
from peftkit.files.export.networks import network_of, styles_read
from peftkit.files.export.programs import Target
from peftkit.files.families.names import Family
from peftkit.files.formats.patch import AdapterFile


def loads(bundle: AdapterFile, structures: Collection[str], family: Family | None) -> dict[str, str]:
    """Say of every program whether it reads a file as it is.

    Args:
        bundle: the file.
        structures: what `Target.reads` calls its adapters.
        family: the model's, None where it is not known.

    Returns:
        Program -> "", or the reason it does not read the file.
    """
    return {target.name: next(_reasons(target, bundle, structures, family), "") for target in programs.TARGETS.values()}


def _reasons(target: Target, bundle: AdapterFile, structures: Collection[str], family: Family | None) -> Iterator[str]:
    """All that keeps a program from reading the file, the plainest first."""
    if bundle.format == "native":
        yield "it is this library's own format: export it"
    if target.configured:
        yield f"{target.title} reads *{target.suffix}: export it"
        return
    if target.folder != (bundle.format == "peft"):
        yield "PEFT reads a folder with its configuration, and nobody else does"
    yield from (
        f"{target.title} has no {structure}" for structure in sorted(structures) if not _reads(target, structure)
    )
    if target.served:
        yield from _unserved(target, bundle)
    if target.folder:
        return
    if family is None and target.generic is None:
        yield f"{target.title} loads adapters of the models it knows"
    denoiser = "" if family is None else family.components[0]
    if family is not None:
        target = target.of(network_of(family.name, denoiser))
    if family is not None and not styles_read(target, family.name, denoiser, denoiser):
        yield f"{target.title} does not load adapters of {family.title}"
    yield from (
        f"{target.title} does not look for {name!r}" for name in bundle.patches if not _named_for(target, name, family)
    )
    if bundle.vectors and not target.vectors:
        yield f"{target.title} leaves out changes of biases and norms, or fails on them"
    if family is not None:
        modules = [module for name in bundle.patches for module in family.find(name)]
        yield from (f"{target.title} makes no adapter of {m.name}" for m in modules if not target.looks_for(m.name))
        try:
            require_readable(modules, target, named=bundle.format)
        except ExportError as error:
            yield str(error)


def _unserved(target: Target, bundle: AdapterFile) -> Iterator[str]:
    """What keeps a server from a folder of PEFT that PEFT itself reads, by the folder's configuration."""
    config = bundle.config
    if config.get("modules_to_save") or bundle.extras or bundle.vectors:
        yield f"{target.title} takes no parameters that trained beside the adapters"
    if config.get("target_parameters"):
        yield f"{target.title} adapts no stacks of experts"
    if any(config.get(name) for name in ("rank_pattern", "alpha_pattern")):
        yield f"{target.title} has one rank and one alpha for all modules: export it"
    if isinstance(config.get("target_modules"), str):
        yield f"{target.title} takes target_modules as a list: export it"
    names = {name.rpartition(".")[2] for name in bundle.patches}
    if target.modules is not None and not names <= target.modules:
        yield f"{target.title} has no adapters of {', '.join(sorted(names - target.modules))}"


def _reads(target: Target, structure: str) -> bool:
    """Whether a program reads a structure; its first word is the kind, the others say how: "dora lora out"."""
    kind, *how = structure.split(" ")
    if how == ["tucker"]:
        return kind in target.tucker
    return tuple(how) in target.decomposes or not target.reads.isdisjoint({structure, f"{structure} old"})


def _named_for(target: Target, name: str, family: Family | None) -> bool:
    if family is None:
        return target.generic is not None and name.startswith(target.generic)
    denoiser = family.components[0]
    return any(
        family.spelled(module.name, style) == name
        for module in family.find(name)
        for style in styles_read(target, family.name, denoiser, module.name.partition(".")[0])
    )
