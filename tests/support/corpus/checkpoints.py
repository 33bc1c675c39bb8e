"""Malformed checkpoints: files, and folders of shards."""

from __future__ import annotations

import json
from typing import Any

import torch

from .build import INF, NAN, Entry, Files, ones, safetensors

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
