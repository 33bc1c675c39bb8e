"""Merging file to file: the same bits as in memory, in every layout, all of it or none, and in little memory."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import peftkit as pk
from peftkit.errors import (
    AmbiguousFileError,
    FileError,
    MergeError,
    MismatchError,
    OptionError,
    UnsupportedLayerError,
    WrongBaseError,
)
from peftkit.files.families.names import FAMILIES, Family
from peftkit.files.formats import container
from peftkit.files.formats.container import Container
from tests.support.cells import tree
from tests.support.checkpoints import (
    FLUX_COLUMNS,
    HANDS,
    Hand,
    State,
    accepting,
    adapt,
    diffusers_state,
    exact,
    full,
    hand_merge,
    header,
    key_of,
    kohya,
    listing,
    load,
    load_folder,
    loha,
    lokr,
    lora,
    merged_in_memory,
    metadata,
    net,
    original_state,
    require_bits,
    same_bits,
    small_families,
    state,
    use_small_families,
    write,
)
from tests.support.zoo import ADAPTERS, train

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> dict[str, Family]:
    """Small weights under the genuine names."""
    return use_small_families(monkeypatch)


def close(ours: Tensor, theirs: Tensor, bound: float, what: str = "") -> None:
    """‖ours − theirs‖ ≤ bound·‖theirs‖."""
    error, size = (ours.double() - theirs.double()).norm(), theirs.double().norm()
    assert error <= bound * size, f"{what}: relative error {error / size:.2e} above {bound:.0e}"


# ------------------------------------------------------------------------------------------------ the same as in memory


#: of each sort one, for the 16-bit dtypes
A_FEW = ("lin", "k1", "k3", "transposed_grouped", "attention.k_proj", "attention.out_proj")
STRENGTHS = {torch.float32: (0.7, -0.5), torch.float16: (-0.5,), torch.bfloat16: (0.7,)}


@DTYPE
@pytest.mark.parametrize("case", ADAPTERS)
def test_file_to_file_is_merging_in_memory_bit_for_bit(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = net(dtype)
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    sites = [site for site in accepting(case) if dtype == torch.float32 or site in A_FEW]
    adapt(model, case, only=sites)
    file = pk.save(model, tmp_path / "adapter.safetensors")
    for strength in STRENGTHS[dtype]:
        expected, report = merged_in_memory(model, {"default": strength})
        out = tmp_path / "out.safetensors"
        ours = pk.merge_checkpoint(base, {file: strength}, out)
        merged = load(out)
        require_bits(merged, expected)
        keys = {key for key in before if not same_bits(before[key], merged[key])}
        assert {w.site for w in ours.weights} == keys == {key_of(site) for site in sites}
        assert ours.norm == pytest.approx(report.norm, rel=1e-6)
        assert ours.lost == pytest.approx(report.lost, rel=1e-4, abs=1e-9)


SETS: dict[str, dict[str, tuple[str, tuple[str, ...] | None]]] = {
    "lora, dora": {"a": ("lora", None), "b": ("dora", None)},
    "oft, full, loha": {"a": ("oft", None), "b": ("full", None), "c": ("loha", None)},
    "ia3, lokr on parts": {
        "a": ("ia3", ("attention.k_proj", "lin", "transposed")),
        "b": ("lokr", ("attention.q_proj", "attention.k_proj", "transposed", "k3")),
    },
    "glora, loldu, dora in": {"a": ("glora", None), "b": ("loldu", None), "c": ("dora in", None)},
}


@DTYPE
@pytest.mark.parametrize("chosen", SETS)
def test_several_adapters_merge_at_once_as_in_memory(chosen: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each reads the base as it was, and they are added in the order they are given."""
    model = net(dtype)
    base = write(tmp_path / "base.safetensors", state(model))
    strengths = dict(zip("abc", (0.7, -0.5, 0.3), strict=False))
    files: dict[Path, float] = {}
    for seed, (name, (case, only)) in enumerate(SETS[chosen].items(), start=1):
        adapt(model, case, name, only, seed)
    for name in SETS[chosen]:
        files[pk.save(model, tmp_path / f"{name}.safetensors", name)] = strengths[name]
    expected, _ = merged_in_memory(model, {name: strengths[name] for name in SETS[chosen]})
    pk.merge_checkpoint(base, files, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("case", ["oft", "dora", "dora in", "loha", "lokr", "loldu", "ia3"])
def test_a_weight_of_several_row_blocks_merges_as_in_memory(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"big": nn.Linear(1100, 1000, bias=False), "deep": nn.ConvTranspose2d(120, 260, 3)}).half()
    base = write(tmp_path / "base.safetensors", state(model))
    pk.wrap(model, ADAPTERS[case].kind, **ADAPTERS[case].options)
    train(model, size=0.05)
    file = pk.save(model, tmp_path / "adapter.safetensors")
    expected, _ = merged_in_memory(model, {"default": -0.5})
    pk.merge_checkpoint(base, {file: -0.5}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("case", ["loldu", "loldu rank 1", "dora of loldu"])
def test_files_with_and_without_the_bases_factors_merge_alike(case: str, portable: bool, tmp_path: Path) -> None:
    model = net()
    base = write(tmp_path / "base.safetensors", state(model))
    adapt(model, case)
    file = pk.save(model, tmp_path / "adapter.safetensors", portable=portable)
    expected, _ = merged_in_memory(model, {"default": 0.7})
    pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


def test_a_model_that_is_one_layer_merges(tmp_path: Path) -> None:
    """Its tensors are called "weight" and "bias", and its adapter's weight has no name."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 12)
    base = write(tmp_path / "base.safetensors", state(layer))
    pk.wrap(layer, "lora", rank=2)
    train(layer)
    file = pk.save(layer, tmp_path / "adapter.safetensors")
    expected, _ = merged_in_memory(layer, {"default": 0.7})
    pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)


@pytest.mark.parametrize("kind", ["diff", "ia3"])
def test_a_change_of_a_transposed_convolution_merges_beside_an_adapter_of_it(kind: str, tmp_path: Path) -> None:
    """One file knows its weight as (out, in), the other changes it as it is stored; both read it as it was."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(6, 6, 3)})
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    pk.wrap(model, "full")
    with torch.no_grad():
        model["up"].adapters["default"].change.copy_(exact(6, 54, seed=3))
    own = pk.save(model, tmp_path / "own.safetensors")
    W = before["up.weight"].double()
    if kind == "diff":
        diff = exact(6, 6, 3, 3, seed=4).double()
        tensors = {"lycoris_up.diff": diff.float()}
    else:
        gate = exact(1, 6, 1, 1, seed=4)
        diff = gate.double().reshape(6, 1, 1, 1) * W
        tensors = {"lycoris_up.weight": gate, "lycoris_up.on_input": torch.tensor(0)}
    theirs = write(tmp_path / "theirs.safetensors", tensors)
    alone, _ = merged_in_memory(model, {"default": 1.0})
    change = alone["up.weight"].double() - W
    for adapters in ({own: 1.0, theirs: 1.0}, {theirs: 1.0, own: 1.0}):
        (merged,) = pk.merge_checkpoint(base, adapters, tmp_path / "out.safetensors").weights
        close(load(tmp_path / "out.safetensors")["up.weight"], W + change + diff, 1e-6)
        assert merged.norm == pytest.approx(float((change + diff).norm()), rel=1e-5)


# --------------------------------------------------------------------------------------------- against formulas by hand


def lycoris(hands: Mapping[str, Hand]) -> State:
    """A file of LyCORIS' generic wrapper."""
    return {
        key: t for name, hand in hands.items() for key, t in hand.keyed(f"lycoris_{name.replace('.', '_')}").items()
    }


@pytest.mark.parametrize("kind", HANDS)
def test_a_foreign_file_adds_what_its_formula_says(kind: str, tmp_path: Path) -> None:
    model = net(torch.bfloat16)
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    hands = {"lin": HANDS[kind](12, 8, seed=1), "bare": HANDS[kind](8, 8, seed=20)}
    file = write(tmp_path / "adapter.safetensors", lycoris(hands))
    pk.merge_checkpoint(base, {file: 0.75}, tmp_path / "out.safetensors")
    expected = hand_merge(before, {f"{name}.weight": [(hand, 0.75)] for name, hand in hands.items()})
    merged = load(tmp_path / "out.safetensors")
    if kind != "dora out":
        require_bits(merged, expected)
    for key in expected:
        close(merged[key], expected[key], 4e-3, key)  # a sum next to the middle of two bf16 may go either way


@pytest.mark.parametrize("target", [None, torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", [*DTYPES, torch.float64], ids=str)
def test_the_result_is_the_fp32_sum_rounded_once_to_the_dtype_asked_for(
    source: torch.dtype, target: torch.dtype | None, tmp_path: Path
) -> None:
    model = net(source)
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    hand, vector = loha(12, 8, seed=3), exact(12, seed=9)
    file = write(tmp_path / "a.safetensors", lycoris({"lin": hand}) | {"lycoris_norm.w_norm": vector})
    pk.merge_checkpoint(base, {file: 0.75}, tmp_path / "out.safetensors", dtype=target)
    merged = load(tmp_path / "out.safetensors")
    wide = torch.float64 if torch.float64 in (source, target) else torch.float32
    delta = (0.75 * hand.delta(before["lin.weight"].double())).to(wide)
    added = {"lin.weight": delta, "norm.weight": 0.75 * vector.to(wide)}
    for key, tensor in before.items():
        goal = target if target is not None and tensor.is_floating_point() else tensor.dtype
        expected = (tensor.to(wide) + added[key]).to(goal) if key in added else tensor.to(goal)
        assert same_bits(merged[key], expected), key


def test_sums_of_two_halves_are_formed_in_fp32(tmp_path: Path) -> None:
    """1 + 2⁻⁹ − 2⁻⁹ in bf16 is 1; a merge that rounded in between would say otherwise of 1 + 2⁻⁸ + 2⁻⁹ + 2⁻¹²."""
    W = torch.ones(4, 4, dtype=torch.bfloat16)
    base = write(tmp_path / "base.safetensors", {"a.weight": W})
    one = write(tmp_path / "1.safetensors", {"lycoris_a.diff": torch.full((4, 4), 2.0**-8 - 2.0**-12)})
    two = write(tmp_path / "2.safetensors", {"lycoris_a.diff": torch.full((4, 4), 2.0**-8 + 2.0**-11)})
    pk.merge_checkpoint(base, {one: 1.0, two: 1.0}, tmp_path / "out.safetensors")
    merged = load(tmp_path / "out.safetensors")["a.weight"]
    assert same_bits(merged, torch.full((4, 4), 1 + 2.0**-7, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("kind", HANDS)
def test_plain_fp8_weights_are_summed_in_fp32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    before = {key: t.to(dtype) if t.dim() > 1 and t.is_floating_point() else t for key, t in state(net()).items()}
    base = write(tmp_path / "base.safetensors", before)
    hands = {"lin": HANDS[kind](12, 8, seed=1), "bare": HANDS[kind](8, 8, seed=20)}
    file = write(tmp_path / "adapter.safetensors", lycoris(hands))
    pk.merge_checkpoint(base, {file: -0.5}, tmp_path / "out.safetensors")
    merged = load(tmp_path / "out.safetensors")
    expected = hand_merge(before, {f"{name}.weight": [(hand, -0.5)] for name, hand in hands.items()})
    apart = 0
    for key in before:
        if not same_bits(merged[key], expected[key]):
            close(merged[key].float(), expected[key].float(), 0.02, key)
            apart += 1
    assert apart == 0 or kind == "dora out"
    pk.merge_checkpoint(base, {file: -0.5}, tmp_path / "wide.safetensors", dtype=torch.float16)
    wide = load(tmp_path / "wide.safetensors")
    for name, hand in hands.items():
        W = before[f"{name}.weight"].double()
        close(wide[f"{name}.weight"], W - 0.5 * hand.delta(W), 1e-3, name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16], ids=str)
def test_a_sum_that_overflows_its_dtype_raises(dtype: torch.dtype, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"lin.weight": torch.ones(4, 4).to(dtype)})
    file = write(tmp_path / "a.safetensors", {"lycoris_lin.diff": torch.full((4, 4), 1e5)})
    before = listing(tmp_path)
    with pytest.raises(MergeError, match="overflows"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before


def test_a_cast_that_overflows_raises_also_for_tensors_nothing_is_added_to(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"lin.weight": torch.ones(4, 4), "norm.weight": torch.full((4,), 1e6)})
    file = write(tmp_path / "a.safetensors", {"lycoris_lin.diff": torch.ones(4, 4)})
    before = listing(tmp_path)
    with pytest.raises(MergeError, match=r"norm\.weight.*overflows"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", dtype=torch.float16)
    assert listing(tmp_path) == before


# -------------------------------------------------------------------------------------------------------------- vectors


@DTYPE
def test_changes_of_biases_and_norms_are_merged(dtype: torch.dtype, tmp_path: Path) -> None:
    """Kohya's diff_b, LyCORIS' w_norm and b_norm, and a norm written as `diff`, as FORMATS.md §1.4 has them."""
    model = net(dtype)
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    hand = lora(12, 8, seed=3)
    change = {
        key: exact(12, seed=seed) for seed, key in enumerate(("lin", "w", "b", "bands", "bands_b", "key"), start=10)
    }
    file = write(
        tmp_path / "a.safetensors",
        {
            **hand.keyed("lycoris_lin"),
            "lycoris_lin.diff_b": change["lin"],
            "lycoris_norm.w_norm": change["w"],
            "lycoris_norm.b_norm": change["b"],
            "lycoris_bands.diff": change["bands"],
            "lycoris_bands.diff_b": change["bands_b"],
            "lycoris_attention_k_proj.diff_b": change["key"][:8].clone(),
        },
    )
    report = pk.merge_checkpoint(base, {file: -0.5}, tmp_path / "out.safetensors")
    expected = hand_merge(before, {"lin.weight": [(hand, -0.5)]})
    targets = {
        "lin": "lin.bias",
        "w": "norm.weight",
        "b": "norm.bias",
        "bands": "bands.weight",
        "bands_b": "bands.bias",
    }
    for name, key in targets.items():
        expected[key] = (before[key].float() - 0.5 * change[name]).to(dtype)
    bias = before["attention.in_proj_bias"].float()
    bias[8:16] -= 0.5 * change["key"][:8]
    expected["attention.in_proj_bias"] = bias.to(dtype)
    require_bits(load(tmp_path / "out.safetensors"), expected)
    assert {w.site for w in report.weights} == {"lin.weight", "attention.in_proj_bias", *targets.values()}
    by_site = {w.site: w for w in report.weights}
    assert by_site["norm.bias"].norm == pytest.approx(0.5 * float(change["b"].norm()), rel=1e-5)


def test_vectors_of_two_files_are_summed_and_have_strengths_of_their_own(tmp_path: Path) -> None:
    before = state(net())
    base = write(tmp_path / "base.safetensors", before)
    one, two = exact(12, seed=1), exact(12, seed=2)
    first = write(tmp_path / "1.safetensors", {"lycoris_norm.w_norm": one, "lycoris_norm.b_norm": two})
    second = write(tmp_path / "2.safetensors", {"lycoris_norm.w_norm": two})
    rules = {"*.bias": 0.0, "norm*": 0.5, "lycoris_norm*": 9.0}
    with pytest.raises(OptionError, match="lycoris_norm"):
        pk.merge_checkpoint(base, {first: rules, second: -0.25}, tmp_path / "out.safetensors")
    del rules["lycoris_norm*"]
    pk.merge_checkpoint(base, {first: rules, second: -0.25}, tmp_path / "out.safetensors")
    expected = {**before, "norm.weight": before["norm.weight"] + (0.5 * one - 0.25 * two)}
    require_bits(load(tmp_path / "out.safetensors"), expected)


def test_a_matrix_adapter_of_a_vector_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", lora(12, 1, rank=1, alpha=1.0).keyed("lycoris_norm"))
    before = listing(tmp_path)
    with pytest.raises((MismatchError, UnsupportedLayerError)):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before


# -------------------------------------------------------------------------------------------------------------- layouts


def sharded(folder: Path, tensors: State, cut: int) -> Path:
    """Two shards with an index, as transformers writes them."""
    keys = list(tensors)
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = {files[0]: keys[:cut], files[1]: keys[cut:]}
    for file, own in parts.items():
        write(folder / file, {key: tensors[key] for key in own}, {"format": "pt"})
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {key: file for file, own in parts.items() for key in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def small_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 96, "projection_dim": 24, "vocab_size": 64}
    return CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


def test_shards_and_their_index_merge_into_a_folder_that_transformers_loads(
    families: dict[str, Family], tmp_path: Path
) -> None:
    model = small_text_encoder()
    before = state(model)
    folder = sharded(tmp_path / "model", before, len(before) // 2)
    model.config.save_pretrained(folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    key = next(key for key in before if key.endswith("layers.1.mlp.fc1.weight"))
    hand = lora(96, 24)
    file = write(tmp_path / "a.safetensors", hand.keyed("lora_te_text_model_encoder_layers_1_mlp_fc1"))
    assert families["sd15"].find("lora_te_text_model_encoder_layers_1_mlp_fc1")
    for name, given in (("whole", folder), ("index", folder / "model.safetensors.index.json")):
        out = tmp_path / name
        pk.merge_checkpoint(given, {file: 0.75}, out, verify=True)
        assert listing(out).keys() == listing(folder).keys()
        assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        expected = hand_merge(before, {key: [(hand, 0.75)]})
        require_bits(load_folder(out), expected)
        loaded = CLIPTextModel.from_pretrained(out)
        require_bits({k: state(loaded)[k] for k in before}, expected)
        assert metadata(out / "model-00001-of-00002.safetensors")["format"] == "pt"


def test_the_index_of_a_folder_says_the_sizes_that_a_new_dtype_gives(tmp_path: Path) -> None:
    before = state(net())
    folder = sharded(tmp_path / "model", before, 6)
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("lycoris_lin"))
    pk.merge_checkpoint(folder, {file: 1.0}, tmp_path / "out", dtype=torch.float16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_folder(tmp_path / "out").values())


def test_a_folder_of_links_as_the_hub_keeps_it_is_copied_whole(tmp_path: Path) -> None:
    """~/.cache/huggingface/hub/models--…/snapshots/… holds links into blobs/ and nothing else."""
    before = state(net())
    blobs = sharded(tmp_path / "blobs", before, 6)
    (blobs / "config.json").write_text("{}")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / "blobs" / blob.name)
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("lycoris_lin"))
    pk.merge_checkpoint(snapshot, {file: 1.0}, tmp_path / "out")
    assert listing(tmp_path / "out").keys() == listing(blobs).keys()


def pipeline(folder: Path, unet: nn.Module, text: nn.Module) -> Path:
    unet.save_pretrained(folder / "unet")  # type: ignore[operator]
    text.save_pretrained(folder / "text_encoder")  # type: ignore[operator]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    return folder


def small_unet() -> UNet2DConditionModel:
    """Of the sizes that the small SD 1.5 has."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
    )


QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.1.conv2"
SAMPLER = "up_blocks.0.upsamplers.0.conv"
POINT = "mid_block.attentions.0.proj_in"
SHORTCUT = "up_blocks.2.resnets.0.conv_shortcut"
FC1 = "text_model.encoder.layers.1.mlp.fc1"
OUT = "text_model.encoder.layers.0.self_attn.out_proj"


def sd15_hands() -> dict[str, Hand]:
    """By canonical name: every sort of place in a U-Net, and its text encoder's."""
    made: dict[str, Callable[..., Hand]] = {
        f"unet.{QUERY}": lora,
        f"unet.{KEY}": loha,
        f"unet.{CONV}": lokr,
        f"unet.{SAMPLER}": lora,
        f"unet.{POINT}": full,
        f"unet.{SHORTCUT}": lora,
        f"text_encoder.{FC1}": lora,
        f"text_encoder.{OUT}": loha,
    }
    modules = small_families()["sd15"].modules
    return {
        name: hand(modules[name].shape[0], math.prod(modules[name].shape[1:]), seed=seed)
        for seed, (name, hand) in enumerate(made.items())
    }


def kohya_file(path: Path, family: Family, hands: Mapping[str, Hand], te: str = "lora_te_") -> Path:
    tensors: State = {}
    for name, hand in hands.items():
        spelled = kohya(family, name)
        tensors |= hand.keyed(spelled.replace("lora_te1_", te) if te else spelled)
    return write(path, tensors)


def test_a_pipeline_folder_and_the_published_file_of_a_model_get_the_same_weights(
    families: dict[str, Family], tmp_path: Path
) -> None:
    """A kohya file on both layouts, against its formulas, and what diffusers converts one into against the other."""
    unet, text = small_unet().half(), small_text_encoder().half()
    folder = pipeline(tmp_path / "pipeline", unet, text)
    theirs = {f"unet.{k}": t for k, t in state(unet).items()}
    for key, tensor in state(text).items():
        level = "" if key.startswith("text_model.") else "text_model."
        theirs[f"text_encoder.{level}{key}"] = tensor
    base = {key: t for key, t in theirs.items() if key.rpartition(".")[2] in ("weight", "bias")}
    published = original_state(families["sd15"], base)
    published["first_stage_model.encoder.conv_in.weight"] = exact(8, 3, 3, 3).half()
    single = write(tmp_path / "single.safetensors", published, {"modelspec.title": "a"})
    hands = sd15_hands()
    file = kohya_file(tmp_path / "lora.safetensors", families["sd15"], hands)
    expected = hand_merge(base, {f"{name}.weight": [(hand, 0.75)] for name, hand in hands.items()})

    report = pk.merge_checkpoint(folder, {file: 0.75}, tmp_path / "out")
    assert len(report.weights) == len(hands)
    out = tmp_path / "out"
    assert listing(out).keys() == listing(folder).keys()
    loaded = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float16)
    require_bits(state(loaded), {k.removeprefix("unet."): t for k, t in expected.items() if k.startswith("unet.")})
    encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float16)
    for key, tensor in state(encoder).items():
        level = "" if key.startswith("text_model.") else "text_model."
        assert same_bits(tensor, expected[f"text_encoder.{level}{key}"]), key

    pk.merge_checkpoint(single, {file: 0.75}, tmp_path / "single-out.safetensors")
    merged = load(tmp_path / "single-out.safetensors")
    assert list(merged) and merged.keys() == published.keys()
    assert same_bits(
        merged["first_stage_model.encoder.conv_in.weight"], published["first_stage_model.encoder.conv_in.weight"]
    )
    converted = single_file_utils.convert_ldm_unet_checkpoint(merged, dict(unet.config))
    require_bits(converted, {k.removeprefix("unet."): t for k, t in expected.items() if k.startswith("unet.")})
    clip = single_file_utils.convert_ldm_clip_checkpoint(merged)
    require_bits(clip, {k.removeprefix("text_encoder."): t for k, t in expected.items() if k.startswith("text_enc")})


def test_other_spellings_of_the_same_modules_merge_alike(families: dict[str, Family], tmp_path: Path) -> None:
    family, hands = families["sd15"], {f"unet.{QUERY}": lora(64, 64, 4, seed=1), f"unet.{KEY}": lora(64, 24, seed=2)}
    base = diffusers_state(family, torch.float16)
    single = write(tmp_path / "single.safetensors", original_state(family, base))
    outs = []
    for i, style in enumerate(("kohya", "diffusers", "ldm", "lycoris")):
        tensors: State = {}
        for name, hand in hands.items():
            tensors |= hand.keyed(family.spell(name, style))
        file = write(tmp_path / f"{i}.safetensors", tensors)
        pk.merge_checkpoint(single, {file: -0.5}, tmp_path / "out.safetensors")
        outs.append(load(tmp_path / "out.safetensors"))
    expected = original_state(
        family, hand_merge(base, {f"{name}.weight": [(hand, -0.5)] for name, hand in hands.items()})
    )
    for out in outs:
        require_bits(out, expected)


def sd3_converted(merged: State) -> State:
    """The published layout of an SD 3.5 as diffusers itself reads it."""
    checkpoint = {k.removeprefix("model.diffusion_model."): t for k, t in merged.items()}
    checkpoint["pos_embed"] = torch.zeros(1)
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    del found["pos_embed.pos_embed"]
    return found


def flux_converted(merged: State) -> State:
    checkpoint = {k.removeprefix("model.diffusion_model."): t for k, t in merged.items()}
    return single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)


#: by family: the split projections with the fused layer of the published file; and modules whose halves are swapped
FUSED: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "sd35-medium": [
        (
            "joint_blocks.1.x_block.attn.qkv",
            "transformer_blocks.1.attn.",
            ("to_q", "to_k", "to_v"),
        ),
        (
            "joint_blocks.0.context_block.attn.qkv",
            "transformer_blocks.0.attn.",
            ("add_q_proj", "add_k_proj", "add_v_proj"),
        ),
        ("joint_blocks.0.x_block.attn2.qkv", "transformer_blocks.0.attn2.", ("to_q", "to_k", "to_v")),
    ],
    "flux": [
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.", ("to_q", "to_k", "to_v")),
        (
            "single_blocks.0.linear1",
            "single_transformer_blocks.0.",
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
        ),
    ],
}
SWAPPED: dict[str, dict[str, str]] = {
    "sd35-medium": {
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "transformer_blocks.1.norm1_context.linear": "joint_blocks.1.context_block.adaLN_modulation.1",
    },
    "flux": {"norm_out.linear": "final_layer.adaLN_modulation.1"},
}
CONVERTED: dict[str, Callable[[State], State]] = {"sd35-medium": sd3_converted, "flux": flux_converted}
TRANSFORMER = pytest.mark.parametrize("name", FUSED)


def both_layouts(family: Family, tmp_path: Path) -> tuple[State, Path, Path]:
    """The transformer's weights, and the two checkpoints of them."""
    theirs = diffusers_state(family, component="transformer")
    split = write(tmp_path / "split.safetensors", theirs)
    fused = write(
        tmp_path / "fused.safetensors", original_state(family, {f"transformer.{k}": t for k, t in theirs.items()})
    )
    return theirs, split, fused


def require_equal_layouts(
    name: str, file: Path, split: Path, fused: Path, expected: State, strength: float, bound: float | None = None
) -> None:
    """Raise AssertionError unless both checkpoints become `expected`, bit for bit or within a bound."""
    pk.merge_checkpoint(split, {file: strength}, split.with_name("split-out.safetensors"))
    pk.merge_checkpoint(fused, {file: strength}, fused.with_name("fused-out.safetensors"))
    ours = load(split.with_name("split-out.safetensors"))
    theirs = CONVERTED[name](load(fused.with_name("fused-out.safetensors")))
    if bound is None:
        require_bits(ours, expected)
        require_bits(theirs, expected)
    for found in (ours, theirs):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key], bound or 0.0, key)


@TRANSFORMER
@pytest.mark.parametrize("kind", HANDS)
def test_adapters_of_split_projections_are_rows_of_the_fused_layer(
    kind: str, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    theirs, split, fused = both_layouts(families[name], tmp_path)
    hands: dict[str, Hand] = {}
    for _, block, parts in FUSED[name]:
        for part in parts[1:]:  # the first keeps its rows
            rows, columns = theirs[f"{block}{part}.weight"].shape
            hands[block + part] = HANDS[kind](rows, columns, seed=len(hands))
    file = write(
        tmp_path / "a.safetensors", {k: t for n, h in hands.items() for k, t in h.keyed(f"transformer.{n}").items()}
    )
    expected = hand_merge(theirs, {f"{n}.weight": [(h, 0.75)] for n, h in hands.items()})
    require_equal_layouts(name, file, split, fused, expected, 0.75, 1e-6 if kind == "dora out" else None)


@TRANSFORMER
@pytest.mark.parametrize("kind", HANDS)
def test_an_adapter_of_the_fused_layer_is_cut_into_the_split_projections(
    kind: str, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    theirs, split, fused = both_layouts(families[name], tmp_path)
    tensors: State = {}
    expected = dict(theirs)
    for seed, (path, block, parts) in enumerate(FUSED[name]):
        W = torch.cat([theirs[f"{block}{part}.weight"] for part in parts])
        # of LoKr, blocks of rows that no projection begins with
        hand = lokr(*W.shape, outer=(8, 2), seed=seed) if kind == "lokr" else HANDS[kind](*W.shape, seed=10 * seed)
        tensors |= hand.keyed(f"lora_unet_{path.replace('.', '_')}")
        merged = hand_merge({"W": W}, {"W": [(hand, -0.5)]})["W"]
        rows = [len(theirs[f"{block}{part}.weight"]) for part in parts]
        for part, own in zip(parts, merged.split(rows), strict=True):
            expected[f"{block}{part}.weight"] = own
    file = write(tmp_path / "a.safetensors", tensors)
    require_equal_layouts(name, file, split, fused, expected, -0.5, 1e-6 if kind == "dora out" else None)


@TRANSFORMER
@pytest.mark.parametrize("original", [False, True], ids=["diffusers names", "original names"])
@pytest.mark.parametrize("kind", HANDS)
def test_halves_change_places_with_the_layout(
    kind: str, original: bool, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    """diffusers has (scale, shift) where the published files have (shift, scale), and adapters have them likewise."""
    theirs, split, fused = both_layouts(families[name], tmp_path)
    tensors: State = {}
    expected = dict(theirs)
    for seed, (module, path) in enumerate(SWAPPED[name].items()):
        W = theirs[f"{module}.weight"]
        hand = HANDS[kind](*W.shape, seed=seed)
        tensors |= hand.keyed(f"lora_unet_{path.replace('.', '_')}" if original else f"transformer.{module}")
        own = torch.cat(W.chunk(2)[::-1]) if original else W
        merged = hand_merge({"W": own}, {"W": [(hand, 0.75)]})["W"]
        expected[f"{module}.weight"] = torch.cat(merged.chunk(2)[::-1]) if original else merged
    file = write(tmp_path / "a.safetensors", tensors)
    require_equal_layouts(name, file, split, fused, expected, 0.75, 1e-6 if kind == "dora out" else None)


@TRANSFORMER
@pytest.mark.parametrize("original", [False, True], ids=["diffusers names", "original names"])
def test_halves_of_biases_change_places_with_the_layout(
    original: bool, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    theirs, split, fused = both_layouts(families[name], tmp_path)
    tensors: State = {}
    expected = dict(theirs)
    for seed, (module, path) in enumerate(SWAPPED[name].items()):
        change = exact(len(theirs[f"{module}.bias"]), seed=seed)
        tensors[(f"lora_unet_{path.replace('.', '_')}" if original else f"transformer.{module}") + ".diff_b"] = change
        own = torch.cat(change.chunk(2)[::-1]) if original else change
        expected[f"{module}.bias"] = theirs[f"{module}.bias"] + 0.5 * own
    file = write(tmp_path / "a.safetensors", tensors)
    require_equal_layouts(name, file, split, fused, expected, 0.5)


@TRANSFORMER
@pytest.mark.parametrize("original", [False, True], ids=["diffusers names", "original names"])
def test_biases_of_fused_projections_merge_in_both_layouts_or_are_refused(
    original: bool, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    """Never half of them: what one layout takes with exact rows, the other may refuse, and then writes nothing."""
    theirs, split, fused = both_layouts(families[name], tmp_path)
    path, block, parts = FUSED[name][0]
    rows = [len(theirs[f"{block}{part}.bias"]) for part in parts]
    change = exact(sum(rows), seed=3)
    expected = dict(theirs)
    for part, own in zip(parts, change.split(rows), strict=True):
        expected[f"{block}{part}.bias"] = theirs[f"{block}{part}.bias"] + own
    if original:
        tensors = {f"lora_unet_{path.replace('.', '_')}.diff_b": change}
    else:
        tensors = {f"transformer.{block}{p}.diff_b": own for p, own in zip(parts, change.split(rows), strict=True)}
    file = write(tmp_path / "a.safetensors", {k: t.contiguous() for k, t in tensors.items()})
    for base, read in ((split, dict), (fused, CONVERTED[name])):
        out = tmp_path / "out.safetensors"
        try:
            pk.merge_checkpoint(base, {file: 1.0}, out)
        except MismatchError:
            assert not out.exists()
            continue
        require_bits(read(load(out)), expected)
        out.unlink()


@TRANSFORMER
def test_fused_and_split_files_merge_on_top_of_each_other(
    name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    """Adapters of all the rows and of some, which read the base as it was whatever the other has done to it."""
    theirs, split, fused = both_layouts(families[name], tmp_path)
    path, block, parts = FUSED[name][0]
    whole = torch.cat([theirs[f"{block}{part}.weight"] for part in parts])
    over, under = lora(*whole.shape, seed=1), full(*theirs[f"{block}{parts[1]}.weight"].shape, seed=2)
    first = write(tmp_path / "1.safetensors", over.keyed(f"lora_unet_{path.replace('.', '_')}"))
    second = write(tmp_path / "2.safetensors", under.keyed(f"transformer.{block}{parts[1]}"))
    expected = dict(theirs)
    merged = (whole.double() + 0.75 * over.delta(whole.double())).split(
        [len(theirs[f"{block}{p}.weight"]) for p in parts]
    )
    for part, rows in zip(parts, merged, strict=True):
        added = -0.5 * under.delta(rows) if part == parts[1] else 0.0
        expected[f"{block}{part}.weight"] = (rows + added).float()
    for base, read in ((split, dict), (fused, CONVERTED[name])):
        for adapters in ({first: 0.75, second: -0.5}, {second: -0.5, first: 0.75}):
            pk.merge_checkpoint(base, adapters, tmp_path / "out.safetensors")
            require_bits(read(load(tmp_path / "out.safetensors")), expected)


def test_a_fused_file_gives_every_layer_of_a_model_factors_of_its_own(
    families: dict[str, Family], tmp_path: Path
) -> None:
    """Loaded onto split projections, training one leaves the others."""
    _, block, parts = FUSED["flux"][0]
    model = tree({f"{block}{part}": nn.Linear(FLUX_COLUMNS, 3072) for part in parts})
    hand = lora(9216, FLUX_COLUMNS, seed=1)
    file = write(tmp_path / "a.safetensors", hand.keyed("lora_unet_double_blocks_0_img_attn_qkv"))
    pk.load(model, file, component="transformer")
    factors = pk.adapter_parameters(model)
    assert len(factors) == 6 and len({p.untyped_storage().data_ptr() for p in factors}) == 6


def test_a_rotation_whose_blocks_cross_the_rows_of_another_adapter_reads_the_base_as_it_was(
    families: dict[str, Family], tmp_path: Path
) -> None:
    """OFT mixes the rows of a block. Here 3·128 rows in blocks of 48, beside a LoRA of the first 128."""
    theirs, _, fused = both_layouts(families["sd35-medium"], tmp_path)
    path, block, parts = FUSED["sd35-medium"][0]
    W = torch.cat([theirs[f"{block}{part}.weight"] for part in parts]).double()
    size, count = 48, len(W) // 48
    A = exact(count, size, size, seed=5) / 16
    rotation = {"oft_blocks": A, "alpha": torch.tensor(0.0)}
    Q = (A - A.mT).double()
    R = torch.linalg.solve((torch.eye(size) - Q).mT, (torch.eye(size) + Q).mT).mT  # (I + Q)(I − Q)⁻¹
    turned = torch.cat([r.mT @ rows for r, rows in zip(R, W.split(size), strict=True)])  # kohya's W' = Rᵀ·W
    first = write(tmp_path / "1.safetensors", Hand(rotation, lambda W: W).keyed(f"lora_unet_{path.replace('.', '_')}"))
    hand = lora(128, 128, seed=9)
    expected = turned.clone()
    expected[:128] += hand.delta(W[:128])
    second = write(tmp_path / "2.safetensors", hand.keyed(f"transformer.{block}{parts[0]}"))
    for adapters in ({first: 1.0, second: 1.0}, {second: 1.0, first: 1.0}):
        pk.merge_checkpoint(fused, adapters, tmp_path / "out.safetensors")
        merged = load(tmp_path / "out.safetensors")[f"model.diffusion_model.{path}.weight"]
        close(merged, expected, 1e-5)


def test_an_openclip_text_encoder_keeps_its_projection_transposed_and_its_attention_fused(
    families: dict[str, Family], tmp_path: Path
) -> None:
    family = families["sdxl"]
    base = diffusers_state(family)
    layer = "text_encoder_2.text_model.encoder.layers.1"
    hands = {
        f"{layer}.self_attn.k_proj": lora(32, 32, seed=1),
        f"{layer}.self_attn.v_proj": lokr(32, 32, seed=2),
        f"{layer}.mlp.fc2": full(32, 128, seed=3),
        "text_encoder_2.text_projection": lora(32, 32, seed=4),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": loha(64, 16, seed=5),
        "unet.add_embedding.linear_1": lora(128, 48, seed=6),
    }
    file = kohya_file(tmp_path / "a.safetensors", family, hands, te="")
    change = exact(32, seed=7)
    bias = f"{layer}.self_attn.v_proj"
    write(file, load(file) | {f"{kohya(family, bias)}.diff_b": change})
    expected = hand_merge(base, {f"{name}.weight": [(hand, 0.75)] for name, hand in hands.items()})
    expected[f"{bias}.bias"] = base[f"{bias}.bias"] + 0.75 * change
    split = write(tmp_path / "split.safetensors", base)
    single = write(tmp_path / "single.safetensors", original_state(family, base))
    pk.merge_checkpoint(split, {file: 0.75}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)
    pk.merge_checkpoint(single, {file: 0.75}, tmp_path / "out.safetensors")
    merged = load(tmp_path / "out.safetensors")
    prefix = "conditioner.embedders.1.model."
    q, k, v = merged[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"].chunk(3)
    found = {
        f"{layer}.self_attn.q_proj": q,
        f"{layer}.self_attn.k_proj": k,
        f"{layer}.self_attn.v_proj": v,
        f"{layer}.mlp.fc2": merged[f"{prefix}transformer.resblocks.1.mlp.c_proj.weight"],
        "text_encoder_2.text_projection": merged[f"{prefix}text_projection"].T,
    }
    for name, tensor in found.items():
        assert same_bits(tensor.contiguous(), expected[f"{name}.weight"]), name
    require_bits(merged, original_state(family, expected))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_plan_of_a_real_sd15_finds_every_module_in_either_layout(layout: str, tmp_path: Path) -> None:
    """Of real shapes there is only a header and a hole: the plan of a rank-1 file of all 490 modules reads no more."""
    family = FAMILIES["sd15"]
    shapes: dict[str, tuple[int, ...]] = {}
    for module in family.modules.values():
        own = {"weight": module.shape, "bias": module.shape[:1]}
        keys = {"weight": module.original, "bias": module.original_bias}
        for kind in ("weight", "bias")[: 1 + module.bias]:
            shapes[keys[kind] or "" if layout == "original" else f"{module.name}.{kind}"] = own[kind]
    base = tmp_path / "base.safetensors"
    sizes = {key: ("F16", shape, 2 * math.prod(shape)) for key, shape in shapes.items()}
    with base.open("wb") as file:
        file.write(container.header(sizes, {}))
        file.truncate(file.tell() + sum(size for _, _, size in sizes.values()))
    tensors: State = {}
    matrices = [m for m in family.modules.values() if len(m.shape) > 1]
    for m in matrices:
        name = kohya(family, m.name)
        tensors[f"{name}.lora_up.weight"] = torch.ones(m.shape[0], 1, *[1] * len(m.shape[2:])).half()
        tensors[f"{name}.lora_down.weight"] = torch.ones(1, *m.shape[1:]).half()
    adapter = write(tmp_path / "a.safetensors", tensors)
    plan = pk.plan_merge(base, {adapter: 1.0})
    places = {kohya(family, m.name): m.original if layout == "original" else f"{m.name}.weight" for m in matrices}
    assert {p.name: p.weight for p in plan.patches} == places
    assert set(plan.touched) == set(places.values())


def test_folders_that_are_not_one_model_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("lycoris_lin"))
    before = state(net())
    two = tmp_path / "two"
    write(two / "a.safetensors", before)
    write(two / "b.safetensors", before)
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = sharded(tmp_path / "odd", before, 6)
    index = json.loads((odd / "model.safetensors.index.json").read_text())
    index["weight_map"]["lin.weight"] = "model-00002-of-00002.safetensors"
    (odd / "model.safetensors.index.json").write_text(json.dumps(index))
    outside = sharded(tmp_path / "outside", before, 6)
    text = (outside / "model.safetensors.index.json").read_text()
    (outside / "model.safetensors.index.json").write_text(text.replace("model-00001", "../two/a"))
    for folder in (two, empty, odd, outside, tmp_path / "nothing"):
        with pytest.raises(FileError):
            pk.merge_checkpoint(folder, {file: 1.0}, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ strengths


def test_strengths_go_by_the_first_pattern_that_matches(tmp_path: Path) -> None:
    before = state(net())
    base = write(tmp_path / "base.safetensors", before)
    hands = {"lin": full(12, 8, seed=1), "bare": full(8, 8, seed=2), "k1": full(12, 8, seed=3)}
    file = write(tmp_path / "a.safetensors", lycoris(hands))
    rules = {"lycoris_lin": -0.75, "bare.weight": 0.0, "*": 1.5}
    plan = pk.plan_merge(base, {file: rules})
    assert {p.name: p.strength for p in plan.patches} == {"lycoris_lin": -0.75, "lycoris_k1": 1.5}
    assert plan.touched == tuple(key for key in plan.base.where if key in ("lin.weight", "k1.weight"))
    report = pk.merge_checkpoint(base, {file: rules}, tmp_path / "out.safetensors")
    expected = hand_merge(before, {"lin.weight": [(hands["lin"], -0.75)], "k1.weight": [(hands["k1"], 1.5)]})
    require_bits(load(tmp_path / "out.safetensors"), expected)
    assert {w.site for w in report.weights} == {"lin.weight", "k1.weight"}


def test_strength_0_of_everything_copies_the_base(tmp_path: Path) -> None:
    before = state(net())
    base = write(tmp_path / "base.safetensors", before, {"modelspec.title": "a", "sshs_model_hash": "b"})
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    report = pk.merge_checkpoint(base, {file: 0.0}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), before)
    assert report.weights == ()
    assert metadata(tmp_path / "out.safetensors") == metadata(base)


@pytest.mark.parametrize(
    "rules, message",
    [
        ({"*": 1.0, "no such": 1.0}, "'no such' matches none"),
        ({"lycoris_li": 1.0, "*": 1.0}, "'lycoris_li' matches none"),
        ({"lycoris_lin": 1.0}, "no strength pattern matches lycoris_bare"),
        ({}, "no strength pattern matches"),
        (math.nan, "strength"),
        (math.inf, "strength"),
        ({"*": math.nan}, "strength"),
    ],
    ids=str,
)
def test_strengths_that_do_not_say_what_is_meant_raise(rules: Any, message: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8), "bare": full(8, 8)}))
    before = listing(tmp_path)
    with pytest.raises(OptionError, match=message):
        pk.merge_checkpoint(base, {file: rules}, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before


def test_adapters_given_twice_or_not_at_all_raise(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    for adapters in ({}, {file: 1.0, str(file): 1.0}):
        with pytest.raises(OptionError):
            pk.merge_checkpoint(base, adapters, tmp_path / "out.safetensors")
    for options in ({"rebase": "x"}, {"dtype": torch.int8}, {"dtype": "fp16"}):
        with pytest.raises(OptionError):
            pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", **options)
    with pytest.raises(FileError, match=r"\*\.safetensors"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.ckpt")
    with pytest.raises(FileError, match="no folder"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "nowhere" / "out.safetensors")


# ----------------------------------------------------------------------------------------------------------- pre-flight


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors of bases that are read whole, by files called base*."""
    found: list[str] = []
    original = Container.tensor

    def tensor(self: Container, name: str, *args: Any) -> Tensor:
        if self.path.name.startswith("base"):
            found.append(name)
        return original(self, name, *args)

    monkeypatch.setattr(Container, "tensor", tensor)
    return found


@pytest.mark.parametrize("case", ["lora", "dora", "loldu", "oft", "glora"])
def test_a_plan_reads_no_tensor_of_the_base(case: str, unread: list[str], tmp_path: Path) -> None:
    model = net()
    base = write(tmp_path / "base.safetensors", state(model))
    adapt(model, case)
    file = pk.save(model, tmp_path / "a.safetensors")
    plan = pk.plan_merge(base, {file: 0.7})
    assert unread == []
    assert {p.name for p in plan.patches} == set(accepting(case))
    assert all(p.law == ("reapply" if case in ("dora", "oft", "glora") else "additive") for p in plan.patches)


def bad_cases() -> dict[str, tuple[type[Exception], str, Callable[[State], State], Callable[[], State]]]:
    """Name -> what raises, what it says, what becomes of the base, and the adapter's tensors."""

    def keep(base: State) -> State:
        return base

    def cast(dtype: torch.dtype, **more: Tensor) -> Callable[[State], State]:
        return lambda base: {**base, "lin.weight": base["lin.weight"].to(dtype), **more}

    good = lora(12, 8).keyed("lycoris_lin")
    fp8, one = torch.float8_e4m3fn, torch.ones(1)
    infinite = {**good, "lycoris_lin.lora_up.weight": torch.full((12, 2), math.inf)}
    nan_vector = {**good, "lycoris_norm.w_norm": torch.full((12,), math.nan)}
    return {
        "a name that is not there": (
            MismatchError,
            "Did you mean 'attention.out_proj'",
            keep,
            lambda: good | lora(8, 8).keyed("lycoris_attention_out_poj"),
        ),
        "another shape": (MismatchError, "12×8", keep, lambda: lora(12, 9).keyed("lycoris_lin")),
        "the same size in another shape": (MismatchError, "12×8", keep, lambda: lora(8, 12).keyed("lycoris_lin")),
        "another kernel": (
            MismatchError,
            "kernel",
            keep,
            lambda: {"lycoris_k3.diff": torch.ones(12, 8, 9)},
        ),
        "int8": (UnsupportedLayerError, "quantised", cast(torch.int8), lambda: good),
        "uint8": (UnsupportedLayerError, "quantised", cast(torch.uint8), lambda: good),
        **{
            f"fp8 under {scale}": (UnsupportedLayerError, scale, cast(fp8, **{scale: one}), lambda: good)
            for scale in ("lin.scale_weight", "lin.weight_scale", "lin.weight_scale_inv", "scaled_fp8")
        },
        "a bias that is not there": (
            MismatchError,
            "bias",
            keep,
            lambda: good | {"lycoris_bare.diff_b": torch.ones(8)} | full(8, 8).keyed("lycoris_bare"),
        ),
        "a bias of another size": (MismatchError, "11", keep, lambda: {**good, "lycoris_lin.diff_b": torch.ones(11)}),
        "factors that are not finite": (MismatchError, "non-finite", keep, lambda: infinite),
        "a vector that is not finite": (MismatchError, "finite", keep, lambda: nan_vector),
        "a tensor that is no adapter's": (MismatchError, "ignore", keep, lambda: {**good, "epoch": torch.ones(1)}),
        "half of an adapter": (FileError, "missing", keep, lambda: {k: t for k, t in good.items() if "up" not in k}),
    }


@pytest.mark.parametrize("verb", ["plan", "merge", "merge over a file"])
@pytest.mark.parametrize("bad", bad_cases())
def test_what_cannot_be_merged_raises_before_anything_is_written(
    bad: str, verb: str, unread: list[str], tmp_path: Path
) -> None:
    error, message, change, tensors = bad_cases()[bad]
    base = write(tmp_path / "base.safetensors", change(state(net())))
    file = write(tmp_path / "a.safetensors", tensors())
    out = tmp_path / "out.safetensors"
    if verb == "merge over a file":
        out.write_bytes(b"what was there before")
    before = listing(tmp_path)
    with pytest.raises(error, match=message) as caught:
        pk.plan_merge(base, {file: 1.0}) if verb == "plan" else pk.merge_checkpoint(base, {file: 1.0}, out)
    assert str(file) in str(caught.value) or "lycoris_" in str(caught.value)
    assert listing(tmp_path) == before
    assert unread == []


def test_a_name_that_can_mean_two_weights_is_refused(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"a.b_c.weight": torch.ones(12, 8), "a_b.c.weight": torch.ones(12, 8)})
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("lycoris_a_b_c"))
    with pytest.raises(AmbiguousFileError, match=r"a\.b_c or a_b\.c"):
        pk.plan_merge(base, {file: 1.0})
    clear = write(tmp_path / "b.safetensors", lora(12, 8).keyed("a_b.c"))
    assert pk.plan_merge(base, {clear: 1.0}).touched == ("a_b.c.weight",)


def test_two_names_of_one_weight_in_one_file_are_refused(families: dict[str, Family], tmp_path: Path) -> None:
    """Which of the two programs would take differs: adding both would be a third answer."""
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", full(12, 8).keyed("lycoris_lin") | full(12, 8).keyed("lora_unet_lin"))
    with pytest.raises(MismatchError, match="lycoris_lin"):
        pk.plan_merge(base, {file: 1.0})
    theirs, split, fused = both_layouts(families["flux"], tmp_path)
    path, block, parts = FUSED["flux"][0]
    rows, columns = theirs[f"{block}{parts[0]}.weight"].shape
    tensors = full(3 * rows, columns).keyed(f"lora_unet_{path.replace('.', '_')}")
    file = write(tmp_path / "b.safetensors", tensors | full(rows, columns).keyed(f"transformer.{block}{parts[0]}"))
    for layout in (split, fused):
        with pytest.raises(MismatchError, match="lora_unet_double_blocks_0_img_attn_qkv"):
            pk.plan_merge(layout, {file: 1.0})


def test_every_problem_of_a_file_is_listed_at_once(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    tensors = lora(12, 8).keyed("lycoris_linn") | lora(12, 8).keyed("lycoris_kk1") | lora(9, 8).keyed("lycoris_bare")
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(MismatchError, match="nothing was merged") as caught:
        pk.plan_merge(base, {file: 1.0})
    assert all(name in str(caught.value) for name in ("lycoris_linn", "lycoris_kk1", "lycoris_bare"))


def other(model: nn.Module, by: float) -> State:
    """Another base: every weight moved by that share of itself."""
    generator = torch.Generator().manual_seed(7)
    return {
        key: t if not t.is_floating_point() else t * (1 + by * torch.randn(t.shape, generator=generator))
        for key, t in state(model).items()
    }


@pytest.mark.parametrize("case", ["lora", "dora", "oft", "loldu"])
def test_another_base_is_noticed_by_its_fingerprints(case: str, tmp_path: Path) -> None:
    model = net()
    changed = other(model, 0.1)
    base = write(tmp_path / "base.safetensors", changed)
    rounded = write(tmp_path / "rounded.safetensors", {k: t.bfloat16() for k, t in state(model).items()})
    adapt(model, case)
    file = pk.save(model, tmp_path / "a.safetensors")
    before = listing(tmp_path)
    with pytest.raises(WrongBaseError, match=r"a\.safetensors was trained on another base"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before
    pk.merge_checkpoint(rounded, {file: 1.0}, tmp_path / "out.safetensors")
    if case != "loldu":
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", other_base=True)


@pytest.mark.parametrize("case", ["loldu", "dora of loldu"])
@pytest.mark.parametrize("options", [{"other_base": True}, {"origin": True}], ids=str)
def test_ldu_factors_that_are_not_in_the_file_are_never_taken_from_another_base(
    case: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """From the origin, where that is at hand, or not at all: those of another base mean something else."""
    model = net()
    origin = write(tmp_path / "origin.safetensors", state(model))
    changed = other(model, 0.1)
    base = write(tmp_path / "base.safetensors", changed)
    adapt(model, case, only=["lin"])
    if "origin" in options:
        options = {"origin": origin, "rebase": "transplant"}
    expected, _ = merged_in_memory(model, {"default": 1.0})
    delta = expected["lin.weight"].double() - state(net())["lin.weight"].double()
    file = pk.save(model, tmp_path / "a.safetensors", portable=False)
    try:
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", **options)
    except WrongBaseError:
        assert not (tmp_path / "out.safetensors").exists()
    else:
        assert "origin" in options, "the factors are nowhere"
        close(load(tmp_path / "out.safetensors")["lin.weight"] - changed["lin.weight"], delta, 1e-5)


def test_ldu_factors_in_the_file_serve_any_base(tmp_path: Path) -> None:
    model = net()
    changed = other(model, 0.1)
    base = write(tmp_path / "base.safetensors", changed)
    adapt(model, "loldu", only=["lin"])
    expected, _ = merged_in_memory(model, {"default": 1.0})
    delta = expected["lin.weight"].double() - state(net())["lin.weight"].double()
    file = pk.save(model, tmp_path / "a.safetensors", portable=True)
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", other_base=True)
    close(load(tmp_path / "out.safetensors")["lin.weight"] - changed["lin.weight"], delta, 1e-5)


def test_an_adapter_that_would_be_lost_to_rounding_raises(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", {"lin.weight": torch.ones(4, 4).bfloat16()})
    file = write(tmp_path / "a.safetensors", {"lycoris_lin.diff": torch.full((4, 4), 1e-6)})
    before = listing(tmp_path)
    with pytest.raises(MergeError, match="too small"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", dtype=torch.float32)
    close(load(tmp_path / "out.safetensors")["lin.weight"], torch.full((4, 4), 1 + 1e-6), 1e-7)


# --------------------------------------------------------------------------------------------------------- another base


def cayley(Q: Tensor) -> Tensor:
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype)
    return (identity + Q) @ torch.linalg.inv(identity - Q)


def skew(upper: Tensor, size: int) -> Tensor:
    """Q (k, b, b) of the upper triangles, row by row."""
    Q = torch.zeros(len(upper), size, size, dtype=torch.float64)
    i, j = torch.triu_indices(size, size, 1)
    Q[:, i, j] = upper.double()
    return Q - Q.mT


def rotated(W: Tensor, Q: Tensor) -> Tensor:
    return torch.cat([R @ rows for R, rows in zip(cayley(Q), W.split(Q.shape[1]), strict=True)])


def low_rank(p: Mapping[str, Tensor], up: str = "up", down: str = "down") -> Tensor:
    return p[up].double() @ p[down].double()


def dora_law(p: Mapping[str, Tensor], W0: Tensor, W: Tensor, strength: float) -> Tensor:
    """m counts relative to the norms of the base it was trained on: t = (m/‖W0‖)·‖W‖/‖W + V‖; V has α/r = 1/2."""
    V = W + 0.5 * low_rank(p, "inner.up", "inner.down")
    t = p["magnitude"].double() / W0.norm(dim=1) * W.norm(dim=1) / V.norm(dim=1)
    return strength * (t[:, None] * V - W)


#: case -> ΔW at a strength on a base W, of one trained on W0
LAWS: dict[str, Callable[[Mapping[str, Tensor], Tensor, Tensor, float], Tensor]] = {
    "dora": dora_law,
    "oft": lambda p, W0, W, s: s * (rotated(W, skew(p["skew"], 4)) - W),
    "oft geodesic": lambda p, W0, W, s: rotated(W, s * skew(p["skew"], 4)) - W,
    "ia3": lambda p, W0, W, s: s * p["gate"].double()[:, None] * W,
    "ia3 in": lambda p, W0, W, s: s * p["gate"].double() * W,
    "glora": lambda p, W0, W, s: 0.5 * s * (W @ low_rank(p, "base_up", "base_down") + low_rank(p)),
}
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "oft geodesic": ("oft", {"block_size": 4, "path": "geodesic"}),
    **{case: (ADAPTERS[case].kind, ADAPTERS[case].options) for case in ("dora", "oft", "ia3", "ia3 in", "glora")},
}


@pytest.mark.parametrize("strength", [0.7, -0.5])
@pytest.mark.parametrize("case", LAWS)
def test_on_another_base_adapters_are_reapplied_or_transplanted_as_the_formulas_say(
    case: str, strength: float, tmp_path: Path
) -> None:
    """MATH.md §6: W' + ΔW(W'), or W' + ΔW(W0) with the origin; and the plan says how far they are apart."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lin": nn.Linear(8, 12)})
    W0 = model["lin"].weight.detach().clone()
    changed = {k: t * 1.5 + 0.1 * torch.randn_like(t) for k, t in state(model).items()}
    origin, base = write(tmp_path / "origin.safetensors", state(model)), write(tmp_path / "base.safetensors", changed)
    kind, options = OPTIONS[case]
    pk.wrap(model, kind, **options)
    train(model)
    p = {key.removeprefix("lin."): t for key, t in pk.adapter_state_dict(model).items()}
    file = pk.save(model, tmp_path / "a.safetensors")
    W = changed["lin.weight"].double()
    law = LAWS[case]
    reapplied, transplanted = law(p, W0.double(), W, strength), law(p, W0.double(), W0.double(), strength)
    out = tmp_path / "out.safetensors"
    pk.merge_checkpoint(base, {file: strength}, out, other_base=True)
    close(load(out)["lin.weight"], W + reapplied, 1e-6, "reapply")
    with pytest.raises(OptionError, match="origin="):
        pk.merge_checkpoint(base, {file: strength}, out, rebase="transplant", other_base=True)
    pk.merge_checkpoint(base, {file: strength}, out, rebase="transplant", origin=origin)
    close(load(out)["lin.weight"], W + transplanted, 1e-6, "transplant")
    gap = law(p, W0.double(), W, 1.0) - law(p, W0.double(), W0.double(), 1.0)
    size = law(p, W0.double(), W0.double(), 1.0).norm()
    for rebase in ("reapply", "transplant"):
        plan = pk.plan_merge(base, {file: strength}, rebase=rebase, origin=origin)
        assert plan.patches[0].law == rebase
        assert plan.patches[0].difference == pytest.approx(float(gap.norm() / size), rel=1e-4)
    assert pk.plan_merge(base, {file: strength}, other_base=True).patches[0].difference is None
    pk.merge_checkpoint(base, {file: strength}, out, rebase="reapply", origin=origin)
    close(load(out)["lin.weight"], W + reapplied, 1e-6, "reapply with an origin")


def test_additive_adapters_are_the_same_on_any_base(tmp_path: Path) -> None:
    model = net()
    origin = write(tmp_path / "origin.safetensors", state(model))
    base = write(tmp_path / "base.safetensors", other(model, 0.1))
    adapt(model, "loha")
    file = pk.save(model, tmp_path / "a.safetensors")
    outs = []
    for options in ({"other_base": True}, {"rebase": "transplant", "origin": origin}, {"origin": origin}):
        pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors", **options)
        outs.append(load(tmp_path / "out.safetensors"))
    require_bits(outs[0], outs[1])
    require_bits(outs[0], outs[2])


@pytest.mark.parametrize("case", ["dora", "oft", "glora"])
def test_an_origin_that_is_not_the_base_the_file_was_trained_on_is_noticed(case: str, tmp_path: Path) -> None:
    model = net()
    base = write(tmp_path / "base.safetensors", other(model, 0.1))
    wrong = write(tmp_path / "wrong.safetensors", other(model, 0.3))
    adapt(model, case)
    file = pk.save(model, tmp_path / "a.safetensors")
    with pytest.raises(WrongBaseError):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", rebase="transplant", origin=wrong)


def test_an_origin_of_another_layout_or_shape_is_refused(tmp_path: Path) -> None:
    model = net()
    base = write(tmp_path / "base.safetensors", other(model, 0.1))
    adapt(model, "ia3", only=["lin"])
    file = pk.save(model, tmp_path / "a.safetensors")
    for i, changed in enumerate(({"bare.weight": torch.ones(2, 2)}, {"lin.weight": torch.ones(12, 9)})):
        origin = write(tmp_path / f"origin{i}.safetensors", changed)
        before = listing(tmp_path)
        with pytest.raises((MismatchError, WrongBaseError)):
            pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", rebase="transplant", origin=origin)
        assert listing(tmp_path) == before


# ------------------------------------------------------------------------------------------------------- all or nothing


def prepared(folder: Path) -> tuple[Path, Path]:
    """A base of several tensors and an adapter of two of them."""
    tensors = {f"layer{i}.weight": torch.randn(64, 64) for i in range(6)} | {"big.weight": torch.randn(700, 700)}
    base = write(folder / "base.safetensors", tensors)
    hands = {"layer1": full(64, 64, seed=1), "layer4": lora(64, 64, seed=2)}
    return base, write(folder / "a.safetensors", lycoris(hands))


def test_the_base_may_be_overwritten_by_the_result(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    pk.merge_checkpoint(base, {file: 0.7}, tmp_path / "out.safetensors")
    before = sorted(listing(tmp_path))
    pk.merge_checkpoint(base, {file: 0.7}, base, verify=True)
    assert base.read_bytes() == (tmp_path / "out.safetensors").read_bytes()
    assert sorted(listing(tmp_path)) == before


def test_the_same_merge_gives_the_same_bytes(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    for name in ("1.safetensors", "2.safetensors"):
        pk.merge_checkpoint(base, {file: 0.7}, tmp_path / name)
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_folder_is_never_written_over_another(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model", state(net()), 6)
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    before = listing(tmp_path)
    with pytest.raises(FileError, match="there already"):
        pk.merge_checkpoint(folder, {file: 1.0}, folder)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_an_error_in_the_middle_leaves_what_was_there(layout: str, tmp_path: Path) -> None:
    """Whatever it is: an interrupt, a full disk, a caller's own exception."""
    base, file = prepared(tmp_path)
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"what was there before")
    if layout == "folder":
        base, out = sharded(tmp_path / "model", load(base), 3), tmp_path / "out"
    before = listing(tmp_path)
    for moment in range(7):
        for error in (KeyboardInterrupt, OSError(28, "No space left on device"), ZeroDivisionError):

            def stop(done: int, total: int, at: list[int] = [moment], error: Any = error) -> None:  # noqa: B006
                at[0] -= 1
                if at[0] < 0:
                    raise error

            with pytest.raises(FileError if isinstance(error, OSError) else error):
                pk.merge_checkpoint(base, {file: 1.0}, out, progress=stop, verify=True)
            assert listing(tmp_path) == before


def test_progress_counts_the_bytes_of_the_base(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    seen: list[tuple[int, int]] = []
    pk.merge_checkpoint(
        base, {file: 1.0}, tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total))
    )
    total = sum(t.nbytes for t in load(base).values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total) and {t for _, t in seen} == {total}


@pytest.mark.parametrize("layout", ["file", "folder"])
@pytest.mark.parametrize("key", ["layer1.weight", "big.weight"], ids=["changed", "copied"])
def test_verify_notices_a_byte_that_the_disk_changed(key: str, layout: str, tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    tensors = load(base)
    out = tmp_path / "out.safetensors"
    if layout == "folder":
        base, out = sharded(tmp_path / "model", tensors, 3), tmp_path / "out"
    before = listing(tmp_path)

    def damaging() -> Callable[[int, int], None]:
        done: list[Path] = []

        def damage(*_: int) -> None:
            """Turn one bit of the tensor round, once, as soon as it is on the disk."""
            for path in (p for p in tmp_path.rglob("*") if ".tmp" in str(p) and p.is_file() and not done):
                with path.open("r+b") as opened:
                    length = int.from_bytes(opened.read(8), "little")
                    entry = json.loads(opened.read(length).decode()).get(key) if length else None
                    if entry is None:
                        continue
                    at = 8 + length + entry["data_offsets"][0] + 5
                    opened.seek(at)
                    byte = opened.read(1)
                    if byte:
                        done.append(path)
                        opened.seek(at)
                        opened.write(bytes([byte[0] ^ 1]))

        return damage

    with pytest.raises(FileError, match=key.replace(".", r"\.")):
        pk.merge_checkpoint(base, {file: 1.0}, out, progress=damaging(), verify=True)
    assert listing(tmp_path) == before
    pk.merge_checkpoint(base, {file: 1.0}, out, progress=damaging())
    damaged = load(out) if layout == "file" else load_folder(out)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    pk.merge_checkpoint(base, {file: 1.0}, out, verify=True)
    sound = load(out) if layout == "file" else load_folder(out)
    assert [k for k in sound if not same_bits(sound[k], damaged[k])] == [key], "the damage was not done"


def run_python(script: str, *arguments: object) -> Any:
    """What a fresh interpreter prints, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


KILL = """
import json, os, resource, signal, sys
import torch, peftkit as pk
from pathlib import Path
base, adapter, folder = map(Path, sys.argv[1:])
torch.set_num_threads(1)
pk.merge_checkpoint
old, results = b"what was there before", {}

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def attempt(name, prepare, out, **options):
    if out.name.startswith("old"):
        out.write_bytes(old)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            prepare()
            pk.merge_checkpoint(base, {adapter: 1.0}, out, **options)
            os._exit(0)
        except pk_error:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    ended = "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    left = [p.name for p in folder.iterdir() if p.name not in (base.name, adapter.name, out.name)]
    content = "nothing" if not out.exists() else "old" if out.read_bytes() == old else "new"
    results[name] = [ended, content, len(left)]
    for name in left:
        (folder / name).unlink()
    out.unlink(missing_ok=True)

from peftkit.errors import FileError as pk_error
from peftkit.files.formats import container
for out in (folder / "old.safetensors", folder / "new.safetensors"):
    for moment in range(7):
        def progress(done, total, left=[moment]):
            left[0] -= 1
            left[0] < 0 and die()
        attempt(f"{out.stem} at tensor {moment}", lambda: None, out, progress=progress)
    for call in ("fsync", "replace"):
        def prepare(call=call):
            class Os:
                def __getattr__(self, name):
                    return die if name == call else getattr(os, name)
            container.os = Os()
        attempt(f"{out.stem} before {call}", prepare, out, verify=True)
    for size in (100, 50_000, 1_000_000):
        def limit(size=size):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        attempt(f"{out.stem} on a disk of {size}", limit, out)
    attempt(f"{out.stem} undisturbed", lambda: None, out)
print(json.dumps(results))
"""


def test_a_killed_process_or_a_full_disk_leaves_the_old_file_or_none(tmp_path: Path) -> None:
    """SIGKILL at every tensor, before the flush and before the rename; a disk that ends in header, tensor or copy."""
    base, file = prepared(tmp_path)
    results = run_python(KILL, base, file, tmp_path)
    for name, (ended, content, left) in results.items():
        was = "old" if name.startswith("old") else "nothing"
        if "undisturbed" in name:
            assert (ended, content, left) == (0, "new", 0), name
        elif "disk" in name:
            assert (ended, content, left) == (3, was, 0), name
        else:
            assert (ended, content) == ("killed", was), name


# --------------------------------------------------------------------------------------------------------------- memory


MEMORY = """
import json, os, sys, threading
import torch, peftkit as pk
torch.set_num_threads(1)
pk.merge_checkpoint
from peftkit.adapters.dora import DoRA
import peftkit.delta.truncation

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def measure(base, adapter, out):
    before, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous())
    watcher = threading.Thread(target=watch)
    watcher.start()
    report = pk.merge_checkpoint(base, {adapter: 0.7}, out, dtype=getattr(torch, dtype) if dtype else None)
    done.set()
    watcher.join()
    return peak[0] - before, report.norm

base, out, dtype, *adapters = sys.argv[1:]
results = {}
for adapter in adapters:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            os.write(write, json.dumps(measure(base, adapter, out)).encode())
        finally:
            os._exit(0)
    os.close(write)  # or a child that dies would leave its parent reading for ever
    results[os.path.basename(adapter)] = json.loads(os.read(read, 1000))
    os.wait()
    os.unlink(out)
print(json.dumps(results))
"""


def test_memory_is_a_few_times_the_largest_tensor_that_changes(tmp_path: Path) -> None:
    """Into 300 MB whose largest changed tensor is 20 MB: beside the interpreter at most 3·20 MB and 100 MB."""
    rows = columns = 2240  # 20 MB of fp32
    sizes = {f"layer{i}.weight": ("F32", (rows, columns), 4 * rows * columns) for i in range(5)}
    sizes |= {f"other{i}.weight": ("F32", (5000, 5000), 100_000_000) for i in range(2)}
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    folder = shared / f"peftkit-{os.getpid()}"
    folder.mkdir()
    try:
        base = folder / "base.safetensors"
        torch.manual_seed(0)
        weight = torch.randn(rows, columns)
        with base.open("wb") as file:  # the others are zeros that no block of the file system holds
            file.write(container.header(sizes, {}))
            end = file.tell() + sum(size for _, _, size in sizes.values())
            for _ in range(5):
                file.write(container.raw(weight))
            file.truncate(end)
        made = {
            "lora": {"lora_up.weight": torch.randn(rows, 16), "lora_down.weight": torch.randn(16, columns)},
            "loha": {
                f"hada_w{i}_{side}": torch.randn(*((rows, 8) if side == "a" else (8, columns)))
                for i in (1, 2)
                for side in "ab"
            },
            "lokr": {"lokr_w1": torch.randn(8, 8), "lokr_w2": torch.randn(rows // 8, columns // 8)},
            "full": {"diff": torch.randn(rows, columns)},
        }
        made["dora"] = {**made["lora"], "dora_scale": torch.rand(rows, 1)}
        files = []
        for kind, tensors in made.items():
            files.append(folder / kind)
            save_file({f"lycoris_layer{i}.{k}": t.clone() for i in (0, 3) for k, t in tensors.items()}, files[-1])
        found = run_python(MEMORY, base, folder / "out.safetensors", "", *files)
        assert all(norm > 100 for _, norm in found.values()), "nothing was merged"
        used = {kind: f"{peak / 1e6:.0f} MB" for kind, (peak, _) in found.items()}
        assert max(peak for peak, _ in found.values()) <= 3 * 20_100_000 + 100_000_000, used
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("own, target", [("float16", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_memory_is_as_small_where_the_dtype_changes(own: str, target: str, tmp_path: Path) -> None:
    size = 6000
    weight = torch.randn(size, size).to(getattr(torch, own))
    base, file = write(tmp_path / "base.safetensors", {"a.weight": weight}), tmp_path / "lora"
    save_file({"a.lora_up.weight": torch.randn(size, 4), "a.lora_down.weight": torch.randn(4, size)}, file)
    ((peak, norm),) = run_python(MEMORY, base, tmp_path / "out.safetensors", target, file).values()
    assert norm > 100
    assert peak <= 3 * weight.nbytes + 100_000_000, f"{peak / 1e6:.0f} MB"


# ------------------------------------------------------------------------------------------------- what else is written


def test_metadata_stays_but_for_what_a_merge_makes_untrue(tmp_path: Path) -> None:
    own = {
        "format": "pt",
        "modelspec.title": "Ein Modell: ☃",
        "sshs_model_hash": "1",
        "sshs_legacy_hash": "2",
        "modelspec.hash_sha256": "0x3",
    }
    base = write(tmp_path / "base.safetensors", state(net()), own)
    one = write(tmp_path / "one.safetensors", lycoris({"lin": full(12, 8)}))
    two = write(tmp_path / "sub" / "one.safetensors", {"lycoris_norm.w_norm": exact(12, seed=3)})
    pk.merge_checkpoint(base, {one: 0.7, two: -0.5}, tmp_path / "out.safetensors")
    found = metadata(tmp_path / "out.safetensors")
    assert {k: found[k] for k in ("format", "modelspec.title")} == {k: own[k] for k in ("format", "modelspec.title")}
    assert not {k for k in found if "hash" in k}
    recipe = json.loads(found["peftkit_merge"])
    assert "0.7" in json.dumps(recipe) and "-0.5" in json.dumps(recipe), "the recipe lacks a file or its strength"


def test_a_cast_makes_hashes_untrue_too(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()), {"sshs_model_hash": "1"})
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    pk.merge_checkpoint(base, {file: 0.0}, tmp_path / "out.safetensors", dtype=torch.float16)
    assert "sshs_model_hash" not in metadata(tmp_path / "out.safetensors")


@pytest.mark.parametrize("verify", [False, True])
def test_tensors_of_every_dtype_and_name_are_carried_over(verify: bool, tmp_path: Path) -> None:
    """Also of those this library does not compute with, empty ones, and single numbers."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 100, (3, 4), generator=generator)
    dtypes = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
    others = {f"numbers of {dtype}": numbers.to(dtype) for dtype in dtypes}
    others |= {"bool": numbers > 50, "complex": numbers.to(torch.complex64), "fp8": numbers.to(torch.float8_e5m2)}
    others |= {'"quoted" and ☃\n': numbers.double(), "empty": torch.zeros(0, 3), "one": torch.tensor(2.5)}
    base = write(tmp_path / "base.safetensors", {**others, "lin.weight": torch.ones(12, 8)})
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", verify=verify)
    merged = load(tmp_path / "out.safetensors")
    require_bits({k: t for k, t in merged.items() if k != "lin.weight"}, others)


def test_tensors_keep_their_order_and_the_file_its_form(tmp_path: Path) -> None:
    """As the reference reads it: no holes, offsets in order, the header a JSON object that begins with a quote."""
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors")

    def order(path: Path) -> list[str]:
        entries = {k: v for k, v in header(path).items() if k != "__metadata__"}
        return sorted(entries, key=lambda key: entries[key]["data_offsets"])

    assert order(tmp_path / "out.safetensors") == order(base)
    assert (tmp_path / "out.safetensors").read_bytes()[8:10] == b'{"'


def test_a_plan_says_what_will_be_done(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    one = write(tmp_path / "one.safetensors", lycoris({"lin": full(12, 8), "bare": lora(8, 8)}))
    two = write(tmp_path / "two.safetensors", lycoris({"k1": loha(12, 8)}))
    plan = pk.plan_merge(base, {one: 0.7, two: -0.5})
    assert [(Path(p.file).name, p.name, p.kind, p.weight, p.strength) for p in plan.patches] == [
        ("one.safetensors", "lycoris_bare", "lora", "bare.weight", 0.7),
        ("one.safetensors", "lycoris_lin", "full", "lin.weight", 0.7),
        ("two.safetensors", "lycoris_k1", "loha", "k1.weight", -0.5),
    ]
    assert plan.table().row_count == 3
    assert "3 of them change" in str(plan) and "0.7" in str(plan) and "-0.5" in str(plan)
    assert plan.memory == 3 * 12 * 8 * 4 + 100_000_000


def test_a_pickled_base_is_refused_unless_it_may_be_read_as_data(tmp_path: Path) -> None:
    before = state(net())
    torch.save({"state_dict": before}, tmp_path / "base.ckpt")
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    with pytest.raises(FileError, match="pickle"):
        pk.merge_checkpoint(tmp_path / "base.ckpt", {file: 1.0}, tmp_path / "out.safetensors")
    pk.merge_checkpoint(tmp_path / "base.ckpt", {file: 1.0}, tmp_path / "out.safetensors", allow_pickle=True)
    require_bits(load(tmp_path / "out.safetensors"), hand_merge(before, {"lin.weight": [(full(12, 8), 1.0)]}))


def test_a_component_that_is_kept_as_a_pickle_is_not_lost(tmp_path: Path) -> None:
    """Published pipelines have a safety checker as .bin: it goes along, or the merge says that it does not."""
    folder = tmp_path / "pipeline"
    write(folder / "unet" / "diffusion_pytorch_model.safetensors", state(net()))
    (folder / "model_index.json").write_text("{}")
    (folder / "safety_checker").mkdir()
    torch.save({"a": torch.ones(2)}, folder / "safety_checker" / "pytorch_model.bin")
    file = write(tmp_path / "a.safetensors", lycoris({"lin": full(12, 8)}))
    try:
        pk.merge_checkpoint(folder, {file: 1.0}, tmp_path / "out")
    except FileError:
        return
    assert listing(tmp_path / "out").keys() == listing(folder).keys()


def test_what_a_narrower_result_loses_is_measured_on_what_is_written(tmp_path: Path) -> None:
    """Against the base in that dtype: what is lost to it alone is no change of the adapter's."""
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    factors = {"a.lora_up.weight": torch.full((64, 1), 1e-3), "a.lora_down.weight": torch.full((1, 64), 1e-1)}
    base, file = write(tmp_path / "base.safetensors", {"a.weight": W}), write(tmp_path / "x.safetensors", factors)
    out = tmp_path / "out.safetensors"
    for dtype in (torch.bfloat16, torch.float16):
        (found,) = pk.merge_checkpoint(base, {file: 1.0}, out, dtype=dtype).weights
        delta = factors["a.lora_up.weight"] @ factors["a.lora_down.weight"]
        moved = load(out)["a.weight"].double() - W.to(dtype).double()
        assert found.change == pytest.approx(float(moved.norm()), rel=1e-5)
        assert found.lost == pytest.approx(float((delta - moved).norm() / delta.norm()), rel=1e-3)
    with pytest.raises(MergeError, match="too small"):
        pk.merge_checkpoint(base, {file: 1e-6}, tmp_path / "none.safetensors", dtype=torch.bfloat16)
    assert not (tmp_path / "none.safetensors").exists()


def test_the_result_does_not_take_the_place_of_an_adapter(tmp_path: Path) -> None:
    base, file = prepared(tmp_path)
    before = file.read_bytes()
    with pytest.raises(OptionError, match="one of the adapters"):
        pk.merge_checkpoint(base, {file: 1.0}, file)
    assert file.read_bytes() == before
