"""The weights of the text encoders that pipelines have: CLIP in two layouts, T5, and language models."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from peftkit.files.families.module import NUMBER, Component, ModuleSpec, entry, same


def clip(width: int, projected: bool = False, positions: int | None = 77) -> Iterator[ModuleSpec]:
    """CLIPTextModel, or CLIPTextModelWithProjection; originals in these names are the same.

    The level "text_model" is in every published file, and in the class before transformers 5.6.
    positions: None for any number.
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
        "embeddings.position_embedding": () if positions is None else (positions, width),
        **{f"encoder.layers.{NUMBER}.{path}": shape for path, shape in layer.items()},
        "final_layer_norm": (width,),
    }
    for path, shape in paths.items():
        name = f"text_model.{path}"
        yield entry(name, name, *shape, bias=not path.startswith("embeddings."))
    if projected:
        yield entry("text_projection", "text_projection", width, width, bias=False)


def open_clip(width: int, projected: bool = False) -> Iterator[ModuleSpec]:
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

    for module in clip(width, projected):
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


def t5(width: int = 4096, hidden: int = 10240, *, sized: bool = True, own_biases: bool = False) -> Iterator[ModuleSpec]:
    """Yield the modules of T5EncoderModel, or of UMT5EncoderModel.

    Its two token embeddings are one tied weight, of which a file may hold either or both.

    width, hidden: of T5 v1.1 XXL. sized: False for any size.
    own_biases: whether every block has a table of relative positions (UMT5), which the first has in any case.
    """
    block, sizes = "encoder.block.{}.layer", {"shared": (32128, width), "encoder.embed_tokens": (32128, width)}
    sizes |= {f"{block}.0.SelfAttention.{part}": (width, width) for part in "qkvo"}
    first = block if own_biases else block.replace(NUMBER, "0")
    sizes[f"{first}.0.SelfAttention.relative_attention_bias"] = (32, 64)
    sizes |= {f"{block}.{i}.layer_norm": (width,) for i in (0, 1)}
    sizes |= {f"{block}.1.DenseReluDense.{into}": (hidden, width) for into in ("wi_0", "wi_1")}
    sizes |= {f"{block}.1.DenseReluDense.wo": (width, hidden), "encoder.final_layer_norm": (width,)}
    for path, shape in sizes.items():
        yield entry(path, path, *(shape if sized else ()), bias=False)


def language(biased: bool = False, normed: bool = False, sandwiched: bool = False) -> Iterator[ModuleSpec]:
    """Yield the modules of a language model of Llama's kind, without its head.

    biased: whether query, key and value have biases (Qwen2). normed: whether query and key are normalised (Qwen3,
    Gemma 3). sandwiched: whether the feed-forward layers are between two norms (Gemma).
    """
    yield from same("embed_tokens", "norm", bias=False)
    block = "layers.{}."
    yield from same("q_proj", "k_proj", "v_proj", name=f"{block}self_attn.", bias=biased)
    yield from same("self_attn.o_proj", name=block, bias=False)
    yield from same(*(("q_norm", "k_norm") if normed else ()), name=f"{block}self_attn.", bias=False)
    yield from same("gate_proj", "up_proj", "down_proj", name=f"{block}mlp.", bias=False)
    yield from same("input_layernorm", "post_attention_layernorm", name=block, bias=False)
    around = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if sandwiched else ()
    yield from same(*around, name=block, bias=False)


_LAYERS = "text_model.encoder.layers"
_POSITIONS = "text_model.embeddings.position_embedding"  # other encoders have the same layers, and other positions


CLIP_L = partial(
    Component,
    name="text_encoder",
    original="text_encoders.clip_l.transformer.",
    comfy="text_encoders.clip_l.transformer",
    webui=("lora_te1", "lora_te"),
    anchor=_POSITIONS,
    build=partial(clip, 768),
    depths={_LAYERS: 12},
)


CLIP_H = partial(
    Component,
    name="text_encoder",
    original="cond_stage_model.model.",
    comfy="text_encoders.clip_h.transformer",
    webui=("lora_te", "lora_te1"),
    anchor=_POSITIONS,
    build=partial(open_clip, 1024),
    depths={_LAYERS: 23},  # the last of its 24 layers is not used
)


CLIP_G = partial(
    Component,
    name="text_encoder_2",
    original="text_encoders.clip_g.transformer.",
    comfy="text_encoders.clip_g.transformer",
    webui=("lora_te2",),
    anchor=_POSITIONS,
    build=partial(clip, 1280, projected=True),
    depths={_LAYERS: 32},
)


T5 = partial(
    Component,
    original="text_encoders.t5xxl.transformer.",
    comfy="text_encoders.t5xxl.transformer",
    anchor="shared",  # UMT5 has another vocabulary
    build=t5,
    depths={"encoder.block": 24},
)

#: A T5 of a pipeline that has no other text encoder
ONLY_T5 = partial(T5, name="text_encoder", webui=("lora_te1", "lora_te"), general=True)


def language_encoder(
    comfy: str,
    layers: int,
    name: str = "text_encoder",
    webui: tuple[str, ...] = ("lora_te", "lora_te1"),
    **options: bool,
) -> Component:
    """Return a pipeline's text encoder that is a language model.

    comfy: its name in ComfyUI. layers: how many it has at most. name, webui: see `Component`. options: see `language`.
    """
    # what transformers' classes have above the layers: with a head, and with an image encoder
    levels = ("model.", "model.language_model.", "language_model.model.")
    return Component(
        name=name,
        original=f"text_encoders.{comfy}.transformer.model.",
        comfy=f"text_encoders.{comfy}.transformer.model",
        webui=webui,
        anchor="layers.{}.self_attn.q_proj",
        build=partial(language, **options),
        depths={"layers": layers},
        prefixes=tuple(f"{name}.{level}" for level in levels),
        general=True,
    )
