"""How checkpoints keep quantised weights: ComfyUI and transformers in fp8, bitsandbytes in 4 and 8 bits, torchao."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from peftkit.errors import FileError, UnsupportedLayerError, require_file
from peftkit.files.base import Base
from peftkit.files.formats import container, strict_json
from peftkit.wrapping.bases.bitsandbytes import EightBit, FourBit
from peftkit.wrapping.bases.fp8 import FineGrainedFP8
from peftkit.wrapping.bases.torchao import TorchAO

#: the entry by which ComfyUI knows a file of scaled fp8 weights
MARK = "scaled_fp8"
#: the scale beside a weight: of ComfyUI, of compressed-tensors, of transformers and DeepSeek
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv", "scale")
#: what else such a layer has: how its input is quantised, and how its weight was
_BESIDE = ("scale_input", "input_scale", "activation_scale", "comfy_quant")
_FOUR_BIT = ".quant_state.bitsandbytes__"
#: the dtypes that a weight of 4 bits can have had
_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
#: the side of DeepSeek's blocks, which have a scale each
_BLOCK = 128


@dataclass(frozen=True)
class Stored:
    """How a checkpoint keeps one quantised weight.

    Attributes:
        title: what the format is called.
        keys: the tensors of the base that the weight is made of or that belong to it; in place of the first of them
            stands the plain weight.
        shape: of the weight.
        dtype: that it is dequantised to.
        read: returns the weight, dequantised.
    """

    title: str
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


def stored_weights(base: Base) -> dict[str, Stored]:
    """Return the quantised weights of a base that can be read, by the names that plain weights would have."""
    found: dict[str, Stored] = {}
    marked = tuple(key.removesuffix(MARK) for key in base.where if key.rpartition(".")[2] == MARK)
    blocks = _Blocks(base)
    for key in base.where:
        stored = _four_bit(base, key) or _eight_bit(base, key) or _scaled(base, key, marked, blocks)
        if stored is not None:
            found[key] = stored
    for home, (shard, prefix) in base.shards.items():
        found |= dict(_torchao(base, home, shard.metadata, prefix))
    return found


# -- numbers under scales -------------------------------------------------------------------------------------------


class _Blocks:
    """The rows and columns that a scale is of, as the configurations of a folder say it."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._known: dict[str, tuple[int, int] | None] = {}

    def of(self, key: str) -> tuple[int, int] | None:
        """Return the block of a weight, None where no configuration says it."""
        home = str(PurePosixPath(self._base.where[key][0]).parent)
        if home not in self._known:
            self._known[home] = self._read(self._base.path / home / "config.json") if self._base.folder else None
        return self._known[home]

    def _read(self, path: Path) -> tuple[int, int] | None:
        config = strict_json.read_json(path) if os.path.isfile(path) else None
        quantised = config.get("quantization_config") if isinstance(config, dict) else None
        block = quantised.get("weight_block_size") if isinstance(quantised, dict) else None
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            return None
        return block[0], block[1]


def _scaled(base: Base, key: str, marked: tuple[str, ...], blocks: _Blocks) -> Stored | None:
    """Numbers of 8 bits times a scale: one, one for a row, or one for a block."""
    info = base.info(key)
    path, _, last = key.rpartition(".")
    if info.dtype not in ("F8_E4M3", "F8_E5M2", "I8") or last in (*_SCALES, *_BESIDE, MARK):
        return None
    names = [f"{path}.{end}" for end in _SCALES] if last == "weight" else []
    scale = next((name for name in (*names, f"{key}_scale_inv", f"{key}_scale") if name in base.where), None)
    if f"{key}_zero_point" in base.where or (scale is None and (info.dtype == "I8" or not key.startswith(marked))):
        return None
    beside = [f"{path}.{end}" for end in _BESIDE]
    keys = (key, *([] if scale is None else [scale]), *(name for name in beside if name in base.where))
    scales = None if scale is None else base.info(scale)
    layout = _layout(info.shape, () if scales is None else scales.shape, blocks.of(key))
    if layout is None or (scales is not None and scales.dtype not in ("F32", "F16", "BF16")):
        raise UnsupportedLayerError(
            f"{key} of {base.path} is {info} under {scale}, {scales}, in which no scales of its rows or blocks can be "
            "read: merge into the 16-bit checkpoint that it was made of"
        )
    rows, block = layout

    def read() -> Tensor:
        numbers = base.tensor(key).reshape(rows, -1)
        values = torch.ones(()) if scale is None else base.tensor(scale)
        values = values.reshape(()) if block is None else values.reshape(-(-rows // block[0]), -1)
        return FineGrainedFP8(numbers, values, block, None).rows(0, rows)

    return Stored(f"{info.dtype} under {scale or MARK}", keys, info.shape, torch.float32, read)


def _layout(
    sizes: tuple[int, ...], scales: tuple[int, ...], known: tuple[int, int] | None
) -> tuple[int, tuple[int, int] | None] | None:
    """The rows of the matrix that a weight is read as, and the block of a scale, None for one of all of it.

    A stack of matrices (E, m, n) is read as (E·m, n). None if the scales fit no blocks.
    """
    if 0 in sizes or not sizes:
        return (1, None) if math.prod(scales) == 1 else None
    stack = sizes[0] if len(sizes) == 3 and len(scales) == 3 else 1
    rows = sizes[1] if stack > 1 else sizes[0]
    columns = math.prod(sizes) // (stack * rows)
    if math.prod(scales) == 1:
        return rows * stack, None
    if 0 in scales or math.prod(scales) % (scales[0] * (scales[1] if stack > 1 else 1)) or (scales[0] != stack > 1):
        return None
    down = scales[1] if stack > 1 else scales[0]
    across = math.prod(scales) // (stack * down)
    for block in (known, (_BLOCK, _BLOCK), (max(rows // down, 1), max(columns // across, 1))):
        if block is not None and (-(-rows // block[0]), -(-columns // block[1])) == (down, across):
            return (rows * stack, block) if stack == 1 or rows % block[0] == 0 else None
    return None


# -- bitsandbytes ---------------------------------------------------------------------------------------------------


def _eight_bit(base: Base, key: str) -> Stored | None:
    """int8 numbers with a scale for every row, as Linear8bitLt is saved."""
    path, info = key.removesuffix(".weight"), base.info(key)
    scale = f"{path}.SCB"
    if info.dtype != "I8" or scale not in base.where or path == key:
        return None
    if len(info.shape) != 2 or base.info(scale).shape != info.shape[:1]:
        raise FileError(f"{base.path}: {scale} is {base.info(scale)}, a scale for every row of {info} was expected")
    keys = (key, scale, *(name for name in (f"{path}.weight_format",) if name in base.where))
    rows = info.shape[0]
    return Stored(
        EightBit.title,
        keys,
        info.shape,
        torch.float32,
        lambda: EightBit(base.tensor(key), base.tensor(scale), None).rows(0, rows),
    )


def _four_bit(base: Base, key: str) -> Stored | None:
    """Two numbers in a byte, with a scale for every block, as Linear4bit is saved."""
    state = next((name for kind in ("nf4", "fp4") if (name := f"{key}{_FOUR_BIT}{kind}") in base.where), None)
    if state is None:
        return None
    names = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
    keys = (key, state, *(name for end in names if (name := f"{key}.{end}") in base.where))
    said = _state(base, key, state)

    def read() -> Tensor:
        make = _library("bitsandbytes", "bitsandbytes.functional", key, base).QuantState
        parts = {name.removeprefix(f"{key}."): base.tensor(name) for name in keys[1:]}
        packed = base.tensor(key)
        return FourBit(packed, make.from_dict(parts, packed.device)).rows(0, said.shape[0])

    return Stored(FourBit.title, keys, said.shape, said.dtype, read)


@dataclass(frozen=True)
class _State:
    shape: tuple[int, ...]
    dtype: torch.dtype


def _state(base: Base, key: str, name: str) -> _State:
    """What a weight of 4 bits says of itself, in keeping with the tensors that it is made of."""
    where = f"{base.path}: {name}"
    said = strict_json.parse(bytes(base.tensor(name).flatten().view(torch.uint8).tolist()), where)
    require_file(isinstance(said, dict), where, "it is no JSON object")
    shape, block, nested = said.get("shape"), said.get("blocksize"), said.get("nested_blocksize")
    counts = [*(shape if isinstance(shape, list) else [None]), block]
    sound = all(type(n) is int and 0 < n < 2**40 for n in counts) and len(counts) == 3
    dtype = _FLOATS.get(said.get("dtype"))
    if not sound or dtype is None:
        raise FileError(f"{where}: its shape {shape}, blocksize {block} or dtype {said.get('dtype')} cannot be")
    numel = math.prod(shape)
    expected = {"absmax": -(-numel // block), "quant_map": 16}
    if f"{key}.nested_absmax" in base.where:
        require_file(type(nested) is int and nested > 0, where, "its nested_blocksize is none")
        expected |= {"nested_absmax": -(-expected["absmax"] // nested), "nested_quant_map": 256}
    held = {end: base.info(own).numel for end in expected if (own := f"{key}.{end}") in base.where}
    require_file(held == expected, where, f"its parts have {held} entries, {expected} were expected")
    size = base.info(key).size
    require_file(
        2 * size == numel + numel % 2, where, f"{key} has {size} bytes, {numel} numbers of 4 bits were expected"
    )
    return _State(tuple(shape), dtype)


# -- torchao --------------------------------------------------------------------------------------------------------


def _torchao(base: Base, home: str, metadata: Mapping[str, str], prefix: str) -> Iterator[tuple[str, Stored]]:
    """Yield the tensor subclasses that torchao has written in pieces, under `_weight_qdata` and the like."""
    if "tensor_names" not in metadata:
        return
    for name in _parsed(metadata["tensor_names"], home):
        module, _, last = str(name).rpartition(".")
        said = _parsed(metadata.get(str(name), "{}"), home)
        parts = said.get("_tensor_data_names") if isinstance(said, dict) else None
        if not isinstance(parts, list):
            continue
        start = f"{module}._{last}_" if module else f"_{last}_"
        keys = tuple(prefix + start + str(part) for part in parts)
        lost = next((key for key in keys if base.where.get(key, ("",))[0] != home), None)
        require_file(bool(keys) and lost is None, f"{base.path}: {home}", f"{name} of torchao has no {lost} in it")
        head = {str(name): metadata[str(name)], "tensor_names": json.dumps([name])}
        sketch = _whole(base, str(name), head, {k.removeprefix(prefix): _sketch(base, k) for k in keys})

        def read(name: str = str(name), head: dict[str, str] = head, keys: tuple[str, ...] = keys) -> Tensor:
            W = TorchAO(_whole(base, name, head, {key.removeprefix(prefix): base.tensor(key) for key in keys}))
            return W.rows(0, W.shape[0])

        yield prefix + str(name), Stored(f"torchao {said['_type']}", keys, tuple(sketch.shape), sketch.dtype, read)


def _parsed(text: str, where: str) -> Any:
    return strict_json.parse(text.encode(), f"what torchao says in the header of {where}")


def _sketch(base: Base, key: str) -> Tensor:
    info = base.info(key)
    dtype = container.DTYPES.get(info.dtype)
    require_file(dtype is not None, base.path, f"{key} is {info.dtype}, which this library does not read")
    return torch.empty(info.shape, dtype=dtype, device="meta")


def _whole(base: Base, name: str, head: Mapping[str, str], parts: Mapping[str, Tensor]) -> Any:
    """The tensor subclass that pieces make."""
    library = _library("torchao", "torchao.prototype.safetensors.safetensors_support", name, base)
    try:
        found, _ = library.unflatten_tensor_state_dict(dict(parts), dict(head))
        return found[name]
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError) as error:
        raise FileError(f"{base.path}: {name} is no tensor of torchao that its library can read: {error}") from error


def _library(name: str, module: str, key: str, base: Base) -> Any:
    """A module of a library that dequantises its own format."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedLayerError(
            f"{key} of {base.path} is quantised by {name}, which dequantises it and cannot be imported ({error}): "
            f'pip install "peftkit[{name}]"'
        ) from error
