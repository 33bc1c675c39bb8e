"""Adapters for programs of language models on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import peftkit as pk
from tests.support.command import Ran, require_clear_error
from tests.support.language import causal_lm
from tests.support.language_cells import LANGUAGE, out, require_same, truths
from tests.support.zoo import train


@pytest.mark.parametrize("target", LANGUAGE)
def test_a_file_is_exported_with_the_models_configuration(
    target: str, peftkit: Callable[..., Ran], tmp_path: Path
) -> None:
    plain, model = causal_lm("llama"), causal_lm("llama")
    plain.save_pretrained(tmp_path / "base")
    pk.wrap(model, "lora", targets=["*.q_proj", "*.v_proj"], rank=2)
    train(model, size=0.3)
    own, path = pk.save(model, tmp_path / "own.safetensors"), out(tmp_path, target)
    ran = peftkit("export", own, "-t", target, "-o", path, "--config", tmp_path / "base", "--model-name", "a/model")
    assert ran.code == 0, ran.err
    require_same(path, plain, target, truths(model))
    if path.is_dir():
        said = json.loads((path / "adapter_config.json").read_text())
        assert (said["base_model_name_or_path"], said["task_type"]) == ("a/model", "CAUSAL_LM")
    else:
        require_clear_error(peftkit("export", own, "-t", target, "-o", tmp_path / "b.gguf"), "pass config=")
        require_clear_error(peftkit("inspect", path), "is a GGUF file")
        assert not (tmp_path / "b.gguf").exists()
