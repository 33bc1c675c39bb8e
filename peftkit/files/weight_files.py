"""Which files of a checkpoint's folder are its weights, in which variant, and which are copies in another form."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from peftkit.errors import FileError, did_you_mean

_VARIANT = r"(?P<variant>[\w-]+)"
#: the name of a model's file or index, as diffusers and transformers write it; of the indices, either order of the ends
_LONE = re.compile(r"(?P<stem>.+)\.(?:safetensors|bin)")
_INDEX = re.compile(rf"(?P<stem>.+)\.safetensors(?:\.index(?:\.{_VARIANT})?|\.(?P<before>[\w-]+)\.index)\.json")
#: what shards have in their names
_SHARD = re.compile(r".+-\d{5}-of-(?!00001\.)\d{5}(?:\.[\w-]+)?\.(?:safetensors|bin)")
#: what diffusers and transformers call a model's weights, without a suffix
_USUAL = ("diffusion_pytorch_model", "model", "pytorch_model")

#: files of weights that no other kind of file is called as
_FORMATS = (".safetensors", ".gguf", ".ckpt", ".msgpack", ".h5", ".tflite", ".mlmodel", ".onnx_data")
#: files of weights whose suffix others have too, such as training_args.bin and optimizer.pt
_NAMED = re.compile(
    r"(?:(?:diffusion_)?pytorch_|tf_|flax_|rust_|openvino_|adapter_|encoder_|decoder_|decoder_with_past_)?"
    r"(?:model|consolidated)(?:[._-].*)?\.(?:bin|pth|pt|onnx|ot|npz|xml)|adapter_config\.json"
    r"|.+\.(?:safetensors|bin|h5|msgpack)(?:\.[\w-]+)?\.index(?:\.[\w-]+)?\.json"
)
#: folders in which a repository keeps its model as another program reads it
_CONVERTED = re.compile(r"(?:original|onnx|openvino|gguf|metal|coreml|mlx|flax|tf)(?:[._-].*)?|checkpoint-\d+")
#: what programs that fetch repositories keep in them
_OF_TOOLS = (".git", ".cache")


@dataclass(frozen=True)
class ModelFile:
    """The file of a model's weights, or the index of its shards. variant: such as "fp16", None for the plain one."""

    name: str
    stem: str
    variant: str | None
    is_index: bool


def is_index(name: str) -> bool:
    """Return whether a file is an index of shards, by its name."""
    return _INDEX.fullmatch(name) is not None


def variant_of_index(name: str) -> str | None:
    """Return the variant that an index of shards is of, None for the plain one."""
    found = _INDEX.fullmatch(name)
    return None if found is None else found["variant"] or found["before"]


def models_in(names: Iterable[str], suffix: str) -> list[ModelFile]:
    """Return the models that a folder has, by the names of its files. suffix: of files without an index."""
    names = sorted(names)
    indices = [(found, name) for name in names if (found := _INDEX.fullmatch(name))] if suffix == ".safetensors" else []
    models = [ModelFile(name, f["stem"], f["variant"] or f["before"], is_index=True) for f, name in indices]
    lone = {f["stem"]: n for n in names if n.endswith(suffix) and not _SHARD.fullmatch(n) and (f := _LONE.fullmatch(n))}
    stems = {*_USUAL, *lone, *(model.stem for model in models)}
    for stem, name in lone.items():
        head, _, variant = stem.rpartition(".")
        plain = head not in stems or not re.fullmatch(_VARIANT, variant)
        own = ModelFile(name, stem if plain else head, None if plain else variant, is_index=False)
        if not any((own.stem, own.variant) == (model.stem, model.variant) for model in models):
            models.append(own)
    return models


def chosen(folder: Path, names: Iterable[str], suffix: str, variant: str | None) -> ModelFile | None:
    """Return the model of a folder in a variant: by default the plain one, or the only one there is.

    Args:
        folder: for messages.
        names: of its files.
        suffix: as in `models_in`.
        variant: such as "fp16"; None for the default.

    Returns:
        The model; None if the folder has no weights, or not in that variant.

    Raises:
        FileError: several models, or several variants and none that is plain.
    """
    names = list(names)
    models = models_in(names, suffix)
    by_stem: defaultdict[str, dict[str | None, ModelFile]] = defaultdict(dict)
    for model in models:
        by_stem[model.stem][model.variant] = model
    stem = _one(folder, by_stem, suffix)
    if stem is None:
        pieces = sorted(name for name in names if _SHARD.fullmatch(name) and name.endswith(suffix))
        if pieces:
            raise FileError(
                f"{folder} has {len(pieces)} shards ({pieces[0]}, …) and no index of them: download the file that ends "
                f"with {suffix}.index.json too"
            )
        return None
    variants = by_stem[stem]
    if variant is not None:
        return variants.get(variant)
    if None in variants or len(variants) == 1:
        return variants.get(None) or next(iter(variants.values()))
    options = " or ".join(f"variant={each!r}" for each in sorted(filter(None, variants)))
    raise FileError(f"{folder} has {stem} in {len(variants)} variants, and none without one: pass {options}")


def _one(folder: Path, by_stem: Mapping[str, Mapping[str | None, ModelFile]], suffix: str) -> str | None:
    """The model that is meant: the only one, the only one with an index, or the one with a usual name."""
    indexed = [stem for stem, variants in by_stem.items() if any(model.is_index for model in variants.values())]
    for stems in (list(by_stem), indexed, [stem for stem in by_stem if stem in _USUAL]):
        if len(stems) == 1:
            return stems[0]
    if len(indexed) > 1:
        raise FileError(f"{folder} has {len(indexed)} indices ({', '.join(sorted(indexed))}): name one model's index")
    if by_stem:
        example = sorted(by_stem)[0] + suffix
        raise FileError(f"{folder} has {len(by_stem)} models and no index ({example}, …): name one file")
    return None


def require_variant(path: Path, variant: str | None, files: Iterable[str]) -> None:
    """Raise FileError if a variant was asked for that no part of a checkpoint has. files: all of the folder."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for file in files:
        names[str(PurePosixPath(file).parent)].append(PurePosixPath(file).name)
    known = {m.variant for own in names.values() for m in models_in(own, ".safetensors")} - {None}
    if variant is not None and variant not in known:
        listed = ", ".join(sorted(filter(None, known))) or "none but the plain one"
        hint = did_you_mean(variant, filter(None, known))
        raise FileError(f"{path} has no weights in the variant {variant!r}; it has {listed}.{hint}")


def copies(files: Iterable[str], homes: Iterable[str], *, pipeline: bool) -> dict[str, str]:
    """Return the files of a folder that hold weights beside those that were read -> what to call them in a report.

    Args:
        files: their paths within the folder.
        homes: the folders, within the folder, that weights were read from.
        pipeline: whether the folder is of a pipeline, whose root holds no component.
    """
    at_home = {*homes, *(["."] if pipeline else [])}
    roots = {file: PurePosixPath(file).parts[0] for file in files}
    return {
        file: f"{root}/" if root in _OF_TOOLS else file
        for file, root in roots.items()
        if root in _OF_TOOLS or _is_copy(PurePosixPath(file), at_home)
    }


def _is_copy(path: PurePosixPath, homes: set[str]) -> bool:
    converted = any(_CONVERTED.fullmatch(part) for part in path.parts[:-1])
    if not converted and str(path.parent) not in homes:
        return path.suffix == ".gguf"
    any_weights = converted and path.suffix in (".bin", ".pth", ".pt", ".onnx", ".xml")
    return any_weights or path.suffix in _FORMATS or _NAMED.fullmatch(path.name) is not None


def written_as(shard: str) -> str:
    """Return the name that a file of weights has in a merged folder, where every one is of safetensors."""
    path = PurePosixPath(shard).with_suffix(".safetensors")
    # transformers calls its pickles pytorch_model.bin, and looks for model.safetensors
    return str(path.with_name(re.sub(r"^pytorch_model\b", "model", path.name)))
