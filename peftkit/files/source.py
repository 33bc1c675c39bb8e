"""The tensors of an adapter file, whatever its container, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats import container
from peftkit.files.formats.disk import opened
from peftkit.files.formats.pickles import unpickle
from peftkit.files.patterns import Selection

#: how every file of llama.cpp begins
_GGUF = b"GGUF"


def _refuse_gguf(path: Path) -> None:
    with opened(path) as file:
        gguf = file.read(len(_GGUF)) == _GGUF
    require_file(
        not gguf,
        path,
        "it is a GGUF file, which llama.cpp reads and this library only writes: name the adapter that it was made of, "
        "a safetensors file or a folder of PEFT",
    )


class Source:
    """The tensors of a file, read when they are asked for, less the ignored ones."""

    def __init__(self, path: Path, allow_pickle: bool, ignored: Selection) -> None:
        self.path = path
        _refuse_gguf(path)
        if allow_pickle and path.suffix in container.PICKLED:
            loaded = unpickle(path)
            self.metadata: Mapping[str, str] = {}
            self.size = sum(tensor.nbytes for tensor in loaded.values())
            names = list(loaded)
            self._read: Callable[[Iterable[str]], dict[str, Tensor]] = lambda keys: {key: loaded[key] for key in keys}
        else:
            file = container.read(path)
            self.size = sum(info.size for info in file.infos.values())
            self.metadata, names, self._read = file.metadata, list(file.infos), file.tensors
        self.names = frozenset(names)
        self.keys = [name for name in names if not ignored.has(name)]
        if not self.keys:
            raise FileError(f"{path} holds no tensors")

    def __getitem__(self, key: str) -> Tensor:
        return self._read([key])[key]

    def named(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors of some keys, read in one go, under other names. keys: name -> key."""
        found = self._read(keys.values())
        return {name: found[key] for name, key in keys.items()}

    def factor(self, key: str) -> Tensor:
        """A tensor of an adapter, which must be of real numbers, and of some."""
        return self._require_factor(key, self[key])

    def factors(self, keys: Mapping[str, str], beside: Container[str] = ()) -> dict[str, Tensor]:
        """As `named`, of tensors that are all factors but those called as `beside` says."""
        found = self.named(keys)
        return {n: tensor if n in beside else self._require_factor(keys[n], tensor) for n, tensor in found.items()}

    def _require_factor(self, key: str, tensor: Tensor) -> Tensor:
        require_file(tensor.is_floating_point(), self.path, f"{key} is {tensor.dtype}, floating point was expected")
        require_file(tensor.numel() > 0, self.path, f"{key} of shape {tuple(tensor.shape)} has nothing in it")
        return tensor

    def number(self, key: str) -> float:
        """A tensor of one finite number."""
        tensor = self[key]
        require_file(
            tensor.numel() == 1 and bool(tensor.float().isfinite().all()),
            self.path,
            f"{key} of shape {tuple(tensor.shape)} is not one finite number",
        )
        return float(tensor.float().item())
