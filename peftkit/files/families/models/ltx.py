"""LTX-Video and LTX-2: LTXVideoTransformer3DModel, and LTX2VideoTransformer3DModel with a stream of sound.

Source: the classes and the single-file loader of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkit.files.families.encoders import ONLY_T5, language_encoder
from peftkit.files.families.family import Family
from peftkit.files.families.module import ModuleSpec, renamed, same
from peftkit.files.families.transformer import ENCODERS_UNREAD, READS, TRANSFORMER

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_NORMS = {"norm_q": "q_norm", "norm_k": "k_norm"}
_BLOCK = "transformer_blocks.{}."


def _modulation(ours: str, theirs: str, *, optional: bool = False) -> Iterator[ModuleSpec]:
    """An AdaLayerNormSingle."""
    layers = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
    yield from renamed({path: path for path in layers}, f"{ours}.", f"{theirs}.", optional=optional)


def _stream(sound: str, attentions: tuple[str, ...]) -> Iterator[ModuleSpec]:
    """The modules of one stream. sound: "audio_" for that of LTX-2, or ""."""
    yield from renamed({f"{sound}proj_in": f"{sound}patchify_proj"})
    yield from same("linear_1", "linear_2", name=f"{sound}caption_projection.", optional=True)
    yield from _modulation(f"{sound}time_embed", f"{sound}adaln_single")
    for attention in attentions:
        yield from same(*_ATTENTION, name=f"{_BLOCK}{attention}.")
        yield from renamed(_NORMS, f"{_BLOCK}{attention}.", f"{_BLOCK}{attention}.", bias=False)
    yield from same("net.0.proj", "net.2", name=f"{_BLOCK}{sound}ff.")
    yield from same(f"{sound}proj_out")


def ltx() -> Iterator[ModuleSpec]:
    """Yield the modules of LTXVideoTransformer3DModel."""
    yield from _stream("", ("attn1", "attn2"))


def ltx2() -> Iterator[ModuleSpec]:
    """Yield the modules of LTX2VideoTransformer3DModel; LTX-2.3 gates its attentions, and modulates the text."""
    for sound, last in (("", "audio_to_video_attn"), ("audio_", "video_to_audio_attn")):
        attentions = (f"{sound}attn1", f"{sound}attn2", last)
        yield from _stream(sound, attentions)
        yield from same(*(f"{attention}.to_gate_logits" for attention in attentions), name=_BLOCK, optional=True)
        yield from _modulation(f"{sound}prompt_adaln", f"{sound}prompt_adaln_single", optional=True)
    for ours, theirs in (
        ("video_scale_shift", "video_scale_shift"),
        ("audio_scale_shift", "audio_scale_shift"),
        ("video_a2v_gate", "a2v_gate"),
        ("audio_v2a_gate", "v2a_gate"),
    ):
        yield from _modulation(f"av_cross_attn_{ours}", f"av_ca_{theirs}_adaln_single")


_LTX = Family(
    name="ltx",
    title="LTX-Video",
    parts=(
        TRANSFORMER(anchor=f"{_BLOCK}attn1.to_q", build=ltx, depths={"transformer_blocks": 48}),
        ONLY_T5(),
    ),
    reads=READS,
    published="2024-11",
    base_model_version="ltx_video",
    architecture="ltx-video",
    implementation="https://github.com/Lightricks/LTX-Video",
    resolution="704x480",
    unread=ENCODERS_UNREAD,
)
_LTX2 = Family(
    name="ltx2",
    title="LTX-2",
    parts=(
        TRANSFORMER(anchor=f"{_BLOCK}audio_attn1.to_q", build=ltx2, depths={"transformer_blocks": 48}),
        language_encoder("gemma3_12b", 48, normed=True, sandwiched=True),
    ),
    reads=READS,
    published="2026-01",
    base_model_version="ltx2",
    architecture="ltx-2",
    implementation="https://github.com/Lightricks/LTX-2",
    resolution="768x512",
    unread=ENCODERS_UNREAD,
)

FAMILIES = (_LTX, _LTX2)
