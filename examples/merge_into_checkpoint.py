"""Merge two adapter files into a checkpoint file, weight by weight, without building the model.

python examples/merge_into_checkpoint.py
"""

import copy

import torch
from safetensors.torch import save_file
from torch import nn

import peftkit as pk

torch.manual_seed(0)
base = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Flatten(), nn.Linear(16 * 36, 10))
save_file(base.state_dict(), "base.safetensors")
for name, kind in (("ink", "lora"), ("paper", "loha")):
    model = copy.deepcopy(base)
    pk.wrap(model, kind, rank=4, name=name)
    for parameter in pk.adapter_parameters(model):
        nn.init.normal_(parameter, std=0.1)  # in place of training
    pk.save(model, f"{name}.safetensors")

strengths = {"ink.safetensors": 0.8, "paper.safetensors": {"0": 0.5, "*": 0.0}}  # per file, or per layer
print(pk.plan_merge("base.safetensors", strengths))  # what would happen; writes nothing
report = pk.merge_checkpoint("base.safetensors", strengths, "merged.safetensors", verify=True)
print(report)
