"""Stacks of experts in one parameter, on the families of transformers that have them."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import registry
from peftkit.errors import CoverageWarning, OptionError, UnsupportedLayerError
from peftkit.wrapping.installed import adapted_modules, installed_adapters
from peftkit.wrapping.layer import Adapted
from peftkit.wrapping.sites import sites
from tests.support.experts import FAMILIES, Bank, language_model, tokens
from tests.support.laws import agree, bits
from tests.support.zoo import ADAPTERS, train

EXPERTS = "*.experts.*"
each_family = pytest.mark.parametrize("family", FAMILIES)


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(p) for name, p in model.named_parameters() if "adapters" not in name}


@each_family
def test_the_stacks_are_found_with_the_shape_of_their_matrices(family: str) -> None:
    found = {name: site for name, site in sites(language_model(family)).items() if ".experts." in name}
    assert {name.rpartition(".")[2] for name in found} == {"gate_up_proj", "down_proj"}
    assert len(found) == 4
    for name, site in found.items():
        one = site.slot.geometry.shape.one
        assert (one.rows, one.channels) == ((48, 16) if name.endswith("gate_up_proj") else (16, 24))
        assert site.slot.geometry.transposed == (family in ("gpt_oss", "llama4"))
        first = site.parameter[0].mT if site.slot.geometry.transposed else site.parameter[0]
        assert torch.equal(site.matrix[: one.rows], first)


@each_family
@pytest.mark.parametrize("case", ["lora", "dora", "lokr", "oft in"])
def test_wrap_train_merge_restore_and_save(family: str, case: str, tmp_path: Path) -> None:
    model, ids = language_model(family), tokens()
    before, bytes_before = model(ids).logits, weights(model)
    pk.wrap(model, ADAPTERS[case].kind, targets=EXPERTS, **ADAPTERS[case].options)
    assert torch.equal(model(ids).logits, before)
    train(model)
    out = model(ids).logits
    assert not torch.equal(out, before)
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pk.adapter_parameters(model))
    path = pk.save(model, tmp_path / "experts.safetensors")
    for backup in ("copy", "packed"):
        pk.merge(model, backup=backup)
        agree(model(ids).logits, out, torch.float32, "merged")
        pk.restore(model)
        assert weights(model) == bytes_before
    assert torch.equal(copy.deepcopy(model)(ids).logits, out)
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, out)
    pk.unwrap(model)
    assert torch.equal(model(ids).logits, before)
    assert pk.load(model, path).loaded == tuple(name for name in sites(model) if ".experts." in name)
    assert torch.equal(model(ids).logits, out)


@pytest.mark.parametrize("case", ADAPTERS)
def test_each_expert_has_an_adapter_of_the_kind(case: str) -> None:
    """ΔW of expert e is that of the kind's own adapter on its matrix, with slice e of every tensor."""
    kind, options = ADAPTERS[case].kind, ADAPTERS[case].options
    torch.manual_seed(0)
    module = Bank().double()
    if options.get("tucker"):  # which is of kernels, and an expert has none
        with pytest.raises(OptionError, match=r"kernel|rank below"):
            pk.wrap(module, kind, targets="weight", **options)
        return
    pk.wrap(module, kind, targets="weight", **options)
    train(module)
    (at,) = installed_adapters(module)
    whole = at.adapter(at.base, 0.7).dense().unflatten(0, (3, 12))
    for expert, (W, changed) in enumerate(zip(at.base.unflatten(0, (3, 12)), whole, strict=True)):
        own = registry.build(kind, at.slot.geometry.shape.one, W, torch.float64, **options)
        own.load_state_dict({key: tensor[expert] for key, tensor in at.adapter.state_dict().items()})
        agree(changed, own(W, 0.7).dense(), torch.float64, f"expert {expert}")


def test_parameters_are_one_tensor_for_all_experts() -> None:
    model = language_model("qwen3_moe")
    plan = pk.wrap(model, "lora", targets="*.experts.gate_up_proj", rank=2)
    assert plan.modules == ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.gate_up_proj")
    assert [tuple(p.shape) for p in pk.adapter_parameters(model)] == [(4, 48, 2), (4, 2, 16)] * 2
    assert plan.parameters == 2 * 4 * 2 * (48 + 16)
    assert plan.entries[0].route == "weight"


@pytest.mark.parametrize(
    "target, names",
    [
        ("*experts*", {"gate_up_proj", "down_proj"}),
        ("MixtralExperts", {"gate_up_proj", "down_proj"}),
        ("down_proj", {"down_proj"}),
        ("re:.*(q_proj|gate_up_proj)", {"q_proj", "gate_up_proj"}),
        ("model.layers.0.mlp", {"gate_up_proj", "down_proj"}),
    ],
)
def test_targets_select_stacks(target: str, names: set[str]) -> None:
    plan = pk.plan(language_model("mixtral"), "lora", targets=target, rank=2)
    assert {name.rpartition(".")[2] for name in plan.modules} == names


def test_presets_leave_experts_out_and_say_so() -> None:
    model = language_model("mixtral")
    with pytest.warns(CoverageWarning, match="MixtralExperts.*name them to adapt them"):
        plan = pk.plan(model, "lora", rank=2)
    assert not any("experts" in name for name in plan.modules)
    assert "*experts*" in dict(plan.skipped)["model.layers.0.mlp.experts"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both = pk.plan(model, "lora", targets=["full", "*experts*"], rank=2)
    assert sum("experts" in name for name in both.modules) == 4
    assert not any("experts" in name for name, _ in both.skipped)
    assert both.coverage["MixtralExperts"].adapted == both.coverage["MixtralExperts"].total


def test_what_is_no_stack_is_none() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(4, 8, 8))

    packed = Bank()
    packed.weight = nn.Parameter(packed.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert not sites(Positions())
    with pytest.raises(UnsupportedLayerError, match=r"its experts are torch\.float8_e4m3fn"):
        pk.plan(nn.Sequential(nn.Linear(2, 2), packed), "lora", targets="1")
    with pytest.raises(UnsupportedLayerError, match="dropout"):
        pk.plan(Bank(), "lora", targets="weight", dropout=0.1)


def test_two_adapters_act_together_and_alone() -> None:
    model, ids = language_model("gpt_oss"), tokens()
    before = model(ids).logits
    for seed, (name, kind) in enumerate((("first", "lora"), ("second", "dora"))):
        pk.wrap(model, kind, targets=EXPERTS, rank=2, name=name)
        train(model, seed, name=name)
    both = model(ids).logits
    with pk.enabled(model, "first"):
        first = model(ids).logits
    with pk.disabled(model):
        assert torch.equal(model(ids).logits, before)
    pk.merge(model, "second")
    agree(model(ids).logits, both, torch.float32, "second merged")
    pk.restore(model)
    pk.set_strength(model, 0.0, "second")
    assert torch.equal(model(ids).logits, first)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_what_waits_for_backward_is_one_stack(kind: str) -> None:
    """W + ΔW is kept once, by what reads it; on the way to it nothing of its size is."""
    torch.manual_seed(0)
    module = Bank()
    pk.wrap(module, kind, targets="weight")
    train(module)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        weight = module.weight
    base = module._parameters["weight"]
    assert base is not None and weight.requires_grad
    fresh = {t.untyped_storage().data_ptr() for t in kept if t.numel() >= base.numel()}
    own = {p.untyped_storage().data_ptr() for p in (base, *pk.adapter_parameters(module))}
    assert fresh <= own


def test_a_stack_is_changed_once_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("mixtral", "eager")
    pk.wrap(model, "lora", targets=EXPERTS, rank=2)
    train(model)
    calls: list[str] = []
    cls = type(adapted_modules(model)["model.layers.0.mlp.experts"])
    changed = cls._changed
    monkeypatch.setattr(cls, "_changed", lambda self, name, *rest: (calls.append(name), changed(self, name, *rest))[1])
    model(tokens(4, 8))
    assert sorted(calls) == ["down_proj"] * 2 + ["gate_up_proj"] * 2


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_reads_the_same(implementation: str) -> None:
    model, ids = language_model("qwen3_moe", implementation), tokens(2, 8)
    pk.wrap(model, "lora", targets=EXPERTS, rank=2)
    train(model)
    other = copy.deepcopy(model)
    other.set_experts_implementation("eager")
    agree(model(ids).logits, other(ids).logits, torch.float32, implementation)


def test_a_stack_of_one_expert() -> None:
    module, x = Bank(experts=1), torch.randn(2, 8)
    pk.wrap(module, "lora", targets="weight", rank=2)
    assert [tuple(p.shape) for p in pk.adapter_parameters(module)] == [(12, 2), (2, 8)]
    train(module)
    out = module(x)
    pk.merge(module)
    agree(module(x), out, torch.float32, "merged")


def test_a_layer_takes_its_class_back() -> None:
    module = Bank()
    pk.wrap(module, "lora", targets="weight", rank=2)
    assert isinstance(module, Adapted)
    pk.unwrap(module)
    assert type(module) is Bank
    assert module.weight.requires_grad


@pytest.mark.parametrize("case", ["lora", "dora", "oft"])
def test_code_that_is_compiled_or_transformed_computes_the_same(case: str) -> None:
    torch.manual_seed(0)
    module, x = Bank(), torch.randn(2, 24)
    pk.wrap(module, ADAPTERS[case].kind, targets="weight", **ADAPTERS[case].options)
    train(module)
    parameters = pk.adapter_parameters(module)
    expected = module(x)
    weights = torch.randn(expected.shape)  # a rotation leaves the norm of the output as it is
    gradients = torch.autograd.grad((expected * weights).sum(), parameters)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    agree(compiled, expected, torch.float32, "compiled")
    names = [name for name, p in module.named_parameters() if p.requires_grad]

    def loss(values: tuple[Tensor, ...]) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,)).mul(weights).sum()

    through_compiled = torch.autograd.grad((compiled * weights).sum(), parameters)
    transformed = torch.func.grad(loss)(tuple(parameters))
    for a, b, c in zip(gradients, through_compiled, transformed, strict=True):
        agree(b, a, torch.float32, "compiled gradient")
        agree(c, a, torch.float32, "transformed gradient")


@pytest.mark.parametrize("case", ["lora", "dora", "loldu"])
def test_a_stack_is_wrapped_on_the_meta_device(case: str) -> None:
    torch.manual_seed(0)
    base, x = Bank(), torch.randn(2, 24)
    with torch.device("meta"):
        module = Bank()
    pk.wrap(module, ADAPTERS[case].kind, targets="weight", **ADAPTERS[case].options)
    module.to_empty(device="cpu").load_state_dict(base.state_dict(), strict=False)
    pk.reset_adapters(module)
    assert torch.equal(module(x), base(x))
    train(module)
    other = Bank()
    other.load_state_dict(base.state_dict())
    pk.wrap(other, ADAPTERS[case].kind, targets="weight", **ADAPTERS[case].options)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
