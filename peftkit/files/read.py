"""Read an adapter file, whoever wrote it, into patches. No model and no base is needed, and nothing is guessed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from peftkit.adapters.options import rank_scale
from peftkit.errors import (
    AmbiguousFileError,
    FileError,
    FullCheckpointError,
    MismatchError,
    OptionError,
    error_context,
    require_choice,
    require_file,
)
from peftkit.files.formats import disk, embeddings, kohya, native, peft, peft_experts
from peftkit.files.formats.disk import Stamp
from peftkit.files.formats.kohya import Modules
from peftkit.files.formats.patch import AdapterFile, OnDemand, Patch
from peftkit.files.formats.state_dict import adapters_in
from peftkit.files.formats.structures import Scale
from peftkit.files.patterns import Selection
from peftkit.files.source import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack

#: the entry in which diffusers keeps PEFT's configurations, by component
_DIFFUSERS = "lora_adapter_metadata"


class Reading(TypedDict, total=False):
    """The options of `read`, which every function that reads adapter files takes."""

    dora_axis: str | None
    alpha_zero: str | None
    ignore: str | Sequence[str]
    allow_pickle: bool


def read(
    path: str | os.PathLike[str],
    *,
    dora_axis: str | None = None,
    alpha_zero: str | None = None,
    ignore: str | Sequence[str] = (),
    allow_pickle: bool = False,
) -> AdapterFile:
    """Read an adapter file of this library, kohya, LyCORIS, diffusers or a WebUI, or a folder of PEFT.

    Every tensor is accounted for, and what a file does not say is not guessed. Tensors are read when asked for.

    Args:
        path: the file or the folder.
        dora_axis: "out" or "in", where magnitudes do not say which axis they are of.
        alpha_zero: "off" or "rank", what α = 0 means.
        ignore: patterns of keys to leave out.
        allow_pickle: read .pt, .ckpt and .bin files too, as data that runs nothing.

    Returns:
        The adapters by the names that the file has for their weights.

    Raises:
        MismatchError: tensors that are no adapter's.
        AmbiguousFileError: a file that can mean two things; the message names the option that decides.
        FileError: a file that is none, is damaged, or is replaced or written to while it is read.
        OptionError: a value that an option does not have, or a pattern that matches nothing.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "full")
        >>> with torch.no_grad():
        ...     _ = pk.adapter_parameters(model)[0].fill_(0.5)
        >>> path = pk.save(model, "style.safetensors")
        >>> found = pk.read(path)
        >>> found.format, found.patches["0"].kind
        ('native', 'full')
    """
    (bundle,) = read_all([path], dora_axis=dora_axis, alpha_zero=alpha_zero, ignore=ignore, allow_pickle=allow_pickle)
    return bundle


def read_all(paths: Sequence[str | os.PathLike[str]], **reading: Unpack[Reading]) -> list[AdapterFile]:
    """Several files in one way. A pattern of `ignore` has to match in one of them."""
    for option, known in (("dora_axis", ("out", "in")), ("alpha_zero", ("off", "rank"))):
        require_choice(option, reading.get(option), (None, *known))
    ignored = Selection(reading.get("ignore", ()))
    bundles = [_read(Path(path), reading, ignored) for path in paths]
    if ignored.unmatched:
        raise OptionError(f"ignore={ignored.unmatched[0]!r} matches no tensor of {', '.join(map(str, paths))}")
    return bundles


def distinct(paths: Iterable[str | os.PathLike[str]]) -> list[str]:
    """Return the paths of adapters, OptionError if two of them lead to the same file."""
    found: dict[object, str] = {}
    for path in map(str, paths):
        weights = os.path.join(path, peft.WEIGHTS) if os.path.isdir(path) else path
        # what is not there is refused by name when it is read
        file = Stamp.of(Path(weights)) if os.path.exists(weights) else os.path.abspath(weights)
        if file in found:
            also = "" if found[file] == path else f", as {found[file]} too"
            raise OptionError(f"{path} is among the adapters twice{also}: give it once, with the sum of its strengths")
        found[file] = path
    return list(found.values())


def _read(path: Path, reading: Reading, ignored: Selection) -> AdapterFile:
    pickles = reading.get("allow_pickle", False)
    beside = _peft_config(path)
    stamp = None if beside is None else Stamp.of(beside)
    config = None if beside is None else peft.read_config(beside)
    if os.path.isdir(path):
        path = _weights_in(path, pickles)
    with error_context(path):
        source = Source(path, pickles, ignored)
        if beside is not None and stamp is not None:  # both are of one moment
            disk.require_stamp(beside, stamp)
        if native.KEY in source.metadata:
            return _native(source)
        if config is not None:
            return _peft(source, config)
        return _foreign(source, reading.get("dora_axis"), reading.get("alpha_zero"))


def _native(source: Source) -> AdapterFile:
    header = native.decode(source.metadata, source.path)
    for name in header.extras:
        require_file(name in source.names, source.path, f"it is damaged: there is no tensor of the extra {name!r}")
    present = set(source.keys)
    extras = dict.fromkeys(name for name in header.extras if name in present)
    owned = native.sorted_by_weight([key for key in source.keys if key not in extras], header.records)

    def patch(name: str) -> Patch:
        own, embedding = header.shared.get(name, (name, None))
        record = header.records[own]
        tensors = source.named({key[len(own) :].removeprefix("."): key for key in owned.get(own, ())})
        return Patch(
            record.kind,
            record.options,
            record.shape,
            tensors,
            True,
            record.convention,
            "its header",
            transposed=record.transposed,
            read=record.read,
            quantised=record.quantised,
            embedding=record.embedding if embedding is None else embedding,
            same_as="" if own == name else own,
        )

    return AdapterFile(
        "native",
        OnDemand(source.path, [*header.records, *header.shared], patch),
        header.name,
        base=header.base | {k: header.base[own] for k, (own, _) in header.shared.items() if own in header.base},
        portable=header.portable,
        unclaimed=tuple(owned.get(None, ())),
        training=header.training,
        metadata=source.metadata,
        size=source.size,
        extras=OnDemand(source.path, extras, source.__getitem__),
    )


def _peft(source: Source, config: Mapping[str, Any]) -> AdapterFile:
    modules, unknown = peft.modules(source.keys)
    modules, parameters = peft_experts.named(modules, config)
    tokens = {module.removeprefix(peft.PREFIX): key for module, key in embeddings.tokens(unknown).items()}
    unknown = [key for key in unknown if key not in tokens.values()]
    bases = {m.removeprefix(peft.PREFIX): key for m, key in embeddings.bases(unknown).items()}
    bases = {module: key for module, key in bases.items() if module in modules}
    unknown = [key for key in unknown if key not in bases.values()]
    extras, shifts, unknown = peft.beside(unknown, config)
    _refuse_unknown(source, unknown)
    scale = peft.scale_of(config)

    def patch(module: str) -> Patch:
        if module in tokens:
            return embeddings.tokens_patch(module, source.factor(tokens[module]), config)
        reader = peft_experts if module in parameters else peft
        return reader.patch(module, source.factors(modules[module]), config, scale)

    patches = OnDemand(source.path, [*modules, *tokens], patch)
    vectors = {f"{m}.bias": _shift(patches, m, source.factor(key)) for m, key in shifts.items()}
    values = OnDemand(source.path, extras, lambda name: source[extras[name]])
    prints = OnDemand(source.path, bases, lambda name: native.samples(source[bases[name]]))
    facts = {"metadata": source.metadata, "size": source.size, "model": peft.of_model(config)}
    return AdapterFile("peft", patches, vectors=vectors, base=prints, extras=values, **facts)


def _shift(patches: Mapping[str, Patch], module: str, bias: Tensor) -> Tensor:
    """What a bias of lora_B adds to its layer's: PEFT's scale is before it as before B·A."""
    require_file(module in patches, module, "it has a bias of lora_B, and no lora_B")
    options = patches[module].options
    return bias * rank_scale("lora", options["rank"], options.get("alpha"), bool(options.get("rslora")))


def _foreign(source: Source, dora_axis: str | None, alpha_zero: str | None) -> AdapterFile:
    modules, unknown = kohya.split(source.keys)
    _refuse_unknown(source, unknown)
    alphas = {module: source.number(roles["alpha"]) for module, roles in modules.items() if "alpha" in roles}
    configs = _diffusers_configs(source, modules)
    if configs and alphas:
        raise AmbiguousFileError(f"{source.path} says its scales twice: in alpha tensors and in {_DIFFUSERS!r}")
    if not alphas and not configs and any(module.startswith(peft.PREFIX) for module in modules):
        raise AmbiguousFileError(
            f"{source.path} is PEFT's, whose scale is in {peft.CONFIG}: put that file beside it and name the folder"
        )
    by_alpha = kohya.alpha_scale(alphas, alpha_zero)
    scales = {component: peft.scale_of(config) for component, config in configs.items()}

    def scale(module: str, rank: int | None) -> tuple[dict[str, Any], str]:
        component, _, rest = module.partition(".")
        return scales[component](rest, rank) if component in scales else by_alpha(module, rank)

    def tensors(module: str) -> dict[str, Tensor]:
        return source.factors(modules[module], beside=("alpha", "on_input"))

    def patch(module: str) -> Patch:
        if "oft_blocks" in modules[module]:
            bound = _constraint(source.path, module, alphas.get(module))
            return _require_patch(module, kohya.patch(module, tensors(module), bound, dora_axis))
        return _require_patch(module, kohya.patch(module, tensors(module), scale, dora_axis))

    vector_roles = {"diff_b", "w_norm", "b_norm"}
    with_vectors = [m for m, roles in modules.items() if vector_roles & set(roles) or "diff" in roles]
    vectors = {f"{m}.{what}": v for m in with_vectors for what, v in kohya.vectors(m, tensors(m)).items()}
    matrices = [
        module
        for module, roles in modules.items()
        if set(roles) - vector_roles - {"alpha"} and not ("diff" in roles and f"{module}.weight" in vectors)
    ]
    claimed = {*matrices, *with_vectors}
    lonely = [module for module in modules if module not in claimed]
    if lonely:
        raise FileError(f"{source.path}: {lonely[0]} has an alpha and nothing it is the alpha of")
    dotted = any("." in module for module in modules)
    return AdapterFile(
        "diffusers" if dotted else "kohya",
        OnDemand(source.path, matrices, patch),
        vectors=vectors,
        metadata=source.metadata,
        size=source.size,
    )


# -- parts ----------------------------------------------------------------------------------------------------------


def _constraint(path: Path, module: str, alpha: float | None) -> Scale:
    """OFT's alpha is the bound on ‖Q‖ as a share of the rows, and no scale."""
    if alpha is not None and alpha < 0:
        raise FileError(f"{path}: {module} has the constraint {alpha:g}, a number from 0 was expected")

    def scale(name: str, rank: int | None) -> tuple[dict[str, Any], str]:
        del name, rank
        return ({"constraint": alpha}, f"1: constraint {alpha:g}") if alpha else ({}, "1: no constraint")

    return scale


def _require_patch(module: str, found: Patch | None) -> Patch:
    if found is None:
        raise FileError(f"{module}: there is no matrix in it")
    return found


def _diffusers_configs(source: Source, modules: Modules) -> dict[str, dict[str, Any]]:
    """diffusers' metadata -> {component: PEFT's configuration}."""
    if _DIFFUSERS not in source.metadata:
        return {}
    try:
        entries = json.loads(source.metadata[_DIFFUSERS])
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source.path}: its {_DIFFUSERS!r} entry is damaged: {error}") from error
    if not isinstance(entries, dict):
        raise FileError(f"{source.path}: its {_DIFFUSERS!r} entry is damaged: it is no JSON object")
    components = {module.partition(".")[0] for module in modules}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        component, _, option = str(key).partition(".")
        if component in components and option:
            configs.setdefault(component, {})[option] = value
    return configs


def _refuse_unknown(source: Source, unknown: Sequence[str]) -> None:
    path, held = source.path, adapters_in(unknown)
    if held:
        raise FullCheckpointError(
            f"{path} is a full checkpoint: {len(source.keys)} tensors of a whole model, with the adapters "
            f"{', '.join(held)} among them, whose kinds and options it does not say. Wrap a model as that one was and "
            "load(model, …) takes an adapter out of it; save(model, …) then writes the adapter alone"
        )
    if unknown and len(unknown) == len(source.keys) and any(key.endswith(".weight") for key in unknown):
        raise MismatchError(
            f"{path} looks like a checkpoint: all its {len(unknown)} tensors are a model's, as {unknown[0]}, and none "
            "is an adapter's; give it as the base, or name an adapter file"
        )
    if unknown:
        listed = "\n".join(f"  {key}" for key in unknown[:8]) + ("\n  …" if len(unknown) > 8 else "")
        what = f"{path} holds {len(unknown)} tensors that are no adapter's"
        raise MismatchError(f"{what}; pass ignore= with patterns to leave them out:\n{listed}")


def _peft_config(path: Path) -> Path | None:
    """The configuration of a folder of PEFT, or of the weights in one."""
    if os.path.isdir(path):
        if not os.path.isfile(path / peft.CONFIG):
            raise FileError(f"{path} is a folder without {peft.CONFIG}: name an adapter file, or a folder PEFT wrote")
        return path / peft.CONFIG
    beside = path.with_name(peft.CONFIG)
    return beside if path.name == peft.WEIGHTS and os.path.isfile(beside) else None


def _weights_in(folder: Path, allow_pickle: bool) -> Path:
    if os.path.isfile(folder / peft.WEIGHTS):
        return folder / peft.WEIGHTS
    pickled = folder / "adapter_model.bin"
    if os.path.isfile(pickled) and allow_pickle:
        return pickled
    also = ", only a pickle, which allow_pickle=True reads as data" if os.path.isfile(pickled) else ""
    raise FileError(f"{folder} has no {peft.WEIGHTS}{also}")
