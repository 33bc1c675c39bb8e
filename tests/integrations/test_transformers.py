"""transformers' Trainer: its checkpoints hold no base, and a resumed run is the run that was not interrupted."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

import peftkit as pk
from peftkit.errors import MismatchError, OptionError, UnknownAdapterError, WrongBaseError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it warns of while it is imported is not ours
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.quantizers.base import HfQuantizer

    from peftkit.integrations.transformers import AdapterCheckpoints, AdapterTrainer


class Words(Dataset[dict[str, Tensor]]):
    def __init__(self, size: int = 32) -> None:
        self.ids = torch.randint(0, 64, (size, 6), generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def llama(kind: str = "lora", seed: int = 0, head: bool = False, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, attention_dropout=0.1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    pk.wrap(model, kind, targets="attn-mlp", **{"rank": 2, **options})
    model.get_output_embeddings().requires_grad_(head)
    return model


def trainer(folder: Path, steps: int, model: nn.Module | None = None, **options: Any) -> AdapterTrainer:
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "steps",
            "save_steps": 4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3, **options,
        }
    )  # fmt: skip
    model = llama(dropout=0.1) if model is None else model
    data = Words()
    return AdapterTrainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)


def whole_and_resumed(folder: Path, make: Callable[[], nn.Module]) -> tuple[AdapterTrainer, AdapterTrainer]:
    """A run of eight steps in folder/whole, and one in folder/parts that stopped after four and was resumed."""
    whole = trainer(folder / "whole", 8, make())
    whole.train()
    trainer(folder / "parts", 4, make()).train()
    parts = trainer(folder / "parts", 8, make())
    parts.train(resume_from_checkpoint=True)
    return whole, parts


def state(own: AdapterTrainer) -> dict[str, Tensor]:
    assert own.model is not None
    return {key: value.clone() for key, value in own.model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "kind", ["lora", "dora", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("loldu", "oft"))]
)
def test_a_checkpoint_holds_no_base_and_resumes_bit_for_bit(kind: str, tmp_path: Path) -> None:
    options = {"block_size": 4, "rank": None} if kind == "oft" else {}

    def model() -> nn.Module:
        made = {name: value for name, value in {"rank": 2, **options}.items() if value is not None}
        torch.manual_seed(0)
        own = LlamaForCausalLM(llama().config)
        pk.wrap(own, kind, targets="attn-mlp", **made)
        return own

    whole = trainer(tmp_path / "whole", 8, model())
    whole.train()
    trainer(tmp_path / "parts", 4, model()).train()
    checkpoint = tmp_path / "parts" / "checkpoint-4"
    parts = trainer(tmp_path / "parts", 8, model())
    parts.train(resume_from_checkpoint=str(checkpoint))
    assert parts.state.global_step == 8
    assert equal(state(parts), state(whole))
    for key, value in load_file(tmp_path / "parts" / "checkpoint-8" / "model.safetensors").items():
        assert ".adapters.default." in key
        assert torch.equal(value, state(whole)[key])
    assert whole.optimizer is not None and parts.optimizer is not None
    for own, other in zip(parts.optimizer.state.values(), whole.optimizer.state.values(), strict=True):
        assert all(torch.equal(own[key], other[key]) for key in own)


def test_the_size_is_that_of_the_adapters(tmp_path: Path) -> None:
    own = trainer(tmp_path, 4, save_only_model=True)
    own.train()
    model = own.model
    assert model is not None
    adapters = sum(p.nbytes for p in pk.adapter_parameters(model))
    base = sum(p.nbytes for p in model.parameters()) - adapters
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "checkpoint-4").iterdir()}
    assert sizes["model.safetensors"] < adapters + 8_000
    assert sizes["adapter-default.safetensors"] < adapters + 16_000
    assert sum(sizes.values()) < base, sizes


def test_the_adapter_file_of_a_checkpoint_loads_onto_a_fresh_base(tmp_path: Path) -> None:
    own = trainer(tmp_path, 4, llama())
    own.train()
    torch.manual_seed(0)
    fresh = LlamaForCausalLM(own.model.config).eval()
    path = tmp_path / "checkpoint-4" / "adapter-default.safetensors"
    assert pk.load(fresh, path).complete
    assert pk.read(path).training == {"steps": 4}
    ids = Words().ids
    trained = own.model.eval()
    with torch.no_grad():
        assert torch.equal(fresh(ids).logits, trained(ids).logits)
        assert not torch.equal(llama().eval()(ids).logits, trained(ids).logits)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    own = trainer(
        tmp_path, 16, llama(), learning_rate=0.3, eval_strategy="steps", eval_steps=4, load_best_model_at_end=True
    )  # fmt: skip
    own.train()
    best = own.state.best_model_checkpoint
    assert best is not None and own.state.best_global_step is not None
    assert own.state.best_global_step < 16, "the last step is the best: nothing is gone back to"
    saved = load_file(Path(best) / "model.safetensors")
    assert saved and all(torch.equal(value, state(own)[key]) for key, value in saved.items())
    assert own.evaluate()["eval_loss"] == pytest.approx(own.state.best_metric, abs=1e-6)


def test_what_is_trained_beside_the_adapters_is_kept(tmp_path: Path) -> None:
    whole, parts = whole_and_resumed(tmp_path, lambda: llama(head=True))
    assert equal(state(parts), state(whole))
    keys = load_file(tmp_path / "parts" / "checkpoint-8" / "model.safetensors").keys()
    assert {key for key in keys if ".adapters." not in key} == {"lm_head.weight"}
    fresh = llama(head=False)
    pk.unwrap(fresh)
    pk.load(fresh, tmp_path / "parts" / "checkpoint-8" / "adapter-default.safetensors")
    assert torch.equal(fresh.lm_head.weight, state(whole)["lm_head.weight"])


def test_an_adapted_weight_that_trains_too_is_no_other_base(tmp_path: Path) -> None:
    def model() -> nn.Module:
        own = llama()
        own.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        return own

    whole, parts = whole_and_resumed(tmp_path, model)
    assert equal(state(parts), state(whole))


def test_tied_parameters_that_are_trained_resume(tmp_path: Path) -> None:
    def model() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = copy.deepcopy(llama().config)
        config.tie_word_embeddings = True
        own = LlamaForCausalLM(config)
        pk.wrap(own, "lora", targets="attn-only", rank=2)
        own.get_input_embeddings().requires_grad_(True)
        assert own.get_input_embeddings().weight is own.get_output_embeddings().weight
        return own

    whole, parts = whole_and_resumed(tmp_path, model)
    assert equal(state(parts), state(whole))


class Regression(nn.Module):
    """No PreTrainedModel, with a buffer that training changes, and two adapters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(6, 64), nn.BatchNorm1d(64), nn.Linear(64, 1)
        pk.wrap(self, "lora", targets="first", rank=2, name="a")
        pk.wrap(self, "ia3", targets="last", name="b")

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.last(torch.relu(self.norm(self.first(input_ids / 64.0))))
        return {"loss": (y - labels.float().mean(1, keepdim=True)).square().mean(), "logits": y}


def test_a_module_that_is_no_model_of_transformers(tmp_path: Path) -> None:
    whole, parts = whole_and_resumed(tmp_path, Regression)
    assert equal(state(parts), state(whole))
    checkpoint = tmp_path / "parts" / "checkpoint-8"
    assert {"adapter-a.safetensors", "adapter-b.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    assert "first.weight" not in load_file(checkpoint / "model.safetensors")
    assert "norm.running_mean" in load_file(checkpoint / "model.safetensors")


def test_a_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, 4).train()
    for other in (llama("loha"), llama(head=True)):
        with pytest.raises(MismatchError, match=r"missing|unexpected"):
            trainer(tmp_path, 8, other).train(resume_from_checkpoint=True)
    with pytest.raises(WrongBaseError, match="another base"):
        trainer(tmp_path, 8, llama(seed=1)).train(resume_from_checkpoint=True)


def test_a_checkpoint_with_the_base_resumes_too(tmp_path: Path) -> None:
    own = trainer(tmp_path / "full", 4)
    transformers.Trainer(model=own.model, args=own.args, train_dataset=Words()).train()
    resumed = trainer(tmp_path / "full", 8)
    resumed.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole", 8)
    whole.train()
    assert equal(state(resumed), state(whole))


def test_save_model_writes_the_same(tmp_path: Path) -> None:
    own = trainer(tmp_path, 4, save_strategy="no")
    own.train()
    own.save_model(str(tmp_path / "final"))
    keys = load_file(tmp_path / "final" / "model.safetensors").keys()
    assert keys and all(".adapters.default." in key for key in keys)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "final" / "adapter-default.safetensors").is_file()


class Quantizer(HfQuantizer):
    """One that makes the state dict to save anew, as those of transformers do, and quantises nothing."""

    def __init__(self) -> None:
        self.quantization_config = None

    def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
        return model.state_dict(), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def test_a_state_dict_that_a_quantizer_makes_anew(tmp_path: Path) -> None:
    own = trainer(tmp_path, 4)
    own.model.hf_quantizer = Quantizer()
    own.train()
    assert not own.model._keys_to_ignore_on_save
    keys = load_file(tmp_path / "checkpoint-4" / "model.safetensors").keys()
    assert keys and all(".adapters.default." in key for key in keys)


def test_it_works_with_any_trainer(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        pass

    class OwnTrainer(AdapterCheckpoints, Own):
        pass

    base = trainer(tmp_path, 4)
    own = OwnTrainer(model=base.model, args=base.args, train_dataset=Words())
    own.train()
    assert (tmp_path / "checkpoint-4" / "adapter-default.safetensors").is_file()


def test_a_model_without_adapters_and_one_that_is_sharded_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LlamaForCausalLM(llama().config)
    with pytest.raises(UnknownAdapterError):
        trainer(tmp_path, 4, plain)
    original = transformers.Trainer.__init__

    def sharding(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(transformers.Trainer, "__init__", sharding)
    with pytest.raises(OptionError, match="FSDP"):
        trainer(tmp_path, 4)
