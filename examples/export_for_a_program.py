"""Write an adapter as another program reads it, and compare the two files weight by weight.

python examples/export_for_a_program.py
"""

import torch
from torch import nn

import peftkit as pk

torch.manual_seed(0)
model = nn.ModuleDict({"to_q": nn.Linear(32, 32), "to_k": nn.Linear(32, 32)})
pk.wrap(model, "lokr", factor=4, name="style")
for parameter in pk.adapter_parameters(model):
    nn.init.normal_(parameter, std=0.1)  # in place of training
pk.save(model, "style.safetensors")

print(pk.inspect("style.safetensors"))
report = pk.export("style.safetensors", "style_peft", "peft")  # also kohya, comfyui, a1111, forge, lycoris, diffusers
print(report)
gap = pk.diff("style.safetensors", "style_peft")  # how far the ΔW of both files are apart
print(gap)
