"""Files that nobody should have written, and everything that can be done with a file.

Every case is a name and bytes, or names and bytes of a folder; `VERBS` are the library's functions on a path. Run as a
program it reads the bombs among them, files that claim far more than they hold, each in a process of its own, and
prints the memory and the time that each took: `python -m tests.support.corpus FOLDER`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import re
import resource
import struct
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import registry
from peftkit.errors import PeftkitError
from peftkit.files.formats import container as files

#: a tensor, or what a header says of one: its dtype, its shape and its bytes
Entry = Tensor | tuple[str, list[int], bytes]
Files = Mapping[str, bytes]

NAN, INF = float("nan"), float("inf")


def ones(*shape: int, by: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, by).to(dtype)


def safetensors(tensors: Mapping[str, Entry], metadata: Any = None) -> bytes:
    """A file whose header says what it is told to."""
    head: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    data = []
    end = 0
    for name, entry in tensors.items():
        if isinstance(entry, Tensor):
            raw = bytes(files.raw(entry)) if entry.numel() else b""
            entry = (files.NAMES[entry.dtype], list(entry.shape), raw)
        dtype, shape, raw = entry
        head[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        data.append(raw)
        end += len(raw)
    return with_header(json.dumps(head).encode(), b"".join(data))


def with_header(text: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def header_of(file: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON and the data of a sound file."""
    (length,) = struct.unpack("<Q", file[:8])
    return json.loads(file[8 : 8 + length]), file[8 + length :]


# -- a small model, and everything that can be done with a file ------------------------------------------------------


class Net(nn.Module):
    """What the adapters below are for: a Linear and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 12)
        self.c = nn.Conv2d(8, 12, 3)


def net() -> Net:
    torch.manual_seed(0)
    return Net()


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
        self.base.write_bytes(_BASE)
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


_BASE = model_file(net())
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
    "load": lambda path, at: pk.load(net(), path),
    "load loosely": lambda path, at: pk.load(net(), path, strict=False, other_base=True),
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


# -- containers ------------------------------------------------------------------------------------------------------


def _pair(**over: Any) -> dict[str, Any]:
    """A header of two sound tensors, x and y, with some of its parts replaced."""
    head: dict[str, Any] = {
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "y": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    for key, value in over.items():
        name, _, part = key.partition("_")
        if part and name in head:
            head[name] = {**head[name], {"offsets": "data_offsets"}.get(part, part): value}
        else:
            head[key] = value
    return head


def _header(**over: Any) -> bytes:
    return with_header(json.dumps(_pair(**over)).encode(), bytes(16))


_X = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
CONTAINERS: dict[str, bytes] = {
    "nothing": b"",
    **{f"{n} bytes": _header()[:n] for n in (1, 7, 8, 9, 16)},
    **{f"cut {n} bytes short": _header()[:-n] for n in (1, 8, 16, 17, 40)},
    "bytes after the end": _header() + b"\0",
    "no tensors": with_header(b"{}"),
    "a header of no bytes": with_header(b"", bytes(16)),
    "a header longer than the file": with_header(_X + b"}", bytes(8), 10**6),
    "a header of 2**63 bytes": with_header(_X + b"}", bytes(8), 2**63),
    "a header of 2**64 - 1 bytes": with_header(_X + b"}", bytes(8), 2**64 - 1),
    "a header one byte short": with_header(_X + b"}", bytes(8), len(_X)),
    "not UTF-8": with_header(_X.replace(b"x", b"\xff") + b"}", bytes(8)),
    "a byte order mark": with_header(b"\xef\xbb\xbf" + _X + b"}", bytes(8)),
    "UTF-16": with_header((_X + b"}").decode().encode("utf-16"), bytes(8)),
    "a space before the header": with_header(b" " + _X + b"}", bytes(8)),
    "NUL after the header": with_header(_X + b"}\0", bytes(8)),
    "two headers": with_header(_X + b"}{}", bytes(8)),
    "not JSON": with_header(b"{'x':1}", bytes(8)),
    **{f"a header that is {text.decode()}": with_header(text) for text in (b"[]", b"null", b"12", b'"x"', b"NaN")},
    "a deep header": with_header(b'{"x":' + b"[" * 100_000),
    "a name twice": with_header(_X + b',"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}', bytes(16)),
    "a dtype twice": with_header(_X[:-1] + b',"dtype":"F16"}}', bytes(8)),
    "metadata twice": with_header(_X + b',"__metadata__":{},"__metadata__":{}}', bytes(8)),
    "a key of the metadata twice": with_header(_X + b',"__metadata__":{"a":"1","a":"2"}}', bytes(8)),
    "an overlap": _header(y_offsets=[4, 12]),
    "the same bytes twice": _header(y_offsets=[0, 8]),
    "a hole": _header(x_offsets=[0, 4], x_shape=[1]),
    "out of order": with_header(json.dumps({"y": _pair()["y"], "x": _pair()["x"]}).encode(), bytes(16)),
    **{
        f"offsets {offsets}": _header(x_offsets=offsets)
        for offsets in (
            *([8, 0], [-8, 0], [0, 2**63], [0, 2**64], [0, 10**400], [0.0, 8.0], [False, 8], ["0", "8"], [None, 8]),
            *([0], [], [0, 8, 16], None, 8, "08", {"0": 8}, [NAN, 8], [0, INF]),
        )
    },
    **{
        f"a shape {str(shape)[:40]}": _header(x_shape=shape)
        for shape in (
            *([-2], [2.0], [True, 2], ["2"], [None], None, 2, "2", {}, [[2]], [2**63], [2**62, 2**62], [10**400]),
            *([NAN], [INF], [1] * 64 + [2], [1] * 10_000 + [2], [0], [-1, -2]),
        )
    },
    **{
        f"a dtype {dtype!r}": _header(x_dtype=dtype)
        for dtype in ("F33", "", "f32", None, 32, [], {}, True, "F32\0", "F4", "\ud800", "C64", "F8_E8M0")
    },
    **{
        f"a tensor that is {value!r}": _header(x=value)
        for value in (None, 1, [], {}, "x", {"dtype": "F32"}, {**_pair()["x"], "more": 1})
    },
    **{
        f"metadata {value!r}": _header(__metadata__=value)
        for value in (None, 1, [], "x", {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}, _pair()["x"], {"a": "\ud800"})
    },
    "a lone surrogate for a name": safetensors({"\ud800": ones(1)}),
    "no name": safetensors({"": ones(1)}),
    "zero bytes": bytes(1000),
    "ones": b"\xff" * 1000,
    "text": b"<html>404 Not Found</html>",
    "zip": b"PK\x03\x04" + bytes(100),
    "2**124 elements of nothing": safetensors({"a.diff": ("F32", [2**62, 2**62, 0], b"")}),
    "2**62 elements of nothing": safetensors({"a.diff": ("F32", [2**62, 0], b"")}),
    "a million million elements of nothing": safetensors({"a.diff": ("F32", [0, 10**6, 10**6], b"")}),
}


# -- kohya, LyCORIS, diffusers ---------------------------------------------------------------------------------------


def _hada(rank: int, more: Mapping[str, Entry] | None = None, tucker: bool = False) -> dict[str, Entry]:
    up = (rank, 12) if tucker else (12, rank)
    halves = {f"a.hada_w{i}_{side}": ones(*(up if side == "a" else (rank, 8))) for i in (1, 2) for side in "ab"}
    return {**halves, **(more or {})}


def _glora(rank: int) -> dict[str, Entry]:
    shapes = {"a1": (8, rank), "a2": (rank, 8), "b1": (12, rank), "b2": (rank, 8)}
    return {f"a.{name}.weight": ones(*shape) for name, shape in shapes.items()}


def _all(shape: tuple[int, ...], *names: str) -> dict[str, Entry]:
    return {f"a.{name}": ones(*shape) for name in names}


def _diffusers(**options: Any) -> dict[str, str]:
    config = {"r": 2, "lora_alpha": 2, **options}
    return {"lora_adapter_metadata": json.dumps({f"a.{key}": value for key, value in config.items()})}


_BLOCKS = torch.linspace(-0.3, 0.4, 48).reshape(3, 4, 4)
_ALPHA = {"a.alpha": torch.tensor(1.0)}
_HADA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_GLORA = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
_LOKR: dict[str, Entry] = {"a.lokr_w1": ones(2, 2), "a.lokr_w2": ones(6, 4)}
_TUCKER: dict[str, Entry] = {"c.lora_up.weight": ones(12, 2), "c.lora_down.weight": ones(2, 8, 1, 1)}

_KOHYA: dict[str, Mapping[str, Entry]] = {
    "lora_up alone": {"a.lora_up.weight": ones(12, 2)},
    "lora_down alone": {"a.lora_down.weight": ones(2, 8)},
    "alpha alone": _ALPHA,
    "one module of two whole": {**LORA, "c.lora_up.weight": ones(12, 2, 1, 1)},
    "ranks that differ": {**LORA, "a.lora_down.weight": ones(3, 8)},
    "rank 0": {"a.lora_up.weight": ones(12, 0), "a.lora_down.weight": ones(0, 8), **_ALPHA},
    "no rows": {"a.lora_up.weight": ones(0, 2), "a.lora_down.weight": ones(2, 8)},
    "no columns": {"a.lora_up.weight": ones(12, 2), "a.lora_down.weight": ones(2, 0)},
    "2**62 columns of nothing": {"a.lora_up.weight": ones(12, 2), "a.lora_down.weight": ("F32", [2, 2**62, 0], b"")},
    "2**62 rows of nothing": {"a.lora_up.weight": ("F32", [2**62, 0], b""), "a.lora_down.weight": ones(0, 8)},
    **{
        f"lora of {len(shape)} dimensions": _all(shape, "lora_up.weight", "lora_down.weight")
        for shape in ((), (8,), (2, 2, 2), (1,) * 7)
    },
    **{
        f"{part} in {name}": {**LORA, f"a.lora_{part}.weight": entry}
        for part, shape in (("up", (12, 2)), ("down", (2, 8)))
        for name, entry in {
            "int8": ones(*shape, dtype=torch.int8),
            "bool": ones(*shape, dtype=torch.bool),
            "int64": ones(*shape, dtype=torch.int64),
            "fp8": ones(*shape, dtype=torch.float8_e4m3fn),
            "complex": ("C64", list(shape), bytes(8 * shape[0] * shape[1])),
            "fp4": ("F4", list(shape), bytes(shape[0] * shape[1] // 2)),
            "NaN": ones(*shape, by=NAN),
            "infinity": ones(*shape, by=INF),
        }.items()
    },
    "factors whose product overflows": {key: entry * 1e30 for key, entry in LORA.items()},
    **{
        f"alpha {name}": {**LORA, "a.alpha": entry}
        for name, entry in {
            "of two": ones(2),
            "of none": ones(0),
            "NaN": torch.tensor(NAN),
            "infinite": torch.tensor(INF),
            "negative": torch.tensor(-1.0),
            "0": torch.tensor(0.0),
            "of an integer": torch.tensor(1),
            "of a bool": torch.tensor(True),
            "complex": ("C64", [], bytes(8)),
            "1e38": torch.tensor(1e38),
        }.items()
    },
    "no prefix before the dot": {".lora_up.weight": ones(12, 2), ".lora_down.weight": ones(2, 8)},
    "no prefix and no dot": {"lora_up.weight": ones(12, 2), "lora_down.weight": ones(2, 8)},
    "a prefix of dots": {"....lora_up.weight": ones(12, 2), "....lora_down.weight": ones(2, 8)},
    "two names of one module": {
        f"{m}.lora_{x}.weight": LORA[f"a.lora_{x}.weight"] for m in ("a", "lora_unet_a") for x in ("up", "down")
    },
    "names that collide without dots": {
        f"{m}.lora_{part}.weight": LORA[f"a.lora_{part}.weight"] for m in ("x.y_z", "x_y.z") for part in ("up", "down")
    },
    "one role under two names": {**LORA, "a.lora_B.weight": ones(12, 2)},
    **{
        f"a name of {name}": {f"{m}.lora_{part}.weight": LORA[f"a.lora_{part}.weight"] for part in ("up", "down")}
        for name, m in {
            "control characters": "a\n\x1b[2J\0\r",
            "markup": "a[/red][bold]",
            "a lone surrogate": "a\ud800",
            "100,000 letters": "a" * 100_000,
            "20,000 dots": "." * 20_000,
            "20,000 underscores": "_" * 20_000,
            "braces": "{0}%s%(x)s",
            "right to left": "\u202ea",
        }.items()
    },
    "two kinds in one module": {**LORA, "a.diff": ones(12, 8)},
    "LoRA and half a LoHa": {**LORA, "a.hada_w1_a": ones(12, 2)},
    "a stray tensor": {**LORA, "stray": ones(1)},
    "a core of 2 dimensions": {**_TUCKER, "c.lora_mid.weight": ones(2, 2)},
    "a core of 1 dimension": {**_TUCKER, "c.lora_mid.weight": ones(2)},
    "a core of another rank": {**_TUCKER, "c.lora_mid.weight": ones(3, 3, 3, 3)},
    "a core of no kernel": {**_TUCKER, "c.lora_mid.weight": ones(2, 2, 0, 3)},
    "half a LoHa": {"a.hada_w1_a": ones(12, 2), "a.hada_w1_b": ones(2, 8)},
    "LoHa of rank 0": {**_hada(0), **_ALPHA},
    "LoHa of scalars": _all((), *_HADA),
    "LoHa of vectors": _all((8,), *_HADA),
    "LoHa of unlike ranks": _hada(2, {"a.hada_w2_a": ones(12, 3), "a.hada_w2_b": ones(3, 8)}),
    "LoHa of a cube": _hada(2, {"a.hada_w1_b": ones(2, 8, 3), "a.hada_w2_b": ones(2, 8, 3)}),
    "LoHa with one core": _hada(2, {"a.hada_t1": ones(2, 2, 3, 3)}, tucker=True),
    "LoHa with unlike cores": _hada(2, {"a.hada_t1": ones(2, 5, 3, 3), "a.hada_t2": ones(2)}, tucker=True),
    "LoKr of scalars": _all((), "lokr_w1", "lokr_w2"),
    "LoKr of vectors": _all((4,), "lokr_w1", "lokr_w2"),
    "LoKr of a cube": {**_LOKR, "a.lokr_w1": ones(2, 2, 2)},
    "LoKr of nothing": {**_LOKR, "a.lokr_w1": ones(0, 2)},
    "LoKr of rank 0": {"a.lokr_w1": ones(2, 2), "a.lokr_w2_a": ones(6, 0), "a.lokr_w2_b": ones(0, 4), **_ALPHA},
    "LoKr of a small factor of rank 0": {
        "a.lokr_w1_a": ones(2, 0), "a.lokr_w1_b": ones(0, 2), "a.lokr_w2": ones(6, 4), **_ALPHA,
    },
    "LoKr of unlike ranks": {"a.lokr_w1_a": ones(2, 3), "a.lokr_w1_b": ones(2, 2), "a.lokr_w2": ones(6, 4)},
    "LoKr with both small factors": {**_LOKR, "a.lokr_w1_a": ones(2, 2)},
    "LoKr with a flat core": {
        "a.lokr_w1": ones(2, 2), "a.lokr_w2_a": ones(2, 6), "a.lokr_w2_b": ones(2, 4), "a.lokr_t2": ones(2, 2),
    },
    "LoKr without its large factor": {"a.lokr_w1": ones(2, 2)},
    "OFT of other blocks than squares": {"a.oft_blocks": ones(3, 4, 5)},
    "OFT of narrow blocks": {"a.oft_blocks": ones(3, 4, 3)},
    **{f"OFT of {len(shape)} dimensions": {"a.oft_blocks": ones(*shape)} for shape in ((), (4,), (4, 4), (1,) * 5)},
    "OFT of no blocks": {"a.oft_blocks": ones(0, 4, 4)},
    "OFT of blocks of nothing": {"a.oft_blocks": ones(3, 0, 0)},
    "OFT of blocks of 1": {"a.oft_blocks": ones(12, 1, 1)},
    "OFT of integers": {"a.oft_blocks": ones(3, 4, 4, dtype=torch.int8)},
    "OFT of NaN": {"a.oft_blocks": ones(3, 4, 4, by=NAN)},
    "OFT with too few factors": {"a.oft_blocks": _BLOCKS, "a.rescale": ones(5)},
    "OFT factors alone": {"a.rescale": ones(12, 1)},
    "OFT with a negative constraint": {"a.oft_blocks": _BLOCKS, "a.alpha": torch.tensor(-1.0)},
    "OFT with a huge constraint": {"a.oft_blocks": _BLOCKS, "a.alpha": torch.tensor(3e38)},
    "OFT with a tiny constraint": {"a.oft_blocks": _BLOCKS, "a.alpha": torch.tensor(1e-45)},
    "BOFT of odd blocks": {"a.oft_blocks": ones(2, 4, 3, 3)},
    "BOFT of too many stages": {"a.oft_blocks": ones(40, 3, 4, 4)},
    "BOFT of no stages": {"a.oft_blocks": ones(0, 3, 4, 4)},
    **{
        f"magnitudes {name}": {**LORA, "a.dora_scale": entry}
        for name, entry in {
            "of none": ones(0),
            "of one": torch.tensor(1.0),
            "of another size": ones(7),
            "of a square": ones(3, 4),
            "of NaN": ones(12, 1, by=NAN),
            "of 0": ones(12, 1, by=0.0),
            "of integers": ones(12, 1, dtype=torch.int32),
            "of 5 dimensions": ones(12, 1, 1, 1, 1),
        }.items()
    },
    "magnitudes twice": {**LORA, "a.dora_scale": ones(12, 1), "a.lora_magnitude_vector": ones(12)},
    "magnitudes alone": {"a.dora_scale": ones(12, 1)},
    "PEFT's magnitudes of another size": {**LORA, "a.lora_magnitude_vector": ones(5)},
    "magnitudes around OFT": {"a.oft_blocks": _BLOCKS, "a.dora_scale": ones(12, 1)},
    "magnitudes around a gate": {"a.weight": ones(12), "a.on_input": torch.tensor(0), "a.dora_scale": ones(12, 1)},
    "GLoRA of scalars": _all((), *_GLORA),
    "GLoRA of vectors": _all((3,), *_GLORA),
    "GLoRA in two layouts": _all((8, 8), *_GLORA),
    "GLoRA in no layout": _all((3, 5), *_GLORA),
    "GLoRA of rank 0": {**_glora(0), **_ALPHA},
    "half a GLoRA": {"a.a1.weight": ones(8, 2)},
    "a gate on two inputs": {"a.weight": ones(12), "a.on_input": ones(2)},
    "a gate of nothing": {"a.weight": ones(0), "a.on_input": torch.tensor(0)},
    "a gate of a scalar": {"a.weight": torch.tensor(1.0), "a.on_input": torch.tensor(0)},
    "a gate on NaN": {"a.weight": ones(12), "a.on_input": torch.tensor(NAN)},
    "a gate on fp4": {"a.weight": ones(12), "a.on_input": ("F4", [], b"\0")},
    "a gate without its vector": {"a.on_input": torch.tensor(0)},
    "a change of a scalar": {"a.diff": torch.tensor(1.0)},
    "a change of 64 dimensions": {"a.diff": ("F32", [1] * 64, bytes(4))},
    "a change of another shape": {"a.diff": ones(8, 12)},
    "a change of nothing": {"a.diff": ("F32", [2**62, 0], b"")},
    "a change of a weight of 1 dimension": {"a.diff": ones(12)},
    **{
        f"a change of a bias {name}": {"a.diff_b": entry}
        for name, entry in {
            "of 2 dimensions": ones(12, 1),
            "of another size": ones(11),
            "of NaN": ones(12, by=NAN),
            "of integers": ones(12, dtype=torch.int64),
            "of a scalar": torch.tensor(1.0),
            "of none": ones(0),
        }.items()
    },
    "two changes of one norm": {"a.diff": ones(12), "a.w_norm": ones(12)},
    "a change of a norm on a matrix": {"a.w_norm": ones(12)},
}  # fmt: skip

_REDOS = "m." + "a" * 40 + "b"
KOHYA: dict[str, bytes] = {
    **{name: safetensors(tensors) for name, tensors in _KOHYA.items()},
    "metadata with a lone surrogate": safetensors(LORA, {"x": "\ud800"}),
    **{
        f"diffusers' entry {text[:12]!r}": safetensors(LORA, {"lora_adapter_metadata": text})
        for text in ("", "[]", "null", "5", "{", "[" * 100_000, '{"a":' * 100_000, "NaN", '{"a.r":1e999}', "{}")
    },
    **{
        f"diffusers' {key} {str(value)[:20]!r}": safetensors(LORA, _diffusers(**{key: value}))
        for key, values in {
            "r": ("x", None, 0, -1, 10**400, 2.5, [2]),
            "lora_alpha": ("x", None, [], 10**400, NAN, INF, True),
            "alpha_pattern": (5, "x", [1], {"(": 1}, {"a{99999999999}": 1}, {"a": "x"}, {"": NAN}),
            "rank_pattern": (5, "x", [1], {"(": 1}, {"a": "x"}),
        }.items()
        for value in values
    },
    "diffusers' scales and alphas": safetensors({**LORA, **_ALPHA}, _diffusers()),
    "a pattern that backtracks for ever": safetensors(
        {f"{_REDOS}.lora_up.weight": ones(12, 2), f"{_REDOS}.lora_down.weight": ones(2, 8)},
        {"lora_adapter_metadata": json.dumps({"m.r": 2, "m.lora_alpha": 2, "m.alpha_pattern": {"(a+)+c": 1}})},
    ),
}


# -- this library's own ----------------------------------------------------------------------------------------------

_UP: dict[str, Entry] = {"a.up": ones(12, 2), "a.down": ones(2, 8)}


def group(kind: Any = "lora", options: Any = None, weights: Any = None) -> dict[str, Any]:
    """A group of a native header; weights: {name: [rows, channels, kernel, groups]}."""
    known = isinstance(kind, str) and kind in pk.kinds()
    convention = registry.get(kind).convention if known else "1"
    return {
        "kind": kind,
        "convention": convention,
        "options": {"rank": 2} if options is None else options,
        "weights": {"a": [12, 8, [], 1]} if weights is None else weights,
    }


def native(tensors: Mapping[str, Entry] | None = None, groups: Any = None, **over: Any) -> bytes:
    value = {"schema": 1, "version": "x", "name": "default", "portable": False, "base": {}, "training": {}}
    value |= {"groups": [group()] if groups is None else groups, **over}
    return safetensors(_UP if tensors is None else tensors, {"peftkit": json.dumps(value)})


def prints(values: Any, count: int = 32) -> str:
    return base64.b64encode(struct.pack(f"<{count}f", *[values] * count)).decode()


def _edited(old: str, new: str) -> bytes:
    """A native file with some of its header's text replaced."""
    head, data = header_of(native())
    text = head["__metadata__"]["peftkit"].replace(old, new)
    return with_header(json.dumps({**head, "__metadata__": {"peftkit": text}}).encode(), data)


def _without(key: str) -> bytes:
    head, data = header_of(native())
    value = json.loads(head["__metadata__"]["peftkit"])
    del value[key]
    return with_header(json.dumps({**head, "__metadata__": {"peftkit": json.dumps(value)}}).encode(), data)


_ODD = (None, 5, -1, NAN, True, "zz", "", [], [1], [[1, 2]], {}, {"x": 1})
_DORA: dict[str, Entry] = {
    "a.magnitude": ones(12), "a.base_norm": ones(12), "a.inner.up": ones(12, 2), "a.inner.down": ones(2, 8),
}  # fmt: skip
_KRON: dict[str, Entry] = {"a.outer": ones(2, 2), "a.block": ones(6, 4)}
_SKEW: dict[str, Entry] = {"a.skew": torch.linspace(-0.1, 0.1, 18).reshape(3, 6)}
_LOLDU: dict[str, Entry] = {
    "a.order": torch.arange(12, dtype=torch.int32),
    "a.dead": torch.zeros(2, 2, dtype=torch.bool),
    "a.start": ones(2),
    "a.shift": ones(2),
    "a.scale_shift": torch.zeros(1),
}
_FACTORS: dict[str, Entry] = {"a.left": ones(12, 2), "a.right": ones(2, 8)}
_PRIME = 999_999_999_999_999_989

NATIVE: dict[str, bytes] = {
    **{
        f"a header of {text[:8]!r}": safetensors(_UP, {"peftkit": text})
        for text in ("", "null", "[]", "5", '"x"', "{", "NaN", "1e999", "[" * 100_000, '{"a":' * 100_000)
    },
    **{f"no {key}": _without(key) for key in ("schema", "version", "name", "portable", "groups", "base", "training")},
    **{
        f"{key} {value!r}": native(**{key: value})
        for key in ("schema", "version", "name", "portable", "groups", "base", "training", "transposed")
        for value in _ODD
        if (key, value) != ("schema", True)
    },
    **{
        f"{key} of a group {value!r}": native(groups=[{**group(), key: value}])
        for key in ("kind", "convention", "options", "weights")
        for value in _ODD
    },
    **{
        f"a weight {str(weight)[:40]}": native(groups=[group(weights={"a": weight})])
        for weight in (
            *([-12, 8, [], 1], [0, 8, [], 1], [12, 0, [], 1], [12.5, 8, [], 1], ["12", "8", [], 1], [True, 8, [], 1]),
            *([2**62, 8, [], 1], [2**80, 8, [], 1], [12, 2**62, [], 1], [INF, 8, [], 1], [NAN, 8, [], 1]),
            *([12, 8, [-1, -1], 1], [12, 8, [0], 1], [12, 8, [2**40, 2**40], 1], [12, 8, "11", 1], [12, 8, 1, 1]),
            *([12, 8, None, 1], [12, 8, [1] * 1000, 1], [12, 8, [INF], 1], [12, 8, [], 0], [12, 8, [], -1]),
            *([12, 8, [], 2**70], [12, 8, [], 5], [12, 8, [], None], [12, 8, []], [], None, "abcd", {"a": 1}),
        )
    },
    **{
        f"a transposed convolution of {groups} groups": native(
            {"c.up": ones(12, 2), "c.down": ones(2, 72)},
            [group(weights={"c": [12, 8, [3, 3], groups]})],
            transposed=["c"],
        )
        for groups in (0, -1, 5, 12, 2**70)
    },
    "a Linear that is said to be transposed": native(transposed=["a"]),
    "a stranger that is said to be transposed": native(transposed=["zz"]),
    **{
        f"{kind} with {str(options)[:50]}": native(tensors, [group(kind, options)])
        for kind, tensors, several in (
            (
                "lora",
                _UP,
                (
                    *({"rank": rank} for rank in (0, -1, True, 2.0, "2", None, [2], 10**9, 10**18, 10**30)),
                    *({"rank": 2, "alpha": alpha} for alpha in ("x", NAN, INF, 10**400, 1e300, -1, 0, True, [])),
                    *({"rank": 2, "dropout": p} for p in (2, -1, NAN, "x")),
                    *({"rank": 2, name: 1} for name in ("unknown", "shape", "weight", "self", "kind", "", "__class__")),
                    *({"rank": 2, "tucker": x} for x in (True, "x")),
                    *({"rank": 2, "decompose": x} for x in (True, "x", None)),
                    *([["rank", 2]], [["rank"]], [[1, 2]], "rank"),
                ),
            ),
            (
                "dora",
                _DORA,
                (
                    *({"rank": 2}, {}, {"inner": "lora"}, {"inner": "lora", "axis": "in", "rank": 2}),
                    *({"inner": inner, "axis": "out"} for inner in ("dora", "zz", 5, None, ["lora"], "oft", "loldu")),
                    *({"inner": "lora", "rank": 2, "axis": axis} for axis in ("zz", 5, None, [])),
                    *({"inner": "lora", "axis": "out", "rank": rank} for rank in (10**9, 10**18, 10**30, 0)),
                    *({"inner": "lora", "axis": "out", "rank": 2, x: 1} for x in ("decompose", "options", "shape")),
                ),
            ),
            (
                "lokr",
                _KRON,
                (
                    *({"outer": o, "full": True} for o in ([0, 2], [-2, 2], [5, 2], [10**30, 2], [2], [2, 2, 2], "ab")),
                    *({"outer": [2, 2], "full": full} for full in (False, None, "x", 1)),
                    *({"factor": factor} for factor in (0, -1, -2, 10**30, [2], [2, 2, 2], "x", 2.0)),
                    *({"outer": [2, 2], "full": True, x: True} for x in ("tucker", "decompose_both")),
                    *({"outer": [2, 2], "rank": 10**18, "full": full} for full in (True, False)),
                    *({"full_scale": x} for x in ("alpha/rank", "zz", 5)),
                ),
            ),
            (
                "oft",
                _SKEW,
                (
                    *({"block_size": b} for b in (0, -4, 1, 5, 10**30, "4", True, 4.0)),
                    *({"blocks": n} for n in (0, -3, 5, 10**30)),
                    {"blocks": 3, "block_size": 4},
                    *({"block_size": 4, "terms": terms} for terms in (0, 1, -1, 10**9, 10**30, "x")),
                    *({"block_size": 4, "constraint": c} for c in (0, -1, NAN, 1e308, 1e-320, 3e38)),
                    *({"block_size": 4, "side": side} for side in ("zz", 5)),
                    *({"block_size": 4, "path": path} for path in ("geodesic", "zz")),
                    {"block_size": 4, "rescale": True},
                ),
            ),
            (
                "loldu",
                _LOLDU,
                (
                    *({"rank": rank} for rank in (0, 9, 13, 10**18)),
                    *({"rank": 2, "alpha": alpha} for alpha in (0, 10**400)),
                    *({"rank": 2, "epsilon": epsilon} for epsilon in (0, -1, NAN)),
                    {"rank": 2, "init": "zz"},
                ),
            ),
        )
        for options in several
    },
    **{
        f"DoRA with {name}": native({**_DORA, **tensors}, [group("dora", {"inner": "lora", "axis": "out", "rank": 2})])
        for name, tensors in {
            "too few magnitudes": {"a.magnitude": ones(5)},
            "whole magnitudes": {"a.magnitude": ones(12, dtype=torch.int32)},
            "one norm": {"a.base_norm": torch.tensor(1.0)},
            "norms of 0": {"a.base_norm": ones(12, by=0.0)},
            "norms of NaN": {"a.base_norm": ones(12, by=NAN)},
        }.items()
    },
    **{
        f"LoLDU with an order of {name}": native({**_LOLDU, "a.order": order}, [group("loldu")])
        for name, order in {
            "zeros": torch.zeros(12, dtype=torch.int32),
            "negatives": -torch.arange(12, dtype=torch.int32),
            "floats": torch.arange(12.0),
            "bools": torch.ones(12, dtype=torch.bool),
            "2**40": torch.arange(12) + 2**40,
            "too few": torch.arange(11, dtype=torch.int32),
        }.items()
    },
    "LoLDU that says it is portable": native(_LOLDU, [group("loldu")], portable=True),
    "LoLDU that says it is not portable": native({**_LOLDU, **_FACTORS}, [group("loldu")]),
    "LoLDU portable without an order": native({"a.shift": ones(2), **_FACTORS}, [group("loldu")], portable=True),
    "LoKr of a large prime": native(_KRON, [group("lokr", {"factor": -1}, {"a": [_PRIME, 1, [], 1]})]),
    "OFT of a large prime": native(_SKEW, [group("oft", {"block_size": 10**18}, {"a": [_PRIME, 1, [], 1]})]),
    **{
        f"fingerprints {name}": native(base=base)
        for name, base in {
            "too short": {"a": prints(1.0, 2)},
            "too long": {"a": prints(1.0, 1000)},
            "of none": {"a": ""},
            "of NaN": {"a": prints(NAN)},
            "of infinity": {"a": prints(INF)},
            "of zeros": {"a": prints(0.0)},
            "that are not base64": {"a": "!!!"},
            "of 3 bytes": {"a": "YWJj"},
            "of integers": {"a": 5},
            "of another weight": {"zz": prints(0.0)},
            "outside ASCII": {"a": "é"},
        }.items()
    },
    "a weight in two groups": native(groups=[group(), group(options={"rank": 2, "alpha": 9})]),
    "a weight twice in one group": _edited('"weights": {', '"weights": {"a": [12, 8, [], 1], '),
    "groups twice": _edited('"groups":', '"groups": [], "groups":'),
    "a weight inside a weight": native(
        {**_UP, "a.up.up": ones(12, 2), "a.up.down": ones(2, 8)},
        [group(weights={"a": [12, 8, [], 1], "a.up": [12, 8, [], 1]})],
    ),
    "no weights": native(groups=[]),
    "a tensor missing": native({"a.up": ones(12, 2)}),
    "tensors too many": native({**_UP, "a.more": ones(1), "more": ones(1)}),
    "no tensor of its own": native({"more": ones(1)}),
    "integers": native({**_UP, "a.up": ones(12, 2, dtype=torch.int8)}),
    "NaN": native({**_UP, "a.up": ones(12, 2, by=NAN)}),
    "fp4": native({**_UP, "a.up": ("F4", [12, 2], bytes(12))}),
    "numbers beyond fp32": native({**_UP, "a.up": ones(12, 2, dtype=torch.float64) * 1e300}),
    **{f"the name {name[:9]!r}": native(name=name) for name in ("../../x", "a\x1b[2J", "\ud800", "x" * 99_999, "a.b")},
}  # fmt: skip


# -- PEFT's folders --------------------------------------------------------------------------------------------------

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_B, _A = "base_model.model.a.lora_B.weight", "base_model.model.a.lora_A.weight"
_PAIR: dict[str, Entry] = {_B: ones(12, 2), _A: ones(2, 8)}
_PEFT_KRON: dict[str, Entry] = {f"base_model.model.{key}": entry for key, entry in _LOKR.items()}
_R: dict[str, Entry] = {"base_model.model.a.oft_R.weight": torch.linspace(-0.1, 0.1, 12).reshape(2, 6)}
_OFT = {"peft_type": "OFT", "r": 0, "oft_block_size": 4}
_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


def peft(config: Any = None, tensors: Mapping[str, Entry] | None = None, **over: Any) -> Files:
    value = {**_CONFIG, **over} if config is None else config
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return {CONFIG: text, WEIGHTS: safetensors(_PAIR if tensors is None else tensors)}


_PATTERNS: tuple[Any, ...] = (
    *(5, "x", ["a"], {"a": "x"}, {"a": None}, {"a": [1]}, {"a": NAN}, {"a": 10**400}, {"": 3}, {"\n": 1}),
    *({p: 1} for p in ("(", ")", "a)(", "\\", "a{99999999999}", "(?P<x>a)(?P<x>b)", "[[a]", "(?i)a", "a" * 100_000)),
    *(
        {p: 1}
        for p in ("(" * 5000 + ")" * 5000, "((a{1,500}){1,500}){1,500}", "(a+)+$b", "(.*)*b", "(?=a)*", "a||b&&c")
    ),
)
PEFT: dict[str, Files] = {
    **{
        f"the configuration {text[:24]!r}": peft(text)
        for text in (
            *(b"", b"null", b"[]", b"5", b'"x"', b"{", b"\xff\xfe", b"\xef\xbb\xbf{}", b"NaN"),
            *(b"[" * 100_000, b'{"a":' * 100_000, b'{"peft_type":"LORA","r":1e999,"lora_alpha":NaN}'),
            *(b'{"peft_type":"LORA","r":' + n + b',"lora_alpha":2}' for n in (b"9" * 5000, b"1" + b"0" * 400)),
        )
    },
    **{
        f"{key} {str(value)[:40]!r}": peft(**{key: value})
        for key, values in {
            "peft_type": (None, 5, [], {}, "zz", "lora", "LOHA", "LOKR", "OFT", "BOFT", "IA3"),
            "r": (0, -1, None, "2", 2.5, True, [2], {}, 10**18, 10**400, NAN),
            "lora_alpha": (None, "2", True, [], {}, 1e308, 10**400, NAN, INF),
            "alpha_pattern": _PATTERNS,
            "rank_pattern": _PATTERNS,
            "use_rslora": ("no", 5, []),
            "fan_in_fan_out": (True, "x"),
            "init_lora_weights": ("pissa", 5, [], {}),
            "use_dora": (True, "x"),
            "layer_replication": ([[0, 1]], 5),
            "target_modules": (5, [5], {}),
        }.items()
        for value in values
    },
    "no r": peft({"peft_type": "LORA", "lora_alpha": 2}),
    "an empty configuration": peft({}),
    "LoKr without r": peft({"peft_type": "LOKR", "alpha": 2, "rank_pattern": {"a": 2}}, _PEFT_KRON),
    "LoKr kept transposed": peft({"peft_type": "LOKR", "r": 2, "alpha": 2, "fan_in_fan_out": True}, _PEFT_KRON),
    **{
        f"OFT with {key} {str(value)[:20]!r}": peft({**_OFT, "coft": key == "eps", key: value}, _R)
        for key, values in {
            "num_cayley_neumann_terms": (None, "x", 0, -1, 1, INF, NAN, 10**9, 10**30, [], True, 2.5),
            "eps": (None, "x", 0, -1, NAN, INF, [], 10**400),
            "use_cayley_neumann": (None, "x", 0),
            "block_share": (True, "x"),
            "oft_block_size": (0, -1, 5, "x", None),
        }.items()
        for value in values
    },
    **{
        f"oft_R of {name}, coft {coft}": peft({**_OFT, "coft": coft}, {"base_model.model.a.oft_R.weight": entry})
        for coft in (False, True)
        for name, entry in {
            "a scalar": torch.tensor(1.0),
            "a vector": ones(6),
            "a cube": ones(2, 6, 1),
            "no triangle": ones(2, 5),
            "no blocks": ones(0, 6),
            "empty blocks": ones(2, 0),
            "2**62 entries of nothing": ("F32", [0, 2**62], b""),
            "NaN": ones(2, 6, by=NAN),
        }.items()
    },
    **{
        f"ia3_l of shape {shape}": peft({"peft_type": "IA3"}, {"base_model.model.a.ia3_l": ones(*shape)})
        for shape in ((), (12,), (12, 1), (3, 4), (1, 12, 1, 1), (0, 1), (1, 0))
    },
    "ia3_l of integers": peft({"peft_type": "IA3"}, {"base_model.model.a.ia3_l": ones(1, 8, dtype=torch.int8)}),
    "LoRA that says it is (IA)³": peft({"peft_type": "IA3"}),
    "LoRA that says it is OFT": peft(_OFT),
    "a stray tensor": peft(tensors={**_PAIR, "stray": ones(1)}),
    "a root": peft(tensors={key.replace(".a.", "."): entry for key, entry in _PAIR.items()}),
    "a pattern that backtracks for ever": peft(
        {**_CONFIG, "alpha_pattern": {"(x+x+)+y": 1}},
        {f"base_model.model.{'x' * 40}.{key[-13:]}": entry for key, entry in _PAIR.items()},
    ),
    "no configuration": {WEIGHTS: safetensors(_PAIR)},
    "no weights": {CONFIG: json.dumps(_CONFIG).encode()},
    "only a pickle": {CONFIG: json.dumps(_CONFIG).encode(), "adapter_model.bin": b"\x80\x02}."},
    "empty weights": {CONFIG: json.dumps(_CONFIG).encode(), WEIGHTS: b""},
    "a pickle called weights": {CONFIG: json.dumps(_CONFIG).encode(), WEIGHTS: b"\x80\x02}."},
    "nothing": {},
    "junk": {"README.md": b"x"},
}  # fmt: skip


# -- checkpoints -----------------------------------------------------------------------------------------------------

_MODEL: dict[str, Entry] = {"a.weight": ones(12, 8), "a.bias": ones(12)}
BASES: dict[str, bytes] = {
    **{
        f"a weight {name}": safetensors({"a.weight": entry})
        for name, entry in {
            "of a scalar": torch.tensor(1.0),
            "of a vector": ones(12),
            "of no rows": ones(0, 8),
            "of no columns": ones(12, 0),
            "of 2**124 entries of nothing": ("F32", [2**62, 2**62, 0], b""),
            "of 64 dimensions": ("F32", [12, 8] + [1] * 62, bytes(4 * 96)),
            "of another shape": ones(8, 12),
            "of fp4": ("F4", [12, 8], bytes(48)),
            "of an unknown dtype": ("F99", [12, 8], bytes(48)),
            "of NaN": ones(12, 8, by=NAN),
            "of infinity": ones(12, 8, by=INF),
            "of int8": ones(12, 8, dtype=torch.int8),
            "of bools": ones(12, 8, dtype=torch.bool),
            "of fp8": ones(12, 8, dtype=torch.float8_e4m3fn),
            "beyond fp16": ones(12, 8, by=1e30),
        }.items()
    },
    **{
        f"a stranger {name}": safetensors({**_MODEL, **more})
        for name, more in {
            "of a scalar": {"z.weight": torch.tensor(1.0)},
            "of a scalar projection": {"z.in_proj_weight": torch.tensor(1.0)},
            "of a projection of 1 row": {"z.in_proj_weight": ones(1, 8)},
            "of 2**124 entries of nothing": {"z.weight": ("F32", [2**62, 2**62, 0], b"")},
            "of an unknown dtype": {"z.weight": ("F99", [12, 8], b"")},
            "of a dtype that is a lone surrogate": {"z.weight": ("\ud800", [12, 8], b"")},
            "with a lone surrogate": {"\ud800.weight": ones(1)},
            "of the same name": {"unet.a.weight": ones(12, 8)},
            "without a name": {"": ones(1)},
            "of dots": {"...weight": ones(1, 1)},
            "with 50,000 letters": {"a" * 50_000 + ".weight": ones(1, 1)},
        }.items()
    },
    "metadata with a lone surrogate": safetensors(_MODEL, {"x": "\ud800"}),
    "metadata of an adapter": safetensors(_MODEL, {"peftkit": "{}"}),
    "a root": safetensors({"weight": ones(12, 8)}),
}

INDEX = "model.safetensors.index.json"


def index(where: Any) -> bytes:
    return json.dumps({"metadata": {"total_size": 384}, "weight_map": where}).encode()


_ONE, _TWO = safetensors({"a.weight": ones(12, 8)}), safetensors({"a.bias": ones(12)})
BASE_FOLDERS: dict[str, Files] = {
    **{
        f"an index of {text[:30]!r}": {"1.safetensors": _ONE, INDEX: text}
        for text in (
            *(b"", b"null", b"[]", b"5", b"{", b"{}", b"\xff", b"[" * 100_000, b'{"weight_map":' * 100_000),
            *(index(where) for where in (None, 5, [], {}, {"a.weight": 5}, {"a.weight": ["1.safetensors"]}, "x")),
        )
    },
    **{
        f"an index that names {name[:30]!r}": {"1.safetensors": _ONE, INDEX: index({"a.weight": name})}
        for name in (
            *("../sound.safetensors", "/etc/passwd", "/tmp/x.safetensors", "..", "", ".", "./1.safetensors", "~"),
            *("sub/1.safetensors", "1.safetensors\0", "1\0.safetensors", ".safetensors", "gone.safetensors", "1.bin"),
            *("1.safetensors/", "C:\\1.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors", INDEX),
        )
    },
    "an index of another model": {"1.safetensors": _ONE, INDEX: index({"zz": "1.safetensors"})},
    "an index with too little": {"1.safetensors": safetensors(_MODEL), INDEX: index({"a.weight": "1.safetensors"})},
    "two indices": {"1.safetensors": _ONE, INDEX: index({"a.weight": "1.safetensors"}), f"x{INDEX}": index({})},
    "two models": {"1.safetensors": _ONE, "2.safetensors": _TWO},
    "a tensor in two shards": {
        "1.safetensors": _ONE, "2.safetensors": _ONE, INDEX: index({"a.weight": "1.safetensors", "x": "2.safetensors"}),
    },
    "an index beside an index of something else": {
        "1.safetensors": _ONE, INDEX: index({"a.weight": "1.safetensors"}), f"old/{INDEX}": index({"z": "9"}),
    },
    "an index beside one that is junk": {
        "1.safetensors": _ONE, INDEX: index({"a.weight": "1.safetensors"}), f"old/{INDEX}": b"junk",
    },
    "a shard that is junk": {"1.safetensors": b"\xff" * 99, INDEX: index({"a.weight": "1.safetensors"})},
    "a shard that is a pickle": {"1.safetensors": b"\x80\x02}.", INDEX: index({"a.weight": "1.safetensors"})},
    "nothing": {},
    "no model": {"config.json": b"{}"},
    "a pipeline of nothing": {"model_index.json": b"{}"},
    "a pipeline of junk": {"model_index.json": b"junk", "unet/d.safetensors": b"junk"},
    "a pipeline of two": {"model_index.json": b"{}", "unet/d.safetensors": _ONE, "vae/d.safetensors": _TWO},
    "a pipeline of one name": {
        "model_index.json": b"{}",
        "x/d.safetensors": safetensors({"y.weight": ones(12, 8)}),
        "x.y/d.safetensors": safetensors({"weight": ones(12, 8)}),
    },
    "a pipeline of odd files": {
        "model_index.json": b"\xff", "unet/d.safetensors": _ONE, "unet/.hidden": b"", "x.tmp": b"", "vae/x.bin": b"x",
    },
    "a pipeline with two in a component": {
        "model_index.json": b"{}", "unet/d.safetensors": _ONE, "unet/d.fp16.safetensors": _ONE,
    },
}  # fmt: skip


# -- pickles ---------------------------------------------------------------------------------------------------------


class Evil:
    """What a pickle can do when it is unpickled: here, make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def saved(value: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def zipped(data: bytes) -> bytes:
    """What torch.save writes, around any pickle, compressed."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def old(body: bytes) -> bytes:
    """The format torch wrote before it wrote archives."""
    parts = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in parts) + body


_OPS = (
    *(b"", b"\x80", b"\x80\x09.", b"\x80\x02", b"\x80\x02.", b"\x80\x02K", b"\x80\x02J\1", b"\x80\x02X\1"),
    *(b"\x80\x02u.", b"\x80\x02(.", b"\x80\x02s.", b"\x80\x02a.", b"\x80\x02R.", b"\x80\x02Q.", b"\x80\x02h\5."),
    *(b"\x80\x02N.", b"\x80\x02]Ns.", b"\x80\x02}]Ns.", b"\x80\x02\x8a\xff", b"\x80\x02X\2\0\0\0\xff\xff."),
    *(b"\x80\x02K\5.", b"\x80\x02cos\nsystem\n.", b"\x80\x02cbuiltins\neval\nX\1\0\0\x001\x85R."),
    *(b"\x80\x02NQ.", b"\x80\x02ctorch\nNothing\n."),
    *(b"\x80\x02ctorch\nTensor\n)R.", b"\x80\x02ctorch\nTensor\n)\x81.", b"\x80\x02ctorch\nSize\n]K\1a\x85R."),
    *(b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", b"\x80\x02ctorch\ndevice\nX\3\0\0\0zzz\x85R."),
    *(b"\x80\x02ccollections\nOrderedDict\n)R}b.", b"\x80\x02ccollections\nOrderedDict\n]]a\x85R."),
    *(b"\x80\x02cbuiltins\nset\n]]a\x85R.", b"\x80\x02cbuiltins\nbytearray\n\x8a\6\0\0\0\0\0\1\x85R."),
    *(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", b"\x80\x02X\xff\xff\xff\x7fabc."),
    b"\x80\x02\x8b\xff\xff\xff\x7f.",
)  # fmt: skip


def pickles() -> dict[str, bytes]:
    """Pickles that run nothing and are not what they should be, read as data."""
    up, down = LORA.values()
    odd = {
        "sparse": lambda shape: ones(*shape).to_sparse(),
        "on no device": lambda shape: torch.empty(shape, device="meta"),
        "complex": lambda shape: ones(*shape, dtype=torch.complex64),
        "of 16 unsigned bits": lambda shape: ones(*shape).to(torch.uint16),
        "that trains": lambda shape: nn.Parameter(ones(*shape)),
        "of one number": lambda shape: torch.zeros(()).expand(*shape),
    }
    return {
        **{f"an adapter {name}": saved({**LORA, "a.lora_up.weight": make((12, 2))}) for name, make in odd.items()},
        **{f"a model {name}": saved({"a.weight": make((12, 8)), "a.bias": ones(12)}) for name, make in odd.items()},
        "an alpha on no device": saved({**LORA, "a.alpha": torch.empty((), device="meta")}),
        "a model transposed in memory": saved({"a.weight": ones(8, 12).T}),
        "a model of a scalar": saved({"a.weight": torch.tensor(1.0)}),
        "more than tensors": saved({**LORA, "epoch": 5}),
        "a state_dict in a dictionary": saved({"state_dict": LORA, "epoch": 5}),
        "a dictionary in a dictionary": saved({"x": LORA}),
        "names that are numbers": saved({1: up, "1": down}),
        "names that are bytes": saved({b"a": up}),
        "a name that is a lone surrogate": saved({"\ud800.weight": up}),
        **{f"a pickle of {type(x).__name__}": saved(x) for x in ([up], up, None, {}, 5, "x")},
        "an old file": saved(LORA, _use_new_zipfile_serialization=False),
        "safetensors": GOOD,
        "an archive of nothing": b"PK\x03\x04" + bytes(100),
        "a tape of nothing": bytes(10_240),
        "text": b"hello",
        **{f"{ops[:24]!r}": ops for ops in _OPS},
        **{f"an archive of {ops[:24]!r}": zipped(ops) for ops in _OPS},
        **{f"an old file of {ops[:24]!r}": old(ops) for ops in _OPS[:12]},
    }


def evil(marker: Path) -> dict[str, bytes]:
    """Pickles that make a folder where they are unpickled."""
    bad = Evil(marker)
    return {
        "an archive": saved({"a.weight": ones(12, 8), "b": bad}),
        "an old file": saved({"a.weight": ones(12, 8), "b": bad}, _use_new_zipfile_serialization=False),
        "an archive of nothing else": zipped(pickle.dumps(bad, 2)),
        **{f"protocol {protocol}": pickle.dumps({"a.weight": bad}, protocol) for protocol in range(6)},
        "old header, new body": old(pickle.dumps(bad, 2)),
    }


# -- bombs: small files that claim to be large -----------------------------------------------------------------------

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
        config = {**_CONFIG, "r": 1, "alpha_pattern": patterns, "rank_pattern": patterns}
        (path / CONFIG).write_text(json.dumps(config))
        keys = (f"base_model.model.blocks.{i}.to_q.lora_{x}.weight" for i in range(count) for x in "AB")
        (path / WEIGHTS).write_bytes(safetensors({key: ("F32", [1, 1], bytes(4)) for key in keys}))

    return make


def _with_a_large_neighbour(path: Path) -> None:
    path.mkdir()
    (path / "model.safetensors").write_bytes(_BASE)
    with (path / "model.onnx").open("wb") as file:
        file.truncate(400 * MB)


def bombs() -> dict[str, Bomb]:
    head = [group("loldu", {"rank": 2}, {"a": [3 * 10**7, 8, [], 1]})]
    wide = torch.zeros(1).expand(12_000, 12_000)
    lora = {"a.lora_up.weight": ones(2**20, 1), "a.lora_down.weight": ones(1, 2**20)}
    return {
        **{f"rank {rank:g}": Bomb(native(groups=[group(options={"rank": rank})])) for rank in (10**9, 10**15, 10**18)},
        "an order of 3e7 rows": Bomb(native({**_LOLDU, **_FACTORS}, head, portable=True)),
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
        "a name of 60,000 dots": Bomb(native({**_UP, "." * 60_000: ones(1)}), ("read", "load")),
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
        "an archive of 400 MB of zeros": Bomb(
            zipped(b"\x80\x02X" + struct.pack("<I", 400 * MB) + bytes(400 * MB) + b"."), ("read",), "bomb.pt",
            options={"allow_pickle": True},
        ),
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


if __name__ == "__main__":
    measured = [m.__dict__ for m in measure(Path(sys.argv[1]))]
    text = json.dumps(measured)
    sys.stdout.write(re.sub(r"\\ud[89a-f]..", "?", text))
