"""Merging file to file adds what the formulas say, summed in fp32 and rounded once; to vectors as well."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import peftkit as pk
from peftkit.errors import MergeError, MismatchError, OptionError, UnsupportedLayerError
from tests.support.files import listing, load, require_bits, same_bits, write
from tests.support.hands import HANDS, exact, hand_merge, loha, lora, lycoris_tensors
from tests.support.merging import DTYPE, DTYPES
from tests.support.models import net, state
from tests.support.numbers import close

# -- against formulas by hand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HANDS)
def test_a_foreign_file_adds_what_its_formula_says(kind: str, tmp_path: Path) -> None:
    model = net(torch.bfloat16)
    before = state(model)
    base = write(tmp_path / "base.safetensors", before)
    hands = {"lin": HANDS[kind](12, 8, seed=1), "bare": HANDS[kind](8, 8, seed=20)}
    file = write(tmp_path / "adapter.safetensors", lycoris_tensors(hands))
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
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": hand}) | {"lycoris_norm.w_norm": vector})
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
    file = write(tmp_path / "adapter.safetensors", lycoris_tensors(hands))
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


# -- vectors -----------------------------------------------------------------------------------------------------------


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
