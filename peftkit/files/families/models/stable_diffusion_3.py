"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel; MMDiT.

Sources: the class and the single-file loader of diffusers, the sd3 repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from peftkit.files.families.encoders import CLIP_G, CLIP_L, T5, clip
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, embedder, entry, fused
from peftkit.files.families.transformer import IMAGE, TEXT, TRANSFORMER, Stream


def sd3(depth: int, normed: bool = False, dual: int = 0) -> Iterator[ModuleSpec]:
    """Yield the modules of SD3Transformer2DModel; originals are of MMDiT, which is 64·depth wide.

    normed: whether queries and keys are (SD 3.5). dual: how many blocks have a second attention over the image.
    """
    width, head = 64 * depth, 64

    def attention(name: str, original: str, ours: Stream, layer: str, out: bool = True) -> Iterator[ModuleSpec]:
        def path(part: str) -> str:
            return f"{name}.{part.replace('attn.', f'{layer}.')}"

        yield from fused({path(part): width for part in ours.qkv}, f"{original}.{layer}.qkv", width)
        if normed:
            for norm, kind in zip(ours.norms, "qk", strict=True):
                yield entry(path(norm), f"{original}.{layer}.ln_{kind}", head, bias=False)
        if out:
            yield entry(path(ours.out), f"{original}.{layer}.proj", width, width)

    yield entry("pos_embed.proj", "x_embedder.proj", width, 16, 2, 2)
    for kind, original, inputs in (("timestep", "t_embedder", 256), ("text", "y_embedder", 2048)):
        yield from embedder(f"time_text_embed.{kind}_embedder", f"{original}.mlp", "0", "2", inputs, width)
    yield entry("context_embedder", "context_embedder", width, 4096)
    for i in range(depth):
        for ours, theirs in ((IMAGE, "x_block"), (TEXT, "context_block")):
            name, original = f"transformer_blocks.{i}", f"joint_blocks.{i}.{theirs}"
            ends = ours is TEXT and i == depth - 1  # nothing reads the text after the last attention
            second = ours is IMAGE and i < dual
            rows = (2 if ends else 9 if second else 6) * width
            modulation = f"{original}.adaLN_modulation.1"
            yield entry(f"{name}.{ours.modulation}", modulation, rows, width, swapped=ends)
            yield from attention(name, original, ours, "attn", out=not ends)
            if second:
                yield from attention(name, original, ours, "attn2")
            if not ends:
                yield entry(f"{name}.{ours.up}", f"{original}.mlp.fc1", 4 * width, width)
                yield entry(f"{name}.{ours.down}", f"{original}.mlp.fc2", width, 4 * width)
    yield entry("norm_out.linear", "final_layer.adaLN_modulation.1", 2 * width, width, swapped=True)
    yield entry("proj_out", "final_layer.linear", 64, width)


_MMDIT = partial(TRANSFORMER, anchor="transformer_blocks.0.attn.to_q")
_READS = {
    "forge": ("kohya", "ldm"),
    "comfyui": ("transformer", "kohya", "ldm", "lycoris", "diffusers"),
    "kohya": ("kohya",),
    "lycoris": ("lycoris",),
    "diffusers": ("diffusers",),
    "peft": ("peft",),
}
_SD3 = Family(
    name="sd3",
    title="Stable Diffusion 3 Medium",
    parts=(
        _MMDIT(build=partial(sd3, 24)),
        CLIP_L(build=partial(clip, 768, projected=True)),
        CLIP_G(),
        T5(name="text_encoder_3", webui=("lora_te3",)),
    ),
    reads=_READS,
    published="2024-06",
    base_model_version="3-medium",
    architecture="stable-diffusion-3-medium",
    implementation="diffusers",
    resolution="1024x1024",
)
_SD35_MEDIUM = replace(
    _SD3,
    name="sd35-medium",
    title="Stable Diffusion 3.5 Medium",
    parts=(
        _MMDIT(build=partial(sd3, 24, normed=True, dual=13)),
        *_SD3.parts[1:],
    ),
    published="2024-10",
    base_model_version="3-5-medium",
    architecture="stable-diffusion-3.5-medium",
)
_SD35_LARGE = replace(
    _SD3,
    name="sd35-large",
    title="Stable Diffusion 3.5 Large",
    parts=(_MMDIT(build=partial(sd3, 38, normed=True)), *_SD3.parts[1:]),
    published="2024-10",
    base_model_version="3-5-large",
    architecture="stable-diffusion-3.5-large",
)

FAMILIES = (_SD3, _SD35_MEDIUM, _SD35_LARGE)
