"""Pickles that are damaged, or that run code."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .build import ones
from .place import GOOD, LORA


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
