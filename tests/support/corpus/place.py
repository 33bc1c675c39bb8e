"""A small model, a folder of sound files, and everything that can be done with a file."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftkit as pk
from peftkit.errors import PeftkitError

from .build import ones, safetensors


class Pair(nn.Module):
    """What the adapters below are for: a Linear and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 12)
        self.c = nn.Conv2d(8, 12, 3)


def pair() -> Pair:
    torch.manual_seed(0)
    return Pair()


def model_file(model: nn.Module) -> bytes:
    return safetensors({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()})


LORA = {"a.lora_up.weight": ones(12, 2), "a.lora_down.weight": ones(2, 8)}
GOOD = safetensors({**LORA, "a.alpha": torch.tensor(1.0)})
PRECIOUS = b"a file that was there before"


@dataclass(frozen=True)
class Place:
    """A folder with a sound base, a sound adapter and a file that is not to be lost."""

    folder: Path
    allow_pickle: bool = False

    def prepare(self) -> Place:
        self.base.write_bytes(SOUND_BASE)
        self.good.write_bytes(GOOD)
        self.out.write_bytes(PRECIOUS)
        return self

    @property
    def base(self) -> Path:
        return self.folder / "sound-base.safetensors"

    @property
    def good(self) -> Path:
        return self.folder / "sound.safetensors"

    @property
    def out(self) -> Path:
        return self.folder / "out.safetensors"

    @property
    def out_folder(self) -> Path:
        return self.folder / "out-folder"

    @property
    def pickles(self) -> dict[str, bool]:
        return {"allow_pickle": True} if self.allow_pickle else {}

    def for_model(self, path: Path) -> Path:
        """Where a model goes: a file for a file, a folder for a folder."""
        return self.out_folder if os.path.isdir(path) else self.out

    def listing(self) -> dict[str, tuple[int, int]]:
        """All that is here, with what changes when it is written."""
        found = (p for p in self.folder.rglob("*") if p.is_symlink() or not p.is_dir())
        return {str(p.relative_to(self.folder)): _stamp(p) for p in found}


def _stamp(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_size, status.st_mtime_ns


SOUND_BASE = model_file(pair())
Verb = Callable[[Path, Place], Any]


def _read(path: Path, at: Place) -> Any:
    bundle = pk.read(path, **at.pickles)
    return [bundle.patches[name] for name in bundle.patches], dict(bundle.vectors)


def _inspect(path: Path, at: Place) -> Any:
    return str(pk.inspect(path, **at.pickles))


def _merge(path: Path, at: Place) -> Any:
    return pk.merge_checkpoint(at.base, {path: 1.0}, at.out, other_base=True, **at.pickles)


def _combine(path: Path, at: Place) -> Any:
    return pk.combine({at.good: 0.5, path: 1.0}, at.out)


#: what is done with an adapter
ADAPTER_VERBS: Mapping[str, Verb] = {
    "read": _read,
    "inspect": _inspect,
    "doctor": lambda path, at: pk.doctor(path),
    "load": lambda path, at: pk.load(pair(), path),
    "load loosely": lambda path, at: pk.load(pair(), path, strict=False, other_base=True),
    "plan_merge": lambda path, at: str(pk.plan_merge(at.base, {path: 1.0}, **at.pickles)),
    "merge_checkpoint": _merge,
    "convert": lambda path, at: pk.convert(path, at.out, "lora"),
    "convert on a base": lambda path, at: pk.convert(path, at.out, "loha", base=at.base),
    "resize": lambda path, at: pk.resize(path, at.out, rank=1),
    "rescale": lambda path, at: pk.rescale(path, 0.5, at.out),
    "combine": _combine,
    "diff": lambda path, at: pk.diff(path, at.good),
    "export": lambda path, at: pk.export(path, at.out, "lycoris"),
    "export to a folder": lambda path, at: pk.export(path, at.out_folder, "peft", base=at.base),
}
#: what is done with a checkpoint
BASE_VERBS: Mapping[str, Verb] = {
    "merge_checkpoint": lambda path, at: pk.merge_checkpoint(path, {at.good: 1.0}, at.for_model(path), **at.pickles),
    "merge in another dtype": lambda path, at: pk.merge_checkpoint(
        path, {at.good: 1.0}, at.for_model(path), dtype=torch.float16, verify=True, **at.pickles
    ),
    "origin": lambda path, at: pk.plan_merge(at.base, {at.good: 1.0}, origin=path, **at.pickles),
    "convert": lambda path, at: pk.convert(at.good, at.out, "full", base=path),
    "extract": lambda path, at: pk.extract(path, at.base, at.out, rank=1, **at.pickles),
    "extract from itself": lambda path, at: pk.extract(path, path, at.out, "full", **at.pickles),
}
PICKLE_VERBS: Mapping[str, Verb] = {
    **{name: ADAPTER_VERBS[name] for name in ("read", "inspect", "plan_merge", "merge_checkpoint")},
    **{f"base: {name}": BASE_VERBS[name] for name in ("merge_checkpoint", "merge in another dtype", "extract")},
}


def outcome(verb: Verb, path: Path, at: Place) -> str | None:
    """What is wrong with what a verb does to a hostile file; None if it came out right or was refused as it should."""
    before = at.listing()
    try:
        verb(path, at)
    except PeftkitError as error:
        named = (path.name, at.good.name, at.out.name, at.out_folder.name)  # of two files, either
        nameless = not any(name in str(error) for name in named)
        wrong = [f"does not name the file: {type(error).__name__}: {error!s:.200}"] if nameless else []
        if at.listing() != before:
            wrong.append(f"changed or left {sorted(set(at.listing().items()) ^ set(before.items()))}")
        return "; ".join(wrong) or None
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "/peftkit/" in f.filename] or frames
        return f"{type(error).__name__} at {Path(own[-1].filename).name}:{own[-1].lineno}: {error!s:.200}"
    left = [name for name in at.listing() if name not in before and re.search(r"\.[0-9a-f]{8}\.tmp", name)]
    return f"left {left}" if left else None
