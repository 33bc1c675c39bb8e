"""Malformed adapters in this library's own format."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from typing import Any

import torch

import peftkit as pk
from peftkit.adapters import registry

from .build import INF, NAN, Entry, header_of, ones, safetensors, with_header

UP_DOWN: dict[str, Entry] = {"a.up": ones(12, 2), "a.down": ones(2, 8)}


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
    return safetensors(UP_DOWN if tensors is None else tensors, {"peftkit": json.dumps(value)})


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
LOLDU_TENSORS: dict[str, Entry] = {
    "a.order": torch.arange(12, dtype=torch.int32),
    "a.dead": torch.zeros(2, 2, dtype=torch.bool),
    "a.start": ones(2),
    "a.shift": ones(2),
    "a.scale_shift": torch.zeros(1),
}
BASE_FACTORS: dict[str, Entry] = {"a.left": ones(12, 2), "a.right": ones(2, 8)}
_PRIME = 999_999_999_999_999_989

NATIVE: dict[str, bytes] = {
    **{
        f"a header of {text[:8]!r}": safetensors(UP_DOWN, {"peftkit": text})
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
                UP_DOWN,
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
                LOLDU_TENSORS,
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
        f"LoLDU with an order of {name}": native({**LOLDU_TENSORS, "a.order": order}, [group("loldu")])
        for name, order in {
            "zeros": torch.zeros(12, dtype=torch.int32),
            "negatives": -torch.arange(12, dtype=torch.int32),
            "floats": torch.arange(12.0),
            "bools": torch.ones(12, dtype=torch.bool),
            "2**40": torch.arange(12) + 2**40,
            "too few": torch.arange(11, dtype=torch.int32),
        }.items()
    },
    "LoLDU that says it is portable": native(LOLDU_TENSORS, [group("loldu")], portable=True),
    "LoLDU that says it is not portable": native({**LOLDU_TENSORS, **BASE_FACTORS}, [group("loldu")]),
    "LoLDU portable without an order": native({"a.shift": ones(2), **BASE_FACTORS}, [group("loldu")], portable=True),
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
        {**UP_DOWN, "a.up.up": ones(12, 2), "a.up.down": ones(2, 8)},
        [group(weights={"a": [12, 8, [], 1], "a.up": [12, 8, [], 1]})],
    ),
    "no weights": native(groups=[]),
    "a tensor missing": native({"a.up": ones(12, 2)}),
    "tensors too many": native({**UP_DOWN, "a.more": ones(1), "more": ones(1)}),
    "no tensor of its own": native({"more": ones(1)}),
    "integers": native({**UP_DOWN, "a.up": ones(12, 2, dtype=torch.int8)}),
    "NaN": native({**UP_DOWN, "a.up": ones(12, 2, by=NAN)}),
    "fp4": native({**UP_DOWN, "a.up": ("F4", [12, 2], bytes(12))}),
    "numbers beyond fp32": native({**UP_DOWN, "a.up": ones(12, 2, dtype=torch.float64) * 1e300}),
    **{f"the name {name[:9]!r}": native(name=name) for name in ("../../x", "a\x1b[2J", "\ud800", "x" * 99_999, "a.b")},
}  # fmt: skip
