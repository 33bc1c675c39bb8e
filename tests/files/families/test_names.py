"""The families' modules against the real classes, and every name against the software that reads and writes it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.loaders import single_file_utils as single_file
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from lycoris.wrapper import LycorisNetwork
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from peftkit.errors import OptionError
from peftkit.files.families import layouts
from peftkit.files.families.denoisers import Component, ModuleSpec, flux
from peftkit.files.families.layouts import of_checkpoint
from peftkit.files.families.names import FAMILIES, Family, guess

STYLES = ("kohya", "diffusers", "ldm", "transformer", "lycoris", "peft")
FAMILY = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
PARTS = [(family, part) for family in FAMILIES.values() for part in family.parts]
PART = pytest.mark.parametrize("family, part", PARTS, ids=[f"{family.name}-{part.name}" for family, part in PARTS])

with torch.device("meta"):
    torch.empty(0)  # torch remembers its constructors at the first use: here, before a fixture wraps torch.empty

# ----------------------------------------------------------------------------------------------------- the real classes

_XL: dict[str, Any] = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    "sdxl": {**_XL, "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]},
}
_SD3: dict[str, dict[str, Any]] = {
    "sd3": {"num_layers": 24},
    "sd35-medium": {"num_layers": 24, "qk_norm": "rms_norm", "dual_attention_layers": tuple(range(13))},
    "sd35-large": {"num_layers": 38, "qk_norm": "rms_norm"},
}


def _clip(kind: Callable[[Any], nn.Module], width: int, layers: int) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width}
    return kind(hf.CLIPTextConfig(**sizes, num_hidden_layers=layers, num_attention_heads=width // 64))


def _t5(config: type[Any], vocab_size: int) -> Any:
    sizes = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "d_kv": 64}
    return config(**sizes, vocab_size=vocab_size, feed_forward_proj="gated-gelu")


def _sd3(num_layers: int, **options: Any) -> nn.Module:
    text: dict[str, Any] = {"joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    width: dict[str, Any] = {"num_attention_heads": num_layers, "caption_projection_dim": 64 * num_layers}
    return SD3Transformer2DModel(num_layers=num_layers, attention_head_dim=64, **width, **text, **options)


@cache
def real(family: str, component: str) -> nn.Module:
    """The class that diffusers' pipeline of the family has, in its published configuration."""
    with torch.device("meta"):
        match family, component:
            case _, "unet":
                return UNet2DConditionModel(**_UNETS[family])
            case "flux", "transformer":
                return FluxTransformer2DModel(guidance_embeds=True)
            case _, "transformer":
                return _sd3(**_SD3[family])
            case ("flux", "text_encoder_2") | (_, "text_encoder_3"):
                return hf.T5EncoderModel(_t5(hf.T5Config, 32128))
            case _, "text_encoder_2":
                return _clip(hf.CLIPTextModelWithProjection, 1280, 32)
            case "sd2", _:
                return _clip(hf.CLIPTextModel, 1024, 23)
            case "sd15" | "sdxl" | "flux", _:
                return _clip(hf.CLIPTextModel, 768, 12)
            case _:
                return _clip(hf.CLIPTextModelWithProjection, 768, 12)


def published(path: str) -> str:
    """With the level of CLIPTextModel that transformers 5.6 left out."""
    return f"text_model.{path}" if re.match(r"(embeddings|encoder\.layers|final_layer_norm)\b", path) else path


def weighted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in model.named_modules() if getattr(module, "weight", None) is not None)


@PART
def test_modules_are_those_of_the_real_class(family: Family, part: Component) -> None:
    model = real(family.name, part.name)
    theirs = {
        published(path): (tuple(module.weight.shape), getattr(module, "bias", None) is not None)
        for path, module in weighted(model)
    }
    assert {m.path: (m.shape, m.bias) for m in part.modules.values()} == theirs
    assert all(family.modules[f"{part.name}.{path}"] is module for path, module in part.modules.items())
    tensors = {f"{m.path}.{kind}" for m in part.modules.values() for kind in ("weight", "bias")[: 1 + m.bias]}
    assert set(map(published, model.state_dict())) - tensors <= {"pos_embed.pos_embed"}
    assert all(family.find(f"{part.name}.{path}")[0].path == published(path) for path, _ in weighted(model))


def test_counts() -> None:
    """Of modules; and of the tensors that the published checkpoints have under model.diffusion_model."""
    modules = {name: [len(part.modules) for part in family.parts] for name, family in FAMILIES.items()}
    assert modules == {
        "sd15": [391, 99],
        "sd2": [391, 187],
        "sdxl": [1050, 99, 260],
        "sd3": [341, 100, 260, 220],
        "sd35-medium": [515, 100, 260, 220],
        "sd35-large": [689, 100, 260, 220],
        "flux": [656, 99, 220],
    }
    tensors = {name: len(originals(family.parts[0])) for name, family in FAMILIES.items()}
    assert tensors["sd15"] == tensors["sd2"] == 686
    assert tensors["sdxl"] == 1680
    assert tensors["flux"] == 780
    assert len(list(flux(guidance=False))) == 654
    assert all(key.startswith("model.diffusion_model.") for key in originals(FAMILIES["sdxl"].parts[0]))


# ---------------------------------------------------------------------------------------------- the original checkpoint


@cache
def originals(part: Component) -> Mapping[str, Tensor]:
    """A checkpoint of a component in its original layout, in which every row is another number."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in part.modules.values():
        rows = max(module.stop or module.shape[0], *shapes.get(module.original, (0,)))
        shape = (rows,) if len(module.shape) == 1 else (rows, 1)
        shapes[module.original] = module.shape[::-1] if module.transposed else shape
        if module.original_bias:
            shapes[module.original_bias] = (rows,)
    sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
    numbers = torch.arange(sum(sizes.values()), dtype=torch.float64).split(list(sizes.values()))
    return {key: n.view(shapes[key]) for key, n in zip(sizes, numbers, strict=True)}


def taken(tensors: Mapping[str, Tensor], place: ModuleSpec | layouts.Placement, key: str | None) -> Tensor:
    """What ModuleSpec and Placement say of a tensor, done."""
    assert key is not None
    tensor = tensors[key][place.start : place.stop]
    if place.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    return tensor.T if place.transposed and tensor.ndim == 2 else tensor


def _converted(family: Family, part: Component, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own conversion."""
    if part.name == "unet":
        config = {"layers_per_block": 2, "addition_embed_type": "text_time" if family.name == "sdxl" else None}
        return single_file.convert_ldm_unet_checkpoint(tensors, config)
    if part.name == "transformer" and family.name == "flux":
        return single_file.convert_flux_transformer_checkpoint_to_diffusers(tensors)
    if part.name == "transformer":
        tensors["model.diffusion_model.pos_embed"] = torch.zeros(1)
        return single_file.convert_sd3_transformer_checkpoint_to_diffusers(tensors)
    if "t5" in part.original:
        return single_file.convert_sd3_t5_checkpoint_to_diffusers(tensors)
    if part.original.endswith("model."):
        text_model = SimpleNamespace(config=SimpleNamespace(hidden_size=1024))
        return single_file.convert_open_clip_checkpoint(text_model, tensors, prefix=part.original)
    return single_file.convert_ldm_clip_checkpoint(tensors, part.original)


@PART
def test_diffusers_converts_the_original_to_what_the_table_says(family: Family, part: Component) -> None:
    tensors = originals(part)
    converted = _converted(family, part, dict(tensors))
    converted.pop("pos_embed.pos_embed", None)
    expected = {f"{m.path}.weight": taken(tensors, m, m.original) for m in part.modules.values()}
    expected |= {f"{m.path}.bias": taken(tensors, m, m.original_bias) for m in part.modules.values() if m.bias}
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in expected.items())


# ------------------------------------------------------------------------------------------------------------- spelling


def spellings(family: Family, style: str) -> Iterator[tuple[ModuleSpec, str]]:
    for module in family.modules.values():
        with suppress(OptionError):
            yield module, family.spell(module.name, style)


@FAMILY
@pytest.mark.parametrize("style", STYLES)
def test_what_is_spelled_is_found_again(family: Family, style: str) -> None:
    """A name names one module, or exactly those that the original has fused."""
    named: defaultdict[str, list[ModuleSpec]] = defaultdict(list)
    for module, spelled in spellings(family, style):
        named[spelled].append(module)
    for spelled, modules in named.items():
        assert family.find(spelled) == tuple(modules)
        assert family.own(spelled)
        assert len({m.original for m in modules}) == 1
        if len(modules) > 1:
            assert [m.start for m in modules] == [0, *(m.stop for m in modules[:-1])]
    every, alone = set(family.components), {part.name for part in family.alone}
    limited = {"transformer": every if "transformer" in every else set(), "lycoris": alone, "peft": alone}
    assert {m.name.partition(".")[0] for modules in named.values() for m in modules} == limited.get(style, every)


@FAMILY
def test_no_two_names_with_a_prefix_collide(family: Family) -> None:
    """Of all prefixes before all paths, in underscores: each means one module, or one original."""
    meant: dict[str, tuple[ModuleSpec, ...]] = {}
    for prefix, table in family._tables:
        for path, match in table.items():
            assert meant.setdefault(prefix + path, match.modules) == match.modules
    for part in family.parts:
        for path, module in part.modules.items():
            assert meant[f"{part.name}_{path}".replace(".", "_")] == (module,)
            assert module in meant[f"{part.name}_{part.ldm(module)}".replace(".", "_")]


EXAMPLES = {
    "sd15": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": """
            lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0
            lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0
            lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0
            lycoris_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0
            oft_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_out_0
            diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0
            model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_out.0
            unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0
            down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora
            unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out
            unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora
            base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0
            base_model.model.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0""",
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj": """
            lora_te_text_model_encoder_layers_3_self_attn_q_proj
            lora_te_encoder_layers_3_self_attn_q_proj
            text_encoder.text_model.encoder.layers.3.self_attn.q_proj
            text_encoder.encoder.layers.3.self_attn.q_proj
            text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora
            text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.q_proj
            base_model.model.text_model.encoder.layers.3.self_attn.q_proj""",
        "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_1_conv",
        "unet.up_blocks.1.upsamplers.0.conv": "lora_unet_output_blocks_5_2_conv",
        "unet.down_blocks.2.downsamplers.0.conv": "lora_unet_input_blocks_9_0_op",
    },
    "sd2": {
        "text_encoder.text_model.encoder.layers.22.mlp.fc1": """
            lora_te_text_model_encoder_layers_22_mlp_fc1
            text_encoders.clip_h.transformer.text_model.encoder.layers.22.mlp.fc1""",
    },
    "sdxl": {
        "unet.add_embedding.linear_2": "lora_unet_label_emb_0_2 lora_unet_add_embedding_linear_2",
        "unet.conv_norm_out": "lora_unet_out_0 lora_unet_conv_norm_out",
        "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
        "text_encoder.text_model.final_layer_norm": "lora_te1_text_model_final_layer_norm",
        "text_encoder_2.text_projection": """
            lora_te2_text_projection text_encoder_2.text_projection text_encoders.clip_g.transformer.text_projection""",
    },
    "sd35-medium": {
        "transformer.transformer_blocks.12.attn2.to_out.0": """
            lora_unet_joint_blocks_12_x_block_attn2_proj
            lora_transformer_transformer_blocks_12_attn2_to_out_0
            diffusion_model.joint_blocks.12.x_block.attn2.proj
            transformer.transformer_blocks.12.attn2.to_out.0""",
        "text_encoder_3.encoder.block.9.layer.1.DenseReluDense.wi_0": """
            lora_te3_encoder_block_9_layer_1_DenseReluDense_wi_0
            text_encoders.t5xxl.transformer.encoder.block.9.layer.1.DenseReluDense.wi_0""",
    },
    "flux": {
        "transformer.transformer_blocks.18.attn.to_add_out": """
            lora_unet_double_blocks_18_txt_attn_proj
            lora_transformer_transformer_blocks_18_attn_to_add_out
            lycoris_transformer_blocks_18_attn_to_add_out
            diffusion_model.double_blocks.18.txt_attn.proj
            base_model.model.double_blocks.18.txt_attn.proj
            double_blocks.18.processor.proj_lora2
            transformer.transformer_blocks.18.attn.to_add_out""",
        "transformer.norm_out.linear": "lora_unet_final_layer_adaLN_modulation_1 transformer.norm_out.linear",
        "text_encoder.text_model.encoder.layers.0.mlp.fc2": """
            lora_te_text_model_encoder_layers_0_mlp_fc2
            lora_te1_text_model_encoder_layers_0_mlp_fc2
            text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2""",
        "text_encoder_2.encoder.block.0.layer.0.SelfAttention.k": """
            lora_te2_encoder_block_0_layer_0_SelfAttention_k
            lora_te3_encoder_block_0_layer_0_SelfAttention_k""",
    },
}


@pytest.mark.parametrize("family", EXAMPLES)
def test_names_seen_in_files(family: str) -> None:
    for name, spelled in EXAMPLES[family].items():
        for foreign in spelled.split():
            assert [m.name for m in FAMILIES[family].find(foreign)] == [name], foreign


def test_names_of_several_modules() -> None:
    family = FAMILIES["flux"]
    block = "transformer.single_transformer_blocks.37"
    qkv = [f"{block}.attn.to_{part}" for part in "qkv"]
    assert [m.name for m in family.find("lora_unet_single_blocks_37_linear1")] == [*qkv, f"{block}.proj_mlp"]
    assert [m.name for m in family.find("diffusion_model.single_blocks.37.processor.qkv_lora")] == qkv
    added = [f"transformer.transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]
    assert [m.name for m in family.find("double_blocks.0.processor.qkv_lora2")] == added


def test_names_of_nothing() -> None:
    xl = FAMILIES["sdxl"]
    assert xl.find("base_model.model.text_model.encoder.layers.0.mlp.fc1") == ()  # of which text encoder?
    assert xl.find("lora_unet_input_blocks_11_0_in_layers_2") == ()
    assert FAMILIES["sd15"].find("transformer.conv_in") == FAMILIES["flux"].find("unet.x_embedder") == ()
    assert FAMILIES["sd15"].find("") == FAMILIES["sd15"].find("lora_unet_") == ()


def test_swaps_where_the_original_has_the_halves_in_the_other_order() -> None:
    family, sd3 = FAMILIES["flux"], FAMILIES["sd3"]
    assert family.swaps("lora_unet_final_layer_adaLN_modulation_1")
    assert sd3.swaps("diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1")
    assert not sd3.swaps("diffusion_model.joint_blocks.22.context_block.adaLN_modulation.1")
    assert not family.swaps("transformer.norm_out.linear")
    assert not family.swaps("no such module")
    swapped = Counter(family.name for family in FAMILIES.values() for m in family.modules.values() if m.swapped)
    assert swapped == {"sd3": 2, "sd35-medium": 2, "sd35-large": 2, "flux": 1}


@pytest.mark.parametrize(
    "family, name, style, message",
    [
        ("sd15", "unet.conv_in", "a1111", "unknown style 'a1111'; there are kohya, diffusers, ldm"),
        ("sd15", "unet.conv_inn", "kohya", "no module 'unet.conv_inn'. Did you mean 'unet.conv_in'"),
        ("sd15", "unet.conv_in", "transformer", "the style 'transformer' has no name for 'unet.conv_in'"),
        ("sdxl", "text_encoder_2.text_projection", "peft", "choose another style"),
    ],
)
def test_what_cannot_be_spelled_raises(family: str, name: str, style: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        FAMILIES[family].spell(name, style)


# ------------------------------------------------------------------------------------------- what others read and write


def _kohya_lora(family: Family, of: Callable[[ModuleSpec], bool]) -> dict[str, Tensor]:
    """A file in sd-scripts' names whose ups are numbered as `originals` is."""
    tensors: dict[str, Tensor] = {}
    for part in family.parts:
        rows = originals(part)
        for module in filter(of, part.modules.values()):
            name = family.spell(module.name, "kohya")
            tensors[f"{name}.lora_up.weight"] = rows[module.original].clone()
            tensors[f"{name}.lora_down.weight"] = torch.ones(1, 1, dtype=torch.float64)
            tensors[f"{name}.alpha"] = torch.ones(())
    return tensors


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_diffusers_reads_our_kohya_names(name: str) -> None:
    """And the names it makes of them are found again. It knows no embeddings and no norms."""
    family = FAMILIES[name]

    def matrix(module: ModuleSpec) -> bool:
        return len(module.shape) > 1 and "embeddings" not in module.path

    tensors = {**_kohya_lora(family, matrix)}
    if name == "sdxl":
        tensors = lora._maybe_map_sgm_blocks_to_diffusers(tensors, SimpleNamespace(layers_per_block=2))
    converted, alphas = lora._convert_non_diffusers_lora_to_diffusers(tensors)
    assert len(alphas) == len(converted) // 2
    found = set()
    for key, tensor in converted.items():
        if ".up." in key:
            (module,) = family.find(re.sub(r"(\.lora(_linear_layer)?)?\.up\.weight$", "", key))
            part = family.parts[family.components.index(module.name.partition(".")[0])]
            assert torch.equal(tensor, originals(part)[module.original]), key
            found.add(module.name)
    assert found == {m.name for m in family.modules.values() if matrix(m)}


def test_diffusers_reads_our_kohya_names_of_flux() -> None:
    """The fused layers are cut, and the last modulation is turned, as the table says."""
    family, part = FAMILIES["flux"], FAMILIES["flux"].parts[0]
    tensors = _kohya_lora(family, lambda m: m.name.startswith("transformer.") and len(m.shape) > 1)
    tensors.pop("lora_unet_final_layer_linear.alpha")
    converted = lora._convert_kohya_flux_lora_to_diffusers(tensors)
    rows, found = originals(part), set()
    for key, tensor in converted.items():
        if key.endswith(".lora_B.weight"):
            (module,) = family.find(key.removesuffix(".lora_B.weight"))
            assert torch.equal(tensor, taken(rows, module, module.original)), key
            found.add(module.name)
    assert found == {m.name for m in part.modules.values() if len(m.shape) > 1}


def test_diffusers_reads_xlabs_names_of_flux_as_we_do() -> None:
    family = FAMILIES["flux"]
    tensors: dict[str, Tensor] = {}
    for block, kinds in {
        "double_blocks.7": ("qkv_lora1", "qkv_lora2", "proj_lora1", "proj_lora2"),
        "single_blocks.7": ("qkv_lora", "proj_lora"),
    }.items():
        for kind in kinds:
            rows = 9216 if "qkv" in kind else 3072
            tensors[f"{block}.processor.{kind}.down.weight"] = torch.ones(1, 1)
            tensors[f"{block}.processor.{kind}.up.weight"] = torch.arange(rows).view(rows, 1) + 10_000 * len(tensors)
    converted = lora._convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    for key, tensor in tensors.items():
        if key.endswith(".up.weight"):
            modules = family.find(key.removesuffix(".up.weight"))
            assert torch.equal(torch.cat([converted[f"{m.name}.lora_B.weight"] for m in modules]), tensor)


def _small_flux() -> tuple[nn.Module, list[str]]:
    """And the paths of its Linear layers."""
    sizes: dict[str, Any] = {"num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, **sizes)
    return model, [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def test_peft_writes_our_peft_names() -> None:
    model, linear = _small_flux()
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules=linear))  # pyright: ignore[reportArgumentType]
    keys = {key.removesuffix(".lora_A.weight") for key in get_peft_model_state_dict(adapted) if "lora_A" in key}
    assert keys == {FAMILIES["flux"].spell(f"transformer.{path}", "peft") for path in linear}


def test_lycoris_writes_our_lycoris_names(monkeypatch: pytest.MonkeyPatch) -> None:
    model, linear = _small_flux()
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_MODULE", ["FluxTransformer2DModel"])
    network = LycorisNetwork(model, lora_dim=1, alpha=1, network_module="lora")
    written = {module.lora_name for module in network.loras}
    assert written == {FAMILIES["flux"].spell(f"transformer.{path}", "lycoris") for path in linear}


# ---------------------------------------------------------------------------------------------------------------- guess


def shape(family: Family, foreign: str) -> tuple[int, int]:
    modules = family.find(foreign)
    return sum(m.shape[0] for m in modules), torch.Size(modules[0].shape[1:]).numel()


@FAMILY
@pytest.mark.parametrize("style", STYLES)
def test_a_whole_adapter_is_of_its_family(family: Family, style: str) -> None:
    spelled = [name for module, name in spellings(family, style) if len(module.shape) > 1]
    if spelled:
        assert guess({name: shape(family, name) for name in spelled})[0] is family


def _names(*arguments: Any) -> list[str]:
    return [family.name for family in guess(dict(*arguments))]


def test_shapes_decide_between_families_that_share_names() -> None:
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert _names({key: (640, 768)}) == ["sd15"]
    assert _names({key: (640, 1024)}) == ["sd2"]
    assert _names({key: (640, 2048)}) == ["sdxl"]
    assert _names({key: (640, 512)}) == []
    assert _names({key: None}) == ["sd15", "sd2", "sdxl"]
    assert _names({key: (640, 768), "lora_unet_no_such": None}) == _names({}) == []


def test_the_usual_spelling_comes_first() -> None:
    assert _names({"lora_unet_input_blocks_4_1_proj_in": None})[0] == "sdxl"
    assert _names({"lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768)})[0] == "sd15"
    assert _names({"lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768)})[0] == "sdxl"
    assert _names({"lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536)}) == ["sd3", "sd35-medium"]
    assert _names({"lora_unet_joint_blocks_0_x_block_attn2_qkv": (4608, 1536)}) == ["sd35-medium"]


# ---------------------------------------------------------------------------------------------------------- checkpoints


def original_shapes(part: Component) -> dict[str, tuple[int, ...]]:
    rows: Counter[str] = Counter()
    shapes: dict[str, tuple[int, ...]] = {}
    for module in part.modules.values():
        rows[module.original] += module.shape[0]
        fused = (rows[module.original], *module.shape[1:])
        shapes[module.original] = module.shape[::-1] if module.transposed else fused
        if module.original_bias:
            shapes[module.original_bias] = fused[:1]
    return shapes


def state_shapes(model: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@FAMILY
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_an_original_checkpoint(family: Family, prefix: str) -> None:
    parts = family.parts if prefix.startswith("model") else family.parts[:1]
    shapes = {k: s for part in parts for k, s in original_shapes(part).items()}
    shapes = {k.replace("model.diffusion_model.", prefix): s for k, s in shapes.items()}
    layout = of_checkpoint({**shapes, "first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)})
    assert layout and layout.family is family and layout.kind == "original"
    assert len(layout.places) == sum(len(part.modules) for part in parts)
    for module in (module for part in parts for module in part.modules.values()):
        place = layout.locate(module.name)
        assert place and place.weight in shapes and (place.bias in shapes) is module.bias
        if prefix.startswith("model"):
            ours = (module.original, module.original_bias, module.start, module.stop, module.swapped, module.transposed)
            assert ours == (place.weight, place.bias, place.start, place.stop, place.swapped, place.transposed)


@FAMILY
@pytest.mark.parametrize("prefixed", [False, True])
def test_a_component_of_diffusers(family: Family, prefixed: bool) -> None:
    for part in family.parts:
        shapes = state_shapes(real(family.name, part.name), f"{part.name}." if prefixed else "")
        layout = of_checkpoint(shapes, [family])
        assert layout and layout.family is family and layout.kind == "diffusers"
        assert layout.places.keys() == {module.name for module in part.modules.values()}
        for name, place in layout.places.items():
            assert shapes[place.weight] == family.modules[name].shape
            assert (place.bias in shapes) is family.modules[name].bias
            assert (place.start, place.stop, place.swapped, place.transposed) == (None, None, False, False)
        found = of_checkpoint(shapes)
        assert found and found.places.keys() >= layout.places.keys() if part.denoiser else found


def test_text_encoders_alone() -> None:
    """With and without the level "text_model". One of several families goes to the first, or as the caller says."""
    memory = state_shapes(real("sd15", "text_encoder"))
    disk = {published(key): size for key, size in memory.items()}
    old = {f"cond_stage_model.transformer.{key}": size for key, size in memory.items()}
    for shapes in (memory, disk, old):
        layout = of_checkpoint(shapes)
        assert layout and (layout.family.name, len(layout.places)) == ("sd15", 99)
    for name, component, family in (("sd2", "text_encoder", "sd2"), ("sd3", "text_encoder_2", "sdxl")):
        layout = of_checkpoint(state_shapes(real(name, component)))
        assert layout and layout.family.name == family
    layout = of_checkpoint(state_shapes(real("flux", "text_encoder_2")), [FAMILIES["flux"]])
    assert layout and layout.locate("text_encoder_2.shared") == layouts.Placement("shared.weight", None)


def test_a_checkpoint_may_lack_and_change_some_tensors() -> None:
    """Flux schnell, inpainting models, an untied embedding, a bias left out."""
    whole = state_shapes(real("flux", "transformer"))
    schnell = {key: size for key, size in whole.items() if "guidance" not in key}
    layout = of_checkpoint(schnell)
    assert layout and layout.family.name == "flux"
    assert layout.locate("transformer.time_text_embed.guidance_embedder.linear_1") is None
    inpainting = {**state_shapes(real("sd15", "unet")), "conv_in.weight": (320, 9, 3, 3)}
    del inpainting["conv_out.bias"]
    layout = of_checkpoint(inpainting)
    assert layout and layout.family.name == "sd15"
    assert layout.locate("unet.conv_in") == layouts.Placement("conv_in.weight", "conv_in.bias")
    assert layout.locate("unet.conv_out") == layouts.Placement("conv_out.weight", None)
    t5 = state_shapes(real("flux", "text_encoder_2"))
    del t5["encoder.embed_tokens.weight"]
    layout = of_checkpoint(t5)
    assert layout and layout.locate("text_encoder_3.encoder.embed_tokens") is None


def _image_encoder(**sizes: Any) -> nn.Module:
    return hf.CLIPVisionModel(hf.CLIPVisionConfig(num_hidden_layers=24, num_attention_heads=16, **sizes))


STRANGERS: dict[str, Callable[[], nn.Module]] = {
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 3)),
    "Llama": lambda: hf.LlamaModel(hf.LlamaConfig(num_hidden_layers=2)),
    "CLIP's image encoder": lambda: _image_encoder(hidden_size=1024, intermediate_size=4096),
    "SigLIP's text encoder": lambda: hf.SiglipTextModel(hf.SiglipTextConfig(bos_token_id=0, eos_token_id=1)),
    "BART": lambda: hf.BartModel(hf.BartConfig(d_model=768, encoder_ffn_dim=3072)),
    "UMT5": lambda: hf.UMT5EncoderModel(_t5(hf.UMT5Config, 256384)),
    "a ControlNet": lambda: ControlNetModel(**_XL),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_other_models_are_of_no_family(stranger: str) -> None:
    with torch.device("meta"):
        shapes = state_shapes(STRANGERS[stranger]())
    assert of_checkpoint(shapes) is None
    assert of_checkpoint({}) is None
