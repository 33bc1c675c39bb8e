"""Flux.2 dev and klein: Flux2Transformer2DModel.

Source: the class and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, entry, fused, renamed
from peftkit.files.families.transformer import ENCODERS_UNREAD, IMAGE, TEXT, TRAINED_BY_KOHYA, TRANSFORMER


def flux2() -> Iterator[ModuleSpec]:
    """Yield the modules of Flux2Transformer2DModel; klein embeds no guidance."""
    for kind in ("timestep", "guidance"):
        name, original = f"time_guidance_embed.{kind}_embedder.", f"{kind.removesuffix('step')}_in."
        layers = {"linear_1": "in_layer", "linear_2": "out_layer"}
        yield from renamed(layers, name, original, bias=False, optional=kind == "guidance")
    outer = {
        "x_embedder": "img_in",
        "context_embedder": "txt_in",
        "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
        "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
        "single_stream_modulation.linear": "single_stream_modulation.lin",
        "proj_out": "final_layer.linear",
    }
    yield from renamed(outer, bias=False)
    yield entry("norm_out.linear", "final_layer.adaLN_modulation.1", bias=False, swapped=True)
    for ours, theirs in ((IMAGE, "img"), (TEXT, "txt")):
        name, original = "transformer_blocks.{}.", f"double_blocks.{{}}.{theirs}_"
        yield from fused({name + part: 1 for part in ours.qkv}, f"{original}attn.qkv", bias=False)
        for norm, kind in zip(ours.norms, ("query", "key"), strict=True):
            yield entry(name + norm, f"{original}attn.norm.{kind}_norm", bias=False, weight="scale")
        feed = ours.up.partition(".")[0]
        block = {ours.out: "attn.proj", f"{feed}.linear_in": "mlp.0", f"{feed}.linear_out": "mlp.2"}
        yield from renamed(block, name, original, bias=False)
    name, original = "single_transformer_blocks.{}.attn.", "single_blocks.{}."
    yield from renamed({"to_qkv_mlp_proj": "linear1", "to_out": "linear2"}, name, original, bias=False)
    for kind in ("query", "key"):
        yield entry(f"{name}norm_{kind[0]}", f"{original}norm.{kind}_norm", bias=False, weight="scale")


_FLUX2 = Family(
    name="flux2",
    title="Flux.2",
    parts=(
        TRANSFORMER(build=flux2, depths={"transformer_blocks": 8, "single_transformer_blocks": 48}),
        language_encoder("mistral3_24b", 40),
    ),
    reads=TRAINED_BY_KOHYA,
    published="2025-11",
    base_model_version="flux2",
    architecture="flux-2-dev",
    implementation="https://github.com/black-forest-labs/flux2",
    resolution="1024x1024",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_FLUX2,)
