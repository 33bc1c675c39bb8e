"""Bombs: small files that claim to be large, each read in a process of its own."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftkit as pk

from .build import header_of, ones, safetensors, with_header
from .native_files import BASE_FACTORS, LOLDU_TENSORS, UP_DOWN, group, native
from .peft_folders import CONFIG, LORA_CONFIG, WEIGHTS
from .pickle_files import saved, zipped
from .place import ADAPTER_VERBS, BASE_VERBS, SOUND_BASE, Place, Verb, outcome

MB = 1 << 20


@dataclass(frozen=True)
class Bomb:
    """A file, or a folder, and what is done with it."""

    content: bytes | Callable[[Path], None]
    verbs: tuple[str, ...] = ("read", "inspect", "doctor", "load", "merge_checkpoint")
    name: str = "bomb.safetensors"
    base: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, folder: Path) -> Path:
        path = folder / self.name
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            self.content(path)
        return path


def _many(count: int, *suffixes: str) -> bytes:
    return safetensors({f"m{i:x}{suffix}": ("F32", [1, 1], bytes(4)) for i in range(count) for suffix in suffixes})


def _strangers(base: bool) -> bytes:
    paths = [
        f"model.diffusion_model.input_blocks.{i}.1.transformer_blocks.{j}.attn{k}.to_{q}"
        for i in range(9) for j in range(7) for k in (1, 2) for q in "qkv"
    ]  # fmt: skip
    if base:
        return safetensors({f"{path}.weight": ("F32", [1, 1], bytes(4)) for path in paths})
    names = [f"lora_unet_{path.replace('.', '_')}_x" for path in paths]
    return safetensors({f"{n}.lora_{x}.weight": ("F32", [1, 1], bytes(4)) for n in names for x in ("up", "down")})


def _peft_of_patterns(count: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        patterns = {f"^blocks\\.{i}\\.to_q": i % 60 + 1 for i in range(count)}
        config = {**LORA_CONFIG, "r": 1, "alpha_pattern": patterns, "rank_pattern": patterns}
        (path / CONFIG).write_text(json.dumps(config))
        keys = (f"base_model.model.blocks.{i}.to_q.lora_{x}.weight" for i in range(count) for x in "AB")
        (path / WEIGHTS).write_bytes(safetensors({key: ("F32", [1, 1], bytes(4)) for key in keys}))

    return make


def _with_a_large_neighbour(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(SOUND_BASE)
    with (path / "model.onnx").open("wb") as file:
        file.truncate(400 * MB)


def _of_zeros(path: Path) -> None:
    path.write_bytes(zipped(b"\x80\x02X" + struct.pack("<I", 400 * MB) + bytes(400 * MB) + b"."))


def bombs() -> dict[str, Bomb]:
    head = [group("loldu", {"rank": 2}, {"a": [3 * 10**7, 8, [], 1]})]
    wide = torch.zeros(1).expand(12_000, 12_000)
    lora = {"a.lora_up.weight": ones(2**20, 1), "a.lora_down.weight": ones(1, 2**20)}
    return {
        **{f"rank {rank:g}": Bomb(native(groups=[group(options={"rank": rank})])) for rank in (10**9, 10**15, 10**18)},
        "an order of 3e7 rows": Bomb(native({**LOLDU_TENSORS, **BASE_FACTORS}, head, portable=True)),
        "blocks of 12,000 of nothing": Bomb(safetensors({"a.oft_blocks": ("F32", [0, 12_000, 12_000], b"")})),
        "an outer product of 12,000": Bomb(
            safetensors({"a.lokr_w1_a": ones(12_000, 1), "a.lokr_w1_b": ones(1, 12_000), "a.lokr_w2": ones(1, 1)}),
            ("read", "load", "merge_checkpoint"),
        ),
        "a ΔW of 2**40 entries written whole": Bomb(safetensors(lora), ("convert to full",)),
        "a deep header": Bomb(with_header(b'{"x":' + b"[" * 5_000_000)),
        "a header of lists": Bomb(with_header(b'{"x":[' + b"[]," * 1_000_000 + b"[]]}")),
        "a header of spaces": Bomb(with_header(b"{" + b" " * 20_000_000 + b"}")),
        "50,000 names of nothing": Bomb(safetensors({f"{i:x}": ("F32", [0], b"") for i in range(50_000)})),
        "20,000 alphas of nothing": Bomb(_many(20_000, ".alpha")),
        "10,000 gates": Bomb(_many(10_000, ".weight", ".on_input"), ("read",)),
        "a name of 60,000 dots": Bomb(native({**UP_DOWN, "." * 60_000: ones(1)}), ("read", "load")),
        "20,000 transposed strangers": Bomb(
            native(groups=[group(weights={f"w{i}": [1, 1, [], 1] for i in range(20_000)})],
                   transposed=[f"v{i}" for i in range(20_000)]),
            ("read",),
        ),
        "378 modules of another model": Bomb(_strangers(False), ("merge into the other", "plan on the other")),
        "a long name in file and base": Bomb(
            safetensors({f"{'ab' * 20_000}.lora_{x}.weight": ones(1, 1) for x in ("up", "down")}),
            ("merge into its like",),
        ),
        "700 patterns for 700 modules": Bomb(_peft_of_patterns(700), ("read",), "bomb"),
        "a large neighbour": Bomb(_with_a_large_neighbour, ("merge_checkpoint",), "bomb", base=True),
        "a pickle of one number that says it is 12,000 by 12,000": Bomb(
            saved({"a.weight": ones(12, 8), "z.weight": wide}), ("merge_checkpoint",), "bomb.pt", base=True,
            options={"allow_pickle": True},
        ),
        "a pickle of a change of 12,000 by 12,000": Bomb(
            saved({"a.diff": wide}), ("read", "inspect"), "bomb.pt", options={"allow_pickle": True}
        ),
        "an archive of 400 MB of zeros": Bomb(_of_zeros, ("read",), "bomb.pt", options={"allow_pickle": True}),
        "a pickle of 700 MB of nothing": Bomb(
            zipped(b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<I", 700 * MB) + b"\x85R."), ("read",), "bomb.pt",
            options={"allow_pickle": True},
        ),
    }  # fmt: skip


def _into_the_other(path: Path, at: Place) -> Any:
    other = at.folder.with_name(f"{at.folder.name}-other.safetensors")
    other.write_bytes(_strangers(True))
    return pk.merge_checkpoint(other, {path: 1.0}, at.out)


def _plan_on_the_other(path: Path, at: Place) -> Any:
    model = nn.Module()
    for name in header_of(_strangers(True))[0]:
        model.add_module(name.replace(".", "_"), nn.Linear(1, 1))
    return pk.load(model, path)


def _into_its_like(path: Path, at: Place) -> Any:
    like = at.folder.with_name(f"{at.folder.name}-like.safetensors")
    like.write_bytes(safetensors({f"{'ba' * 20_000}{'c' * i}.weight": ones(1, 1) for i in range(3)}))
    return pk.merge_checkpoint(like, {path: 1.0}, at.out)


_BOMB_VERBS: Mapping[str, Verb] = {
    **ADAPTER_VERBS,
    "convert to full": lambda path, at: pk.convert(path, at.out, "full"),
    "merge into the other": _into_the_other,
    "plan on the other": _plan_on_the_other,
    "merge into its like": _into_its_like,
}


@dataclass(frozen=True)
class Measured:
    """What one verb on one bomb took. wrong: as `outcome` says, or how the process ended."""

    bomb: str
    verb: str
    wrong: str | None
    seconds: float  # of the processor
    grown: int  # bytes of memory at most
    size: int  # of the file


def _in_child(bomb: str, verb: Verb, path: Path, at: Place, label: str) -> Measured:
    """Run in a process of its own that may take 2 GB of address space and 20 seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2048 * MB,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        try:
            wrong = outcome(verb, path, at)
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before.ru_maxrss) << 10
        os.write(writing, json.dumps([wrong, time.process_time() - start, grown]).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    wrong, seconds, grown = json.loads(said) if said else (f"killed by signal {os.WTERMSIG(status)}", 20.0, 0)
    own = (
        [p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file()] if path.is_dir() else [path.stat().st_size]
    )
    return Measured(bomb, label, wrong, seconds, grown, sum(min(size, 100 * MB) for size in own))


def measure(folder: Path) -> list[Measured]:
    """Every verb on every bomb."""
    warm = Place(folder / "warm")
    warm.folder.mkdir()
    for verb in (*ADAPTER_VERBS.values(), *BASE_VERBS.values()):  # what is built once is not the file's doing
        outcome(verb, warm.prepare().good, warm)
    found = []
    for i, (name, bomb) in enumerate(bombs().items()):
        (folder / str(i)).mkdir()
        at = Place(folder / str(i), allow_pickle="allow_pickle" in bomb.options).prepare()
        path = bomb.make(at.folder)
        table = BASE_VERBS if bomb.base else _BOMB_VERBS
        found += [_in_child(name, table[label], path, at, label) for label in bomb.verbs]
    return found
