"""Damaged safetensors containers."""

from __future__ import annotations

import json
from typing import Any

from .build import INF, NAN, ones, safetensors, with_header


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
