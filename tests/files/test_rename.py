"""Other names for the modules of a file: the rules, what they refuse, and every function that takes them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import MismatchError, OptionError
from peftkit.files.rename import Renames, suggested
from tests.support.files import State, load, require_bits, write
from tests.support.hands import lora, lycoris_tensors
from tests.support.models import tree

# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, name, expected",
    [
        (("a.*.q", "x.*.to_q"), "a.b.0.q", "x.b.0.to_q"),
        (("*.attn.*", "*.attn1.*"), "a.attn.b.attn.c", "a.attn1.b.attn.c"),  # a star takes as little as it can
        (("layer?.w[13]", "layer?.v[13]"), "layer7.w3", "layer7.v3"),
        (("w[!13]*", "v[13]*"), "w2.q", "v2.q"),
        (("net.*", "*"), "net.blocks.0", "blocks.0"),
        (("*", "net.*"), "blocks.0", "net.blocks.0"),
        (("lora_unet_*_q", "*.q"), "lora_unet_blocks_0_q", "blocks_0.q"),
        (("a.b", "c"), "a.b", "c"),
        (("a", "c"), "a.b", "a.b"),  # a whole name
        (("A.*", "c.*"), "a.b", "a.b"),  # case counts
    ],
)
def test_a_wildcard_of_the_replacement_is_what_the_patterns_matched(
    rule: tuple[str, str], name: str, expected: str
) -> None:
    assert Renames(dict([rule])).of(name) == expected


def test_the_first_rule_that_matches_counts_so_that_names_can_change_places() -> None:
    renames = Renames({"*.norm2": "*.norm3", "*.norm3": "*.norm2", "*": "*"})
    assert [renames.of(f"blocks.0.{name}") for name in ("norm2", "norm3", "q")] == [
        "blocks.0.norm3",
        "blocks.0.norm2",
        "blocks.0.q",
    ]
    assert renames.unmatched == []


@pytest.mark.parametrize(
    "rename, said",
    [
        ({"a.*": "b"}, "1 * in the replacement, as in the pattern, was expected"),
        ({"a": "*"}, "0 * in the replacement"),
        ({"[z-a].*": "[z-a].*"}, "is no pattern"),
        ({"a.*": 1}, "{pattern: replacement} was expected"),
        ("a.*=b.*", "{pattern: replacement} was expected"),
        ({"no.such": "x"}, "'no.such' of rename matches no name of"),
        ({"blok.0": "x"}, "Did you mean 'block.0'"),
        ({"block.": "x."}, "give rename={'block.*': 'x.*'}"),
        ({"*.0": "x.*", "block.0": "y"}, "that the rules before it leave: give it before them"),
        ({"block.0": "block.1"}, "'block.0' and 'block.1' would both be 'block.1'"),
    ],
)
def test_a_rule_without_a_meaning_is_refused(rename: Any, said: str, tmp_path: Path) -> None:
    tensors = lycoris_tensors({"block.0": lora(8, 8), "block.1": lora(8, 8)})
    file = write(tmp_path / "a.safetensors", {k.replace("lycoris_block_", "block."): t for k, t in tensors.items()})
    with pytest.raises(OptionError, match=re.escape(said)):
        pk.read(file, rename=rename)


def test_names_that_match_nothing_are_found_out_in_little_time() -> None:
    renames = Renames({"*a*a*a*a*a*b": "*a*a*a*a*a*c"})
    assert renames.of("a" * 20_000) == "a" * 20_000
    assert renames.of("a" * 20_000 + "b") == "a" * 20_000 + "c"


def test_the_rule_for_a_message_makes_one_name_of_the_other() -> None:
    pairs = [
        ("blocks.0.self_attn.q", "blocks.0.attn1.q"),
        ("model.layers.0.mlp", "model.language_model.layers.0.mlp"),
        ("lora_unet_a_b", "a.b"),
        ("x.a.b", "a.b"),
        ("a.b", "x.a.b"),
        ("a", "b.c"),
    ]
    for name, meant in pairs:
        ((pattern, replacement),) = re.findall(r"rename=\{'(.*)': '(.*)'\}", suggested(name, meant))
        assert Renames({pattern: replacement}).of(name) == meant, (pattern, replacement)


# -- laws --------------------------------------------------------------------------------------------------------------

#: names of a base and of a file for it, and the rules between them
OURS = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.1.attn2.to_q", "proj_out")
THEIRS = (
    "diffusion_model.blocks.0.self_attn.q",
    "diffusion_model.blocks.0.self_attn.o",
    "diffusion_model.blocks.1.cross_attn.q",
    "diffusion_model.head.head",
)
THERE = {
    "diffusion_model.blocks.*.self_attn.q": "blocks.*.attn1.to_q",
    "diffusion_model.blocks.*.self_attn.o": "blocks.*.attn1.to_out.0",
    "diffusion_model.blocks.*.cross_attn.q": "blocks.*.attn2.to_q",
    "diffusion_model.head.head": "proj_out",
}
BACK = {new: old for old, new in THERE.items()}


def factors(names: tuple[str, ...]) -> State:
    """A LoRA with an alpha for each name, and a change of the last one's bias."""
    generator = torch.Generator().manual_seed(2)
    found: State = {}
    for name in names:
        found |= {
            f"{name}.lora_down.weight": torch.randn(2, 8, generator=generator),
            f"{name}.lora_up.weight": torch.randn(8, 2, generator=generator),
            f"{name}.alpha": torch.tensor(3.0),
        }
    return found | {f"{names[-1]}.diff_b": torch.randn(8, generator=generator)}


def model() -> nn.Module:
    torch.manual_seed(0)
    return tree({name: nn.Linear(8, 8) for name in OURS})


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A base, a file of names of another spelling for it, and the same file renamed by hand."""
    base = write(tmp_path / "base.safetensors", model().state_dict())
    return base, write(tmp_path / "a.safetensors", factors(THEIRS)), write(tmp_path / "b.safetensors", factors(OURS))


def places(plan: pk.MergePlan) -> list[tuple[Any, ...]]:
    found = [(p.name, p.parts, p.shape, p.strength, p.law) for p in plan.patches]
    return [*found, *((v.name, v.spans, v.strength) for v in plan.vectors)]


def test_a_renamed_file_merges_to_the_same_bits_as_one_renamed_by_hand(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, theirs, ours = files
    with pytest.raises(MismatchError, match="without a place"):
        pk.plan_merge(base, {theirs: 1.0})
    strengths = {"blocks.0.*": 0.5, "*": -1.0}  # over the new names
    pk.merge_checkpoint(base, {theirs: strengths}, tmp_path / "merged.safetensors", rename=THERE)
    pk.merge_checkpoint(base, {ours: strengths}, tmp_path / "by_hand.safetensors")
    require_bits(load(tmp_path / "merged.safetensors"), load(tmp_path / "by_hand.safetensors"))


def test_renaming_by_the_same_names_changes_nothing(files: tuple[Path, Path, Path]) -> None:
    base, _, ours = files
    plain = pk.plan_merge(base, {ours: 1.0})
    for rename in ({"*": "*"}, {"blocks.*": "blocks.*"}, {name: name for name in OURS}):
        same = pk.plan_merge(base, {ours: 1.0}, rename=rename)
        assert places(same) == places(plain) and str(same) == str(plain)
        assert pk.read(ours, rename=rename).renamed == {}


def test_renaming_forth_and_back_is_the_same_plan(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, theirs, ours = files
    pk.resize(ours, tmp_path / "there.safetensors", rank=2, rename=BACK, ignore="*.diff_b")
    assert sorted(pk.read(tmp_path / "there.safetensors").patches) == sorted(THEIRS)
    back = pk.plan_merge(base, {tmp_path / "there.safetensors": 1.0}, rename=THERE)
    forth = pk.plan_merge(base, {ours: 1.0}, ignore="*.diff_b")
    assert places(back) == places(forth)
    assert pk.read(theirs, rename=THERE).patches.keys() == pk.read(ours).patches.keys()


def test_a_plan_and_an_inspection_say_what_was_renamed(files: tuple[Path, Path, Path]) -> None:
    base, theirs, _ = files
    plan = pk.plan_merge(base, {theirs: 1.0}, rename=THERE)
    assert f"4 names are others than in the file, {THEIRS[1]} is {OURS[1]}" in str(plan)
    found = pk.inspect(theirs, rename=THERE)
    assert {m.name for m in found.modules} == set(OURS)
    assert found.renamed == dict(zip(THEIRS, OURS, strict=True)) and "loads in, so renamed: " in str(found)


# -- every function that reads a file ----------------------------------------------------------------------------------


def on_model(path: Path, **options: Any) -> State:
    """What a file makes of the model."""
    loaded = model()
    pk.load(loaded, path, **options)
    pk.merge(loaded)
    pk.unwrap(loaded, keep_merged=True)
    return loaded.state_dict()


VERBS: dict[str, Callable[..., object]] = {
    "convert": lambda path, out, **o: pk.convert(path, out, "full", **o),
    "resize": lambda path, out, **o: pk.resize(path, out, rank=2, **o),
    "combine": lambda path, out, **o: pk.combine({path: 1.0, path.with_name("b.safetensors"): 0.0}, out, **o),
    "export": lambda path, out, **o: pk.export(path, out, "lycoris", **o),
}


@pytest.mark.parametrize("verb", VERBS)
def test_what_is_written_has_the_new_names(verb: str, files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    _, theirs, ours = files
    plain = {"ignore": "*.diff_b"}
    VERBS[verb](theirs, tmp_path / "out.safetensors", rename=THERE, **plain)
    by_file, by_hand = on_model(tmp_path / "out.safetensors"), on_model(ours, **plain)
    for key in by_hand:
        torch.testing.assert_close(by_file[key], by_hand[key], rtol=0, atol=2e-5)


def test_load_swap_and_diff_take_rules(files: tuple[Path, Path, Path]) -> None:
    _, theirs, ours = files
    require_bits(on_model(theirs, rename=THERE), on_model(ours))
    swapped = model()
    pk.load(swapped, ours, name="style")
    assert set(pk.swap(swapped, theirs, "style", rename=THERE).loaded) == {*OURS, "proj_out.bias"}
    assert pk.diff(theirs, ours, rename=THERE, ignore="*.diff_b").equal
    assert pk.doctor(theirs, rename=THERE).code == pk.doctor(ours).code == 0


def test_a_file_of_this_library_is_renamed_with_its_base_its_extras_and_what_is_shared(tmp_path: Path) -> None:
    """The fingerprints, a norm that trained beside, and one adapter on two layers go with the names."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
            self.second.weight = self.first.weight

    torch.manual_seed(3)
    inner = Tied()
    outer = nn.ModuleDict({"inner": copy.deepcopy(inner)})
    pk.wrap(inner, "lora", targets=["first", "second"], rank=2, tied="share")
    inner.norm.requires_grad_(True)
    nn.init.normal_(pk.adapter_parameters(inner)[0])
    path = pk.save(inner, tmp_path / "a.safetensors")
    report = pk.load(outer, path, rename={"*": "inner.*"}, tied="share")
    assert set(report.loaded) == {"inner.first", "inner.second"} and report.complete
    assert set(report.extras) == {"inner.norm.weight", "inner.norm.bias"} and report.base_distance == 0
    by_module = pk.read(path, rename={"norm": "layer_norm"})
    assert set(by_module.extras) == {"layer_norm.weight", "layer_norm.bias"}


def test_a_file_goes_on_a_model_that_is_one_layer(tmp_path: Path) -> None:
    """Whose path is the empty name."""
    path = write(tmp_path / "a.safetensors", factors(("lora_unet_lin",)))
    layer = nn.Linear(8, 8)
    assert pk.load(layer, path, rename={"lora_unet_lin": ""}, ignore="*.diff_b").loaded == ("",)


def test_a_full_checkpoint_takes_no_rules(tmp_path: Path) -> None:
    wrapped = model()
    pk.wrap(wrapped, "lora", rank=2)
    path = write(tmp_path / "full.safetensors", wrapped.state_dict())
    with pytest.raises(OptionError, match="rename="):
        pk.load(wrapped, path, rename={"*": "*"})


def test_the_difference_of_checkpoints_of_other_names(tmp_path: Path) -> None:
    """As of a base under the names of its class, and of what it was tuned to, saved by another program."""
    before, X = model().state_dict(), torch.ones(8, 8)
    after = {f"net.{k}": t + X if k == f"{OURS[0]}.weight" else t for k, t in before.items()}
    base, tuned = write(tmp_path / "base.safetensors", before), write(tmp_path / "tuned.safetensors", after)
    with pytest.raises(MismatchError, match="are not one model") as refused:
        pk.extract(tuned, base, tmp_path / "a.safetensors", rank=1)
    (rule,) = re.findall(r"pass rename=\{'(.*?)': '(.*?)'\}", str(refused.value))
    assert rule == ("net.*", "*")
    report = pk.extract(tuned, base, tmp_path / "a.safetensors", rank=1, rename=dict([rule]))
    assert [w.weight for w in report.weights] == [OURS[0]] and report.lost < 1e-6
    for rename, said in ({"nets.*": "*"}, "matches no name"), ({"net.*.bias": "net.*.weight"}, "would be"):
        with pytest.raises(OptionError, match=said):
            pk.extract(tuned, base, tmp_path / "b.safetensors", rank=1, rename=rename)
    assert not (tmp_path / "b.safetensors").exists()
