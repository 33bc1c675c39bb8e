"""Which network a family has, for what programs read of each, and which names they look for."""

from __future__ import annotations

from peftkit.files.export.programs import Target


def network_of(family: str, denoiser: str) -> str:
    """Return the network for `Target.of`: "unet", "flux", or else "sd3".

    Args:
        family: such as "sdxl".
        denoiser: the component of the family that denoises, "unet" or "transformer".
    """
    return denoiser if denoiser == "unet" else "flux" if family.startswith("flux") else "sd3"


def styles_read(target: Target, family: str, denoiser: str, component: str) -> frozenset[str]:
    """Return the styles of module names that a program looks for.

    Args:
        target: the program.
        family: of the model, such as "sdxl".
        denoiser: the component of the family that denoises, "unet" or "transformer".
        component: the one whose names are asked for.
    """
    network = network_of(family, denoiser)
    target = target.of(network)
    own = target.style if denoiser == "unet" else target.transformer_style
    if own is None:
        return frozenset()
    if component != denoiser:
        return frozenset({own, target.encoder_style or own})
    return frozenset({own}) | target.also.get(network, frozenset())
