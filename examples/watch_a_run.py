"""Watch a run through its weights, go back to the turning point, and draw it (pip install 'peftkit[plot]').

python examples/watch_a_run.py
"""

import torch
from torch import nn

import peftkit as pk
from peftkit.monitor import EarlyStopping

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))
x, held_out = torch.randn(16, 16), torch.randn(256, 16)  # few samples and noisy targets: a run that overfits
y, truth = x[:, :1] + 0.5 * torch.randn(16, 1), held_out[:, :1]

pk.wrap(model, "lora", rank=8, name="few")
optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=5e-3)
stopper = EarlyStopping(model, optimizer=optimizer, interval=1, window=5, log="run.jsonl")
for step in range(100):
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 5 == 0:
        with torch.no_grad():
            stopper.note(held_out=nn.functional.mse_loss(model(held_out), truth).item())
stopper.plot("run.png")
if stopper.advice.step is not None:
    stopper.restore()  # the parameters at the turning point
print(stopper.advice)
