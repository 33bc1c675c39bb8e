"""Strengths, and what a plan finds wrong before anything is written."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftkit as pk
from peftkit.errors import (
    AmbiguousFileError,
    FileError,
    MergeError,
    MismatchError,
    OptionError,
    QuantisedMergeError,
    UnsupportedLayerError,
    WrongBaseError,
)
from peftkit.files.families.names import Family
from peftkit.files.formats.container import Container
from tests.support.files import State, listing, load, metadata, require_bits, write
from tests.support.hands import full, hand_merge, lora, lycoris_tensors
from tests.support.merging import FUSED, both_layouts, other
from tests.support.models import accepting, adapt, merged_in_memory, net, state
from tests.support.numbers import close

# -- strengths ---------------------------------------------------------------------------------------------------------


def test_strengths_go_by_the_first_pattern_that_matches(tmp_path: Path) -> None:
    before = state(net())
    base = write(tmp_path / "base.safetensors", before)
    hands = {"lin": full(12, 8, seed=1), "bare": full(8, 8, seed=2), "k1": full(12, 8, seed=3)}
    file = write(tmp_path / "a.safetensors", lycoris_tensors(hands))
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
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
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
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8), "bare": full(8, 8)}))
    before = listing(tmp_path)
    with pytest.raises(OptionError, match=message):
        pk.merge_checkpoint(base, {file: rules}, tmp_path / "out.safetensors")
    assert listing(tmp_path) == before


@pytest.mark.parametrize("way", ["a link", "another name", "a detour"])
def test_one_adapter_by_two_paths_is_refused(way: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    again = tmp_path / "b.safetensors"
    if way == "a link":
        again.symlink_to(file)
    elif way == "another name":
        again.hardlink_to(file)
    else:
        again = tmp_path / ".." / tmp_path.name / file.name
    with pytest.raises(OptionError, match=r"twice, as .*a\.safetensors too"):
        pk.plan_merge(base, {file: 1.0, again: 0.5})


def test_adapters_given_twice_or_not_at_all_raise(tmp_path: Path) -> None:
    base = write(tmp_path / "base.safetensors", state(net()))
    file = write(tmp_path / "a.safetensors", lycoris_tensors({"lin": full(12, 8)}))
    anything: Any = file, str(file), [file]
    for adapters in ({}, {file: 1.0, str(file): 1.0}, *anything):
        with pytest.raises(OptionError):
            pk.merge_checkpoint(base, adapters, tmp_path / "out.safetensors")
    for options in ({"rebase": "x"}, {"dtype": torch.int8}, {"dtype": "fp16"}):
        with pytest.raises(OptionError):
            pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.safetensors", **options)
    with pytest.raises(FileError, match=r"\*\.safetensors"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out.ckpt")
    with pytest.raises(FileError, match="no folder"):
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "nowhere" / "out.safetensors")


# -- pre-flight --------------------------------------------------------------------------------------------------------


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
            f"fp8 under {scale}": (QuantisedMergeError, scale, cast(fp8, **{scale: one}), lambda: good)
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
    with pytest.raises(AmbiguousFileError, match=r"a\.b_c or a_b\.c") as caught:
        pk.plan_merge(base, {file: 1.0})
    offered = [ast.literal_eval(said) for said in re.findall(r"rename=(\{.*?\})", str(caught.value))]
    touched = [pk.plan_merge(base, {file: 1.0}, rename=names).touched for names in offered]
    assert touched == [("a.b_c.weight",), ("a_b.c.weight",)]
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
