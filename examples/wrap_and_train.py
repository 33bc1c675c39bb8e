"""Wrap a model, train its adapters alone, save them, and merge them into the weights.

python examples/wrap_and_train.py
"""

import torch
from torch import nn

import peftkit as pk

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))  # any model, with its own weights
x = torch.randn(256, 16)
y = x[:, :1] * x[:, 1:2]

plan = pk.wrap(model, "lora", rank=4, name="product")  # freezes the model; its output is the same, bit for bit
optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-2)
for _ in range(200):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
pk.save(model, "product.safetensors")
report = pk.merge(model, backup=None)  # for good: a plain model again

error = nn.functional.mse_loss(model(x), y).item()
print(plan, report, f"mean squared error {error:.3f}; of the mean {y.var().item():.3f}", sep="\n")
