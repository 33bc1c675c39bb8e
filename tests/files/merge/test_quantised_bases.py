"""Checkpoints whose weights are quantised: merged into as plain weights where dtype= says so, refused otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, OptionError, QuantisedMergeError, UnsupportedLayerError
from tests.support.files import State, listing, load, load_folder, metadata, require_bits, sharded, write
from tests.support.hands import lora
from tests.support.numbers import close

SHAPE = (128, 192)
FP8 = torch.float8_e4m3fn
LAYERS = ("first", "second")


def weights() -> State:
    generator = torch.Generator().manual_seed(0)
    return {name: 0.1 * torch.randn(SHAPE, generator=generator) for name in LAYERS}


@dataclass(frozen=True)
class Quantised:
    """A checkpoint's tensors, what its weights are by the library's own word, and its header."""

    tensors: State
    plain: State
    header: dict[str, str]


def rest() -> State:
    return {"first.bias": torch.ones(SHAPE[0], dtype=torch.bfloat16), "norm.weight": torch.ones(4)}


def _fp8(scale_name: str, scales: Callable[[Tensor], Tensor], spread: Callable[[Tensor], Tensor]) -> Quantised:
    """Numbers under scales: N = W/s. scales: of a weight. spread: the scales over the whole weight."""
    tensors, plain = rest(), {}
    for name, W in weights().items():
        s = scales(W)
        N = (W / spread(s)).to(FP8)
        tensors |= {f"{name}.weight": N, f"{name}.{scale_name}": s}
        plain[name] = N.float() * spread(s)
    return Quantised(tensors, plain, {})


def comfyui() -> Quantised:
    found = _fp8("scale_weight", lambda W: W.abs().max() / 448, lambda s: s)
    beside = {f"{name}.scale_input": torch.ones(()) for name in LAYERS}
    return Quantised(found.tensors | beside | {"scaled_fp8": torch.empty(0, dtype=FP8)}, found.plain, {})


def comfyui_newer() -> Quantised:
    found = _fp8("weight_scale", lambda W: W.abs().max() / 448, lambda s: s)
    said = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    beside = {
        f"{name}.{end}": t for name in LAYERS for end, t in (("comfy_quant", said), ("input_scale", torch.ones(())))
    }
    return Quantised(found.tensors | beside, found.plain, {"_quantization_metadata": "{}"})


def per_row() -> Quantised:
    return _fp8("weight_scale", lambda W: W.abs().amax(1, keepdim=True) / 448, lambda s: s)


def _over(block: tuple[int, int]) -> Callable[[Tensor], Tensor]:
    return lambda s: s.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: SHAPE[0], : SHAPE[1]]


def _block_scales(W: Tensor, block: tuple[int, int]) -> Tensor:
    rows = [torch.stack([part.abs().max() for part in row.split(block[1], 1)]) for row in W.split(block[0])]
    return torch.stack(rows) / 448


def deepseek() -> Quantised:
    return _fp8("weight_scale_inv", lambda W: _block_scales(W, (128, 128)), _over((128, 128)))


def small_blocks() -> Quantised:
    return _fp8("weight_scale_inv", lambda W: _block_scales(W, (32, 64)), _over((32, 64)))


def bitsandbytes_4bit(kind: str, nested: bool, dtype: torch.dtype = torch.bfloat16) -> Quantised:
    library = pytest.importorskip("bitsandbytes")
    tensors, plain = rest(), {}
    for name, W in weights().items():
        layer = library.nn.Linear4bit(*SHAPE[::-1], bias=False, quant_type=kind, compress_statistics=nested)
        layer.load_state_dict({"weight": W.to(dtype)})
        layer = layer.to("cpu")
        tensors |= {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        plain[name] = library.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    return Quantised(tensors, plain, {})


def bitsandbytes_8bit() -> Quantised:
    tensors, plain = rest(), {}
    for name, W in weights().items():
        scales = W.abs().amax(1)
        numbers = (127 * W / scales[:, None]).round().to(torch.int8)
        tensors |= {
            f"{name}.weight": numbers,
            f"{name}.SCB": scales,
            f"{name}.weight_format": torch.zeros((), dtype=torch.uint8),
        }
        plain[name] = numbers.float() * (scales[:, None] / 127)
    return Quantised(tensors, plain, {})


def torchao(config: str, **options: Any) -> Quantised:
    quantization = pytest.importorskip("torchao.quantization")
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    model = nn.ModuleDict({name: nn.Linear(*SHAPE[::-1], bias=False) for name in LAYERS}).bfloat16()
    for name, W in weights().items():
        cast(nn.Linear, model[name]).weight.data.copy_(W)
    quantization.quantize_(model, getattr(quantization, config)(**options))
    own = {key: tensor.data for key, tensor in model.state_dict().items()}
    plain = {name: cast(Any, model[name]).weight.dequantize().float() for name in LAYERS}
    tensors, header = support.flatten_tensor_state_dict(own)
    return Quantised(rest() | tensors, plain, header)


CASES: dict[str, Callable[[], Quantised]] = {
    "fp8 of ComfyUI": comfyui,
    "fp8 of newer ComfyUI": comfyui_newer,
    "fp8 by rows": per_row,
    "fp8 of DeepSeek": deepseek,
    "fp8 in other blocks": small_blocks,
    "nf4": lambda: bitsandbytes_4bit("nf4", nested=False),
    "nf4, double": lambda: bitsandbytes_4bit("nf4", nested=True, dtype=torch.float16),
    "fp4": lambda: bitsandbytes_4bit("fp4", nested=False, dtype=torch.float32),
    "int8 of bitsandbytes": bitsandbytes_8bit,
    "int8 of torchao": lambda: torchao("Int8WeightOnlyConfig"),
    "fp8 of torchao": lambda: torchao("Float8WeightOnlyConfig"),
}


def hands() -> dict[str, Any]:
    return {name: lora(*SHAPE, seed=3 * i) for i, name in enumerate(LAYERS)}


def adapter(path: Path) -> Path:
    return write(path, {k: t for name, hand in hands().items() for k, t in hand.keyed(name).items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_quantised_base_is_merged_into_as_plain_weights(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    found = CASES[case]()
    base = write(tmp_path / "base.safetensors", found.tensors, found.header)
    file, out = adapter(tmp_path / "a.safetensors"), tmp_path / "out.safetensors"
    before = listing(tmp_path)
    with pytest.raises(QuantisedMergeError, match=r"pass dtype=torch\.bfloat16"):
        pk.merge_checkpoint(base, {file: 0.5}, out)
    assert listing(tmp_path) == before
    report = pk.merge_checkpoint(base, {file: 0.5}, out, dtype=dtype, verify=True)
    after = load(out)
    assert after.keys() == {"first.weight", "second.weight", "first.bias", "norm.weight"}
    assert {t.dtype for t in after.values()} == {dtype}
    for name, hand in hands().items():
        change = 0.5 * hand.delta(found.plain[name].double())
        close(
            after[f"{name}.weight"],
            (found.plain[name].double() + change).to(dtype),
            1e-2 if dtype.itemsize < 4 else 1e-6,
        )
    require_bits({k: after[k] for k in ("norm.weight",)}, {"norm.weight": torch.ones(4, dtype=dtype)})
    assert set(report.changed) == {"first.weight", "second.weight"} and report.survived is None
    assert report.lost < (0.1 if dtype.itemsize < 4 else 1e-5)
    assert not {"_quantization_metadata", "tensor_names", "first.weight"} & metadata(out).keys()


def test_the_report_is_that_of_merging_in_memory(tmp_path: Path) -> None:
    library = pytest.importorskip("bitsandbytes")
    found = bitsandbytes_4bit("nf4", nested=False)
    base, file = write(tmp_path / "base.safetensors", found.tensors), adapter(tmp_path / "a.safetensors")
    report = pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", dtype=torch.bfloat16)
    model = nn.ModuleDict()
    for name, W in weights().items():
        layer = library.nn.Linear4bit(*SHAPE[::-1], bias=False, quant_type="nf4", compress_statistics=False)
        layer.load_state_dict({"weight": W.bfloat16()})
        model[name] = layer.to("cpu")
    pk.load(model, file)
    ours = pk.merge(model, into="dequantised", dtype=torch.bfloat16, backup=None)
    for mine, theirs in zip(report.weights, ours.weights, strict=True):
        assert mine.norm == pytest.approx(theirs.norm, rel=1e-5)
        assert mine.lost == pytest.approx(theirs.lost, rel=1e-3)
        assert mine.change == pytest.approx(theirs.change, rel=1e-3)
    merged = {f"{name}.weight": cast(Any, model[name]).weight.detach() for name in LAYERS}
    require_bits({key: load(tmp_path / "out.safetensors")[key] for key in merged}, merged)


def test_a_folder_says_no_more_that_it_is_quantised(tmp_path: Path) -> None:
    found = small_blocks()
    base = sharded(tmp_path / "base", found.tensors, 5)
    said = {"architectures": ["X"], "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 64]}}
    (base / "config.json").write_text(json.dumps(said))
    file = adapter(tmp_path / "a.safetensors")
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out", dtype=torch.bfloat16, verify=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"architectures": ["X"]}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    after = load_folder(tmp_path / "out")
    assert index["weight_map"].keys() == after.keys() and "first.weight_scale_inv" not in after
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in after.values())
    assert pk.plan_merge(tmp_path / "out", {file: 1.0}).touched == ("first.weight", "second.weight")


def test_a_quantised_base_whose_quantised_weights_stay_is_copied(tmp_path: Path) -> None:
    found = comfyui()
    plain = {"head.weight": torch.ones(12, 8)}
    base = write(tmp_path / "base.safetensors", found.tensors | plain)
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("head"))
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors")
    after = load(tmp_path / "out.safetensors")
    require_bits({key: after[key] for key in found.tensors}, found.tensors)
    assert not torch.equal(after["head.weight"], plain["head.weight"])


def test_dtype_is_one_of_plain_weights(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", comfyui().tensors)
    with pytest.raises(OptionError, match=r"torch\.bfloat16, torch\.float16 or torch\.float32 was expected"):
        pk.plan_merge(base, {adapter(tmp_path / "a.safetensors"): 1.0}, dtype=FP8)


def test_an_adapter_trained_on_quantised_weights_knows_their_checkpoint(tmp_path: Path) -> None:
    """Its fingerprints are of the weights, not of the numbers that they are stored as."""
    found = comfyui()
    model = nn.ModuleDict({name: nn.Linear(*SHAPE[::-1], bias=False) for name in LAYERS})
    for name, W in weights().items():
        cast(nn.Linear, model[name]).weight.data.copy_(W)
    pk.wrap(model, "dora", rank=2)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    file = pk.save(model, tmp_path / "a.safetensors")
    base = write(tmp_path / "base.safetensors", found.tensors)
    assert len(pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "o.safetensors", dtype=torch.bfloat16).changed) == 2
    other = write(
        tmp_path / "other.safetensors", {k: -t if t.dtype == torch.float32 else t for k, t in found.tensors.items()}
    )
    with pytest.raises(pk.errors.WrongBaseError):
        pk.plan_merge(other, {file: 1.0}, dtype=torch.bfloat16)


def test_the_difference_of_quantised_checkpoints_is_of_their_weights(tmp_path: Path) -> None:
    found, tuned = comfyui(), comfyui()
    tuned.tensors["first.scale_weight"] = 2 * found.tensors["first.scale_weight"]
    paths = [write(tmp_path / f"{i}.safetensors", each.tensors) for i, each in enumerate((found, tuned))]
    report = pk.extract(paths[1], paths[0], tmp_path / "d.safetensors", "full")
    assert [w.weight for w in report.weights] == ["first"]
    assert report.weights[0].norm == pytest.approx(float(found.plain["first"].norm()), rel=1e-5)
    assert set(report.unchanged) == {"second.weight", "first.bias", "norm.weight"}


def test_an_adapter_that_reads_its_base_is_exported_with_a_quantised_one(tmp_path: Path) -> None:
    found = per_row()
    tensors = {"first.lora_up.weight": torch.ones(SHAPE[0], 1), "first.lora_down.weight": torch.ones(1, SHAPE[1])}
    file = write(tmp_path / "a.safetensors", tensors | {"first.dora_scale": torch.ones(SHAPE[0], 1)})
    base = write(tmp_path / "base.safetensors", found.tensors)
    plain = write(tmp_path / "plain.safetensors", {f"{name}.weight": W for name, W in found.plain.items()})
    outs = [tmp_path / "q.safetensors", tmp_path / "p.safetensors"]
    for out, each in zip(outs, (base, plain), strict=True):
        pk.convert(file, out, "full", base=each)
    require_bits(load(outs[0]), load(outs[1]))


# -- formats that are not read ----------------------------------------------------------------------------------------

UNREAD: dict[str, tuple[str, State]] = {
    "GPTQ": (
        "GPTQ",
        {"first.qweight": torch.ones(1, 8, dtype=torch.int32), "first.g_idx": torch.zeros(8, dtype=torch.int32)},
    ),
    "AWQ": (
        "AWQ",
        {"first.qweight": torch.ones(8, 1, dtype=torch.int32), "first.qzeros": torch.ones(1, 1, dtype=torch.int32)},
    ),
    "packed": ("compressed-tensors", {"first.weight_packed": torch.ones(8, 1, dtype=torch.int32)}),
}


@pytest.mark.parametrize("case", UNREAD)
def test_a_base_in_a_format_that_is_not_read_is_called_by_its_name(case: str, tmp_path: Path) -> None:
    title, tensors = UNREAD[case]
    base = write(tmp_path / "base.safetensors", tensors | {"norm.weight": torch.ones(4)})
    source = write(
        tmp_path / "source.safetensors", {"first.weight": torch.ones(8, 8), "second.weight": torch.ones(8, 8)}
    )
    message = rf"quantised as {title}, which is not read: merge into the 16-bit checkpoint that it was made of"
    file = write(tmp_path / "a.safetensors", lora(8, 8).keyed("lycoris_first"))
    for dtype in (None, torch.bfloat16):
        with pytest.raises(UnsupportedLayerError, match=message):
            pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", dtype=dtype)
    pk.merge_checkpoint(source, {file: 1.0}, tmp_path / "out.safetensors")
    with pytest.raises(UnsupportedLayerError, match=title):
        pk.extract(base, base, tmp_path / "d.safetensors", "full")


def _state_of(tensors: State) -> str:
    return next(key for key in tensors if "quant_state" in key)


def _say(tensors: State, **values: Any) -> None:
    """Change what the first weight of 4 bits says of itself."""
    key = _state_of(tensors)
    said = json.loads(bytes(tensors[key].tolist())) | values
    tensors[key] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


def _cut(tensors: State, key: str) -> None:
    tensors[key] = tensors[key].flatten()[:-1]


def _four() -> Quantised:
    return bitsandbytes_4bit("nf4", nested=False)


def _ao() -> Quantised:
    return torchao("Float8WeightOnlyConfig")


Harm = Callable[[State, dict[str, str]], object]
SCALE = "first.weight_scale_inv"
DAMAGED: dict[str, tuple[Callable[[], Quantised], Harm, str]] = {
    "a scale that fits nothing": (deepseek, lambda t, _: t.update({SCALE: torch.ones(3, 5)}), "no scales"),
    "a scale of integers": (deepseek, lambda t, _: t.update({SCALE: torch.ones(1, 2).int()}), "no scales"),
    "a state that is no JSON": (_four, lambda t, _: _cut(t, _state_of(t)), "not sound JSON"),
    "another shape": (_four, lambda t, _: _say(t, shape=[128, 224]), "absmax.* entries"),
    "a few numbers less": (_four, lambda t, _: _say(t, shape=[384, 63], blocksize=63), "12288 bytes"),
    "a huge shape": (_four, lambda t, _: _say(t, shape=[2**50, 2]), "cannot be"),
    "an odd dtype": (_four, lambda t, _: _say(t, dtype="int64"), "dtype int64 cannot be"),
    "no blocksize": (_four, lambda t, _: _say(t, blocksize=0), "blocksize 0"),
    "few scales": (_four, lambda t, _: _cut(t, "first.weight.absmax"), "absmax"),
    "few row scales": (bitsandbytes_8bit, lambda t, _: _cut(t, "first.SCB"), "a scale for every row"),
    "a part that is lost": (_ao, lambda t, _: t.pop("first._weight_scale"), "has no first._weight_scale"),
    "odd attributes": (
        _ao,
        lambda _, h: h.update({"first.weight": h["first.weight"].replace("block_size", "x")}),
        "no tensor of torchao that",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_quantised_weight_is_a_typed_error(case: str, tmp_path: Path) -> None:
    make, harm, message = DAMAGED[case]
    found = make()
    tensors, header = dict(found.tensors), dict(found.header)
    harm(tensors, header)
    base, file = write(tmp_path / "base.safetensors", tensors, header), adapter(tmp_path / "a.safetensors")
    with pytest.raises((FileError, UnsupportedLayerError), match=message):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", dtype=torch.bfloat16)
    assert not (tmp_path / "out.safetensors").exists()
