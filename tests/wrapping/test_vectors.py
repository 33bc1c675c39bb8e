"""Norms and biases: which targets select them, what may adapt them, and that every verb takes them."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import registry
from peftkit.errors import DuplicateNameError, MismatchError, TargetError, TiedWeightsError, UnsupportedLayerError
from peftkit.wrapping.installed import installed_adapters
from peftkit.wrapping.layer import Adapted
from tests.support.zoo import ADAPTERS, train


class Block(nn.Module):
    """Matrices with and without biases, and norms of several classes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.RMSNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 16), nn.Linear(16, 8, bias=False)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.bands = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        x = x + self.fc2(self.fc1(self.norm2(x)).relu())
        return self.bands(x.mT).mT


NORMS = ("norm1", "norm1.bias", "norm2", "bands", "bands.bias")
BIASES = ("norm1.bias", "fc1.bias", "attn.in_proj_bias", "attn.out_proj.bias", "bands.bias")


def block(seed: int = 0) -> tuple[Block, Tensor]:
    torch.manual_seed(seed)
    model = Block().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    "targets, expected",
    [
        ("LayerNorm", ("norm1", "norm1.bias")),
        ("norm2", ("norm2",)),
        ("norm1", ("norm1", "norm1.bias")),
        ("norm1.bias", ("norm1.bias",)),
        ("*norm?", ("norm1", "norm1.bias", "norm2")),
        ("bias", (*BIASES[:2], "attn.out_proj.bias", "bands.bias")),
        ("*bias", BIASES),
        (r"re:.*(norm\d|bands)", NORMS),
        (["LayerNorm", "RMSNorm", "GroupNorm"], ("norm1", "norm1.bias", "norm2", "bands", "bands.bias")),
    ],
    ids=str,
)
def test_targets_that_match_no_matrix_select_norms_and_biases(targets: Any, expected: tuple[str, ...]) -> None:
    model, _ = block()
    plan = pk.plan(model, "full", targets=targets)
    assert set(plan.modules) == set(expected)
    assert f"and {len(expected)} norms and biases" in str(plan)
    assert all(share.adapted == 0 for share in plan.coverage.values()), "a vector was counted as a matrix"


@pytest.mark.parametrize("targets", ["full", "*", "re:.*", "attn", "Linear", "fc1", "Block"])
def test_targets_that_match_a_matrix_select_no_vector(targets: str) -> None:
    """What was selected before there were adapters of vectors is selected now."""
    model, _ = block()
    chosen = pk.plan(model, "full", targets=targets).modules
    assert chosen
    assert not {*NORMS, *BIASES} & set(chosen)


def test_exclude_leaves_out_the_norms_that_it_names() -> None:
    model, _ = block()
    chosen = pk.plan(model, rules=[pk.Rule("*bias", "full", exclude=["LayerNorm", "attn.*"])]).modules
    assert chosen == ("fc1.bias", "bands.bias")
    with pytest.raises(TargetError, match="adapts nothing"):
        pk.plan(model, "full", targets="norm1", exclude="LayerNorm")


@pytest.mark.parametrize("adapter", [name for name, case in ADAPTERS.items() if case.kind != "full"])
def test_other_kinds_are_refused_with_the_reason(adapter: str) -> None:
    model, _ = block()
    case = ADAPTERS[adapter]
    reason = f"norm2: {registry.get(case.kind).kind} adapts matrices, and this is a vector of 8 numbers"
    with pytest.raises(UnsupportedLayerError, match=reason):
        pk.wrap(model, case.kind, targets="norm2", **case.options)
    with pytest.raises(UnsupportedLayerError, match="full adapts matrices"):
        pk.wrap(model, "full", targets="norm2", decompose=True)
    assert not any(isinstance(module, Adapted) for module in model.modules())


RULES = {
    "BitFit": [pk.Rule("*bias", "full")],
    "norms": [pk.Rule(["LayerNorm", "RMSNorm", "GroupNorm"], "full")],
    "beside LoRA": [pk.Rule("full", "lora", rank=2), pk.Rule(["*bias", "norm2"], "full")],
    "beside (IA)³": [pk.Rule("full", "ia3"), pk.Rule("*bias", "full")],
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("grad", [True, False])
def test_every_verb_takes_them(rules: str, grad: bool, tmp_path: Path) -> None:
    model, x = block()
    base, before = copy.deepcopy(model), model(x)
    with torch.set_grad_enabled(grad):
        plan = pk.wrap(model, rules=RULES[rules])
        torch.testing.assert_close(model(x), before)
        train(model)
        y = model(x)
    assert (y - before).norm() > 0.01 * before.norm()
    assert pk.check(model, x).ok
    own = {at.site: at for at in installed_adapters(model)}
    record = pk.monitor.CSMonitor(model, spectra=1).measure()
    assert set(record.norms) == set(plan.modules)
    for site, at in own.items():
        if at.slot.geometry.vector:
            assert record.norms[site] == pytest.approx(float(at.adapter.get_parameter("change").detach().norm()))
    pk.set_strength(model, 0.3)
    third = model(x)
    pk.merge(model)
    torch.testing.assert_close(model(x), third, rtol=1e-4, atol=1e-5)
    pk.restore(model)
    assert torch.equal(model(x), third)
    pk.set_strength(model, 0.0)
    torch.testing.assert_close(model(x), before)
    pk.set_strength(model, 1.0)
    file = pk.save(model, tmp_path / "one.safetensors")
    with pk.disabled(model):
        torch.testing.assert_close(model(x), before)
    fresh = copy.deepcopy(base)
    assert set(pk.load(fresh, file).loaded) == set(plan.modules)
    assert torch.equal(fresh(x), model(x))
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {file: 1.0}, tmp_path / "merged.safetensors")
    merged = copy.deepcopy(base)
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)
    pk.unwrap(model)
    assert torch.equal(model(x), base(x))
    assert {name: type(module) for name, module in model.named_modules()} == {
        name: type(module) for name, module in base.named_modules()
    }


@pytest.mark.parametrize("first", ["lora", "bias"])
def test_a_layers_weight_and_bias_share_a_name_in_either_order(first: str, tmp_path: Path) -> None:
    """The bias of a Linear is read, its weight is called; the state dict of each order loads into its own kind."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), torch.randn(3, 8)
    base = copy.deepcopy(model)
    wraps: dict[str, Any] = {
        "lora": lambda: pk.wrap(model, "lora", targets="0", rank=2),
        "bias": lambda: pk.wrap(model, "full", targets="0.bias"),
    }
    for own in sorted(wraps, key=lambda name: name != first):
        wraps[own]()
        with pytest.raises(DuplicateNameError):
            wraps[own]()
    train(model)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
    save_file(model.state_dict(), tmp_path / "whole.safetensors")
    pk.wrap(base, rules=[pk.Rule("0", "lora", rank=2), pk.Rule("0.bias", "full")])
    base.load_state_dict(model.state_dict())
    assert torch.equal(base(x), y)
    train(base, seed=2)
    pk.load(base, tmp_path / "whole.safetensors")
    assert torch.equal(base(x), y)
    assert set(pk.unwrap(model)) == {"0"}
    assert type(model[0]) is nn.Linear


def test_adapters_of_two_names_act_and_merge_apart() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(3, 8)
    pk.wrap(model, "lora", targets="0", rank=2, dropout=0.5, name="style")
    pk.wrap(model, "full", targets=["0.bias", "1"], exclude="1.bias", name="shift")
    train(model)
    model.eval()
    y = model(x)
    with pk.disabled(model, "style"):
        shifted = model(x)
    with pk.disabled(model, "shift"):
        styled = model(x)
    assert not torch.allclose(shifted, y) and not torch.allclose(styled, y)
    pk.merge(model, "shift")
    torch.testing.assert_close(model(x), y)
    with pk.disabled(model, "style"):
        torch.testing.assert_close(model(x), shifted)
    pk.restore(model)
    assert torch.equal(model(x), y)
    model.train()
    model(x).square().sum().backward()
    assert all(p.grad is not None for p in pk.adapter_parameters(model))


def test_a_shared_bias_is_refused_or_untied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].bias = model[0].bias
    with pytest.raises(TiedWeightsError, match=r"0\.bias shares its weight with 1\.bias"):
        pk.wrap(model, "full", targets="0.bias")
    pk.wrap(model, "full", targets="0.bias", tied="untie")
    assert model[0]._parameters["bias"] is not model[1].bias
    pk.unwrap(model)
    assert model[0].bias is model[1].bias
    pk.wrap(model, "lora", targets="0", rank=2)  # the weight is its own: its adapter merges
    train(model)
    pk.merge(model)


def test_compiled_code_reads_them() -> None:
    model, x = block()
    pk.wrap(model, rules=RULES["beside LoRA"])
    train(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), model(x))
        pk.set_strength(model, 0.5)
        torch.testing.assert_close(compiled(x), model(x))


def test_norms_of_transformers_are_found_and_train() -> None:
    """Llama's RMSNorm multiplies by w, Gemma's by 1 + w: the change is the same."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 16}
    ids = torch.arange(8).reshape(1, 8)
    for name in ("Llama", "Gemma"):
        config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0)
        model: Any = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        before = model(ids).logits
        plan = pk.plan(model, "full", targets="*norm*")
        assert {name.rpartition(".")[2] for name in plan.modules} >= {"input_layernorm", "norm"}
        pk.wrap(model, "full", targets=f"{name}RMSNorm")
        assert torch.equal(model(ids).logits, before)
        train(model)
        adapted = model(ids).logits
        assert not torch.allclose(adapted, before)
        pk.merge(model)
        torch.testing.assert_close(model(ids).logits, adapted, rtol=1e-4, atol=1e-5)
        pk.restore(model)


def test_a_file_of_a_kind_for_matrices_does_not_fit_a_vector(tmp_path: Path) -> None:
    linear = nn.ModuleDict({"norm": nn.Linear(1, 8, bias=False)})
    pk.wrap(linear, "lora", rank=1)
    train(linear)
    file = pk.save(linear, tmp_path / "one.safetensors")
    with pytest.raises(MismatchError, match="lora adapts matrices"):
        pk.load(nn.ModuleDict({"norm": nn.LayerNorm(8)}), file, other_base=True)
    save_file({"norm.weight": torch.ones(8)}, tmp_path / "base.safetensors")
    with pytest.raises(MismatchError, match="lora changes matrices"):
        pk.merge_checkpoint(tmp_path / "base.safetensors", {file: 1.0}, tmp_path / "out.safetensors", other_base=True)


def test_a_swap_writes_over_them(tmp_path: Path) -> None:
    model, x = block()
    pk.wrap(model, rules=RULES["beside LoRA"])
    train(model)
    file, y = pk.save(model, tmp_path / "one.safetensors"), model(x)
    train(model, seed=7)
    pk.swap(model, file)
    assert torch.equal(model(x), y)
