"""The monitor against the definition: cosines and norms of materialised ΔW, for every adapter on every layer."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import peftkit as pk
from peftkit.errors import OptionError, UnknownAdapterError
from peftkit.monitor import CSMonitor, Record
from peftkit.wrapping.installed import installed_adapters
from tests.support.laws import refusal
from tests.support.processes import distributed
from tests.support.zoo import ADAPTERS, LAYERS, METHODS, make, target_of, train

CELLS = [cell for cell in itertools.product(ADAPTERS, LAYERS) if refusal(*cell) is None]


def by_definition(model: nn.Module, strengths: dict[str, float]) -> Record:
    """From ΔW itself, in float64."""
    sums: dict[str, Any] = {}
    for where in installed_adapters(model, list(strengths)):
        W = where.base.double()
        dense = copy.deepcopy(where.adapter).eval().delta(where.base).dense().double()
        total = sums.setdefault(where.site, [W, torch.zeros_like(W)])[1]
        total += strengths[where.name] * dense
    cosines, norms, ratios = {}, {}, {}
    for site, (W, D) in sums.items():
        norms[site] = D.norm().item()
        ratios[site] = (D.norm() / W.norm()).item()
        cosines[site] = torch.nn.functional.cosine_similarity(D.flatten(), W.flatten(), 0).item()
    return Record(0, cosines, norms, ratios)


def agree(ours: Record, expected: Record, bound: float) -> None:
    assert ours.per_module.keys() == expected.per_module.keys()
    for site in ours.per_module:
        assert abs(ours.per_module[site] - expected.per_module[site]) <= bound, site
        assert ours.norms[site] == pytest.approx(expected.norms[site], rel=bound, abs=1e-30), site
        assert ours.ratios[site] == pytest.approx(expected.ratios[site], rel=bound, abs=1e-30), site
    assert abs(ours.cs - expected.cs) <= bound


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_adapter_on_every_layer(adapter: str, dtype: torch.dtype, bound: float) -> None:
    """Twice, because the second measurement uses what the first kept, after the adapter moved on."""
    if adapter.startswith("dora") and dtype != torch.float64:
        bound = 1e-5  # ‖e·W + f·V‖² is a sum of terms that nearly cancel here
    for layer in (layer for a, layer in CELLS if a == adapter):
        module, _ = make(layer, dtype)
        pk.wrap(module, ADAPTERS[adapter].kind, **ADAPTERS[adapter].options)
        train(module)
        monitor = CSMonitor(module)
        agree(monitor.measure(), by_definition(module, {"default": 1.0}), bound)
        train(module, seed=7)
        agree(monitor.measure(), by_definition(module, {"default": 1.0}), bound)


CLOSED = ("lora-xs", "miss", "miss mini", "svdiff", "svft", "svft random", "fourierft", "fourierft dense")


@pytest.mark.parametrize("layer", ["linear", "conv2d k3", "experts"])
@pytest.mark.parametrize("adapter", CLOSED)
def test_closed_forms_of_kinds_are_the_definition(adapter: str, layer: str) -> None:
    """Also on another base than they were made of, and where rounded singular vectors are no longer orthonormal."""
    module, _ = make(layer)
    pk.wrap(module, METHODS[adapter].kind, targets=target_of(module), **METHODS[adapter].options)
    monitor = CSMonitor(module)
    for seed in range(2):
        train(module, seed=seed)
        agree(monitor.measure(), by_definition(module, {"default": 1.0}), 1e-10)
    with torch.no_grad():
        next(installed_adapters(module)).base.mul_(1.5).add_(0.1)
    agree(monitor.measure(), by_definition(module, {"default": 1.0}), 1e-10)
    module.to(torch.bfloat16).to(torch.float64)
    agree(monitor.measure(), by_definition(module, {"default": 1.0}), 1e-10)


def test_a_frequency_and_its_mirror_are_one_wave() -> None:
    """Every place of an even and an odd spectrum, of which some are their own mirrors."""
    for rows, columns in ((4, 6), (3, 5), (4, 3)):
        model = nn.Sequential(nn.Linear(columns, rows)).double()
        pk.wrap(model, "fourierft", frequencies=rows * columns)
        train(model)
        agree(CSMonitor(model).measure(), by_definition(model, {"default": 1.0}), 1e-10)


@pytest.mark.parametrize("adapter", ["lora", "loha", "lokr", "loldu", "dora", "oft", "boft", "ia3", "full"])
def test_adapter_parameters_in_bf16_are_measured_in_fp32(adapter: str) -> None:
    """Within what their rounding makes of the result, not what bf16 products would."""
    model = nn.Sequential(nn.Linear(96, 64), nn.Linear(64, 96))
    options = dict(ADAPTERS[adapter].options) if adapter != "boft" else {"block_size": 6}
    pk.wrap(model, adapter, **options)
    train(model, size=0.05)
    model.to(torch.bfloat16)
    measured = CSMonitor(model).measure()
    wide = copy.deepcopy(model).double()
    bound = 3e-2 if adapter in ("dora", "oft", "boft") else 5e-3  # t − 1 and R − I are formed from rounded parameters
    agree(measured, by_definition(wide, {"default": 1.0}), bound)


def test_several_adapters_are_measured_together_and_alone() -> None:
    kinds = {"a": "lora", "b": "loha", "c": "oft", "d": "lora", "e": "boft"}
    model = nn.Sequential(nn.Linear(24, 24), nn.Conv2d(4, 12, 3)).double()
    for i, (name, kind) in enumerate(kinds.items()):
        pk.wrap(model, kind, name=name, **({"block_size": 6} if kind == "boft" else {}))
        train(model, seed=i, name=name)
        pk.set_strength(model, 0.5 * i - 0.8, name)
    record = CSMonitor(model).measure()
    agree(record, by_definition(model, {name: 0.5 * i - 0.8 for i, name in enumerate(kinds)}), 1e-11)
    assert record.alone.keys() == kinds.keys()
    for name in kinds:
        agree(record.alone[name], by_definition(model, {name: 1.0}), 1e-11)
        agree(CSMonitor(model, name=name).measure(), by_definition(model, {name: 1.0}), 1e-11)


def test_what_cannot_be_divided_is_zero() -> None:
    """A weight that has not moved, or is zero, counts as 0 in the mean of all."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.zeros_(model[2].weight)
    pk.wrap(model, "lora", rank=2)
    assert CSMonitor(model).measure().zero
    train(model[0])
    train(model[2])
    record = CSMonitor(model).measure()
    assert record.per_module["1"] == record.per_module["2"] == record.ratios["2"] == 0.0
    assert record.norms["2"] > 0
    assert record.cs == pytest.approx(record.per_module["0"] / 3)
    assert not record.zero


def test_a_weighed_mean_counts_numbers_not_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 40))
    pk.wrap(model, "lora", rank=2)
    train(model)
    record, plain = CSMonitor(model, weighed=True).measure(), CSMonitor(model).measure()
    first, second = plain.per_module.values()
    assert record.per_module == plain.per_module
    assert plain.cs == pytest.approx((first + second) / 2)
    assert record.cs == pytest.approx((16 * first + 160 * second) / 176)


def test_orthogonal_adapters_only_measure_how_far_they_went() -> None:
    """CS = −‖ΔW‖/2‖W‖ for OFT and BOFT, a theorem that the closed forms know nothing of."""
    for kind, options in (
        ("oft", {"block_size": 8}),
        ("oft", {"side": "in", "block_size": 4}),
        ("boft", {"block_size": 6}),
    ):
        model = nn.Linear(64, 24).double()
        pk.wrap(model, kind, **options)
        train(model)
        record = CSMonitor(model).measure()
        assert record.cs == pytest.approx(-record.ratio / 2, rel=1e-10)


def test_dropout_and_training_mode_stay_out_of_it() -> None:
    model = nn.Linear(16, 16)
    pk.wrap(model, "lora", rank_dropout=0.5, module_dropout=0.5, dropout=0.5)
    train(model)
    model.train()
    monitor = CSMonitor(model)
    first, state = monitor.measure(), torch.get_rng_state()
    assert monitor.measure() == first
    assert torch.equal(torch.get_rng_state(), state), "measuring drew random numbers"
    assert all(module.training for module in model.modules())
    with torch.autocast("cpu", torch.bfloat16), pk.disabled(model):
        assert monitor.measure() == first
    assert all(p.grad is None for p in model.parameters())


def test_merging_and_moving_the_base_are_noticed() -> None:
    model = nn.Linear(16, 24)
    pk.wrap(model, "oft", block_size=4)
    train(model)
    monitor = CSMonitor(model)
    first = monitor.measure()
    pk.merge(model)
    agree(monitor.measure(), first, 1e-12)
    pk.restore(model)
    agree(monitor.measure(), first, 1e-12)
    with torch.no_grad():
        model.weight.mul_(3)
    agree(monitor.measure(), by_definition(model, {"default": 1.0}), 1e-6)
    model.double()
    agree(monitor.measure(), by_definition(model, {"default": 1.0}), 1e-12)


@pytest.mark.parametrize("assign", [False, True])
def test_a_reloaded_loldu_is_measured_with_its_new_factors(assign: bool) -> None:
    model = nn.Linear(12, 12).double()
    pk.wrap(model, "loldu", rank=4)
    train(model)
    monitor = CSMonitor(model)
    monitor.measure()
    other = nn.Linear(12, 12).double()
    pk.wrap(other, "loldu", rank=4)
    train(other, seed=3)
    model.load_state_dict(other.state_dict(), assign=assign)
    agree(monitor.measure(), by_definition(model, {"default": 1.0}), 1e-12)


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if "tucker" not in name])
def test_nothing_of_the_size_of_the_weight_is_made(adapter: str) -> None:
    """After the first measurement, which builds what is kept, no allocation reaches half of W."""
    model = nn.Linear(2048, 1536)
    pk.wrap(model, ADAPTERS[adapter].kind, **{**ADAPTERS[adapter].options, **WIDE.get(adapter, {})})
    train(model, size=0.01)
    monitor = CSMonitor(model)
    monitor.measure()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        monitor.measure()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < model.weight.nbytes / 2


#: blocks as wide as W would be W: options for wide layers where the zoo's are for small ones
WIDE: dict[str, dict[str, Any]] = {
    "boft": {"block_size": 8},
    "boft rescaled": {"block_size": 8},
    "oft bounded": {"blocks": 64},
    "lokr": {"factor": 8},
    "lokr rank": {"factor": (8, 8)},
    "lokr as told": {"outer": (8, 8)},
}


# -- counting steps -------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    pk.wrap(model, "lora", rank=2)
    return model


def fit(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, accumulate: int = 1) -> None:
    for step in range(steps * accumulate):
        model(torch.randn(4, 8)).square().mean().backward()
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()


def test_an_optimizer_counts_its_own_steps(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2)
    monitor, records = CSMonitor(model, interval=3, optimizer=optimizer, gradients=True), []
    monitor.listeners.append(records.append)
    fit(model, optimizer, 10, accumulate=2)
    assert [record.step for record in records] == [3, 6, 9]
    assert all(record.lr == 1e-2 and set(record.gradients) == {"0", "1"} for record in records)
    assert all(value > 0 for value in records[-1].gradients.values())
    with pytest.raises(OptionError, match="by itself"):
        monitor.step()
    monitor.detach()
    fit(model, optimizer, 10)
    assert len(records) == 3


def test_the_rate_is_that_of_the_adapters_groups(model: nn.Module) -> None:
    head = nn.Linear(2, 2)
    first, *rest = pk.adapter_parameters(model)
    groups = [
        {"params": head.parameters(), "lr": 1.0},
        {"params": [first], "lr": 1e-3},
        {"params": rest, "lr": 2e-3},
    ]
    optimizer = torch.optim.SGD(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    monitor, rates = CSMonitor(model, interval=1, optimizer=optimizer), []
    monitor.listeners.append(lambda record: rates.append(record.lr))
    for _ in range(3):
        fit(model, optimizer, 1)
        schedule.step()
    assert rates == [2e-3, 1e-3, 5e-4]


def test_steps_that_a_scaler_skips_do_not_count(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monitor = CSMonitor(model, interval=1, optimizer=optimizer)
    for poison in (False, True, False, True, True, False):
        loss = model(torch.randn(4, 8)).square().mean() * (float("inf") if poison else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert monitor.steps == 3


def test_a_step_within_a_step_counts_once(model: nn.Module) -> None:
    class Own(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.AdamW([nn.Parameter(torch.ones(1))])  # torch hooks into the class when its first instance is made
    optimizer = Own(pk.adapter_parameters(model), lr=1e-2)
    monitor = CSMonitor(model, interval=1, optimizer=optimizer)
    fit(model, optimizer, 5)
    assert monitor.steps == 5


def test_the_rate_is_read_after_the_optimizer_was_resumed(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2)
    monitor = CSMonitor(model, optimizer=optimizer)
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.5
    optimizer.load_state_dict(state)
    assert monitor.learning_rate() == 0.5


def test_unwrapping_ends_the_watch_and_not_the_training(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    head = nn.Linear(8, 8)
    optimizer = torch.optim.SGD([*pk.adapter_parameters(model), *head.parameters()], lr=0.1)
    CSMonitor(model, interval=1, optimizer=optimizer)
    fit(nn.Sequential(model, head), optimizer, 2)
    pk.unwrap(model)
    fit(nn.Sequential(model, head), optimizer, 2)
    assert "stops counting" in caplog.text


def test_a_weight_that_is_trained_is_read_again() -> None:
    """Fused optimisers write without telling torch."""
    model = nn.Linear(16, 16)
    pk.wrap(model, "loldu", rank=4)
    train(model)
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    monitor = CSMonitor(model)
    monitor.measure()
    for _ in range(3):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    assert monitor.measure() == CSMonitor(model).measure()


def test_ranks_that_cancel_leave_what_they_leave() -> None:
    model = nn.Linear(32, 32)
    pk.wrap(model, "lora", rank=2, alpha=2)
    adapter: Any = model.adapters["default"]  # type: ignore[index]
    with torch.no_grad():
        adapter.up.copy_(torch.randn(32, 1).expand(32, 2) * torch.tensor([1.0, -1.0]))
        adapter.down.copy_((torch.randn(1, 32) * 1e3).expand(2, 32) + 1e-2 * torch.randn(2, 32))
    expected = by_definition(copy.deepcopy(model).double(), {"default": 1.0})
    agree(CSMonitor(model).measure(), expected, 1e-3)


def test_nothing_is_recorded_before_anything_moves(model: nn.Module) -> None:
    monitor = CSMonitor(model, interval=2)
    assert [monitor.step(), monitor.step()] == [None, None]
    train(model)
    record = [monitor.step(), monitor.step()][-1]
    assert record is not None
    assert record.step == 4


@pytest.mark.parametrize("interval", [0, -3, 2.0, True])
def test_a_bad_interval(model: nn.Module, interval: Any) -> None:
    with pytest.raises(OptionError, match="interval="):
        CSMonitor(model, interval=interval)


def test_a_model_without_adapters() -> None:
    with pytest.raises(UnknownAdapterError, match="call wrap or load first"):
        CSMonitor(nn.Linear(2, 2))
    module = nn.Linear(4, 4)
    pk.wrap(module, "lora", rank=1, name="style")
    with pytest.raises(UnknownAdapterError, match="style"):
        CSMonitor(module, name="stile")


# -- sharded weights ------------------------------------------------------------------------------------------------


def _sharded() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for kind in pk.kinds():
        model = _model(kind)
        for module in model:
            torch.distributed.fsdp.fully_shard(module, mesh=mesh)
        torch.distributed.fsdp.fully_shard(model, mesh=mesh)
        assert any(isinstance(p, DTensor) for p in model.parameters())
        monitor = CSMonitor(model)
        record = monitor.measure()
        assert monitor.measure() == record
        found[kind] = (record.per_module, record.norms, record.ratios)
    return found


def _model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 24), nn.Linear(24, 24)] + ([nn.Conv2d(4, 24, 3)] if kind != "glora" else [])
    model = nn.Sequential(*layers).double()
    pk.wrap(model, kind, **({"block_size": 6} if kind == "boft" else {}))
    train(model)
    return model


@pytest.mark.processes
def test_sharded_weights_are_summed_across_processes(tmp_path: Path) -> None:
    """FSDP2 over two processes: the same numbers on both, and those of the whole model."""
    found = distributed(_sharded, folder=tmp_path)
    assert found[0] == found[1]
    for kind, (cosines, norms, ratios) in found[0].items():
        agree(Record(0, cosines, norms, ratios), CSMonitor(_model(kind)).measure(), 1e-10)
