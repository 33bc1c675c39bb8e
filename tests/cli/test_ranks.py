"""Ranks of a new adapter of a checkpoint, by the command and as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import peftkit as pk
from peftkit.errors import FileError, OptionError
from peftkit.files.base import open_base
from peftkit.files.ranks import plan_ranks, read_scores
from peftkit.files.skeleton import skeleton
from tests.support.command import Ran, require_clear_error


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 32, 3), nn.GroupNorm(2, 32), nn.Linear(64, 128), nn.Linear(128, 64))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    base = network()
    tensors = {f"model.{name}": tensor.half() for name, tensor in base.state_dict().items()}
    tensors |= {"first_stage_model.x.weight": torch.zeros(9, 9), "embed_tokens.weight": torch.zeros(50, 8)}
    tensors["model.2.weight"].zero_()
    save_file(tensors, folder / "base.safetensors")
    change = torch.zeros(128, 64)
    change[0, 0], change[1, 1], change[2, 2] = 4, 2, 1
    save_file(tensors | {"model.2.weight": change.half()}, folder / "tuned.safetensors")
    return folder


def test_a_skeleton_has_the_layers_that_adapters_are_for(files: Path) -> None:
    model = skeleton(open_base(files / "base.safetensors"))
    layers = {name: type(layer) for name, layer in model.named_modules() if list(layer.parameters(recurse=False))}
    assert layers == {"model.0": nn.Conv2d, "model.2": nn.Linear, "model.3": nn.Linear, "embed_tokens": nn.Embedding}
    assert all(p.is_meta for p in model.parameters())
    ours, theirs = (pk.plan(m, "lora", targets=["Conv2d", "Linear"], rank=3) for m in (model, network()))
    assert [e.parameters for e in ours.entries] == [e.parameters for e in theirs.entries]


def test_a_weight_may_hold_others(tmp_path: Path) -> None:
    names = ("a.weight", "a.b.weight", "c.d.weight")
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "x.safetensors")
    found = pk.plan(skeleton(open_base(tmp_path / "x.safetensors")), "lora", rank=1).modules
    assert sorted(found) == ["a", "a.b", "c.d"]
    save_file({"ids": torch.zeros(4, dtype=torch.int64), "norm.weight": torch.zeros(3)}, tmp_path / "y.safetensors")
    names = ("train.weight", "a.type.weight", "b.forward.weight", "_modules.weight", "c..weight", "weight")
    save_file({name: torch.zeros(4, 4) for name in names}, tmp_path / "z.safetensors")
    found = pk.plan(skeleton(open_base(tmp_path / "z.safetensors")), "lora", rank=1).modules
    assert sorted(found) == ["_modules", "a.type", "b.forward", "train"]
    with pytest.raises(FileError, match="no weight of a Linear or a convolution"):
        skeleton(open_base(tmp_path / "y.safetensors"))


def test_what_was_tuned_gets_the_ranks_that_it_has(files: Path) -> None:
    base, tuned = files / "base.safetensors", files / "tuned.safetensors"
    plan = plan_ranks(base, "lora", "20KB", tuned=tuned)
    assert {entry.site.name: entry.options for entry in plan.entries} == {"model.2": {"rank": 3}}
    assert plan.why["model.2"] == "100.00% of all that is worth anything; no further rank is worth anything"
    less = plan_ranks(base, "lora", 192 * 4 * 2, tuned=tuned, targets="Linear")
    assert [entry.options["rank"] for entry in less.entries] == [2] and less.why["model.2"].startswith("95.24%")


def test_by_command(files: Path, peftkit: Callable[..., Ran]) -> None:
    base, scores = files / "base.safetensors", files / "scores.json"
    shown = peftkit("plan", base, "--budget", "6kB", "--all")
    assert shown.code == 0 and "of 6,000 bytes" in shown.out and "model.3: lora 3: rank 3: equal ranks" in shown.out
    scores.write_text(json.dumps({"model.0": [0], "model.2": [3, 2, 1], "model.3": [0.5]}))
    found = peftkit("plan", base, "--budget", "1.6kB", "--scores", scores, "--json").json
    assert found["weights"] == {"model.2": {"kind": "lora", "rank": 2, "bytes": 1536}} and found["bytes"] == 1536
    narrow = peftkit("plan", base, "--budget", "1.6kB", "--scores", scores, "--dtype", "fp16", "--json").json
    assert narrow["weights"]["model.2"]["rank"] == 3
    options = ("--kind", "svdlora", "--target", "Linear", "--exclude", "model.3", "--json")
    only = peftkit("plan", base, "--budget", "6kB", *options).json
    assert {name: own["kind"] for name, own in only["weights"].items()} == {"model.2": "svdlora"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "no adapter was given"),
        (("--scores", "x.json"), "--scores is for a new adapter"),
        (("a.safetensors", "--budget", "1MB"), "leave files and --rebase out"),
        (("--budget", "1MB", "--rebase", "transplant"), "leave files and --rebase out"),
        (("--budget", "1MB", "--scores", "{scores}", "--tuned", "{tuned}"), "both given"),
        (("--budget", "1MB", "--scores", "{wrong}"), "holds no scores"),
        (("--budget", "lots"), "a number of bytes or a size"),
    ],
)
def test_what_does_not_go_together(
    files: Path, peftkit: Callable[..., Ran], arguments: tuple[str, ...], message: str
) -> None:
    (files / "good.json").write_text('{"model.0": [1]}')
    (files / "wrong.json").write_text('{"model.0": "much"}')
    paths = {"scores": files / "good.json", "wrong": files / "wrong.json", "tuned": files / "tuned.safetensors"}
    given = [own.format(**paths) for own in arguments]
    require_clear_error(peftkit("plan", files / "base.safetensors", *given), message)


def test_another_model_is_no_tuned_one(files: Path, tmp_path: Path) -> None:
    base, other = files / "base.safetensors", tmp_path / "other.safetensors"
    save_file({"model.2.weight": torch.zeros(3, 3)}, other)
    with pytest.raises(FileError, match=r"model\.0\.weight is not there"):
        plan_ranks(base, "lora", "1KB", tuned=other)
    with pytest.raises(FileError, match=r"model\.2\.weight is \(3, 3\), \(128, 64\) was expected"):
        plan_ranks(base, "lora", "1KB", tuned=other, targets="model.2")
    with pytest.raises(OptionError, match="both given"):
        plan_ranks(base, "lora", "1KB", scores={}, tuned=other)
    (tmp_path / "s.json").write_text('{"a": [1, 0.5]}')
    assert read_scores(tmp_path / "s.json") == {"a": [1, 0.5]}


def test_quantised_numbers_are_what_they_stand_for(tmp_path: Path) -> None:
    """As ComfyUI's fp8 under a scale: a copy of it has learned nothing, and a plain one what it has."""
    W = torch.linspace(-1, 1, 24 * 16).reshape(24, 16)
    narrow = (W * 256).to(torch.float8_e4m3fn)
    scaled = {"a.weight": narrow, "a.scale_weight": torch.tensor(1 / 256), "scaled_fp8": torch.zeros(2).to(narrow)}
    save_file(scaled, tmp_path / "fp8.safetensors")
    plain = narrow.float() / 256
    save_file({"a.weight": plain}, tmp_path / "same.safetensors")
    change = torch.outer(torch.ones(24), torch.ones(16))
    save_file({"a.weight": plain + change}, tmp_path / "tuned.safetensors")
    assert plan_ranks(tmp_path / "fp8.safetensors", "lora", "1KB", tuned=tmp_path / "same.safetensors").entries == ()
    plan = plan_ranks(tmp_path / "fp8.safetensors", "lora", "1KB", tuned=tmp_path / "tuned.safetensors")
    assert plan.why["a"].startswith("100.00%") and plan.entries[0].options["rank"] >= 1
    for wrong, message in (
        (W * float("inf"), "not finite"),
        (W.to(torch.int8), "floating-point numbers were expected"),
    ):
        save_file({"a.weight": wrong}, tmp_path / "wrong.safetensors")
        with pytest.raises(FileError, match=message):
            plan_ranks(tmp_path / "same.safetensors", "lora", "1KB", tuned=tmp_path / "wrong.safetensors")
