"""Adapters on quantised layers: what the layer computes, plus ΔW of the weight that its stored numbers stand for."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

import peftkit as pk
from peftkit.errors import OptionError, TiedWeightsError, UnsupportedLayerError
from peftkit.wrapping.bases.formats import format_of, matrix_of
from peftkit.wrapping.installed import adapted_modules
from peftkit.wrapping.layer import Adapted
from tests.support.matrix_quantised import BASES, COLUMNS, OPTIONS, ROWS, cells, network, pair, quantised
from tests.support.zoo import STRUCTURES, train

# The 8-bit layer of bitsandbytes rounds its input to 16 bits, where it computes in float32 too; the dynamic one of
# torchao to 8 bits
TOLERANCE = {"bitsandbytes int8": 1e-3, "torchao int8 dynamic": 0.03}
BITSANDBYTES = [base for base in BASES if base.startswith("bitsandbytes")]


def close(base: str, got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal to the rounding of the base's layer."""
    got, expected = got.detach(), expected.detach()
    bound = TOLERANCE.get(base, 2e-6) * float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(got - expected)) <= bound


def values(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers that a tensor stands for."""
    return tensor if type(tensor) in (torch.Tensor, nn.Parameter) else tensor.dequantize()


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The gradients of the input and of the adapters."""
    x = x.clone().requires_grad_(True)
    y = model(x)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()  # a norm would not change with a rotation
    return list(torch.autograd.grad(loss, [x, *pk.adapter_parameters(model)]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", STRUCTURES)
class TestEveryKindOnEveryBase:
    def test_a_fresh_adapter_changes_no_bit(self, kind: str, base: str) -> None:
        model, x = network(base), torch.randn(3, 5, COLUMNS)
        before = model(x)
        pk.wrap(model, kind, **OPTIONS.get(kind, {}))
        assert torch.equal(model(x), before)

    def test_output_and_gradients_are_of_the_dequantised_weight(self, kind: str, base: str) -> None:
        model, plain = pair(kind, base)
        x = torch.randn(3, 5, COLUMNS)
        assert close(base, model(x), plain(x))
        for got, expected in zip(gradients(model, x), gradients(plain, x), strict=True):
            assert close(base, got, expected)

    def test_a_file_gives_every_bit_back(self, kind: str, base: str, tmp_path: Path) -> None:
        model, _ = pair(kind, base)
        path = pk.save(model, tmp_path / "a.safetensors")
        other = network(base)
        assert pk.load(other, path).complete
        x = torch.randn(2, COLUMNS)
        assert torch.equal(other(x), model(x))

    def test_it_is_measured_as_on_the_plain_weight(self, kind: str, base: str) -> None:
        records = [pk.monitor.CSMonitor(model).measure() for model in pair(kind, base)]
        assert records[0].norms == pytest.approx(records[1].norms, rel=1e-3)
        assert records[0].per_module == pytest.approx(records[1].per_module, rel=1e-3, abs=1e-5)


def test_no_kind_is_refused_and_none_dequantises_all_of_the_weight() -> None:
    for cell in cells(bases=["bitsandbytes nf4 double", "torchao int8 groups"]):
        assert cell.refusal == ""
        assert cell.at_once <= 0.5
        reads = cell.kind in ("dora", "glora") or cell.base.startswith("torchao")  # whose backward is by blocks too
        assert (cell.at_once > 0) == reads


@pytest.mark.parametrize("base", BITSANDBYTES)
@pytest.mark.parametrize("columns", [90, 96, 130])
def test_a_width_of_no_whole_blocks_is_what_the_layer_computes_with(base: str, columns: int) -> None:
    layer = quantised(base, 40, columns, bias=False)
    pk.wrap(layer, "ia3")
    assert isinstance(layer, Adapted)
    assert close(base, layer(torch.eye(columns)).mT, layer.base_of("").float()[:])


@pytest.mark.parametrize(
    "base", ["torchao int8", "torchao int4", "torchao fp8"]
)  # other layers of the libraries refuse
def test_gradients_by_transforms(base: str) -> None:
    model, _ = pair("dora", base)
    x = torch.randn(3, COLUMNS)
    own = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def total(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    model(x).square().sum().backward()
    for name, gradient in torch.func.grad(total)(own).items():
        assert own[name].grad is not None
        assert close(base, gradient, own[name].grad)  # type: ignore[arg-type]


def unscaled(linear: nn.Linear) -> nn.Linear:
    """A Linear that holds fp8 numbers without their scales."""
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return linear


def nf4_tensor(linear: nn.Linear) -> nn.Linear:
    """A Linear with a weight of torchao that can be read in no part."""
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    linear.weight = nn.Parameter(to_nf4(linear.weight.detach(), 64, 2), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    "make, reason",
    [
        (unscaled, "float8_e4m3fn, quantised in a format that peftkit does not read"),
        (nf4_tensor, "NF4Tensor of torchao"),
    ],
)
def test_a_format_that_is_not_read_is_refused(make: Callable[[nn.Linear], nn.Module], reason: str) -> None:
    model = nn.Sequential(make(nn.Linear(128, 64)))
    with pytest.raises(UnsupportedLayerError, match=reason):
        pk.wrap(model, "lora", targets="0")


@pytest.mark.parametrize("base", BITSANDBYTES)  # torchao's own layers cannot be pickled
def test_a_pickle_computes_the_same(base: str) -> None:
    model, _ = pair("lora", base)
    x = torch.randn(2, COLUMNS)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("base", BASES)
class TestEveryBase:
    def test_rows_are_those_of_the_whole(self, base: str) -> None:
        layer = quantised(base, 96, 192)
        form = format_of(layer)
        assert form is not None
        W = form.of(layer).rows(0, 96)
        for start, stop in ((0, 1), (3, 17), (31, 65), (95, 96)):
            assert torch.equal(form.of(layer).rows(start, stop), W[start:stop])
        matrix = matrix_of(form.of(layer))
        assert torch.equal(matrix[3:3], W[3:3])
        assert torch.equal(matrix[5::7], W[5::7])
        assert torch.equal(matrix.mT[:, 3:17], W.mT[:, 3:17])
        assert torch.equal(matrix[:, 3:17], W[:, 3:17])
        assert torch.equal(matrix[torch.tensor([3, -1, 3]), torch.tensor([0, 1, 2])], W[[3, -1, 3], [0, 1, 2]])
        assert torch.equal(matrix.to(torch.float64) * 2, W.double() * 2)

    def test_the_model_keeps_its_state_and_class(self, base: str) -> None:
        model = network(base)
        kinds, before = [type(m) for m in model], copy.deepcopy(model.state_dict())
        pk.wrap(model, "dora", rank=2)
        model(torch.randn(2, COLUMNS)).sum().backward()
        pk.unwrap(model)
        assert [type(m) for m in model] == kinds
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(values(after[key]), values(before[key])) for key in before)

    def test_a_copy_computes_the_same(self, base: str) -> None:
        model, _ = pair("dora", base)
        x = torch.randn(2, COLUMNS)
        expected = model(x)
        other = copy.deepcopy(model)
        assert torch.equal(other(x), expected)
        pk.unwrap(other)
        assert torch.equal(model(x), expected)

    def test_two_adapters_act_together(self, base: str) -> None:
        model, x = network(base), torch.randn(2, COLUMNS)
        before = model(x)
        alone = []
        for name, kind in (("a", "lora"), ("b", "oft")):
            pk.wrap(model[0], kind, name=name)
            train(model, name=name)
        hidden = model[0](x)
        for name in ("a", "b"):
            with pk.enabled(model, name):
                alone.append(model[0](x))
        plain = network(base)[0](x)
        assert close(base, hidden - plain, sum(alone) - 2 * plain)  # type: ignore[operator]
        with pk.disabled(model):
            assert torch.equal(model(x), before)

    def test_the_route_that_would_dequantise_is_refused(self, base: str) -> None:
        model = network(base)
        with pytest.raises(OptionError, match="route='dense' was given, and its weight is quantised"):
            pk.wrap(model, "lora", route="dense")
        assert not adapted_modules(model)
        assert {entry.route for entry in pk.wrap(model, "lora", rank=64).entries} == {"factored"}

    def test_a_weight_that_other_code_reads_is_refused(self, base: str) -> None:
        model = network(base)
        with pytest.raises(UnsupportedLayerError, match=r"quantised .* only where its layer is called"):
            pk.wrap(model, rules=[pk.Rule("0", "lora", read=True)])
        encoder = nn.TransformerEncoderLayer(COLUMNS, 2, ROWS)
        encoder.linear1 = quantised(base)  # type: ignore[assignment]
        with pytest.raises(UnsupportedLayerError, match="linear1: its weight is quantised"):
            pk.wrap(encoder, "lora", targets="linear1")

    def test_presets_take_it_and_count_it(self, base: str) -> None:
        plan = pk.plan(network(base), "lora", rank=2)
        assert plan.modules == ("0", "2")
        assert set(plan.coverage.values()) == {(2 * ROWS * COLUMNS, 2 * ROWS * COLUMNS)}

    def test_input_dropout_and_training(self, base: str) -> None:
        model, x = network(base), torch.randn(8, COLUMNS)
        target = torch.randn(8, COLUMNS)
        pk.wrap(model, "lora", rank=8, dropout=0.1)
        optimizer = torch.optim.Adam(pk.adapter_parameters(model), lr=1e-2)
        losses = []
        for _ in range(20):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0]

    def test_inference_mode(self, base: str) -> None:
        for kind in ("lora", "dora", "glora"):
            model, _ = pair(kind, base)
            x = torch.randn(3, COLUMNS)
            with torch.inference_mode():
                got = model(x)
            assert close(base, got, model(x))

    def test_a_shared_weight_gets_a_copy_of_its_own(self, base: str) -> None:
        first = quantised(base, COLUMNS, COLUMNS)
        second = copy.deepcopy(first)
        second.weight = first.weight
        model, x = nn.Sequential(first, second), torch.randn(2, COLUMNS)
        with pytest.raises(TiedWeightsError):
            pk.wrap(model, "lora", targets="0")
        before = model(x)
        pk.wrap(model, "dora", targets="0", tied="untie", rank=2)
        assert torch.equal(model(x), before)
        train(model)
        pk.merge(model, into="dequantised", dtype=torch.float32)
        pk.restore(model)
        pk.unwrap(model)
        assert model[0].weight is model[1].weight
        assert torch.equal(model(x), before)

    def test_autocast(self, base: str) -> None:
        model, plain = pair("dora", base)
        x = torch.randn(4, COLUMNS)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = model(x), plain(x)
        assert float((got - expected).detach().norm() / expected.detach().norm()) < 0.02
