"""What a folder of PEFT says beside its tensors: the model, its task, and which modules are adapted, by their names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import peftkit as pk
from peftkit.errors import FileError, OptionError
from peftkit.files.export.peft_targets import selection
from tests.support.models import language_model
from tests.support.zoo import train

#: PEFT asks a model of transformers for an attribute that is to be renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small Llama."""
    folder = tmp_path_factory.mktemp("llama")
    language_model().save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(llama: Path) -> nn.Module:
    """The Llama as transformers loads it, with a trained LoRA."""
    model = transformers.LlamaForCausalLM.from_pretrained(llama)
    pk.wrap(model, "lora", targets=["*.q_proj", "*.down_proj"], rank=2)
    train(model)
    return model.eval()


TOKENS = torch.arange(6)[None]


def require_same(folder: Path, model: nn.Module, load: Callable[[Path], Any]) -> None:
    """Hold the output of a model that another library loaded against ours."""
    theirs = load(folder).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        with pk.disabled(model):
            plain = model(TOKENS).logits
        torch.testing.assert_close(theirs(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).norm() > 1e-2 * plain.norm()


def test_auto_peft_model_loads_a_folder_of_a_model_that_came_from_one(
    llama: Path, adapted: nn.Module, tmp_path: Path
) -> None:
    pk.export(adapted, tmp_path / "a", "peft")
    said = config(tmp_path / "a")
    assert said["base_model_name_or_path"] == str(llama)
    assert said["task_type"] == "CAUSAL_LM"
    assert sorted(said["target_modules"]) == ["down_proj", "q_proj"]
    require_same(tmp_path / "a", adapted, peft.AutoPeftModelForCausalLM.from_pretrained)


def test_auto_peft_model_loads_a_folder_of_a_file_with_its_base(
    llama: Path, adapted: nn.Module, tmp_path: Path
) -> None:
    own = pk.save(adapted, tmp_path / "own.safetensors")
    pk.export(own, tmp_path / "a", "peft", base=llama)
    require_same(tmp_path / "a", adapted, peft.AutoPeftModelForCausalLM.from_pretrained)
    assert sorted(config(tmp_path / "a")["target_modules"]) == ["down_proj", "q_proj"]


def test_auto_peft_model_loads_a_folder_of_which_the_user_says_the_model(
    llama: Path, adapted: nn.Module, tmp_path: Path
) -> None:
    own = pk.save(adapted, tmp_path / "own.safetensors")
    pk.export(own, tmp_path / "unknown", "peft")
    assert config(tmp_path / "unknown")["base_model_name_or_path"] is None
    assert config(tmp_path / "unknown")["task_type"] is None
    for number, given in enumerate((llama, llama / "config.json", json.loads((llama / "config.json").read_text()))):
        folder = tmp_path / str(number)
        pk.export(own, folder, "peft", config=given, model_name=str(llama))
        require_same(folder, adapted, peft.AutoPeftModelForCausalLM.from_pretrained)


def test_transformers_loads_the_folder(llama: Path, adapted: nn.Module, tmp_path: Path) -> None:
    pk.export(adapted, tmp_path / "a", "peft")

    def load(folder: Path) -> Any:
        model = transformers.LlamaForCausalLM.from_pretrained(llama)
        model.load_adapter(str(folder))
        return model

    require_same(tmp_path / "a", adapted, load)


def test_what_a_folder_says_of_its_model_stays_said(llama: Path, adapted: nn.Module, tmp_path: Path) -> None:
    pk.export(adapted, tmp_path / "a", "peft")
    pk.export(tmp_path / "a", tmp_path / "exported", "peft")
    pk.resize(tmp_path / "a", tmp_path / "resized", rank=1)
    pk.convert(tmp_path / "a", tmp_path / "converted", "lora", rank=1)
    for name in ("exported", "resized", "converted"):
        said = config(tmp_path / name)
        assert (said["base_model_name_or_path"], said["task_type"]) == (str(llama), "CAUSAL_LM"), name
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / name)


def test_a_model_of_no_task_is_found_by_its_class(tmp_path: Path) -> None:
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    model.save_pretrained(tmp_path / "base")
    model = transformers.LlamaModel.from_pretrained(tmp_path / "base")
    pk.wrap(model, "lora", targets="*.q_proj", rank=2)
    train(model)
    pk.export(model, tmp_path / "a", "peft")
    theirs = peft.AutoPeftModel.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        ours = model.eval()(TOKENS).last_hidden_state
        torch.testing.assert_close(theirs(TOKENS).last_hidden_state, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", [True, False])
def test_a_classifier_has_its_task_said_where_its_head_is_in_the_folder(head: bool, tmp_path: Path) -> None:
    """PEFT fails on a folder with that task and without the head."""
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "pad_token_id": 0}
    model = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**sizes, num_attention_heads=2))
    model.save_pretrained(tmp_path / "base")
    model = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    pk.wrap(model, "lora", targets="*.q_proj", rank=2)
    model.score.requires_grad_(head)
    train(model)
    pk.export(model, tmp_path / "a", "peft")
    said = config(tmp_path / "a")
    assert said["task_type"] == ("SEQ_CLS" if head else None)
    auto = peft.AutoPeftModelForSequenceClassification if head else peft.AutoPeftModel
    theirs = auto.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model.eval()(TOKENS).logits, rtol=1e-5, atol=1e-5)


# -- which modules -----------------------------------------------------------------------------------------------------

_LAYERS = [f"model.layers.{n}.{m}" for n in range(3) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    "adapted, modules, expected",
    [
        (_LAYERS[::3], _LAYERS, ["q_proj"]),
        (_LAYERS[:1], _LAYERS, ["0.self_attn.q_proj"]),
        ([*_LAYERS[::3], _LAYERS[4]], _LAYERS, ["q_proj", "1.self_attn.v_proj"]),
        (["0"], ["0", "1", "1.0"], None),
        (["1.0"], ["0", "1", "1.0"], ["1.0"]),
        (["1", "1.0", "0"], ["0", "1", "1.0"], ["1", "0"]),
        (["model.head"], None, ["model.head"]),
        (["head"], None, None),
        ([], ["a"], []),
    ],
)
def test_the_shortest_ends_of_paths_that_select_these_modules_alone(
    adapted: list[str], modules: list[str] | None, expected: list[str] | None
) -> None:
    found = selection(adapted, modules)
    assert found == expected
    if found is not None and modules is not None:
        chosen = {name for name in modules if any(name == end or name.endswith(f".{end}") for end in found)}
        assert chosen == set(adapted)


def test_a_pattern_is_written_only_where_no_list_will_do_and_the_report_says_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    pk.wrap(model, "lora", targets=["0"], rank=2)
    train(model)
    report = pk.export(model, tmp_path / "a", "peft")
    assert config(tmp_path / "a")["target_modules"] == "0"
    assert "target_modules is a regular expression" in str(report)
    pk.unwrap(model)
    pk.wrap(model, "lora", targets=["0", "1.0"], rank=2)
    train(model)
    report = pk.export(model, tmp_path / "b", "peft")
    assert config(tmp_path / "b")["target_modules"] == ["0"]
    assert "regular expression" not in str(report)


def test_r_is_the_largest_rank_and_every_scale_is_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    pk.wrap(model, rules=[pk.Rule("0", "lora", rank=4, alpha=3), pk.Rule("*", "lora", rank=2)])
    train(model)
    pk.export(model, tmp_path / "a", "peft")
    said = config(tmp_path / "a")
    assert said["r"] == said["lora_alpha"] == 4
    assert said["rank_pattern"] == said["alpha_pattern"] == {"^1": 2, "^2": 2}
    x = torch.randn(3, 8)
    expected = model(x)
    pk.unwrap(model)
    theirs: Any = peft.PeftModel.from_pretrained(model, str(tmp_path / "a")).eval()
    torch.testing.assert_close(theirs(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "text, words", [(None, "there is no file"), ("[1]", "a configuration is an object"), ("{", "not sound JSON")]
)
def test_a_configuration_that_is_none_is_refused_and_nothing_is_written(
    text: str | None, words: str, adapted: nn.Module, tmp_path: Path
) -> None:
    given = tmp_path / "config.json"
    if text is not None:
        given.write_text(text)
    with pytest.raises(FileError, match=words):
        pk.export(adapted, tmp_path / "a", "peft", config=given)
    assert not (tmp_path / "a").exists()


def test_a_damaged_configuration_of_the_base_is_no_matter_to_programs_that_do_not_ask(
    llama: Path, adapted: nn.Module, tmp_path: Path
) -> None:
    own = pk.save(adapted, tmp_path / "own.safetensors")
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    (base / "config.json").write_text("{")
    pk.export(own, tmp_path / "a.safetensors", "lycoris", base=base)
    with pytest.raises(FileError, match="not sound JSON"):
        pk.export(own, tmp_path / "a", "peft", base=base)
    pk.export(own, tmp_path / "a", "peft", base=base, config=llama)
    assert config(tmp_path / "a")["task_type"] == "CAUSAL_LM"


def test_a_configuration_of_transformers_is_given_as_a_dictionary(adapted: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"pass its to_dict\(\)"):
        pk.export(adapted, tmp_path / "a", "peft", config=adapted.config)
    pk.export(adapted, tmp_path / "a", "peft", config=adapted.config.to_dict())
    assert config(tmp_path / "a")["peft_type"] == "LORA"


@pytest.mark.parametrize(
    "entries",
    [
        {"architectures": "LlamaForCausalLM", "_name_or_path": 5},
        {"architectures": [], "is_encoder_decoder": "yes"},
        {"architectures": [["LlamaForCausalLM"]]},
        {"model_type": None},
    ],
)
def test_entries_of_another_type_say_nothing_of_the_task(
    entries: dict[str, Any], llama: Path, adapted: nn.Module, tmp_path: Path
) -> None:
    own = pk.save(adapted, tmp_path / "own.safetensors")
    pk.export(own, tmp_path / "a", "peft", config=entries)
    assert config(tmp_path / "a")["task_type"] is None
    assert config(tmp_path / "a")["base_model_name_or_path"] is None
