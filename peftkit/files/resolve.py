"""Find the weights that the names in an adapter file mean, among those of a model or of a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from peftkit.errors import AmbiguousFileError, did_you_mean
from peftkit.files.families import names
from peftkit.files.families.layouts import Placement
from peftkit.files.families.names import Family
from peftkit.files.families.prefixes import COMPILED, FILE_PREFIXES, SPELLED, TEXT_ENCODERS, usual
from peftkit.files.formats.patch import AdapterFile
from peftkit.files.rename import nearest_rule, said

#: those that say nothing of the model. The second expert of Wan 2.2 is another model than the first, whose paths are
#: the same: its names go on a model that is said to be it, and on no other
_LEFT_OUT = tuple(prefix for prefix in FILE_PREFIXES if prefix != "transformer_2.")
#: how many names are compared with all there are, which takes long
HINTS = 8
#: what models call the layer whose weight is their embedding's, and that one
_HEADS, _EMBEDDINGS = ("lm_head", "output"), ("embed_tokens", "wte", "tok_embeddings")
#: a level of CLIP's modules that transformers 5 leaves out
_LEVEL = "text_model."
#: what checkpoints put before it
WEIGHT_PREFIXES = (
    "",
    "model.diffusion_model.",
    "diffusion_model.",
    "unet.",
    "transformer.",
    "transformer_2.",
    "net.",
    "model.model.",
)
#: the parts of a pipeline that can be another part's twin: the two experts of Wan 2.2
TWINS = ("transformer", "transformer_2")


class Resolver:
    """Names of a file -> the parts of weights they mean, in the order of the patch's rows.

    paths: module path -> its weight. places: canonical name of a family's module -> its weight, None where it is not.
    """

    def __init__(self, paths: Mapping[str, Placement], places: Callable[[str], Placement | None]) -> None:
        self._dotted: defaultdict[str, dict[str, Placement]] = defaultdict(dict)
        self._shown: dict[str, None] = {}  # the names that hints have
        for path, part in paths.items():
            whole = path.replace(COMPILED, "")
            for prefix in WEIGHT_PREFIXES:
                if whole.startswith(prefix):
                    self._dotted[whole.removeprefix(prefix)][path] = part
                    self._shown[whole.removeprefix(prefix)] = None
            for spelled in _of_text_encoder(path):
                self._dotted[spelled][path] = part
        self._underscored: defaultdict[str, dict[str, Placement]] = defaultdict(dict)
        for spelled, found in self._dotted.items():
            self._underscored[spelled.replace(".", "_")] |= found
        self._places = places
        self._hints = HINTS

    def __call__(self, name: str, families: Sequence[Family] = ()) -> tuple[Placement, ...]:
        """() for a name that means nothing here."""
        found = self._parts(name, families)
        return found or (self._parts(usual(name), families) if usual(name) != name else ())

    def _parts(self, name: str, families: Sequence[Family]) -> tuple[Placement, ...]:
        own = self._by_path(name)
        if own is not None:
            return (own,)
        for family in families:
            parts = tuple(part for m in family.find(name) if (part := self._places(m.name)) is not None)
            if parts and len(parts) == len(family.find(name)):
                swaps = family.swaps(name)
                return tuple(replace(part, swapped=part.swapped != swaps) for part in parts)
        return ()

    def hint(self, name: str, own: str) -> str:
        """The paths that come near a name, for a message; "" after the first few, which are all that one shows.

        own: what the file itself calls the module.
        """
        self._hints -= 1
        if tied := self.tied(name, own):
            return (
                f"{tied}. To change the output alone, load the file onto the model with tied='untie', merge there and "
                "save the model"
            )
        if self._hints < 0:
            return ""
        path = name.removeprefix(prefix_of(name))
        rule = nearest_rule(own, path, self._shown) if self._hints == HINTS - 1 else ""
        return did_you_mean(path, self._shown) + rule

    def tied(self, name: str, own: str) -> str:
        """Return what helps where a model has no weight of its own for its output, which is that of its embedding."""
        shared = next((path for path in self._dotted if path.rpartition(".")[2] in _EMBEDDINGS), "")
        if name.rpartition(".")[2] not in _HEADS or not shared:
            return ""
        return f" Its output layer has the weight of {shared}: {said(own, shared)} changes both"

    def _by_path(self, name: str) -> Placement | None:
        for table in (self._dotted, self._underscored):
            if name in table.get(name, ()):  # its own path goes before one that is called so behind a prefix
                return table[name][name]
            for prefix in _LEFT_OUT:
                found = table.get(name.removeprefix(prefix)) if name.startswith(prefix) else None
                if found is not None and len(set(found.values())) > 1:
                    raise AmbiguousFileError(f"{name} can be {' or '.join(sorted(found))}: {_deciding(name, found)}")
                if found is not None:
                    return next(iter(found.values()))
        return None


def _deciding(name: str, paths: Iterable[str]) -> str:
    """The options that say which of several paths a name means, for a message."""
    parts = sorted({path.partition(".")[0] for path in paths})
    options = [f"component={part!r}" for part in parts if part in TWINS]
    if len(options) < len(parts):
        options = [said(name, path) for path in sorted(paths)]
    return " or ".join(f"pass {option}" for option in options)


def _of_text_encoder(path: str) -> Iterator[str]:
    """How files may call a module of a pipeline's text encoder, by its path from the pipeline."""
    component, _, rest = path.partition(".")
    rest = rest.removeprefix(_LEVEL)
    for prefix in (f"{component}.", *TEXT_ENCODERS.get(component, ())) if component in TEXT_ENCODERS else ():
        yield prefix + rest
        yield prefix + _LEVEL + rest


def component_of(name: str, default: str) -> str:
    """The part of a pipeline that a name's prefix says it is of; the default where it says nothing, or either."""
    name = usual(name)
    denoiser = default if default == "unet" or default in TWINS else "unet"
    transformer = default if default in TWINS else "transformer"
    prefixes = {"unet.": "unet", "lora_unet_": denoiser, "lora_transformer_": transformer, "transformer.": transformer}
    prefixes |= {"diffusion_model.": denoiser, "model.diffusion_model.": denoiser, "transformer_2.": "transformer_2"}
    prefixes |= {p: c for c, ps in TEXT_ENCODERS.items() for p in (f"{c}.", *ps)}
    return next((c for p, c in prefixes.items() if name.startswith(p)), default)


def names_of(component: str, names: Iterable[str], families: Sequence[Family]) -> frozenset[str]:
    """Return those of a file's names that may be of a part of a pipeline.

    Files of either of two experts say "transformer.", which is the first of them only in a file of both.
    """
    names = list(names)
    both = any(component_of(name, "") == "transformer_2" for name in names)

    def is_of(name: str) -> bool:
        said = component_of(name, component)
        if both and component_of(name, "") == "transformer":
            said = "transformer"
        own = common(families, name) or said
        return own == component or (own in TWINS and said == component in TWINS)

    return frozenset(filter(is_of, names))


def plain(name: str) -> str:
    """A name without what trainers put before it and without dots: the same for all spellings of one path."""
    name = usual(name)
    return name.removeprefix(prefix_of(name)).replace(".", "_")


def prefix_of(name: str) -> str:
    """What a trainer put before a module's path."""
    return max((p for p in (*FILE_PREFIXES, *SPELLED) if name.startswith(p)), key=len)


def families_of(bundle: AdapterFile, among: Iterable[str] | None = None) -> tuple[Family, ...]:
    """The families that have all these modules of a file, told apart by the shapes of its patches; best first."""
    shapes: dict[str, tuple[int, int] | None] = {}
    for name in bundle.patches if among is None else among:
        shape = bundle.patches[name].shape
        shapes[usual(name)] = (shape.rows, shape.columns) if shape.rows and shape.columns else None
    return names.guess(shapes)


def common(families: Sequence[Family], name: str) -> str:
    """The component that a name means, "" where that is not known."""
    components = {module.name.partition(".")[0] for family in families for module in family.find(usual(name))}
    return components.pop() if len(components) == 1 else ""
