"""What users do to models besides wrapping them, and the states that must come out right."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, MergeError, MergeStateError, OptionError, UnsupportedLayerError, WrongBaseError
from tests.support.zoo import ADAPTERS, train

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def linear(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(8, 8)


@pytest.mark.parametrize("case", ["lora", "lokr", "loldu", "dora of loldu", "dora", "oft"])
def test_a_full_state_dict_resumes_on_a_model_built_from_its_config(case: str) -> None:
    """The base in the checkpoint is not the one the fresh adapter was made on."""
    layer, fresh = linear(0), linear(1)
    for each in (layer, fresh):
        pk.wrap(each, ADAPTERS[case].kind, **ADAPTERS[case].options)
    train(layer)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(X), layer(X))


@pytest.mark.parametrize("case", [name for name in ADAPTERS if "tucker" not in name])
@pytest.mark.parametrize("route", ["factored", "dense"])
def test_an_empty_batch(case: str, route: str) -> None:
    """An expert that no token was sent to."""
    for layer, x in (
        (linear(), torch.zeros(0, 8)),
        (nn.Conv2d(8, 8, 3, groups=2), torch.zeros(0, 8, 5, 5)),
    ):
        before = layer(x)
        pk.wrap(layer, ADAPTERS[case].kind, route=route, **ADAPTERS[case].options)
        y = layer(x)
        assert y.shape == before.shape
        y.sum().backward()


def test_a_rank_deficient_base_gives_the_same_factors_in_another_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64, bias=False)
    layer.weight.data = torch.randn(64, 4) @ torch.randn(4, 64) / 8
    narrow = copy.deepcopy(layer).bfloat16()
    pk.wrap(layer, "loldu", rank=16)
    train(layer)
    pk.load(narrow, pk.save(layer, tmp_path / "a.safetensors"))
    ours, theirs = (each.adapters["default"](each.weight, 1.0).dense() for each in (layer, narrow))
    assert (ours - theirs).norm() < 0.05 * ours.norm()


def test_a_forward_replaced_on_the_instance_is_refused() -> None:
    layer = linear()
    original = layer.forward
    layer.forward = lambda x: original(x)  # what offloading hooks do
    with pytest.raises(UnsupportedLayerError, match="forward was replaced"):
        pk.wrap(layer, "lora")


class TestDisabled:
    def test_survives_unwrapping_and_wrapping_inside(self) -> None:
        layer = linear()
        pk.wrap(layer, "lora", name="a")
        pk.wrap(layer, "lora", name="b")
        with pk.disabled(layer, "a"):
            pk.unwrap(layer, "a")
            pk.wrap(layer, "lora", name="a")
        assert set(layer.adapter_state.always.strengths) == {"a", "b"}

    def test_a_copy_made_inside_is_not_disabled(self) -> None:
        layer = linear()
        pk.wrap(layer, "lora")
        train(layer)
        with pk.disabled(layer):
            twin = copy.deepcopy(layer)
        assert torch.equal(twin(X), layer(X))


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("inner", ["lora", "loha", "lokr"])
def test_zero_rows_have_finite_gradients_through_the_norm(inner: str, axis: str) -> None:
    layer = linear()
    with torch.no_grad():
        layer.weight[2] = 0
        layer.weight[:, 3] = 0
    pk.wrap(layer, "dora", inner=inner, axis=axis, detach_norm=False)
    layer(X).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pk.adapter_parameters(layer))


class TestMerge:
    def test_an_overflow_of_the_weight_is_refused(self) -> None:
        layer = linear().half()
        layer.weight.data.fill_(60000)
        pk.wrap(layer, "lora", rank=1)
        for parameter in pk.adapter_parameters(layer):
            parameter.data.fill_(100)
        with pytest.raises(MergeError, match="overflows"):
            pk.merge(layer)
        assert (layer.weight == 60000).all()

    def test_an_expanded_weight_is_refused(self) -> None:
        layer = linear()
        layer.weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))
        pk.wrap(layer, "lora")
        train(layer)
        with pytest.raises(MergeError, match="share memory"):
            pk.merge(layer)
        assert layer.adapter_state.merged is None

    def test_an_adapter_that_raises_stays_in_training_and_nothing_is_merged(self) -> None:
        model = nn.Sequential(linear(), linear(1))
        pk.wrap(model, "lora")
        train(model)
        before = copy.deepcopy(model.state_dict())
        adapter = model[1].adapters["default"]
        adapter.down.data = torch.zeros(3, 3)
        with pytest.raises(RuntimeError):
            pk.merge(model)
        assert adapter.training
        assert model[0].adapter_state.merged is None
        assert torch.equal(model[0].weight, before["0.weight"])

    def test_a_changed_weight_under_a_packed_partial_merge_is_noticed(self) -> None:
        layer = linear()
        pk.wrap(layer, "lora", name="a")
        pk.wrap(layer, "dora", name="b")
        train(layer)
        pk.merge(layer, "a", backup="packed")
        with torch.no_grad():
            layer.weight.zero_()
        with pytest.raises(MergeStateError, match="no longer gives the base back"):
            layer(X)

    def test_names_and_baking_mean_something(self) -> None:
        layer = linear()
        pk.wrap(layer, "lora")
        with pytest.raises(OptionError, match=r"names=.* a name or several was expected"):
            pk.merge(layer, [])
        with pytest.raises(MergeStateError, match="nothing is merged"):
            pk.unwrap(layer, keep_merged=True)


class TestFlags:
    """requires_grad, whatever was wrapped where."""

    @staticmethod
    def model() -> nn.Sequential:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 4))

    def clean(self, model: nn.Module) -> bool:
        return all(p.requires_grad for p in model.parameters()) and not any(
            "peftkit" in key for module in model.modules() for key in module.__dict__
        )

    def test_a_module_replaced_meanwhile(self) -> None:
        model = self.model()
        pk.wrap(model, "lora", targets="0")
        model[1] = nn.Identity()
        pk.unwrap(model)
        assert self.clean(model)

    def test_wraps_at_two_levels(self) -> None:
        model = self.model()
        pk.wrap(model[0], "lora", name="a")
        pk.wrap(model, "lora", name="b")
        pk.unwrap(model[0], "a")
        assert not any(p.requires_grad for n, p in model.named_parameters() if "adapters" not in n)
        pk.unwrap(model)
        assert self.clean(model)

    def test_a_copy_gives_back_its_own(self) -> None:
        model = self.model()
        pk.wrap(model, "lora")
        twin = copy.deepcopy(model)
        pk.unwrap(twin)
        assert self.clean(twin)
        assert not model[0].weight.requires_grad


def test_a_class_changed_after_wrapping_is_not_pulled_from_under(recwarn: pytest.WarningsRecorder) -> None:
    layer = linear()
    pk.wrap(layer, "lora")
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    with pytest.raises(UnsupportedLayerError, match="undo that before"):
        pk.unwrap(layer)
    nn.utils.parametrize.remove_parametrizations(layer, "bias")
    pk.unwrap(layer)
    assert type(layer) is nn.Linear


def test_a_parametrized_bias_is_read_as_the_layer_reads_it() -> None:
    layer = linear()
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Tanh())
    before = layer(X)
    pk.wrap(layer, "oft", block_size=4)
    assert torch.equal(layer(X), before)
    train(layer)
    y = layer(X)
    pk.merge(layer)
    torch.testing.assert_close(layer(X), y)


def test_attributes_of_ones_own_are_not_overwritten() -> None:
    layer = linear()
    layer.adapters = nn.ModuleDict()
    with pytest.raises(UnsupportedLayerError, match="'adapters' of its own"):
        pk.wrap(layer, "lora")
    assert type(layer) is nn.Linear


class Locked(nn.Linear):
    """A layer that says how it is copied."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}


def test_the_layers_own_getstate_is_respected() -> None:
    layer = Locked()
    pk.wrap(layer, "lora")
    train(layer)
    assert torch.equal(copy.deepcopy(layer)(X), layer(X))


def test_out_proj_alone_is_adapted_where_attention_reads_it() -> None:
    attention = nn.MultiheadAttention(8, 2)
    x = torch.randn(3, 2, 8)
    before = attention(x, x, x)[0]
    pk.wrap(attention.out_proj, "lora")
    train(attention.out_proj)
    assert not torch.equal(attention(x, x, x)[0], before)


def test_a_second_adapter_may_have_dropout() -> None:
    layer = linear()
    pk.wrap(layer, "lora", name="a")
    plan = pk.wrap(layer, "lora", name="b", dropout=0.1)
    assert plan.entries[0].route != "weight"


@pytest.mark.parametrize(
    "options, error",
    [
        ({"rslora": "no"}, OptionError),
        ({"alpha": True}, OptionError),
        ({"alpha": "x"}, OptionError),
        ({"decompose": "yes"}, OptionError),
        ({"dtype": "bf16"}, OptionError),
        ({"dtype": torch.float8_e4m3fn}, OptionError),
        ({"name": 5}, OptionError),
        ({"name": "training"}, OptionError),
        ({"targets": []}, pk.errors.TargetError),
        ({"targets": 5}, pk.errors.TargetError),
        ({"outputs": 5}, OptionError),
        ({"route": "dense", "dropout": 0.1}, OptionError),
    ],
    ids=str,
)
def test_bad_arguments_leave_the_layer_alone(options: dict[str, Any], error: type[Exception]) -> None:
    layer = linear()
    with pytest.raises(error):
        pk.wrap(layer, "lora", **options)
    assert type(layer) is nn.Linear
    assert layer.weight.requires_grad


def test_numpy_numbers_are_numbers(tmp_path: Path) -> None:
    layer = linear()
    pk.wrap(layer, "lora", rank=np.int64(2), alpha=np.float32(4))
    train(layer)
    assert pk.load(linear(), pk.save(layer, tmp_path / "a.safetensors")).complete


def test_wrapping_in_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(OptionError, match="cannot train"):
        pk.wrap(linear(), "lora")


class Nested(nn.Linear):
    """A layer inside a layer."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.inner = nn.Linear(8, 8)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.inner(input))


def test_keys_that_collide_are_refused_at_save(tmp_path: Path) -> None:
    model = nn.Sequential(Nested())
    pk.wrap(model, rules=[pk.Rule("0.inner", "lora", rank=2), pk.Rule("0", "dora", rank=2)])
    train(model)
    with pytest.raises(FileError, match=r"two adapters of 'default' .* '0\.inner\.up'"):
        pk.save(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_not_finite_is_not_the_same_base(tmp_path: Path) -> None:
    layer, other = linear(), linear()
    pk.wrap(layer, "lora")
    train(layer)
    path = pk.save(layer, tmp_path / "a.safetensors")
    other.weight.data.fill_(float("nan"))
    with pytest.raises(WrongBaseError):
        pk.load(other, path)


@pytest.mark.parametrize(
    "arguments", [{"strength": float("nan")}, {"strength": "1"}, {"route": "fast"}, {"tied": "skip"}], ids=str
)
def test_load_checks_its_arguments_first(arguments: dict[str, Any], tmp_path: Path) -> None:
    layer, fresh = linear(), linear()
    pk.wrap(layer, "lora")
    train(layer)
    path = pk.save(layer, tmp_path / "a.safetensors")
    with pytest.raises(OptionError):
        pk.load(fresh, path, **arguments)
    assert type(fresh) is nn.Linear
    assert fresh.weight.requires_grad


def test_patterns_are_printed_as_they_are() -> None:
    assert "[qk]" in str(pk.plan(nn.ModuleDict({"q": linear()}), "lora", targets="[qk]"))


def test_check_puts_reassigned_buffers_back() -> None:
    class Running(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
            return self.layer(x)

    model = Running()
    pk.wrap(model, "lora")
    buffer = model.mean
    assert pk.check(model, X).ok
    assert model.mean is buffer
    assert not model.mean.any()


@pytest.mark.parametrize("case", ["lokr", "oft", "oft in", "loha", "dora full norm"])
def test_nothing_of_the_size_of_the_weight_waits_on_grouped_convolutions(case: str) -> None:
    layer = nn.Conv2d(32, 64, 3, padding=1, groups=4)
    pk.wrap(layer, ADAPTERS[case].kind, route="factored", **(ADAPTERS[case].options | extra(case)))
    own = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), *layer.buffers())}
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.untyped_storage().nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(1, 32, 3, 3)).square().sum()
    assert max(kept) < layer.weight.nbytes


def extra(case: str) -> dict[str, Any]:
    """Options under which blocks span the groups."""
    return {"oft": {"block_size": 32}, "lokr": {"factor": 2}}.get(case, {})
