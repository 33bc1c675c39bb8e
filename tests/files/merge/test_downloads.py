"""Bases as repositories have them: variants, shards of variants, and copies of the weights in other forms."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import peftkit as pk
from peftkit.errors import FileError
from peftkit.files.base import open_base
from tests.support.files import State, listing, load, load_folder, require_bits, write
from tests.support.hands import full

KEYS = ("first.weight", "second.weight")


def tensors(value: float, dtype: torch.dtype = torch.float32) -> State:
    return {key: torch.full((12, 8), value, dtype=dtype) for key in KEYS}


def adapter(path: Path, *modules: str) -> Path:
    return write(path, {k: t for m in modules or ("first",) for k, t in full(12, 8).keyed(m).items()})


def sharded(folder: Path, values: State, index: str, shard: str) -> None:
    """One file a tensor, called as `shard` says of its number, and their index."""
    files = {key: shard.format(i + 1, len(values)) for i, key in enumerate(values)}
    for key, file in files.items():
        write(folder / file, {key: values[key]})
    total = sum(t.nbytes for t in values.values())
    (folder / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))


def merged(base: Path, out: Path, **options: Any) -> pk.MergeReport:
    return pk.merge_checkpoint(base, {adapter(base.parent / "a.safetensors"): 1.0}, out, **options)


def expected(values: State) -> State:
    change: Tensor = full(12, 8).tensors["diff"]
    return values | {KEYS[0]: values[KEYS[0]] + change.to(values[KEYS[0]].dtype)}


# -- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_the_plain_variant_is_merged_into_unless_another_is_asked_for(stem: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / f"{stem}.safetensors", tensors(1.0))
    write(base / f"{stem}.fp16.safetensors", tensors(2.0, torch.float16))
    report = merged(base, tmp_path / "plain")
    assert report.left_out == (f"{stem}.fp16.safetensors",)
    assert listing(tmp_path / "plain").keys() == {f"{stem}.safetensors"}
    require_bits(load_folder(tmp_path / "plain"), expected(tensors(1.0)))
    report = merged(base, tmp_path / "half", variant="fp16")
    assert report.left_out == (f"{stem}.safetensors",)
    assert listing(tmp_path / "half").keys() == {f"{stem}.fp16.safetensors"}
    require_bits(load_folder(tmp_path / "half"), expected(tensors(2.0, torch.float16)))


INDICES = {
    "as diffusers writes them": ("m.safetensors.index.fp16.json", "m.fp16-{:05}-of-{:05}.safetensors"),
    "as diffusers wrote them": ("m.safetensors.fp16.index.json", "m-{:05}-of-{:05}.fp16.safetensors"),
}


@pytest.mark.parametrize("form", INDICES)
@pytest.mark.parametrize("plain", ["whole", "sharded", "none"])
def test_shards_of_a_variant_are_found_by_its_index(plain: str, form: str, tmp_path: Path) -> None:
    base, (index, shard) = tmp_path / "base", INDICES[form]
    sharded(base, tensors(2.0, torch.float16), index, shard)
    if plain == "sharded":
        sharded(base, tensors(1.0), "m.safetensors.index.json", "m-{:05}-of-{:05}.safetensors")
    elif plain == "whole":
        write(base / "m.safetensors", tensors(1.0))
    options: list[dict[str, Any]] = [{"variant": "fp16"}, *([{}] if plain == "none" else [])]
    for i, given in enumerate(options):
        merged(base, tmp_path / f"out{i}", **given)
        require_bits(load_folder(tmp_path / f"out{i}"), expected(tensors(2.0, torch.float16)))
        held = {index, *(shard.format(i, 2) for i in (1, 2))}
        assert listing(tmp_path / f"out{i}").keys() == held
    assert open_base(base / index).where == open_base(base, variant="fp16").where
    if plain != "none":
        merged(base, tmp_path / "plain")
        require_bits(load_folder(tmp_path / "plain"), expected(tensors(1.0)))


def test_a_pipeline_takes_a_variant_where_it_has_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    (base / "unet").mkdir(parents=True)
    (base / "model_index.json").write_text("{}")
    write(base / "unet" / "diffusion_pytorch_model.safetensors", tensors(1.0))
    write(base / "unet" / "diffusion_pytorch_model.fp16.safetensors", tensors(2.0, torch.float16))
    write(base / "vae" / "diffusion_pytorch_model.safetensors", {"decoder.weight": torch.ones(3)})
    write(base / "whole.safetensors", tensors(5.0))
    report = merged(base, tmp_path / "out", variant="fp16")
    assert listing(tmp_path / "out").keys() == {
        "model_index.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    assert set(report.left_out) == {"whole.safetensors", "unet/diffusion_pytorch_model.safetensors"}
    require_bits(
        load(tmp_path / "out/unet/diffusion_pytorch_model.fp16.safetensors"), expected(tensors(2.0, torch.float16))
    )


def test_what_asks_for_a_variant_names_one_that_works(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "model.fp16.safetensors", tensors(2.0))
    write(base / "model.bf16.safetensors", tensors(3.0))
    with pytest.raises(FileError, match="in 2 variants, and none without one") as caught:
        merged(base, tmp_path / "out")
    options = re.findall(r"variant='(\w+)'", str(caught.value))
    assert options == ["bf16", "fp16"]
    for option in options:
        merged(base, tmp_path / option, variant=option)
    with pytest.raises(FileError, match=r"it has bf16, fp16\. Did you mean 'fp16'"):
        merged(base, tmp_path / "out", variant="fp61")
    plain = write(tmp_path / "plain" / "model.safetensors", tensors(1.0)).parent
    with pytest.raises(FileError, match="none but the plain one"):
        merged(plain, tmp_path / "out", variant="fp32")


def test_diffusers_writes_and_reads_what_is_merged_in_a_variant(tmp_path: Path) -> None:
    from diffusers import UNet2DModel  # type: ignore[attr-defined]

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    base = tmp_path / "base"
    cast(Any, unet).save_pretrained(base, variant="fp16", max_shard_size="100KB")
    name = "down_blocks.0.resnets.0.time_emb_proj"
    shape = cast(Tensor, unet.state_dict()[f"{name}.weight"]).shape
    file = write(tmp_path / "a.safetensors", full(*shape).keyed(name))
    assert len(list(base.glob("*.safetensors"))) > 1
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out", variant="fp16")
    back = cast(Any, UNet2DModel).from_pretrained(tmp_path / "out", variant="fp16")
    change = full(*shape).tensors["diff"]
    assert torch.equal(back.state_dict()[f"{name}.weight"], unet.state_dict()[f"{name}.weight"] + change)


def test_a_difference_is_taken_in_a_variant(tmp_path: Path) -> None:
    for name, value in (("base", 1.0), ("tuned", 2.0)):
        write(tmp_path / name / "model.safetensors", tensors(value))
        write(tmp_path / name / "model.fp16.safetensors", tensors(value * value))
    norms = {
        variant: pk.extract(
            tmp_path / "tuned", tmp_path / "base", tmp_path / "out.safetensors", "full", variant=variant
        )
        for variant in (None, "fp16")
    }
    assert [round(norms[v].weights[0].norm ** 2) for v in norms] == [96 * 1, 96 * 9]


# -- copies -----------------------------------------------------------------------------------------------------------

#: what repositories have beside a model's weights -> whether it is of those weights
BESIDE = {
    "config.json": False,
    "tokenizer.model": False,
    "tokenizer.json": False,
    "training_args.bin": False,
    "optimizer.pt": False,
    "speech.onnx": False,
    "2_Dense/model.safetensors": False,
    "2_Dense/pytorch_model.bin": False,
    "original/params.json": False,
    "model.fp16.safetensors": True,
    "model.safetensors.index.json": True,
    "pytorch_model.bin": True,
    "pytorch_model-00001-of-00002.bin": True,
    "pytorch_model.bin.index.json": True,
    "consolidated.safetensors": True,
    "consolidated.00.pth": True,
    "original/consolidated.00.pth": True,
    "onnx/model.onnx": True,
    "onnx/decoder.onnx_data": True,
    "model.onnx": True,
    "model-Q4_K_M.gguf": True,
    "gguf/model.gguf": True,
    "tf_model.h5": True,
    "flax_model.msgpack": True,
    "rust_model.ot": True,
    "openvino_model.xml": True,
    "openvino_model.bin": True,
    "model.ckpt": True,
    "adapter_model.safetensors": True,
    "adapter_config.json": True,
    "checkpoint-500/pytorch_model.bin": True,
}


@pytest.mark.parametrize("home", ["", "unet"])
def test_copies_of_the_weights_are_left_out_and_named(home: str, tmp_path: Path) -> None:
    base = tmp_path / "base" / home
    write(base / "model.safetensors", tensors(1.0))
    for name in BESIDE:
        if name != "model.safetensors.index.json":
            (base / name).parent.mkdir(exist_ok=True)
            (base / name).write_text("{}")
    copies = {name for name, is_copy in BESIDE.items() if is_copy and (base / name).exists()}
    kept = {name for name in BESIDE if (base / name).exists()} - copies | {"model.safetensors"}
    if home:
        (tmp_path / "base" / "model_index.json").write_text("{}")
    named = {f"{home}/{name}" if home else name for name in copies}
    file = adapter(tmp_path / "a.safetensors")
    plan = pk.plan_merge(tmp_path / "base", {file: 1.0})
    assert set(plan.base.copies) == named and all(name in str(plan) for name in named)
    report = merged(tmp_path / "base", tmp_path / "out")
    assert set(report.left_out) == named
    assert listing(tmp_path / "out" / home).keys() - {"model_index.json"} == kept


def test_a_component_that_is_not_read_keeps_its_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "unet" / "diffusion_pytorch_model.safetensors", tensors(1.0))
    for name in (
        "model_index.json",
        "safety_checker/pytorch_model.bin",
        ".git/lfs/objects/1",
        ".cache/x/model.safetensors",
    ):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    report = merged(base, tmp_path / "out")
    assert report.left_out == (".cache/", ".git/")
    assert listing(tmp_path / "out").keys() == {
        "model_index.json",
        "safety_checker/pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
    }


def test_a_folder_is_not_merged_over_itself_where_copies_would_be_lost(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "model.safetensors", tensors(1.0))
    (base / "pytorch_model.bin").write_bytes(b"a copy")
    before = listing(base)
    with pytest.raises(FileError, match=r"holds pytorch_model\.bin, which would be lost: name a new folder"):
        merged(base, base, overwrite=True)
    assert listing(base) == before
    merged(base, tmp_path / "new")


def test_a_pickle_among_the_components_is_written_as_its_library_looks_for_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write(base / "unet" / "diffusion_pytorch_model.safetensors", tensors(1.0))
    (base / "model_index.json").write_text("{}")
    (base / "text_encoder").mkdir()
    torch.save(tensors(2.0), base / "text_encoder" / "pytorch_model.bin")
    file = adapter(tmp_path / "a.safetensors", "text_encoder.first")
    pk.merge_checkpoint(base, {file: 1.0}, tmp_path / "out", allow_pickle=True)
    require_bits(load(tmp_path / "out" / "text_encoder" / "model.safetensors"), expected(tensors(2.0)))
    assert not (tmp_path / "out" / "text_encoder" / "pytorch_model.bin").exists()


# -- what is no checkpoint here ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF" + bytes(100), "GGUF file.*merge into the safetensors checkpoint that it was made from"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"oid" * 20, "pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>" + bytes(100), "web page.*download the file again"),
    ],
)
@pytest.mark.parametrize("name", ["base.safetensors", "base.gguf"])
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=message):
        merged(tmp_path / name, tmp_path / "out.safetensors")
    source = write(tmp_path / "source.safetensors", tensors(1.0))  # what the message says
    merged(source, tmp_path / "out.safetensors")


def test_a_folder_of_another_format_says_which(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "model.Q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(FileError, match=r"only model\.Q4\.gguf of llama\.cpp"):
        merged(base, tmp_path / "out")
    torch.save(tensors(1.0), base / "pytorch_model.bin")
    (base / "model.Q4.gguf").unlink()
    with pytest.raises(FileError, match="allow_pickle=True reads"):
        merged(base, tmp_path / "out")
    merged(base, tmp_path / "out", allow_pickle=True)
    assert listing(tmp_path / "out").keys() == {"model.safetensors"}


def test_shards_without_their_index_are_not_taken_for_models(tmp_path: Path) -> None:
    base = tmp_path / "base"
    sharded(base, tensors(1.0), "model.safetensors.index.json", "model-{:05}-of-{:05}.safetensors")
    index = (base / "model.safetensors.index.json").read_text()
    (base / "model.safetensors.index.json").unlink()
    with pytest.raises(FileError, match=r"2 shards .* no index of them: download the file that ends with"):
        merged(base, tmp_path / "out")
    (base / "model.safetensors.index.json").write_text(index)
    merged(base, tmp_path / "out")


def test_two_models_in_a_folder_ask_for_one(tmp_path: Path) -> None:
    base = tmp_path / "base"
    for name in ("one", "two"):
        write(base / f"{name}.safetensors", tensors(1.0))
    with pytest.raises(FileError, match=r"2 models and no index .*name one file"):
        merged(base, tmp_path / "out")
    merged(base / "two.safetensors", tmp_path / "out.safetensors")


def test_a_variant_of_a_single_file_is_that_of_its_name(tmp_path: Path) -> None:
    lone, half = tmp_path / "model.safetensors", tmp_path / "diffusion_pytorch_model.fp16.safetensors"
    for path in (lone, half):
        save_file({"0.weight": torch.zeros(2, 2)}, path)
    assert open_base(half, variant="fp16").where == open_base(half).where
    with pytest.raises(FileError, match="name its folder, or leave variant= out"):
        open_base(lone, variant="fp16")
