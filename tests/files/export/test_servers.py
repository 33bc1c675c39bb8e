"""What is exported for vLLM and SGLang is what they add, by their own rules for a folder of PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError, LossyError
from tests.support.language import causal_lm, matrices
from tests.support.language_cells import HOW, SERVERS, language_cell, require_same, truths
from tests.support.readers import Refused
from tests.support.readers.servers import read_converter, read_sglang
from tests.support.zoo import train

#: PEFT asks a model of transformers for an attribute that is to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
EACH = pytest.mark.parametrize("target", SERVERS)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@EACH
@pytest.mark.parametrize("case", HOW)
def test_every_kind_goes_out_as_low_rank(case: str, target: str) -> None:
    assert language_cell(case, target) == HOW[case]


@EACH
@pytest.mark.parametrize("model_type", ["qwen3", "gemma3_text", "phi3"])
def test_every_linear_of_a_model(model_type: str, target: str, tmp_path: Path) -> None:
    model = causal_lm(model_type)
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", targets="*_proj", rank=3, alpha=2)
    train(model, size=0.3)
    pk.export(model, tmp_path / "a", target)
    require_same(tmp_path / "a", plain, target, truths(model))


@EACH
def test_ranks_and_alphas_become_one(target: str, tmp_path: Path) -> None:
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    rules = [
        pk.Rule("*.q_proj", "lora", rank=1, alpha=3.0),
        pk.Rule("*.v_proj", "lora", rank=4, alpha=1.0, rslora=True),
        pk.Rule("*.1.*.down_proj", "lokr", factor=4, rank=1),
    ]
    pk.wrap(model, rules=rules)
    train(model, size=0.3)
    report = pk.export(model, tmp_path / "a", target)
    assert f"smaller ranks are filled up to {config(tmp_path / 'a')['r']} with zeros" in str(report)
    said = config(tmp_path / "a")
    assert said["r"] == said["lora_alpha"] and said["rank_pattern"] == said["alpha_pattern"] == {}
    require_same(tmp_path / "a", plain, target, truths(model))
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "a").eval()
    tokens = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


def test_llamacpps_converter_reads_these_folders(tmp_path: Path) -> None:
    """It has one alpha over the rank of each module, so that ranks must be the same."""
    model = causal_lm("llama")
    pk.wrap(model, rules=[pk.Rule("*.q_proj", "dora", rank=3), pk.Rule("*.v_proj", "lora", rank=2, alpha=5)])
    train(model, size=0.3)
    pk.export(model, tmp_path / "a", "vllm")
    weights = matrices(causal_lm("llama"))
    found, expected = read_converter(tmp_path / "a", weights).deltas, truths(model)
    assert found.keys() == expected.keys()
    for name, delta in expected.items():
        assert (found[name] - delta).norm() <= 1e-6 * (delta.norm() + weights[name].norm()), name
    pk.unwrap(model)
    pk.wrap(model, rules=[pk.Rule("*.q_proj", "lora", rank=3), pk.Rule("*.v_proj", "lora", rank=2)])
    train(model, size=0.3)
    report = pk.export(model, tmp_path / "mixed", "peft")
    assert "the modules have several ranks" in str(report)
    found, expected = read_converter(tmp_path / "mixed", weights).deltas, truths(model)
    assert any((found[name] - delta).norm() > 0.1 * delta.norm() for name, delta in expected.items())


def test_a_folder_for_peft_is_read_by_both_where_ranks_are_the_same(tmp_path: Path) -> None:
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", targets="*_proj", rank=2, alpha=3)
    train(model, size=0.3)
    pk.export(model, tmp_path / "a", "peft")
    for target in SERVERS:
        require_same(tmp_path / "a", plain, target, truths(model))
        assert pk.inspect(tmp_path / "a").loads[target] == ""


def test_what_a_server_does_not_read_is_said_of_a_folder_and_an_export_of_that_is_read(tmp_path: Path) -> None:
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    pk.wrap(model, rules=[pk.Rule("*.q_proj", "lora", rank=2), pk.Rule("*.v_proj", "dora", rank=3)])
    train(model, size=0.3)
    with pytest.raises(ExportError, match="give the base"):
        pk.export(pk.save(model, tmp_path / "own.safetensors"), tmp_path / "a", "vllm")
    pk.export(model, tmp_path / "peft", "peft", bake=True)
    weights = matrices(plain, lambda module: isinstance(module, nn.Linear))
    for target, reason in (("vllm", "one rank and one alpha"), ("sglang", "one rank and one alpha")):
        assert reason in pk.inspect(tmp_path / "peft").loads[target]
        pk.export(tmp_path / "peft", tmp_path / target, target)
        require_same(tmp_path / target, plain, target, truths(model))
    with pytest.raises(Refused):
        read_sglang(tmp_path / "peft", weights)


@pytest.mark.parametrize(
    "targets, words",
    [
        ("*.k_proj", "only beside an adapter of q_proj"),
        ("*.q_proj", "only beside an adapter of v_proj"),
        ("*.up_proj", "only beside an adapter of gate_proj"),
        ("lm_head", "none of 'lm_head'"),
    ],
)
def test_sglang_reads_some_modules_only_beside_others(targets: str, words: str, tmp_path: Path) -> None:
    model = causal_lm("llama")
    pk.wrap(model, "lora", targets=[targets], rank=2)
    train(model, size=0.3)
    with pytest.raises(ExportError, match=words):
        pk.export(model, tmp_path / "a", "sglang")
    assert list(tmp_path.iterdir()) == []
    pk.export(model, tmp_path / "a", "peft")
    weights = matrices(causal_lm("llama"), lambda module: isinstance(module, nn.Linear))
    try:
        assert read_sglang(tmp_path / "a", weights).deltas == {}, "the reader has it, and the export refuses it"
    except Refused:
        return


@EACH
def test_what_trained_beside_and_embeddings_are_refused(target: str, tmp_path: Path) -> None:
    model = causal_lm("llama")
    pk.wrap(model, "lora", targets=["*.embed_tokens"], rank=2)
    train(model)
    with pytest.raises(ExportError, match="it is an embedding"):
        pk.export(model, tmp_path / "a", target)
    model = causal_lm("llama")
    pk.wrap(model, "lora", targets=["*.q_proj", "*.v_proj"], rank=2)
    model.lm_head.requires_grad_(True)
    train(model)
    with pytest.raises(LossyError, match="has no place for them"):
        pk.export(model, tmp_path / "a", target)
    assert list(tmp_path.iterdir()) == []


def test_vllm_has_room_for_512_ranks(tmp_path: Path) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"o_proj": nn.Linear(520, 520)})])})
    pk.wrap(model, "lora", rank=513)
    train(model)
    with pytest.raises(ExportError, match="room for 512 ranks, and these adapters are of rank 513"):
        pk.export(model, tmp_path / "a", "vllm")
    own = pk.save(model, tmp_path / "own.safetensors")
    pk.resize(own, tmp_path / "small.safetensors", rank=512)
    pk.export(tmp_path / "small.safetensors", tmp_path / "a", "vllm")
    assert config(tmp_path / "a")["r"] == 512
