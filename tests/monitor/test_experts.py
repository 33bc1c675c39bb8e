"""The monitor on stacks of experts: one ΔW of all, whose numbers are sums over the experts."""

from __future__ import annotations

import pytest
import torch

import peftkit as pk
from peftkit.monitor import CSMonitor, Record
from peftkit.wrapping.installed import installed_adapters
from tests.support.experts import Bank, language_model, tokens
from tests.support.zoo import ADAPTERS, train


@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_cosine_and_norms_are_of_the_whole_stack(case: str, transposed: bool) -> None:
    """Twice, because the second measurement uses what the first kept, after the adapter moved on."""
    if ADAPTERS[case].options.get("tucker"):
        pytest.skip("Tucker cores are of kernels")
    torch.manual_seed(0)
    module = Bank(transposed=transposed).double()
    pk.wrap(module, ADAPTERS[case].kind, targets="weight", **ADAPTERS[case].options)
    monitor = CSMonitor(module)
    for seed in (1, 7):
        train(module, seed)
        record = monitor.measure()
        (at,) = installed_adapters(module)
        W, dense = at.base, at.adapter(at.base, 1.0).dense().detach()
        assert record.norms["weight"] == pytest.approx(dense.norm().item(), rel=1e-10)
        assert record.ratios["weight"] == pytest.approx((dense.norm() / W.norm()).item(), rel=1e-10)
        cosine = torch.nn.functional.cosine_similarity(dense.flatten(), W.flatten(), 0)
        assert record.per_module["weight"] == pytest.approx(cosine.item(), abs=1e-10)


def test_a_run_is_watched() -> None:
    model = language_model("gpt_oss")
    pk.wrap(model, "lora", targets="*.experts.*", rank=2)
    optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.3)
    monitor = CSMonitor(model, interval=1, optimizer=optimizer)
    records: list[Record] = []
    monitor.listeners.append(records.append)
    for _ in range(3):
        model(tokens(1, 6)).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [len(record.per_module) for record in records] == [4] * 3
    assert all(record.norms[name] > 0 for record in records for name in record.norms)


def test_a_spectrum_is_that_of_the_experts_side_by_side() -> None:
    torch.manual_seed(0)
    module = Bank().double()
    pk.wrap(module, "lora", targets="weight", rank=2)
    train(module)
    (at,) = installed_adapters(module)
    parts = at.adapter(at.base, 1.0).dense().detach().unflatten(0, (3, 12))
    values = torch.linalg.svdvals(torch.block_diag(*parts))
    share = values[values > 1e-12] / values.sum()
    found = pk.monitor.spectra(module, leading=2)["weight"]
    assert found.effective_rank == pytest.approx(float(torch.exp(-(share * share.log()).sum())), rel=1e-6)
    assert found.stable_rank == pytest.approx(float(values.square().sum() / values.max() ** 2), rel=1e-6)
    assert len(found.similarity) == 3 * 2
    for expert, (W, dense) in enumerate(zip(at.base.unflatten(0, (3, 12)), parts, strict=True)):
        own, changed = torch.linalg.svd(W)[0], torch.linalg.svd(W + dense)[0][:, :2]
        cosines = (own.mT @ changed).abs().amax(0)
        assert found.similarity[2 * expert : 2 * expert + 2] == pytest.approx(cosines.tolist(), rel=1e-4)


def test_norms_are_limited() -> None:
    module = Bank()
    pk.wrap(module, "lora", targets="weight", rank=2)
    train(module)
    (limited,) = pk.limit_norms_(module, 0.5)
    assert limited.weight == "weight"
    (at,) = installed_adapters(module)
    assert float(at.adapter(at.base, 1.0).dense().detach().norm()) == pytest.approx(0.5, rel=1e-5)
