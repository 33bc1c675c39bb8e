"""A file for several parts of a pipeline, or names that fit two: component= says which is meant."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import AmbiguousFileError, MismatchError, OptionError
from peftkit.files.families.names import Family
from tests.support.files import State, load_folder, require_bits, write
from tests.support.hands import full
from tests.support.small_families import diffusers_state

PATH = "blocks.0.attn1.to_q"
EXPERTS = ("transformer", "transformer_2")


def experts(folder: Path) -> Path:
    """A pipeline of two transformers with the same names, as Wan 2.2 is."""
    for value, part in enumerate(EXPERTS):
        name = folder / part / "diffusion_pytorch_model.safetensors"
        write(name, {f"{PATH}.weight": torch.full((12, 8), float(value)), "head.weight": torch.ones(4, 4)})
    (folder / "model_index.json").write_text("{}")
    return folder


def values(folder: Path) -> dict[str, State]:
    return {part: load_folder(folder / part) for part in EXPERTS}


SPELLINGS = {
    "bare": PATH,
    "lycoris": f"lycoris_{PATH.replace('.', '_')}",
    "kohya": f"lora_unet_{PATH.replace('.', '_')}",
    "comfyui": f"diffusion_model.{PATH}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_name_of_two_transformers_asks_which(spelling: str, tmp_path: Path) -> None:
    base = experts(tmp_path / "base")
    file = write(tmp_path / "a.safetensors", full(12, 8).keyed(SPELLINGS[spelling]))
    with pytest.raises(AmbiguousFileError, match="transformer") as caught:
        pk.plan_merge(base, {file: 1.0})
    offered = re.findall(r"component='(\w+)'", str(caught.value))
    assert offered == list(EXPERTS)
    before, change = values(base), full(12, 8).tensors["diff"]
    for part in offered:
        pk.merge_checkpoint(base, {file: 1.0}, tmp_path / part, component=part)
        after = values(tmp_path / part)
        before_part = before[part][f"{PATH}.weight"]
        require_bits(after[part], before[part] | {f"{PATH}.weight": before_part + change})
        (other,) = set(EXPERTS) - {part}
        require_bits(after[other], before[other])


def test_a_name_that_says_its_transformer_is_taken_at_its_word(tmp_path: Path) -> None:
    base = experts(tmp_path / "base")
    hands = {f"{part}.{PATH}": full(12, 8, seed=i + 1) for i, part in enumerate(EXPERTS)}
    tensors = {k: t for name, hand in hands.items() for k, t in hand.keyed(name).items()}
    both = write(tmp_path / "both.safetensors", tensors)
    assert pk.plan_merge(base, {both: 1.0}).touched == tuple(f"{part}.{PATH}.weight" for part in EXPERTS)
    for part in EXPERTS:
        assert pk.plan_merge(base, {both: 1.0}, component=part).touched == (f"{part}.{PATH}.weight",)
    # diffusers calls the transformer so in files of either expert
    one = write(tmp_path / "one.safetensors", hands[f"transformer.{PATH}"].keyed(f"transformer.{PATH}"))
    assert pk.plan_merge(base, {one: 1.0}).touched == (f"transformer.{PATH}.weight",)
    assert pk.plan_merge(base, {one: 1.0}, component="transformer_2").touched == (f"transformer_2.{PATH}.weight",)


def test_one_expert_s_checkpoint_takes_its_own_of_a_file_of_both(tmp_path: Path) -> None:
    base = experts(tmp_path / "base") / "transformer_2"
    hands = {part: full(12, 8, seed=i + 1) for i, part in enumerate(EXPERTS)}
    tensors = {k: t for part, hand in hands.items() for k, t in hand.keyed(f"{part}.{PATH}").items()}
    both = write(tmp_path / "both.safetensors", tensors)
    before = load_folder(base)[f"{PATH}.weight"]
    for part in EXPERTS:
        pk.merge_checkpoint(base, {both: 1.0}, tmp_path / part, component=part)
        after = load_folder(tmp_path / part)[f"{PATH}.weight"]
        assert torch.equal(after, before + hands[part].tensors["diff"])


def test_a_native_file_of_one_model_goes_to_the_part_that_is_named(tmp_path: Path) -> None:
    base = experts(tmp_path / "base")
    model = nn.Module()
    model.head = nn.Linear(4, 4, bias=False)
    nn.init.ones_(model.head.weight)
    pk.wrap(model, "full", targets="head")
    with torch.no_grad():
        pk.adapter_parameters(model)[0].fill_(0.5)
    file = pk.save(model, tmp_path / "a.safetensors")
    with pytest.raises(AmbiguousFileError, match="component='transformer'"):
        pk.plan_merge(base, {file: 1.0})
    for part in EXPERTS:
        assert pk.plan_merge(base, {file: 1.0}, component=part).touched == (f"{part}.head.weight",)


def test_a_part_that_is_not_there_is_answered_with_those_that_are(tmp_path: Path) -> None:
    base = experts(tmp_path / "base")
    file = write(tmp_path / "a.safetensors", full(12, 8).keyed(PATH))
    with pytest.raises(OptionError, match=r"'transformer' or 'transformer_2' was expected\. Did you mean"):
        pk.plan_merge(base, {file: 1.0}, component="transfomer_2")
    text = write(tmp_path / "te.safetensors", full(12, 8).keyed("lora_te_text_model_encoder"))
    with pytest.raises(MismatchError, match="no adapter for transformer in it"):
        pk.plan_merge(base, {text: 1.0}, component="transformer")


def two_parts(path: Path, unet: str, text: str, shape: tuple[int, int]) -> Path:
    return write(path, full(12, 8).keyed(f"lora_unet_{unet}") | full(*shape, seed=1).keyed(f"lora_te_{text}"))


def test_a_file_of_two_parts_onto_one_of_them(tmp_path: Path) -> None:
    unet = write(tmp_path / "unet.safetensors", {"mid.to_q.weight": torch.ones(12, 8)})
    text = write(tmp_path / "text.safetensors", {"encoder.q_proj.weight": torch.ones(6, 6)})
    file = two_parts(tmp_path / "a.safetensors", "mid_to_q", "encoder_q_proj", (6, 6))
    with pytest.raises(MismatchError, match="It is of the text_encoder: component='unet' leaves it alone"):
        pk.plan_merge(unet, {file: 1.0})
    assert pk.plan_merge(unet, {file: 1.0}, component="unet").touched == ("mid.to_q.weight",)
    assert pk.plan_merge(text, {file: 1.0}, component="text_encoder").touched == ("encoder.q_proj.weight",)


def test_a_file_of_a_pipeline_onto_the_unet_of_a_family(families: dict[str, Family], tmp_path: Path) -> None:
    family = families["sd15"]
    theirs = diffusers_state(family, component="unet")
    key = next(k for k, t in theirs.items() if k.endswith("to_q.weight") and t.dim() == 2)
    name = key.removesuffix(".weight").replace(".", "_")
    base = write(tmp_path / "unet.safetensors", theirs)
    text = "text_model_encoder_layers_0_self_attn_q_proj"
    tensors = full(*theirs[key].shape).keyed(f"lora_unet_{name}") | full(4, 4).keyed(f"lora_te_{text}")
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(MismatchError, match="component='unet'"):
        pk.plan_merge(base, {file: 1.0})
    assert pk.plan_merge(base, {file: 1.0}, component="unet").touched == (key,)


def test_a_text_encoder_leaves_the_denoiser_s_keys_of_an_unknown_family_alone(tmp_path: Path) -> None:
    """Whatever the trainer puts before the denoiser's names."""
    model = nn.Module()
    model.encoder = nn.Linear(6, 6)
    for i, prefix in enumerate(("transformer.", "diffusion_model.", "model.diffusion_model.", "unet.", "lora_unet_")):
        tensors = full(12, 8).keyed(f"{prefix}mystery") | full(6, 6).keyed("text_encoder.encoder")
        file = write(tmp_path / f"{i}.safetensors", tensors)
        assert pk.load(model, file, component="text_encoder").loaded == ("encoder",)
        pk.unwrap(model)


def test_a_model_that_has_the_very_name_takes_it(tmp_path: Path) -> None:
    model = nn.Module()
    model.transformer = nn.ModuleDict({"h": nn.Linear(6, 6)})
    file = write(tmp_path / "a.safetensors", full(6, 6).keyed("transformer.h"))
    assert pk.load(model, file, component="text_encoder").loaded == ("transformer.h",)


def test_a_pipeline_in_memory_asks_too(tmp_path: Path) -> None:
    pipe = nn.ModuleDict({part: nn.ModuleDict({"head": nn.Linear(8, 12)}) for part in EXPERTS})
    file = write(tmp_path / "a.safetensors", full(12, 8).keyed("lycoris_head"))
    with pytest.raises(AmbiguousFileError, match="pass component='transformer' or pass component='transformer_2'"):
        pk.load(pipe, file)
    for part in EXPERTS:
        assert pk.load(pipe, file, component=part).loaded == (f"{part}.head",)
        pk.unwrap(pipe)


def test_a_file_of_another_kind_of_model_is_called_so(tmp_path: Path) -> None:
    """Hints are names that the base has, not spellings of them that only some programs know."""
    base = tmp_path / "base"
    text = {f"text_model.encoder.layers.{i}.self_attn.q_proj.weight": torch.ones(8, 8) for i in range(2)}
    write(base / "text_encoder" / "model.safetensors", text)
    write(base / "unet" / "diffusion_pytorch_model.safetensors", {"mid.attn1.to_q.weight": torch.ones(8, 8)})
    (base / "model_index.json").write_text("{}")
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    file = write(tmp_path / "a.safetensors", {k: t for name in names for k, t in full(8, 8).keyed(name).items()})
    with pytest.raises(MismatchError, match=r"no module of .*: a file for another kind of model") as caught:
        pk.plan_merge(base, {file: 1.0})
    assert "lora_te" not in str(caught.value)
    typo = "lora_te_text_model_encoder_layers_0_self_attn_q_prj"
    file = write(tmp_path / "b.safetensors", full(8, 8).keyed(typo))
    with pytest.raises(MismatchError) as caught:
        pk.plan_merge(base, {file: 1.0})
    (rule,) = (ast.literal_eval(said) for said in re.findall(r"rename=(\{.*?\})", str(caught.value)))
    touched = pk.plan_merge(base, {file: 1.0}, rename=rule).touched
    assert touched == ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.weight",)
