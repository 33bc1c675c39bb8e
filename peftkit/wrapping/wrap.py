"""Put adapters on a model, and take them off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftkit.adapters import registry
from peftkit.adapters.base import Adapter
from peftkit.errors import MergeStateError, OptionError, UnsupportedLayerError
from peftkit.kernels.torch_private import own_parameters
from peftkit.wrapping.classes import as_wrapped, become_
from peftkit.wrapping.divided import require_not_empty, settle
from peftkit.wrapping.extras import give_back_, require_returnable
from peftkit.wrapping.in_common import distinct_state, join_, require_together
from peftkit.wrapping.install import TRAINABLE, check_install, install
from peftkit.wrapping.installed import InstalledAdapter, adapted_modules, installed_adapters, names_of, one_name
from peftkit.wrapping.layer import WEIGHT, Adapted, base_class
from peftkit.wrapping.pipeline import of_models
from peftkit.wrapping.plan import Plan, plan
from peftkit.wrapping.rule import Rule
from peftkit.wrapping.sites import Site
from peftkit.wrapping.walk import dotted, named_modules


@of_models
def adapter_parameters(model: nn.Module, name: str | None = None) -> list[nn.Parameter]:
    """Return the trainable parameters of all adapters, or of one: what an optimiser takes.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Returns:
        The parameters that require gradients, each once.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or none at all.
        SharedParameterError: a parameter that adapters share has become several.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> optimizer = torch.optim.AdamW(pk.adapter_parameters(model), lr=1e-3)
        >>> sorted(tuple(p.shape) for p in pk.adapter_parameters(model))
        [(2, 8), (8, 2)]
    """
    settle(model)  # an optimiser of what a forward pass has left whole would change nothing
    names = names_of(model, name)
    require_together(model, names)
    installed = installed_adapters(model, names)
    return list(dict.fromkeys(p for at in installed for p in at.adapter.parameters() if p.requires_grad))


@of_models
def adapter_state_dict(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of one adapter by name, "<weight>.<tensor>": parameters and buffers, not copied.

    Args:
        model: a wrapped model.
        name: of the adapter; may be left out where there is only one.

    Returns:
        Name -> tensor; one that several layers share comes once, at the first. `peftkit.save` writes them to a file
        with what it takes to read them back.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or several and none is named.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> sorted(pk.adapter_state_dict(model))
        ['0.down', '0.up']
    """
    installed = installed_adapters(model, [one_name(model, name)])
    return {dotted(at.site, key): tensor for at, own in distinct_state(installed) for key, tensor in own.items()}


@of_models
def wrap(
    model: nn.Module,
    kind: str | None = None,
    *,
    targets: str | Sequence[str] = "full",
    exclude: str | Sequence[str] = (),
    rules: Sequence[Rule] | None = None,
    name: str = "default",
    route: str = "auto",
    tied: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> Plan:
    """Put an adapter on every targeted layer, in place, and freeze the rest of the model.

    Until it is trained, an adapter changes no bit of the model's output. The first wrap freezes all the model's
    parameters: make a new head trainable after it. Further wraps, under other names, add to the layer. If anything
    raises, the model is what it was.

    A target is one of, in this order:

    * a preset: "full" is every Linear and convolution; "attn-mlp" is the attention and MLP layers and the transformer
      blocks, with their projections and modulations; "attn-only" is the attention layers. No preset takes the output
      head of a language model, the module that its `get_output_embeddings()` returns, as it is large and often
      shares the embedding's weight; `targets=["full", "lm_head"]` takes it too. The head of a classifier is a layer
      like any other. Nor does a preset take stacks of experts: `targets=["full", "*experts*"]`.
    * "re:…", a regular expression that matches the whole name of a layer;
    * a glob over names, "*.to_q" or "blocks.[01].*";
    * the name of a layer, or of a module, for all layers inside it;
    * the name of a class, for all layers inside its instances: "Linear", "BasicTransformerBlock";
    * the end of layers' names, "q_proj" or "to_out.0", where it is none of the above.

    Norms and biases, "norm1" and "fc.bias", are for the kind "full", and are selected by targets that match no matrix:
    "LayerNorm", "*norm*", "bias", and by no preset.

    The projections of an nn.MultiheadAttention are layers of their own: q_proj, k_proj, v_proj and out_proj. So is a
    stack of experts, a parameter (E, out, in) or (E, in, out) of a module with `num_experts`: it gets one adapter, with
    a ΔW for each expert.

    Args:
        model: any module; its class stays, and its layers keep their identity, names and hooks. Or a pipeline of
            diffusers, whose denoiser and text encoders are one model to every function that takes a model.
        kind: the adapter: one of `peftkit.kinds()`, as "lora", "dora", "lokr".
        targets: one target or several; each must select something.
        exclude: targets to leave out; each must select something.
        rules: `Rule`s, in place of kind, targets, exclude and options: the first that matches a layer wins.
        name: what the adapter is called in the other verbs: letters, digits, "_" and "-".
        route: "auto" chooses for each call between the "factored" route, y + ΔW·x by the factors, and the "dense"
            one, (W + ΔW)·x; naming one pins it.
        tied: what to do with a targeted weight that another module shares: "skip" it; "untie" it, which gives the layer
            its own copy; or "share", which puts one adapter on all layers of the weight, so that they stay tied. By
            default it is refused, as merging would change both.
        dtype: of the adapters' parameters; by default the weight's, and at least float32.
        **options: the adapter's own: rank, alpha, dropout, …, which help(peftkit.adapters.LoRA) and its like explain.
            decompose=True makes a DoRA of any adapter whose ΔW does not depend on the base.

    Returns:
        The plan that was carried out; print it for a table.

    Raises:
        TargetError: a target matches no layer, or only layers that are taken or excluded.
        OptionError: an option is unknown, or its value is not possible for a layer.
        UnknownAdapterError: no adapter is called `kind`.
        UnsupportedLayerError: what a target matches cannot be adapted: it is no Linear or convolution, is quantised in
            a format that is not read, ….
        TiedWeightsError: a targeted weight is shared, and tied was not given.
        DuplicateNameError: a targeted layer has an adapter of that name.
        MergeStateError: a targeted layer has adapters merged into its weight.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> x = torch.randn(2, 8)
        >>> before = model(x)
        >>> plan = pk.wrap(model, "lora", rank=4, alpha=8)
        >>> plan.modules, plan.parameters
        (('0', '2'), 176)
        >>> torch.equal(model(x), before)
        True
    """
    planned = plan(
        model, kind, targets=targets, exclude=exclude, rules=rules, name=name, tied=tied, dtype=dtype, **options
    )
    check_install([entry.site for entry in planned.entries], 1.0, route)
    inputs = [entry for entry in planned.entries if entry.route == "input"]
    if inputs and route == "dense":
        raise OptionError(
            f"{inputs[0].site.label}: route='dense' was given, but the change of {inputs[0].kind} depends on the "
            "layer's input: no matrix stands for it. Leave route out"
        )
    built: dict[str, tuple[Site, Adapter]] = {}
    for entry in planned.entries:
        if entry.site.name in planned.shared:
            built[entry.site.name] = entry.site, built[planned.shared[entry.site.name]][1]
            continue
        matrix, shape = entry.site.matrix.detach(), entry.site.slot.geometry.shape
        adapter = registry.build(entry.kind, shape, matrix, dtype, **entry.options)
        built[entry.site.name] = entry.site, adapter
    join_(dict.fromkeys(adapter for _, adapter in built.values()))
    install(model, list(built.values()), name, route=route, untie=planned.untie)
    return planned


@of_models
def unwrap(model: nn.Module, name: str | None = None, *, keep_merged: bool = False) -> tuple[str, ...]:
    """Take one adapter, or all, off the model, and give parameters that its file was loaded over their values back.

    The last adapter to go leaves the modules as they were before the first wrap, with their gradient flags.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.
        keep_merged: leave merged weights, and what came with the file, as they are, where otherwise it raises.

    Returns:
        The names of the modules that the adapters were on.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or none at all.
        MergeStateError: the adapter is merged and keep_merged is False, or nothing is merged and it is True.
        UnsupportedLayerError: the layer's class was changed after it was wrapped.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> pk.unwrap(model)
        ('0',)
        >>> type(model[0])
        <class 'torch.nn.modules.linear.Linear'>
    """
    names = names_of(model, name)
    settle(model)
    affected = {n: host for n, host in adapted_modules(model).items() if set(names) & set(host.adapters)}
    for host_name, host in affected.items():
        _check_removal(host_name or "the model", host, names, keep_merged)
    require_returnable(model, names, keep=keep_merged)
    if keep_merged and not any(host.adapter_state.merged for host in affected.values()):
        raise MergeStateError("keep_merged=True was given, but nothing is merged: merge(model) first")
    give_back_(model, names, keep=keep_merged)
    for host in affected.values():
        state = host.adapter_state
        for own in [own for own in names if own in host.adapters]:
            del host.adapters[own], state.strengths[own]
        baked = state.merged is not None and not set(state.merged.names) & set(host.adapters)
        if baked:
            state.merged = None
        state.refresh()
        if not len(host.adapters):
            _detach(host, baked)
    if not adapted_modules(model):
        for _, module in named_modules(model):
            for own in module.__dict__.pop(TRAINABLE, ()):
                if own_parameters(own.module).get(own.key) is not None:
                    own.tensor.requires_grad_(True)
    return tuple(affected)


def _check_removal(where: str, host: Adapted, names: Sequence[str], keep_merged: bool) -> None:
    if not as_wrapped(host):
        raise UnsupportedLayerError(
            f"{where} was made a {type(host).__name__} after it was wrapped (by parametrize or the like): "
            "undo that before unwrapping it"
        )
    merged = host.adapter_state.merged
    if merged is None or not set(merged.names) & set(names):
        return
    if not keep_merged:
        raise MergeStateError(
            f"{', '.join(merged.names)} is merged into {where}: restore(model) first, "
            "or pass keep_merged=True to leave it in the weights"
        )
    if set(merged.names) - set(names):
        raise MergeStateError(
            f"{', '.join(merged.names)} are merged together into {where}: unwrap them together, or restore first"
        )


def take_off(at: InstalledAdapter) -> None:
    """Take one adapter off one weight that nothing is merged into; others of its name stay."""
    host, held = at.host, at.host.adapters[at.name]
    if isinstance(held, nn.ModuleDict):
        del held[at.slot_name or WEIGHT]
    if not isinstance(held, nn.ModuleDict) or not len(held):
        del host.adapters[at.name], host.adapter_state.strengths[at.name]
    host.adapter_state.refresh()
    if not len(host.adapters):
        _detach(host, baked=False)


def _detach(host: Adapted, baked: bool) -> None:
    state = host.adapter_state
    if not baked:  # a merged copy stays untied: the shared weight never had the adapter in it
        own_parameters(host).update(state.tied)
    del host.adapters, host.adapter_state
    become_(host, base_class(host))


@of_models
def reset_adapters(model: nn.Module, name: str | None = None) -> None:
    """Give adapters the values that they start with, in place: ΔW is zero, and what they read of the base is read.

    For a model that was wrapped on the meta device: after `to_empty` and after its weights are loaded, before
    `fully_shard`. The random values are drawn anew.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or none at all.
        UnsetAdapterError: a weight or an adapter is on the meta device, or divided among processes.

    Example:
        >>> with torch.device("meta"):
        ...     model = nn.Sequential(nn.Linear(8, 8))
        >>> _ = pk.wrap(model, "lora", rank=2)
        >>> base = nn.Sequential(nn.Linear(8, 8))
        >>> _ = model.to_empty(device="cpu").load_state_dict(base.state_dict(), strict=False)
        >>> pk.reset_adapters(model)
        >>> torch.equal(model(torch.ones(8)), base(torch.ones(8)))
        True
    """
    require_not_empty(model)
    for at in installed_adapters(model, names_of(model, name)):
        at.require_loaded()
        at.adapter.reset_parameters(at.base)


@of_models
@torch.no_grad()
def project_(model: nn.Module, name: str | None = None) -> None:
    """Move the adapters' parameters, in place, into the set that the algorithm allows, after an optimiser step.

    Only LoLDU with epsilon has such a set: ‖ΔW‖ ≤ epsilon. The parameters of the others stay as they are.

    Args:
        model: a wrapped model.
        name: of one adapter; by default all.

    Raises:
        UnknownAdapterError: there is no adapter of that name, or none at all.

    Example:
        >>> model = nn.Linear(8, 8)
        >>> _ = pk.wrap(model, "loldu", rank=2, epsilon=0.1)
        >>> optimizer = torch.optim.SGD(pk.adapter_parameters(model), lr=0.1)
        >>> hook = optimizer.register_step_post_hook(lambda *_: pk.project_(model))
    """
    for at in installed_adapters(model, names_of(model, name)):
        at.adapter.project_()
