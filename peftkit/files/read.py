"""Read an adapter file, whoever wrote it, into patches. No model and no base is needed, and nothing is guessed."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from peftkit.errors import (
    FileError,
    OptionError,
    error_context,
    require_choice,
    require_file,
)
from peftkit.files import hub
from peftkit.files.foreign import read_foreign, refuse_unknown, scaled_bias
from peftkit.files.formats import (
    disk,
    embeddings,
    native,
    peft,
    peft_config,
    peft_experts,
    peft_projections,
    peft_shared,
)
from peftkit.files.formats.alphas import AlphaOptions
from peftkit.files.formats.disk import Stamp
from peftkit.files.formats.patch import AdapterFile, OnDemand, Patch
from peftkit.files.patterns import Selection
from peftkit.files.rename import Renames, names_of, renamed
from peftkit.files.source import Source

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Reading(TypedDict, total=False):
    """The options of `read`, which every function that reads adapter files takes."""

    dora_axis: str | None
    alpha_zero: str | None
    alpha: float | str | None
    ignore: str | Sequence[str]
    rename: Mapping[str, str]
    allow_pickle: bool


def read(
    path: str | os.PathLike[str],
    *,
    dora_axis: str | None = None,
    alpha_zero: str | None = None,
    alpha: float | str | None = None,
    ignore: str | Sequence[str] = (),
    rename: Mapping[str, str] = MappingProxyType({}),
    allow_pickle: bool = False,
) -> AdapterFile:
    """Read an adapter file of this library, kohya, LyCORIS, diffusers or a WebUI, or a folder of PEFT.

    Every tensor is accounted for, and what a file does not say is not guessed. Tensors are read when asked for.

    Args:
        path: the file or the folder; or, on the Hugging Face hub, "owner/name" or "hf://owner/name/file@revision".
        dora_axis: "out" or "in", where magnitudes do not say which axis they are of.
        alpha_zero: "off" or "rank", what α = 0 means.
        alpha: α of the modules for which the file does not say it: a number, or "rank" for a scale of 1.
        ignore: patterns of keys to leave out.
        rename: {pattern: replacement} over the names of modules, of which the first that matches counts; each `*` of
            the replacement stands for what the `*` at its place in the pattern has matched.
        allow_pickle: read .pt, .ckpt and .bin files too, as data that runs nothing.

    Returns:
        The adapters by the names that the file has for their weights.

    Raises:
        MismatchError: tensors that are no adapter's.
        AmbiguousFileError: a file that can mean two things; the message names the option that decides.
        FileError: a file that is none, is damaged, or is replaced or written to while it is read.
        OptionError: a value that an option does not have, a pattern that matches nothing, an alpha for files that say
            theirs, or two names that would become one.

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
    options = {"dora_axis": dora_axis, "alpha_zero": alpha_zero, "alpha": alpha}
    (bundle,) = read_all([path], **options, ignore=ignore, rename=rename, allow_pickle=allow_pickle)
    return bundle


def read_all(paths: Sequence[str | os.PathLike[str]], **reading: Unpack[Reading]) -> list[AdapterFile]:
    """Several files in one way. A pattern of `ignore` or `rename` has to match in one of them, `alpha` to be of one."""
    require_choice("dora_axis", reading.get("dora_axis"), (None, "out", "in"))
    ignored, renames = Selection(reading.get("ignore", ())), Renames(reading.get("rename", {}))
    alpha = AlphaOptions(reading.get("alpha_zero"), reading.get("alpha"))
    read_as = [_read(Path(hub.local(path)), reading, ignored, alpha) for path in paths]
    listed = ", ".join(map(str, paths))
    if ignored.unmatched:
        raise OptionError(f"ignore={ignored.unmatched[0]!r} matches no tensor of {listed}")
    alpha.require_used(listed)
    bundles: list[AdapterFile] = []
    for path, bundle in zip(paths, read_as, strict=True):
        with error_context(path):
            bundles.append(renamed(bundle, renames))
    renames.require_matched((name for bundle in read_as for name in names_of(bundle)), listed)
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


def _read(path: Path, reading: Reading, ignored: Selection, alpha: AlphaOptions) -> AdapterFile:
    pickles = reading.get("allow_pickle", False)
    beside = _peft_config(path)
    stamp = None if beside is None else Stamp.of(beside)
    config = None if beside is None else peft_config.read_config(beside)
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
        return read_foreign(source, reading.get("dora_axis"), alpha)


def _native(source: Source) -> AdapterFile:
    header = native.decode(source.metadata, source.path)
    for name in header.extras:
        require_file(name in source.names, source.path, f"it is damaged: there is no tensor of the extra {name!r}")
    for name in header.common:
        require_file(name in source.names, source.path, f"it is damaged: there is no tensor {name!r}, which it shares")
    present = set(source.keys)
    extras = dict.fromkeys(name for name in header.extras if name in present)
    stored = {key: name for name, keys in header.common.items() if name in present for key in keys}
    twice = sorted(stored.keys() & source.names)
    require_file(not twice, source.path, f"it is damaged: {twice} are in it, and shared as well")
    own_keys = [key for key in source.keys if key not in extras and key not in header.common]
    owned = native.sorted_by_weight(own_keys, header.records)
    shared = native.sorted_by_weight(stored, header.records)
    ignored = native.sorted_by_weight(source.names - present, header.records)
    left = [name for name in header.records if name in owned or name not in ignored]

    def patch(name: str) -> Patch:
        own, embedding = header.shared.get(name, (name, None))
        record = header.records[own]
        common = {key[len(own) :].removeprefix("."): stored[key] for key in shared.get(own, ())}
        tensors = source.named({key[len(own) :].removeprefix("."): key for key in owned.get(own, ())} | common)
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
            common=common,
        )

    return AdapterFile(
        "native",
        OnDemand(source.path, [*left, *(name for name, own in header.shared.items() if own[0] in left)], patch),
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
    peft_shared.require_one_vector(source.keys, config)
    modules, unknown = peft.modules(source.keys)
    modules, tables = peft_projections.tables(modules)
    modules, parameters = peft_experts.named(modules, config)
    tokens = {module.removeprefix(peft.PREFIX): key for module, key in embeddings.tokens(unknown).items()}
    unknown = [key for key in unknown if key not in tokens.values()]
    bases = {m.removeprefix(peft.PREFIX): key for m, key in embeddings.bases(unknown).items()}
    bases = {module: key for module, key in bases.items() if module in modules}
    unknown = [key for key in unknown if key not in bases.values()]
    extras, shifts, unknown = peft.beside(unknown, config)
    refuse_unknown(source, unknown)
    scale = peft_config.scale_of(config)
    shared = functools.cache(lambda: source.factors(tables))

    def patch(module: str) -> Patch:
        if module in tokens:
            return embeddings.tokens_patch(module, source.factor(tokens[module]), config)
        reader = peft_experts if module in parameters else peft
        return reader.patch(module, shared() | source.factors(modules[module], peft_shared.NUMBERS), config, scale)

    patches = OnDemand(source.path, [*modules, *tokens], patch)
    vectors = {f"{m}.bias": _shift(patches, m, source.factor(key)) for m, key in shifts.items()}
    values = OnDemand(source.path, extras, lambda name: source[extras[name]])
    prints = OnDemand(source.path, bases, lambda name: native.samples(source[bases[name]]))
    facts = {"metadata": source.metadata, "size": source.size, "config": config}
    return AdapterFile("peft", patches, vectors=vectors, base=prints, extras=values, **facts)


def _shift(patches: Mapping[str, Patch], module: str, bias: Tensor) -> Tensor:
    """What a bias of lora_B adds to its layer's: PEFT's scale is before it as before B·A."""
    require_file(module in patches, module, "it has a bias of lora_B, and no lora_B")
    return scaled_bias(patches[module], bias)


# -- parts ----------------------------------------------------------------------------------------------------------


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
