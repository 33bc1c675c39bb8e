"""The weights of the model families: each module's name and shape, and its place in the published checkpoint.

Names are those of diffusers and transformers, and of the checkpoint that the model was published in.

A generator states the structure of one network once, in both namings side by side; loops do the counting. `entry` is
one line of it: the diffusers name, the original name, the shape of the weight.

Sources: the classes and the single-file loader of diffusers, transformers, the ldm, sgm, sd3 and flux repositories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Any, NamedTuple


@dataclass(frozen=True)
class ModuleSpec:
    """One module that has a weight.

    `original` names a tensor of the published checkpoint, suffix included. Rows [start, stop) of it are this weight,
    all of them if they are None; then its two halves are exchanged if `swapped`; or it is transposed, if `transposed`.
    The bias follows, except that it is never transposed.
    """

    name: str  # "<component>.<path in the diffusers or transformers class>"
    shape: tuple[int, ...]
    bias: bool
    original: str
    original_bias: str | None
    start: int | None = None
    stop: int | None = None
    swapped: bool = False  # diffusers has (scale, shift) where the original has (shift, scale)
    transposed: bool = False  # a bare parameter that is multiplied from the right

    @property
    def path(self) -> str:
        """The name inside its component."""
        return self.name.partition(".")[2]


@dataclass(frozen=True, eq=False)
class Component:
    """One network of a pipeline, and what its names begin with in the files that hold it."""

    name: str  # as in a diffusers pipeline
    original: str  # what its keys begin with in the published checkpoint
    comfy: str  # what its modules begin with in ComfyUI's own dotted spelling
    webui: tuple[str, ...]  # what its modules begin with in underscored spellings, the one to write first
    anchor: str  # a path: this weight's shape tells the network from others of the same class
    build: Callable[[], Iterator[ModuleSpec]]  # with names relative to the component
    webui_ldm: bool = False  # sd-scripts trains the original network, and the first of `webui` goes with its paths

    @property
    def denoiser(self) -> bool:
        """Whether it is the network that denoises."""
        return self.name in ("unet", "transformer")

    @cached_property
    def modules(self) -> Mapping[str, ModuleSpec]:
        """Path -> module."""

        def placed(module: ModuleSpec) -> ModuleSpec:
            bias = None if module.original_bias is None else self.original + module.original_bias
            return replace(
                module, name=f"{self.name}.{module.name}", original=self.original + module.original, original_bias=bias
            )

        return MappingProxyType({module.name: placed(module) for module in self.build()})

    def ldm(self, module: ModuleSpec) -> str:
        """Return the path in the original naming, as adapter files spell it; transformers' for text encoders."""
        return module.original.removeprefix(self.original).rpartition(".")[0] if self.denoiser else module.path


def entry(name: str, original: str, *shape: int, bias: bool = True, weight: str = "weight", **rows: Any) -> ModuleSpec:
    """Return one module by its diffusers name, its original name and its shape. rows: start, stop, swapped."""
    return ModuleSpec(name, shape, bias, f"{original}.{weight}", f"{original}.bias" if bias else None, **rows)


def _fused(parts: Mapping[str, int], original: str, columns: int) -> Iterator[ModuleSpec]:
    """The modules whose rows lie one after another in one original Linear. parts: name -> its rows."""
    start = 0
    for name, rows in parts.items():
        yield entry(name, original, rows, columns, start=start, stop=start + rows)
        start += rows


def _embedder(name: str, original: str, first: str, second: str, inputs: int, width: int) -> Iterator[ModuleSpec]:
    yield entry(f"{name}.linear_1", f"{original}.{first}", width, inputs)
    yield entry(f"{name}.linear_2", f"{original}.{second}", width, width)


# ----------------------------------------------------------------------------------------------- U-Net: SD 1, 2 and XL


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
    yield from _embedder("time_embedding", "time_embed", "0", "2", width, time)
    if added is not None:
        yield from _embedder("add_embedding", "label_emb.0", "0", "2", added, time)
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


# ------------------------------------------------------------------------------------- transformers: SD 3, SD 3.5, Flux


class _Stream(NamedTuple):
    """What diffusers calls the parts of the image or of the text half of a joint block."""

    modulation: str
    qkv: tuple[str, str, str]
    norms: tuple[str, str]
    out: str
    up: str
    down: str


_IMAGE = _Stream(
    modulation="norm1.linear",
    qkv=("attn.to_q", "attn.to_k", "attn.to_v"),
    norms=("attn.norm_q", "attn.norm_k"),
    out="attn.to_out.0",
    up="ff.net.0.proj",
    down="ff.net.2",
)
_TEXT = _Stream(
    modulation="norm1_context.linear",
    qkv=("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    norms=("attn.norm_added_q", "attn.norm_added_k"),
    out="attn.to_add_out",
    up="ff_context.net.0.proj",
    down="ff_context.net.2",
)


def flux(guidance: bool = True) -> Iterator[ModuleSpec]:
    """Yield the modules of FluxTransformer2DModel. guidance: whether it is embedded, as not in schnell."""
    width, head = 3072, 128
    embedders = {"timestep": ("time_in", 256), "guidance": ("guidance_in", 256), "text": ("vector_in", 768)}
    for kind, (original, inputs) in embedders.items():
        if guidance or kind != "guidance":
            name = f"time_text_embed.{kind}_embedder"
            yield from _embedder(name, original, "in_layer", "out_layer", inputs, width)
    yield entry("context_embedder", "txt_in", width, 4096)
    yield entry("x_embedder", "img_in", width, 64)
    for i in range(19):
        for ours, theirs in ((_IMAGE, "img"), (_TEXT, "txt")):
            name, original = f"transformer_blocks.{i}", f"double_blocks.{i}.{theirs}"
            yield entry(f"{name}.{ours.modulation}", f"{original}_mod.lin", 6 * width, width)
            for norm, kind in zip(ours.norms, ("query", "key"), strict=True):
                norm_original = f"{original}_attn.norm.{kind}_norm"
                yield entry(f"{name}.{norm}", norm_original, head, bias=False, weight="scale")
            yield from _fused({f"{name}.{part}": width for part in ours.qkv}, f"{original}_attn.qkv", width)
            yield entry(f"{name}.{ours.out}", f"{original}_attn.proj", width, width)
            yield entry(f"{name}.{ours.up}", f"{original}_mlp.0", 4 * width, width)
            yield entry(f"{name}.{ours.down}", f"{original}_mlp.2", width, 4 * width)
    for i in range(38):
        name, original = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        yield entry(f"{name}.norm.linear", f"{original}.modulation.lin", 3 * width, width)
        for kind in ("query", "key"):
            norm_original = f"{original}.norm.{kind}_norm"
            yield entry(f"{name}.attn.norm_{kind[0]}", norm_original, head, bias=False, weight="scale")
        parts = {f"{name}.attn.to_{part}": width for part in "qkv"}
        yield from _fused({**parts, f"{name}.proj_mlp": 4 * width}, f"{original}.linear1", width)
        yield entry(f"{name}.proj_out", f"{original}.linear2", width, 5 * width)
    yield entry("norm_out.linear", "final_layer.adaLN_modulation.1", 2 * width, width, swapped=True)
    yield entry("proj_out", "final_layer.linear", 64, width)


def sd3(depth: int, normed: bool = False, dual: int = 0) -> Iterator[ModuleSpec]:
    """Yield the modules of SD3Transformer2DModel; originals are of MMDiT, which is 64·depth wide.

    normed: whether queries and keys are (SD 3.5). dual: how many blocks have a second attention over the image.
    """
    width, head = 64 * depth, 64

    def attention(name: str, original: str, ours: _Stream, layer: str, out: bool = True) -> Iterator[ModuleSpec]:
        def path(part: str) -> str:
            return f"{name}.{part.replace('attn.', f'{layer}.')}"

        yield from _fused({path(part): width for part in ours.qkv}, f"{original}.{layer}.qkv", width)
        if normed:
            for norm, kind in zip(ours.norms, "qk", strict=True):
                yield entry(path(norm), f"{original}.{layer}.ln_{kind}", head, bias=False)
        if out:
            yield entry(path(ours.out), f"{original}.{layer}.proj", width, width)

    yield entry("pos_embed.proj", "x_embedder.proj", width, 16, 2, 2)
    for kind, original, inputs in (("timestep", "t_embedder", 256), ("text", "y_embedder", 2048)):
        yield from _embedder(f"time_text_embed.{kind}_embedder", f"{original}.mlp", "0", "2", inputs, width)
    yield entry("context_embedder", "context_embedder", width, 4096)
    for i in range(depth):
        for ours, theirs in ((_IMAGE, "x_block"), (_TEXT, "context_block")):
            name, original = f"transformer_blocks.{i}", f"joint_blocks.{i}.{theirs}"
            ends = ours is _TEXT and i == depth - 1  # nothing reads the text after the last attention
            second = ours is _IMAGE and i < dual
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


# ------------------------------------------------------------------------- the networks, but for what differs by family

UNET = partial(
    Component,
    name="unet",
    original="model.diffusion_model.",
    comfy="diffusion_model",
    webui=("lora_unet", "oft_unet"),
    anchor="down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",  # as wide as the text
)
TRANSFORMER = partial(
    Component,
    name="transformer",
    original="model.diffusion_model.",
    comfy="diffusion_model",
    webui=("lora_unet", "lora_transformer", "oft_unet"),
    anchor="transformer_blocks.0.attn.to_q",
    webui_ldm=True,
)
