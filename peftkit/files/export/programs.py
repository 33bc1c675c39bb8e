"""The programs an adapter can be exported to, and what each of them reads right.

Read from their sources: A1111 1.10.1, Forge of June 2025, ComfyUI 0.28, sd-scripts of February 2026, LyCORIS 4.1.3,
diffusers 0.42, PEFT 0.21, llama.cpp, vLLM and SGLang of October 2026. `reads` has the structures a program rebuilds
exactly; what it lacks is written as something it has, and what it reads wrongly it does not have here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from peftkit.delta import Dense, LowRank
from peftkit.errors import require_choice
from peftkit.files.families.family import Family
from peftkit.geometry import Shape

_ALL = frozenset({0, 1, 2, 3})
_CONVOLUTIONS = frozenset({1, 2, 3})
_TOKENS = "full rows"


@dataclass(frozen=True)
class Limit:
    """Weights for which a program does not read some structures, or gives them another meaning.

    Attributes:
        reason: may name the {structure}, the {dims} of the kernel and the program's {title}.
        structures: the ones the limit is about, None for all.
        exempt: the ones the limit is not about.
        dims: of the kernel, 0 for a Linear.
        grouped: whether the limit is about grouped convolutions only.
    """

    reason: str
    structures: frozenset[str] | None = None
    exempt: frozenset[str] = frozenset()
    dims: frozenset[int] = _ALL
    grouped: bool = False

    def holds(self, structure: str, shape: Shape) -> bool:
        """Whether the limit is about this structure on a weight of this shape."""
        named = structure not in self.exempt and (self.structures is None or structure in self.structures)
        grouped = shape.groups > 1 and shape.experts == 1
        return named and len(shape.kernel) in self.dims and (grouped or not self.grouped)


@dataclass(frozen=True)
class Target:
    """One program: what it reads, on which weights, and under which names.

    Attributes:
        name: the one that `export` takes.
        title: the one for messages.
        reads: the structures it rebuilds exactly.
        decomposes: the (structure, axis) pairs it reads inside a weight decomposition.
        nonlinear: the structures whose law of strength is not W + λ·ΔW there.
        tucker: the structures it reads with Tucker cores.
        limits: weights on which it does not read what it reads elsewhere.
        encoder_style: another style than the denoiser's that is read of text encoders, None where there is none.
        kohya_metadata: whether a file says what it is in the entries of sd-scripts.
        generic: what comes before the path of a module of any other model, None where only known models load.
        any_model: whether it loads on any one model by its own paths, which it then does for known models too.
        flat: whether those paths have underscores for dots.
        folder: whether it reads a folder with a configuration, and not a file.
        suffix: how its files are called.
        configured: whether names and rows in its files depend on the model's configuration.
        special: the layers it adapts beside Linears and convolutions: "embeddings", "experts" in one parameter, and
            "conv1d", which keeps its weight as (in, out).
        beside: whether its folder has a place for parameters that trained beside the adapters.
        served: whether it serves models with adapters of one rank for all modules, which a list names.
        modules: the last names of modules that it adapts, None for any.
        companions: by the last name of a module, those beside it without whose adapters it does not read that one's.
        most_ranks: the largest rank it has room for, None for any.
        peft_names: whether low-rank tensors have PEFT's names, without tensors of alpha.
        builds_lokr: whether D of a LoKr is expected whole from half its rank up, whatever the kernel.
        infers_sizes: whether it makes a module with sizes inferred from the tensors, and fails where its own differ.
        all_decomposed: whether one module with magnitudes makes it expect them of all.
        encoder_magnitudes: whether it keeps the magnitudes of text encoders.
        encoder_marks: what some name of a text encoder must contain for the program to recognise the encoder, by the
            format of the file, "" for any other format.
        text_projection: whether it reads an adapter of a text encoder's projection.
        whole_attentions: whether it applies an OpenCLIP attention only with all of its projections.
        t5: whether it loads adapters of T5.
        roots: whether it adapts a layer that is the whole model.
        vectors: whether it applies changes of biases and norms.
        norms: whether such changes are written for it, by the paths of any model.
        unturned: the structures it computes in the row order of the original network, on layers whose halves change
            places, though the file has them in the order of diffusers.
    """

    name: str
    title: str
    reads: frozenset[str]
    decomposes: frozenset[tuple[str, str]] = frozenset()
    nonlinear: frozenset[str] = frozenset()
    tucker: frozenset[str] = frozenset()
    limits: tuple[Limit, ...] = ()
    encoder_style: str | None = None
    kohya_metadata: bool = True
    generic: str | None = None
    any_model: bool = False
    flat: bool = False
    folder: bool = False
    suffix: str = ".safetensors"
    configured: bool = False
    special: frozenset[str] = frozenset()
    beside: bool = False
    served: bool = False
    modules: frozenset[str] | None = None
    companions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    most_ranks: int | None = None
    peft_names: bool = False
    builds_lokr: bool = False
    infers_sizes: bool = False
    all_decomposed: bool = False
    encoder_magnitudes: bool = True
    encoder_marks: Mapping[str, str] = field(default_factory=dict)
    text_projection: bool = True
    whole_attentions: bool = False
    t5: bool = True
    roots: bool = False
    vectors: bool = False
    norms: bool = False
    unturned: frozenset[str] = frozenset()

    def is_dense(self, shape: Shape) -> bool:
        """Whether it reads a whole ΔW of a weight of this shape."""
        return Dense.structure in self.reads and not self.refusal(Dense.structure, shape)

    def on(self, *, embedding: bool = False, swapped: bool = False) -> Target:
        """Return what it reads on some layers.

        Args:
            embedding: of embeddings, LoRA with magnitudes per column of W (V, d), and trained tokens.
            swapped: of layers whose halves are in the other order in the original network, all but `unturned`.
        """
        if swapped and self.unturned:
            return replace(self, limits=(*self.limits, Limit(_UNTURNED, structures=self.unturned))).on()
        if not embedding:
            return replace(self, reads=self.reads - {_TOKENS}) if _TOKENS in self.reads else self
        lora = LowRank.structure
        own = frozenset({(lora, "in")} if self.decomposes else ())
        return replace(self, reads=self.reads & {lora, _TOKENS}, decomposes=own)

    def refusal(self, structure: str, shape: Shape) -> str:
        """Return why it would not read this structure on a weight of this shape, "" where it does."""
        found = next((limit.reason for limit in self.limits if limit.holds(structure, shape)), "")
        return found.format(structure=structure, dims=len(shape.kernel), title=self.title)


_WEBUI = frozenset({"lora", "loha", "lokr", "full"})
_IN = frozenset({("lora", "in"), ("loha", "in"), ("lokr", "in")})
_OUT = frozenset({("lora", "out"), ("loha", "out"), ("lokr", "out")})
_TUCKER = frozenset({"lora", "loha"})

_UNTURNED = "{title} has the two halves of this layer in the other order, in which it computes {structure}"
_GROUPED = "{title} gives the adapter of a grouped convolution another meaning"
_PEFT_FAILS = "PEFT fails on {structure} of a {dims}-dimensional convolution"
#: kinds for which PEFT has no strength
_PEFT_UNSCALED = frozenset({"miss", "vera", "randlora", "fourierft", "vb-lora", "tiny-lora"})
#: made from the weight's own shape, so that groups change nothing
_PEFT_BY_SHAPE = frozenset({"loha", "lokr"})

_A1111 = Target(
    "a1111",
    "A1111",
    _WEBUI | {"oft", "oft rescaled", "boft", "ia3", "glora old"},
    _IN,
    tucker=_WEBUI - {"full"},
    limits=(
        Limit(
            "A1111 drops the whole file at a {dims}-dimensional convolution",
            structures=frozenset({"lora"}),
            dims=frozenset({1, 3}),
        ),
        Limit("A1111 fails on (IA)³ of a convolution's outputs", structures=frozenset({"ia3"}), dims=_CONVOLUTIONS),
        Limit("A1111 fails on GLoRA of a convolution", structures=frozenset({"glora"}), dims=_CONVOLUTIONS),
    ),
    text_projection=False,
    whole_attentions=True,
)
_FORGE = Target(
    "forge",
    "Forge",
    _WEBUI | {"glora"},
    _IN,
    tucker=_TUCKER,
    # it adds a whole ΔW as it is, and GLoRA is of the weight
    unturned=frozenset({"full", "glora"}),
    vectors=True,
)
_COMFYUI = Target(
    "comfyui",
    "ComfyUI",
    _WEBUI | {"oft", "boft", "glora"},
    _IN,
    nonlinear=frozenset({"oft", "boft"}),
    tucker=_TUCKER,
    unturned=frozenset({"oft", "boft", "glora"}),
    encoder_style="ldm",
    generic="diffusion_model.",
    vectors=True,
)
_KOHYA = Target(
    "kohya",
    "sd-scripts",
    frozenset({"lora"}),
    limits=(
        Limit("sd-scripts has no adapters of {dims}-dimensional convolutions", dims=frozenset({1, 3})),
        Limit(_GROUPED, grouped=True),
    ),
    text_projection=False,
)
_LYCORIS = Target(
    "lycoris",
    "LyCORIS",
    _WEBUI | {"oft", "oft rescaled", "boft", "glora"},
    _OUT,
    nonlinear=frozenset({"oft rescaled", "boft", "dora"}),
    tucker=_TUCKER,
    limits=(Limit("LyCORIS fails on GLoRA of a grouped convolution", structures=frozenset({"glora"}), grouped=True),),
    kohya_metadata=False,
    generic="lycoris_",
    any_model=True,
    flat=True,
    builds_lokr=True,
    infers_sizes=True,
    roots=True,
    norms=True,
)
_DIFFUSERS = Target(
    "diffusers",
    "diffusers",
    frozenset({"lora"}),
    frozenset({("lora", "out")}),
    nonlinear=frozenset({"dora"}),
    limits=(Limit(_GROUPED, grouped=True),),
    kohya_metadata=False,
    encoder_style="kohya",
    peft_names=True,
    all_decomposed=True,
    encoder_magnitudes=False,
    # it knows the attention by its path in its own names, and by its output in kohya's
    encoder_marks={"diffusers": "attn", "": "self_attn.out_proj"},
    text_projection=False,
    t5=False,
)
_PEFT = Target(
    "peft",
    "PEFT",
    frozenset({"lora", "loha", "lokr", "oft in", "svdlora", *_PEFT_UNSCALED, _TOKENS}),
    frozenset({("lora", "out")}),
    nonlinear=frozenset({"dora", "oft in"}) | _PEFT_UNSCALED,
    tucker=_TUCKER,
    limits=(
        Limit(_PEFT_FAILS, structures=_PEFT_BY_SHAPE, dims=frozenset({3})),
        Limit(_PEFT_FAILS, structures=frozenset({"lokr"}), dims=frozenset({1})),
        Limit(_GROUPED, exempt=_PEFT_BY_SHAPE, grouped=True),
    ),
    kohya_metadata=False,
    generic="base_model.model.",
    any_model=True,
    folder=True,
    special=frozenset({"embeddings", "experts", "conv1d"}),
    beside=True,
    peft_names=True,
    builds_lokr=True,
)
_NO_CONVOLUTIONS = (Limit("{title} adapts no convolutions", dims=_CONVOLUTIONS),)
_LLAMA_CPP = Target(
    "llama.cpp",
    "llama.cpp",
    frozenset({"lora"}),
    limits=_NO_CONVOLUTIONS,
    kohya_metadata=False,
    generic="",
    any_model=True,
    suffix=".gguf",
    configured=True,
    special=frozenset({"embeddings", "conv1d"}),
    peft_names=True,
)
_VLLM = replace(
    _PEFT,
    name="vllm",
    title="vLLM",
    reads=frozenset({"lora"}),
    decomposes=frozenset(),
    nonlinear=frozenset(),
    tucker=frozenset(),
    limits=_NO_CONVOLUTIONS,
    special=frozenset(),
    beside=False,
    served=True,
    most_ranks=512,
)
_SGLANG = replace(
    _VLLM,
    name="sglang",
    title="SGLang",
    # it puts those together that its models have as one layer, beginning with queries
    modules=frozenset(
        {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"}
    ),
    companions={
        "q_proj": ("v_proj",),
        "k_proj": ("q_proj", "v_proj"),
        "v_proj": ("q_proj",),
        "up_proj": ("gate_proj",),
    },
    most_ranks=None,
)

_DIFFUSION = (_A1111, _FORGE, _COMFYUI, _KOHYA, _LYCORIS, _DIFFUSERS, _PEFT)
_LANGUAGE = (_LLAMA_CPP, _VLLM, _SGLANG)
#: what `export` takes, by name
TARGETS: Mapping[str, Target] = MappingProxyType({program.name: program for program in (*_DIFFUSION, *_LANGUAGE)})


def styles_read(target: Target, family: Family, component: str) -> frozenset[str]:
    """Return the styles of module names that a program looks for.

    Args:
        target: the program.
        family: of the model.
        component: the one whose names are asked for.
    """
    styles = family.reads.get(target.name, ())
    if not styles or component == family.components[0]:
        return frozenset(styles)
    return frozenset({styles[0], target.encoder_style or styles[0]})


def get(name: str) -> Target:
    """Return the program of that name. Raises OptionError for a name there is no program of."""
    require_choice("target", name, TARGETS)
    return TARGETS[name]
