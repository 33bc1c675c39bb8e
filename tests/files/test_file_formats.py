"""Conversions keep the format of a file: kohya's and LyCORIS's names and metadata, PEFT's folders."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import ExportError, FileError, OptionError
from tests.support.adapter_files import (
    ENTRIES,
    KOHYA,
    SD15,
    Two,
    X,
    base_of,
    kohya_file,
    kohya_hands,
    lycoris_file,
    lycoris_hands,
    optimum,
    require_deltas,
    sd15_model,
    true_deltas,
)
from tests.support.files import State, listing, load, metadata, write
from tests.support.hands import Hand, loha
from tests.support.models import net
from tests.support.readers import READERS

# -- formats -----------------------------------------------------------------------------------------------------------

TRUE = ("ss_base_model_version", "ss_tag_frequency", "ss_output_name", "modelspec.title")


def base_weights() -> State:
    return {f"unet.{path}": layer.weight.detach() for path in SD15 for layer in [sd15_model().get_submodule(path)]}


def ragged_hands() -> dict[str, Hand]:
    """LoHas of rank 1, 2 and 3, which are of 1, 4 and 9 as LoRAs."""
    shapes = {path: make().weight.shape[:2] for path, make in SD15.items()}
    return {path: loha(*shape, rank=i + 1, seed=10 * i) for i, (path, shape) in enumerate(shapes.items())}


def read_as(target: str, path: Path) -> State:
    """ΔW as a program reads it, by path; every key must have an effect."""
    read = READERS[target](path, base_weights(), "sd15", 1.0)
    assert read.ignored == [] and read.biases == {}
    return {name.removeprefix("unet."): delta.flatten(1) for name, delta in read.deltas.items()}


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "convert to lora": lambda file, out: pk.convert(file, out, "lora"),
    "convert to full": lambda file, out: pk.convert(file, out, "full"),
    "convert to lokr": lambda file, out: pk.convert(file, out, "lokr"),
    "resize": lambda file, out: pk.resize(file, out, rank=3),
    "rescale": lambda file, out: pk.rescale(file, 0.5, out),
    "combine": lambda file, out: pk.combine({file: 0.5, file.with_name("second.safetensors"): 0.5}, out),
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
def test_a_kohya_file_stays_one_with_the_same_module_names(kind: str, verb: str, tmp_path: Path) -> None:
    """Read back by others as this library reads it; true entries kept, hashes of other bytes dropped."""
    file = kohya_file(tmp_path / "a.safetensors", kohya_hands(kind), dict(ENTRIES))
    kohya_file(tmp_path / "second.safetensors", kohya_hands(kind))
    out = tmp_path / "out.safetensors"
    report = VERBS[verb](file, out)
    keys = load(out)
    assert {key.partition(".")[0] for key in keys} == set(KOHYA.values())
    assert all(f"{module}.alpha" in keys or f"{module}.diff" in keys for module in KOHYA.values())
    expected = {k: t * (0.5 if verb == "rescale" else 1.0) for k, t in true_deltas(kohya_hands(kind)).items()}
    if not verb.endswith("lokr") and verb != "resize":
        for target in ("a1111", "comfyui", "forge"):
            require_deltas(read_as(target, out), expected)
    ours = {KOHYA[name]: delta for name, delta in read_as("a1111", out).items()}
    for m in report.modules:
        true = expected[next(n for n, k in KOHYA.items() if k == m.name)]
        error = float((ours[m.name] - true).norm() / true.norm())
        assert m.error == pytest.approx(error, rel=1e-3, abs=2e-6)
    entries = metadata(out)
    assert {k: entries.get(k) for k in TRUE} == {k: ENTRIES[k] for k in TRUE}
    digest = hashlib.sha256(out.read_bytes()[8 + int.from_bytes(out.read_bytes()[:8], "little") :]).hexdigest()
    assert entries.get("sshs_model_hash", digest) == digest
    assert "sshs_legacy_hash" not in entries
    assert "modelspec.hash_sha256" not in entries, "the hash of other bytes"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_errors_reported_are_those_of_a_kohya_file_in_16_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whose ranks differ, so that some factors are scaled to the alpha they share before they are rounded."""
    file = kohya_file(tmp_path / "a.safetensors", ragged_hands())
    twin = kohya_file(tmp_path / "twin.safetensors", ragged_hands())
    out, expected = tmp_path / "out.safetensors", true_deltas(ragged_hands())
    verbs: tuple[Callable[[], Any], ...] = (
        lambda: pk.convert(file, out, "lora", dtype=dtype),
        lambda: pk.resize(file, out, rank=3, dtype=dtype),
        lambda: pk.combine({file: 0.25, twin: 0.75}, out, method="svd", energy=0.9, dtype=dtype),
    )
    for verb in verbs:
        report, found = verb(), read_as("a1111", out)
        assert len({m.after for m in report.modules}) > 1
        for m in report.modules:
            name = next(n for n, k in KOHYA.items() if k == m.name)
            true = float((found[name] - expected[name]).norm() / expected[name].norm())
            assert m.error == pytest.approx(true, rel=1e-3, abs=1e-7), m.name


def test_a_file_of_another_kind_does_not_say_how_the_first_was_trained(tmp_path: Path) -> None:
    """ss_network_dim, _alpha and _args describe LoHa's factors, which are not there any more."""
    file = kohya_file(tmp_path / "a.safetensors", kohya_hands("loha"), dict(ENTRIES))
    pk.convert(file, tmp_path / "out.safetensors", "lora")
    entries = metadata(tmp_path / "out.safetensors")
    assert not {"ss_network_dim", "ss_network_alpha"} & entries.keys()
    assert "loha" not in entries.get("ss_network_args", "")


def test_ranks_that_differ_share_one_alpha(tmp_path: Path) -> None:
    """diffusers applies the commonest alpha to every module (FORMATS.md §0.3)."""
    file = kohya_file(tmp_path / "a.safetensors", ragged_hands())
    pk.resize(file, tmp_path / "out.safetensors", energy=0.95)
    tensors = load(tmp_path / "out.safetensors")
    ranks = {t.shape[0] for key, t in tensors.items() if "lora_down" in key}
    assert len({float(t) for key, t in tensors.items() if key.endswith("alpha")}) == 1
    assert len(ranks) > 1 and all(t.dim() == 0 and t > 0 for key, t in tensors.items() if key.endswith("alpha"))
    require_deltas(read_as("diffusers", tmp_path / "out.safetensors"), read_as("a1111", tmp_path / "out.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_kernel_that_a_file_holds_flattened_is_written_in_the_shape_that_programs_read(
    kind: str, tmp_path: Path
) -> None:
    """LoHa's factors say the fan-in only. Names and shapes say the model, and that says the kernel."""
    path = "down_blocks.0.resnets.0.conv1"
    hand = loha(320, 320 * 9, seed=3)
    file = write(tmp_path / "a.safetensors", hand.keyed(f"lora_unet_{path.replace('.', '_')}"))
    out = tmp_path / "out.safetensors"
    pk.convert(file, out, kind, exact=True)
    weights = {f"unet.{path}": torch.zeros(320, 320, 3, 3)}
    for target in ("a1111", "comfyui", "forge", *(("kohya", "diffusers") if kind == "lora" else ())):
        read = READERS[target](out, weights, "sd15", 1.0)
        assert read.ignored == [], target
        require_deltas({"x": read.deltas[f"unet.{path}"].flatten(1)}, {"x": hand.delta(torch.zeros(0))})


def test_a_file_with_diffusers_names_keeps_them(tmp_path: Path) -> None:
    hands = kohya_hands("lora")
    tensors: State = {}
    for path, hand in hands.items():
        up, down = hand.tensors["lora_up.weight"] / 2, hand.tensors["lora_down.weight"]
        ones = (1,) * (2 if "proj_in" in path else 0)
        tensors[f"unet.{path}.lora_B.weight"] = up.reshape(*up.shape, *ones)
        tensors[f"unet.{path}.lora_A.weight"] = down.reshape(*down.shape, *ones)
    file = write(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    out = tmp_path / "out.safetensors"
    for verb, factor in ((lambda: pk.resize(file, out, rank=2), 1.0), (lambda: pk.rescale(file, -0.5, out), -0.5)):
        verb()
        assert load(out).keys() == tensors.keys()
        expected = {k: t * factor for k, t in true_deltas(hands).items()}
        require_deltas(read_as("diffusers", out), expected)
        assert metadata(out)["format"] == "pt"


@pytest.mark.parametrize("kind", ["lora", "dora out"])
def test_a_file_converted_with_its_base_keeps_its_module_names(kind: str, tmp_path: Path) -> None:
    hands = lycoris_hands(kind)
    file, base = lycoris_file(tmp_path / "a.safetensors", hands), base_of(tmp_path)
    out = tmp_path / "out.safetensors"
    report = pk.convert(file, out, "full", base=base)
    assert {key.partition(".")[0] for key in load(out)} == {f"lycoris_{n.replace('.', '_')}" for n in hands}
    assert report.error < 1e-5
    weights = {name: net().get_submodule(name).weight.detach() for name in hands}
    read = READERS["lycoris"](out, weights, None, 1.0)
    assert read.ignored == []
    expected = {name: hand.delta(weights[name].double()) for name, hand in hands.items()}
    require_deltas(read.deltas, expected, 1e-5)


# -- PEFT's own folders ------------------------------------------------------------------------------------------------


def peft_folder(path: Path, kind: str = "lora") -> tuple[Path, Tensor]:
    """A folder PEFT wrote, and what its model computes."""
    options: dict[str, Any] = {"target_modules": ["lin"]}
    config = {
        "lora": peft.LoraConfig(r=4, lora_alpha=2, rank_pattern={"block.lin": 3}, **options),
        "rslora": peft.LoraConfig(r=4, lora_alpha=2, use_rslora=True, **options),
        "loha": peft.LoHaConfig(r=2, alpha=3, **options),
        "lokr": peft.LoKrConfig(r=2, alpha=3, decompose_factor=2, **options),
    }[kind]
    model = peft.get_peft_model(Two(), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    model.save_pretrained(path)
    with torch.no_grad():
        return path, model.eval()(X)


def from_peft(path: Path) -> Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(Two(), str(path)).eval()(X)


@pytest.mark.parametrize("kind", ["lora", "rslora", "loha", "lokr"])
def test_a_folder_of_peft_stays_one_that_peft_loads(kind: str, tmp_path: Path) -> None:
    folder, expected = peft_folder(tmp_path / "a", kind)
    kinds = {"lora": ("lora", "loha"), "rslora": ("lora",), "loha": ("lora", "loha"), "lokr": ("lora", "lokr")}
    for other in kinds[kind]:
        out = tmp_path / f"to {other}"
        report = pk.convert(folder, out, other, exact=True)
        assert report.error < 1e-5
        torch.testing.assert_close(from_peft(out), expected, rtol=1e-4, atol=1e-5)
        assert {m.name for m in report.modules} == {"lin", "block.lin"}
    before = listing(tmp_path)
    with pytest.raises((OptionError, ExportError), match="PEFT"):
        pk.convert(folder, tmp_path / "to full", "full")
    with pytest.raises(FileError, match="there already"):
        pk.convert(folder, tmp_path / "to lora", "lora")
    assert listing(tmp_path) == before


def test_a_resized_and_a_rescaled_folder_of_peft_load_there(tmp_path: Path) -> None:
    folder, _ = peft_folder(tmp_path / "a")
    pk.resize(folder, tmp_path / "resized", rank=2)
    pk.rescale(folder, {"block*": -0.5}, tmp_path / "rescaled")
    pk.combine({folder: 0.25, tmp_path / "resized": 0.75}, tmp_path / "combined", method="cat")
    for name in ("resized", "rescaled", "combined"):
        model = Two()
        pk.load(model, tmp_path / name)
        with torch.no_grad():
            torch.testing.assert_close(from_peft(tmp_path / name), model.eval()(X), rtol=1e-4, atol=1e-5)
    W = {name: Two().get_submodule(name).weight.detach() for name in ("lin", "block.lin")}
    whole, resized, rescaled, combined = (
        READERS["peft"](tmp_path / name, W, None, 1.0).deltas for name in ("a", "resized", "rescaled", "combined")
    )
    for name in W:
        error = float((resized[name] - whole[name]).norm() / whole[name].norm())
        assert error == pytest.approx(optimum(whole[name], 2), rel=1e-4)
        torch.testing.assert_close(combined[name], 0.25 * whole[name] + 0.75 * resized[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rescaled["lin"], whole["lin"])
    torch.testing.assert_close(rescaled["block.lin"], -0.5 * whole["block.lin"])


# -- what a review found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["resize", "convert", "combine"])
@torch.no_grad()
def test_layers_that_keep_their_weight_the_other_way_round_stay_so(verb: str, tmp_path: Path) -> None:
    """Every GPT-2 adapter of PEFT is of such layers: without fan_in_fan_out the folder would mean the transpose."""
    torch.manual_seed(0)
    base = nn.Sequential(hf.pytorch_utils.Conv1D(48, 16), nn.GELU(), hf.pytorch_utils.Conv1D(48, 48))
    options = peft.LoraConfig(r=4, target_modules=["0", "2"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(copy.deepcopy(base), options)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    for name in ("one", "two"):
        adapted.save_pretrained(tmp_path / name)
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    verbs: dict[str, Callable[[], Any]] = {
        "resize": lambda: pk.resize(one, out, rank=4),
        "convert": lambda: pk.convert(one, out, "lora"),
        "combine": lambda: pk.combine({one: 0.5, two: 0.5}, out, method="svd", rank=4),
    }
    verbs[verb]()
    x = torch.randn(5, 16)
    before, expected = base(x), adapted.eval()(x)
    pk.export(one, tmp_path / "exported", "peft")
    for folder in (out, tmp_path / "exported"):
        found = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()(x)
        assert (found - expected).norm() < 1e-4 * (expected - before).norm()
