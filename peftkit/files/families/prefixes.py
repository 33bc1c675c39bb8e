"""What trainers put before the path of a module, and the usual one of the ways to write it."""

from __future__ import annotations

#: what trainers put before a module's path, where the path itself tells the components apart
FILE_PREFIXES = (
    "",
    "lycoris_",
    "lora_unet_",
    "lora_transformer_",
    "oft_unet_",
    "base_model.model.",
    "diffusion_model.",
    "model.diffusion_model.",
    "transformer.",
    "transformer_2.",
    "unet.",
)
#: other ways to write these, by trainers that few use: Wan-Fun's, Stable Cascade's, the scripts of PixArt, and files
#: that went through a program which took the prefix for part of the path
SPELLED = {
    "lora_unet__": "lora_unet_",
    "lora_prior_unet_": "lora_unet_",
    "unet.base_model.model.": "base_model.model.",
    "transformer.base_model.model.": "base_model.model.",
    "diffusion_model.transformer.": "transformer.",
    "transformer._orig_mod.": "transformer.",
    "unet._orig_mod.": "unet.",
}
#: what torch.compile puts before the module that it compiles
COMPILED = "_orig_mod."
#: the text encoders of a pipeline by the prefixes of their modules in files
TEXT_ENCODERS = {
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
#: the prefixes of names without dots
_FLAT = tuple(prefix for prefix in (*FILE_PREFIXES, *sum(TEXT_ENCODERS.values(), ())) if prefix.endswith("_"))


def usual(name: str) -> str:
    """Return a name as most programs spell it: with a prefix that many know, and without what torch.compile adds.

    Example:
        >>> from peftkit.files.families.prefixes import usual
        >>> usual("lora_unet__blocks_0_q"), usual("lora_unet_blocks_0.attn.q"), usual("transformer._orig_mod.blocks.0")
        ('lora_unet_blocks_0_q', 'lora_unet_blocks_0_attn_q', 'transformer.blocks.0')
    """
    name = name.replace(COMPILED, "")
    for spelled, prefix in SPELLED.items():
        if name.startswith(spelled):
            name = prefix + name.removeprefix(spelled)
            break
    # a path that trainers flatten, of which one kept the dots below the first level
    return name.replace(".", "_") if name.startswith(_FLAT) else name
