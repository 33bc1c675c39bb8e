"""Tell one base weight from another by a few entries, which survive a cast; refuse a file trained on another base."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from peftkit.adapters import registry
from peftkit.errors import WrongBaseError
from peftkit.files.formats import native
from peftkit.files.formats.native import sample_index as sample_index
from peftkit.files.formats.native import samples as samples


def require_same_base(
    file: object,
    base: str,
    distances: Mapping[str, float],
    kinds: Mapping[str, str],
    bound: Collection[str],
    other_base: bool,
    quantised: Collection[str] = (),
) -> None:
    """Raise WrongBaseError if a file's fingerprints are of other weights than the base's.

    Args:
        file: the adapter file, for the error.
        base: the base, for the error.
        distances: weight -> how far it is from its fingerprint.
        kinds: weight -> kind of its adapter.
        bound: the weights whose ΔW is made of factors of their base; other_base does not help these.
        other_base: whether the user accepts another base.
        quantised: the weights that are quantised, in the base or where the file was trained.
    """
    near = set(quantised) - set(bound)
    bounds = {name: native.SAME_QUANTISED if name in near else native.SAME_BASE for name in distances}
    far = [name for name, distance in distances.items() if distance > bounds[name]]
    lost = [name for name in far if name in bound]
    if not far or (other_base and not lost):
        return
    worst = max(far, key=lambda name: distances[name])
    meaning = "; ".join(f"{k} {registry.get(k).on_another_base}" for k in sorted({kinds[n] for n in lost or far}))
    advice = "" if lost else " To use it there on purpose, pass other_base=True."
    raise WrongBaseError(
        f"{file} was trained on another base than {base}: {len(far)} of {len(distances)} weights differ, most of all "
        f"{worst or 'its own'} by {100 * distances[worst]:.3g} %. On another base, {meaning}.{advice}"
    )
