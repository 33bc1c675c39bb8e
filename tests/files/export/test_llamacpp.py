"""What is exported for llama.cpp is what it adds to its weights, under its names and in its order of rows."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError, FileError, LossyError, OptionError
from peftkit.files.export.gguf_names import ARCHITECTURES, GgufModel
from peftkit.files.export.model_facts import ModelFacts
from tests.support.language import MODELS, SIZES, causal_lm
from tests.support.language_cells import BOUND, HOW, language_cell, require_same, truths
from tests.support.zoo import train


@pytest.mark.parametrize("model_type", MODELS)
def test_llamacpp_adds_what_we_do(model_type: str, tmp_path: Path) -> None:
    model = causal_lm(model_type)
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", rank=3, alpha=2)
    train(model, size=0.3)
    report = pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    assert report.exact and {w.how for w in report.weights} == {"exact"}
    assert max(w.error or 0.0 for w in report.weights) < BOUND
    require_same(tmp_path / "a.gguf", plain, "llama.cpp", truths(model))


@pytest.mark.parametrize("case", HOW)
def test_every_kind_goes_out_as_low_rank(case: str) -> None:
    assert language_cell(case, "llama.cpp") == HOW[case]


def test_the_gguf_package_reads_the_file(tmp_path: Path) -> None:
    model = causal_lm("llama")
    pk.wrap(model, "lora", targets="*.q_proj", rank=2)
    train(model)
    report = pk.export(model, tmp_path / "a.gguf", "llama.cpp", title="a style", training={"epochs": 3})
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["general.type"] == "adapter" and said["adapter.type"] == "lora"
    assert said["general.architecture"] == "llama" and said["general.name"] == "a style"
    assert said["adapter.lora.alpha"] == 2.0
    assert json.loads(said["peftkit.export"])["training"] == {"epochs": 3}
    held = {tensor.name: tensor.data.nbytes for tensor in reader.tensors}
    assert list(held) == [f"blk.{n}.attn_q.weight.lora_{end}" for n in range(2) for end in "ab"]
    assert [w.written for w in report.weights] == ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]
    assert sum(w.bytes for w in report.weights) == sum(held.values())


def test_ranks_and_alphas_are_folded_under_one_alpha(tmp_path: Path) -> None:
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    rules = [
        pk.Rule("*.q_proj", "lora", rank=4, alpha=1.0),
        pk.Rule("*.v_proj", "lora", rank=2, alpha=7.0, rslora=True),
        pk.Rule("*.down_proj", "lora", rank=3),
    ]
    pk.wrap(model, rules=rules)
    train(model, size=0.3)
    pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    require_same(tmp_path / "a.gguf", plain, "llama.cpp", truths(model))


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_a_narrow_dtype_costs_its_rounding(dtype: torch.dtype, bound: float, tmp_path: Path) -> None:
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", rank=3, alpha=2)
    train(model, size=0.3)
    pk.export(model, tmp_path / "a.gguf", "llama.cpp", dtype=dtype)
    require_same(tmp_path / "a.gguf", plain, "llama.cpp", truths(model), bound)
    assert {str(t.tensor_type.name) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors} <= {"F16", "BF16"}


def test_an_adapter_in_fp64_is_written_in_fp32(tmp_path: Path) -> None:
    model = causal_lm("llama").double()
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", rank=3)
    train(model, size=0.3)
    pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    require_same(tmp_path / "a.gguf", plain, "llama.cpp", truths(model))
    with pytest.raises(OptionError, match="dtype"):
        pk.export(model, tmp_path / "b.gguf", "llama.cpp", dtype=torch.float64)
    assert not (tmp_path / "b.gguf").exists()


def test_the_same_export_gives_the_same_bytes(tmp_path: Path) -> None:
    model = causal_lm("qwen3")
    pk.wrap(model, "lora", rank=2)
    train(model)
    for name in ("a", "b"):
        pk.export(model, tmp_path / f"{name}.gguf", "llama.cpp", title="t")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


# -- the model's configuration -----------------------------------------------------------------------------------------


def test_a_file_is_exported_with_the_configuration_that_the_user_or_the_base_has(tmp_path: Path) -> None:
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    plain.save_pretrained(tmp_path / "base")
    pk.wrap(model, "loha", targets="*_proj", rank=2)
    train(model, size=0.3)
    own = pk.save(model, tmp_path / "own.safetensors")
    with pytest.raises(ExportError, match="pass config="):
        pk.export(own, tmp_path / "a.gguf", "llama.cpp")
    assert not (tmp_path / "a.gguf").exists()
    given: list[dict[str, Any]] = [
        {"config": tmp_path / "base/config.json"},
        {"config": tmp_path / "base"},
        {"config": plain.config.to_dict()},
        {"base": tmp_path / "base"},
        {"base": tmp_path / "base/model.safetensors"},
        {"base": plain},
    ]
    for number, options in enumerate(given):
        path = tmp_path / f"{number}.gguf"
        pk.export(own, path, "llama.cpp", **options)
        require_same(path, plain, "llama.cpp", truths(model))


def test_a_folder_of_peft_brings_the_configuration_of_the_model_it_names(tmp_path: Path) -> None:
    causal_lm("mistral").save_pretrained(tmp_path / "base")
    model = transformers.MistralForCausalLM.from_pretrained(tmp_path / "base")
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", rank=2)
    train(model, size=0.3)
    pk.export(model, tmp_path / "peft", "peft")
    pk.export(tmp_path / "peft", tmp_path / "a.gguf", "llama.cpp")
    require_same(tmp_path / "a.gguf", plain, "llama.cpp", truths(model))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mamba"}, "of type 'mamba', and adapters are written for llama.cpp of apertus"),
        ({"num_hidden_layers": None}, "has no num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "has 1000000000 layers, 2000 at most"),
        ({"model_type": ["llama"], "text_config": 5}, "pass config="),
        ({"num_key_value_heads": 0, "num_attention_heads": 0}, "by the configuration 0 heads"),
        ({"num_attention_heads": 5}, "16 rows, and by the configuration 5 heads"),
        ({"num_hidden_layers": 1}, r"layers\.1\.self_attn\.q_proj: llama.cpp has no weight of its own"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = causal_lm("llama")
    pk.wrap(model, "lora", targets="*.q_proj", rank=2)
    train(model)
    with pytest.raises(ExportError, match=words):
        pk.export(model, tmp_path / "a.gguf", "llama.cpp", config={**model.config.to_dict(), **change})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_matrix_of_a_known_type_of_model_has_a_name(model_type: str) -> None:
    """Of all of transformers' modules but stacks of experts, on the meta device."""
    if model_type == "gemma3":
        text = {"model_type": "gemma3_text", "num_hidden_layers": 2, "num_attention_heads": 4}
        own = GgufModel.of(ModelFacts({"model_type": model_type, "text_config": text}))
        for path in ("model.language_model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj"):
            assert own.tensor(path) == "blk.1.ffn_up.weight"
        return
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4} if model_type == "gpt2" else SIZES | {"num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    assert config.tie_word_embeddings == ARCHITECTURES[model_type].tied
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    own = GgufModel.of(ModelFacts(config.to_dict()))
    kinds = (nn.Linear, nn.Embedding, transformers.pytorch_utils.Conv1D)
    paths = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if ARCHITECTURES[model_type].tied and own.names.get_name("lm_head") is None:
        paths.remove("lm_head")  # of a type whose models are all tied
    names = {path: own.tensor(path) for path in paths}
    assert len(set(names.values())) == len(paths) > 7


# -- what llama.cpp does not apply -------------------------------------------------------------------------------------


def test_embedding_and_head_are_adapted_where_they_are_two_weights(tmp_path: Path) -> None:
    model = causal_lm("llama")
    plain = copy.deepcopy(model)
    pk.wrap(model, "lora", targets=["*.embed_tokens", "lm_head"], rank=2, alpha=3)
    train(model, size=0.3)
    report = pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    assert {w.written for w in report.weights} == {"token_embd.weight", "output.weight"}
    require_same(tmp_path / "a.gguf", plain, "llama.cpp", truths(model))


@pytest.mark.parametrize("target", ["*.embed_tokens", "lm_head"])
def test_a_weight_that_input_and_output_share_is_refused(target: str, tmp_path: Path) -> None:
    model = causal_lm("llama", tie_word_embeddings=True)
    pk.wrap(model, "lora", targets=[target], rank=2, tied="untie")
    train(model)
    with pytest.raises(ExportError, match="input and output share one weight"):
        pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    assert list(tmp_path.iterdir()) == []


def test_norms_heads_and_biases_are_refused_with_the_reason(tmp_path: Path) -> None:
    model = causal_lm("qwen2")
    pk.wrap(model, rules=[pk.Rule("*.q_proj", "lora", rank=2), pk.Rule("*.input_layernorm", "full")])
    train(model)
    with pytest.raises(ExportError, match=r"a norm's weight or a bias, and no file for llama\.cpp"):
        pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    model = causal_lm("qwen2")
    pk.wrap(model, "lora", targets="*.q_proj", rank=2)
    model.lm_head.requires_grad_(True)
    train(model)
    with pytest.raises(
        LossyError, match=r"\(lm_head.weight\) trained beside the adapters, and what is written for llama"
    ):
        pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    assert list(tmp_path.iterdir()) == []
    report = pk.export(model, tmp_path / "a.gguf", "llama.cpp", extras=False)
    assert report.left_out == ("lm_head.weight",)


def test_experts_are_refused_and_the_rest_of_the_model_is_not(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_local_experts": 2, "num_key_value_heads": 2}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    pk.wrap(model, "lora", targets=["*experts*", "*.q_proj"], rank=2)
    train(model)
    with pytest.raises(ExportError, match=r"stack of 2 experts in one parameter, and llama\.cpp"):
        pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    pk.unwrap(model)
    pk.wrap(model, "lora", targets=["*.q_proj"], rank=2)
    train(model)
    report = pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    assert {w.written for w in report.weights} == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}


def test_without_the_gguf_package_the_message_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lm("llama")
    pk.wrap(model, "lora", targets="*.q_proj", rank=2)
    train(model)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(OptionError, match=r"pip install 'peftkit\[gguf\]'"):
        pk.export(model, tmp_path / "a.gguf", "llama.cpp")
    with pytest.raises(OptionError, match=r"reads \*\.gguf"):
        pk.export(model, tmp_path / "a.safetensors", "llama.cpp")
    assert list(tmp_path.iterdir()) == []


# -- a GGUF given as an adapter ----------------------------------------------------------------------------------------


def test_a_gguf_is_no_adapter_to_read_and_the_file_it_was_made_of_is(tmp_path: Path) -> None:
    model = causal_lm("llama")
    pk.wrap(model, "lora", targets="*.q_proj", rank=2)
    train(model)
    own = pk.save(model, tmp_path / "own.safetensors")
    path = tmp_path / "a.gguf"
    pk.export(model, path, "llama.cpp")
    for name in ("a.gguf", "renamed.safetensors", "renamed.bin"):
        (tmp_path / name).write_bytes(path.read_bytes())
        with pytest.raises(FileError, match=r"is a GGUF file, which llama\.cpp reads and this library only writes"):
            pk.read(tmp_path / name, allow_pickle=True)
        assert pk.doctor(tmp_path / name).code == 2
    fresh = causal_lm("llama")
    pk.load(fresh, own)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileError, match="is a GGUF file"):
        pk.load(causal_lm("llama"), tmp_path / "cut.gguf")
    pk.export(model, tmp_path / "peft", "peft")
    assert pk.inspect(tmp_path / "peft").loads["llama.cpp"] == "llama.cpp reads *.gguf: export it"
