"""Every name against the software that reads and writes it."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as lora
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from lycoris.wrapper import LycorisNetwork
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from peftkit.errors import OptionError
from peftkit.files.families.family import _matches
from peftkit.files.families.module import ModuleSpec
from peftkit.files.families.names import FAMILIES, Family
from tests.support.classes import FAMILY, STYLES, originals, spellings, taken

# -- spelling ----------------------------------------------------------------------------------------------------------


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
    for prefix, component in family._prefixes:
        for path, match in _matches(component).items():
            assert meant.setdefault(prefix + path, match.modules) == match.modules
    for part in family.parts:
        for module in part.specs:
            assert meant[f"{part.name}_{module.path}".replace(".", "_")] == (module,)
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
    "chroma": {
        "transformer.distilled_guidance_layer.layers.3.linear_2": """
            lora_unet_distilled_guidance_layer_layers_3_out_layer
            diffusion_model.distilled_guidance_layer.layers.3.out_layer
            transformer.distilled_guidance_layer.layers.3.linear_2""",
    },
    "wan": {
        "transformer.blocks.39.attn2.to_out.0": """
            diffusion_model.blocks.39.cross_attn.o
            lora_unet_blocks_39_cross_attn_o
            blocks.39.cross_attn.o
            transformer.blocks.39.attn2.to_out.0
            lycoris_blocks_39_attn2_to_out_0""",
        "transformer.blocks.0.attn2.add_k_proj": "diffusion_model.blocks.0.cross_attn.k_img",
        "transformer.blocks.0.ffn.net.2": "lora_unet_blocks_0_ffn_2 transformer.blocks.0.ffn.net.2",
        "transformer.condition_embedder.time_proj": "diffusion_model.time_projection.1",
        "transformer.proj_out": "diffusion_model.head.head",
        "transformer.vace_blocks.0.proj_in": "diffusion_model.vace_blocks.0.before_proj",
        "transformer.vace_blocks.7.attn2.to_q": "lora_unet_vace_blocks_7_cross_attn_q",
        "transformer.face_adapter.7.to_q": "diffusion_model.face_adapter.fuser_blocks.7.linear1_q",
        "text_encoder.encoder.block.3.layer.0.SelfAttention.q": """
            text_encoders.umt5xxl.transformer.encoder.block.3.layer.0.SelfAttention.q""",
    },
    "kolors": {
        "unet.encoder_hid_proj": "lora_unet_encoder_hid_proj unet.encoder_hid_proj",
        "unet.conv_in": "lora_unet_input_blocks_0_0",
    },
    "stable-cascade": {
        "prior.down_blocks.1.71.attention.to_q": """
            lora_prior_unet_down_blocks_1_71_attention_attn_to_q
            lora_unet_down_blocks_1_71_attention_attn_to_q
            diffusion_model.down_blocks.1.71.attention.attn.to_q
            lycoris_down_blocks_1_71_attention_to_q
            base_model.model.down_blocks.1.71.attention.to_q""",
        "prior.up_blocks.0.2.attention.to_out.0": "lora_prior_unet_up_blocks_0_2_attention_attn_out_proj",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": "lora_prior_te_text_model_encoder_layers_0_mlp_fc1",
    },
    "qwen-image": {
        "text_encoder.layers.27.mlp.up_proj": """
            text_encoders.qwen25_7b.transformer.model.layers.27.mlp.up_proj
            text_encoder.model.language_model.layers.27.mlp.up_proj""",
        "transformer.transformer_blocks.59.img_mlp.net.0.proj": """
            transformer_blocks.59.img_mlp.net.0.proj
            diffusion_model.transformer_blocks.59.img_mlp.net.0.proj
            transformer.transformer_blocks.59.img_mlp.net.0.proj
            lora_unet_transformer_blocks_59_img_mlp_net_0_proj
            lora_transformer_transformer_blocks_59_img_mlp_net_0_proj
            lycoris_transformer_blocks_59_img_mlp_net_0_proj""",
    },
    "qwen-image-2.1": {
        "transformer.transformer_blocks.3.img_mlp.gate_layer": """
            diffusion_model.transformer_blocks.3.img_mlp.gate_layer
            transformer.transformer_blocks.3.img_mlp.gate_layer
            lora_unet_transformer_blocks_3_img_mlp_gate_layer""",
    },
    "z-image": {
        "transformer.layers.29.attention.to_out.0": """
            diffusion_model.layers.29.attention.to_out.0
            diffusion_model.layers.29.attention.out
            lora_unet_layers_29_attention_to_out_0
            lora_unet_layers_29_attention_out
            transformer.layers.29.attention.to_out.0""",
        "transformer.all_final_layer.2-1.linear": "diffusion_model.final_layer.linear",
    },
    "flux2": {
        "transformer.single_transformer_blocks.47.attn.to_qkv_mlp_proj": """
            diffusion_model.single_blocks.47.linear1
            lora_unet_single_blocks_47_linear1
            base_model.model.single_blocks.47.linear1
            transformer.single_transformer_blocks.47.attn.to_qkv_mlp_proj
            lora_transformer_single_transformer_blocks_47_attn_to_qkv_mlp_proj""",
        "transformer.transformer_blocks.0.ff_context.linear_in": "diffusion_model.double_blocks.0.txt_mlp.0",
        "transformer.double_stream_modulation_img.linear": "lora_unet_double_stream_modulation_img_lin",
    },
    "hunyuan-video": {
        "transformer.transformer_blocks.19.ff.net.0.proj": """
            lora_unet_double_blocks_19_img_mlp_fc1
            transformer.double_blocks.19.img_mlp.fc1
            diffusion_model.double_blocks.19.img_mlp.fc1
            diffusion_model.double_blocks.19.img_mlp.0
            transformer.transformer_blocks.19.ff.net.0.proj""",
        "transformer.single_transformer_blocks.39.norm.linear": """
            diffusion_model.single_blocks.39.modulation.linear diffusion_model.single_blocks.39.modulation.lin""",
        "transformer.context_embedder.token_refiner.refiner_blocks.1.attn.to_out.0": """
            diffusion_model.txt_in.individual_token_refiner.blocks.1.self_attn_proj
            diffusion_model.txt_in.individual_token_refiner.blocks.1.self_attn.proj""",
    },
    "ltx": {
        "transformer.transformer_blocks.27.attn1.to_q": """
            diffusion_model.transformer_blocks.27.attn1.to_q transformer_blocks.27.attn1.to_q""",
        "transformer.proj_in": "diffusion_model.patchify_proj",
        "transformer.time_embed.linear": "diffusion_model.adaln_single.linear",
    },
    "ltx2": {
        "transformer.av_cross_attn_audio_v2a_gate.linear": "diffusion_model.av_ca_v2a_gate_adaln_single.linear",
        "transformer.transformer_blocks.0.audio_ff.net.2": "diffusion_model.transformer_blocks.0.audio_ff.net.2",
    },
    "cosmos": {
        "transformer.transformer_blocks.27.attn1.to_q": """
            lora_unet_blocks_27_self_attn_q_proj
            diffusion_model.blocks.27.self_attn.q_proj
            net.blocks.27.self_attn.q_proj""",
        "text_conditioner.blocks.5.cross_attn.o_proj": """
            diffusion_model.llm_adapter.blocks.5.cross_attn.o_proj
            lora_unet_llm_adapter_blocks_5_cross_attn_o_proj
            text_conditioner.blocks.5.cross_attn.o_proj""",
        "text_encoder.layers.27.self_attn.q_proj": """
            lora_te_layers_27_self_attn_q_proj text_encoders.qwen3_06b.transformer.model.layers.27.self_attn.q_proj""",
        "transformer.transformer_blocks.0.norm3.linear_2": "diffusion_model.blocks.0.adaln_modulation_mlp.2",
    },
    "lumina2": {
        "transformer.layers.25.feed_forward.linear_1": "lora_unet_layers_25_feed_forward_w1",
        "transformer.noise_refiner.0.norm1.linear": "diffusion_model.noise_refiner.0.adaLN_modulation.1",
    },
    "pixart": {
        "transformer.transformer_blocks.27.attn2.to_q": """
            diffusion_model.blocks.27.cross_attn.q_linear
            lora_transformer_transformer_blocks_27_attn2_to_q
            base_model.model.transformer_blocks.27.attn2.to_q
            transformer.transformer_blocks.27.attn2.to_q""",
    },
    "auraflow": {
        "transformer.joint_transformer_blocks.3.attn.add_q_proj": "diffusion_model.double_layers.3.attn.w1q",
        "transformer.single_transformer_blocks.31.attn.to_q": "diffusion_model.single_layers.31.attn.w1q",
    },
    "hidream": {
        "transformer.double_stream_blocks.15.block.ff_i.experts.3.w1": """
            diffusion_model.double_stream_blocks.15.block.ff_i.experts.3.w1
            lycoris_double_stream_blocks_15_block_ff_i_experts_3_w1
            lora_unet_double_stream_blocks_15_block_ff_i_experts_3_w1""",
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
    wide = FAMILIES["lumina2"].find("lora_unet_layers_3_attention_qkv")
    assert [(m.path, m.rows_of(3840)) for m in wide] == [
        ("layers.3.attn.to_q", (0, 2304)),
        ("layers.3.attn.to_k", (2304, 3072)),
        ("layers.3.attn.to_v", (3072, 3840)),
    ]
    added = [f"transformer.transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]
    assert [m.name for m in family.find("double_blocks.0.processor.qkv_lora2")] == added


def test_names_of_nothing() -> None:
    xl = FAMILIES["sdxl"]
    assert xl.find("base_model.model.text_model.encoder.layers.0.mlp.fc1") == ()  # of which text encoder?
    assert xl.find("lora_unet_input_blocks_11_0_in_layers_2") == ()
    assert FAMILIES["sd15"].find("transformer.conv_in") == FAMILIES["flux"].find("unet.x_embedder") == ()
    assert FAMILIES["wan"].find("diffusion_model.blocks.40.self_attn.q") == ()  # there are 40
    assert FAMILIES["wan"].find("diffusion_model.blocks.self_attn.q") == ()
    assert FAMILIES["sd15"].find("") == FAMILIES["sd15"].find("lora_unet_") == ()


def test_swaps_where_the_original_has_the_halves_in_the_other_order() -> None:
    family, sd3 = FAMILIES["flux"], FAMILIES["sd3"]
    assert family.swaps("lora_unet_final_layer_adaLN_modulation_1")
    assert sd3.swaps("diffusion_model.joint_blocks.23.context_block.adaLN_modulation.1")
    assert not sd3.swaps("diffusion_model.joint_blocks.22.context_block.adaLN_modulation.1")
    assert not family.swaps("transformer.norm_out.linear")
    assert not family.swaps("no such module")
    swapped = Counter(family.name for family in FAMILIES.values() for m in family.modules.values() if m.swapped)
    once = dict.fromkeys(("flux", "auraflow", "flux2", "hunyuan-video"), 1)
    assert swapped == {"sd3": 2, "sd35-medium": 2, "sd35-large": 2, **once}


@pytest.mark.parametrize(
    "family, name, style, message",
    [
        ("sd15", "unet.conv_in", "a1111", "style='a1111' was given, 'kohya', 'diffusers', 'ldm'"),
        ("sd15", "unet.conv_inn", "kohya", "no module 'unet.conv_inn'. Did you mean 'unet.conv_in'"),
        ("sd15", "unet.conv_in", "transformer", "the style 'transformer' has no name for 'unet.conv_in'"),
        ("sdxl", "text_encoder_2.text_projection", "peft", "choose another style"),
    ],
)
def test_what_cannot_be_spelled_raises(family: str, name: str, style: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        FAMILIES[family].spell(name, style)


# -- what others read and write ----------------------------------------------------------------------------------------


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
