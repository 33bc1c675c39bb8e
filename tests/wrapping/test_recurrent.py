"""LSTM, GRU, RNN and their cells: torch's fused function gets W + ΔW, as if that were the weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import CoverageWarning, UnsupportedLayerError
from peftkit.wrapping.installed import installed_adapters
from tests.support.zoo import ADAPTERS, train

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(4, 6, batch_first=True),
    "LSTM of two layers, both ways": lambda: nn.LSTM(4, 6, 2, bidirectional=True),
    "LSTM with projections": lambda: nn.LSTM(4, 6, proj_size=2),
    "LSTM without biases": lambda: nn.LSTM(4, 6, bias=False),
    "GRU": lambda: nn.GRU(4, 6),
    "RNN": lambda: nn.RNN(4, 6, nonlinearity="relu"),
    "LSTM cell": lambda: nn.LSTMCell(4, 6),
    "GRU cell": lambda: nn.GRUCell(4, 6),
}


class Net(nn.Module):
    def __init__(self, layer: str) -> None:
        super().__init__()
        self.rnn, self.head = LAYERS[layer](), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        out = self.rnn(x)
        if isinstance(self.rnn, nn.RNNCellBase):  # a second step, for a state that is not 0
            out = self.rnn(x, out)
        while isinstance(out, tuple):
            out = out[0]
        return out


def net(layer: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(layer), torch.randn((5, 4) if "cell" in layer else (3, 5, 4))


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("adapter", ["lora", "ia3"])
def test_every_matrix_is_adapted_as_if_it_were_the_sum(layer: str, adapter: str, tmp_path: Path) -> None:
    model, x = net(layer)
    base, case = copy.deepcopy(model), ADAPTERS[adapter]
    plan = pk.wrap(model, case.kind, targets="rnn", **case.options)
    matrices = {f"rnn.{name}" for name, p in base.rnn.named_parameters() if p.dim() == 2}
    assert set(plan.modules) == matrices
    assert {entry.route for entry in plan.entries} == {"weight"}
    assert torch.equal(model(x), base(x))
    train(model)
    y = model(x)
    assert (y - base(x)).norm() > 1e-3
    assert pk.check(model, x).ok
    summed = copy.deepcopy(base)
    with torch.no_grad():
        for at in installed_adapters(model):
            summed.get_parameter(at.site).add_(at.adapter(at.base, 1.0).dense())
    torch.testing.assert_close(y, summed(x))
    file = pk.save(model, tmp_path / "a.safetensors")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded(base, file)):
        assert torch.equal(twin(x), y)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    pk.merge_checkpoint(tmp_path / "base.safetensors", {file: 1.0}, tmp_path / "merged.safetensors")
    merged = copy.deepcopy(base)
    merged.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(merged(x), y)
    pk.merge(model)
    torch.testing.assert_close(model(x), y)
    pk.restore(model)
    assert torch.equal(model(x), y)
    with pk.disabled(model):
        assert torch.equal(model(x), base(x))
    model.double().float()
    torch.testing.assert_close(model(x), y)
    pk.unwrap(model)
    assert type(model.rnn) is type(base.rnn)
    assert torch.equal(model(x), base(x))
    with torch.no_grad():
        model.rnn.get_parameter(next(iter(dict(model.rnn.named_parameters())))).zero_()
    assert not torch.equal(model(x), base(x))


def loaded(base: nn.Module, file: Path) -> nn.Module:
    fresh = copy.deepcopy(base)
    pk.load(fresh, file)
    return fresh


def test_presets_leave_them_out_and_say_so() -> None:
    model, _ = net("LSTM")
    with pytest.warns(CoverageWarning, match="it is a recurrent layer"):
        plan = pk.plan(model, "lora", rank=1)
    assert plan.modules == ("head",)
    assert "it is a recurrent layer" in dict(plan.skipped)["rnn"]
    assert pk.plan(model, "lora", targets="*", rank=1).modules == ("head",)
    assert set(pk.plan(model, "lora", targets="LSTM", rank=1).modules) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0"}
    assert pk.plan(model, "lora", targets="weight_hh_l0", rank=1).modules == ("rnn.weight_hh_l0",)
    assert set(pk.plan(model, "full", targets="*.bias_*").modules) == {"rnn.bias_ih_l0", "rnn.bias_hh_l0"}
    with pytest.raises(UnsupportedLayerError, match="it is a recurrent layer"):
        pk.plan(model.rnn, "lora", rank=1)


def test_biases_train_beside_the_matrices() -> None:
    model, x = net("GRU")
    base = copy.deepcopy(model)
    pk.wrap(model, rules=[pk.Rule("rnn", "lora", rank=2), pk.Rule("*.bias_*", "full")])
    assert torch.equal(model(x), base(x))
    train(model)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in pk.adapter_parameters(model))
    y = model(x)
    pk.merge(model, backup=None)
    torch.testing.assert_close(model(x), y)


def test_compiled_code_follows_the_adapters() -> None:
    model, x = net("LSTM")
    pk.wrap(model, "lora", targets="rnn", rank=2)
    train(model)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))
        pk.set_strength(model, 0.25)
        torch.testing.assert_close(compiled(x), model(x))
        with pk.disabled(model):
            torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "allow_rnn"), reason="an option of later versions of torch")
@pytest.mark.parametrize("layer", ["LSTM", "GRU", "LSTM cell"])
def test_a_full_graph_is_compiled_where_that_of_the_plain_layer_is(layer: str) -> None:
    model, x = net(layer)
    pk.wrap(model, "lora", targets="rnn", rank=2)
    train(model)
    with torch.no_grad():
        if "cell" not in layer:
            for own in (model, net(layer)[0]):
                torch._dynamo.reset()
                with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU"):
                    torch.compile(own, backend="eager", fullgraph=True)(x)
        torch._dynamo.reset()
        with torch._dynamo.config.patch(allow_rnn=True):
            compiled = torch.compile(model, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), model(x))
            with pk.disabled(model):
                torch.testing.assert_close(compiled(x), model(x))
