"""The programs an adapter can be exported to, and what each of them reads right.

Read from their sources: A1111 1.10.1, Forge of June 2025, ComfyUI 0.28, sd-scripts of February 2026, LyCORIS 4.1.3,
diffusers 0.42, PEFT 0.21. `reads` has the structures a program rebuilds exactly; what it lacks is written as something
it has, and what it reads wrongly it does not have here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from peftkit.errors import OptionError, did_you_mean
from peftkit.geometry import Shape


@dataclass(frozen=True)
class Target:
    """One program.

    reads: structures. decomposes: (structure, axis) pairs it reads inside a weight decomposition.
    nonlinear: those whose law of strength is not W + λ·ΔW there. style, transformer_style: how modules of U-Nets and of
    transformers are named (see `names`), None where they are not. generic: what comes before the path of a module of
    any other model, None where only known models load.
    """

    name: str
    title: str
    reads: frozenset[str]
    decomposes: frozenset[tuple[str, str]] = frozenset()
    nonlinear: frozenset[str] = frozenset()
    style: str = "kohya"
    transformer_style: str | None = "kohya"
    generic: str | None = None

    @property
    def dense(self) -> bool:
        return "full" in self.reads

    def refusal(self, structure: str, shape: Shape) -> str | None:
        """Why it would not read this structure on such a weight, or None."""
        spatial = len(shape.kernel)
        if self.name == "a1111" and structure == "lora" and spatial in (1, 3):
            return f"A1111 drops the whole file at a {spatial}-dimensional convolution"
        if self.name == "kohya" and spatial in (1, 3):
            return f"sd-scripts has no adapters of {spatial}-dimensional convolutions"
        if self.name == "peft" and (spatial, structure) in ((3, "loha"), (3, "lokr"), (1, "lokr")):
            return f"PEFT fails on {structure} of a {spatial}-dimensional convolution"
        if structure == "ia3" and spatial and self.name == "a1111":
            return "A1111 fails on (IA)³ of a convolution's outputs"
        if structure == "glora" and spatial and self.name == "a1111":
            return "A1111 fails on GLoRA of a convolution"
        of_outputs = self.name == "peft" and structure in ("loha", "lokr")  # made from the weight's own shape
        if shape.groups > 1 and self.name in ("kohya", "diffusers", "peft") and not of_outputs:
            return f"{self.title} gives the adapter of a grouped convolution another meaning"
        return None


_WEBUI = frozenset({"lora", "loha", "lokr", "full"})
_IN = frozenset({("lora", "in"), ("loha", "in"), ("lokr", "in")})
_OUT = frozenset({("lora", "out"), ("loha", "out"), ("lokr", "out")})

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                "a1111",
                "A1111",
                _WEBUI | {"oft", "oft rescaled", "boft", "ia3", "glora old"},
                _IN,
                transformer_style=None,
            ),
            Target(
                "forge",
                "Forge",
                _WEBUI | {"glora"},
                _IN,
                transformer_style="transformer",
            ),
            Target(
                "comfyui",
                "ComfyUI",
                _WEBUI | {"oft", "boft", "glora"},
                _IN,
                nonlinear=frozenset({"oft", "boft"}),
                transformer_style="transformer",
                generic="diffusion_model.",
            ),
            Target("kohya", "sd-scripts", frozenset({"lora"})),
            Target(
                "lycoris",
                "LyCORIS",
                _WEBUI | {"oft", "oft rescaled", "boft", "glora"},
                _OUT,
                nonlinear=frozenset({"oft rescaled", "boft", "dora"}),
                style="lycoris",
                transformer_style="lycoris",
                generic="lycoris_",
            ),
            Target(
                "diffusers",
                "diffusers",
                frozenset({"lora"}),
                frozenset({("lora", "out")}),
                nonlinear=frozenset({"dora"}),
                style="diffusers",
                transformer_style="diffusers",
            ),
            Target(
                "peft",
                "PEFT",
                frozenset({"lora", "loha", "lokr", "oft in"}),
                frozenset({("lora", "out")}),
                nonlinear=frozenset({"dora", "oft in"}),
                style="peft",
                transformer_style="peft",
                generic="base_model.model.",
            ),
        )
    }
)


#: the spellings of a denoiser that a program reads beside the one written for it: (program, U-Net or family) -> styles
_ALSO: Mapping[tuple[str, str], frozenset[str]] = MappingProxyType(
    {
        ("comfyui", "unet"): frozenset({"ldm", "lycoris"}),
        ("comfyui", "sd3"): frozenset({"kohya", "ldm", "lycoris", "diffusers"}),
        ("comfyui", "flux"): frozenset({"kohya", "ldm", "lycoris", "diffusers"}),
        ("forge", "unet"): frozenset({"ldm", "lycoris"}),
        ("forge", "sd3"): frozenset({"kohya", "ldm"}),
        ("forge", "flux"): frozenset({"kohya", "ldm", "lycoris", "diffusers"}),
        ("diffusers", "unet"): frozenset({"kohya"}),
        ("diffusers", "flux"): frozenset({"kohya", "ldm"}),
    }
)


def styles_read(target: Target, family: str, denoiser: str, component: str) -> frozenset[str]:
    """The spellings of a component's modules that a program looks for. family, denoiser: "sdxl" and "unet", …"""
    own = target.style if denoiser == "unet" else target.transformer_style
    if own is None:
        return frozenset()
    if component != denoiser:
        return frozenset({own, {"comfyui": "ldm", "diffusers": "kohya"}.get(target.name, own)})
    kind = denoiser if denoiser == "unet" else "flux" if family.startswith("flux") else "sd3"
    return frozenset({own}) | _ALSO.get((target.name, kind), frozenset())


def get(name: str) -> Target:
    """The target of that name."""
    if name not in TARGETS:
        hint = did_you_mean(name, TARGETS)
        raise OptionError(f"target={name!r} was given, one of {', '.join(TARGETS)} was expected.{hint}")
    return TARGETS[name]
