"""What torchrun starts on two processes: train divided layers, save, export and merge them.

    torchrun --standalone --nproc-per-node 2 -m tests.support.torchrun lora FOLDER

Without torchrun's variables it is the same in one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

import peftkit as pk


def main(kind: str, folder: Path) -> None:
    several = "RANK" in os.environ
    rank, size = 0, 1
    if several:
        dist.init_process_group("gloo")
        rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    data = torch.randn(8, 16)
    pk.wrap(model, kind, targets=["0", "2"], rank=4)
    if several:
        fully_shard(model)
    optimiser = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
    losses: list[torch.Tensor] = []
    for _ in range(3):
        loss = model(data.chunk(size)[rank]).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.detach())
    own = torch.stack(losses)
    if several:
        dist.all_reduce(own)
    pk.save(model, folder / "own.safetensors")
    pk.export(model, folder / "peft", "peft")
    pk.merge(model)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options) if several else model.state_dict()
    if rank == 0:
        weights = {key: value.contiguous() for key, value in state.items() if key in ("0.weight", "2.weight")}
        save_file({**weights, "losses": own / size}, folder / "merged.safetensors")
    if several:
        dist.barrier()
        os._exit(0)  # taking a group down joins its threads, which may be waiting for Python's lock


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
