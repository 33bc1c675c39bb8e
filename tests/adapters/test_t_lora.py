"""T-LoRA: LyCORIS' own module as oracle, and which ranks a timestep leaves."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from lycoris.modules.tlora import TLoraModule, clear_timestep_mask, compute_timestep_mask, set_timestep_mask
from torch import Tensor, nn

import peftkit as pk
from peftkit.adapters import Adapter
from peftkit.errors import OptionError
from peftkit.wrapping.installed import installed_adapters
from tests.support.zoo import train

RANK = 6


def trained(**options: object) -> tuple[nn.Module, nn.Linear, Adapter]:
    """A model with a T-LoRA that has moved, its Linear alone, and the adapter."""
    torch.manual_seed(0)
    plain = nn.Linear(10, 16)
    model = nn.Sequential(copy.deepcopy(plain)).double()
    pk.wrap(model, "t-lora", rank=RANK, alpha=3, **options)
    train(model)
    return model, plain.double(), next(installed_adapters(model)).adapter


def change(model: nn.Module) -> Tensor:
    where = next(installed_adapters(model))
    with torch.no_grad():
        return where.adapter(where.base, 1.0).dense()


@pytest.mark.parametrize("start", ["principal", "last", "middle"])
def test_it_is_lycoris_own_at_every_timestep(start: str) -> None:
    model, plain, adapter = trained(start=start, min_rank=2)
    theirs = TLoraModule("a", plain.float(), 1.0, RANK, 3, sig_type=start)
    assert torch.allclose(theirs.base_lambda[0], adapter.get_buffer("gate0").float(), atol=1e-5)
    signs = (theirs.base_p * adapter.get_buffer("up0")).sum(0).sign()
    own = dict(adapter.named_parameters())
    with torch.no_grad():
        theirs.p_layer.weight += own["up"] * signs
        theirs.q_layer.weight += own["down"] * signs[:, None]
        theirs.lambda_layer += own["gate"]
    for t in (None, 0, 130, 500, 750, 999, 1000):
        pk.training.use_timestep(model, t)
        if t is not None:
            set_timestep_mask(compute_timestep_mask(t, 1000, RANK, 2))
        with torch.no_grad():
            expected, _ = theirs.get_diff_weight()
        clear_timestep_mask()
        assert (change(model) - expected).norm() <= 1e-5 * expected.norm()


def test_a_timestep_leaves_the_first_ranks_alone() -> None:
    model, _, adapter = trained(of="random")
    names = {"up": 1, "gate": 0, "down": 0}
    for t, ranks in ((1000, 1), (600, 3), (0, RANK), (None, RANK)):
        pk.training.use_timestep(model, t)
        model.zero_grad()
        model(torch.randn(4, 10, dtype=torch.float64)).square().sum().backward()
        for name, axis in names.items():
            gradient = adapter.get_parameter(name).grad
            assert gradient is not None
            moved = gradient.movedim(axis, 0).flatten(1 if gradient.dim() > 1 else 0)
            moved = moved.abs().sum(1) if gradient.dim() > 1 else moved.abs()
            assert moved.nonzero().flatten().tolist() == list(range(ranks))
    pk.training.use_timestep(model, 500, power=3)
    assert torch.linalg.matrix_rank(change(model)) == 2  # of the ranks that it holds, and of those that it left


def test_random_factors_are_orthonormal_and_in_the_file(tmp_path: Path) -> None:
    model, plain, adapter = trained(of="random", start="last")
    up, down = adapter.get_buffer("up0"), adapter.get_buffer("down0")
    identity = torch.eye(RANK, dtype=up.dtype)
    assert torch.allclose(up.mT @ up, identity) and torch.allclose(down @ down.mT, identity)
    pk.training.use_timestep(model, 900)
    again = nn.Sequential(copy.deepcopy(plain)).double()
    pk.load(again, pk.save(model, tmp_path / "a.safetensors", dtype=torch.float64))
    pk.training.use_timestep(model, None)
    assert torch.equal(change(again), change(model))


def test_what_timesteps_are_refused() -> None:
    model, plain, _ = trained()
    for timestep, options, message in (
        (1001, {}, "timestep=1001 was given, a number from 0 to steps, 1000, or None"),
        (5, {"steps": 0}, "steps=0 was given, a number above 0"),
        (5, {"power": -1.0}, "power=-1.0 was given"),
    ):
        with pytest.raises(OptionError, match=message):
            pk.training.use_timestep(model, timestep, **options)
    lora = nn.Sequential(plain)
    pk.wrap(lora, "lora", rank=2)
    with pytest.raises(OptionError, match="the ranks of no adapter of the model depend on it"):
        pk.training.use_timestep(lora, 5)
