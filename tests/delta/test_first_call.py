"""A structure may be compiled before it has run at all."""

from __future__ import annotations

from tests.support.processes import run_python

SCRIPT = """
import json, warnings
import torch
import peftkit as pk

warnings.simplefilter("ignore")
net = torch.nn.Linear(8, 8)
pk.wrap(net, "lokr", factor=2, route="dense")
compiled = torch.compile(net, backend="eager", fullgraph=True)
x = torch.randn(2, 8)
print(json.dumps(float((compiled(x) - net(x)).abs().max())))
"""


def test_the_first_call_of_all_may_be_compiled() -> None:
    assert run_python(SCRIPT) < 1e-6
