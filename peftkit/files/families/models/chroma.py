"""Chroma: ChromaTransformer2DModel, Flux.1 whose modulations one guidance network makes.

Source: the class and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import T5
from peftkit.files.families.family import Family
from peftkit.files.families.models.flux import DEPTHS, READS, joint_blocks, single_blocks
from peftkit.files.families.module import ModuleSpec, entry, renamed, same
from peftkit.files.families.transformer import TRANSFORMER

_GUIDANCE = "distilled_guidance_layer"


def chroma() -> Iterator[ModuleSpec]:
    """Yield the modules of ChromaTransformer2DModel."""
    yield from same("in_proj", "out_proj", name=f"{_GUIDANCE}.")
    layers = f"{_GUIDANCE}.layers.{{}}."
    yield from renamed({"linear_1": "in_layer", "linear_2": "out_layer"}, layers, layers)
    norms = f"{_GUIDANCE}.norms.{{}}"
    yield entry(norms, norms, bias=False, weight="scale")
    yield from renamed({"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"})
    modulations = ("norm1.linear", "norm1_context.linear", "norm.linear")
    yield from (module for module in joint_blocks() if not module.name.endswith(modulations))
    yield from (module for module in single_blocks() if not module.name.endswith(modulations))


_CHROMA = Family(
    name="chroma",
    title="Chroma",
    parts=(
        TRANSFORMER(build=chroma, depths={**DEPTHS, f"{_GUIDANCE}.layers": 5, f"{_GUIDANCE}.norms": 5}),
        T5(name="text_encoder", webui=("lora_te3", "lora_te2", "lora_te1", "lora_te")),
    ),
    reads={program: styles for program, styles in READS.items() if program != "forge"},
    published="2025-06",
    base_model_version="chroma",
    architecture="chroma",
    implementation="https://github.com/lodestone-rock/flow",
    resolution="1024x1024",
    # which Flux.1 does not have, by whose list of diffusers' names ComfyUI reads these
    unread={f"comfyui {style}": (f"transformer.{_GUIDANCE}.*",) for style in ("transformer", "lycoris", "diffusers")},
)

FAMILIES = (_CHROMA,)
