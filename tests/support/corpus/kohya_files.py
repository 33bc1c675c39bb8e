"""Malformed adapters in the spellings of kohya, LyCORIS and diffusers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from .build import INF, NAN, Entry, ones, safetensors
from .place import LORA


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
LOKR_TENSORS: dict[str, Entry] = {"a.lokr_w1": ones(2, 2), "a.lokr_w2": ones(6, 4)}
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
    "LoKr of a cube": {**LOKR_TENSORS, "a.lokr_w1": ones(2, 2, 2)},
    "LoKr of nothing": {**LOKR_TENSORS, "a.lokr_w1": ones(0, 2)},
    "LoKr of rank 0": {"a.lokr_w1": ones(2, 2), "a.lokr_w2_a": ones(6, 0), "a.lokr_w2_b": ones(0, 4), **_ALPHA},
    "LoKr of a small factor of rank 0": {
        "a.lokr_w1_a": ones(2, 0), "a.lokr_w1_b": ones(0, 2), "a.lokr_w2": ones(6, 4), **_ALPHA,
    },
    "LoKr of unlike ranks": {"a.lokr_w1_a": ones(2, 3), "a.lokr_w1_b": ones(2, 2), "a.lokr_w2": ones(6, 4)},
    "LoKr with both small factors": {**LOKR_TENSORS, "a.lokr_w1_a": ones(2, 2)},
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
