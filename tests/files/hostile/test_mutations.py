"""Mutations of sound files are read right or refused."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import peftkit as pk
from tests.support import corpus
from tests.support.bounds import put, require_law
from tests.support.corpus import (
    ADAPTER_VERBS,
    BASE_VERBS,
    GOOD,
    INDEX,
    Entry,
    Files,
    Place,
    Verb,
    ones,
    pair,
    safetensors,
)
from tests.support.zoo import ADAPTERS, train


@cache
def sound() -> dict[str, bytes]:
    """Files of several formats and kinds, for `Pair`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        found = {"kohya lora": GOOD, "base": corpus.model_file(pair())}
        for case in ("lora", "loha tucker", "lokr", "dora", "oft", "loldu", "ia3 in", "glora"):
            model = pair()
            targets = ["a"] if case == "glora" else ["a", "c"] if "tucker" not in case else ["c"]
            pk.wrap(model, ADAPTERS[case].kind, targets=targets, **ADAPTERS[case].options)
            train(model)
            pk.save(model, path)
            found[f"native {case}"] = path.read_bytes()
            if case not in ("loldu", "glora", "ia3 in"):
                pk.export(model, path, "lycoris")
                found[f"kohya {case}"] = path.read_bytes()
    return found


FUZZED = ("read", "inspect", "doctor", "load", "load loosely", "merge_checkpoint", "rescale")
ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 8, 12, 64, 2**31, 2**62, 2**63, 2**80, 10**400, 0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "x", "a", "F32", "F16", "I64", "\0", "\ud800", "lora", "dora", [], [0], [[]]),
    *([1, 2], {}, {"a": 1}, {"rank": 2}, [8, 12, [], 1], "9" * 5000, "(", "(a+)+$"),
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from nodes(child, (*path, key))


@st.composite
def edited(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one to three of its parts replaced, removed, doubled or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(nodes(value))))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        how, key = draw(st.sampled_from(("replace", "replace", "remove", "double", "rename"))), path[-1]
        if how == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(ODD)))
        elif how == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key]))
        else:
            others = ["", "a", "x.alpha", "__metadata__", "rank", f"{key}.", f"{key}x", *parent]
            parent[draw(st.sampled_from(others))] = copy.deepcopy(parent[key]) if how == "double" else parent.pop(key)
    return value


def fuzz(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


def _require_law_of(content: bytes | Files, verbs: Mapping[str, Verb], name: str = "hostile.safetensors") -> None:
    with tempfile.TemporaryDirectory() as folder:
        at = Place(Path(folder))
        path = at.folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            put(path, content)
        require_law(path, at, verbs)


def _adapter_verbs(*names: str) -> dict[str, Verb]:
    return {name: ADAPTER_VERBS[name] for name in names}


@fuzz(120)
@given(st.data())
def test_a_file_with_other_bytes_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(sound())))
    content = bytearray(sound()[name])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(len(content) - 1, 900)) | st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(("set", "set", "set", "remove", "insert", "cut")))
        if how == "set":
            content[at] = data.draw(st.integers(0, 255) | st.sampled_from(b'0123456789",:{}[]'))
        elif how == "remove":
            del content[at : at + data.draw(st.integers(1, 9))]
        elif how == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif at:
            del content[at:]
    verbs = BASE_VERBS if name == "base" else _adapter_verbs(*FUZZED)
    _require_law_of(bytes(content), verbs)


@fuzz(150)
@given(st.data())
def test_a_file_with_another_header_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(sound())))
    head, rest = corpus.header_of(sound()[name])
    changed = data.draw(edited(head))
    content = corpus.with_header(json.dumps(changed).encode(), rest)
    _require_law_of(content, BASE_VERBS if name == "base" else _adapter_verbs(*FUZZED))


@fuzz(250)
@given(st.data())
def test_a_native_header_that_says_something_else_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name in sorted(sound()) if name.startswith("native")]))
    head, rest = corpus.header_of(sound()[name])
    changed = data.draw(edited(json.loads(head["__metadata__"]["peftkit"])))
    head["__metadata__"]["peftkit"] = json.dumps(changed)
    _require_law_of(corpus.with_header(json.dumps(head).encode(), rest), _adapter_verbs(*FUZZED))


_CONFIGS: tuple[tuple[dict[str, Any], dict[str, Entry]], ...] = (
    (
        {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {"a": 1}, "rank_pattern": {"a": 2}},
        {f"base_model.model.a.lora_{x}.weight": ones(*s) for x, s in (("B", (12, 2)), ("A", (2, 8)))},
    ),
    (
        {"peft_type": "OFT", "r": 0, "oft_block_size": 4, "coft": True, "eps": 1e-5, "num_cayley_neumann_terms": 5},
        {"base_model.model.a.oft_R.weight": ones(2, 6, by=0.1)},
    ),
    (
        {"peft_type": "LOKR", "r": 2, "alpha": 2, "alpha_pattern": {}, "rank_pattern": {"a": 2}},
        {"base_model.model.a.lokr_w1": ones(2, 2), "base_model.model.a.lokr_w2": ones(6, 4)},
    ),
    (
        {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 2, "rank_pattern": {"a": [True, True]}},
        {f"base_model.model.a.lora_{x}": ones(*s) for x, s in (("B", (12, 2)), ("E", (2, 1)), ("A", (2, 8)))},
    ),
    (
        {"peft_type": "MISS", "r": 2, "mini_r": 3, "init_weights": "mini"},
        {"base_model.model.a.miss_block": ones(2, 3)},
    ),
    (
        {"peft_type": "MISS", "r": 2, "init_weights": "bat"},
        {"base_model.model.a.miss_block": ones(6, 2, 2)},
    ),
)


@fuzz(100)
@given(st.data())
def test_another_configuration_of_peft_is_read_right_or_refused_by_name(data: st.DataObject) -> None:
    config, tensors = data.draw(st.sampled_from(_CONFIGS))
    verbs = _adapter_verbs("read", "doctor", "load", "merge_checkpoint")
    _require_law_of(corpus.peft(data.draw(edited(config)), tensors), verbs, "hostile")


@fuzz(50)
@given(st.data())
def test_another_index_is_followed_right_or_refused_by_name(data: st.DataObject) -> None:
    where = {"a.weight": "1.safetensors", "a.bias": "2.safetensors"}
    shards = {
        "1.safetensors": safetensors({"a.weight": ones(12, 8)}),
        "2.safetensors": safetensors({"a.bias": ones(12)}),
    }
    changed = data.draw(edited(json.loads(corpus.index(where))))
    some = {name: BASE_VERBS[name] for name in ("merge_checkpoint", "extract from itself")}
    _require_law_of({**shards, INDEX: json.dumps(changed).encode()}, some, "hostile")
