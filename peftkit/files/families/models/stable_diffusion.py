"""Stable Diffusion 1.5, 2.1 and XL, and Kolors: UNet2DConditionModel; ldm and sgm.

Sources: the classes and the single-file loader of diffusers, the ldm and sgm repositories.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from peftkit.files.families.encoders import CLIP_G, CLIP_H, CLIP_L, open_clip
from peftkit.files.families.family import Family
from peftkit.files.families.module import Component, ModuleSpec, embedder, entry


def _resnet(name: str, original: str, inputs: int, outputs: int, time: int) -> Iterator[ModuleSpec]:
    yield entry(f"{name}.norm1", f"{original}.in_layers.0", inputs)
    yield entry(f"{name}.conv1", f"{original}.in_layers.2", outputs, inputs, 3, 3)
    yield entry(f"{name}.time_emb_proj", f"{original}.emb_layers.1", outputs, time)
    yield entry(f"{name}.norm2", f"{original}.out_layers.0", outputs)
    yield entry(f"{name}.conv2", f"{original}.out_layers.3", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield entry(f"{name}.conv_shortcut", f"{original}.skip_connection", outputs, inputs, 1, 1)


def _attention(name: str, original: str, width: int, depth: int, context: int, linear: bool) -> Iterator[ModuleSpec]:
    """A Transformer2DModel (ldm: SpatialTransformer); inside, both namings agree."""
    project = (width, width) if linear else (width, width, 1, 1)
    block = {
        "norm1": (width,),
        "attn1.to_q": (width, width),
        "attn1.to_k": (width, width),
        "attn1.to_v": (width, width),
        "attn1.to_out.0": (width, width),
        "norm2": (width,),
        "attn2.to_q": (width, width),
        "attn2.to_k": (width, context),
        "attn2.to_v": (width, context),
        "attn2.to_out.0": (width, width),
        "norm3": (width,),
        "ff.net.0.proj": (8 * width, width),
        "ff.net.2": (width, 4 * width),
    }
    yield entry(f"{name}.norm", f"{original}.norm", width)
    yield entry(f"{name}.proj_in", f"{original}.proj_in", *project)
    for i in range(depth):
        for path, shape in block.items():
            inner = f"transformer_blocks.{i}.{path}"
            yield entry(f"{name}.{inner}", f"{original}.{inner}", *shape, bias=path[-4:-1] != "to_")
    yield entry(f"{name}.proj_out", f"{original}.proj_out", *project)


def unet(
    widths: tuple[int, ...], depths: tuple[int, ...], middle: int, context: int, linear: bool, added: int | None = None
) -> Iterator[ModuleSpec]:
    """Yield the modules of UNet2DConditionModel.

    Originals are of ldm's UNetModel, which numbers its blocks through, samplers included.

    widths, depths: channels and transformer blocks per attention of each level. middle: of the mid block.
    context: width of the text. linear: whether proj_in and proj_out are Linear. added: width of SDXL's conditioning.
    """
    last, width, time = len(widths) - 1, widths[0], 4 * widths[0]
    yield from embedder("time_embedding", "time_embed", "0", "2", width, time)
    if added is not None:
        yield from embedder("add_embedding", "label_emb.0", "0", "2", added, time)
    yield entry("conv_in", "input_blocks.0.0", width, 4, 3, 3)

    skips, n = [width], 1
    for level, (outputs, depth) in enumerate(zip(widths, depths, strict=True)):
        block = f"down_blocks.{level}"
        for i in range(2):
            yield from _resnet(f"{block}.resnets.{i}", f"input_blocks.{n}.0", width, outputs, time)
            if depth:
                yield from _attention(f"{block}.attentions.{i}", f"input_blocks.{n}.1", outputs, depth, context, linear)
            width = outputs
            skips.append(width)
            n += 1
        if level < last:
            yield entry(f"{block}.downsamplers.0.conv", f"input_blocks.{n}.0.op", width, width, 3, 3)
            skips.append(width)
            n += 1

    yield from _resnet("mid_block.resnets.0", "middle_block.0", width, width, time)
    yield from _attention("mid_block.attentions.0", "middle_block.1", width, middle, context, linear)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", width, width, time)

    n = 0
    for level, (outputs, depth) in enumerate(zip(reversed(widths), reversed(depths), strict=True)):
        block = f"up_blocks.{level}"
        for i in range(3):
            yield from _resnet(f"{block}.resnets.{i}", f"output_blocks.{n}.0", width + skips.pop(), outputs, time)
            if depth:
                yield from _attention(
                    f"{block}.attentions.{i}", f"output_blocks.{n}.1", outputs, depth, context, linear
                )
            width = outputs
            n += 1
        if level < last:  # comes after the attention, where there is one
            sampler = f"output_blocks.{n - 1}.{2 if depth else 1}.conv"
            yield entry(f"{block}.upsamplers.0.conv", sampler, width, width, 3, 3)
    yield entry("conv_norm_out", "out.0", width)
    yield entry("conv_out", "out.2", 4, width, 3, 3)


UNET = partial(
    Component,
    name="unet",
    original="model.diffusion_model.",
    comfy="diffusion_model",
    webui=("lora_unet", "oft_unet"),
    anchor="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",  # as wide as the text
    unlike="transformer_in.proj_in",  # of the video models I2VGenXL and UNet3DConditionModel
)

#: sd-scripts makes adapters inside the blocks
_UNREAD = {"kohya": ("unet.conv_in", "unet.conv_out", "unet.time_embedding.*", "unet.add_embedding.*")}
_READS = {
    "a1111": ("kohya",),
    "forge": ("kohya", "ldm", "lycoris"),
    "comfyui": ("kohya", "ldm", "lycoris"),
    "kohya": ("kohya",),
    "lycoris": ("lycoris",),
    "diffusers": ("diffusers", "kohya"),
    "peft": ("peft",),
}
_SD15 = Family(
    name="sd15",
    title="Stable Diffusion 1.5",
    parts=(
        UNET(build=partial(unet, (320, 640, 1280, 1280), (1, 1, 1, 0), middle=1, context=768, linear=False)),
        CLIP_L(original="cond_stage_model.transformer.", webui=("lora_te", "lora_te1")),
    ),
    reads=_READS,
    published="2022-10",
    base_model_version="sd_v1",
    architecture="stable-diffusion-v1",
    implementation="diffusers",
    resolution="512x512",
    unread=_UNREAD,
)
_SD2 = Family(
    name="sd2",
    title="Stable Diffusion 2.1",
    parts=(
        UNET(build=partial(unet, (320, 640, 1280, 1280), (1, 1, 1, 0), middle=1, context=1024, linear=True)),
        CLIP_H(),
    ),
    reads=_READS,
    published="2022-12",
    base_model_version="sd_v2_v",
    architecture="stable-diffusion-v2-768-v",
    implementation="diffusers",
    resolution="768x768",
    unread=_UNREAD,
)
_SDXL = Family(
    name="sdxl",
    title="Stable Diffusion XL",
    parts=(
        UNET(
            build=partial(unet, (320, 640, 1280), (0, 2, 10), middle=10, context=2048, linear=True, added=2816),
            webui_ldm=True,
        ),
        CLIP_L(original="conditioner.embedders.0.transformer."),
        CLIP_G(original="conditioner.embedders.1.model.", build=partial(open_clip, 1280, projected=True)),
    ),
    reads=_READS,
    published="2023-07",
    base_model_version="sdxl_base_v1-0",
    architecture="stable-diffusion-xl-v1-base",
    implementation="https://github.com/Stability-AI/generative-models",
    resolution="1024x1024",
    unread=_UNREAD,
)


def _kolors() -> Iterator[ModuleSpec]:
    """SDXL's U-Net, which ChatGLM's states enter through a layer."""
    yield from unet((320, 640, 1280), (0, 2, 10), middle=10, context=2048, linear=True, added=5632)
    yield entry("encoder_hid_proj", "encoder_hid_proj", 2048, 4096)


_KOLORS = Family(
    name="kolors",
    title="Kolors",
    parts=(UNET(build=_kolors, webui_ldm=True),),
    reads={program: _READS[program] for program in ("kohya", "lycoris", "diffusers", "peft")},
    published="2024-07",
    base_model_version="kolors",
    architecture="kolors",
    implementation="https://github.com/Kwai-Kolors/Kolors",
    resolution="1024x1024",
    unread=_UNREAD,
)

FAMILIES = (_SD15, _SD2, _SDXL, _KOLORS)
