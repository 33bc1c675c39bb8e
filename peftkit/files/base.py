"""A base checkpoint on disk: one safetensors file, shards with an index, or the folders of a diffusers pipeline."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import BinaryIO, Protocol

from torch import Tensor, nn

from peftkit.errors import FileError, require_choice
from peftkit.files.formats import container, strict_json
from peftkit.files.formats.container import Info
from peftkit.files.formats.disk import Stamp
from peftkit.files.formats.pickles import unpickle
from peftkit.files.weight_files import ModelFile, chosen, copies, models_in, require_variant, variant_of_index
from peftkit.wrapping.divided import gathered
from peftkit.wrapping.walk import plain_name


class Shard(Protocol):
    """A file of tensors."""

    @property
    def infos(self) -> Mapping[str, Info]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    def tensor(self, name: str, into: Tensor | None = None) -> Tensor: ...
    def elements(self, name: str, index: list[int]) -> Tensor: ...
    def digest(self, name: str) -> str: ...
    def copy(self, name: str, to: BinaryIO) -> None: ...


@dataclass(frozen=True)
class Loaded:
    """Tensors in memory: of a pickle, or of a model."""

    tensors: Mapping[str, Tensor]
    infos: Mapping[str, Info]
    metadata: Mapping[str, str]

    def tensor(self, name: str, into: Tensor | None = None) -> Tensor:
        del into
        return gathered(self.tensors[name]).clone()

    def elements(self, name: str, index: list[int]) -> Tensor:
        return gathered(self.tensors[name]).flatten()[index]

    def digest(self, name: str) -> str:
        return hashlib.sha256(container.raw(gathered(self.tensors[name]))).hexdigest()

    def copy(self, name: str, to: BinaryIO) -> None:
        container.put(to, container.raw(gathered(self.tensors[name])))


@dataclass(frozen=True, eq=False)
class Base:
    """A checkpoint. shards: path within the folder (or the file's name) -> (file, what its keys are to begin with).

    where: key -> (shard, its name there). others: path within the folder of every other file -> the stamp that file had
    before anything of the folder was read. copies: the files among them of weights in another form, which are not read.
    pipeline: whether it is a folder of components. model: the one in memory, None for a checkpoint on disk.
    """

    path: Path
    shards: Mapping[str, tuple[Shard, str]]
    where: Mapping[str, tuple[str, str]]
    others: Mapping[str, Stamp]
    model: nn.Module | None = None
    copies: tuple[str, ...] = ()
    pipeline: bool = False

    @property
    def folder(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: self.info(key).shape for key in self.where}

    @property
    def size(self) -> int:
        """Of all tensors, in bytes."""
        return sum(self.info(key).size for key in self.where)

    def part(self, component: str) -> Base:
        """The part of a pipeline, under names of its own; a checkpoint of one model as it is.

        Raises:
            OptionError: a pipeline without such a part.
        """
        if not self.pipeline:
            return self
        prefix = f"{component}."
        where = {key.removeprefix(prefix): at for key, at in self.where.items() if key.startswith(prefix)}
        if not where:
            require_choice("component", component, dict.fromkeys(key.partition(".")[0] for key in self.where))
        return replace(self, where=where)

    def info(self, key: str) -> Info:
        shard, name = self.where[key]
        return self.shards[shard][0].infos[name]

    def tensor(self, key: str, into: Tensor | None = None) -> Tensor:
        """One tensor, in memory of its own or in that of `into`, bytes (uint8)."""
        shard, name = self.where[key]
        return self.shards[shard][0].tensor(name, into)

    def elements(self, key: str, index: list[int]) -> Tensor:
        """A few entries of one tensor."""
        shard, name = self.where[key]
        return self.shards[shard][0].elements(name, index)


def of_model(model: nn.Module) -> Base:
    """A model in memory as a base, under its state dict's names."""
    tensors = {
        plain_name(model, key): tensor
        for key, tensor in model.state_dict(keep_vars=True).items()
        if tensor.dtype in container.NAMES
    }
    return replace(_joined(Path("the model"), {"the model": (_loaded(tensors), "")}), model=model)


def open_base(path: str | os.PathLike[str], *, allow_pickle: bool = False, variant: str | None = None) -> Base:
    """The checkpoint at a path: a .safetensors file, an index.json, or a folder with either, or with components.

    Only headers are read. Of the variants that a folder has, the plain one is read by default, as diffusers does.

    Args:
        path: the file or the folder.
        allow_pickle: read pickles, as data that runs nothing.
        variant: such as "fp16", of the components that have it.

    Raises:
        FileError: what is damaged, inconsistent, would leave its folder, or is a pickle or another format.
    """
    path = Path(path)
    if path.name.endswith(".json") and os.path.isfile(path):
        path, variant = path.parent, variant or variant_of_index(path.name)
    if not os.path.isdir(path):
        if variant is not None and variant not in {model.variant for model in models_in([path.name], path.suffix)}:
            raise FileError(
                f"{path} is one file, not of the variant {variant!r}: name its folder, or leave variant= out"
            )
        return _joined(path, {path.name: (_shard(path, allow_pickle), "")})
    try:
        files = dict(_stamped(path))
        pipeline = "model_index.json" in files
        require_variant(path, variant, files)
        models = dict(_models(path, files, pipeline, allow_pickle, variant))
        found = {
            _within(home, name): (shard, "" if home == "." else f"{home}.")
            for home, model in models.items()
            for name, shard in _shards(path / home, model, allow_pickle)
        }
    except OSError as error:
        raise FileError(f"{path} could not be read: {error}") from error
    if not found:
        raise FileError(f"{path} has no *.safetensors file in it{_instead(files)}")
    read = {*found, *(_within(home, model.name) for home, model in models.items() if model.is_index)}
    beside = copies([name for name in files if name not in read], models, pipeline=pipeline)
    others = {name: stamp for name, stamp in files.items() if name not in found and name not in beside}
    return replace(_joined(path, found, others), copies=tuple(dict.fromkeys(beside.values())), pipeline=pipeline)


def _stamped(folder: Path) -> Iterator[tuple[str, Stamp]]:
    """Every file of a folder, by its path within."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), Stamp.of(path)


def _within(home: str, name: str) -> str:
    return name if home == "." else f"{home}/{name}"


def _models(
    folder: Path, files: Iterable[str], pipeline: bool, allow_pickle: bool, variant: str | None
) -> Iterator[tuple[str, ModelFile]]:
    """The folder's own model, as that of ".", or those of a pipeline's components, in a variant where they have it."""
    names: defaultdict[str, list[str]] = defaultdict(list)
    for path in map(PurePosixPath, files):
        names[str(path.parent)].append(path.name)
    suffixes = (".safetensors", ".bin") if allow_pickle else (".safetensors",)
    asked = [None] if variant is None else [variant, None]
    for home in [each for each in names if "/" not in each and (each != ".") == pipeline]:
        models = (chosen(folder / home, names[home], suffix, each) for suffix in suffixes for each in asked)
        model = next(filter(None, models), None)
        if model is not None:
            yield home, model


def _instead(files: Iterable[str]) -> str:
    """What a folder has in place of weights that are read, for a message."""
    name = next((name for name in files if name.endswith((".gguf", ".bin"))), None)
    if name is None:
        return ""
    if name.endswith(".bin"):
        return f", only a pickle ({name}), which allow_pickle=True reads as data"
    return f", only {name} of llama.cpp: {container.GGUF_ADVICE}"


def _shards(folder: Path, model: ModelFile, allow_pickle: bool) -> Iterator[tuple[str, Shard]]:
    """The files of one model: those its index names, or the only one there is."""
    if not model.is_index:
        yield model.name, _shard(folder / model.name, allow_pickle)
        return
    index = folder / model.name
    listed = _weight_map(index)
    for name in sorted(set(listed.values())):
        shard = container.read(folder / name)
        own = {key for key, shard_name in listed.items() if shard_name == name}
        if own != set(shard.infos):
            odd = sorted(own ^ set(shard.infos))[0]
            raise FileError(f"{index} and {name} disagree about {odd!r}: one of them is of another model")
        yield name, shard


def _weight_map(index: Path) -> dict[str, str]:
    found = strict_json.read_json(index)
    value = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value.values()):
        raise FileError(f"{index} is not an index of shards: its weight_map does not map names to files")
    for name in set(value.values()):
        if Path(name).name != name or name in ("", ".", "..") or not name.endswith(".safetensors"):
            raise FileError(f"{index} names {name!r}, a *.safetensors file beside it was expected; it was not opened")
    return value


def _shard(path: Path, allow_pickle: bool) -> Shard:
    if not (allow_pickle and path.suffix in container.PICKLED):
        return container.read(path)
    tensors = {key: tensor.contiguous() for key, tensor in unpickle(path).items()}
    unknown = [key for key, tensor in tensors.items() if tensor.dtype not in container.NAMES]
    if unknown:
        raise FileError(f"{path}: {unknown[0]} is {tensors[unknown[0]].dtype}, which safetensors cannot hold")
    return _loaded(tensors)


def _loaded(tensors: Mapping[str, Tensor]) -> Loaded:
    infos = {key: Info(container.NAMES[t.dtype], tuple(t.shape), 0, t.nbytes) for key, t in tensors.items()}
    return Loaded(tensors, infos, {})


def _joined(
    path: Path, shards: Mapping[str, tuple[Shard, str]], others: Mapping[str, Stamp] = MappingProxyType({})
) -> Base:
    where: dict[str, tuple[str, str]] = {}
    for shard_name, (shard, prefix) in shards.items():
        for name in shard.infos:
            if prefix + name in where:
                raise FileError(f"{path}: {prefix + name} is in {where[prefix + name][0]} and in {shard_name}")
            where[prefix + name] = (shard_name, name)
    return Base(path, shards, where, others)
