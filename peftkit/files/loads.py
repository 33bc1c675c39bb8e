"""What each program makes of an adapter file as it is: what it loads, what it skips and why, and at which scale."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from peftkit.adapters import registry
from peftkit.adapters.options import rank_scale
from peftkit.delta import LowRank
from peftkit.errors import ExportError
from peftkit.files.export import programs
from peftkit.files.export.names import require_readable
from peftkit.files.export.programs import Target
from peftkit.files.families.family import Family
from peftkit.files.formats.patch import AdapterFile, Patch


@dataclass(frozen=True)
class _Habits:
    """How a program meets what it does not know, and what it takes for the factor γ.

    fails: whether it drops the whole file at a known module with tensors that it does not know. leftovers: the number
    of tensors without a place from which it drops the file, None where it never does. missing: γ of a module without
    alpha, "one", "commonest" (by the alpha that most of the others have) or "fails". off: whether an alpha of 0 is a
    scale of 0, and not of 1. common: whether attention layers under kohya's names get the commonest alpha.
    """

    fails: bool = False
    leftovers: int | None = None
    missing: str = "one"
    off: bool = True
    common: bool = False


_HABITS: Mapping[str, _Habits] = MappingProxyType(
    {
        "a1111": _Habits(fails=True),
        "forge": _Habits(leftovers=12),
        "kohya": _Habits(off=False),
        "lycoris": _Habits(fails=True, missing="fails", off=False),
        "diffusers": _Habits(fails=True, missing="commonest", common=True),
    }
)
#: the tensors of modules that have no alpha, and the magnitudes, without which a program reads the rest
_WITHOUT_ALPHA, _MAGNITUDES = frozenset({"diff", "on_input"}), frozenset({"dora_scale", "magnitude"})


@dataclass(frozen=True)
class ProgramLoad:
    """What one program makes of a file.

    Attributes:
        loaded: how many adapters it applies as the file means them, but for the scale.
        skipped: reason -> how many it leaves out, or reads as another change.
        refused: why it loads nothing at all, "" where it does.
        scales: the smallest and the largest factor γ it gives what it loads, None where nothing is loaded.
        names_checked: whether the names were compared with those of a model that is known here.
        notes: what is special about the scales.
    """

    loaded: int
    skipped: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""
    scales: tuple[float, float] | None = None
    names_checked: bool = True
    notes: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """Why it does not load the whole file, "" where it does."""
        return self.refused or next(iter(self.skipped), "")

    def __str__(self) -> str:
        if self.refused:
            return f"nothing: {self.refused}"
        total = self.loaded + sum(self.skipped.values())
        said = [f"{self.loaded or 'none'} of {total}" if self.skipped else f"all {total}"]
        if self.scales is not None:
            low, high = self.scales
            said[0] += f" at scale {low:.4g}" + (f" to {high:.4g}" if high != low else "")
        said += [f"{count} skipped: {reason}" for reason, count in self.skipped.items()]
        said += [*self.notes, *([] if self.names_checked else ["names not checked"])]
        return "; ".join(said)


def loads(bundle: AdapterFile, patches: Mapping[str, Patch], family: Family | None) -> dict[str, ProgramLoad]:
    """Say of every program what it makes of a file as it is.

    Args:
        bundle: the file.
        patches: its adapters, which may be without their tensors.
        family: the model's, None where it is not known.

    Returns:
        Program -> what it loads and skips, with the reasons and the scale.
    """
    return {target.name: _of_program(target, bundle, patches, family) for target in programs.TARGETS.values()}


class _Tally:
    """What a program makes of the adapters of a file, one after another."""

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        self.leftovers = 0
        self._examples: dict[str, str] = {}
        self._scales: list[float] = []
        self._notes: dict[str, None] = {}

    def skip(self, reason: str, name: str, leftovers: int) -> None:
        """Count an adapter that is not loaded, and its tensors that the program has no place for."""
        self._examples.setdefault(reason, f"{name!r:.80}")
        self.skipped[reason] += 1
        self.leftovers += leftovers

    def take(self, scale: float, note: str) -> None:
        """Count one that is loaded."""
        self._scales.append(scale)
        self._notes |= {note: None} if note else {}

    def result(self, *, checked: bool) -> ProgramLoad:
        """Return what the program makes of all of them."""
        skipped = {
            f"{why} ({self._examples[why]})" if why in self._examples else why: count
            for why, count in self.skipped.items()
        }
        scales = (min(self._scales), max(self._scales)) if self._scales else None
        return ProgramLoad(len(self._scales), skipped, "", scales, checked, tuple(self._notes))


def _of_program(
    target: Target, bundle: AdapterFile, patches: Mapping[str, Patch], family: Family | None
) -> ProgramLoad:
    habits, tally = _HABITS.get(target.name, _Habits()), _Tally()
    refused = next(_refusals(target, bundle, family), "") or _tallied(tally, target, habits, bundle, patches, family)
    if bundle.vectors and not target.vectors:
        tally.skipped[f"{target.title} leaves out changes of biases and norms, or fails on them"] += len(bundle.vectors)
    if not refused and habits.leftovers is not None and tally.leftovers > habits.leftovers:
        most = f"it drops a file with more than {habits.leftovers} tensors that it has no place for"
        refused = f"{next(iter(tally.skipped))}; {tally.leftovers} tensors are left over, and {most}"
    return ProgramLoad(0, refused=refused) if refused else tally.result(checked=family is not None)


def _tallied(
    tally: _Tally,
    target: Target,
    habits: _Habits,
    bundle: AdapterFile,
    patches: Mapping[str, Patch],
    family: Family | None,
) -> str:
    """Count every adapter. Returns why one of them makes the program drop the file, "" where none does."""
    names = {new: old for old, new in bundle.renamed.items()}
    commonest = _commonest(bundle)
    for name, patch in patches.items():
        own = names.get(name, name)
        roles = bundle.roles.get(own, frozenset())
        reason, found = _reason(target, name, patch, roles, family)
        if reason and found and habits.fails and not reason.startswith(_OTHERWISE):
            return f"{reason}, and it drops a file with a module that it cannot read"
        if reason:
            tally.skip(reason, name, len(roles - {"alpha", "dora_scale"} if found else roles))
            continue
        scale, note = _scale(habits, bundle, own, patch, commonest)
        if scale is None:
            return note
        tally.take(scale, note)
    return ""


def _refusals(target: Target, bundle: AdapterFile, family: Family | None) -> Iterator[str]:
    """All that keeps a program from reading anything of the file, the plainest first."""
    if bundle.format == "native":
        yield "it is this library's own format: export it"
    if target.configured:
        yield f"{target.title} reads *{target.suffix}: export it"
    if target.folder != (bundle.format == "peft"):
        yield "PEFT reads a folder with its configuration, and nobody else does"
    if target.served:
        yield from _unserved(target, bundle)
    if target.folder:
        return
    if family is None and target.generic is None:
        yield f"{target.title} loads adapters of the models it knows"
    if family is not None:
        if family.style(target.name) is None:
            yield f"{target.title} does not load adapters of {family.title}"
        modules = [module for name in bundle.patches for module in family.find(name)]
        try:
            require_readable(modules, target, named=bundle.format)
        except ExportError as error:
            yield str(error)


def _unserved(target: Target, bundle: AdapterFile) -> Iterator[str]:
    """What keeps a server from a folder of PEFT that PEFT itself reads, by the folder's configuration."""
    config = bundle.config
    if config.get("modules_to_save") or bundle.extras or bundle.vectors:
        yield f"{target.title} takes no parameters that trained beside the adapters"
    if config.get("target_parameters"):
        yield f"{target.title} adapts no stacks of experts"
    if any(config.get(name) for name in ("rank_pattern", "alpha_pattern")):
        yield f"{target.title} has one rank and one alpha for all modules: export it"
    if isinstance(config.get("target_modules"), str):
        yield f"{target.title} takes target_modules as a list: export it"
    names = {name.rpartition(".")[2] for name in bundle.patches}
    if target.modules is not None and not names <= target.modules:
        yield f"{target.title} has no adapters of {', '.join(sorted(names - target.modules))}"


#: how a reason begins where the program applies something, and not what the file means
_OTHERWISE = "it reads"


def _reason(target: Target, name: str, patch: Patch, roles: frozenset[str], family: Family | None) -> tuple[str, bool]:
    """Why a program does not load one adapter, "" where it does, and whether it finds the module at all."""
    if not target.folder:
        if not _named_for(target, name, family):
            return "it does not look for such names", False
        if family is not None and not all(family.looked_for(m.name, target.name) for m in family.find(name)):
            return "it makes no adapter of such layers", False
    structure = registry.get(patch.kind).structure(patch.options)
    if not _reads(target, structure):
        if LowRank.structure in target.reads and roles & _MAGNITUDES:
            return f"{_OTHERWISE} {structure} as another change", True
        return f"{target.title} has no {structure}", True
    refusal = target.refusal(structure.split(" ")[0], patch.shape) if patch.kernel_known else ""
    return refusal, True


def _reads(target: Target, structure: str) -> bool:
    """Whether a program reads a structure; its first word is the kind, the others say how: "dora lora out"."""
    kind, *how = structure.split(" ")
    if how == ["tucker"]:
        return kind in target.tucker
    return tuple(how) in target.decomposes or not target.reads.isdisjoint({structure, f"{structure} old"})


def _named_for(target: Target, name: str, family: Family | None) -> bool:
    if family is None:
        return target.generic is not None and name.startswith(target.generic)
    return any(
        family.spelled(module.name, style) == name
        for module in family.find(name)
        for style in programs.styles_read(target, family, module.name.partition(".")[0])
        if family.looked_for(module.name, target.name, style)
    )


def by_outcome(found: Mapping[str, ProgramLoad]) -> list[str]:
    """Return a line for each thing that programs make of a file, with the titles of those that do."""
    lines: dict[str, list[str]] = {}
    for name, load in found.items():
        lines.setdefault(str(load), []).append(programs.TARGETS[name].title)
    if len(lines) == 1 and all(load.refused for load in found.values()):
        return [f"no other program reads it: {next(iter(found.values())).refused}"]
    return [f"{', '.join(titles)}: {said}" for said, titles in lines.items()]


# -- scales ----------------------------------------------------------------------------------------------------------


def _commonest(bundle: AdapterFile) -> float | None:
    """The alpha that most modules of a file have, None without any."""
    counts = Counter(bundle.alphas.values())
    return counts.most_common(1)[0][0] if counts else None


def _scale(
    habits: _Habits, bundle: AdapterFile, name: str, patch: Patch, commonest: float | None
) -> tuple[float | None, str]:
    """The factor γ a program gives an adapter, None where it fails for want of one; and what is special about it."""
    rank = patch.options.get("rank")
    alpha = bundle.alphas.get(name)
    if name not in bundle.roles:  # the scale is in a configuration
        said = patch.options.get("alpha")
        if not isinstance(rank, int) or not isinstance(said, int | float):
            return 1.0, ""
        return rank_scale(patch.kind, rank, said, bool(patch.options.get("rslora"))), ""
    if bundle.roles[name] & _WITHOUT_ALPHA:
        return 1.0, ""
    if alpha is None and habits.missing == "fails":
        return None, f"{name!r:.80} has no alpha, without which it fails"
    if not isinstance(rank, int):
        return 1.0, ""
    if habits.common and commonest is not None and alpha != commonest and (alpha is None or _is_attention(name)):
        which = "modules without an alpha" if alpha is None else "attention layers"
        return commonest / rank, f"{which} get the alpha that most modules have, {commonest:g}"
    if alpha == 0:
        return (
            (0.0, "an alpha of 0 is a scale of 0 there") if habits.off else (1.0, "an alpha of 0 is a scale of 1 there")
        )
    return (1.0 if alpha is None else alpha / rank), "" if alpha is not None else "1 where there is no alpha"


def _is_attention(name: str) -> bool:
    """Whether a name of kohya's is a projection of an attention layer."""
    return name.rpartition(".")[0] == "" and any(f"_{part}" in name for part in ("to_q", "to_k", "to_v", "to_out"))
