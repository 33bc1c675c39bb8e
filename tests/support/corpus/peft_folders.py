"""Malformed folders of PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from .build import INF, NAN, Entry, Files, ones, safetensors
from .kohya_files import LOKR_TENSORS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_B, _A = "base_model.model.a.lora_B.weight", "base_model.model.a.lora_A.weight"
_PAIR: dict[str, Entry] = {_B: ones(12, 2), _A: ones(2, 8)}
_PEFT_KRON: dict[str, Entry] = {f"base_model.model.{key}": entry for key, entry in LOKR_TENSORS.items()}
_R: dict[str, Entry] = {"base_model.model.a.oft_R.weight": torch.linspace(-0.1, 0.1, 12).reshape(2, 6)}
_OFT = {"peft_type": "OFT", "r": 0, "oft_block_size": 4}
LORA_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}


def peft(config: Any = None, tensors: Mapping[str, Entry] | None = None, **over: Any) -> Files:
    value = {**LORA_CONFIG, **over} if config is None else config
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
        {**LORA_CONFIG, "alpha_pattern": {"(x+x+)+y": 1}},
        {f"base_model.model.{'x' * 40}.{key[-13:]}": entry for key, entry in _PAIR.items()},
    ),
    "no configuration": {WEIGHTS: safetensors(_PAIR)},
    "no weights": {CONFIG: json.dumps(LORA_CONFIG).encode()},
    "only a pickle": {CONFIG: json.dumps(LORA_CONFIG).encode(), "adapter_model.bin": b"\x80\x02}."},
    "empty weights": {CONFIG: json.dumps(LORA_CONFIG).encode(), WEIGHTS: b""},
    "a pickle called weights": {CONFIG: json.dumps(LORA_CONFIG).encode(), WEIGHTS: b"\x80\x02}."},
    "nothing": {},
    "junk": {"README.md": b"x"},
}  # fmt: skip
