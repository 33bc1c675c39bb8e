"""Checkpoints of every layout: shards, pipeline folders, published files, fused and swapped projections."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders import single_file_utils
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

import peftkit as pk
from peftkit.errors import FileError, MismatchError
from peftkit.files.families.names import FAMILIES, Family
from peftkit.files.formats import container
from tests.support.files import State, listing, load, load_folder, metadata, require_bits, same_bits, sharded, write
from tests.support.hands import HANDS, Hand, exact, full, hand_merge, loha, lokr, lora
from tests.support.merging import FUSED, both_layouts
from tests.support.models import net, state, tree
from tests.support.numbers import close
from tests.support.small_families import FLUX_COLUMNS, diffusers_state, kohya_name, original_state, small_families


def small_text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 96, "projection_dim": 24, "vocab_size": 64}
    return CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


def test_shards_and_their_index_merge_into_a_folder_that_transformers_loads(
    families: dict[str, Family], tmp_path: Path
) -> None:
    model = small_text_encoder()
    before = state(model)
    folder = sharded(tmp_path / "model", before, len(before) // 2)
    model.config.save_pretrained(folder)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    key = next(key for key in before if key.endswith("layers.1.mlp.fc1.weight"))
    hand = lora(96, 24)
    file = write(tmp_path / "a.safetensors", hand.keyed("lora_te_text_model_encoder_layers_1_mlp_fc1"))
    assert families["sd15"].find("lora_te_text_model_encoder_layers_1_mlp_fc1")
    for name, given in (("whole", folder), ("index", folder / "model.safetensors.index.json")):
        out = tmp_path / name
        pk.merge_checkpoint(given, {file: 0.75}, out, verify=True)
        assert listing(out).keys() == listing(folder).keys()
        assert (out / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        expected = hand_merge(before, {key: [(hand, 0.75)]})
        require_bits(load_folder(out), expected)
        loaded = CLIPTextModel.from_pretrained(out)
        require_bits({k: state(loaded)[k] for k in before}, expected)
        assert metadata(out / "model-00001-of-00002.safetensors")["format"] == "pt"


def test_the_index_of_a_folder_says_the_sizes_that_a_new_dtype_gives(tmp_path: Path) -> None:
    before = state(net())
    folder = sharded(tmp_path / "model", before, 6)
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("lycoris_lin"))
    pk.merge_checkpoint(folder, {file: 1.0}, tmp_path / "out", dtype=torch.float16)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_folder(tmp_path / "out").values())


def test_a_folder_of_links_as_the_hub_keeps_it_is_copied_whole(tmp_path: Path) -> None:
    """~/.cache/huggingface/hub/models--…/snapshots/… holds links into blobs/ and nothing else."""
    before = state(net())
    blobs = sharded(tmp_path / "blobs", before, 6)
    (blobs / "config.json").write_text("{}")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for blob in blobs.iterdir():
        (snapshot / blob.name).symlink_to(Path("..") / "blobs" / blob.name)
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("lycoris_lin"))
    pk.merge_checkpoint(snapshot, {file: 1.0}, tmp_path / "out")
    assert listing(tmp_path / "out").keys() == listing(blobs).keys()


def pipeline(folder: Path, unet: nn.Module, text: nn.Module) -> Path:
    unet.save_pretrained(folder / "unet")  # type: ignore[operator]
    text.save_pretrained(folder / "text_encoder")  # type: ignore[operator]
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    return folder


def small_unet() -> UNet2DConditionModel:
    """Of the sizes that the small SD 1.5 has."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
    )


QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
KEY = "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.1.conv2"
SAMPLER = "up_blocks.0.upsamplers.0.conv"
POINT = "mid_block.attentions.0.proj_in"
SHORTCUT = "up_blocks.2.resnets.0.conv_shortcut"
FC1 = "text_model.encoder.layers.1.mlp.fc1"
OUT = "text_model.encoder.layers.0.self_attn.out_proj"


def sd15_hands() -> dict[str, Hand]:
    """By canonical name: every sort of place in a U-Net, and its text encoder's."""
    made: dict[str, Callable[..., Hand]] = {
        f"unet.{QUERY}": lora,
        f"unet.{KEY}": loha,
        f"unet.{CONV}": lokr,
        f"unet.{SAMPLER}": lora,
        f"unet.{POINT}": full,
        f"unet.{SHORTCUT}": lora,
        f"text_encoder.{FC1}": lora,
        f"text_encoder.{OUT}": loha,
    }
    modules = small_families()["sd15"].modules
    return {
        name: hand(modules[name].shape[0], math.prod(modules[name].shape[1:]), seed=seed)
        for seed, (name, hand) in enumerate(made.items())
    }


def kohya_file(path: Path, family: Family, hands: Mapping[str, Hand], te: str = "lora_te_") -> Path:
    tensors: State = {}
    for name, hand in hands.items():
        spelled = kohya_name(family, name)
        tensors |= hand.keyed(spelled.replace("lora_te1_", te) if te else spelled)
    return write(path, tensors)


def test_a_pipeline_folder_and_the_published_file_of_a_model_get_the_same_weights(
    families: dict[str, Family], tmp_path: Path
) -> None:
    """A kohya file on both layouts, against its formulas, and what diffusers converts one into against the other."""
    unet, text = small_unet().half(), small_text_encoder().half()
    folder = pipeline(tmp_path / "pipeline", unet, text)
    theirs = {f"unet.{k}": t for k, t in state(unet).items()}
    for key, tensor in state(text).items():
        level = "" if key.startswith("text_model.") else "text_model."
        theirs[f"text_encoder.{level}{key}"] = tensor
    base = {key: t for key, t in theirs.items() if key.rpartition(".")[2] in ("weight", "bias")}
    published = original_state(families["sd15"], base)
    published["first_stage_model.encoder.conv_in.weight"] = exact(8, 3, 3, 3).half()
    single = write(tmp_path / "single.safetensors", published, {"modelspec.title": "a"})
    hands = sd15_hands()
    file = kohya_file(tmp_path / "lora.safetensors", families["sd15"], hands)
    expected = hand_merge(base, {f"{name}.weight": [(hand, 0.75)] for name, hand in hands.items()})

    report = pk.merge_checkpoint(folder, {file: 0.75}, tmp_path / "out")
    assert len(report.weights) == len(hands)
    out = tmp_path / "out"
    assert listing(out).keys() == listing(folder).keys()
    loaded = UNet2DConditionModel.from_pretrained(out / "unet", torch_dtype=torch.float16)
    require_bits(state(loaded), {k.removeprefix("unet."): t for k, t in expected.items() if k.startswith("unet.")})
    encoder = CLIPTextModel.from_pretrained(out / "text_encoder", dtype=torch.float16)
    for key, tensor in state(encoder).items():
        level = "" if key.startswith("text_model.") else "text_model."
        assert same_bits(tensor, expected[f"text_encoder.{level}{key}"]), key

    pk.merge_checkpoint(single, {file: 0.75}, tmp_path / "single-out.safetensors")
    merged = load(tmp_path / "single-out.safetensors")
    assert list(merged) and merged.keys() == published.keys()
    assert same_bits(
        merged["first_stage_model.encoder.conv_in.weight"], published["first_stage_model.encoder.conv_in.weight"]
    )
    converted = single_file_utils.convert_ldm_unet_checkpoint(merged, dict(unet.config))
    require_bits(converted, {k.removeprefix("unet."): t for k, t in expected.items() if k.startswith("unet.")})
    clip = single_file_utils.convert_ldm_clip_checkpoint(merged)
    require_bits(clip, {k.removeprefix("text_encoder."): t for k, t in expected.items() if k.startswith("text_enc")})


def test_other_spellings_of_the_same_modules_merge_alike(families: dict[str, Family], tmp_path: Path) -> None:
    family, hands = families["sd15"], {f"unet.{QUERY}": lora(64, 64, 4, seed=1), f"unet.{KEY}": lora(64, 24, seed=2)}
    base = diffusers_state(family, torch.float16)
    single = write(tmp_path / "single.safetensors", original_state(family, base))
    outs = []
    for i, style in enumerate(("kohya", "diffusers", "ldm", "lycoris")):
        tensors: State = {}
        for name, hand in hands.items():
            tensors |= hand.keyed(family.spell(name, style))
        file = write(tmp_path / f"{i}.safetensors", tensors)
        pk.merge_checkpoint(single, {file: -0.5}, tmp_path / "out.safetensors")
        outs.append(load(tmp_path / "out.safetensors"))
    expected = original_state(
        family, hand_merge(base, {f"{name}.weight": [(hand, -0.5)] for name, hand in hands.items()})
    )
    for out in outs:
        require_bits(out, expected)


def sd3_converted(merged: State) -> State:
    """The published layout of an SD 3.5 as diffusers itself reads it."""
    checkpoint = {k.removeprefix("model.diffusion_model."): t for k, t in merged.items()}
    checkpoint["pos_embed"] = torch.zeros(1)
    found = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    del found["pos_embed.pos_embed"]
    return found


def flux_converted(merged: State) -> State:
    checkpoint = {k.removeprefix("model.diffusion_model."): t for k, t in merged.items()}
    return single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)


SWAPPED: dict[str, dict[str, str]] = {
    "sd35-medium": {
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "transformer_blocks.1.norm1_context.linear": "joint_blocks.1.context_block.adaLN_modulation.1",
    },
    "flux": {"norm_out.linear": "final_layer.adaLN_modulation.1"},
}
CONVERTED: dict[str, Callable[[State], State]] = {"sd35-medium": sd3_converted, "flux": flux_converted}
TRANSFORMER = pytest.mark.parametrize("name", FUSED)


def require_equal_layouts(
    name: str, file: Path, split: Path, fused: Path, expected: State, strength: float, bound: float | None = None
) -> None:
    """Raise AssertionError unless both checkpoints become `expected`, bit for bit or within a bound."""
    pk.merge_checkpoint(split, {file: strength}, split.with_name("split-out.safetensors"))
    pk.merge_checkpoint(fused, {file: strength}, fused.with_name("fused-out.safetensors"))
    ours = load(split.with_name("split-out.safetensors"))
    theirs = CONVERTED[name](load(fused.with_name("fused-out.safetensors")))
    if bound is None:
        require_bits(ours, expected)
        require_bits(theirs, expected)
    for found in (ours, theirs):
        assert found.keys() == expected.keys()
        for key in expected:
            close(found[key], expected[key], bound or 0.0, key)


@TRANSFORMER
@pytest.mark.parametrize("kind", HANDS)
def test_adapters_of_split_projections_are_rows_of_the_fused_layer(
    kind: str, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    theirs, split, fused = both_layouts(families[name], tmp_path)
    hands: dict[str, Hand] = {}
    for _, block, parts in FUSED[name]:
        for part in parts[1:]:  # the first keeps its rows
            rows, columns = theirs[f"{block}{part}.weight"].shape
            hands[block + part] = HANDS[kind](rows, columns, seed=len(hands))
    file = write(
        tmp_path / "a.safetensors", {k: t for n, h in hands.items() for k, t in h.keyed(f"transformer.{n}").items()}
    )
    expected = hand_merge(theirs, {f"{n}.weight": [(h, 0.75)] for n, h in hands.items()})
    require_equal_layouts(name, file, split, fused, expected, 0.75, 1e-6 if kind == "dora out" else None)


@TRANSFORMER
@pytest.mark.parametrize("kind", HANDS)
def test_an_adapter_of_the_fused_layer_is_cut_into_the_split_projections(
    kind: str, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    theirs, split, fused = both_layouts(families[name], tmp_path)
    tensors: State = {}
    expected = dict(theirs)
    for seed, (path, block, parts) in enumerate(FUSED[name]):
        W = torch.cat([theirs[f"{block}{part}.weight"] for part in parts])
        # of LoKr, blocks of rows that no projection begins with
        hand = lokr(*W.shape, outer=(8, 2), seed=seed) if kind == "lokr" else HANDS[kind](*W.shape, seed=10 * seed)
        tensors |= hand.keyed(f"lora_unet_{path.replace('.', '_')}")
        merged = hand_merge({"W": W}, {"W": [(hand, -0.5)]})["W"]
        rows = [len(theirs[f"{block}{part}.weight"]) for part in parts]
        for part, own in zip(parts, merged.split(rows), strict=True):
            expected[f"{block}{part}.weight"] = own
    file = write(tmp_path / "a.safetensors", tensors)
    require_equal_layouts(name, file, split, fused, expected, -0.5, 1e-6 if kind == "dora out" else None)


@TRANSFORMER
@pytest.mark.parametrize("original", [False, True], ids=["diffusers names", "original names"])
@pytest.mark.parametrize("kind", HANDS)
def test_halves_change_places_with_the_layout(
    kind: str, original: bool, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    """diffusers has (scale, shift) where the published files have (shift, scale), and adapters have them likewise."""
    theirs, split, fused = both_layouts(families[name], tmp_path)
    tensors: State = {}
    expected = dict(theirs)
    for seed, (module, path) in enumerate(SWAPPED[name].items()):
        W = theirs[f"{module}.weight"]
        hand = HANDS[kind](*W.shape, seed=seed)
        tensors |= hand.keyed(f"lora_unet_{path.replace('.', '_')}" if original else f"transformer.{module}")
        own = torch.cat(W.chunk(2)[::-1]) if original else W
        merged = hand_merge({"W": own}, {"W": [(hand, 0.75)]})["W"]
        expected[f"{module}.weight"] = torch.cat(merged.chunk(2)[::-1]) if original else merged
    file = write(tmp_path / "a.safetensors", tensors)
    require_equal_layouts(name, file, split, fused, expected, 0.75, 1e-6 if kind == "dora out" else None)


@TRANSFORMER
@pytest.mark.parametrize("original", [False, True], ids=["diffusers names", "original names"])
def test_halves_of_biases_change_places_with_the_layout(
    original: bool, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    theirs, split, fused = both_layouts(families[name], tmp_path)
    tensors: State = {}
    expected = dict(theirs)
    for seed, (module, path) in enumerate(SWAPPED[name].items()):
        change = exact(len(theirs[f"{module}.bias"]), seed=seed)
        tensors[(f"lora_unet_{path.replace('.', '_')}" if original else f"transformer.{module}") + ".diff_b"] = change
        own = torch.cat(change.chunk(2)[::-1]) if original else change
        expected[f"{module}.bias"] = theirs[f"{module}.bias"] + 0.5 * own
    file = write(tmp_path / "a.safetensors", tensors)
    require_equal_layouts(name, file, split, fused, expected, 0.5)


@TRANSFORMER
@pytest.mark.parametrize("original", [False, True], ids=["diffusers names", "original names"])
def test_biases_of_fused_projections_merge_in_both_layouts_or_are_refused(
    original: bool, name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    """Never half of them: what one layout takes with exact rows, the other may refuse, and then writes nothing."""
    theirs, split, fused = both_layouts(families[name], tmp_path)
    path, block, parts = FUSED[name][0]
    rows = [len(theirs[f"{block}{part}.bias"]) for part in parts]
    change = exact(sum(rows), seed=3)
    expected = dict(theirs)
    for part, own in zip(parts, change.split(rows), strict=True):
        expected[f"{block}{part}.bias"] = theirs[f"{block}{part}.bias"] + own
    if original:
        tensors = {f"lora_unet_{path.replace('.', '_')}.diff_b": change}
    else:
        tensors = {f"transformer.{block}{p}.diff_b": own for p, own in zip(parts, change.split(rows), strict=True)}
    file = write(tmp_path / "a.safetensors", {k: t.contiguous() for k, t in tensors.items()})
    for base, read in ((split, dict), (fused, CONVERTED[name])):
        out = tmp_path / "out.safetensors"
        try:
            pk.merge_checkpoint(base, {file: 1.0}, out)
        except MismatchError:
            assert not out.exists()
            continue
        require_bits(read(load(out)), expected)
        out.unlink()


@TRANSFORMER
def test_fused_and_split_files_merge_on_top_of_each_other(
    name: str, families: dict[str, Family], tmp_path: Path
) -> None:
    """Adapters of all the rows and of some, which read the base as it was whatever the other has done to it."""
    theirs, split, fused = both_layouts(families[name], tmp_path)
    path, block, parts = FUSED[name][0]
    whole = torch.cat([theirs[f"{block}{part}.weight"] for part in parts])
    over, under = lora(*whole.shape, seed=1), full(*theirs[f"{block}{parts[1]}.weight"].shape, seed=2)
    first = write(tmp_path / "1.safetensors", over.keyed(f"lora_unet_{path.replace('.', '_')}"))
    second = write(tmp_path / "2.safetensors", under.keyed(f"transformer.{block}{parts[1]}"))
    expected = dict(theirs)
    merged = (whole.double() + 0.75 * over.delta(whole.double())).split(
        [len(theirs[f"{block}{p}.weight"]) for p in parts]
    )
    for part, rows in zip(parts, merged, strict=True):
        added = -0.5 * under.delta(rows) if part == parts[1] else 0.0
        expected[f"{block}{part}.weight"] = (rows + added).float()
    for base, read in ((split, dict), (fused, CONVERTED[name])):
        for adapters in ({first: 0.75, second: -0.5}, {second: -0.5, first: 0.75}):
            pk.merge_checkpoint(base, adapters, tmp_path / "out.safetensors")
            require_bits(read(load(tmp_path / "out.safetensors")), expected)


def test_a_fused_file_gives_every_layer_of_a_model_factors_of_its_own(
    families: dict[str, Family], tmp_path: Path
) -> None:
    """Loaded onto split projections, training one leaves the others."""
    _, block, parts = FUSED["flux"][0]
    model = tree({f"{block}{part}": nn.Linear(FLUX_COLUMNS, 3072) for part in parts})
    hand = lora(9216, FLUX_COLUMNS, seed=1)
    file = write(tmp_path / "a.safetensors", hand.keyed("lora_unet_double_blocks_0_img_attn_qkv"))
    pk.load(model, file, component="transformer")
    factors = pk.adapter_parameters(model)
    assert len(factors) == 6 and len({p.untyped_storage().data_ptr() for p in factors}) == 6


def test_a_rotation_whose_blocks_cross_the_rows_of_another_adapter_reads_the_base_as_it_was(
    families: dict[str, Family], tmp_path: Path
) -> None:
    """OFT mixes the rows of a block. Here 3·128 rows in blocks of 48, beside a LoRA of the first 128."""
    theirs, _, fused = both_layouts(families["sd35-medium"], tmp_path)
    path, block, parts = FUSED["sd35-medium"][0]
    W = torch.cat([theirs[f"{block}{part}.weight"] for part in parts]).double()
    size, count = 48, len(W) // 48
    A = exact(count, size, size, seed=5) / 16
    rotation = {"oft_blocks": A, "alpha": torch.tensor(0.0)}
    Q = (A - A.mT).double()
    R = torch.linalg.solve((torch.eye(size) - Q).mT, (torch.eye(size) + Q).mT).mT  # (I + Q)(I − Q)⁻¹
    turned = torch.cat([r.mT @ rows for r, rows in zip(R, W.split(size), strict=True)])  # kohya's W' = Rᵀ·W
    first = write(tmp_path / "1.safetensors", Hand(rotation, lambda W: W).keyed(f"lora_unet_{path.replace('.', '_')}"))
    hand = lora(128, 128, seed=9)
    expected = turned.clone()
    expected[:128] += hand.delta(W[:128])
    second = write(tmp_path / "2.safetensors", hand.keyed(f"transformer.{block}{parts[0]}"))
    for adapters in ({first: 1.0, second: 1.0}, {second: 1.0, first: 1.0}):
        pk.merge_checkpoint(fused, adapters, tmp_path / "out.safetensors")
        merged = load(tmp_path / "out.safetensors")[f"model.diffusion_model.{path}.weight"]
        close(merged, expected, 1e-5)


def test_an_openclip_text_encoder_keeps_its_projection_transposed_and_its_attention_fused(
    families: dict[str, Family], tmp_path: Path
) -> None:
    family = families["sdxl"]
    base = diffusers_state(family)
    layer = "text_encoder_2.text_model.encoder.layers.1"
    hands = {
        f"{layer}.self_attn.k_proj": lora(32, 32, seed=1),
        f"{layer}.self_attn.v_proj": lokr(32, 32, seed=2),
        f"{layer}.mlp.fc2": full(32, 128, seed=3),
        "text_encoder_2.text_projection": lora(32, 32, seed=4),
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": loha(64, 16, seed=5),
        "unet.add_embedding.linear_1": lora(128, 48, seed=6),
    }
    file = kohya_file(tmp_path / "a.safetensors", family, hands, te="")
    change = exact(32, seed=7)
    bias = f"{layer}.self_attn.v_proj"
    write(file, load(file) | {f"{kohya_name(family, bias)}.diff_b": change})
    expected = hand_merge(base, {f"{name}.weight": [(hand, 0.75)] for name, hand in hands.items()})
    expected[f"{bias}.bias"] = base[f"{bias}.bias"] + 0.75 * change
    split = write(tmp_path / "split.safetensors", base)
    single = write(tmp_path / "single.safetensors", original_state(family, base))
    pk.merge_checkpoint(split, {file: 0.75}, tmp_path / "out.safetensors")
    require_bits(load(tmp_path / "out.safetensors"), expected)
    pk.merge_checkpoint(single, {file: 0.75}, tmp_path / "out.safetensors")
    merged = load(tmp_path / "out.safetensors")
    prefix = "conditioner.embedders.1.model."
    q, k, v = merged[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"].chunk(3)
    found = {
        f"{layer}.self_attn.q_proj": q,
        f"{layer}.self_attn.k_proj": k,
        f"{layer}.self_attn.v_proj": v,
        f"{layer}.mlp.fc2": merged[f"{prefix}transformer.resblocks.1.mlp.c_proj.weight"],
        "text_encoder_2.text_projection": merged[f"{prefix}text_projection"].T,
    }
    for name, tensor in found.items():
        assert same_bits(tensor.contiguous(), expected[f"{name}.weight"]), name
    require_bits(merged, original_state(family, expected))


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_the_plan_of_a_real_sd15_finds_every_module_in_either_layout(layout: str, tmp_path: Path) -> None:
    """Of real shapes there is only a header and a hole: the plan of a rank-1 file of all 490 modules reads no more."""
    family = FAMILIES["sd15"]
    shapes: dict[str, tuple[int, ...]] = {}
    for module in family.modules.values():
        own = {"weight": module.shape, "bias": module.shape[:1]}
        keys = {"weight": module.original, "bias": module.original_bias}
        for kind in ("weight", "bias")[: 1 + module.bias]:
            shapes[keys[kind] or "" if layout == "original" else f"{module.name}.{kind}"] = own[kind]
    base = tmp_path / "base.safetensors"
    sizes = {key: ("F16", shape, 2 * math.prod(shape)) for key, shape in shapes.items()}
    with base.open("wb") as file:
        file.write(container.header(sizes, {}))
        file.truncate(file.tell() + sum(size for _, _, size in sizes.values()))
    tensors: State = {}
    matrices = [m for m in family.modules.values() if len(m.shape) > 1]
    for m in matrices:
        name = kohya_name(family, m.name)
        tensors[f"{name}.lora_up.weight"] = torch.ones(m.shape[0], 1, *[1] * len(m.shape[2:])).half()
        tensors[f"{name}.lora_down.weight"] = torch.ones(1, *m.shape[1:]).half()
    adapter = write(tmp_path / "a.safetensors", tensors)
    plan = pk.plan_merge(base, {adapter: 1.0})
    places = {kohya_name(family, m.name): m.original if layout == "original" else f"{m.name}.weight" for m in matrices}
    assert {p.name: p.weight for p in plan.patches} == places
    assert set(plan.touched) == set(places.values())


def test_folders_that_are_not_one_model_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", lora(12, 8).keyed("lycoris_lin"))
    before = state(net())
    two = tmp_path / "two"
    write(two / "a.safetensors", before)
    write(two / "b.safetensors", before)
    empty = tmp_path / "empty"
    empty.mkdir()
    odd = sharded(tmp_path / "odd", before, 6)
    index = json.loads((odd / "model.safetensors.index.json").read_text())
    index["weight_map"]["lin.weight"] = "model-00002-of-00002.safetensors"
    (odd / "model.safetensors.index.json").write_text(json.dumps(index))
    outside = sharded(tmp_path / "outside", before, 6)
    text = (outside / "model.safetensors.index.json").read_text()
    (outside / "model.safetensors.index.json").write_text(text.replace("model-00001", "../two/a"))
    for folder in (two, empty, odd, outside, tmp_path / "nothing"):
        with pytest.raises(FileError):
            pk.merge_checkpoint(folder, {file: 1.0}, tmp_path / "out")
        assert not (tmp_path / "out").exists()
