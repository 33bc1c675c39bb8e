"""Names that mean one module without a family: rare prefixes, levels of language models, and what is said where not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import AmbiguousFileError, MismatchError, PeftkitError
from tests.support.files import State, load, require_bits, write
from tests.support.models import language_model, tree

PATHS = ("blocks.0.self_attn.q_proj", "blocks.0.mlp.layer1", "blocks.1.self_attn.q_proj")


def factors(names: Sequence[str], size: int = 8) -> State:
    """A LoRA for each name, of whole numbers."""
    found: State = {}
    for i, name in enumerate(names):
        found[f"{name}.lora_A.weight"] = torch.arange(2.0 * size).reshape(2, size) - i
        found[f"{name}.lora_B.weight"] = torch.arange(2.0 * size).reshape(size, 2) + i
    return found


def changes(names: Sequence[str], prefix: str = "", size: int = 8) -> State:
    """What `factors` add to weights of zeros."""
    A_B = factors(names, size)
    return {f"{prefix}{n}.weight": A_B[f"{n}.lora_B.weight"] @ A_B[f"{n}.lora_A.weight"] for n in names}


def merged(base: State, tensors: State, folder: Path, **options: Any) -> State:
    paths = write(folder / "base.safetensors", base), write(folder / "a.safetensors", tensors)
    pk.merge_checkpoint(paths[0], {paths[1]: 1.0}, folder / "merged.safetensors", overwrite=True, **options)
    return load(folder / "merged.safetensors")


# -- prefixes ----------------------------------------------------------------------------------------------------------

#: how a file may call a module whose path is PATHS[0], and whether without dots
SPELLED = {
    "lora_unet__": "lora_unet__blocks_0_self_attn_q_proj",
    "lora_prior_unet_": "lora_prior_unet_blocks_0_self_attn_q_proj",
    "half flat": "lora_unet_blocks_0.self_attn.q_proj",
    "half flat, LyCORIS": "lycoris_blocks_0_self_attn.q_proj",
    "unet.base_model.model.": "unet.base_model.model.blocks.0.self_attn.q_proj",
    "diffusion_model.transformer.": "diffusion_model.transformer.blocks.0.self_attn.q_proj",
    "transformer._orig_mod.": "transformer._orig_mod.blocks.0.self_attn.q_proj",
    "a compiled block": "base_model.model.blocks.0._orig_mod.self_attn.q_proj",
}


@pytest.mark.parametrize("base_prefix", ["", "net.", "model.model.", "model.diffusion_model.", "_orig_mod."])
@pytest.mark.parametrize("spelled", SPELLED)
def test_a_rare_prefix_means_the_module_behind_it(spelled: str, base_prefix: str, tmp_path: Path) -> None:
    """Of trainers (Wan-Fun, Stable Cascade, PixArt), torch.compile, and of the official checkpoints of Cosmos."""
    base = {f"{base_prefix}{path}.weight": torch.zeros(8, 8) for path in PATHS}
    scale = {"alpha": "rank"} if "base_model." in SPELLED[spelled] else {}
    out = merged(base, factors([SPELLED[spelled]]), tmp_path, **scale)
    require_bits(out, base | changes(PATHS[:1], base_prefix))


@pytest.mark.parametrize("spelled", SPELLED)
def test_and_on_a_model_in_memory(spelled: str, tmp_path: Path) -> None:
    model = tree({path: nn.Linear(8, 8, bias=False) for path in PATHS})
    path = write(tmp_path / "a.safetensors", factors([SPELLED[spelled]]))
    scale = {"alpha": "rank"} if "base_model." in SPELLED[spelled] else {}
    assert pk.load(model, path, **scale).loaded == PATHS[:1]


def test_the_own_path_of_a_module_goes_before_one_behind_a_prefix(tmp_path: Path) -> None:
    model = nn.ModuleDict({"net": nn.ModuleDict({"lin": nn.Linear(8, 8)}), "lin": nn.Linear(8, 8)})
    assert pk.load(model, write(tmp_path / "a.safetensors", factors(["lin"]))).loaded == ("lin",)


def test_a_path_of_two_modules_is_asked_about_and_the_rule_it_names_decides(tmp_path: Path) -> None:
    base = {f"{part}.{PATHS[0]}.weight": torch.zeros(8, 8) for part in ("net", "unet")}
    with pytest.raises(AmbiguousFileError) as asked:
        merged(base, factors([PATHS[0]]), tmp_path)
    rules = dict(re.findall(r"rename=\{'(.*?)': '(.*?)'\}", str(asked.value).partition(" or pass ")[2]))
    assert rules == {PATHS[0]: f"unet.{PATHS[0]}"}
    out = merged(base, factors([PATHS[0]]), tmp_path, rename=rules)
    require_bits(out, base | changes([PATHS[0]], "unet."))


def test_names_of_the_second_expert_go_on_a_model_that_is_said_to_be_it(tmp_path: Path) -> None:
    """Both transformers of Wan 2.2 have the same paths, and the base is one of them."""
    base, name = {f"{PATHS[0]}.weight": torch.zeros(8, 8)}, f"transformer_2.{PATHS[0]}"
    with pytest.raises(MismatchError, match="without a place") as refused:
        merged(base, factors([name]), tmp_path)
    assert "pass rename={'transformer_2.*': '*'}" in str(refused.value)
    for said in ({"rename": {"transformer_2.*": "*"}}, {"component": "transformer_2"}):
        require_bits(merged(base, factors([name]), tmp_path, **said), changes(PATHS[:1]))
        model = tree({PATHS[0]: nn.Linear(8, 8)})
        assert pk.load(model, tmp_path / "a.safetensors", **said).loaded == PATHS[:1]
    model = tree({PATHS[0]: nn.Linear(8, 8)})
    with pytest.raises(MismatchError, match=r"nothing in .* fits"):
        pk.load(model, tmp_path / "a.safetensors")


# -- levels of language models -----------------------------------------------------------------------------------------

#: where each tree has a layer, sight and the head
LEVELS = {
    "new": ("model.language_model.layers.0.q", "model.visual.blocks.0.qkv", "lm_head"),
    "qwen2": ("model.layers.0.q", "visual.blocks.0.qkv", "lm_head"),
    "llava": ("language_model.model.layers.0.q", "visual.blocks.0.qkv", "language_model.lm_head"),
}


@pytest.mark.parametrize("theirs", LEVELS)
@pytest.mark.parametrize("ours", LEVELS)
def test_a_file_finds_its_layers_at_another_level_where_the_whole_of_it_fits(
    ours: str, theirs: str, tmp_path: Path
) -> None:
    base = {f"{name}.weight": torch.zeros(8, 8) for name in LEVELS[ours]}
    out = merged(base, factors(LEVELS[theirs]), tmp_path)
    require_bits(out, changes(LEVELS[ours]))
    model = tree({name: nn.Linear(8, 8) for name in LEVELS[ours]})
    report = pk.load(model, tmp_path / "a.safetensors")
    assert set(report.loaded) == set(LEVELS[ours])
    again = pk.swap(model, tmp_path / "a.safetensors")
    assert set(again.loaded) == set(LEVELS[ours])
    plan = pk.plan_merge(tmp_path / "base.safetensors", {tmp_path / "a.safetensors": 1.0})
    assert ("names are others" in str(plan)) is (ours != theirs)


def test_a_folder_of_peft_and_its_trained_head_move_too(tmp_path: Path) -> None:
    """From a base class, whose layers are at the root, and the other way round."""
    model = language_model()
    pk.wrap(model.model, "lora", targets="*.q_proj", rank=2)
    for parameter in pk.adapter_parameters(model.model):
        nn.init.normal_(parameter)
    pk.export(model.model, tmp_path / "folder", "peft")
    whole = language_model()
    report = pk.load(whole, tmp_path / "folder")
    assert report.loaded and all(name.startswith("model.layers.") for name in report.loaded)
    pk.export(whole, tmp_path / "back", "peft")
    assert set(pk.load(language_model().model, tmp_path / "back").loaded) == {
        name.removeprefix("model.") for name in report.loaded
    }


def test_the_levels_are_those_of_transformers(tmp_path: Path) -> None:
    """A file from before 4.52 onto the class of today, of which sight is a part."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 32, "bos_token_id": None, "eos_token_id": None}
    rope = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 2, "mlp_ratio": 1}
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config={**text, **rope}, vision_config=vision))
    theirs = ("model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.proj")
    report = pk.load(model, write(tmp_path / "a.safetensors", factors(theirs, 16)))
    assert set(report.loaded) == {f"model.language_{theirs[0]}", f"model.{theirs[1]}"}


def test_a_part_that_fits_nowhere_keeps_the_whole_where_it_is(tmp_path: Path) -> None:
    base = {"model.language_model.layers.0.q.weight": torch.zeros(8, 8)}
    with pytest.raises(MismatchError, match="2 without a place") as refused:
        merged(base, factors(["model.layers.0.q", "model.layers.1.q"]), tmp_path)
    assert "rename={'model.*': 'model.language_model.*'}" in str(refused.value)
    rename = {"model.*": "model.language_model.*"}
    out = merged(base, factors(["model.layers.0.q", "model.layers.1.q"]), tmp_path, rename=rename, ignore="*.1.*")
    require_bits(out, dict(zip(base, changes(["model.layers.0.q"]).values(), strict=True)))


def test_a_file_that_fits_at_two_levels_asks_and_the_rules_that_it_names_decide(tmp_path: Path) -> None:
    ours = ("model.layers.0.q", "language_model.model.layers.0.q")
    base = {f"{name}.weight": torch.zeros(8, 8) for name in ours}
    tensors = factors(["model.language_model.layers.0.q"])
    with pytest.raises(AmbiguousFileError) as asked:
        merged(base, tensors, tmp_path)
    rules = re.findall(r"pass rename=\{'(.*?)': '(.*?)'\}", str(asked.value))
    touched = [merged(base, tensors, tmp_path, rename=dict([rule])) for rule in rules]
    assert sorted(key for out in touched for key in out if bool(out[key].any())) == sorted(base)


# -- a head without a weight of its own --------------------------------------------------------------------------------


def test_a_head_that_has_the_weight_of_the_embedding_says_so_and_both_ways_on_work(tmp_path: Path) -> None:
    model = language_model(tied=True)
    vocabulary, width = model.lm_head.weight.shape
    base = {k: t for k, t in model.state_dict().items() if k != "lm_head.weight"}
    up, down = torch.randn(vocabulary, 2), torch.randn(2, width)
    tensors = {"lm_head.lora_A.weight": down, "lm_head.lora_B.weight": up}
    with pytest.raises(MismatchError, match=r"output layer has the weight of model\.embed_tokens") as refused:
        merged(base, tensors, tmp_path)
    assert "rename={'lm_head': 'model.embed_tokens'} changes both" in str(refused.value)
    out = merged(base, tensors, tmp_path, rename={"lm_head": "model.embed_tokens"})
    embedding = base["model.embed_tokens.weight"]
    torch.testing.assert_close(out["model.embed_tokens.weight"], embedding + up @ down)
    pk.load(model, tmp_path / "a.safetensors", tied="untie")
    pk.merge(model)
    pk.unwrap(model, keep_merged=True)
    torch.testing.assert_close(model.lm_head.weight, embedding + up @ down)
    assert torch.equal(model.model.embed_tokens.weight, embedding)


def test_a_trained_head_goes_over_the_embedding_by_the_rule_that_is_named(tmp_path: Path) -> None:
    """What PEFT trains beside the adapters, modules_to_save, on a checkpoint that has one tensor for both."""
    model = language_model(tied=True)
    head = torch.ones_like(model.lm_head.weight)
    tensors = factors(["model.layers.0.self_attn.q_proj"], 16) | {"base_model.model.lm_head.weight": head}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "modules_to_save": ["lm_head"]}
    write(tmp_path / "folder" / "adapter_model.safetensors", tensors)
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(config))
    weights = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    base = write(tmp_path / "base.safetensors", weights)
    with pytest.raises(MismatchError, match="no such tensor") as refused:
        pk.plan_merge(base, {tmp_path / "folder": 1.0})
    (rule,) = re.findall(r"rename=\{'(.*?)': '(.*?)'\} changes both", str(refused.value))
    pk.merge_checkpoint(base, {tmp_path / "folder": 1.0}, tmp_path / "merged.safetensors", rename=dict([rule]))
    assert torch.equal(load(tmp_path / "merged.safetensors")["model.embed_tokens.weight"], head)


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["diffusion_model.blocks.0.attn.q"], ["blocks.0.attn.q", "blocks.1.attn.q"]])
def test_the_rule_that_a_refusal_names_can_be_taken(names: list[str], tmp_path: Path) -> None:
    ours = ("blocks.0.attn1.to_q", "blocks.1.attn1.to_q")
    model = tree({path: nn.Linear(8, 8, bias=False) for path in ours})
    path = write(tmp_path / "a.safetensors", factors(names))
    base = write(tmp_path / "base.safetensors", model.state_dict())
    said: list[tuple[str, str]] = []
    for refuse in (lambda: pk.load(model, path), lambda: pk.plan_merge(base, {path: 1.0})):
        with pytest.raises(PeftkitError) as refused:
            refuse()
        said += re.findall(r"pass rename=\{'(.*?)': '(.*?)'\}", str(refused.value))
    rules = dict(said)
    assert len(rules) == 1
    assert pk.load(model, path, rename=rules).complete
    assert len(pk.plan_merge(base, {path: 1.0}, rename=rules).patches) == len(names)
