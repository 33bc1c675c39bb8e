"""The adapters that the patches of a file describe, on weights that they fit, on the base they were trained on."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from peftkit.adapters.base import Adapter
from peftkit.adapters.in_common import Held
from peftkit.errors import WrongBaseError, error_context
from peftkit.files.bind import bind
from peftkit.files.extras import PlacedExtras, listed, under_adapters
from peftkit.files.fingerprint import require_same_base
from peftkit.files.formats.patch import AdapterFile, Patch
from peftkit.wrapping.in_common import join_stored_
from peftkit.wrapping.sites import Site


def made(
    path: object,
    fitting: Sequence[tuple[Site, Patch]],
    bundle: AdapterFile,
    beside: PlacedExtras,
    distances: Mapping[str, float],
    extras: bool,
    other_base: bool,
) -> list[tuple[Site, Adapter]]:
    """The adapters of the patches, on the base they were trained on."""
    _require_trained_bases(path, bundle, extras or other_base)
    built: list[tuple[Site, Adapter]] = []
    own: dict[str, Adapter] = {}
    held: dict[Hashable, Held] = {}
    for site, patch in fitting:
        if patch.same_as and patch.same_as in own:  # the root of a model has the name ""
            built.append((site, own[patch.same_as]))
            continue
        trained = beside.of(site.module, site.slot.parameter)  # the weight itself may come with the file
        weight = site.matrix.detach() if trained is None else site.slot.geometry.matrix(site.slot.of(trained))
        own[site.name] = bind(patch, site.slot.geometry.shape, weight, f"{path}: {site.label}").train()
        with error_context(f"{path}: {site.label}"):
            join_stored_(own[site.name], patch.common, held)
        built.append((site, own[site.name]))
    kinds = {site.name: adapter.kind for site, adapter in built}
    bound = [site.name for site, adapter in built if adapter.derived() and not bundle.portable]
    quantised = [site.name for site, patch in fitting if patch.quantised or site.slot.base is not None]
    require_same_base(path, "this model", distances, kinds, bound, other_base, quantised)
    return built


def _require_trained_bases(path: object, bundle: AdapterFile, accepted: bool) -> None:
    """Refuse to leave out weights that the file's own adapters were trained on, unless another base is accepted."""
    lost = list(dict.fromkeys(under_adapters(bundle).values()))
    if lost and not accepted:
        raise WrongBaseError(
            f"{path}: extras=False leaves out {listed(lost)} that its adapters were trained on. Load them too, or pass "
            "other_base=True"
        )
