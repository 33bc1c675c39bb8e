"""Flux.1 dev and schnell, Kontext, Fill and Krea: FluxTransformer2DModel.

Sources: the class and the single-file loader of diffusers, the flux repository.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from peftkit.files.families.encoders import CLIP_L, T5
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, embedder, entry, fused
from peftkit.files.families.transformer import IMAGE, TEXT, TRANSFORMER

#: a list of blocks -> how many dev and schnell have
DEPTHS: Mapping[str, int] = {"transformer_blocks": 19, "single_transformer_blocks": 38}
_WIDTH, _HEAD = 3072, 128


def joint_blocks() -> Iterator[ModuleSpec]:
    """Yield the modules of a block with a stream of the image and one of the text."""
    for ours, theirs in ((IMAGE, "img"), (TEXT, "txt")):
        name, original = "transformer_blocks.{}", f"double_blocks.{{}}.{theirs}"
        yield entry(f"{name}.{ours.modulation}", f"{original}_mod.lin", 6 * _WIDTH, _WIDTH)
        for norm, kind in zip(ours.norms, ("query", "key"), strict=True):
            norm_original = f"{original}_attn.norm.{kind}_norm"
            yield entry(f"{name}.{norm}", norm_original, _HEAD, bias=False, weight="scale")
        yield from fused({f"{name}.{part}": _WIDTH for part in ours.qkv}, f"{original}_attn.qkv", _WIDTH)
        yield entry(f"{name}.{ours.out}", f"{original}_attn.proj", _WIDTH, _WIDTH)
        yield entry(f"{name}.{ours.up}", f"{original}_mlp.0", 4 * _WIDTH, _WIDTH)
        yield entry(f"{name}.{ours.down}", f"{original}_mlp.2", _WIDTH, 4 * _WIDTH)


def single_blocks() -> Iterator[ModuleSpec]:
    """Yield the modules of a block with one stream."""
    name, original = "single_transformer_blocks.{}", "single_blocks.{}"
    yield entry(f"{name}.norm.linear", f"{original}.modulation.lin", 3 * _WIDTH, _WIDTH)
    for kind in ("query", "key"):
        yield entry(f"{name}.attn.norm_{kind[0]}", f"{original}.norm.{kind}_norm", _HEAD, bias=False, weight="scale")
    parts = {f"{name}.attn.to_{part}": _WIDTH for part in "qkv"}
    yield from fused({**parts, f"{name}.proj_mlp": 4 * _WIDTH}, f"{original}.linear1", _WIDTH)
    yield entry(f"{name}.proj_out", f"{original}.linear2", _WIDTH, 5 * _WIDTH)


def flux() -> Iterator[ModuleSpec]:
    """Yield the modules of FluxTransformer2DModel; schnell embeds no guidance."""
    embedders = {"timestep": ("time_in", 256), "guidance": ("guidance_in", 256), "text": ("vector_in", 768)}
    for kind, (original, inputs) in embedders.items():
        for layer in embedder(f"time_text_embed.{kind}_embedder", original, "in_layer", "out_layer", inputs, _WIDTH):
            yield replace(layer, optional=kind == "guidance")
    yield entry("context_embedder", "txt_in", _WIDTH, 4096)
    yield entry("x_embedder", "img_in", _WIDTH, 64, optional=True)  # Fill and Control have more channels
    yield from joint_blocks()
    yield from single_blocks()
    yield entry("norm_out.linear", "final_layer.adaLN_modulation.1", 2 * _WIDTH, _WIDTH, swapped=True)
    yield entry("proj_out", "final_layer.linear", 64, _WIDTH)


READS = {
    "forge": ("transformer", "kohya", "ldm", "lycoris", "diffusers"),
    "comfyui": ("transformer", "kohya", "ldm", "lycoris", "diffusers"),
    "kohya": ("kohya",),
    "lycoris": ("lycoris",),
    "diffusers": ("diffusers", "kohya", "ldm"),
    "peft": ("peft",),
}
FLUX = Family(
    name="flux",
    title="Flux.1",
    parts=(
        TRANSFORMER(build=flux, depths=DEPTHS),
        CLIP_L(),
        T5(name="text_encoder_2", webui=("lora_te3", "lora_te2")),
    ),
    reads=READS,
    published="2024-08",
    base_model_version="flux1",
    architecture="flux-1-dev",
    implementation="https://github.com/black-forest-labs/flux",
    resolution="1024x1024",
    # sd-scripts makes adapters inside the blocks, and of the first layers
    unread={"kohya": ("transformer.norm_out.linear", "transformer.proj_out")},
)

FAMILIES = (FLUX,)
