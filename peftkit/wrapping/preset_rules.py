"""A preset of LyCORIS as rules of `wrap`: its walk over a model, and its algorithms and options under our names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import nn

from peftkit.adapters import registry
from peftkit.errors import TargetError, error_context, require_choice, require_option
from peftkit.wrapping.pipeline import of_models, parts_of
from peftkit.wrapping.preset import Override, Preset, read_preset
from peftkit.wrapping.preset_options import Layer, adapter_of, algorithms, has_size, layer_of
from peftkit.wrapping.rule import Rule


@of_models
def preset_rules(
    model: nn.Module,
    preset: str | os.PathLike[str],
    kind: str = "lora",
    *,
    part: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    train_llm_adapter: bool = False,
    **options: Any,
) -> list[Rule]:
    """Return the rules that put the adapters on a model which a preset of LyCORIS asks for.

    The same modules get the same algorithm and rank as in LyCORIS 4.1.3. What neither the preset nor an argument says
    has this library's defaults.

    Args:
        model: a denoiser, a text encoder, another model, or a pipeline, whose parts are each looked up in the lists for
            its sort.
        preset: the name of a preset of LyCORIS ("full", "full-lin", "attn-mlp", "attn-only", "unet-only",
            "unet-transformer-only", "unet-convblock-only", "ia3"), or the path of a preset file.
        kind: the adapter of modules for which the preset's maps name none; "diag-oft" is "oft".
        part: whose lists are meant where the model is no pipeline: "unet", "text_encoder", or "model" for target_module
            and target_name, as in `lycoris.create_lycoris`. By default "model" where the preset has these, else "unet".
        rank: LyCORIS' dim.
        alpha: α.
        conv_rank: of convolutions with larger kernels, by default the rank.
        conv_alpha: α of those, by default `alpha`.
        train_llm_adapter: adapt the blocks of Anima's LLM adapter too.
        **options: other options of the kind; kinds of the maps get those that they have.

    Returns:
        Rules for `pk.wrap(model, rules=…)` and `pk.plan`, which name their layers.

    Raises:
        FileError: there is no such preset, or it has a key, an algorithm or an option that is not known.
        OptionError: rank or alpha is given, and no kind has it.
        TargetError: the preset adapts no layer of the model.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> rules = pk.preset_rules(model, "full", "loha", part="model", rank=2)
        >>> pk.wrap(model, rules=rules).modules
        ('0',)
    """
    require_choice("part", part, ("model", "unet", "text_encoder", None))
    read = read_preset(preset)
    kind = registry.get(algorithms().get(kind, kind)).kind
    sizes = {"rank": rank, "alpha": alpha}, {"rank": conv_rank or rank, "alpha": conv_alpha or alpha}
    groups: dict[str, tuple[list[str], str, dict[str, Any]]] = {}
    for name, layer, said in _layers(read, model, part, train_llm_adapter):
        given = {what: value for what, value in sizes[layer.large].items() if value is not None}
        with error_context(f"{read.source}: {said.where}"):
            own, its = adapter_of(said, kind, layer, given, options)
        groups.setdefault(f"{own} {its}", ([], own, its))[0].append(name)
    if not groups:
        raise TargetError(
            f"{read.source} adapts no layer of this {type(model).__name__}: its lists name other classes and names, or "
            "those of another part=; print(pk.plan(model, 'lora')) lists what there is"
        )
    kinds = {own for _, own, _ in groups.values()}
    for what, value in sizes[0].items():
        unused = value is not None and not any(has_size(own, what) for own in kinds)
        require_option(not unused, what, value, f"no {what}, as {', '.join(sorted(kinds))} has none,")
    return [Rule(names, own, **its) for names, own, its in groups.values()]


def _layers(
    preset: Preset, model: nn.Module, part: str | None, llm_adapter: bool
) -> Iterator[tuple[str, Layer, Override]]:
    """The layers that get an adapter, each once, by name, and what the preset says of it."""
    parts = {} if part else parts_of(model)
    alone = part or preset.default_part()
    seen: set[str] = set()
    for prefix, root in parts.items() or [("", model)]:
        own = alone if not prefix else "text_encoder" if prefix.startswith("text_encoder") else "unet"
        for name, said in preset.chosen(root, own, llm_adapter=llm_adapter):
            layer = layer_of(root.get_submodule(name))
            full = f"{prefix}.{name}" if prefix else name or "full"  # a model that is one layer has no name for it
            if layer is None or full in seen:
                continue
            if not layer.large or preset.large_kernels or said.options.get("dim"):
                seen.add(full)
                yield full, layer, said
