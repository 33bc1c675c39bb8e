"""A base checkpoint on disk: one safetensors file, shards with an index, or the folders of a diffusers pipeline."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Protocol

from torch import Tensor, nn

from peftkit.errors import FileError
from peftkit.files.formats import container, strict_json
from peftkit.files.formats.container import Info
from peftkit.files.formats.disk import Stamp
from peftkit.files.formats.pickles import unpickle
from peftkit.wrapping.divided import gathered
from peftkit.wrapping.walk import plain_name

_PICKLED = (".pt", ".ckpt", ".bin", ".pth")


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
    before anything of the folder was read. model: the one in memory, None for a checkpoint on disk.
    """

    path: Path
    shards: Mapping[str, tuple[Shard, str]]
    where: Mapping[str, tuple[str, str]]
    others: Mapping[str, Stamp]
    model: nn.Module | None = None

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


def open_base(path: str | os.PathLike[str], *, allow_pickle: bool = False) -> Base:
    """The checkpoint at a path: a .safetensors file, an index.json, or a folder with either, or with components.

    Only headers are read. Raises FileError for what is damaged, inconsistent, or would leave its folder; pickles are
    refused unless allow_pickle, and then read as data that runs nothing.
    """
    path = Path(path)
    if path.name.endswith(".index.json") and os.path.isfile(path):
        path = path.parent
    if not os.path.isdir(path):
        return _joined(path, {path.name: (_shard(path, allow_pickle), "")})
    try:
        files = dict(_stamped(path))
        found = dict(_folder(path, allow_pickle))
    except OSError as error:
        raise FileError(f"{path} could not be read: {error}") from error
    if not found:
        raise FileError(f"{path} has no *.safetensors file in it")
    return _joined(path, found, {name: stamp for name, stamp in files.items() if name not in found})


def _stamped(folder: Path) -> Iterator[tuple[str, Stamp]]:
    """Every file of a folder, by its path within."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), Stamp.of(path)


def _folder(path: Path, allow_pickle: bool) -> Iterator[tuple[str, tuple[Shard, str]]]:
    """The files of a folder, and what their keys are to begin with: its own, or those of a pipeline's components."""
    if not os.path.isfile(path / "model_index.json"):
        yield from ((name, (shard, "")) for name, shard in _shards(path, allow_pickle))
        return
    for component in sorted(path.iterdir()):
        if os.path.isdir(component) and any(component.glob("*.safetensors")):
            for name, shard in _shards(component, allow_pickle):
                yield f"{component.name}/{name}", (shard, f"{component.name}.")


def _shards(folder: Path, allow_pickle: bool) -> Iterator[tuple[str, Shard]]:
    """The files of one model: those its index names, or the only one there is."""
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        raise FileError(
            f"{folder} has {len(indices)} indices ({', '.join(i.name for i in indices)}): name one model's folder"
        )
    if not indices:
        files = sorted(folder.glob("*.safetensors")) or (sorted(folder.glob("*.bin")) if allow_pickle else [])
        if len(files) > 1:
            raise FileError(f"{folder} has {len(files)} models and no index ({files[0].name}, …): name one file")
        for file in files:
            yield file.name, _shard(file, allow_pickle)
        return
    listed = _weight_map(indices[0])
    for name in sorted(set(listed.values())):
        shard = container.read(folder / name)
        own = {key for key, shard_name in listed.items() if shard_name == name}
        if own != set(shard.infos):
            odd = sorted(own ^ set(shard.infos))[0]
            raise FileError(f"{indices[0]} and {name} disagree about {odd!r}: one of them is of another model")
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
    if not (allow_pickle and path.suffix in _PICKLED):
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
