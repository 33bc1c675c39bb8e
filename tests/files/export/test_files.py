"""What an exported file has besides factors: alphas, metadata, dtypes, names; and what is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_bytes
from torch import nn

import peftkit as pk
from peftkit.errors import ExportError, FileError, OptionError, PeftkitError, UnknownAdapterError
from tests.support.architectures import EACH_TARGET, linear, of_part, readable, tensors
from tests.support.cells import (
    ALL_LAYERS,
    LAYERS,
    MIXED,
    TARGETS,
    exists,
    model_of,
    of_kinds,
    out,
    require_equal,
    require_read,
    truths,
    weights,
    wrapped,
)
from tests.support.files import metadata
from tests.support.models import tree
from tests.support.paths import ROOT
from tests.support.readers import READERS
from tests.support.zoo import ADAPTERS, train

WEBUI = ("a1111", "forge", "comfyui", "kohya")
#: targets whose files name tensors lora_up, lora_down, alpha
WITH_ALPHA = (*WEBUI, "lycoris")


# -- what else a file has ----------------------------------------------------------------------------------------------

RANKED = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": {"rank": 2, "alpha": 3},
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k": {"rank": 4, "alpha": 1},
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v": {"rank": 4, "alpha": 8},
    "down_blocks.0.resnets.0.conv1": {"rank": 5},
}


def ranked() -> nn.Module:
    torch.manual_seed(0)
    model = tree({path: nn.Conv2d(8, 16, 3) if "conv" in path else nn.Linear(8, 16) for path in RANKED})
    pk.wrap(model, rules=[pk.Rule(path, "lora", **options) for path, options in RANKED.items()])
    train(model)
    return model


@EACH_TARGET
def test_one_alpha_is_shared_by_all_low_rank_modules(target: str, tmp_path: Path) -> None:
    """diffusers gives attention layers the commonest alpha, whatever theirs is; PEFT's spelling has none."""
    path = out(tmp_path, target)
    report = pk.export(ranked(), path, target, family="sd15")
    require_read(path, target, report, ranked(), "sd15")
    alphas = [tensor for key, tensor in tensors(path).items() if key.endswith("alpha")]
    assert len(alphas) == (len(RANKED) if target in WITH_ALPHA else 0)
    assert all(alpha.shape == () and alpha.dtype == torch.float32 for alpha in alphas)
    assert {alpha.item() for alpha in alphas} == ({4.0} if alphas else set())
    if target in ("kohya", "a1111"):
        diffusers = READERS["diffusers"](path, weights(ranked()), "sd15", 1.0)
        require_equal(diffusers, truths(ranked()))


#: What belongs together, without what may be beside it: the magnitude of DoRA
SETS = (
    {"lora_up.weight", "lora_down.weight", "alpha"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"},
    {"lokr_w1", "lokr_w2", "alpha"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"},
    {"a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"},
    {"oft_blocks", "alpha"},
    {"weight", "on_input"},
    {"diff"},
    {"lora_A.weight", "lora_B.weight"},
)


@EACH_TARGET
def test_every_module_has_a_whole_set_of_tensors(target: str, tmp_path: Path) -> None:
    """A1111 drops a file over a lone tensor, and LyCORIS over a missing alpha."""
    pk.export(of_kinds(MIXED), out(tmp_path, target), target, family="sd15")
    modules: dict[str, set[str]] = {}
    for key in tensors(out(tmp_path, target)):
        module, _, suffix = key.rpartition(".lora_") if target not in WITH_ALPHA else key.partition(".")
        modules.setdefault(module, set()).add(suffix if target in WITH_ALPHA else f"lora_{suffix}")
    assert len(modules) == len(MIXED)
    magnitudes = {"dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight"}
    assert all(own - magnitudes in SETS for own in modules.values()), modules


@pytest.mark.parametrize("target", ["lycoris", "comfyui", "peft"])
def test_two_modules_of_one_name_in_the_file_are_refused(target: str, tmp_path: Path) -> None:
    """Underscores for dots make a.b_c and a_b.c one; dotted names keep them apart."""
    model = wrapped("lora", {"a.b_c": linear(8, 4), "a_b.c": linear(8, 4)})
    if target == "lycoris":
        with pytest.raises(ExportError, match=r"'a\.b_c' and 'a_b\.c'"):
            pk.export(model, out(tmp_path, target), target)
        assert list(tmp_path.iterdir()) == []
    else:
        report = pk.export(model, out(tmp_path, target), target, family="own" if target == "comfyui" else None)
        require_read(out(tmp_path, target), target, report, model, None, "")


LABELS = {
    "sd15": ("sd_v1", "False", "stable-diffusion-v1/lora", "diffusers", "512x512"),
    "sd2": ("sd_v2_v", "True", "stable-diffusion-v2-768-v/lora", "diffusers", "768x768"),
    "sdxl": (
        "sdxl_base_v1-0",
        "False",
        "stable-diffusion-xl-v1-base/lora",
        "https://github.com/Stability-AI/generative-models",
        "1024x1024",
    ),
    "flux": ("flux1", "False", "flux-1-dev/lora", "https://github.com/black-forest-labs/flux", "1024x1024"),
}


@pytest.mark.parametrize("target", ["a1111", "forge", "comfyui", "kohya", "diffusers"])
@pytest.mark.parametrize("family", LABELS)
def test_the_header_says_which_model_the_file_is_for(family: str, target: str, tmp_path: Path) -> None:
    """Without it A1111 files any adapter under SD1, and hides it from the others."""
    if not readable(family, "transformer" if family == "flux" else "unet", target):
        return
    component = "transformer" if family == "flux" else "unet"
    model = of_part(family, component, "lora", target)
    path = tmp_path / "style.safetensors"
    pk.export(model, path, target, family=family, title="A style")
    entries = metadata(path)
    version, v2, architecture, implementation, resolution = LABELS[family]
    assert entries["ss_base_model_version"] == version
    assert entries["ss_v2"] == v2
    assert entries["modelspec.sai_model_spec"] == "1.0.1"
    assert entries["modelspec.architecture"] == architecture
    assert entries["modelspec.implementation"] == implementation
    assert entries["modelspec.title"] == "A style"
    assert entries["modelspec.resolution"] == resolution


@pytest.mark.parametrize("target", WEBUI)
def test_the_header_says_what_the_network_is(target: str, tmp_path: Path) -> None:
    pk.export(ranked(), tmp_path / "style.safetensors", target, family="sd15")
    entries = metadata(tmp_path / "style.safetensors")
    assert entries["ss_network_module"] == "networks.lora"
    assert (entries["ss_network_dim"], entries["ss_network_alpha"]) == ("4", "4")
    assert entries["ss_output_name"] == entries["modelspec.title"] == "style"
    pk.export(model_of("full", "linear"), tmp_path / "full.safetensors", target, family="sd15")
    module = "networks.lora" if target == "kohya" else "lycoris.kohya"
    assert metadata(tmp_path / "full.safetensors")["ss_network_module"] == module


def big() -> nn.Module:
    """An adapter of more than a MiB, with tensors of two dtypes when it is exported to fp16."""
    torch.manual_seed(0)
    model = tree({ALL_LAYERS["linear"].path: nn.Linear(900, 1100)})
    pk.wrap(model, "lora", rank=300)
    train(model, size=0.01)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", ["a1111", "lycoris", "diffusers"])
def test_the_hashes_are_those_a_webui_computes(target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """sha256 after the header; and sd-scripts' older one, of 64 KiB at 1 MiB of a file with only its own entries."""
    path = tmp_path / "adapter.safetensors"
    pk.export(big(), path, target, family="sd15", dtype=dtype, training={"ss_steps": "10", "modelspec.author": "me"})
    content, entries = path.read_bytes(), metadata(path)
    assert len(content) > (1 << 20) + (1 << 16)
    start = 8 + int.from_bytes(content[:8], "little")
    assert content[8:10] == b'{"'
    assert entries["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    own = {key: value for key, value in entries.items() if key.startswith("ss_")}
    kohya = save_bytes(load_file(path), own)
    assert entries["sshs_legacy_hash"] == hashlib.sha256(kohya[1 << 20 : (1 << 20) + (1 << 16)]).hexdigest()[:8]


def test_the_hash_of_a_small_file_is_kohyas_of_nothing(tmp_path: Path) -> None:
    pk.export(ranked(), tmp_path / "small.safetensors", "kohya", family="sd15")
    assert metadata(tmp_path / "small.safetensors")["sshs_legacy_hash"] == "e3b0c442"


_EXPORT_ALL = """
import hashlib, sys
from pathlib import Path
import peftkit as pk
from tests.support.cells import MIXED, TARGETS, of_kinds, out
for target in TARGETS:
    path = out(Path(sys.argv[1]), target)
    pk.export(of_kinds(MIXED), path, target, family="sd15", training={"ss_epoch": 3, "ss_tag_frequency": {"a": {}}})
    for file in sorted([path] if path.is_file() else path.iterdir()):
        print(target, file.name, hashlib.sha256(file.read_bytes()).hexdigest())
"""


@pytest.mark.processes
def test_the_same_export_gives_the_same_bytes_in_another_process(tmp_path: Path, capsys: Any) -> None:
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    environment = {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _EXPORT_ALL, str(tmp_path / "there")]
    there = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240
    ).stdout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["", str(tmp_path / "here")])
        exec(_EXPORT_ALL, {})
    assert capsys.readouterr().out == there
    assert len(there.splitlines()) == len(TARGETS) + 1


def test_entries_of_the_user_are_kept(tmp_path: Path) -> None:
    training = {
        "ss_learning_rate": 1e-4,
        "ss_training_started_at": 1700000000.5,
        "ss_tag_frequency": {"10_cat": {"cat": 3, "größe": 1}},
        "ss_dataset_dirs": '{"10_cat": {"n_repeats": 10, "img_count": 5}}',
        "ss_network_dim": "16",
        "modelspec.author": "somebody",
        "modelspec.date": "2026-01-01",
    }
    pk.export(ranked(), tmp_path / "adapter.safetensors", "kohya", family="sd15", training=training)
    entries = metadata(tmp_path / "adapter.safetensors")
    assert all(isinstance(value, str) for value in entries.values())
    assert float(entries["ss_learning_rate"]) == 1e-4
    assert float(entries["ss_training_started_at"]) == 1700000000.5
    assert json.loads(entries["ss_tag_frequency"]) == training["ss_tag_frequency"]
    for key in ("ss_dataset_dirs", "ss_network_dim", "modelspec.author", "modelspec.date"):
        assert entries[key] == training[key]


@pytest.mark.parametrize(
    "entry, value",
    [
        ("ss_training_started_at", "soon"),
        ("ss_training_started_at", "nan"),
        ("ss_training_finished_at", [1]),
        ("ss_dataset_dirs", "10_cat"),
        ("ss_bucket_info", "{"),
        ("ss_tag_frequency", "{'a': 1}"),
        ("ss_network_args", "factor=8"),
        ("sshs_model_hash", "0" * 64),
        ("sshs_legacy_hash", "00000000"),
        ("ss_tag_frequency", {"a": {1, 2}}),
        ("lora_adapter_metadata", "{}"),
        ("peftkit", "{}"),
    ],
)
def test_entries_that_a_program_would_fail_on_are_refused(entry: str, value: Any, tmp_path: Path) -> None:
    """diffusers raises on its own entry beside alpha tensors, and this library reads its own as another format."""
    with pytest.raises(OptionError, match=entry):
        pk.export(ranked(), tmp_path / "a.safetensors", "kohya", family="sd15", training={entry: value})
    assert list(tmp_path.iterdir()) == []


ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8}


@EACH_TARGET
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_narrow_dtype_costs_its_rounding(adapter: str, dtype: torch.dtype, target: str, tmp_path: Path) -> None:
    """Two factors are off by u each, so their product by (2u + u²)·|B|·|A|; the change by u; alphas by nothing."""
    model = model_of(adapter, "linear", "conv 3×3")
    path = out(tmp_path, target)
    pk.export(model, path, target, family="sd15", dtype=dtype)
    held = tensors(path)
    assert {tensor.dtype for key, tensor in held.items() if "alpha" not in key} == {dtype}
    assert {tensor.dtype for key, tensor in held.items() if "alpha" in key} <= {torch.float32}
    read = READERS[target](path, weights(model), "sd15", 1.0)
    assert read.ignored == []
    u = ROUNDING[dtype]
    for name, (delta, _) in truths(model).items():
        size = delta
        if adapter == "lora":
            own = model.get_submodule(name.removeprefix("unet.")).adapters["default"]
            size = (1.5 / 3 * own.up.detach().double().abs() @ own.down.detach().double().abs()).reshape(delta.shape)
        factor = 2 * u + u * u if adapter == "lora" or target in ("kohya", "diffusers", "peft") else u
        assert (read.deltas[name] - delta).norm() <= (factor + 1e-6) * size.norm(), name


def scaled(adapter: str, by: float) -> nn.Module:
    model = copy.deepcopy(model_of(adapter, "linear"))
    with torch.no_grad():
        for parameter in pk.adapter_parameters(model):
            parameter.mul_(by)
    return model


@EACH_TARGET
@pytest.mark.parametrize("adapter", ["lora", "full", "lokr"])
def test_what_a_dtype_cannot_hold_is_refused(adapter: str, target: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"not finite as torch\.float16"):
        pk.export(scaled(adapter, 1e12), out(tmp_path, target), target, family="sd15", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@EACH_TARGET
def test_what_vanishes_in_a_dtype_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="zero"):
        pk.export(scaled("full", 1e-20), out(tmp_path, target), target, family="sd15", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "adapter, target", [*((adapter, "comfyui") for adapter in ADAPTERS), *(("lora", target) for target in TARGETS)]
)
def test_an_adapter_that_does_nothing_is_refused_and_what_was_there_stays(
    adapter: str, target: str, tmp_path: Path
) -> None:
    layer = next(layer for layer in LAYERS if exists(adapter, layer))
    model, case, path = tree({LAYERS[layer].path: LAYERS[layer].make()}), ADAPTERS[adapter], out(tmp_path, target)
    pk.wrap(model, case.kind, **case.options)
    with pytest.raises(FileError):
        pk.export(model, path, target, family="sd15")
    assert list(tmp_path.iterdir()) == []
    if target == "peft":
        path.mkdir()
    existing = path / "notes.txt" if target == "peft" else path
    existing.write_bytes(b"what was there")
    with pytest.raises(FileError):
        pk.export(model, path, target, family="sd15")
    assert existing.read_bytes() == b"what was there"
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [existing]


@EACH_TARGET
def test_a_parameter_that_is_not_finite_is_refused(target: str, tmp_path: Path) -> None:
    with pytest.raises(PeftkitError):
        pk.export(scaled("lora", float("nan")), out(tmp_path, target), target, family="sd15")
    assert list(tmp_path.iterdir()) == []


@EACH_TARGET
def test_a_file_that_is_there_is_replaced_only_by_a_whole_one(target: str, tmp_path: Path) -> None:
    """A folder with anything in it is not: it may hold more than the adapter."""
    path = out(tmp_path, target)
    pk.export(model_of("lora", "linear"), path, target, family="sd15")
    before = tensors(path)
    if target == "peft":
        with pytest.raises(FileError, match="already"):
            pk.export(model_of("full", "linear"), path, target, family="sd15")
        assert tensors(path).keys() == before.keys()
    else:
        pk.export(model_of("full", "linear"), path, target, family="sd15")
        assert {tensor.shape for tensor in tensors(path).values()} != {tensor.shape for tensor in before.values()}
    assert len(list(tmp_path.iterdir())) == 1


def test_options_that_mean_nothing_are_refused(tmp_path: Path) -> None:
    model, path = model_of("lora", "linear"), tmp_path / "adapter.safetensors"
    with pytest.raises(OptionError, match="a1111"):
        pk.export(model, path, "a111")
    with pytest.raises(OptionError, match="sd15"):
        pk.export(model, path, "a1111", family="sd1")
    with pytest.raises(OptionError, match="safetensors"):
        pk.export(model, tmp_path / "adapter.pt", "a1111", family="sd15")
    with pytest.raises(OptionError, match="dtype"):
        pk.export(model, path, "a1111", family="sd15", dtype=torch.int8)
    with pytest.raises(ExportError, match=r"ff\.net\.2"):
        pk.export(model, path, "a1111", family="flux")
    assert list(tmp_path.iterdir()) == []


def test_of_several_adapters_the_named_one_goes_out(tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("lora", "linear"))
    pk.wrap(model, "full", name="second")
    train(model, seed=4, name="second")
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(UnknownAdapterError, match="second"):
        pk.export(model, path, "a1111", family="sd15")
    pk.export(model, path, "a1111", family="sd15", name="second")
    require_equal(READERS["a1111"](path, weights(model), "sd15", 1.0), truths(model, name="second"))


@EACH_TARGET
@pytest.mark.parametrize("adapter", ["lora", "dora", "glora", "ia3"])
def test_a_merged_model_exports_the_same_bytes(adapter: str, target: str, tmp_path: Path) -> None:
    model = copy.deepcopy(model_of(adapter, "linear"))
    pk.export(model, out(tmp_path, target, "before"), target, family="sd15", title="t")
    pk.merge(model)
    pk.export(model, out(tmp_path, target, "after"), target, family="sd15", title="t")
    before, after = tensors(out(tmp_path, target, "before")), tensors(out(tmp_path, target, "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@EACH_TARGET
def test_the_report_is_of_the_file(target: str, tmp_path: Path) -> None:
    model = of_kinds(MIXED)
    report = pk.export(model, out(tmp_path, target), target, family="sd15")
    held = tensors(out(tmp_path, target))
    assert sum(w.bytes for w in report.weights) == sum(tensor.nbytes for tensor in held.values())
    assert all(any(key.startswith(f"{w.written}.") for key in held) for w in report.weights)
    assert report.exact == all(w.how != "baked" for w in report.weights)
    assert f"{len(MIXED)} weights" in str(report)
    assert report.table().row_count == len(MIXED)
    assert sum(w.own for w in report.weights) == sum(p.nbytes for p in pk.adapter_parameters(model))
    errors = [w.error for w in report.weights]
    assert all(error is not None and error < 1e-5 for error in errors)
