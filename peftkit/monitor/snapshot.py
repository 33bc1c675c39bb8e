"""The trained parameters of a run as they were after one measurement."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peftkit.errors import FileError, require_file
from peftkit.files.formats import container


@dataclass(frozen=True)
class Snapshot:
    """Holds the trained parameters after a measurement: copies in main memory, or the path of their file.

    Attributes:
        measurement: The number of the measurement, from 0.
        step: The optimiser steps before it.
        tensors: The parameters by name, None if they are in a file.
        path: The file that holds them, else None.
    """

    measurement: int
    step: int
    tensors: dict[str, Tensor] | None
    path: Path | None = None

    def read(self) -> dict[str, Tensor]:
        """Return the parameters by name.

        Raises:
            FileError: The file is gone or damaged.
        """
        if self.tensors is not None:
            return self.tensors
        assert self.path is not None
        require_file(self.path.is_file(), self.path, f"the snapshot of step {self.step} was here and is gone")
        try:
            return load_file(self.path)
        except SafetensorError as error:
            raise FileError(f"{self.path}: the snapshot of step {self.step} is damaged: {error}") from error

    def written(self, folder: Path, run: str) -> Snapshot:
        """Write the parameters to a file of the folder, and return the snapshot that reads them from there.

        Args:
            folder: An existing folder.
            run: Goes into the name of the file, so that runs may share a folder.
        """
        path = folder / f"snapshot-{run}-{self.step}.safetensors"
        container.write(path, self.read(), {"format": "pt", "step": str(self.step)})
        return Snapshot(self.measurement, self.step, None, path)


def snapshot_folder(folder: str | Path) -> Path:
    """Make a folder for snapshots, unless it is there.

    Raises:
        FileError: It cannot be made.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder}: no folder for snapshots can be made there: {error}") from error
    return folder
