"""The scale γ = α/r of modules whose α is a tensor of the file, or is not in it: then the user says it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peftkit.errors import AmbiguousFileError, require_choice, require_option
from peftkit.files.formats.kohya import Modules

#: what trainers call α among a file's metadata; sglang takes the first of these that is there, others take none
ENTRIES = ("lora_alpha", "network_alpha", "alpha", "ss_network_alpha")
#: the tensors one of which a module with a rank has
_RANKED = frozenset({"down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a1"})


@dataclass
class AlphaOptions:
    """What the user says of α: what zero means, and what it is where a file does not say it.

    zero: "off" or "rank". unsaid: a number, or "rank". used: whether a file had a module for `unsaid`.
    """

    zero: str | None = None
    unsaid: float | str | None = None
    used: bool = False

    def __post_init__(self) -> None:
        require_choice("alpha_zero", self.zero, (None, "off", "rank"))
        number = isinstance(self.unsaid, (int, float)) and not isinstance(self.unsaid, bool)
        fits = self.unsaid in (None, "rank") or (number and 0 < float(self.unsaid or 0) < math.inf)
        require_option(fits, "alpha", self.unsaid, "'rank' or a positive, finite number")

    def require_used(self, files: str) -> None:
        """Raise OptionError if the user gave α for files that all say theirs."""
        advice = f" {files} say every scale, or have no module with a rank; pk.rescale changes a scale"
        require_option(self.unsaid is None or self.used, "alpha", self.unsaid, "no alpha", advice)


def unsaid(modules: Modules, elsewhere: Iterable[str]) -> list[str]:
    """Return the modules with a rank for which the file has no α. elsewhere: components whose α is in metadata."""
    known = set(elsewhere)
    return [
        module
        for module, roles in modules.items()
        if "alpha" not in roles and _RANKED & set(roles) and module.partition(".")[0] not in known
    ]


@dataclass(frozen=True)
class AlphaScale:
    """γ by the tensors of α, and by what the user says; as `structures.Scale`.

    alphas: module -> its α. metadata: the file's, in which α may be too, where not all programs look for it.
    """

    alphas: Mapping[str, float]
    options: AlphaOptions
    metadata: Mapping[str, str]

    def __call__(self, module: str, rank: int | None) -> tuple[dict[str, Any], str]:
        """Return the options that make γ, and where they came from in words."""
        alpha, zero = self.alphas.get(module), self.options.zero
        if rank is None:
            return {}, "1: no factor has a rank"
        if alpha is None:
            return self._unsaid(module, rank)
        if alpha == 0 and zero is None:
            raise AmbiguousFileError(
                f"{module}: alpha is 0, which A1111, ComfyUI, Forge and diffusers read as 'off' and kohya and LyCORIS "
                "as 'the rank': say which by alpha_zero='off' or alpha_zero='rank'"
            )
        if alpha == 0 and zero == "rank":
            return {"alpha": None}, "1: alpha is 0, read as the rank"
        return {"alpha": alpha}, f"{alpha / rank:.4g}: alpha {alpha:g} / rank {rank}"

    def _unsaid(self, module: str, rank: int) -> tuple[dict[str, Any], str]:
        given, (entry, alpha) = self.options.unsaid, _entry(self.metadata)
        if given == "rank":
            return {"alpha": None}, "1: alpha is the rank, as the user says"
        if given is not None:
            return {"alpha": float(given)}, f"{float(given) / rank:.4g}: alpha {given:g} / rank {rank}, by the user"
        if entry and alpha != rank:
            raise AmbiguousFileError(
                f"{module}: there is no tensor of alpha, and the metadata say {entry} = {alpha:g} at rank {rank}. That "
                f"is a scale of {alpha / rank:.4g} in sglang, which reads it, and of 1 in kohya and ComfyUI, which do "
                f"not: say which by alpha={alpha:g} or alpha='rank'"
            )
        return {"alpha": None}, "1: there is no alpha"


def _entry(metadata: Mapping[str, str]) -> tuple[str, float]:
    """The entry of the metadata that says α, and what it says; ("", 0) without one that is a number."""
    for entry in ENTRIES:
        try:
            alpha = float(metadata[entry])
        except (KeyError, ValueError):  # "Dynamic" is what a file says whose modules have several
            continue
        if 0 < alpha < math.inf:
            return entry, alpha
    return "", 0.0
