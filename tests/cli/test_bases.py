"""Checkpoints as they are downloaded, on the command line: variants, parts of pipelines, quantised weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from tests.support.command import Ran, require_clear_error
from tests.support.files import load, write
from tests.support.hands import full

Command = Callable[..., Ran]


def test_a_variant_is_merged_into_and_what_is_left_out_is_named(peftkit: Command, tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    for end in ("", ".fp16", ".bf16"):
        write(base / f"model{end}.safetensors", {"lin.weight": torch.zeros(12, 8)})
    file = write(tmp_path / "a.safetensors", full(12, 8).keyed("lin"))
    ran = peftkit("merge", base, file, "-o", out, "--variant", "fp16")
    assert ran.code == 0 and f"wrote {out}" in ran.out
    said = "left out, as they hold the weights without the adapters: model.bf16.safetensors, model.safetensors"
    assert said in ran.out and said in peftkit("plan", base, file, "--variant", "fp16").out
    assert [path.name for path in out.iterdir()] == ["model.fp16.safetensors"]
    (base / "model.safetensors").unlink()
    require_clear_error(peftkit("merge", base, file, "-o", tmp_path / "o"), "pass --variant 'bf16' or --variant 'fp16'")


def test_one_of_two_transformers_is_chosen_as_the_message_says(peftkit: Command, tmp_path: Path) -> None:
    base = tmp_path / "base"
    for part in ("transformer", "transformer_2"):
        write(base / part / "model.safetensors", {"lin.weight": torch.zeros(12, 8)})
    (base / "model_index.json").write_text("{}")
    file = write(tmp_path / "a.safetensors", full(12, 8).keyed("lycoris_lin"))
    ran = peftkit("merge", base, file, "-o", tmp_path / "out")
    require_clear_error(ran, "lycoris_lin can be transformer.lin or transformer_2.lin")
    for part in re.findall(r"--component '(\w+)'", ran.err):
        assert peftkit("merge", base, file, "-o", tmp_path / part, "--component", part).code == 0
        assert load(tmp_path / part / part / "model.safetensors")["lin.weight"].any()


def test_a_quantised_base_is_dequantised_as_the_message_says(peftkit: Command, tmp_path: Path) -> None:
    numbers = torch.ones(12, 8).to(torch.float8_e4m3fn)
    tensors = {"lin.weight": numbers, "lin.scale_weight": torch.tensor(0.5)}
    base = write(tmp_path / "base.safetensors", tensors)
    file = write(tmp_path / "a.safetensors", full(12, 8).keyed("lin"))
    ran = peftkit("merge", base, file, "-o", tmp_path / "out.safetensors")
    require_clear_error(ran, "pass --dtype bf16 to write plain weights")
    assert peftkit("merge", base, file, "-o", tmp_path / "out.safetensors", "--dtype", "bf16").code == 0
    after = load(tmp_path / "out.safetensors")
    assert torch.equal(after["lin.weight"].float(), 0.5 + full(12, 8).tensors["diff"])
