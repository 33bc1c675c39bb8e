"""torch.distributed.checkpoint of a divided, adapted model: what is trained comes back, and the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftkit as pk
from tests.support.processes import distributed

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(torch.__version__ < "2.6", reason="fully_shard is public from torch 2.6 on"),
]


def model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    pk.wrap(net, kind, rank=2)
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer, at: int) -> None:
    x = torch.linspace(-1, 1, 12).view(2, 6) * (at + 1)
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(pk.adapter_parameters(net), lr=1e-2)


def _run(folder: Path, kind: str) -> list[Tensor | int]:
    """Two steps, a checkpoint, two steps; and a fresh model that takes the checkpoint and the last two steps."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.fsdp import fully_shard

    trained = StateDictOptions(ignore_frozen_params=True)
    nets: list[nn.Module] = []
    for resumed in (False, True):
        net = model(kind)
        fully_shard(net)
        optimizer = optimizer_of(net)
        if resumed:
            for p in pk.adapter_parameters(net):
                nn.init.zeros_(p)
            state, own = get_state_dict(net, optimizer, options=trained)
            dcp.load({"model": state, "optimizer": own}, checkpoint_id=str(folder / "dcp"))
            lenient = StateDictOptions(ignore_frozen_params=True, strict=False)
            set_state_dict(net, optimizer, model_state_dict=state, optim_state_dict=own, options=lenient)
        else:
            for at in range(2):
                step(net, optimizer, at)
            state, own = get_state_dict(net, optimizer, options=trained)
            dcp.save({"model": state, "optimizer": own}, checkpoint_id=str(folder / "dcp"))
        for at in range(2, 4):
            step(net, optimizer, at)
        nets.append(net)
    keys = [key for key in state if "adapters" not in key]
    files = [pk.save(net, folder / f"{i}.safetensors").read_bytes() for i, net in enumerate(nets)]
    return [len(keys), int(files[0] == files[1])]


@pytest.mark.parametrize("kind", [pytest.param("lora", marks=pytest.mark.slow), "dora"])
def test_a_divided_run_resumes_from_its_adapters_alone(kind: str, tmp_path: Path) -> None:
    for others, same in distributed(_run, tmp_path, kind, folder=tmp_path):
        assert others == 0, "the checkpoint holds nothing of the base"
        assert same == 1, "the resumed run is the other one, bit for bit"
    whole = model(kind)
    optimizer = optimizer_of(whole)
    for at in range(4):
        step(whole, optimizer, at)
    loaded = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    loaded.load_state_dict({key: t for key, t in whole.state_dict().items() if "adapters" not in key})
    pk.load(loaded, tmp_path / "0.safetensors")
    x = torch.randn(4, 6)
    torch.testing.assert_close(loaded(x), whole(x), rtol=1e-5, atol=1e-6)


def _local(parameter: Any) -> int:
    """The bytes of a parameter on this process."""
    return parameter.to_local().numel() * parameter.element_size()


def test_a_70b_model_fits_on_8_gpus_with_its_adapters_and_their_optimiser() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = 80
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config).to(torch.bfloat16)
    pk.wrap(net, "lora", targets="attn-mlp", rank=16)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        for layer in net.model.layers:
            fully_shard(layer)
        fully_shard(net)
        adapters = pk.adapter_parameters(net)
        own = {id(p) for p in adapters}
        base = [p for p in net.parameters() if id(p) not in own]
        held_base, held_adapters = sum(map(_local, base)), sum(map(_local, adapters))
        layer = sum(p.numel() * p.element_size() for p in net.model.layers[0].parameters())
        ends = sum(p.numel() * p.element_size() for p in (net.lm_head.weight, net.model.embed_tokens.weight))
    finally:
        torch.distributed.destroy_process_group()
    assert 70.5e9 < sum(p.numel() for p in base) < 70.6e9
    assert sum(p.numel() for p in adapters) == layers * 16 * (
        2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    )
    assert held_base == pytest.approx(2 * 70.55e9 / 8, rel=1e-3)
    # fp32 adapters with their gradients and AdamW's two moments: four times their bytes, and no more than 0.42 GB
    assert 4 * held_adapters < 0.42e9
    # gathered at a time: two layers, of which one is fetched ahead, and the root's embedding and head
    peak = held_base + 4 * held_adapters + 2 * layer + ends
    assert peak == pytest.approx(25.7e9, rel=5e-3)
