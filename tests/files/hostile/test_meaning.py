"""No verb drops or changes in silence what a file means, and no report calls sound what is not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import peftkit as pk
from peftkit.errors import FileError, PeftkitError, WrongBaseError
from peftkit.files.formats import container
from tests.support import corpus
from tests.support.bounds import put
from tests.support.corpus import GOOD, LORA, Entry, ones, pair, safetensors
from tests.support.zoo import train


def _saved(at: Path, kind: str, model: nn.Module | None = None, **options: Any) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of `Pair` in this library's format, and its ΔW."""
    model = pair() if model is None else model
    portable, targets = options.pop("portable", False), options.pop("targets", ["a"])
    before = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    pk.wrap(model, kind, targets=targets, **options)
    train(model, seed=options.get("rank", 3))
    pk.save(model, at, portable=portable)
    pk.merge(model)
    after = {name: t.detach() for name, t in model.state_dict().items() if name in before}
    return at, {name: after[name] - before[name] for name in before}


def test_files_bound_to_their_base_are_not_compared_without_it(tmp_path: Path) -> None:
    """LoLDU without its factors says nothing of ΔW; two of them once were 'equal'."""
    one, _ = _saved(tmp_path / "one.safetensors", "loldu", rank=4)
    two, _ = _saved(tmp_path / "two.safetensors", "loldu", rank=3)
    for verb in (lambda: pk.diff(one, two), lambda: pk.convert(one, tmp_path / "x.safetensors", "lora")):
        with pytest.raises(PeftkitError, match="base"):
            verb()


@pytest.mark.parametrize("verb", ["convert", "export", "diff", "combine", "resize"])
def test_another_base_than_a_file_was_trained_on_is_refused_wherever_it_decides_the_numbers(
    verb: str, tmp_path: Path
) -> None:
    path, _ = _saved(tmp_path / "bound.safetensors", "loldu", rank=4)
    twin = shutil.copy(path, tmp_path / "twin.safetensors")
    torch.manual_seed(7)
    other, out = corpus.Pair(), tmp_path / "out.safetensors"
    base = tmp_path / "other.safetensors"
    base.write_bytes(corpus.model_file(other))
    verbs: dict[str, Callable[[], Any]] = {
        "convert": lambda: pk.convert(path, out, "lora", base=other),
        "export": lambda: pk.export(path, out, "lycoris", base=base),
        "diff": lambda: pk.diff(path, twin, base=base),
        "combine": lambda: pk.combine({path: 1.0, twin: 1.0}, out, base=base),
        "resize": lambda: pk.resize(path, out, rank=1, base=base),
    }
    with pytest.raises(WrongBaseError, match=path.name):
        verbs[verb]()


@pytest.mark.parametrize("verb", ["convert", "resize", "combine"])
def test_an_adapter_of_a_transposed_convolution_stays_one_or_is_refused(verb: str, tmp_path: Path) -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.ConvTranspose2d(8, 8, 3)

    torch.manual_seed(0)
    model, base, out = Up(), tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    base.write_bytes(corpus.model_file(model))
    path, truth = _saved(tmp_path / "up.safetensors", "lora", model, rank=2, targets=["t"])
    twin = shutil.copy(path, tmp_path / "twin.safetensors")
    verbs: dict[str, Callable[[], Any]] = {
        "convert": lambda: pk.convert(path, out, "lora"),
        "resize": lambda: pk.resize(path, out, rank=2),
        "combine": lambda: pk.combine({path: 0.5, twin: 0.5}, out),
    }
    refusal = ""
    try:
        verbs[verb]()
    except PeftkitError as error:
        refusal = str(error)
    if refusal:
        assert "transposed" in refusal
        return
    pk.merge_checkpoint(base, {out: 1.0}, tmp_path / "merged.safetensors")
    moved = load_file(tmp_path / "merged.safetensors")["t.weight"] - load_file(base)["t.weight"]
    assert torch.allclose(moved, truth["t.weight"], atol=1e-5)


def test_layers_that_a_file_fuses_do_not_share_their_factors(tmp_path: Path) -> None:
    """One `lora_down` for q, k and v; trained on, each has its own."""
    model = nn.Module()
    block = nn.Module()
    block.attn = nn.Module()
    for name in ("to_q", "to_k", "to_v"):
        block.attn.add_module(name, nn.Linear(1536, 1536, bias=False))
    model.transformer_blocks = nn.ModuleList([block])
    path, fused = tmp_path / "fused.safetensors", "lora_unet_joint_blocks_0_x_block_attn_qkv"
    path.write_bytes(
        safetensors({f"{fused}.lora_up.weight": ones(4608, 1), f"{fused}.lora_down.weight": ones(1, 1536)})
    )
    pk.load(model, path)
    memory = [parameter.data_ptr() for parameter in pk.adapter_parameters(model)]
    assert len(memory) == 6
    assert len(set(memory)) == 6, "two adapters train the same memory"


@pytest.mark.parametrize(
    "more",
    [
        {"a.lora_B.weight": ones(12, 2, by=5.0), "a.lora_A.weight": ones(2, 8)},
        {"base_model.model.a.alpha": torch.tensor(7.0)},
        {"base_model.model.a.diff_b": ones(12)},
        {"base_model.model.a.w_norm": ones(12)},
    ],
    ids=["a module twice", "an alpha", "a change of a bias", "a change of a norm"],
)
def test_no_tensor_of_a_folder_of_peft_is_dropped_in_silence(more: dict[str, Entry], tmp_path: Path) -> None:
    pair = {f"base_model.model.a.lora_{x}.weight": ones(*s) for x, s in (("B", (12, 2)), ("A", (2, 8)))}
    path = put(tmp_path / "hostile", corpus.peft(tensors={**pair, **more}))
    with pytest.raises(FileError, match="hostile"):
        dict(pk.read(path).patches)


@pytest.mark.parametrize(
    "config", [{"r": 7}, {"r": -1}, {"rank_pattern": {"a": 9}}, {"use_dora": True}, {"use_rslora": "no"}]
)
def test_a_configuration_of_peft_that_contradicts_its_tensors_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    """PEFT itself cannot load such a folder; the scale would be a guess."""
    path = put(tmp_path / "hostile", corpus.peft(**config))
    with pytest.raises(FileError, match="hostile"):
        dict(pk.read(path).patches)


@pytest.mark.parametrize(
    "content",
    [
        corpus.NATIVE["DoRA with too few magnitudes"],
        corpus.NATIVE["oft with {'block_size': 0}"],
        corpus.NATIVE["loldu with {'rank': 2, 'epsilon': -1}"],
        corpus.NATIVE["LoLDU with an order of floats"],
        corpus.NATIVE["fingerprints of NaN"],
        corpus.NATIVE["a weight in two groups"],
        corpus.KOHYA["PEFT's magnitudes of another size"],
        corpus.KOHYA["OFT with too few factors"],
        corpus.KOHYA["OFT of other blocks than squares"],
        corpus.KOHYA["magnitudes around OFT"],
        corpus.KOHYA["GLoRA in no layout"],
        corpus.KOHYA["LoKr of nothing"],
        corpus.KOHYA["no columns"],
        corpus.KOHYA["a gate of nothing"],
        corpus.KOHYA["a change of a bias of NaN"],
    ],
    ids=range(15),
)
def test_the_doctor_does_not_call_sound_what_cannot_be_loaded_anywhere(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    assert pk.doctor(path).code == 2


@pytest.mark.parametrize("size", [1e22, 1e-26])
def test_a_change_is_not_called_dead_for_its_size(size: float, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    down = torch.zeros(2, 8)
    down[0, 0] = 1.0
    path.write_bytes(safetensors({"a.lora_up.weight": ones(12, 2, by=size), "a.lora_down.weight": down}))
    (module,) = pk.inspect(path).modules
    assert module.problem == ""
    assert module.norm == pytest.approx(size * 12**0.5, rel=1e-5)


def test_an_extracted_projection_goes_back_where_it_came_from(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.MultiheadAttention(8, 2)

    torch.manual_seed(0)
    model, files = Attention(), [tmp_path / f"{name}.safetensors" for name in ("base", "tuned", "found", "back")]
    files[0].write_bytes(corpus.model_file(model))
    with torch.no_grad():
        model.m.in_proj_weight.add_(torch.randn(24, 1) @ torch.randn(1, 8))
    files[1].write_bytes(corpus.model_file(model))
    pk.extract(files[1], files[0], files[2], "full")
    pk.merge_checkpoint(files[0], {files[2]: 1.0}, files[3])
    assert torch.allclose(load_file(files[3])["m.in_proj_weight"], model.m.in_proj_weight.detach(), atol=1e-6)


def test_a_combined_file_names_all_its_modules_in_one_way(tmp_path: Path) -> None:
    """A module only the second file has does not keep the second file's spelling."""
    kohya, diffusers, out = (tmp_path / f"{name}.safetensors" for name in ("kohya", "diffusers", "out"))
    one, two = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.1.proj_in"
    shapes = {"up": (320, 1, 1, 1), "down": (1, 320, 1, 1)}
    spelled = {"up": "lora_B", "down": "lora_A"}
    kohya.write_bytes(
        safetensors({f"lora_unet_{one.replace('.', '_')}.lora_{x}.weight": ones(*s) for x, s in shapes.items()})
    )
    diffusers.write_bytes(safetensors({f"unet.{two}.{spelled[x]}.weight": ones(*s) for x, s in shapes.items()}))
    pk.combine({kohya: 1.0, diffusers: 1.0}, out)
    assert {key.partition(".")[0] for key in container.read(out).infos} == {
        f"lora_unet_{path.replace('.', '_')}" for path in (one, two)
    }


def test_a_rescaled_file_keeps_no_hash_of_what_it_was(tmp_path: Path) -> None:
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    stale = {"modelspec.hash_sha256": "0x0", "sshs_model_hash": "0", "sshs_legacy_hash": "0"}
    path.write_bytes(safetensors(LORA, {**stale, "ss_output_name": "x"}))
    pk.rescale(path, 0.5, out)
    assert dict(pk.read(out).metadata) == {"ss_output_name": "x"}


@pytest.mark.parametrize("verb", ["convert", "resize", "rescale", "combine", "diff", "export", "doctor"])
def test_every_remedy_that_an_error_names_can_be_taken(verb: str, tmp_path: Path) -> None:
    """A file with α = 0 asks for alpha_zero=; whoever says so must take it."""
    path, good, out = (tmp_path / f"{name}.safetensors" for name in ("zero", "good", "out"))
    path.write_bytes(safetensors({**LORA, "a.alpha": torch.tensor(0.0)}))
    good.write_bytes(GOOD)
    verbs: dict[str, Callable[..., Any]] = {
        "convert": lambda **k: pk.convert(path, out, "lora", **k),
        "resize": lambda **k: pk.resize(path, out, rank=1, **k),
        "rescale": lambda **k: pk.rescale(path, 0.5, out, **k),
        "combine": lambda **k: pk.combine({good: 1.0, path: 1.0}, out, **k),
        "diff": lambda **k: pk.diff(good, path, **k),
        "export": lambda **k: pk.export(path, out, "lycoris", **k),
        "doctor": lambda **k: pk.doctor(path, **k),
    }
    try:
        said = verbs[verb]()
    except PeftkitError as error:
        said = error
    if "alpha_zero=" in str(said):
        verbs[verb](alpha_zero="rank")
