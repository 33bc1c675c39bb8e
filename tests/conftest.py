"""Fixed seeds, and uninitialised memory that shows: torch.empty is NaN when the library asks for it."""

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

_empty, _empty_like = torch.empty, torch.empty_like

# torch lists the functions that `with torch.device(…)` acts on at its first use: these, and not those that poison
with torch.device("meta"):
    torch.empty(0)


def _poisoned(original: Any) -> Any:
    def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("peftkit") and tensor.is_floating_point() and not tensor.is_meta:
            tensor.fill_(float("nan"))
        return tensor

    return empty


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    monkeypatch.setattr(torch, "empty", _poisoned(_empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(_empty_like))
