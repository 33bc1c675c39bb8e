"""Every example in the package's docstrings runs, and shows what it says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil

import pytest
import torch
from torch import nn

import peftkit as pk

#: the verbs and classes of a wrapped model
VERBS = (
    "plan",
    "Rule",
    "wrap",
    "unwrap",
    "set_strength",
    "disabled",
    "enabled",
    "merge",
    "restore",
    "check",
    "project_",
)
RESULTS = ("Plan", "MergeReport", "CheckReport")
PARAMETERS = ("adapter_parameters", "adapter_state_dict")


def modules() -> list[str]:
    """The names of all modules; the kernels in Triton only where it is installed."""
    names = ["peftkit", *(info.name for info in pkgutil.walk_packages(pk.__path__, "peftkit."))]
    triton = importlib.util.find_spec("triton") is not None
    return [name for name in names if not name.endswith("__main__") and (triton or ".triton" not in name)]


@pytest.mark.parametrize("name", modules())
def test_examples(name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples see pk, torch and nn, start from seed 0, and write to a folder that is empty."""
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    for example in finder.find(module, name, extraglobs={"pk": pk, "torch": torch, "nn": nn}):
        monkeypatch.chdir(tmp_path_factory.mktemp("example"))
        torch.manual_seed(0)
        report: list[str] = []
        failed, _ = doctest.DocTestRunner(optionflags=flags).run(example, out=report.append)
        assert not failed, "".join(report)


@pytest.mark.parametrize("name", [*VERBS, *RESULTS, *PARAMETERS])
def test_what_works_on_a_model_has_an_example(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(getattr(pk, name).__doc__)
    assert examples
    assert name in RESULTS or any(f"pk.{name}(" in example.source for example in examples)
