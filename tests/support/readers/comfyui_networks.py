"""The layers of the newer networks of ComfyUI (comfy/ldm, October 2025 and 2026), and how its key map names them."""

from __future__ import annotations

import re
from collections.abc import Iterator

#: Network -> its modules that have a weight; "blocks[0:40] a b" are blocks.0.a, blocks.0.b, ... blocks.39.b
NETWORKS: dict[str, str] = {
    "wan": """
        face_encoder.conv1_local.conv face_encoder.conv2.conv face_encoder.conv3.conv face_encoder.out_proj
            head.head img_emb.proj.0 img_emb.proj.1 img_emb.proj.3 img_emb.proj.4 patch_embedding
            pose_patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2
            time_projection.1 vace_patch_embedding
        blocks[0:40] cross_attn.k cross_attn.k_img cross_attn.norm_k cross_attn.norm_k_img cross_attn.norm_q
            cross_attn.o cross_attn.q cross_attn.v cross_attn.v_img ffn.0 ffn.2 norm3 self_attn.k
            self_attn.norm_k self_attn.norm_q self_attn.o self_attn.q self_attn.v
        face_adapter.fuser_blocks[0:8] k_norm linear1_kv linear1_q linear2 q_norm
        vace_blocks[0:8] after_proj cross_attn.k cross_attn.norm_k cross_attn.norm_q cross_attn.o cross_attn.q
            cross_attn.v ffn.0 ffn.2 norm3 self_attn.k self_attn.norm_k self_attn.norm_q self_attn.o self_attn.q
            self_attn.v
        vace_blocks[0:1] before_proj""",
    "lumina2": """
        cap_embedder.0 cap_embedder.1 final_layer.adaLN_modulation.1 final_layer.linear norm_final
            t_embedder.mlp.0 t_embedder.mlp.2 x_embedder
        context_refiner[0:2] attention.k_norm attention.out attention.q_norm attention.qkv attention_norm1
            attention_norm2 feed_forward.w1 feed_forward.w2 feed_forward.w3 ffn_norm1 ffn_norm2
        layers[0:26] adaLN_modulation.1 attention.k_norm attention.out attention.q_norm attention.qkv
            attention_norm1 attention_norm2 feed_forward.w1 feed_forward.w2 feed_forward.w3 ffn_norm1 ffn_norm2
        noise_refiner[0:2] adaLN_modulation.1 attention.k_norm attention.out attention.q_norm attention.qkv
            attention_norm1 attention_norm2 feed_forward.w1 feed_forward.w2 feed_forward.w3 ffn_norm1 ffn_norm2""",
    "cosmos": """
        final_layer.adaln_modulation.1 final_layer.adaln_modulation.2 final_layer.linear t_embedder.1.linear_1
            t_embedder.1.linear_2 t_embedding_norm x_embedder.proj.1 llm_adapter.embed llm_adapter.out_proj
        llm_adapter.blocks[0:6] cross_attn.k_proj cross_attn.o_proj cross_attn.q_proj cross_attn.v_proj mlp.0
            mlp.2 self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj
        blocks[0:36] adaln_modulation_cross_attn.1 adaln_modulation_cross_attn.2 adaln_modulation_mlp.1
            adaln_modulation_mlp.2 adaln_modulation_self_attn.1 adaln_modulation_self_attn.2 cross_attn.k_norm
            cross_attn.k_proj cross_attn.output_proj cross_attn.q_norm cross_attn.q_proj cross_attn.v_proj
            mlp.layer1 mlp.layer2 self_attn.k_norm self_attn.k_proj self_attn.output_proj self_attn.q_norm
            self_attn.q_proj self_attn.v_proj""",
    "auraflow": """
        cond_seq_linear final_linear init_x_linear modF.1 t_embedder.mlp.0 t_embedder.mlp.2
        double_layers[0:4] attn.w1k attn.w1o attn.w1q attn.w1v attn.w2k attn.w2o attn.w2q attn.w2v mlpC.c_fc1
            mlpC.c_fc2 mlpC.c_proj mlpX.c_fc1 mlpX.c_fc2 mlpX.c_proj modC.1 modX.1
        single_layers[0:32] attn.w1k attn.w1o attn.w1q attn.w1v mlp.c_fc1 mlp.c_fc2 mlp.c_proj modCX.1""",
    "pixart": """
        ar_embedder.mlp.0 ar_embedder.mlp.2 csize_embedder.mlp.0 csize_embedder.mlp.2 final_layer.linear
            t_block.1 t_embedder.mlp.0 t_embedder.mlp.2 x_embedder.proj y_embedder.y_proj.fc1
            y_embedder.y_proj.fc2
        blocks[0:28] attn.proj attn.qkv cross_attn.kv_linear cross_attn.proj cross_attn.q_linear mlp.fc1 mlp.fc2""",
    "hidream": """
        final_layer.adaLN_modulation.1 final_layer.linear p_embedder.pooled_embedder.linear_1
            p_embedder.pooled_embedder.linear_2 t_embedder.timestep_embedder.linear_1
            t_embedder.timestep_embedder.linear_2 x_embedder.proj
        caption_projection[0:49] linear
        double_stream_blocks[0:16] block.adaLN_modulation.1 block.attn1.k_rms_norm block.attn1.k_rms_norm_t
            block.attn1.q_rms_norm block.attn1.q_rms_norm_t block.attn1.to_k block.attn1.to_k_t
            block.attn1.to_out block.attn1.to_out_t block.attn1.to_q block.attn1.to_q_t block.attn1.to_v
            block.attn1.to_v_t block.ff_i.experts.0.w1 block.ff_i.experts.0.w2 block.ff_i.experts.0.w3
            block.ff_i.experts.1.w1 block.ff_i.experts.1.w2 block.ff_i.experts.1.w3 block.ff_i.experts.2.w1
            block.ff_i.experts.2.w2 block.ff_i.experts.2.w3 block.ff_i.experts.3.w1 block.ff_i.experts.3.w2
            block.ff_i.experts.3.w3 block.ff_i.gate block.ff_i.shared_experts.w1 block.ff_i.shared_experts.w2
            block.ff_i.shared_experts.w3 block.ff_t.w1 block.ff_t.w2 block.ff_t.w3
        single_stream_blocks[0:32] block.adaLN_modulation.1 block.attn1.k_rms_norm block.attn1.q_rms_norm
            block.attn1.to_k block.attn1.to_out block.attn1.to_q block.attn1.to_v block.ff_i.experts.0.w1
            block.ff_i.experts.0.w2 block.ff_i.experts.0.w3 block.ff_i.experts.1.w1 block.ff_i.experts.1.w2
            block.ff_i.experts.1.w3 block.ff_i.experts.2.w1 block.ff_i.experts.2.w2 block.ff_i.experts.2.w3
            block.ff_i.experts.3.w1 block.ff_i.experts.3.w2 block.ff_i.experts.3.w3 block.ff_i.gate
            block.ff_i.shared_experts.w1 block.ff_i.shared_experts.w2 block.ff_i.shared_experts.w3""",
    "ltx": """
        adaln_single.emb.timestep_embedder.linear_1 adaln_single.emb.timestep_embedder.linear_2
            adaln_single.linear caption_projection.linear_1 caption_projection.linear_2 patchify_proj proj_out
        transformer_blocks[0:48] attn1.k_norm attn1.q_norm attn1.to_k attn1.to_out.0 attn1.to_q attn1.to_v
            attn2.k_norm attn2.q_norm attn2.to_k attn2.to_out.0 attn2.to_q attn2.to_v ff.net.0.proj ff.net.2""",
    "hunyuan-video": """
        final_layer.adaLN_modulation.1 final_layer.linear guidance_in.in_layer guidance_in.out_layer img_in.proj
            time_in.in_layer time_in.out_layer txt_in.c_embedder.in_layer txt_in.c_embedder.out_layer
            txt_in.input_embedder txt_in.t_embedder.in_layer txt_in.t_embedder.out_layer vector_in.in_layer
            vector_in.out_layer
        double_blocks[0:20] img_attn.proj img_attn.qkv img_mlp.0 img_mlp.2 img_mod.lin txt_attn.proj
            txt_attn.qkv txt_mlp.0 txt_mlp.2 txt_mod.lin
        single_blocks[0:40] linear1 linear2 modulation.lin
        txt_in.individual_token_refiner.blocks[0:2] adaLN_modulation.1 mlp.0 mlp.2 norm1 norm2 self_attn.proj
            self_attn.qkv""",
    "chroma": """
        distilled_guidance_layer.in_proj distilled_guidance_layer.out_proj final_layer.linear img_in txt_in
        distilled_guidance_layer.layers[0:5] in_layer out_layer
        double_blocks[0:19] img_attn.proj img_attn.qkv img_mlp.0 img_mlp.2 txt_attn.proj txt_attn.qkv txt_mlp.0
            txt_mlp.2
        single_blocks[0:38] linear1 linear2""",
    "qwen-image": """
        img_in norm_out.linear proj_out time_text_embed.timestep_embedder.linear_1
            time_text_embed.timestep_embedder.linear_2 txt_in txt_norm
        transformer_blocks[0:60] attn.add_k_proj attn.add_q_proj attn.add_v_proj attn.norm_added_k
            attn.norm_added_q attn.norm_k attn.norm_q attn.to_add_out attn.to_k attn.to_out.0 attn.to_q
            attn.to_v img_mlp.net.0.proj img_mlp.net.2 img_mod.1 txt_mlp.net.0.proj txt_mlp.net.2 txt_mod.1""",
    "stable-cascade": """
        clf.1 clip_img_mapper clip_txt_mapper clip_txt_pooled_mapper down_downscalers.1.1.blocks.0 embedding.1
            up_upscalers.0.1.blocks.1
        down_blocks.0[0:22:3] channelwise.0 channelwise.4 depthwise
        down_blocks.0[1:23:3] mapper mapper_crp mapper_sca
        down_blocks.0[2:24:3] attention.attn.out_proj attention.attn.to_k attention.attn.to_q
            attention.attn.to_v kv_mapper.1
        down_blocks.1[0:70:3] channelwise.0 channelwise.4 depthwise
        down_blocks.1[1:71:3] mapper mapper_crp mapper_sca
        down_blocks.1[2:72:3] attention.attn.out_proj attention.attn.to_k attention.attn.to_q
            attention.attn.to_v kv_mapper.1
        up_blocks.0[0:70:3] channelwise.0 channelwise.4 depthwise
        up_blocks.0[1:71:3] mapper mapper_crp mapper_sca
        up_blocks.0[2:72:3] attention.attn.out_proj attention.attn.to_k attention.attn.to_q attention.attn.to_v
            kv_mapper.1
        up_blocks.1[0:22:3] channelwise.0 channelwise.4 depthwise
        up_blocks.1[1:23:3] mapper mapper_crp mapper_sca
        up_blocks.1[2:24:3] attention.attn.out_proj attention.attn.to_k attention.attn.to_q attention.attn.to_v
            kv_mapper.1""",
    # ComfyUI of 2026: Z-Image is of Lumina's class, Flux.2 of Flux's, Anima of Cosmos'
    "z-image": """
        cap_embedder.0 cap_embedder.1 final_layer.adaLN_modulation.1 final_layer.linear t_embedder.mlp.0
            t_embedder.mlp.2 x_embedder
        context_refiner[0:2] attention.k_norm attention.out attention.q_norm attention.qkv attention_norm1
            attention_norm2 feed_forward.w1 feed_forward.w2 feed_forward.w3 ffn_norm1 ffn_norm2
        layers[0:30] adaLN_modulation.0 attention.k_norm attention.out attention.q_norm attention.qkv
            attention_norm1 attention_norm2 feed_forward.w1 feed_forward.w2 feed_forward.w3 ffn_norm1 ffn_norm2
        noise_refiner[0:2] adaLN_modulation.0 attention.k_norm attention.out attention.q_norm attention.qkv
            attention_norm1 attention_norm2 feed_forward.w1 feed_forward.w2 feed_forward.w3 ffn_norm1 ffn_norm2""",
    "qwen-image-2.1": """
        img_in modulation.1 norm_out.linear proj_out time_text_embed.timestep_embedder.linear_1
            time_text_embed.timestep_embedder.linear_2 txt_in.in_layer txt_in.out_layer txt_in.text_norm
        transformer_blocks[0:32] attn.norm_k attn.norm_q attn.to_k attn.to_out.0 attn.to_q attn.to_v img_mlp.out
            img_mlp.gate_layer img_mlp.proj""",
    "flux2": """
        double_stream_modulation_img.lin double_stream_modulation_txt.lin final_layer.adaLN_modulation.1
            final_layer.linear guidance_in.in_layer guidance_in.out_layer img_in single_stream_modulation.lin
            time_in.in_layer time_in.out_layer txt_in
        double_blocks[0:8] img_attn.proj img_attn.qkv img_mlp.0 img_mlp.2 txt_attn.proj txt_attn.qkv txt_mlp.0
            txt_mlp.2
        single_blocks[0:48] linear1 linear2""",
}
_BLOCKS = re.compile(r"(.+)\[(\d+):(\d+):?(\d*)\]")
#: Families whose model also answers to the names of SimpleTuner's files (lora.py, `model_lora_keys_unet`)
_SIMPLE_TUNER = ("hidream", "qwen-image", "qwen-image-2.1")


def modules(network: str) -> Iterator[str]:
    """Its paths, without "diffusion_model."."""
    blocks = [""]
    for word in NETWORKS[network].split():
        if found := _BLOCKS.fullmatch(word):
            name, start, stop, step = found.groups()
            blocks = [f"{name}.{i}." for i in range(int(start), int(stop), int(step or 1))]
        else:
            yield from (block + word for block in blocks)


def names(network: str) -> dict[str, str]:
    """The key map: what a file may call each module -> its path."""
    found: dict[str, str] = {}
    for path in modules(network):
        flat = path.replace(".", "_")
        found |= {f"lora_unet_{flat}": path, f"diffusion_model.{path}": path}
        if network == "stable-cascade":
            found[f"lora_prior_unet_{flat}"] = path
        if network in _SIMPLE_TUNER:
            found |= {f"lycoris_{flat}": path, f"transformer.{path}": path}
        if network == "hunyuan-video":
            found |= {f"{prefix}{_official(path)}": path for prefix in ("transformer.", "diffusion_model.")}
    return found


def _official(path: str) -> str:
    """HunyuanVideo's own name of a module."""
    for ours, theirs in {
        "_mod.lin": "_mod.linear",
        "_attn.qkv": "_attn_qkv",
        "_attn.proj": "_attn_proj",
        "mlp.0": "mlp.fc1",
        "mlp.2": "mlp.fc2",
        ".modulation.lin": ".modulation.linear",
    }.items():
        path = re.sub(rf"{re.escape(ours)}$", theirs, path)
    return path
