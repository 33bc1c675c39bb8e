"""The weights of the text encoders that pipelines have: CLIP in two layouts, and T5. See `families`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from peftkit.files.families.module import Component, ModuleSpec, entry


def clip(width: int, layers: int, projected: bool = False) -> Iterator[ModuleSpec]:
    """CLIPTextModel, or CLIPTextModelWithProjection; originals in these names are the same.

    The level "text_model" is in every published file, and in the class before transformers 5.6.
    """
    layer = {
        **{f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")},
        "layer_norm1": (width,),
        "mlp.fc1": (4 * width, width),
        "mlp.fc2": (width, 4 * width),
        "layer_norm2": (width,),
    }
    paths = {
        "embeddings.token_embedding": (49408, width),
        "embeddings.position_embedding": (77, width),
        **{f"encoder.layers.{i}.{path}": shape for i in range(layers) for path, shape in layer.items()},
        "final_layer_norm": (width,),
    }
    for path, shape in paths.items():
        name = f"text_model.{path}"
        yield entry(name, name, *shape, bias=not path.startswith("embeddings."))
    if projected:
        yield entry("text_projection", "text_projection", width, width, bias=False)


def open_clip(width: int, layers: int, projected: bool = False) -> Iterator[ModuleSpec]:
    """Yield the modules of `clip`, whose originals are an OpenCLIP text transformer's."""
    renamed = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_model.encoder.layers": "transformer.resblocks",
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "text_projection.weight": "text_projection",
    }

    def original(key: str) -> str:
        for ours, theirs in renamed.items():
            key = key.replace(ours, theirs)
        return key

    for module in clip(width, layers, projected):
        block, _, part = module.name.rpartition(".self_attn.")
        if part in ("q_proj", "k_proj", "v_proj"):
            start = "qkv".index(part[0]) * width
            key = f"{original(block)}.attn.in_proj"
            yield replace(
                module, original=f"{key}_weight", original_bias=f"{key}_bias", start=start, stop=start + width
            )
        else:
            bias = module.original_bias and original(module.original_bias)
            transposed = module.name == "text_projection"
            yield replace(module, original=original(module.original), original_bias=bias, transposed=transposed)


def t5(width: int = 4096, hidden: int = 10240, layers: int = 24) -> Iterator[ModuleSpec]:
    """Yield the modules of T5EncoderModel, XXL.

    Its two token embeddings are one tied weight, of which a file may hold either or both.
    """
    paths = {"shared": (32128, width), "encoder.embed_tokens": (32128, width)}
    for i in range(layers):
        block = f"encoder.block.{i}.layer"
        paths |= {f"{block}.0.SelfAttention.{part}": (width, width) for part in "qkvo"}
        if i == 0:
            paths[f"{block}.0.SelfAttention.relative_attention_bias"] = (32, 64)
        paths |= {f"{block}.{j}.layer_norm": (width,) for j in (0, 1)}
        paths |= {f"{block}.1.DenseReluDense.wi_{j}": (hidden, width) for j in (0, 1)}
        paths[f"{block}.1.DenseReluDense.wo"] = (width, hidden)
    for path, shape in {**paths, "encoder.final_layer_norm": (width,)}.items():
        yield entry(path, path, *shape, bias=False)


_POSITIONS = "text_model.embeddings.position_embedding"  # other encoders have the same layers, and other positions


CLIP_L = partial(
    Component,
    name="text_encoder",
    original="text_encoders.clip_l.transformer.",
    comfy="text_encoders.clip_l.transformer",
    webui=("lora_te1", "lora_te"),
    anchor=_POSITIONS,
    build=partial(clip, 768, 12),
)


CLIP_H = partial(
    Component,
    name="text_encoder",
    original="cond_stage_model.model.",
    comfy="text_encoders.clip_h.transformer",
    webui=("lora_te", "lora_te1"),
    anchor=_POSITIONS,
    build=partial(open_clip, 1024, 23),  # the last of its 24 layers is not used
)


CLIP_G = partial(
    Component,
    name="text_encoder_2",
    original="text_encoders.clip_g.transformer.",
    comfy="text_encoders.clip_g.transformer",
    webui=("lora_te2",),
    anchor=_POSITIONS,
    build=partial(clip, 1280, 32, projected=True),
)


T5 = partial(
    Component,
    original="text_encoders.t5xxl.transformer.",
    comfy="text_encoders.t5xxl.transformer",
    anchor="shared",  # UMT5 has another vocabulary
    build=t5,
)
