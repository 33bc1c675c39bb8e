"""TRL's trainers: the reference is the base under the adapters, and there is no second base."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, GRPOConfig, SFTConfig, SFTTrainer

import peftkit as pk
from peftkit.errors import OptionError, UnknownAdapterError, UnsupportedLayerError
from peftkit.integrations.transformers import AdapterCheckpoints
from peftkit.integrations.trl import AdapterDPOTrainer, AdapterGRPOTrainer, ReferenceModel
from tests.support.zoo import train

# what TRL itself does with transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

WORDS = ["<pad>", "<eos>", "a", "b", "c", "d", "e"]
COMMON: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "disable_tqdm": True,
}
PAIRS = Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e e"}] * 4)


def base() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8, pad_token_id=0, eos_token_id=1, **sizes))


def wrapped() -> Any:
    model = base()
    pk.wrap(model, "lora", rank=2)
    train(model)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="e"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def held() -> int:
    """The bytes of all parameters in this process."""
    gc.collect()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _parameters()}
    return sum(storages.values())


def _parameters() -> list[Tensor]:
    return [each for each in gc.get_objects() if type(each) is nn.Parameter and not each.is_meta]


def log_probs(model: Any, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens).logits.log_softmax(-1)
    return logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def test_the_reference_is_the_base_and_holds_nothing() -> None:
    model, tokens = wrapped(), torch.tensor([[2, 3, 4, 5]])
    adapted = log_probs(model, tokens)
    reference = ReferenceModel(model)
    assert list(reference.parameters()) == [] and list(reference.modules()) == [reference]
    assert reference.config is model.config
    expected = log_probs(base(), tokens)
    assert torch.equal(log_probs(reference, tokens), expected)
    assert not torch.equal(adapted, expected)
    assert torch.equal(log_probs(model, tokens), adapted)


def test_dpo_scores_against_the_base_without_loading_it(tmp_path: Path) -> None:
    model = wrapped()
    before = held()
    arguments = DPOConfig(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, beta=0.5, **COMMON)
    trainer = AdapterDPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=tokenizer())
    assert held() == before
    tokens = torch.tensor([[2, 3, 4, 5, 1]])
    theirs = trainer.ref_model(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=tokens, fused_lm_head=True
    )
    torch.testing.assert_close(theirs.log_probs.flatten()[-4:], log_probs(base(), tokens).flatten())
    trainer.train()
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in trainer.state.log_history if "loss" in row)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(p, base().get_parameter(name)) for name, p in frozen.items())
    assert (tmp_path / "checkpoint-2" / "adapter-default.safetensors").is_file()


def test_the_first_loss_of_dpo_is_that_of_the_adapters_distance_from_the_base(tmp_path: Path) -> None:
    model = base()
    pk.wrap(model, "lora", rank=2)
    arguments = DPOConfig(output_dir=str(tmp_path), save_strategy="no", **COMMON)
    trainer = AdapterDPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=tokenizer())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-4), (
        "an adapter at its start is the base"
    )
    assert losses[1] < losses[0]


def test_grpo_has_the_base_as_its_reference(tmp_path: Path) -> None:
    model = wrapped()
    before = held()
    options = {**COMMON, "max_steps": 1}
    arguments = GRPOConfig(
        output_dir=str(tmp_path), save_strategy="no", beta=0.1, num_generations=2, max_completion_length=4, **options
    )
    prompts = Dataset.from_list([{"prompt": "a b"}] * 4)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(i) for i, _ in enumerate(completions)]

    trainer = AdapterGRPOTrainer(model, reward, args=arguments, train_dataset=prompts, processing_class=tokenizer())
    assert held() == before
    assert trainer.beta == arguments.beta == 0.1 and isinstance(trainer.ref_model, ReferenceModel)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "kl" in row]
    assert row["kl"] > 0


def test_sft_trains_the_adapters(tmp_path: Path) -> None:
    class AdapterSFTTrainer(AdapterCheckpoints, SFTTrainer):
        pass

    model = wrapped()
    arguments = SFTConfig(output_dir=str(tmp_path), save_strategy="no", max_length=8, **COMMON)
    data = Dataset.from_list([{"text": "a b c d"}] * 4)
    trainer = AdapterSFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[1] < losses[0]


def test_what_needs_another_reference_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError):
        ReferenceModel(base())
    with pytest.raises(OptionError, match="a wrapped model was expected"):
        AdapterDPOTrainer("a/path")  # type: ignore[arg-type]
    model = base()
    pk.wrap(model, "lora", targets="lm_head")
    with pytest.raises(UnsupportedLayerError, match="read=True"):
        ReferenceModel(model)
    model = wrapped()
    arguments = DPOConfig(output_dir=str(tmp_path), precompute_ref_log_probs=True, **COMMON)
    with pytest.raises(OptionError, match="precompute_ref_log_probs"):
        AdapterDPOTrainer(model, args=arguments, train_dataset=PAIRS, processing_class=tokenizer())
    with pytest.raises(OptionError, match="ref_model"):
        AdapterDPOTrainer(model, ref_model=base())
