"""The presets on the real classes of every family, module by module, in their published sizes, without memory."""

from __future__ import annotations

import functools
import importlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

with torch.device("meta"):
    torch.empty(0)  # torch remembers its constructors at the first use: here, before a fixture wraps torch.empty

import peftkit as pk
from peftkit.errors import CoverageWarning, TargetError, TiedWeightsError, UnsupportedLayerError

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore:.*of the weights it stands for:peftkit.errors.CoverageWarning",  # of Mixtral's experts
)

#: module names, a star for every number and {a,b} for either -> how many modules have each
Names = Mapping[str, int]


@dataclass(frozen=True)
class Family:
    """What attn-only selects, what attn-mlp adds to it, what full adds to that, and what full leaves out."""

    make: Callable[[], nn.Module]
    attention: Names
    mlp: Names
    rest: Names
    head: str | None = None


def diffusers(name: str, **config: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module("diffusers"), name)(**config)


def transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        return getattr(library, name)(getattr(library, f"{config}Config")(**options))

    return make


def unet(blocks: Mapping[str, tuple[int, int]], rest: Names, **config: Any) -> Family:
    """blocks: place -> how many attentions it holds, and how many transformer blocks are in them."""
    attention, mlp = {}, {}
    for place, (outer, inner) in blocks.items():
        block = f"{place}.attentions.*.transformer_blocks.*"
        attention[block + ".attn{1,2}.{to_q,to_k,to_v,to_out.*}"] = inner
        mlp |= {block + ".ff.net.{*,*.proj}": inner, place + ".attentions.*.{proj_in,proj_out}": outer}
    always = {
        "conv_{in,out}": 1,
        "time_embedding.linear_{1,2}": 1,
        "mid_block.resnets.*.{conv1,conv2,time_emb_proj}": 2,
    }
    return Family(diffusers("UNet2DConditionModel", **config), attention, mlp, always | rest)


def sd3(dual: int, **config: Any) -> Family:
    block = "transformer_blocks.*"
    attention = {block + ".attn.{to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj,to_out.*}": 24}
    attention |= {block + ".attn.to_add_out": 23} | ({block + ".attn2.{to_q,to_k,to_v,to_out.*}": dual} if dual else {})
    mlp = {block + ".{norm1.linear,norm1_context.linear,ff.net.*,ff.net.*.proj}": 24}
    mlp |= {block + ".ff_context.net.{*,*.proj}": 23}
    rest = {"{pos_embed.proj,context_embedder,norm_out.linear,proj_out}": 1}
    rest |= {"time_text_embed.{timestep,text}_embedder.linear_{1,2}": 1}
    sizes = {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    return Family(diffusers("SD3Transformer2DModel", **sizes, **config), attention, mlp, rest)


def llama(name: str, layers: int, **sizes: Any) -> Family:
    return Family(
        transformers(f"{name}ForCausalLM", name, num_hidden_layers=layers, **sizes),
        {"model.layers.*.self_attn.{q,k,v,o}_proj": layers},
        {"model.layers.*.mlp.{gate,up,down}_proj": layers},
        {},
        "lm_head",
    )


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
CLIP_ATTENTION = "encoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}"

FAMILIES: dict[str, Family] = {
    "SD 1.5": unet(
        {"down_blocks.*": (6, 6), "up_blocks.*": (9, 9), "mid_block": (1, 1)},
        {
            "down_blocks.*.resnets.*.{conv1,conv2,time_emb_proj}": 8,
            "down_blocks.*.resnets.*.conv_shortcut": 2,
            "up_blocks.*.resnets.*.{conv1,conv2,time_emb_proj,conv_shortcut}": 12,
            "{down_blocks.*.downsamplers,up_blocks.*.upsamplers}.*.conv": 3,
        },
        cross_attention_dim=768,
    ),
    "SDXL": unet(
        {"down_blocks.*": (4, 24), "up_blocks.*": (6, 36), "mid_block": (1, 10)},
        {
            "add_embedding.linear_{1,2}": 1,
            "down_blocks.*.resnets.*.{conv1,conv2,time_emb_proj}": 6,
            "down_blocks.*.resnets.*.conv_shortcut": 2,
            "up_blocks.*.resnets.*.{conv1,conv2,time_emb_proj,conv_shortcut}": 9,
            "{down_blocks.*.downsamplers,up_blocks.*.upsamplers}.*.conv": 2,
        },
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    "SD 3": sd3(0, pos_embed_max_size=192),
    "SD 3.5 medium": sd3(13, pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    "Flux": Family(
        diffusers("FluxTransformer2DModel", guidance_embeds=True),
        {
            "transformer_blocks.*.attn.{to_q,to_k,to_v,to_out.*,add_q_proj,add_k_proj,add_v_proj,to_add_out}": 19,
            "single_transformer_blocks.*.attn.{to_q,to_k,to_v}": 38,
        },
        {
            "transformer_blocks.*.{norm1,norm1_context}.linear": 19,
            "transformer_blocks.*.{ff,ff_context}.net.{*,*.proj}": 19,
            "single_transformer_blocks.*.{norm.linear,proj_mlp,proj_out}": 38,
        },
        {
            "time_text_embed.{timestep,guidance,text}_embedder.linear_{1,2}": 1,
            "{context_embedder,x_embedder,norm_out.linear,proj_out}": 1,
        },
    ),
    "PixArt": Family(
        diffusers("PixArtTransformer2DModel", sample_size=128, out_channels=8, use_additional_conditions=False),
        {"transformer_blocks.*.attn{1,2}.{to_q,to_k,to_v,to_out.*}": 28},
        {"transformer_blocks.*.ff.net.{*,*.proj}": 28},
        {"{pos_embed.proj,proj_out,adaln_single.linear}": 1, "adaln_single.emb.timestep_embedder.linear_{1,2}": 1},
    ),
    "Wan": Family(
        diffusers("WanTransformer3DModel", num_attention_heads=12, ffn_dim=8960, num_layers=30),
        {"blocks.*.attn{1,2}.{to_q,to_k,to_v,to_out.*}": 30},
        {"blocks.*.ffn.net.{*,*.proj}": 30},
        {
            "{patch_embedding,proj_out}": 1,
            "condition_embedder.{time_embedder.linear_1,time_embedder.linear_2,time_proj}": 1,
            "condition_embedder.text_embedder.linear_{1,2}": 1,
        },
    ),
    "CLIP L": Family(
        transformers("CLIPTextModel", "CLIPText", hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        {CLIP_ATTENTION: 12},
        {"encoder.layers.*.mlp.{fc1,fc2}": 12},
        {},
    ),
    "CLIP G": Family(
        transformers("CLIPTextModelWithProjection", "CLIPText", hidden_size=1280, num_hidden_layers=32),
        {f"text_model.{CLIP_ATTENTION}": 32},
        {"text_model.encoder.layers.*.mlp.{fc1,fc2}": 32},
        {"text_projection": 1},
    ),
    "T5 XXL encoder": Family(
        transformers("T5EncoderModel", "T5", d_model=4096, d_ff=10240, num_layers=24, feed_forward_proj="gated-gelu"),
        {"encoder.block.*.layer.*.SelfAttention.{q,k,v,o}": 24},
        {"encoder.block.*.layer.*.DenseReluDense.{wi_0,wi_1,wo}": 24},
        {},
    ),
    "T5 small": Family(
        transformers("T5ForConditionalGeneration", "T5"),
        {
            "{encoder,decoder}.block.*.layer.*.SelfAttention.{q,k,v,o}": 6,
            "decoder.block.*.layer.*.EncDecAttention.{q,k,v,o}": 6,
        },
        {"{encoder,decoder}.block.*.layer.*.DenseReluDense.{wi,wo}": 6},
        {},
        "lm_head",
    ),
    "Llama": llama("Llama", 32, intermediate_size=14336, num_key_value_heads=8, vocab_size=128256),
    "Mistral": llama("Mistral", 32, num_key_value_heads=8),
    "Qwen 2.5": llama("Qwen2", 28, hidden_size=3584, intermediate_size=18944, num_attention_heads=28),
    "Qwen 3, tied": llama("Qwen3", 28, hidden_size=1024, intermediate_size=3072, tie_word_embeddings=True),
    "Gemma 2, tied": llama("Gemma2", 2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2),
    "Mixtral": Family(
        transformers("MixtralForCausalLM", "Mixtral", **SMALL, num_key_value_heads=2, num_local_experts=2),
        {"model.layers.*.self_attn.{q,k,v,o}_proj": 2},
        {},
        {},
        "lm_head",
    ),
    "OPT": Family(
        transformers("OPTForCausalLM", "OPT", num_hidden_layers=2, hidden_size=48, word_embed_proj_dim=48),
        {"model.decoder.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}": 2},
        {"model.decoder.layers.*.{fc1,fc2}": 2},
        {},
        "lm_head",
    ),
    "BERT": Family(
        transformers("BertForSequenceClassification", "Bert"),
        {"bert.encoder.layer.*.attention.{self.query,self.key,self.value,output.dense}": 12},
        {"bert.encoder.layer.*.{intermediate,output}.dense": 12},
        {"{bert.pooler.dense,classifier}": 1},
    ),
    "RoBERTa": Family(
        transformers("RobertaForMaskedLM", "Roberta", **SMALL),
        {"roberta.encoder.layer.*.attention.{self.query,self.key,self.value,output.dense}": 2},
        {"roberta.encoder.layer.*.{intermediate,output}.dense": 2},
        {"lm_head.dense": 1},
        "lm_head.decoder",
    ),
    "ViT": Family(
        transformers("ViTForImageClassification", "ViT"),
        {"vit.layers.*.attention.{q,k,v,o}_proj": 12},
        {"vit.layers.*.mlp.{fc1,fc2}": 12},
        {"{vit.embeddings.patch_embeddings.projection,classifier}": 1},
    ),
    "Whisper": Family(
        transformers("WhisperForConditionalGeneration", "Whisper", encoder_layers=2, decoder_layers=2, d_model=48),
        {
            "model.{encoder,decoder}.layers.*.self_attn.{q_proj,k_proj,v_proj,out_proj}": 2,
            "model.decoder.layers.*.encoder_attn.{q_proj,k_proj,v_proj,out_proj}": 2,
        },
        {"model.{encoder,decoder}.layers.*.{fc1,fc2}": 2},
        {"model.encoder.{conv1,conv2}": 1},
        "proj_out",
    ),
}

#: at rank 16: parameters of attn-only, attn-mlp and full
PARAMETERS = {
    "SD 1.5": (3_188_736, 6_782_976, 16_931_456),
    "SDXL": (23_224_320, 42_557_440, 49_412_736),
    "Flux": (26_148_864, 85_917_696, 86_743_040),
    "Llama": (13_631_488, 41_943_040, 41_943_040),
}


@functools.cache
def model_of(family: str) -> nn.Module:
    with torch.device("meta"):
        return FAMILIES[family].make()


def every(pattern: str) -> list[str]:
    """The names that a pattern with {a,b} stands for."""
    parts = re.split(r"\{(.*?)\}", pattern)
    return ["".join(choice) for choice in itertools.product(*(part.split(",") for part in parts))]


def counted(names: Names) -> Counter[str]:
    return Counter({name: count for pattern, count in names.items() for name in every(pattern)})


def found(family: str, preset: str) -> Counter[str]:
    modules = pk.plan(model_of(family), "lora", targets=preset, rank=1).modules
    return Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in modules)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_each_preset_selects(family: str) -> None:
    case = FAMILIES[family]
    attention, mlp, rest = counted(case.attention), counted(case.mlp), counted(case.rest)
    assert found(family, "attn-only") == attention
    assert found(family, "attn-mlp") == attention + mlp
    assert found(family, "full") == attention + mlp + rest


@pytest.mark.parametrize("family", PARAMETERS)
def test_parameters_at_rank_16(family: str) -> None:
    model = model_of(family)
    plans = [pk.plan(model, "lora", targets=preset, rank=16) for preset in ("attn-only", "attn-mlp", "full")]
    assert tuple(plan.parameters for plan in plans) == PARAMETERS[family]


@pytest.mark.parametrize("family", [name for name, case in FAMILIES.items() if case.head])
def test_the_output_head_is_left_out_unless_it_is_named(family: str) -> None:
    model, head = model_of(family), FAMILIES[family].head
    assert head is not None
    plan = pk.plan(model, "lora", rank=1)
    assert "output head" in dict(plan.skipped)[head]
    both = pk.plan(model, "lora", targets=["full", head], rank=1, tied="untie")
    assert set(both.modules) == {*plan.modules, head}
    assert head not in dict(both.skipped)


def test_a_head_that_shares_the_embedding_needs_a_policy_only_where_it_is_named() -> None:
    model = model_of("Qwen 3, tied")
    assert pk.plan(model, "lora", rank=1).parameters
    with pytest.raises(TiedWeightsError, match=r"lm_head shares its weight with model\.embed_tokens\.weight"):
        pk.plan(model, "lora", targets="lm_head", rank=1)


def test_experts_in_one_parameter_are_listed_as_skipped() -> None:
    with pytest.warns(CoverageWarning, match="adapts 20 % .* MixtralExperts"):
        plan = pk.plan(model_of("Mixtral"), "lora", targets="attn-mlp", rank=1)
    assert "model.layers.0.mlp.experts" in dict(plan.skipped)
    assert plan.coverage["MixtralExperts"].adapted == 0


def test_a_preset_that_selects_nothing_says_why() -> None:
    with torch.device("meta"):
        mamba = transformers("MambaForCausalLM", "Mamba", hidden_size=64, num_hidden_layers=1)()
    no_matrix = nn.ModuleDict({"embed": nn.Embedding(4, 8), "norm": nn.LayerNorm(8)})
    with pytest.raises(UnsupportedLayerError, match="embed: it is an embedding"):
        pk.plan(no_matrix, "lora")
    with pytest.raises(TargetError, match=r"matches no layer of the model\. Its layers are named like"):
        pk.plan(mamba, "lora", targets="attn-only")
